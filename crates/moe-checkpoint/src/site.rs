//! Addresses of the linear maps of a model, and of the matrices that they are made of.

use std::fmt;

use crate::human::variant;
use crate::{ExpertPart, LayerRole};

/// A linear map of a model: the address by which adapters, training and files mean one matrix, whatever tensors hold
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Site {
    /// A map of decoder layer `.0`.
    Layer(usize, LayerSite),
    /// A map of a routed expert.
    Expert {
        /// Decoder layer.
        layer: usize,
        /// Expert in the layer.
        expert: usize,
        /// Which map.
        map: ExpertSite,
    },
}

impl Site {
    /// Its decoder layer.
    pub fn layer(&self) -> usize {
        match self {
            Self::Layer(layer, _) | Self::Expert { layer, .. } => *layer,
        }
    }

    /// Its name in lists of parameters: `layers.3.query`, `layers.3.experts.7.gate_up`.
    pub fn path(&self) -> String {
        match self {
            Self::Layer(layer, site) => format!("layers.{layer}.{}", site.name()),
            Self::Expert { layer, expert, map } => format!("layers.{layer}.experts.{expert}.{}", map.name()),
        }
    }

    /// Whether it is in the attention half of its layer.
    pub fn is_attention(&self) -> bool {
        matches!(self, Self::Layer(_, site) if site.is_attention())
    }
}

/// A linear map of a decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum LayerSite {
    /// `[heads * D, H]`.
    Query,
    /// `[kv_heads * D, H]`.
    Key,
    /// `[kv_heads * D_v, H]`.
    Value,
    /// Rows of queries, keys and values in one matrix `[(heads + 2 kv_heads) * D, H]`.
    Qkv,
    /// Gates on the outputs of the heads `[heads * D, H]`; one per head `[heads, H]`.
    AttentionGate,
    /// `[H, heads * D_v]`.
    Output,
    /// Queries, keys and values of gated DeltaNet `[2 key_heads * D_k + value_heads * D_v, H]`.
    DeltaQkv,
    /// Gate on the output of gated DeltaNet `[value_heads * D_v, H]`.
    DeltaGate,
    /// Down projection of the gate on the output of Kimi delta attention `[D, H]`.
    DeltaGateDown,
    /// Up projection of that `[heads * D, D]`.
    DeltaGateUp,
    /// How much a delta rule writes `[value_heads, H]`.
    DeltaBeta,
    /// How fast gated DeltaNet forgets `[value_heads, H]`, or Kimi delta attention `[heads * D, H]`.
    DeltaDecay,
    /// Down projection of how fast Kimi delta attention forgets `[D, H]`.
    DeltaDecayDown,
    /// Up projection of that `[heads * D, D]`.
    DeltaDecayUp,
    /// Queries, keys, values and gates of gated DeltaNet, per key head `[2 key_heads * D_k + 2 value_heads * D_v, H]`.
    DeltaQkvGate,
    /// How much gated DeltaNet writes and how fast it forgets, per key head `[2 value_heads, H]`.
    DeltaBetaDecay,
    /// `[H, value_heads * D_v]` of gated DeltaNet.
    DeltaOutput,
    /// Gate, inputs and steps of a state space layer `[2 heads * P + 2 groups * N + heads, H]`.
    MambaInput,
    /// `[H, heads * P]` of a state space layer.
    MambaOutput,
    /// Queries, keys and values of lightning attention, head by head `[3 heads * D, H]`.
    LightningQkv,
    /// Gate on its output `[heads * D, H]`.
    LightningGate,
    /// `[H, heads * D]` of lightning attention.
    LightningOutput,
    /// Both gates and the input of a short convolution `[3 H, H]`.
    ConvolutionInput,
    /// `[H, H]` of a short convolution.
    ConvolutionOutput,
    /// To the latent of queries `[R_q, H]`.
    LatentQueryDown,
    /// From the latent of queries `[heads * D, R_q]`.
    LatentQueryUp,
    /// To the latent of keys and values, and the rotary key `[R_kv + rope, H]`.
    LatentKvDown,
    /// From the latent to keys and values `[heads * (nope + value), R_kv]`.
    LatentKvUp,
    /// To the one head of keys that are values, too `[D, H]`.
    KeyValue,
    /// From what groups of heads give `[H, groups * R]`.
    OutputJoin,
    /// To the keys that are compressed `[D, H]` or `[2 D, H]`.
    CompressorKey,
    /// To the logits of their weights, of the same shape.
    CompressorGate,
    /// Keys, then values, of a mixture of attention heads `[2 kv_heads * D, H]`.
    HeadKeyValue,
    /// `[E, H]`.
    Router,
    /// To the latent that routed experts read `[L, H]`.
    ExpertLatentDown,
    /// From the sum of what they give there `[H, L]`.
    ExpertLatentUp,
    /// Gate rows, then up rows, of the shared expert `[2 I, H]`; up rows alone `[I, H]` where it has no gate.
    SharedGateUp,
    /// The same in one matrix.
    SharedPacked,
    /// `[H, I]` of the shared expert.
    SharedDown,
    /// Gate on the output of the shared expert `[1, H]`.
    SharedExpertGate,
    /// Gate rows, then up rows, of a dense layer `[2 I, H]`; up rows alone `[I, H]` where it has no gate.
    DenseGateUp,
    /// `[H, I]` of a dense layer.
    DenseDown,
    /// Gate on the layer's own input `[P, H]`.
    LayerInputGate,
    /// From that to the residual stream `[H, P]`.
    LayerInputOutput,
}

impl fmt::Display for LayerSite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl LayerSite {
    /// All of them.
    pub const ALL: [Self; 44] = [
        Self::Query,
        Self::Key,
        Self::Value,
        Self::Qkv,
        Self::AttentionGate,
        Self::Output,
        Self::DeltaQkv,
        Self::DeltaGate,
        Self::DeltaGateDown,
        Self::DeltaGateUp,
        Self::DeltaBeta,
        Self::DeltaDecay,
        Self::DeltaDecayDown,
        Self::DeltaDecayUp,
        Self::DeltaQkvGate,
        Self::DeltaBetaDecay,
        Self::DeltaOutput,
        Self::MambaInput,
        Self::MambaOutput,
        Self::LightningQkv,
        Self::LightningGate,
        Self::LightningOutput,
        Self::ConvolutionInput,
        Self::ConvolutionOutput,
        Self::LatentQueryDown,
        Self::LatentQueryUp,
        Self::LatentKvDown,
        Self::LatentKvUp,
        Self::KeyValue,
        Self::OutputJoin,
        Self::CompressorKey,
        Self::CompressorGate,
        Self::HeadKeyValue,
        Self::Router,
        Self::ExpertLatentDown,
        Self::ExpertLatentUp,
        Self::SharedGateUp,
        Self::SharedPacked,
        Self::SharedDown,
        Self::SharedExpertGate,
        Self::DenseGateUp,
        Self::DenseDown,
        Self::LayerInputGate,
        Self::LayerInputOutput,
    ];

    /// The tensors it is made of, whose rows follow each other.
    pub fn roles(self) -> &'static [LayerRole] {
        match self {
            Self::Query => &[LayerRole::Query],
            Self::Key => &[LayerRole::Key],
            Self::Value => &[LayerRole::Value],
            Self::Qkv => &[LayerRole::Qkv],
            Self::AttentionGate => &[LayerRole::AttentionGate],
            Self::Output => &[LayerRole::Output],
            Self::DeltaQkv => &[LayerRole::DeltaQkv],
            Self::DeltaGate => &[LayerRole::DeltaGate],
            Self::DeltaBeta => &[LayerRole::DeltaBeta],
            Self::DeltaDecay => &[LayerRole::DeltaDecay],
            Self::DeltaGateDown => &[LayerRole::DeltaGateDown],
            Self::DeltaGateUp => &[LayerRole::DeltaGateUp],
            Self::DeltaDecayDown => &[LayerRole::DeltaDecayDown],
            Self::DeltaDecayUp => &[LayerRole::DeltaDecayUp],
            Self::DeltaQkvGate => &[LayerRole::DeltaQkvGate],
            Self::DeltaBetaDecay => &[LayerRole::DeltaBetaDecay],
            Self::DeltaOutput => &[LayerRole::DeltaOutput],
            Self::MambaInput => &[LayerRole::MambaInput],
            Self::MambaOutput => &[LayerRole::MambaOutput],
            Self::LightningQkv => &[LayerRole::LightningQkv],
            Self::LightningGate => &[LayerRole::LightningGate],
            Self::LightningOutput => &[LayerRole::LightningOutput],
            Self::ConvolutionInput => &[LayerRole::ConvolutionInput],
            Self::ConvolutionOutput => &[LayerRole::ConvolutionOutput],
            Self::LatentQueryDown => &[LayerRole::LatentQueryDown],
            Self::LatentQueryUp => &[LayerRole::LatentQueryUp],
            Self::LatentKvDown => &[LayerRole::LatentKvDown],
            Self::LatentKvUp => &[LayerRole::LatentKvUp],
            Self::KeyValue => &[LayerRole::KeyValue],
            Self::OutputJoin => &[LayerRole::OutputJoin],
            Self::CompressorKey => &[LayerRole::CompressorKey],
            Self::CompressorGate => &[LayerRole::CompressorGate],
            Self::HeadKeyValue => &[LayerRole::HeadKeyValue],
            Self::Router => &[LayerRole::Router],
            Self::ExpertLatentDown => &[LayerRole::ExpertLatentDown],
            Self::ExpertLatentUp => &[LayerRole::ExpertLatentUp],
            Self::SharedGateUp => &[LayerRole::SharedGate, LayerRole::SharedUp],
            Self::SharedPacked => &[LayerRole::SharedGateUp],
            Self::SharedDown => &[LayerRole::SharedDown],
            Self::SharedExpertGate => &[LayerRole::SharedExpertGate],
            Self::DenseGateUp => &[LayerRole::DenseGate, LayerRole::DenseUp],
            Self::DenseDown => &[LayerRole::DenseDown],
            Self::LayerInputGate => &[LayerRole::LayerInputGate],
            Self::LayerInputOutput => &[LayerRole::LayerInputOutput],
        }
    }

    /// The map that a tensor belongs to, and its place among the map's tensors; `None` for one that is no matrix of a
    /// linear map.
    pub fn of(role: LayerRole) -> Option<(Self, usize)> {
        Self::ALL.into_iter().find_map(|site| Some((site, site.roles().iter().position(|r| *r == role)?)))
    }

    /// Its name in lists of parameters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Query => "query",
            Self::Key => "key",
            Self::Value => "value",
            Self::Qkv => "qkv",
            Self::AttentionGate => "attention_gate",
            Self::Output => "output",
            Self::DeltaQkv => "delta_qkv",
            Self::DeltaGate => "delta_gate",
            Self::DeltaBeta => "delta_beta",
            Self::DeltaDecay => "delta_decay",
            Self::DeltaGateDown => "delta_gate_down",
            Self::DeltaGateUp => "delta_gate_up",
            Self::DeltaDecayDown => "delta_decay_down",
            Self::DeltaDecayUp => "delta_decay_up",
            Self::DeltaQkvGate => "delta_qkv_gate",
            Self::DeltaBetaDecay => "delta_beta_decay",
            Self::DeltaOutput => "delta_output",
            Self::MambaInput => "mamba_input",
            Self::MambaOutput => "mamba_output",
            Self::LightningQkv => "lightning_qkv",
            Self::LightningGate => "lightning_gate",
            Self::LightningOutput => "lightning_output",
            Self::ConvolutionInput => "convolution_input",
            Self::ConvolutionOutput => "convolution_output",
            Self::LatentQueryDown => "latent_query_down",
            Self::LatentQueryUp => "latent_query_up",
            Self::LatentKvDown => "latent_kv_down",
            Self::LatentKvUp => "latent_kv_up",
            Self::KeyValue => "key_value",
            Self::OutputJoin => "output_join",
            Self::CompressorKey => "compressor_key",
            Self::CompressorGate => "compressor_gate",
            Self::HeadKeyValue => "head_key_value",
            Self::Router => "router",
            Self::ExpertLatentDown => "expert_latent_down",
            Self::ExpertLatentUp => "expert_latent_up",
            Self::SharedGateUp => "shared_gate_up",
            Self::SharedPacked => "shared_packed",
            Self::SharedDown => "shared_down",
            Self::SharedExpertGate => "shared_expert_gate",
            Self::DenseGateUp => "dense_gate_up",
            Self::DenseDown => "dense_down",
            Self::LayerInputGate => "layer_input_gate",
            Self::LayerInputOutput => "layer_input_output",
        }
    }

    /// Whether it is in the attention half of the layer.
    pub fn is_attention(self) -> bool {
        use LayerSite::*;
        let delta =
            matches!(self, DeltaQkv | DeltaGate | DeltaBeta | DeltaDecay | DeltaQkvGate | DeltaBetaDecay | DeltaOutput);
        let low_rank = matches!(self, DeltaGateDown | DeltaGateUp | DeltaDecayDown | DeltaDecayUp);
        let latent = matches!(self, LatentQueryDown | LatentQueryUp | LatentKvDown | LatentKvUp);
        let mamba = matches!(self, MambaInput | MambaOutput);
        let lightning = matches!(self, LightningQkv | LightningGate | LightningOutput);
        let compressed = matches!(self, KeyValue | OutputJoin | CompressorKey | CompressorGate);
        let convolution = matches!(self, ConvolutionInput | ConvolutionOutput);
        let softmax = matches!(self, Query | Key | Value | Qkv | AttentionGate | Output | HeadKeyValue);
        delta || low_rank || latent || mamba || lightning || convolution || compressed || softmax
    }
}

/// A linear map of a routed expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ExpertSite {
    /// Gate rows, then up rows `[2 I, H]`; up rows alone `[I, H]` of experts without a gate.
    GateUp,
    /// `[H, I]`.
    Down,
}

impl fmt::Display for ExpertSite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl ExpertSite {
    /// The parts of an expert it is made of, whose rows follow each other.
    pub fn parts(self) -> &'static [ExpertPart] {
        match self {
            Self::GateUp => &[ExpertPart::Gate, ExpertPart::Up],
            Self::Down => &[ExpertPart::Down],
        }
    }

    /// Its name in lists of parameters.
    pub fn name(self) -> &'static str {
        match self {
            Self::GateUp => "gate_up",
            Self::Down => "down",
        }
    }
}

/// A matrix of a model, the address by which files of adapters mean it: a tensor that is a linear map, or of a map that
/// is several tensors, one of them. What is computed is a [`Site`]: [`MatrixId::site`] says which, and which of its
/// rows. `H` is the hidden size, `I` the width of an expert, `V` the size of the vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MatrixId {
    /// A matrix of decoder layer `.0`.
    Layer(usize, LayerRole),
    /// A matrix of a routed expert.
    Expert {
        /// Decoder layer.
        layer: usize,
        /// Expert in the layer.
        expert: usize,
        /// Which matrix.
        part: ExpertMatrix,
    },
    /// The token embeddings `[V, H]`.
    Embedding,
    /// The output head `[V, H]`.
    Head,
}

/// A matrix of a routed expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ExpertMatrix {
    /// Gate projection `[I, H]`.
    Gate,
    /// Up projection `[I, H]`.
    Up,
    /// Both, gate rows first `[2 I, H]`, as one matrix: low-rank additions to it share their `A`.
    GateUp,
    /// Down projection `[H, I]`.
    Down,
}

impl fmt::Display for ExpertMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&variant(self))
    }
}

impl MatrixId {
    /// Its decoder layer, if it is in one.
    pub fn layer(&self) -> Option<usize> {
        match self {
            Self::Layer(layer, _) | Self::Expert { layer, .. } => Some(*layer),
            Self::Embedding | Self::Head => None,
        }
    }

    /// The linear map that it is a matrix of, and its place among the matrices of the same number of rows that the map
    /// is made of: `(place, how many)`, `(0, 1)` for the whole map. `None` for embeddings and output head, which are no
    /// maps of a layer, and for tensors that are no matrix of a map.
    pub fn site(&self) -> Option<(Site, (usize, usize))> {
        match *self {
            Self::Layer(layer, role) => {
                let (site, place) = LayerSite::of(role)?;
                Some((Site::Layer(layer, site), (place, site.roles().len())))
            }
            Self::Expert { layer, expert, part } => {
                let (map, place) = match part {
                    ExpertMatrix::Gate => (ExpertSite::GateUp, (0, 2)),
                    ExpertMatrix::Up => (ExpertSite::GateUp, (1, 2)),
                    ExpertMatrix::GateUp => (ExpertSite::GateUp, (0, 1)),
                    ExpertMatrix::Down => (ExpertSite::Down, (0, 1)),
                };
                Some((Site::Expert { layer, expert, map }, place))
            }
            Self::Embedding | Self::Head => None,
        }
    }
}

impl fmt::Display for MatrixId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layer(layer, role) => write!(f, "{role} of layer {layer}"),
            Self::Expert { layer, expert, part } => write!(f, "{part} of expert {expert} of layer {layer}"),
            Self::Embedding => f.write_str("the embeddings"),
            Self::Head => f.write_str("the output head"),
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layer(layer, site) => write!(f, "{site} of layer {layer}"),
            Self::Expert { layer, expert, map } => write!(f, "{map} of expert {expert} of layer {layer}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_matrix_is_rows_of_one_linear_map() {
        for site in LayerSite::ALL {
            for (place, role) in site.roles().iter().enumerate() {
                let found = MatrixId::Layer(3, *role).site();
                assert_eq!(found, Some((Site::Layer(3, site), (place, site.roles().len()))), "{role:?}");
            }
        }
        let expert =
            |part| MatrixId::Expert { layer: 1, expert: 2, part }.site().map(|(site, place)| (site.path(), place));
        let gate_up = "layers.1.experts.2.gate_up".to_string();
        assert_eq!(expert(ExpertMatrix::Gate), Some((gate_up.clone(), (0, 2))));
        assert_eq!(expert(ExpertMatrix::Up), Some((gate_up.clone(), (1, 2))));
        assert_eq!(expert(ExpertMatrix::GateUp), Some((gate_up, (0, 1))));
        assert_eq!(expert(ExpertMatrix::Down), Some(("layers.1.experts.2.down".to_string(), (0, 1))));
        assert_eq!(MatrixId::Layer(0, LayerRole::AttentionNorm).site(), None);
        assert_eq!((MatrixId::Head.site(), MatrixId::Embedding.site()), (None, None));
    }
}

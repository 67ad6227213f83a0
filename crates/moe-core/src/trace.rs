//! What a sweep shows to the code that watches it.
//!
//! An [`Observer`] says which [`Signals`] it needs; the engine computes nothing nobody asked for. It then sees every
//! MoE layer once ([`LayerTrace`], routing) and every expert that received tokens once ([`ExpertTrace`]) per wave.
//! With gradients asked for, layers come from the last to the first MoE layer; without, from the first to the last.
//! Never-routed experts produce no [`ExpertTrace`]. Waves hold no padding, so no statistic can see any.

use std::ops::{BitOr, Range};

use burn::tensor::Tensor;

use crate::{error::Result, experts::ExpertTensors, host::HostView};

/// Which quantities an [`Observer`] needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signals {
    /// Router logits, selected experts and routing weights of every token.
    pub routing: bool,
    /// Unit activations `u = act(gate x) * (up x)` of the routed tokens.
    pub units: bool,
    /// Expert outputs `f(x) = down u`, before the routing weight.
    pub outputs: bool,
    /// Gradients at the expert's output, units and pre-activations: costs a backward sweep.
    pub gradients: bool,
    /// Gradients of the router's logits and of the routing weights: costs a backward sweep, too.
    pub router_gradients: bool,
    /// Gradients of what the model's adapters train, added up in the adapters: costs a backward sweep, as deep as they
    /// are.
    pub parameters: bool,
    /// The input of every decoder layer.
    pub hidden: bool,
    /// The residual stream before and after the feed-forward half of every MoE layer.
    pub streams: bool,
    /// The logits of every token.
    pub logits: bool,
}

impl Signals {
    /// No signal at all.
    pub const NONE: Self = Self {
        routing: false,
        units: false,
        outputs: false,
        gradients: false,
        router_gradients: false,
        parameters: false,
        hidden: false,
        streams: false,
        logits: false,
    };
    /// Routing only.
    pub const ROUTING: Self = Self { routing: true, ..Self::NONE };
    /// Unit activations.
    pub const UNITS: Self = Self { units: true, ..Self::NONE };
    /// Expert outputs.
    pub const OUTPUTS: Self = Self { outputs: true, ..Self::NONE };
    /// Gradients of the loss, by a backward sweep.
    pub const GRADIENTS: Self = Self { gradients: true, ..Self::NONE };
    /// Gradients of the router.
    pub const ROUTER_GRADIENTS: Self = Self { router_gradients: true, ..Self::NONE };

    /// Gradients of what is trained.
    pub const PARAMETERS: Self = Self { parameters: true, ..Self::NONE };

    /// The residual stream around MoE layers.
    pub const STREAMS: Self = Self { streams: true, ..Self::NONE };

    /// Whether experts must be visited at all.
    pub fn experts(&self) -> bool {
        self.units || self.outputs || self.gradients
    }

    /// Whether there must be a backward sweep.
    pub fn backward(&self) -> bool {
        self.gradients || self.router_gradients || self.parameters
    }
}

impl BitOr for Signals {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self {
            routing: self.routing || other.routing,
            units: self.units || other.units,
            outputs: self.outputs || other.outputs,
            gradients: self.gradients || other.gradients,
            router_gradients: self.router_gradients || other.router_gradients,
            parameters: self.parameters || other.parameters,
            hidden: self.hidden || other.hidden,
            streams: self.streams || other.streams,
            logits: self.logits || other.logits,
        }
    }
}

/// The wave a trace belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaveInfo {
    /// Wave id.
    pub id: u64,
    /// Tokens in the wave, T.
    pub tokens: usize,
    /// Their ids `[T]`; empty where they are not known.
    pub ids: Vec<u32>,
    /// Token range and number of predicted tokens of each sequence, in order.
    pub sequences: Vec<SequenceInfo>,
}

/// One sequence of a wave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceInfo {
    /// Its rows among the wave's tokens.
    pub tokens: Range<usize>,
    /// How many of its tokens are predicted, that is, count in the loss.
    pub loss_tokens: usize,
}

impl WaveInfo {
    /// Of the wave itself.
    pub(crate) fn of(wave: &crate::data::Wave) -> Self {
        let mut info = Self { id: wave.id, tokens: 0, ids: Vec::new(), sequences: Vec::new() };
        for sequence in &wave.sequences {
            let start = info.ids.len();
            info.ids.extend_from_slice(&sequence.ids);
            info.sequences.push(SequenceInfo { tokens: start..info.ids.len(), loss_tokens: sequence.loss_tokens() });
        }
        info.tokens = info.ids.len();
        info
    }

    /// Predicted tokens of the whole wave.
    pub fn loss_tokens(&self) -> usize {
        self.sequences.iter().map(|s| s.loss_tokens).sum()
    }
}

/// Routing of one MoE layer for all tokens of a wave.
#[derive(Debug)]
pub struct LayerTrace<'a> {
    /// Decoder layer index.
    pub layer: usize,
    /// The wave.
    pub wave: &'a WaveInfo,
    /// Number of experts, E.
    pub experts: usize,
    /// Experts per token, k.
    pub top_k: usize,
    /// Router logits `[T, E]`, before any normalization; minus infinity for experts that an overlay removed.
    pub logits: &'a [f32],
    /// Selected experts `[T, k]`, best first.
    pub selected: &'a [u32],
    /// Routing weights of the selected experts `[T, k]`, as the model applies them.
    pub weights: &'a [f32],
    /// Factor that all weights carry (`routed_scaling_factor`); 1 in models without one.
    pub scale: f32,
    /// Choices `[T, k]` that no expert sees: those of identity experts, in whose place another expert stands without
    /// weight, and those that an overlay skips. Empty where there are none.
    pub idle: &'a [bool],
}

impl LayerTrace<'_> {
    /// Whether the expert of this choice, counted over tokens and their `k` choices, sees the token.
    pub fn is_seen(&self, slot: usize) -> bool {
        !self.idle.get(slot).copied().unwrap_or(false)
    }
}

/// Choices of identity experts of one MoE layer for all tokens of a wave.
#[derive(Debug)]
pub struct IdentityTrace<'a> {
    /// Decoder layer index.
    pub layer: usize,
    /// Number of identity experts, Z.
    pub identities: usize,
    /// Their router logits `[T, Z]`.
    pub logits: &'a [f32],
    /// Sum of the routing weights of those that a token goes to `[T]`.
    pub weights: &'a [f32],
}

/// The residual stream around the feed-forward half of an MoE layer, for one wave.
#[derive(Debug)]
pub struct LayerOutput<'a> {
    /// Decoder layer index.
    pub layer: usize,
    /// Position of the wave in the list that was given; 0 where waves are run one by one.
    pub position: usize,
    /// The wave.
    pub wave: &'a WaveInfo,
    /// The stream that enters it `[T, H]`, not normed.
    pub stream: &'a Tensor<2>,
    /// What it is added to `[T, H]`: the stream, in some families normed and with a factor, and any bias.
    pub input: &'a Tensor<2>,
    /// What its norm reads `[T, H]`: the same, or the input of the layer where both halves are side by side.
    pub read: &'a Tensor<2>,
    /// After it `[T, H]`: `input + residual_factor * (shared + sum of routing weight * expert)`, without what a layer
    /// adds of an [input of its own](moe_checkpoint::LayerInputs).
    pub output: &'a Tensor<2>,
    /// Factor on what the experts add to the stream; 1 in most families.
    pub residual_factor: f32,
}

impl<'a> LayerOutput<'a> {
    /// What runs the half again.
    pub fn half(&self) -> HalfInput<'a> {
        HalfInput { stream: self.stream, read: self.read }
    }
}

/// What a half of a layer is given.
#[derive(Clone, Copy, Debug)]
pub struct HalfInput<'a> {
    /// What it is added to `[T, H]`.
    pub stream: &'a Tensor<2>,
    /// What its norm reads `[T, H]`: the same, unless both halves of the layer are side by side.
    pub read: &'a Tensor<2>,
}

impl<'a> From<&'a Tensor<2>> for HalfInput<'a> {
    fn from(stream: &'a Tensor<2>) -> Self {
        Self { stream, read: stream }
    }
}

/// Gradients of the summed objective at the routing of one MoE layer, for all tokens of a wave.
#[derive(Debug)]
pub struct RouterGradients<'a> {
    /// Decoder layer index.
    pub layer: usize,
    /// The wave.
    pub wave: &'a WaveInfo,
    /// Number of experts, E.
    pub experts: usize,
    /// Experts per token, k.
    pub top_k: usize,
    /// What the router reads `[T, H]`. With `d_logits`, the gradient of its weight is `d_logits^T input`, that of its
    /// bias the column sums.
    pub input: &'a Tensor<2>,
    /// Router logits `[T, E]`; minus infinity for experts that an overlay removed.
    pub logits: &'a [f32],
    /// Selected experts `[T, k]`, best first.
    pub selected: &'a [u32],
    /// Routing weights as the model applies them `[T, k]`.
    pub weights: &'a [f32],
    /// d loss / d `weights`; 0 where the token skips the expert.
    pub d_weights: &'a [f32],
    /// d loss / d logits `[T, E]`. The choice of experts is not differentiated.
    pub d_logits: &'a [f32],
    /// d loss / d (a factor on the routing weights of expert e) `[E]`, summed over the tokens: at the gains of a
    /// routing overlay, 0 included, or at 1.
    pub d_gains: &'a [f64],
}

/// Rows of an expert that belong to one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Index of the sequence in the wave.
    pub sequence: usize,
    /// Rows of the expert's matrices, `0..n_e`.
    pub rows: Range<usize>,
    /// Predicted tokens of that sequence (of all of it, not of the rows).
    pub loss_tokens: usize,
}

/// One expert and the n tokens of a wave routed to it. H is the hidden size, I the expert's width.
#[derive(Debug)]
pub struct ExpertTrace<'a> {
    /// Decoder layer index.
    pub layer: usize,
    /// Expert index in its layer.
    pub expert: usize,
    /// Wave token of each row, ascending `[n]`.
    pub rows: &'a [u32],
    /// Routing weight of each row `[n]`.
    pub routing_weights: &'a [f32],
    /// The rows grouped by sequence, in order; sequences without a row are absent.
    pub segments: &'a [Segment],
    /// Expert inputs `[n, H]`.
    pub input: &'a Tensor<2>,
    /// Unit activations `[n, I]`, if [`Signals::units`] or [`Signals::gradients`] was asked for.
    pub units: Option<&'a Tensor<2>>,
    /// Expert outputs before the routing weight `[n, H]`, if [`Signals::outputs`] was asked for.
    pub output: Option<&'a Tensor<2>>,
    /// Gradients, if [`Signals::gradients`] was asked for.
    pub backward: Option<ExpertGradients<'a>>,
    /// The expert's weights.
    pub expert_weights: &'a ExpertTensors,
}

/// Gradients of the summed objective, usually the cross-entropy (unit weight per predicted token), at one expert.
#[derive(Clone, Copy, Debug)]
pub struct ExpertGradients<'a> {
    /// d loss / d (layer output), *without* the routing weight `[n, H]`. The gradient at the expert's output is row t
    /// of this times `routing_weights[t]`.
    pub upstream: &'a Tensor<2>,
    /// d loss / d units, routing weight included `[n, I]`.
    pub units: &'a Tensor<2>,
    /// d loss / d pre-activations, routing weight included `[n, 2I]`: columns `0..I` of gate, `I..2I` of up.
    pub gate_up: &'a Tensor<2>,
}

/// A part of the sweep over a wave; the parts come in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SweepPart {
    /// A decoder layer, forward.
    Forward(usize),
    /// The objective and its gradient.
    Head,
    /// A decoder layer, backward.
    Backward(usize),
}

/// Watches a sweep.
pub trait Observer {
    /// What it needs; asked once before a sweep.
    fn needs(&self) -> Signals;

    /// The first decoder layer whose gradients it looks at; asked once before a sweep, which goes back no further for
    /// it. One that looks at the last layer alone costs the backward pass of that layer.
    fn first_layer(&self) -> usize {
        0
    }

    /// A wave begins.
    ///
    /// # Errors
    /// Whatever the observer refuses; wrapped by [`Error::observer`](crate::Error::observer).
    fn begin_wave(&mut self, wave: &WaveInfo) -> Result<()> {
        let _ = wave;
        Ok(())
    }

    /// Routing of an MoE layer ([`Signals::routing`]); always in the forward sweep, first layer first.
    ///
    /// # Errors
    /// Whatever the observer refuses.
    fn layer(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        let _ = trace;
        Ok(())
    }

    /// Choices of identity experts of an MoE layer that has some ([`Signals::routing`]); after the layer's routing.
    ///
    /// # Errors
    /// Whatever the observer refuses.
    fn identities(&mut self, trace: &IdentityTrace<'_>) -> Result<()> {
        let _ = trace;
        Ok(())
    }

    /// An expert and its tokens ([`Signals::units`], [`Signals::outputs`], [`Signals::gradients`]).
    ///
    /// # Errors
    /// Whatever the observer refuses.
    fn expert(&mut self, trace: &ExpertTrace<'_>) -> Result<()> {
        let _ = trace;
        Ok(())
    }

    /// Gradients at the routing of an MoE layer ([`Signals::router_gradients`]); in the backward sweep, last layer
    /// first, after the layer's experts.
    ///
    /// # Errors
    /// Whatever the observer refuses.
    fn router(&mut self, gradients: &RouterGradients<'_>) -> Result<()> {
        let _ = gradients;
        Ok(())
    }

    /// The residual stream after the last layer that runs `[T, H]`, before the final norm ([`Signals::hidden`]).
    ///
    /// # Errors
    /// Whatever the observer refuses.
    fn last_hidden(&mut self, hidden: &Tensor<2>) -> Result<()> {
        let _ = hidden;
        Ok(())
    }

    /// The input of decoder layer `layer` `[T, H]` ([`Signals::hidden`]).
    ///
    /// # Errors
    /// Whatever the observer refuses.
    fn hidden(&mut self, layer: usize, hidden: &Tensor<2>) -> Result<()> {
        let _ = (layer, hidden);
        Ok(())
    }

    /// A wave has passed an MoE layer ([`Signals::streams`]); in the forward sweep, after the layer's routing and the
    /// experts that are shown there.
    ///
    /// # Errors
    /// Whatever the observer refuses.
    fn output(&mut self, output: &LayerOutput<'_>) -> Result<()> {
        let _ = output;
        Ok(())
    }

    /// Logits of consecutive tokens starting at wave token `first`, `[chunk, V]` row-major ([`Signals::logits`]).
    ///
    /// # Errors
    /// Whatever the observer refuses.
    fn logits(&mut self, first: usize, logits: &HostView, vocab: usize) -> Result<()> {
        let _ = (first, logits, vocab);
        Ok(())
    }

    /// The routing of an MoE layer as [`layer`](Self::layer) was shown it by the run that this one goes on from
    /// ([`Signals::routing`]); in the backward sweep, before the layer's experts.
    ///
    /// # Errors
    /// Whatever the observer refuses.
    fn recall(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        let _ = trace;
        Ok(())
    }

    /// A part of the sweep is done: whatever it shows has been shown. What the observer keeps now, a run that goes on
    /// from the next part need not see again.
    ///
    /// # Errors
    /// Whatever keeps the observer from keeping it.
    fn done(&mut self, part: SweepPart) -> Result<()> {
        let _ = part;
        Ok(())
    }

    /// The wave is complete: every layer and expert has been seen.
    ///
    /// # Errors
    /// Whatever the observer refuses.
    fn end_wave(&mut self, wave: &WaveInfo) -> Result<()> {
        let _ = wave;
        Ok(())
    }
}

/// Watches nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nobody;

impl Observer for Nobody {
    fn needs(&self) -> Signals {
        Signals::NONE
    }
}

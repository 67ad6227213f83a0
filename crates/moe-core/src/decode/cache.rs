//! What generation keeps of a sequence in a layer.

use burn::tensor::{Device, Tensor};
use moe_checkpoint::Mixer;

use crate::{
    host::{self, HostView},
    layers::{CompressedState, ConvolutionState, DeltaState, LightningState, MambaState},
};

/// Keys and values of one sequence in one layer, `[length, kv_heads * D]` each. Values of latent attention are its
/// keys.
#[derive(Clone, Default)]
pub(super) struct KeyValues {
    pub keys: Growing,
    values: Option<Growing>,
    /// Keys of the layer's indexer, where it may have to choose.
    pub indexed: Growing,
}

/// What is kept of one sequence in one layer.
// One per layer, and the larger variant is the usual one.
#[allow(clippy::large_enum_variant)]
#[derive(Clone)]
pub(super) enum Kept {
    /// Its keys and values, which grow.
    Attention(KeyValues),
    /// The state of a linear attention, which does not; none before the first token.
    Delta(Option<DeltaState>),
    /// The last rows of a short convolution; none before the first token.
    Convolution(Option<ConvolutionState>),
    /// The state of a state space layer; none before the first token.
    Mamba(Option<MambaState>),
    /// The state of lightning attention; none before the first token.
    Lightning(Option<LightningState>),
    /// The last keys and the compressed ones; none before the first token.
    Compressed(Option<Box<CompressedState>>),
    /// Nothing, of a layer that does not look at other tokens.
    None,
}

/// What a layer kept at some time, to go back to.
pub(super) enum Mark {
    /// Rows of keys.
    Rows(usize),
    Delta(Option<DeltaState>),
    Convolution(Option<ConvolutionState>),
    Mamba(Option<MambaState>),
    Lightning(Option<LightningState>),
    Compressed(Option<Box<CompressedState>>),
    None,
}

/// Rows that accumulate on their device.
#[derive(Clone, Default)]
pub(super) struct Growing {
    pub host: Vec<f32>,
    device: Option<Tensor<2>>,
    rows: usize,
}

impl Kept {
    /// What a layer with this mixer keeps before the first token.
    pub fn empty(mixer: &Mixer) -> Self {
        match mixer {
            Mixer::DeltaNet(_) | Mixer::ChannelDelta(_) => Self::Delta(None),
            Mixer::ShortConvolution { .. } => Self::Convolution(None),
            Mixer::Mamba(_) => Self::Mamba(None),
            Mixer::Lightning(_) => Self::Lightning(None),
            Mixer::Compressed(_) => Self::Compressed(None),
            Mixer::None => Self::None,
            _ => Self::Attention(KeyValues::default()),
        }
    }

    /// Whether it holds keys of any token.
    pub fn is_fed(&self) -> bool {
        matches!(self, Self::Attention(kept) if kept.keys.rows > 0)
    }

    /// The state as it is now.
    pub fn mark(&self) -> Mark {
        match self {
            Self::Attention(kept) => Mark::Rows(kept.keys.rows),
            Self::Delta(state) => Mark::Delta(state.clone()),
            Self::Convolution(state) => Mark::Convolution(state.clone()),
            Self::Mamba(state) => Mark::Mamba(state.clone()),
            Self::Lightning(state) => Mark::Lightning(state.clone()),
            Self::Compressed(state) => Mark::Compressed(state.clone()),
            Self::None => Mark::None,
        }
    }

    /// Goes back to a mark.
    pub fn rewind(&mut self, mark: Mark) {
        match (self, mark) {
            (Self::Attention(kept), Mark::Rows(rows)) => kept.truncate(rows),
            (Self::Delta(state), Mark::Delta(marked)) => *state = marked,
            (Self::Convolution(state), Mark::Convolution(marked)) => *state = marked,
            (Self::Mamba(state), Mark::Mamba(marked)) => *state = marked,
            (Self::Lightning(state), Mark::Lightning(marked)) => *state = marked,
            (Self::Compressed(state), Mark::Compressed(marked)) => *state = marked,
            _ => {}
        }
    }
}

impl KeyValues {
    /// Adds tokens of a sequence that has at most `length` of them in the end.
    pub fn push(&mut self, k: Tensor<2>, v: Option<Tensor<2>>, length: usize, device: &Device) {
        self.keys.push(k, length, device);
        if let Some(v) = v {
            self.values.get_or_insert_default().push(v, length, device);
        }
    }

    pub fn values(&self) -> &Growing {
        self.values.as_ref().unwrap_or(&self.keys)
    }

    /// Forgets all rows but the first.
    pub fn truncate(&mut self, rows: usize) {
        self.keys.truncate(rows);
        self.indexed.truncate(rows);
        if let Some(values) = &mut self.values {
            values.truncate(rows);
        }
    }
}

impl Growing {
    pub fn push(&mut self, rows: Tensor<2>, length: usize, device: &Device) {
        self.rows += rows.dims()[0];
        if host::is_host(device) {
            // No more than planned for, which doubling would exceed. Pages are taken as they are written.
            self.host.reserve_exact((length * rows.dims()[1]).saturating_sub(self.host.len()));
            self.host.extend_from_slice(HostView::new(&rows).as_slice());
        } else {
            self.device = Some(match self.device.take() {
                Some(all) => Tensor::cat(vec![all, rows], 0),
                None => rows,
            });
        }
    }

    /// The rows, on a device that is not the host.
    pub fn on_device(&self) -> Tensor<2> {
        self.device.clone().expect("rows are pushed before they are read")
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The rows as a tensor, which on the host is a copy.
    pub fn tensor(&self, device: &Device) -> Tensor<2> {
        match &self.device {
            Some(all) => all.clone(),
            None => host::from_vec(self.host.clone(), [self.rows, self.host.len() / self.rows.max(1)], device),
        }
    }

    fn truncate(&mut self, rows: usize) {
        if rows >= self.rows {
            return;
        }
        let columns = self.host.len() / self.rows.max(1);
        self.host.truncate(rows * columns);
        self.device = self.device.take().filter(|_| rows > 0).map(|all| all.narrow(0, 0, rows));
        self.rows = rows;
    }
}

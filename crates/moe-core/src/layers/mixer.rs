//! The half of a layer that looks at other tokens, of whatever kind.

use std::ops::Range;

use burn::tensor::Tensor;

use super::{
    AttentionLayer, AttentionTape, CompressedLayer, CompressedTape, ConvolutionLayer, ConvolutionTape, DeltaLayer,
    DeltaTape, Handover, HeadMixtureLayer, HeadMixtureTape, LightningLayer, LightningTape, MambaLayer, MambaTape,
};
use crate::{adapters::Wanted, error::Result, kernels::rope::RotaryTable};

/// What mixes tokens, with its norm and residual.
#[derive(Clone, Debug)]
pub enum MixerLayer {
    /// Softmax attention.
    Attention(Box<AttentionLayer>),
    /// Gated DeltaNet or Kimi delta attention.
    Delta(Box<DeltaLayer>),
    /// A gated short convolution.
    Convolution(Box<ConvolutionLayer>),
    /// A state space layer.
    Mamba(Box<MambaLayer>),
    /// Lightning attention.
    Lightning(Box<LightningLayer>),
    /// A mixture of attention heads.
    HeadMixture(Box<HeadMixtureLayer>),
    /// Attention to the last keys and to compressed ones.
    Compressed(Box<CompressedLayer>),
    /// Nothing: the layer is a feed-forward half alone.
    None,
}

/// What the backward pass of a [`MixerLayer`] needs of the forward pass.
#[derive(Clone, Debug)]
// One per layer, and the larger variant is the usual one.
#[allow(clippy::large_enum_variant)]
pub enum MixerTape {
    /// Of softmax attention.
    Attention(AttentionTape),
    /// Of a delta rule.
    Delta(DeltaTape),
    /// Of a gated short convolution.
    Convolution(ConvolutionTape),
    /// Of a state space layer.
    Mamba(MambaTape),
    /// Of lightning attention.
    Lightning(LightningTape),
    /// Of a mixture of attention heads.
    HeadMixture(HeadMixtureTape),
    /// Of attention to compressed keys.
    Compressed(CompressedTape),
    /// Of nothing.
    None,
}

impl MixerLayer {
    /// The projections of `x [T, H]`, rotated by `table` where the layer rotates, and the keys that its queries see.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) where a layer that makes or chooses keys for this one did not
    /// run.
    pub fn project(
        &self,
        x: &Tensor<2>,
        table: &RotaryTable,
        sequences: &[Range<usize>],
        handover: &Handover,
    ) -> Result<MixerTape> {
        Ok(match self {
            Self::Attention(layer) => MixerTape::Attention(layer.project_chosen(x, table, sequences, handover)?),
            Self::Delta(layer) => MixerTape::Delta(layer.project(x)),
            Self::Convolution(layer) => MixerTape::Convolution(layer.project(x)),
            Self::Mamba(layer) => MixerTape::Mamba(layer.project(x)),
            Self::Lightning(layer) => MixerTape::Lightning(layer.project(x)),
            Self::HeadMixture(layer) => MixerTape::HeadMixture(layer.project(x, table)),
            Self::Compressed(layer) => MixerTape::Compressed(layer.project(x, sequences)),
            Self::None => MixerTape::None,
        })
    }

    /// `x` plus what the layer makes of it, given the projections of `x`.
    pub fn mix(&self, x: &Tensor<2>, tape: &MixerTape, sequences: &[Range<usize>]) -> Tensor<2> {
        match (self, tape) {
            (Self::Attention(layer), MixerTape::Attention(tape)) => layer.mix(x, tape, sequences),
            (Self::Delta(layer), MixerTape::Delta(tape)) => layer.mix(x, tape, sequences),
            (Self::Convolution(layer), MixerTape::Convolution(tape)) => layer.mix(x, tape, sequences),
            (Self::Mamba(layer), MixerTape::Mamba(tape)) => layer.mix(x, tape, sequences),
            (Self::Lightning(layer), MixerTape::Lightning(tape)) => layer.mix(x, tape, sequences),
            (Self::HeadMixture(layer), MixerTape::HeadMixture(tape)) => layer.mix(x, tape, sequences),
            (Self::Compressed(layer), MixerTape::Compressed(tape)) => layer.mix(x, tape, sequences),
            (Self::None, MixerTape::None) => x.clone(),
            _ => unreachable!("a tape belongs to the layer that wrote it"),
        }
    }

    /// Gradient with respect to `x`, if it is wanted, from the gradient of [`mix`](Self::mix)'s result; and those of
    /// what is trained. Gradients at what other layers made are handed over as in [`AttentionLayer::backward`].
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        x: &Tensor<2>,
        tape: &MixerTape,
        sequences: &[Range<usize>],
        table: &RotaryTable,
        dy: Tensor<2>,
        handover: &Handover,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        match (self, tape) {
            (Self::Attention(layer), MixerTape::Attention(tape)) => {
                layer.backward(x, tape, sequences, table, dy, handover, wanted)
            }
            (Self::Delta(layer), MixerTape::Delta(tape)) => layer.backward(x, tape, sequences, dy, wanted),
            (Self::Convolution(layer), MixerTape::Convolution(tape)) => layer.backward(x, tape, sequences, dy, wanted),
            (Self::Mamba(layer), MixerTape::Mamba(tape)) => layer.backward(x, tape, sequences, dy, wanted),
            (Self::Lightning(layer), MixerTape::Lightning(tape)) => layer.backward(x, tape, sequences, dy, wanted),
            (Self::HeadMixture(layer), MixerTape::HeadMixture(tape)) => {
                layer.backward(x, tape, sequences, table, dy, wanted)
            }
            (Self::Compressed(layer), MixerTape::Compressed(tape)) => layer.backward(x, tape, sequences, dy, wanted),
            (Self::None, MixerTape::None) => wanted.input.then_some(dy),
            _ => unreachable!("a tape belongs to the layer that wrote it"),
        }
    }
}

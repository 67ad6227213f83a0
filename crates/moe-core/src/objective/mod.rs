//! What a sweep minimizes: the function of the logits at its end, summed over the predicted tokens.

mod blend;
mod teacher;

use burn::tensor::Tensor;

pub use blend::{Blend, Tempered};
pub use teacher::{Distillation, TeacherLogits, TeacherRecorder};

use crate::{
    error::Result,
    kernels::loss::{self, Losses},
    trace::WaveInfo,
};

/// A loss per predicted token. Gradients that observers see are those of its sum over a wave.
pub trait Objective {
    /// A wave's logits follow.
    ///
    /// # Errors
    /// Whatever the objective refuses.
    fn begin_wave(&mut self, wave: &WaveInfo) -> Result<()> {
        let _ = wave;
        Ok(())
    }

    /// Losses of some rows and, if asked for, the gradient of their sum in place of the logits. `blocks` are
    /// consecutive blocks of the vocabulary, `[n, V_b]` each; `targets [n]` are the tokens that follow. Rows without a
    /// target have no loss. Rows with one come in the order of the wave's tokens, each once.
    ///
    /// # Errors
    /// Whatever the objective refuses.
    fn losses(&mut self, blocks: Vec<Tensor<2>>, targets: &[Option<u32>], gradient: bool) -> Result<Losses>;
}

/// Cross-entropy of the next token.
#[derive(Clone, Copy, Debug, Default)]
pub struct CrossEntropy;

impl Objective for CrossEntropy {
    fn losses(&mut self, blocks: Vec<Tensor<2>>, targets: &[Option<u32>], gradient: bool) -> Result<Losses> {
        Ok(loss::cross_entropy(blocks, targets, gradient))
    }
}

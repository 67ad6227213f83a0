//! The output head: from the last layer's output to logits, block of the vocabulary by block, and back.

use std::ops::Range;

use burn::tensor::Tensor;
use moe_checkpoint::{ModelConfig, Role};

use super::Model;
use crate::{
    adapters::Wanted,
    error::Result,
    host,
    kernels::rows::RowAccumulator,
    layers::{Linear, scaled},
    memory,
};

impl Model {
    /// Number of vocabulary blocks of the output head.
    pub(crate) fn head_blocks(&self) -> usize {
        let config = self.config();
        config.vocab_size.div_ceil(memory::head_block_rows(config.hidden_size))
    }

    /// The rows of the output head that are computed together, block by block.
    pub fn head_rows(&self) -> impl Iterator<Item = Range<usize>> {
        Self::head_row_blocks(self.config())
    }

    /// The same for any model with this configuration.
    pub fn head_row_blocks(config: &ModelConfig) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, vocab) = (memory::head_block_rows(config.hidden_size), config.vocab_size);
        (0..vocab.div_ceil(rows)).map(move |block| block * rows..((block + 1) * rows).min(vocab))
    }

    /// Logits of the normed hidden states `h [n, H]`, `[n, V_b]` per block of the vocabulary.
    pub(crate) fn head_forward(&self, h: &Tensor<2>) -> Result<Vec<Tensor<2>>> {
        let h = scaled(h.clone(), self.logits_factor());
        (0..self.head_blocks()).map(|block| Ok(self.capped(self.head_block(block)?.forward(&h)))).collect()
    }

    /// Gradient with respect to `h`, from those of the logits; with `parameters`, also those of what is trained of the
    /// head.
    pub(crate) fn head_backward(&self, h: &Tensor<2>, d_logits: Vec<Tensor<2>>, parameters: bool) -> Result<Tensor<2>> {
        let wanted = Wanted { input: true, parameters };
        let h = || scaled(h.clone(), self.logits_factor());
        let rows = d_logits.first().map_or(0, |block| block.dims()[0]);
        let mut dh = RowAccumulator::zeros(rows, self.config().hidden_size, self.device());
        for (block, d_logits) in d_logits.into_iter().enumerate() {
            let weights = self.head_block(block)?;
            let d_logits = match self.config().logit_cap {
                // the derivative of c tanh(x / c)
                Some(cap) => {
                    let share = self.capped(weights.forward(&h())).div_scalar(cap as f32);
                    d_logits * (share.clone() * share).neg().add_scalar(1.0)
                }
                None => d_logits,
            };
            if let Some(d) = weights.backward(h, &d_logits, wanted) {
                dh.add(&d);
            }
        }
        Ok(scaled(dh.into_tensor(), self.logits_factor()))
    }

    /// Logits within the bound of the model.
    fn capped(&self, logits: Tensor<2>) -> Tensor<2> {
        match self.config().logit_cap {
            Some(cap) => logits.div_scalar(cap as f32).tanh().mul_scalar(cap as f32),
            None => logits,
        }
    }

    /// Factor on the logits. Applied to what is multiplied with the head, which has fewer columns.
    fn logits_factor(&self) -> f32 {
        (1.0 / self.config().multipliers.logits_divisor) as f32
    }

    /// Block `block` of the output head `[V_b, H]`.
    fn head_block(&self, block: usize) -> Result<Linear> {
        let load = |block: usize| -> Result<Linear> {
            let config = self.config();
            let (rows, h) = (memory::head_block_rows(config.hidden_size), config.hidden_size);
            let range = block * rows..((block + 1) * rows).min(config.vocab_size);
            let n = range.len();
            let adapter = self.adapters().and_then(|adapters| adapters.head(range.clone()));
            let weight = self.adapted(&format!("output head {range:?}"), [n, h], adapter, || {
                self.row_weight(Role::LmHead, range.clone(), [n, h])
            })?;
            let bias = match config.head_bias {
                true => {
                    let all = self.checkpoint().read_f32(Role::LmHeadBias)?;
                    let values = all[range].iter().map(|b| b * self.logits_factor()).collect();
                    Some(host::from_vec(values, [n], self.device()))
                }
                false => None,
            };
            Ok(Linear::new(weight, bias))
        };
        self.cached_head_block(block, load)
    }
}

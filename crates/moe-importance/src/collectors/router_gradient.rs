//! Gradients of router rows per sequence.

use moe_checkpoint::{ArrayKind, Extent, Fold, Statistics};
use moe_core::host;
use moe_core::trace::{RouterGradients, Signals};

use super::Collector;
use crate::Result;
use crate::statistics::{
    ROUTER_GRADIENT_ABS, ROUTER_GRADIENT_SQUARE, ROUTER_GRADIENT_SQUARES, StatisticId, StatisticSpec,
};

pub(super) const PROVIDED: &[StatisticId] = &[ROUTER_GRADIENT_ABS, ROUTER_GRADIENT_SQUARE, ROUTER_GRADIENT_SQUARES];

/// Any of [`ROUTER_GRADIENT_ABS`], [`ROUTER_GRADIENT_SQUARE`] and [`ROUTER_GRADIENT_SQUARES`], from the gradient `G_s =
/// sum_t dz_t x_t^T` of a layer's router weight `[E, H]` from sequence s's loss, the *mean* cross-entropy over its
/// predicted tokens, with the router's input x and the gradient dz at its logits. A sequence that predicts no token
/// adds 0.
#[derive(Debug)]
pub struct RouterGradient {
    statistics: Vec<StatisticSpec>,
}

impl RouterGradient {
    /// Of these statistics; others are ignored.
    pub fn new(ids: &[StatisticId]) -> Self {
        let spec = |id: &StatisticId| match id {
            id if *id == ROUTER_GRADIENT_SQUARES => {
                StatisticSpec { id: id.clone(), kind: ArrayKind::Vector(Extent::Hidden), fold: Fold::Sum }
            }
            id => StatisticSpec::expert_sum(id.clone()),
        };
        Self { statistics: PROVIDED.iter().filter(|id| ids.contains(id)).map(spec).collect() }
    }
}

/// The refusal of a vector per router row where that is wider than what experts read.
pub(crate) fn latent(rows: usize, experts: usize) -> crate::Error {
    crate::Error::Run(moe_core::Error::Unsupported(format!(
        "statistic `{ROUTER_GRADIENT_SQUARES}` of a model whose experts read a latent of width {experts}, while rows of its router have {rows} \
         numbers; `{ROUTER_GRADIENT_ABS}` and `{ROUTER_GRADIENT_SQUARE}` are one number per expert"
    )))
}

impl Collector for RouterGradient {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.statistics
    }

    fn needs(&self) -> Signals {
        Signals::ROUTER_GRADIENTS
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn router(&mut self, gradients: &RouterGradients<'_>, into: &mut Statistics) -> Result<()> {
        let (experts, [_, hidden]) = (gradients.experts, gradients.input.dims());
        for sequence in gradients.wave.sequences.iter().filter(|sequence| sequence.loss_tokens > 0) {
            let rows = sequence.tokens.clone();
            let d_logits = gradients.d_logits[rows.start * experts..rows.end * experts].to_vec();
            let d_logits = host::from_vec(d_logits, [rows.len(), experts], &gradients.input.device());
            let input = gradients.input.clone().slice([rows]);
            let gradient = host::into_vec(d_logits.transpose().matmul(input)); // [E, H]
            let scale = 1.0 / sequence.loss_tokens as f64;
            for (expert, row) in gradient.chunks_exact(hidden.max(1)).enumerate() {
                let entries = || row.iter().map(|g| f64::from(*g) * scale);
                for StatisticSpec { id, .. } in &self.statistics {
                    if *id == ROUTER_GRADIENT_SQUARES {
                        let out = into.vector_mut(id.as_str(), Extent::Hidden, Fold::Sum, gradients.layer, expert)?;
                        if out.len() != hidden {
                            return Err(latent(hidden, out.len()));
                        }
                        out.iter_mut().zip(entries()).for_each(|(out, g)| *out += g * g);
                        continue;
                    }
                    let sum: f64 = match *id == ROUTER_GRADIENT_ABS {
                        true => entries().map(f64::abs).sum::<f64>() / hidden as f64,
                        false => entries().map(|g| g * g).sum(),
                    };
                    into.expert_mut(id.as_str(), Fold::Sum, gradients.layer)?[expert] += sum;
                }
            }
        }
        Ok(())
    }
}

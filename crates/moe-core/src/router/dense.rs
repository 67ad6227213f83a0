//! The router's gradient from all experts: DenseMixer.

use rayon::prelude::*;

use super::{Routed, Router, Rule, Score, below_floor, largest_logit, softmax_sum};
use crate::{
    error::{Error, Result},
    kernels::math,
};

impl Router {
    /// Whether the gradient from all experts is defined for the rule.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for SparseMixer, whose weights are no shares of one distribution over all experts, and
    /// whose own gradient is already an estimate.
    pub fn check_dense(&self) -> Result<()> {
        match self.rule {
            Rule::Scores { .. } => Ok(()),
            Rule::Sparsemixer { .. } => Err(Error::Unsupported(
                "router gradients from all experts with SparseMixer routing: its weights come from a softmax over \
                 other experts for each choice, so that an expert that was not chosen has no weight"
                    .into(),
            )),
        }
    }

    /// DenseMixer's gradient with respect to the logits `[T, E]`, from `values [T, E]`: `v_e = <d loss / d y, E_e(x)>`,
    /// the gradient of the weight of each expert, chosen or not.
    ///
    /// The output `sum over chosen of w_e E_e(x)` is differentiated as if it were `sum over all of u_e E_e(x)` with
    /// `u_e = s p_e / c` and `u_e = s p_e / stop(c)` for experts that were not chosen: `p` the scores, `s` the router's
    /// scale, `c` the sum of the chosen scores where the rule divides by it, and else 1. With `g_e = d loss / d p_e`,
    /// for a softmax `dz_e = p_e (g_e - sum_i p_i g_i)`, for sigmoids `dz_e = p_e (1 - p_e) g_e`, for other scores of
    /// one logit each `dz_e = p'_e g_e`. If all experts are chosen, it is [`backward`](Self::backward).
    ///
    /// Source: code of yaof20/DenseMixer, for softmax routing. That sigmoid scores are treated alike, and that experts
    /// outside the selected groups take part, is inferred. 0 for rules that [`check_dense`](Self::check_dense) refuses.
    pub fn dense_backward(&self, logits: &[f32], routed: &Routed, values: &[f32]) -> Vec<f32> {
        let (experts, k) = (routed.experts, routed.top_k);
        let mut out = crate::kernels::zeros(logits.len());
        let Rule::Scores { score, renormalize, .. } = self.rule else { return out };
        if k == 0 {
            return out;
        }
        let tokens = out.par_chunks_mut(experts).zip(logits.par_chunks(experts)).zip(values.par_chunks(experts));
        tokens.zip(routed.selected.par_chunks(k)).with_min_len(64).for_each_init(
            || (Vec::new(), Vec::new()),
            |(p, g), (((out, logits), values), selected)| {
                p.clear();
                match score {
                    Score::Sigmoid | Score::SqrtSoftplus => p.extend(logits.iter().map(|z| f64::from(score.of(*z)))),
                    Score::Softmax { .. } => {
                        let max = largest_logit(logits);
                        let sum = f64::from(softmax_sum(logits, max));
                        p.extend(logits.iter().map(|z| f64::from(math::exp(*z - max)) / sum));
                    }
                }
                let chosen = || selected.iter().map(|&e| e as usize);
                // the divisor, and whether it is a constant
                let (divisor, constant) = match score {
                    _ if !renormalize => (1.0, true),
                    Score::Sigmoid | Score::SqrtSoftplus => {
                        (chosen().map(|e| p[e]).sum::<f64>() + f64::from(self.norm_eps), false)
                    }
                    Score::Softmax { floor } if below_floor(logits, selected, floor) => (f64::from(floor), true),
                    Score::Softmax { .. } => (chosen().map(|e| p[e]).sum::<f64>(), false),
                };
                let scale = f64::from(self.scale) / divisor;
                g.clear();
                g.extend(values.iter().map(|v| scale * f64::from(*v)));
                if !constant {
                    let inner = chosen().map(|e| p[e] * f64::from(values[e])).sum::<f64>() / divisor;
                    chosen().for_each(|e| g[e] -= scale * inner);
                }
                let mean: f64 = p.iter().zip(g.iter()).map(|(p, g)| p * g).sum();
                for ((out, z), (p, g)) in out.iter_mut().zip(logits).zip(p.iter().zip(g.iter())) {
                    *out = match score {
                        Score::Sigmoid => p * (1.0 - p) * g,
                        Score::SqrtSoftplus => p * f64::from(score.log_slope(*z)) * g,
                        Score::Softmax { .. } => p * (g - mean),
                    } as f32;
                }
            },
        );
        out
    }
}

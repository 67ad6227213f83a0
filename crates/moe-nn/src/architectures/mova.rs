//! MoVA: a coarse choice of experts for a whole input, and a fine one for each token.

use burn::config::Config;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::activation::{softmax, softplus};
use burn::tensor::{Device, Tensor, TensorData};

use crate::assignment::Assignment;
use crate::dispatch::dispatch;
use crate::experts::{ExpertNetworks, GatedExperts, GatedExpertsConfig};
use crate::router::{check_top_k, gate, top};
use crate::routing::{Routing, host, logits};

/// Configuration of [`CoarseToFine`].
#[derive(Config, Debug)]
pub struct CoarseToFineConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Width of the context that the coarse choice reads.
    pub d_context: usize,
    /// Intermediate size of one expert.
    pub d_ff: usize,
    /// The number of experts in the pool.
    pub num_experts: usize,
    /// Experts that are left after the coarse choice.
    #[config(default = 3)]
    pub chosen: usize,
}

/// The two choices of MoVA (arXiv 2404.13046), there of vision encoders and here of networks of any input: first the
/// context of a sequence, such as the question about an image, filters the pool; then every token mixes all that is
/// left, softly. An expert that the context excludes does not run at all. MoVA's coarse choice is a language model's
/// answer; here it is a linear map of a context vector, trained by [`CoarseToFineOutput::coarse_loss`] on which experts
/// helped.
#[derive(Module, Debug)]
pub struct CoarseToFine {
    /// Context to experts.
    pub coarse: Linear,
    /// Hidden to experts.
    pub fine: Linear,
    /// The pool.
    pub experts: GatedExperts,
    chosen: usize,
}

/// What a [`CoarseToFine`] returns.
#[derive(Clone, Debug)]
pub struct CoarseToFineOutput {
    /// `[batch, tokens, hidden]`.
    pub hidden: Tensor<3>,
    /// Logits of the coarse choice, `[batch, experts]`.
    pub coarse: Tensor<2>,
    /// The fine choice of all tokens.
    pub routing: Routing,
}

impl CoarseToFineConfig {
    /// Makes the layer.
    ///
    /// # Panics
    ///
    /// If more experts are to be left than there are.
    pub fn init(&self, device: &Device) -> CoarseToFine {
        check_top_k(self.chosen, self.num_experts);
        CoarseToFine {
            coarse: LinearConfig::new(self.d_context, self.num_experts).init(device),
            fine: gate(self.d_model, self.num_experts, false, device),
            experts: GatedExpertsConfig::new(self.d_model, self.d_ff, self.num_experts).init(device),
            chosen: self.chosen,
        }
    }
}

impl CoarseToFine {
    /// Runs `[batch, tokens, hidden]`, each sequence with its context, `[batch, d_context]`. In a causal model the
    /// context must be known before the first token.
    ///
    /// # Panics
    ///
    /// If there is not one context per sequence.
    pub fn forward(&self, x: Tensor<3>, context: Tensor<2>) -> CoarseToFineOutput {
        let ([batch, tokens, hidden], device) = (x.dims(), x.device());
        assert_eq!(context.dims()[0], batch, "{batch} sequences, but {} contexts", context.dims()[0]);
        let coarse = logits(context, &self.coarse);
        let experts = self.experts.num_experts();
        let pools: Vec<Vec<u32>> = host(&coarse).chunks_exact(experts).map(|row| top(row, self.chosen)).collect();

        let rows = batch * tokens;
        let fine = logits(x.clone().reshape([rows, hidden]), &self.fine);
        let places: Vec<u32> = pools.iter().flat_map(|pool| pool.repeat(tokens)).collect();
        let assignment = Assignment::new(rows, self.chosen, places);
        let excluded = pools.iter().flat_map(|pool| {
            let row: Vec<f32> = (0..experts as u32).map(|e| if pool.contains(&e) { 0.0 } else { -1e30 }).collect();
            row.repeat(tokens)
        });
        let excluded = TensorData::new(excluded.collect::<Vec<f32>>(), [rows, experts]);
        let scores = softmax(fine.clone() + Tensor::from_data(excluded, &device), 1);
        let weights = scores.clone().gather(1, assignment.indices(&device));
        let routing = Routing { logits: fine, scores, assignment, weights, num_experts: experts };
        let output =
            dispatch(x.reshape([rows, hidden]), &routing, |rows, segments| self.experts.forward(rows, segments));
        CoarseToFineOutput { hidden: output.reshape([batch, tokens, hidden]), coarse, routing }
    }
}

impl CoarseToFineOutput {
    /// The binary cross-entropy of the coarse choice against which experts helped on each sequence, `[batch, experts]`
    /// of zeros and ones, mean over all.
    pub fn coarse_loss(&self, helped: Tensor<2>) -> Tensor<1> {
        // -y log s(z) - (1 - y) log(1 - s(z)) = softplus(z) - y z
        (softplus(self.coarse.clone(), 1.0) - helped * self.coarse.clone()).mean()
    }
}

//! What a router says about a batch of tokens.

use burn::tensor::activation::{sigmoid, softmax, softplus};
use burn::tensor::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::assignment::Assignment;

/// What a router may want to know of the tokens besides their hidden states.
#[derive(Clone, Copy, Debug, Default)]
pub struct RouteContext<'a> {
    /// The token ids, one per row, for routers that go by them.
    pub token_ids: Option<&'a [u32]>,
    /// True for rows that are padding. A layer leaves them out before it routes, so that they take no capacity, count
    /// in no loss and come out as zeros.
    pub padding: Option<&'a [bool]>,
    /// Whether a token must not depend on later ones, as in a language model. Routers that compare the tokens of a
    /// batch with each other refuse it.
    pub causal: bool,
}

/// The outcome of routing `[tokens, hidden]`.
#[derive(Clone, Debug)]
pub struct Routing {
    /// Logits in f32, `[tokens, columns]`. There is a column per expert, and further ones for null experts.
    pub logits: Tensor<2>,
    /// The scores that weights are taken from, `[tokens, columns]`: rows that sum to one for a softmax, and whatever
    /// the router's [`Score`] says for others.
    pub scores: Tensor<2>,
    /// The experts of each token.
    pub assignment: Assignment,
    /// The factor of each expert's output, `[tokens, slots]`, 0 in empty places.
    pub weights: Tensor<2>,
    /// The number of experts that an assignment may name.
    pub num_experts: usize,
}

impl Routing {
    /// This routing with at most `capacity` tokens per expert; those whose weight for the expert is lowest lose it.
    pub fn limited(self, capacity: usize) -> Self {
        let priority = host(&self.weights);
        let assignment = self.assignment.limited(self.num_experts, capacity, &priority);
        let weights = self.weights * assignment.mask(&self.logits.device());
        Routing { assignment, weights, ..self }
    }
}

/// How logits become scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Score {
    /// Softmax over all experts (Mixtral, Qwen, OLMoE, DeepSeek-V2).
    #[default]
    Softmax,
    /// A sigmoid per expert (DeepSeek-V3, Llama 4).
    Sigmoid,
    /// The square root of a softplus per expert.
    SqrtSoftplus,
}

impl Score {
    /// The scores of logits `[tokens, experts]`.
    pub fn of(self, logits: Tensor<2>) -> Tensor<2> {
        match self {
            Score::Softmax => softmax(logits, 1),
            Score::Sigmoid => sigmoid(logits),
            Score::SqrtSoftplus => softplus(logits, 1.0).sqrt(),
        }
    }
}

/// How the scores of chosen experts become the factors of their outputs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Combine {
    /// The scores as they are (`norm_topk_prob: false`).
    Raw,
    /// The scores divided by their sum over the chosen experts.
    #[default]
    Renormalize,
    /// A softmax of the chosen logits (GPT-OSS); for softmax scores the same as `Renormalize`.
    SoftmaxOfChosen,
}

impl Combine {
    /// The weights `[tokens, slots]` of an assignment, 0 in empty places. A token without an expert has no weight at
    /// all.
    pub fn weights(self, logits: &Tensor<2>, scores: &Tensor<2>, assignment: &Assignment) -> Tensor<2> {
        let device = logits.device();
        let mask = assignment.mask(&device);
        let chosen = |of: &Tensor<2>| of.clone().gather(1, assignment.indices(&device));
        match self {
            Combine::Raw => chosen(scores) * mask,
            Combine::Renormalize => {
                let weights = chosen(scores) * mask;
                // Sums of nothing are 0, where 0 / 1 is meant.
                let sums = weights.clone().sum_dim(1);
                let nothing = sums.clone().equal_scalar(0.0).float();
                weights / (sums + nothing)
            }
            Combine::SoftmaxOfChosen => {
                let weights = softmax(chosen(logits) + (mask.clone() - 1.0) * 1e30, 1);
                weights * mask
            }
        }
    }
}

/// The values of a tensor, on the host, in f32.
///
/// # Panics
///
/// If the device fails to deliver them.
pub(crate) fn host<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    match tensor.try_to_vec_as::<f32>() {
        Ok(values) => values,
        Err(error) => panic!("the device does not deliver a tensor {:?}: {error:?}", tensor.dims()),
    }
}

/// Logits `[tokens, experts]` in f32, whatever the model computes in: `x · weight` with weight `[hidden, experts]`.
pub(crate) fn logits(x: Tensor<2>, gate: &burn::nn::Linear) -> Tensor<2> {
    let logits = x.cast(DType::F32).matmul(gate.weight.val().cast(DType::F32));
    match &gate.bias {
        Some(bias) => logits + bias.val().cast(DType::F32).unsqueeze(),
        None => logits,
    }
}

//! Losses on routers: pure functions of what a router said.
//!
//! None of them has hidden state: a layer returns its losses, and who trains adds them.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::routing::Routing;

/// The share of tokens that go to each column of the router, `[1, columns]`; null columns share theirs evenly, so that
/// these are not balanced against each other (AdaMoE, arXiv 2406.13233).
fn shares(routing: &Routing) -> Tensor<2> {
    let (assignment, [tokens, columns]) = (&routing.assignment, routing.logits.dims());
    let mut shares: Vec<f32> = assignment.loads(routing.num_experts).into_iter().map(|load| load as f32).collect();
    let empty = (tokens * assignment.slots() - assignment.filled()) as f32;
    shares.extend((routing.num_experts..columns).map(|_| empty / (columns - routing.num_experts) as f32));
    shares.iter_mut().for_each(|share| *share /= tokens.max(1) as f32);
    Tensor::from_data(TensorData::new(shares, [1, columns]), &routing.logits.device())
}

/// The load-balance loss of Switch Transformers (arXiv 2101.03961, equation 4) for any number of experts per token:
/// `E * sum_e f_e P_e`, with `f_e` the share of tokens that chose e and `P_e` the mean probability of e. It is the
/// number of experts per token at perfect balance. Null experts count as columns that share one load.
pub fn balance(routing: &Routing) -> Tensor<1> {
    let columns = routing.logits.dims()[1];
    let probabilities = normalized(routing).mean_dim(0); // [1, columns]
    (shares(routing) * probabilities).sum() * columns as f32
}

/// The balance loss over all layers as Hugging Face's `load_balancing_loss_func` has it: `E * sum_e f_e P_e` with f and
/// P over the tokens of all layers together.
///
/// # Panics
///
/// If there is no layer, or layers have different numbers of experts.
pub fn balance_of_layers(layers: &[&Routing]) -> Tensor<1> {
    let first = layers.first().expect("there is no layer to balance");
    let count = layers.len() as f32;
    let mean =
        |of: &dyn Fn(&Routing) -> Tensor<2>| layers[1..].iter().fold(of(first), |sum, layer| sum + of(layer)) / count;
    let probabilities = mean(&|layer| normalized(layer).mean_dim(0));
    (mean(&shares) * probabilities).sum() * first.logits.dims()[1] as f32
}

/// The balance loss of groups of experts on one device (DeepSeekMoE, arXiv 2401.06066, equation 15): `sum_j f'_j P'_j`,
/// with `f'_j` the mean of `f_i = N / (K T) * count_i` over group j and `P'_j` the sum of its mean probabilities.
///
/// # Panics
///
/// If the experts do not divide into `groups`.
pub fn device_balance(routing: &Routing, groups: usize) -> Tensor<1> {
    let (experts, slots) = (routing.num_experts, routing.assignment.slots() as f32);
    assert!(groups > 0 && experts.is_multiple_of(groups), "{experts} experts do not divide into {groups} groups");
    let size = experts / groups;
    let loads = (shares(routing) * (experts as f32 / slots)).reshape([groups, size]).mean_dim(1);
    let probabilities = normalized(routing).mean_dim(0).reshape([groups, size]).sum_dim(1);
    (loads * probabilities).sum()
}

/// The expert-level balance loss of DeepSeekMoE (arXiv 2401.06066, equation 12): [`balance`] divided by the number of
/// experts per token, so that it is 1 at balance. With one sequence per call it is the sequence-wise loss.
pub fn expert_balance(routing: &Routing) -> Tensor<1> {
    balance(routing) / routing.assignment.slots() as f32
}

/// The z-loss of ST-MoE (arXiv 2202.08906, equation 5): the mean square of `log sum_e exp(z_e)`, which keeps logits
/// small.
pub fn router_z(routing: &Routing) -> Tensor<1> {
    let logits = routing.logits.clone();
    // log sum exp(z) = z - log_softmax(z), the same for every column.
    let first = Tensor::<2>::zeros([logits.dims()[0], 1], &logits.device());
    let index = first.int();
    let sums = logits.clone().gather(1, index.clone()) - log_softmax(logits, 1).gather(1, index);
    sums.square().mean()
}

/// The mean entropy of a token's probabilities in nats (the dynamic loss of arXiv 2403.07652): low where a router is
/// decided.
pub fn entropy(routing: &Routing) -> Tensor<1> {
    entropies(normalized(routing)).mean()
}

/// The mutual-information loss of ModuleFormer (arXiv 2306.04640): `-(H(mean_t p_t) - mean_t H(p_t))`. It is `-ln E`
/// for routers that are decided for each token and balanced over all, and 0 where all tokens are routed alike.
pub fn mutual_information(routing: &Routing) -> Tensor<1> {
    let probabilities = normalized(routing);
    entropies(probabilities.clone()).mean() - entropies(probabilities.mean_dim(0)).sum()
}

/// The squared coefficient of variation of the sums of weights per expert (the importance loss of Shazeer et al.,
/// arXiv 1701.06538, equation 7).
pub fn importance(routing: &Routing) -> Tensor<1> {
    let sums = normalized(routing).sum_dim(0);
    let mean = sums.clone().mean_dim(1);
    ((sums - mean.clone()) / mean).square().mean()
}

/// The squared distance of a mean from its target: the global budget of Duo-LLM (arXiv 2410.10846), with `used` the
/// share of the larger choice per token and layer.
pub fn budget<const D: usize>(used: Tensor<D>, target: f64) -> Tensor<1> {
    (used.mean() - target).square()
}

/// Rows that sum to one: the scores divided by their sum, which for a softmax are the scores.
fn normalized(routing: &Routing) -> Tensor<2> {
    let scores = routing.scores.clone().cast(DType::F32);
    scores.clone() / scores.sum_dim(1).clamp_min(1e-20)
}

/// The entropy of each row in nats, `[rows, 1]`; `0 log 0` is 0.
fn entropies(probabilities: Tensor<2>) -> Tensor<2> {
    -(probabilities.clone() * probabilities.clamp_min(1e-20).log()).sum_dim(1)
}

/// The coefficients of the losses that a layer adds up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossWeights {
    /// Of [`balance`]; 0.01 is usual.
    pub balance: f64,
    /// Of [`router_z`]; 0.001 is usual.
    pub z: f64,
    /// Of [`entropy`].
    pub entropy: f64,
    /// Of [`mutual_information`].
    pub mutual_information: f64,
}

/// The losses of a layer, without their coefficients, and their weighted sum. What has no coefficient is not computed.
#[derive(Clone, Debug, Default)]
pub struct RouterLosses {
    /// [`balance`].
    pub balance: Option<Tensor<1>>,
    /// [`router_z`].
    pub z: Option<Tensor<1>>,
    /// [`entropy`].
    pub entropy: Option<Tensor<1>>,
    /// [`mutual_information`].
    pub mutual_information: Option<Tensor<1>>,
    total: Option<Tensor<1>>,
}

impl RouterLosses {
    /// The losses of a routing that have a coefficient.
    pub fn of(routing: &Routing, weights: &LossWeights) -> Self {
        let mut losses = RouterLosses::default();
        let mut term = |weight: f64, loss: fn(&Routing) -> Tensor<1>| {
            (weight != 0.0).then(|| {
                let value = loss(routing);
                losses.total = add(losses.total.take(), Some(value.clone() * weight));
                value
            })
        };
        let balance = term(weights.balance, balance);
        let z = term(weights.z, router_z);
        let entropy = term(weights.entropy, entropy);
        let mutual_information = term(weights.mutual_information, mutual_information);
        RouterLosses { balance, z, entropy, mutual_information, total: losses.total }
    }

    /// The sum of the losses times their coefficients, none where there is no coefficient.
    pub fn total(&self) -> Option<Tensor<1>> {
        self.total.clone()
    }
}

/// The sum of two losses of which either may be absent.
pub fn add(left: Option<Tensor<1>>, right: Option<Tensor<1>>) -> Option<Tensor<1>> {
    match (left, right) {
        (Some(left), Some(right)) => Some(left + right),
        (left, right) => left.or(right),
    }
}

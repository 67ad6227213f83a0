//! DMoERM: an outer choice of a task, and an inner mixture of capabilities.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::{Initializer, Linear, LinearConfig};
use burn::tensor::activation::softplus;
use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::assignment::Segments;
use crate::dispatch::dispatch;
use crate::experts::{Activation, ExpertNetworks, LowRankMap, MlpExperts, MlpExpertsConfig, matrices, of_expert};
use crate::grouped::grouped_product;
use crate::router::{Router, TopKRouter, TopKRouterConfig};
use crate::routing::{Combine, RouteContext, Routing};

/// Configuration of [`CapabilityExperts`].
#[derive(Config, Debug)]
pub struct CapabilityExpertsConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Intermediate size of a task's network.
    pub d_ff: usize,
    /// The number of tasks.
    pub num_experts: usize,
    /// Capabilities of a task.
    #[config(default = 3)]
    pub capabilities: usize,
    /// Rank of what a capability adds to its task's network.
    #[config(default = 8)]
    pub rank: usize,
}

/// Experts that are mixtures themselves: a task's network runs once per capability, each with low-rank additions of its
/// own, and a small network fuses what all of them give: concatenated, to hidden, PReLU. Additions begin at zero.
#[derive(Module, Debug)]
pub struct CapabilityExperts {
    /// The network of each task.
    pub network: MlpExperts,
    /// What each capability adds between hidden and intermediate, a map of all tasks.
    pub up: Vec<LowRankMap>,
    /// What each capability adds between intermediate and hidden.
    pub down: Vec<LowRankMap>,
    /// Outputs of all capabilities to hidden, `[tasks, capabilities * hidden, hidden]`.
    pub fuse: Param<Tensor<3>>,
    /// Bias of that map, `[tasks, hidden]`.
    pub fuse_bias: Param<Tensor<2>>,
    /// The slope of PReLU below zero, `[tasks, 1]`.
    pub slope: Param<Tensor<2>>,
}

impl CapabilityExpertsConfig {
    /// Makes the experts.
    ///
    /// # Panics
    ///
    /// If a size is 0.
    pub fn init(&self, device: &Device) -> CapabilityExperts {
        let (d, f, tasks, capabilities) = (self.d_model, self.d_ff, self.num_experts, self.capabilities);
        assert!(capabilities > 0 && self.rank > 0, "found {capabilities} capabilities of rank {}", self.rank);
        let maps = |sizes: [usize; 2]| {
            (0..capabilities).map(|_| LowRankMap::new(tasks, sizes, self.rank, true, device)).collect()
        };
        CapabilityExperts {
            network: MlpExpertsConfig::new(d, f, tasks).with_activation(Activation::Gelu).init(device),
            up: maps([d, f]),
            down: maps([f, d]),
            fuse: matrices(tasks, capabilities * d, d, device),
            fuse_bias: Initializer::Zeros.init([tasks, d], device),
            slope: Initializer::Constant { value: 0.25 }.init([tasks, 1], device),
        }
    }
}

impl CapabilityExperts {
    /// These experts with networks and additions frozen: the last phase of training, of what fuses them alone.
    pub fn fusing_only(self) -> Self {
        let frozen = |maps: Vec<LowRankMap>| maps.into_iter().map(Module::no_grad).collect();
        CapabilityExperts { network: self.network.no_grad(), up: frozen(self.up), down: frozen(self.down), ..self }
    }
}

impl ExpertNetworks for CapabilityExperts {
    fn num_experts(&self) -> usize {
        self.network.num_experts()
    }

    fn forward(&self, rows: Tensor<2>, segments: &Segments) -> Tensor<2> {
        let offsets = segments.offsets();
        let up = grouped_product(rows.clone(), self.network.up.val(), offsets); // [rows, intermediate]
        let outputs = self.up.iter().zip(&self.down).map(|(to_inner, to_hidden)| {
            let inner = Activation::Gelu.of(up.clone() + to_inner.forward(rows.clone(), segments));
            grouped_product(inner.clone(), self.network.down.val(), offsets) + to_hidden.forward(inner, segments)
        });
        let all = Tensor::cat(outputs.collect(), 1); // [rows, capabilities * hidden]
        let fused = grouped_product(all, self.fuse.val(), offsets) + of_expert(&self.fuse_bias, segments);
        let (positive, negative) = (fused.clone().clamp_min(0.0), fused.clamp_max(0.0));
        positive + negative * of_expert(&self.slope, segments)
    }
}

/// Configuration of [`TwoLevelReward`].
#[derive(Config, Debug)]
pub struct TwoLevelRewardConfig {
    /// Tasks and capabilities.
    pub experts: CapabilityExpertsConfig,
}

/// A reward model in two levels (DMoERM, arXiv 2403.01197): a task is chosen for a whole sequence, hard; within it, the
/// capabilities' views are fused into one number. It reads the last hidden state of each sequence, which a language
/// model gives; in the paper an inner expert is a language model of its own, and a capability a LoRA in it.
#[derive(Module, Debug)]
pub struct TwoLevelReward {
    /// Hidden to tasks; trained by labels of tasks, with [`TwoLevelReward::task_loss`].
    pub router: TopKRouter,
    /// The experts of all tasks.
    pub experts: CapabilityExperts,
    /// Fused to reward.
    pub head: Linear,
}

impl TwoLevelRewardConfig {
    /// Makes the model.
    ///
    /// # Panics
    ///
    /// As [`CapabilityExpertsConfig::init`].
    pub fn init(&self, device: &Device) -> TwoLevelReward {
        let (d, tasks) = (self.experts.d_model, self.experts.num_experts);
        let router = TopKRouterConfig::new(d, tasks).with_top_k(1).with_combine(Combine::Renormalize);
        TwoLevelReward {
            router: router.init(device),
            experts: self.experts.init(device),
            head: LinearConfig::new(d, 1).init(device),
        }
    }
}

impl TwoLevelReward {
    /// Rewards `[batch]` of hidden states `[batch, tokens, hidden]`, of which sequence b has `lengths[b]`, and the
    /// tasks that were chosen.
    ///
    /// # Panics
    ///
    /// If there is not one length per sequence, or one is 0 or beyond the tokens.
    pub fn forward(&self, hidden: Tensor<3>, lengths: &[usize]) -> (Tensor<1>, Routing) {
        let ([batch, tokens, width], device) = (hidden.dims(), hidden.device());
        assert_eq!(lengths.len(), batch, "{batch} sequences, but {} lengths", lengths.len());
        assert!(lengths.iter().all(|length| (1..=tokens).contains(length)), "lengths {lengths:?} of {tokens} tokens");
        let last: Vec<i64> = lengths.iter().enumerate().map(|(b, length)| (b * tokens + length - 1) as i64).collect();
        let last = Tensor::<1, Int>::from_data(TensorData::new(last, [batch]), &device);
        let x = hidden.reshape([batch * tokens, width]).select(0, last);
        let routing = self.router.route(x.clone(), &RouteContext::default());
        let fused = dispatch(x, &routing, |rows, segments| self.experts.forward(rows, segments));
        (self.head.forward(fused).reshape([batch]), routing)
    }

    /// The cross-entropy of the choice of tasks against their labels, mean over sequences.
    ///
    /// # Panics
    ///
    /// If there is not one label per sequence.
    pub fn task_loss(routing: &Routing, tasks: &[usize]) -> Tensor<1> {
        let sequences = routing.assignment.tokens();
        assert_eq!(tasks.len(), sequences, "{sequences} sequences, but {} labels", tasks.len());
        let labels: Vec<i64> = tasks.iter().map(|task| *task as i64).collect();
        let labels = Tensor::<2, Int>::from_data(TensorData::new(labels, [sequences, 1]), &routing.logits.device());
        -burn::tensor::activation::log_softmax(routing.logits.clone(), 1).gather(1, labels).mean()
    }

    /// The loss of preferences, the mean of `-log sigmoid(reward of the better - reward of the worse)`.
    pub fn preference_loss(better: Tensor<1>, worse: Tensor<1>) -> Tensor<1> {
        softplus(worse - better, 1.0).mean()
    }
}

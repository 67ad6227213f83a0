//! The router of language models: the k highest scores of a linear map.

use burn::config::Config;
use burn::module::{Flag, Module, Param, RunningState};
use burn::nn::Linear;
use burn::tensor::activation::softplus;
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::{Router, check_top_k, gate, top, top_of_rows};
use crate::assignment::Assignment;
use crate::routing::{Combine, RouteContext, Routing, Score, host, logits};

/// Noise in training, for exploration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Noise {
    /// No noise.
    #[default]
    None,
    /// What the router reads is multiplied by uniform numbers within `1 - eps` and `1 + eps` (Switch Transformers).
    Jitter {
        /// The distance from 1, e.g. 0.01.
        eps: f64,
    },
    /// Gumbel noise on the logits that experts are chosen by; weights do not see it. The choice is then a sample
    /// without replacement from the softmax.
    Gumbel,
    /// Normal noise on the logits, with a deviation that a second linear map learns: noisy top-k gating (Shazeer et
    /// al., arXiv 1701.06538, equations 3 to 5).
    Learned,
}

/// Experts are chosen within the best groups (DeepSeek-V2 and V3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupLimit {
    /// The number of groups, of equally many neighboring experts.
    pub groups: usize,
    /// The number of groups that a token may choose from.
    pub chosen: usize,
    /// How many of a group's best scores are added to rank it: 1 in DeepSeek-V2, 2 in DeepSeek-V3.
    pub by_best: usize,
}

/// Configuration of a [`TopKRouter`].
#[derive(Config, Debug)]
pub struct TopKRouterConfig {
    /// Hidden size.
    pub d_model: usize,
    /// The number of experts.
    pub num_experts: usize,
    /// Experts per token.
    #[config(default = 2)]
    pub top_k: usize,
    /// How logits become scores.
    #[config(default = "Score::Softmax")]
    pub score: Score,
    /// How scores become weights.
    #[config(default = "Combine::Renormalize")]
    pub combine: Combine,
    /// A factor of all weights (`routed_scaling_factor`).
    #[config(default = 1.0)]
    pub scale: f64,
    /// Whether logits have a bias.
    #[config(default = false)]
    pub bias: bool,
    /// Whether experts are chosen by scores plus a bias that weights do not see, which [`TopKRouter::update_bias`]
    /// moves (loss-free balancing, arXiv 2408.15664).
    #[config(default = false)]
    pub selection_bias: bool,
    /// Groups of experts.
    pub groups: Option<GroupLimit>,
    /// Noise in training.
    #[config(default = "Noise::None")]
    pub noise: Noise,
}

/// The k experts with the highest scores of a linear map.
#[derive(Module, Debug)]
pub struct TopKRouter {
    /// Hidden to experts.
    pub gate: Linear,
    /// Hidden to the deviations of learned noise.
    pub noise_gate: Option<Linear>,
    /// What is added to scores to choose experts, `[experts]`: recorded, not trained by gradients.
    pub selection_bias: Option<RunningState<Tensor<1>>>,
    /// Tokens per expert since the last [`update_bias`](Self::update_bias), `[experts]`.
    pub loads: Option<RunningState<Tensor<1>>>,
    /// Whether there is noise, and loads are counted. [`Module::valid`] turns it off.
    pub training: Param<Flag>,
    top_k: usize,
    scale: f64,
    #[module(skip)]
    score: Score,
    #[module(skip)]
    combine: Combine,
    #[module(skip)]
    groups: Option<GroupLimit>,
    #[module(skip)]
    noise: Noise,
}

impl TopKRouterConfig {
    /// Makes the router.
    ///
    /// # Panics
    ///
    /// If there are fewer experts than a token takes, or groups do not divide them or hold too few.
    pub fn init(&self, device: &Device) -> TopKRouter {
        let experts = self.num_experts;
        check_top_k(self.top_k, experts);
        if let Some(GroupLimit { groups, chosen, by_best }) = self.groups {
            assert!(
                groups > 0 && experts.is_multiple_of(groups),
                "{experts} experts do not divide into {groups} groups"
            );
            let size = experts / groups;
            assert!((1..=groups).contains(&chosen), "chosen groups must be within 1..={groups}, found {chosen}");
            assert!((1..=size).contains(&by_best), "groups of {size} are not ranked by {by_best} experts");
            assert!(chosen * size >= self.top_k, "{chosen} groups of {size} hold fewer than {} experts", self.top_k);
        }
        let state = || self.selection_bias.then(|| RunningState::new(Tensor::zeros([experts], device)));
        let learned = self.noise == Noise::Learned;
        TopKRouter {
            gate: gate(self.d_model, experts, self.bias, device),
            noise_gate: learned.then(|| gate(self.d_model, experts, false, device)),
            selection_bias: state(),
            loads: state(),
            training: Param::from_bool(true),
            top_k: self.top_k,
            scale: self.scale,
            score: self.score,
            combine: self.combine,
            groups: self.groups,
            noise: self.noise,
        }
    }
}

impl TopKRouter {
    /// Experts per token.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// This router with another number of experts per token.
    ///
    /// # Panics
    ///
    /// If there are fewer experts, or its groups hold fewer.
    pub fn with_top_k(mut self, top_k: usize) -> Self {
        let experts = self.num_experts();
        check_top_k(top_k, experts);
        if let Some(GroupLimit { groups, chosen, .. }) = self.groups {
            assert!(chosen * experts / groups >= top_k, "{chosen} of {groups} groups hold fewer than {top_k} experts");
        }
        self.top_k = top_k;
        self
    }

    /// Moves the selection bias of every expert by `rate` towards balance, `b += rate * sign(mean load - load)`, and
    /// forgets the loads. Call it once per step of the optimizer; 0.001 is the published rate.
    ///
    /// # Panics
    ///
    /// If the router was made without a selection bias.
    pub fn update_bias(&self, rate: f64) {
        let (Some(bias), Some(loads)) = (&self.selection_bias, &self.loads) else {
            panic!("this router has no selection bias: set `selection_bias` in its configuration");
        };
        let counted = loads.value_sync();
        let moved = (counted.clone().mean().expand(counted.dims()) - counted.clone()).sign() * rate;
        bias.update(bias.value_sync() + moved);
        bias.value_sync();
        loads.update(counted.zeros_like());
        loads.value_sync();
    }

    fn explores(&self, x: &Tensor<2>) -> bool {
        self.training.val().is_enabled() && x.device().is_autodiff()
    }

    fn count(&self, assignment: &Assignment, device: &Device) {
        let Some(loads) = &self.loads else { return };
        let counted: Vec<f32> = assignment.loads(self.num_experts()).into_iter().map(|load| load as f32).collect();
        let count = counted.len();
        let counted = Tensor::from_data(TensorData::new(counted, [count]), device);
        loads.update(loads.value_sync() + counted);
        loads.value_sync();
    }

    fn choose(&self, ranked: &[f32]) -> Assignment {
        let experts = self.num_experts();
        let Some(GroupLimit { groups, chosen, by_best }) = self.groups else {
            return top_of_rows(ranked, experts, self.top_k);
        };
        let size = experts / groups;
        let rows = ranked.chunks_exact(experts).flat_map(|row| {
            let rank = |group: &[f32]| top(group, by_best).iter().map(|&expert| group[expert as usize]).sum::<f32>();
            let ranks: Vec<f32> = row.chunks_exact(size).map(rank).collect();
            let open = top(&ranks, chosen);
            let masked = row.iter().enumerate().map(|(expert, &value)| {
                if open.contains(&((expert / size) as u32)) { value } else { f32::NEG_INFINITY }
            });
            top(&masked.collect::<Vec<f32>>(), self.top_k)
        });
        Assignment::new(ranked.len() / experts, self.top_k, rows.collect())
    }
}

impl Router for TopKRouter {
    fn num_experts(&self) -> usize {
        self.gate.weight.dims()[1]
    }

    fn route(&self, x: Tensor<2>, _context: &RouteContext) -> Routing {
        let explores = self.explores(&x);
        let noise = if explores { self.noise } else { Noise::None };
        let read = match noise {
            Noise::Jitter { eps } => x.clone() * x.random_like(Distribution::Uniform(1.0 - eps, 1.0 + eps)),
            _ => x.clone(),
        };
        let mut logits = logits(read, &self.gate);
        if let (Noise::Learned, Some(noise_gate)) = (noise, &self.noise_gate) {
            let deviation = softplus(crate::routing::logits(x, noise_gate), 1.0);
            logits = logits.clone() + logits.random_like(Distribution::Normal(0.0, 1.0)) * deviation;
        }
        let scores = self.score.of(logits.clone());
        let mut ranked = scores.clone().detach();
        if noise == Noise::Gumbel {
            let uniform = logits.random_like(Distribution::Uniform(1e-9, 1.0));
            ranked = logits.clone().detach() - (-uniform.log()).log();
        }
        if let Some(bias) = &self.selection_bias {
            ranked = ranked + bias.value_sync().unsqueeze();
        }
        let assignment = self.choose(&host(&ranked));
        if explores {
            self.count(&assignment, &logits.device());
        }
        let weights = self.combine.weights(&logits, &scores, &assignment) * self.scale;
        Routing { logits, scores, assignment, weights, num_experts: self.num_experts() }
    }
}

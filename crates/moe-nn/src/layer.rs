//! The layer: a router, experts, and what every token gets besides.

use burn::module::{Flag, Module, Param};
use burn::tensor::{Bool, Device, IndexingUpdateOp, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::dispatch::dispatch;
use crate::experts::{Activation, ExpertNetworks, GatedExperts, GatedExpertsConfig, SharedExpert, SharedExpertConfig};
use crate::losses::{LossWeights, RouterLosses};
use crate::router::{Router, TopKRouter, TopKRouterConfig};
use crate::routing::{RouteContext, Routing};

/// How many tokens an expert takes at most: `ceil(factor * tokens * slots / experts)`. Tokens beyond go without it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capacity {
    /// The factor in training, e.g. 1.25.
    pub train: f64,
    /// The factor in evaluation, e.g. 2.
    pub eval: f64,
}

impl Capacity {
    /// The number of tokens for a factor.
    pub fn tokens(factor: f64, routing: &Routing) -> usize {
        let places = (routing.assignment.tokens() * routing.assignment.slots()) as f64;
        (factor * places / routing.num_experts as f64).ceil() as usize
    }
}

/// What a layer returns.
#[derive(Clone, Debug)]
pub struct MoeOutput<const D: usize> {
    /// The output, in the shape of the input.
    pub hidden: Tensor<D>,
    /// The losses of the router that have a coefficient.
    pub losses: RouterLosses,
    /// Who went where, capacity applied.
    pub routing: Routing,
}

/// A Mixture-of-Experts layer of any router and any experts.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use moe_nn::{MoeConfig, RoutingRecord};
///
/// let device = Device::default().autodiff();
/// let layer = MoeConfig::new(16, 32, 8).with_top_k(2).init(&device);
/// let x = Tensor::<3>::random([2, 5, 16], Distribution::Default, &device);
/// let output = layer.forward(x.clone());
/// assert_eq!(output.hidden.dims(), [2, 5, 16]);
/// assert_eq!(RoutingRecord::of(&output.routing).experts_per_token, 2.0);
/// let gradients = output.hidden.sum().backward();
/// assert!(layer.experts.up.val().grad(&gradients).is_some());
/// ```
#[derive(Module, Debug)]
pub struct MoeLayer<R: Module, X: Module> {
    /// The router.
    pub router: R,
    /// The experts.
    pub experts: X,
    /// A network that every token runs through.
    pub shared: Option<SharedExpert>,
    /// Whether capacity is that of training. [`Module::valid`] turns it off.
    pub training: Param<Flag>,
    /// The limit of tokens per expert; none drops no token.
    #[module(skip)]
    pub capacity: Option<Capacity>,
    /// The coefficients of the losses.
    #[module(skip)]
    pub losses: LossWeights,
}

impl<R: Router, X: ExpertNetworks> MoeLayer<R, X> {
    /// A layer without a shared expert, capacity or losses.
    ///
    /// # Panics
    ///
    /// If the router has another number of experts.
    pub fn new(router: R, experts: X) -> Self {
        let (routed, there) = (router.num_experts(), experts.num_experts());
        assert_eq!(routed, there, "the router has {routed} experts, but there are {there}");
        let training = Param::from_bool(true);
        MoeLayer { router, experts, shared: None, training, capacity: None, losses: LossWeights::default() }
    }

    /// This layer with a network that every token runs through.
    pub fn with_shared(mut self, shared: SharedExpert) -> Self {
        self.shared = Some(shared);
        self
    }

    /// This layer with a limit of tokens per expert.
    ///
    /// # Panics
    ///
    /// If a factor is not positive.
    pub fn with_capacity(mut self, capacity: Capacity) -> Self {
        assert!(capacity.train > 0.0 && capacity.eval > 0.0, "capacity factors must be positive, found {capacity:?}");
        self.capacity = Some(capacity);
        self
    }

    /// This layer with losses.
    pub fn with_losses(mut self, losses: LossWeights) -> Self {
        self.losses = losses;
        self
    }

    /// Runs the layer on `[..., hidden]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> MoeOutput<D> {
        self.forward_in(x, &RouteContext::default())
    }

    /// Runs the layer on `[..., hidden]`, with what a router may want to know besides.
    ///
    /// # Panics
    ///
    /// If the context does not fit the tokens, or the router refuses it.
    pub fn forward_in<const D: usize>(&self, x: Tensor<D>, context: &RouteContext) -> MoeOutput<D> {
        let shape = x.dims();
        let hidden = shape[D - 1];
        let tokens = shape[..D - 1].iter().product::<usize>();
        let x = x.reshape([tokens, hidden]);
        let (output, losses, routing) = match context.padding.filter(|padding| padding.contains(&true)) {
            None => self.forward_rows(x, context),
            Some(padding) => self.forward_unpadded(x, padding, context),
        };
        MoeOutput { hidden: output.reshape(shape), losses, routing }
    }

    fn forward_unpadded(
        &self,
        x: Tensor<2>,
        padding: &[bool],
        context: &RouteContext,
    ) -> (Tensor<2>, RouterLosses, Routing) {
        let (shape, device) = (x.dims(), x.device());
        assert_eq!(padding.len(), shape[0], "padding says {} tokens, there are {}", padding.len(), shape[0]);
        let real: Vec<i64> = (0..padding.len() as i64).filter(|&token| !padding[token as usize]).collect();
        let ids: Option<Vec<u32>> =
            context.token_ids.map(|ids| real.iter().map(|&token| ids[token as usize]).collect());
        let count = real.len();
        let rows = Tensor::<1, Int>::from_data(TensorData::new(real, [count]), &device);
        let context = RouteContext { token_ids: ids.as_deref(), padding: None, ..*context };
        let (output, losses, routing) = self.forward_rows(x.clone().select(0, rows.clone()), &context);
        let zeros = Tensor::<2>::zeros(shape, (&device, x.dtype()));
        (zeros.select_assign(0, rows, output, IndexingUpdateOp::Add), losses, routing)
    }

    fn forward_rows(&self, x: Tensor<2>, context: &RouteContext) -> (Tensor<2>, RouterLosses, Routing) {
        let mut routing = self.router.route(x.clone(), context);
        let losses = RouterLosses::of(&routing, &self.losses);
        if let Some(capacity) = self.capacity {
            let training = self.training.val().is_enabled() && x.device().is_autodiff();
            let factor = if training { capacity.train } else { capacity.eval };
            let limit = Capacity::tokens(factor, &routing);
            routing = routing.limited(limit);
        }
        let routed = dispatch(x.clone(), &routing, |rows, segments| self.experts.forward(rows, segments));
        let output = match &self.shared {
            Some(shared) => routed + shared.forward(x),
            None => routed,
        };
        (output, losses, routing)
    }
}

/// A top-k router over SwiGLU experts: the layer of Mixtral, Qwen, OLMoE and DeepSeek.
pub type SwigluMoe = MoeLayer<TopKRouter, GatedExperts>;

/// Configuration of a [`SwigluMoe`].
#[derive(burn::config::Config, Debug)]
pub struct MoeConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Intermediate size of one expert.
    pub d_ff: usize,
    /// The number of routed experts.
    pub num_experts: usize,
    /// Experts per token.
    #[config(default = 2)]
    pub top_k: usize,
    /// The router, where it is not the usual one of this size: then its own sizes are replaced by those above.
    pub router: Option<TopKRouterConfig>,
    /// The activation of the experts' gates.
    #[config(default = "Activation::Silu")]
    pub activation: Activation,
    /// A network that every token runs through; its `d_model` is replaced by that above.
    pub shared: Option<SharedExpertConfig>,
    /// The limit of tokens per expert; none drops no token.
    pub capacity: Option<Capacity>,
    /// The coefficients of the losses.
    #[config(default = "LossWeights::default()")]
    pub losses: LossWeights,
}

impl MoeConfig {
    /// The router, with the sizes of the layer.
    pub fn router_config(&self) -> TopKRouterConfig {
        let router = self.router.clone().unwrap_or_else(|| TopKRouterConfig::new(self.d_model, self.num_experts));
        TopKRouterConfig { d_model: self.d_model, num_experts: self.num_experts, top_k: self.top_k, ..router }
    }

    /// Makes the layer.
    ///
    /// # Panics
    ///
    /// If sizes do not fit together, as [`TopKRouterConfig::init`] says.
    pub fn init(&self, device: &Device) -> SwigluMoe {
        let router = self.router_config();
        let experts =
            GatedExpertsConfig::new(self.d_model, self.d_ff, self.num_experts).with_activation(self.activation);
        let mut layer = MoeLayer::new(router.init(device), experts.init(device)).with_losses(self.losses);
        if let Some(capacity) = self.capacity {
            layer = layer.with_capacity(capacity);
        }
        match &self.shared {
            Some(shared) => {
                layer.with_shared(SharedExpertConfig { d_model: self.d_model, ..shared.clone() }.init(device))
            }
            None => layer,
        }
    }
}

/// The rows of a mask, as a host vector: for who has padding as a tensor `[batch, sequence]`.
///
/// # Panics
///
/// If the device fails to deliver it.
pub fn padding_of(mask: Tensor<2, Bool>) -> Vec<bool> {
    crate::routing::host(&mask.float()).into_iter().map(|value| value != 0.0).collect()
}

//! Architectures side by side: a small language model with one layer each, trained for some hundred steps on text, at
//! about equal active parameters. Prints the loss of the last steps, how even the loads are, and the time.
//!
//! `cargo run --release -p moe-nn --example architectures [STEPS]`

use std::time::Instant;

use burn::module::{Module, ModuleDisplay};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};
use burn_optim::{AdamWConfig, GradientsParams};
use moe_nn::architectures::*;
use moe_nn::*;

const TEXT: &str =
    concat!(include_str!("../README.md"), include_str!("../src/lib.rs"), include_str!("../src/layer.rs"));
const D: usize = 32;
/// Active intermediate width of every layer.
const ACTIVE: usize = 64;
const BATCH: usize = 8;
const LENGTH: usize = 48;
const CONTEXT: RouteContext<'static> = RouteContext { token_ids: None, padding: None, causal: true };

/// A layer to compare: output of `[tokens, hidden]`, losses, and routing if there is any.
trait Layer: Module + ModuleDisplay {
    fn run(&self, x: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>);

    /// The same, for layers that look at the tokens themselves `[batch, length]`.
    fn run_on(&self, x: Tensor<2>, _ids: Tensor<2, Int>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        self.run(x)
    }

    /// The layer at a place of the training, from 0 to 1.
    fn at(self, _progress: f64) -> Self {
        self
    }

    /// What the layer learns from gradients by itself.
    fn observe(&self, _gradients: &Gradients) {}
}

impl<R: Router, X: ExpertNetworks> Layer for MoeLayer<R, X> {
    fn run(&self, x: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        let output = self.forward_in(x, &CONTEXT);
        (output.hidden, output.losses.total(), Some(output.routing))
    }
}

impl Layer for FeedForward {
    fn run(&self, x: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        (self.forward(x), None, None)
    }
}

impl Layer for ChainOfExperts {
    fn run(&self, x: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        let (output, mut routings) = self.forward(x.clone(), &CONTEXT);
        let loss = routings.iter().map(losses::balance).reduce(|sum, loss| sum + loss).map(|loss| loss * 0.01);
        // The model adds what it read by itself.
        (output - x, loss, routings.pop())
    }
}

impl Layer for RmoeStack {
    fn run(&self, x: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        let (output, routing, _) = self.forward(0, x, None);
        (output, Some(losses::balance(&routing) * 0.01), Some(routing))
    }
}

impl Layer for MofmeLayer {
    fn run(&self, x: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        let (output, routing) = self.forward(x, &CONTEXT);
        (output, Some(losses::balance(&routing) * 0.01), Some(routing))
    }
}

impl Layer for DuoLayer {
    fn run(&self, x: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        let output = self.forward(x);
        (output.hidden, Some(losses::budget(output.big, 0.5) * 0.1), None)
    }
}

impl Layer for MemoryLayer {
    fn run(&self, x: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        (self.forward(x).0, None, None)
    }
}

impl Layer for StickBreakingAttention {
    fn run(&self, x: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        let (output, routing) = self.forward(x.reshape([BATCH, LENGTH, D]));
        let loss = losses::mutual_information(&routing) * 0.01;
        (output.reshape([BATCH * LENGTH, D]), Some(loss), Some(routing))
    }
}

impl Layer for AttentionMixture {
    fn run(&self, x: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        (self.forward(x.reshape([BATCH, LENGTH, D])).0.reshape([BATCH * LENGTH, D]), None, None)
    }
}

impl Layer for CoarseToFine {
    fn run(&self, x: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        let x = x.reshape([BATCH, LENGTH, D]);
        // The first token is what is known of a sequence before all others.
        let context = x.clone().narrow(1, 0, 1).reshape([BATCH, D]);
        let output = self.forward(x, context);
        // All experts are as good as any for text of one kind: the coarse choice is to be even.
        let even = output.coarse.zeros_like() + 0.5;
        let loss = losses::balance(&output.routing) + output.coarse_loss(even);
        (output.hidden.reshape([BATCH * LENGTH, D]), Some(loss * 0.01), Some(output.routing))
    }
}

impl Layer for UnionOfExperts {
    fn run(&self, x: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        let (output, routing) = self.forward(x, &CONTEXT);
        (output, Some(losses::balance(&routing) * 0.01), Some(routing))
    }
}

impl Layer for WideNet {
    fn run(&self, x: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        let x = x.reshape([BATCH, LENGTH, D]);
        let (output, loss, mut routings) = self.forward(x.clone());
        // The model adds what it read by itself.
        ((output - x).reshape([BATCH * LENGTH, D]), loss, routings.pop())
    }
}

impl Layer for ReadMe {
    fn run(&self, _: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        unreachable!("one router looks at tokens, before all layers")
    }

    fn run_on(&self, x: Tensor<2>, ids: Tensor<2, Int>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        let routing = self.router.route(ids);
        (self.forward(0, x, &routing), Some(losses::balance(&routing) * 0.01), Some(routing))
    }
}

/// A dense network with tiny experts beside it.
#[derive(Module, Debug)]
struct Beside {
    network: FeedForward,
    experts: Mome,
}

impl Layer for Beside {
    fn run(&self, x: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        let (output, routing) = self.experts.forward(x.clone(), &CONTEXT);
        let loss = losses::balance(&routing) * 0.01;
        (self.network.forward(x) + output, Some(loss), Some(routing))
    }
}

impl Layer for UltraMem {
    fn run(&self, x: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        self.update_sides();
        (self.forward(0, x).0, None, None)
    }
}

/// A dense network behind a norm that goes its way over the steps, and sees every batch.
#[derive(Module, Debug)]
struct Normed<N: Module> {
    norm: N,
    network: FeedForward,
}

impl Layer for Normed<ProgressiveNorm> {
    fn run(&self, x: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        (self.network.forward(self.norm.forward(x)), None, None)
    }

    fn at(self, progress: f64) -> Self {
        Self { norm: self.norm.at(progress), ..self }
    }
}

impl Layer for Normed<ScaledNorm> {
    fn run(&self, x: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        (self.network.forward(self.norm.forward(x)), None, None)
    }
}

impl Layer for Normed<UnifiedNorm> {
    fn run(&self, x: Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>, Option<Routing>) {
        (self.network.forward(self.norm.forward(x)), None, None)
    }

    fn observe(&self, gradients: &Gradients) {
        self.norm.observe(gradients);
    }
}

/// One block around a layer.
#[derive(Module, Debug)]
struct Model<L: Module> {
    embedding: Embedding,
    norms: [RmsNorm; 3],
    attention: Attention,
    layer: L,
    head: Linear,
}

impl<L: Layer> Model<L> {
    fn new(layer: L, device: &Device) -> Self {
        Model {
            embedding: EmbeddingConfig::new(256, D).init(device),
            norms: [0, 1, 2].map(|_| RmsNormConfig::new(D).init(device)),
            attention: AttentionConfig::new(4, 4, D / 4).init(D, device),
            layer,
            head: LinearConfig::new(D, 256).with_bias(false).init(device),
        }
    }

    fn loss(&self, ids: Tensor<2, Int>) -> (Tensor<1>, Option<Tensor<1>>, Option<Routing>) {
        let x = self.embedding.forward(ids.clone().narrow(1, 0, LENGTH));
        let x = x.clone() + self.attention.forward(self.norms[0].forward(x));
        let x = x.reshape([BATCH * LENGTH, D]);
        let normed = self.norms[1].forward(x.clone());
        let (output, loss, routing) = self.layer.run_on(normed, ids.clone().narrow(1, 0, LENGTH));
        let logits = self.head.forward(self.norms[2].forward(x + output));
        let targets = ids.narrow(1, 1, LENGTH).reshape([BATCH * LENGTH, 1]);
        (-log_softmax(logits, 1).gather(1, targets).mean(), loss, routing)
    }
}

/// Sequences of a step, the same for every layer.
fn batch(step: usize, device: &Device) -> Tensor<2, Int> {
    let bytes = TEXT.as_bytes();
    let start = |row: usize| (step * 7919 + row * 104_729) % (bytes.len() - LENGTH - 1);
    let ids = (0..BATCH).flat_map(|row| bytes[start(row)..][..=LENGTH].iter().map(|byte| i64::from(*byte)));
    Tensor::from_data(TensorData::new(ids.collect::<Vec<i64>>(), [BATCH, LENGTH + 1]), device)
}

fn train<L: Layer>(name: &str, layer: L, steps: usize, device: &Device) {
    device.seed(1);
    let parameters = Module::num_params(&layer);
    let mut model = Model::new(layer, device);
    let mut optimizer = AdamWConfig::new().init();
    let (mut last, mut load, start) = (0.0, None, Instant::now());
    for step in 0..steps {
        let (loss, router_loss, routing) = model.loss(batch(step, device));
        if step + 50 >= steps {
            last += loss.clone().into_scalar::<f32>() / steps.min(50) as f32;
            load = routing.as_ref().map(|routing| RoutingRecord::of(routing).max_over_mean);
        }
        let total = match router_loss {
            Some(router_loss) => loss + router_loss,
            None => loss,
        };
        let gradients = total.backward();
        model.layer.observe(&gradients);
        model.layer = model.layer.at((step + 1) as f64 / steps as f64);
        let gradients = GradientsParams::from_grads(gradients, &model);
        model = optimizer.step(3e-3, model, gradients);
    }
    let load = load.map_or("-".to_string(), |load| format!("{load:.2}"));
    println!("{name:<28} {parameters:>10} {last:>8.3} {load:>10} {:>8.1}", start.elapsed().as_secs_f64());
}

fn main() {
    let steps = match std::env::args().nth(1).map(|steps| steps.parse::<usize>()) {
        None => 300,
        Some(Ok(steps)) if steps > 0 => steps,
        Some(other) => panic!("the number of steps must be a whole number above 0, found {other:?}"),
    };
    let device = &Device::default().autodiff();
    device.seed(0);
    println!("{steps} steps of {BATCH} x {LENGTH} bytes, hidden {D}, active width {ACTIVE}");
    println!("{:<28} {:>10} {:>8} {:>10} {:>8}", "layer", "parameters", "loss", "max/mean", "seconds");
    let balance = LossWeights { balance: 0.01, ..LossWeights::default() };
    let experts = |count: usize, width: usize| GatedExpertsConfig::new(D, width, count).init(device);
    train("dense", FeedForwardConfig::new(D, ACTIVE).init(device), steps, device);
    train("top-2 of 8", MoeConfig::new(D, ACTIVE / 2, 8).with_losses(balance).init(device), steps, device);
    let free = TopKRouterConfig::new(D, 8).with_selection_bias(true);
    train(
        "top-2, no loss at all",
        MoeConfig::new(D, ACTIVE / 2, 8).with_router(Some(free)).init(device),
        steps,
        device,
    );
    let segments = DeepSeekMoeConfig::new(D, ACTIVE / 2, 8, 2).with_losses(balance);
    train("DeepSeekMoE", segments.init(device), steps, device);
    train("Chain-of-Experts", ChainOfExpertsConfig::new(D, ACTIVE / 4, 16).init(device), steps, device);
    let recurrent = RecurrentRouterConfig::new(D, 8).with_d_router(16);
    train("RMoE", RmoeStackConfig::new(1, recurrent, ACTIVE / 2).init(device), steps, device);
    let top_p = TopPRouterConfig::new(D, 8).with_max_k(Some(4)).init(device);
    let entropy = LossWeights { entropy: 1e-2, ..balance };
    train("top-p", MoeLayer::new(top_p, experts(8, ACTIVE / 2)).with_losses(entropy), steps, device);
    let null = NullExpertRouterConfig::new(D, 8, 4).init(device);
    train("AdaMoE", MoeLayer::new(null, experts(8, ACTIVE / 2)).with_losses(balance), steps, device);
    let random = RandomRouterConfig::new(D, 8, 2, 2).init(device);
    train("SMoE-Dropout, k = 2", MoeLayer::new(random, experts(8, ACTIVE / 2)), steps, device);
    let mlp = MlpRouterConfig::new(D, 8).with_d_router(32).init(device);
    let information = LossWeights { mutual_information: 0.01, ..LossWeights::default() };
    train("ModuleFormer gate", MoeLayer::new(mlp, experts(8, ACTIVE / 2)).with_losses(information), steps, device);
    let sinkhorn = BalancedRouterConfig::new(D, 8).with_top_k(2).init(device);
    train("Sinkhorn", MoeLayer::new(sinkhorn, experts(8, ACTIVE / 2)), steps, device);
    let low_rank = LowRankExpertsConfig::new(D, ACTIVE / 4, 8, 4).with_common(true).init(device);
    let router = || TopKRouterConfig::new(D, 8).init(device);
    train("low-rank experts", MoeLayer::new(router(), low_rank).with_losses(balance), steps, device);
    let ternary = TernaryExpertsConfig::new(GatedExpertsConfig::new(D, ACTIVE / 2, 8)).init(device);
    train("ternary experts", MoeLayer::new(router(), ternary).with_losses(balance), steps, device);
    train("MoFME", MofmeLayerConfig::new(D, ACTIVE, 8).init(device), steps, device);
    train("Duo-LLM", DuoLayerConfig::new(D, ACTIVE - 16, 16).init(device), steps, device);
    train(
        "memory, 32 x 32 slots",
        MemoryLayerConfig::new(D, 32).with_top_k(32).with_heads(2).init(device),
        steps,
        device,
    );
    let shared = UltraMemConfig::new(D, 32).with_top_k(32).with_value_dim(D).with_pre_value_dim(D);
    train("UltraMemV2, 32 x 32 slots", shared.init(device), steps, device);
    let gate = || MlpRouterConfig::new(D, 4).with_d_router(16);
    train("ModuleFormer attention", StickBreakingAttentionConfig::new(D, 2, 16, gate()).init(device), steps, device);
    let mixed = AttentionMixtureConfig::new(D, 2, AttentionConfig::new(4, 2, D / 4)).with_shared_keys(true);
    train("BAM attention, 2", mixed.init(device), steps, device);
    train("MoVA, 2 of 8", CoarseToFineConfig::new(D, D, ACTIVE / 2, 8).with_chosen(2).init(device), steps, device);
    let capabilities = CapabilityExpertsConfig::new(D, ACTIVE / 4, 4).with_capabilities(2).with_rank(4).init(device);
    let task = TopKRouterConfig::new(D, 4).with_top_k(1).with_combine(Combine::Raw).init(device);
    train("DMoERM, 2 of 4 tasks", MoeLayer::new(task, capabilities).with_losses(balance), steps, device);
    let network = || FeedForwardConfig::new(D, ACTIVE).init(device);
    let whole = FeedForwardConfig::new(D, 4 * ACTIVE).init(device);
    train("Union-of-Experts, 2 of 8", UnionOfExpertsConfig::new(8, 2).init_from(&whole, device), steps, device);
    let block = MoeConfig::new(D, ACTIVE / 2, 8).with_losses(balance);
    let wide = WideNetConfig::new(D, 2, AttentionConfig::new(4, 4, D / 4), block);
    train("WideNet, depth 2", wide.init(device), steps, device);
    let beside = Beside { network: network(), experts: MomeConfig::new(D, 4, 8).init(device) };
    train("MoME beside a dense one", beside, steps, device);
    let pre_gate = PreGateConfig::new(256, 4);
    train("Read-ME", ReadMeConfig::new(pre_gate, D, 1, ACTIVE / 2, ACTIVE / 2).init(device), steps, device);
    let norm = ScaledNormConfig::new(D, 2).init(device);
    train("dense, LayerNorm scaling", Normed { norm, network: network() }, steps, device);
    let norm = ProgressiveNormConfig::new(D).init(device);
    train("dense, SLAB's norm", Normed { norm, network: network() }, steps, device);
    let norm = UnifiedNormConfig::new(D).with_warmup(20).init(device);
    train("dense, Unified Norm", Normed { norm, network: network() }, steps, device);
}

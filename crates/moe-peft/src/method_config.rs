//! All methods as one tagged value, and what each is trained with if nothing else is said.

use std::collections::BTreeMap;

use moe_core::train::{AdamW, Decay, Keep, Optimizer, Schedule, TrainOptions};
use moe_importance::Calibration;
use serde::{Deserialize, Serialize};

use crate::{
    AdapterSet, Installed, Phase, Result, Setting, TuningMethod,
    compressed_experts::CompressedExperts,
    condenser::CondenserTuning,
    duo::DuoTuning,
    esft::{Esft, EsftSelection},
    final_router::FinalRouterTuning,
    label_experts::LabelExperts,
    layer_sampling::LayerTurns,
    lora::{Init, LoraConfig},
    loss_free::LossFree,
    mixture::{Gate, MixtureConfig},
    model_weights::OwnWeights,
    mote::Mote,
    null_experts::NullExpertTuning,
    recurrent_router::RecurrentRouterTuning,
    router_loss::RouterTargetTuning,
    smoe_dropout::SmoeDropout,
    smt::Smt,
    token_skip::TokenSkipTuning,
};

/// A method, in JSON `{"type": "lora", "r": 16, ..}`.
///
/// [`training`](Self::training) is what it is trained with by default: what was published for it, or, where nothing
/// was, what its family takes. "ours" marks what no source says.
///
/// | `type` | what | highest rate | schedule | AdamW | steps | from |
/// |---|---|--:|---|---|---|---|
/// | `own` | [`OwnWeights`] | 1e-5 | constant | .9, .95, decay 0.1 | 500 | as `esft`; ours |
/// | `full` | all weights | 3e-5 | constant | .9, .95, decay 0.1 | 500 | full fine-tuning in arXiv 2407.01906 |
/// | `esft` | [`Esft`] | 1e-5 | constant | .9, .95, decay 0.1 | 500 | arXiv 2407.01906 |
/// | `smt` | [`Smt`] | 9.65e-6 | linear to 0 | .9, .95 | 3 epochs | code of arXiv 2405.15525 |
/// | `layers` | [`LayerTurns`] | 2e-5; 3e-4 with a projection | constant (ours) | .9, .999 | 3 epochs (ours) | LMFlow's script; OwLore's script |
/// | `lora` | [`LoraConfig`] | 1e-4; 2e-5 for CorDA | cosine to 0, 3% warm-up | .9, .999 | 3 epochs (ours) | LoRA in arXiv 2407.01906; CorDA's code |
/// | `mixture`, top k | [`MixtureConfig`] | 3e-4; 2e-4 in blocks | constant, 100 steps of warm-up | .9, .999 | 2 epochs | MoLA's, MixLoRA's code |
/// | `mixture`, uncertain or all | | 2e-4 | cosine to 0, 3% warm-up | .9, .999 | 2 epochs | DynMoLE's, LoRAMoE's code |
/// | `mixture`, ranks | | 1e-4 | cosine to 0, 10% warm-up | .9, .999 | 3 epochs | SMoRA's code |
/// | `mixture`, self-activated | | 5e-4 | constant | .9, .999 | 500 | MoRAM's code |
/// | `mixture`, sparse | | 3e-4 | constant | .9, .999 | 2 epochs (ours) | arXiv 2510.08396 |
/// | `mixture`, label | | 2e-4 | cosine to 0, 3% warm-up | .9, .999 | 2 epochs | ours: LoRA-Mixer's are unknown |
/// | `compressed_experts` | [`Compressed`] | 2e-5 | cosine to 0, 3% warm-up | .9, .999 | 2 epochs | arXiv 2503.00634 |
/// | `condensers` | [`CondenserTuning`] | 1e-5 | cosine to 10%, 10% warm-up | .9, .999 | 2 epochs (ours) | code of arXiv 2604.23036 |
/// | `null_experts` | [`NullExpertTuning`] | 5e-5 | constant (ours) | .9, .999 | 2 epochs | arXiv 2406.13233 |
/// | `recurrent_router` | [`RecurrentRouterTuning`] | 1e-3 | cosine to 0, 3% warm-up | .9, .999 | 2 epochs | ours: it was published for training from scratch |
/// | `duo` | [`DuoTuning`] | 1e-3 | cosine to 0, 3% warm-up | .9, .999 | 200 | ours: it was published for training from scratch |
/// | `token_skip` | [`TokenSkipTuning`] | 1e-3 | cosine to 0, 3% warm-up | .9, .999 | 1 epoch | arXiv 2410.13859; rate ours |
/// | `final_router` | [`FinalRouterTuning`] | 1e-4 | constant (ours) | .9, .999 | 2 epochs (ours) | arXiv 2605.07260, of which the abstract is known |
/// | `router_targets` | [`RouterTargetTuning`] | 1e-3 | constant (ours) | .9, .999 | 2 epochs (ours) | arXiv 2507.18464 |
/// | `label_experts` | [`LabelExperts`] | 1e-5 | constant | .9, .95, decay 0.1 | 500 | as `esft`; ours |
/// | `loss_free` | [`LossFree`] | 1e-5 | constant | .9, .95, decay 0.1 | 500 | as `esft`; ours |
/// | `mote` | [`Mote`] | 1e-4 | cosine to 0, 3% warm-up | .9, .999 | 500 | ours: the paper's are unknown |
/// | `smoe_dropout` | [`SmoeDropout`] | 3e-5 | cosine to 0, 3% warm-up | .9, .999 | 500 | ours: it was published for training from scratch |
///
/// Gradients are clipped at a norm of 1 throughout, nothing is evaluated on the way and the last values are kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum MethodConfig {
    /// Some of the model's own weights.
    Own(OwnWeights),
    /// All of them.
    Full {},
    /// The experts that the training rows use.
    Esft(Esft),
    /// The blocks with the strongest gradients.
    Smt(Smt),
    /// A few layers at a time.
    Layers(LayerTurns),
    /// Low-rank additions.
    Lora(Box<LoraConfig>),
    /// Mixtures of low-rank additions, of which a router chooses for every token.
    Mixture(Box<MixtureConfig>),
    /// Fewer experts per token, and factors from those that do not run.
    CompressedExperts(Compressed),
    /// Uneven routing, and experts that every token passes.
    Condensers(CondenserTuning),
    /// Experts that do nothing.
    NullExperts(NullExpertTuning),
    /// A router across layers.
    RecurrentRouter(RecurrentRouterTuning),
    /// Many or few experts for every token, under a budget.
    Duo(DuoTuning),
    /// Tokens that skip feed-forward halves of redundant layers.
    TokenSkip(TokenSkipTuning),
    /// The last router, taught by routes that it could have taken.
    FinalRouter(FinalRouterTuning),
    /// A router, taught which experts are right.
    RouterTargets(RouterTargetTuning),
    /// Experts by the labels of rows.
    LabelExperts(LabelExperts),
    /// Balance by a bias instead of a loss.
    LossFree(LossFree),
    /// Ternary experts.
    Mote(Mote),
    /// Experts under random routers.
    SmoeDropout(SmoeDropout),
}

/// Compressed experts, and what is trained beside them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compressed {
    /// How many experts of a token do not run.
    pub experts: CompressedExperts,
    /// The model's own weights that are trained as well.
    #[serde(default)]
    pub own: OwnWeights,
}

impl TuningMethod for Compressed {
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        self.experts.check(on)?;
        if self.own != OwnWeights::default() { self.own.check(on) } else { Ok(()) }
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        let installed = match self.own == OwnWeights::default() {
            true => Installed::default(),
            false => self.own.install(on, set)?,
        };
        Ok(installed.and(self.experts.install(on, set)?))
    }

    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        if self.own != OwnWeights::default() {
            self.own.outline(on, set)?;
        }
        self.experts.install(on, set)
    }
}

/// The experts that `waves` use, counted in a sweep over all of them.
impl TuningMethod for Esft {
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        self.validate()?;
        OwnWeights { experts: true, ..OwnWeights::default() }.check(on)
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        let mut calibration = Calibration::of_waves(on.model, on.waves).group(on.group);
        if let Some(directory) = on.directory {
            calibration = calibration.store(directory.join("expert_use"));
        }
        self.select(&self.scores(calibration)?)?.weights().install(on, set)
    }

    /// All experts, any of which the rows may use.
    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.validate()?;
        let selection = EsftSelection {
            experts: BTreeMap::new(),
            shared_experts: self.shared_experts,
            non_expert_modules: self.non_expert_modules,
        };
        OwnWeights { only: None, ..selection.weights() }.outline(on, set)
    }
}

impl MethodConfig {
    /// Whether several processes share the steps of this method: whether all that it makes of a wave is a gradient.
    pub fn is_shareable(&self) -> bool {
        match self {
            Self::Own(_) | Self::Full {} | Self::Esft(_) => true,
            // Covariances are sums over all rows, which every process would have to run.
            Self::Lora(config) => !matches!(config.init_lora_weights, Init::Corda(_)),
            _ => false,
        }
    }

    /// The method.
    fn method(&self) -> Box<dyn TuningMethod + '_> {
        match self {
            Self::Own(weights) => Box::new(weights.clone()),
            Self::Full {} => Box::new(OwnWeights::full()),
            Self::Esft(esft) => Box::new(*esft),
            Self::Smt(smt) => Box::new(*smt),
            Self::Layers(turns) => Box::new(turns.clone()),
            Self::Lora(config) => config.clone(),
            Self::Mixture(config) => config.clone(),
            Self::CompressedExperts(compressed) => Box::new(compressed.clone()),
            Self::Condensers(tuning) => Box::new(tuning.clone()),
            Self::NullExperts(tuning) => Box::new(tuning.clone()),
            Self::RecurrentRouter(tuning) => Box::new(tuning.clone()),
            Self::Duo(tuning) => Box::new(tuning.clone()),
            Self::TokenSkip(tuning) => Box::new(tuning.clone()),
            Self::FinalRouter(tuning) => Box::new(*tuning),
            Self::RouterTargets(tuning) => Box::new(tuning.clone()),
            Self::LabelExperts(method) => Box::new(method.clone()),
            Self::LossFree(method) => Box::new(method.clone()),
            Self::Mote(method) => Box::new(*method),
            Self::SmoeDropout(method) => Box::new(method.clone()),
        }
    }

    /// Makes everything random about it begin with this seed.
    pub fn set_seed(&mut self, seed: u64) {
        match self {
            Self::Layers(turns) => turns.sampling.seed = seed,
            Self::Lora(config) => config.seed = seed,
            Self::Mixture(config) => config.seed = seed,
            Self::RecurrentRouter(tuning) => tuning.router.seed = seed,
            Self::SmoeDropout(method) => method.seed = seed,
            Self::FinalRouter(method) => method.seed = seed,
            _ => {}
        }
    }

    /// Whether it trains routers, which a router gradient from all experts needs.
    pub fn trains_routers(&self) -> bool {
        match self {
            Self::Own(weights) => weights.router,
            Self::Full {} | Self::Layers(_) => true,
            Self::Esft(esft) => esft.non_expert_modules,
            Self::CompressedExperts(compressed) => compressed.own.router,
            Self::Condensers(tuning) => tuning.weights.router,
            Self::Mote(method) => method.router,
            // DenseMixer knows the model's own rule alone
            Self::NullExperts(_)
            | Self::RecurrentRouter(_)
            | Self::Duo(_)
            | Self::TokenSkip(_)
            | Self::FinalRouter(_)
            | Self::RouterTargets(_)
            | Self::LabelExperts(_)
            | Self::LossFree(_)
            | Self::SmoeDropout(_) => false,
            Self::Smt(_) | Self::Lora(_) | Self::Mixture(_) => false,
        }
    }

    /// What it is trained with by default: see the table above.
    pub fn training(&self) -> TrainOptions {
        let adamw = |beta2: f64, weight_decay: f64| AdamW { beta2, weight_decay, ..AdamW::default() };
        let constant = Schedule { warmup: 0.0, decay: Decay::Constant, final_share: 1.0, ..Schedule::default() };
        let cosine = Schedule { warmup: 0.03, decay: Decay::Cosine, final_share: 0.0, ..Schedule::default() };
        let linear = Schedule { warmup: 0.0, decay: Decay::Linear, ..cosine };
        let some = |steps| (1_000_000, Some(steps));
        let epochs = |epochs| (epochs, None);
        let plain = adamw(0.999, 0.0);
        let (peak, schedule, optimizer, (epochs, max_steps)) = match self {
            Self::Own(_) | Self::Esft(_) => (1e-5, constant, adamw(0.95, 0.1), some(500)),
            Self::Full {} => (3e-5, constant, adamw(0.95, 0.1), some(500)),
            Self::Smt(_) => (9.65e-6, linear, adamw(0.95, 0.0), epochs(3)),
            Self::Layers(turns) if turns.projection.is_some() => (3e-4, constant, plain, epochs(3)),
            Self::Layers(_) => (2e-5, constant, plain, epochs(3)),
            Self::Lora(config) if matches!(config.init_lora_weights, Init::Corda(_)) => {
                (2e-5, cosine, plain, epochs(3))
            }
            Self::Lora(_) => (1e-4, cosine, plain, epochs(3)),
            Self::Mixture(config) => match config.gate {
                Gate::TopK { .. } | Gate::TopP { .. } | Gate::Top1 {} => {
                    let peak = if config.blocks { 2e-4 } else { 3e-4 };
                    (peak, Schedule { warmup_steps: Some(100), ..constant }, plain, epochs(2))
                }
                Gate::Uncertain { .. } | Gate::Dense {} | Gate::Label {} => (2e-4, cosine, plain, epochs(2)),
                Gate::Ranks { .. } => (1e-4, Schedule { warmup: 0.1, ..cosine }, plain, epochs(3)),
                Gate::SelfActivated { .. } => (5e-4, constant, plain, some(500)),
                Gate::Sparse { .. } => (3e-4, constant, plain, epochs(2)),
            },
            Self::CompressedExperts(_) => (2e-5, cosine, plain, epochs(2)),
            Self::Condensers(_) => (1e-5, Schedule { warmup: 0.1, final_share: 0.1, ..cosine }, plain, epochs(2)),
            Self::NullExperts(_) => (5e-5, constant, plain, epochs(2)),
            Self::RecurrentRouter(_) => (1e-3, cosine, plain, epochs(2)),
            Self::Duo(_) => (1e-3, cosine, plain, some(200)),
            Self::TokenSkip(_) => (1e-3, cosine, plain, epochs(1)),
            Self::FinalRouter(_) => (1e-4, constant, plain, epochs(2)),
            Self::RouterTargets(_) => (1e-3, constant, plain, epochs(2)),
            Self::LabelExperts(_) => (1e-5, constant, adamw(0.95, 0.1), some(500)),
            Self::LossFree(_) => (1e-5, constant, adamw(0.95, 0.1), some(500)),
            Self::Mote(_) => (1e-4, cosine, plain, some(500)),
            Self::SmoeDropout(_) => (3e-5, cosine, plain, some(500)),
        };
        TrainOptions {
            epochs,
            max_steps,
            schedule: Schedule { peak, ..schedule },
            optimizer: Optimizer::AdamW(optimizer),
            clip: Some(1.0),
            evaluate_every: None,
            keep: Keep::Last,
            ..TrainOptions::default()
        }
    }
}

impl TuningMethod for MethodConfig {
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        self.method().check(on)
    }

    fn phases(&self, steps: usize) -> Vec<Phase> {
        self.method().phases(steps)
    }

    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.method().outline(on, set)
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.method().install(on, set)
    }
}

//! The one trait of all methods: how a way of fine-tuning puts itself into a model.

use std::{
    collections::BTreeMap,
    fmt::{self, Debug},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use moe_checkpoint::WeightFormat;
use moe_checkpoint::group::{Alone, Group};
use moe_core::{
    Engine, EngineOptions, Model,
    adaptive::RunTime,
    data::Wave,
    trace::Signals,
    train::{ParameterGroup, Parameters},
};

use crate::{
    AdapterSet, Result, TrainingHooks,
    compressed_experts::CompressedLayers,
    condenser::Condensers,
    duo::Duo,
    lora::Lora,
    loss_free::BalanceBias,
    mixture::Mixture,
    null_experts::NullExperts,
    recurrent_router::RecurrentRouter,
    router_loss::{RouterLossReport, RouterLosses},
    smoe_dropout::RandomRouting,
    smt::BlockWatch,
    token_skip::TokenSkipRouter,
};

/// A way of fine-tuning.
///
/// It puts adapters, or the model's own weights, into an [`AdapterSet`], and says what else training needs: hooks,
/// groups of parameters, a model under an overlay. Methods of several phases are asked once per phase. Anything outside
/// this crate that does so is a method like those in it.
///
/// ```
/// use moe_core::Model;
/// use moe_peft::{AdapterSet, FineTune, Installed, Result, Setting, TuningMethod, model_weights::OwnWeights};
///
/// /// Trains the norms of the last layer.
/// #[derive(Debug)]
/// struct LastNorms;
///
/// impl TuningMethod for LastNorms {
///     fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
///         let last = on.model.config().layers.len() - 1;
///         OwnWeights { norms: true, layers: Some([last].into()), ..OwnWeights::default() }.install(on, set)
///     }
/// }
///
/// # fn train(model: &Model) -> Result<()> {
/// let mut set = AdapterSet::new();
/// let installed = LastNorms.install(&Setting::new(model), &mut set)?;
/// let task = FineTune::new(installed.model(model), set.into())?;
/// # Ok(())
/// # }
/// ```
pub trait TuningMethod: Debug + Send + Sync {
    /// Checks the method against a model, before anything is run or written.
    ///
    /// # Errors
    /// [`Error::Input`](crate::Error::Input) and [`Error::Unsupported`](crate::Error::Unsupported) for what could never
    /// be installed, or trained in vain.
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        let _ = on;
        Ok(())
    }

    /// The phases of a training of so many steps in all; each has an optimizer, a schedule and saved states of its own.
    /// One by default.
    fn phases(&self, steps: usize) -> Vec<Phase> {
        vec![Phase { name: "training", steps }]
    }

    /// Puts what the phase [`Setting::phase`] may train into `set`, without running the model, with the names and
    /// shapes that [`install`](Self::install) gives it and any values: everything that such a set can show to be wrong
    /// is found before a token is read. Where the model has to be run to find out what is trained, all that could be.
    /// By default what is installed; whatever runs the model to be installed, or is large, says it here.
    /// [`Setting::take_before`] gives nothing.
    ///
    /// # Errors
    /// What is wrong with the method for this model.
    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.install(on, set)
    }

    /// Puts the phase [`Setting::phase`] into `set`.
    ///
    /// # Errors
    /// What is wrong with the method for this model, and what keeps weights from being read or the model from being
    /// run.
    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed>;
}

/// A part of a training.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Phase {
    /// Its name, for files and logs.
    pub name: &'static str,
    /// Its optimizer steps.
    pub steps: usize,
}

/// What a method is installed on.
#[derive(Debug)]
pub struct Setting<'a> {
    /// The model.
    pub model: &'a Model,
    /// The rows that will be trained on, for methods that look at them before.
    pub waves: &'a [Wave],
    /// Labels of the sequences of waves by the wave's id: the task or type of each row. Empty if rows have none.
    pub labels: &'a BTreeMap<u64, Vec<usize>>,
    /// Losses on the routers that will be trained with, for methods that look at gradients before.
    pub router_losses: RouterLosses,
    /// Waves of an optimizer step.
    pub waves_per_step: usize,
    /// Number of the phase, from 0.
    pub phase: usize,
    /// Directory for what a method finds out before it trains, so that an interrupted run need not find it out again.
    pub directory: Option<&'a Path>,
    /// Who trains together. Every rank installs the same method on the same rows.
    pub group: &'a dyn Group,
    pub(crate) before: Mutex<Option<PhaseEnd>>,
}

static NO_LABELS: BTreeMap<u64, Vec<usize>> = BTreeMap::new();

impl<'a> Setting<'a> {
    /// The first phase on a model, without rows.
    pub fn new(model: &'a Model) -> Self {
        Self {
            model,
            waves: &[],
            labels: &NO_LABELS,
            router_losses: RouterLosses::default(),
            waves_per_step: 1,
            phase: 0,
            directory: None,
            group: &Alone,
            before: Mutex::default(),
        }
    }

    /// The same with rows.
    #[must_use]
    pub fn with_waves(self, waves: &'a [Wave]) -> Self {
        Self { waves, ..self }
    }

    /// The same in a later phase, after `before`.
    #[must_use]
    pub fn after(self, before: PhaseEnd) -> Self {
        Self { phase: self.phase + 1, before: Mutex::new(Some(before)), ..self }
    }

    /// Checks that the model's `max_memory` holds a step on the largest of the waves, before anything that leads to it.
    ///
    /// # Errors
    /// [`Error::Memory`](moe_core::Error::Memory) with the bytes that it needs.
    pub fn check_memory(&self) -> Result<()> {
        let Some(tokens) = self.waves.iter().map(Wave::tokens).max() else { return Ok(()) };
        let engine = Engine::new(self.model, EngineOptions { loss: true, ..EngineOptions::default() });
        engine.plan(tokens, Signals::PARAMETERS)?;
        Ok(())
    }

    /// What the phase before ended with; once.
    pub fn take_before(&self) -> Option<PhaseEnd> {
        self.before.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// What a phase ended with.
#[derive(Debug)]
pub struct PhaseEnd {
    /// The trained values.
    pub parameters: Parameters,
    /// What was installed besides.
    pub artifacts: Artifacts,
}

/// What a method gives training besides the adapters in the set.
#[derive(Default)]
pub struct Installed {
    /// The model to train, where it is not the one that was given: under an overlay, say.
    pub model: Option<Model>,
    /// What happens besides gradient descent.
    pub hooks: Option<Box<dyn TrainingHooks>>,
    /// How some parameters are trained in another way than the rest.
    pub groups: Vec<ParameterGroup>,
    /// What can be saved, or asked, afterwards.
    pub artifacts: Artifacts,
}

impl fmt::Debug for Installed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Installed");
        shown.field("model", &self.model.is_some()).field("hooks", &self.hooks.is_some());
        shown.field("groups", &self.groups).field("artifacts", &self.artifacts).finish()
    }
}

impl Installed {
    /// The model to train: `base`, unless the method has another.
    pub fn model<'a>(&'a self, base: &'a Model) -> &'a Model {
        self.model.as_ref().unwrap_or(base)
    }

    /// Both, for a method that is made of two. Of models and hooks only one of them may have some; the first counts.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.groups.extend(other.groups);
        Self {
            model: self.model.or(other.model),
            hooks: self.hooks.or(other.hooks),
            groups: self.groups,
            artifacts: self.artifacts.and(other.artifacts),
        }
    }
}

impl From<Artifacts> for Installed {
    fn from(artifacts: Artifacts) -> Self {
        Self { artifacts, ..Self::default() }
    }
}

/// What was installed beside the weights of a model, by kind.
#[derive(Clone, Debug, Default)]
pub struct Artifacts {
    /// Low-rank additions.
    pub lora: Option<Arc<Lora>>,
    /// A mixture of them.
    pub mixture: Option<Arc<Mixture>>,
    /// Factors of experts that do not run.
    pub compressed: Option<CompressedLayers>,
    /// Biases of routing, and experts that every token passes.
    pub condensers: Option<Arc<Condensers>>,
    /// Losses on routers.
    pub router_losses: Option<Arc<RouterLossReport>>,
    /// Sums of gradients by block.
    pub blocks: Option<BlockWatch>,
    /// Experts that do nothing.
    pub null_experts: Option<Arc<NullExperts>>,
    /// A router across layers.
    pub recurrent_router: Option<Arc<RecurrentRouter>>,
    /// A bias that balances the load.
    pub balance_bias: Option<Arc<BalanceBias>>,
    /// A choice of two sizes.
    pub duo: Option<Arc<Duo>>,
    /// Random routers.
    pub random_routing: Option<Arc<RandomRouting>>,
    /// Scores by which tokens skip feed-forward halves.
    pub token_skip: Option<Arc<TokenSkipRouter>>,
    /// The format that routed experts were trained in, and are packed in when they are saved.
    pub packed: Option<WeightFormat>,
}

impl Artifacts {
    /// How the trained model is to be run, where that is another way than the model's and needs no weights.
    pub fn run_time(&self) -> RunTime {
        let bias = self.balance_bias.as_ref().map(|bias| bias.routing());
        let routing = bias.or_else(|| self.random_routing.as_ref().map(|random| random.routing()));
        let layers = self.token_skip.as_ref().map(|skip| skip.layers());
        RunTime { routing, layers, ..RunTime::default() }
    }

    /// A model with what stands beside its weights: condensers, null experts, a recurrent router, another routing;
    /// `None` where nothing does.
    ///
    /// # Errors
    /// Those of each.
    pub fn beside(&self, model: &Model) -> Result<Option<Model>> {
        if let Some(condensers) = &self.condensers {
            return condensers.applied_to(model).map(Some);
        }
        if let Some(nulls) = &self.null_experts {
            return nulls.applied_to(model).map(Some);
        }
        if let Some(router) = &self.recurrent_router {
            return router.applied_to(model).map(Some);
        }
        if let Some(duo) = &self.duo {
            duo.set_temperature(None);
            return duo.applied_to(model).map(Some);
        }
        Ok(self.run_time().on(model)?)
    }

    fn and(self, other: Self) -> Self {
        Self {
            lora: self.lora.or(other.lora),
            mixture: self.mixture.or(other.mixture),
            compressed: self.compressed.or(other.compressed),
            condensers: self.condensers.or(other.condensers),
            router_losses: self.router_losses.or(other.router_losses),
            blocks: self.blocks.or(other.blocks),
            null_experts: self.null_experts.or(other.null_experts),
            recurrent_router: self.recurrent_router.or(other.recurrent_router),
            balance_bias: self.balance_bias.or(other.balance_bias),
            duo: self.duo.or(other.duo),
            random_routing: self.random_routing.or(other.random_routing),
            token_skip: self.token_skip.or(other.token_skip),
            packed: self.packed.or(other.packed),
        }
    }
}

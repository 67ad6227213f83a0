//! Experts of dense models: copies, parts, clusters, several models.
//!
//! The outcome is a model over models, as that of every method is: it is run, pruned, trained or written like any
//! other, and what stock transformers loads is the sibling family with experts (`mixtral` for Llama and Mistral,
//! `qwen2_moe`, `qwen3_moe`).
//!
//! # Exactness
//!
//! A gated network is the sum of its units, so that parts of it sum to it. Routing weights sum to one over the chosen
//! experts; the down projection of a part is therefore multiplied by the number of parts, which with a router of zeros
//! and all parts chosen gives the network back. With `k` of `N` parts the sum is scaled by `N / k`, as in FactorLLM
//! (arXiv 2408.11855); [`PartScale::Sum`] multiplies by `k` instead, so that the chosen parts are added as they are. A
//! shared part goes through a gate of zeros, whose sigmoid is a half, and is doubled. In f32 and
//! for powers of two nothing else is rounded.

mod partition;
mod recipe;
mod source;
mod start;
mod target;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, OnceLock};

use moe_checkpoint::{BeforeAfter, Checkpoint, ExpertPart, LayerRole, ModelDescription, Role, Step, TensorInfo};
use serde::{Deserialize, Serialize};
use serde_json::json;

pub use recipe::{ClusterBy, PartScale, RouterStart, UpcycleMethod, Upcycling};

use crate::evidence::Evidence;
use crate::{Error, Result};
use source::Made;

/// The method of the [step](Step) that upcycling adds to the record of a model.
const METHOD: &str = "upcycle";

/// What upcycling takes besides a dense model and a recipe.
#[derive(Clone, Debug, Default)]
pub struct UpcycleInputs {
    /// Other dense models, for [`UpcycleMethod::Models`].
    pub others: Vec<Arc<Checkpoint>>,
    /// Tokens that the layers saw, collected on [`Upcycling::one_expert`] of the dense model.
    pub evidence: Option<Arc<Evidence>>,
    /// The same of the rows of each domain, for [`UpcycleMethod::Domains`].
    pub domains: Vec<Arc<Evidence>>,
    /// Directions of experts by layer, `[experts, hidden]` row-major, for [`RouterStart::Prototypes`].
    pub prototypes: Option<BTreeMap<usize, Vec<f32>>>,
}

/// What upcycling did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UpcycleReport {
    /// `model_type` before and after.
    pub family: [String; 2],
    /// Method, in a word.
    pub method: String,
    /// Routed experts per layer.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Width of the dense network, and of one expert.
    pub width: BeforeAfter,
    /// Width of the shared expert.
    pub shared_width: usize,
    /// What the routers begin with.
    pub router: RouterStart,
    /// What chosen parts are multiplied by.
    pub scale: PartScale,
    /// Parameters of the whole model.
    pub parameters: BeforeAfter,
    /// Parameters that one token runs through, embeddings included.
    pub active: BeforeAfter,
    /// Whether the function is that of the dense model, but for rounding.
    pub exact: bool,
    /// What to know.
    pub notes: Vec<String>,
}

impl fmt::Display for UpcycleReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [before, after] = &self.family;
        writeln!(f, "{before} -> {after}, by `{}`", self.method)?;
        let Self { experts, top_k, width, shared_width, parameters, active, .. } = self;
        writeln!(
            f,
            "{experts} experts of width {} (of {}), {top_k} per token, shared {shared_width}",
            width.after, width.before
        )?;
        writeln!(f, "parameters {}, active {}", parameters.counts(), active.counts())?;
        let function = if self.exact { "that of the dense model" } else { "not that of the dense model: train it" };
        writeln!(f, "function: {function}")?;
        self.notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))
    }
}

/// A Mixture of Experts made of dense models, and what that did.
#[derive(Clone, Debug)]
pub struct UpcycledModel {
    model: Arc<Checkpoint>,
    report: UpcycleReport,
}

impl UpcycledModel {
    /// The model: to be run, trained, [written](moe_checkpoint::write()).
    pub fn model(&self) -> &Arc<Checkpoint> {
        &self.model
    }

    /// What became of the dense model.
    pub fn report(&self) -> &UpcycleReport {
        &self.report
    }
}

impl Upcycling {
    /// The Mixture of Experts that this recipe makes of a dense model. Nothing is read yet: experts are made when they
    /// are asked for.
    ///
    /// ```no_run
    /// use std::sync::Arc;
    /// use moe_checkpoint::{Checkpoint, WriteOptions, write};
    /// use moe_merge::{UpcycleInputs, UpcycleMethod, Upcycling};
    ///
    /// let dense = Arc::new(Checkpoint::open_dense("models/SmolLM2-135M")?);
    /// let recipe = Upcycling { shared_width: 512, ..Upcycling::new(UpcycleMethod::Split { copies: 1 }, 8) };
    /// let made = recipe.on(&dense, &UpcycleInputs::default())?;
    /// println!("{}", made.report());
    /// write(made.model(), "out/smol-moe", &WriteOptions::default())?;
    /// # Ok::<(), moe_merge::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for numbers that do not go together or with the model; [`Error::Infeasible`] for a
    /// model with experts, models of different sizes, or one that no stock family with experts can hold;
    /// [`Error::OtherModel`] for evidence of another model; [`Error::InvalidEvidence`] for directions of other sizes.
    pub fn on(&self, base: &Arc<Checkpoint>, inputs: &UpcycleInputs) -> Result<UpcycledModel> {
        let dense = target::dense_width(base)?;
        let sampled = inputs.evidence.is_some() || !inputs.domains.is_empty();
        self.validate(dense, 1 + inputs.others.len(), (inputs.evidence.is_some(), inputs.domains.len()))?;
        let mut models = vec![base.dequantized()?];
        for other in &inputs.others {
            models.push(other.dequantized()?);
        }
        let average = matches!(self.method, UpcycleMethod::Models { average: true });
        models[1..].iter().try_for_each(|other| same_sizes(&models[0], other, average))?;
        let target = target::Target::new(&models[0], self)?;
        let router = self.router(sampled);
        self.check_prototypes(router, &models[0], inputs)?;
        for evidence in inputs.evidence.iter().chain(&inputs.domains) {
            let of = Self::one_expert().on(base, &UpcycleInputs::default())?;
            if !of.model.is_model(&evidence.model) {
                let (path, expected) = (base.dir().to_path_buf(), evidence.model.clone());
                return Err(Error::OtherModel { what: "evidence", path, found: of.model.fingerprint(), expected });
            }
        }
        let report = self.report(&models[0], &target, router);
        let mut recipe = serde_json::to_value(&report).map_err(|error| Error::invalid_plan(error.to_string()))?;
        recipe["recipe"] = json!(self);
        recipe["models"] = models.iter().map(|model| json!(model.fingerprint())).collect();
        recipe["evidence"] = json!(inputs.evidence.as_ref().map(|evidence| evidence.digest()));
        recipe["domains"] = inputs.domains.iter().map(|evidence| json!(evidence.digest())).collect();
        recipe["prototypes"] = json!(inputs.prototypes.as_ref().map(digest_of));
        let summary = format!(
            "{} routed experts of width {} made of a dense `{}` by `{}`",
            self.experts,
            target.width,
            report.family[0],
            self.name()
        );
        let step = Step::new(METHOD, &models[0], recipe, summary);
        let description =
            ModelDescription { config: target.config, tensors: target.tensors, ..ModelDescription::of(&models[0]) };
        let source = source::Upcycled {
            recipe: self.clone(),
            router,
            evidence: inputs.evidence.clone(),
            domains: inputs.domains.clone(),
            prototypes: inputs.prototypes.clone(),
            made: made(&models[0], target.family, target.stored_shared)?,
            partitions: models[0].config().layers.iter().map(|_| OnceLock::new()).collect(),
            models,
            step,
        };
        let model = Arc::new(Checkpoint::from_source(description, Arc::new(source))?);
        Ok(UpcycledModel { model, report })
    }

    fn check_prototypes(&self, router: RouterStart, base: &Checkpoint, inputs: &UpcycleInputs) -> Result<()> {
        let Some(prototypes) = &inputs.prototypes else {
            return match router {
                RouterStart::Prototypes => {
                    Err(Error::parameter("prototypes", "none", "a direction per expert and layer"))
                }
                _ => Ok(()),
            };
        };
        if router != RouterStart::Prototypes {
            return Err(Error::parameter("prototypes", "given", "none unless the router begins with `prototypes`"));
        }
        let expected = self.experts * base.config().hidden_size;
        for layer in 0..base.config().layers.len() {
            let found = prototypes.get(&layer).map_or(0, Vec::len);
            if found != expected {
                let reason = format!("layer {layer} has {found} numbers in directions of experts, expected {expected}");
                return Err(Error::invalid_evidence(reason));
            }
        }
        Ok(())
    }

    fn report(&self, base: &Checkpoint, target: &target::Target, router: RouterStart) -> UpcycleReport {
        let elements = |spec: &moe_checkpoint::TensorSpec| spec.shape.iter().product::<usize>() as u64;
        let after: u64 = target.tensors.iter().map(elements).sum();
        let one = 3 * (target.width * base.config().hidden_size * base.config().layers.len()) as u64;
        let before = base.parameters();
        let mut notes = Vec::new();
        let plain_f32 = base.plain_tensors().all(|info| info.dtype == moe_checkpoint::Dtype::F32);
        if self.parts() > 1 && !(self.factor() as usize).is_power_of_two() && !plain_f32 {
            notes.push(format!("weights are stored in 16 bits, and {} times a weight is rounded", self.factor()));
        }
        let shared = self.shared(target.dense);
        if target.stored_shared > shared {
            let width = target.stored_shared;
            notes.push(format!("`{}` has a shared expert in any case: here {width} units of zeros", target.family));
        }
        if self.top_k() < self.experts && router == RouterStart::Zero {
            notes.push("a router of zeros sends all tokens to the first experts until it is trained".into());
        }
        if matches!(self.method, UpcycleMethod::Ternary { zero: false }) {
            notes.push("ternary experts are added to the whole network: the output is about twice as large".into());
        }
        UpcycleReport {
            family: [base.config().model_type.clone(), target.family.to_string()],
            method: self.name().to_string(),
            experts: self.experts,
            top_k: self.top_k(),
            width: BeforeAfter { before: target.dense as u64, after: target.width as u64 },
            shared_width: shared,
            router,
            scale: self.scale,
            parameters: BeforeAfter { before, after },
            active: BeforeAfter { before, after: after - one * (self.experts - self.top_k()) as u64 },
            exact: self.is_exact(),
            notes,
        }
    }
}

/// A name for directions of experts.
fn digest_of(prototypes: &BTreeMap<usize, Vec<f32>>) -> String {
    let mut hasher = blake3::Hasher::new();
    for (layer, rows) in prototypes {
        hasher.update(&(*layer as u64).to_le_bytes());
        let bytes: Vec<u8> = rows.iter().flat_map(|value| value.to_le_bytes()).collect();
        hasher.update(&bytes);
    }
    hasher.finalize().to_hex().to_string()
}

/// Refuses a model of other sizes than the base's: of its networks, or of any tensor.
fn same_sizes(base: &Checkpoint, other: &Checkpoint, all: bool) -> Result<()> {
    let dense = [LayerRole::DenseGate, LayerRole::DenseUp, LayerRole::DenseDown];
    let names: std::collections::BTreeSet<String> = (0..base.config().layers.len())
        .flat_map(|layer| dense.map(|role| base.family().tensor_name(Role::Layer(layer, role))))
        .collect();
    target::dense_width(other)?;
    for info in base.plain_tensors().filter(|info| all || names.contains(&info.name)) {
        let found = other.plain_info(&info.name)?;
        if found.shape != info.shape || (all && found.dtype != info.dtype) {
            let TensorInfo { name, shape, dtype, .. } = found;
            let reason = format!("`{name}` is {dtype} {shape:?}, that of the base {:?} {:?}", info.dtype, info.shape);
            return Err(Error::infeasible(other.dir().display().to_string(), reason));
        }
    }
    Ok(())
}

/// Names of the tensors that are neither those of the dense model nor of experts.
fn made(base: &Checkpoint, family: &str, shared: usize) -> Result<BTreeMap<String, (usize, Made)>> {
    let family = moe_checkpoint::family(family)?;
    let mut made = BTreeMap::new();
    for layer in 0..base.config().layers.len() {
        let mut add = |role, what| {
            let name = target::in_place(base, layer, family.tensor_name(Role::Layer(layer, role)));
            made.insert(name, (layer, what));
        };
        add(LayerRole::Router, Made::Router);
        if shared > 0 {
            add(LayerRole::SharedGate, Made::Shared(ExpertPart::Gate));
            add(LayerRole::SharedUp, Made::Shared(ExpertPart::Up));
            add(LayerRole::SharedDown, Made::Shared(ExpertPart::Down));
            add(LayerRole::SharedExpertGate, Made::SharedGate);
        }
    }
    Ok(made)
}

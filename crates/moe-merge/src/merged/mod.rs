//! A plan on a model is a model: merged experts are made when they are read.

mod check;
mod made;
mod mtp;
pub(crate) mod router_rows;
mod source;
mod target;
mod tensors;
pub(crate) mod weights;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use moe_checkpoint::{BeforeAfter, Checkpoint, ModelDescription, Mtp, Step, check_space};
use serde::{Deserialize, Serialize};

pub(crate) use check::not_grouped;
pub(crate) use made::encoded_part;
pub use weights::MergedWeights;

use crate::evidence::Evidence;
use crate::plan::MergePlan;
use crate::report::{LayerMergeReport, MergeReport};
use crate::router::RouterConfig;
use crate::{Error, Result};

/// The method of the [step](Step) that a merge adds to the record of a model.
const METHOD: &str = "merge";

/// What the merged model looks like to whoever loads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum OutputForm {
    /// One expert per group, router rows of the others deleted (or merged, if the recipe does so): loads in stock
    /// runtimes. Refused where layers have different numbers of groups.
    Stock,
    /// One set of weights per group, and an index map from router rows to sets (`docs/grouped-format.md`): the router
    /// of the recipe, any number of groups per layer. Stock runtimes refuse it.
    Grouped,
    /// Every expert of a group a copy of the merged one, the router as it was: loads in stock runtimes, saves nothing.
    StockCopies,
}

impl OutputForm {
    /// The name used in recipes and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Grouped => "grouped",
            Self::StockCopies => "stock-copies",
        }
    }
}

impl fmt::Display for OutputForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for OutputForm {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let all = [Self::Stock, Self::Grouped, Self::StockCopies];
        let found = all.into_iter().find(|form| form.name() == text);
        found.ok_or_else(|| Error::parameter("form", format!("`{text}`"), "`stock`, `grouped` or `stock-copies`"))
    }
}

/// How a plan is carried out.
#[derive(Clone)]
pub struct MergeOptions {
    /// What the model looks like.
    pub form: OutputForm,
    /// The evidence the plan was made from: needed again by recipes that fit on sampled tokens.
    pub evidence: Option<Arc<Evidence>>,
    /// Experts that were merged before by this plan ([`MergePlan::compute`], or a sequential run); otherwise they are
    /// computed when they are read.
    pub merged: Option<MergedWeights>,
    /// What becomes of layers that predict further tokens. Needed where a checkpoint has them.
    pub mtp: Option<Mtp>,
    /// Where experts that are computed wait, in anonymous files; the system's directory for temporary files if not
    /// given.
    pub scratch: Option<PathBuf>,
}

impl MergeOptions {
    /// Options of this form, with nothing given.
    pub fn new(form: OutputForm) -> Self {
        Self { form, evidence: None, merged: None, mtp: None, scratch: None }
    }
}

impl fmt::Debug for MergeOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { form, evidence, merged, mtp, scratch } = self;
        f.debug_struct("MergeOptions")
            .field("form", form)
            .field("evidence", &evidence.is_some())
            .field("merged", &merged.as_ref().map(MergedWeights::dir))
            .field("mtp", mtp)
            .field("scratch", scratch)
            .finish()
    }
}

/// A model that a plan makes of another, and what that did.
#[derive(Clone, Debug)]
pub struct MergedModel {
    model: Arc<Checkpoint>,
    report: MergeReport,
}

impl MergedModel {
    /// The model: to be run, scored, pruned, [written](moe_checkpoint::write()).
    pub fn model(&self) -> &Arc<Checkpoint> {
        &self.model
    }

    /// What became of the experts.
    pub fn report(&self) -> &MergeReport {
        &self.report
    }
}

/// What the record of a merged model holds of the merge: `Record::load(dir)?.recipe::<MergeRecord>("merge")`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergeRecord {
    /// What the plan did.
    pub report: MergeReport,
    /// What became of the router: that of the recipe, unless the form needs another.
    pub router: RouterConfig,
    /// What became of layers that predict further tokens.
    pub mtp: Option<Mtp>,
    /// Where merged experts came from: `computed`, or the digest of the run that merged them.
    pub experts: String,
    /// The plan, in the indices of the model it was applied to, with its recipe.
    pub plan: MergePlan,
}

impl MergePlan {
    /// The model that this plan makes of `base`. Nothing is merged yet: a layer's merged experts are computed once, by
    /// whoever reads one of them first, from whatever thread, and wait in an anonymous file. Memory is what the
    /// combination states for one layer.
    ///
    /// Tensors outside the routed experts and the router are those of the base; experts that do not change are read
    /// from it, so that a plan that merges nothing gives every tensor and the config as they were.
    ///
    /// ```no_run
    /// use std::sync::Arc;
    /// use moe_checkpoint::{Checkpoint, WriteOptions, write};
    /// use moe_merge::{MergeOptions, MergePlan, OutputForm};
    ///
    /// let model = Arc::new(Checkpoint::open("models/Qwen1.5-MoE-A2.7B")?);
    /// let plan = MergePlan::load("plan.json")?;
    /// let merged = plan.on(&model, &MergeOptions::new(OutputForm::Stock))?;
    /// println!("{}", merged.report());
    /// write(merged.model(), "out/merged", &WriteOptions::default())?;
    /// # Ok::<(), moe_merge::Error>(())
    /// ```
    ///
    /// # Errors
    /// All that can be known, before any expert is read: [`Error::OtherModel`], [`Error::InvalidPlan`],
    /// [`Error::Infeasible`] for a base whose experts share weights already, [`Error::MissingEvidence`],
    /// [`Error::Output`] with the reason why this form is impossible, [`Error::Checkpoint`] for a scratch directory
    /// without room. Whoever reads the model later meets errors of the combination.
    pub fn on(&self, base: &Arc<Checkpoint>, options: &MergeOptions) -> Result<MergedModel> {
        self.check_base(base)?;
        let form = options.form;
        let evidence = match &options.merged {
            Some(merged) => merged.check(self).map(|()| None)?,
            None => check::evidence(self, options.evidence.as_ref())?,
        };
        let plain = base.dequantized()?;
        let mut target = target::Target::new(self, &plain, form)?;
        let dropped = mtp::dropped(&plain, form, options.mtp, target.renumbers(&plain))?;
        if !dropped.is_empty() {
            plain.drop_mtp_layers(&mut target.config);
        }
        let mut tensors = tensors::Tensors::new(&plain, &target, &dropped)?;
        tensors.specs = plain.following_identities(&target.config, tensors.specs)?;
        let scratch = options.scratch.clone().unwrap_or_else(std::env::temp_dir);
        if options.merged.is_none() {
            check_space(&scratch, self.bytes_merged(&plain, &target)?)?;
        }
        let report = self.report(base, &target, &tensors)?;
        for note in &report.notes {
            tracing::warn!("{note}");
        }
        let record = MergeRecord {
            report: report.clone(),
            router: target.router,
            mtp: options.mtp.filter(|_| plain.mtp_tensors().next().is_some()),
            experts: options
                .merged
                .as_ref()
                .map_or_else(|| "computed".to_string(), |merged| merged.digest().to_string()),
            plan: self.clone(),
        };
        let recipe = serde_json::to_value(&record).map_err(|error| Error::invalid_plan(error.to_string()))?;
        let step = Step::new(METHOD, &plain, recipe, summary(&report));
        let target::Target { config, layers, .. } = target;
        let source = source::Merged {
            plan: self.clone(),
            evidence,
            weights: options.merged.clone(),
            scratch,
            layers: layers.into_iter().map(|layer| (layer.layer, layer.into())).collect(),
            routers: tensors.routers,
            step,
            base: plain.clone(),
        };
        let description = ModelDescription { config, tensors: tensors.specs, ..ModelDescription::of(&plain) };
        let model = Arc::new(Checkpoint::from_source(description, Arc::new(source))?);
        Ok(MergedModel { model, report })
    }

    /// Merges all layers into `dir` and keeps them there: an artifact that [`MergePlan::on`] takes in any form, as
    /// often as wanted. A run that was interrupted goes on with the layers that `dir` has.
    ///
    /// # Errors
    /// As [`MergePlan::on`], but for what concerns forms; those of the combination; [`Error::InvalidPlan`] for a
    /// directory of another plan.
    pub fn compute(
        &self,
        base: &Arc<Checkpoint>,
        evidence: Option<&Arc<Evidence>>,
        dir: impl AsRef<Path>,
    ) -> Result<MergedWeights> {
        self.check_base(base)?;
        let evidence = check::evidence(self, evidence)?;
        let plain = base.dequantized()?;
        let digest = blake3::hash(self.to_json()?.as_bytes()).to_hex().to_string();
        let writer = weights::MergedWriter::create_or_resume(dir.as_ref(), &digest)?;
        for layer in &self.layers {
            if writer.finished(layer.layer)?.is_none() {
                writer.write(&plain, layer.clone(), |plan, sink| {
                    source::combine(self, &plain, evidence.as_deref(), plan.layer, sink)
                })?;
            }
        }
        writer.finish(self.clone())
    }

    fn check_base(&self, base: &Checkpoint) -> Result<()> {
        if !base.is_model(&self.model) {
            let (path, expected) = (base.dir().to_path_buf(), self.model.clone());
            return Err(Error::OtherModel { what: "plan", path, found: base.fingerprint(), expected });
        }
        self.validate(base.shape())?;
        not_grouped(base)
    }

    /// Bytes of merged experts that have to wait somewhere, at most.
    fn bytes_merged(&self, from: &Checkpoint, target: &target::Target) -> Result<u64> {
        let mut bytes = 0;
        for (plan, layer) in self.layers.iter().zip(&target.layers).filter(|(plan, _)| !plan.is_identity()) {
            for (group, width) in plan.groups.iter().zip(&layer.group_widths) {
                let alone = group.members.len() == 1 && plan.dissolved.is_empty();
                bytes += if alone { 0 } else { made::expert_bytes(from, plan.layer, group.dominant as usize, *width)? };
            }
        }
        Ok(bytes)
    }

    fn report(&self, base: &Checkpoint, target: &target::Target, tensors: &tensors::Tensors) -> Result<MergeReport> {
        let mut layers = Vec::with_capacity(self.layers.len());
        for (position, (plan, made)) in self.layers.iter().zip(&target.layers).enumerate() {
            let experts = self.shape.layers[position].num_experts();
            layers.push(LayerMergeReport {
                layer: plan.layer,
                experts: BeforeAfter { before: experts as u64, after: plan.groups.len() as u64 },
                router_rows: BeforeAfter {
                    before: experts as u64,
                    after: made.mix.as_ref().map_or(experts, |mix| mix.rows.len()) as u64,
                },
                alone: plan.groups.iter().filter(|group| group.members.len() == 1).count(),
                largest: plan.groups.iter().map(|group| group.members.len()).max().unwrap_or(0),
                dissolved: plan.dissolved.len(),
                protected: plan.protected.len(),
                bytes: BeforeAfter {
                    before: base.expert_bytes_on_disk(plan.layer)?,
                    after: tensors.expert_bytes.get(&plan.layer).copied().unwrap_or_default(),
                },
            });
        }
        Ok(MergeReport {
            form: target.form,
            recipe: self.recipe.name.clone(),
            ratio: self.ratio,
            bytes: BeforeAfter { before: base.bytes_on_disk(), after: tensors.specs.iter().map(tensors::bytes).sum() },
            layers,
            never_used: self.never_used.clone(),
            notes: target.notes.clone(),
        })
    }
}

/// A merge in a sentence.
fn summary(report: &MergeReport) -> String {
    let sum = |of: fn(&LayerMergeReport) -> u64| report.layers.iter().map(of).sum::<u64>();
    let (before, after) = (sum(|layer| layer.experts.before), sum(|layer| layer.experts.after));
    format!("{before} routed experts merged into {after} by `{}`, as `{}`", report.recipe, report.form)
}

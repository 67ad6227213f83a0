//! What a plan makes of a checkpoint: another checkpoint, whose weights are made when they are read.

mod attention;
mod export;
mod fine_grained;
mod further;
mod masked;
mod mtp;
mod ragged;
mod record;
mod select;
mod shared_sets;
mod source;
mod target;
mod tensors;
mod uniform;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, ExpertBiases, KeptQuantization, MatrixOrigin, ModelDescription, Mtp, Step};
use serde::{Deserialize, Serialize};

pub use export::{Export, PruneForm};
pub use fine_grained::{FineGrained, LayerPieces, Piece, PieceMap};
#[cfg(feature = "repair")]
pub use fine_grained::{ScaleCalibration, ScaleFit, Trial, TrialOptions};
pub use masked::plan_from_masked;
pub use record::{PRUNE_METHOD, PruneRecord};
pub use shared_sets::SharedSets;

use crate::{EditSource, Error, PrunePlan, Report, Result};

/// In which precision a quantized base is pruned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrunedPrecision {
    /// In the quantization of the base: experts that keep all their units are copied byte for byte; of others, groups
    /// of elements that stay together keep their codes and their scale, and groups that are cut are rounded again,
    /// which the report says. In [`PruneForm::Uniform`] without edits; other forms, which no engine reads quantized,
    /// are BF16, which the report says, too.
    #[default]
    AsBase,
    /// In BF16, without quantization.
    Bf16,
}

/// What is made of a plan.
#[derive(Clone)]
pub struct PruneOptions<'a> {
    /// In which form.
    pub form: PruneForm<'a>,
    /// Make uniform widths that are no multiple of 8 as they are, which stock loaders may fail on in a forward pass.
    /// Without it they are refused, and pieces of experts get units of zeros up to a multiple of 8.
    pub allow_unaligned: bool,
    /// What becomes of layers that predict further tokens. Needed where a checkpoint has them.
    pub mtp: Option<Mtp>,
    /// In which precision a quantized base is pruned.
    pub precision: PrunedPrecision,
    /// Weights that a repair changed. They are converted to the dtype of the checkpoint, rounded to nearest even.
    pub edits: Option<Arc<dyn EditSource>>,
}

impl<'a> PruneOptions<'a> {
    /// Options of this form: nothing else said.
    pub fn new(form: PruneForm<'a>) -> Self {
        Self { form, allow_unaligned: false, mtp: None, precision: PrunedPrecision::default(), edits: None }
    }

    /// Checks everything that a checkpoint shows to be impossible, whatever a plan for it drops: what takes hours of
    /// scoring or searching calls this before.
    ///
    /// # Errors
    /// [`Error::Export`] with the reason: no routed experts, layers that predict further tokens without a choice or
    /// with one that cannot be, experts that share sets of weights or a routing that cannot be cut into pieces.
    pub fn check(&self, base: &Checkpoint) -> Result<()> {
        if base.shape().units() == 0 {
            return Err(self.form.refused("the model has no routed experts to prune".into()));
        }
        mtp::check(base, self)?;
        if let PruneForm::FineGrained(how) = &self.form {
            fine_grained::refuse_sharing(base)?;
            how.map(&PrunePlan::keep_all(base.shape(), ""), base)?;
        }
        Ok(())
    }
}

impl fmt::Debug for PruneOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { form, allow_unaligned, mtp, precision, edits } = self;
        f.debug_struct("PruneOptions")
            .field("form", form)
            .field("allow_unaligned", allow_unaligned)
            .field("mtp", mtp)
            .field("precision", precision)
            .field("edits", &edits.as_ref().map(|edits| edits.digest()))
            .finish()
    }
}

/// A pruned model, not yet written: [`PrunePlan::on`].
#[derive(Clone, Debug)]
pub struct PrunedModel {
    model: Arc<Checkpoint>,
    report: Report,
}

impl PrunedModel {
    /// The model: to be run, to be changed further, or to be written with [`moe_checkpoint::write`].
    pub fn model(&self) -> &Arc<Checkpoint> {
        &self.model
    }

    /// What the plan does to its base.
    pub fn report(&self) -> &Report {
        &self.report
    }
}

impl PrunePlan {
    /// The pruned model, made from `base` whenever its weights are read; nothing of them is read here but what ranks
    /// the experts of layers that predict further tokens, where those are pruned.
    ///
    /// Tensors outside the routed experts are those of the base; rows and columns of the experts are selected on raw
    /// bytes, one matrix at a time, without conversion; only [`PruneOptions::edits`] and factors of pieces are
    /// converted. So a plan that keeps everything gives every tensor byte for byte, quantized ones too. A quantized
    /// base stays quantized where [`PrunedPrecision`] says so.
    ///
    /// Where experts of `base` share sets of weights, a plan removes whole experts with their rows of the router, and a
    /// set when its last expert goes; units go from a set as a whole, so that its experts must keep the same
    /// ([`SharedSets`] makes such plans).
    ///
    /// ```no_run
    /// use std::sync::Arc;
    /// use moe_checkpoint::{Checkpoint, WriteOptions, write};
    /// use moe_prune::{PruneForm, PruneOptions, PrunePlan};
    ///
    /// let model = Arc::new(Checkpoint::open("models/Qwen1.5-MoE-A2.7B")?);
    /// let plan = PrunePlan::load("plan.json")?;
    /// let pruned = plan.on(&model, &PruneOptions::new(PruneForm::Ragged))?;
    /// write(pruned.model(), "out/pruned", &WriteOptions::default())?;
    /// println!("{}", pruned.report());
    /// # Ok::<(), moe_prune::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::OtherModel`], [`Error::InvalidPlan`], [`Error::InvalidEdits`], [`Error::Export`] with the reason why
    /// this form is impossible. What is wrong with values of edits (too large for the dtype of the checkpoint) is an
    /// error of reading the model.
    pub fn on(&self, base: &Arc<Checkpoint>, options: &PruneOptions<'_>) -> Result<PrunedModel> {
        if !base.is_model(&self.model) {
            let (path, found, expected) = (base.dir().to_path_buf(), base.fingerprint(), self.model.clone());
            return Err(Error::OtherModel { path, found, expected });
        }
        self.validate(base.shape())?;
        if !matches!(options.form, PruneForm::FineGrained(_)) {
            self.validate_routing(base.config())?;
        }
        shared_sets::check(self, base, options)?;
        if let Some(edits) = options.edits.as_deref() {
            self.validate_edits(edits)?;
            check_routers(self, base, edits)?;
            refuse_biases(self, base, options, edits)?;
        }
        let made = self.pruned(base, options, None)?;
        let quantized = base.quantization().filter(|_| options.precision == PrunedPrecision::AsBase);
        let Some(quantization) = quantized else { return Ok(made.model) };
        let further = options.mtp == Some(Mtp::Prune) && base.mtp_tensors().next().is_some();
        if options.form != PruneForm::Uniform || options.edits.is_some() || further {
            let why = match (options.edits.is_some(), further) {
                (true, _) => "repaired weights are",
                (_, true) => "layers that predict further tokens are pruned, too, and all is",
                _ => "this form is",
            };
            let note =
                format!("{why} written as BF16, not as {quantization}: quantize the outcome with `moe quantize`");
            return Ok(self.pruned(base, options, Some(After { note: Some(note), sizes: None }))?.model);
        }
        let kept = made.quantized(base)?;
        let note = match kept.cut_groups {
            0 => format!("stays quantized as {quantization}, every code and scale as it was"),
            cut => {
                format!("stays quantized as {quantization}; {cut} groups of elements that were cut are rounded again")
            }
        };
        let note = kept.notes.iter().fold(note, |note, more| format!("{note}; {more}"));
        let layers = kept.model.shape().layers.iter();
        let layers =
            layers.map(|layer| kept.model.expert_bytes_on_disk(layer.layer)).collect::<moe_checkpoint::Result<_>>()?;
        let sizes = (kept.model.bytes_on_disk(), layers);
        // The record tells the sizes of what is written.
        let made = self.pruned(base, options, Some(After { note: Some(note), sizes: Some(sizes) }))?;
        let model = made.quantized(base)?.model;
        Ok(PrunedModel { model, report: made.model.report })
    }

    /// The pruned model in BF16. `after` is what the report says of another precision that it gets.
    fn pruned(&self, base: &Arc<Checkpoint>, options: &PruneOptions<'_>, after: Option<After>) -> Result<Made> {
        let from = base.dequantized()?;
        let mut target = match &options.form {
            PruneForm::Uniform => {
                let keeps = options.precision == PrunedPrecision::AsBase && options.edits.is_none();
                uniform::target(self, &from, options, keeps && KeptQuantization::counts_by_layer(base))?
            }
            PruneForm::Ragged => ragged::target(self, &from, options.edits.as_deref())?,
            PruneForm::Masked => masked::target(self, &from)?,
            PruneForm::FineGrained(how) => fine_grained::target(self, &from, how, options)?,
        };
        mtp::settle(self, &from, options, &mut target)?;
        let edited = options.edits.as_deref();
        let tensors = tensors::tensors(&from, &target, options.form.name(), edited)?;

        let mut report = Report::of(self, base, options.form.export())?;
        for (layer, target) in report.layers.iter_mut().zip(&target.layers) {
            layer.written = target.rows.len();
        }
        report.notes.append(&mut target.notes);
        let specs = from.following_identities(&target.config, tensors.specs)?;
        let (parameters, bytes) = (tensors::parameters(&from, &specs), specs.iter().map(tensors::bytes).sum());
        (report.parameters.after, report.bytes.after) = (parameters, bytes);
        for (layer, bytes) in report.layers.iter_mut().zip(tensors.expert_bytes) {
            layer.bytes.after = bytes;
        }
        if let Some(After { note, sizes }) = after {
            report.notes.extend(note);
            if let Some((bytes, layers)) = sizes {
                report.bytes.after = bytes;
                report.layers.iter_mut().zip(layers).for_each(|(layer, bytes)| layer.bytes.after = bytes);
            }
        }
        let origins = target.layers.iter().filter(|layer| layer.further.is_none());
        let origins = origins.map(|layer| (layer.layer, layer.sets.iter().map(origin).collect())).collect();
        let changed = tensors.made.keys().cloned().collect();
        let record = PruneRecord::new(self, options, &target, &report);
        let step = Step::new(PRUNE_METHOD, base, record.to_value()?, record.summary());
        let description = ModelDescription {
            config: std::mem::take(&mut target.config),
            tensors: specs,
            generation: from.raw_generation_config().cloned(),
        };
        let source = source::PrunedSource::new(self, from, target, tensors.made, options, step);
        let model = Arc::new(Checkpoint::from_source(description, Arc::new(source))?);
        Ok(Made { model: PrunedModel { model, report }, origins, changed })
    }
}

/// What the report says of another precision: a note, bytes of all tensors and of the experts of every layer.
struct After {
    note: Option<String>,
    sizes: Option<(u64, Vec<u64>)>,
}

/// A pruned model in BF16, and what of it comes from where.
struct Made {
    model: PrunedModel,
    /// Of every set of weights of a layer.
    origins: BTreeMap<usize, Vec<Option<MatrixOrigin>>>,
    /// Tensors outside the experts that are not those of the base.
    changed: BTreeSet<String>,
}

impl Made {
    fn quantized(&self, base: &Arc<Checkpoint>) -> Result<KeptQuantization> {
        let origin = |layer: usize, set: usize| self.origins.get(&layer)?.get(set)?.clone();
        Ok(KeptQuantization::on(&self.model.model, base, &origin, &self.changed)?)
    }
}

/// Where a set of weights comes from, if it is a selection of units.
fn origin(set: &target::TargetSet) -> Option<MatrixOrigin> {
    let plain = set.width == set.units.len() && (set.down_factor, set.bias_factor) == (1.0, 1.0);
    plain.then(|| MatrixOrigin { set: set.source, units: set.units.clone() })
}

/// Checks that edited routers have a row as wide as the residual stream for every expert.
fn check_routers(plan: &PrunePlan, base: &Checkpoint, edits: &dyn EditSource) -> Result<()> {
    let hidden = base.config().hidden_size;
    for kept in &plan.kept {
        let (layer, experts) = (kept.layer, kept.experts.len());
        if let Some(found) = edits.router(layer)?.map(|weight| weight.len()).filter(|len| *len != experts * hidden) {
            return Err(Error::invalid_edits(format!(
                "layer {layer}: router has {found} values, expected [{experts}, {hidden}], a row for every original \
                 expert"
            )));
        }
    }
    Ok(())
}

/// Refuses biases in a format that has no place for them.
fn refuse_biases(
    plan: &PrunePlan,
    base: &Checkpoint,
    options: &PruneOptions<'_>,
    edits: &dyn EditSource,
) -> Result<()> {
    if options.form == PruneForm::Ragged {
        return Ok(());
    }
    for kept in &plan.kept {
        if base.config().moe(kept.layer).is_some_and(|moe| moe.biases != ExpertBiases::None) {
            continue;
        }
        for expert in kept.experts_kept() {
            if edits.sizes(kept.layer, expert)?.down_bias.is_some() {
                return Err(options.form.refused(format!(
                    "the edits add a bias to expert {expert} of layer {}, but experts of `{}` have none: export as ragged",
                    kept.layer,
                    base.config().model_type
                )));
            }
        }
    }
    Ok(())
}

//! Carrying out a plan: checkpoint to checkpoint, as a stream of raw bytes.

mod fine_grained;
mod masked;
mod mtp;
mod origin;
mod ragged;
mod select;
mod stream;
mod uniform;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use moe_checkpoint::{
    Checkpoint, Existing, ExpertBiases, ExpertLayout, Mtp, OnProgress, OutputDir, Role, ShardedWriter, TensorSpec,
    WriterOptions, copy_side_files, dequantised_config, write_atomic, write_json,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use fine_grained::{FineGrained, LayerPieces, Piece, PieceMap};
#[cfg(feature = "repair")]
pub use fine_grained::{ScaleCalibration, ScaleFit, Trial, TrialOptions};
pub use masked::plan_from_masked;

use crate::plan::LayerKept;
use crate::{EditSource, Error, PrunePlan, Report, Result};

/// Name of the file in an output directory that tells what was done; see [`Applied`]. Stock loaders ignore it.
pub const APPLIED_FILE: &str = "moe_prune.json";

/// Version of that file.
const APPLIED_VERSION: u64 = 1;

/// How a pruned checkpoint is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Export {
    /// One width for all experts, in the layout that was read: loads in stock runtimes. Refused for plans whose widths
    /// differ.
    Uniform,
    /// A width per expert, in the format of this project; stock runtimes refuse it.
    Ragged,
    /// Shapes as they were, dropped units zeroed: loads in stock runtimes, saves nothing.
    Masked,
    /// Experts as equal pieces ([`FineGrained`]), each an expert of its own: loads in stock runtimes. Takes plans whose widths
    /// are multiples of a piece, with as many pieces in every layer. An expert without units goes with its router row.
    FineGrained,
}

impl Export {
    /// The name used in recipes and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Ragged => "ragged",
            Self::Masked => "masked",
            Self::FineGrained => "fine_grained",
        }
    }
}

impl fmt::Display for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Export {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let all = [Self::Uniform, Self::Ragged, Self::Masked, Self::FineGrained];
        all.into_iter().find(|mode| mode.name() == text).ok_or_else(|| Error::InvalidParameter {
            field: "export",
            found: format!("`{text}`"),
            expected: "`uniform`, `ragged`, `masked` or `fine_grained`".into(),
        })
    }
}

/// How a plan is applied.
#[derive(Clone, Copy)]
pub struct ApplyOptions<'a> {
    /// What is written.
    pub mode: Export,
    /// Most bytes of tensor data per file; a larger tensor gets its own file.
    pub max_shard_bytes: u64,
    /// Continue what an interrupted run left in `OUT.partial`.
    pub resume: bool,
    /// Replace an output that exists, once the new one is complete, and start over what an interrupted run left. Wins
    /// over `resume`.
    pub force: bool,
    /// Write uniform widths that are no multiple of 8, which stock loaders may fail on in a forward pass.
    pub allow_unaligned: bool,
    /// What becomes of layers that predict further tokens. Needed where a checkpoint has them.
    pub mtp: Option<Mtp>,
    /// How experts are cut; for [`Export::FineGrained`] alone.
    pub fine_grained: Option<FineGrained<'a>>,
    /// Weights that a repair changed. They are converted to the dtype of the checkpoint, rounded to nearest even.
    pub edits: Option<&'a dyn EditSource>,
    /// Told how far it is.
    pub progress: Option<OnProgress<'a>>,
}

impl ApplyOptions<'_> {
    /// Options of this export: shards of 5 GB, nothing replaced or resumed.
    pub fn new(mode: Export) -> Self {
        Self {
            mode,
            max_shard_bytes: WriterOptions::default().max_shard_bytes,
            resume: false,
            force: false,
            allow_unaligned: false,
            mtp: None,
            fine_grained: None,
            edits: None,
            progress: None,
        }
    }
}

impl fmt::Debug for ApplyOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mode, max_shard_bytes, resume, force, allow_unaligned, mtp, fine_grained, edits, progress } = self;
        f.debug_struct("ApplyOptions")
            .field("mode", mode)
            .field("max_shard_bytes", max_shard_bytes)
            .field("resume", resume)
            .field("force", force)
            .field("allow_unaligned", allow_unaligned)
            .field("mtp", mtp)
            .field("fine_grained", fine_grained)
            .field("edits", &edits.map(|edits| edits.digest()))
            .field("progress", &progress.is_some())
            .finish()
    }
}

/// What [`APPLIED_FILE`] of an output directory holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Applied {
    /// Version of the file.
    pub version: u64,
    /// Version of this crate.
    pub crate_version: String,
    /// How the plan was applied.
    pub export: Export,
    /// What it did.
    pub report: Report,
    /// Digest of the edits that were applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edits: Option<String>,
    /// Pieces of every expert, in a fine-grained export.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pieces: Option<usize>,
    /// Factors of experts in a fine-grained export, as in [`FineGrained::scales`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scales: Option<Vec<Vec<f32>>>,
    /// The plan, in the indices of the checkpoint it was applied to, with its recipe.
    pub plan: PrunePlan,
}

impl Applied {
    /// Reads what was done to make this checkpoint.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::InvalidPlan`], naming the file.
    pub fn load(directory: impl AsRef<Path>) -> Result<Self> {
        let path = directory.as_ref().join(APPLIED_FILE);
        let json = fs::read_to_string(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let applied: Self =
            serde_json::from_str(&json).map_err(|error| Error::invalid_plan(error.to_string()).in_file(&path))?;
        if applied.version != APPLIED_VERSION {
            let (found, supported) = (applied.version, APPLIED_VERSION);
            return Err(Error::PlanVersion { path: Some(path), found, supported });
        }
        applied.plan.validate(&applied.plan.shape).map_err(|error| error.in_file(&path))?;
        Ok(applied)
    }
}

/// What an export mode makes of a plan.
pub(crate) struct Target<'a> {
    /// The new config.json.
    pub config: Value,
    /// MoE layers in ascending order, then pruned layers that predict further tokens.
    pub layers: Vec<TargetLayer<'a>>,
    /// Width of the shared experts, where it grows by units of zeros.
    pub shared_width: Option<usize>,
    /// Tensors that are left out.
    pub dropped: BTreeSet<String>,
}

impl Target<'_> {
    /// A hash of what the plan does not say about the content of experts.
    fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for expert in self.layers.iter().flat_map(|layer| &layer.experts) {
            for number in [expert.source, expert.width, expert.units.len()] {
                hasher.update(&(number as u64).to_le_bytes());
            }
            for unit in expert.units.iter() {
                hasher.update(&unit.to_le_bytes());
            }
            for factor in [expert.down_factor, expert.bias_factor] {
                hasher.update(&factor.to_le_bytes());
            }
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// One MoE layer of a [`Target`].
pub(crate) struct TargetLayer<'a> {
    /// Decoder layer index; without meaning for a further layer.
    pub layer: usize,
    /// The layer that it is made from, if that is none of the decoder's.
    pub further: Option<origin::FurtherLayer>,
    pub layout: ExpertLayout,
    pub biases: ExpertBiases,
    /// Experts as they are written, in the new order.
    pub experts: Vec<TargetExpert<'a>>,
    /// Dropped units are zeroed instead of taken out.
    pub zero: bool,
    /// Factor on the correction bias.
    pub correction_factor: f32,
}

/// One expert as it is written.
#[derive(Clone)]
pub(crate) struct TargetExpert<'a> {
    /// The expert of the checkpoint that it is made from.
    pub source: usize,
    /// Its units there, ascending.
    pub units: Cow<'a, [u32]>,
    /// Width as written.
    pub width: usize,
    /// Factor on its down projection.
    pub down_factor: f32,
    /// Factor on its bias of down.
    pub bias_factor: f32,
}

impl<'a> TargetLayer<'a> {
    /// The kept experts of a layer, in the layout it is written in.
    fn kept(from: &Checkpoint, kept: &'a LayerKept, layout: ExpertLayout) -> Self {
        let expert = |source: usize| {
            let units = kept.experts[source].as_slice();
            TargetExpert { source, width: units.len(), units: units.into(), down_factor: 1.0, bias_factor: 1.0 }
        };
        Self {
            layer: kept.layer,
            further: None,
            layout,
            biases: from.config().moe(kept.layer).map_or(ExpertBiases::None, |moe| moe.biases),
            experts: kept.experts_kept().into_iter().map(expert).collect(),
            zero: false,
            correction_factor: 1.0,
        }
    }

    /// Width of every expert as written.
    pub fn widths(&self) -> Vec<usize> {
        self.experts.iter().map(|expert| expert.width).collect()
    }

    /// Whether router rows are those of the checkpoint, in its order.
    pub fn same_experts(&self, before: usize) -> bool {
        self.experts.len() == before && self.experts.iter().enumerate().all(|(new, expert)| new == expert.source)
    }
}

impl PrunePlan {
    /// Writes the pruned checkpoint to `to`, which appears whole or not at all: work happens in `TO.partial`.
    ///
    /// Tensors outside the routed experts are copied; rows and columns of the experts are selected on raw bytes, one
    /// expert at a time, without conversion; only [`ApplyOptions::edits`] are converted. So a plan that keeps everything reproduces every tensor byte for byte, and
    /// memory stays at that of a few matrices of one expert. Side files (tokenizer, generation config) are copied too, and
    /// [`APPLIED_FILE`] tells what was done.
    ///
    /// ```no_run
    /// use moe_checkpoint::Checkpoint;
    /// use moe_prune::{ApplyOptions, Export, PrunePlan};
    ///
    /// let model = Checkpoint::open("models/Qwen1.5-MoE-A2.7B")?;
    /// let plan = PrunePlan::load("plan.json")?;
    /// let report = plan.apply(&model, "out/pruned".as_ref(), &ApplyOptions::new(Export::Ragged))?;
    /// println!("{report}");
    /// # Ok::<(), moe_prune::Error>(())
    /// ```
    ///
    /// # Errors
    /// Before anything is written: [`Error::OtherModel`], [`Error::InvalidPlan`], [`Error::InvalidEdits`], [`Error::Export`] with the reason why
    /// this mode is impossible, an output that exists. Later: [`Error::Checkpoint`] for the file system and
    /// [`Error::Interrupted`]; the input and an earlier output stay as they were.
    pub fn apply(&self, from: &Checkpoint, to: &Path, options: &ApplyOptions<'_>) -> Result<Report> {
        let fingerprint = from.fingerprint();
        if fingerprint != self.model {
            let (path, expected) = (from.dir().to_path_buf(), self.model.clone());
            return Err(Error::OtherModel { path, found: fingerprint, expected });
        }
        self.validate(from.shape())?;
        if same_directory(from.dir(), to) {
            let reason = format!("{} is the checkpoint itself; choose another directory", to.display());
            return Err(Error::Export { mode: options.mode.name(), reason });
        }
        if from.grouped() {
            let reason = "its experts share sets of weights; prune before merging".to_string();
            return Err(Error::Export { mode: options.mode.name(), reason });
        }
        if options.mode != Export::FineGrained {
            self.validate_routing(from.config())?;
        }
        if let Some(edits) = options.edits {
            self.validate_edits(edits)?;
            refuse_biases(self, from, options, edits)?;
        }
        let mut target = match options.mode {
            Export::Uniform => uniform::target(self, from, options)?,
            Export::Ragged => ragged::target(self, from, options.edits)?,
            Export::Masked => masked::target(self, from)?,
            Export::FineGrained => fine_grained::target(self, from, options)?,
        };
        mtp::settle(self, from, options, &mut target)?;
        if from.quantisation().is_some() {
            target.config = dequantised_config(&target.config);
        }
        let tensors = stream::tensors(from, &target, options)?;
        let specs: Vec<_> = tensors.iter().map(|tensor| tensor.spec.clone()).collect();
        let mut report = Report::new(self, from, options.mode)?;
        report.bytes.after = specs.iter().map(stream::bytes).sum();
        report.parameters.after = parameters(from, &specs);
        for (position, (layer, target)) in report.layers.iter_mut().zip(&target.layers).enumerate() {
            layer.written = target.experts.len();
            let tensors = tensors.iter().filter(|tensor| tensor.layer() == Some(position));
            layer.bytes.after = tensors.map(|tensor| stream::bytes(&tensor.spec)).sum();
        }
        if options.mode == Export::FineGrained {
            let piece = target.layers.first().and_then(|layer| layer.experts.first());
            report.notes = piece.map_or(vec![], |piece| fine_grained::notes(piece.width));
        }

        let existing = match (options.force, options.resume) {
            (true, _) => Existing::Force,
            (false, true) => Existing::Resume,
            (false, false) => Existing::Refuse,
        };
        let output = OutputDir::create(to, existing)?;
        let edits = options.edits.map(EditSource::digest);
        let recipe = format!(
            "{} {:?} {fingerprint} {edits:?} {} {}",
            options.mode,
            options.mtp,
            target.digest(),
            self.to_json()?
        );
        let writer_options = WriterOptions { max_shard_bytes: options.max_shard_bytes, recipe };
        let writer = ShardedWriter::new(output.path(), writer_options, specs)?;
        let written = stream::write(self, from, &tensors, &target, writer, options)?;
        debug_assert_eq!(written.bytes, report.bytes.after);

        copy_side_files(from.dir(), output.path())?;
        let config_path = output.path().join("config.json");
        if target.config == *from.raw_config() {
            // Nothing changed: not even its spaces.
            let original = from.dir().join("config.json");
            let bytes = fs::read(&original).map_err(|source| Error::Io { path: original, source })?;
            write_atomic(&config_path, &bytes)?;
        } else {
            write_json(&config_path, &target.config)?;
        }
        let fine_grained = options.fine_grained.filter(|_| options.mode == Export::FineGrained);
        let applied = Applied {
            version: APPLIED_VERSION,
            crate_version: env!("CARGO_PKG_VERSION").to_string(),
            export: options.mode,
            report,
            edits,
            pieces: fine_grained.map(|how| how.pieces),
            scales: fine_grained.and_then(|how| how.scales).map(<[_]>::to_vec),
            plan: self.clone(),
        };
        let json = serde_json::to_vec(&applied).map_err(|error| Error::invalid_plan(error.to_string()))?;
        write_atomic(output.path().join(APPLIED_FILE), &json)?;
        // Config, headers and lengths are checked before the output gets its name.
        Checkpoint::open(output.path())?;
        output.commit()?;
        Ok(applied.report)
    }
}

/// Refuses biases in a format that has no place for them.
fn refuse_biases(
    plan: &PrunePlan,
    from: &Checkpoint,
    options: &ApplyOptions<'_>,
    edits: &dyn EditSource,
) -> Result<()> {
    if options.mode == Export::Ragged {
        return Ok(());
    }
    for kept in &plan.kept {
        if from.config().moe(kept.layer).is_some_and(|moe| moe.biases != ExpertBiases::None) {
            continue;
        }
        for expert in kept.experts_kept() {
            if edits.sizes(kept.layer, expert)?.down_bias.is_some() {
                let reason = format!(
                    "the edits add a bias to expert {expert} of layer {}, but experts of `{}` have none: export as ragged",
                    kept.layer,
                    from.config().model_type
                );
                return Err(Error::Export { mode: options.mode.name(), reason });
            }
        }
    }
    Ok(())
}

/// Elements of the tensors; a tied head counts once.
fn parameters(from: &Checkpoint, specs: &[TensorSpec]) -> u64 {
    let tied_head = from.config().tie_word_embeddings.then(|| from.family().tensor_name(Role::LmHead));
    let counted = specs.iter().filter(|spec| Some(&spec.name) != tied_head.as_ref());
    counted.map(|spec| spec.shape.iter().map(|size| *size as u64).product::<u64>()).sum()
}

fn same_directory(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

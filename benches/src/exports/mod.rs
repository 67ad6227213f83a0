//! Every export that stock loaders read, of every checkpoint under a directory: what `xtask/scripts/roundtrip.py` loads
//! in transformers, and what the test of its results makes again.

pub mod lora;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Parser;
use moe_checkpoint::{Checkpoint, Provenance, Reduction, ScoreTable, Statistics, WriteOptions, write};
use moe_importance::ScorerConfig;
use moe_importance::scorers::Magnitude;
use moe_merge::{Evidence, MergeOptions, OutputForm, Recipe};
use moe_prune::{
    Budget, ExpertPruner, FineGrained, Mtp, ProtectionMask, PruneForm, PruneOptions, PrunePlan, PrunedPrecision,
    Pruner, Scope, UnitPruner,
};
use serde::Serialize;

use crate::{Error, Result};

/// Exports every checkpoint under a directory in every way that stock loaders read, scored by weight magnitude, and an
/// adapter of each.
#[derive(Clone, Debug, Parser)]
#[command(name = "exports")]
pub struct Arguments {
    /// Directory of directories of checkpoints
    #[arg(default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../crates/moe-checkpoint/tests/fixtures/parity/tf5"))]
    pub from: PathBuf,
    /// New directory for the exports, as MODEL/EXPORT
    #[arg(long)]
    pub out: PathBuf,
    /// Models to leave out; repeatable
    #[arg(long)]
    pub skip: Vec<String>,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// A way to export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Half of the units of every expert dropped, or what a multiple of 8 leaves of that.
    Uniform,
    /// The same units zeroed.
    Masked,
    /// A quarter of the experts dropped.
    Experts,
    /// Every expert in two pieces (as few as give a width of a multiple of 4), nothing dropped.
    Pieces,
    /// Every expert in as many pieces, some dropped. All that can be selected are, since which of equal pieces a loader
    /// selects is its own affair.
    FineGrained,
    /// A quarter of the experts merged into those whose router rows are most alike, rows with them.
    Merged,
    /// An adapter on every linear map of the decoder layers, in the weights.
    Lora,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Uniform, Self::Masked, Self::Experts, Self::Pieces, Self::FineGrained, Self::Merged, Self::Lora];

    /// Name of its directory.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Masked => "masked",
            Self::Experts => "experts",
            Self::Pieces => "pieces",
            Self::FineGrained => "fine_grained",
            Self::Merged => "merged",
            Self::Lora => "lora",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What was exported.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Model and way to export.
    pub exports: Vec<(String, Kind)>,
    /// Directory that the exports are written to.
    pub out: PathBuf,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {} exports", self.out.display(), self.exports.len())
    }
}

/// Exports everything.
///
/// # Errors
/// Whatever stops an export; an output directory that exists.
pub fn run(arguments: &Arguments) -> Result<Report> {
    let Arguments { from, out, skip, .. } = arguments;
    if out.exists() {
        return Err(Error::Invalid(format!("{}: exists", out.display())));
    }
    let mut exports = Vec::new();
    for name in models(from, skip)? {
        let checkpoint = Arc::new(Checkpoint::open(from.join(&name))?);
        for kind in Kind::ALL {
            if export(&checkpoint, kind, &out.join(&name).join(kind.name()))? {
                exports.push((name.clone(), kind));
            }
        }
        if lora::is_exact(&checkpoint) {
            let files = out.join(&name).join(lora::FILES);
            lora::files(&checkpoint, &name, &files)?;
            lora::fold(&checkpoint, &lora::on_attention_and_experts(&checkpoint), &files.join(lora::FOLDED))?;
        }
    }
    Ok(Report { exports, out: out.clone() })
}

/// Directories under a directory, sorted, but for some.
///
/// # Errors
/// A directory that cannot be read.
pub fn models(from: &Path, skip: &[String]) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(from).map_err(Error::io(from))? {
        let entry = entry.map_err(Error::io(from))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() && !skip.contains(&name) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Exports a checkpoint in one way; false if its family has no such export.
///
/// # Errors
/// Whatever stops it.
pub fn export(from: &Arc<Checkpoint>, kind: Kind, to: &Path) -> Result<bool> {
    let (shape, none) = (from.shape(), ProtectionMask::none());
    let routing = &from.config().routing;
    let groups = routing.groups().map_or(1, |groups| groups.count);
    // Stock loaders are asked about the layouts, in numbers that all of them read.
    let precision = PrunedPrecision::Bf16;
    let plain =
        |form| PruneOptions { mtp: Some(Mtp::Drop), allow_unaligned: true, precision, ..PruneOptions::new(form) };
    let mut how;
    let narrows = matches!(kind, Kind::Uniform | Kind::Pieces | Kind::FineGrained);
    if narrows && from.family().shared_follows_width() {
        return Ok(false);
    }
    let counts = matches!(kind, Kind::Pieces | Kind::FineGrained | Kind::Merged);
    if counts && (from.family().attention_has_experts() || from.config().routes_by_tables()) {
        return Ok(false);
    }
    let (plan, options) = match kind {
        Kind::Uniform | Kind::Masked => {
            let plan = UnitPruner::new(Scope::Expert).prune(&magnitude(from)?, shape, Budget::Ratio(0.5), &none)?.plan;
            (plan, plain(if kind == Kind::Uniform { PruneForm::Uniform } else { PruneForm::Masked }))
        }
        Kind::Experts => {
            let scores = magnitude(from)?.to_experts(Reduction::Sum)?;
            let plan = ExpertPruner::new().groups(groups).prune(&scores, shape, Budget::Ratio(0.25), &none)?.plan;
            (plan, plain(PruneForm::Uniform))
        }
        Kind::Pieces | Kind::FineGrained => {
            let moe = |layer| from.config().moe(layer);
            let identities = (0..from.config().layers.len()).filter_map(moe).any(|moe| moe.identities > 0);
            if identities || matches!(routing.kind, moe_checkpoint::RoutingKind::Sparsemixer { .. }) {
                return Ok(false);
            }
            // Grouped products of stock loaders need 16 bytes, four numbers of the fixtures' dtype.
            let width = shape.uniform_width().unwrap_or(0);
            let pieces = (2..=width).find(|m| width.is_multiple_of(*m) && (width / m).is_multiple_of(4));
            how = FineGrained::new(pieces.unwrap_or(2));
            let keep = PrunePlan::keep_all(shape, from.fingerprint());
            let mut plan = keep.clone();
            if kind == Kind::FineGrained {
                let few = FineGrained { top_k: Some(1), ..how };
                // Groups of two experts that are ranked by their two best cannot lose a piece.
                plan = few.prune(&magnitude(from)?, from, 0.3).or_else(|_| few.map(&keep, from).map(|_| keep))?;
                let map = few.map(&plan, from)?;
                let pieces = map.layers.first().map_or(0, |layer| layer.pieces.len());
                let selectable = map.routing.groups().map_or(pieces, |groups| pieces / groups.count * groups.top);
                how.top_k = Some(selectable);
            }
            (plan, plain(PruneForm::FineGrained(how)))
        }
        Kind::Merged => return merge(from, to),
        Kind::Lora => return lora::fold(from, &lora::everywhere(from), to).map(|()| true),
    };
    write(plan.on(from, &options)?.model(), to, &WriteOptions::default())?;
    Ok(true)
}

/// A merge that needs no run of the model.
const MERGE: &str = r#"{
    "name": "merged",
    "budget": {"amount": {"ratio": 0.25}},
    "importance": {"type": "equal"},
    "grouping": {"type": "dominant", "similarity": [{"features": {"type": "router_rows"}, "metric": "cosine"}]},
    "alignment": {"type": "weights"},
    "combination": {"type": "average", "weights": {"by": {"type": "equal"}}},
    "router": {"type": "merge"}
}"#;

/// Exports a merge; false for experts in groups that must stay as many as they are.
fn merge(from: &Arc<Checkpoint>, to: &Path) -> Result<bool> {
    if from.config().routing.groups().is_some() {
        return Ok(false);
    }
    let evidence = Evidence { model: from.fingerprint(), data: String::new(), layers: Vec::new() };
    let plan = Recipe::from_json(MERGE)?.plan(from, &evidence, &ProtectionMask::none())?;
    let options = MergeOptions { mtp: Some(Mtp::Drop), ..MergeOptions::new(OutputForm::Stock) };
    write(plan.on(from, &options)?.model(), to, &WriteOptions::default())?;
    Ok(true)
}

/// Scores by weight magnitude: no run of the model.
fn magnitude(checkpoint: &Checkpoint) -> Result<ScoreTable> {
    let provenance = Provenance::new(checkpoint.fingerprint(), "", "{}");
    let scorer = ScorerConfig::from(Magnitude::new()).build()?;
    Ok(scorer.score(&Statistics::new(checkpoint.shape(), provenance), checkpoint)?)
}

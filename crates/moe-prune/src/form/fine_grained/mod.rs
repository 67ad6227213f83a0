//! Experts as equal pieces: ragged budgets for stock loaders.
//!
//! An MoE layer with `E` experts of width `I` and `k` per token equals one with `E m` experts of width `I / m` and `k
//! m` per token, if every expert is cut into `m` pieces that all have a copy of its router row: the pieces of an expert
//! tie, and are selected together. An expert may then keep `n_e` of its `m` pieces, while all pieces have one width.
//!
//! The other way round it is how fine-grained experts are explained (DeepSeekMoE, arXiv 2401.06066, section 3.1). With
//! `n_e < m` and a fixed number of pieces per token the routing is no longer that of the model: pieces of further
//! experts are selected, and the weights change. [`FineGrained::top_k`] and [`FineGrained::scales`] are there to make
//! up for it.

#[cfg(feature = "repair")]
mod calibrate;
mod map;
mod select;

use moe_checkpoint::{
    Checkpoint, Granularity, GroupScore, RoutingKind, ScoreTable, UniformShape, uniform_shape_config,
};

#[cfg(feature = "repair")]
pub use calibrate::{ScaleCalibration, ScaleFit, Trial, TrialOptions};
pub use map::{LayerPieces, Piece, PieceMap};
pub(super) use select::best_blocks;

use super::PruneOptions;
use super::export::Export;
use super::target::{Target, TargetLayer, TargetSet};
use super::uniform::{ALIGNMENT, aligned, check_shared, shared, stock_layout};
use crate::plan::LayerKept;
use crate::{Error, PrunePlan, Result};

/// Widths that are multiples of these are what kernels of serving engines are tuned for.
const SERVING: usize = 64;

/// How experts become pieces; see [`PruneForm::FineGrained`](crate::PruneForm::FineGrained).
///
/// ```no_run
/// use std::sync::Arc;
/// use moe_checkpoint::{Checkpoint, ScoreTable, WriteOptions, write};
/// use moe_prune::{FineGrained, PruneForm, PruneOptions};
///
/// let model = Arc::new(Checkpoint::open("models/Qwen1.5-MoE-A2.7B")?);
/// let scores = ScoreTable::load("scores.safetensors")?;
/// let pieces = FineGrained { ranking: Some(&scores), ..FineGrained::new(4) };
/// let plan = pieces.prune(&scores, &model, 0.5)?;
/// let pruned = plan.on(&model, &PruneOptions::new(PruneForm::FineGrained(pieces)))?;
/// write(pruned.model(), "out/pieces", &WriteOptions::default())?;
/// # Ok::<(), moe_prune::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FineGrained<'a> {
    /// Pieces that a whole expert has, `m`. A power of two keeps the factor on down projections exact.
    pub pieces: usize,
    /// Pieces per token; `None` is `m` times the experts per token of the model.
    pub top_k: Option<usize>,
    /// Unit scores: the units that an expert keeps are dealt to its pieces from the highest-scored on, so that all
    /// pieces are worth the same, the first one most. `None` deals them in the order of their ids.
    pub ranking: Option<&'a ScoreTable>,
    /// Factor on the output of every expert, `[MoE layer][expert of the checkpoint]`, e.g. from calibration.
    pub scales: Option<&'a [Vec<f32>]>,
}

impl<'a> FineGrained<'a> {
    /// `pieces` of every expert, the same share of them per token as before, units dealt by their ids, no further
    /// factor.
    pub fn new(pieces: usize) -> Self {
        Self { pieces, top_k: None, ranking: None, scales: None }
    }

    /// Units of a piece. Stock loaders run multiples of 8 alone, so that pieces of other widths get units of zeros.
    ///
    /// # Errors
    /// [`Error::Export`] for experts of different widths, or of a width that is no multiple of the number of pieces.
    pub fn width(&self, from: &Checkpoint) -> Result<usize> {
        let Some(width) = from.shape().uniform_width().filter(|width| *width > 0) else {
            return Err(refused("the experts of the checkpoint must all have one width".into()));
        };
        if self.pieces == 0 || !width.is_multiple_of(self.pieces) {
            let reason = format!("experts of width {width} cannot be cut into {} equal pieces", self.pieces);
            return Err(refused(reason));
        }
        Ok(width / self.pieces)
    }

    /// Units of every piece of an expert, ascending; the pieces share out the kept units evenly.
    fn deal(&self, kept: &LayerKept, expert: usize, width: usize) -> Vec<Vec<u32>> {
        let mut units = kept.experts[expert].clone();
        let scores = self.ranking.and_then(|table| table.layer(kept.layer)).map(|layer| &layer.scores[expert]);
        if let Some(scores) = scores {
            // Stable, so that equal scores stay in the order of their ids. Scores are finite: the table was validated.
            let score = |unit: &u32| scores[*unit as usize];
            units.sort_by(|a, b| score(b).partial_cmp(&score(a)).unwrap_or(std::cmp::Ordering::Equal));
        }
        let pieces = units.len() / width;
        (0..pieces)
            .map(|piece| {
                let mut units: Vec<u32> = units.iter().skip(piece).step_by(pieces).copied().collect();
                units.sort_unstable();
                units
            })
            .collect()
    }

    /// The experts that the pieces of a layer become, `width` wide: the expert of the checkpoint that each is a piece
    /// of, and its weights.
    pub(super) fn sets(
        &self,
        kept: &LayerKept,
        pieces: &LayerPieces,
        map: &PieceMap,
        width: usize,
        scales: Option<&[f32]>,
    ) -> (Vec<usize>, Vec<TargetSet>) {
        let dealt: Vec<Vec<Vec<u32>>> =
            (0..kept.experts.len()).map(|expert| self.deal(kept, expert, map.width)).collect();
        let set = |piece: &Piece| {
            let scale = scales.map_or(1.0, |scales| scales[piece.expert]);
            TargetSet {
                width,
                down_factor: map.factor * scale,
                // All pieces of an expert together give its bias once.
                bias_factor: map.factor / dealt[piece.expert].len() as f32 * scale,
                ..TargetSet::of(piece.expert, dealt[piece.expert][piece.index].clone())
            }
        };
        (pieces.pieces.iter().map(|piece| piece.expert).collect(), pieces.pieces.iter().map(set).collect())
    }

    fn validate(&self, plan: &PrunePlan) -> Result<()> {
        if let Some(table) = self.ranking {
            table.validate_for(&plan.shape)?;
            if table.granularity != Granularity::Unit {
                return Err(Error::NeedsUnitScores);
            }
        }
        let Some(scales) = self.scales else { return Ok(()) };
        let (found, expected): (Vec<_>, Vec<_>) =
            (scales.iter().map(Vec::len).collect(), plan.shape.layers.iter().map(|l| l.num_experts()).collect());
        if found != expected {
            let (found, expected) = (format!("{found:?}"), format!("{expected:?}, the experts of every MoE layer"));
            return Err(Error::InvalidParameter { field: "scales", found: format!("of {found} experts"), expected });
        }
        if let Some(value) = scales.iter().flatten().find(|value| !value.is_finite()) {
            let expected = "finite numbers".into();
            return Err(Error::InvalidParameter { field: "scales", found: value.to_string(), expected });
        }
        Ok(())
    }
}

pub(super) fn refused(reason: String) -> Error {
    Error::Export { mode: Export::FineGrained.name(), reason }
}

/// Refuses experts that share sets of weights: a piece of a set would need a row of the router of each of its experts.
pub(super) fn refuse_sharing(from: &Checkpoint) -> Result<()> {
    match from.grouped() {
        true => Err(refused("its experts share sets of weights, which pieces cannot; cut before merging".into())),
        false => Ok(()),
    }
}

/// The target of a form as pieces: a stock checkpoint with more, narrower experts.
pub(super) fn target(
    plan: &PrunePlan,
    from: &Checkpoint,
    how: &FineGrained<'_>,
    options: &PruneOptions<'_>,
) -> Result<Target> {
    refuse_sharing(from)?;
    how.validate(plan)?;
    let map = how.map(plan, from)?;
    // Units of zeros give nothing and cost little; what stock loaders cannot run is worth nothing.
    let width = match aligned(map.width, from) || options.allow_unaligned {
        true => map.width,
        false => map.width.next_multiple_of(ALIGNMENT),
    };
    check_shared(width, from, options)?;
    let mut layers = Vec::with_capacity(plan.kept.len());
    for (position, (kept, pieces)) in plan.kept.iter().zip(&map.layers).enumerate() {
        for (expert, _) in pieces.counts.iter().enumerate().filter(|(_, count)| **count == 0) {
            let sizes = options.edits.as_ref().map(|edits| edits.sizes(kept.layer, expert)).transpose()?;
            if sizes.unwrap_or_default().down_bias.is_some() {
                return Err(refused(format!(
                    "the edits give expert {expert} of layer {} a bias, but without units it goes with its router row",
                    kept.layer
                )));
            }
        }
        let scales = how.scales.map(|scales| scales[position].as_slice());
        let (rows, sets) = how.sets(kept, pieces, &map, width, scales);
        let layer = TargetLayer::kept(from, kept, stock_layout(from, kept.layer, width)?);
        layers.push(TargetLayer { rows, sets, correction_factor: map.correction_factor, ..layer });
    }
    let mut notes = notes(map.width, width);
    if map.cuts_experts() {
        notes.push(format!(
            "{} pieces per token end within those of one expert for some tokens; these tie, and stock runtimes take others of \
             them than an evaluation here: their outputs differ",
            map.routing.top_k
        ));
    }
    let (shared_experts, shared_width) = shared(from, width);
    let shape = UniformShape {
        width,
        experts: map.layers.first().map(|layer| layer.pieces.len()),
        shared_experts,
        top_k: Some(map.routing.top_k),
        groups: map.routing.groups().map(|groups| (groups.count, groups.top)),
        ..UniformShape::default()
    };
    let config = uniform_shape_config(from.raw_config(), shape)?;
    Ok(Target { shared_width, notes, ..Target::new(config, layers) })
}

/// What the report says beyond the numbers.
fn notes(units: usize, width: usize) -> Vec<String> {
    let mut notes = Vec::new();
    if units != width {
        notes.push(format!(
            "pieces of {units} units are {width} wide, the rest zeros: grouped matrix products of stock loaders need \
             multiples of {ALIGNMENT}"
        ));
    }
    if !width.is_multiple_of(SERVING) {
        notes.push(format!(
            "pieces have width {width}; kernels of serving engines are tuned for multiples of {SERVING} or {}",
            2 * SERVING
        ));
    }
    notes
}

/// Factor on the down projection of `m` pieces that keeps the output, where all pieces of an expert are selected: the
/// inverse of what cutting does to the weight of an expert. [`Error::Export`] where there is none.
fn down_factor(kind: &RoutingKind, pieces: usize) -> Result<f32> {
    match kind {
        // The softmax is over m times as many experts, or the sum it is divided by has m times as many terms.
        RoutingKind::SoftmaxTopK { .. }
        | RoutingKind::TopKSoftmax
        | RoutingKind::SoftmaxGroupTopK { .. }
        | RoutingKind::SoftmaxCorrected { .. }
        | RoutingKind::Sigmoid { renormalize: true, .. } => Ok(pieces as f32),
        RoutingKind::Sigmoid { renormalize: false, .. } => Ok(1.0),
        RoutingKind::Sparsemixer { .. } => Err(refused(
            "sparsemixer takes one expert after the other, so that pieces of an expert are not selected together"
                .into(),
        )),
        other => Err(refused(format!(
            "routing {} has no known equivalent with pieces",
            moe_checkpoint::human::variant(&other)
        ))),
    }
}

/// Factor on the correction bias: where it is added to a softmax, which becomes smaller by the number of pieces.
fn correction_factor(kind: &RoutingKind, pieces: usize) -> f32 {
    match kind {
        RoutingKind::SoftmaxCorrected { .. } => 1.0 / pieces as f32,
        _ => 1.0,
    }
}

/// Whether every piece of a group must be in a group of its own, since groups are ranked by a sum over their experts.
fn splits_groups(kind: &RoutingKind) -> bool {
    matches!(kind, RoutingKind::Sigmoid { groups: Some(groups), .. } if groups.score == GroupScore::TopTwoSum)
}

//! Dropped experts in pieces: each unit goes where it fits, and each kept expert is clustered back to its width.

mod reassign;
mod recombine;

use serde::{Deserialize, Serialize};

use super::{Combination, GroupSink, GroupWeights, LayerJob, Merged};
use crate::experts::{UnitParts, check_alike, from_unit_vectors, unit_vectors};
use crate::importance::Importance;
use crate::router::RouterAddition;
use crate::{Error, Result};

use reassign::{Moved, reassign};
pub(crate) use recombine::Points;

/// Every unit of an expert that is not dominant is a *segment* `(gate row, up row, down column)`. It moves to the
/// dominant that holds the most similar segment, if the similarity exceeds `alpha`, else it is lost. Each dominant then
/// has more segments than units, and weighted spherical k-means makes as many of them as it had.
///
/// Source: DERN (arXiv 2509.10377), steps 2 and 3, reconstructed from a digest. Choices where that is silent: segments
/// weigh as much as the importance of the expert they come from, and each that moves adds the `1 / I`-th part of it to
/// the importance of its destination, whose own segments weigh as much as both; a center has the direction of the
/// weighted mean of unit vectors and the weighted mean of lengths; a cluster of one segment is that segment, bit for
/// bit; an empty cluster keeps its center; a dominant that received nothing stays as it is.
///
/// Cost per layer, with D dropped and K kept experts of I units: `2 D K I^2 n H` operations for the similarities (n = 2
/// parts, or 3) and up to `rounds * 2 K N I 3 H` for the clusters of N segments. Memory: the vectors of up to 8 kept
/// experts, `4 * 8 I n H` bytes, then for one expert its points twice and similarities, `4 N (6 H + I)` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segments {
    /// Similarity that a segment must exceed to be moved. 1 or more moves nothing, -1 everything.
    #[serde(default = "default_alpha")]
    pub alpha: f64,
    /// What makes segments alike.
    #[serde(default)]
    pub similarity: SegmentSimilarity,
    /// Where the clusters start.
    #[serde(default)]
    pub centers: Centers,
    /// What lengths are averaged of.
    #[serde(default)]
    pub scale: Scale,
    /// Most rounds of the k-means.
    #[serde(default = "default_rounds")]
    pub rounds: usize,
    /// Whether each moved segment adds the `1 / I`-th part of its expert's router row to that of its destination. Off
    /// by default: it changes the routing.
    #[serde(default)]
    pub add_router_rows: bool,
}

fn default_alpha() -> f64 {
    0.6
}

fn default_rounds() -> usize {
    30
}

impl Default for Segments {
    fn default() -> Self {
        Self {
            alpha: default_alpha(),
            similarity: SegmentSimilarity::default(),
            centers: Centers::default(),
            scale: Scale::default(),
            rounds: default_rounds(),
            add_router_rows: false,
        }
    }
}

/// What makes segments alike when they are reassigned: the cosine of these vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentSimilarity {
    /// Whether the gate row counts beside up row and down column; without it is slightly better.
    #[serde(default)]
    pub gate: bool,
    /// Whether each part is divided by its length first, so that scaling up by c and down by 1 / c changes nothing.
    #[serde(default)]
    pub normalize_parts: bool,
}

/// Where the clusters of an expert start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Centers {
    /// The segments with the largest absolute element of the gate row. A segment that points exactly where an earlier
    /// one does is passed over while there are others, since its cluster would stay empty and displace another.
    #[default]
    LargestGate,
    /// The expert's own segments.
    Own,
}

/// What the lengths of a cluster's segments are averaged of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    /// The whole vector.
    #[default]
    Whole,
    /// Gate row, up row and down column each.
    Parts,
}

impl Combination for Segments {
    fn combine(&self, job: &LayerJob<'_>, sink: GroupSink<'_>) -> Result<Vec<RouterAddition>> {
        let plan = job.plan;
        let moved = reassign(job, self)?;
        let mut additions = Vec::new();
        for (position, (group, moved)) in plan.groups.iter().zip(&moved).enumerate() {
            let dominant = group.dominant as usize;
            let merged = match moved.is_empty() {
                true => Merged::Unchanged(dominant),
                false => self.recombine(job, dominant, moved)?,
            };
            if self.add_router_rows {
                additions.extend(router_additions(job, position, moved)?);
            }
            sink(position, merged)?;
        }
        Ok(additions)
    }

    fn weights(&self) -> GroupWeights {
        GroupWeights::by(Importance::Equal)
    }

    fn takes_dissolved(&self) -> bool {
        true
    }

    fn adds_to_router(&self) -> bool {
        self.add_router_rows
    }

    fn as_wide_as_dominant(&self) -> bool {
        true
    }

    fn validate(&self) -> Result<()> {
        if !self.alpha.is_finite() {
            return Err(Error::parameter("combination.alpha", self.alpha, "a number"));
        }
        match self.rounds {
            0 => Err(Error::parameter("combination.rounds", 0, "at least 1")),
            _ => Ok(()),
        }
    }
}

impl Segments {
    /// Clusters an expert's segments and those moved to it back to its width.
    fn recombine(&self, job: &LayerJob<'_>, dominant: usize, moved: &[Moved]) -> Result<Merged> {
        let own = job.experts.expert(dominant)?;
        let (mut vectors, length) = unit_vectors(&own, UnitParts::ALL);
        let weight = |expert: usize| job.plan.importance.get(expert).map_or(1.0, |v| f64::from(*v));
        let taken: f64 = moved.chunk_by(|a, b| a.expert == b.expert).try_fold(0.0, |sum, run| {
            let width = job.experts.width(run[0].expert)?.max(1);
            Ok::<_, Error>(sum + weight(run[0].expert) * run.len() as f64 / width as f64)
        })?;
        let mut weights = vec![weight(dominant) + taken; own.width];
        // Moved segments ascend by expert: each is read once.
        for run in moved.chunk_by(|a, b| a.expert == b.expert) {
            let source = job.experts.expert(run[0].expert)?;
            check_alike_but_for_width(job, dominant, &own, run[0].expert, &source)?;
            let (from, _) = unit_vectors(&source, UnitParts::ALL);
            for segment in run {
                vectors.extend_from_slice(&from[segment.unit * length..(segment.unit + 1) * length]);
                weights.push(weight(segment.expert));
            }
        }
        let points = Points { vectors, length, weights, own: own.width, hidden: own.hidden };
        Ok(match points.cluster(self.centers, self.scale, self.rounds) {
            None => Merged::Unchanged(dominant),
            Some(centers) => Merged::Changed(Box::new(from_unit_vectors(&centers, &own))),
        })
    }
}

fn check_alike_but_for_width(
    job: &LayerJob<'_>,
    dominant: usize,
    own: &moe_checkpoint::ExpertWeights,
    expert: usize,
    source: &moe_checkpoint::ExpertWeights,
) -> Result<()> {
    // Segments are compared one by one: widths may differ.
    let same_width = moe_checkpoint::ExpertWeights { width: own.width, ..source.clone() };
    check_alike(job.plan.layer, (dominant, own), (expert, &same_width))
}

/// The share of each expert's router row that its moved segments take along.
fn router_additions(job: &LayerJob<'_>, group: usize, moved: &[Moved]) -> Result<Vec<RouterAddition>> {
    let runs = moved.chunk_by(|a, b| a.expert == b.expert);
    let addition = |run: &[Moved]| -> Result<RouterAddition> {
        let width = job.experts.expert(run[0].expert)?.width;
        Ok(RouterAddition { group, expert: run[0].expert, share: run.len() as f64 / width as f64 })
    };
    runs.map(addition).collect()
}

#[cfg(test)]
mod tests;

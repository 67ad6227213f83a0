//! Where each segment goes.

use std::ops::Range;

use moe_checkpoint::ExpertWeights;
use rayon::prelude::*;

use super::{LayerJob, SegmentSimilarity, Segments};
use crate::Result;
use crate::experts::{UnitParts, unit_vectors};
use crate::linalg::{normalize_rows, row_products};

/// Kept experts whose vectors are in memory at a time.
const BLOCK: usize = 8;

/// A segment on its way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Moved {
    /// The expert it comes from.
    pub expert: usize,
    /// Its unit there.
    pub unit: usize,
}

/// The most similar kept expert so far of one segment.
#[derive(Clone, Copy)]
struct Best {
    similarity: f32,
    group: usize,
}

/// The segments that move to each group, ascending by expert and unit.
pub(super) fn reassign(job: &LayerJob<'_>, parameters: &Segments) -> Result<Vec<Vec<Moved>>> {
    let plan = job.plan;
    let kept: Vec<usize> = plan.groups.iter().map(|group| group.dominant as usize).collect();
    let alone = |group: usize| plan.protected(kept[group]);
    let dropped: Vec<usize> = (0..job.experts.count()).filter(|e| !kept.contains(e)).collect();
    let mut best: Vec<Vec<Best>> = vec![Vec::new(); dropped.len()];
    let open: Vec<usize> = (0..kept.len()).filter(|group| !alone(*group)).collect();
    for block in open.chunks(BLOCK) {
        let mut vectors = Vec::with_capacity(block.len());
        for group in block {
            vectors.push((*group, rows(&job.experts.expert(kept[*group])?, parameters.similarity)));
        }
        for (expert, best) in dropped.iter().zip(&mut best) {
            let (segments, length) = rows(&job.experts.expert(*expert)?, parameters.similarity);
            let nobody = Best { similarity: f32::NEG_INFINITY, group: usize::MAX };
            best.resize(segments.len() / length.max(1), nobody);
            for (group, (kept, _)) in &vectors {
                let width = kept.len() / length.max(1);
                if width == 0 {
                    continue;
                }
                let products = row_products(&segments, kept, length);
                best.par_iter_mut().zip(products.par_chunks_exact(width)).for_each(|(best, row)| {
                    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max).clamp(-1.0, 1.0);
                    if largest > best.similarity {
                        *best = Best { similarity: largest, group: *group };
                    }
                });
            }
        }
    }
    let mut moved: Vec<Vec<Moved>> = vec![Vec::new(); kept.len()];
    for (expert, best) in dropped.iter().zip(&best) {
        for (unit, best) in best.iter().enumerate() {
            // Everything exceeds -1 but what points exactly the other way; it moves then, too.
            let exceeds = f64::from(best.similarity) > parameters.alpha || parameters.alpha <= -1.0;
            if exceeds && best.group != usize::MAX {
                moved[best.group].push(Moved { expert: *expert, unit });
            }
        }
    }
    Ok(moved)
}

/// Vectors of unit length that segments are compared by, and their number of elements.
fn rows(expert: &ExpertWeights, similarity: SegmentSimilarity) -> (Vec<f32>, usize) {
    let parts = UnitParts { gate: similarity.gate, ..UnitParts::OUTER };
    let (mut vectors, length) = unit_vectors(expert, parts);
    if similarity.normalize_parts {
        for row in vectors.chunks_exact_mut(length.max(1)) {
            for part in parts_of(length, expert.hidden) {
                normalize_rows(&mut row[part.clone()], part.len());
            }
        }
    }
    normalize_rows(&mut vectors, length);
    (vectors, length)
}

/// Ranges of the whole parts of a unit vector.
fn parts_of(length: usize, hidden: usize) -> impl Iterator<Item = Range<usize>> {
    (0..length / hidden.max(1)).map(move |part| part * hidden..(part + 1) * hidden)
}

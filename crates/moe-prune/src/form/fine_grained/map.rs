//! Which pieces a model has after the export, and how it routes to them.

use moe_checkpoint::{Checkpoint, Groups, Routing, RoutingKind};

use super::{FineGrained, correction_factor, down_factor, refused, splits_groups};
use crate::plan::LayerKept;
use crate::{PrunePlan, Result};

/// The pieces of a model, and the routing to them.
#[derive(Clone, Debug, PartialEq)]
pub struct PieceMap {
    /// Units of every piece.
    pub width: usize,
    /// Routing of the exported model.
    pub routing: Routing,
    /// Factor on all down projections, apart from [`FineGrained::scales`].
    pub factor: f32,
    /// Factor on the correction bias.
    pub correction_factor: f32,
    /// MoE layers in ascending order.
    pub layers: Vec<LayerPieces>,
}

/// The pieces of one MoE layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerPieces {
    /// Decoder layer index.
    pub layer: usize,
    /// The experts of the exported model.
    pub pieces: Vec<Piece>,
    /// How many pieces every expert of the checkpoint keeps.
    pub counts: Vec<usize>,
}

/// An expert of the exported model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Piece {
    /// The expert of the checkpoint that it is a piece of.
    pub expert: usize,
    /// Which of its pieces.
    pub index: usize,
}

impl LayerPieces {
    /// Values per expert of the checkpoint, `[tokens, experts]`, as values per piece `[tokens, pieces]`.
    pub fn expand(&self, values: &[f32]) -> Vec<f32> {
        let rows = values.chunks_exact(self.counts.len().max(1));
        rows.flat_map(|row| self.pieces.iter().map(|piece| row[piece.expert])).collect()
    }
}

impl PieceMap {
    /// How many of the pieces of a layer can be selected for one token: all, or those of the selected groups.
    fn selectable(&self, layer: &LayerPieces) -> usize {
        let pieces = layer.pieces.len();
        self.routing.groups().map_or(pieces, |groups| pieces / groups.count * groups.top)
    }

    /// Whether the pieces per token may end within those of one expert, which tie. Which of them a token gets is up to
    /// whoever runs the model then.
    pub fn cuts_experts(&self) -> bool {
        self.layers.iter().any(|layer| {
            let counts = || layer.counts.iter().copied().filter(|count| *count > 0);
            let alike = counts().max() == counts().min();
            let whole = alike && counts().max().is_some_and(|count| self.routing.top_k.is_multiple_of(count));
            self.routing.top_k < self.selectable(layer) && !whole
        })
    }
}

impl FineGrained<'_> {
    /// The pieces that a plan leaves.
    ///
    /// # Errors
    /// [`Error::Export`](crate::Error::Export) with the reason: a routing without an equivalent, widths that are no
    /// multiples of a piece, layers with different numbers of pieces, groups that cannot be formed, fewer pieces than
    /// are selected.
    pub fn map(&self, plan: &PrunePlan, from: &Checkpoint) -> Result<PieceMap> {
        let routing = &from.config().routing;
        if plan.kept.iter().any(|kept| from.config().moe(kept.layer).is_some_and(|moe| moe.identities > 0)) {
            let reason = "routers choose identity experts, too, which would have to become as many pieces".into();
            return Err(refused(reason));
        }
        if let Some(kept) = plan.kept.iter().find(|kept| from.config().moe(kept.layer).is_some_and(|moe| moe.by_table))
        {
            let layer = kept.layer;
            let reason = "routes by a table of the vocabulary, which would have to name the pieces";
            return Err(refused(format!("layer {layer} {reason}")));
        }
        let factor = down_factor(&routing.kind, self.pieces)?;
        let width = self.width(from)?;
        let mut layers: Vec<LayerPieces> = Vec::with_capacity(plan.kept.len());
        for kept in &plan.kept {
            let layer = self.layer(kept, width, routing)?;
            let total = layer.pieces.len();
            if let Some(first) = layers.first().filter(|first| first.pieces.len() != total) {
                return Err(refused(format!(
                    "layer {} keeps {} pieces of {width} units and layer {} keeps {total}; stock loaders read one number for \
                     all layers: see FineGrained::prune",
                    first.layer,
                    first.pieces.len(),
                    kept.layer
                )));
            }
            layers.push(layer);
        }
        let correction_factor = correction_factor(&routing.kind, self.pieces);
        let routing = self.routing(routing, layers.first().map_or(0, |layer| layer.pieces.len()))?;
        Ok(PieceMap { width, routing, factor, correction_factor, layers })
    }

    /// The routing to so many pieces of a layer.
    pub(super) fn routing(&self, before: &Routing, pieces: usize) -> Result<Routing> {
        let top_k = self.top_k.unwrap_or(before.top_k * self.pieces);
        if top_k == 0 {
            return Err(refused("`top_k` is 0, expected at least 1".into()));
        }
        let mut routing = Routing { top_k, ..before.clone() };
        let mut reachable = pieces;
        if let Some(groups) = before.groups() {
            let groups = match splits_groups(&routing.kind) {
                true => Groups { count: groups.count * self.pieces, top: groups.top * self.pieces, ..groups },
                false => groups,
            };
            reachable = pieces / groups.count * groups.top;
            match &mut routing.kind {
                RoutingKind::Sigmoid { groups: g, .. } => *g = Some(groups),
                RoutingKind::SoftmaxGroupTopK { groups: g } => *g = groups,
                _ => {}
            }
        }
        if reachable < top_k {
            return Err(refused(format!(
                "a token can be routed to {reachable} of the {pieces} pieces of a layer, but {top_k} are selected per token; \
                 keep more or give a smaller `top_k`"
            )));
        }
        Ok(routing)
    }

    /// The pieces of one layer of a model with this routing.
    pub(in crate::form) fn layer(&self, kept: &LayerKept, width: usize, routing: &Routing) -> Result<LayerPieces> {
        let counts = counts(kept, width)?;
        let pieces = match routing.groups() {
            None => in_order(&counts, 0..counts.len()).collect(),
            Some(groups) => {
                let pieces = self.grouped(&counts, &groups, &routing.kind);
                pieces.map_err(|reason| refused(format!("layer {}: {reason}", kept.layer)))?
            }
        };
        Ok(LayerPieces { layer: kept.layer, pieces, counts })
    }

    /// Refuses so many pieces of a group where groups are ranked by their two best.
    pub(super) fn check_split(&self, per_group: usize) -> Result<(), String> {
        let blocks = self.pieces;
        if per_group.is_multiple_of(blocks) && per_group / blocks >= 2 {
            return Ok(());
        }
        Err(format!(
            "its groups keep {per_group} pieces each; ranked by their two best they are split into {blocks}, which needs a \
             multiple of {blocks} and at least {}",
            2 * blocks
        ))
    }

    /// Pieces in the order that keeps groups together, or why there is none.
    fn grouped(&self, counts: &[usize], groups: &Groups, kind: &RoutingKind) -> Result<Vec<Piece>, String> {
        let size = counts.len() / groups.count.max(1);
        let per_group: Vec<usize> = counts.chunks(size.max(1)).map(|counts| counts.iter().sum()).collect();
        if per_group.iter().any(|count| *count != per_group[0]) {
            return Err(format!(
                "its groups of experts keep {per_group:?} pieces; routing by groups needs as many in each"
            ));
        }
        let members = |group: usize| group * size..(group + 1) * size;
        if !splits_groups(kind) {
            return Ok((0..groups.count).flat_map(|group| in_order(counts, members(group))).collect());
        }
        let blocks = self.pieces;
        self.check_split(per_group[0])?;
        let mut all = Vec::with_capacity(counts.iter().sum());
        for group in 0..groups.count {
            // The pieces of an expert go to different blocks, the least filled ones, so that fillings never differ by
            // more than one. Experts with most pieces come first: whole ones are in every block.
            let mut experts: Vec<usize> = members(group).collect();
            experts.sort_by_key(|expert| std::cmp::Reverse(counts[*expert]));
            let mut filled: Vec<Vec<Piece>> = vec![Vec::new(); blocks];
            for expert in experts {
                let mut order: Vec<usize> = (0..blocks).collect();
                order.sort_by_key(|block| filled[*block].len());
                order.truncate(counts[expert]);
                order.sort_unstable();
                for (index, block) in order.into_iter().enumerate() {
                    filled[block].push(Piece { expert, index });
                }
            }
            for mut block in filled {
                block.sort_unstable();
                all.extend(block);
            }
        }
        Ok(all)
    }
}

/// Pieces of every expert.
fn counts(kept: &LayerKept, width: usize) -> Result<Vec<usize>> {
    let count = |(expert, units): (usize, &Vec<u32>)| match units.len().is_multiple_of(width) {
        true => Ok(units.len() / width),
        false => Err(refused(format!(
            "expert {expert} of layer {} keeps {} units, expected a multiple of {width}, the width of a piece: prune with \
             round_to {width}",
            kept.layer,
            units.len()
        ))),
    };
    kept.experts.iter().enumerate().map(count).collect()
}

/// All pieces of some experts, one expert after the other.
fn in_order(counts: &[usize], experts: std::ops::Range<usize>) -> impl Iterator<Item = Piece> + '_ {
    experts.flat_map(|expert| (0..counts[expert]).map(move |index| Piece { expert, index }))
}

//! What a form makes of a plan, before any weight is read.

use std::collections::{BTreeMap, BTreeSet};

use moe_checkpoint::{Checkpoint, ExpertBiases, ExpertLayout};
use serde_json::Value;

use super::further::FurtherLayer;
use crate::plan::LayerKept;

/// What a form makes of a plan.
pub(super) struct Target {
    /// The new config.json.
    pub config: Value,
    /// MoE layers in ascending order, then pruned layers that predict further tokens.
    pub layers: Vec<TargetLayer>,
    /// Width of the shared experts, where it grows by units of zeros.
    pub shared_width: Option<usize>,
    /// Experts of attention that stay, by decoder layer, where it has fewer than before.
    pub attention: BTreeMap<usize, Vec<usize>>,
    /// Tensors that are left out.
    pub dropped: BTreeSet<String>,
    /// What a user should know besides.
    pub notes: Vec<String>,
}

impl Target {
    /// A target that leaves everything but these layers.
    pub fn new(config: Value, layers: Vec<TargetLayer>) -> Self {
        let (attention, dropped) = (BTreeMap::new(), BTreeSet::new());
        Self { config, layers, shared_width: None, attention, dropped, notes: Vec::new() }
    }

    /// A hash of what the plan does not say about the content of experts.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut number = |value: usize| {
            hasher.update(&(value as u64).to_le_bytes());
        };
        for layer in &self.layers {
            number(layer.rows.len());
            layer.rows.iter().for_each(|row| number(*row));
            for set in &layer.sets {
                [set.source, set.width, set.units.len()].into_iter().for_each(&mut number);
                set.units.iter().for_each(|unit| number(*unit as usize));
                [set.down_factor, set.bias_factor].into_iter().for_each(|factor| number(factor.to_bits() as usize));
            }
        }
        for (layer, experts) in &self.attention {
            number(*layer);
            experts.iter().for_each(|expert| number(*expert));
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// One MoE layer of a [`Target`].
pub(super) struct TargetLayer {
    /// Decoder layer index; without meaning for a further layer.
    pub layer: usize,
    /// The layer that it is made from, if that is none of the decoder's.
    pub further: Option<FurtherLayer>,
    pub layout: ExpertLayout,
    pub biases: ExpertBiases,
    /// The expert of the checkpoint that every expert is (a piece of), in the new order: which rows of the router stay.
    pub rows: Vec<usize>,
    /// The set of weights of every expert, where they share.
    pub sharing: Option<Vec<u32>>,
    /// Sets of weights, in the new order; one per expert where they do not share.
    pub sets: Vec<TargetSet>,
    /// Dropped units are zeroed instead of taken out.
    pub zero: bool,
    /// Factor on the correction bias.
    pub correction_factor: f32,
}

/// The weights of an expert, or of several that share them.
pub(super) struct TargetSet {
    /// The set of weights of the checkpoint that it is made from.
    pub source: usize,
    /// An expert of the checkpoint with these weights: the one whose edits count.
    pub expert: usize,
    /// Its units there, ascending.
    pub units: Vec<u32>,
    /// Width; more than its units where there are units of zeros.
    pub width: usize,
    /// Factor on its down projection.
    pub down_factor: f32,
    /// Factor on its bias of down.
    pub bias_factor: f32,
}

impl TargetSet {
    /// These units of an expert that shares with no other.
    pub fn of(expert: usize, units: Vec<u32>) -> Self {
        Self { source: expert, expert, width: units.len(), units, down_factor: 1.0, bias_factor: 1.0 }
    }
}

impl TargetLayer {
    /// The kept experts of a layer, in this layout.
    pub fn kept(from: &Checkpoint, kept: &LayerKept, layout: ExpertLayout) -> Self {
        let moe = from.config().moe(kept.layer);
        let rows = kept.experts_kept();
        let set = |expert: &usize| TargetSet::of(*expert, kept.experts[*expert].clone());
        let (sets, sharing) = match moe.and_then(|moe| moe.sets.as_ref()) {
            None => (rows.iter().map(set).collect(), None),
            Some(sets) => {
                // Sets that are left, in their order, each by the first expert that is left of it.
                let mut left: BTreeMap<usize, usize> = BTreeMap::new();
                for row in &rows {
                    left.entry(sets[*row] as usize).or_insert(*row);
                }
                let sharing = rows.iter().map(|row| left.range(..sets[*row] as usize).count() as u32).collect();
                let sets = left.iter().map(|(source, expert)| TargetSet { source: *source, ..set(expert) });
                (sets.collect(), Some(sharing))
            }
        };
        Self {
            layer: kept.layer,
            further: None,
            layout,
            biases: moe.map_or(ExpertBiases::None, |moe| moe.biases),
            rows,
            sharing,
            sets,
            zero: false,
            correction_factor: 1.0,
        }
    }

    /// Width of every set of weights.
    pub fn set_widths(&self) -> Vec<usize> {
        self.sets.iter().map(|set| set.width).collect()
    }

    /// Width of every expert.
    pub fn widths(&self) -> Vec<usize> {
        match &self.sharing {
            None => self.set_widths(),
            Some(sharing) => sharing.iter().map(|set| self.sets[*set as usize].width).collect(),
        }
    }

    /// Identity experts of the layer, the last rows of its router.
    pub fn identities(&self, from: &Checkpoint) -> usize {
        let decoder = self.further.is_none().then_some(self.layer);
        decoder.and_then(|layer| from.config().moe(layer)).map_or(0, |moe| moe.identities)
    }

    /// Whether router rows are those of the checkpoint, in its order.
    pub fn same_rows(&self, before: usize) -> bool {
        self.rows.len() == before && self.rows.iter().enumerate().all(|(new, old)| new == *old)
    }
}

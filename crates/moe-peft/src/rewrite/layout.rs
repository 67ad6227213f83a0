//! The tensors of a model with new values.

use std::collections::{BTreeMap, BTreeSet};

use moe_checkpoint::{Checkpoint, Dtype, ModelDescription, TensorSpec, regrouped_config};
use moe_core::adapters::{ExpertSite, Site};

use super::Rewrite;
use crate::{Error, Result, trainable_tensors};

/// Where a set of experts comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SetOrigin {
    /// The set of the base.
    pub set: usize,
    /// The one expert that it is for, if that has a new matrix.
    pub expert: Option<usize>,
}

/// Some rows of a map, as one tensor holds them.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// The tensor.
    pub tensor: String,
    pub dtype: Dtype,
    pub rows: usize,
    pub cols: usize,
}

/// What a model with new values consists of.
pub(crate) struct Layout {
    pub description: ModelDescription,
    /// The sets of each layer whose experts have new matrices.
    pub layers: BTreeMap<usize, Vec<SetOrigin>>,
    /// Sets before and after, in layers where experts do not share them any more.
    pub ungrouped: BTreeMap<usize, [usize; 2]>,
    /// The parts of every map with a new matrix, in the order of its rows.
    pub parts: BTreeMap<Site, Vec<Part>>,
    /// The map and its part, by tensor, outside experts.
    pub places: BTreeMap<String, (Site, usize)>,
}

impl Layout {
    /// Names of the tensors of maps with new matrices.
    pub fn tensors(&self) -> BTreeSet<String> {
        self.parts.values().flatten().map(|part| part.tensor.clone()).collect()
    }

    /// Checks that what is new fits the base.
    pub fn new(base: &Checkpoint, rewrite: &Rewrite) -> Result<Self> {
        let known: BTreeMap<Site, [usize; 2]> =
            trainable_tensors::linear_maps(base).into_iter().map(|place| (place.site, place.dims)).collect();
        for (site, new) in &rewrite.maps {
            let Some(dims) = known.get(site) else {
                return Err(Error::input("a map with new values", site, "a map of the model"));
            };
            if new.dims() != *dims {
                let found = format!("{:?}", new.dims());
                return Err(Error::input(format!("shape of the new values of {site}"), found, format!("{dims:?}")));
            }
        }
        let mut layout = Self {
            description: ModelDescription::of(base),
            layers: BTreeMap::new(),
            ungrouped: BTreeMap::new(),
            parts: BTreeMap::new(),
            places: BTreeMap::new(),
        };
        layout.lay_out_experts(base, rewrite)?;
        for site in rewrite.maps.keys() {
            let Site::Layer(layer, map) = *site else { continue };
            let mut parts = Vec::new();
            for role in trainable_tensors::roles(base, layer, map) {
                let info = base.role(role)?;
                let [rows, cols] = <[usize; 2]>::try_from(&info.shape[..]).unwrap_or_default();
                layout.places.insert(info.name.clone(), (*site, parts.len()));
                parts.push(Part { tensor: info.name.clone(), dtype: info.dtype, rows, cols });
            }
            layout.parts.insert(*site, parts);
        }
        Ok(layout)
    }

    fn lay_out_experts(&mut self, base: &Checkpoint, rewrite: &Rewrite) -> Result<()> {
        let mut changed: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
        for site in rewrite.maps.keys() {
            if let Site::Expert { layer, expert, .. } = *site {
                changed.entry(layer).or_default().insert(expert);
            }
        }
        let mut sets: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
        for layer in base.shape().layers.iter().map(|layer| layer.layer) {
            let Some(moe) = base.config().moe(layer) else { continue };
            let experts = 0..moe.num_experts();
            let Some(changed) = changed.get(&layer) else {
                sets.insert(layer, experts.map(|expert| moe.stored(expert) as u32).collect());
                continue;
            };
            let origin = |expert: usize| SetOrigin {
                set: moe.stored(expert),
                expert: changed.contains(&expert).then_some(expert),
            };
            let origins: BTreeSet<SetOrigin> = experts.clone().map(origin).collect();
            let origins: Vec<SetOrigin> = origins.into_iter().collect();
            let of = |expert| origins.partition_point(|other| *other < origin(expert));
            sets.insert(layer, experts.clone().map(|expert| of(expert) as u32).collect());
            let before = moe.stored_widths();
            let widths: Vec<usize> = origins.iter().map(|origin| before[origin.set]).collect();
            if origins.len() != before.len() {
                self.ungrouped.insert(layer, [before.len(), origins.len()]);
                self.replace_tensors(base, layer, &origins, &widths)?;
            }
            let layout = base.expert_layout(layer)?;
            for expert in changed {
                for map in [ExpertSite::GateUp, ExpertSite::Down] {
                    let site = Site::Expert { layer, expert: *expert, map };
                    if !rewrite.maps.contains_key(&site) {
                        continue;
                    }
                    let mut parts = Vec::new();
                    for part in trainable_tensors::expert_parts(base, layer, map) {
                        let place = layout.place(base.config().expert_hidden_size(), &widths, of(*expert), *part);
                        let missing = || Error::input(format!("{part} of {site}"), "none", "a matrix");
                        parts.push(Part {
                            tensor: base.expert_tensor_name(layer, place.tensor),
                            dtype: base.expert_dtype(layer, *expert, *part)?.ok_or_else(missing)?,
                            rows: place.rows,
                            cols: place.cols,
                        });
                    }
                    self.parts.insert(site, parts);
                }
            }
            self.layers.insert(layer, origins);
        }
        if !self.ungrouped.is_empty() {
            self.description.config = regrouped_config(base.raw_config(), &sets)?;
        }
        Ok(())
    }

    /// The tensors of a layer's experts with more sets than it has in the base.
    fn replace_tensors(
        &mut self,
        base: &Checkpoint,
        layer: usize,
        origins: &[SetOrigin],
        widths: &[usize],
    ) -> Result<()> {
        let Some(moe) = base.config().moe(layer) else { return Ok(()) };
        let (layout, hidden) = (base.expert_layout(layer)?, base.config().expert_hidden_size());
        let tensors = |widths: &[usize]| layout.tensors(hidden, widths, moe.biases).unwrap_or_default();
        let old: BTreeSet<String> = tensors(&moe.stored_widths())
            .into_iter()
            .map(|tensor| base.expert_tensor_name(layer, tensor.tensor))
            .collect();
        self.description.tensors.retain(|spec| !old.contains(&spec.name));
        for tensor in tensors(widths) {
            let name = base.expert_tensor_name(layer, tensor.tensor);
            let first = tensor.blocks.first().and_then(|(set, block)| Some((*set, *block.parts().first()?)));
            let dtype = first.map(|(set, part)| {
                let expert = (0..moe.num_experts()).find(|expert| moe.stored(*expert) == origins[set].set);
                base.expert_dtype(layer, expert.unwrap_or(0), part)
            });
            let missing = || Error::input(format!("tensor `{name}`"), "no part", "parts of experts");
            let dtype = dtype.transpose()?.flatten().ok_or_else(missing)?;
            self.description.tensors.push(TensorSpec { name, dtype, shape: tensor.shape });
        }
        Ok(())
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        let bytes = |spec: &TensorSpec| {
            spec.shape.iter().map(|size| *size as u64).product::<u64>() * spec.dtype.bitsize() as u64 / 8
        };
        self.description.tensors.iter().map(bytes).sum()
    }
}

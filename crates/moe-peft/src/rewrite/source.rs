//! Where new values come from.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use moe_checkpoint::{Checkpoint, ExpertPart, ModelSource, RawMatrix, Step, TensorInfo, decode_f32, sliced};
use moe_core::adapters::{ExpertSite, Site};
use rayon::prelude::*;

use super::{Changes, Layout, NewRows, Part, Rewrite, encoded, layout::SetOrigin};
use crate::{Error, Result, trainable_tensors};

/// Most parts that wait to be asked for.
const WAITING: usize = 32;

/// Parts of maps that were made together with another part and were not asked for yet: gate and up are made at once and
/// read one after the other.
type Waiting = BTreeMap<(Site, usize), Vec<u8>>;

/// A base with new values.
pub(super) struct Source {
    base: Arc<Checkpoint>,
    rewrite: Rewrite,
    layout: Layout,
    step: Step,
    waiting: Mutex<Waiting>,
}

impl Source {
    pub fn new(base: Arc<Checkpoint>, rewrite: Rewrite, layout: Layout, step: Step) -> Self {
        Self { base, rewrite, layout, step, waiting: Mutex::default() }
    }

    /// Names of the tensors that may have new values.
    pub fn tensors(&self) -> BTreeSet<String> {
        let rows = self.rewrite.tensors.keys().cloned();
        self.layout.tensors().into_iter().chain(rows).collect()
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One part of a map with a new matrix.
    fn part(&self, site: Site, part: usize) -> Result<Vec<u8>> {
        if let Some(made) = self.waiting().remove(&(site, part)) {
            return Ok(made);
        }
        let mut made = self.make(site)?;
        let wanted = std::mem::take(&mut made[part]);
        let mut waiting = self.waiting();
        for (other, bytes) in made.into_iter().enumerate().filter(|(other, _)| *other != part) {
            if waiting.len() >= WAITING {
                waiting.pop_first();
            }
            waiting.insert((site, other), bytes);
        }
        Ok(wanted)
    }

    fn parts(&self, site: Site) -> &[Part] {
        self.layout.parts.get(&site).map_or(&[], Vec::as_slice)
    }

    /// All parts of a map with a new matrix.
    fn make(&self, site: Site) -> Result<Vec<Vec<u8>>> {
        (self.rewrite.unchanged)()?;
        let parts = self.parts(site);
        let unknown = || Error::input("a map with new values", site, "one that has some");
        let new = self.rewrite.maps.get(&site).ok_or_else(unknown)?;
        if parts.iter().all(|part| part.rows * part.cols == 0) {
            return Ok(vec![Vec::new(); parts.len()]);
        }
        let old = if new.replaces() { Vec::new() } else { self.old_values(site)? };
        let mut matrix = new.matrix(&old)?;
        let [out, inputs] = new.dims();
        if matrix.len() != out * inputs {
            return Err(Error::input(format!("new values of {site}"), matrix.len(), format!("{out} x {inputs}")));
        }
        // What is as it was stays so to the bit, signs of zeros included.
        matrix.iter_mut().zip(&old).filter(|(new, old)| new == old).for_each(|(new, old)| *new = *old);
        let (mut made, mut rest) = (Vec::with_capacity(parts.len()), matrix.as_slice());
        for Part { tensor, dtype, rows, cols } in parts {
            let (values, after) = rest.split_at(rows * cols);
            made.push(encoded(tensor, *dtype, values)?);
            rest = after;
        }
        Ok(made)
    }

    fn old_values(&self, site: Site) -> Result<Vec<f32>> {
        let mut values = Vec::new();
        for (part, old) in self.parts(site).iter().zip(self.old(site)?) {
            decode_f32(part.dtype, &old, &mut values);
        }
        self.release_old(site);
        Ok(values)
    }

    /// The parts of a map in the base.
    fn old(&self, site: Site) -> Result<Vec<Cow<'_, [u8]>>> {
        match site {
            Site::Layer(layer, map) => {
                let read = |role| Ok(self.base.bytes(&self.base.role(role)?.name)?);
                trainable_tensors::roles(&self.base, layer, map).map(read).collect()
            }
            Site::Expert { layer, expert, map } => {
                let read = |part: &ExpertPart| {
                    let missing = || Error::input(format!("{part} of {site}"), "none", "a matrix");
                    Ok(self.base.expert_part(layer, expert, *part)?.ok_or_else(missing)?.bytes)
                };
                trainable_tensors::expert_parts(&self.base, layer, map).iter().map(read).collect()
            }
        }
    }

    fn release_old(&self, site: Site) {
        // What cannot be given back stays until everything is.
        let _ = match site {
            Site::Layer(..) => self.parts(site).iter().try_for_each(|part| self.base.release_tensor(&part.tensor)),
            Site::Expert { layer, expert, .. } => self.base.release_expert(layer, expert),
        };
    }

    /// Rows of a tensor with new rows, as bytes.
    fn rows(&self, tensor: &TensorInfo, new: &dyn NewRows, rows: Range<usize>) -> Result<Vec<u8>> {
        (self.rewrite.unchanged)()?;
        let columns: usize = tensor.shape.iter().skip(1).product();
        let values = new.rows(rows.clone(), &self.base)?;
        if values.len() != rows.len() * columns {
            let expected = format!("{} x {columns}", rows.len());
            return Err(Error::input(format!("new values of {}", new.what()), values.len(), expected));
        }
        encoded(&tensor.name, tensor.dtype, &values)
    }

    fn read(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        if let Some((site, part)) = self.layout.places.get(&tensor.name) {
            return Ok(sliced(Cow::Owned(self.part(*site, *part)?), range));
        }
        let Some(new) = self.rewrite.tensors.get(&tensor.name) else {
            return Ok(self.base.tensor_bytes(&tensor.name, range)?);
        };
        let row = row_bytes(tensor);
        let rows = range.start / row..range.end.div_ceil(row);
        let bytes = self.rows(tensor, &**new, rows.clone())?;
        Ok(sliced(Cow::Owned(bytes), range.start - rows.start * row..range.end - rows.start * row))
    }

    fn origin(&self, layer: usize, set: usize) -> Option<SetOrigin> {
        self.layout.layers.get(&layer)?.get(set).copied()
    }

    fn read_expert(&self, layer: usize, set: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        let Some(SetOrigin { set: old, expert }) = self.origin(layer, set) else {
            return Ok(self.base.set_part(layer, set, part)?);
        };
        // Without a gate, the up projection is the gate, too.
        let wanted = match part {
            ExpertPart::Gate if trainable_tensors::is_gateless(&self.base, layer) => ExpertPart::Up,
            part => part,
        };
        let place = expert.and_then(|expert| {
            let at = |map: ExpertSite| {
                let parts = trainable_tensors::expert_parts(&self.base, layer, map);
                Some((map, parts.iter().position(|other| *other == wanted)?))
            };
            let (map, index) = [ExpertSite::GateUp, ExpertSite::Down].into_iter().find_map(at)?;
            let site = Site::Expert { layer, expert, map };
            self.rewrite.maps.contains_key(&site).then_some((site, index))
        });
        let Some((site, index)) = place else { return Ok(self.base.set_part(layer, old, part)?) };
        let Part { dtype, rows, cols, .. } = self.parts(site)[index];
        Ok(Some(RawMatrix { bytes: Cow::Owned(self.part(site, index)?), dtype, rows, cols }))
    }

    /// Compares everything that may have changed with the base.
    pub fn changes(&self) -> Result<Changes> {
        let sites: Vec<Site> = self.rewrite.maps.keys().copied().collect();
        let compare = |site: &Site| -> Result<Vec<bool>> {
            let made = self.make(*site)?;
            let changed = made.iter().zip(self.old(*site)?).map(|(new, old)| *new != *old).collect();
            self.release_old(*site);
            Ok(changed)
        };
        let compared = moe_checkpoint::collect_in_order(sites.par_iter().map(compare))?;
        let mut changes = Changes { ungrouped: self.layout.ungrouped.clone(), ..Changes::default() };
        for (site, changed) in sites.iter().zip(compared) {
            if !changed.contains(&true) {
                changes.unchanged.push(site.to_string());
            }
            let mut names: Vec<&String> =
                self.parts(*site).iter().zip(changed).filter(|(_, new)| *new).map(|(part, _)| &part.tensor).collect();
            names.dedup();
            for name in names {
                changes.changed.entry(name.clone()).or_default().push(site.to_string());
            }
        }
        for (name, new) in &self.rewrite.tensors {
            let (info, mut changed) = (self.base.info(name)?, false);
            let (row, count) = (row_bytes(info), info.shape.first().copied().unwrap_or(1));
            let step = ((4 << 20) / row).max(1);
            for start in (0..count).step_by(step) {
                let rows = start..count.min(start + step);
                let old = self.base.tensor_bytes(name, rows.start * row..rows.end * row)?;
                changed |= self.rows(info, &**new, rows)? != *old;
            }
            self.base.release_tensor(name)?;
            match changed {
                true => changes.changed.entry(name.clone()).or_default().push(new.what()),
                false => changes.unchanged.push(new.what()),
            }
        }
        Ok(changes)
    }
}

fn row_bytes(tensor: &TensorInfo) -> usize {
    (tensor.shape.iter().skip(1).product::<usize>() * tensor.dtype.bitsize() / 8).max(1)
}

impl ModelSource for Source {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> moe_checkpoint::Result<Cow<'_, [u8]>> {
        self.read(tensor, range).map_err(Error::reading)
    }

    fn grain(&self, tensor: &TensorInfo) -> usize {
        match (self.layout.places.contains_key(&tensor.name), self.rewrite.tensors.contains_key(&tensor.name)) {
            (true, _) => tensor.bytes as usize,
            (_, true) => row_bytes(tensor),
            _ => self.base.grain(&tensor.name),
        }
    }

    fn makes_experts(&self, layer: usize) -> bool {
        self.layout.layers.contains_key(&layer)
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> moe_checkpoint::Result<Option<RawMatrix<'_>>> {
        self.read_expert(layer, set, part).map_err(Error::reading)
    }

    fn release(&self, tensor: &TensorInfo, range: Range<usize>) {
        match self.layout.places.get(&tensor.name) {
            Some(place) => drop(self.waiting().remove(place)),
            None if self.rewrite.tensors.contains_key(&tensor.name) => {}
            None => self.base.release_range(&tensor.name, range),
        }
    }

    fn release_expert(&self, layer: usize, set: usize) {
        if let Some(SetOrigin { set: old, .. }) = self.origin(layer, set) {
            self.base.release_set(layer, old);
        }
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.base)
    }

    fn step(&self) -> Option<Step> {
        Some(self.step.clone())
    }
}

//! An adapter in another layout.

use std::path::PathBuf;

use moe_checkpoint::{Checkpoint, Existing, OutputDir};

use super::{AdapterInput, AdapterLayout, WrittenAdapter, write_adapter};
use crate::{
    Error, Result,
    codec::{Delta, DeltaBase},
    lora::{LoraWeights, Maps},
};

/// Writes an adapter as PEFT has it, in a layout of choice: one that took a part of the weights becomes plain, experts
/// become fused or come one by one, a mixture becomes its approximation, the delta of an adapter an adapter again.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvertAdapter {
    /// Directory of the model that it is for.
    pub base: PathBuf,
    /// The adapter; its weight goes into what is written.
    pub adapter: AdapterInput,
    /// How it is written.
    pub layout: AdapterLayout,
    /// Directory of the new adapter.
    pub out: PathBuf,
    /// What to do about what is there already.
    pub existing: Existing,
}

impl ConvertAdapter {
    /// Converts an adapter into a directory that is not there yet.
    pub fn new(base: impl Into<PathBuf>, adapter: AdapterInput, out: impl Into<PathBuf>) -> Self {
        let (base, out) = (base.into(), out.into());
        Self { base, adapter, layout: AdapterLayout::default(), out, existing: Existing::Refuse }
    }

    /// Does it.
    ///
    /// # Errors
    /// What keeps the adapter from being read, from fitting the model and from being written in this layout, and an
    /// output that cannot be, before anything is written; then those of writing.
    pub fn run(&self) -> Result<WrittenAdapter> {
        OutputDir::check(&self.out, self.existing)?;
        let base = Checkpoint::open(&self.base)?;
        let maps = Maps::new(&base);
        let weights = match self.adapter.path.is_file() {
            true => self.of_delta(&maps)?,
            false => self.adapter.read(&maps)?,
        };
        let weights = scaled(weights, self.adapter.weight)?;
        let options = self.layout.options(&self.base, &weights, &maps);
        write_adapter(&self.out, self.existing, &weights, &maps, &options)
    }

    /// The adapter that a delta was made from, as far as the delta has it.
    fn of_delta(&self, maps: &Maps<'_>) -> Result<LoraWeights> {
        let delta = Delta::open(&self.adapter.path)?;
        if !matches!(delta.table().base, DeltaBase::Adapter { .. }) {
            let path = self.adapter.path.display();
            return Err(Error::Unsupported(format!(
                "{path}: the delta of a checkpoint as an adapter; merge it instead"
            )));
        }
        let mut name = self.out.file_name().unwrap_or_default().to_os_string();
        name.push(".restored");
        let restored = self.out.with_file_name(name);
        delta.restore_adapter(&restored, Existing::Force)?;
        let read = AdapterInput { path: restored.clone(), ..self.adapter.clone() }.read(maps);
        std::fs::remove_dir_all(&restored).map_err(|source| Error::Io { path: restored, source })?;
        read
    }
}

/// An adapter times a weight.
fn scaled(mut weights: LoraWeights, weight: f64) -> Result<LoraWeights> {
    if weight == 1.0 {
        return Ok(weights);
    }
    if !weight.is_finite() || weight == 0.0 {
        return Err(Error::input("weight of the adapter", weight, "a finite number other than 0"));
    }
    let whole = !weights.whole.is_empty() || !weights.tokens.is_empty();
    if whole || weights.maps.values().any(|low| low.magnitude.is_some() || low.changes_base()) {
        let what =
            "a weight on an adapter with DoRA, a part of the weights to begin with, or tensors in place of the base's";
        return Err(Error::Unsupported(what.into()));
    }
    weights.maps.values_mut().for_each(|low| low.b.iter_mut().for_each(|b| *b = (f64::from(*b) * weight) as f32));
    let biases = weights.maps.values_mut().filter_map(|low| low.bias.as_mut());
    biases.flatten().for_each(|c| *c = (f64::from(*c) * weight) as f32);
    Ok(weights)
}

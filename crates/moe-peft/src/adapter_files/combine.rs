//! Adapters into one.

use std::path::PathBuf;

use moe_checkpoint::{Checkpoint, Existing, OutputDir};

use super::{AdapterInput, AdapterLayout, WrittenAdapter, some, write_adapter};
use crate::{
    Result,
    lora::Maps,
    merge::{Combination, combine},
};

/// Writes one adapter that stands for several with weights.
#[derive(Clone, Debug, PartialEq)]
pub struct CombineAdapters {
    /// Directory of the model that they are for.
    pub base: PathBuf,
    /// The adapters.
    pub adapters: Vec<AdapterInput>,
    /// How they become one.
    pub how: Combination,
    /// How it is written.
    pub layout: AdapterLayout,
    /// Directory of the new adapter.
    pub out: PathBuf,
    /// What to do about what is there already.
    pub existing: Existing,
}

impl CombineAdapters {
    /// Combines adapters into a directory that is not there yet.
    pub fn new(
        base: impl Into<PathBuf>,
        adapters: Vec<AdapterInput>,
        how: Combination,
        out: impl Into<PathBuf>,
    ) -> Self {
        let (base, out) = (base.into(), out.into());
        Self { base, adapters, how, layout: AdapterLayout::default(), out, existing: Existing::Refuse }
    }

    /// Does it.
    ///
    /// # Errors
    /// What keeps adapters from being read or from fitting the model, those of [`combine`], and an output that cannot
    /// be, before anything is written; then those of writing.
    pub fn run(&self) -> Result<WrittenAdapter> {
        some(&self.adapters)?;
        OutputDir::check(&self.out, self.existing)?;
        let base = Checkpoint::open(&self.base)?;
        let maps = Maps::new(&base);
        let read = |adapter: &AdapterInput| Ok((adapter.read(&maps)?, adapter.weight));
        let read = self.adapters.iter().map(read).collect::<Result<Vec<_>>>()?;
        let weighted: Vec<_> = read.iter().map(|(weights, weight)| (weights, *weight)).collect();
        let combined = combine(&weighted, self.how)?;
        let options = self.layout.options(&self.base, &combined, &maps);
        write_adapter(&self.out, self.existing, &combined, &maps, &options)
    }
}

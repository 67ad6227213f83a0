//! Running a model with adapters from files.

use std::path::PathBuf;
use std::sync::Arc;

use moe_core::Model;
use moe_peft::lora::{Lora, LoraWeights, Maps};
use moe_peft::{AdapterSet, peft_files};

use crate::Result;

/// The model with adapters in PEFT's files, each with its whole weight; the model itself for none.
///
/// # Errors
/// Files that cannot be read or are for another model.
pub fn model_with(model: Model, directories: &[PathBuf]) -> Result<Model> {
    if directories.is_empty() {
        return Ok(model);
    }
    let mut set = AdapterSet::new();
    let maps = Maps::new(model.checkpoint());
    let mut adapters: Vec<(String, LoraWeights)> = Vec::with_capacity(directories.len());
    for (number, directory) in directories.iter().enumerate() {
        let weights = peft_files::read(directory, &maps, peft_files::ReadOptions::default())?;
        adapters.push((format!("adapter{number}"), weights));
    }
    let adapters: Vec<(&str, LoraWeights)> = adapters.iter().map(|(name, w)| (name.as_str(), w.clone())).collect();
    Lora::install(&mut set, &maps, &adapters, model.device())?;
    Ok(model.with_adapters(Arc::new(set))?)
}

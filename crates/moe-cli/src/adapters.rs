//! Opening a model with all that belongs to it: saved plans, what stands beside its weights, adapters.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use moe_checkpoint::Checkpoint;
use moe_core::Model;
use moe_peft::lora::{Lora, LoraWeights, Maps};
use moe_peft::{AdapterSet, SavedKind, peft_files};

use crate::{Error, Result};

/// Which model is run.
#[derive(Clone, Debug, clap::Args)]
pub struct ModelArguments {
    /// Model directory
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Saved plan of pruning or merging to run the model under, without writing it; repeatable: each goes on what the
    /// one before makes
    #[arg(long, value_name = "FILE")]
    pub plan: Vec<PathBuf>,
    /// What fine-tuning saved to run the model with: a LoRA in PEFT's files, each with its whole weight; or one
    /// mixture; repeatable
    #[arg(long, value_name = "DIR")]
    pub adapter: Vec<PathBuf>,
    /// Memory to stay within, such as 8GiB; never changes results
    #[arg(long, value_name = "SIZE", value_parser = crate::cli::bytes)]
    pub max_memory: Option<u64>,
    /// flex (CPU), wgpu, vulkan or cuda, as far as compiled in
    #[arg(long, default_value = "default")]
    pub device: String,
}

impl ModelArguments {
    /// The model, under its plans and with its adapters.
    ///
    /// # Errors
    /// Files that cannot be read or are for another model.
    pub fn open(&self) -> Result<Model> {
        open(&self.model, &self.plan, &self.adapter, &self.device, self.max_memory)
    }
}

/// Opens a model, with the condensers or compressed experts that stand beside its weights, under saved plans, with
/// adapters.
///
/// # Errors
/// Files that cannot be read or are for another model.
pub fn open(
    directory: &Path,
    plans: &[PathBuf],
    adapters: &[PathBuf],
    device: &str,
    max_memory: Option<u64>,
) -> Result<Model> {
    let device = moe_core::device::device(device)?;
    let mut checkpoint = Arc::new(Checkpoint::open(directory)?);
    for plan in plans {
        checkpoint = crate::apply::planned(&checkpoint, plan)?;
    }
    let model = Model::new(checkpoint, &device, max_memory)?;
    let beside = moe_peft::open(directory).ok().filter(|saved| {
        saved.kinds().iter().any(|kind| matches!(kind, SavedKind::CompressedExperts | SavedKind::Condensers))
    });
    match beside {
        None => model_with(model, adapters),
        Some(saved) if plans.is_empty() && adapters.is_empty() => Ok(saved.onto(&model)?.0),
        Some(saved) => {
            let kinds: Vec<String> = saved.kinds().iter().map(ToString::to_string).collect();
            let (directory, kinds) = (directory.display(), kinds.join(" and "));
            Err(Error::Usage(format!(
                "{directory}: has {kinds} beside its weights, which take neither --plan nor --adapter"
            )))
        }
    }
}

/// The model with what fine-tuning saved: any number of LoRAs, each with its whole weight, or one of another kind; the
/// model itself for none.
///
/// # Errors
/// Files that cannot be read or are for another model, several of which one is no LoRA.
pub fn model_with(model: Model, directories: &[PathBuf]) -> Result<Model> {
    let mut saved = Vec::with_capacity(directories.len());
    for directory in directories {
        saved.push(moe_peft::open(directory)?);
    }
    let lora = |saved: &moe_peft::SavedTuning| saved.kinds() == [SavedKind::Lora];
    match saved.as_slice() {
        [] => return Ok(model),
        [one] if !lora(one) => return Ok(one.onto(&model)?.0),
        several => {
            if let Some(other) = several.iter().position(|saved| !lora(saved)) {
                let path = directories[other].display();
                return Err(Error::Usage(format!("{path}: no LoRA, which alone can be added to others")));
            }
        }
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

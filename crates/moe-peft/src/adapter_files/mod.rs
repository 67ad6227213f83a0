//! Jobs over adapters as files and directories: merge them into a model, combine them, write them in another layout,
//! look at them.
//!
//! Each job is an options type with one method `run`, and a report that prints itself and goes into JSON. An adapter is
//! whatever fine-tuning saved: PEFT's files, fused or one expert at a time; a mixture of LoRA experts; compressed
//! experts and condensers beside a checkpoint; a delta file. Everything that can be wrong with a job is found before
//! anything is written.
//!
//! ```no_run
//! use moe_peft::adapter_files::{AdapterInput, CombineAdapters, MergeAdapters, inspect};
//! use moe_peft::merge::Combination;
//!
//! println!("{}", inspect("adapters/math".as_ref(), None)?);
//! let [math, code] = ["adapters/math", "adapters/code"].map(AdapterInput::new);
//! let both = vec![math.clone().weighted(0.7), code.weighted(0.3)];
//! CombineAdapters::new("models/OLMoE", both, Combination::Svd { rank: 16 }, "adapters/both").run()?;
//! println!("{}", MergeAdapters::new("models/OLMoE", vec![math], "models/OLMoE-math").run()?);
//! # Ok::<(), moe_peft::Error>(())
//! ```

mod combine;
mod convert;
mod inspect;
mod merge;

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use moe_checkpoint::human::{count, size};
use moe_checkpoint::{Existing, OutputDir};
use serde::Serialize;

pub use combine::CombineAdapters;
pub use convert::ConvertAdapter;
pub use inspect::{AdapterFacts, LoraFacts, ModuleFacts, inspect};
pub use merge::{MergeAdapters, MergedAdapters};

use crate::{
    AdapterSet, Error, Result, SavedKind,
    lora::{LoraWeights, Maps, Naming},
    mixture::{MeanWeights, Mixture},
    open,
    peft_files::{self, ReadOptions, WriteOptions},
};

/// An adapter on disk, and how much of it.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterInput {
    /// Its directory, or the file of a delta.
    pub path: PathBuf,
    /// What it is multiplied by.
    pub weight: f64,
    /// The adapter as it began, for one that took a part of the weights (PiSSA, OLoRA, CorDA): PEFT's
    /// `path_initial_model_for_weight_conversion`.
    pub initial: Option<PathBuf>,
    /// For a mixture, the weight of each of its experts in place of what its routers decide for every token. An
    /// approximation; without it, only mixtures that are matrices are taken.
    pub experts_at: Option<f64>,
}

impl AdapterInput {
    /// All of an adapter.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), weight: 1.0, initial: None, experts_at: None }
    }

    /// The same times a weight.
    #[must_use]
    pub fn weighted(self, weight: f64) -> Self {
        Self { weight, ..self }
    }

    /// The name it goes by in records.
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// As low-rank additions to the weights of a model.
    ///
    /// # Errors
    /// What keeps it from being read or from fitting the model; [`Error::Unsupported`] for what is no addition to
    /// weights, and for a mixture without [`experts_at`](Self::experts_at) that depends on its input.
    pub fn read(&self, maps: &Maps<'_>) -> Result<LoraWeights> {
        let kinds = open(&self.path)?.kinds().to_vec();
        let kind = kinds.first().copied().unwrap_or(SavedKind::Lora);
        if self.initial.is_some() && kind != SavedKind::Lora {
            let expected = "none: only a LoRA begins as a part of the weights";
            return Err(Error::input(format!("initial adapter of {}", self.name()), kind, expected));
        }
        if self.experts_at.is_some() && kind != SavedKind::Mixture {
            let expected = "none: only the experts of a mixture have one";
            return Err(Error::input(format!("weight of the experts of {}", self.name()), kind, expected));
        }
        match kind {
            SavedKind::Lora => match &self.initial {
                Some(initial) => peft_files::read_converted(&self.path, initial, maps),
                None => peft_files::read(&self.path, maps, ReadOptions::default()),
            },
            SavedKind::Mixture => {
                let mixture = Mixture::load(&self.path, &mut AdapterSet::new(), maps, &Device::default())?;
                match self.experts_at {
                    Some(weight) => mixture.approximate_merge(MeanWeights::Constant(weight)),
                    None => mixture.merge(),
                }
            }
            other => Err(Error::Unsupported(format!(
                "{}: {other} as additions to weights: they act on routing and on experts as a whole, and stay beside the checkpoint",
                self.name()
            ))),
        }
    }
}

/// How an adapter is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdapterLayout {
    /// Experts one by one or fused; if not given, fused where PEFT has a fused form for the adapter.
    pub naming: Option<Naming>,
    /// Put what additions count into `B`, so that one `lora_alpha` says it for all: what llama.cpp's converter reads.
    pub one_alpha: bool,
}

impl AdapterLayout {
    /// What PEFT's files are written with.
    fn options(&self, base: &Path, weights: &LoraWeights, maps: &Maps<'_>) -> WriteOptions {
        let options = WriteOptions {
            base_model: Some(base.display().to_string()),
            one_alpha: self.one_alpha,
            ..WriteOptions::default()
        };
        match self.naming {
            Some(naming) => WriteOptions { naming, ..options },
            None => options.fitting(weights, maps),
        }
    }
}

/// An adapter that was written.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WrittenAdapter {
    /// Its directory.
    pub path: PathBuf,
    /// Low-rank additions in it.
    pub additions: usize,
    /// Tensors in place of the base's, and rows of the embeddings.
    pub replaced: usize,
    /// Numbers in it, before additions are joined or filled up to a common rank.
    pub values: usize,
    /// `per_expert` or `fused`.
    pub layout: Naming,
    /// Bytes of its values on disk.
    pub bytes: u64,
}

impl std::fmt::Display for WrittenAdapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { path, additions, replaced, values, layout, bytes } = self;
        let layout = if *layout == Naming::Fused { "fused" } else { "one by one" };
        let (path, values, bytes) = (path.display(), count(*values as u64), size(*bytes));
        write!(f, "{path}: {additions} additions of {values} values, experts {layout}, {bytes}")?;
        if *replaced > 0 {
            write!(f, "; {replaced} tensors and rows in place of the base's")?;
        }
        writeln!(f)
    }
}

/// Writes an adapter to a directory that appears whole or not at all.
fn write_adapter(
    to: &Path,
    existing: Existing,
    weights: &LoraWeights,
    maps: &Maps<'_>,
    options: &WriteOptions,
) -> Result<WrittenAdapter> {
    peft_files::check(weights, maps, options)?;
    let output = OutputDir::create(to, existing)?;
    peft_files::write(output.path(), weights, maps, options)?;
    let path = output.commit()?;
    let file = path.join(peft_files::MODEL_FILE);
    let bytes = std::fs::metadata(&file).map_err(|source| Error::Io { path: file, source })?.len();
    Ok(WrittenAdapter {
        path,
        additions: weights.maps.len(),
        replaced: weights.whole.len() + weights.tokens.len(),
        values: weights.values(),
        layout: options.naming,
        bytes,
    })
}

/// Refuses a job without adapters.
fn some(adapters: &[AdapterInput]) -> Result<()> {
    match adapters.is_empty() {
        true => Err(Error::input("adapters", 0, "at least one")),
        false => Ok(()),
    }
}

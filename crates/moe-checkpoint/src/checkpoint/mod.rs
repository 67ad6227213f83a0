//! A model: a directory, or what a method makes of one; verified wholly, read lazily.

mod experts;
mod open;
mod quantized;
mod tensors;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde_json::Value;

use crate::config::{Ffn, ModelConfig};
use crate::experts::{ExpertBlock, ExpertLayout};
use crate::family::{Family, LayerRole};
use crate::formats::Packed;
use crate::record::Step;
use crate::shape::MoeShape;
use crate::source::ModelSource;
use crate::weights::TensorInfo;

/// A model, read-only, shareable between threads: a directory, or what a method makes of one ([`ModelSource`]).
///
/// Weights are memory-mapped (or made) and read when asked for. Reads that convert give the pages they touched back to
/// the system, so that resident memory stays that of the results; [`Checkpoint::bytes`] and
/// [`Checkpoint::expert_bytes`] return views and leave that to [`Checkpoint::release`].
///
/// The files must not be changed in place while they are open.
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    raw_config: Value,
    raw_generation: Option<Value>,
    family: &'static dyn Family,
    ragged: bool,
    shape: MoeShape,
    /// What the layers have besides routed experts.
    roles: HashSet<(usize, LayerRole)>,
    source: Arc<dyn ModelSource>,
    tensors: BTreeMap<String, TensorInfo>,
    layouts: BTreeMap<usize, ExpertLayout>,
    /// Tensors made of experts that the source makes.
    made: BTreeMap<String, MadeTensor>,
    unfit: Option<String>,
    /// Quantized weights, by the names they have without quantization.
    quantized: BTreeMap<String, Packed>,
    /// Stored tensors that a checkpoint without quantization does not have by that name.
    companions: BTreeSet<String>,
    steps: Vec<Step>,
    fingerprint: OnceLock<String>,
}

/// A tensor of experts that the source makes.
pub(crate) struct MadeTensor {
    pub layer: usize,
    /// Set of weights, content and first byte of every block, in file order.
    pub blocks: Vec<(usize, ExpertBlock, usize)>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = formatter.debug_struct("Checkpoint");
        debug.field("dir", &self.dir).field("model_type", &self.config.model_type).field("ragged", &self.ragged);
        debug.field("steps", &self.steps.len()).field("tensors", &self.tensors.len()).finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// The directory, as given to [`Checkpoint::open`]: of what a method makes, that of the model it started from,
    /// which has the tokenizer and the other files that are not weights.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The typed config.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// `config.json` as it is, unknown keys included.
    pub fn raw_config(&self) -> &Value {
        &self.raw_config
    }

    /// `generation_config.json` as it is, if there is one.
    pub fn raw_generation_config(&self) -> Option<&Value> {
        self.raw_generation.as_ref()
    }

    /// The family.
    pub fn family(&self) -> &'static dyn Family {
        self.family
    }

    /// The routed-expert shape.
    pub fn shape(&self) -> &MoeShape {
        &self.shape
    }

    /// Whether the experts are of different widths, in the format of `docs/ragged-format.md`.
    pub fn ragged(&self) -> bool {
        self.ragged
    }

    /// Why the model cannot run although its weights can be read, pruned and written: its attention is of a kind that
    /// the config does not describe, or does not fit the sizes that the config gives it.
    pub fn cannot_run(&self) -> Option<String> {
        self.unfit.clone()
    }

    /// Whether the model has no routed experts: what [`Checkpoint::open_dense`] opens, and what was made of it without
    /// adding any.
    pub fn is_dense(&self) -> bool {
        self.shape.layers.is_empty()
    }

    /// Whether experts share sets of weights, in the format of `docs/grouped-format.md`.
    pub fn grouped(&self) -> bool {
        self.config.layers.iter().any(|layer| matches!(&layer.ffn, Ffn::Moe(moe) if moe.sets.is_some()))
    }

    /// Identifies the model by content, as 64 hex digits: a BLAKE3 hash over `config.json`, names, dtypes and shapes of
    /// all tensors and samples of 4 KiB from the start, the middle and the end of each. It does not depend on how the
    /// weights are spread over files. Of what a method makes it is the digest of its last [step](Checkpoint::steps).
    /// Computed on the first call.
    pub fn fingerprint(&self) -> String {
        self.fingerprint.get_or_init(|| self.source.fingerprint(self)).clone()
    }

    /// Whether this is the model that a plan, scores or statistics name by `fingerprint`: by its own fingerprint or,
    /// for a directory that was written from what a method made, by the digest of the last step.
    pub fn is_model(&self, fingerprint: &str) -> bool {
        self.fingerprint() == fingerprint || self.steps.last().is_some_and(|step| step.digest == fingerprint)
    }

    /// What methods did to make this model of a released one, the first step first; those in the record of its
    /// directory included.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The model that a method made this one from; `None` for a directory.
    pub fn base(&self) -> Option<&Arc<Checkpoint>> {
        self.source.base()
    }

    pub(crate) fn infos(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    pub(crate) fn made(&self, name: &str) -> Option<&MadeTensor> {
        self.made.get(name)
    }
}

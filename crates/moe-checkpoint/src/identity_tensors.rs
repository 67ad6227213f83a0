//! Tensors of identity experts, which nothing reads, kept in step with what a method makes of the routed experts.
//!
//! transformers stores a gate and an up projection for every identity expert, numbered after the routed ones and as
//! wide as they are, and asks for them when it loads such a file. Where a method changes the number or the width of the
//! routed experts, these tensors follow: as many zeros, since nothing reads them.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::config::ModelConfig;
use crate::expert_bytes::RawMatrix;
use crate::experts::ExpertPart;
use crate::record::Step;
use crate::source::ModelSource;
use crate::verify::identity_tensors;
use crate::weights::TensorInfo;
use crate::{Checkpoint, Result, TensorSpec};

/// A source whose tensors of identity experts are zeros.
struct Adapted {
    source: Arc<dyn ModelSource>,
    zeros: BTreeSet<String>,
}

/// What becomes of the tensors of identity experts of a model that is made of `base`, layer by layer where anything
/// does: those of the base that go, and those that come.
fn changes<'a>(
    base: &'a Checkpoint,
    config: &'a ModelConfig,
) -> impl Iterator<Item = (Vec<String>, Vec<TensorSpec>)> + 'a {
    let stores = base.family().identity_expert_tensors();
    (0..base.config().layers.len()).filter(move |_| stores).filter_map(|layer| {
        let mut before = identity_tensors(base.family(), base.config(), layer);
        before.retain(|(name, _)| base.info(name).is_ok());
        let dtype = before.first().and_then(|(name, _)| Some(base.info(name).ok()?.dtype))?;
        let after = identity_tensors(base.family(), config, layer);
        (before != after).then(|| {
            let specs = after.into_iter().map(|(name, shape)| TensorSpec { name, dtype, shape });
            (before.into_iter().map(|(name, _)| name).collect(), specs.collect())
        })
    })
}

impl Checkpoint {
    /// The tensors of a model with this config that is made of this one, with the tensors of identity experts that go
    /// with it in place of those of this one, where this one has some. [`Checkpoint::from_source`] makes the same of
    /// any tensors; this says beforehand what they are.
    ///
    /// # Errors
    /// As [`ModelConfig::from_json`].
    pub fn following_identities(&self, config: &Value, tensors: Vec<TensorSpec>) -> Result<Vec<TensorSpec>> {
        if !self.family().identity_expert_tensors() {
            return Ok(tensors);
        }
        let config = ModelConfig::from_json(config, None)?;
        let (mut gone, mut come) = (BTreeSet::new(), Vec::new());
        for (before, after) in changes(self, &config) {
            gone.extend(before);
            come.extend(after);
        }
        Ok(tensors.into_iter().filter(|spec| !gone.contains(&spec.name)).chain(come).collect())
    }
}

/// The tensors of a made model with those of identity experts that its config calls for, if its base holds such, and
/// the source of them all.
pub(crate) fn adapted(
    mut tensors: BTreeMap<String, TensorInfo>,
    config: &ModelConfig,
    file: &Arc<Path>,
    source: Arc<dyn ModelSource>,
) -> Result<(BTreeMap<String, TensorInfo>, Arc<dyn ModelSource>)> {
    let mut zeros = BTreeSet::new();
    for (before, after) in source.base().into_iter().flat_map(|base| changes(base, config)) {
        before.iter().for_each(|name| drop(tensors.remove(name)));
        for spec in after {
            zeros.insert(spec.name.clone());
            tensors.insert(spec.name.clone(), TensorInfo::made(spec, file)?);
        }
    }
    let source = if zeros.is_empty() { source } else { Arc::new(Adapted { source, zeros }) };
    Ok((tensors, source))
}

impl ModelSource for Adapted {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        match self.zeros.contains(&tensor.name) {
            true => Ok(Cow::Owned(vec![0; range.len()])),
            false => self.source.bytes(tensor, range),
        }
    }

    fn grain(&self, tensor: &TensorInfo) -> usize {
        if self.zeros.contains(&tensor.name) { 1 } else { self.source.grain(tensor) }
    }

    fn makes_experts(&self, layer: usize) -> bool {
        self.source.makes_experts(layer)
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        self.source.expert_part(layer, set, part)
    }

    fn release(&self, tensor: &TensorInfo, range: Range<usize>) {
        if !self.zeros.contains(&tensor.name) {
            self.source.release(tensor, range);
        }
    }

    fn release_expert(&self, layer: usize, set: usize) {
        self.source.release_expert(layer, set);
    }

    fn release_all(&self) {
        self.source.release_all();
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        self.source.base()
    }

    fn step(&self) -> Option<Step> {
        self.source.step()
    }

    fn fingerprint(&self, model: &Checkpoint) -> String {
        self.source.fingerprint(model)
    }
}

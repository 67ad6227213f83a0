//! A merged model as a source of weights.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use moe_checkpoint::{
    Checkpoint, ExpertPart, LayerRole, ModelSource, RawMatrix, Result as CheckpointResult, Step, TensorInfo, sliced,
};

use super::made::MadeLayer;
use super::router_rows;
use super::target::TargetLayer;
use super::weights::MergedWeights;
use crate::combination::{Combination, GroupSink, LayerJob};
use crate::evidence::Evidence;
use crate::experts::LayerExperts;
use crate::plan::MergePlan;
use crate::router::RouterAddition;
use crate::{Error, Result};

/// The model that a plan makes of another.
pub(super) struct Merged {
    /// Not quantized.
    pub base: Arc<Checkpoint>,
    pub plan: MergePlan,
    pub evidence: Option<Arc<Evidence>>,
    /// Experts that were merged before, if so.
    pub weights: Option<MergedWeights>,
    /// Where merged experts wait.
    pub scratch: PathBuf,
    pub layers: BTreeMap<usize, MergedLayer>,
    /// Layer and role of tensors of routers that are mixed.
    pub routers: BTreeMap<String, (usize, LayerRole)>,
    pub step: Step,
}

/// A layer, and its merged experts from when they are asked for first.
pub(super) struct MergedLayer {
    pub target: TargetLayer,
    made: OnceLock<MadeLayer>,
    making: Mutex<()>,
}

impl From<TargetLayer> for MergedLayer {
    fn from(target: TargetLayer) -> Self {
        Self { target, made: OnceLock::new(), making: Mutex::new(()) }
    }
}

impl Merged {
    fn layer(&self, layer: usize) -> Result<&MergedLayer> {
        self.layers.get(&layer).ok_or_else(|| Error::invalid_plan(format!("no layer {layer}")))
    }

    /// The merged experts of a layer: made once, by whoever asks first, while others wait.
    fn made(&self, layer: usize) -> Result<&MadeLayer> {
        let found = self.layer(layer)?;
        if let Some(made) = found.made.get() {
            return Ok(made);
        }
        let _making = found.making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = found.made.get() {
            return Ok(made);
        }
        let made = match &self.weights {
            Some(weights) => weights.made(layer)?,
            None => apart(|| {
                let TargetLayer { dominants, group_widths, .. } = &found.target;
                let like = (dominants.as_slice(), group_widths.as_slice());
                MadeLayer::fill(&self.base, layer, like, &self.scratch, |sink| {
                    combine(&self.plan, &self.base, self.evidence.as_deref(), layer, sink)
                })
            })?,
        };
        Ok(found.made.get_or_init(|| made))
    }

    fn router(&self, layer: usize, role: LayerRole) -> Result<Vec<u8>> {
        let target = &self.layer(layer)?.target;
        let lacking = || Error::invalid_plan(format!("layer {layer}: {role} is mixed, and there is none"));
        let mut mix = target.mix.clone().ok_or_else(lacking)?;
        if self.plan.recipe.combination.adds_to_router() {
            mix.add(&self.made(layer)?.additions);
        }
        router_rows::mixed(&self.base, layer, role, &mix)?.map(|(bytes, _)| bytes).ok_or_else(lacking)
    }
}

/// Merges the experts of a layer as a plan says.
pub(super) fn combine(
    plan: &MergePlan,
    base: &Checkpoint,
    evidence: Option<&Evidence>,
    layer: usize,
    sink: GroupSink<'_>,
) -> Result<Vec<RouterAddition>> {
    let of_layer = plan.layer(layer).ok_or_else(|| Error::invalid_plan(format!("no layer {layer}")))?;
    let recipe = &plan.recipe;
    let experts = LayerExperts { checkpoint: base, layer };
    let job = LayerJob {
        plan: of_layer,
        experts: &experts,
        sample: evidence.and_then(|evidence| evidence.layer(layer)?.sample.as_ref()),
        activation: base.config().expert_activation(layer),
        alignment: &recipe.alignment,
        basis: &OnceLock::new(),
        reference: recipe.reference,
    };
    recipe.combination.combine(&job, sink)
}

/// Does some work on threads of its own. Whoever waits for it may be a thread of a pool, and would take up other work
/// of that pool while it waits: perhaps work that needs this very outcome.
fn apart<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(rayon::current_num_threads()).build();
    let pool = pool.map_err(|error| Error::numerics("threads to merge experts on", error))?;
    std::thread::scope(|scope| match scope.spawn(|| pool.install(work)).join() {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

impl ModelSource for Merged {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> CheckpointResult<Cow<'_, [u8]>> {
        match self.routers.get(&tensor.name) {
            None => self.base.tensor_bytes(&tensor.name, range),
            Some((layer, role)) => {
                let bytes = self.router(*layer, *role).map_err(moe_checkpoint::Error::method)?;
                Ok(sliced(Cow::Owned(bytes), range))
            }
        }
    }

    fn grain(&self, tensor: &TensorInfo) -> usize {
        match self.routers.contains_key(&tensor.name) {
            true => tensor.bytes as usize,
            false => self.base.grain(&tensor.name),
        }
    }

    fn makes_experts(&self, layer: usize) -> bool {
        self.layers.get(&layer).is_some_and(|layer| !layer.target.copied)
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> CheckpointResult<Option<RawMatrix<'_>>> {
        let found = || -> Result<_> {
            let target = &self.layer(layer)?.target;
            let group = target.groups.get(set).copied();
            let group = group.ok_or_else(|| Error::invalid_plan(format!("layer {layer}: no set {set}")))?;
            Ok((self.made(layer)?, group))
        };
        let (made, group) = found().map_err(moe_checkpoint::Error::method)?;
        match made.same_as(group) {
            Some(expert) => self.base.expert_part(layer, expert, part),
            None => made.part(group, part).map_err(moe_checkpoint::Error::method),
        }
    }

    fn release(&self, tensor: &TensorInfo, range: Range<usize>) {
        if !self.routers.contains_key(&tensor.name) {
            self.base.release_range(&tensor.name, range);
        }
    }

    fn release_expert(&self, layer: usize, set: usize) {
        let Some(found) = self.layers.get(&layer) else { return };
        let same = found.made.get().zip(found.target.groups.get(set)).and_then(|(made, group)| made.same_as(*group));
        if let Some(expert) = same {
            // It exists, or it would not have been read.
            let _ = self.base.release_expert(layer, expert);
        }
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.base)
    }

    fn step(&self) -> Option<Step> {
        Some(self.step.clone())
    }
}

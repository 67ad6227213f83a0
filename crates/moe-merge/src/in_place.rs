//! Models whose routed experts are changed where they are: as many, of the same shapes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use moe_checkpoint::{
    Checkpoint, Dtype, ExpertPart, LayerRole, ModelDescription, ModelSource, RawMatrix, Result as CheckpointResult,
    Role, Step, TensorInfo,
};
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::merged::encoded_part;

/// New values for the parts of stored sets of weights, which are the experts unless these share sets.
pub(crate) trait PartChange: Send + Sync + 'static {
    /// The values of a part that the set has; `None` if they stay.
    fn part(&self, base: &Checkpoint, layer: usize, set: usize, part: ExpertPart) -> Result<Option<Vec<f32>>>;

    /// All bytes of a tensor outside the routed experts, if they change.
    fn tensor(&self, _name: &str) -> Option<&[u8]> {
        None
    }
}

struct InPlace<C> {
    base: Arc<Checkpoint>,
    change: C,
    /// The dtype of all routed experts; each its own if not given.
    dtype: Option<Dtype>,
    step: Step,
}

/// The model that `change` makes of a base that is not quantized.
pub(crate) fn model(
    base: &Arc<Checkpoint>,
    change: impl PartChange,
    dtype: Option<Dtype>,
    step: Step,
) -> Result<Arc<Checkpoint>> {
    let mut description = ModelDescription::of(base);
    if let Some(dtype) = dtype {
        let mut experts = BTreeMap::new();
        for layer in &base.shape().layers {
            let Some(moe) = base.config().moe(layer.layer) else { continue };
            let layout = base.expert_layout(layer.layer)?;
            let tensors = layout.tensors(base.shape().hidden_size, &moe.stored_widths(), moe.biases);
            let names = tensors.into_iter().flatten().map(|t| (base.expert_tensor_name(layer.layer, t.tensor), dtype));
            experts.extend(names);
        }
        for spec in &mut description.tensors {
            spec.dtype = experts.get(&spec.name).copied().unwrap_or(spec.dtype);
        }
    }
    let source = InPlace { base: base.clone(), change, dtype, step };
    Ok(Arc::new(Checkpoint::from_source(description, Arc::new(source))?))
}

impl<C: PartChange> InPlace<C> {
    fn changed(&self, layer: usize, set: usize, part: ExpertPart, own: &RawMatrix<'_>) -> Result<Option<Vec<u8>>> {
        let dtype = self.dtype.unwrap_or(own.dtype);
        let values = match self.change.part(&self.base, layer, set, part)? {
            Some(values) => values,
            None if dtype == own.dtype => return Ok(None),
            None => own.to_f32(),
        };
        encoded_part((layer, set), part, dtype, &values).map(Some)
    }
}

impl<C: PartChange> ModelSource for InPlace<C> {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> CheckpointResult<Cow<'_, [u8]>> {
        match self.change.tensor(&tensor.name) {
            Some(bytes) => Ok(bytes[range].into()),
            None => self.base.tensor_bytes(&tensor.name, range),
        }
    }

    fn grain(&self, tensor: &TensorInfo) -> usize {
        self.base.grain(&tensor.name)
    }

    fn makes_experts(&self, _layer: usize) -> bool {
        true
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> CheckpointResult<Option<RawMatrix<'_>>> {
        let Some(own) = self.base.set_part(layer, set, part)? else { return Ok(None) };
        let changed = self.changed(layer, set, part, &own).map_err(moe_checkpoint::Error::method)?;
        Ok(Some(match changed {
            None => own,
            Some(bytes) => RawMatrix { bytes: bytes.into(), dtype: self.dtype.unwrap_or(own.dtype), ..own },
        }))
    }

    fn release(&self, tensor: &TensorInfo, range: Range<usize>) {
        self.base.release_range(&tensor.name, range);
    }

    fn release_expert(&self, layer: usize, set: usize) {
        self.base.release_set(layer, set);
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.base)
    }

    fn step(&self) -> Option<Step> {
        Some(self.step.clone())
    }
}

/// Tensors outside the routed experts, of one kind, that a merge of fine-tuned models leaves as the base has them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftAtBase {
    /// The kind, such as `attention`.
    pub kind: String,
    /// Tensors of this kind.
    pub tensors: usize,
    /// Those of them that differ from the base in one of the fine-tuned models: what it learnt there is lost.
    pub changed: usize,
}

/// Bytes that are compared at a time.
const COMPARED: usize = 4 << 20;

/// What of each kind stays that of the base, and how much of it the others have changed. Kinds in the order of the
/// model.
pub(crate) fn left_at_base(base: &Checkpoint, tuned: &[Arc<Checkpoint>]) -> Result<Vec<LeftAtBase>> {
    let kinds = Kinds::of(base);
    let mut left: BTreeMap<Kind, (usize, usize)> = BTreeMap::new();
    for info in base.tensors().filter(|info| !base.is_scale(&info.name)) {
        let Some(kind) = kinds.kind(base, &info.name) else { continue };
        let mut changed = false;
        for other in tuned {
            changed = changed || !same(base, other, &info.name)?;
        }
        let (tensors, differ) = left.entry(kind).or_default();
        *tensors += 1;
        *differ += usize::from(changed);
    }
    let report =
        |(kind, (tensors, changed)): (Kind, (usize, usize))| LeftAtBase { kind: kind.name(), tensors, changed };
    Ok(left.into_iter().map(report).collect())
}

/// Whether two models have the same values in a tensor.
fn same(base: &Checkpoint, other: &Checkpoint, name: &str) -> Result<bool> {
    let (own, theirs) = (base.info(name)?, other.info(name));
    if !theirs.is_ok_and(|theirs| theirs.shape == own.shape && theirs.dtype == own.dtype) {
        return Ok(false);
    }
    let end = own.bytes as usize;
    let step = (COMPARED / base.grain(name)).max(1) * base.grain(name);
    for start in (0..end).step_by(step) {
        let range = start..end.min(start + step);
        let equal = base.tensor_bytes(name, range.clone())? == other.tensor_bytes(name, range.clone())?;
        base.release_range(name, range.clone());
        other.release_range(name, range);
        if !equal {
            return Ok(false);
        }
    }
    Ok(true)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Embedding,
    Attention,
    Router,
    SharedExperts,
    DenseLayers,
    Norms,
    Head,
    FurtherTokens,
    Other,
}

impl Kind {
    fn name(self) -> String {
        match self {
            Self::Embedding => "embedding",
            Self::Attention => "attention",
            Self::Router => "router",
            Self::SharedExperts => "shared experts",
            Self::DenseLayers => "dense layers",
            Self::Norms => "norms",
            Self::Head => "output head",
            Self::FurtherTokens => "multi-token prediction",
            Self::Other => "others",
        }
        .to_string()
    }
}

/// The kinds of tensors by name; routed experts have none.
struct Kinds {
    roles: BTreeMap<String, Kind>,
    experts: std::collections::BTreeSet<String>,
}

impl Kinds {
    fn of(base: &Checkpoint) -> Self {
        use LayerRole as R;
        const LAYER: [(Kind, &[LayerRole]); 5] = [
            (
                Kind::Norms,
                &[
                    R::AttentionNorm,
                    R::AttentionNormBias,
                    R::AttentionOutputNorm,
                    R::FfnNorm,
                    R::FfnNormBias,
                    R::FfnOutputNorm,
                    R::SharedNorm,
                    R::SharedOutputNorm,
                    R::ExpertsOutputNorm,
                    R::LayerScale,
                    R::LayerInputOutputNorm,
                ],
            ),
            (
                Kind::Attention,
                &[
                    R::Qkv,
                    R::AttentionGate,
                    R::Query,
                    R::Key,
                    R::Value,
                    R::Output,
                    R::QueryBias,
                    R::KeyBias,
                    R::ValueBias,
                    R::OutputBias,
                    R::QueryNorm,
                    R::KeyNorm,
                    R::Sinks,
                    R::DeltaQkv,
                    R::DeltaGate,
                    R::DeltaBeta,
                    R::DeltaDecay,
                    R::DeltaQkvGate,
                    R::DeltaBetaDecay,
                    R::DeltaConvolution,
                    R::DeltaRate,
                    R::DeltaRateBias,
                    R::DeltaNorm,
                    R::DeltaOutput,
                    R::MambaInput,
                    R::MambaConvolution,
                    R::MambaConvolutionBias,
                    R::MambaRate,
                    R::MambaStepBias,
                    R::MambaSkip,
                    R::MambaNorm,
                    R::MambaOutput,
                    R::ConvolutionInput,
                    R::ConvolutionTaps,
                    R::ConvolutionOutput,
                    R::LatentQueryDown,
                    R::LatentQueryDownBias,
                    R::LatentQueryNorm,
                    R::LatentQueryUp,
                    R::LatentKvDown,
                    R::LatentKvDownBias,
                    R::LatentKvNorm,
                    R::LatentKvUp,
                    R::KeyValue,
                    R::OutputGroups,
                    R::OutputJoin,
                    R::CompressorKey,
                    R::CompressorGate,
                    R::CompressorBias,
                    R::CompressorNorm,
                ],
            ),
            (
                Kind::Router,
                &[R::Router, R::RouterBias, R::CorrectionBias, R::ExpertTable, R::RouterNorm, R::ExpertScale],
            ),
            (Kind::SharedExperts, &[R::SharedGateUp, R::SharedGate, R::SharedUp, R::SharedDown, R::SharedExpertGate]),
            (Kind::DenseLayers, &[R::DenseGate, R::DenseUp, R::DenseDown, R::LayerInputGate, R::LayerInputOutput]),
        ];
        let name = |role| base.family().tensor_name(role);
        let mut roles = BTreeMap::from([
            (name(Role::LmHead), Kind::Head),
            (name(Role::LmHeadBias), Kind::Head),
            (name(Role::FinalNorm), Kind::Norms),
            (name(Role::FinalNormBias), Kind::Norms),
            (name(Role::Embedding), Kind::Embedding),
            (name(Role::LayerInputEmbedding), Kind::Embedding),
            (name(Role::LayerInputProjection), Kind::DenseLayers),
            (name(Role::LayerInputNorm), Kind::Norms),
        ]);
        let mut experts = std::collections::BTreeSet::new();
        for layer in 0..base.config().layers.len() {
            for (kind, of) in LAYER {
                roles.extend(of.iter().map(|role| (name(Role::Layer(layer, *role)), kind)));
            }
            let Some(moe) = base.config().moe(layer) else { continue };
            let Ok(layout) = base.expert_layout(layer) else { continue };
            let tensors = layout.tensors(base.shape().hidden_size, &moe.stored_widths(), moe.biases);
            experts.extend(tensors.into_iter().flatten().map(|t| base.expert_tensor_name(layer, t.tensor)));
        }
        Self { roles, experts }
    }

    fn kind(&self, base: &Checkpoint, name: &str) -> Option<Kind> {
        if self.experts.contains(name) {
            return None;
        }
        Some(match self.roles.get(name) {
            Some(kind) => *kind,
            None if base.is_mtp(name) => Kind::FurtherTokens,
            None => Kind::Other,
        })
    }
}

//! The tensors of a merged model.

use std::collections::{BTreeMap, BTreeSet};

use moe_checkpoint::{Checkpoint, Dtype, LayerRole, Role, TensorSpec};

use super::router_rows;
use super::target::{Target, TargetLayer};
use crate::{Error, Result};

/// What a merged model is made of.
pub(crate) struct Tensors {
    pub specs: Vec<TensorSpec>,
    /// Layer and role of tensors of routers that are mixed.
    pub routers: BTreeMap<String, (usize, LayerRole)>,
    /// Bytes of the routed experts by decoder layer.
    pub expert_bytes: BTreeMap<usize, u64>,
}

impl Tensors {
    /// The tensors of `target`, made from those of `from`, which is not quantized.
    pub fn new(from: &Checkpoint, target: &Target, dropped: &BTreeSet<String>) -> Result<Self> {
        let (mut of_experts, mut routers, mut expert_bytes) = (BTreeSet::new(), BTreeMap::new(), BTreeMap::new());
        let mut specs = Vec::new();
        let mut rows = BTreeMap::new();
        for (old, new) in from.shape().layers.iter().zip(&target.layers) {
            let layout = from.expert_layout(new.layer)?;
            for tensor in layout.tensors(from.shape().hidden_size, &old.widths, new.biases).into_iter().flatten() {
                of_experts.insert(from.expert_tensor_name(new.layer, tensor.tensor));
            }
            let made = expert_tensors(from, target, new)?;
            expert_bytes.insert(new.layer, made.iter().map(bytes).sum());
            specs.extend(made);
            if let Some(mix) = &new.mix {
                let identities = from.config().moe(new.layer).map_or(0, |moe| moe.identities);
                rows.insert(new.layer, (old.num_experts() + identities, mix.rows.len() + identities));
                for role in router_rows::ROLES {
                    routers.insert(from.family().tensor_name(Role::Layer(new.layer, role)), (new.layer, role));
                }
            }
        }
        for info in from.tensors() {
            if dropped.contains(&info.name) || of_experts.contains(&info.name) {
                continue;
            }
            let mut spec = info.spec();
            if let Some((before, after)) = routers.get(&info.name).and_then(|(layer, _)| rows.get(layer)) {
                // One row per expert, or one row of all (`[1, E]`).
                if let Some(size) = spec.shape.iter_mut().find(|size| *size == before) {
                    *size = *after;
                }
            }
            specs.push(spec);
        }
        Ok(Self { specs, routers, expert_bytes })
    }
}

fn expert_tensors(from: &Checkpoint, target: &Target, layer: &TargetLayer) -> Result<Vec<TensorSpec>> {
    let refuse = |reason: String| Error::Output { form: target.form.name(), reason };
    let TargetLayer { layer: number, layout, biases, groups, dominants, .. } = layer;
    let widths = layer.widths();
    let tensors = layout
        .tensors(from.shape().hidden_size, &widths, *biases)
        .ok_or_else(|| refuse(format!("layer {number}: {layout} experts cannot have widths {widths:?}")))?;
    let mut out = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let name = from.expert_tensor_name(*number, tensor.tensor);
        let mut dtype: Option<Dtype> = None;
        for (written, block) in &tensor.blocks {
            let dominant = dominants[groups[*written]];
            for part in block.parts() {
                let found = from.expert_dtype(*number, dominant, *part)?;
                let found = found.ok_or_else(|| refuse(format!("tensor `{name}` would hold {part}, absent")))?;
                if let Some(other) = dtype.replace(found).filter(|other| *other != found) {
                    return Err(refuse(format!(
                        "tensor `{name}` would hold experts of dtypes {other} and {found}; they must agree"
                    )));
                }
            }
        }
        let dtype = dtype.ok_or_else(|| refuse(format!("tensor `{name}` would hold no expert")))?;
        out.push(TensorSpec { name, dtype, shape: tensor.shape });
    }
    Ok(out)
}

/// Bytes of a tensor, whose size is checked when the model is.
pub(crate) fn bytes(spec: &TensorSpec) -> u64 {
    spec.shape.iter().map(|size| *size as u64).product::<u64>() * spec.dtype.bitsize() as u64 / 8
}

//! The tensors of a pruned model, and what those are made of that are not copies.

use std::collections::{BTreeMap, BTreeSet};

use moe_checkpoint::{
    Checkpoint, Dtype, ExpertBiases, ExpertBlock, LayerRole, ModelConfig, Role, TensorInfo, TensorSpec,
};

use super::attention;
use super::target::{Target, TargetLayer};
use crate::{EditSource, Error, Result};

/// The tensors of a pruned model.
pub(super) struct Tensors {
    pub specs: Vec<TensorSpec>,
    /// Those that are neither copies nor made of the decoder's experts.
    pub made: BTreeMap<String, Made>,
    /// Bytes of the experts of every layer of the target.
    pub expert_bytes: Vec<u64>,
}

/// What a tensor is made of.
pub(super) enum Made {
    /// A row of the tensor of the same name, or of an edited router, for every expert of a layer of the target, by
    /// position.
    Rows(usize, LayerRole),
    /// The tensor of the same name with zeros after its rows (of shape before) or after its columns.
    Pad { rows: usize, cols: usize },
    /// These blocks along the first dimension of the tensor of the same name.
    Blocks(Vec<usize>),
    /// The table that a layer of the target routes by, by position, with so many experts per token.
    Table(usize, usize),
    /// Blocks of sets of weights of a layer of the target that is none of the decoder's, by position, in file order.
    /// All are of one size.
    Experts(usize, Vec<(usize, ExpertBlock)>),
}

/// All tensors of the target.
///
/// # Errors
/// [`Error::Export`] for experts that the layout has no place for.
pub(super) fn tensors(
    from: &Checkpoint,
    target: &Target,
    mode: &'static str,
    edits: Option<&dyn EditSource>,
) -> Result<Tensors> {
    let mut layer_of: BTreeSet<String> = BTreeSet::new();
    let mut rows_of: BTreeMap<String, (usize, LayerRole)> = BTreeMap::new();
    let mut tables: BTreeMap<String, usize> = BTreeMap::new();
    let mut pads: BTreeSet<String> = BTreeSet::new();
    let mut out = Tensors { specs: Vec::new(), made: BTreeMap::new(), expert_bytes: Vec::new() };
    for (position, layer) in target.layers.iter().enumerate() {
        let before = layer.tensors_before(from)?;
        layer_of.extend(before.iter().map(|tensor| layer.expert_tensor_name(from, tensor.tensor)));
        out.experts(from, layer, position, mode)?;
        let name = |role| layer.tensor_name(from, role);
        let moved = !layer.same_rows(layer.widths_before(from).len());
        let edited = edits.filter(|_| layer.further.is_none()).map(|edits| edits.router(layer.layer)).transpose()?;
        for (role, changed) in [
            (LayerRole::Router, edited.flatten().is_some()),
            (LayerRole::RouterBias, false),
            (LayerRole::CorrectionBias, layer.correction_factor != 1.0),
            (LayerRole::ExpertScale, false),
        ] {
            if moved || changed {
                rows_of.insert(name(role), (position, role));
            }
        }
        if moved && layer.further.is_none() && from.config().moe(layer.layer).is_some_and(|moe| moe.by_table) {
            tables.insert(name(LayerRole::ExpertTable), position);
        }
        if target.shared_width.is_some() {
            pads.extend([LayerRole::SharedGate, LayerRole::SharedUp, LayerRole::SharedDown].map(name));
        }
    }
    let mut blocks: BTreeMap<String, &Vec<usize>> = BTreeMap::new();
    for (layer, kept) in &target.attention {
        let name = |role| from.family().tensor_name(Role::Layer(*layer, role));
        blocks.extend(attention::STACKS.map(|role| (name(role), kept)));
    }
    let top_k = match tables.is_empty() {
        true => 0,
        false => ModelConfig::from_json(&target.config, None)?.routing.top_k,
    };
    for info in from.tensors() {
        if target.dropped.contains(&info.name) || layer_of.contains(&info.name) {
            continue;
        }
        let mut spec = info.spec();
        if let Some((position, role)) = rows_of.get(&info.name) {
            let layer = &target.layers[*position];
            let identities = layer.identities(from);
            let before = layer.widths_before(from).len() + identities;
            spec.shape = kept_shape(info, before, layer.rows.len() + identities);
            out.made.insert(info.name.clone(), Made::Rows(*position, *role));
        } else if let Some(position) = tables.get(&info.name) {
            spec.shape[1] = top_k;
            out.made.insert(info.name.clone(), Made::Table(*position, top_k));
        } else if let Some(kept) = blocks.get(&info.name) {
            spec.shape[0] = kept.len();
            out.made.insert(info.name.clone(), Made::Blocks(kept.to_vec()));
        } else if let (Some(width), [rows, cols]) =
            (target.shared_width.filter(|_| pads.contains(&info.name)), &info.shape[..])
        {
            let down = info.name.contains("down");
            let made = Made::Pad { rows: *rows, cols: *cols };
            spec.shape = if down { vec![*rows, width] } else { vec![width, *cols] };
            out.made.insert(info.name.clone(), made);
        }
        out.specs.push(spec);
    }
    Ok(out)
}

impl Tensors {
    /// The tensors of the experts of a layer.
    fn experts(&mut self, from: &Checkpoint, layer: &TargetLayer, position: usize, mode: &'static str) -> Result<()> {
        let refuse = |reason: String| Error::Export { mode, reason };
        let label = layer.label();
        let (layout, widths) = (layer.layout, layer.set_widths());
        let tensors = layout.tensors(from.shape().hidden_size, &widths, layer.biases);
        let tensors = tensors.ok_or_else(|| match layer.biases {
            ExpertBiases::Down => refuse(format!(
                "experts of {label} have a bias on their output, which `{}` has no place for: export as ragged",
                from.config().model_type
            )),
            _ => refuse(format!("{label}: {layout} experts cannot have widths {widths:?}")),
        })?;
        let mut sum = 0;
        for tensor in tensors {
            let name = layer.expert_tensor_name(from, tensor.tensor);
            let mut dtype: Option<Dtype> = None;
            for (set, block) in &tensor.blocks {
                for part in block.parts() {
                    let found = layer.dtype(from, &layer.sets[*set], *part)?;
                    let found = found
                        .ok_or_else(|| refuse(format!("tensor `{name}` would hold biases, but there are none")))?;
                    if let Some(other) = dtype.replace(found).filter(|other| *other != found) {
                        return Err(refuse(format!(
                            "tensor `{name}` would hold experts of dtypes {other} and {found}; they must agree"
                        )));
                    }
                }
            }
            let dtype = dtype.ok_or_else(|| refuse(format!("tensor `{name}` would hold no expert")))?;
            let spec = TensorSpec { name, dtype, shape: tensor.shape };
            sum += bytes(&spec);
            if layer.further.is_some() {
                self.made.insert(spec.name.clone(), Made::Experts(position, tensor.blocks));
            }
            self.specs.push(spec);
        }
        self.expert_bytes.push(sum);
        Ok(())
    }
}

/// The shape of a tensor with one row per expert (or one row of all, `[1, E]`) after the selection.
fn kept_shape(info: &TensorInfo, before: usize, after: usize) -> Vec<usize> {
    let mut shape = info.shape.clone();
    if let Some(size) = shape.iter_mut().find(|size| **size == before) {
        *size = after;
    }
    shape
}

/// Bytes of a tensor, whose size is checked when the model is made.
pub(super) fn bytes(spec: &TensorSpec) -> u64 {
    spec.shape.iter().map(|size| *size as u64).product::<u64>() * spec.dtype.bitsize() as u64 / 8
}

/// Elements of the tensors; a tied head counts once.
pub(super) fn parameters(from: &Checkpoint, specs: &[TensorSpec]) -> u64 {
    let tied_head = from.config().tie_word_embeddings.then(|| from.family().tensor_name(Role::LmHead));
    let counted = specs.iter().filter(|spec| Some(&spec.name) != tied_head.as_ref());
    counted.map(|spec| spec.shape.iter().map(|size| *size as u64).product::<u64>()).sum()
}

//! Exact changes of what writes to the residual stream, and of what reads it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use serde_json::json;

use crate::config::{Ffn, NormKind, NormPlacement};
use crate::convert::{decode_f32, encode};
use crate::expert_bytes::RawMatrix;
use crate::experts::{ExpertLayout, ExpertPart, ExpertTensor};
use crate::family::{LayerRole, Role};
use crate::source::{ModelDescription, ModelSource, sliced};
use crate::weights::TensorInfo;
use crate::{Checkpoint, Dtype, Error, Result, Step, TensorSpec};

/// Changes of a model that leave what it computes as it is, or that a training with them would have folded in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEdit {
    /// Takes the mean over the width out of everything that writes to the residual stream (arXiv 2305.14858): rows of
    /// the embedding, output projections with their biases, down projections of all experts. The stream then has mean
    /// zero everywhere, and a LayerNorm of it is an RMSNorm. Only a model with LayerNorms can be centered; changed
    /// tensors are F32, since rounding would bring a mean back.
    Center,
    /// Multiplies the norms before both halves of layer l, from 1, by `1 / sqrt(l)`: LayerNorm scaling (arXiv
    /// 2502.05795) of a model that was trained with it, as plain weights. A layer that moves keeps its own factor.
    ScaleNorms,
}

#[derive(Clone, Copy)]
enum Edit {
    /// Less the mean of each row.
    CenterRows,
    /// Less the mean over the rows, for each column.
    CenterColumns,
    /// Times a factor.
    Scale(f32),
}

struct Edited {
    base: Arc<Checkpoint>,
    edits: BTreeMap<String, Edit>,
    step: Step,
}

fn refuse(reason: impl Into<String>) -> Error {
    Error::method(std::io::Error::other(reason.into()))
}

impl StreamEdit {
    /// The model with the change.
    ///
    /// # Errors
    /// [`Error::Method`] for a model that cannot be changed like this, with the reason. Those of
    /// [`Checkpoint::from_source`].
    pub fn on(self, base: &Arc<Checkpoint>) -> Result<Arc<Checkpoint>> {
        if base.quantization().is_some() {
            return Err(refuse("changing the residual stream of a quantized model; dequantize it first"));
        }
        let (edits, name, summary) = match self {
            Self::Center => (centered(base)?, "center_stream", "the mean is taken out of the residual stream"),
            Self::ScaleNorms => (scaled(base)?, "scale_norms", "norms of layer l times 1 / sqrt(l)"),
        };
        let spec = |info: &TensorInfo| -> TensorSpec {
            let spec = info.spec();
            match edits.get(&info.name) {
                Some(Edit::CenterRows | Edit::CenterColumns) => TensorSpec { dtype: Dtype::F32, ..spec },
                _ => spec,
            }
        };
        let description =
            ModelDescription { tensors: base.tensors().map(spec).collect(), ..ModelDescription::of(base) };
        let step = Step::new(name, base, json!({}), summary);
        Checkpoint::from_source(description, Arc::new(Edited { base: base.clone(), edits, step })).map(Arc::new)
    }
}

/// What writes to the stream.
fn centered(base: &Arc<Checkpoint>) -> Result<BTreeMap<String, Edit>> {
    let config = base.config();
    if !matches!(config.norm, NormKind::Layer | NormKind::LayerUnbiased) {
        return Err(refuse(format!("`{}` has RMSNorms already, which a mean matters to", config.model_type)));
    }
    if config.tie_word_embeddings {
        return Err(refuse("the head is the embedding, and reads a stream that is not centered"));
    }
    if config.placement != NormPlacement::Before || config.normed_residual.is_some() {
        return Err(refuse("norms come after the halves of layers, and write means of their own"));
    }
    let mut edits = BTreeMap::new();
    let mut add = |role: Role, edit: Edit| -> Result<()> {
        edits.insert(base.role(role)?.name.clone(), edit);
        Ok(())
    };
    add(Role::Embedding, Edit::CenterRows)?;
    for (layer, of) in config.layers.iter().enumerate() {
        add(Role::Layer(layer, LayerRole::Output), Edit::CenterColumns)?;
        if config.attention_of(layer).output_bias {
            add(Role::Layer(layer, LayerRole::OutputBias), Edit::CenterRows)?;
        }
        match &of.ffn {
            Ffn::Dense { .. } => add(Role::Layer(layer, LayerRole::DenseDown), Edit::CenterColumns)?,
            Ffn::None => {}
            Ffn::Moe(moe) => {
                if moe.shared.is_some() {
                    add(Role::Layer(layer, LayerRole::SharedDown), Edit::CenterColumns)?;
                }
                if base.expert_layout(layer)? != ExpertLayout::PerExpert || moe.biases.has(ExpertPart::DownBias) {
                    return Err(refuse(format!("experts of layer {layer} that are fused, or have biases")));
                }
            }
        }
    }
    for (layer, of) in config.layers.iter().enumerate() {
        let Ffn::Moe(moe) = &of.ffn else { continue };
        for expert in 0..moe.num_experts() {
            let name = base.family().expert_tensor_name(layer, ExpertTensor::Down(expert));
            edits.insert(base.info(&name)?.name.clone(), Edit::CenterColumns);
        }
    }
    Ok(edits)
}

fn scaled(base: &Arc<Checkpoint>) -> Result<BTreeMap<String, Edit>> {
    let config = base.config();
    let carried = config.normed_residual.is_some();
    if config.placement != NormPlacement::Before || carried || config.norm == NormKind::RmsOnePlus {
        return Err(refuse("norms that are not the weights of what both halves of a layer read"));
    }
    let mut edits = BTreeMap::new();
    for layer in 0..config.layers.len() {
        let factor = ((layer + 1) as f32).sqrt().recip();
        for role in [LayerRole::AttentionNorm, LayerRole::FfnNorm] {
            edits.insert(base.role(Role::Layer(layer, role))?.name.clone(), Edit::Scale(factor));
        }
        if config.norm == NormKind::Layer {
            for role in [LayerRole::AttentionNormBias, LayerRole::FfnNormBias] {
                edits.insert(base.role(Role::Layer(layer, role))?.name.clone(), Edit::Scale(factor));
            }
        }
    }
    Ok(edits)
}

impl Edited {
    fn made(&self, tensor: &TensorInfo, edit: Edit) -> Result<Vec<u8>> {
        let stored = self.base.info(&tensor.name)?;
        let mut values = Vec::new();
        decode_f32(stored.dtype, &self.base.bytes(&tensor.name)?, &mut values);
        let columns = stored.shape.last().copied().unwrap_or(1).max(1);
        match edit {
            Edit::Scale(factor) => values.iter_mut().for_each(|v| *v *= factor),
            Edit::CenterRows => {
                for row in values.chunks_exact_mut(columns) {
                    let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / columns as f64;
                    row.iter_mut().for_each(|v| *v = (f64::from(*v) - mean) as f32);
                }
            }
            Edit::CenterColumns => {
                let rows = values.len() / columns;
                let mut means = vec![0.0f64; columns];
                for row in values.chunks_exact(columns) {
                    means.iter_mut().zip(row).for_each(|(sum, v)| *sum += f64::from(*v) / rows as f64);
                }
                for row in values.chunks_exact_mut(columns) {
                    row.iter_mut().zip(&means).for_each(|(v, mean)| *v = (f64::from(*v) - mean) as f32);
                }
            }
        }
        let mut bytes = Vec::new();
        match encode(tensor.dtype, &values, &mut bytes) {
            true => Ok(bytes),
            false => Err(refuse(format!("tensor `{}` in {:?}", tensor.name, tensor.dtype))),
        }
    }
}

impl ModelSource for Edited {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        match self.edits.get(&tensor.name) {
            Some(edit) => Ok(sliced(Cow::Owned(self.made(tensor, *edit)?), range)),
            None => self.base.tensor_bytes(&tensor.name, range),
        }
    }

    fn grain(&self, tensor: &TensorInfo) -> usize {
        match self.edits.contains_key(&tensor.name) {
            true => tensor.bytes as usize,
            false => self.base.grain(&tensor.name),
        }
    }

    fn makes_experts(&self, layer: usize) -> bool {
        self.base.makes_experts(layer)
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        self.base.set_part(layer, set, part)
    }

    fn release(&self, tensor: &TensorInfo, range: Range<usize>) {
        if !self.edits.contains_key(&tensor.name) {
            self.base.release_range(&tensor.name, range);
        }
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

//! Embeddings, norms and linear maps, read from the checkpoint.

use std::ops::Range;

use burn::tensor::Tensor;
use moe_checkpoint::human::variant;
use moe_checkpoint::{Dtype, LayerRole, NormKind, NormPlacement, Role};

use super::Model;
use crate::{
    adapters::LayerSite,
    error::{Error, Result},
    host,
    kernels::weight::{Bf16Source, Weight},
    layers::{HeadInput, Linear, Norm},
    precision::Precision,
};

impl Model {
    /// Embeddings of token ids `[T, H]`.
    ///
    /// # Errors
    /// [`Error::Input`] for an id past the vocabulary.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor<2>> {
        let (h, vocab) = (self.config().hidden_size, self.config().vocab_size);
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::input("token id", id, format!("below the vocabulary size {vocab}")));
        }
        if let Some(inputs) = self.config().layer_inputs {
            let rows = inputs.vocab_size;
            if let Some(id) = ids.iter().find(|&&id| id as usize >= rows) {
                let expected = format!("below `vocab_size_per_layer_input` = {rows}");
                return Err(Error::input("token id", id, expected));
            }
        }
        self.count().enter(ids.len());
        let mut values = Vec::with_capacity(ids.len() * h);
        let adapter = self.adapters.as_ref().and_then(|adapters| adapters.embedding());
        if !adapter.as_ref().is_some_and(|adapter| adapter.replaces()) {
            for &id in ids {
                values.extend(self.checkpoint.read_f32_rows(Role::Embedding, id as usize..id as usize + 1)?);
            }
        }
        if let Some(adapter) = adapter {
            values = adapter.rows(ids, &values);
        }
        let factor = self.config().multipliers.embedding as f32;
        if factor != 1.0 {
            values.iter_mut().for_each(|x| *x *= factor);
        }
        Ok(host::from_vec(values, [ids.len(), h], &self.device))
    }

    /// The norm before the head, and what it reads.
    pub(crate) fn final_norm(&self) -> Result<HeadInput> {
        if let Some(found) = &self.lock().final_norm {
            return Ok(found.clone());
        }
        let mut loaded = self.norm(Role::FinalNorm, Role::FinalNormBias)?;
        if let Some(eps) = self.config().final_norm_eps {
            loaded.eps = eps as f32;
        }
        let loaded = self.head_input(loaded)?;
        self.lock().final_norm = Some(loaded.clone());
        Ok(loaded)
    }

    /// Block `block` of the output head, from memory if it stays there.
    pub(super) fn cached_head_block(&self, block: usize, load: impl Fn(usize) -> Result<Linear>) -> Result<Linear> {
        if let Some(found) = &self.lock().head {
            return Ok(found[block].clone());
        }
        if self.lock().residency.head {
            let all = (0..self.head_blocks()).map(load).collect::<Result<Vec<_>>>()?;
            let found = all[block].clone();
            self.lock().head = Some(all);
            return Ok(found);
        }
        load(block)
    }

    /// Some rows of a matrix.
    pub(super) fn row_weight(&self, role: Role, rows: Range<usize>, shape: [usize; 2]) -> Result<Weight> {
        if let Some(weight) = self.bf16_weight(&[role], Some(rows.clone()), shape, self.precision)? {
            return Ok(weight);
        }
        Ok(Weight::dense(host::from_vec(self.checkpoint.read_f32_rows(role, rows)?, shape, &self.device)))
    }

    /// The rows of some tensors, one after the other, as one weight.
    pub(super) fn weight(&self, roles: &[Role], shape: [usize; 2], precision: Precision) -> Result<Weight> {
        if let Some(weight) = self.bf16_weight(roles, None, shape, precision)? {
            return Ok(weight);
        }
        let mut stacked = self.checkpoint.read_f32(roles[0])?;
        for role in &roles[1..] {
            stacked.extend(self.checkpoint.read_f32(*role)?);
        }
        Ok(Weight::dense(host::from_vec(stacked, shape, &self.device)))
    }

    /// The same straight from bf16 storage, where the device multiplies that best; `rows` of the first tensor only, if
    /// given.
    fn bf16_weight(
        &self,
        roles: &[Role],
        rows: Option<Range<usize>>,
        [outputs, inputs]: [usize; 2],
        precision: Precision,
    ) -> Result<Option<Weight>> {
        let names =
            roles.iter().map(|&role| Ok(self.checkpoint.role(role)?.name.clone())).collect::<Result<Vec<String>>>()?;
        // A quantized weight is read as BF16: it is multiplied as what it is folded or dequantized to.
        let mut stored_so = Weight::prefers_bf16(&self.device, precision);
        for name in &names {
            stored_so = stored_so && self.checkpoint.plain_dtype(name)? == Dtype::BF16;
        }
        if !stored_so {
            return Ok(None);
        }
        let checkpoint = self.checkpoint.clone();
        let source: Bf16Source = Box::new(move |f| {
            let read = |name: &String| {
                let bytes = match &rows {
                    Some(rows) => 2 * inputs * rows.start..2 * inputs * rows.end,
                    None => 0..2 * checkpoint.plain_info(name)?.elements() as usize,
                };
                checkpoint.plain_bytes(name, bytes)
            };
            let parts = names.iter().map(read).collect::<moe_checkpoint::Result<Vec<_>>>()?;
            f(&parts.iter().flat_map(|bytes| bytes.chunks_exact(2 * inputs)).collect::<Vec<_>>());
            names.iter().try_for_each(|name| checkpoint.release_tensor(name))?;
            Ok(())
        });
        Ok(Some(Weight::from_bf16([outputs, inputs], &self.device, precision, source, &self.failure)?))
    }

    pub(super) fn vector(&self, role: Role, len: usize) -> Result<Tensor<1>> {
        Ok(host::from_vec(self.checkpoint.read_f32(role)?, [len], &self.device))
    }

    pub(super) fn linear(
        &self,
        layer: usize,
        site: LayerSite,
        weight: Role,
        bias: Option<Role>,
        shape: [usize; 2],
    ) -> Result<Linear> {
        let bias_adapter = bias.and_then(|role| self.adapters()?.vector(role));
        let bias = bias.map(|role| self.vector(role, shape[0])).transpose()?;
        Ok(Linear { weight: self.site_weight(layer, site, &[weight], shape)?, bias, bias_adapter })
    }

    /// A norm of the residual stream.
    pub(super) fn norm(&self, weight: Role, bias: Role) -> Result<Norm> {
        let config = self.config();
        let bias_adapter = self.adapters().and_then(|adapters| adapters.vector(bias));
        let bias = match config.norm {
            NormKind::Rms | NormKind::RmsOnePlus => None,
            NormKind::Layer => Some(self.vector(bias, config.hidden_size)?),
            NormKind::LayerUnbiased => {
                let zeros = vec![0.0; config.hidden_size];
                Some(host::from_vec(zeros, [config.hidden_size], &self.device))
            }
            other => return Err(Error::Unsupported(format!("norm {}", variant(&other)))),
        };
        let centered = self.centered && bias.is_some();
        Ok(Norm { bias, bias_adapter, centered, ..self.rms_norm(weight, config.hidden_size, config.norm_eps)? })
    }

    pub(super) fn rms_norm(&self, weight: Role, len: usize, eps: f64) -> Result<Norm> {
        let weight_adapter = self.adapters().and_then(|adapters| adapters.vector(weight));
        let offset = if self.config().norm == NormKind::RmsOnePlus { 1.0 } else { 0.0 };
        Ok(Norm { weight_adapter, offset, ..Norm::new(self.vector(weight, len)?, None, eps as f32) })
    }

    /// A norm that has no weight.
    pub(super) fn unit_norm(&self, len: usize) -> Norm {
        Norm::new(host::from_vec(vec![1.0; len], [len], self.device()), None, self.config().norm_eps as f32)
    }

    /// The norms before and after a half of a layer, as far as it has them.
    pub(super) fn half_norms(
        &self,
        layer: usize,
        before: [LayerRole; 2],
        after: LayerRole,
    ) -> Result<[Option<Norm>; 2]> {
        let config = self.config();
        let role = |r| Role::Layer(layer, r);
        let (early, late) = match config.placement {
            NormPlacement::Before | NormPlacement::Parallel => (true, false),
            NormPlacement::After => (false, true),
            NormPlacement::Both => (true, true),
            other => return Err(Error::Unsupported(format!("norms {}", variant(&other)))),
        };
        let [weight, bias] = before;
        Ok([
            early.then(|| self.norm(role(weight), role(bias))).transpose()?,
            late.then(|| self.rms_norm(role(after), config.hidden_size, config.norm_eps)).transpose()?,
        ])
    }
}

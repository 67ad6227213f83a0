//! The maps of several residual streams, read from the checkpoint.

use std::sync::Arc;

use burn::tensor::Tensor;
use moe_checkpoint::{LayerRole, Role};

use super::Model;
use crate::{
    error::{Error, Result},
    host::{self, HostView},
    kernels::new_rows,
    layers::{HeadInput, HyperConnection, Norm, StreamSum},
    precision::Precision,
};

/// Map, bias and scales before the attention.
pub(super) const ATTENTION_STREAMS: [LayerRole; 3] =
    [LayerRole::AttentionStreams, LayerRole::AttentionStreamsBase, LayerRole::AttentionStreamsScale];
/// Those before the FFN.
pub(super) const FFN_STREAMS: [LayerRole; 3] =
    [LayerRole::FfnStreams, LayerRole::FfnStreamsBase, LayerRole::FfnStreamsScale];

impl Model {
    /// How a half of a layer reads and writes several streams; nothing where there is one.
    pub(super) fn hyper_connection(
        &self,
        layer: usize,
        [map, base, scale]: [LayerRole; 3],
    ) -> Result<Option<Arc<HyperConnection>>> {
        let Some(streams) = &self.config().streams else { return Ok(None) };
        let role = |r| Role::Layer(layer, r);
        let scales = self.checkpoint.read_f32(role(scale))?;
        let scale = scales.as_slice().try_into().map_err(|_| {
            Error::input(format!("scales of the streams of layer {layer}"), format!("{} numbers", scales.len()), 3)
        })?;
        let width = self.config().stream_width();
        Ok(Some(Arc::new(HyperConnection {
            norm: self.unit_norm(width),
            map: self.weight(&[role(map)], [streams.rows(), width], Precision::F32)?,
            base: self.checkpoint.read_f32(role(base))?.into(),
            scale,
            count: streams.count,
            iterations: streams.iterations,
            eps: streams.eps as f32,
        })))
    }

    /// What the head reads of the streams, with its norm.
    pub(super) fn head_input(&self, norm: Norm) -> Result<HeadInput> {
        let Some(streams) = &self.config().streams else { return Ok(HeadInput { norm, streams: None }) };
        let width = self.config().stream_width();
        let sum = StreamSum {
            norm: self.unit_norm(width),
            map: self.weight(&[Role::HeadStreams], [streams.count, width], Precision::F32)?,
            base: self.checkpoint.read_f32(Role::HeadStreamsBase)?.into(),
            scale: self.checkpoint.read_f32(Role::HeadStreamsScale)?.first().copied().unwrap_or(1.0),
            eps: streams.eps as f32,
        };
        Ok(HeadInput { norm, streams: Some(Box::new(sum)) })
    }

    /// Embeddings of token ids as the first layer reads them `[T, n H]`: in every stream alike.
    pub(crate) fn embedded_streams(&self, ids: &[u32]) -> Result<Tensor<2>> {
        let x = self.embed(ids)?;
        Ok(match &self.config().streams {
            Some(streams) => x.repeat(&[1, streams.count]),
            None => x,
        })
    }

    /// The gradient at the embeddings `[T, H]` from that at what the first layer reads.
    pub(crate) fn over_streams(&self, d: &Tensor<2>) -> Tensor<2> {
        let Some(streams) = &self.config().streams else { return d.clone() };
        let ([tokens, width], hidden) = (d.dims(), self.config().hidden_size);
        let view = HostView::new(d);
        let values = view.as_slice();
        let sums = new_rows(tokens, hidden, |t, sum| {
            let all = values[t * width..(t + 1) * width].chunks_exact(hidden).take(streams.count);
            all.for_each(|stream| sum.iter_mut().zip(stream).for_each(|(sum, x)| *sum += x));
        });
        host::from_vec(sums, [tokens, hidden], &d.device())
    }
}

//! Attention to compressed keys, read from the checkpoint.

use moe_checkpoint::{CompressedAttention, KeyCompression, LayerRole, Role};

use super::{Model, streams::ATTENTION_STREAMS};
use crate::{
    adapters::LayerSite,
    error::{Error, Result},
    kernels::{
        compressed::{CompressedShape, PoolShape},
        rope::RotaryEmbedding,
        weight::Weight,
    },
    layers::{CompressedLayer, Compressor, EntryIndexer, Linear, LowRankQuery, QueryProjection},
    precision::Precision,
};

impl Model {
    pub(super) fn compressed_attention(&self, layer: usize, a: &CompressedAttention) -> Result<CompressedLayer> {
        let config = self.config();
        let (h, d, rank) = (config.hidden_size, a.head_dim, a.query_rank);
        let role = |r| Role::Layer(layer, r);
        let linear = |site, r, shape| self.linear(layer, site, role(r), None, shape);
        let streams = self.hyper_connection(layer, ATTENTION_STREAMS)?.ok_or_else(|| {
            Error::Unsupported(format!("compressed attention in layer {layer} of a model with one residual stream"))
        })?;
        let (group, columns) = (a.output_rank, a.queries() / a.output_groups);
        let of_group = |i: usize| -> Result<Weight> {
            let rows = i * group..(i + 1) * group;
            self.row_weight(role(LayerRole::OutputGroups), rows, [group, columns])
        };
        let rate = a.compression.as_ref().map_or(0, |compression| compression.rate);
        Ok(CompressedLayer {
            streams,
            norm: self.norm(role(LayerRole::AttentionNorm), role(LayerRole::AttentionNormBias))?,
            query: QueryProjection::LowRank(Box::new(LowRankQuery {
                down: linear(LayerSite::LatentQueryDown, LayerRole::LatentQueryDown, [rank, h])?,
                norm: self.rms_norm(role(LayerRole::LatentQueryNorm), rank, config.norm_eps)?,
                up: self.site_weight(
                    layer,
                    LayerSite::LatentQueryUp,
                    &[role(LayerRole::LatentQueryUp)],
                    [a.queries(), rank],
                )?,
            })),
            query_norm: self.unit_norm(d),
            key: linear(LayerSite::KeyValue, LayerRole::KeyValue, [d, h])?,
            key_norm: self.rms_norm(role(LayerRole::KeyNorm), d, config.norm_eps)?,
            groups: (0..a.output_groups).map(of_group).collect::<Result<_>>()?,
            join: linear(LayerSite::OutputJoin, LayerRole::OutputJoin, [h, a.output_groups * group])?,
            shape: CompressedShape {
                heads: a.heads,
                head_dim: d,
                window: a.window,
                rate,
                sinks: self.checkpoint.read_f32(role(LayerRole::Sinks))?.into(),
            },
            rope: RotaryEmbedding::new(&a.rope, a.rotary_dim)?,
            compressor: match &a.compression {
                Some(compression) => Some(self.compressor(layer, compression, d)?),
                None => None,
            },
            indexer: match &a.compression {
                Some(compression) => self.entry_indexer(layer, compression, rank)?.map(Box::new),
                None => None,
            },
        })
    }

    fn compressor(&self, layer: usize, compression: &KeyCompression, width: usize) -> Result<Compressor> {
        let config = self.config();
        let columns = compression.series() * width;
        let role = |r| Role::Layer(layer, r);
        let linear = |site, r| self.linear(layer, site, role(r), None, [columns, config.hidden_size]);
        Ok(Compressor {
            key: linear(LayerSite::CompressorKey, LayerRole::CompressorKey)?,
            gate: linear(LayerSite::CompressorGate, LayerRole::CompressorGate)?,
            bias: self.checkpoint.read_f32(role(LayerRole::CompressorBias))?.into(),
            norm: self.rms_norm(role(LayerRole::CompressorNorm), width, config.norm_eps)?,
            shape: PoolShape { rate: compression.rate, width, overlapping: compression.series() == 2 },
        })
    }

    fn entry_indexer(&self, layer: usize, compression: &KeyCompression, rank: usize) -> Result<Option<EntryIndexer>> {
        let Some(indexer) = &compression.indexer else { return Ok(None) };
        let (h, rate, d) = (self.config().hidden_size, compression.rate, indexer.head_dim);
        let role = |r| Role::Layer(layer, r);
        // In f32 as routers are: keys that are close would change places by rounding alone.
        let weight = |r, shape| self.weight(&[role(r)], shape, Precision::F32);
        let linear = |r| Ok::<_, Error>(Linear::new(weight(r, [2 * d, h])?, None));
        Ok(Some(EntryIndexer {
            compressor: Compressor {
                key: linear(LayerRole::IndexerCompressorKey)?,
                gate: linear(LayerRole::IndexerCompressorGate)?,
                bias: self.checkpoint.read_f32(role(LayerRole::IndexerCompressorBias))?.into(),
                norm: self.rms_norm(role(LayerRole::IndexerCompressorNorm), d, self.config().norm_eps)?,
                shape: PoolShape { rate, width: d, overlapping: true },
            },
            query: weight(LayerRole::IndexerQuery, [indexer.heads * d, rank])?,
            heads: weight(LayerRole::IndexerHeads, [indexer.heads, h])?,
            shape: CompressedShape { heads: indexer.heads, head_dim: d, window: 0, rate, sinks: [].into() },
            keys: indexer.keys,
        }))
    }
}

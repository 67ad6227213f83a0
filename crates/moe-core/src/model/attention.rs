//! Softmax attention of a decoder layer, read from the checkpoint.

use moe_checkpoint::human::variant;
use moe_checkpoint::{AttentionConfig, AttentionKind, LatentAttention, LayerRole, OutputGate, QkNorm, Role};

use super::Model;
use crate::{
    adapters::LayerSite,
    error::{Error, Result},
    kernels::{attention::AttentionShape, indexer::IndexerShape, latent::LatentHeads},
    layers::{
        AttentionLayer, GroupedProjections, HeadGate, HeadNorms, IndexerLayer, KeyChoice, LatentProjections,
        LowRankQuery, Norm, Projections, QkvProjections, QueryOnly, QueryProjection,
    },
    precision::Precision,
};

impl Model {
    pub(super) fn attention(&self, layer: usize) -> Result<AttentionLayer> {
        let config = self.config();
        let a = config.attention_of(layer);
        let role = |r| Role::Layer(layer, r);
        let values = a.num_heads * a.value_head_dim();
        let sinks = match a.sinks {
            true => Some(self.checkpoint.read_f32(role(LayerRole::Sinks))?.into()),
            false => None,
        };
        let [norm, output_norm] = self.half_norms(
            layer,
            [LayerRole::AttentionNorm, LayerRole::AttentionNormBias],
            LayerRole::AttentionOutputNorm,
        )?;
        Ok(AttentionLayer {
            norm,
            output_norm,
            projections: match &a.kind {
                AttentionKind::Grouped if let Some(of) = config.layers[layer].keys_of => {
                    Projections::QueryOnly(Box::new(self.query_only(layer, of)?))
                }
                AttentionKind::Grouped => Projections::Grouped(Box::new(self.grouped(layer)?)),
                AttentionKind::Latent(latent) => Projections::Latent(Box::new(self.latent(layer, latent)?)),
                other => return Err(Error::Unsupported(format!("attention {}", variant(&other)))),
            },
            output: self.linear(
                layer,
                LayerSite::Output,
                role(LayerRole::Output),
                a.output_bias.then_some(role(LayerRole::OutputBias)),
                [config.hidden_size, values],
            )?,
            shape: AttentionShape {
                heads: a.num_heads,
                kv_heads: a.num_kv_heads,
                head_dim: a.head_dim,
                value_dim: a.value_head_dim(),
                scale: a.softmax_scale() as f32,
                window: config.layers[layer].sliding_window,
                chunk: config.layers[layer].chunk,
                sinks,
            },
            residual: config.mixer_factors(layer).0 as f32,
            carry: config.mixer_factors(layer).1.map(|carry| carry as f32),
            choice: self.key_choice(layer, a)?,
            lent_as: config.lends_keys(layer).then_some(layer),
        })
    }

    /// The queries of a layer that reads keys and values of layer `keys_of`.
    fn query_only(&self, layer: usize, keys_of: usize) -> Result<QueryOnly> {
        let (config, a) = (self.config(), self.config().attention_of(layer));
        let plain = a.gate == OutputGate::None && a.growth.is_none() && !a.packed && a.qkv_clip.is_none();
        if !plain || a.norm_after_rotation || a.selects.is_some() {
            let what =
                "attention to keys of a layer before with gates, clipping or growth, or that chooses them, in layer";
            return Err(Error::Unsupported(format!("{what} {layer}")));
        }
        let role = |r| Role::Layer(layer, r);
        let shape = [a.num_heads * a.head_dim, config.hidden_size];
        let bias = a.qkv_bias.then_some(role(LayerRole::QueryBias));
        Ok(QueryOnly {
            query: self.linear(layer, LayerSite::Query, role(LayerRole::Query), bias, shape)?,
            norm: match a.qk_norm {
                QkNorm::None => None,
                QkNorm::Head => Some(self.rms_norm(role(LayerRole::QueryNorm), a.head_dim, config.norm_eps)?),
                ref other => {
                    let what = format!("norm {} of queries for keys of a layer before", variant(other));
                    return Err(Error::Unsupported(what));
                }
            },
            rotary: config.layers[layer].rotary,
            keys_of,
        })
    }

    /// How the keys of a layer are chosen, where they are.
    fn key_choice(&self, layer: usize, a: &AttentionConfig) -> Result<Option<KeyChoice>> {
        let Some(selection) = &a.selects else { return Ok(None) };
        let by = selection.chosen_by.get(layer).copied().unwrap_or(layer);
        if by != layer {
            return Ok(Some(KeyChoice::Of { layer: by, keys: selection.keys }));
        }
        let rank = match &a.kind {
            AttentionKind::Latent(LatentAttention { q_lora_rank: Some(rank), .. }) => *rank,
            other => return Err(Error::Unsupported(format!("an indexer beside {}", variant(other)))),
        };
        let (h, heads, dim) = (self.config().hidden_size, selection.heads, selection.head_dim);
        // In f32 as routers are: keys that are close would change places by rounding alone.
        let weight = |role, shape| self.weight(&[Role::Layer(layer, role)], shape, Precision::F32);
        let vector = |role| self.vector(Role::Layer(layer, role), dim);
        let indexer = IndexerLayer {
            query: weight(LayerRole::IndexerQuery, [heads * dim, rank])?,
            key: weight(LayerRole::IndexerKey, [dim, h])?,
            // Whatever `rms_norm_eps` says.
            key_norm: Norm::new(vector(LayerRole::IndexerKeyNorm)?, Some(vector(LayerRole::IndexerKeyNormBias)?), 1e-6),
            heads: weight(LayerRole::IndexerHeads, [heads, h])?,
            shape: IndexerShape { heads, head_dim: dim, keys: selection.keys },
            interleaved: selection.interleaved,
        };
        let shared_as = selection.is_shared(layer).then_some(layer);
        Ok(Some(KeyChoice::Own { indexer: Box::new(indexer), shared_as }))
    }

    fn grouped(&self, layer: usize) -> Result<GroupedProjections> {
        let config = self.config();
        let a = config.attention_of(layer);
        let role = |r| Role::Layer(layer, r);
        let (h, q, kv) = (config.hidden_size, a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim);
        let rotary = config.layers[layer].rotary;
        let linear = |site, weight, bias, rows| {
            self.linear(layer, site, role(weight), a.qkv_bias.then_some(role(bias)), [rows, h])
        };
        let after_rotation = a.norm_after_rotation;
        let norms = |per_head, query, key| -> Result<Option<HeadNorms>> {
            let norm = |r, len| self.rms_norm(role(r), len, config.norm_eps);
            let (query, key) = (norm(LayerRole::QueryNorm, query)?, norm(LayerRole::KeyNorm, key)?);
            Ok(Some(HeadNorms { query, key, per_head, after_rotation }))
        };
        let query = || {
            let rows = if a.gate == OutputGate::Query { 2 * q } else { q };
            linear(LayerSite::Query, LayerRole::Query, LayerRole::QueryBias, rows)
        };
        let key = || linear(LayerSite::Key, LayerRole::Key, LayerRole::KeyBias, kv);
        let plain = |site, r, rows| self.linear(layer, site, role(r), None, [rows, h]);
        Ok(GroupedProjections {
            qkv: match (a.packed, a.tied_values) {
                (true, _) => QkvProjections::Packed(Box::new(plain(LayerSite::Qkv, LayerRole::Qkv, q + 2 * kv)?)),
                (false, true) => QkvProjections::Tied(Box::new([query()?, key()?])),
                (false, false) => {
                    let value = linear(LayerSite::Value, LayerRole::Value, LayerRole::ValueBias, kv)?;
                    QkvProjections::Separate(Box::new([query()?, key()?, value]))
                }
            },
            norms: match a.qk_norm {
                QkNorm::None => None,
                QkNorm::Head => norms(true, a.head_dim, a.head_dim)?,
                QkNorm::Projection => norms(false, q, kv)?,
                QkNorm::Unit => {
                    let norm = || self.unit_norm(a.head_dim);
                    rotary.then(|| HeadNorms { query: norm(), key: norm(), per_head: true, after_rotation })
                }
                other => return Err(Error::Unsupported(format!("norm of queries and keys {}", variant(&other)))),
            },
            value_norm: a.value_norm.then(|| self.unit_norm(a.head_dim)),
            clip: a.qkv_clip.map(|bound| bound as f32),
            rotary,
            grows: a.growth.is_some() && !rotary,
            gate: match a.gate {
                OutputGate::None => HeadGate::None,
                OutputGate::Query => HeadGate::Query,
                OutputGate::Projection => {
                    HeadGate::Projection(Box::new(plain(LayerSite::AttentionGate, LayerRole::AttentionGate, q)?))
                }
                OutputGate::Head => {
                    let gate = plain(LayerSite::AttentionGate, LayerRole::AttentionGate, a.num_heads)?;
                    HeadGate::Head(Box::new(gate))
                }
                other => return Err(Error::Unsupported(format!("gates on heads {}", variant(&other)))),
            },
        })
    }

    fn latent(&self, layer: usize, latent: &LatentAttention) -> Result<LatentProjections> {
        let config = self.config();
        let a = &config.attention;
        let role = |r| Role::Layer(layer, r);
        let (h, q, rank) = (config.hidden_size, a.num_heads * a.head_dim, latent.kv_lora_rank);
        let down = |site, weight, bias, rows| {
            self.linear(layer, site, role(weight), a.qkv_bias.then_some(role(bias)), [rows, h])
        };
        let weight = |site, weight, dims| self.site_weight(layer, site, &[role(weight)], dims);
        let heads = LatentHeads {
            heads: a.num_heads,
            nope: latent.qk_nope_head_dim,
            rope: latent.qk_rope_head_dim,
            value: latent.v_head_dim,
        };
        Ok(LatentProjections {
            query: match latent.q_lora_rank {
                None => QueryProjection::Full(weight(LayerSite::Query, LayerRole::Query, [q, h])?),
                Some(rank) => QueryProjection::LowRank(Box::new(LowRankQuery {
                    down: down(
                        LayerSite::LatentQueryDown,
                        LayerRole::LatentQueryDown,
                        LayerRole::LatentQueryDownBias,
                        rank,
                    )?,
                    norm: self.rms_norm(role(LayerRole::LatentQueryNorm), rank, latent.norm_eps)?,
                    up: weight(LayerSite::LatentQueryUp, LayerRole::LatentQueryUp, [q, rank])?,
                })),
            },
            rotary: config.layers[layer].rotary,
            gate: match a.gate {
                OutputGate::None => None,
                OutputGate::Head => {
                    let (site, gate) = (LayerSite::AttentionGate, role(LayerRole::AttentionGate));
                    Some(self.linear(layer, site, gate, None, [a.num_heads, h])?)
                }
                other => {
                    return Err(Error::Unsupported(format!("gates {} on heads of latent attention", variant(&other))));
                }
            },
            kv_down: down(
                LayerSite::LatentKvDown,
                LayerRole::LatentKvDown,
                LayerRole::LatentKvDownBias,
                rank + heads.rope,
            )?,
            kv_norm: self.rms_norm(role(LayerRole::LatentKvNorm), rank, latent.norm_eps)?,
            kv_scale: latent.kv_scale as f32,
            kv_up: weight(
                LayerSite::LatentKvUp,
                LayerRole::LatentKvUp,
                [heads.heads * (heads.nope + heads.value), rank],
            )?,
            heads,
        })
    }
}

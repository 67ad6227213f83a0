//! Weights of a decoder layer, read from the checkpoint.

use moe_checkpoint::{AttentionKind, Ffn, LatentAttention, LayerRole, NormKind, QkNorm, Role};

use super::Model;
use crate::{
    adapters::LayerSite,
    error::{Error, Result},
    experts::ExpertTensors,
    host,
    kernels::{attention::AttentionShape, latent::LatentHeads, weight::Weight},
    layers::{
        AttentionLayer, DenseBlock, FfnLayer, GroupedProjections, HeadNorms, LatentProjections, Linear, LowRankQuery,
        Norm, Projections, QueryProjection, RouterLayer,
    },
    overlay::RoutingOverlay,
};

impl Model {
    /// Attention of decoder layer `layer`.
    pub(crate) fn attention(&self, layer: usize) -> Result<AttentionLayer> {
        if let Some(found) = &self.lock().attention[layer] {
            return Ok(found.clone());
        }
        let config = self.config();
        let a = &config.attention;
        let role = |r| Role::Layer(layer, r);
        let values = a.num_heads * a.value_head_dim();
        let sinks = match a.sinks {
            true => Some(self.checkpoint.read_f32(role(LayerRole::Sinks))?.into()),
            false => None,
        };
        let loaded = AttentionLayer {
            norm: self.norm(role(LayerRole::AttentionNorm), role(LayerRole::AttentionNormBias))?,
            projections: match &a.kind {
                AttentionKind::Grouped => Projections::Grouped(Box::new(self.grouped(layer)?)),
                AttentionKind::Latent(latent) => Projections::Latent(Box::new(self.latent(layer, latent)?)),
                other => return Err(Error::Unsupported(format!("attention {other:?}"))),
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
                sinks,
            },
            residual: config.multipliers.residual as f32,
        };
        let mut cache = self.lock();
        if layer < cache.residency.layers {
            cache.attention[layer] = Some(loaded.clone());
        }
        Ok(loaded)
    }

    fn grouped(&self, layer: usize) -> Result<GroupedProjections> {
        let config = self.config();
        let a = &config.attention;
        let role = |r| Role::Layer(layer, r);
        let (h, q, kv) = (config.hidden_size, a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim);
        let linear = |site, weight, bias, rows| {
            self.linear(layer, site, role(weight), a.qkv_bias.then_some(role(bias)), [rows, h])
        };
        let norms = |per_head, query, key| -> Result<Option<HeadNorms>> {
            let norm = |r, len| self.rms_norm(role(r), len, config.norm_eps);
            let (query, key) = (norm(LayerRole::QueryNorm, query)?, norm(LayerRole::KeyNorm, key)?);
            Ok(Some(HeadNorms { query, key, per_head }))
        };
        Ok(GroupedProjections {
            qkv: [
                linear(LayerSite::Query, LayerRole::Query, LayerRole::QueryBias, q)?,
                linear(LayerSite::Key, LayerRole::Key, LayerRole::KeyBias, kv)?,
                linear(LayerSite::Value, LayerRole::Value, LayerRole::ValueBias, kv)?,
            ],
            norms: match a.qk_norm {
                QkNorm::None => None,
                QkNorm::Head => norms(true, a.head_dim, a.head_dim)?,
                QkNorm::Projection => norms(false, q, kv)?,
                other => return Err(Error::Unsupported(format!("norm of queries and keys {other:?}"))),
            },
            clip: a.qkv_clip.map(|bound| bound as f32),
            rotary: config.layers[layer].rotary,
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
            kv_down: down(
                LayerSite::LatentKvDown,
                LayerRole::LatentKvDown,
                LayerRole::LatentKvDownBias,
                rank + heads.rope,
            )?,
            kv_norm: self.rms_norm(role(LayerRole::LatentKvNorm), rank, latent.norm_eps)?,
            kv_up: weight(
                LayerSite::LatentKvUp,
                LayerRole::LatentKvUp,
                [heads.heads * (heads.nope + heads.value), rank],
            )?,
            heads,
        })
    }

    /// Norm, router, and dense or shared block of decoder layer `layer`.
    pub(crate) fn ffn(&self, layer: usize) -> Result<FfnLayer> {
        self.ffn_routed_by(layer, self.routing.as_deref())
    }

    /// The same with the router weights and biases of `overlay` instead of those of the model's own overlay.
    pub(crate) fn ffn_routed_by(&self, layer: usize, overlay: Option<&dyn RoutingOverlay>) -> Result<FfnLayer> {
        let mut ffn = self.stored_ffn(layer)?;
        // not cached: an overlay may change its weights between sweeps
        let (Some(router), Some(overlay)) = (&mut ffn.router, overlay) else { return Ok(ffn) };
        let [experts, hidden] = router.linear.weight.dims();
        let refuse = |what: &str, found: usize, expected: String| {
            Err(Error::input(format!("{what} of layer {layer}"), found, expected))
        };
        if let Some(weight) = overlay.router(layer) {
            if weight.len() != experts * hidden {
                return refuse("router weights", weight.len(), format!("{experts} by {hidden}"));
            }
            router.linear.weight = Weight::dense(host::from_vec(weight, [experts, hidden], &self.device));
        }
        if let Some(bias) = overlay.router_bias(layer) {
            if router.linear.bias.is_none() || bias.len() != experts {
                let expected = if router.linear.bias.is_none() {
                    "none: the model has no such bias".into()
                } else {
                    experts.to_string()
                };
                return refuse("router biases", bias.len(), expected);
            }
            router.linear.bias = Some(host::from_vec(bias, [experts], &self.device));
        }
        if let Some(bias) = overlay.selection_bias(layer) {
            if router.selection_bias.is_none() || bias.len() != experts {
                let expected = if router.selection_bias.is_none() {
                    "none: the model has no such bias".into()
                } else {
                    experts.to_string()
                };
                return refuse("selection biases", bias.len(), expected);
            }
            router.selection_bias = Some(bias.into());
        }
        Ok(ffn)
    }

    /// The same as the checkpoint has it.
    fn stored_ffn(&self, layer: usize) -> Result<FfnLayer> {
        if let Some(found) = &self.lock().ffn[layer] {
            return Ok(found.clone());
        }
        let config = self.config();
        let h = config.hidden_size;
        let role = |r| Role::Layer(layer, r);
        let block = |sites: [LayerSite; 2], gate, up, down, width: usize| -> Result<ExpertTensors> {
            Ok(ExpertTensors {
                gate_up: self.site_weight(layer, sites[0], &[role(gate), role(up)], [2 * width, h])?,
                gate_up_bias: None,
                down: self.site_weight(layer, sites[1], &[role(down)], [h, width])?,
                down_bias: None,
                activation: self.activation,
            })
        };
        let adapter = self.adapters().and_then(|adapters| adapters.block(layer));
        let (dense, router) = match &config.layers[layer].ffn {
            Ffn::Dense { intermediate_size } => {
                let sites = [LayerSite::DenseGateUp, LayerSite::DenseDown];
                let weights =
                    block(sites, LayerRole::DenseGate, LayerRole::DenseUp, LayerRole::DenseDown, *intermediate_size)?;
                (Some(DenseBlock { weights, gate: None, adapter }), None)
            }
            Ffn::Moe(moe) => {
                let shared = match &moe.shared {
                    Some(shared) => {
                        let width = shared.intermediate_size;
                        let sites = [LayerSite::SharedGateUp, LayerSite::SharedDown];
                        let (gate, up) = (LayerRole::SharedGate, LayerRole::SharedUp);
                        let weights = block(sites, gate, up, LayerRole::SharedDown, width)?;
                        let gate_role = [role(LayerRole::SharedExpertGate)];
                        let gate = match shared.gated {
                            true => Some(self.site_weight(layer, LayerSite::SharedExpertGate, &gate_role, [1, h])?),
                            false => None,
                        };
                        Some(DenseBlock { weights, gate, adapter })
                    }
                    None => None,
                };
                let bias = config.routing.bias.then_some(role(LayerRole::RouterBias));
                let shape = [moe.num_experts(), h];
                let linear = self.linear(layer, LayerSite::Router, role(LayerRole::Router), bias, shape)?;
                let selection_bias = match config.routing.correction_bias() {
                    true => Some(self.checkpoint.read_f32(role(LayerRole::CorrectionBias))?.into()),
                    false => None,
                };
                (shared, Some(RouterLayer { linear, selection_bias }))
            }
        };
        let norm = self.norm(role(LayerRole::FfnNorm), role(LayerRole::FfnNormBias))?;
        let loaded = FfnLayer { norm, dense, router, residual: config.multipliers.residual as f32 };
        let mut cache = self.lock();
        if layer < cache.residency.layers {
            cache.ffn[layer] = Some(loaded.clone());
        }
        Ok(loaded)
    }

    fn linear(
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
            NormKind::Rms => None,
            NormKind::Layer => Some(self.vector(bias, config.hidden_size)?),
            other => return Err(Error::Unsupported(format!("norm {other:?}"))),
        };
        Ok(Norm { bias, bias_adapter, ..self.rms_norm(weight, config.hidden_size, config.norm_eps)? })
    }

    fn rms_norm(&self, weight: Role, len: usize, eps: f64) -> Result<Norm> {
        let weight_adapter = self.adapters().and_then(|adapters| adapters.vector(weight));
        Ok(Norm { weight_adapter, ..Norm::new(self.vector(weight, len)?, None, eps as f32) })
    }
}

//! Weights of a decoder layer, read from the checkpoint.

use std::sync::Arc;

use moe_checkpoint::{
    AttentionKind, ChannelDelta, DeltaNet, Ffn, LatentAttention, LayerRole, Mamba, Mixer, NormKind, NormPlacement,
    OutputGate, QkNorm, Role,
};

use super::{Model, gated_activation};
use crate::{
    adapters::LayerSite,
    error::{Error, Result},
    experts::ExpertTensors,
    host,
    kernels::{
        attention::AttentionShape, channel_delta::ChannelDeltaShape, delta::DeltaShape, latent::LatentHeads,
        ssd::SsdShape, weight::Weight,
    },
    layers::{
        ApartNorms, AttentionLayer, ChannelDeltaLayer, ConvolutionLayer, DeltaLayer, DeltaProjections, DenseBlock,
        FfnLayer, GroupedProjections, HeadGate, HeadNorms, LatentMaps, LatentProjections, Linear, LowRankQuery,
        MambaLayer, MixerLayer, Norm, Projections, QkvProjections, QueryProjection, RouterLayer, WideProjection,
    },
    overlay::RoutingOverlay,
};

impl Model {
    /// What mixes tokens in decoder layer `layer`.
    pub(crate) fn mixer(&self, layer: usize) -> Result<MixerLayer> {
        if let Some(found) = &self.lock().mixers[layer] {
            return Ok(found.clone());
        }
        let loaded = match &self.config().layers[layer].mixer {
            Mixer::Attention => MixerLayer::Attention(Box::new(self.attention(layer)?)),
            Mixer::DeltaNet(delta) => MixerLayer::Delta(Box::new(self.delta(layer, delta)?)),
            Mixer::ChannelDelta(delta) => MixerLayer::ChannelDelta(Box::new(self.channel_delta(layer, delta)?)),
            Mixer::ShortConvolution { kernel } => {
                MixerLayer::Convolution(Box::new(self.short_convolution(layer, *kernel)?))
            }
            Mixer::Mamba(mamba) => MixerLayer::Mamba(Box::new(self.mamba(layer, mamba)?)),
            Mixer::None => MixerLayer::None,
            other => return Err(Error::Unsupported(format!("running {other:?}"))),
        };
        let mut cache = self.lock();
        if layer < cache.residency.layers {
            cache.mixers[layer] = Some(loaded.clone());
        }
        Ok(loaded)
    }

    fn delta(&self, layer: usize, delta: &DeltaNet) -> Result<DeltaLayer> {
        let config = self.config();
        let (h, heads, channels) = (config.hidden_size, delta.value_heads, delta.channels());
        let role = |r| Role::Layer(layer, r);
        let linear = |site, weight, shape| self.linear(layer, site, role(weight), None, shape);
        let values = |r| self.checkpoint.read_f32(role(r));
        let norm = role(LayerRole::DeltaNorm);
        let inputs = match delta.grouped {
            true => DeltaProjections::Grouped(Box::new([
                linear(LayerSite::DeltaQkvGate, LayerRole::DeltaQkvGate, [channels + delta.values(), h])?,
                linear(LayerSite::DeltaBetaDecay, LayerRole::DeltaBetaDecay, [2 * heads, h])?,
            ])),
            false => DeltaProjections::Separate(Box::new([
                linear(LayerSite::DeltaQkv, LayerRole::DeltaQkv, [channels, h])?,
                linear(LayerSite::DeltaGate, LayerRole::DeltaGate, [delta.values(), h])?,
                linear(LayerSite::DeltaBeta, LayerRole::DeltaBeta, [heads, h])?,
                linear(LayerSite::DeltaDecay, LayerRole::DeltaDecay, [heads, h])?,
            ])),
        };
        Ok(DeltaLayer {
            norm: self.norm(role(LayerRole::AttentionNorm), role(LayerRole::AttentionNormBias))?,
            inputs,
            taps: self.taps(role(LayerRole::DeltaConvolution), delta.kernel)?,
            rate: values(LayerRole::DeltaRate)?.into_iter().map(f32::exp).collect(),
            rate_bias: values(LayerRole::DeltaRateBias)?.into(),
            // As it is stored, whatever the norms of the residual stream are.
            output_norm: Norm {
                weight_adapter: self.adapters().and_then(|adapters| adapters.vector(norm)),
                ..Norm::new(self.vector(norm, delta.value_head_dim)?, None, config.norm_eps as f32)
            },
            output: linear(LayerSite::DeltaOutput, LayerRole::DeltaOutput, [h, delta.values()])?,
            shape: DeltaShape {
                key_heads: delta.key_heads,
                value_heads: heads,
                key_dim: delta.key_head_dim,
                value_dim: delta.value_head_dim,
            },
        })
    }

    fn channel_delta(&self, layer: usize, delta: &ChannelDelta) -> Result<ChannelDeltaLayer> {
        let config = self.config();
        let (h, width, heads) = (config.hidden_size, delta.width(), delta.heads);
        let role = |r| Role::Layer(layer, r);
        let linear = |site, weight, shape| self.linear(layer, site, role(weight), None, shape);
        let values = |r| self.checkpoint.read_f32(role(r));
        let wide = |full: (LayerSite, LayerRole), narrow: [(LayerSite, LayerRole); 2]| -> Result<WideProjection> {
            Ok(match delta.low_rank {
                false => WideProjection::Full(Box::new(linear(full.0, full.1, [width, h])?)),
                true => {
                    let [down, up] = narrow;
                    WideProjection::LowRank(Box::new([
                        linear(down.0, down.1, [delta.head_dim, h])?,
                        linear(up.0, up.1, [width, delta.head_dim])?,
                    ]))
                }
            })
        };
        let taps = [LayerRole::QueryConvolution, LayerRole::KeyConvolution, LayerRole::ValueConvolution]
            .map(|r| self.taps(role(r), delta.kernel));
        let [q, k, v] = taps;
        let (q, k, v) = (q?, k?, v?);
        let of_tap = |tap: usize| [&q, &k, &v].map(|taps| &taps[tap * width..(tap + 1) * width]).concat();
        let norm = role(LayerRole::DeltaNorm);
        Ok(ChannelDeltaLayer {
            norm: self.norm(role(LayerRole::AttentionNorm), role(LayerRole::AttentionNormBias))?,
            qkv: Box::new([
                linear(LayerSite::Query, LayerRole::Query, [width, h])?,
                linear(LayerSite::Key, LayerRole::Key, [width, h])?,
                linear(LayerSite::Value, LayerRole::Value, [width, h])?,
            ]),
            taps: (0..delta.kernel).flat_map(of_tap).collect(),
            decay: wide(
                (LayerSite::DeltaDecay, LayerRole::DeltaDecay),
                [
                    (LayerSite::DeltaDecayDown, LayerRole::DeltaDecayDown),
                    (LayerSite::DeltaDecayUp, LayerRole::DeltaDecayUp),
                ],
            )?,
            rate: values(LayerRole::DeltaRate)?.into_iter().map(f32::exp).collect(),
            rate_bias: values(LayerRole::DeltaRateBias)?.into(),
            lower_bound: delta.lower_bound.map(|bound| bound as f32),
            beta: linear(LayerSite::DeltaBeta, LayerRole::DeltaBeta, [heads, h])?,
            gate: wide(
                (LayerSite::AttentionGate, LayerRole::AttentionGate),
                [
                    (LayerSite::DeltaGateDown, LayerRole::DeltaGateDown),
                    (LayerSite::DeltaGateUp, LayerRole::DeltaGateUp),
                ],
            )?,
            output_norm: Norm {
                weight_adapter: self.adapters().and_then(|adapters| adapters.vector(norm)),
                ..Norm::new(self.vector(norm, delta.head_dim)?, None, config.norm_eps as f32)
            },
            output: linear(LayerSite::Output, LayerRole::Output, [h, width])?,
            shape: ChannelDeltaShape { heads, key_dim: delta.head_dim, value_dim: delta.head_dim },
        })
    }

    fn short_convolution(&self, layer: usize, kernel: usize) -> Result<ConvolutionLayer> {
        let h = self.config().hidden_size;
        let role = |r| Role::Layer(layer, r);
        let linear = |site, weight, shape| self.linear(layer, site, role(weight), None, shape);
        Ok(ConvolutionLayer {
            norm: self.norm(role(LayerRole::AttentionNorm), role(LayerRole::AttentionNormBias))?,
            input: linear(LayerSite::ConvolutionInput, LayerRole::ConvolutionInput, [3 * h, h])?,
            taps: self.taps(role(LayerRole::ConvolutionTaps), kernel)?,
            output: linear(LayerSite::ConvolutionOutput, LayerRole::ConvolutionOutput, [h, h])?,
        })
    }

    fn mamba(&self, layer: usize, mamba: &Mamba) -> Result<MambaLayer> {
        let config = self.config();
        let h = config.hidden_size;
        let role = |r| Role::Layer(layer, r);
        let linear = |site, weight, shape| self.linear(layer, site, role(weight), None, shape);
        let values = |r| self.checkpoint.read_f32(role(r));
        let columns = mamba.values() + mamba.channels() + mamba.heads;
        Ok(MambaLayer {
            norm: self.norm(role(LayerRole::AttentionNorm), role(LayerRole::AttentionNormBias))?,
            input: linear(LayerSite::MambaInput, LayerRole::MambaInput, [columns, h])?,
            taps: self.taps(role(LayerRole::MambaConvolution), mamba.kernel)?,
            convolution_bias: match mamba.convolution_bias {
                true => Some(values(LayerRole::MambaConvolutionBias)?.into()),
                false => None,
            },
            rates: values(LayerRole::MambaRate)?.into_iter().map(|rate| -rate.exp()).collect(),
            step_bias: values(LayerRole::MambaStepBias)?.into(),
            least_step: mamba.least_step as f32,
            skip: values(LayerRole::MambaSkip)?.into(),
            output_norm: values(LayerRole::MambaNorm)?.into(),
            eps: config.norm_eps as f32,
            output: linear(LayerSite::MambaOutput, LayerRole::MambaOutput, [h, mamba.values()])?,
            shape: SsdShape { heads: mamba.heads, head_dim: mamba.head_dim, groups: mamba.groups, state: mamba.state },
            residual: config.multipliers.residual as f32,
        })
    }

    /// The taps `[K, C]` of a convolution that is stored `[C, 1, K]`.
    fn taps(&self, role: Role, kernel: usize) -> Result<Arc<[f32]>> {
        let stored = self.checkpoint.read_f32(role)?;
        let of_tap = |tap: usize| stored.iter().skip(tap).step_by(kernel).copied();
        Ok((0..kernel).flat_map(of_tap).collect())
    }

    fn attention(&self, layer: usize) -> Result<AttentionLayer> {
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
                chunk: config.layers[layer].chunk,
                sinks,
            },
            residual: config.multipliers.residual as f32,
        })
    }

    /// The norms before and after a half of a layer, as far as it has them.
    fn half_norms(&self, layer: usize, before: [LayerRole; 2], after: LayerRole) -> Result<[Option<Norm>; 2]> {
        let config = self.config();
        let role = |r| Role::Layer(layer, r);
        let (early, late) = match config.placement {
            NormPlacement::Before | NormPlacement::Parallel => (true, false),
            NormPlacement::After => (false, true),
            NormPlacement::Both => (true, true),
            other => return Err(Error::Unsupported(format!("norms {other:?}"))),
        };
        let [weight, bias] = before;
        Ok([
            early.then(|| self.norm(role(weight), role(bias))).transpose()?,
            late.then(|| self.rms_norm(role(after), config.hidden_size, config.norm_eps)).transpose()?,
        ])
    }

    /// A norm that has no weight.
    fn unit_norm(&self, len: usize) -> Norm {
        Norm::new(host::from_vec(vec![1.0; len], [len], self.device()), None, self.config().norm_eps as f32)
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
                other => return Err(Error::Unsupported(format!("norm of queries and keys {other:?}"))),
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
                other => return Err(Error::Unsupported(format!("gates on heads {other:?}"))),
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
                other => return Err(Error::Unsupported(format!("gates {other:?} on heads of latent attention"))),
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
        let block = |sites: [LayerSite; 2], gateless: bool, width: usize, limit| -> Result<ExpertTensors> {
            // Without a gate the last of its tensors, up, is the gate, too.
            let [all, down] = sites.map(LayerSite::roles);
            let gate_up: Vec<Role> = all[if gateless { 1 } else { 0 }..].iter().map(|r| role(*r)).collect();
            let rows = if gateless { width } else { 2 * width };
            let weight = self.site_weight(layer, sites[0], &gate_up, [rows, h])?;
            Ok(ExpertTensors {
                gate_up: if gateless { weight.twice() } else { weight },
                gate_up_bias: None,
                down: self.site_weight(layer, sites[1], &[role(down[0])], [h, width])?,
                down_bias: None,
                activation: gated_activation(config.hidden_act.bounded(limit))?,
            })
        };
        let adapter = self.adapters().and_then(|adapters| adapters.block(layer));
        let (dense, router) = match &config.layers[layer].ffn {
            Ffn::None => (None, None),
            Ffn::Dense { intermediate_size, gateless } => {
                let sites = [LayerSite::DenseGateUp, LayerSite::DenseDown];
                let weights = block(sites, *gateless, *intermediate_size, None)?;
                (Some(DenseBlock { weights, gate: None, adapter }), None)
            }
            Ffn::Moe(moe) => {
                let shared = match &moe.shared {
                    Some(shared) => {
                        let width = shared.intermediate_size;
                        let site = if shared.packed { LayerSite::SharedPacked } else { LayerSite::SharedGateUp };
                        let sites = [site, LayerSite::SharedDown];
                        let weights = block(sites, shared.gateless, width, shared.limit)?;
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
                let norm = match config.routing.own_norm {
                    true => {
                        let stored = self.checkpoint.read_f32(role(LayerRole::RouterNorm))?;
                        let factor = (h as f32).powf(-0.5);
                        let weight = stored.into_iter().map(|scale| scale * factor).collect();
                        Some(Norm::new(host::from_vec(weight, [h], self.device()), None, config.norm_eps as f32))
                    }
                    false => None,
                };
                let scales = match config.routing.expert_scales {
                    true => Some(self.checkpoint.read_f32(role(LayerRole::ExpertScale))?.into()),
                    false => None,
                };
                (shared, Some(RouterLayer { linear, norm, selection_bias, scales }))
            }
        };
        let [norm, output_norm] = match &config.layers[layer].ffn {
            Ffn::None => [None, None],
            _ => {
                let before = match config.is_parallel() {
                    true => [LayerRole::AttentionNorm, LayerRole::AttentionNormBias],
                    false => [LayerRole::FfnNorm, LayerRole::FfnNormBias],
                };
                self.half_norms(layer, before, LayerRole::FfnOutputNorm)?
            }
        };
        let apart = match config.moe(layer).and_then(|moe| moe.shared.as_ref()).is_some_and(|shared| shared.apart) {
            true => {
                let norm = |r| self.rms_norm(role(r), h, config.norm_eps);
                Some(Box::new(ApartNorms {
                    dense_input: norm(LayerRole::SharedNorm)?,
                    dense_output: norm(LayerRole::SharedOutputNorm)?,
                    experts_output: norm(LayerRole::ExpertsOutputNorm)?,
                }))
            }
            false => None,
        };
        let latent = match config.expert_latent.filter(|_| router.is_some()) {
            Some(width) => Some(Box::new(LatentMaps {
                down: self.site_weight(
                    layer,
                    LayerSite::ExpertLatentDown,
                    &[role(LayerRole::ExpertLatentDown)],
                    [width, h],
                )?,
                up: self.site_weight(
                    layer,
                    LayerSite::ExpertLatentUp,
                    &[role(LayerRole::ExpertLatentUp)],
                    [h, width],
                )?,
            })),
            None => None,
        };
        let scale = match config.layer_scale {
            true => self.checkpoint.read_f32(role(LayerRole::LayerScale))?.first().copied().unwrap_or(1.0),
            false => 1.0,
        };
        let residual = config.ffn_factor(layer) as f32;
        let loaded = FfnLayer { norm, output_norm, apart, latent, dense, router, residual, scale };
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
            NormKind::Rms | NormKind::RmsOnePlus => None,
            NormKind::Layer => Some(self.vector(bias, config.hidden_size)?),
            NormKind::LayerUnbiased => {
                let zeros = vec![0.0; config.hidden_size];
                Some(host::from_vec(zeros, [config.hidden_size], &self.device))
            }
            other => return Err(Error::Unsupported(format!("norm {other:?}"))),
        };
        let centered = self.centered && bias.is_some();
        Ok(Norm { bias, bias_adapter, centered, ..self.rms_norm(weight, config.hidden_size, config.norm_eps)? })
    }

    fn rms_norm(&self, weight: Role, len: usize, eps: f64) -> Result<Norm> {
        let weight_adapter = self.adapters().and_then(|adapters| adapters.vector(weight));
        let offset = if self.config().norm == NormKind::RmsOnePlus { 1.0 } else { 0.0 };
        Ok(Norm { weight_adapter, offset, ..Norm::new(self.vector(weight, len)?, None, eps as f32) })
    }
}

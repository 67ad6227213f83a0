//! What mixes tokens in a decoder layer, read from the checkpoint.

use std::sync::Arc;

use moe_checkpoint::human::variant;
use moe_checkpoint::{
    ChannelDelta, DeltaNet, HeadMixture, LayerRole, LightningAttention, Mamba, Mixer, Role, Routing, RoutingKind,
};

use super::Model;
use crate::{
    adapters::LayerSite,
    error::{Error, Result},
    host,
    kernels::{
        attention::AttentionShape,
        delta::{DecayPer, DeltaShape},
        ssd::SsdShape,
        weight::Weight,
    },
    layers::{
        ApartProjections, ConvolutionLayer, DeltaLayer, DeltaProjections, GateActivation, HeadMixtureLayer,
        LightningLayer, MambaLayer, MixerLayer, Norm, WideProjection,
    },
    precision::Precision,
    router::Router,
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
            Mixer::ChannelDelta(delta) => MixerLayer::Delta(Box::new(self.channel_delta(layer, delta)?)),
            Mixer::ShortConvolution { kernel } => {
                MixerLayer::Convolution(Box::new(self.short_convolution(layer, *kernel)?))
            }
            Mixer::Mamba(mamba) => MixerLayer::Mamba(Box::new(self.mamba(layer, mamba)?)),
            Mixer::Lightning(lightning) => MixerLayer::Lightning(Box::new(self.lightning(layer, lightning)?)),
            Mixer::HeadMixture(mixture) => MixerLayer::HeadMixture(Box::new(self.head_mixture(layer, mixture)?)),
            Mixer::Compressed(compressed) => {
                MixerLayer::Compressed(Box::new(self.compressed_attention(layer, compressed)?))
            }
            Mixer::None => MixerLayer::None,
            other => return Err(Error::Unsupported(format!("running {}", variant(&other)))),
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
            lower_bound: None,
            gate: GateActivation::Silu,
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
                decay: DecayPer::Head,
            },
        })
    }

    fn channel_delta(&self, layer: usize, delta: &ChannelDelta) -> Result<DeltaLayer> {
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
        let qkv = [
            linear(LayerSite::Query, LayerRole::Query, [width, h])?,
            linear(LayerSite::Key, LayerRole::Key, [width, h])?,
            linear(LayerSite::Value, LayerRole::Value, [width, h])?,
        ];
        let decay = wide(
            (LayerSite::DeltaDecay, LayerRole::DeltaDecay),
            [
                (LayerSite::DeltaDecayDown, LayerRole::DeltaDecayDown),
                (LayerSite::DeltaDecayUp, LayerRole::DeltaDecayUp),
            ],
        )?;
        let gate = wide(
            (LayerSite::AttentionGate, LayerRole::AttentionGate),
            [(LayerSite::DeltaGateDown, LayerRole::DeltaGateDown), (LayerSite::DeltaGateUp, LayerRole::DeltaGateUp)],
        )?;
        let beta = linear(LayerSite::DeltaBeta, LayerRole::DeltaBeta, [heads, h])?;
        Ok(DeltaLayer {
            norm: self.norm(role(LayerRole::AttentionNorm), role(LayerRole::AttentionNormBias))?,
            inputs: DeltaProjections::Apart(Box::new(ApartProjections { qkv, gate, beta, decay })),
            taps: (0..delta.kernel).flat_map(of_tap).collect(),
            rate: values(LayerRole::DeltaRate)?.into_iter().map(f32::exp).collect(),
            rate_bias: values(LayerRole::DeltaRateBias)?.into(),
            lower_bound: delta.lower_bound.map(|bound| bound as f32),
            gate: GateActivation::Sigmoid,
            output_norm: Norm {
                weight_adapter: self.adapters().and_then(|adapters| adapters.vector(norm)),
                ..Norm::new(self.vector(norm, delta.head_dim)?, None, config.norm_eps as f32)
            },
            output: linear(LayerSite::Output, LayerRole::Output, [h, width])?,
            shape: DeltaShape {
                key_heads: heads,
                value_heads: heads,
                key_dim: delta.head_dim,
                value_dim: delta.head_dim,
                decay: DecayPer::Channel,
            },
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

    fn lightning(&self, layer: usize, lightning: &LightningAttention) -> Result<LightningLayer> {
        let config = self.config();
        let (h, width) = (config.hidden_size, lightning.width());
        let role = |r| Role::Layer(layer, r);
        let linear = |site, weight, shape| self.linear(layer, site, role(weight), None, shape);
        let stored = role(LayerRole::LightningRate);
        let rates: Vec<f32> = match self.checkpoint.role(stored).is_ok() {
            true => self.checkpoint.read_f32(stored)?,
            false => lightning.rates().into_iter().map(|rate| rate as f32).collect(),
        };
        if rates.len() != lightning.heads {
            let expected = format!("{}, one for each head", lightning.heads);
            return Err(Error::input(format!("rates of lightning attention of layer {layer}"), rates.len(), expected));
        }
        let norm = role(LayerRole::LightningNorm);
        let (residual, carry) = config.mixer_factors(layer);
        Ok(LightningLayer {
            norm: self.norm(role(LayerRole::AttentionNorm), role(LayerRole::AttentionNormBias))?,
            qkv: linear(LayerSite::LightningQkv, LayerRole::LightningQkv, [3 * width, h])?,
            gate: linear(LayerSite::LightningGate, LayerRole::LightningGate, [width, h])?,
            // Whatever `rms_norm_eps` says.
            output_norm: self.rms_norm(norm, width, 1e-6)?,
            output: linear(LayerSite::LightningOutput, LayerRole::LightningOutput, [h, width])?,
            rates: rates.into_iter().map(|rate| -rate).collect(),
            head_dim: lightning.head_dim,
            residual: residual as f32,
            carry: carry.map(|carry| carry as f32),
        })
    }

    fn head_mixture(&self, layer: usize, mixture: &HeadMixture) -> Result<HeadMixtureLayer> {
        let (h, width) = (self.config().hidden_size, mixture.width());
        let role = |r| Role::Layer(layer, r);
        // Matrices of a stack, one by one.
        let stack = |r, [rows, columns]: [usize; 2]| -> Result<Vec<Weight>> {
            let matrix = |expert: usize| {
                let values = self.checkpoint.read_f32_rows(role(r), expert..expert + 1)?;
                Ok(Weight::dense(host::from_vec(values, [rows, columns], self.device())))
            };
            (0..mixture.experts).map(matrix).collect()
        };
        let rule = Routing::new(mixture.top_k, RoutingKind::TopKSoftmax);
        Ok(HeadMixtureLayer {
            norm: self.norm(role(LayerRole::AttentionNorm), role(LayerRole::AttentionNormBias))?,
            router: self.weight(&[role(LayerRole::HeadRouter)], [mixture.experts, h], Precision::F32)?,
            rule: Router::new(&rule)?,
            queries: stack(LayerRole::HeadQueries, [width, h])?,
            outputs: stack(LayerRole::HeadOutputs, [h, width])?,
            key_value: self.linear(
                layer,
                LayerSite::HeadKeyValue,
                role(LayerRole::HeadKeyValue),
                None,
                [2 * width, h],
            )?,
            bias: self.vector(role(LayerRole::HeadBias), h)?,
            shape: AttentionShape {
                heads: mixture.top_k * mixture.kv_heads,
                kv_heads: mixture.kv_heads,
                head_dim: mixture.head_dim,
                value_dim: mixture.head_dim,
                scale: (mixture.head_dim as f32).powf(-0.5),
                window: None,
                chunk: None,
                sinks: None,
            },
        })
    }

    /// The taps `[K, C]` of a convolution that is stored `[C, 1, K]`.
    fn taps(&self, role: Role, kernel: usize) -> Result<Arc<[f32]>> {
        let stored = self.checkpoint.read_f32(role)?;
        let of_tap = |tap: usize| stored.iter().skip(tap).step_by(kernel).copied();
        Ok((0..kernel).flat_map(of_tap).collect())
    }
}

//! The feed-forward half of a decoder layer, read from the checkpoint.

use std::sync::Arc;

use moe_checkpoint::{Ffn, LayerRole, Role};

use super::{Model, gated_activation, streams::FFN_STREAMS};
use crate::{
    adapters::LayerSite,
    error::{Error, Result},
    experts::ExpertTensors,
    host,
    kernels::weight::Weight,
    layers::{ApartNorms, DenseBlock, FfnLayer, LatentMaps, Norm, RouterLayer},
    overlay::RoutingOverlay,
};

impl Model {
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

    /// Factor on the output of a layer.
    pub(super) fn layer_scale(&self, layer: usize) -> Result<f32> {
        if !self.config().layer_scale {
            return Ok(1.0);
        }
        let scale = self.checkpoint.read_f32(Role::Layer(layer, LayerRole::LayerScale))?;
        Ok(scale.first().copied().unwrap_or(1.0))
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
                let shape = [moe.router_rows(), h];
                let linear = self.linear(layer, LayerSite::Router, role(LayerRole::Router), bias, shape)?;
                let table = self.checkpoint.expert_table(layer)?.map(Arc::new);
                let selection_bias = match config.corrects_selection(layer) {
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
                (shared, Some(RouterLayer { linear, norm, selection_bias, table, scales }))
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
        // A layer with an input of its own is scaled after that.
        let scale = if config.layer_inputs.is_some() { 1.0 } else { self.layer_scale(layer)? };
        let residual = config.ffn_factor(layer) as f32;
        let bias = match config.moe(layer).is_some_and(|moe| moe.output_bias) {
            true => Some(self.vector(role(LayerRole::ExpertsBias), h)?),
            false => None,
        };
        let carry = config.ffn_carry().map(|carry| carry as f32);
        let (shortcut, identities) = (config.starts_shortcut(layer), config.moe(layer).map_or(0, |moe| moe.identities));
        let streams = match &config.layers[layer].ffn {
            Ffn::None => None,
            _ => self.hyper_connection(layer, FFN_STREAMS)?,
        };
        let loaded = FfnLayer {
            streams,
            norm,
            output_norm,
            apart,
            latent,
            dense,
            router,
            identities,
            shortcut,
            residual,
            scale,
            carry,
            bias,
        };
        let mut cache = self.lock();
        if layer < cache.residency.layers {
            cache.ffn[layer] = Some(loaded.clone());
        }
        Ok(loaded)
    }
}

//! Routed experts, read from the checkpoint, changed by overlays and adapters.

use burn::tensor::Tensor;
use moe_checkpoint::{Dtype, ExpertPart, ExpertWeights, RawMatrix};

use super::Model;
use crate::{
    error::{Error, Result},
    experts::ExpertTensors,
    host,
    kernels::weight::{Bf16Source, Weight},
    overlay::ExpertOverlay,
};

impl Model {
    /// Routed expert `expert` of decoder layer `layer`, through the overlay.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it cannot be read, or the overlay's error.
    pub fn expert(&self, layer: usize, expert: usize) -> Result<ExpertTensors> {
        if let Some(stream) = &self.stream {
            return Ok(self.on_device(layer, stream.expert(layer, expert)?));
        }
        let index = self.expert_index(layer, expert)?;
        if let Some(found) = index.and_then(|index| self.lock().experts[index].clone()) {
            return Ok(found);
        }
        let loaded = self.adapted_expert(layer, expert, || match &self.experts {
            Some(overlay) => {
                Ok(self.on_device(layer, overlay.apply(layer, expert, self.checkpoint.expert(layer, expert)?)?))
            }
            None => self.load_expert(layer, expert),
        })?;
        let mut cache = self.lock();
        if let Some(index) = index.filter(|index| *index < cache.residency.experts) {
            cache.experts[index] = Some(loaded.clone());
        }
        Ok(loaded)
    }

    /// An expert as `overlay` changes what this model has.
    pub(crate) fn replaced_expert(
        &self,
        overlay: &dyn ExpertOverlay,
        layer: usize,
        expert: usize,
    ) -> Result<ExpertTensors> {
        let mut weights = self.checkpoint.expert(layer, expert)?;
        if let Some(own) = &self.experts {
            weights = own.apply(layer, expert, weights)?;
        }
        let weights = overlay.apply(layer, expert, weights)?;
        self.adapted_expert(layer, expert, || Ok(self.on_device(layer, weights)))
    }

    fn on_device(&self, layer: usize, weights: ExpertWeights) -> ExpertTensors {
        let gateless = self.config().moe(layer).is_some_and(|moe| moe.gateless);
        let make = if gateless { ExpertTensors::gateless } else { ExpertTensors::new };
        make(weights, &self.device).with_activation(self.activation(layer))
    }

    fn load_expert(&self, layer: usize, expert: usize) -> Result<ExpertTensors> {
        let config = self.config();
        let mut packed = Weight::prefers_bf16(&self.device, self.precision);
        for part in ExpertPart::ALL {
            packed = packed && self.checkpoint.expert_dtype(layer, expert, part)? == Some(Dtype::BF16);
        }
        if !packed {
            return Ok(self.on_device(layer, self.checkpoint.expert(layer, expert)?));
        }
        let (width, hidden) = (config.moe(layer).map_or(0, |moe| moe.widths[expert]), config.expert_hidden_size());
        let source = |parts: &'static [ExpertPart]| -> Bf16Source {
            let checkpoint = self.checkpoint.clone();
            Box::new(move |f| {
                let mut matrices = Vec::with_capacity(parts.len());
                for part in parts {
                    matrices.extend(checkpoint.expert_part(layer, expert, *part)?);
                }
                f(&matrices.iter().flat_map(rows).collect::<Vec<_>>());
                Ok(checkpoint.release_expert(layer, expert)?)
            })
        };
        // Biases are few: f32 beside the packed matrices.
        let bias = |parts: &[ExpertPart]| -> Result<Option<Tensor<1>>> {
            let mut values = Vec::new();
            for part in parts {
                let Some(bias) = self.checkpoint.expert_part(layer, expert, *part)? else { return Ok(None) };
                values.extend(bias.to_f32());
            }
            let len = values.len();
            Ok(Some(host::from_vec(values, [len], &self.device)))
        };
        const GATE_UP: [ExpertPart; 2] = [ExpertPart::Gate, ExpertPart::Up];
        let stacked = |parts: &'static [ExpertPart]| {
            Weight::from_bf16([parts.len() * width, hidden], &self.device, self.precision, source(parts), &self.failure)
        };
        Ok(ExpertTensors {
            gate_up: match config.moe(layer).is_some_and(|moe| moe.gateless) {
                true => stacked(&GATE_UP[1..])?.twice(),
                false => stacked(&GATE_UP)?,
            },
            gate_up_bias: bias(&[ExpertPart::GateBias, ExpertPart::UpBias])?,
            down: Weight::from_bf16(
                [hidden, width],
                &self.device,
                self.precision,
                source(&[ExpertPart::Down]),
                &self.failure,
            )?,
            down_bias: bias(&[ExpertPart::DownBias])?,
            activation: self.activation(layer),
        })
    }

    /// Where an expert is cached: experts that share weights share the place. `None` where an overlay may make such
    /// experts differ.
    pub(super) fn expert_index(&self, layer: usize, expert: usize) -> Result<Option<usize>> {
        let config = self.config();
        let mut index = 0;
        for l in &self.checkpoint.shape().layers {
            let Some(moe) = config.moe(l.layer) else { continue };
            if l.layer == layer && expert < moe.num_experts() {
                let differ = moe.sets.is_some() && (self.experts.is_some() || self.adapters.is_some());
                return Ok((!differ).then_some(index + moe.stored(expert)));
            }
            index += moe.stored_widths().len();
        }
        Err(Error::input("routed expert", format!("layer {layer}, expert {expert}"), "one of the model's"))
    }
}

fn rows<'a>(matrix: &'a RawMatrix<'_>) -> impl Iterator<Item = &'a [u8]> {
    (0..matrix.rows).filter_map(|i| matrix.row(i))
}

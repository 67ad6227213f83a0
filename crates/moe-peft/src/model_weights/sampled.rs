//! Layers that take turns in training.

use std::collections::BTreeSet;

use moe_core::{
    adapters::Depth,
    train::{Parameters, TaskState},
};

use crate::{AdapterSet, Live, Result, TrainingHooks, layer_sampling::LayerSampling};

/// Trains the layers that a [`LayerSampling`] draws; parameters that belong to no layer (embeddings, final norm, head) always.
#[derive(Clone, Debug)]
pub struct SampledLayers {
    sampling: LayerSampling,
    probabilities: Vec<f64>,
}

impl SampledLayers {
    /// With the [probabilities](LayerSampling::probabilities) of a model's layers.
    pub fn new(sampling: LayerSampling, probabilities: Vec<f64>) -> Self {
        Self { sampling, probabilities }
    }

    fn draw(&self, step: usize, set: &AdapterSet, parameters: &mut Parameters) -> Result<()> {
        let layers = self.sampling.draw(&self.probabilities, step);
        let trained = |live: &Live| layer_of(live.name()).is_none_or(|layer| layers.contains(&layer));
        set.bank().set_trained(parameters, self.sampling.drop_state, trained)?;
        set.set_depth(depth(set, &layers));
        Ok(())
    }
}

/// The decoder layer that a parameter `layers.3.query` belongs to.
pub(crate) fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("layers.")?.split('.').next()?.parse().ok()
}

/// How deep the backward sweep must go for these layers and for what always trains.
fn depth(set: &AdapterSet, layers: &BTreeSet<usize>) -> Depth {
    let embeddings = set.bank().iter().any(|live| live.name().starts_with("embeddings"));
    let start = if embeddings { Depth::Embedding } else { Depth::Head };
    layers.iter().map(|layer| Depth::Attention(*layer)).fold(start, Depth::deeper)
}

impl TrainingHooks for SampledLayers {
    fn before_step(&mut self, step: usize, set: &AdapterSet, parameters: &mut Parameters) -> Result<()> {
        match self.sampling.draws_at(step) {
            true => self.draw(step, set, parameters),
            false => Ok(()),
        }
    }

    fn state_save(&self) -> Result<TaskState> {
        Ok(TaskState::default())
    }

    fn state_load(&mut self, _: TaskState, set: &AdapterSet, parameters: &mut Parameters) -> Result<()> {
        // which parameters are active is part of the saved state; the adapters have to be told
        let active: BTreeSet<String> =
            parameters.iter().filter(|(_, p)| p.is_active()).map(|(name, _)| name.to_owned()).collect();
        let layers = active.iter().filter_map(|name| layer_of(name)).collect();
        set.bank().iter().for_each(|live| live.set_trained(active.contains(live.name())));
        set.set_depth(depth(set, &layers));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_told_by_name() {
        assert_eq!(layer_of("layers.12.experts.3.down"), Some(12));
        assert_eq!((layer_of("head.rows_0_64"), layer_of("layers.x.query")), (None, None));
    }
}

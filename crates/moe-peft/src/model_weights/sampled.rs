//! Layers that take turns in training.

use std::{collections::BTreeSet, path::Path, sync::Arc};

use moe_core::{
    adapters::Depth,
    train::{Parameters, TaskState},
};

use crate::{AdapterSet, Live, Result, TrainingHooks, layer_sampling::LayerSampling, parked_values::Parking};

/// Trains the layers that a [`LayerSampling`] draws; parameters that belong to no layer (embeddings, final norm, head)
/// always.
///
/// In memory are f32 values of the matrices that train at the moment, and of no others. A matrix that had no turn yet
/// is that of the checkpoint, in its stored form. One whose turn is over is parked in a file as f32, so that nothing of
/// what it learnt is lost to the rounding of the checkpoint's dtype; sweeps read it there, as they read a checkpoint
/// that is not in memory. Biases and norms, which are small, stay in memory. The optimizer's moments of layers that do
/// not train stay, unless the sampling
/// [drops](LayerSampling::drop_state) them.
#[derive(Clone, Debug)]
pub struct SampledLayers {
    sampling: LayerSampling,
    probabilities: Vec<f64>,
    parking: Arc<Parking>,
}

impl SampledLayers {
    /// With the [probabilities](LayerSampling::probabilities) of a model's layers.
    pub fn new(sampling: LayerSampling, probabilities: Vec<f64>) -> Self {
        Self { sampling, probabilities, parking: Parking::new(None) }
    }

    /// The same with a directory for parked values other than the system's for temporary files.
    #[must_use]
    pub fn parked_in(self, directory: &Path) -> Self {
        Self { parking: Parking::new(Some(directory)), ..self }
    }

    /// Frees the memory of what does not train and began in the checkpoint.
    fn park(&self, set: &AdapterSet, parameters: &mut Parameters) -> Result<()> {
        let waiting = set.bank().iter().filter_map(|live| Some((live, live.base()?)));
        for (live, _) in waiting.filter(|(live, _)| !live.is_trained()) {
            let Some(parameter) = parameters.get(live.name()).filter(|parameter| parameter.storage().is_none()) else {
                continue;
            };
            let parked = self.parking.park(&parameter.values)?;
            parameters.store(live.name(), parked)?;
        }
        Ok(())
    }

    fn draw(&self, step: usize, set: &AdapterSet, parameters: &mut Parameters) -> Result<()> {
        let layers = self.sampling.draw(&self.probabilities, step);
        let trained = |live: &Live| layer_of(live.name()).is_none_or(|layer| layers.contains(&layer));
        // What goes makes room for what comes.
        set.bank().set_trained(parameters, self.sampling.drop_state, |live| trained(live) && live.is_trained())?;
        self.park(set, parameters)?;
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
        // Stored values are in the file of the state, which goes: those that were never trained are the base's, the
        // others are parked.
        for (live, base) in set.bank().iter().filter_map(|live| Some((live, live.base()?))) {
            let Some(parameter) = parameters.get(live.name()).filter(|parameter| parameter.storage().is_some()) else {
                continue;
            };
            let (saved, first) = (parameter.read()?, base.read()?);
            let storage = match saved.iter().map(|v| v.to_bits()).eq(first.iter().map(|v| v.to_bits())) {
                true => base.clone(),
                false => self.parking.park(&saved)?,
            };
            drop(saved);
            parameters.store(live.name(), storage)?;
        }
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

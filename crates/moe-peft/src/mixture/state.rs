//! What happens to a mixture besides gradient descent, and what it has to remember besides parameters.

use std::{collections::BTreeMap, sync::Arc};

use moe_core::train::{Parameters, StateArray, TaskState};

use super::Mixture;
use crate::{AdapterSet, Error, Result, TrainingHooks};

/// Saves the biases of selections with the state of training, so that SMoRA and FlyLoRA resume to the same bits. For
/// other mixtures it does nothing.
#[derive(Clone, Debug)]
pub struct KeepsSelection(pub Arc<Mixture>);

impl TrainingHooks for KeepsSelection {
    fn state_save(&self) -> Result<TaskState> {
        let mut arrays = BTreeMap::new();
        if self.0.config.gate.bias_rate().is_some() {
            for (path, router) in &self.0.routers {
                let values = router.settled_bias();
                arrays.insert(path.clone(), StateArray { shape: vec![values.len()], values });
            }
        }
        Ok(TaskState { arrays, ..TaskState::default() })
    }

    fn state_load(&mut self, state: TaskState, _: &AdapterSet, _: &mut Parameters) -> Result<()> {
        for (path, array) in state.arrays {
            let router = self.0.routers.get(&path).filter(|router| router.width == array.values.len());
            let router = router.ok_or_else(|| {
                let found = format!("{} values for `{path}`", array.values.len());
                Error::input("saved biases of selections", found, "those of this mixture")
            })?;
            router.set_bias(array.values);
        }
        Ok(())
    }
}

/// Pulls trained values towards those that they began with: `c sum (v - v_0)^2` beside the mean loss.
#[derive(Clone, Debug)]
pub(super) struct Preservation {
    pub coefficient: f64,
    /// Values at the start, by name.
    pub start: BTreeMap<String, Vec<f32>>,
}

impl Preservation {
    /// Adds the gradient, divided by `factor`, and gives the loss.
    fn add(&self, factor: f64, parameters: &mut Parameters) -> f64 {
        let mut sum = 0.0;
        let slope = (2.0 * self.coefficient / factor) as f32;
        for (name, start) in &self.start {
            let Some(parameter) = parameters.get_mut(name) else { continue };
            let moved: Vec<f32> = parameter.values.iter().zip(start).map(|(v, start)| v - start).collect();
            sum += moved.iter().map(|d| f64::from(*d).powi(2)).sum::<f64>();
            if let Some(gradient) = parameter.gradient_mut() {
                gradient.iter_mut().zip(moved).for_each(|(g, d)| *g += slope * d);
            }
        }
        self.coefficient * sum
    }
}

/// Hooks of a mixture.
#[derive(Clone, Debug)]
pub(super) struct MixtureHooks {
    pub selection: KeepsSelection,
    pub preservation: Option<Preservation>,
}

impl TrainingHooks for MixtureHooks {
    fn gradients(&mut self, _: usize, factor: f64, parameters: &mut Parameters) -> Result<BTreeMap<String, f64>> {
        let loss = |preservation: &Preservation| ("preservation".to_owned(), preservation.add(factor, parameters));
        Ok(self.preservation.iter().map(loss).collect())
    }

    fn state_save(&self) -> Result<TaskState> {
        self.selection.state_save()
    }

    fn state_load(&mut self, state: TaskState, set: &AdapterSet, parameters: &mut Parameters) -> Result<()> {
        self.selection.state_load(state, set, parameters)
    }
}

//! What a mixture has to remember besides parameters while it is trained.

use std::{collections::BTreeMap, sync::Arc};

use moe_core::train::{Parameters, StateArray, TaskState};

use super::Mixture;
use crate::{AdapterSet, Error, Result, TrainingHooks};

/// Saves the biases of selections with the state of training, so that SMoRA and FlyLoRA resume to the same bits. For other mixtures it does
/// nothing.
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

//! Compressed experts as an overlay.

use std::collections::BTreeMap;
use std::sync::Arc;

use moe_checkpoint::ExpertWeights;
use moe_core::{ExpertOverlay, Model};

use crate::compress::CompactModel;
use crate::{Error, Result};

/// Shows a model with the experts of a [`CompactModel`], their matrices formed as they are loaded: what compressing costs in quality, not
/// what it saves.
#[derive(Clone, Debug)]
pub struct CompactOverlay {
    compact: CompactModel,
    /// The stored set of every expert of a layer.
    sets: BTreeMap<usize, Vec<usize>>,
}

impl CompactOverlay {
    /// `model` with the experts of `compact`, which must have been made from its checkpoint.
    ///
    /// # Errors
    /// [`Error::OtherModel`], those of [`Model::with_overlay`].
    pub fn of(compact: CompactModel, model: &Model) -> Result<Model> {
        let checkpoint = model.checkpoint();
        let found = checkpoint.fingerprint();
        if found != compact.model() {
            let (path, expected) = (checkpoint.dir().to_path_buf(), compact.model().to_string());
            return Err(Error::OtherModel { what: "compact model", path, found, expected });
        }
        let sets = checkpoint.shape().layers.iter().filter_map(|layer| {
            let moe = checkpoint.config().moe(layer.layer)?;
            Some((layer.layer, (0..moe.num_experts()).map(|expert| moe.stored(expert)).collect()))
        });
        let overlay = Self { sets: sets.collect(), compact };
        Ok(model.with_overlay(Arc::new(overlay))?)
    }
}

impl ExpertOverlay for CompactOverlay {
    fn apply(&self, layer: usize, expert: usize, weights: ExpertWeights) -> moe_core::Result<ExpertWeights> {
        let Some(set) = self.sets.get(&layer).and_then(|sets| sets.get(expert)) else { return Ok(weights) };
        Ok(self.compact.expert(layer, *set).map_err(moe_core::Error::observer)?.dense())
    }
}

//! What goes into the linear maps of a model, seen by adapters that change nothing.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use burn::tensor::Tensor;
use moe_core::{
    Engine, EngineOptions, Model,
    adapters::{LinearAdapter, Site, Tokens, Wanted},
    data::Wave,
    kernels::{reduce::add_weighted_column_squares, weight::Weight},
    trace::Nobody,
};

use crate::{AdapterSet, Error, Result, places::Place};

/// Sums of squares of each column of a map's input.
#[derive(Debug)]
struct Squares {
    dims: [usize; 2],
    sums: Mutex<Vec<f64>>,
}

impl Squares {
    fn lock(&self) -> MutexGuard<'_, Vec<f64>> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LinearAdapter for Squares {
    fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn forward(&self, base: &Weight, x: &Tensor<2>, tokens: Tokens<'_>) -> Tensor<2> {
        add_weighted_column_squares(x, &vec![1.0; x.dims()[0]], &mut self.lock());
        base.forward_for(x, None, tokens)
    }

    fn backward(
        &self,
        base: &Weight,
        _: &Tensor<2>,
        dy: &Tensor<2>,
        _: Tokens<'_>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        wanted.input.then(|| base.backward(dy))
    }

    fn matrix(&self, base: &Weight) -> Option<Tensor<2>> {
        Some(base.to_tensor())
    }
}

/// `||X_j||^2` of each input column j of the linear maps `places`, over the tokens of `waves` that reach them.
///
/// # Errors
/// What stops the model; [`Error::Input`] for no waves.
pub fn input_squares(model: &Model, places: &[Place], waves: &[Wave]) -> Result<BTreeMap<Site, Vec<f64>>> {
    if waves.is_empty() {
        return Err(Error::input("waves to measure inputs on", 0, "at least one"));
    }
    let mut set = AdapterSet::new();
    let mut probes = BTreeMap::new();
    for place in places {
        let probe = Arc::new(Squares { dims: place.dims, sums: Mutex::new(vec![0.0; place.dims[1]]) });
        probes.insert(place.site, probe.clone());
        set.add(place.site, probe)?;
    }
    let probed = model.with_adapters(Arc::new(set))?;
    let engine = Engine::new(&probed, EngineOptions { loss: true, ..EngineOptions::default() });
    for wave in waves {
        engine.run(wave, &mut Nobody)?;
    }
    Ok(probes.into_iter().map(|(site, probe)| (site, probe.lock().clone())).collect())
}

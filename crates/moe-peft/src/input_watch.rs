//! What goes into the linear maps of a model, seen by adapters that change nothing.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{Arc, Mutex, PoisonError},
};

use burn::tensor::Tensor;
use moe_core::{
    Engine, EngineOptions, Model,
    adapters::{LinearAdapter, Site, Tokens, Wanted},
    data::Wave,
    kernels::{reduce::add_weighted_column_squares, weight::Weight},
    trace::Nobody,
};

use crate::{AdapterSet, Error, Result, trainable_tensors::Place};

/// The map itself, with its inputs shown to `see`, which adds them to what was seen before.
#[derive(Debug)]
struct Watch<S> {
    dims: [usize; 2],
    seen: Mutex<S>,
    see: fn(&mut S, &Tensor<2>),
}

impl<S: Debug + Send> LinearAdapter for Watch<S> {
    fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn forward(&self, base: &Weight, x: &Tensor<2>, tokens: Tokens<'_>) -> Tensor<2> {
        (self.see)(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner), x);
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

    fn digest(&self, _: &mut dyn FnMut(&[u8])) {}
}

/// Runs `waves` forward through a model and shows the input `[n, in]` of each of `places` to `see`, as often as the map is run: once per
/// wave, or per piece of it, and for an expert on its tokens. What was seen begins as the default.
///
/// # Errors
/// What stops the model; [`Error::Input`] for no waves, and for a place given twice.
pub(crate) fn watch<S: Debug + Default + Send + 'static>(
    model: &Model,
    places: impl IntoIterator<Item = Place>,
    waves: &[Wave],
    see: fn(&mut S, &Tensor<2>),
) -> Result<BTreeMap<Site, S>> {
    if waves.is_empty() {
        return Err(Error::input("waves to watch inputs on", 0, "at least one"));
    }
    let mut set = AdapterSet::new();
    let mut watches = BTreeMap::new();
    for Place { site, dims } in places {
        let watch = Arc::new(Watch { dims, seen: Mutex::new(S::default()), see });
        watches.insert(site, watch.clone());
        set.add(site, watch)?;
    }
    let watched = model.with_adapters(Arc::new(set))?;
    let engine = Engine::new(&watched, EngineOptions { loss: true, ..EngineOptions::default() });
    for wave in waves {
        engine.run(wave, &mut Nobody)?;
    }
    let take = |watch: &Watch<S>| std::mem::take(&mut *watch.seen.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(watches.into_iter().map(|(site, watch)| (site, take(&watch))).collect())
}

/// `||X_j||^2` of each input column j of the linear maps `places`, over the tokens of `waves` that reach them; zeros for a map that none
/// reaches.
///
/// # Errors
/// What stops the model; [`Error::Input`] for no waves.
pub fn input_squares(model: &Model, places: &[Place], waves: &[Wave]) -> Result<BTreeMap<Site, Vec<f64>>> {
    let mut squares = watch(model, places.iter().copied(), waves, |sums: &mut Vec<f64>, x| {
        let [n, columns] = x.dims();
        sums.resize(columns, 0.0);
        add_weighted_column_squares(x, &vec![1.0; n], sums);
    })?;
    for place in places {
        squares.entry(place.site).or_default().resize(place.dims[1], 0.0);
    }
    Ok(squares)
}

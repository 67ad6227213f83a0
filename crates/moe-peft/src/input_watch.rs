//! What goes into the linear maps of a model, seen by adapters that change nothing.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use burn::tensor::Tensor;
use moe_checkpoint::{ArrayKind, Fold, Statistics};
use moe_core::{
    Model,
    adapters::{LinearAdapter, Site, Tokens, Wanted},
    data::Wave,
    kernels::{reduce::add_weighted_column_squares, weight::Weight},
    trace::{Signals, WaveInfo},
};
use moe_importance::{Calibration, StatisticId, StatisticSpec, collectors::Collector};

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

/// Statistics of what adapters of a model see of the inputs of linear maps: a [`Collector`] for a
/// [`Calibration`](moe_importance::Calibration) of the watched model.
#[derive(Debug)]
pub(crate) struct InputCollector<S> {
    specs: Vec<StatisticSpec>,
    watches: Vec<(Site, Arc<Watch<S>>)>,
    /// Adds what was seen in a wave at a map.
    add: fn(Site, [usize; 2], S, &mut Statistics) -> moe_importance::Result<()>,
}

/// A model that shows the input `[n, in]` of each of `places` to `see`, as often as the map is run: once per wave, or
/// per piece of it, and for an expert on its tokens; and the collector of what was seen, which begins as the default in
/// every wave.
///
/// # Errors
/// [`Error::Input`] for a place given twice; those of the model.
pub(crate) fn watch<S: Debug + Default + Send + 'static>(
    model: &Model,
    places: impl IntoIterator<Item = Place>,
    see: fn(&mut S, &Tensor<2>),
    specs: fn(Site, [usize; 2]) -> Vec<StatisticSpec>,
    add: fn(Site, [usize; 2], S, &mut Statistics) -> moe_importance::Result<()>,
) -> Result<(Model, InputCollector<S>)> {
    let mut set = AdapterSet::new();
    let mut collector = InputCollector { specs: Vec::new(), watches: Vec::new(), add };
    for Place { site, dims } in places {
        let watch = Arc::new(Watch { dims, seen: Mutex::new(S::default()), see });
        collector.specs.extend(specs(site, dims));
        collector.watches.push((site, watch.clone()));
        set.add(site, watch)?;
    }
    Ok((model.with_adapters(Arc::new(set))?, collector))
}

impl<S: Debug + Default + Send + 'static> InputCollector<S> {
    fn take(watch: &Watch<S>) -> S {
        std::mem::take(&mut *watch.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<S: Debug + Default + Send + 'static> Collector for InputCollector<S> {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.specs
    }

    fn needs(&self) -> Signals {
        Signals::NONE
    }

    fn needs_forward(&self) -> bool {
        true
    }

    fn begin_wave(&mut self, _: &WaveInfo) -> moe_importance::Result<()> {
        self.watches.iter().for_each(|(_, watch)| drop(Self::take(watch)));
        Ok(())
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn end_layer(&mut self, layer: usize, into: &mut Statistics) -> moe_importance::Result<()> {
        let watches = self.watches.iter().filter(|(site, _)| site.layer() == layer);
        watches.into_iter().try_for_each(|(site, watch)| (self.add)(*site, watch.dims, Self::take(watch), into))
    }
}

/// What is seen of a map, as statistics call it: `inputs.squares.layers.3.query`.
pub(crate) fn statistic(what: &str, site: Site) -> String {
    format!("inputs.{what}.{}", site.path())
}

/// A matrix of sums.
pub(crate) fn sums(name: String, rows: usize, columns: usize) -> StatisticSpec {
    StatisticSpec { id: StatisticId::from(name), kind: ArrayKind::Matrix { rows, columns }, fold: Fold::Sum }
}

/// `||X_j||^2` of each input column j of the linear maps `places`, over the tokens of `waves` that reach them; zeros
/// for a map that none reaches. Finished waves are kept in `store`, if there is one, and not run again.
///
/// # Errors
/// What stops the model; [`Error::Input`] for no waves; a store of something else.
pub fn input_squares(
    model: &Model,
    places: &[Place],
    waves: &[Wave],
    store: Option<&Path>,
) -> Result<BTreeMap<Site, Vec<f64>>> {
    let (watched, collector) = watch(
        model,
        places.iter().copied(),
        |sums: &mut Vec<f64>, x| {
            let [n, columns] = x.dims();
            sums.resize(columns, 0.0);
            add_weighted_column_squares(x, &vec![1.0; n], sums);
        },
        |site, [_, columns]| vec![sums(statistic("squares", site), 1, columns)],
        |site, [_, columns], seen, into| {
            let sums = into.matrix_mut(&statistic("squares", site), [1, columns], Fold::Sum)?;
            sums.iter_mut().zip(seen).for_each(|(sum, seen)| *sum += seen);
            Ok(())
        },
    )?;
    let statistics = run(&watched, collector, waves, store)?;
    let of = |place: &Place| Ok((place.site, statistics.matrix(&statistic("squares", place.site))?.0.to_vec()));
    places.iter().map(of).collect()
}

/// Runs a watched model over waves.
pub(crate) fn run<S: Debug + Default + Send + 'static>(
    watched: &Model,
    collector: InputCollector<S>,
    waves: &[Wave],
    store: Option<&Path>,
) -> Result<Statistics> {
    if waves.is_empty() {
        return Err(Error::input("waves to watch inputs on", 0, "at least one"));
    }
    let mut calibration = Calibration::of_waves(watched, waves).collector(Box::new(collector));
    if let Some(directory) = store {
        calibration = calibration.store(directory);
    }
    Ok(calibration.run(&mut |_| {})?)
}

//! Which layers train when: LISA (arXiv 2403.17919) and OwLore (arXiv 2405.18380).

use std::collections::{BTreeMap, BTreeSet};

use moe_core::{
    Model,
    adapters::Site,
    data::Wave,
    train::{ParameterGroup, Projection},
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::{
    AdapterSet, Error, Installed, Result, Setting, TuningMethod, input_watch,
    model_weights::{Begin, OwnWeights, SampledLayers},
    trainable_tensors::{self, Place},
};

/// How often a layer is drawn.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum LayerWeights {
    /// All alike, as LISA does.
    #[default]
    Uniform,
    /// More often the more outliers there are among `|w_ij| * ||X_j||` of its linear maps, as OwLore does.
    Outliers {
        /// What is so many times the layer's mean is an outlier. 13 in the published runs; pruning by outliers (OWL)
        /// takes 3.
        times_mean: f64,
    },
    /// Less often the more outliers there are: `max p - p`, rescaled.
    FewOutliers {
        /// As above.
        times_mean: f64,
    },
    /// Rising or falling linearly with depth, from `first` to `last`.
    Linear {
        /// Weight of the first layer.
        first: f64,
        /// Weight of the last layer.
        last: f64,
    },
    /// These weights, one per layer.
    Given(Vec<f64>),
}

/// Every so many steps, some decoder layers are drawn; they alone train, and embeddings, final norm and head where they
/// are trained at all.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LayerSampling {
    /// Layers that train at a time, gamma.
    pub layers: usize,
    /// Steps between draws, K.
    pub every: usize,
    /// How often a layer is drawn.
    pub weights: LayerWeights,
    /// Whether the optimizer's moments of layers that stop training are forgotten, which saves memory, rather than kept
    /// for their next turn.
    pub drop_state: bool,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for LayerSampling {
    fn default() -> Self {
        Self { layers: 2, every: 20, weights: LayerWeights::Uniform, drop_state: false, seed: 0 }
    }
}

impl LayerSampling {
    /// The defaults of OwLore: five layers by their outliers, every 50 steps.
    pub fn owlore() -> Self {
        let weights = LayerWeights::Outliers { times_mean: 13.0 };
        Self { layers: 5, every: 50, weights, ..Self::default() }
    }

    /// # Errors
    /// [`Error::Input`] names the field that is out of range for a model of so many layers; weights that are negative
    /// or all zero.
    pub fn validate(&self, layers: usize) -> Result<()> {
        if self.layers == 0 || self.layers > layers {
            return Err(Error::input("layers", self.layers, format!("1 to the {layers} of the model")));
        }
        if self.every == 0 {
            return Err(Error::input("every", 0, "at least 1"));
        }
        match &self.weights {
            LayerWeights::Outliers { times_mean } | LayerWeights::FewOutliers { times_mean }
                if !(*times_mean > 0.0 && times_mean.is_finite()) =>
            {
                Err(Error::input("times_mean", times_mean, "a finite number above 0"))
            }
            LayerWeights::Given(weights) if weights.len() != layers => Err(Error::input(
                "weights",
                format!("{} numbers", weights.len()),
                format!("one for each of {layers} layers"),
            )),
            LayerWeights::Given(weights) => normalized(weights.clone()).map(drop),
            LayerWeights::Linear { first, last } => normalized(linear(*first, *last, layers)).map(drop),
            _ => Ok(()),
        }
    }

    /// The probabilities of the layers of a model `[layers]`, which sum to 1. `waves` are run where weights need them.
    ///
    /// # Errors
    /// As [`validate`](Self::validate); weights that are negative or all zero; what stops the model.
    pub fn probabilities(&self, model: &Model, waves: &[Wave]) -> Result<Vec<f64>> {
        let layers = model.config().layers.len();
        self.validate(layers)?;
        let weights = match &self.weights {
            LayerWeights::Uniform => vec![1.0; layers],
            LayerWeights::Outliers { times_mean } => outliers(model, waves, *times_mean)?,
            LayerWeights::FewOutliers { times_mean } => {
                let shares = normalized(outliers(model, waves, *times_mean)?)?;
                let most = shares.iter().copied().fold(0.0, f64::max);
                shares.into_iter().map(|p| most - p).collect()
            }
            LayerWeights::Linear { first, last } => linear(*first, *last, layers),
            LayerWeights::Given(weights) => weights.clone(),
        };
        normalized(weights)
    }

    /// The layers that train from the draw on that `step` (from 1) belongs to. Depends on nothing but the seed and the
    /// number of the draw, so that a resumed run draws the same.
    pub fn draw(&self, probabilities: &[f64], step: usize) -> BTreeSet<usize> {
        let draw = step.saturating_sub(1) / self.every.max(1);
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        random.set_stream(draw as u64);
        let mut left: Vec<(usize, f64)> = probabilities.iter().copied().enumerate().collect();
        let mut drawn = BTreeSet::new();
        while drawn.len() < self.layers.min(probabilities.len()) {
            let sum: f64 = left.iter().map(|(_, p)| p).sum();
            // layers without probability come last, lowest first
            let at = match sum > 0.0 {
                false => 0,
                true => {
                    let mut target = random.random::<f64>() * sum;
                    let found = left.iter().position(|(_, p)| {
                        target -= p;
                        target < 0.0
                    });
                    found.unwrap_or_else(|| left.iter().rposition(|(_, p)| *p > 0.0).unwrap_or(0))
                }
            };
            drawn.insert(left.remove(at).0);
        }
        drawn
    }

    /// Whether there is a draw before `step` (from 1).
    pub fn draws_at(&self, step: usize) -> bool {
        step.saturating_sub(1).is_multiple_of(self.every.max(1))
    }
}

/// A few layers at a time, and the low rank that gradients of their matrices are projected to, if any: LISA without,
/// OwLore with.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LayerTurns {
    /// Which layers when.
    pub sampling: LayerSampling,
    /// Low-rank projection of gradients (GaLore).
    pub projection: Option<Projection>,
}

/// Waves that outliers are counted on.
const OUTLIER_WAVES: usize = 4;

/// Linear maps whose gradients are projected, as OwLore has it: those of attention and of feed-forward blocks.
const PROJECTED: [&str; 6] = ["query", "key", "value", "output", "*gate_up", "*down"];

impl TuningMethod for LayerTurns {
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        self.sampling.validate(on.model.config().layers.len())?;
        if let Some(projection) = &self.projection {
            projection.validate()?;
        }
        OwnWeights::full().check(on)
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        let waves = &on.waves[..on.waves.len().min(OUTLIER_WAVES)];
        let probabilities = self.sampling.probabilities(on.model, waves)?;
        OwnWeights::full().put_into(on.model, set, Begin::Stored)?;
        let group = |map: &&str| ParameterGroup {
            pattern: format!("layers.*.{map}"),
            projection: self.projection,
            later: true,
            ..ParameterGroup::default()
        };
        let groups = PROJECTED.iter().filter(|_| self.projection.is_some()).map(group).collect();
        let hooks = SampledLayers::new(self.sampling.clone(), probabilities);
        let hooks = match on.directory {
            Some(directory) => hooks.parked_in(directory),
            None => hooks,
        };
        Ok(Installed { hooks: Some(Box::new(hooks)), groups, ..Installed::default() })
    }

    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        OwnWeights::full().outline(on, set)
    }
}

/// From `first` to `last` in equal steps.
fn linear(first: f64, last: f64, layers: usize) -> Vec<f64> {
    let step = |l: usize| l as f64 / layers.saturating_sub(1).max(1) as f64;
    (0..layers).map(|l| first + (last - first) * step(l)).collect()
}

fn normalized(weights: Vec<f64>) -> Result<Vec<f64>> {
    let sum: f64 = weights.iter().sum();
    let bad = weights.iter().any(|w| !(*w >= 0.0 && w.is_finite()));
    if bad || sum <= 0.0 {
        return Err(Error::input("weights of layers", format!("{weights:?}"), "numbers of 0 or more, not all 0"));
    }
    Ok(weights.into_iter().map(|w| w / sum).collect())
}

/// Share of outliers among the linear maps of each layer, on the tokens of `waves`.
///
/// # Errors
/// What stops the model; [`Error::Input`] for no waves.
pub fn outliers(model: &Model, waves: &[Wave], times_mean: f64) -> Result<Vec<f64>> {
    let checkpoint = model.checkpoint();
    let places: Vec<Place> =
        trainable_tensors::linear_maps(checkpoint).into_iter().filter(|place| !place.dims.contains(&0)).collect();
    let inputs = input_watch::input_squares(model, &places, waves, None)?;
    let norms: BTreeMap<Site, Vec<f32>> = inputs
        .into_iter()
        .map(|(site, squares)| (site, squares.into_iter().map(|s| s.sqrt() as f32).collect()))
        .collect();
    let layers = model.config().layers.len();
    let mut totals = vec![(0.0f64, 0u64); layers];
    for place in &places {
        let sum: f64 =
            metric(&trainable_tensors::read(checkpoint, place.site)?, &norms[&place.site]).map(f64::from).sum();
        let total = &mut totals[place.site.layer()];
        *total = (total.0 + sum, total.1 + (place.dims[0] * place.dims[1]) as u64);
    }
    let mut above = vec![0u64; layers];
    for place in &places {
        let layer = place.site.layer();
        let threshold = times_mean * totals[layer].0 / totals[layer].1.max(1) as f64;
        let values = trainable_tensors::read(checkpoint, place.site)?;
        above[layer] += metric(&values, &norms[&place.site]).filter(|m| f64::from(*m) > threshold).count() as u64;
    }
    checkpoint.release();
    Ok(above.iter().zip(totals).map(|(above, (_, n))| *above as f64 / n.max(1) as f64).collect())
}

/// `|w_ij| * ||X_j||`.
fn metric<'a>(weights: &'a [f32], norms: &'a [f32]) -> impl Iterator<Item = f32> + 'a {
    weights.chunks_exact(norms.len().max(1)).flat_map(move |row| row.iter().zip(norms).map(|(w, n)| w.abs() * n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_of_the_asked_size_and_reproducible() {
        let sampling = LayerSampling { layers: 2, every: 3, seed: 5, ..LayerSampling::default() };
        let uniform = [0.25; 4];
        let draws: Vec<_> = (1..=300).map(|step| sampling.draw(&uniform, step)).collect();
        assert!(draws.iter().all(|layers| layers.len() == 2));
        for (i, three) in draws.chunks(3).enumerate() {
            assert!(three.iter().all(|draw| *draw == three[0]), "draw {i} changes between draws");
        }
        assert!(sampling.draws_at(1) && !sampling.draws_at(3) && sampling.draws_at(4));
        assert_ne!(
            draws,
            (1..=300).map(|s| LayerSampling { seed: 6, ..sampling.clone() }.draw(&uniform, s)).collect::<Vec<_>>()
        );
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let sampling = LayerSampling { layers: 1, every: 1, ..LayerSampling::default() };
        let probabilities = [0.1, 0.4, 0.0, 0.5];
        let mut counts = [0.0; 4];
        for step in 1..=4000 {
            counts[*sampling.draw(&probabilities, step).first().unwrap()] += 1.0 / 4000.0;
        }
        for (count, p) in counts.iter().zip(probabilities) {
            assert!((count - p).abs() < 0.03, "{counts:?}");
        }
        let all = LayerSampling { layers: 4, ..sampling };
        assert_eq!(all.draw(&probabilities, 1).len(), 4);
    }

    #[test]
    fn fields_out_of_range_are_named() {
        let message = |sampling: LayerSampling| sampling.validate(4).unwrap_err().to_string();
        assert!(message(LayerSampling { layers: 5, ..LayerSampling::default() }).contains("layers: found 5"));
        assert!(message(LayerSampling { every: 0, ..LayerSampling::default() }).contains("every"));
        let given = LayerWeights::Given(vec![1.0]);
        assert!(message(LayerSampling { weights: given, ..LayerSampling::default() }).contains("one for each of 4"));
        assert!(normalized(vec![0.0, 0.0]).is_err() && normalized(vec![1.0, -1.0, 2.0]).is_err());
        assert_eq!(normalized(vec![1.0, 3.0]).unwrap(), [0.25, 0.75]);
    }
}

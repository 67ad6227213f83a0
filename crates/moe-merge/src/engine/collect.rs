//! Evidence from a run.

use std::collections::BTreeSet;
use std::path::Path;

use moe_checkpoint::Provenance;
use moe_core::Model;
use moe_core::data::Wave;
use moe_importance::calibration::waves_hash;
use moe_importance::collectors::{Collector, collectors_for};
use moe_importance::statistics::{LOGIT_GRAM, OUTPUT_MOMENTS, ROUTED_TOKENS};
use moe_importance::{Calibration, Collection, Progress, StatisticId};

use super::dense::DenseMeans;
use super::sampler::TokenSampler;
use crate::Result;
use crate::evidence::{Evidence, OutputMean};
use crate::grouping::Grouping;
use crate::recipe::Recipe;
use crate::similarity::Features;

/// What evidence is collected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvidenceOptions {
    /// Names of statistics; the numbers of routed tokens are always among them.
    pub statistics: BTreeSet<String>,
    /// Mean outputs over all tokens, exactly: every expert is run on every token. Without, output similarity runs
    /// experts on the sampled tokens.
    pub dense_outputs: bool,
    /// Tokens to sample from every layer.
    pub sample: usize,
    /// Seed of the sample.
    pub seed: u64,
}

impl EvidenceOptions {
    /// What a recipe reads: its statistics, exact mean outputs if it compares them, and `sample` tokens if it fits on
    /// some.
    pub fn for_recipe(recipe: &Recipe, sample: usize) -> Self {
        let mut options = Self { statistics: recipe.statistics(), dense_outputs: false, sample: 0, seed: 0 };
        for features in recipe.grouping.needs() {
            match features {
                Features::RouterLogits => drop(options.statistics.insert(LOGIT_GRAM.to_string())),
                Features::Outputs { over: OutputMean::Routed } => {
                    options.statistics.insert(OUTPUT_MOMENTS.to_string());
                }
                Features::Outputs { .. } => options.dense_outputs = true,
                _ => {}
            }
        }
        if recipe.fits_on_sample() {
            options.sample = sample;
        }
        options
    }

    /// Identifies the evidence that these options give for a model on some waves, as 64 hex digits.
    pub fn digest(&self, model: &Model, waves: &[Wave]) -> String {
        let Self { statistics, dense_outputs, sample, seed } = self;
        let what = serde_json::json!({
            "model": model.identity(), "data": waves_hash(waves), "statistics": statistics,
            "dense": dense_outputs, "sample": sample, "seed": seed,
        });
        blake3::hash(what.to_string().as_bytes()).to_hex().to_string()
    }

    /// Observes it in a calibration of `model`.
    pub fn observe<'m>(&self, model: &'m Model, calibration: Calibration<'m>) -> Calibration<'m> {
        let ids = self.ids();
        self.own_collectors(model).into_iter().fold(calibration.statistics(ids), Calibration::collector)
    }

    /// Observes it in sweeps that no calibration makes, of data with this hash.
    pub(super) fn collection<'m>(&self, model: &'m Model, data: String) -> Result<Collection<'m>> {
        let checkpoint = model.checkpoint();
        let recipe = serde_json::json!({ "statistics": self.statistics }).to_string();
        let provenance = Provenance::new(checkpoint.fingerprint(), data, recipe);
        let known = collectors_for(&self.ids())?.into_iter().map(|collector| collector as Box<dyn Collector + 'm>);
        let all = known.chain(self.own_collectors(model)).collect();
        Ok(Collection::with_collectors(checkpoint.shape(), provenance, all)?)
    }

    /// Statistics of moe-importance; the numbers of routed tokens are always among them.
    fn ids(&self) -> Vec<StatisticId> {
        self.statistics.iter().cloned().map(StatisticId::from).chain([ROUTED_TOKENS]).collect()
    }

    fn own_collectors<'m>(&self, model: &'m Model) -> Vec<Box<dyn Collector + 'm>> {
        let mut own: Vec<Box<dyn Collector + 'm>> = Vec::new();
        if self.sample > 0 {
            let (shape, top_k) = (model.checkpoint().shape(), model.config().routing.top_k);
            own.push(Box::new(TokenSampler::new(self.sample, self.seed, shape, top_k)));
        }
        if self.dense_outputs {
            own.push(Box::new(DenseMeans::new(model)));
        }
        own
    }

    /// What several recipes read together.
    pub fn for_recipes<'a>(recipes: impl IntoIterator<Item = &'a Recipe>, sample: usize) -> Self {
        let none = Self { statistics: BTreeSet::new(), dense_outputs: false, sample: 0, seed: 0 };
        recipes.into_iter().map(|recipe| Self::for_recipe(recipe, sample)).fold(none, |mut all, one| {
            all.statistics.extend(one.statistics);
            all.dense_outputs |= one.dense_outputs;
            all.sample = all.sample.max(one.sample);
            all
        })
    }
}

/// Runs a model over waves and keeps what `options` ask for; in `store`, if there is one, wave by wave, so that a run
/// that was stopped goes on. It is a [`Calibration`] of the model on these waves, with what
/// [`EvidenceOptions::observe`] adds: shards and other observations go the same way, and [`Evidence::from_statistics`]
/// reads the result.
///
/// ```no_run
/// use moe_core::{Model, device::device};
/// use moe_merge::{EvidenceOptions, Recipe, collect_evidence};
///
/// # let waves = vec![];
/// let model = Model::open("models/Qwen1.5-MoE-A2.7B", &device("default")?, None)?;
/// let options = EvidenceOptions::for_recipe(&Recipe::named("mergemoe")?, 4096);
/// collect_evidence(&model, &waves, &options, None, &mut |_| {})?.save("evidence.safetensors")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::Statistics`](crate::Error::Statistics) with what stops the model, unknown statistics, two waves of one id,
/// no waves, or a store of something else.
pub fn collect_evidence(
    model: &Model,
    waves: &[Wave],
    options: &EvidenceOptions,
    store: Option<&Path>,
    progress: &mut dyn FnMut(&Progress),
) -> Result<Evidence> {
    let mut calibration = options.observe(model, Calibration::of_waves(model, waves));
    if let Some(directory) = store {
        calibration = calibration.store(directory);
    }
    let evidence = Evidence::from_statistics(&calibration.run(progress)?)?;
    evidence.validate(model.checkpoint().shape())?;
    Ok(evidence)
}

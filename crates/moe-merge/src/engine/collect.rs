//! Evidence from a run.

use std::collections::BTreeSet;

use moe_checkpoint::{Provenance, Statistics};
use moe_core::data::Wave;
use moe_core::trace::{ExpertTrace, LayerTrace, Observer, RouterGradients, Signals, WaveInfo};
use moe_core::{Engine, EngineOptions, Model};
use moe_importance::{Collection, StatisticId};

use super::dense::DenseMeans;
use super::sampler::TokenSampler;
use crate::evidence::{Evidence, LOGIT_GRAM, LayerEvidence, OUTPUT_MOMENTS, OutputMean, ROUTED_TOKENS};
use crate::recipe::Recipe;
use crate::similarity::Features;
use crate::{Error, Result};

/// What evidence is collected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvidenceOptions {
    /// Names of statistics; the numbers of routed tokens are always among them.
    pub statistics: BTreeSet<String>,
    /// Mean outputs over all tokens, exactly: every expert is run on every token. Without, output similarity runs experts on
    /// the sampled tokens.
    pub dense_outputs: bool,
    /// Tokens to sample from every layer.
    pub sample: usize,
    /// Seed of the sample.
    pub seed: u64,
}

impl EvidenceOptions {
    /// What a recipe reads: its statistics, exact mean outputs if it compares them, and `sample` tokens if it fits on some.
    pub fn for_recipe(recipe: &Recipe, sample: usize) -> Self {
        let mut options = Self { statistics: recipe.statistics(), dense_outputs: false, sample: 0, seed: 0 };
        for features in recipe.grouping.features() {
            match features {
                Features::RouterLogits => drop(options.statistics.insert(LOGIT_GRAM.into())),
                Features::Outputs { over: OutputMean::Routed } => {
                    options.statistics.insert(OUTPUT_MOMENTS.into());
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
            "model": model.checkpoint().fingerprint(), "data": data_hash(waves), "statistics": statistics,
            "dense": dense_outputs, "sample": sample, "seed": seed,
        });
        blake3::hash(what.to_string().as_bytes()).to_hex().to_string()
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

/// Runs a model over waves and keeps what `options` ask for.
///
/// ```no_run
/// use moe_core::{Model, device::device};
/// use moe_merge::{EvidenceOptions, Recipe, collect_evidence};
///
/// # let waves = vec![];
/// let model = Model::open("models/Qwen1.5-MoE-A2.7B", &device("default")?, None)?;
/// let options = EvidenceOptions::for_recipe(&Recipe::named("mergemoe")?, 4096);
/// collect_evidence(&model, &waves, &options, &mut |_, _| {})?.save("evidence.safetensors")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::Engine`], [`Error::Statistics`] for unknown statistics, two waves of one id, or no waves.
pub fn collect_evidence(
    model: &Model,
    waves: &[Wave],
    options: &EvidenceOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Evidence> {
    let mut collector = EvidenceCollector::new(model, options, data_hash(waves))?;
    let engine = Engine::new(model, EngineOptions::default());
    let mut folded: Option<Statistics> = None;
    let mut ordered: Vec<&Wave> = waves.iter().collect();
    ordered.sort_by_key(|wave| wave.id);
    for (done, wave) in ordered.iter().enumerate() {
        progress(done, waves.len());
        engine.run(wave, &mut collector)?;
        collector.fold_into(&mut folded)?;
    }
    progress(waves.len(), waves.len());
    let statistics = folded.ok_or_else(|| Error::parameter("waves", "none", "at least one"))?;
    let mut evidence = Evidence::from_statistics(&statistics)?;
    for layer in &mut evidence.layers {
        collector.add_to(layer);
    }
    evidence.validate(model.checkpoint().shape())?;
    Ok(evidence)
}

/// A hash of the tokens of waves.
pub(super) fn data_hash(waves: &[Wave]) -> String {
    let mut hasher = blake3::Hasher::new();
    for wave in waves {
        hasher.update(&wave.id.to_le_bytes());
        for sequence in &wave.sequences {
            hasher.update(&(sequence.ids.len() as u64).to_le_bytes());
            for id in &sequence.ids {
                hasher.update(&id.to_le_bytes());
            }
        }
    }
    hasher.finalize().to_hex().to_string()
}

/// Watches runs for evidence.
pub(crate) struct EvidenceCollector<'m> {
    collection: Collection<'m>,
    sampler: Option<TokenSampler>,
    dense: Option<DenseMeans<'m>>,
}

impl<'m> EvidenceCollector<'m> {
    pub fn new(model: &'m Model, options: &EvidenceOptions, data: String) -> Result<Self> {
        let mut names = options.statistics.clone();
        names.insert(ROUTED_TOKENS.to_string());
        let ids: Vec<StatisticId> = names.iter().cloned().map(StatisticId::from).collect();
        let checkpoint = model.checkpoint();
        let recipe = serde_json::json!({ "statistics": names }).to_string();
        let provenance = Provenance::new(checkpoint.fingerprint(), data, recipe);
        Ok(Self {
            collection: Collection::new(checkpoint.shape(), provenance, &ids)?,
            sampler: (options.sample > 0).then(|| TokenSampler::new(options.sample, options.seed)),
            dense: options.dense_outputs.then(|| DenseMeans::new(model)),
        })
    }

    /// Adds the statistics of the wave that was finished last.
    pub fn fold_into(&mut self, folded: &mut Option<Statistics>) -> Result<()> {
        let Some(wave) = self.collection.take() else { return Ok(()) };
        match folded {
            None => *folded = Some(wave),
            Some(folded) => folded.fold(&wave)?,
        }
        Ok(())
    }

    /// Adds what is not a statistic to a layer's evidence.
    pub fn add_to(&mut self, evidence: &mut LayerEvidence) {
        let layer = evidence.layer;
        if let Some(means) = self.dense.as_mut().and_then(|dense| dense.take(layer)) {
            evidence.outputs.extend(means);
        }
        evidence.sample = self.sampler.as_mut().and_then(|sampler| sampler.take(layer));
    }
}

impl Observer for EvidenceCollector<'_> {
    fn needs(&self) -> Signals {
        let tokens = match self.sampler.is_some() || self.dense.is_some() {
            true => Signals::ROUTING | Signals::UNITS,
            false => Signals::NONE,
        };
        self.collection.needs() | tokens
    }

    fn begin_wave(&mut self, wave: &WaveInfo) -> moe_core::Result<()> {
        self.collection.begin_wave(wave)
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        if let Some(dense) = &mut self.dense {
            dense.layer(trace)?;
        }
        if let Some(sampler) = &mut self.sampler {
            sampler.layer(trace);
        }
        self.collection.layer(trace)
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> moe_core::Result<()> {
        if let Some(dense) = &mut self.dense {
            dense.expert(trace);
        }
        if let Some(sampler) = &mut self.sampler {
            sampler.expert(trace);
        }
        self.collection.expert(trace)
    }

    fn router(&mut self, gradients: &RouterGradients<'_>) -> moe_core::Result<()> {
        self.collection.router(gradients)
    }

    fn end_wave(&mut self, wave: &WaveInfo) -> moe_core::Result<()> {
        if let Some(dense) = &mut self.dense {
            dense.flush()?;
        }
        self.collection.end_wave(wave)
    }
}

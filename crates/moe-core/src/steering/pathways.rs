//! C3PO: the routing of a prompt's last token, mixed from that of similar prompts that were answered rightly.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use burn::tensor::Tensor;
use moe_checkpoint::RoutingKind;
use serde::{Deserialize, Serialize};

use super::RowOverride;
use crate::{
    Engine, EngineOptions, Model,
    data::{Sequence, Wave},
    error::{Error, Result},
    generate::{GenerateOptions, generate},
    host::HostView,
    trace::{LayerTrace, Nobody, Observer, RouterGradients, Signals, WaveInfo},
};

/// A prompt that the model answers rightly, and how its last token is routed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reference {
    /// The prompt's tokens.
    pub prompt: Vec<u32>,
    /// The right answer's.
    pub answer: Vec<u32>,
    /// Where it lies among prompts.
    pub embedding: Vec<f32>,
    /// Scores of the experts for the last token of the prompt ([`Router::scores`](crate::router::Router::scores)), by
    /// decoder layer `[E]`.
    pub rows: BTreeMap<usize, Vec<f32>>,
}

/// References, as a file of JSON.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReferenceStore {
    /// Version of the file: 1.
    pub version: u64,
    /// The references.
    pub references: Vec<Reference>,
}

/// Test-time remixing of experts (C3PO, arXiv 2504.07964).
///
/// The neighbors of a prompt are the `neighbors` references that lie nearest, by a Gaussian kernel of the distance
/// whose width is the median distance of the neighbors; those more similar than `most_similar` are left out. In the
/// last `layers` MoE layers, the scores `w` of the experts at the prompt's last token become `a w + (1 - a) w'`, with
/// `w'` the kernel mean of the neighbors' scores, or are found by descent on the neighbors' loss. Then the model's own
/// rule selects and weighs. Tokens that are generated are routed as always.
///
/// The paper's models have softmax routers, whose scores are shares; where a score is a sigmoid, it is mixed alike.
/// SparseMixer, which has no scores that logits could be found for, is refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pathways {
    /// References that a prompt learns from.
    pub neighbors: usize,
    /// Similarity (cosine) above which a reference is the prompt itself.
    pub most_similar: f64,
    /// The last MoE layers that are changed.
    pub layers: usize,
    /// How the new shares are found.
    pub method: PathwaysMethod,
}

/// How new shares are found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum PathwaysMethod {
    /// Kernel regression: `a` is the one of these with the least loss of the neighbors' answers; 1 changes nothing.
    Kernel {
        /// Shares of the prompt's own routing that are tried.
        own: Vec<f64>,
    },
    /// Descent on the loss of the neighbors' answers, each run with the prompt's shares at its own last token, by Adam
    /// on the logits with a rate that falls along a cosine.
    Descent {
        /// Steps; 0 changes nothing.
        steps: usize,
        /// First rate.
        rate: f64,
        /// Last rate.
        last_rate: f64,
    },
}

impl Default for Pathways {
    fn default() -> Self {
        let method = PathwaysMethod::Kernel { own: vec![0.0, 0.25, 0.5, 0.75, 1.0] };
        Self { neighbors: 3, most_similar: 0.95, layers: 5, method }
    }
}

/// What was found for a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Remixed {
    /// New logits of its last token, by decoder layer.
    pub rows: BTreeMap<usize, Vec<f32>>,
    /// The references it learned from.
    pub neighbors: Vec<usize>,
    /// Loss of their answers with the prompt's own routing, and with the new one.
    pub losses: (f64, f64),
}

/// Routing of the last token, the mean of the stream after the last layer, and gradients at one token.
#[derive(Default)]
struct Seen {
    wave: Option<WaveInfo>,
    position: Option<usize>,
    /// The first layer that is changed.
    first: usize,
    logits: BTreeMap<usize, Vec<f32>>,
    gradients: BTreeMap<usize, Vec<f32>>,
    mean: Vec<f32>,
}

impl Seen {
    fn token(&self) -> usize {
        let last = self.wave.as_ref().map_or(0, |wave| wave.tokens.saturating_sub(1));
        self.position.unwrap_or(last)
    }
}

impl Observer for Seen {
    fn needs(&self) -> Signals {
        match self.position {
            None => Signals { routing: true, hidden: true, ..Signals::NONE },
            Some(_) => Signals::ROUTER_GRADIENTS,
        }
    }

    fn first_layer(&self) -> usize {
        self.first
    }

    fn begin_wave(&mut self, wave: &WaveInfo) -> Result<()> {
        self.wave = Some(wave.clone());
        Ok(())
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        let t = self.token();
        self.logits.insert(trace.layer, trace.logits[t * trace.experts..(t + 1) * trace.experts].to_vec());
        Ok(())
    }

    fn router(&mut self, gradients: &RouterGradients<'_>) -> Result<()> {
        let row = self.token() * gradients.experts;
        self.gradients.insert(gradients.layer, gradients.d_logits[row..row + gradients.experts].to_vec());
        Ok(())
    }

    fn last_hidden(&mut self, hidden: &Tensor<2>) -> Result<()> {
        let (view, [tokens, columns]) = (HostView::new(hidden), hidden.dims());
        let mut mean = vec![0.0f32; columns];
        for row in view.as_slice().chunks_exact(columns) {
            mean.iter_mut().zip(row).for_each(|(sum, x)| *sum += x / tokens as f32);
        }
        let length = mean.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
        self.mean = mean.into_iter().map(|x| x / length).collect();
        Ok(())
    }
}

fn look(model: &Model, prompt: &[u32]) -> Result<Seen> {
    let mut seen = Seen::default();
    let wave = Wave { id: 0, sequences: vec![Sequence::new(prompt.to_vec())] };
    Engine::new(model, EngineOptions::default()).run(&wave, &mut seen)?;
    Ok(seen)
}

impl ReferenceStore {
    /// Keeps those of prompts with answers that the model gives itself, greedily. Prompts are embedded by the mean of
    /// the model's last stream; embeddings of one's own go into [`Reference`]s.
    ///
    /// # Errors
    /// Whatever stops the model.
    pub fn collect(model: &Model, samples: &[(Vec<u32>, Vec<u32>)]) -> Result<Self> {
        let mut references = Vec::new();
        for (prompt, answer) in samples {
            let options = GenerateOptions { max_new_tokens: answer.len(), ..GenerateOptions::default() };
            if answer.is_empty()
                || generate(model, std::slice::from_ref(prompt), &options, |_| false)?.concat() != *answer
            {
                continue;
            }
            let (seen, router) = (look(model, prompt)?, model.router());
            let rows = seen.logits.iter().map(|(layer, logits)| (*layer, router.scores(logits))).collect();
            references.push(Reference { prompt: prompt.clone(), answer: answer.clone(), embedding: seen.mean, rows });
        }
        Ok(Self { version: 1, references })
    }

    /// Name of the file beside a model.
    pub const FILE: &str = "references.json";

    /// Writes the store.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let value = serde_json::to_value(self).map_err(|error| Error::input("references", error, "JSON"))?;
        Ok(moe_checkpoint::write_json(path, &value)?)
    }

    /// Reads a store.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Input`] names the file that is something else.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let wrong = |found: String| Error::input(path.display().to_string(), found, "references of version 1");
        let store: Self = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        if store.version == 1 { Ok(store) } else { Err(wrong(format!("version {}", store.version))) }
    }
}

impl Pathways {
    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self, references: usize) -> Result<()> {
        if !(1..=references).contains(&self.neighbors) {
            return Err(Error::input("neighbors", self.neighbors, format!("1 to {references}, the references")));
        }
        if self.layers == 0 {
            return Err(Error::input("layers", 0, "at least 1"));
        }
        match &self.method {
            PathwaysMethod::Kernel { own } if own.is_empty() || own.iter().any(|a| !(0.0..=1.0).contains(a)) => {
                Err(Error::input("own", format!("{own:?}"), "shares in [0, 1]"))
            }
            PathwaysMethod::Descent { rate, last_rate, .. } if !(*rate >= 0.0 && *last_rate >= 0.0) => {
                Err(Error::input("rate", rate, "numbers of 0 or more"))
            }
            _ => Ok(()),
        }
    }

    /// Finds new routing for the last token of a prompt. `overridden` is the model under `rows`
    /// ([`RowOverride::routing`]).
    ///
    /// # Errors
    /// As [`validate`](Self::validate); [`Error::Input`] where too few references are left; whatever stops the model.
    pub fn remix(
        &self,
        overridden: &Model,
        rows: &Arc<RowOverride>,
        prompt: &[u32],
        store: &ReferenceStore,
    ) -> Result<Remixed> {
        self.validate(store.references.len())?;
        let router = overridden.router();
        rows.reset();
        let seen = look(overridden, prompt)?;
        let critical: Vec<usize> = seen.logits.keys().rev().take(self.layers).copied().collect();
        let own: BTreeMap<usize, Vec<f32>> =
            seen.logits.iter().filter(|(l, _)| critical.contains(l)).map(|(l, z)| (*l, z.clone())).collect();
        let (neighbors, kernel) = self.neighbors(&seen.mean, store)?;
        let near: Vec<&Reference> = neighbors.iter().map(|i| &store.references[*i]).collect();
        let loss = |logits: &BTreeMap<usize, Vec<f32>>| -> Result<f64> {
            let mut sum = 0.0;
            for (reference, k) in near.iter().zip(&kernel) {
                sum += k * self.answer(overridden, rows, reference, logits, &mut Nobody)?;
            }
            Ok(sum / kernel.iter().sum::<f64>())
        };
        let before = loss(&own)?;
        let mut best = (before, own.clone());
        match &self.method {
            PathwaysMethod::Kernel { own: shares } => {
                for a in shares.iter().filter(|a| **a < 1.0) {
                    let mut mixed = BTreeMap::new();
                    for (layer, logits) in &own {
                        let mut w: Vec<f64> = router.scores(logits).iter().map(|w| a * f64::from(*w)).collect();
                        for (reference, k) in near.iter().zip(&kernel) {
                            let of = reference.rows.get(layer).filter(|row| row.len() == w.len());
                            let missing =
                                || Error::input(format!("reference's scores of layer {layer}"), "none", w.len());
                            let of = of.ok_or_else(missing)?;
                            let factor = (1.0 - a) * k / kernel.iter().sum::<f64>();
                            w.iter_mut().zip(of).for_each(|(w, p)| *w += factor * f64::from(*p));
                        }
                        mixed.insert(*layer, router.logits_of(&w));
                    }
                    let found = loss(&mixed)?;
                    if found < best.0 {
                        best = (found, mixed);
                    }
                }
            }
            PathwaysMethod::Descent { steps, rate, last_rate } => {
                let mut at = own.clone();
                let mut moments: BTreeMap<usize, (Vec<f64>, Vec<f64>)> = BTreeMap::new();
                for step in 0..*steps {
                    let mut gradients: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
                    for (reference, k) in near.iter().zip(&kernel) {
                        let first = critical.iter().copied().min().unwrap_or(0);
                        let mut seen = Seen { position: Some(reference.prompt.len() - 1), first, ..Seen::default() };
                        self.answer(overridden, rows, reference, &at, &mut seen)?;
                        for (layer, d) in seen.gradients.iter().filter(|(layer, _)| at.contains_key(layer)) {
                            let sum = gradients.entry(*layer).or_insert_with(|| vec![0.0; d.len()]);
                            let factor = k / kernel.iter().sum::<f64>() / reference.answer.len() as f64;
                            sum.iter_mut().zip(d).for_each(|(sum, d)| *sum += factor * f64::from(*d));
                        }
                    }
                    let along = step as f64 / (*steps).max(2).saturating_sub(1) as f64;
                    let rate = last_rate + (rate - last_rate) * (1.0 + (std::f64::consts::PI * along).cos()) / 2.0;
                    for (layer, gradient) in gradients {
                        let Some(row) = at.get_mut(&layer) else { continue };
                        let zeros = || (vec![0.0; row.len()], vec![0.0; row.len()]);
                        let (m, v) = moments.entry(layer).or_insert_with(zeros);
                        for (i, g) in gradient.iter().enumerate() {
                            m[i] = 0.9 * m[i] + 0.1 * g;
                            v[i] = 0.999 * v[i] + 0.001 * g * g;
                            let n = step as i32 + 1;
                            let (m, v) = (m[i] / (1.0 - 0.9f64.powi(n)), v[i] / (1.0 - 0.999f64.powi(n)));
                            row[i] -= (rate * m / (v.sqrt() + 1e-8)) as f32;
                        }
                    }
                    let found = loss(&at)?;
                    if found < best.0 {
                        best = (found, at.clone());
                    }
                }
            }
        }
        rows.reset();
        Ok(Remixed { rows: best.1, neighbors, losses: (before, best.0) })
    }

    /// The nearest references and their kernel weights.
    fn neighbors(&self, embedding: &[f32], store: &ReferenceStore) -> Result<(Vec<usize>, Vec<f64>)> {
        let mut found: Vec<(usize, f64)> = Vec::new();
        for (i, reference) in store.references.iter().enumerate() {
            if reference.embedding.len() != embedding.len() {
                let expected = embedding.len();
                return Err(Error::input(format!("embedding of reference {i}"), reference.embedding.len(), expected));
            }
            let (mut dot, mut aa, mut bb) = (0.0, 0.0, 0.0);
            for (a, b) in reference.embedding.iter().zip(embedding) {
                let (a, b) = (f64::from(*a), f64::from(*b));
                (dot, aa, bb) = (dot + a * b, aa + a * a, bb + b * b);
            }
            let similarity = dot / (aa.sqrt() * bb.sqrt()).max(f64::MIN_POSITIVE);
            if similarity <= self.most_similar {
                found.push((i, (2.0 - 2.0 * similarity).max(0.0).sqrt()));
            }
        }
        found.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
        if found.len() < self.neighbors {
            let expected = format!("at least {} below a similarity of {}", self.neighbors, self.most_similar);
            return Err(Error::input("references beside the prompt itself", found.len(), expected));
        }
        found.truncate(self.neighbors);
        let width = found[found.len() / 2].1.max(1e-6);
        let kernel = found.iter().map(|(_, d)| (-(d * d) / (2.0 * width * width)).exp()).collect();
        Ok((found.iter().map(|(i, _)| *i).collect(), kernel))
    }

    /// Mean loss of a reference's answer with these logits at its prompt's last token.
    fn answer(
        &self,
        overridden: &Model,
        rows: &Arc<RowOverride>,
        reference: &Reference,
        logits: &BTreeMap<usize, Vec<f32>>,
        observer: &mut dyn Observer,
    ) -> Result<f64> {
        let ids: Vec<u32> = reference.prompt.iter().chain(&reference.answer).copied().collect();
        let counts = (0..ids.len()).map(|t| t >= reference.prompt.len()).collect();
        let sequence = Sequence { ids, loss: Some(counts) };
        rows.set(reference.prompt.len() - 1, logits.clone(), 1);
        let engine = Engine::new(overridden, EngineOptions { loss: true, ..EngineOptions::default() });
        let report = engine.run(&Wave { id: 0, sequences: vec![sequence] }, observer)?;
        Ok(report.loss.unwrap_or(0.0) / report.loss_tokens.max(1) as f64)
    }

    /// Continues prompts, each with routing of its own at its last token.
    ///
    /// # Errors
    /// As [`remix`](Self::remix) and [`generate`].
    pub fn generate(
        &self,
        model: &Model,
        prompts: &[Vec<u32>],
        store: &ReferenceStore,
        options: &GenerateOptions,
        mut ended: impl FnMut(&[u32]) -> bool,
    ) -> Result<Vec<(Vec<u32>, Remixed)>> {
        let config = model.config();
        if matches!(config.routing.kind, RoutingKind::Sparsemixer { .. }) {
            return Err(Error::Unsupported("remixed pathways with SparseMixer".into()));
        }
        let layers: Vec<usize> = (0..config.layers.len()).filter(|layer| config.moe(*layer).is_some()).collect();
        let rows = RowOverride::new();
        let overridden = model.routed_by(Arc::new(rows.routing(&layers)))?;
        let mut all = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let found = self.remix(&overridden, &rows, prompt, store)?;
            rows.set(prompt.len().saturating_sub(1), found.rows.clone(), 1);
            let completion = generate(&overridden, std::slice::from_ref(prompt), options, &mut ended)?.concat();
            rows.reset();
            all.push((completion, found));
        }
        Ok(all)
    }
}

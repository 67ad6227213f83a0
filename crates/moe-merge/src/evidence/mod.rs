//! What merging knows of a model beside its weights.

mod file;
pub(crate) mod sample;

use std::collections::BTreeMap;

use moe_checkpoint::{Checkpoint, Extent, Granularity, MoeShape, ScoreTable, Statistics};
use moe_importance::StatisticId;
use moe_importance::statistics::{LOGIT_GRAM, OUTPUT_MOMENTS, ROUTED_TOKENS};
use serde::{Deserialize, Serialize};

pub use sample::TokenSample;

use crate::{Error, Result};

/// Name of the per-expert numbers that [`Evidence::add_scores`] puts in.
pub const SCORE: &str = "score";
/// Name of the sums of outputs over all tokens in statistics, a vector `[H]` per expert.
pub(crate) const OUTPUT_ALL: StatisticId = StatisticId::new("output.all");
/// Name of the same, weighted with the softmax of the router's logits over all experts.
pub(crate) const OUTPUT_GATED: StatisticId = StatisticId::new("output.gated");
/// Name of the number of tokens that these sums are over, the same for every expert.
pub(crate) const OUTPUT_ALL_TOKENS: StatisticId = StatisticId::new("output.all_tokens");

/// Which tokens an expert's mean output is taken over, and with what weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputMean {
    /// `mean_t f_e(x_t)` over all tokens, routed to the expert or not (HC-SMoE).
    All,
    /// `mean_t f_e(x_t)` over the tokens routed to it.
    Routed,
    /// `mean_t p_t[e] f_e(x_t)` over all tokens, p the softmax of the router's logits over all experts (REAM).
    Gated,
}

impl OutputMean {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Routed => "routed",
            Self::Gated => "gated",
        }
    }
}

/// What is known of one MoE layer. Every part may be absent; a recipe says which it needs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerEvidence {
    /// Decoder layer index.
    pub layer: usize,
    /// Tokens seen.
    pub tokens: u64,
    /// Sums over tokens, one number per expert `[E]`, by the names of statistics: `routing.tokens`, `routing.weight`,
    /// `output.norm_applied` and the like; and [`SCORE`].
    pub sums: BTreeMap<String, Vec<f64>>,
    /// Inner products of the experts' columns of router logits over all tokens, `[E, E]` row-major.
    pub logit_gram: Option<Vec<f64>>,
    /// Mean outputs `[E, H]` row-major.
    pub outputs: BTreeMap<OutputMean, Vec<f64>>,
    /// Some of the tokens themselves.
    pub sample: Option<TokenSample>,
}

impl LayerEvidence {
    /// Sums of this name.
    ///
    /// # Errors
    /// [`Error::MissingEvidence`].
    pub fn sum(&self, name: &str, part: &'static str) -> Result<&[f64]> {
        let what = || format!("the statistic `{name}`");
        self.sums.get(name).map(Vec::as_slice).ok_or_else(|| self.missing(part, what()))
    }

    /// The sampled tokens.
    ///
    /// # Errors
    /// [`Error::MissingEvidence`].
    pub fn sample(&self, part: &'static str) -> Result<&TokenSample> {
        let sample = self.sample.as_ref().filter(|sample| sample.tokens() > 0);
        sample.ok_or_else(|| self.missing(part, "a sample of the layer's tokens".into()))
    }

    /// Experts that no token was routed to, if that is known.
    pub fn never_used(&self) -> Vec<u32> {
        let counts = self.sums.get(ROUTED_TOKENS.as_str()).map_or(&[][..], Vec::as_slice);
        (0u32..).zip(counts).filter(|(_, count)| **count == 0.0).map(|(expert, _)| expert).collect()
    }

    pub(crate) fn missing(&self, part: &'static str, what: String) -> Error {
        Error::MissingEvidence { layer: self.layer, part, what }
    }

    fn validate(&self, shape: &MoeShape) -> Result<()> {
        let invalid = |reason: String| Err(Error::invalid_evidence(format!("layer {}: {reason}", self.layer)));
        let Some(layer) = shape.layer(self.layer) else { return invalid("the model has no such MoE layer".into()) };
        let (experts, hidden) = (layer.num_experts(), shape.hidden_size);
        let sums = self.sums.iter().map(|(name, values)| (format!("`{name}`"), values, experts));
        let gram = self.logit_gram.iter().map(|values| ("the logit Gram".to_string(), values, experts * experts));
        let outputs = self.outputs.iter().map(|(mean, values)| (format!("outputs {mean:?}"), values, experts * hidden));
        for (what, values, expected) in sums.chain(gram).chain(outputs) {
            if values.len() != expected {
                return invalid(format!("{what} has {} numbers, expected {expected}", values.len()));
            }
            if let Some(value) = values.iter().find(|v| !v.is_finite()) {
                return invalid(format!("{what} holds {value}"));
            }
        }
        match &self.sample {
            Some(sample) => sample.validate(experts, hidden).or_else(invalid),
            None => Ok(()),
        }
    }
}

/// What is known of a model, layer by layer.
///
/// Sums, Grams and mean outputs over routed tokens come from [`Statistics`]; samples and mean outputs over all tokens
/// from the collectors of feature `engine`. Memory is that
/// of the samples: per layer and sampled token, `4 (H + E + 2 k)` bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Evidence {
    /// Fingerprint of the model.
    pub model: String,
    /// Hash of the calibration data; empty where there was none.
    pub data: String,
    /// MoE layers in ascending order, those without evidence absent.
    pub layers: Vec<LayerEvidence>,
}

impl Evidence {
    /// Nothing about a model: what is enough for recipes that look at weights alone.
    pub fn none(checkpoint: &Checkpoint) -> Self {
        Self { model: checkpoint.fingerprint(), data: String::new(), layers: Vec::new() }
    }

    /// What `statistics` say: every array with a number per expert, `routing.logit_gram`, mean outputs over routed
    /// tokens from `output.moments`, and what [`EvidenceOptions`](crate::EvidenceOptions) has observed beside: mean
    /// outputs over all tokens, and samples.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for one of these arrays of another kind.
    pub fn from_statistics(statistics: &Statistics) -> Result<Self> {
        let provenance = statistics.provenance();
        let mut layers = Vec::with_capacity(statistics.shape().layers.len());
        for shape in &statistics.shape().layers {
            let (layer, experts) = (shape.layer, shape.num_experts());
            let sums = statistics.ids().filter_map(|id| {
                let values = statistics.expert(id, layer).ok().filter(|_| id != OUTPUT_ALL_TOKENS.as_str())?;
                Some((id.to_string(), values.to_vec()))
            });
            let mut evidence =
                LayerEvidence { layer, tokens: statistics.tokens(), sums: sums.collect(), ..LayerEvidence::default() };
            if statistics.contains(LOGIT_GRAM.as_str()) {
                let mut gram = Vec::with_capacity(experts * experts);
                for expert in 0..experts {
                    gram.extend_from_slice(statistics.vector(LOGIT_GRAM.as_str(), Extent::Experts, layer, expert)?);
                }
                evidence.logit_gram = Some(gram);
            }
            if statistics.contains(OUTPUT_MOMENTS.as_str()) {
                let hidden = statistics.shape().hidden_size;
                let mut means = Vec::with_capacity(experts * hidden);
                for expert in 0..experts {
                    // Count, means, squared deviations.
                    let moments = statistics.vector(OUTPUT_MOMENTS.as_str(), Extent::Moments, layer, expert)?;
                    means.extend_from_slice(&moments[1..=hidden]);
                }
                evidence.outputs.insert(OutputMean::Routed, means);
            }
            let hidden = statistics.shape().hidden_size;
            for (id, mean) in [(OUTPUT_ALL, OutputMean::All), (OUTPUT_GATED, OutputMean::Gated)] {
                if !statistics.contains(id.as_str()) {
                    continue;
                }
                let seen = statistics.expert(OUTPUT_ALL_TOKENS.as_str(), layer)?.first().copied().unwrap_or_default();
                let mut means = Vec::with_capacity(experts * hidden);
                for expert in 0..experts {
                    let sums = statistics.vector(id.as_str(), Extent::Hidden, layer, expert)?;
                    means.extend(sums.iter().map(|sum| sum / seen));
                }
                if seen > 0.0 {
                    evidence.outputs.insert(mean, means);
                }
            }
            let name = sample::sample_name(layer);
            if statistics.contains(&name) {
                let (rows, columns) = statistics.matrix(&name)?;
                let sample = TokenSample::from_rows(rows, columns, hidden, experts).ok_or_else(|| {
                    let found = format!("rows of {columns} numbers");
                    Error::invalid_evidence(format!("`{name}`: {found} for hidden size {hidden} and {experts} experts"))
                })?;
                evidence.sample = Some(sample);
            }
            layers.push(evidence);
        }
        Ok(Self { model: provenance.model.clone(), data: provenance.data.clone(), layers })
    }

    /// Adds the scores of a table of experts as the sums called [`SCORE`].
    ///
    /// # Errors
    /// [`Error::InvalidEvidence`] for a table of units, of another model, or of other layers.
    pub fn add_scores(&mut self, table: &ScoreTable) -> Result<()> {
        if table.granularity != Granularity::Expert {
            return Err(Error::invalid_evidence("the score table scores units; reduce it to experts first"));
        }
        if table.provenance.model != self.model {
            let reason = format!("scores of model {}, evidence of {}", table.provenance.model, self.model);
            return Err(Error::invalid_evidence(reason));
        }
        for scores in &table.layers {
            let values = scores.scores.iter().flatten().map(|score| f64::from(*score)).collect();
            self.layer_mut(scores.layer).sums.insert(SCORE.to_string(), values);
        }
        Ok(())
    }

    /// What is known of a layer.
    pub fn layer(&self, layer: usize) -> Option<&LayerEvidence> {
        self.layers.binary_search_by_key(&layer, |evidence| evidence.layer).ok().map(|at| &self.layers[at])
    }

    /// What is known of a layer, for adding to.
    pub fn layer_mut(&mut self, layer: usize) -> &mut LayerEvidence {
        let at = match self.layers.binary_search_by_key(&layer, |evidence| evidence.layer) {
            Ok(at) => at,
            Err(at) => {
                self.layers.insert(at, LayerEvidence { layer, ..LayerEvidence::default() });
                at
            }
        };
        &mut self.layers[at]
    }

    /// Takes what `other` knows in addition; where both know something, `other` wins.
    ///
    /// # Errors
    /// [`Error::InvalidEvidence`] for another model.
    pub fn add(&mut self, other: Evidence) -> Result<()> {
        if self.model != other.model {
            let reason = format!("it is of the model {}, expected {}", other.model, self.model);
            return Err(Error::invalid_evidence(reason));
        }
        if self.data.is_empty() {
            self.data.clone_from(&other.data);
        }
        for from in other.layers {
            let into = self.layer_mut(from.layer);
            into.tokens = from.tokens.max(into.tokens);
            into.sums.extend(from.sums);
            into.outputs.extend(from.outputs);
            into.logit_gram = from.logit_gram.or(into.logit_gram.take());
            into.sample = from.sample.or(into.sample.take());
        }
        Ok(())
    }

    /// Checks that every array fits a model of this shape and is finite.
    ///
    /// # Errors
    /// [`Error::InvalidEvidence`] names the layer and the array.
    pub fn validate(&self, shape: &MoeShape) -> Result<()> {
        if let Some(pair) = self.layers.windows(2).find(|pair| pair[0].layer >= pair[1].layer) {
            let reason = format!("layer {} stands before layer {}", pair[0].layer, pair[1].layer);
            return Err(Error::invalid_evidence(reason));
        }
        self.layers.iter().try_for_each(|layer| layer.validate(shape))
    }

    /// A hash of everything it holds, as 64 hex digits.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut text = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        text(&self.model);
        text(&self.data);
        for (name, dtype, shape, bytes) in file::tensors(self) {
            text(&format!("{name} {dtype} {shape:?}"));
            text(&blake3::hash(&bytes).to_hex());
        }
        for layer in &self.layers {
            text(&format!("{} {}", layer.layer, layer.tokens));
        }
        hasher.finalize().to_hex().to_string()
    }
}

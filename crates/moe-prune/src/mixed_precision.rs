//! Bits as an allocation: which experts get how many, so that a checkpoint of so many bytes diverges least.

use std::collections::BTreeMap;
use std::sync::Arc;

use moe_checkpoint::{
    Checkpoint, ExpertFormat, ExpertFormats, ExpertWeights, InputMoments, QuantizeOptions, Quantized, WeightFormat,
    expert_bytes,
};
use moe_core::{ExpertOverlay, Model};
use serde::{Deserialize, Serialize};

use crate::probe::EngineProbe;
use crate::{Choice, Distortion, Error, Result, Statistic, knapsack};

/// What gets one format together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrecisionGroup {
    /// The routed experts of a layer: what engines that stack them have kernels for.
    #[default]
    Layer,
    /// Every routed expert by itself (EdgeMoE, arXiv 2308.14352): one run of the model per expert and format.
    Expert,
}

/// Mixed precision by measured sensitivity.
///
/// Every group of experts is rounded to every format alone, with all others as they are, and the divergence of the
/// model's predictions is measured: the sensitivities that EdgeMoE orders experts by. Divergences of groups nearly add
/// up, as those of pruned layers do ([`RateDistortion`](crate::RateDistortion)), so that the best formats within so
/// many bytes are a [`knapsack`].
///
/// Units go into the same knapsack by [`best_allocation`]: stock loaders read one width, so that the options are one
/// whole model per pruning ratio, each with the best formats that the bytes left allow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixedPrecision {
    /// Formats to choose from: those that stand beside others in one checkpoint
    /// ([`WeightFormat::is_mixable`]).
    pub formats: Vec<WeightFormat>,
    /// What gets one format together.
    #[serde(default)]
    pub within: PrecisionGroup,
    /// Whether experts may stay as they are.
    #[serde(default)]
    pub unquantized: bool,
    /// Mean or worst sequence.
    #[serde(default)]
    pub statistic: Statistic,
}

/// A format of a group of experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrecisionOption {
    /// The format; none for experts that stay as they are.
    pub format: Option<WeightFormat>,
    /// Bytes of the group.
    pub bytes: u64,
    /// Bytes of the group in BF16.
    pub plain_bytes: u64,
    /// Divergence above that of the model without quantization, in nats per predicted token.
    pub distortion: f64,
}

/// Experts that get one format, and what each costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrecisionGroupOptions {
    /// Decoder layer.
    pub layer: usize,
    /// Its experts.
    pub experts: Vec<usize>,
    /// What it may be stored in, and at which loss.
    pub options: Vec<PrecisionOption>,
}

/// How sensitive a model's experts are to rounding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sensitivities {
    /// Fingerprint of the model.
    pub model: String,
    /// Divergence of the model without quantization from the one that is compared with: 0 for itself, more for one that
    /// was pruned.
    pub start: Distortion,
    /// Bytes outside the routed experts.
    pub fixed_bytes: u64,
    /// The groups, by layer and expert.
    pub groups: Vec<PrecisionGroupOptions>,
}

/// The formats that diverge least within so many bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrecisionAllocation {
    /// The format of every expert.
    pub formats: ExpertFormats,
    /// Bytes of the whole model.
    pub bytes: u64,
    /// Bits per weight of routed experts, scales included.
    pub bits: f64,
    /// The sum of the divergences of all groups above that of the model without quantization.
    pub predicted: f64,
}

/// Steps of the knapsack: bytes are rounded up to a step.
const STEPS: u64 = 1 << 13;

impl MixedPrecision {
    /// These formats, layer by layer.
    pub fn new(formats: Vec<WeightFormat>) -> Self {
        Self { formats, within: PrecisionGroup::default(), unquantized: false, statistic: Statistic::Mean }
    }

    /// Measures the sensitivities of the experts of `model`, against what the probe compares with. `progress` is told
    /// how many of how many runs are done.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for no formats, or one that no engine reads beside others;
    /// [`Error::Checkpoint`] for widths that a format cannot divide; those of the engine.
    pub fn measure(
        &self,
        model: &Model,
        probe: &EngineProbe<'_>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Sensitivities> {
        let expected = "at least one of fp8_channels, mxfp4, nvfp4 and integers";
        if let Some(format) = self.formats.iter().find(|format| !format.is_mixable()) {
            let found = format.to_string();
            return Err(Error::InvalidParameter { field: "formats", found, expected: expected.into() });
        }
        if self.formats.is_empty() {
            return Err(Error::InvalidParameter { field: "formats", found: "none".into(), expected: expected.into() });
        }
        let checkpoint = model.checkpoint();
        let shape = checkpoint.shape();
        let mut groups = Vec::new();
        for layer in &shape.layers {
            let all: Vec<usize> = (0..layer.num_experts()).collect();
            match self.within {
                PrecisionGroup::Layer => groups.push((layer.layer, all)),
                PrecisionGroup::Expert => groups.extend(all.into_iter().map(|expert| (layer.layer, vec![expert]))),
            }
        }
        let bytes_of = |layer: usize, experts: &[usize], format: Option<&WeightFormat>| -> Result<u64> {
            let widths = shape.layer(layer).map_or(&[][..], |layer| &layer.widths);
            experts.iter().map(|expert| Ok(expert_bytes(format, shape.hidden_size, widths[*expert])?)).sum()
        };
        // Widths that do not fit are told before the model is run.
        for (layer, experts) in &groups {
            self.formats.iter().try_for_each(|format| bytes_of(*layer, experts, Some(format)).map(drop))?;
        }
        let start = probe.distortion_of(model)?;
        let plain = checkpoint.dequantized()?;
        let mut experts_bytes = 0;
        for layer in &shape.layers {
            experts_bytes += plain.expert_bytes_on_disk(layer.layer)?;
        }
        let (runs, mut done) = (groups.len() * self.formats.len(), 0);
        let mut measured = Vec::with_capacity(groups.len());
        for (layer, experts) in groups {
            let mut options = Vec::new();
            let plain_bytes = bytes_of(layer, &experts, None)?;
            if self.unquantized {
                options.push(PrecisionOption { format: None, bytes: plain_bytes, plain_bytes, distortion: 0.0 });
            }
            for format in &self.formats {
                let rounded = RoundedExperts::new(experts.iter().map(|expert| ((layer, *expert), format.clone())));
                let distortion = probe.distortion_of(&model.with_overlay(Arc::new(rounded))?)?;
                let above = (distortion.of(self.statistic) - start.of(self.statistic)).max(0.0);
                let bytes = bytes_of(layer, &experts, Some(format))?;
                options.push(PrecisionOption { format: Some(format.clone()), bytes, plain_bytes, distortion: above });
                done += 1;
                progress(done, runs);
            }
            measured.push(PrecisionGroupOptions { layer, experts, options });
        }
        Ok(Sensitivities {
            model: checkpoint.fingerprint(),
            start,
            fixed_bytes: plain.bytes_on_disk().saturating_sub(experts_bytes),
            groups: measured,
        })
    }

    /// The model of so many bytes that diverges least: measured, allocated and rounded, by second moments of the inputs
    /// of experts where they are given.
    ///
    /// # Errors
    /// As [`MixedPrecision::measure`] and [`Sensitivities::allocate`]; those of [`Quantized::mixed`].
    pub fn quantize(
        &self,
        model: &Model,
        probe: &EngineProbe<'_>,
        keep_bytes: u64,
        moments: Option<&InputMoments>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(Quantized, PrecisionAllocation)> {
        let allocation = self.measure(model, probe, progress)?.allocate(keep_bytes)?;
        let quantized = allocation.on(model.checkpoint(), moments)?;
        Ok((quantized, allocation))
    }
}

impl Sensitivities {
    /// The formats of least predicted divergence in a model of no more than so many bytes.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for fewer bytes than the smallest formats take.
    pub fn allocate(&self, keep_bytes: u64) -> Result<PrecisionAllocation> {
        let least: u64 = self.groups.iter().filter_map(|group| group.options.iter().map(|o| o.bytes).min()).sum();
        let smallest = self.fixed_bytes + least;
        let too_few = || Error::InvalidParameter {
            field: "keep_bytes",
            found: keep_bytes.to_string(),
            expected: format!(
                "at least {smallest}: {} outside the routed experts, {least} in the smallest formats",
                self.fixed_bytes
            ),
        };
        // What is above the smallest formats is shared out, so that rounding up to steps costs little.
        let spare = keep_bytes.checked_sub(smallest).ok_or_else(too_few)?;
        let step = spare.div_ceil(STEPS).max(1);
        let choices: Vec<Vec<Choice>> = self
            .groups
            .iter()
            .map(|group| {
                let least = group.options.iter().map(|option| option.bytes).min().unwrap_or(0);
                let choice = |option: &PrecisionOption| Choice {
                    cost: (option.bytes - least).div_ceil(step) as usize,
                    distortion: option.distortion,
                };
                group.options.iter().map(choice).collect()
            })
            .collect();
        let chosen = knapsack(&choices, (spare / step) as usize).ok_or_else(too_few)?;
        self.of_choices(&chosen)
    }

    /// The same format everywhere; `None` if it is no option of every group.
    pub fn uniform(&self, format: Option<&WeightFormat>) -> Option<PrecisionAllocation> {
        let position =
            |group: &PrecisionGroupOptions| group.options.iter().position(|option| option.format.as_ref() == format);
        let chosen: Option<Vec<usize>> = self.groups.iter().map(position).collect();
        self.of_choices(&chosen?).ok()
    }

    fn of_choices(&self, chosen: &[usize]) -> Result<PrecisionAllocation> {
        let picked: Vec<(&PrecisionGroupOptions, &PrecisionOption)> =
            self.groups.iter().zip(chosen).map(|(group, choice)| (group, &group.options[*choice])).collect();
        let experts: u64 = picked.iter().map(|(_, option)| option.bytes).sum();
        let plain: u64 = self.groups.iter().map(|group| self.plain_bytes(group)).sum();
        let formats = picked.iter().map(|(group, option)| ExpertFormat {
            layer: group.layer,
            experts: group.experts.clone(),
            format: option.format.clone(),
        });
        Ok(PrecisionAllocation {
            formats: ExpertFormats::listed(formats.collect()),
            bytes: self.fixed_bytes + experts,
            bits: 16.0 * experts as f64 / plain.max(1) as f64,
            predicted: self.start.mean + picked.iter().map(|(_, option)| option.distortion).sum::<f64>(),
        })
    }

    /// Bytes of a group in BF16.
    fn plain_bytes(&self, group: &PrecisionGroupOptions) -> u64 {
        group.options.first().map_or(0, |option| option.plain_bytes)
    }
}

impl PrecisionAllocation {
    /// The model in these formats.
    ///
    /// # Errors
    /// Those of [`Quantized::mixed`].
    pub fn on(&self, base: &Arc<Checkpoint>, moments: Option<&InputMoments>) -> Result<Quantized> {
        let first = self.formats.groups().iter().find_map(|group| group.format.clone());
        let options = QuantizeOptions::new(first.unwrap_or(WeightFormat::Fp8Channels));
        Ok(Quantized::mixed(base, &options, &self.formats, moments)?)
    }
}

/// Of several models (such as one pruned to several ratios), the one whose best formats within so many bytes diverge
/// least, and these: bits and units in one knapsack, where all experts have one width. `None` if none is small enough.
pub fn best_allocation(of: &[Sensitivities], keep_bytes: u64) -> Option<(usize, PrecisionAllocation)> {
    let fits = of.iter().enumerate().filter_map(|(index, found)| Some((index, found.allocate(keep_bytes).ok()?)));
    fits.min_by(|(_, a), (_, b)| a.predicted.total_cmp(&b.predicted))
}

/// Shows experts as formats round them.
#[derive(Clone, Debug)]
pub struct RoundedExperts(BTreeMap<(usize, usize), WeightFormat>);

impl RoundedExperts {
    /// These experts, by layer and number, in these formats.
    pub fn new(experts: impl IntoIterator<Item = ((usize, usize), WeightFormat)>) -> Self {
        Self(experts.into_iter().collect())
    }
}

impl ExpertOverlay for RoundedExperts {
    fn apply(&self, layer: usize, expert: usize, mut weights: ExpertWeights) -> moe_core::Result<ExpertWeights> {
        let Some(format) = self.0.get(&(layer, expert)) else { return Ok(weights) };
        let (hidden, width) = (weights.hidden, weights.width);
        weights.gate = format.round(&weights.gate, width, hidden)?;
        weights.up = format.round(&weights.up, width, hidden)?;
        weights.down = format.round(&weights.down, hidden, width)?;
        Ok(weights)
    }
}

//! Super experts: the few whose outputs carry massive activations, and which nothing should touch.

use moe_checkpoint::{ExpertId, MoeShape, Statistics};
use serde::{Deserialize, Serialize};

use crate::statistics::{OUTPUT_FIRST_MAX, OUTPUT_MAX};
use crate::{Error, Result, StatisticId};

/// Which rows of an expert's outputs are looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rows {
    /// All routed tokens: [`OUTPUT_MAX`].
    #[default]
    All,
    /// The first routed token of each sequence: [`OUTPUT_FIRST_MAX`]. The released profiler reads only the first row of
    /// a batch of one sequence.
    First,
}

/// What late layers are left out of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LateLayers {
    /// Thresholds and protection: the released profiler.
    #[default]
    Ignored,
    /// Protection alone; they enter the thresholds. REAP's variant.
    Unprotected,
}

/// How super experts are found. An expert is one if its largest absolute output exceeds *both* the percentile and the
/// fraction of the maximum, and its layer is early enough.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct SuperExpertOptions {
    /// Percentile over experts, 0 to 100, interpolated linearly between ranks; default 99.5.
    pub percentile: f64,
    /// Fraction of the largest value of all experts, 0 to 1; default 0.1.
    pub fraction_of_max: f64,
    /// Round the fraction of the maximum down to a whole number, as the released profiler does; default false.
    pub floor: bool,
    /// Fraction of the decoder layers, from the first, that super experts can be in, rounded half to even; default
    /// 0.75. `None` for all layers, as REAP's "outliers" variant.
    pub layers: Option<f64>,
    /// What later layers are left out of; default [`LateLayers::Ignored`].
    pub late: LateLayers,
    /// Which rows are looked at; default [`Rows::All`].
    pub rows: Rows,
}

impl Default for SuperExpertOptions {
    fn default() -> Self {
        Self {
            percentile: 99.5,
            fraction_of_max: 0.1,
            floor: false,
            layers: Some(0.75),
            late: LateLayers::default(),
            rows: Rows::default(),
        }
    }
}

impl SuperExpertOptions {
    /// The released profiler: first rows, the last quarter of the layers left out of everything, a tenth rounded down.
    pub fn released() -> Self {
        Self { floor: true, rows: Rows::First, ..Self::default() }
    }

    /// REAP's variant: all experts enter the thresholds; only those of the first three quarters are protected.
    pub fn reap() -> Self {
        Self { late: LateLayers::Unprotected, ..Self::default() }
    }

    /// The statistic that must be collected.
    pub fn needs(&self) -> StatisticId {
        match self.rows {
            Rows::All => OUTPUT_MAX,
            Rows::First => OUTPUT_FIRST_MAX,
        }
    }

    fn validate(&self) -> Result<()> {
        let fields = [
            ("percentile", self.percentile, 100.0),
            ("fraction_of_max", self.fraction_of_max, 1.0),
            ("layers", self.layers.unwrap_or(1.0), 1.0),
        ];
        match fields.into_iter().find(|(_, value, limit)| !(0.0..=*limit).contains(value)) {
            None => Ok(()),
            Some((field, value, limit)) => Err(Error::InvalidField {
                scorer: "super_experts".into(),
                field: field.into(),
                reason: format!("found {value}, expected 0 to {limit}"),
            }),
        }
    }
}

/// A super expert and its evidence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SuperExpert {
    /// Decoder layer index.
    pub layer: usize,
    /// Expert index.
    pub expert: usize,
    /// Its largest absolute output.
    pub max: f64,
}

/// The super experts of a model and how they were found: what pruning, merging and quantization leave alone.
///
/// The released profiler puts shared experts into the percentile as well; traces show routed experts only, and so does
/// this.
///
/// Source: "Unveiling Super Experts in Mixture-of-Experts Large Language Models", arXiv 2507.23279, and its variant in
/// the REAP code (arXiv 2510.13999).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SuperExperts {
    /// How they were found.
    pub options: SuperExpertOptions,
    /// The percentile's value.
    pub percentile_value: f64,
    /// The largest value of all experts that enter the thresholds.
    pub max: f64,
    /// The threshold that the fraction of the maximum gives.
    pub fraction_value: f64,
    /// Layers below this decoder layer index can hold super experts.
    pub layers_below: usize,
    /// Fingerprint of the model.
    pub model: String,
    /// The super experts, by layer and expert.
    pub experts: Vec<SuperExpert>,
}

impl SuperExperts {
    /// Finds them. The number of decoder layers is taken as one more than the last MoE layer.
    ///
    /// # Errors
    /// [`Error::InvalidField`] for options out of range, [`Error::MissingStatistic`], [`Error::NoData`] for statistics
    /// of no token or a model without experts that enter the thresholds.
    pub fn find(statistics: &Statistics, options: SuperExpertOptions) -> Result<Self> {
        options.validate()?;
        let id = options.needs();
        if !statistics.contains(id.as_str()) {
            let found: Vec<_> = statistics.ids().collect();
            let found = if found.is_empty() { "none".into() } else { found.join(", ") };
            return Err(Error::MissingStatistic { scorer: "super_experts".into(), id: id.to_string(), found });
        }
        let no_data = |counted| Error::NoData { what: "super experts".into(), counted };
        if statistics.tokens() == 0 {
            return Err(no_data("tokens"));
        }
        let layers_below = layers_below(statistics.shape(), options.layers);
        let mut all = Vec::new();
        for layer in statistics.shape().layers.iter().map(|layer| layer.layer) {
            let values = statistics.expert(id.as_str(), layer)?.iter().enumerate();
            all.extend(values.map(|(expert, max)| SuperExpert { layer, expert, max: *max }));
        }
        if options.late == LateLayers::Ignored {
            all.retain(|expert| expert.layer < layers_below);
        }
        let values: Vec<f64> = all.iter().map(|expert| expert.max).collect();
        let percentile_value = percentile(&values, options.percentile).ok_or_else(|| no_data("experts"))?;
        let max = values.iter().copied().fold(0.0, f64::max);
        let fraction_value = match options.floor {
            true => (options.fraction_of_max * max).floor(),
            false => options.fraction_of_max * max,
        };
        all.retain(|expert| {
            expert.max > percentile_value && expert.max > fraction_value && expert.layer < layers_below
        });
        let model = statistics.provenance().model.clone();
        Ok(Self { options, percentile_value, max, fraction_value, layers_below, model, experts: all })
    }

    /// The experts alone. As JSON `[{"layer":1,"expert":68}]`: a protection mask of whole experts.
    pub fn protected(&self) -> Vec<ExpertId> {
        self.experts.iter().map(|expert| ExpertId { layer: expert.layer, expert: expert.expert }).collect()
    }
}

/// The first decoder layer that is too late.
fn layers_below(shape: &MoeShape, fraction: Option<f64>) -> usize {
    let layers = shape.layers.last().map_or(0, |layer| layer.layer + 1);
    fraction.map_or(layers, |fraction| (fraction * layers as f64).round_ties_even() as usize)
}

/// Linear interpolation between the two ranks around `percent / 100 * (n - 1)`; `None` of nothing.
fn percentile(values: &[f64], percent: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let rank = percent / 100.0 * sorted.len().checked_sub(1)? as f64;
    let below = rank.floor() as usize;
    let (low, high) = (*sorted.get(below)?, *sorted.get(below + 1).or(sorted.last())?);
    Some(low + (high - low) * (rank - below as f64))
}

#[cfg(test)]
mod tests {
    use moe_checkpoint::{Fold, MoeLayerShape, Provenance};
    use proptest::prelude::*;

    use super::*;

    /// Maxima of 8 layers of 32 experts between 1 and 2, with some of (layer, expert, value) planted.
    fn statistics(planted: &[(usize, usize, f64)], seed: u64) -> Statistics {
        let layers = (0..8).map(|layer| MoeLayerShape { layer, widths: vec![4; 32] }).collect();
        let shape = MoeShape { gateless: false, hidden_size: 4, top_k: 2, layers };
        let mut statistics = Statistics::new(&shape, Provenance::new("model", "data", "{}"));
        statistics.add_counts(100, 1, 99);
        for layer in 0..8 {
            for id in [OUTPUT_MAX, OUTPUT_FIRST_MAX] {
                let values = statistics.expert_mut(id.as_str(), Fold::Max, layer).unwrap();
                for (e, value) in values.iter_mut().enumerate() {
                    let hash = (seed + (layer * 32 + e) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
                    *value = 1.0 + hash as f64 / (1 << 24) as f64;
                }
                for (_, expert, value) in planted.iter().filter(|(l, ..)| *l == layer) {
                    values[*expert] = *value;
                }
            }
        }
        statistics
    }

    fn found(statistics: &Statistics, options: SuperExpertOptions) -> Vec<(usize, usize)> {
        let found = SuperExperts::find(statistics, options).unwrap();
        found.protected().into_iter().map(|id| (id.layer, id.expert)).collect()
    }

    proptest! {
        #[test]
        fn planted_super_experts_are_found_in_early_layers_alone(
            seed in 0u64..1000, early in 0usize..6, late in 6usize..8, expert in 0usize..32, size in 30.0f64..1000.0,
        ) {
            let planted = statistics(&[(early, expert, size), (late, expert, size)], seed);
            for options in [SuperExpertOptions::default(), SuperExpertOptions::released(), SuperExpertOptions::reap()] {
                prop_assert_eq!(found(&planted, options), vec![(early, expert)]);
            }
            let anywhere = SuperExpertOptions { layers: None, ..SuperExpertOptions::default() };
            prop_assert_eq!(found(&planted, anywhere), vec![(early, expert), (late, expert)]);
        }

        #[test]
        fn protection_follows_the_experts(
            seed in 0u64..1000, order in Just((0..32).collect::<Vec<usize>>()).prop_shuffle(), expert in 0usize..32,
        ) {
            let before = statistics(&[(2, expert, 50.0)], seed);
            let mut after = before.clone();
            for layer in 0..8 {
                let values = before.expert(OUTPUT_MAX.as_str(), layer).unwrap();
                let permuted: Vec<f64> = order.iter().map(|from| values[*from]).collect();
                after.expert_mut(OUTPUT_MAX.as_str(), Fold::Max, layer).unwrap().copy_from_slice(&permuted);
            }
            let moved = order.iter().position(|from| *from == expert).unwrap();
            prop_assert_eq!(found(&before, SuperExpertOptions::default()), vec![(2, expert)]);
            prop_assert_eq!(found(&after, SuperExpertOptions::default()), vec![(2, moved)]);
        }
    }

    #[test]
    fn without_outliers_a_percentile_protects_few_and_the_maximum_rule_is_what_limits_outliers() {
        // 99.5 per cent of 192 experts: at most one is above.
        assert!(found(&statistics(&[], 3), SuperExpertOptions::default()).len() <= 1);
        // One giant, and one that the percentile alone would keep.
        let planted = statistics(&[(0, 1, 1000.0), (1, 2, 90.0)], 3);
        let options = SuperExpertOptions { percentile: 90.0, ..SuperExpertOptions::default() };
        assert_eq!(found(&planted, options), [(0, 1)]);
        let all = SuperExpertOptions { fraction_of_max: 0.0, ..options };
        assert!(found(&planted, all).contains(&(1, 2)) && found(&planted, all).len() == 20);
    }

    #[test]
    fn late_layers_raise_the_thresholds_only_if_they_are_not_ignored() {
        let planted = statistics(&[(0, 1, 50.0), (7, 0, 1000.0)], 1);
        assert_eq!(found(&planted, SuperExpertOptions::default()), [(0, 1)]);
        assert!(found(&planted, SuperExpertOptions::reap()).is_empty());
    }

    #[test]
    fn the_report_is_json_and_its_mask_is_that_of_a_plan() {
        let report = SuperExperts::find(&statistics(&[(1, 6, 99.0)], 1), SuperExpertOptions::released()).unwrap();
        assert_eq!((report.max, report.fraction_value, report.layers_below), (99.0, 9.0, 6));
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<SuperExperts>(&json).unwrap(), report);
        assert_eq!(serde_json::to_string(&report.protected()).unwrap(), r#"[{"layer":1,"expert":6}]"#);
    }

    #[test]
    fn what_cannot_be_found_is_named() {
        let statistics = statistics(&[], 1);
        let error = |options| SuperExperts::find(&statistics, options).unwrap_err().to_string();
        let wrong = SuperExpertOptions { percentile: 101.0, ..SuperExpertOptions::default() };
        assert!(error(wrong).contains("field `percentile`: found 101, expected 0 to 100"));
        let none = SuperExpertOptions { layers: Some(0.0), ..SuperExpertOptions::default() };
        assert!(error(none).contains("found 0 experts"));
        let empty = Statistics::new(statistics.shape(), statistics.provenance().clone());
        let error = SuperExperts::find(&empty, SuperExpertOptions::default()).unwrap_err();
        assert!(matches!(error, Error::MissingStatistic { id, .. } if id == "output.max"));
        let json = serde_json::from_str::<SuperExpertOptions>(r#"{"percent": 99}"#).unwrap_err().to_string();
        assert!(json.contains("unknown field `percent`"), "{json}");
    }

    #[test]
    fn percentiles_are_interpolated_between_ranks() {
        assert_eq!(percentile(&[3.0, 1.0, 2.0, 4.0], 50.0), Some(2.5));
        assert_eq!(percentile(&[3.0, 1.0], 100.0), Some(3.0));
        assert_eq!(percentile(&[7.0], 99.5), Some(7.0));
        assert_eq!(percentile(&[], 99.5), None);
    }
}

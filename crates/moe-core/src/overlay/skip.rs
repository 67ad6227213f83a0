//! Dynamic expert skipping: tokens leave out experts that weigh little beside their best one.

use std::collections::BTreeMap;

use super::RoutingOverlay;
use crate::{
    error::{Error, Result},
    router::Routed,
    trace::{LayerTrace, Observer, Signals},
};

/// Skips expert i of a token when `w_i < beta * w_1`, with `w_1` its largest routing weight and a `beta` per layer
/// (NAEE, arXiv 2402.14800 section 3.3, there for two experts per token). The best expert always stays.
#[derive(Clone, Debug, PartialEq)]
pub struct SkipExperts {
    /// Threshold of each layer; layers without one skip nothing.
    pub beta: BTreeMap<usize, f32>,
    /// Whether the weights that stay are scaled so that a token's weights keep their sum. As NAEE's code does, which
    /// divides by the remaining sum; turn it off for models whose rule does not normalize the weights.
    pub renormalize: bool,
}

impl SkipExperts {
    /// Skips with these thresholds and scales what stays.
    pub fn new(beta: BTreeMap<usize, f32>) -> Self {
        Self { beta, renormalize: true }
    }

    /// Sums of a token's weights before and after, if they differ and are to be made equal.
    fn sums(&self, before: &[f32], stays: impl Fn(usize) -> bool) -> Option<(f32, f32)> {
        let kept: f32 = (0..before.len()).filter(|&i| stays(i)).map(|i| before[i]).sum();
        let all: f32 = before.iter().sum();
        (self.renormalize && kept > 0.0 && kept < all).then_some((all, kept))
    }
}

impl RoutingOverlay for SkipExperts {
    fn routed(&self, layer: usize, routed: &mut Routed) {
        let Some(beta) = self.beta.get(&layer) else { return };
        for weights in routed.weights.chunks_exact_mut(routed.top_k.max(1)) {
            let largest = largest(weights);
            let before = weights.to_vec();
            let stays = |i: usize| before[i] >= beta * largest;
            let factor = self.sums(&before, stays).map_or(1.0, |(all, kept)| all / kept);
            for (i, weight) in weights.iter_mut().enumerate() {
                *weight = if stays(i) { *weight * factor } else { 0.0 };
            }
        }
    }

    fn routed_backward(&self, layer: usize, before: &Routed, after: &Routed, d_weights: &mut [f32]) {
        if !self.beta.contains_key(&layer) {
            return;
        }
        let k = before.top_k.max(1);
        let tokens = before.weights.chunks_exact(k).zip(after.weights.chunks_exact(k));
        for ((before, after), d) in tokens.zip(d_weights.chunks_exact_mut(k)) {
            let stays = |i: usize| after[i] != 0.0;
            // after_i = before_i * all / kept for those that stay
            let (all, kept) = self.sums(before, stays).unwrap_or((1.0, 1.0));
            let inner: f32 = (0..d.len()).filter(|&i| stays(i)).map(|i| d[i] * before[i]).sum();
            let changed = kept != all;
            for (i, d) in d.iter_mut().enumerate() {
                let own = if stays(i) { *d * all / kept } else { 0.0 };
                let through_all = if changed { inner / kept } else { 0.0 };
                let through_kept = if changed && stays(i) { inner * all / (kept * kept) } else { 0.0 };
                *d = own + through_all - through_kept;
            }
        }
    }
}

fn largest(weights: &[f32]) -> f32 {
    weights.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Finds the thresholds of [`SkipExperts`]: per layer the median over the calibration tokens of the smallest routing
/// weight of a token divided by its largest. With two experts per token, that is NAEE's rule, and half of the tokens
/// skip their second expert.
///
/// It keeps a ratio for every expert of a token but its best, `4 (k - 1)` bytes per token and layer, so that other
/// shares than a half are exact, too.
#[derive(Clone, Debug, Default)]
pub struct SkipCalibration {
    layers: BTreeMap<usize, Ratios>,
}

/// `w_i / w_1` of the experts of each token but its best, descending.
#[derive(Clone, Debug, Default)]
struct Ratios {
    per_token: usize,
    values: Vec<f32>,
}

impl SkipCalibration {
    /// Has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Per layer the median over tokens of `w_k / w_1`, the mean of the middle two for an even number. Layers of which
    /// every token has one expert are absent.
    pub fn medians(&self) -> BTreeMap<usize, f32> {
        let layers = self.layers.iter().filter(|(_, ratios)| !ratios.values.is_empty());
        layers.map(|(&layer, ratios)| (layer, median(ratios.last_of_each()))).collect()
    }

    /// Per layer the largest threshold that skips at most this share of all (token, expert) pairs beyond the best of
    /// each token.
    ///
    /// # Errors
    /// [`Error::Input`] for a share outside [0, 1].
    pub fn skipping(&self, share: f64) -> Result<BTreeMap<usize, f32>> {
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::input("share of experts to skip", share, "a number in [0, 1]"));
        }
        let layers = self.layers.iter().filter(|(_, ratios)| !ratios.values.is_empty());
        Ok(layers
            .map(|(&layer, ratios)| {
                let mut sorted = ratios.values.clone();
                sorted.sort_by(f32::total_cmp);
                let skipped = (share * sorted.len() as f64).floor() as usize;
                // ratios equal to the threshold stay
                let beta = sorted.get(skipped).copied().unwrap_or_else(|| sorted[sorted.len() - 1].next_up());
                (layer, beta)
            })
            .collect())
    }

    /// Share of the (token, expert) pairs seen in a layer that thresholds of `beta` skip; pairs of a token's best
    /// expert count, too.
    pub fn share_skipped(&self, layer: usize, beta: f32) -> f64 {
        let Some(ratios) = self.layers.get(&layer).filter(|ratios| !ratios.values.is_empty()) else { return 0.0 };
        let pairs = ratios.values.len() / ratios.per_token * (ratios.per_token + 1);
        ratios.values.iter().filter(|ratio| **ratio < beta).count() as f64 / pairs as f64
    }
}

impl Ratios {
    fn last_of_each(&self) -> Vec<f32> {
        self.values.iter().copied().skip(self.per_token - 1).step_by(self.per_token).collect()
    }
}

impl Observer for SkipCalibration {
    fn needs(&self) -> Signals {
        Signals::ROUTING
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        let ratios = self.layers.entry(trace.layer).or_default();
        ratios.per_token = trace.top_k.saturating_sub(1);
        for weights in trace.weights.chunks_exact(trace.top_k.max(1)) {
            let mut sorted = weights.to_vec();
            sorted.sort_by(|a, b| b.total_cmp(a));
            // a token whose weights are all zero prefers no expert
            ratios.values.extend(sorted.iter().skip(1).map(|w| if sorted[0] > 0.0 { w / sorted[0] } else { 1.0 }));
        }
        Ok(())
    }
}

fn median(mut values: Vec<f32>) -> f32 {
    values.sort_by(f32::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::WaveInfo;

    fn routed(weights: &[f32], top_k: usize) -> Routed {
        let selected = (0..weights.len()).map(|slot| (slot % top_k) as u32).collect();
        Routed { experts: top_k, top_k, selected, weights: weights.to_vec() }
    }

    fn seen(tokens: &[[f32; 3]]) -> SkipCalibration {
        let weights: Vec<f32> = tokens.iter().flatten().copied().collect();
        let wave = WaveInfo { id: 0, tokens: tokens.len(), ids: Vec::new(), sequences: Vec::new() };
        let selected: Vec<u32> = (0..weights.len()).map(|i| (i % 3) as u32).collect();
        let mut calibration = SkipCalibration::new();
        let trace = LayerTrace {
            layer: 4,
            wave: &wave,
            experts: 3,
            top_k: 3,
            logits: &weights,
            selected: &selected,
            weights: &weights,
            scale: 1.0,
            idle: &[],
        };
        calibration.layer(&trace).unwrap();
        calibration
    }

    #[test]
    fn the_median_of_the_last_ratio_is_the_threshold() {
        // w_3 / w_1: 0.2, 0.5, 0.1 and 0.25
        let tokens = [[0.5, 0.4, 0.1], [0.4, 0.4, 0.2], [0.6, 0.34, 0.06], [0.4, 0.3, 0.1]];
        assert_eq!(seen(&tokens[..3]).medians(), BTreeMap::from([(4, 0.2)]));
        let calibration = seen(&tokens);
        assert!((calibration.medians()[&4] - 0.225).abs() < 1e-6);
        // 8 pairs beside the best ones: 0.1, 0.2, 0.25, 0.5, 0.5667, 0.75, 0.8, 1
        assert!((calibration.skipping(0.5).unwrap()[&4] - 0.34 / 0.6).abs() < 1e-6);
        assert_eq!(calibration.share_skipped(4, 0.225), 2.0 / 12.0);
        assert_eq!(calibration.share_skipped(4, calibration.skipping(1.0).unwrap()[&4]), 8.0 / 12.0);
        assert!(calibration.skipping(1.5).unwrap_err().to_string().contains("1.5"));
    }

    #[test]
    fn experts_far_below_the_best_are_skipped() {
        let mut skip = SkipExperts::new(BTreeMap::from([(2, 0.5)]));
        let mut found = routed(&[0.6, 0.3, 0.1, 0.5, 0.24, 0.26], 3);
        skip.routed(2, &mut found);
        let expected = [0.6 / 0.9, 0.3 / 0.9, 0.0, 0.5 / 0.76, 0.0, 0.26 / 0.76];
        assert!(found.weights.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{:?}", found.weights);
        skip.renormalize = false;
        let mut found = routed(&[0.6, 0.3, 0.1], 3);
        skip.routed(1, &mut found);
        assert_eq!(found.weights, [0.6, 0.3, 0.1]);
        skip.routed(2, &mut found);
        assert_eq!(found.weights, [0.6, 0.3, 0.0]);
    }

    #[test]
    fn the_gradient_through_skipping_matches_a_difference_quotient() {
        let d = [0.7f32, -1.3, 0.4];
        let start = [0.55f32, 0.35, 0.15];
        for renormalize in [true, false] {
            let skip = SkipExperts { beta: BTreeMap::from([(0, 0.5)]), renormalize };
            let value = |weights: &[f32]| {
                let mut after = routed(weights, 3);
                skip.routed(0, &mut after);
                after.weights.iter().zip(d).map(|(w, d)| f64::from(*w) * f64::from(d)).sum::<f64>()
            };
            let before = routed(&start, 3);
            let mut after = before.clone();
            skip.routed(0, &mut after);
            let mut gradient = d;
            skip.routed_backward(0, &before, &after, &mut gradient);
            for i in 0..3 {
                let moved = |h: f32| {
                    let mut weights = start;
                    weights[i] += h;
                    value(&weights)
                };
                let numeric = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                assert!((numeric - f64::from(gradient[i])).abs() < 1e-3, "{i}: {numeric} {}", gradient[i]);
            }
        }
    }
}

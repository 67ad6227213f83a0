//! What the tokens of a wave did at a router, and losses that are functions of their shares.
//!
//! A loss says its gradient with respect to the share `p_te` of every expert in the scores of a token; that with
//! respect to the logits follows: `d loss / d z_te = p_te s_te (g_te - sum_j p_tj g_tj)`, with `s_te` the derivative of
//! the logarithm of an expert's score (1 for a softmax). How many tokens go to an expert is a constant of every
//! gradient.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What the tokens of a wave did at a router: T tokens, E experts.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub experts: usize,
    /// Share of every expert in the scores of every token `[T, E]`.
    pub shares: Vec<f64>,
    /// Times that the tokens of each sequence went to each expert `[S, E]`.
    pub counts: Vec<f64>,
    /// Tokens of each sequence.
    pub sequences: Vec<Range<usize>>,
}

impl Seen {
    fn tokens(&self) -> f64 {
        (self.shares.len() / self.experts.max(1)).max(1) as f64
    }

    /// Mean shares `[E]` of some tokens.
    fn mean(&self, tokens: Range<usize>) -> Vec<f64> {
        let n = tokens.len().max(1) as f64;
        let mut mean = vec![0.0; self.experts];
        for row in self.shares[tokens.start * self.experts..tokens.end * self.experts].chunks_exact(self.experts) {
            mean.iter_mut().zip(row).for_each(|(sum, p)| *sum += p / n);
        }
        mean
    }

    fn all(&self) -> Range<usize> {
        0..self.shares.len() / self.experts.max(1)
    }

    /// Times that all tokens went to each expert `[E]`.
    fn loads(&self) -> Vec<f64> {
        let mut loads = vec![0.0; self.experts];
        for row in self.counts.chunks_exact(self.experts) {
            loads.iter_mut().zip(row).for_each(|(sum, n)| *sum += n);
        }
        loads
    }
}

/// Losses on the shares of a layer's experts, each by its coefficient of 0 or more; none by default. All are sums over
/// the layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShareLosses {
    /// Entropy of a token's shares, mean over tokens: sharp routing, of which dynamic top-p (arXiv 2403.07652) needs
    /// few experts.
    pub entropy: Option<f64>,
    /// `-(H(mean shares) - mean H(shares))`: the mutual information of tokens and experts (ModuleFormer, arXiv
    /// 2306.04640), balanced over all and decided for each. `-log E` at best, 0 where all tokens route alike.
    pub mutual_information: Option<f64>,
    /// `H(mean shares)`: few experts stay in use. ModuleFormer names such a loss for fine-tuning and releases none;
    /// this form is ours.
    pub concentration: Option<f64>,
    /// Squared coefficient of variation of the experts' summed shares (arXiv 1701.06538): 0 at balance.
    pub variation: Option<f64>,
    /// DeepSeek's balance within each sequence, mean over sequences (arXiv 2405.04434): the coefficient at balance.
    pub sequence_balance: Option<f64>,
    /// DeepSeekMoE's balance over groups of experts that share a device (arXiv 2401.06066, equation 15).
    pub device_balance: Option<DeviceBalance>,
    /// Squared distance of the shares of neighboring tokens of a sequence, mean over pairs: smooth routing, as GNT-MOVE
    /// (arXiv 2308.11793) asks for of neighboring points. That it is squared and over all experts is inferred.
    pub smoothness: Option<f64>,
}

/// Balance over groups of experts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceBalance {
    /// Its factor, the loss at balance.
    pub coefficient: f64,
    /// Groups of as many consecutive experts.
    pub devices: usize,
}

impl ShareLosses {
    /// Whether there are none.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    fn named(&self) -> [(&'static str, Option<f64>); 7] {
        [
            ("entropy", self.entropy),
            ("mutual_information", self.mutual_information),
            ("concentration", self.concentration),
            ("variation", self.variation),
            ("sequence_balance", self.sequence_balance),
            ("device_balance", self.device_balance.map(|balance| balance.coefficient)),
            ("smoothness", self.smoothness),
        ]
    }

    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        for (field, value) in self.named() {
            if let Some(value) = value.filter(|value| !(*value >= 0.0 && value.is_finite())) {
                return Err(Error::input(field, value, "a finite number of 0 or more"));
            }
        }
        Ok(())
    }

    /// Refuses groups that the experts of a layer do not form.
    pub(super) fn fits(&self, layer: usize, experts: usize) -> Result<()> {
        match self.device_balance {
            Some(DeviceBalance { devices, .. }) if devices == 0 || !experts.is_multiple_of(devices) => {
                Err(Error::input("devices", devices, format!("a divisor of the {experts} experts of layer {layer}")))
            }
            _ => Ok(()),
        }
    }

    /// The losses of a layer by name, coefficients included.
    pub(super) fn values(&self, seen: &Seen) -> Vec<(&'static str, f64)> {
        let mut found = Vec::new();
        let mut add = |name, coefficient: Option<f64>, value: &dyn Fn() -> f64| {
            found.extend(coefficient.map(|c| (name, c * value())));
        };
        let rows = || seen.shares.chunks_exact(seen.experts);
        let mean_entropy = || rows().map(entropy).sum::<f64>() / seen.tokens();
        add("router_entropy", self.entropy, &mean_entropy);
        add("router_mutual_information", self.mutual_information, &|| {
            mean_entropy() - smoothed_entropy(&seen.mean(seen.all()))
        });
        add("router_concentration", self.concentration, &|| entropy(&seen.mean(seen.all())));
        add("router_variation", self.variation, &|| {
            let sums = seen.mean(seen.all());
            let total: f64 = sums.iter().sum();
            sums.len() as f64 * sums.iter().map(|s| s * s).sum::<f64>() / (total * total) - 1.0
        });
        add("router_sequence_balance", self.sequence_balance, &|| {
            let parts = seen.sequences.iter().enumerate().map(|(s, rows)| {
                let loads = sequence_loads(seen, s);
                loads.iter().zip(seen.mean(rows.clone())).map(|(f, p)| f * p).sum::<f64>()
            });
            parts.sum::<f64>() / seen.sequences.len().max(1) as f64
        });
        add("router_device_balance", self.device_balance.map(|balance| balance.coefficient), &|| {
            device_loads(seen, self.devices()).iter().zip(seen.mean(seen.all())).map(|(f, p)| f * p).sum()
        });
        add("router_smoothness", self.smoothness, &|| {
            let pairs = neighbors(seen);
            let n = pairs.len().max(1) as f64;
            let square = |t: usize| -> f64 {
                let (a, b) = (row(seen, t), row(seen, t + 1));
                a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
            };
            pairs.into_iter().map(square).sum::<f64>() / n
        });
        found
    }

    fn devices(&self) -> usize {
        self.device_balance.map_or(1, |balance| balance.devices)
    }

    /// The gradient of their sum with respect to the shares `[T, E]`.
    pub(super) fn gradient(&self, seen: &Seen) -> Vec<f64> {
        let (experts, tokens) = (seen.experts, seen.tokens());
        let mut out = vec![0.0; seen.shares.len()];
        let log = |p: f64| p.max(f64::MIN_POSITIVE).ln();
        if let Some(c) = self.entropy.into_iter().chain(self.mutual_information).reduce(|a, b| a + b) {
            out.iter_mut().zip(&seen.shares).for_each(|(d, p)| *d -= c / tokens * (log(*p) + 1.0));
        }
        // what is the same for all tokens
        let mut same = vec![0.0; experts];
        let mean = seen.mean(seen.all());
        if let Some(c) = self.mutual_information {
            same.iter_mut().zip(&mean).for_each(|(d, p)| *d += c / tokens * ((p + EPS).ln() + p / (p + EPS)));
        }
        if let Some(c) = self.concentration {
            same.iter_mut().zip(&mean).for_each(|(d, p)| *d -= c / tokens * (log(*p) + 1.0));
        }
        if let Some(c) = self.variation {
            let (total, squares): (f64, f64) = (mean.iter().sum(), mean.iter().map(|p| p * p).sum());
            let n = experts as f64;
            let slope = |p: &f64| 2.0 * n * (p / total.powi(2) - squares / total.powi(3));
            same.iter_mut().zip(&mean).for_each(|(d, p)| *d += c / tokens * slope(p));
        }
        if let Some(DeviceBalance { coefficient, devices }) = self.device_balance {
            let loads = device_loads(seen, devices);
            same.iter_mut().zip(loads).for_each(|(d, f)| *d += coefficient / tokens * f);
        }
        out.chunks_exact_mut(experts).for_each(|row| row.iter_mut().zip(&same).for_each(|(d, s)| *d += s));
        if let Some(c) = self.sequence_balance {
            for (s, rows) in seen.sequences.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
                let factor = c / (seen.sequences.len() * rows.len()) as f64;
                let loads = sequence_loads(seen, s);
                for row in out[rows.start * experts..rows.end * experts].chunks_exact_mut(experts) {
                    row.iter_mut().zip(&loads).for_each(|(d, f)| *d += factor * f);
                }
            }
        }
        if let Some(c) = self.smoothness {
            let pairs = neighbors(seen);
            let factor = 2.0 * c / pairs.len().max(1) as f64;
            for t in pairs {
                for e in 0..experts {
                    let difference = factor * (seen.shares[t * experts + e] - seen.shares[(t + 1) * experts + e]);
                    out[t * experts + e] += difference;
                    out[(t + 1) * experts + e] -= difference;
                }
            }
        }
        out
    }
}

/// ModuleFormer's, inside the logarithm of the mean shares alone.
const EPS: f64 = 1e-8;

fn entropy(shares: &[f64]) -> f64 {
    -shares.iter().filter(|p| **p > 0.0).map(|p| p * p.ln()).sum::<f64>()
}

fn smoothed_entropy(shares: &[f64]) -> f64 {
    -shares.iter().map(|p| p * (p + EPS).ln()).sum::<f64>()
}

fn row(seen: &Seen, token: usize) -> &[f64] {
    &seen.shares[token * seen.experts..(token + 1) * seen.experts]
}

/// First tokens of the pairs of neighbors.
fn neighbors(seen: &Seen) -> Vec<usize> {
    seen.sequences.iter().flat_map(|rows| rows.start..rows.end.saturating_sub(1).max(rows.start)).collect()
}

/// `E n_e / (k T)` of a sequence: 1 for all experts at balance.
fn sequence_loads(seen: &Seen, sequence: usize) -> Vec<f64> {
    let counts = &seen.counts[sequence * seen.experts..(sequence + 1) * seen.experts];
    normalized(counts, seen)
}

fn normalized(counts: &[f64], seen: &Seen) -> Vec<f64> {
    let total: f64 = counts.iter().sum();
    counts.iter().map(|n| n * seen.experts as f64 / total.max(1.0)).collect()
}

/// For every expert, the mean load of the experts of its group: `f'_d`, which multiplies the share of each of them.
fn device_loads(seen: &Seen, devices: usize) -> Vec<f64> {
    let loads = normalized(&seen.loads(), seen);
    let size = (seen.experts / devices.max(1)).max(1);
    let mean = |group: &[f64]| group.iter().sum::<f64>() / group.len() as f64;
    loads.chunks(size).flat_map(|group| std::iter::repeat_n(mean(group), group.len())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shares, with the two best experts chosen.
    fn seen(shares: Vec<f64>, experts: usize, sequences: Vec<Range<usize>>) -> Seen {
        let mut counts = vec![0.0; sequences.len() * experts];
        for (s, rows) in sequences.iter().enumerate() {
            for row in shares[rows.start * experts..rows.end * experts].chunks_exact(experts) {
                let mut order: Vec<usize> = (0..experts).collect();
                order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
                order[..2].iter().for_each(|e| counts[s * experts + e] += 1.0);
            }
        }
        Seen { experts, shares, counts, sequences }
    }

    fn softmax(logits: &[f64], experts: usize) -> Vec<f64> {
        let row = |row: &[f64]| {
            let sum: f64 = row.iter().map(|z| z.exp()).sum();
            row.iter().map(move |z| z.exp() / sum).collect::<Vec<_>>()
        };
        logits.chunks(experts).flat_map(row).collect()
    }

    fn each() -> Vec<ShareLosses> {
        let none = ShareLosses::default();
        vec![
            ShareLosses { entropy: Some(0.7), ..none },
            ShareLosses { mutual_information: Some(0.7), ..none },
            ShareLosses { concentration: Some(0.7), ..none },
            ShareLosses { variation: Some(0.7), ..none },
            ShareLosses { sequence_balance: Some(0.7), ..none },
            ShareLosses { device_balance: Some(DeviceBalance { coefficient: 0.7, devices: 3 }), ..none },
            ShareLosses { smoothness: Some(0.7), ..none },
        ]
    }

    #[test]
    fn gradients_match_difference_quotients_with_the_choice_held() {
        let (experts, sequences) = (6, vec![0..4, 4..9]);
        let logits: Vec<f64> = (0..54).map(|i| (f64::from(i) * 1.7).sin() * 1.5).collect();
        let fixed = seen(softmax(&logits, experts), experts, sequences);
        for losses in each() {
            let value = |logits: &[f64]| -> f64 {
                let at = Seen { shares: softmax(logits, experts), ..fixed.clone() };
                losses.values(&at).iter().map(|(_, value)| value).sum()
            };
            let g = losses.gradient(&fixed);
            for i in 0..logits.len() {
                let t = i / experts;
                let p = row(&fixed, t);
                let inner: f64 = p.iter().zip(&g[t * experts..]).map(|(p, g)| p * g).sum();
                let analytic = fixed.shares[i] * (g[i] - inner);
                let moved = |h: f64| {
                    let mut logits = logits.clone();
                    logits[i] += h;
                    value(&logits)
                };
                let numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!((numeric - analytic).abs() < 1e-7, "{losses:?} {i}: {numeric} {analytic}");
            }
        }
    }

    #[test]
    fn at_balance_and_at_collapse_every_loss_has_its_value() {
        let value = |losses: &ShareLosses, seen: &Seen| losses.values(seen)[0].1;
        let losses = each();
        // six tokens, each wholly for its own expert
        let mut one_hot = vec![0.0; 36];
        (0..6).for_each(|t| one_hot[t * 6 + t] = 1.0);
        let balanced = seen(one_hot, 6, std::iter::once(0..6).collect());
        assert_eq!(value(&losses[0], &balanced), 0.0);
        assert!((value(&losses[1], &balanced) + 0.7 * 6f64.ln()).abs() < 1e-6);
        assert!((value(&losses[2], &balanced) - 0.7 * 6f64.ln()).abs() < 1e-9);
        assert!(value(&losses[3], &balanced).abs() < 1e-12);
        // all alike: no information, whatever the shares
        let alike = seen([0.5, 0.2, 0.1, 0.1, 0.05, 0.05].repeat(5), 6, std::iter::once(0..5).collect());
        assert!(value(&losses[1], &alike).abs() < 1e-6);
        assert_eq!(value(&losses[6], &alike), 0.0);
        // uniform shares, choices in turn
        let mut uniform = seen(vec![1.0 / 6.0; 36], 6, vec![0..3, 3..6]);
        uniform.counts = vec![1.0; 12];
        for losses in &losses[4..6] {
            assert!((value(losses, &uniform) - 0.7).abs() < 1e-9, "{losses:?}");
        }
        // everything to two experts of one device: E / k times, and three devices' worth
        let collapsed = seen([0.5, 0.5, 0.0, 0.0, 0.0, 0.0].repeat(4), 6, std::iter::once(0..4).collect());
        assert!((value(&losses[4], &collapsed) - 0.7 * 3.0).abs() < 1e-9);
        assert!((value(&losses[5], &collapsed) - 0.7 * 3.0).abs() < 1e-9);
        assert!((value(&losses[3], &collapsed) - 0.7 * 2.0).abs() < 1e-9);
    }

    #[test]
    fn a_device_of_one_expert_is_plain_balance_and_wrong_groups_are_refused() {
        let seen = seen(
            softmax(&(0..24).map(|i| (f64::from(i) * 0.9).cos()).collect::<Vec<_>>(), 6),
            6,
            std::iter::once(0..4).collect(),
        );
        let of = |devices| ShareLosses {
            device_balance: Some(DeviceBalance { coefficient: 1.0, devices }),
            ..ShareLosses::default()
        };
        let whole = ShareLosses { sequence_balance: Some(1.0), ..ShareLosses::default() };
        assert!((of(6).values(&seen)[0].1 - whole.values(&seen)[0].1).abs() < 1e-12);
        let error = of(4).fits(3, 6).unwrap_err().to_string();
        assert!(error.contains("devices: found 4, expected a divisor of the 6 experts of layer 3"), "{error}");
        let error = ShareLosses { entropy: Some(-1.0), ..ShareLosses::default() }.validate().unwrap_err().to_string();
        assert!(error.contains("entropy: found -1"), "{error}");
    }
}

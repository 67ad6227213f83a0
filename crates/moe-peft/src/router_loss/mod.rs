//! Losses on router logits beside the objective: load balance and z-loss.
//!
//! For a wave of T tokens (there is no padding), E experts and k experts per token, with `p_te` the share of expert e
//! in the scores of token t (softmax; for sigmoid routing the sigmoid divided by the sum of them) and `P_e` its mean
//! over the tokens:
//!
//! * balance, Switch Transformers' form (arXiv 2101.03961, equations 4 to 6; Mixtral's): `a E sum_e f_e P_e`, `f_e` the
//!   share of tokens that go to expert e. It is `a k` at perfect balance;
//! * balance, normalized: `f_e` divided by k, so that it is `a` at perfect balance;
//! * z-loss (ST-MoE, arXiv 2202.08906, equation 5): `b mean_t (log sum_e exp z_te)^2`, summed over the layers.
//!
//! A balance loss counts [over the whole model](BalanceScope::Model), as `load_balancing_loss_func` of Hugging Face's
//! transformers does: the routers of all layers are concatenated as if they were one with L T tokens, so that layers
//! may be uneven where others make up for it. Or it is [the sum of those of the layers](BalanceScope::Layer), which is
//! larger by a factor of about L, and more where layers are uneven. A coefficient belongs to its scope. `f_e` is a
//! constant of the gradient. The losses stand beside the mean loss per predicted token, so that their gradients are
//! multiplied by the predicted tokens of the wave. [`ShareLosses`] are the others by their names: entropy, mutual
//! information, coefficient of variation, balance within sequences and over devices, smoothness.

mod shares;
mod targets;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use moe_checkpoint::RoutingKind;
use moe_core::{
    Model,
    adapters::RouterAdapter,
    trace::{LayerTrace, WaveInfo},
};
use serde::{Deserialize, Serialize};

use shares::Seen;
pub use shares::{DeviceBalance, ShareLosses};
pub use targets::{RouterTargetTuning, RouterTargets};

use crate::{AdapterSet, Artifacts, Error, Installed, Result, Setting, SweepListener, TuningMethod};

/// What the coefficient of a balance loss is multiplied by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BalanceForm {
    /// A loss that is the number of experts per token at perfect balance: Switch, Mixtral, Qwen.
    #[default]
    Switch,
    /// A loss that is 1 at perfect balance: counts are divided by tokens times experts per token.
    Normalized,
}

/// Which routers a balance loss counts together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BalanceScope {
    /// All of the model, as one router with the tokens of all layers: what Hugging Face's transformers compute.
    #[default]
    Model,
    /// Each layer by itself; the losses of the layers are added up.
    Layer,
}

/// A balance loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalanceLoss {
    /// Its factor, for the given form and scope; 0 or more. `router_aux_loss_coef` of most configurations is 0.001 to
    /// 0.01, for the default ones.
    pub coefficient: f64,
    /// Which form.
    #[serde(default)]
    pub form: BalanceForm,
    /// Over the whole model, or layer by layer.
    #[serde(default)]
    pub over: BalanceScope,
}

/// Losses on the routers of all MoE layers. None by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterLosses {
    /// Load balance.
    pub balance: Option<BalanceLoss>,
    /// Factor of the z-loss; 0 or more. ST-MoE's is 0.001.
    pub z: Option<f64>,
    /// Losses on the shares of experts.
    #[serde(skip_serializing_if = "ShareLosses::is_none")]
    pub shares: ShareLosses,
}

/// Mean losses per wave of a layer, coefficients included. Those of all layers sum to the losses of the model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LayerLosses {
    /// Of the balance loss; over the whole model, the layer's part of it.
    pub balance: f64,
    /// Of the z-loss.
    pub z: f64,
    /// Waves seen.
    pub waves: u64,
}

/// What the losses were.
#[derive(Debug, Default)]
pub struct RouterLossReport {
    losses: RouterLosses,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The wave that is running, or ran last.
    wave: BTreeMap<usize, LayerSums>,
    /// Whether it is among the sums below.
    settled: bool,
    sums: BTreeMap<usize, LayerLosses>,
}

/// What the tokens of a wave did at a router.
#[derive(Clone, Debug, Default)]
struct LayerSums {
    tokens: f64,
    /// Choices of each expert.
    counts: Vec<f64>,
    /// Sum over the tokens of each expert's share.
    shares: Vec<f64>,
    /// Sum over the tokens of the squared `log sum exp`.
    z: f64,
    /// What losses on shares look at, where there are any.
    seen: Option<Seen>,
}

impl RouterLossReport {
    /// Mean losses per wave of each layer since the last call.
    pub fn take(&self) -> BTreeMap<usize, LayerLosses> {
        let mut state = self.lock();
        self.settle(&mut state);
        let mut layers = std::mem::take(&mut state.sums);
        for losses in layers.values_mut() {
            let waves = losses.waves.max(1) as f64;
            (losses.balance, losses.z) = (losses.balance / waves, losses.z / waves);
        }
        layers
    }

    /// The losses of each layer in the last wave that trained.
    fn last(&self, state: &State) -> BTreeMap<usize, LayerLosses> {
        let of = |(layer, sums): (&usize, &LayerSums)| {
            let balance = self.loads(state, *layer).map_or(0.0, |(loads, tokens)| {
                loads.iter().zip(&sums.shares).map(|(load, share)| load * share).sum::<f64>() / tokens
            });
            let z = self.losses.z.unwrap_or(0.0) * sums.z / sums.tokens.max(1.0);
            (*layer, LayerLosses { balance, z, waves: 1 })
        };
        state.wave.iter().map(of).collect()
    }

    fn settle(&self, state: &mut State) {
        if !std::mem::replace(&mut state.settled, true) {
            for (layer, losses) in self.last(state) {
                let sum = state.sums.entry(layer).or_default();
                (sum.balance, sum.z, sum.waves) = (sum.balance + losses.balance, sum.z + losses.z, sum.waves + 1);
            }
        }
    }

    /// `coefficient * E * f_e`, the gradient of the balance loss with respect to `P_e`, and the tokens that `P_e` is a
    /// mean over.
    fn loads(&self, state: &State, layer: usize) -> Option<(Vec<f64>, f64)> {
        let BalanceLoss { coefficient, form, over } = self.losses.balance?;
        let experts = state.wave.get(&layer)?.counts.len();
        let counted: Vec<&LayerSums> = match over {
            BalanceScope::Model => state.wave.values().collect(),
            BalanceScope::Layer => state.wave.get(&layer).into_iter().collect(),
        };
        let mut loads = vec![0.0; experts];
        counted.iter().for_each(|sums| loads.iter_mut().zip(&sums.counts).for_each(|(load, count)| *load += count));
        let tokens = counted.iter().map(|sums| sums.tokens).sum::<f64>().max(1.0);
        let of: f64 = match form {
            BalanceForm::Switch => tokens,
            BalanceForm::Normalized => loads.iter().sum::<f64>().max(1.0),
        };
        loads.iter_mut().for_each(|load| *load *= coefficient * experts as f64 / of);
        Some((loads, tokens))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SweepListener for RouterLossReport {
    fn begin_wave(&self, _: &WaveInfo) {
        let mut state = self.lock();
        self.settle(&mut state);
        (state.wave, state.settled) = (BTreeMap::new(), false);
    }

    fn losses(&self) -> Vec<(&'static str, f64)> {
        let layers = self.last(&self.lock());
        let sum = |of: fn(&LayerLosses) -> f64| layers.values().map(of).sum::<f64>();
        let balance = self.losses.balance.map(|_| ("router_balance", sum(|losses| losses.balance)));
        let mut all: Vec<_> =
            balance.into_iter().chain(self.losses.z.map(|_| ("router_z", sum(|losses| losses.z)))).collect();
        let state = self.lock();
        all.extend(
            state.wave.values().filter_map(|sums| sums.seen.as_ref()).flat_map(|seen| self.losses.shares.values(seen)),
        );
        all
    }
}

impl RouterLosses {
    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        let fields = [("balance.coefficient", self.balance.map(|balance| balance.coefficient)), ("z", self.z)];
        for (field, value) in fields {
            if let Some(value) = value.filter(|value| !(*value >= 0.0 && value.is_finite())) {
                return Err(Error::input(field, value, "a finite number of 0 or more"));
            }
        }
        self.shares.validate()
    }

    fn fits(&self, model: &Model) -> Result<()> {
        self.validate()?;
        let config = model.config();
        let layers = (0..config.layers.len()).filter_map(|layer| Some((layer, config.moe(layer)?.num_experts())));
        let layers: Vec<(usize, usize)> = layers.collect();
        let Some((_, experts)) = layers.first() else {
            return Err(Error::input("layers with routers", 0, "at least one, for losses on them"));
        };
        layers.iter().try_for_each(|(layer, experts)| self.shares.fits(*layer, *experts))?;
        let whole = self.balance.is_some_and(|balance| balance.over == BalanceScope::Model);
        match layers.iter().find(|(_, other)| other != experts) {
            Some((layer, other)) if whole => {
                let expected = format!(
                    "{experts}, as in the first: a balance loss over the model counts them together; \"layer\" does not"
                );
                Err(Error::input(format!("experts of layer {layer}"), other, expected))
            }
            _ => Ok(()),
        }
    }

    fn put_into(&self, model: &Model, set: &mut AdapterSet) -> Arc<RouterLossReport> {
        let report = Arc::new(RouterLossReport { losses: *self, state: Mutex::default() });
        let config = model.config();
        let sigmoid = matches!(config.routing.kind, RoutingKind::Sigmoid { .. });
        for layer in (0..config.layers.len()).filter(|&layer| config.moe(layer).is_some()) {
            set.add_router(layer, Arc::new(LayerLoss { sigmoid, report: report.clone() }));
        }
        set.add_listener(report.clone());
        report
    }
}

/// Adds the losses to the routers of all MoE layers. They reach whatever is trained at the router or below it.
impl TuningMethod for RouterLosses {
    /// # Errors
    /// As [`validate`](RouterLosses::validate); [`Error::Input`] for a model without routed experts, and for a balance
    /// loss over the whole model whose layers have different numbers of experts.
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        self.fits(on.model)
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        let router_losses = Some(self.put_into(on.model, set));
        Ok(Artifacts { router_losses, ..Artifacts::default() }.into())
    }
}

/// The losses of one layer.
#[derive(Debug)]
struct LayerLoss {
    sigmoid: bool,
    report: Arc<RouterLossReport>,
}

/// Scores of a token's experts.
struct Scores {
    /// Shares of them; they sum to 1.
    shares: Vec<f64>,
    /// d log of an expert's score / d logit.
    slopes: Vec<f64>,
    /// `log sum exp` of the logits.
    log_sum: f64,
}

impl LayerLoss {
    /// What losses on shares look at.
    fn seen(&self, trace: &LayerTrace<'_>) -> Seen {
        let (experts, k) = (trace.experts.max(1), trace.top_k.max(1));
        let shares = trace.logits.chunks_exact(experts).flat_map(|logits| self.scores(logits).shares).collect();
        let sequences: Vec<_> = trace.wave.sequences.iter().map(|sequence| sequence.tokens.clone()).collect();
        let mut counts = vec![0.0; sequences.len() * experts];
        for (s, rows) in sequences.iter().enumerate() {
            let slots = rows.start * k..rows.end * k;
            let chosen = trace.selected[slots.clone()].iter().zip(&trace.weights[slots]).filter(|(_, w)| **w != 0.0);
            chosen.for_each(|(e, _)| counts[s * experts + *e as usize] += 1.0);
        }
        Seen { experts, shares, counts, sequences }
    }

    fn scores(&self, logits: &[f32]) -> Scores {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exp = |z: &f32| (f64::from(*z) - f64::from(max)).exp();
        let sum: f64 = logits.iter().map(exp).sum();
        let log_sum = f64::from(max) + sum.ln();
        if !self.sigmoid {
            let shares = logits.iter().map(|z| exp(z) / sum).collect();
            return Scores { shares, slopes: vec![1.0; logits.len()], log_sum };
        }
        let scores: Vec<f64> = logits.iter().map(|z| 1.0 / (1.0 + (-f64::from(*z)).exp())).collect();
        let sum: f64 = scores.iter().sum();
        let shares = scores.iter().map(|s| s / sum.max(f64::MIN_POSITIVE)).collect();
        Scores { shares, slopes: scores.iter().map(|s| 1.0 - s).collect(), log_sum }
    }
}

impl RouterAdapter for LayerLoss {
    fn routed(&self, trace: &LayerTrace<'_>) {
        let experts = trace.experts;
        let mut sums = LayerSums { counts: vec![0.0; experts], shares: vec![0.0; experts], ..LayerSums::default() };
        let chosen = trace.selected.iter().zip(trace.weights).filter(|(_, w)| **w != 0.0);
        chosen.for_each(|(&e, _)| sums.counts[e as usize] += 1.0);
        for logits in trace.logits.chunks_exact(experts.max(1)) {
            let Scores { shares, log_sum, .. } = self.scores(logits);
            sums.shares.iter_mut().zip(shares).for_each(|(sum, share)| *sum += share);
            sums.z += log_sum * log_sum;
            sums.tokens += 1.0;
        }
        if !self.report.losses.shares.is_none() {
            sums.seen = Some(self.seen(trace));
        }
        self.report.lock().wave.insert(trace.layer, sums);
    }

    fn add_gradient(&self, trace: &LayerTrace<'_>, d_logits: &mut [f32]) {
        // the forward pass of all layers is over, so that the loads of the model are known
        let loads = self.report.loads(&self.report.lock(), trace.layer);
        let experts = trace.experts.max(1);
        let predicted = trace.wave.loss_tokens() as f64;
        let own = (trace.logits.len() / experts).max(1) as f64;
        let on_shares = (!self.report.losses.shares.is_none()).then(|| {
            let seen = self.seen(trace);
            self.report.losses.shares.gradient(&seen)
        });
        for (t, (logits, d)) in trace.logits.chunks_exact(experts).zip(d_logits.chunks_exact_mut(experts)).enumerate() {
            let Scores { shares, slopes, log_sum } = self.scores(logits);
            let balance = loads.as_ref().map(|(loads, tokens)| {
                let mean = loads.iter().zip(&shares).map(|(f, p)| f * p).sum::<f64>();
                (loads, mean, predicted / tokens)
            });
            // of log sum exp the derivative is the softmax, whatever the rule
            let z = self.report.losses.z.map(|z| 2.0 * z * log_sum * predicted / own);
            let on_shares = on_shares.as_ref().map(|all| {
                let g = &all[t * experts..(t + 1) * experts];
                (g, g.iter().zip(&shares).map(|(g, p)| g * p).sum::<f64>())
            });
            for (e, d) in d.iter_mut().enumerate() {
                let mut sum = 0.0;
                if let Some((loads, mean, factor)) = &balance {
                    sum += factor * shares[e] * slopes[e] * (loads[e] - mean);
                }
                if let Some((g, mean)) = on_shares {
                    sum += predicted * shares[e] * slopes[e] * (g[e] - mean);
                }
                if let Some(z) = z {
                    sum += z * (f64::from(logits[e]) - log_sum).exp();
                }
                *d += sum as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_core::trace::{SequenceInfo, WaveInfo};

    fn wave(tokens: usize, loss_tokens: usize) -> WaveInfo {
        WaveInfo { id: 0, tokens, ids: Vec::new(), sequences: vec![SequenceInfo { tokens: 0..tokens, loss_tokens }] }
    }

    fn adapter(losses: RouterLosses, sigmoid: bool) -> LayerLoss {
        LayerLoss { sigmoid, report: Arc::new(RouterLossReport { losses, state: Mutex::default() }) }
    }

    fn balance(coefficient: f64, form: BalanceForm) -> RouterLosses {
        let over = BalanceScope::Layer;
        RouterLosses { balance: Some(BalanceLoss { coefficient, form, over }), ..RouterLosses::default() }
    }

    /// The losses of these logits, with experts chosen beforehand.
    fn losses(adapter: &LayerLoss, wave: &WaveInfo, logits: &[f32], experts: usize, selected: &[u32]) -> LayerLosses {
        let weights = vec![1.0; selected.len()];
        let top_k = selected.len() / wave.tokens;
        adapter.report.begin_wave(wave);
        adapter.routed(&LayerTrace {
            layer: 3,
            wave,
            experts,
            top_k,
            logits,
            selected,
            weights: &weights,
            scale: 1.0,
            idle: &[],
        });
        adapter.report.take()[&3]
    }

    #[test]
    fn at_perfect_balance_each_form_has_its_value() {
        let wave = wave(2, 1);
        for (form, expected) in [(BalanceForm::Switch, 0.5 * 2.0), (BalanceForm::Normalized, 0.5)] {
            let found = losses(&adapter(balance(0.5, form), false), &wave, &[0.0; 8], 4, &[0, 1, 2, 3]);
            assert!((found.balance - expected).abs() < 1e-12 && found.z == 0.0, "{found:?}");
        }
        // everything to one expert: E times its share
        let found =
            losses(&adapter(balance(1.0, BalanceForm::Switch), false), &wave, &[9.0, 0.0, 9.0, 0.0], 2, &[0, 0]);
        assert!((found.balance - 2.0 / (1.0 + (-9.0f64).exp())).abs() < 1e-12);
        let z = adapter(RouterLosses { z: Some(0.1), ..RouterLosses::default() }, false);
        let found = losses(&z, &wave, &[0.0; 8], 4, &[0, 1, 2, 3]);
        assert!((found.z - 0.1 * 4f64.ln().powi(2)).abs() < 1e-12);
    }

    #[test]
    fn gradients_match_difference_quotients() {
        let wave = wave(3, 5);
        let logits: Vec<f32> = (0..12).map(|i| ((i * 7 % 11) as f32 - 5.0) * 0.3).collect();
        let selected = [0, 1, 2, 0, 3, 1];
        let both = RouterLosses { z: Some(0.3), ..balance(0.7, BalanceForm::Switch) };
        let shares = ShareLosses {
            entropy: Some(0.2),
            mutual_information: Some(0.5),
            variation: Some(0.3),
            sequence_balance: Some(0.4),
            smoothness: Some(0.6),
            ..ShareLosses::default()
        };
        let on_shares = RouterLosses { shares, ..RouterLosses::default() };
        for (config, sigmoid) in [
            (both, false),
            (both, true),
            (balance(0.7, BalanceForm::Normalized), false),
            (balance(1.0, BalanceForm::Switch), true),
            (on_shares, false),
            (on_shares, true),
        ] {
            let adapter = adapter(config, sigmoid);
            let weights = [1.0; 6];
            let trace = LayerTrace {
                layer: 3,
                wave: &wave,
                experts: 4,
                top_k: 2,
                logits: &logits,
                selected: &selected,
                weights: &weights,
                scale: 1.0,
                idle: &[],
            };
            let mut found = vec![0.25; 12];
            adapter.routed(&trace);
            adapter.add_gradient(&trace, &mut found);
            adapter.report.take();
            for i in 0..12 {
                let at = |h: f32| {
                    let mut moved = logits.clone();
                    moved[i] += h;
                    let found = losses(&adapter, &wave, &moved, 4, &selected);
                    let told = adapter.report.losses();
                    let shares: f64 = told
                        .iter()
                        .filter(|(name, _)| !["router_balance", "router_z"].contains(name))
                        .map(|(_, l)| l)
                        .sum();
                    (found.balance + found.z + shares) * 5.0
                };
                let numeric = (at(1e-2) - at(-1e-2)) / 2e-2;
                assert!((numeric + 0.25 - f64::from(found[i])).abs() < 1e-4, "{i}: {numeric} {}", found[i]);
            }
        }
    }

    /// `load_balancing_loss_func` of transformers 5 (`modeling_mixtral.py`), without a mask: softmax of the
    /// concatenated logits, the top k of it, `num_experts * sum(mean over tokens of one-hot choices * mean over tokens
    /// of probabilities)`.
    fn hugging_face(layers: &[Vec<f32>], experts: usize, k: usize) -> f64 {
        let all: Vec<f32> = layers.concat();
        let tokens = (all.len() / experts) as f64;
        let (mut per_expert, mut probability) = (vec![0.0f64; experts], vec![0.0f64; experts]);
        for row in all.chunks_exact(experts) {
            let sum: f64 = row.iter().map(|z| f64::from(*z).exp()).sum();
            row.iter().zip(&mut probability).for_each(|(z, p)| *p += f64::from(*z).exp() / sum / tokens);
            best(row, k).into_iter().for_each(|e| per_expert[e as usize] += 1.0 / tokens);
        }
        experts as f64 * per_expert.iter().zip(probability).map(|(f, p)| f * p).sum::<f64>()
    }

    fn best(row: &[f32], k: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..row.len() as u32).collect();
        order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
        order[..k].to_vec()
    }

    #[test]
    fn over_the_model_it_is_hugging_faces_loss_and_over_the_layers_their_sum() {
        let (experts, k, tokens) = (8, 2, 5);
        // every layer prefers an expert of its own: uneven by layer, even over the model
        let logits = |layer: usize| -> Vec<f32> {
            let z = |t: usize, e: usize| if e / 2 == layer { 5.0 } else { ((t * 5 + e * 3 + layer) % 7) as f32 * 0.2 };
            (0..tokens).flat_map(|t| (0..experts).map(move |e| z(t, e))).collect()
        };
        let layers: Vec<Vec<f32>> = (0..4).map(logits).collect();
        let wave = wave(tokens, 3);
        let run = |over: BalanceScope| {
            let balance = Some(BalanceLoss { coefficient: 1.0, form: BalanceForm::Switch, over });
            let adapter = adapter(RouterLosses { balance, ..RouterLosses::default() }, false);
            adapter.report.begin_wave(&wave);
            for (layer, logits) in layers.iter().enumerate() {
                let selected: Vec<u32> = logits.chunks_exact(experts).flat_map(|row| best(row, k)).collect();
                let weights = vec![1.0; selected.len()];
                let (selected, weights) = (&selected, &weights);
                adapter.routed(&LayerTrace {
                    layer,
                    wave: &wave,
                    experts,
                    top_k: k,
                    logits,
                    selected,
                    weights,
                    scale: 1.0,
                    idle: &[],
                });
            }
            let told = adapter.report.losses();
            let sum = adapter.report.take().values().map(|losses| losses.balance).sum::<f64>();
            assert_eq!(told, [("router_balance", sum)]);
            sum
        };
        let expected = hugging_face(&layers, experts, k);
        assert!((run(BalanceScope::Model) - expected).abs() < 1e-9, "{} {expected}", run(BalanceScope::Model));
        let apart: f64 = layers.iter().map(|logits| hugging_face(std::slice::from_ref(logits), experts, k)).sum();
        assert!((run(BalanceScope::Layer) - apart).abs() < 1e-9);
        // near 2 where the layers make up for each other, near 4 layers times 8 where each counts alone
        assert!((expected - 2.0).abs() < 0.1 && apart > 25.0, "{expected} {apart}");
    }

    #[test]
    fn recipes_are_checked() {
        let parsed: RouterLosses =
            serde_json::from_str(r#"{"balance": {"coefficient": 0.01, "form": "normalized"}, "z": 0.001}"#).unwrap();
        assert!(parsed.validate().is_ok());
        let error = RouterLosses { z: Some(-1.0), ..parsed }.validate().unwrap_err().to_string();
        assert!(error.contains("z: found -1"), "{error}");
        let error = balance(f64::NAN, BalanceForm::Switch).validate().unwrap_err().to_string();
        assert!(error.contains("balance.coefficient"), "{error}");
        assert!(serde_json::from_str::<RouterLosses>(r#"{"z_loss": 1.0}"#).is_err());
    }
}

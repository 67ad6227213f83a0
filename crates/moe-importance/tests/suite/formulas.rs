//! Every criterion against its formula, computed by brute force in f64.
#![cfg(feature = "flex")]

use crate::common;

use common::world::{World, WorldExpert, WorldLayer};
use common::{Case, Matrix, SequenceCase};
use moe_checkpoint::{ExpertWeights, Extent, Statistics};
use moe_importance::scorers::{Aimer, Average, Coupled, Heapr, Mone};
use moe_importance::statistics::{LOGIT_GRAM, OUTPUT_FIRST_MAX, OUTPUT_MAX, OUTPUT_MOMENTS};
use moe_importance::{Error, ExpertWeightsSource, NoWeights, Result, Scorer, ScorerConfig};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SEQUENCES: [(usize, usize); 4] = [(7, 6), (12, 11), (3, 0), (9, 8)];

fn world() -> World {
    World::random(10, &[5, 6, 3, 5, 4], 2, &SEQUENCES, 11)
}

/// What the formulas speak of, for one expert: rows t, units j.
struct Rows<'a> {
    world: &'a World,
    layer: &'a WorldLayer,
    expert: &'a WorldExpert,
    index: usize,
    u: Matrix,
    du: Matrix,
    /// Outputs of the expert.
    f: Matrix,
    /// Routing weights as applied, renormalized over the top-k, and softmax over all experts.
    gates: [Vec<f64>; 3],
}

impl<'a> Rows<'a> {
    fn new(world: &'a World, layer: &'a WorldLayer, index: usize) -> Self {
        let expert = &layer.experts[index];
        let (u, du, _) = expert.case.backward();
        let renormalized = |(row, t): (usize, &usize)| expert.case.routing[row] / layer.weights[*t].iter().sum::<f64>();
        let gates = [
            expert.case.routing.clone(),
            expert.tokens.iter().enumerate().map(renormalized).collect(),
            expert.tokens.iter().map(|t| layer.softmax(*t)[index]).collect(),
        ];
        Self { world, layer, expert, index, u, du, f: expert.outputs(), gates }
    }

    fn n(&self) -> usize {
        self.expert.tokens.len()
    }

    /// All tokens.
    fn all(&self) -> f64 {
        self.world.tokens() as f64
    }

    /// Routed tokens as a divisor.
    fn routed(&self) -> f64 {
        self.n().max(1) as f64
    }

    fn sum(&self, f: impl Fn(usize) -> f64) -> f64 {
        (0..self.n()).map(f).sum()
    }

    fn units(&self, f: impl Fn(usize) -> f64) -> Vec<f64> {
        (0..self.expert.case.width()).map(f).collect()
    }

    fn norm(&self, t: usize) -> f64 {
        dot(&self.f, t, &self.f, t).sqrt()
    }

    /// Norm of a down column.
    fn column(&self, j: usize) -> f64 {
        let down = self.expert.case.down.transposed();
        dot(&down, j, &down, j).sqrt()
    }

    /// Gradient of this expert's router row from one sequence's mean loss `[H]`, for sequences that predict something.
    fn router_gradients(&self) -> Vec<Vec<f64>> {
        let of = |s: usize| -> Vec<f64> {
            let scale = 1.0 / self.world.sequences[s].1 as f64;
            let entry = |t: usize, h: usize| self.layer.d_logits.at(t, self.index) * self.layer.input.at(t, h) * scale;
            (0..self.world.hidden).map(|h| self.world.range(s).map(|t| entry(t, h)).sum()).collect()
        };
        (0..SEQUENCES.len()).filter(|s| self.world.sequences[*s].1 > 0).map(of).collect()
    }
}

fn dot(a: &Matrix, i: usize, b: &Matrix, j: usize) -> f64 {
    (0..a.columns).map(|h| a.at(i, h) * b.at(j, h)).sum()
}

/// Scores of all experts of a layer, `[experts][units or 1]`.
fn score(world: &World, statistics: &Statistics, json: &str) -> Vec<Vec<Vec<f32>>> {
    let config: ScorerConfig = serde_json::from_str(json).unwrap();
    let table = config.build().unwrap().score(statistics, world).unwrap();
    table.layers.into_iter().map(|layer| layer.scores).collect()
}

/// Checks one configuration against its formula.
fn check(world: &World, json: &str, formula: impl Fn(&Rows<'_>) -> Vec<f64>) {
    let config: ScorerConfig = serde_json::from_str(json).unwrap();
    let statistics = world.collect(&config.build().unwrap().needs().statistics);
    let found = score(world, &statistics, json);
    for (layer, found) in world.layers.iter().zip(found) {
        let expected: Vec<Vec<f64>> = (0..layer.experts.len()).map(|e| formula(&Rows::new(world, layer, e))).collect();
        let largest = expected.iter().flatten().fold(0.0f64, |a, b| a.max(b.abs()));
        assert!(largest > 0.0, "{json}: a formula that is 0 everywhere shows nothing");
        for (e, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.len(), expected.len(), "{json}");
            for (a, b) in found.iter().zip(expected) {
                assert!((f64::from(*a) - b).abs() <= 3e-6 * largest, "{json}, expert {e}: {a}, expected {b}");
            }
        }
    }
}

#[test]
fn unit_criteria_are_their_formulas() {
    let world = world();
    check(&world, r#"{"type":"heapr"}"#, |r| {
        let mean = |m: &Matrix, j: usize| r.sum(|t| m.at(t, j).powi(2)) / r.routed();
        r.units(|j| mean(&r.u, j) * mean(&r.du, j))
    });
    check(&world, r#"{"type":"heapr","denominator":"all_tokens"}"#, |r| {
        let sum = |m: &Matrix, j: usize| r.sum(|t| m.at(t, j).powi(2));
        r.units(|j| sum(&r.u, j) * sum(&r.du, j) / (r.routed() * r.all()))
    });
    let product = |r: &Rows<'_>, t: usize, j: usize| r.u.at(t, j) * r.du.at(t, j);
    check(&world, r#"{"type":"coupled"}"#, |r| r.units(|j| r.sum(|t| product(r, t, j).powi(2)) / r.all()));
    check(&world, r#"{"type":"coupled","denominator":"routed_tokens"}"#, |r| {
        r.units(|j| r.sum(|t| product(r, t, j).powi(2)) / r.routed())
    });
    check(&world, r#"{"type":"taylor"}"#, |r| r.units(|j| r.sum(|t| product(r, t, j).abs()) / r.all()));
    check(&world, r#"{"type":"taylor","form":"sum"}"#, |r| r.units(|j| (r.sum(|t| product(r, t, j)) / r.all()).abs()));
    check(&world, r#"{"type":"taylor","form":"loss_increase","denominator":"routed_tokens"}"#, |r| {
        r.units(|j| -r.sum(|t| product(r, t, j)) / r.routed())
    });
    for (power, weighting) in ["none", "weight", "square"].into_iter().enumerate() {
        check(&world, &format!(r#"{{"type":"activation","weighting":"{weighting}"}}"#), |r| {
            let value = |t: usize, j: usize| r.u.at(t, j).abs() * r.gates[0][t].powi(power as i32);
            r.units(|j| r.sum(|t| value(t, j)) / r.all() * r.column(j))
        });
    }
    let along = |r: &Rows<'_>, t: usize, j: usize| {
        let down = r.expert.case.down.transposed();
        r.u.at(t, j) * dot(&down, j, &r.f, t) / r.norm(t)
    };
    check(&world, r#"{"type":"projection"}"#, |r| r.units(|j| r.sum(|t| along(r, t, j)) / r.routed()));
    check(&world, r#"{"type":"projection","denominator":"all_tokens","weighting":"weight"}"#, |r| {
        r.units(|j| r.sum(|t| along(r, t, j) * r.gates[0][t]) / r.all())
    });
}

#[test]
fn expert_criteria_are_their_formulas() {
    let world = world();
    check(&world, r#"{"type":"frequency"}"#, |r| vec![r.n() as f64 / r.all()]);
    check(&world, r#"{"type":"seer","count":"hard"}"#, |r| vec![r.n() as f64 / r.all()]);
    check(&world, r#"{"type":"seer"}"#, |r| vec![r.gates[0].iter().sum::<f64>() / r.all()]);
    check(&world, r#"{"type":"dern"}"#, |r| vec![r.gates[1].iter().sum::<f64>() / r.all()]);
    check(&world, r#"{"type":"ean"}"#, |r| vec![r.sum(|t| r.norm(t)) / r.all()]);
    check(&world, r#"{"type":"ean","denominator":"routed_tokens"}"#, |r| vec![r.sum(|t| r.norm(t)) / r.routed()]);
    check(&world, r#"{"type":"man"}"#, |r| vec![r.sum(|t| r.norm(t)) / r.routed()]);
    check(&world, r#"{"type":"man","squared":true}"#, |r| vec![r.sum(|t| r.norm(t).powi(2)) / r.routed()]);
    for (gate, name) in ["as_applied", "renormalized", "softmax"].into_iter().enumerate() {
        check(&world, &format!(r#"{{"type":"routing_weight","gate":"{name}"}}"#), |r| {
            vec![r.gates[gate].iter().sum::<f64>() / r.all()]
        });
        check(&world, &format!(r#"{{"type":"routing_weight","gate":"{name}","denominator":"routed_tokens"}}"#), |r| {
            vec![r.gates[gate].iter().sum::<f64>() / r.routed()]
        });
        for power in [1, 2] {
            check(&world, &format!(r#"{{"type":"reap","gate":"{name}","power":{power}}}"#), |r| {
                vec![r.sum(|t| r.gates[gate][t].powi(power) * r.norm(t)) / r.routed()]
            });
        }
    }
    check(&world, r#"{"type":"reap","denominator":"all_tokens"}"#, |r| {
        vec![r.sum(|t| r.gates[0][t] * r.norm(t)) / r.all()]
    });
    check(&world, r#"{"type":"tenp"}"#, |r| {
        let x = &r.expert.case.input;
        let cos = |t: usize| dot(x, t, &r.f, t) / dot(x, t, x, t).sqrt() / r.norm(t);
        vec![r.sum(|t| r.gates[0][t] * r.norm(t) * (1.0 - cos(t))) / r.all()]
    });
    check(&world, r#"{"type":"mone"}"#, |r| {
        let mean = |h: usize| r.sum(|t| r.f.at(t, h)) / r.routed();
        let spread: f64 = (0..10).map(|h| r.sum(|t| (r.f.at(t, h) - mean(h)).powi(2)) / r.routed()).sum();
        vec![spread.sqrt() * r.gates[0].iter().sum::<f64>() / r.all()]
    });
    for (score, weighted) in [("token", false), ("gate", true)] {
        check(&world, &format!(r#"{{"type":"esft","score":"{score}"}}"#), |r| {
            let mass = |e: &WorldExpert| if weighted { e.case.routing.iter().sum() } else { e.tokens.len() as f64 };
            // Means of gates before the scaling factor, and shares of selections.
            let scale = f64::from(common::world::SCALE);
            vec![if weighted {
                mass(r.expert) / scale / r.all()
            } else {
                mass(r.expert) / r.layer.experts.iter().map(mass).sum::<f64>()
            }]
        });
    }
    let entries = |r: &Rows<'_>| -> Vec<f64> {
        let case = &r.expert.case;
        [&case.gate, &case.up, &case.down].into_iter().flat_map(|m| m.values.clone()).collect()
    };
    check(&world, r#"{"type":"expert_magnitude"}"#, |r| vec![entries(r).iter().map(|w| w * w).sum::<f64>().sqrt()]);
    check(&world, r#"{"type":"aimer"}"#, |r| {
        let (w, n) = (entries(r), entries(r).len() as f64);
        let magnitude = w.iter().map(|w| w.abs()).sum::<f64>() / n;
        vec![1.0 - magnitude / (w.iter().map(|w| w * w).sum::<f64>() / n).sqrt()]
    });
}

#[test]
fn router_criteria_are_their_formulas() {
    let world = world();
    let n = SEQUENCES.len() as f64;
    check(&world, r#"{"type":"router_taylor","form":"abs"}"#, |r| {
        vec![r.router_gradients().concat().iter().map(|g| g.abs()).sum::<f64>() / (10.0 * n)]
    });
    check(&world, r#"{"type":"router_taylor","form":"square"}"#, |r| {
        vec![r.router_gradients().concat().iter().map(|g| g * g).sum::<f64>() / n]
    });
    check(&world, r#"{"type":"router_taylor"}"#, |r| {
        let row = |h: usize| r.layer.router.at(r.index, h);
        let of = |g: Vec<f64>| g.iter().enumerate().map(|(h, g)| (row(h) * g).powi(2)).sum::<f64>();
        vec![(r.router_gradients().into_iter().map(of).sum::<f64>() / n).sqrt()]
    });
    // Usage of each expert, and the sign of it minus the mean or median of the layer.
    let votes = |r: &Rows<'_>, samples: Vec<std::ops::Range<usize>>, median: bool| -> f64 {
        let vote = |tokens: std::ops::Range<usize>| {
            let usage: Vec<f64> = (0..5).map(|e| tokens.clone().map(|t| r.layer.softmax(t)[e]).sum::<f64>()).collect();
            let mut sorted = usage.clone();
            sorted.sort_by(f64::total_cmp);
            let middle = if median { sorted[2] } else { usage.iter().sum::<f64>() / 5.0 };
            f64::from(u8::from(usage[r.index] > middle)) - f64::from(u8::from(usage[r.index] < middle))
        };
        samples.into_iter().map(vote).sum()
    };
    let sequences = |r: &Rows<'_>| (0..SEQUENCES.len()).map(|s| r.world.range(s)).collect::<Vec<_>>();
    check(&world, r#"{"type":"bias","step":0.5}"#, |r| vec![0.5 * votes(r, sequences(r), false)]);
    check(&world, r#"{"type":"bias","around":"median"}"#, |r| vec![1e-3 * votes(r, sequences(r), true)]);
    #[allow(clippy::single_range_in_vec_init)]
    let wave = |r: &Rows<'_>| vec![0..r.world.tokens()];
    check(&world, r#"{"type":"bias","sample":"wave"}"#, |r| vec![1e-3 * votes(r, wave(r), false)]);
}

#[test]
fn the_arrays_that_merging_wants_are_their_definitions() {
    let world = world();
    let statistics = world.collect(&[LOGIT_GRAM, OUTPUT_MAX, OUTPUT_FIRST_MAX, OUTPUT_MOMENTS]);
    let close = |a: f64, b: f64| assert!((a - b).abs() <= 3e-6 * b.abs().max(1.0), "{a}, expected {b}");
    for layer in &world.layers {
        for (e, expert) in layer.experts.iter().enumerate() {
            let gram = statistics.vector(LOGIT_GRAM.as_str(), Extent::Experts, layer.layer, e).unwrap();
            for (other, found) in gram.iter().enumerate() {
                let z = |t: usize, e: usize| layer.logits.at(t, e);
                close(*found, (0..world.tokens()).map(|t| z(t, e) * z(t, other)).sum());
            }
            let f = expert.outputs();
            let max =
                |rows: &[usize]| rows.iter().flat_map(|t| (0..10).map(|h| f.at(*t, h).abs())).fold(0.0f64, f64::max);
            let all: Vec<usize> = (0..f.rows).collect();
            close(statistics.expert(OUTPUT_MAX.as_str(), layer.layer).unwrap()[e], max(&all));
            let first = |s: usize| expert.tokens.iter().position(|t| world.range(s).contains(t));
            let first: Vec<usize> = (0..SEQUENCES.len()).filter_map(first).collect();
            close(statistics.expert(OUTPUT_FIRST_MAX.as_str(), layer.layer).unwrap()[e], max(&first));
            let moments = statistics.vector(OUTPUT_MOMENTS.as_str(), Extent::Moments, layer.layer, e).unwrap();
            close(moments[0], f.rows as f64);
            for h in 0..10 {
                let column: Vec<f64> = (0..f.rows).map(|t| f.at(t, h)).collect();
                let mean = column.iter().sum::<f64>() / column.len().max(1) as f64;
                close(moments[1 + h], mean);
                close(moments[11 + h], column.iter().map(|x| (x - mean).powi(2)).sum());
            }
        }
    }
}

fn lone(case: &Case) -> Statistics {
    let ids = [Heapr::default().needs().statistics, Coupled::default().needs().statistics].concat();
    common::collect_one(case, &ids)
}

#[test]
fn half_of_heapr_is_the_loss_of_zeroing_a_unit_at_a_quadratic_minimum() {
    // The loss of a token is half of v^T A v, v the change of the expert's output, with A the mean outer product of the
    // gradients: the H x H form of the paper.
    let case = Case::random(7, 4, &[SequenceCase { rows: 9, loss_tokens: 9 }], 21);
    let (u, _, _) = case.backward();
    let a = |h: usize, i: usize| -> f64 {
        let d = |t: usize, h: usize| case.routing[t] * case.upstream.at(t, h);
        (0..9).map(|t| d(t, h) * d(t, i)).sum::<f64>() / 9.0
    };
    // Expert 1 gets all 10 tokens of the wave by count; give the routed mean its 9 rows.
    let mut statistics = lone(&case);
    statistics.expert_mut("routing.tokens", moe_checkpoint::Fold::Sum, 3).unwrap()[1] = 9.0;
    let scores = Heapr::default().score(&statistics, &NoWeights).unwrap().layers[0].scores[1].clone();
    for (j, score) in scores.iter().enumerate() {
        let change = |t: usize, h: usize| -u.at(t, j) * case.down.at(h, j);
        let loss = |t: usize| -> f64 {
            let pairs = (0..7).flat_map(|h| (0..7).map(move |i| (h, i)));
            pairs.map(|(h, i)| 0.5 * change(t, h) * a(h, i) * change(t, i)).sum()
        };
        let expected = (0..9).map(loss).sum::<f64>() / 9.0;
        assert!((f64::from(*score) / 2.0 - expected).abs() < 1e-5 * expected, "{score} and {expected}");
    }
}

#[test]
fn output_space_scores_do_not_see_how_a_unit_is_scaled() {
    let case = Case::random(6, 5, &[SequenceCase { rows: 12, loss_tokens: 12 }], 22);
    let mut scaled = case.clone();
    for h in 0..6 {
        scaled.up.values[2 * 6 + h] *= 8.0;
        scaled.down.values[h * 5 + 2] /= 8.0;
    }
    let (before, after) = (lone(&case), lone(&scaled));
    let scorers: [Box<dyn Scorer>; 2] = [Box::new(Heapr::default()), Box::new(Coupled::new(Average::RoutedTokens))];
    for scorer in scorers {
        let [a, b] = [&before, &after].map(|s| scorer.score(s, &NoWeights).unwrap().layers[0].scores[1].clone());
        for (a, b) in a.iter().zip(&b) {
            assert!((a - b).abs() <= 1e-5 * a, "{a} and {b}");
        }
    }
}

#[test]
fn only_the_coupled_form_sees_that_activation_and_gradient_never_meet() {
    // Unit 0 fires at token 0 and has a gradient at token 1 only.
    let mut case = Case::random(2, 2, &[SequenceCase { rows: 2, loss_tokens: 2 }], 1);
    case.gate.values = vec![1.0, 0.0, 1.0, 1.0];
    case.up.values = vec![1.0, 0.0, 1.0, 1.0];
    case.down.values = vec![1.0, 1.0, 0.0, 1.0];
    case.input.values = vec![1.0, 0.0, 0.0, 1.0];
    case.upstream.values = vec![0.0, 1.0, 1.0, 0.0];
    let statistics = lone(&case);
    let coupled = Coupled::default().score(&statistics, &NoWeights).unwrap().layers[0].scores[1].clone();
    let heapr = Heapr::default().score(&statistics, &NoWeights).unwrap().layers[0].scores[1].clone();
    assert!(coupled[0] == 0.0 && coupled[1] > 0.0, "{coupled:?}");
    assert!(heapr[0] > 0.0, "{heapr:?}");
}

#[test]
fn frequency_norm_and_reap_order_three_experts_in_three_ways() {
    // Many tokens with small outputs; a few with large ones at small weights; some in between at large weights.
    let mut statistics = {
        let world = World::random(3, &[1, 1, 1], 1, &[(16, 15)], 2);
        let ids = ["frequency", "man", "reap"].map(|name| {
            let config: ScorerConfig = serde_json::from_str(&format!(r#"{{"type":"{name}"}}"#)).unwrap();
            config.build().unwrap().needs().statistics
        });
        world.collect(&ids.concat())
    };
    for layer in [1, 3] {
        let mut set = |id: &str, values: [f64; 3]| {
            statistics.expert_mut(id, moe_checkpoint::Fold::Sum, layer).unwrap().copy_from_slice(&values);
        };
        set("routing.tokens", [10.0, 2.0, 4.0]);
        set("output.norm", [10.0, 20.0, 12.0]);
        set("output.norm_applied", [9.0, 1.0, 10.0]);
    }
    let order = |name: &str| {
        let config: ScorerConfig = serde_json::from_str(&format!(r#"{{"type":"{name}"}}"#)).unwrap();
        let scores = config.build().unwrap().score(&statistics, &NoWeights).unwrap().layers[0].scores.concat();
        let mut order = [0, 1, 2];
        order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
        order
    };
    assert_eq!([order("frequency"), order("man"), order("reap")], [[1, 2, 0], [0, 2, 1], [1, 0, 2]]);
}

#[test]
fn an_expert_of_constant_output_has_no_spread_however_large_it_is() {
    let mut case = Case::random(6, 4, &[SequenceCase { rows: 20, loss_tokens: 20 }], 23);
    // The same input everywhere, and outputs of a thousand.
    for t in 1..20 {
        let first = case.input.values[..6].to_vec();
        case.input.values[t * 6..(t + 1) * 6].copy_from_slice(&first);
    }
    case.down.values.iter_mut().for_each(|w| *w *= 4096.0);
    let shown = common::world::World {
        hidden: 6,
        top_k: 1,
        sequences: vec![(8, 7), (12, 11)],
        layers: vec![WorldLayer {
            layer: 3,
            input: case.input.clone(),
            logits: Matrix { rows: 20, columns: 1, values: vec![0.0; 20] },
            d_logits: Matrix { rows: 20, columns: 1, values: vec![0.0; 20] },
            router: Matrix { rows: 1, columns: 6, values: vec![0.0; 6] },
            selected: vec![vec![0]; 20],
            weights: vec![vec![1.0]; 20],
            experts: vec![WorldExpert { case, tokens: (0..20).collect() }],
        }],
    };
    let mut folded = Statistics::new(&shown.shape(), common::provenance());
    for wave in 0..2 {
        let mut collection =
            moe_importance::Collection::new(&shown.shape(), common::provenance(), &Mone::new().needs().statistics)
                .unwrap();
        shown.observe(wave as u64, wave..wave + 1, &mut collection).unwrap();
        let mut statistics = collection.take().unwrap();
        statistics.round_to_f32();
        folded.fold(&statistics).unwrap();
    }
    let mean = folded.vector(OUTPUT_MOMENTS.as_str(), Extent::Moments, 3, 0).unwrap()[1..7].to_vec();
    let size = mean.iter().map(|m| m * m).sum::<f64>().sqrt();
    let score = f64::from(Mone::new().score(&folded, &NoWeights).unwrap().layers[0].scores[0][0]);
    assert!(size > 100.0 && score < 1e-6 * size, "mean {size}, score {score}");
}

/// Experts whose gate, up and down hold these numbers.
struct Weights(Vec<Vec<f32>>);

impl ExpertWeightsSource for Weights {
    fn expert(&self, _: usize, expert: usize) -> Result<ExpertWeights, Error> {
        let third = self.0[expert].len() / 3;
        let part = |i: usize| self.0[expert][i * third..(i + 1) * third].to_vec();
        Ok(ExpertWeights { gate: part(0), up: part(1), down: part(2), width: 1, hidden: third, ..Default::default() })
    }
}

#[test]
fn aimer_knows_tails_and_not_scale() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut uniform = move || (f64::from(rng.next_u32()) + 0.5) / 4294967296.0;
    let n = 60_000;
    // Box-Muller, and its cube for heavy tails.
    let gaussian: Vec<f64> =
        (0..n).map(|_| (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()).collect();
    let f32s = |values: &[f64], f: &dyn Fn(f64) -> f64| values.iter().map(|v| f(*v) as f32).collect::<Vec<f32>>();
    let experts = Weights(vec![
        f32s(&gaussian, &|v| v),
        f32s(&gaussian, &|v| 1024.0 * v),
        f32s(&gaussian, &|v| v.powi(3)),
        f32s(&gaussian, &f64::signum),
        vec![0.0; n],
    ]);
    let layers = vec![moe_checkpoint::MoeLayerShape { layer: 0, widths: vec![1; 5] }];
    let shape = moe_checkpoint::MoeShape { gateless: false, hidden_size: n / 3, top_k: 1, layers };
    let statistics = Statistics::new(&shape, common::provenance());
    let scores = Aimer::new().score(&statistics, &experts).unwrap().layers[0].scores.concat();
    assert!((1.0 - scores[0] - (2.0 / std::f32::consts::PI).sqrt()).abs() < 5e-3, "{scores:?}");
    assert_eq!(scores[0], scores[1], "a power of two changes nothing");
    assert!(scores[2] > scores[0], "heavier tails are kept");
    assert!(scores[3].abs() < 1e-6 && scores[4] == 0.0, "{scores:?}");
}

/// What an expert adds at its rows, what all experts of these tokens add, and the squares of the stream after the
/// layer.
fn attributed(r: &Rows<'_>) -> (Vec<Vec<f64>>, Vec<Vec<f64>>, Vec<f64>) {
    let (added, stream) = (r.layer.added(), r.layer.stream());
    let of = |t: &usize| added[*t].iter().find(|(e, _)| *e == r.index).unwrap().1.clone();
    let together = |t: &usize| {
        let hidden = r.world.hidden;
        (0..hidden).map(|h| added[*t].iter().map(|(_, values)| values[h]).sum()).collect()
    };
    let tokens = &r.expert.tokens;
    (
        tokens.iter().map(of).collect(),
        tokens.iter().map(together).collect(),
        tokens.iter().map(|t| dot(&stream, *t, &stream, *t) + 1e-6).collect(),
    )
}

#[test]
fn attribution_is_the_slope_of_the_loss_of_the_scaled_layer() {
    let world = world();
    // The loss of a layer whose routed experts count alpha times, one of them (1 + step) times that.
    let loss = |r: &Rows<'_>, alpha: f64, step: f64| -> f64 {
        let (added, stream) = (r.layer.added(), r.layer.stream());
        let of_token = |(t, added): (usize, &Vec<(usize, Vec<f64>)>)| -> f64 {
            let change = |h: usize| {
                let scaled = added.iter().map(|(e, v)| if *e == r.index { (1.0 + step) * v[h] } else { v[h] });
                alpha * scaled.sum::<f64>() - added.iter().map(|(_, v)| v[h]).sum::<f64>()
            };
            (0..r.world.hidden).map(|h| change(h).powi(2)).sum::<f64>() / (dot(&stream, t, &stream, t) + 1e-6)
        };
        added.iter().enumerate().map(of_token).sum()
    };
    for alpha in [0.9, 0.5] {
        let json = format!(r#"{{"type":"attribution","clip":false,"alpha":{alpha}}}"#);
        check(&world, &json, |r| vec![-(loss(r, alpha, 1e-4) - loss(r, alpha, -1e-4)) / 2e-4 / r.all()]);
        // The loss is quadratic: with the second order it is the whole change that removing the expert makes.
        let json = format!(r#"{{"type":"attribution","clip":false,"order":"second","alpha":{alpha}}}"#);
        check(&world, &json, |r| vec![(loss(r, alpha, -1.0) - loss(r, alpha, 0.0)) / r.all()]);
    }
    check(&world, r#"{"type":"attribution"}"#, |r| {
        let (o, m, squares) = attributed(r);
        let clipped = |h: usize| -> f64 {
            let values: Vec<f64> = (0..r.n()).map(|t| m[t][h] * o[t][h] / squares[t]).collect();
            let mut sizes: Vec<f64> = values.iter().map(|value| value.abs()).collect();
            sizes.sort_by(f64::total_cmp);
            let bound = match sizes.len() {
                0..=2 => f64::INFINITY,
                n => {
                    let place = 0.99 * (n - 1) as f64;
                    let below = place.floor() as usize;
                    let above = (below + 1).min(n - 1);
                    sizes[below] + place.fract() * (sizes[above] - sizes[below])
                }
            };
            values.iter().map(|value| value.clamp(-bound, bound)).sum()
        };
        vec![0.18 * (0..r.world.hidden).map(clipped).sum::<f64>() / r.all()]
    });
    let error = serde_json::from_str::<ScorerConfig>(r#"{"type":"attribution","alpha":1.0}"#).unwrap().build();
    assert!(error.err().unwrap().to_string().contains("field `alpha`: found 1, expected a number between 0 and 1"));
}

#[test]
fn coalition_is_the_shapley_value_of_the_experts_of_a_token() {
    let world = World::random(10, &[5, 6, 3, 5, 4], 3, &SEQUENCES, 12);
    // The mean marginal value of an expert over all orders in which the experts of a token come in.
    check(&world, r#"{"type":"coalition","signed":true}"#, |r| {
        let worth = |members: &[&Vec<f64>]| -> f64 {
            (0..r.world.hidden).map(|h| members.iter().map(|v| v[h]).sum::<f64>().powi(2)).sum()
        };
        let of_token = |added: &Vec<(usize, Vec<f64>)>| -> f64 {
            let Some(own) = added.iter().find(|(e, _)| *e == r.index).map(|(_, v)| v) else { return 0.0 };
            let others: Vec<&Vec<f64>> = added.iter().filter(|(e, _)| *e != r.index).map(|(_, v)| v).collect();
            let [a, b] = others[..] else { panic!("three experts per token") };
            let margin = |before: &[&Vec<f64>]| worth(&[before, &[own]].concat()) - worth(before);
            let mean = (2.0 * margin(&[]) + margin(&[a]) + margin(&[b]) + 2.0 * margin(&[a, b])) / 6.0;
            mean / worth(&[a, b, own])
        };
        vec![r.layer.added().iter().map(of_token).sum::<f64>() / r.all()]
    });
    let statistics = world.collect(&[moe_importance::statistics::COALITION, moe_importance::statistics::ROUTED_TOKENS]);
    for layer in score(&world, &statistics, r#"{"type":"coalition","signed":true}"#) {
        let sum: f32 = layer.concat().iter().sum();
        assert!((sum - 1.0).abs() < 1e-5, "the experts of a token share what they give: {sum}");
    }
    for layer in score(&world, &statistics, r#"{"type":"coalition"}"#) {
        assert!(layer.concat().iter().all(|value| *value >= 0.0));
    }
}

#[test]
fn channel_norms_are_norms_and_slimming_weighs_experts_and_layers_beside_them() {
    let world = world();
    check(&world, r#"{"type":"channel_norms"}"#, |r| {
        let [gate, up] =
            [&r.expert.case.gate, &r.expert.case.up].map(|matrix| r.expert.case.input.times_transposed(matrix));
        let norm = |m: &Matrix, j: usize| r.sum(|t| m.at(t, j).powi(2)).sqrt();
        r.units(|j| (norm(&r.u, j) + norm(&up, j) + norm(&gate, j)) / 3.0)
    });
    let config: ScorerConfig = serde_json::from_str(r#"{"type":"slimming"}"#).unwrap();
    let slimming = config.build().unwrap();
    let statistics = world.collect(&slimming.needs().statistics);
    let table = slimming.score(&statistics, &world).unwrap();
    let channels = score(&world, &statistics, r#"{"type":"channel_norms"}"#);
    let experts = score(&world, &statistics, r#"{"type":"attribution"}"#);
    for (position, layer) in table.layers.iter().enumerate() {
        assert_eq!(layer.scores, channels[position]);
        let whole = layer.whole.as_ref().unwrap();
        assert_eq!(whole.experts, experts[position].concat());
        let (added, stream) = (world.layers[position].added(), world.layers[position].stream());
        let of_token = |(t, added): (usize, &Vec<(usize, Vec<f64>)>)| -> f64 {
            let sum = |h: usize| added.iter().map(|(_, v)| v[h]).sum::<f64>();
            (0..world.hidden).map(|h| sum(h).powi(2)).sum::<f64>() / (dot(&stream, t, &stream, t) + 1e-6)
        };
        let loss = added.iter().enumerate().map(of_token).sum::<f64>() / world.tokens() as f64;
        assert!((f64::from(whole.layer) - loss).abs() < 1e-5 * loss, "{} and {loss}", whole.layer);
    }
    // The file keeps them; one score per expert has no wholes beside it.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("scores.safetensors");
    table.save(&path).unwrap();
    assert_eq!(moe_checkpoint::ScoreTable::load(&path).unwrap(), table);
    let reduced = table.to_experts(moe_checkpoint::Reduction::Sum).unwrap();
    assert!(reduced.layers.iter().all(|layer| layer.whole.is_none()));
}

#[test]
fn gradients_of_single_matrices_make_up_those_of_all() {
    let world = world();
    let all = [r#"["gate"]"#, r#"["up"]"#, r#"["down"]"#, r#"["gate","up"]"#]
        .map(|parts| format!(r#"{{"type":"fisher","criterion":"abs","parts":{parts}}}"#));
    let needs = |json: &str| serde_json::from_str::<ScorerConfig>(json).unwrap().build().unwrap().needs().statistics;
    let whole = r#"{"type":"fisher","criterion":"abs"}"#;
    let mut ids = needs(whole);
    all.iter().for_each(|json| ids.extend(needs(json)));
    let statistics = world.collect(&ids);
    let [gate, up, down, both] = all.each_ref().map(|json| score(&world, &statistics, json));
    let whole = score(&world, &statistics, whole);
    for (layer, of_layer) in world.layers.iter().enumerate() {
        for expert in 0..of_layer.experts.len() {
            for (unit, all) in whole[layer][expert].iter().enumerate() {
                let of = |scores: &Vec<Vec<Vec<f32>>>| scores[layer][expert][unit];
                let mean = (of(&gate) + of(&up) + of(&down)) / 3.0;
                assert!((mean - all).abs() <= 1e-5 * all.abs(), "{mean} and {all}");
                let mean = (of(&gate) + of(&up)) / 2.0;
                assert!((mean - of(&both)).abs() <= 1e-5 * mean.abs());
            }
        }
    }
    // One sequence, by hand: the gate row's gradient is the outer product of its pre-activation gradients and inputs.
    let case = Case::random(4, 3, &[SequenceCase { rows: 5, loss_tokens: 5 }], 6);
    let ids = needs(&all[2]);
    let found = common::collect_one(&case, &ids);
    let gradients = case.weight_gradients(0..5);
    let id = moe_importance::statistics::FISHER_ABS_DOWN;
    for (unit, gradients) in gradients.iter().enumerate() {
        let expected = gradients[8..12].iter().map(|g| (g / 5.0).abs()).sum::<f64>() / 4.0;
        let sum = found.unit(id.as_str(), 3, 1).unwrap()[unit];
        assert!((sum - expected).abs() < 1e-5 * expected, "{sum} and {expected}");
    }
    for bad in [r#"{"type":"fisher","parts":["up"]}"#, r#"{"type":"fisher","criterion":"abs","parts":[]}"#] {
        let error = serde_json::from_str::<ScorerConfig>(bad).unwrap().build().err().unwrap().to_string();
        assert!(error.contains("field `parts`"), "{error}");
    }
}

#[test]
fn squares_of_inputs_count_by_the_squared_routing_weight() {
    use moe_importance::statistics::{INPUT_SQUARE_WEIGHTED, UNIT_SQUARE_WEIGHTED};
    let world = world();
    let statistics = world.collect(&[INPUT_SQUARE_WEIGHTED, UNIT_SQUARE_WEIGHTED]);
    for layer in &world.layers {
        for index in 0..layer.experts.len() {
            let r = Rows::new(&world, layer, index);
            let sum = |m: &Matrix, j: usize| r.sum(|t| (r.gates[0][t] * m.at(t, j)).powi(2));
            let inputs = statistics.vector(INPUT_SQUARE_WEIGHTED.as_str(), Extent::Hidden, layer.layer, index).unwrap();
            let units = statistics.unit(UNIT_SQUARE_WEIGHTED.as_str(), layer.layer, index).unwrap();
            assert_eq!((inputs.len(), units.len()), (world.hidden, r.expert.case.width()));
            for (found, expected) in inputs.iter().enumerate().map(|(h, found)| (found, sum(&r.expert.case.input, h))) {
                assert!((found - expected).abs() <= 1e-5 * expected, "{found} and {expected}");
            }
            for (found, expected) in units.iter().enumerate().map(|(j, found)| (found, sum(&r.u, j))) {
                assert!((found - expected).abs() <= 1e-5 * expected, "{found} and {expected}");
            }
        }
    }
}

use std::sync::OnceLock;

use moe_checkpoint::{Activation, ExpertWeights};

use super::*;
use crate::alignment::{AlignmentConfig, UnitBasis};
use crate::combination::Reference;
use crate::plan::{Group, LayerPlan};
use crate::testing::{biased_expert, expert, noise, shuffled};

const HIDDEN: usize = 12;

fn plan(experts: usize, kept: &[u32], importance: &[f64]) -> LayerPlan {
    LayerPlan {
        layer: 1,
        groups: kept.iter().map(|e| Group { dominant: *e, members: vec![*e], weights: vec![1.0] }).collect(),
        dissolved: (0..experts as u32).filter(|e| !kept.contains(e)).collect(),
        protected: vec![],
        importance: importance.iter().map(|v| *v as f32).collect(),
    }
}

fn job<'a>(plan: &'a LayerPlan, experts: &'a Vec<ExpertWeights>) -> LayerJob<'a> {
    static NONE: OnceLock<UnitBasis> = OnceLock::new();
    let (activation, reference) = (Activation::Silu, Reference::Dominant);
    LayerJob { plan, experts, sample: None, activation, alignment: &AlignmentConfig::None, basis: &NONE, reference }
}

fn combine(segments: &Segments, plan: &LayerPlan, experts: &Vec<ExpertWeights>) -> (Vec<Merged>, Vec<RouterAddition>) {
    let mut merged = Vec::new();
    let additions = segments
        .combine(&job(plan, experts), &mut |group, found| {
            assert_eq!(group, merged.len());
            merged.push(found);
            Ok(())
        })
        .unwrap();
    (merged, additions)
}

fn difference(a: &ExpertWeights, b: &ExpertWeights) -> f32 {
    let x = noise(30 * HIDDEN, 5);
    let (a, b) = (a.forward(&x, Activation::Silu), b.forward(&x, Activation::Silu));
    let largest = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

#[test]
fn a_permuted_copy_finds_its_twins_and_changes_nothing() {
    for make in [expert, biased_expert] {
        let (first, second) = (make(HIDDEN, 20, 1), make(HIDDEN, 20, 2));
        let experts = vec![first.clone(), second.clone(), second.select_units(&shuffled(20, 3)).unwrap()];
        let plan = plan(3, &[0, 1], &[0.5, 0.3, 0.2]);
        for segments in [
            Segments::default(),
            Segments { centers: Centers::Own, ..Segments::default() },
            Segments { scale: Scale::Parts, ..Segments::default() },
            Segments { similarity: SegmentSimilarity { gate: true, normalize_parts: true }, ..Segments::default() },
        ] {
            let moved = reassign(&job(&plan, &experts), &segments).unwrap();
            assert!(moved[0].is_empty() && moved[1].len() == 20, "{segments:?}");
            let (merged, _) = combine(&segments, &plan, &experts);
            assert_eq!(merged[0], Merged::Unchanged(0));
            let Merged::Changed(found) = &merged[1] else { panic!("{segments:?}") };
            assert!(difference(found, &second) < 1e-5, "{segments:?}: {}", difference(found, &second));
        }
    }
}

#[test]
fn what_moves_follows_alpha() {
    let experts: Vec<ExpertWeights> = (0..5).map(|seed| expert(HIDDEN, 9, seed + 10)).collect();
    let plan = plan(5, &[1, 3], &[0.1, 0.4, 0.05, 0.3, 0.15]);
    let moved = |alpha| reassign(&job(&plan, &experts), &Segments { alpha, ..Segments::default() }).unwrap();
    // Nothing: plain expert dropping, bit for bit.
    let (merged, additions) = combine(&Segments { alpha: 1.0, ..Segments::default() }, &plan, &experts);
    assert_eq!(merged, [Merged::Unchanged(1), Merged::Unchanged(3)]);
    assert!(additions.is_empty());
    // Everything, each once, to the arg-max expert.
    let all = moved(-1.0);
    let mut seen: Vec<(usize, usize)> = all.iter().flatten().map(|m| (m.expert, m.unit)).collect();
    seen.sort_unstable();
    let expected: Vec<(usize, usize)> = [0, 2, 4].iter().flat_map(|e| (0..9).map(move |u| (*e, u))).collect();
    assert_eq!(seen, expected);
    let vector = |expert: usize, unit: usize| -> Vec<f64> {
        let weights = &experts[expert];
        let up = weights.up[unit * HIDDEN..(unit + 1) * HIDDEN].iter();
        let down = (0..HIDDEN).map(|h| weights.down[h * 9 + unit]);
        up.copied().chain(down).map(f64::from).collect()
    };
    let cosine = |a: &[f64], b: &[f64]| {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    };
    let best = |m: &Moved, to: usize| {
        (0..9).map(|u| cosine(&vector(m.expert, m.unit), &vector(to, u))).fold(f64::NEG_INFINITY, f64::max)
    };
    for (group, moved) in all.iter().enumerate() {
        for m in moved {
            assert!(best(m, [1, 3][group]) >= best(m, [3, 1][group]), "{m:?}");
        }
    }
    let some = moved(0.3);
    for m in some.iter().flatten() {
        assert!(best(m, 1).max(best(m, 3)) > 0.3);
    }
    assert!(some.iter().flatten().count() < 27);
}

#[test]
fn protected_experts_take_nothing() {
    let experts: Vec<ExpertWeights> = (0..3).map(|seed| expert(HIDDEN, 6, seed + 30)).collect();
    let mut plan = plan(3, &[0, 1], &[0.5, 0.3, 0.2]);
    plan.protected = vec![0];
    let moved = reassign(&job(&plan, &experts), &Segments { alpha: -1.0, ..Segments::default() }).unwrap();
    assert_eq!((moved[0].len(), moved[1].len()), (0, 6));
}

fn points(rows: &[[f32; 3]], weights: &[f64], own: usize) -> Points {
    Points { vectors: rows.concat(), length: 3, weights: weights.to_vec(), own, hidden: 1 }
}

#[test]
fn a_cluster_lies_where_its_weights_say() {
    // Two unit vectors with weights 3 and 1: three quarters of the way, in direction.
    let points = points(&[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], &[3.0, 1.0], 1);
    let center = points.cluster(Centers::Own, Scale::Whole, 20).unwrap();
    let expected = [0.75, 0.25, 0.0].map(|v: f32| v / (0.75f32 * 0.75 + 0.25 * 0.25).sqrt());
    assert!(center.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-6), "{center:?}");
}

#[test]
fn a_long_vector_does_not_capture_the_center() {
    let points = points(&[[0.1, 1.0, 0.0], [0.1, 0.0, 1000.0]], &[1.0, 1.0], 1);
    let center = points.cluster(Centers::Own, Scale::Whole, 20).unwrap();
    // Both directions count alike; the length is their mean.
    assert!((center[1] / center[2] - 1.0).abs() < 0.01, "{center:?}");
    let length = center.iter().map(|v| v * v).sum::<f32>().sqrt();
    assert!((length - (1000.0 + 1.01f32.sqrt()) / 2.0).abs() < 0.1, "{length}");
}

#[test]
fn centers_start_at_the_largest_gates_and_pass_over_copies() {
    // Gates 0.1, 0.5 (own), 0.5 again in the same direction, 0.4, 0.2.
    let rows = [[0.1, 1.0, 0.0], [0.5, 0.0, 1.0], [0.5, 0.0, 1.0], [-0.4, -1.0, 0.0], [0.2, 1.0, 1.0]];
    let chosen = |own| points(&rows, &[1.0; 5], own).seeds();
    assert_eq!(chosen(2), [1, 3]);
    assert_eq!(chosen(3), [1, 3, 4]);
    // All of them only when there is no other.
    assert_eq!(chosen(5), [0, 1, 2, 3, 4]);
    assert_eq!(chosen(4), [0, 1, 3, 4]);
}

#[test]
fn nothing_moved_means_nothing_changed() {
    let rows = [[0.1, 1.0, 0.0], [0.5, 0.0, 1.0]];
    assert_eq!(points(&rows, &[1.0; 2], 2).cluster(Centers::LargestGate, Scale::Whole, 20), None);
}

#[test]
fn router_rows_follow_their_segments_on_request() {
    let second = expert(HIDDEN, 10, 2);
    let experts = vec![expert(HIDDEN, 10, 1), second.clone(), second.select_units(&shuffled(10, 3)).unwrap()];
    let plan = plan(3, &[0, 1], &[0.5, 0.3, 0.2]);
    let (_, additions) = combine(&Segments { add_router_rows: true, ..Segments::default() }, &plan, &experts);
    assert_eq!(additions, [RouterAddition { group: 1, expert: 2, share: 1.0 }]);
}

#[test]
fn recombining_beats_dropping_where_structure_is_shared() {
    // Dropped experts hold noisy copies of the kept experts' units, spread over both.
    let kept: Vec<ExpertWeights> = (0..2).map(|seed| expert(HIDDEN, 16, seed + 70)).collect();
    let mut dropped = kept[0].clone();
    for unit in 0..16 {
        let from = &kept[unit % 2];
        let other = (unit * 5 + 3) % 16;
        dropped.gate[unit * HIDDEN..][..HIDDEN].copy_from_slice(&from.gate[other * HIDDEN..][..HIDDEN]);
        dropped.up[unit * HIDDEN..][..HIDDEN].copy_from_slice(&from.up[other * HIDDEN..][..HIDDEN]);
        for h in 0..HIDDEN {
            dropped.down[h * 16 + unit] = from.down[h * 16 + other];
        }
    }
    for (part, seed) in [(&mut dropped.gate, 1), (&mut dropped.up, 2), (&mut dropped.down, 3)] {
        part.iter_mut().zip(noise(HIDDEN * 16, seed)).for_each(|(v, n)| *v = 1.4 * *v + 0.2 * n);
    }
    let experts = vec![kept[0].clone(), kept[1].clone(), dropped];
    let plan = plan(3, &[0, 1], &[0.3, 0.3, 0.4]);
    let (merged, _) = combine(&Segments::default(), &plan, &experts);
    let weights = |merged: &Merged| match merged {
        Merged::Changed(weights) => (**weights).clone(),
        Merged::Unchanged(expert) => experts[*expert].clone(),
    };
    // A layer in which every token uses all three, with the mean of what each held before and after.
    let x = noise(60 * HIDDEN, 6);
    let sum = |experts: &[ExpertWeights], scale: f32| -> Vec<f32> {
        let mut sum = vec![0.0; x.len()];
        for expert in experts {
            let y = expert.forward(&x, Activation::Silu);
            sum.iter_mut().zip(y).for_each(|(s, y)| *s += scale * y);
        }
        sum
    };
    let full = sum(&experts, 1.0 / 3.0);
    let error = |found: &[f32]| found.iter().zip(&full).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
    let dern = error(&sum(&[weights(&merged[0]), weights(&merged[1])], 0.5));
    let drop = error(&sum(&kept, 0.5));
    assert!(dern < drop, "{dern} {drop}");
}

#[test]
fn experts_may_be_of_other_widths() {
    let experts = vec![expert(HIDDEN, 6, 1), expert(HIDDEN, 9, 2)];
    let plan = plan(2, &[0], &[0.6, 0.4]);
    let (merged, _) = combine(&Segments { alpha: -1.0, ..Segments::default() }, &plan, &experts);
    let Merged::Changed(found) = &merged[0] else { panic!() };
    assert_eq!(found.width, 6);
    assert!(found.gate.iter().chain(&found.up).chain(&found.down).all(|v| v.is_finite()));
}

#[test]
fn the_order_of_units_and_experts_does_not_change_what_is_merged() {
    let experts: Vec<ExpertWeights> = (0..4).map(|seed| expert(HIDDEN, 10, seed + 90)).collect();
    // Expert i of the second layer is expert order[i] of the first, with its units in another order.
    let order = [2usize, 0, 3, 1];
    let moved: Vec<ExpertWeights> =
        order.iter().map(|e| experts[*e].select_units(&shuffled(10, *e as u64)).unwrap()).collect();
    let importance = [0.4, 0.1, 0.3, 0.2];
    let (first, second) = (plan(4, &[0, 2], &importance), plan(4, &[0, 1], &order.map(|e: usize| importance[e])));
    let segments = Segments { alpha: 0.2, ..Segments::default() };
    let weights = |merged: &Merged, experts: &[ExpertWeights]| match merged {
        Merged::Changed(weights) => (**weights).clone(),
        Merged::Unchanged(expert) => experts[*expert].clone(),
    };
    let (a, b) = (combine(&segments, &first, &experts).0, combine(&segments, &second, &moved).0);
    assert!(matches!(a[0], Merged::Changed(_)));
    // Dominants 0 and 2 are the second layer's 1 and 0.
    for (x, y) in [(0, 1), (1, 0)] {
        let (x, y) = (weights(&a[x], &experts), weights(&b[y], &moved));
        assert!(difference(&x, &y) < 1e-4, "{}", difference(&x, &y));
    }
}

#[test]
fn an_expert_is_the_sum_of_its_segments() {
    let (width, x) = (9, noise(7 * HIDDEN, 31));
    let whole = expert(HIDDEN, width, 30);
    let mut sum = vec![0.0f64; x.len()];
    for unit in 0..width {
        let row = |values: &[f32]| values[unit * HIDDEN..(unit + 1) * HIDDEN].to_vec();
        let down = (0..HIDDEN).map(|h| whole.down[h * width + unit]).collect();
        let (gate, up) = (row(&whole.gate), row(&whole.up));
        let one = ExpertWeights { gate, up, down, width: 1, hidden: HIDDEN, ..ExpertWeights::default() };
        let outputs = one.forward(&x, Activation::Silu);
        sum.iter_mut().zip(outputs).for_each(|(sum, y)| *sum += f64::from(y));
    }
    let expected = whole.forward(&x, Activation::Silu);
    assert!(sum.iter().zip(expected).all(|(a, b)| (a - f64::from(b)).abs() < 1e-5));
}

#[test]
fn a_moved_segment_adds_its_share_of_importance_to_its_destination() {
    // One unit each: they become one, which points to the weighted mean of their directions.
    let experts = vec![expert(HIDDEN, 1, 1), expert(HIDDEN, 1, 2)];
    let (kept, dropped) = (0.5, 0.2);
    let segments = Segments { alpha: -1.0, ..Segments::default() };
    let (merged, _) = combine(&segments, &plan(2, &[0], &[kept, dropped]), &experts);
    let Merged::Changed(found) = &merged[0] else { panic!("{merged:?}") };
    let direction = |expert: &ExpertWeights| {
        let (mut vector, length) = unit_vectors(expert, UnitParts::ALL);
        crate::linalg::normalize_rows(&mut vector, length);
        vector
    };
    let (a, b) = (direction(&experts[0]), direction(&experts[1]));
    let mut expected: Vec<f32> =
        a.iter().zip(&b).map(|(a, b)| (kept + dropped) as f32 * a + dropped as f32 * b).collect();
    let length = expected.len();
    crate::linalg::normalize_rows(&mut expected, length);
    assert!(direction(found).iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-6));
}

//! Budgets by coverage: what layers and experts keep follows from their own scores and their weights as wholes.

use crate::synthetic;

use moe_checkpoint::{MoeShape, ScoreTable, WholeScores};
use moe_prune::{AllocatorConfig, Budget, Coverage, ProtectionMask, Pruner, UnitPruner, WidthLimits};
use synthetic::{Noise, shape};

fn pruner(coverage: Coverage) -> UnitPruner {
    UnitPruner::with_allocator(AllocatorConfig::Coverage(coverage))
}

fn with_wholes(mut scores: ScoreTable, of: impl Fn(usize, usize) -> f32) -> ScoreTable {
    for (position, layer) in scores.layers.iter_mut().enumerate() {
        let experts: Vec<f32> = (0..layer.scores.len()).map(|expert| of(position, expert)).collect();
        layer.whole = Some(WholeScores { layer: experts.iter().sum::<f32>().max(0.0), experts });
    }
    scores
}

fn widths(pruner: &UnitPruner, scores: &ScoreTable, shape: &MoeShape, ratio: f64) -> Vec<Vec<usize>> {
    let plan = pruner.prune(scores, shape, Budget::Ratio(ratio), &ProtectionMask::none()).unwrap().plan;
    plan.kept.iter().map(|layer| layer.experts.iter().map(Vec::len).collect()).collect()
}

/// One layer of two experts, by hand: scores 4, 3, 2, 1 each, weights 9 and 1.
#[test]
fn an_important_expert_keeps_a_larger_part_of_its_own_scores() {
    let shape = shape(1, 2, 4);
    let scores = synthetic::table(moe_checkpoint::Granularity::Unit, &[vec![vec![4.0, 3.0, 2.0, 1.0]; 2]]);
    let scores = with_wholes(scores, |_, expert| [9.0, 1.0][expert]);
    // Shares 3/4 and 1/4 of the square roots. Units enter at covered / total / share:
    // 0, .4/.75, .7/.75, .9/.75 = 0, .53, .93, 1.2 and 0, 1.6, 2.8, 3.6.
    let pruner = pruner(Coverage::default());
    assert_eq!(widths(&pruner, &scores, &shape, 0.75), [[1, 1]]);
    assert_eq!(widths(&pruner, &scores, &shape, 0.625), [[2, 1]]);
    assert_eq!(widths(&pruner, &scores, &shape, 0.375), [[4, 1]]);
    assert_eq!(widths(&pruner, &scores, &shape, 0.25), [[4, 2]]);
    // The best units stay.
    let plan = pruner.prune(&scores, &shape, Budget::Ratio(0.625), &ProtectionMask::none()).unwrap().plan;
    assert_eq!(plan.kept[0].experts, [vec![0, 1], vec![0]]);
}

#[test]
fn equal_layers_keep_alike_and_a_dominant_channel_needs_few() {
    let shape = shape(3, 2, 8);
    let flat = vec![vec![1.0; 8]; 2];
    let equal = synthetic::table(moe_checkpoint::Granularity::Unit, &[flat.clone(), flat.clone(), flat.clone()]);
    let equal = with_wholes(equal, |_, _| 1.0);
    assert_eq!(widths(&pruner(Coverage::default()), &equal, &shape, 0.5), [[4, 4]; 3]);
    let peaked = vec![[vec![100.0], vec![0.01; 7]].concat(), vec![0.01; 8]];
    let one = synthetic::table(moe_checkpoint::Granularity::Unit, &[flat.clone(), peaked, flat]);
    let one = with_wholes(one, |_, _| 1.0);
    let found = widths(&pruner(Coverage::default()), &one, &shape, 0.5);
    let [first, peaked, last] = [0, 1, 2].map(|layer: usize| found[layer].iter().sum::<usize>());
    // Of 24 units one layer needs but one, and 23 do not halve: the earlier of two equal layers has the odd one.
    assert_eq!((first, peaked, last), (12, 1, 11), "{found:?}");
}

#[test]
fn budgets_are_met_to_the_unit_however_small_and_more_budget_never_keeps_less_of_a_layer() {
    let shape = shape(4, 3, 10);
    let mut noise = Noise(3);
    let scores = noise.units(&shape);
    let weights: Vec<f32> = (0..12).map(|_| noise.next() as f32).collect();
    let scores = with_wholes(scores, |layer, expert| weights[3 * layer + expert]);
    let mut before = vec![0; 4];
    for percent in (5..=90).rev().step_by(5) {
        let ratio = f64::from(percent) / 100.0;
        let found = widths(&pruner(Coverage::default()), &scores, &shape, ratio);
        let layers: Vec<usize> = found.iter().map(|layer| layer.iter().sum()).collect();
        assert_eq!(layers.iter().sum::<usize>(), 120 - (120.0 * ratio).floor() as usize, "{percent}%");
        assert!(layers.iter().zip(&before).all(|(now, before)| now >= before), "{percent}%: {layers:?} {before:?}");
        before = layers;
    }
}

#[test]
fn permuted_experts_permute_the_plan() {
    let shape = shape(2, 4, 6);
    let mut noise = Noise(11);
    let scores = with_wholes(noise.units(&shape), |_, expert| 1.0 + expert as f32);
    let mut turned = scores.clone();
    for layer in &mut turned.layers {
        layer.scores.reverse();
        layer.whole.as_mut().unwrap().experts.reverse();
    }
    let pruner = pruner(Coverage::default());
    let [found, mut back] = [&scores, &turned].map(|scores| widths(&pruner, scores, &shape, 0.4));
    back.iter_mut().for_each(|layer| layer.reverse());
    assert_eq!(found, back);
}

#[test]
fn narrow_experts_go_whole_and_their_units_to_others() {
    let shape = shape(2, 4, 16);
    let mut noise = Noise(7);
    // An expert that the layer is better without, and one that hardly matters.
    let scores = with_wholes(noise.units(&shape), |_, expert| [4.0, -1.0, 3.0, 1e-9][expert]);
    let evicting = pruner(Coverage { min_units: 3, ..Coverage::default() });
    let pruned = evicting.prune(&scores, &shape, Budget::Ratio(0.5), &ProtectionMask::none()).unwrap();
    assert_eq!(pruned.plan.units_kept(), 64, "the total is kept");
    for layer in &pruned.plan.kept {
        let widths: Vec<usize> = layer.experts.iter().map(Vec::len).collect();
        assert!(widths.iter().all(|width| *width == 0 || *width >= 3), "{widths:?}");
        assert_eq!(layer.removed.contains(&1), widths[1] == 0);
        assert_eq!(widths[1], 0, "{widths:?}");
    }
    let keeping = pruner(Coverage { min_units: 3, remove_emptied: false, ..Coverage::default() });
    let plan = keeping.prune(&scores, &shape, Budget::Ratio(0.5), &ProtectionMask::none()).unwrap().plan;
    assert!(plan.kept.iter().all(|layer| layer.removed.is_empty()));
    // Too few experts for the router are an error that names the layer.
    let mut four = shape.clone();
    four.top_k = 4;
    let error = evicting.prune(&scores, &four, Budget::Ratio(0.5), &ProtectionMask::none()).unwrap_err().to_string();
    assert!(error.contains("layer 1") && error.contains("the router selects 4"), "{error}");
}

#[test]
fn protection_and_multiples_hold() {
    let shape = shape(2, 3, 16);
    let mut noise = Noise(9);
    let scores = with_wholes(noise.units(&shape), |_, expert| [2.0, 1.0, -1.0][expert]);
    let mut protect = ProtectionMask::none();
    protect.protect_expert(3, 2);
    let mut pruner = pruner(Coverage { min_units: 4, ..Coverage::default() });
    pruner.limits = WidthLimits { round_to: 4, ..WidthLimits::default() };
    let plan = pruner.prune(&scores, &shape, Budget::Ratio(0.5), &protect).unwrap().plan;
    assert_eq!(plan.kept[1].experts[2].len(), 16);
    assert!(plan.kept.iter().flat_map(|layer| &layer.experts).all(|kept| kept.len() % 4 == 0));
    assert_eq!(plan.units_kept(), 48);
}

#[test]
fn scores_without_wholes_are_refused_with_the_scorer_that_has_them() {
    let shape = shape(1, 2, 4);
    let scores = Noise(1).units(&shape);
    let error = pruner(Coverage::default()).prune(&scores, &shape, Budget::Ratio(0.5), &ProtectionMask::none());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("without weights of layers and experts") && error.contains("`slimming`"), "{error}");
}

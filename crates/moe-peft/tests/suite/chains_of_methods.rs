//! Experts trained on what merging and pruning made, without a directory in between.

use crate::chain;
use crate::common;
use crate::forms;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use chain::{dora, experts, learn_much, learn_nothing};
use forms::open;
use moe_checkpoint::{Checkpoint, Denominator, Granularity, LayerScores, Pool, ProtectionMask, Provenance, ScoreTable};
use moe_merge::{Amount, Evidence, LayerEvidence, MergeOptions, OutputForm, Recipe};
use moe_prune::{Budget, FineGrained, PruneForm, PruneOptions, Pruner, Scope, SharedSets, UnitPruner};

/// Checkpoints of which experts are merged, pruned and cut: every layout.
fn bases() -> Vec<(String, Arc<Checkpoint>)> {
    let names = ["qwen2_moe", "qwen2_moe_bf16", "mixtral", "gpt_oss", "gpt_oss_mxfp4", "deepseek_v3_fp8", "olmoe"];
    let tiny = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    let mut bases: Vec<_> = names.into_iter().map(|name| (name.to_string(), open(common::fixture(name)))).collect();
    bases.push(("tiny-moe".into(), open(tiny)));
    bases
}

/// Numbers above 0 without a pattern.
fn positive(len: usize, seed: usize) -> Vec<f64> {
    common::noise(len, seed).into_iter().map(|value| f64::from(value.abs()) + 0.01).collect()
}

/// `merge --recipe m-smoe`, whose output is grouped: experts share the weights that they were merged to.
fn merged(base: &Arc<Checkpoint>) -> Arc<Checkpoint> {
    let recipe = Recipe::named("m-smoe").unwrap().with_amount(Amount::Ratio(0.5));
    let layers = base.shape().layers.iter().map(|layer| {
        let experts = layer.num_experts();
        let columns = positive(experts * 20, layer.layer + 3);
        let gram = (0..experts * experts).map(|at| {
            let row = |expert: usize| &columns[expert * 20..(expert + 1) * 20];
            row(at / experts).iter().zip(row(at % experts)).map(|(a, b)| a * b).sum()
        });
        let sums = [("routing.tokens".to_string(), positive(experts, layer.layer))];
        LayerEvidence {
            layer: layer.layer,
            tokens: 60,
            sums: BTreeMap::from(sums),
            logit_gram: Some(gram.collect()),
            outputs: BTreeMap::new(),
            sample: None,
        }
    });
    let evidence = Evidence { model: base.fingerprint(), data: "noise".into(), layers: layers.collect() };
    let plan = recipe.plan(base, &evidence, &ProtectionMask::none()).unwrap();
    let model = plan.on(base, &MergeOptions::new(OutputForm::Grouped)).unwrap().model().clone();
    assert!(model.grouped());
    model
}

/// Scores of units without a pattern.
fn scores(model: &Checkpoint) -> ScoreTable {
    let layers = model.shape().layers.iter().map(|layer| LayerScores {
        layer: layer.layer,
        scores: layer
            .widths
            .iter()
            .enumerate()
            .map(|(expert, width)| positive(*width, expert + layer.layer).into_iter().map(|v| v as f32).collect())
            .collect(),
        routed: None,
        whole: None,
    });
    ScoreTable {
        scorer: r#"{"type":"noise"}"#.into(),
        granularity: Granularity::Unit,
        pool: Pool::Global,
        additive: Some(Pool::Global),
        denominator: Denominator::None,
        layers: layers.collect(),
        provenance: Provenance::new(model.fingerprint(), "", "{}"),
    }
}

/// A third of all units gone, the worst of each layer: experts of different widths.
fn pruned(model: &Arc<Checkpoint>) -> Arc<Checkpoint> {
    let (pruner, budget, nothing) = (UnitPruner::new(Scope::Layer), Budget::Ratio(0.3), ProtectionMask::none());
    let plan = match SharedSets::of(model) {
        Some(shared) => shared.prune(&pruner, &scores(model), budget, &nothing).unwrap(),
        None => pruner.prune(&scores(model), model.shape(), budget, &nothing).unwrap().plan,
    };
    let pruned = plan.on(model, &PruneOptions::new(PruneForm::Ragged)).unwrap().model().clone();
    assert!(pruned.ragged() && pruned.shape().units() < model.shape().units());
    pruned
}

/// Half of all units gone, what is left in two pieces per expert: a stock model of narrow experts.
fn in_pieces(model: &Arc<Checkpoint>) -> Arc<Checkpoint> {
    let scores = scores(model);
    let pieces = FineGrained { ranking: Some(&scores), ..FineGrained::new(2) };
    let plan = pieces.prune(&scores, model, 0.25).unwrap();
    let cut = plan.on(model, &PruneOptions::new(PruneForm::FineGrained(pieces))).unwrap().model().clone();
    assert!(!cut.ragged() && cut.shape().layers[0].num_experts() > model.shape().layers[0].num_experts());
    cut
}

#[test]
fn experts_are_trained_on_what_merging_and_pruning_made() {
    let dir = tempfile::tempdir().unwrap();
    let mut cut = 0;
    for (name, base) in bases() {
        let grouped = merged(&base);
        let mut chain =
            vec![("merged", grouped.clone()), ("pruned", pruned(&base)), ("merged and pruned", pruned(&grouped))];
        if base.shape().uniform_width().is_some_and(|width| width % 2 == 0) && base.mtp_tensors().next().is_none() {
            chain.push(("in pieces", in_pieces(&base)));
            cut += 1;
        }
        for (form, model) in chain {
            let what = format!("{name}, {form}");
            learn_nothing(&model, &dir.path().join(&what), &what);
            for config in [experts(), dora()] {
                let what = format!("{name}, {form}, DoRA {}", config.use_dora);
                learn_much(&model, &config, &dir.path().join(&what), &what);
            }
        }
    }
    assert!(cut > 3);
}

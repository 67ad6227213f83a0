//! Evidence from runs, merges as overlays, layers merged one after the other.

use crate::common;

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;

use common::run::{difference, logits, logits_of};
use common::{files, open, options, parity, written};
use moe_checkpoint::{Checkpoint, ProtectionMask};
use moe_core::Model;
use moe_core::data::{Sequence, Wave};
use moe_core::device::device;
use moe_importance::{Calibration, statistics::FISHER_SEQUENCE};
use moe_merge::{
    Amount, Evidence, EvidenceOptions, LayerContext, LayerExperts, MergeOptions, OutputForm, OutputMean, Recipe,
    RouterConfig, collect_evidence, merge_sequentially,
};
use tempfile::tempdir;

fn model(name: &str) -> Model {
    Model::open(parity(name), &device("flex").unwrap(), None).unwrap()
}

fn waves() -> Vec<Wave> {
    let sequence =
        |seed: usize, n: usize| Sequence::new((0..n).map(|i| ((i * i * 7 + i * 3 + seed * 11) % 90) as u32).collect());
    vec![
        Wave { id: 3, sequences: vec![sequence(1, 33), sequence(2, 15)] },
        Wave { id: 1, sequences: vec![sequence(3, 40)] },
    ]
}

fn everything(sample: usize) -> EvidenceOptions {
    let recipes: Vec<Recipe> = Recipe::names().map(|name| Recipe::named(name).unwrap()).collect();
    EvidenceOptions::for_recipes(&recipes, sample)
}

fn collect(model: &Model, options: &EvidenceOptions) -> Evidence {
    collect_evidence(model, &waves(), options, None, &mut |_| {}).unwrap()
}

#[test]
fn a_sample_is_what_the_layers_saw() {
    let model = model("tf5/qwen2_moe");
    let whole = collect(&model, &everything(1000));
    for layer in &whole.layers {
        let sample = layer.sample.as_ref().unwrap();
        assert_eq!((sample.tokens(), layer.tokens), (88, 88));
        let experts = model.config().moe(layer.layer).unwrap().num_experts();
        for expert in 0..experts {
            let routed = sample.weights_of(expert).iter().filter(|w| **w != 0.0).count();
            assert_eq!(layer.sums["routing.tokens"][expert], routed as f64);
            // DERN's importance: the share of the weights of a token's experts, 0 where it is not selected.
            let share = |token: usize| {
                let all: f64 = (0..experts).map(|e| f64::from(sample.weights_of(e)[token])).sum();
                f64::from(sample.weights_of(expert)[token]) / all
            };
            let expected: f64 = (0..88).map(share).sum();
            assert!((layer.sums["routing.renormalized"][expert] - expected).abs() < 1e-4);
        }
        // The Gram matrix of the sampled logits is that of all tokens.
        let gram = layer.logit_gram.as_ref().unwrap();
        for (k, found) in gram.iter().enumerate() {
            let (i, j) = (k / experts, k % experts);
            let expected: f64 = sample.logits.chunks_exact(experts).map(|z| f64::from(z[i]) * f64::from(z[j])).sum();
            assert!((found - expected).abs() < 1e-4 * (1.0 + expected.abs()));
        }
        // Exact mean outputs are those of all tokens, run on the host.
        let checkpoint = model.checkpoint();
        let without = moe_merge::LayerEvidence { outputs: Default::default(), ..layer.clone() };
        let context = LayerContext {
            layer: layer.layer,
            experts: &LayerExperts { checkpoint, layer: layer.layer },
            router: None,
            evidence: &without,
            activation: checkpoint.config().hidden_act,
            importance: &vec![1.0; experts],
            protected: &vec![false; experts],
            router_groups: 1,
        };
        for over in [OutputMean::All, OutputMean::Gated] {
            let (found, expected) = (&layer.outputs[&over], context.mean_outputs(over).unwrap());
            let largest = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5 * largest), "{over:?}");
        }
    }
}

#[test]
fn a_small_sample_is_a_part_of_a_large_one_whatever_the_order_of_the_waves() {
    let model = model("tf5/qwen2_moe");
    let of = |sample, seed| {
        let options = EvidenceOptions { seed, sample, ..everything(0) };
        collect(&model, &options).layers.into_iter().map(|layer| layer.sample.unwrap()).collect::<Vec<_>>()
    };
    let (large, small, again, other) = (of(40, 0), of(12, 0), of(12, 0), of(12, 1));
    assert_eq!(small, again);
    assert_ne!(small[0], other[0]);
    let rows = |sample: &moe_merge::TokenSample| -> BTreeSet<Vec<u32>> {
        sample.inputs.chunks_exact(sample.hidden).map(|x| x.iter().map(|v| v.to_bits()).collect()).collect()
    };
    for (small, large) in small.iter().zip(&large) {
        assert_eq!((small.tokens(), large.tokens()), (12, 40));
        assert!(rows(small).is_subset(&rows(large)));
    }
    let mut turned = waves();
    turned.reverse();
    let options = EvidenceOptions { sample: 12, ..everything(0) };
    let turned = collect_evidence(&model, &turned, &options, None, &mut |_| {}).unwrap();
    assert_eq!(turned.layers[0].sample.as_ref().unwrap(), &small[0]);
}

#[test]
fn every_recipe_merges_a_model_on_its_own_evidence() {
    let directory = tempdir().unwrap();
    let model = model("tf5/qwen2_moe");
    let evidence = collect(&model, &everything(60));
    let file = directory.path().join("evidence.safetensors");
    evidence.save(&file).unwrap();
    let evidence = Arc::new(Evidence::load(&file).unwrap());
    for recipe in Recipe::names().map(|name| Recipe::named(name).unwrap().with_amount(Amount::Ratio(0.5))) {
        let plan = recipe.plan(model.checkpoint(), &evidence, &ProtectionMask::none()).unwrap();
        let out = directory.path().join(&recipe.name);
        let options =
            MergeOptions { evidence: Some(evidence.clone()), ..options(OutputForm::Grouped, model.checkpoint()) };
        let report = written(&plan, model.checkpoint(), &out, &options).unwrap();
        assert!(report.bytes.after < report.bytes.before);
        assert!(logits(&out).iter().all(|v| v.is_finite()), "{}", recipe.name);
    }
}

#[test]
fn a_sequential_merge_is_the_checkpoint_it_is_applied_to() {
    for name in ["tf5/qwen2_moe", "tf5/mixtral", "tf5/qwen2_moe_bf16"] {
        let directory = tempdir().unwrap();
        let model = model(name);
        for recipe in ["ream", "hc-smoe", "dern", "uncurl"] {
            let recipe = Recipe::named(recipe).unwrap().with_amount(Amount::Ratio(0.5));
            let (work, out) =
                (directory.path().join(format!("{}-work", recipe.name)), directory.path().join(&recipe.name));
            let options = EvidenceOptions::for_recipe(&recipe, 64);
            let none = ProtectionMask::none();
            let merged = merge_sequentially(&model, &waves(), &recipe, &none, &options, &work).unwrap();
            let groups = model.checkpoint().shape().layers.iter().map(|l| l.num_experts() - l.num_experts() / 2);
            assert_eq!(merged.plan().groups(), groups.sum::<usize>());
            let form = if recipe.router.keeps_rows() { OutputForm::Grouped } else { OutputForm::Stock };
            let apply = MergeOptions { merged: Some(merged.clone()), ..MergeOptions::new(form) };
            written(merged.plan(), model.checkpoint(), &out, &apply).unwrap();
            let read = merged.plan().on(model.checkpoint(), &apply).unwrap();
            let found = logits_of(&Model::new(read.model().clone(), model.device(), None).unwrap());
            assert_eq!(found, logits(&out), "{name} {}", recipe.name);

            // The first layer saw the model as it was, the last one did not.
            let evidence = collect(&model, &options);
            let at_once = recipe.plan(model.checkpoint(), &evidence, &none).unwrap();
            assert_eq!(at_once.layers[0].groups.len(), merged.plan().layers[0].groups.len());
            assert_eq!(at_once.layers[0], merged.plan().layers[0]);
            if recipe.name != "dern" {
                let last = at_once.layers.len() - 1;
                assert_ne!(at_once.layers[last].importance, merged.plan().layers[last].importance, "{name}");
            }
        }
    }
}

#[test]
fn a_sequential_merge_goes_on_where_it_stopped() {
    let directory = tempdir().unwrap();
    let model = model("tf5/qwen2_moe");
    let recipe = Recipe::named("ream").unwrap().with_amount(Amount::Ratio(0.5));
    let options = EvidenceOptions::for_recipe(&recipe, 64);
    let run = |dir: &str, recipe: &Recipe| {
        let none = ProtectionMask::none();
        merge_sequentially(&model, &waves(), recipe, &none, &options, &directory.path().join(dir))
    };
    let whole = files(run("whole", &recipe).unwrap().dir());
    let again = run("again", &recipe).unwrap();
    assert!(files(again.dir()) == whole);
    for file in ["plan.json", "layer-001.json"] {
        fs::remove_file(again.dir().join(file)).unwrap();
    }
    assert!(moe_merge::MergedWeights::open(again.dir()).is_err());
    assert!(files(run("again", &recipe).unwrap().dir()) == whole);
    let error = run("again", &recipe.clone().with_amount(Amount::Ratio(0.25))).unwrap_err().to_string();
    assert!(error.contains("run.json") && error.contains("digest"), "{error}");
    let opened = moe_merge::MergedWeights::open(again.dir()).unwrap();
    assert_eq!(opened.plan(), again.plan());
}

#[test]
fn merging_nothing_sequentially_changes_nothing() {
    let directory = tempdir().unwrap();
    let model = model("tf5/gpt_oss");
    for router in [RouterConfig::Keep, RouterConfig::Delete] {
        let mut recipe = Recipe::named("ream").unwrap().with_amount(Amount::Ratio(0.0));
        recipe.router = router;
        let work = directory.path().join(format!("{router:?}"));
        let options = EvidenceOptions::for_recipe(&recipe, 8);
        let merged = merge_sequentially(&model, &waves(), &recipe, &ProtectionMask::none(), &options, &work).unwrap();
        assert!(merged.plan().is_identity());
        let out = directory.path().join(format!("{router:?}-out"));
        let apply = MergeOptions { merged: Some(merged.clone()), ..MergeOptions::new(OutputForm::Grouped) };
        let read = merged.plan().on(model.checkpoint(), &apply).unwrap();
        let read = Model::new(read.model().clone(), model.device(), None).unwrap();
        assert_eq!(logits_of(&read), logits_of(&model));
        written(merged.plan(), model.checkpoint(), &out, &apply).unwrap();
        assert!(common::contents(&Checkpoint::open(&out).unwrap()) == common::contents(model.checkpoint()));
    }
}

#[test]
fn a_budget_that_layers_share_cannot_be_spent_one_after_the_other() {
    let directory = tempdir().unwrap();
    let model = model("tf5/qwen2_moe");
    let recipe = Recipe::named("m-smoe").unwrap();
    let options = EvidenceOptions::for_recipe(&recipe, 8);
    let error = merge_sequentially(&model, &waves(), &recipe, &ProtectionMask::none(), &options, directory.path());
    assert!(error.unwrap_err().to_string().contains("budget.scope"));
}

#[test]
fn compressed_experts_are_shown_in_place_of_their_own() {
    use moe_merge::{CompactModel, Compression, Ranks, RowScore};
    let directory = tempdir().unwrap();
    let model = model("tf5/qwen2_moe");
    let checkpoint = model.checkpoint();
    // How far the logits are from the model's, and the matrices from its matrices.
    let errors_at = |keep_rows: f64| {
        let out = directory.path().join(keep_rows.to_string());
        let how = Compression { rank: 6, keep_rows, rows: RowScore::Magnitude, ranks: Ranks::Same };
        how.compress(checkpoint, &out, None, false).unwrap();
        let compact = CompactModel::open(&out).unwrap();
        let mut squares = 0.0;
        for layer in &checkpoint.shape().layers {
            for expert in 0..layer.num_experts() {
                let own = checkpoint.expert(layer.layer, expert).unwrap();
                let shown = compact.expert(layer.layer, expert).unwrap().dense();
                for (own, shown) in [(own.gate, shown.gate), (own.up, shown.up), (own.down, shown.down)] {
                    squares += own.iter().zip(&shown).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
                }
            }
        }
        let formed = compact.on(checkpoint, Some(moe_checkpoint::Dtype::F32)).unwrap();
        let formed = Model::new(formed.model().clone(), model.device(), None).unwrap();
        (difference(&logits_of(&formed), &logits_of(&model)), squares)
    };
    let [none, half, all] = [0.0, 0.5, 1.0].map(errors_at);
    // With all rows of S nothing is lost. Fewer rows are worse matrices, though of a model of random weights not always
    // worse logits.
    assert!(all.0 < 1e-4 && all.1 < 1e-6, "{all:?}");
    assert!(half.0 > 1e-3 && none.0 > 1e-3, "{half:?} {none:?}");
    assert!(all.1 < 0.01 * half.1 && half.1 < 0.9 * none.1, "{half:?} {none:?}");
    // Fisher scores of units of this very model.
    let id = moe_importance::StatisticId::from("fisher.token".to_string());
    let calibration = moe_importance::Calibration::of_waves(&model, &waves()).statistics([id]);
    let statistics = calibration.run(&mut |_| {}).unwrap();
    let how = Compression { rank: 6, keep_rows: 0.5, rows: RowScore::Fisher, ranks: Ranks::Same };
    let out = directory.path().join("fisher");
    let report = how.compress(model.checkpoint(), &out, Some((&statistics, "fisher.token")), false).unwrap();
    assert_eq!(report.rows_kept, report.rows / 2);
    // Ranks of 6 on average, the higher the more important an expert is.
    let unequal = Compression { keep_rows: 0.0, rows: RowScore::Magnitude, ranks: Ranks::Importance, ..how };
    let ranked = directory.path().join("ranks");
    unequal.compress(model.checkpoint(), &ranked, Some((&statistics, "fisher.token")), false).unwrap();
    let compact = CompactModel::open(&ranked).unwrap();
    let mut found: Vec<(f64, usize)> = Vec::new();
    for layer in &model.checkpoint().shape().layers {
        for expert in 0..layer.num_experts() {
            let importance = statistics.unit("fisher.token", layer.layer, expert).unwrap().iter().sum();
            let expert = compact.expert(layer.layer, expert).unwrap();
            assert_eq!((expert.gate.rank, expert.down.rank), (expert.up.rank, expert.up.rank));
            found.push((importance, expert.gate.rank));
        }
    }
    found.sort_by(|a, b| a.0.total_cmp(&b.0));
    assert!(found.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{found:?}");
    assert!(found[0].1 < found[found.len() - 1].1, "{found:?}");
    let sum: usize = found.iter().map(|(_, rank)| rank).sum();
    assert!(sum <= 6 * found.len() && sum > 5 * found.len(), "{found:?}");
    compact.on(model.checkpoint(), None).unwrap();
    let refused = unequal.compress(model.checkpoint(), &directory.path().join("x"), None, false).unwrap_err();
    assert!(refused.to_string().contains("compression.ranks"), "{refused}");
    let other = moe_merge::CompactModel::open(&out).unwrap();
    let stranger = open(parity("tf5/mixtral"));
    assert!(other.on(&stranger, None).unwrap_err().to_string().contains("compact model was made for"));
}

#[test]
fn dense_outputs_are_the_same_beside_statistics_that_ask_for_gradients() {
    let model = model("tf5/qwen2_moe");
    let options = EvidenceOptions { statistics: BTreeSet::new(), dense_outputs: true, sample: 0, seed: 0 };
    let alone = collect(&model, &options);
    // With gradients, experts are shown in the backward sweep, after all layers of the forward sweep.
    let waves = waves();
    let calibration = Calibration::of_waves(&model, &waves).statistics([FISHER_SEQUENCE]);
    let statistics = options.observe(&model, calibration).run(&mut |_| {}).unwrap();
    let beside = Evidence::from_statistics(&statistics).unwrap();
    for (alone, beside) in alone.layers.iter().zip(&beside.layers) {
        assert_eq!(alone.outputs.keys().collect::<Vec<_>>(), [&OutputMean::All, &OutputMean::Gated]);
        for over in [OutputMean::All, OutputMean::Gated] {
            assert!(alone.outputs[&over].iter().any(|mean| *mean != 0.0));
            assert_eq!(alone.outputs[&over], beside.outputs[&over], "{over:?} of layer {}", alone.layer);
        }
    }
}

#[test]
fn sequential_reap_keeps_what_is_salient_in_the_model_pruned_so_far() {
    let directory = tempdir().unwrap();
    let model = model("tf5/qwen2_moe");
    let recipe = Recipe::named("reap-sequential").unwrap().with_amount(Amount::Ratio(0.5));
    let options = EvidenceOptions::for_recipe(&recipe, 0);
    let none = ProtectionMask::none();
    let merged = merge_sequentially(&model, &waves(), &recipe, &none, &options, directory.path()).unwrap();
    let last = merged.plan().layers.len() - 1;
    let mut so_far = merged.plan().clone();
    let (layer, count) = (so_far.layers[last].layer, model.checkpoint().shape().layers[last].num_experts());
    so_far.layers[last] = moe_merge::LayerPlan::keep_all(layer, count);
    so_far.ratio.achieved = 1.0 - so_far.groups() as f64 / so_far.experts() as f64;
    let below = so_far.on(model.checkpoint(), &MergeOptions::new(OutputForm::Grouped)).unwrap();
    let below = Model::new(below.model().clone(), model.device(), None).unwrap();
    let importance = &collect(&below, &options).layers[last];
    let saliency = recipe.importance.of(importance, count).unwrap();
    let mut ranked: Vec<u32> = (0..count as u32).collect();
    ranked.sort_by(|a, b| saliency[*b as usize].total_cmp(&saliency[*a as usize]));
    ranked.truncate(count / 2);
    ranked.sort_unstable();
    let kept: Vec<u32> = merged.plan().layers[last].groups.iter().map(|group| group.dominant).collect();
    assert_eq!(kept, ranked);
}

//! Merging and pruning of one checkpoint, side by side and one after the other.

use std::path::Path;
use std::sync::Arc;

#[path = "../../crates/moe-merge/tests/common/mod.rs"]
#[allow(dead_code)]
mod common;

use common::{checkpoints, contents, open, options, parity, plain, plan, written};
use moe_checkpoint::{
    Checkpoint, LayerRole, Mtp, ProtectionMask, Provenance, Reduction, Role, ScoreTable, Statistics, WriteOptions,
    write,
};
use moe_merge::{CombinationConfig, DominantOnly, GroupingConfig, MergeOptions, OutputForm, Retain, RouterConfig};
use moe_prune::{
    Budget, Edits, ExpertEdit, ExpertPruner, FineGrained, PruneForm, PruneOptions, PrunePlan, PrunedModel,
    PrunedPrecision, Pruner, Scope, SharedSets, UnitPruner,
};
use tempfile::tempdir;

#[test]
fn dominants_alone_are_expert_pruning_to_the_byte() {
    let directory = tempdir().unwrap();
    for (name, model) in checkpoints().into_iter().filter(|(_, model)| model.config().routing.groups().is_none()) {
        // Its attention has as many experts: a merge of them is refused for stock loaders.
        if model.config().model_type == "jetmoe" {
            continue;
        }
        let mut recipe = plain(0.5);
        if model.shape().layers[0].num_experts() / 2 < model.shape().top_k {
            recipe = plain(0.25);
        }
        recipe.combination = CombinationConfig::DominantOnly(DominantOnly {});
        recipe.router = RouterConfig::Delete;
        let merged = plan(&recipe, &model);
        // A table that names experts by tokens has no rows to delete.
        if model.config().routes_by_tables() {
            let refused = written(&merged, &model, &directory.path().join(&name), &options(OutputForm::Stock, &model));
            assert!(refused.unwrap_err().to_string().contains("experts that a table names"), "{name}");
            continue;
        }
        recipe.grouping = GroupingConfig::Retain(Retain {});
        let dissolved = plan(&recipe, &model);
        let pruned = directory.path().join(format!("{name}-pruned"));
        let mtp = model.mtp_tensors().next().map(|_| Mtp::Drop);
        // Merging writes BF16, and so is it compared.
        let precision = PrunedPrecision::Bf16;
        let export = PruneOptions { mtp, allow_unaligned: true, precision, ..PruneOptions::new(PruneForm::Uniform) };
        let plan = PrunePlan::without_experts(model.shape(), model.fingerprint(), &merged.removed()).unwrap();
        let base = Arc::new(Checkpoint::open(model.dir()).unwrap());
        write(plan.on(&base, &export).unwrap().model(), &pruned, &WriteOptions::default()).unwrap();
        let pruned = Checkpoint::open(&pruned).unwrap();
        for (which, plan) in [("merged", merged), ("dissolved", dissolved)] {
            let out = directory.path().join(format!("{name}-{which}"));
            let report = written(&plan, &model, &out, &options(OutputForm::Stock, &model)).unwrap();
            let result = Checkpoint::open(&out).unwrap();
            let (found, expected) = (contents(&result), contents(&pruned));
            assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{name} {which}");
            for (tensor, found) in &found {
                assert!(*found == expected[tensor], "{name} {which} {tensor}");
            }
            assert_eq!(result.raw_config(), pruned.raw_config(), "{name} {which}");
            // FP4 becomes BF16, which is more than half the experts save.
            assert!(report.bytes.after < report.bytes.before || name.contains("mxfp4"), "{name}");
        }
    }
}

#[test]
fn a_grouped_checkpoint_is_pruned_by_its_sets() {
    let directory = tempdir().unwrap();
    let model = open(parity("tf5/qwen2_moe"));
    let out = directory.path().join("grouped");
    let plan = plan(&plain(0.5), &model);
    written(&plan, &model, &out, &MergeOptions::new(OutputForm::Grouped)).unwrap();
    let grouped = Arc::new(Checkpoint::open(&out).unwrap());
    let mut prune = PrunePlan::keep_all(grouped.shape(), grouped.fingerprint());
    let same = prune.on(&grouped, &PruneOptions::new(PruneForm::Masked)).unwrap();
    assert_eq!(contents(same.model()), contents(&grouped));
    let moe = grouped.config().moe(prune.kept[0].layer).unwrap();
    let shared = (1..moe.num_experts()).find(|expert| moe.stored(*expert) == moe.stored(0)).unwrap();
    let (before, units) = (prune.kept[0].experts[0].clone(), prune.shape.units() as f64);
    prune.kept[0].experts[0].truncate(8);
    prune.ratio.achieved = (before.len() - 8) as f64 / units;
    let error = prune.on(&grouped, &PruneOptions::new(PruneForm::Ragged)).unwrap_err();
    assert!(error.to_string().contains(&format!("experts 0 and {shared} of layer 0 share")), "{error}");
}

/// A merged checkpoint whose experts share sets, and the same with a copy of its set for every expert.
fn shared_and_copied(model: &Arc<Checkpoint>) -> [Arc<Checkpoint>; 2] {
    let merged = plan(&plain(0.5), model);
    [OutputForm::Grouped, OutputForm::StockCopies]
        .map(|form| merged.on(model, &options(form, model)).unwrap().model().clone())
}

/// Scores without a pattern, which differ between experts that share a set.
fn scores(model: &Checkpoint) -> ScoreTable {
    let scorer = moe_importance::ScorerConfig::from(moe_importance::scorers::Magnitude::new()).build().unwrap();
    let provenance = Provenance::new(model.fingerprint(), "", "{}");
    let mut table = scorer.score(&Statistics::new(model.shape(), provenance), model).unwrap();
    for (salt, layer) in table.layers.iter_mut().enumerate() {
        for (expert, values) in layer.scores.iter_mut().enumerate() {
            let factor = |unit: usize| 1.0 + ((unit * 7 + expert * 13 + salt * 5) % 11) as f32 / 11.0;
            values.iter_mut().enumerate().for_each(|(unit, value)| *value *= factor(unit));
        }
    }
    table
}

/// Checks that a plan does to a model whose experts share what it does to the one where each has a copy, and that the
/// model is written as it reads.
fn compare(
    plan: &PrunePlan,
    [shared, copied]: [&Arc<Checkpoint>; 2],
    options: &PruneOptions<'_>,
    out: &Path,
) -> PrunedModel {
    let of = |model: &Arc<Checkpoint>| {
        let plan = PrunePlan { model: model.fingerprint(), ..plan.clone() };
        plan.on(model, options).unwrap()
    };
    let (pruned, expected) = (of(shared), of(copied));
    let what = format!("{} {}", shared.dir().display(), options.form);
    assert_eq!(pruned.model().shape(), expected.model().shape(), "{what}");
    for layer in &pruned.model().shape().layers {
        for expert in 0..layer.num_experts() {
            let [a, b] = [&pruned, &expected].map(|pruned| pruned.model().expert(layer.layer, expert).unwrap());
            assert_eq!(a, b, "{what}: layer {}, expert {expert}", layer.layer);
        }
        for role in [LayerRole::Router, LayerRole::RouterBias, LayerRole::CorrectionBias] {
            let read = |pruned: &PrunedModel| pruned.model().read_f32(Role::Layer(layer.layer, role)).ok();
            assert_eq!(read(&pruned), read(&expected), "{what}: {role:?}");
        }
    }
    let written = write(pruned.model(), out, &WriteOptions::default()).unwrap();
    assert_eq!(pruned.report().bytes.after, written.bytes, "{what}");
    let reopened = Checkpoint::open(out).unwrap();
    assert!(contents(&reopened) == contents(pruned.model()), "{what}");
    assert_eq!(reopened.raw_config(), pruned.model().raw_config(), "{what}");
    std::fs::remove_dir_all(out).unwrap();
    pruned
}

#[test]
fn units_of_shared_sets_go_for_all_their_experts() {
    let directory = tempdir().unwrap();
    let mut compared = 0;
    for (name, model) in checkpoints() {
        let [shared, copied] = shared_and_copied(&model);
        let (sets, none) = (SharedSets::of(&shared).unwrap(), ProtectionMask::none());
        let table = scores(&shared);
        for (scope, form, ratio) in [
            (Scope::Expert, PruneForm::Uniform, 0.6),
            (Scope::Layer, PruneForm::Ragged, 0.5),
            (Scope::Global, PruneForm::Masked, 0.6),
        ] {
            // Some configs have one width for routed and shared experts.
            if form == PruneForm::Uniform && shared.family().shared_follows_width() {
                continue;
            }
            let plan = sets.prune(&UnitPruner::new(scope), &table, Budget::Ratio(ratio), &none).unwrap();
            let mtp = shared.mtp_tensors().next().map(|_| Mtp::Drop);
            let options = PruneOptions { mtp, allow_unaligned: true, ..PruneOptions::new(form) };
            options.check(&shared).unwrap();
            let pruned = compare(&plan, [&shared, &copied], &options, &directory.path().join("out"));
            // Nothing of what is stored goes twice: the budget is met on the sets.
            let before: usize = sets.shape().units();
            let after: usize = SharedSets::of(pruned.model()).unwrap().shape().units();
            assert!(form == PruneForm::Masked || after < before, "{name} {form}");
            assert!(form == PruneForm::Masked || before - after <= (before as f64 * ratio) as usize, "{name} {form}");
            compared += 1;
        }
        // A plan made without regard to who shares is refused.
        let plan = UnitPruner::new(Scope::Layer).prune(&table, shared.shape(), Budget::Ratio(0.5), &none).unwrap().plan;
        let mtp = shared.mtp_tensors().next().map(|_| Mtp::Drop);
        let options = PruneOptions { mtp, ..PruneOptions::new(PruneForm::Ragged) };
        let error = plan.on(&shared, &options).unwrap_err().to_string();
        assert!(error.contains("share a set of weights, but the plan keeps different units"), "{name}: {error}");
    }
    assert!(compared > 40, "{compared}");
}

#[test]
fn whole_experts_of_shared_sets_go_with_their_rows() {
    let directory = tempdir().unwrap();
    let mut emptied = 0;
    for (name, model) in checkpoints().into_iter().filter(|(_, model)| model.config().routing.groups().is_none()) {
        let [shared, copied] = shared_and_copied(&model);
        let table = scores(&shared).to_experts(Reduction::Sum).unwrap();
        let none = ProtectionMask::none();
        let found = ExpertPruner::new().prune(&table, shared.shape(), Budget::Ratio(0.3), &none);
        let mut plans: Vec<PrunePlan> = found.into_iter().map(|found| found.plan).collect();
        // All experts of a set go, where enough are left.
        let layer = shared.shape().layers[0].layer;
        let moe = shared.config().moe(layer).unwrap();
        let all: Vec<u32> =
            (0..moe.num_experts() as u32).filter(|expert| moe.stored(*expert as usize) == moe.stored(0)).collect();
        if moe.num_experts() - all.len() >= shared.shape().top_k {
            let removed = [(layer, all)].into();
            plans.push(PrunePlan::without_experts(shared.shape(), shared.fingerprint(), &removed).unwrap());
            emptied += 1;
        }
        for plan in plans {
            let mtp = shared.mtp_tensors().next().map(|_| Mtp::Drop);
            let options = PruneOptions { mtp, ..PruneOptions::new(PruneForm::Ragged) };
            let pruned = compare(&plan, [&shared, &copied], &options, &directory.path().join("out"));
            let rows = |model: &Checkpoint| model.config().moe(layer).unwrap().num_experts();
            assert_eq!(rows(&shared) - rows(pruned.model()), plan.kept[0].removed.len(), "{name}");
            let left = pruned.model().config().moe(layer).unwrap().stored_widths().len();
            assert!(left <= moe.stored_widths().len(), "{name}");
        }
    }
    assert!(emptied > 5, "{emptied}");
}

#[test]
fn what_shared_sets_cannot_become_is_refused() {
    let model = open(parity("tf5/qwen2_moe"));
    let [shared, _] = shared_and_copied(&model);
    let pieces = PruneOptions::new(PruneForm::FineGrained(FineGrained::new(2)));
    for error in [
        pieces.check(&shared).unwrap_err(),
        FineGrained::new(2).check(&shared, 0.5).unwrap_err(),
        PrunePlan::keep_all(shared.shape(), shared.fingerprint()).on(&shared, &pieces).map(drop).unwrap_err(),
    ] {
        assert!(error.to_string().contains("cut before merging"), "{error}");
    }
    // A repair of one expert would change the others of its set.
    let keep = PrunePlan::keep_all(shared.shape(), shared.fingerprint());
    let moe = shared.config().moe(0).unwrap();
    let alone = |expert: &usize| (0..moe.num_experts()).filter(|e| moe.stored(*e) == moe.stored(*expert)).count() == 1;
    let (alone, together): (Vec<usize>, Vec<usize>) = (0..moe.num_experts()).partition(alone);
    let edited = |expert: usize| {
        let mut edits = Edits::new();
        let down = vec![0.5; shared.shape().hidden_size * keep.kept[0].experts[expert].len()];
        edits.set_expert(0, expert, ExpertEdit { down: Some(down), down_bias: None });
        PruneOptions { edits: Some(Arc::new(edits)), ..PruneOptions::new(PruneForm::Masked) }
    };
    let error = keep.on(&shared, &edited(together[0])).map(drop).unwrap_err().to_string();
    assert!(error.contains("a repair changed one of them"), "{error}");
    for expert in alone {
        let repaired = keep.on(&shared, &edited(expert)).unwrap();
        assert!(repaired.model().expert(0, expert).unwrap().down.iter().all(|value| *value == 0.5));
    }
}

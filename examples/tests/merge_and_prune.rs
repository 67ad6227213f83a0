//! Merging and pruning of one checkpoint, side by side and one after the other.

#[path = "../../crates/moe-merge/tests/common/mod.rs"]
#[allow(dead_code)]
mod common;

use common::{checkpoints, contents, open, options, parity, plain, plan, written};
use moe_checkpoint::{Checkpoint, Mtp};
use moe_merge::{CombinationConfig, DominantOnly, GroupingConfig, MergeOptions, OutputForm, Retain, RouterConfig};
use moe_prune::{ApplyOptions, Export, PrunePlan};
use tempfile::tempdir;

#[test]
fn dominants_alone_are_expert_pruning_to_the_byte() {
    let directory = tempdir().unwrap();
    for (name, model) in checkpoints().into_iter().filter(|(_, model)| model.config().routing.groups().is_none()) {
        let mut recipe = plain(0.5);
        if model.shape().layers[0].num_experts() / 2 < model.shape().top_k {
            recipe = plain(0.25);
        }
        recipe.combination = CombinationConfig::DominantOnly(DominantOnly {});
        recipe.router = RouterConfig::Delete;
        let merged = plan(&recipe, &model);
        recipe.grouping = GroupingConfig::Retain(Retain {});
        let dissolved = plan(&recipe, &model);
        let pruned = directory.path().join(format!("{name}-pruned"));
        let mtp = model.mtp_tensors().next().map(|_| Mtp::Drop);
        let export = ApplyOptions { mtp, allow_unaligned: true, ..ApplyOptions::new(Export::Uniform) };
        let plan = PrunePlan::without_experts(model.shape(), model.fingerprint(), &merged.removed()).unwrap();
        plan.apply(&model, &pruned, &export).unwrap();
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
fn a_grouped_checkpoint_is_not_pruned() {
    let directory = tempdir().unwrap();
    let model = open(parity("tf5/qwen2_moe"));
    let out = directory.path().join("grouped");
    let plan = plan(&plain(0.5), &model);
    written(&plan, &model, &out, &MergeOptions::new(OutputForm::Grouped)).unwrap();
    let grouped = Checkpoint::open(&out).unwrap();
    let prune = PrunePlan::keep_all(grouped.shape(), grouped.fingerprint());
    let error = prune.apply(&grouped, &directory.path().join("x"), &ApplyOptions::new(Export::Masked)).unwrap_err();
    assert!(error.to_string().contains("prune before merging"), "{error}");
}

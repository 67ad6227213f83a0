//! Merging and pruning of one checkpoint, side by side and one after the other.

#[path = "../../crates/moe-merge/tests/common/mod.rs"]
#[allow(dead_code)]
mod common;

use common::{checkpoints, contents, open, options, parity, plain, plan, written};
use moe_checkpoint::{Checkpoint, Mtp, WriteOptions, write};
use moe_merge::{CombinationConfig, DominantOnly, GroupingConfig, MergeOptions, OutputForm, Retain, RouterConfig};
use moe_prune::{PruneForm, PruneOptions, PrunePlan};
use std::sync::Arc;

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
        let export = PruneOptions { mtp, allow_unaligned: true, ..PruneOptions::new(PruneForm::Uniform) };
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

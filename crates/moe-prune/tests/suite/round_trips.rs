//! What a written checkpoint computes: experts taken out of groups, and experts without units.

use crate::common;
use crate::run;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::{contents, magnitude, parity, write_plan};
use moe_checkpoint::{Checkpoint, Reduction};
use moe_core::device::device;
use moe_core::{Model, RemoveExperts};
use moe_prune::{Budget, ExpertPruner, ProtectionMask, PruneForm, PruneOptions, PrunePlan, Pruner, Scope, UnitPruner};
use run::{difference, logits, logits_of};
use tempfile::tempdir;

/// A copy of a fixture of eight experts whose router selects the best of two groups of four.
fn two_groups(name: &str, to: &Path) -> Checkpoint {
    fs::create_dir_all(to).unwrap();
    fs::copy(parity(name).join("model.safetensors"), to.join("model.safetensors")).unwrap();
    let mut config = Checkpoint::open(parity(name)).unwrap().raw_config().clone();
    (config["n_group"], config["topk_group"]) = (2.into(), 1.into());
    fs::write(to.join("config.json"), config.to_string()).unwrap();
    Checkpoint::open(to).unwrap()
}

#[test]
fn experts_leave_their_groups_evenly_and_the_rest_is_routed_as_without_them() {
    let directory = tempdir().unwrap();
    for name in ["tf5/deepseek_v2_group", "tf5/deepseek_v3", "tf4/deepseek_v3", "tf5/deepseek_v3_bf16"] {
        let at = |what: &str| directory.path().join(format!("{}-{what}", name.replace('/', "-")));
        let model = two_groups(name, &at("model"));
        let groups = model.config().routing.groups().unwrap();
        assert_eq!((groups.count, groups.top), (2, 1));
        let scores = magnitude(&model).to_experts(Reduction::Sum).unwrap();
        let pruner = ExpertPruner::new().groups(2);
        let plan = pruner.prune(&scores, model.shape(), Budget::Ratio(0.25), &ProtectionMask::none()).unwrap().plan;
        let mut removed = RemoveExperts::new();
        for kept in &plan.kept {
            let halves = kept.removed.iter().filter(|expert| **expert < 4).count();
            assert_eq!((kept.removed.len(), halves), (2, 1), "{name}");
            removed = removed.remove(kept.layer, kept.removed.iter().copied());
        }
        let whole = Model::open(model.dir(), &device("flex").unwrap(), None).unwrap();
        let expected = logits_of(&whole.with_overlays(None, Some(Arc::new(removed))).unwrap());
        assert!(difference(&logits(model.dir()), &expected) > 1e-3, "{name}: nothing has changed");
        for mode in [PruneForm::Uniform, PruneForm::Ragged] {
            write_plan(&plan, &model, at(mode.name()), &PruneOptions::new(mode)).unwrap();
            let found = difference(&logits(&at(mode.name())), &expected);
            assert!(found < 1e-5, "{name} {mode}: {found}");
        }
        // A second expert of each group would leave two, which cannot give three per token.
        let half = pruner.prune(&scores, model.shape(), Budget::Ratio(0.5), &ProtectionMask::none());
        let text = match half {
            Err(error) => error.to_string(),
            Ok(half) => {
                let options = PruneOptions::new(PruneForm::Uniform);
                write_plan(&half.plan, &model, at("half"), &options).unwrap_err().to_string()
            }
        };
        assert!(text.contains('3'), "{text}");
    }
}

#[test]
fn experts_without_units_and_empty_layers_go_round() {
    let directory = tempdir().unwrap();
    for name in [
        "tf4/qwen2_moe",
        "tf4/mixtral",
        "tf4/phimoe",
        "tf5/qwen2_moe_bf16",
        "tf5/qwen3_moe_sharded",
        "tf5/olmoe",
        "tf5/granitemoe",
        "tf5/gpt_oss",
        "tf5/gpt_oss_mxfp4",
        "tf5/deepseek_v2_group",
        "tf5/deepseek_v3_fp8",
        "tf5/glm4_moe",
        "tf5/ernie4_5_moe",
    ] {
        let at = |what: &str| directory.path().join(format!("{}-{what}", name.replace('/', "-")));
        let apply = |plan: &PrunePlan, from: &Checkpoint, what: &str, mode| {
            write_plan(plan, from, at(what), &PruneOptions::new(mode)).unwrap();
            Checkpoint::open(at(what)).unwrap()
        };
        let model = Checkpoint::open(parity(name)).unwrap();
        let mut scores = magnitude(&model);
        // The last layer, if there are several, and the first two experts of the others score lowest.
        let last = scores.layers.len() - 1;
        let mut lowest = 0;
        for (position, layer) in scores.layers.iter_mut().enumerate() {
            for (expert, scores) in layer.scores.iter_mut().enumerate() {
                if (position == last && last > 0) || expert < 2 {
                    scores.fill(0.0);
                    lowest += scores.len();
                }
            }
        }
        let units = model.shape().units();
        let ratio = (lowest as f64 + 0.5) / units as f64;
        let pruner = UnitPruner::new(Scope::Global);
        let prune = |scores, from: &Checkpoint, ratio| {
            pruner.prune(scores, from.shape(), Budget::Ratio(ratio), &ProtectionMask::none()).unwrap().plan
        };
        let plan = prune(&scores, &model, ratio);
        assert!(last == 0 || plan.kept[last].experts.iter().all(Vec::is_empty), "{name}");
        assert!(plan.kept.iter().all(|kept| kept.experts[0].is_empty() && kept.removed.is_empty()), "{name}");

        let ragged = apply(&plan, &model, "ragged", PruneForm::Ragged);
        let masked = apply(&plan, &model, "masked", PruneForm::Masked);
        let expected = logits(masked.dir());
        let found = difference(&logits(ragged.dir()), &expected);
        // Other sums where units are left out, and BF16 products in another order.
        assert!(found < 1e-4, "{name}: {found}");
        assert_eq!(ragged.expert(model.shape().layers[last].layer, 1).unwrap().width, 0);

        // Once more as it is, and pruned further: from the ragged checkpoint as from the masked one.
        let keep = PrunePlan::keep_all(ragged.shape(), ragged.fingerprint());
        let copy = apply(&keep, &ragged, "copy", PruneForm::Ragged);
        assert_eq!(contents(&copy), contents(&ragged), "{name}");
        assert_eq!((copy.raw_config(), copy.fingerprint()), (ragged.raw_config(), ragged.fingerprint()));
        let again = prune(&magnitude(&ragged), &ragged, 0.3);
        let twice = apply(&again, &ragged, "twice", PruneForm::Ragged);
        let mut together = plan.clone();
        for (kept, again) in together.kept.iter_mut().zip(&again.kept) {
            for (units, again) in kept.experts.iter_mut().zip(&again.experts) {
                *units = again.iter().map(|unit| units[*unit as usize]).collect();
            }
        }
        together.ratio.achieved = 1.0 - together.units_kept() as f64 / units as f64;
        let direct = apply(&together, &model, "direct", PruneForm::Ragged);
        assert_eq!(contents(&twice), contents(&direct), "{name}");
        assert_eq!(twice.raw_config(), direct.raw_config(), "{name}");
        // There is no one width to go back to.
        let text =
            write_plan(&keep, &ragged, at("uniform"), &PruneOptions::new(PruneForm::Uniform)).unwrap_err().to_string();
        assert!(text.contains("one width") || text.contains("any unit"), "{text}");
    }
}

//! Every family and layout: units, whole experts, quantized weights and further layers.

use crate::common;
use crate::run;

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;

use common::{contents, every_checkpoint, load, magnitude, parity, plan, save, unrun, write_plan, write_plan_with};
use moe_checkpoint::{Checkpoint, Dtype, Existing, ExpertWeights, LayerRole, Reduction, Role, WriteOptions};
use moe_core::device::device;
use moe_core::{Model, RemoveExperts};
use moe_prune::{
    AllocatorConfig, Budget, ExpertPruner, FineGrained, Global, Mtp, ProtectionMask, PruneForm, PruneOptions,
    PrunePlan, PrunedPrecision, Pruner, Scope,
};
use run::{difference, logits, logits_of};
use safetensors::SafeTensors;
use serde_json::json;
use tempfile::tempdir;

/// One checkpoint of every family, of every way in which experts are on disk without quantization, and of every routing
/// with groups, in both generations of transformers.
fn checkpoints() -> Vec<(String, Checkpoint)> {
    let variants =
        ["_padded", "_sliding", "_linear", "_long", "_yarn", "_longrope", "_fp8", "_mxfp4", "_sharded", "_tanh"];
    every_checkpoint()
        .into_iter()
        .map(|dir| {
            let names = dir.components().rev().take(2).map(|part| part.as_os_str().to_str().unwrap());
            (names.collect::<Vec<_>>().join("-"), Checkpoint::open(dir).unwrap())
        })
        .filter(|(name, _)| !variants.iter().any(|variant| name.contains(variant)))
        // what becomes of further layers is a test of its own
        .filter(|(_, model)| model.mtp_tensors().next().is_none())
        // as is what no config has a place for
        .filter(|(_, model)| !model.family().shared_follows_width())
        .collect()
}

#[test]
fn a_width_that_the_shared_expert_would_have_to_follow_is_refused() {
    for name in ["llama4_text", "hunyuan_v1_moe", "deepseek_v4"] {
        let model = Arc::new(Checkpoint::open(parity(&format!("tf5/{name}"))).unwrap());
        let units = plan(&model, Scope::Expert, 0.5);
        let options = |form| PruneOptions { allow_unaligned: true, ..PruneOptions::new(form) };
        // Pieces of experts that a table names are refused before.
        let pieces = (!model.config().routes_by_tables()).then_some(PruneForm::FineGrained(FineGrained::new(2)));
        for form in std::iter::once(PruneForm::Uniform).chain(pieces) {
            let plan = match form {
                PruneForm::Uniform => units.clone(),
                _ => PrunePlan::keep_all(model.shape(), model.fingerprint()),
            };
            let refused = plan.on(&model, &options(form)).unwrap_err().to_string();
            assert!(refused.contains(name) && refused.contains("intermediate_size"), "{refused}");
        }
        for form in [PruneForm::Ragged, PruneForm::Masked] {
            units.on(&model, &options(form)).unwrap();
        }
        // Whole experts leave the width as it is.
        let fewer = expert_plan(&model, 0.3).unwrap();
        let pruned = fewer.on(&model, &options(PruneForm::Uniform)).unwrap();
        let kept = &fewer.kept[0];
        let left = pruned.model().config().moe(kept.layer).unwrap().num_experts();
        assert_eq!(left, kept.experts_kept().len());
        assert!(left < model.config().moe(kept.layer).unwrap().num_experts());
    }
}

fn expert_plan(model: &Checkpoint, ratio: f64) -> moe_prune::Result<PrunePlan> {
    let scores = magnitude(model).to_experts(Reduction::Sum).unwrap();
    let groups = model.config().routing.groups().map_or(1, |groups| groups.count);
    let pruner = ExpertPruner::new().groups(groups);
    Ok(pruner.prune(&scores, model.shape(), Budget::Ratio(ratio), &ProtectionMask::none())?.plan)
}

/// The units of an expert that are kept, from its full weights.
fn kept_of(full: &ExpertWeights, kept: &[u32]) -> ExpertWeights {
    let rows = |matrix: &[f32]| -> Vec<f32> {
        kept.iter().flat_map(|unit| matrix[*unit as usize * full.hidden..][..full.hidden].to_vec()).collect()
    };
    let few = |bias: &Option<Vec<f32>>| bias.as_ref().map(|b| kept.iter().map(|unit| b[*unit as usize]).collect());
    ExpertWeights {
        gate: rows(&full.gate),
        up: rows(&full.up),
        down: full.down.chunks(full.width).flat_map(|row| kept.iter().map(|unit| row[*unit as usize])).collect(),
        gate_bias: few(&full.gate_bias),
        up_bias: few(&full.up_bias),
        down_bias: full.down_bias.clone(),
        width: kept.len(),
        hidden: full.hidden,
    }
}

#[test]
fn units_go_alike_in_every_layout_and_export() {
    let directory = tempdir().unwrap();
    for (name, model) in checkpoints() {
        let plan = plan(&model, Scope::Expert, 0.5);
        assert!(plan.units_kept() < plan.shape.units(), "{name}");
        let [uniform, ragged, masked] = [PruneForm::Uniform, PruneForm::Ragged, PruneForm::Masked].map(|mode| {
            let out = directory.path().join(format!("{name}-{mode}"));
            let report = write_plan(&plan, &model, &out, &PruneOptions::new(mode)).unwrap();
            let result = Checkpoint::open(&out).unwrap();
            assert_eq!(report.bytes.after, result.bytes_on_disk(), "{name} {mode}");
            assert_eq!(report.parameters.after, result.parameters(), "{name} {mode}");
            result
        });
        for layer in &plan.kept {
            for (expert, kept) in layer.experts.iter().enumerate() {
                let full = model.expert(layer.layer, expert).unwrap();
                let expected = kept_of(&full, kept);
                assert_eq!(uniform.expert(layer.layer, expert).unwrap(), expected, "{name}");
                assert_eq!(ragged.expert(layer.layer, expert).unwrap(), expected, "{name}");
                let masked = masked.expert(layer.layer, expert).unwrap();
                assert_eq!(kept_of(&masked, kept), expected, "{name}");
                let gone: Vec<u32> = (0..full.width as u32).filter(|unit| !kept.contains(unit)).collect();
                let zeros = kept_of(&masked, &gone);
                assert_eq!(zeros.down_bias, full.down_bias);
                let parts = [Some(zeros.gate), Some(zeros.up), Some(zeros.down), zeros.gate_bias, zeros.up_bias];
                assert!(parts.into_iter().flatten().flatten().all(|value| value == 0.0), "{name}");
            }
        }
        // Back from ragged to one width.
        let back = directory.path().join(format!("{name}-back"));
        let keep = PrunePlan::keep_all(ragged.shape(), ragged.fingerprint());
        write_plan(&keep, &ragged, &back, &PruneOptions::new(PruneForm::Uniform)).unwrap();
        let back = Checkpoint::open(back).unwrap();
        assert_eq!(back.raw_config(), uniform.raw_config(), "{name}");
        let layer = plan.kept[0].layer;
        assert_eq!(back.expert(layer, 0).unwrap(), uniform.expert(layer, 0).unwrap());
        // What was ragged gets the stock layout of its family, which need not be the one it was first read in.
        if back.expert_layout(layer).unwrap() == uniform.expert_layout(layer).unwrap() {
            assert_eq!(back.tensors().count(), uniform.tensors().count());
        }
    }
}

#[test]
fn shared_experts_follow_the_width_and_grow_by_zeros() {
    let directory = tempdir().unwrap();
    for (name, count_key, before, after, width) in [
        ("tf5/deepseek_v3", "n_shared_experts", 1, 2, 32),
        ("tf5/deepseek_v2", "n_shared_experts", 2, 3, 48),
        ("tf5/ernie4_5_moe", "moe_num_shared_experts", 1, 2, 32),
    ] {
        let model = Checkpoint::open(parity(name)).unwrap();
        assert_eq!(model.raw_config()[count_key], before);
        let out = directory.path().join(name.replace('/', "-"));
        write_plan(&plan(&model, Scope::Expert, 0.4), &model, &out, &PruneOptions::new(PruneForm::Uniform)).unwrap();
        let out = Checkpoint::open(out).unwrap();
        assert_eq!(out.raw_config()["moe_intermediate_size"], 16);
        let shared = out.config().moe(1).unwrap().shared.as_ref().unwrap().intermediate_size;
        assert_eq!((&out.raw_config()[count_key], shared), (&json!(after), width));
        for role in [LayerRole::SharedGate, LayerRole::SharedUp, LayerRole::SharedDown] {
            let (old, new) = (model.role(Role::Layer(1, role)).unwrap(), out.role(Role::Layer(1, role)).unwrap());
            let values = out.read_f32(Role::Layer(1, role)).unwrap();
            let original = model.read_f32(Role::Layer(1, role)).unwrap();
            let (old_cols, new_cols) = (old.shape[1], new.shape[1]);
            for (row, found) in values.chunks(new_cols).enumerate() {
                let expected = original.chunks(old_cols).nth(row).unwrap_or(&[]);
                assert_eq!(&found[..expected.len()], expected);
                assert!(found[expected.len()..].iter().all(|value| *value == 0.0));
            }
        }
    }
}

#[test]
fn experts_go_with_their_router_rows_and_biases() {
    let directory = tempdir().unwrap();
    for (name, model) in checkpoints() {
        // Where the router selects groups of two first, none can go: the ratio is rounded down to that.
        let plan = expert_plan(&model, 0.25).unwrap();
        assert_eq!(plan.kept[0].removed.is_empty(), model.config().routing.groups().is_some(), "{name}");
        for mode in [PruneForm::Uniform, PruneForm::Ragged] {
            let out = directory.path().join(format!("{name}-{mode}"));
            let report = write_plan(&plan, &model, &out, &PruneOptions::new(mode)).unwrap();
            let out = Checkpoint::open(out).unwrap();
            assert_eq!(out.shape(), &plan.pruned_shape(), "{name}");
            assert_eq!(report.bytes.after, out.bytes_on_disk());
            assert_eq!(report.parameters.after, out.parameters());
            for layer in &plan.kept {
                let experts = layer.experts_kept();
                for (new, old) in experts.iter().enumerate() {
                    assert_eq!(out.expert(layer.layer, new).unwrap(), model.expert(layer.layer, *old).unwrap());
                }
                let roles = [LayerRole::Router, LayerRole::RouterBias, LayerRole::CorrectionBias];
                for role in roles.map(|role| Role::Layer(layer.layer, role)) {
                    let Ok(before) = model.read_f32(role) else { continue };
                    let rows = model.config().moe(layer.layer).unwrap().router_rows();
                    let row = before.len() / rows;
                    // Identity experts come last, and stay.
                    let left = experts.iter().copied().chain(layer.experts.len()..rows);
                    let expected: Vec<f32> = left.flat_map(|e| before[e * row..][..row].to_vec()).collect();
                    assert_eq!(out.read_f32(role).unwrap(), expected, "{name}");
                }
            }
        }
        if !plan.kept[0].removed.is_empty() {
            let error =
                write_plan(&plan, &model, directory.path().join("masked"), &PruneOptions::new(PruneForm::Masked));
            assert!(error.unwrap_err().to_string().contains("the router would still choose them"));
        }
    }
}

#[test]
fn attention_of_experts_keeps_as_many_of_them_in_a_uniform_export_and_all_in_a_ragged_one() {
    let directory = tempdir().unwrap();
    let model = Checkpoint::open(parity("tf5/jetmoe")).unwrap();
    let plan = expert_plan(&model, 0.4).unwrap();
    let left = plan.kept[0].experts_kept().len();
    assert_eq!((model.shape().layers[0].num_experts(), left), (6, 4));
    let stacks = [LayerRole::HeadRouter, LayerRole::HeadQueries, LayerRole::HeadOutputs];
    for mode in [PruneForm::Uniform, PruneForm::Ragged] {
        let out = directory.path().join(mode.name());
        let report = write_plan(&plan, &model, &out, &PruneOptions::new(mode)).unwrap();
        let out = Checkpoint::open(out).unwrap();
        assert_eq!(
            report.notes.iter().any(|note| note.contains("attention keeps 4 experts")),
            mode.name() == "uniform"
        );
        for layer in 0..2 {
            let [router, queries, outputs] = stacks
                .map(|role| model.read_f32(Role::Layer(layer, role)).unwrap())
                .map(|values| values.chunks(values.len() / 6).map(<[f32]>::to_vec).collect::<Vec<_>>());
            let square = |values: &[f32]| values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
            let mut order: Vec<usize> = (0..6).collect();
            order.sort_by_key(|e| std::cmp::Reverse((1e9 * square(&queries[*e]) * square(&outputs[*e])) as u64));
            let mut best = if mode.name() == "uniform" { order[..left].to_vec() } else { order };
            best.sort_unstable();
            for (role, before) in stacks.into_iter().zip([router, queries, outputs]) {
                let expected: Vec<f32> = best.iter().flat_map(|expert| before[*expert].clone()).collect();
                assert_eq!(out.read_f32(Role::Layer(layer, role)).unwrap(), expected, "{role:?}");
            }
        }
        assert_eq!(out.raw_config()["num_local_experts"], if mode.name() == "uniform" { 4 } else { 6 });
    }
}

#[test]
fn tensors_of_identity_experts_follow_the_routed_ones_where_there_are_some() {
    let model = Arc::new(Checkpoint::open(parity("tf5/longcat_flash")).unwrap());
    let is_gate = |name: &str| name.contains(".mlp.experts.") && name.ends_with(".gate_proj.weight");
    let gates = |model: &Checkpoint| -> Vec<(String, Vec<usize>)> {
        let found = model.tensors().filter(|info| is_gate(&info.name) && info.name.contains("layers.1."));
        found.map(|info| (info.name.rsplit('.').nth(2).unwrap().to_string(), info.shape.clone())).collect()
    };
    let numbered = |count: usize, width: usize| -> Vec<(String, Vec<usize>)> {
        (0..count).map(|number| (number.to_string(), vec![width, 16])).collect()
    };
    // Six experts, and three identity experts whose tensors nothing reads.
    assert_eq!(gates(&model), numbered(9, 12));
    let on = |plan: &PrunePlan, form| {
        plan.on(&model, &PruneOptions { allow_unaligned: true, ..PruneOptions::new(form) }).unwrap().model().clone()
    };
    let (units, experts) = (plan(&model, Scope::Expert, 0.5), expert_plan(&model, 0.3).unwrap());
    let width = units.kept[0].experts[0].len();
    let narrow = on(&units, PruneForm::Uniform);
    assert_eq!(gates(&narrow), numbered(9, narrow.shape().uniform_width().unwrap()));
    assert!(width < 12 && narrow.shape().uniform_width().unwrap() < 12);
    let zeros = narrow.tensor_f32("model.layers.1.mlp.experts.8.up_proj.weight").unwrap();
    assert!(zeros.iter().all(|value| *value == 0.0));
    let left = experts.kept[1].experts_kept().len();
    assert!(left < 6);
    assert_eq!(gates(&on(&experts, PruneForm::Uniform)), numbered(left + 3, 12));
    assert_eq!(gates(&on(&units, PruneForm::Masked)), numbered(9, 12));
    assert_eq!(gates(&on(&experts, PruneForm::Ragged))[..], numbered(left + 3, 12)[left..]);
    // Released files have no such tensors, and exports of them none either.
    let dir = tempdir().unwrap();
    let dead = |name: &str| (6..9).any(|number| name.contains(&format!(".experts.{number}.")));
    let bytes = fs::read(parity("tf5/longcat_flash").join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let kept = file.tensors().into_iter().filter(|(name, _)| !dead(name));
    fs::write(dir.path().join("model.safetensors"), safetensors::serialize(kept, None).unwrap()).unwrap();
    fs::copy(parity("tf5/longcat_flash").join("config.json"), dir.path().join("config.json")).unwrap();
    let released = Arc::new(Checkpoint::open(dir.path()).unwrap());
    assert_eq!(gates(&released), numbered(6, 12));
    assert!(difference(&logits(released.dir()), &logits(model.dir())) == 0.0);
    let plan = expert_plan(&released, 0.3).unwrap();
    let pruned = plan.on(&released, &PruneOptions::new(PruneForm::Uniform)).unwrap();
    assert_eq!(gates(pruned.model()), numbered(left, 12));
    // Pieces would be chosen beside identity experts that are none.
    let keep = PrunePlan::keep_all(model.shape(), model.fingerprint());
    let pieces =
        PruneOptions { allow_unaligned: true, ..PruneOptions::new(PruneForm::FineGrained(FineGrained::new(2))) };
    let refused = keep.on(&model, &pieces).unwrap_err().to_string();
    assert!(refused.contains("identity experts"), "{refused}");
}

/// Tables `[V, k]` of the layers that have some.
fn tables(model: &Checkpoint) -> BTreeMap<usize, Vec<Vec<u32>>> {
    let layers = 0..model.config().layers.len();
    let found = layers.filter_map(|layer| Some((layer, model.expert_table(layer).unwrap()?)));
    found.map(|(layer, t)| (layer, (0..t.tokens()).map(|token| t.row(token).to_vec()).collect())).collect()
}

#[test]
fn tables_of_layers_that_route_by_them_lose_the_removed_experts_and_no_token_moves_without_need() {
    let directory = tempdir().unwrap();
    for name in ["deepseek_v4", "deepseek_v4_saved"] {
        let model = Checkpoint::open(parity(&format!("tf5/{name}"))).unwrap();
        let plan = expert_plan(&model, 0.4).unwrap();
        let gone =
            plan.kept.iter().fold(RemoveExperts::new(), |gone, kept| gone.remove(kept.layer, kept.removed.clone()));
        let whole = Model::open(model.dir(), &device("flex").unwrap(), None).unwrap();
        let expected = logits_of(&whole.with_overlays(None, Some(Arc::new(gone))).unwrap());
        for form in [PruneForm::Uniform, PruneForm::Ragged] {
            let out = directory.path().join(format!("{name}-{form}"));
            write_plan(&plan, &model, &out, &PruneOptions::new(form)).unwrap();
            let pruned = Checkpoint::open(&out).unwrap();
            let (before, after) = (tables(&model), tables(&pruned));
            assert!(!before.is_empty() && before.len() == after.len());
            for (layer, before) in before {
                let kept = plan.kept.iter().find(|kept| kept.layer == layer).unwrap();
                let left: Vec<u32> = kept.experts_kept().iter().map(|expert| *expert as u32).collect();
                assert!(left.len() < kept.experts.len());
                let mut moved = 0;
                for (token, (row, now)) in before.iter().zip(&after[&layer]).enumerate() {
                    let now: Vec<u32> = now.iter().map(|expert| left[*expert as usize]).collect();
                    let stay: Vec<u32> = row.iter().copied().filter(|expert| left.contains(expert)).collect();
                    assert_eq!(now[..stay.len()], stay, "token {token}");
                    assert!(now.len() == row.len() && (1..now.len()).all(|i| !now[..i].contains(&now[i])));
                    moved += usize::from(stay.len() < row.len());
                }
                assert!(moved > 0 && moved < before.len(), "{moved}");
            }
            // What is written is what the overlay showed.
            assert!(difference(&logits(&out), &expected) < 1e-5, "{name} {form}");
        }
        // Fewer experts than a token has: the config and the tables say so.
        let few = expert_plan(&model, 0.85).unwrap();
        let clamp = few.top_k_clamp().unwrap();
        let out = directory.path().join(format!("{name}-few"));
        write_plan(&few, &model, &out, &PruneOptions::new(PruneForm::Uniform)).unwrap();
        let few = Checkpoint::open(&out).unwrap();
        assert!(few.config().routing.top_k < clamp.before);
        assert!(tables(&few).values().flatten().all(|row| row.len() == few.config().routing.top_k));
        logits(&out);
        // A plan that keeps everything leaves the table as it is.
        let keep = PrunePlan::keep_all(model.shape(), model.fingerprint());
        let same = directory.path().join(format!("{name}-same"));
        write_plan(&keep, &model, &same, &PruneOptions::new(PruneForm::Uniform)).unwrap();
        assert_eq!(contents(&Checkpoint::open(&same).unwrap()), contents(&model), "{name}");
        let refused = keep
            .on(
                &Arc::new(model),
                &PruneOptions {
                    allow_unaligned: true,
                    ..PruneOptions::new(PruneForm::FineGrained(FineGrained::new(2)))
                },
            )
            .unwrap_err()
            .to_string();
        assert!(refused.contains("table of the vocabulary"), "{refused}");
    }
}

#[test]
fn groups_and_top_k_are_protected() {
    let model = Checkpoint::open(parity("tf5/deepseek_v3")).unwrap();
    let mut plan = PrunePlan::keep_all(model.shape(), model.fingerprint());
    let remove = |plan: &mut PrunePlan, removed: &[u32]| {
        for expert in removed {
            plan.kept[0].experts[*expert as usize].clear();
        }
        plan.kept[0].removed = removed.to_vec();
        let achieved = 1.0 - plan.units_kept() as f64 / plan.shape.units() as f64;
        plan.ratio = moe_prune::Ratio { asked: achieved, achieved };
        let out = tempdir().unwrap();
        write_plan(plan, &model, out.path().join("out"), &PruneOptions::new(PruneForm::Ragged)).unwrap_err().to_string()
    };
    let text = remove(&mut plan.clone(), &[0, 3]);
    assert!(text.contains("layer 1") && text.contains("[1, 1, 2, 2]"), "{text}");
    let text = remove(&mut plan.clone(), &[0, 2, 4, 6]);
    assert!(text.contains("two best"), "{text}");
    let text = remove(&mut plan, &[0, 1, 2, 3, 4, 5]);
    assert!(text.contains("2 experts are left, but the router selects 3"), "{text}");
}

#[test]
fn fewer_experts_than_a_token_gets_are_all_selected() {
    let directory = tempdir().unwrap();
    let model = Checkpoint::open(parity("tf5/mixtral")).unwrap();
    assert_eq!((model.shape().top_k, model.shape().layers[0].num_experts()), (2, 4));
    let plan = expert_plan(&model, 0.8).unwrap();
    assert!(plan.kept.iter().all(|layer| layer.removed.len() == 3));
    assert_eq!((plan.pruned_shape().top_k, plan.top_k_clamp().unwrap().before), (1, 2));
    let gone = plan.kept.iter().fold(RemoveExperts::new(), |gone, kept| gone.remove(kept.layer, kept.removed.clone()));
    let whole = Model::open(model.dir(), &device("flex").unwrap(), None).unwrap();
    let expected = logits_of(&whole.with_overlays(None, Some(Arc::new(gone))).unwrap());
    for form in [PruneForm::Uniform, PruneForm::Ragged] {
        let out = directory.path().join(form.name());
        let report = write_plan(&plan, &model, &out, &PruneOptions::new(form)).unwrap();
        assert!(report.notes.iter().any(|note| note.contains("all of them instead of 2")), "{:?}", report.notes);
        let written = Checkpoint::open(&out).unwrap();
        assert_eq!((written.shape().top_k, written.config().routing.top_k), (1, 1));
        assert!(difference(&logits(&out), &expected) < 1e-5);
    }
    // Half of them are as many as a token gets: nothing is clamped, and no layer is left with fewer, whatever it
    // scores.
    let mut scores = magnitude(&model).to_experts(Reduction::Sum).unwrap();
    scores.layers[0].scores.iter_mut().for_each(|score| score[0] *= 1e-6);
    let pruner = ExpertPruner::with_allocator(AllocatorConfig::Global(Global::default()));
    let half = pruner.prune(&scores, model.shape(), Budget::Ratio(0.5), &ProtectionMask::none()).unwrap().plan;
    assert_eq!((half.kept[0].removed.len(), half.top_k_clamp()), (2, None));
}

/// Bytes without a pattern.
fn noise(count: usize, salt: usize) -> Vec<u8> {
    (0..count).map(|i| ((i + salt).wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

#[test]
fn mxfp4_experts_are_written_back_as_bf16() {
    let directory = tempdir().unwrap();
    let (mut config, mut tensors) = load(&parity("tf5/gpt_oss"));
    config["intermediate_size"] = json!(32);
    config["quantization_config"] = json!({"quant_method": "mxfp4"});
    for layer in 0..3 {
        let name = |part: &str| format!("model.layers.{layer}.mlp.experts.{part}");
        tensors.remove(&name("gate_up_proj"));
        tensors.remove(&name("down_proj"));
        let mut add = |part: &str, dtype, shape: Vec<usize>, bytes| tensors.insert(name(part), (dtype, shape, bytes));
        add("gate_up_proj_blocks", Dtype::U8, vec![4, 64, 1, 16], noise(4 * 64 * 16, layer));
        add("gate_up_proj_scales", Dtype::U8, vec![4, 64, 1], (0..256).map(|i| 120 + (i % 9) as u8).collect());
        add("down_proj_blocks", Dtype::U8, vec![4, 32, 1, 16], noise(4 * 32 * 16, layer + 7));
        add("down_proj_scales", Dtype::U8, vec![4, 32, 1], (0..128).map(|i| 122 + (i % 5) as u8).collect());
        let bias: Vec<u8> = (0..4 * 64).flat_map(|i| half::bf16::from_f32(i as f32 / 64.0).to_le_bytes()).collect();
        add("gate_up_proj_bias", Dtype::BF16, vec![4, 64], bias);
        let bias: Vec<u8> = (0..4 * 32).flat_map(|i| half::bf16::from_f32(i as f32 / 32.0).to_le_bytes()).collect();
        add("down_proj_bias", Dtype::BF16, vec![4, 32], bias);
    }
    let model = save(&directory.path().join("mxfp4"), &config, &tensors);
    // Gate row j of an expert is row 2j of its blocks; the low half of a byte comes first.
    const VALUES: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
    let blocks = &tensors["model.layers.1.mlp.experts.gate_up_proj_blocks"].2;
    let scales = &tensors["model.layers.1.mlp.experts.gate_up_proj_scales"].2;
    let element = |expert: usize, row: usize, col: usize| {
        let byte = blocks[(expert * 64 + row) * 16 + col / 2];
        let nibble = if col.is_multiple_of(2) { byte & 15 } else { byte >> 4 };
        VALUES[nibble as usize] * 2f32.powi(scales[expert * 64 + row] as i32 - 127)
    };
    let expert = model.expert(1, 3).unwrap();
    for unit in 0..32 {
        for col in 0..32 {
            assert_eq!(expert.gate[unit * 32 + col], element(3, 2 * unit, col));
            assert_eq!(expert.up[unit * 32 + col], element(3, 2 * unit + 1, col));
        }
    }
    assert_eq!(expert.gate_bias.as_ref().unwrap()[5], (3 * 64 + 10) as f32 / 64.0);
    let units: u64 = 3 * 4 * 32;
    let keep = PrunePlan::keep_all(model.shape(), model.fingerprint());
    for mode in [PruneForm::Uniform, PruneForm::Masked, PruneForm::Ragged] {
        let out = directory.path().join(mode.name());
        let options = PruneOptions { precision: PrunedPrecision::Bf16, ..PruneOptions::new(mode) };
        write_plan(&keep, &model, &out, &options).unwrap();
        let out = Checkpoint::open(out).unwrap();
        assert_eq!(out.quantization(), None);
        assert_eq!(out.raw_config().get("quantization_config"), None);
        assert_eq!(out.parameters(), model.parameters());
        assert!(model.parameters() > units * 3 * 32);
        for layer in 0..3 {
            for expert in 0..4 {
                assert_eq!(out.expert(layer, expert).unwrap(), model.expert(layer, expert).unwrap());
            }
        }
    }
}

#[test]
fn fp8_blocks_are_written_back_as_bf16() {
    let directory = tempdir().unwrap();
    let (mut config, mut tensors) = load(&parity("tf4/deepseek_v3"));
    config["quantization_config"] = json!({"quant_method": "fp8", "weight_block_size": [16, 16]});
    let names: Vec<String> = tensors.keys().filter(|name| name.contains("_proj")).cloned().collect();
    for name in &names {
        let shape = tensors[name].1.clone();
        // No NaN: its byte is 0x7F or 0xFF.
        let bytes: Vec<u8> = noise(shape[0] * shape[1], name.len()).iter().map(|byte| byte & 0xBF).collect();
        let scale = vec![shape[0].div_ceil(16), shape[1].div_ceil(16)];
        let scales = (0..scale[0] * scale[1]).flat_map(|i| (0.01 + i as f32 / 16.0).to_le_bytes()).collect();
        tensors.insert(name.clone(), (Dtype::F8_E4M3, shape, bytes));
        tensors.insert(format!("{name}_scale_inv"), (Dtype::F32, scale, scales));
    }
    let model = save(&directory.path().join("fp8"), &config, &tensors);
    let keep = PrunePlan::keep_all(model.shape(), model.fingerprint());
    let out = directory.path().join("out");
    let options = PruneOptions { precision: PrunedPrecision::Bf16, ..PruneOptions::new(PruneForm::Uniform) };
    write_plan(&keep, &model, &out, &options).unwrap();
    let out = Checkpoint::open(out).unwrap();
    assert_eq!(out.raw_config().get("quantization_config"), None);
    assert!(out.tensors().all(|info| !info.name.ends_with("scale_inv")));
    assert_eq!(out.parameters(), model.parameters());
    for name in &names {
        assert_eq!(out.info(name).unwrap().dtype, Dtype::BF16);
        assert_eq!(out.tensor_f32(name).unwrap(), model.tensor_f32(name).unwrap());
    }
    // 0x38 is 1: the factor of its block, rounded to BF16.
    let name = "model.layers.1.mlp.experts.2.up_proj.weight";
    let at = tensors[name].2.iter().position(|byte| *byte == 0x38).unwrap();
    let block = (at / 32 / 16) * 2 + at % 32 / 16;
    let expected = half::bf16::from_f32(0.01 + block as f32 / 16.0).to_f32();
    assert_eq!(model.expert(1, 2).unwrap().up[at], expected);
    assert_eq!(model.read_f32_rows(Role::Layer(0, LayerRole::DenseUp), 3..5).unwrap().len(), 64);
}

#[test]
fn further_layers_are_kept_or_dropped_by_choice() {
    let directory = tempdir().unwrap();
    let (config, mut tensors) = load(&parity("tf5/deepseek_v3"));
    let shared: Vec<(String, _)> = tensors
        .iter()
        .filter(|(name, _)| name.starts_with("model.layers.2."))
        .map(|(name, tensor)| (name.replace("layers.2.", "layers.3."), tensor.clone()))
        .collect();
    tensors.extend(shared);
    let model = save(&directory.path().join("mtp"), &config, &tensors);
    let plan = plan(&model, Scope::Expert, 0.5);
    let keep = PrunePlan::keep_all(model.shape(), model.fingerprint());
    let apply = |plan: &PrunePlan, mode, mtp| {
        let out = directory.path().join("out");
        let options = PruneOptions { mtp, ..PruneOptions::new(mode) };
        let force = WriteOptions { existing: Existing::Force, ..Default::default() };
        write_plan_with(plan, &model, &out, &options, &force).map(|_| Checkpoint::open(out).unwrap())
    };
    let text = apply(&plan, PruneForm::Uniform, None).unwrap_err().to_string();
    assert!(text.contains("model.layers.3.") && text.contains("kept, dropped or pruned"), "{text}");
    let text = apply(&plan, PruneForm::Uniform, Some(Mtp::Keep)).unwrap_err().to_string();
    assert!(text.contains("prune or drop them"), "{text}");
    for mode in [PruneForm::Ragged, PruneForm::Masked] {
        let kept = apply(&plan, mode, Some(Mtp::Keep)).unwrap();
        assert_eq!(kept.mtp_tensors().count(), model.mtp_tensors().count());
    }
    assert_eq!(apply(&keep, PruneForm::Uniform, Some(Mtp::Keep)).unwrap().fingerprint(), model.fingerprint());
    let dropped = apply(&plan, PruneForm::Uniform, Some(Mtp::Drop)).unwrap();
    assert_eq!(dropped.mtp_tensors().count(), 0);
    assert_eq!(dropped.raw_config()["num_nextn_predict_layers"], 0);
}

#[test]
fn text_models_are_pruned_inside_others_and_by_themselves() {
    let directory = tempdir().unwrap();
    for (name, text_config) in [("qwen3_5_moe", true), ("qwen3_5_moe_text", false)] {
        let model = Checkpoint::open(unrun(name)).unwrap();
        let text = |checkpoint: &Checkpoint| match text_config {
            true => checkpoint.raw_config()["text_config"].clone(),
            false => checkpoint.raw_config().clone(),
        };
        assert_eq!(model.shape().layers.len(), 4);
        let units = plan(&model, Scope::Expert, 0.4);
        let experts = expert_plan(&model, 0.25).unwrap();
        let [units, experts] = [("units", units), ("experts", experts)].map(|(kind, plan)| {
            let out = directory.path().join(format!("{name}-{kind}"));
            write_plan(&plan, &model, &out, &PruneOptions::new(PruneForm::Uniform)).unwrap();
            Checkpoint::open(out).unwrap()
        });
        assert_eq!((&text(&units)["moe_intermediate_size"], &text(&units)["num_experts"]), (&json!(16), &json!(4)));
        assert_eq!((&text(&experts)["moe_intermediate_size"], &text(&experts)["num_experts"]), (&json!(24), &json!(3)));
        // What is not an expert is as it was: linear attention, vision, shared experts.
        let before = contents(&model);
        for (checkpoint, changed) in [(&units, vec![".experts."]), (&experts, vec![".experts.", ".mlp.gate."])] {
            let after = contents(checkpoint);
            let kept: Vec<_> = before.iter().filter(|(name, _)| !changed.iter().any(|c| name.contains(c))).collect();
            assert_eq!(kept.iter().any(|(name, _)| name.starts_with("model.visual.")), text_config);
            assert!(kept.iter().any(|(name, _)| name.contains(".linear_attn.conv1d.")));
            assert!(kept.into_iter().all(|(name, value)| after[name] == *value));
        }
        // Layers of multi-token prediction, as released checkpoints have them.
        let (mut config, mut tensors) = load(&unrun(name));
        let from = if text_config { "model.language_model.layers.3." } else { "model.layers.3." };
        let mtp: Vec<_> = tensors.iter().filter(|(tensor, _)| tensor.starts_with(from)).collect();
        let mtp: Vec<_> = mtp.into_iter().map(|(t, v)| (t.replace(from, "mtp.layers.0."), v.clone())).collect();
        let count = mtp.len();
        tensors.extend(mtp);
        let key = "mtp_num_hidden_layers";
        let inner = if text_config { &mut config["text_config"] } else { &mut config };
        inner[key] = json!(1);
        let model = save(&directory.path().join(format!("{name}-mtp")), &config, &tensors);
        assert_eq!((model.mtp_tensors().count(), model.config().mtp_layers), (count, 1));
        let out = directory.path().join(format!("{name}-dropped"));
        let options = PruneOptions { mtp: Some(Mtp::Drop), ..PruneOptions::new(PruneForm::Uniform) };
        write_plan(&plan(&model, Scope::Expert, 0.4), &model, &out, &options).unwrap();
        let dropped = Checkpoint::open(out).unwrap();
        assert_eq!((dropped.mtp_tensors().count(), &text(&dropped)[key]), (0, &json!(0)));
    }
}

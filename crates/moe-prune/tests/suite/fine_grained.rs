//! Experts as pieces: the same model where nothing is dropped, the right shapes and refusals where something is.

use crate::common;
use crate::run;

use std::path::Path;
use std::sync::Arc;

use common::{fuse, magnitude, parity, write_plan_with};
use moe_checkpoint::{Checkpoint, Existing, GroupScore, LayerRole, Record, Role, WriteOptions};
use moe_prune::{
    EditSource, Edits, ExpertEdit, Export, FineGrained, PRUNE_METHOD, PruneForm, PruneOptions, PrunePlan, PruneRecord,
    Ratio, Scope,
};
use run::{difference, logits};
use tempfile::tempdir;

/// Every family and routing rule but sparsemixer, in both dialects.
const FIXTURES: [&str; 21] = [
    "tf4/deepseek_v2",
    "tf4/deepseek_v3",
    "tf4/glm4_moe",
    "tf4/gpt_oss",
    "tf4/mixtral",
    "tf4/olmoe",
    "tf4/qwen2_moe",
    "tf4/qwen3_moe",
    "tf5/deepseek_v2",
    "tf5/deepseek_v2_group",
    "tf5/deepseek_v3",
    "tf5/ernie4_5_moe",
    "tf5/glm4_moe",
    "tf5/gpt_oss",
    "tf5/granitemoe",
    "tf5/mixtral",
    "tf5/olmoe",
    "tf5/qwen2_moe",
    "tf5/qwen2_moe_bf16",
    "tf5/qwen2_moe_mixed",
    "tf5/qwen3_moe",
];

fn export(
    plan: &PrunePlan,
    model: &Checkpoint,
    out: &Path,
    how: FineGrained<'_>,
    edits: Option<&Edits>,
) -> moe_prune::Result<Checkpoint> {
    let edits = edits.map(|edits| Arc::new(edits.clone()) as Arc<dyn EditSource>);
    let options = PruneOptions { edits, allow_unaligned: true, ..PruneOptions::new(PruneForm::FineGrained(how)) };
    let report = write_plan_with(plan, model, out, &options, &force())?;
    let out = Checkpoint::open(out).unwrap();
    assert_eq!(report.bytes.after, out.bytes_on_disk());
    assert_eq!(report.parameters.after, out.parameters());
    Ok(out)
}

fn force() -> WriteOptions<'static> {
    WriteOptions { existing: Existing::Force, ..Default::default() }
}

fn keep_all(model: &Checkpoint) -> PrunePlan {
    PrunePlan::keep_all(model.shape(), model.fingerprint())
}

#[test]
fn without_drops_pieces_are_the_same_model() {
    let directory = tempdir().unwrap();
    for name in FIXTURES {
        let model = Checkpoint::open(parity(name)).unwrap();
        let expected = logits(model.dir());
        let scores = magnitude(&model);
        for pieces in [2, 4] {
            // Dealt by ids or by rank, it is the same.
            for ranking in [None, Some(&scores)] {
                let how = FineGrained { ranking, ..FineGrained::new(pieces) };
                let out = directory.path().join("out");
                let out = export(&keep_all(&model), &model, &out, how, None).unwrap();
                let found = difference(&logits(out.dir()), &expected);
                assert!(found < 2e-5, "{name}, {pieces} pieces: {found}");
                let (before, after) = (model.config(), out.config());
                assert_eq!(after.routing.top_k, before.routing.top_k * pieces);
                for (old, new) in model.shape().layers.iter().zip(&out.shape().layers) {
                    assert_eq!(new.num_experts(), old.num_experts() * pieces);
                    assert_eq!(new.widths[0] * pieces, old.widths[0]);
                    assert_eq!(out.expert_layout(new.layer).unwrap(), model.expert_layout(old.layer).unwrap());
                }
                match (before.routing.groups(), after.routing.groups()) {
                    (None, None) => {}
                    (Some(old), Some(new)) if old.score == GroupScore::Max => assert_eq!(old, new),
                    (Some(old), Some(new)) => {
                        assert_eq!((new.count, new.top), (old.count * pieces, old.top * pieces));
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}

#[test]
fn fused_experts_become_fused_pieces() {
    let directory = tempdir().unwrap();
    let model = Checkpoint::open(parity("tf5/qwen2_moe_bf16")).unwrap();
    let path = directory.path().join("fused");
    fuse(&model, &path);
    let fused = Checkpoint::open(&path).unwrap();
    let [a, b] = [("a", &model), ("b", &fused)].map(|(letter, from)| {
        let how = FineGrained::new(3);
        let plan = how.prune(&magnitude(from), from, 0.4).unwrap();
        export(&plan, from, &directory.path().join(letter), how, None).unwrap()
    });
    assert_eq!(b.expert_layout(1).unwrap(), moe_checkpoint::ExpertLayout::Fused);
    for layer in &a.shape().layers {
        for expert in 0..layer.num_experts() {
            assert_eq!(a.expert(layer.layer, expert).unwrap(), b.expert(layer.layer, expert).unwrap());
        }
    }
}

#[test]
fn pieces_hold_the_dealt_units_with_scaled_down_columns() {
    let directory = tempdir().unwrap();
    let model = Checkpoint::open(parity("tf5/qwen3_moe")).unwrap();
    let scores = magnitude(&model);
    let scales: Vec<Vec<f32>> = (0..3).map(|l| (0..8).map(|e| 0.5 + (l + e) as f32 / 8.0).collect()).collect();
    let how = FineGrained { ranking: Some(&scores), scales: Some(&scales), top_k: Some(7), ..FineGrained::new(4) };
    let plan = how.prune(&scores, &model, 0.5).unwrap();
    let map = how.map(&plan, &model).unwrap();
    assert_eq!((map.width, map.factor, map.routing.top_k), (6, 4.0, 7));
    let out = export(&plan, &model, &directory.path().join("out"), how, None).unwrap();
    assert_eq!(out.config().routing.top_k, 7);
    for ((position, layer), kept) in map.layers.iter().enumerate().zip(&plan.kept) {
        let (number, hidden) = (layer.layer, model.shape().hidden_size);
        let router = model.read_f32(Role::Layer(number, LayerRole::Router)).unwrap();
        let rows = out.read_f32(Role::Layer(number, LayerRole::Router)).unwrap();
        assert_eq!(
            rows,
            layer.pieces.iter().flat_map(|p| router[p.expert * hidden..][..hidden].to_vec()).collect::<Vec<_>>()
        );
        // Units of an expert by rank: piece p has ranks p, p + n, p + 2n, ...
        for (new, piece) in layer.pieces.iter().enumerate() {
            let n = layer.counts[piece.expert];
            let mut ranked = kept.experts[piece.expert].clone();
            let score = |unit: u32| scores.layers[position].scores[piece.expert][unit as usize];
            ranked.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
            let mut units: Vec<u32> = ranked.into_iter().skip(piece.index).step_by(n).collect();
            units.sort_unstable();
            let (full, found) = (model.expert(number, piece.expert).unwrap(), out.expert(number, new).unwrap());
            assert_eq!(found.width, 6);
            for (at, unit) in units.into_iter().enumerate() {
                let unit = unit as usize;
                assert_eq!(found.gate[at * hidden..(at + 1) * hidden], full.gate[unit * hidden..(unit + 1) * hidden]);
                assert_eq!(found.up[at * hidden..(at + 1) * hidden], full.up[unit * hidden..(unit + 1) * hidden]);
                for row in 0..hidden {
                    let factor = 4.0 * scales[position][piece.expert];
                    assert_eq!(found.down[row * 6 + at], full.down[row * full.width + unit] * factor);
                }
            }
        }
    }
    let applied: PruneRecord = Record::load(out.dir()).unwrap().recipe(PRUNE_METHOD).unwrap().unwrap();
    assert_eq!(applied.export, Export::FineGrained);
    assert_eq!((applied.pieces, applied.scales.as_ref()), (Some(4), Some(&scales)));
    assert_eq!(applied.report.layers[0].written, 16);
    assert!(applied.report.to_string().contains("multiples of 64 or 128"), "{}", applied.report);
}

#[test]
fn every_layer_keeps_as_many_pieces() {
    for name in FIXTURES {
        let model = Checkpoint::open(parity(name)).unwrap();
        let scores = magnitude(&model);
        for (pieces, ratio) in [(2, 0.5), (4, 0.3), (4, 0.5), (2, 0.1)] {
            let how = FineGrained { top_k: Some(1), ..FineGrained::new(pieces) };
            if name.ends_with("deepseek_v3") && ratio > 0.1 {
                continue; // groups of two experts, ranked by their two best, cannot lose a block
            }
            let plan = how.prune(&scores, &model, ratio).unwrap();
            let map = how.map(&plan, &model).unwrap();
            let count = map.layers[0].pieces.len();
            assert!(map.layers.iter().all(|layer| layer.pieces.len() == count), "{name}");
            assert!(plan.ratio.achieved <= ratio, "{name}");
            for layer in &map.layers {
                let mut sorted = layer.pieces.clone();
                sorted.sort_unstable();
                let all = layer
                    .counts
                    .iter()
                    .enumerate()
                    .flat_map(|(expert, count)| (0..*count).map(move |index| moe_prune::Piece { expert, index }));
                assert_eq!(sorted, all.collect::<Vec<_>>(), "{name}: every piece once");
            }
        }
    }
}

#[test]
fn groups_stay_together() {
    let directory = tempdir().unwrap();
    // Eight experts, in four groups of two or in two groups of four.
    let four = |name: &str| (Checkpoint::open(parity(name)).unwrap(), 4);
    let halves = directory.path().join("halves");
    std::fs::create_dir_all(&halves).unwrap();
    std::fs::copy(parity("tf5/deepseek_v3").join("model.safetensors"), halves.join("model.safetensors")).unwrap();
    let mut config = four("tf5/deepseek_v3").0.raw_config().clone();
    (config["n_group"], config["topk_group"]) = (2.into(), 1.into());
    std::fs::write(halves.join("config.json"), config.to_string()).unwrap();
    let halves = (Checkpoint::open(halves).unwrap(), 2);
    for ((model, count), blocks) in [(four("tf5/deepseek_v2_group"), 1), (four("tf5/deepseek_v3"), 4), (halves, 4)] {
        let how = FineGrained { top_k: Some(4), ..FineGrained::new(4) };
        let members = 8 / count;
        let name = model.dir().display().to_string();
        for ratio in [0.1, 0.5] {
            if (count, blocks, ratio) == (4, 4, 0.5) {
                // Two experts in each of four blocks cannot lose a piece.
                let text = how.prune(&magnitude(&model), &model, 0.5).unwrap_err().to_string();
                assert!(text.contains("at least 8"), "{text}");
                continue;
            }
            let plan = how.prune(&magnitude(&model), &model, ratio).unwrap();
            let map = how.map(&plan, &model).unwrap();
            let groups = map.routing.groups().unwrap();
            assert_eq!(groups.count, count * blocks);
            for layer in &map.layers {
                let size = layer.pieces.len() / groups.count;
                for (group, pieces) in layer.pieces.chunks(size).enumerate() {
                    assert!(pieces.iter().all(|piece| piece.expert / members == group / blocks), "{name}");
                    if blocks > 1 {
                        assert!(pieces.windows(2).all(|pair| pair[0].expert < pair[1].expert), "{name}");
                    }
                }
            }
            let out = export(&plan, &model, &directory.path().join("out"), how, None).unwrap();
            assert!(logits(out.dir()).iter().all(|value| value.is_finite()));
        }
    }
}

#[test]
fn edits_go_into_the_pieces() {
    let directory = tempdir().unwrap();
    for name in ["tf5/qwen3_moe", "tf5/gpt_oss", "tf5/deepseek_v3"] {
        let model = Checkpoint::open(parity(name)).unwrap();
        let plan = keep_all(&model);
        let hidden = model.shape().hidden_size;
        let mut edits = Edits::new();
        for kept in &plan.kept {
            for (expert, units) in kept.experts.iter().enumerate().step_by(2) {
                let noise = |i: usize| ((i * 7919 + expert * 31).wrapping_mul(2_654_435_761) % 1000) as f32 / 2000.0;
                let down = (0..hidden * units.len()).map(noise).collect();
                let down_bias = name.ends_with("gpt_oss").then(|| (0..hidden).map(noise).collect());
                edits.set_expert(kept.layer, expert, ExpertEdit { down: Some(down), down_bias });
            }
        }
        let uniform = directory.path().join("uniform");
        let shared = Some(Arc::new(edits.clone()) as Arc<dyn EditSource>);
        let options = PruneOptions { edits: shared, ..PruneOptions::new(PruneForm::Uniform) };
        write_plan_with(&plan, &model, &uniform, &options, &force()).unwrap();
        let out = export(&plan, &model, &directory.path().join("out"), FineGrained::new(2), Some(&edits)).unwrap();
        let found = difference(&logits(out.dir()), &logits(&uniform));
        assert!(found < 2e-5, "{name}: {found}");
        assert!(difference(&logits(&uniform), &logits(model.dir())) > 1e-2, "{name}: the edits change nothing");
    }
}

#[test]
fn what_cannot_be_expressed_is_refused() {
    let directory = tempdir().unwrap();
    let out = directory.path().join("out");
    let refused = |plan: &PrunePlan, model: &Checkpoint, how: FineGrained<'_>| {
        export(plan, model, &out, how, None).unwrap_err().to_string()
    };
    let phimoe = Checkpoint::open(parity("tf5/phimoe")).unwrap();
    let text = refused(&keep_all(&phimoe), &phimoe, FineGrained::new(2));
    assert!(text.contains("sparsemixer"), "{text}");
    let model = Checkpoint::open(parity("tf5/qwen2_moe")).unwrap();
    let keep = keep_all(&model);
    let text = refused(&keep, &model, FineGrained::new(5));
    assert!(text.contains("width 24") && text.contains("5 equal pieces"), "{text}");
    let text = refused(&keep, &model, FineGrained::new(0));
    assert!(text.contains("0 equal pieces"), "{text}");
    let text = refused(&keep, &model, FineGrained { top_k: Some(33), ..FineGrained::new(4) });
    assert!(text.contains("32 of the 32 pieces") && text.contains("33 are selected"), "{text}");
    let scales = vec![vec![1.0; 8]; 2];
    let text = refused(&keep, &model, FineGrained { scales: Some(&scales), ..FineGrained::new(2) });
    assert!(text.contains("scales"), "{text}");

    let uneven = common::plan(&model, Scope::Layer, 0.4);
    let text = refused(&uneven, &model, FineGrained::new(4));
    assert!(text.contains("multiple of 6") && text.contains("round_to 6"), "{text}");
    let mut fewer = keep.clone();
    fewer.kept[1].experts[5].truncate(12);
    let dropped = 1.0 - fewer.units_kept() as f64 / fewer.shape.units() as f64;
    fewer.ratio = Ratio { asked: dropped, achieved: dropped };
    let text = refused(&fewer, &model, FineGrained::new(2));
    assert!(text.contains("layer 0 keeps 16 pieces") && text.contains("keeps 15"), "{text}");
    let mut grouped = keep_all(&Checkpoint::open(parity("tf5/deepseek_v2_group")).unwrap());
    let layers = grouped.kept.len();
    for kept in &mut grouped.kept {
        kept.experts[0].truncate(12);
    }
    let dropped = (12 * layers) as f64 / grouped.shape.units() as f64;
    grouped.ratio = Ratio { asked: dropped, achieved: dropped };
    let text = refused(&grouped, &Checkpoint::open(parity("tf5/deepseek_v2_group")).unwrap(), FineGrained::new(2));
    assert!(text.contains("[3, 4, 4, 4] pieces"), "{text}");

    assert!(!out.exists() && !directory.path().join("out.partial").exists());
}

/// Pieces of an expert tie, and runtimes break ties in their own ways: where a token gets some of an expert's pieces
/// alone, the report says so.
#[test]
fn pieces_per_token_that_cut_an_expert_are_told() {
    let directory = tempdir().unwrap();
    let model = Checkpoint::open(parity("tf5/qwen3_moe")).unwrap();
    let told = |plan: &PrunePlan, how: FineGrained<'_>| {
        let options = PruneOptions { allow_unaligned: true, ..PruneOptions::new(PruneForm::FineGrained(how)) };
        let out = directory.path().join("out");
        let report = write_plan_with(plan, &model, &out, &options, &force()).unwrap();
        report.notes.iter().any(|note| note.contains("these tie"))
    };
    let how = FineGrained::new(2);
    assert!(!told(&keep_all(&model), how), "two pieces of every expert, an even number per token");
    assert!(told(&keep_all(&model), FineGrained { top_k: Some(3), ..how }));
    let plan = how.prune(&magnitude(&model), &model, 0.3).unwrap();
    assert!(told(&plan, how), "some experts have one piece");
    let all = how.map(&plan, &model).unwrap().layers[0].pieces.len();
    assert!(!told(&plan, FineGrained { top_k: Some(all), ..how }), "all are selected");
}

#[test]
fn pieces_that_grouped_products_cannot_run_get_units_of_zeros() {
    let directory = tempdir().unwrap();
    // Pieces of 12, 6 and 3 units: none is a multiple of 8. Biases of units, shared experts in widths of a routed one,
    // fused experts.
    for name in ["tf5/qwen2_moe_bf16", "tf5/gpt_oss", "tf5/deepseek_v3", "tf5/granitemoe"] {
        let model = Checkpoint::open(parity(name)).unwrap();
        let expected = logits(model.dir());
        let whole = model.shape().uniform_width().unwrap();
        for pieces in [2, 4, 8].into_iter().filter(|pieces| whole.is_multiple_of(*pieces)) {
            let (how, out) = (FineGrained::new(pieces), directory.path().join("out"));
            let options = PruneOptions::new(PruneForm::FineGrained(how));
            let report = write_plan_with(&keep_all(&model), &model, &out, &options, &force()).unwrap();
            let units = whole / pieces;
            let width = units.next_multiple_of(8);
            let padded =
                report.notes.iter().any(|note| note.contains(&format!("pieces of {units} units are {width} wide")));
            assert_eq!(padded, units != width, "{name}: {:?}", report.notes);
            let written = Checkpoint::open(&out).unwrap();
            assert_eq!(written.shape().uniform_width(), Some(width), "{name}");
            let found = difference(&logits(&out), &expected);
            assert!(found < 2e-2, "{name}, {pieces} pieces: {found}");
            // The zeros are all that tells it from pieces as wide as they are.
            let bare = directory.path().join("bare");
            export(&keep_all(&model), &model, &bare, how, None).unwrap();
            let found = difference(&logits(&out), &logits(&bare));
            assert!(found < 1e-6, "{name}, {pieces} pieces: {found}");
        }
    }
}

#[test]
fn a_ratio_that_leaves_too_few_pieces_is_known_before_any_score() {
    let model = Checkpoint::open(parity("tf5/qwen3_moe")).unwrap();
    let (how, scores) = (FineGrained::new(4), magnitude(&model));
    for ratio in [0.1, 0.3, 0.5, 0.7, 0.9] {
        let before = how.check(&model, ratio).map_err(|error| error.to_string());
        let after = how.prune(&scores, &model, ratio).map(drop).map_err(|error| error.to_string());
        assert_eq!(before, after, "{ratio}");
    }
    assert!(how.check(&model, 0.9).is_err() && how.check(&model, 0.1).is_ok());
    for name in FIXTURES {
        let model = Checkpoint::open(parity(name)).unwrap();
        for (pieces, ratio) in [(2, 0.3), (4, 0.6), (3, 0.2)] {
            let how = FineGrained::new(pieces);
            let before = how.check(&model, ratio).is_ok();
            assert_eq!(before, how.prune(&magnitude(&model), &model, ratio).is_ok(), "{name}, {pieces}, {ratio}");
        }
    }
}

#[test]
fn experts_without_pieces_go_with_their_router_rows() {
    let directory = tempdir().unwrap();
    let model = Checkpoint::open(parity("tf5/deepseek_v2")).unwrap();
    let mut scores = magnitude(&model);
    scores.layers.iter_mut().for_each(|layer| layer.scores[2].fill(0.0));
    let how = FineGrained { top_k: Some(6), ..FineGrained::new(2) };
    let plan = how.prune(&scores, &model, 0.2).unwrap();
    assert!(plan.kept.iter().all(|kept| kept.experts[2].is_empty()));
    let map = how.map(&plan, &model).unwrap();
    assert!(map.layers.iter().all(|layer| layer.pieces.iter().all(|piece| piece.expert != 2)));
    let out = export(&plan, &model, &directory.path().join("out"), how, None).unwrap();
    assert_eq!(out.shape().layers[0].num_experts(), map.layers[0].pieces.len());
}

#[test]
fn a_correction_bias_on_a_softmax_shrinks_with_it() {
    let directory = tempdir().unwrap();
    let model = Checkpoint::open(parity("tf5/ernie4_5_moe")).unwrap();
    let how = FineGrained { top_k: Some(4), ..FineGrained::new(2) };
    let plan = how.prune(&magnitude(&model), &model, 0.3).unwrap();
    let map = how.map(&plan, &model).unwrap();
    let out = export(&plan, &model, &directory.path().join("out"), how, None).unwrap();
    for layer in &map.layers {
        assert_eq!(layer.pieces.len(), 12, "not a multiple of 8");
        let role = Role::Layer(layer.layer, LayerRole::CorrectionBias);
        let before = model.read_f32(role).unwrap();
        let expected: Vec<f32> = layer.pieces.iter().map(|piece| before[piece.expert] / 2.0).collect();
        assert_eq!(out.read_f32(role).unwrap(), expected);
    }
}

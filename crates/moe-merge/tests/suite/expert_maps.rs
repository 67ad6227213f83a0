//! Experts and routers as sums of others, and the search for them.

use crate::common;

use std::sync::Arc;

use common::{open, parity};
use moe_checkpoint::{Checkpoint, ExpertPart, LayerRole, RawMatrix, Role, WriteOptions, write};
use moe_core::Model;
use moe_core::data::{Sequence, Wave};
use moe_core::device::device;
use moe_merge::{ExpertEvolution, ExpertMap, Fitness, LayerMap};
use tempfile::tempdir;

fn waves() -> Vec<Wave> {
    let sequence =
        |seed: usize, n: usize| Sequence::new((0..n).map(|i| ((i * i * 7 + i * 3 + seed * 11) % 90) as u32).collect());
    vec![Wave { id: 0, sequences: vec![sequence(1, 33), sequence(2, 15)] }]
}

fn base() -> Arc<Checkpoint> {
    open(parity("tf5/qwen2_moe"))
}

/// The same number of experts of every layer, every second one.
fn kept(base: &Checkpoint) -> Vec<LayerMap> {
    let of = |layer: &moe_checkpoint::MoeLayerShape| {
        let experts = layer.num_experts();
        let kept: Vec<u32> = (0..experts as u32).step_by(2).collect();
        LayerMap::keep(layer.layer, &kept, experts)
    };
    base.shape().layers.iter().map(of).collect()
}

fn router(model: &Checkpoint, layer: usize) -> Vec<f32> {
    let info = model.role(Role::Layer(layer, LayerRole::Router)).unwrap();
    let bytes = model.bytes(&info.name).unwrap();
    RawMatrix { bytes, dtype: info.dtype, rows: 1, cols: info.elements() as usize }.to_f32()
}

#[test]
fn rows_of_a_single_one_keep_experts_and_router_rows_to_the_byte() {
    let base = base();
    let small = ExpertMap::new(&base, kept(&base)).unwrap().on(&base, None).unwrap();
    let hidden = base.shape().hidden_size;
    for (layer, before) in small.shape().layers.iter().zip(&base.shape().layers) {
        assert_eq!(layer.num_experts(), before.num_experts().div_ceil(2));
        let (new, old) = (router(&small, layer.layer), router(&base, layer.layer));
        for expert in 0..layer.num_experts() {
            assert_eq!(new[expert * hidden..][..hidden], old[2 * expert * hidden..][..hidden]);
            for part in [ExpertPart::Gate, ExpertPart::Up, ExpertPart::Down] {
                let of = |model: &Checkpoint, e| {
                    let matrix = model.expert_part(layer.layer, e, part).unwrap().unwrap();
                    (matrix.dtype, matrix.bytes.to_vec())
                };
                assert_eq!(of(&small, expert), of(&base, 2 * expert));
            }
        }
    }
    // Nothing goes, nothing is mixed: every expert is as it was.
    let all = base.shape().layers.iter().map(|layer| {
        let experts: Vec<u32> = (0..layer.num_experts() as u32).collect();
        LayerMap::keep(layer.layer, &experts, layer.num_experts())
    });
    let same = ExpertMap::new(&base, all.collect()).unwrap().on(&base, None).unwrap();
    assert_eq!(router(&same, base.shape().layers[0].layer), router(&base, base.shape().layers[0].layer));
}

#[test]
fn other_rows_are_sums_in_the_model_and_in_the_one_that_is_written() {
    let base = base();
    let mut layers = kept(&base);
    let first = layers[0].layer;
    layers[0].experts[1] = vec![0.0; layers[0].experts[1].len()];
    (layers[0].experts[1][2], layers[0].experts[1][1]) = (0.75, -0.5);
    (layers[0].router[0][0], layers[0].router[0][3]) = (1.0, 0.25);
    let map = ExpertMap::new(&base, layers).unwrap();
    let model = map.on(&base, None).unwrap();
    let hidden = base.shape().hidden_size;
    let old = router(&base, first);
    let close = |found: &[f32], expected: &[f32]| {
        // In the dtype of the model.
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6 + 0.01 * b.abs();
        assert!(found.len() == expected.len() && found.iter().zip(expected).all(near), "{found:?} {expected:?}");
    };
    let check = |model: &Checkpoint| {
        let row: Vec<f32> = (0..hidden).map(|h| old[h] + 0.25 * old[3 * hidden + h]).collect();
        close(&router(model, first)[..hidden], &row);
        for part in [ExpertPart::Gate, ExpertPart::Up, ExpertPart::Down] {
            let of = |model: &Checkpoint, e| model.expert_part(first, e, part).unwrap().unwrap().to_f32();
            let (one, two) = (of(&base, 1), of(&base, 2));
            let sum: Vec<f32> = one.iter().zip(&two).map(|(one, two)| 0.75 * two - 0.5 * one).collect();
            close(&of(model, 1), &sum);
        }
    };
    check(&model);
    let directory = tempdir().unwrap();
    let out = directory.path().join("out");
    write(&model, &out, &WriteOptions::default()).unwrap();
    let written = Checkpoint::open(&out).unwrap();
    check(&written);
    assert!(written.is_model(&model.fingerprint()));
    // The file keeps all of it, and belongs to one model.
    let file = directory.path().join("map.json");
    map.save(&file).unwrap();
    assert_eq!(ExpertMap::load(&file).unwrap(), map);
    let error = map.on(&open(parity("tf5/mixtral")), None).unwrap_err().to_string();
    assert!(error.contains("expert map"), "{error}");
}

#[test]
fn maps_that_do_not_fit_name_the_layer() {
    let base = base();
    let message = |change: &dyn Fn(&mut Vec<LayerMap>)| {
        let mut layers = kept(&base);
        change(&mut layers);
        ExpertMap::new(&base, layers).unwrap_err().to_string()
    };
    let first = base.shape().layers[0].layer;
    assert!(message(&|layers| layers[0].kept.reverse()).contains(&format!("layer {first}: kept experts")));
    assert!(message(&|layers| drop(layers[0].router.pop())).contains("router has rows"));
    assert!(message(&|layers| layers[0].experts[0][0] = f32::NAN).contains("not finite"));
    assert!(message(&|layers| drop(layers.pop())).contains("but the model has"));
}

#[test]
fn the_search_only_gets_better_and_draws_the_same_by_the_same_seed() {
    let model = Model::open(parity("tf5/qwen2_moe"), &device("flex").unwrap(), None).unwrap();
    let base = model.checkpoint().clone();
    let experts = base.shape().layers[0].num_experts() - 1;
    let search = ExpertEvolution {
        experts,
        population: 4,
        pruning: 3,
        merging: 4,
        mutation: 0.2,
        fitness: Fitness::Divergence,
        seed: 5,
    };
    let mut told = Vec::new();
    let found = search.search(&model, &waves(), None, &mut |done, of| told.push((done, of))).unwrap();
    assert_eq!((found.best.len(), found.runs), (1 + 3 + 4, 4 * (1 + 3 + 4)));
    assert_eq!(told.last(), Some(&(found.runs, found.runs)));
    assert!(found.best.windows(2).all(|pair| pair[1] <= pair[0]), "{:?}", found.best);
    assert!(found.best[7] < found.best[0], "{:?}", found.best);
    let again = search.search(&model, &waves(), None, &mut |_, _| {}).unwrap();
    assert_eq!(again, found);
    // What it says of the best is what the model that is made of it does.
    let made = model.like(found.map.on(&base, None).unwrap()).unwrap();
    let engine = moe_core::Engine::new(&model, Default::default());
    let tokens = model.config().vocab_size.min(256);
    let teacher = moe_core::TeacherLogits::record(&engine, &waves(), tokens).unwrap();
    let divergence = moe_core::evaluate::divergence(&made, &teacher, &waves()).unwrap();
    assert!((divergence - found.best[7]).abs() < 1e-9, "{divergence} and {:?}", found.best);
    // Pruning alone leaves rows of single ones.
    let pruned = ExpertEvolution { merging: 0, fitness: Fitness::Loss, ..search.clone() };
    let map = pruned.search(&model, &waves(), None, &mut |_, _| {}).unwrap().map;
    for layer in map.layers() {
        assert_eq!(*layer, LayerMap::keep(layer.layer, &layer.kept, layer.router[0].len()));
    }
    for (wrong, part) in [
        (ExpertEvolution { population: 1, ..search.clone() }, "population"),
        (ExpertEvolution { mutation: 0.0, ..search.clone() }, "mutation"),
        (ExpertEvolution { experts: 0, ..search.clone() }, "experts per token"),
        (ExpertEvolution { experts: 1000, ..search }, "experts"),
    ] {
        let error = wrong.search(&model, &waves(), None, &mut |_, _| {}).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

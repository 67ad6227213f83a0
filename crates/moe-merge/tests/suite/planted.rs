//! Models in which what should be merged is known, and models that differ in the order of their parts alone.

use crate::common;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::run::{difference, logits};
use common::{open, parity, written};
use moe_checkpoint::ProtectionMask;
use moe_checkpoint::{Checkpoint, Dtype, ExpertTensor, ExpertWeights, LayerRole, Role, encode};
use moe_core::Model;
use moe_core::data::{Sequence, Wave};
use moe_core::device::device;
use moe_merge::{
    AlignmentConfig, Amount, CombinationConfig, Evidence, EvidenceOptions, GroupingConfig, MergeOptions, MergePlan,
    OutputForm, Recipe, Reference, RouterConfig, Scope, collect_evidence,
};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use tempfile::tempdir;

/// Writes the checkpoint with tensors changed: `change` gets a tensor's name and its values.
fn rewrite(from: &Checkpoint, to: &Path, change: &dyn Fn(&str, Vec<f32>) -> Vec<f32>) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from.dir()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
    let bytes = fs::read(from.dir().join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut changed = Vec::new();
    for (name, view) in tensors.iter() {
        let values = view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let mut bytes = Vec::new();
        assert!(view.dtype() == Dtype::F32 && encode(Dtype::F32, &change(name, values), &mut bytes));
        changed.push((name.to_string(), view.shape().to_vec(), bytes));
    }
    let views = changed
        .iter()
        .map(|(name, shape, bytes)| (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    fs::write(to.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

/// The checkpoint with expert `e` of every layer made by `expert(layer, e)`, and row `e` of its router by `row(e)`.
fn with_experts(
    from: &Checkpoint,
    to: &Path,
    expert: &dyn Fn(usize, usize) -> ExpertWeights,
    row: &dyn Fn(usize) -> (usize, f32),
) {
    let mut parts = std::collections::BTreeMap::new();
    for layer in &from.shape().layers {
        for e in 0..layer.num_experts() {
            let ExpertWeights { gate, up, down, .. } = expert(layer.layer, e);
            let tensors = [(ExpertTensor::Gate(e), gate), (ExpertTensor::Up(e), up), (ExpertTensor::Down(e), down)];
            parts.extend(tensors.map(|(tensor, values)| (from.expert_tensor_name(layer.layer, tensor), values)));
        }
        let router = &from.role(Role::Layer(layer.layer, LayerRole::Router)).unwrap().name;
        let old = from.tensor_f32(router).unwrap();
        let rows = old.len() / layer.num_experts();
        let of = |e: usize| {
            let (from, factor) = row(e);
            old[from * rows..(from + 1) * rows].iter().map(move |v| factor * v).collect::<Vec<f32>>()
        };
        parts.insert(router.clone(), (0..layer.num_experts()).flat_map(of).collect());
    }
    rewrite(from, to, &|name, values| parts.get(name).cloned().unwrap_or(values));
}

/// A permutation that is not its own inverse.
fn shuffled(length: usize, salt: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..length as u32).collect();
    order.sort_by_key(|i| (*i as usize * 7919 + salt * 104_729) % 1009);
    order
}

fn waves() -> Vec<Wave> {
    let sequence =
        |seed: usize, n: usize| Sequence::new((0..n).map(|i| ((i * i * 7 + i * 3 + seed * 11) % 90) as u32).collect());
    vec![Wave { id: 1, sequences: vec![sequence(1, 60), sequence(2, 50)] }]
}

fn evidence(dir: &Path) -> Evidence {
    let model = Model::open(dir, &device("flex").unwrap(), None).unwrap();
    let recipes: Vec<Recipe> = Recipe::names().map(|name| Recipe::named(name).unwrap()).collect();
    collect_evidence(&model, &waves(), &EvidenceOptions::for_recipes(&recipes, 110), None, &mut |_| {}).unwrap()
}

fn plan(recipe: &Recipe, dir: &Path, evidence: &Evidence) -> MergePlan {
    recipe.plan(&Checkpoint::open(dir).unwrap(), evidence, &ProtectionMask::none()).unwrap()
}

fn apply(plan: &MergePlan, dir: &Path, evidence: &Evidence, form: OutputForm, out: &Path) {
    let options = MergeOptions { evidence: Some(Arc::new(evidence.clone())), ..MergeOptions::new(form) };
    written(plan, &open(dir), out, &options).unwrap();
}

/// Recipes that find clones by what experts do, with the router kept, each with an alignment.
fn finders() -> Vec<Recipe> {
    let named = |name: &str| Recipe::named(name).unwrap();
    let mut recipes = Vec::new();
    for name in ["hc-smoe", "sub-moe", "uncurl"] {
        for alignment in [named("m-smoe").alignment, named("ream").alignment] {
            for combination in ["m-smoe", "sub-moe", "mergemoe"] {
                let mut recipe = named(name);
                recipe.name = format!("{name}, {alignment:?}, {combination}");
                recipe.combination = named(combination).combination;
                recipe.alignment = alignment.clone();
                recipe.router = RouterConfig::Keep;
                recipe.budget.scope = Scope::Layer;
                recipes.push(recipe);
            }
        }
    }
    recipes
}

#[test]
fn clones_in_another_order_of_units_become_one_again_and_nothing_changes() {
    let directory = tempdir().unwrap();
    let from = Checkpoint::open(parity("tf4/qwen2_moe")).unwrap();
    // Four pairs, and two groups of four.
    for (name, size) in [("pairs", 2), ("fours", 4)] {
        let planted = directory.path().join(name);
        let original = |e: usize| e - e % size;
        let expert = |layer: usize, e: usize| {
            let weights = from.expert(layer, original(e)).unwrap();
            weights.select_units(&shuffled(weights.width, e % size)).unwrap()
        };
        // Shorter rows of the router: the first of its clones is used more than the next.
        with_experts(&from, &planted, &expert, &|e| (original(e), 1.0 - 0.05 * (e % size) as f32));
        let (evidence, expected) = (evidence(&planted), logits(&planted));
        for (at, recipe) in finders().into_iter().enumerate() {
            let recipe = recipe.with_amount(Amount::Groups(8 / size));
            let plan = plan(&recipe, &planted, &evidence);
            for layer in &plan.layers {
                let members: Vec<Vec<u32>> = layer.groups.iter().map(|group| group.members.clone()).collect();
                let clones: Vec<Vec<u32>> = (0..8 / size as u32)
                    .map(|group| (0..size as u32).map(|e| group * size as u32 + e).collect())
                    .collect();
                assert_eq!(members, clones, "{name}, {}", recipe.name);
            }
            let out = directory.path().join(format!("{name}-{at}"));
            apply(&plan, &planted, &evidence, OutputForm::Grouped, &out);
            let found = difference(&logits(&out), &expected);
            assert!(found < 1e-4, "{name}, {}: {found}", recipe.name);
            if matches!(recipe.combination, CombinationConfig::Average(_)) {
                // To the last bit of every weight.
                let (merged, planted) = (Checkpoint::open(&out).unwrap(), Checkpoint::open(&planted).unwrap());
                for layer in &plan.layers {
                    for group in &layer.groups {
                        let of =
                            |checkpoint: &Checkpoint| checkpoint.expert(layer.layer, group.dominant as usize).unwrap();
                        assert_eq!(of(&merged), of(&planted), "{name}, {}", recipe.name);
                    }
                }
            }
        }
    }
}

#[test]
fn a_twin_that_is_dropped_leaves_its_twin_as_it_is() {
    let directory = tempdir().unwrap();
    let from = Checkpoint::open(parity("tf4/qwen2_moe")).unwrap();
    let planted = directory.path().join("twins");
    let expert = |layer: usize, e: usize| {
        let weights = from.expert(layer, e - e % 2).unwrap();
        weights.select_units(&shuffled(weights.width, e % 2)).unwrap()
    };
    // The second of two twins has hardly a token.
    with_experts(&from, &planted, &expert, &|e| (e - e % 2, if e % 2 == 0 { 1.0 } else { 0.1 }));
    let evidence = evidence(&planted);
    let recipe = Recipe::named("dern").unwrap().with_amount(Amount::Groups(4));
    let mut plan = plan(&recipe, &planted, &evidence);
    for layer in &mut plan.layers {
        let keep = |e: u32| moe_merge::Group { dominant: e, members: vec![e], weights: vec![1.0] };
        (layer.groups, layer.dissolved) = ([0, 2, 4, 6].map(keep).into(), vec![1, 3, 5, 7]);
    }
    let out = directory.path().join("out");
    apply(&plan, &planted, &evidence, OutputForm::Stock, &out);
    let (merged, planted) = (Checkpoint::open(&out).unwrap(), Checkpoint::open(&planted).unwrap());
    let x: Vec<f32> = (0..40 * 32).map(|i| ((i * i * 31 + i * 17) % 200) as f32 / 100.0 - 1.0).collect();
    let activation = planted.config().hidden_act;
    for layer in &plan.layers {
        for (at, e) in [0, 2, 4, 6].into_iter().enumerate() {
            let of =
                |checkpoint: &Checkpoint, e: usize| checkpoint.expert(layer.layer, e).unwrap().forward(&x, activation);
            assert!(difference(&of(&merged, at), &of(&planted, e)) < 1e-5, "layer {}, expert {e}", layer.layer);
        }
    }
}

#[test]
fn twins_behind_one_row_are_one_under_a_full_softmax() {
    let directory = tempdir().unwrap();
    let from = Checkpoint::open(parity("tf5/gpt_oss")).unwrap();
    let planted = directory.path().join("twins");
    // Experts 1 and 3 are 0 and 2, router rows and biases included.
    rewrite(&from, &planted, &|name, values| {
        if !(name.contains(".mlp.experts.") || name.contains(".mlp.router.")) {
            return values;
        }
        let length = values.len() / 4;
        [0, 0, 2, 2].iter().flat_map(|e| values[e * length..(e + 1) * length].to_vec()).collect()
    });
    let config = fs::read_to_string(planted.join("config.json")).unwrap();
    let all = config.replace("\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 4");
    assert_ne!(all, config);
    fs::write(planted.join("config.json"), all).unwrap();
    let evidence = evidence(&planted);
    let recipe = Recipe::named("uncurl").unwrap().with_amount(Amount::Groups(2));
    assert!(matches!(recipe.router, RouterConfig::Merge(rows) if rows.count_bias));
    let plan = plan(&recipe, &planted, &evidence);
    assert!(plan.layers.iter().all(|layer| layer.groups.iter().map(|g| g.members.len()).eq([2, 2])));
    let out = directory.path().join("out");
    apply(&plan, &planted, &evidence, OutputForm::Stock, &out);
    assert!(difference(&logits(&out), &logits(&planted)) < 1e-5);
}

#[test]
fn the_order_of_experts_and_units_changes_no_recipe_and_no_output() {
    let directory = tempdir().unwrap();
    let from = Checkpoint::open(parity("tf4/qwen2_moe")).unwrap();
    let order = shuffled(8, 3);
    let moved = directory.path().join("moved");
    let expert = |layer: usize, e: usize| {
        let weights = from.expert(layer, order[e] as usize).unwrap();
        weights.select_units(&shuffled(weights.width, e)).unwrap()
    };
    with_experts(&from, &moved, &expert, &|e| (order[e] as usize, 1.0));
    assert!(difference(&logits(&moved), &logits(from.dir())) < 1e-5);
    let (own, of_moved) = (evidence(from.dir()), evidence(&moved));
    for mut recipe in Recipe::names().map(|name| Recipe::named(name).unwrap()) {
        // Who is the first of a layer is a matter of order, and so is a match to its units.
        recipe.reference = Reference::Dominant;
        // Averages of experts that are not aligned depend on the order of their units.
        let aligned = !matches!(recipe.alignment, AlignmentConfig::None);
        let unaligned = matches!(
            recipe.combination,
            CombinationConfig::Average(_) | CombinationConfig::Subspace(_) | CombinationConfig::LeastSquaresDown(_)
        );
        if unaligned && !aligned {
            recipe.alignment = Recipe::named("uncurl").unwrap().alignment;
        }
        // Nor do weights of units that were renamed say which experts are alike.
        if recipe.name == "mergemoe" {
            recipe.grouping = Recipe::named("m-smoe").unwrap().grouping;
        }
        let (first, second) = (plan(&recipe, from.dir(), &own), plan(&recipe, &moved, &of_moved));
        for (first, second) in first.layers.iter().zip(&second.layers) {
            let renamed = |experts: &[u32]| {
                let mut names: Vec<u32> = experts.iter().map(|e| order[*e as usize]).collect();
                names.sort_unstable();
                names
            };
            let mut groups: Vec<(u32, Vec<u32>)> =
                second.groups.iter().map(|g| (order[g.dominant as usize], renamed(&g.members))).collect();
            groups.sort();
            let expected: Vec<(u32, Vec<u32>)> = first.groups.iter().map(|g| (g.dominant, g.members.clone())).collect();
            assert_eq!(groups, expected, "{}", recipe.name);
            assert_eq!(renamed(&second.dissolved), first.dissolved, "{}", recipe.name);
        }
        let outs = ["own", "moved"].map(|which| directory.path().join(format!("{}-{which}", recipe.name)));
        apply(&first, from.dir(), &own, OutputForm::Grouped, &outs[0]);
        apply(&second, &moved, &of_moved, OutputForm::Grouped, &outs[1]);
        let found = difference(&logits(&outs[1]), &logits(&outs[0]));
        assert!(found < 1e-3, "{}: {found}", recipe.name);
        assert!(!matches!(recipe.grouping, GroupingConfig::Retain(_)) || !recipe.router.keeps_rows());
    }
}

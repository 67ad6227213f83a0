//! Experts of dense models: what stays the same, what does not, what is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, ExpertPart, LayerRole, Role, WriteOptions, write};
use moe_core::Model;
use moe_core::data::{Sequence, Wave};
use moe_core::device::device;
use moe_core::host::HostView;
use moe_core::trace::{LayerOutput, Observer, Signals};
use moe_core::{Engine, EngineOptions};
use moe_merge::{
    ClusterBy, Evidence, EvidenceOptions, PartScale, RouterStart, UpcycleInputs, UpcycleMethod, Upcycling,
    collect_evidence,
};
use tempfile::tempdir;

const FAMILIES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

fn dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/dense").join(name)
}

fn dense(name: &str) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open_dense(dir(name)).unwrap())
}

fn on(recipe: &Upcycling, base: &Arc<Checkpoint>) -> Arc<Checkpoint> {
    recipe.on(base, &UpcycleInputs::default()).unwrap().model().clone()
}

fn refusal(recipe: &Upcycling, base: &Arc<Checkpoint>, inputs: &UpcycleInputs) -> String {
    recipe.on(base, inputs).unwrap_err().to_string()
}

/// The tokens that transformers ran the dense model on, and its logits.
fn expected(name: &str) -> (Wave, Vec<f32>) {
    let bytes = std::fs::read(dir(name).join("expected.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("input_ids").unwrap();
    let ids: Vec<u32> =
        ids.data().chunks_exact(8).map(|id| i64::from_le_bytes(id.try_into().unwrap()) as u32).collect();
    let logits = file.tensor("logits").unwrap();
    let logits = logits.data().chunks_exact(4).map(|value| f32::from_le_bytes(value.try_into().unwrap())).collect();
    (Wave { id: 0, sequences: ids.chunks(19).map(|ids| Sequence::new(ids.to_vec())).collect() }, logits)
}

#[derive(Default)]
struct Logits(Vec<f32>);

impl Observer for Logits {
    fn needs(&self) -> Signals {
        Signals { logits: true, ..Signals::NONE }
    }

    fn logits(&mut self, _: usize, logits: &HostView, _: usize) -> moe_core::Result<()> {
        self.0.extend_from_slice(logits.as_slice());
        Ok(())
    }
}

/// The largest difference of a model's logits from those of the dense model in transformers.
fn difference(model: &Arc<Checkpoint>, name: &str) -> f32 {
    let (wave, expected) = expected(name);
    let model = Model::new(model.clone(), &device("flex").unwrap(), None).unwrap();
    let mut logits = Logits::default();
    Engine::new(&model, EngineOptions::default()).run(&wave, &mut logits).unwrap();
    assert_eq!(logits.0.len(), expected.len());
    logits.0.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// What the model of one expert saw of the expected rows.
fn sample(base: &Arc<Checkpoint>, name: &str) -> Arc<Evidence> {
    sample_of(base, name, 0..2)
}

/// The same of some of the rows.
fn sample_of(base: &Arc<Checkpoint>, name: &str, rows: std::ops::Range<usize>) -> Arc<Evidence> {
    let one = on(&Upcycling::one_expert(), base);
    let model = Model::new(one, &device("flex").unwrap(), None).unwrap();
    let options = EvidenceOptions { statistics: BTreeSet::new(), dense_outputs: false, sample: 64, seed: 0 };
    let wave = Wave { id: 0, sequences: expected(name).0.sequences[rows].to_vec() };
    Arc::new(collect_evidence(&model, &[wave], &options, None, &mut |_| {}).unwrap())
}

#[test]
fn dense_models_open_as_what_they_are_and_verbs_that_need_experts_refuse_them() {
    for name in FAMILIES {
        let model = dense(name);
        assert!(model.is_dense());
        assert_eq!(model.config().model_type, name);
        let refusal = Checkpoint::open(dir(name)).unwrap_err().to_string();
        assert!(
            refusal.contains(&format!("model_type `{name}`")) && refusal.contains("no field about experts"),
            "{refusal}"
        );
    }
    let moe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5/mixtral");
    let refusal = Checkpoint::open_dense(moe).unwrap_err().to_string();
    assert!(refusal.contains("`mixtral`") && refusal.contains("llama, mistral, qwen2, qwen3"), "{refusal}");
}

#[test]
fn one_expert_is_the_dense_model_that_transformers_computes() {
    for (name, family) in FAMILIES.into_iter().zip(["mixtral", "mixtral", "qwen2_moe", "qwen3_moe"]) {
        let model = on(&Upcycling::one_expert(), &dense(name));
        assert_eq!(model.config().model_type, family);
        let difference = difference(&model, name);
        assert!(difference < 1e-4, "{name}: {difference}");
    }
}

/// What the feed-forward half of every layer adds to the stream.
#[derive(Default)]
struct Halves(Vec<Vec<f32>>);

impl Observer for Halves {
    fn needs(&self) -> Signals {
        Signals::STREAMS
    }

    fn output(&mut self, output: &LayerOutput<'_>) -> moe_core::Result<()> {
        let (before, after) = (HostView::new(output.input), HostView::new(output.output));
        self.0.push(before.as_slice().iter().zip(after.as_slice()).map(|(x, y)| y - x).collect());
        Ok(())
    }
}

/// The largest difference of what any feed-forward half of a model gives from what that of the dense model gives.
fn halves_differ(model: &Arc<Checkpoint>, base: &Arc<Checkpoint>, name: &str) -> f32 {
    let halves = |model: Arc<Checkpoint>| {
        let model = Model::new(model, &device("flex").unwrap(), None).unwrap();
        let mut halves = Halves::default();
        Engine::new(&model, EngineOptions::default()).run(&expected(name).0, &mut halves).unwrap();
        halves.0.concat()
    };
    let (found, dense) = (halves(model.clone()), halves(on(&Upcycling::one_expert(), base)));
    assert!(found.len() == dense.len() && dense.iter().any(|value| value.abs() > 0.1));
    found.iter().zip(&dense).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn copies_and_all_parts_are_the_dense_model() {
    let copy = |experts| Upcycling::new(UpcycleMethod::Copy { noise: 0.0 }, experts);
    let split = |experts, copies| Upcycling::new(UpcycleMethod::Split { copies }, experts);
    let cluster = |by| Upcycling::new(UpcycleMethod::Cluster { by }, 8);
    let tops = |recipe: Upcycling, top_k| Upcycling { top_k: Some(top_k), ..recipe };
    for name in FAMILIES {
        let base = dense(name);
        for recipe in [
            copy(4),
            Upcycling::new(UpcycleMethod::Drop { ratio: 0.0 }, 4),
            split(2, 1),
            split(8, 1),
            split(16, 4),          // four copies of four parts, one copy per token
            tops(split(16, 4), 8), // two copies per token
            cluster(ClusterBy::Weights),
            Upcycling { scale: PartScale::Sum, ..cluster(ClusterBy::Weights) },
        ] {
            let made = recipe.on(&base, &UpcycleInputs::default()).unwrap();
            assert!(made.report().exact, "{name}: {recipe:?}");
            let difference = difference(made.model(), name);
            assert!(difference < 1e-4, "{name}, {recipe:?}: {difference}");
            let halves = halves_differ(made.model(), &base, name);
            assert!(halves < 1e-5, "{name}, {recipe:?}: {halves}");
        }
    }
}

#[test]
fn a_shared_part_and_the_other_parts_are_the_dense_model() {
    for name in ["llama", "qwen2"] {
        let base = dense(name);
        let evidence = Some(sample(&base, name));
        let methods = [
            UpcycleMethod::Split { copies: 1 },
            UpcycleMethod::Cluster { by: ClusterBy::Weights },
            UpcycleMethod::Cluster { by: ClusterBy::Activations },
        ];
        for method in methods {
            let recipe = Upcycling { shared_width: 16, ..Upcycling::new(method, 8) };
            let inputs = UpcycleInputs { evidence: evidence.clone(), ..UpcycleInputs::default() };
            let made = recipe.on(&base, &inputs).unwrap();
            assert_eq!(made.model().config().model_type, "qwen2_moe");
            assert_eq!((made.report().width.before, made.report().width.after), (64, 6));
            let difference = difference(made.model(), name);
            assert!(difference < 1e-4, "{name}, {recipe:?}: {difference}");
            let halves = halves_differ(made.model(), &base, name);
            assert!(halves < 1e-5, "{name}, {recipe:?}: {halves}");
        }
    }
}

#[test]
fn every_unit_of_the_network_is_in_one_part() {
    let base = dense("qwen2");
    let evidence = Some(sample(&base, "qwen2"));
    let recipe =
        Upcycling { shared_width: 16, ..Upcycling::new(UpcycleMethod::Cluster { by: ClusterBy::Activations }, 4) };
    let model = recipe.on(&base, &UpcycleInputs { evidence, ..UpcycleInputs::default() }).unwrap().model().clone();
    let row = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
    let rows = |values: Vec<f32>| values.chunks_exact(32).map(row).collect::<Vec<_>>();
    for layer in 0..2 {
        let mut found = rows(model.read_f32(Role::Layer(layer, LayerRole::SharedUp)).unwrap());
        assert_eq!(found.len(), 16);
        for expert in 0..4 {
            found.extend(rows(model.expert_part(layer, expert, ExpertPart::Up).unwrap().unwrap().to_f32()));
        }
        let mut expected = rows(base.read_f32(Role::Layer(layer, LayerRole::DenseUp)).unwrap());
        found.sort();
        expected.sort();
        assert_eq!(found, expected);
    }
}

#[test]
fn noise_and_redrawn_units_change_what_they_say_they_change() {
    let base = dense("llama");
    let up = |model: &Checkpoint, expert| model.expert_part(0, expert, ExpertPart::Up).unwrap().unwrap().to_f32();
    let down = |model: &Checkpoint, expert| model.expert_part(0, expert, ExpertPart::Down).unwrap().unwrap().to_f32();
    let original = base.read_f32(Role::Layer(0, LayerRole::DenseUp)).unwrap();
    let original_down = base.read_f32(Role::Layer(0, LayerRole::DenseDown)).unwrap();

    let noisy = on(&Upcycling::new(UpcycleMethod::Copy { noise: 0.1 }, 3), &base);
    assert_eq!(up(&noisy, 0), original);
    let deviation = |values: &[f32]| (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt();
    for expert in [1, 2] {
        let difference: Vec<f32> = up(&noisy, expert).iter().zip(&original).map(|(a, b)| a - b).collect();
        let relative = deviation(&difference) / deviation(&original);
        assert!((0.09..0.11).contains(&relative), "{relative}");
    }
    assert_ne!(up(&noisy, 1), up(&noisy, 2));
    assert_eq!(up(&noisy, 1), up(&on(&Upcycling::new(UpcycleMethod::Copy { noise: 0.1 }, 3), &base), 1));

    let drop = on(&Upcycling::new(UpcycleMethod::Drop { ratio: 0.25 }, 3), &base);
    let mut all = Vec::new();
    for expert in 0..3 {
        let changed: Vec<usize> =
            (0..64).filter(|unit| up(&drop, expert)[unit * 32..][..32] != original[unit * 32..][..32]).collect();
        assert_eq!(changed.len(), 16);
        // The same units in the other matrices: columns of down.
        let found = down(&drop, expert);
        let columns: Vec<usize> = (0..64)
            .filter(|unit| (0..32).any(|row| found[row * 64 + unit] != original_down[row * 64 + unit]))
            .collect();
        assert_eq!(columns, changed);
        all.push(changed);
    }
    assert_ne!(all[0], all[1]);
}

#[test]
fn the_teacher_sends_tokens_where_their_units_are() {
    let base = dense("llama");
    let evidence = sample(&base, "llama");
    let recipe = |router| Upcycling {
        top_k: Some(2),
        router: Some(router),
        ..Upcycling::new(UpcycleMethod::Split { copies: 1 }, 4)
    };
    let inputs = UpcycleInputs { evidence: Some(evidence), ..UpcycleInputs::default() };
    let teacher = recipe(RouterStart::Teacher { ridge: 0.01 }).on(&base, &inputs).unwrap().model().clone();
    let random = on(&recipe(RouterStart::Random { std: 0.02 }), &base);
    let (taught, drawn) = (difference(&teacher, "llama"), difference(&random, "llama"));
    assert!(taught < drawn, "{taught} with the teacher's router, {drawn} with a random one");
}

#[test]
fn parts_stand_for_all_or_are_added_as_they_are() {
    let base = dense("llama");
    let recipe = |scale| Upcycling { top_k: Some(2), scale, ..Upcycling::new(UpcycleMethod::Split { copies: 1 }, 8) };
    let down = |scale| on(&recipe(scale), &base).expert_part(1, 3, ExpertPart::Down).unwrap().unwrap().to_f32();
    let (mean, sum) = (down(PartScale::Mean), down(PartScale::Sum));
    assert!(mean.iter().zip(&sum).all(|(mean, sum)| *mean == sum * 4.0), "8 parts of which 2 are chosen");
    // The parts of a network point different ways: two of eight are nearer to it as they are.
    let evidence = Some(sample(&base, "llama"));
    let taught = |scale| {
        let inputs = UpcycleInputs { evidence: evidence.clone(), ..UpcycleInputs::default() };
        difference(recipe(scale).on(&base, &inputs).unwrap().model(), "llama")
    };
    let (mean, sum) = (taught(PartScale::Mean), taught(PartScale::Sum));
    assert!(sum < mean, "{sum} as they are, {mean} times four");
}

#[test]
fn domains_become_experts_of_their_most_active_units_and_routers_know_them() {
    let base = dense("llama");
    let domains = vec![sample_of(&base, "llama", 0..1), sample_of(&base, "llama", 1..2)];
    let recipe = Upcycling { shared_width: 16, ..Upcycling::new(UpcycleMethod::Domains { share: 0.5 }, 2) };
    let inputs = UpcycleInputs { domains: domains.clone(), ..UpcycleInputs::default() };
    let made = recipe.on(&base, &inputs).unwrap();
    assert_eq!((made.report().width.after, made.report().shared_width, made.report().top_k), (16, 16, 1));
    assert!(!made.report().exact);
    let model = made.model();
    let rows = |values: Vec<f32>| -> Vec<Vec<u32>> {
        values.chunks_exact(32).map(|row| row.iter().map(|value| value.to_bits()).collect()).collect()
    };
    for layer in 0..2 {
        let whole = rows(base.read_f32(Role::Layer(layer, LayerRole::DenseUp)).unwrap());
        let shared = rows(model.read_f32(Role::Layer(layer, LayerRole::SharedUp)).unwrap());
        let router = model.read_f32(Role::Layer(layer, LayerRole::Router)).unwrap();
        for (domain, evidence) in domains.iter().enumerate() {
            let own = rows(model.expert_part(layer, domain, ExpertPart::Up).unwrap().unwrap().to_f32());
            assert!(own.iter().all(|row| whole.contains(row) && !shared.contains(row)), "layer {layer}");
            // Most tokens of a domain go to its expert.
            let inputs = &evidence.layer(layer).unwrap().sample.as_ref().unwrap().inputs;
            let logit = |token: &[f32], expert: usize| -> f32 {
                token.iter().zip(&router[expert * 32..][..32]).map(|(a, b)| a * b).sum()
            };
            let right = inputs.chunks_exact(32).filter(|token| logit(token, domain) > logit(token, 1 - domain)).count();
            assert!(right * 4 >= inputs.len() / 32 * 3, "layer {layer}, domain {domain}: {right}");
        }
    }
    // Experts of all units are the dense model, whatever the router.
    let whole = Upcycling::new(UpcycleMethod::Domains { share: 1.0 }, 2);
    assert!(difference(whole.on(&base, &inputs).unwrap().model(), "llama") < 1e-4);
    let three = Upcycling { experts: 3, ..recipe.clone() };
    assert!(refusal(&three, &base, &inputs).contains("experts is 3, expected 2, one per domain"));
    let narrow = Upcycling { shared_width: 32, ..recipe };
    assert!(refusal(&narrow, &base, &inputs).contains("more than the 32 shared of 64 units"));
}

#[test]
fn ternary_experts_stand_beside_the_whole_network() {
    let base = dense("qwen2");
    let ternary = |zero| Upcycling::new(UpcycleMethod::Ternary { zero }, 4);
    let still = ternary(true).on(&base, &UpcycleInputs::default()).unwrap();
    assert!(still.report().exact && difference(still.model(), "qwen2") < 1e-4);
    let made = ternary(false).on(&base, &UpcycleInputs::default()).unwrap();
    assert_eq!((made.report().exact, made.report().shared_width, made.report().top_k), (false, 64, 1));
    let parts = [
        (ExpertPart::Gate, LayerRole::DenseGate),
        (ExpertPart::Up, LayerRole::DenseUp),
        (ExpertPart::Down, LayerRole::DenseDown),
    ];
    for (part, role) in parts {
        let values = made.model().expert_part(1, 2, part).unwrap().unwrap().to_f32();
        let dense = base.read_f32(Role::Layer(1, role)).unwrap();
        let sum: f64 = dense.iter().map(|value| f64::from(value.abs())).sum();
        let scale = (sum / dense.len() as f64) as f32;
        for (from, to) in dense.iter().zip(&values) {
            let expected = if from.abs() < scale / 2.0 { 0.0 } else { scale.copysign(*from) };
            assert!((to - expected).abs() < 1e-6 * scale, "{from} became {to}, expected {expected}");
        }
    }
    let shared = Upcycling { shared_width: 8, ..ternary(true) };
    assert!(refusal(&shared, &base, &UpcycleInputs::default()).contains("shared_width is 8"));
    let of_norms = refusal(&ternary(true), &dense("qwen3"), &UpcycleInputs::default());
    assert!(of_norms.contains("another method than `ternary`"), "{of_norms}");
}

#[test]
fn several_models_become_experts_of_one() {
    let base = dense("llama");
    let other = on_disk_with_other_networks(&base);
    let other = Arc::new(Checkpoint::open_dense(other.path()).unwrap());
    let mut prototypes = BTreeMap::new();
    for layer in 0..2 {
        prototypes.insert(layer, [vec![1.0; 32], vec![-1.0; 32]].concat());
    }
    let recipe = Upcycling {
        router: Some(RouterStart::Prototypes),
        ..Upcycling::new(UpcycleMethod::Models { average: false }, 2)
    };
    let inputs =
        UpcycleInputs { others: vec![other.clone()], prototypes: Some(prototypes), ..UpcycleInputs::default() };
    let made = recipe.on(&base, &inputs).unwrap().model().clone();
    let down = |expert| made.expert_part(1, expert, ExpertPart::Down).unwrap().unwrap().to_f32();
    assert_eq!(down(0), base.read_f32(Role::Layer(1, LayerRole::DenseDown)).unwrap());
    assert_eq!(down(1), other.read_f32(Role::Layer(1, LayerRole::DenseDown)).unwrap());
    let router = made.read_f32(Role::Layer(0, LayerRole::Router)).unwrap();
    assert_eq!((router[0], router[32]), (1.0, -1.0));

    let average = Upcycling::new(UpcycleMethod::Models { average: true }, 2);
    let inputs = UpcycleInputs { others: vec![other.clone()], ..UpcycleInputs::default() };
    let averaged = average.on(&base, &inputs).unwrap().model().clone();
    let [a, b, mean] =
        [&base, &other, &averaged].map(|model| model.read_f32(Role::Layer(0, LayerRole::Query)).unwrap());
    assert!(mean.iter().zip(a.iter().zip(&b)).all(|(mean, (a, b))| (mean - (a + b) / 2.0).abs() < 1e-6));

    // The same model twice is the model, whatever the router.
    let inputs = UpcycleInputs { others: vec![base.clone()], ..UpcycleInputs::default() };
    let twice = average.on(&base, &inputs).unwrap().model().clone();
    assert!(difference(&twice, "llama") < 1e-4);
}

/// A copy of a model on disk with every second number of every tensor turned around.
fn on_disk_with_other_networks(base: &Checkpoint) -> tempfile::TempDir {
    let out = tempdir().unwrap();
    for file in ["config.json", "generation_config.json"] {
        std::fs::copy(base.dir().join(file), out.path().join(file)).unwrap();
    }
    let bytes = std::fs::read(base.dir().join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let turned = |data: &[u8]| {
        let values = data.chunks_exact(4).enumerate();
        values
            .flat_map(|(i, v)| {
                let value = f32::from_le_bytes(v.try_into().unwrap());
                (if i % 2 == 0 { value } else { -value }).to_le_bytes()
            })
            .collect::<Vec<u8>>()
    };
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> =
        file.tensors().into_iter().map(|(name, view)| (name, view.shape().to_vec(), turned(view.data()))).collect();
    let views = tensors.iter().map(|(name, shape, data)| {
        (name.clone(), safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap())
    });
    safetensors::serialize_to_file(views, None, &out.path().join("model.safetensors")).unwrap();
    out
}

#[test]
fn a_made_model_is_written_as_it_runs() {
    let out = tempdir().unwrap();
    let base = dense("qwen2");
    let recipe = Upcycling { shared_width: 16, ..Upcycling::new(UpcycleMethod::Split { copies: 1 }, 6) };
    let made = on(&recipe, &base);
    write(&made, out.path().join("moe"), &WriteOptions::default()).unwrap();
    let written = Arc::new(Checkpoint::open(out.path().join("moe")).unwrap());
    assert!(written.is_model(&made.fingerprint()));
    assert_eq!(written.steps().last().unwrap().method, "upcycle");
    assert!(difference(&written, "qwen2") < 1e-4);
}

#[test]
fn what_cannot_be_is_refused_by_what_is_wrong_with_it() {
    let none = UpcycleInputs::default();
    let split = |experts| Upcycling::new(UpcycleMethod::Split { copies: 1 }, experts);
    let llama = dense("llama");
    let cases = [
        (split(5), "multiple of 5 units"),
        (Upcycling { top_k: Some(9), ..split(8) }, "top_k is 9, expected 1 to the number of experts 8"),
        (Upcycling::new(UpcycleMethod::Split { copies: 3 }, 8), "copies is 3, expected a divisor of the 8 experts"),
        (Upcycling { shared_width: 8, ..Upcycling::new(UpcycleMethod::Copy { noise: 0.0 }, 8) }, "shared_width is 8"),
        (
            Upcycling { scale: PartScale::Sum, ..Upcycling::new(UpcycleMethod::Copy { noise: 0.0 }, 8) },
            "scale is sum, expected mean where experts are not parts",
        ),
        (Upcycling::new(UpcycleMethod::Copy { noise: -1.0 }, 8), "noise is -1"),
        (Upcycling::new(UpcycleMethod::Drop { ratio: 1.5 }, 8), "ratio is 1.5, expected 0 to 1"),
        (Upcycling::new(UpcycleMethod::Cluster { by: ClusterBy::Activations }, 8), "sample is none"),
        (Upcycling::new(UpcycleMethod::Models { average: false }, 3), "expected 1, one per model"),
        (Upcycling { router: Some(RouterStart::Prototypes), ..split(8) }, "prototypes is none"),
    ];
    for (recipe, message) in cases {
        let found = refusal(&recipe, &llama, &none);
        assert!(found.contains(message), "{recipe:?}: {found}");
    }
    let shared = Upcycling { shared_width: 16, ..split(8) };
    assert!(refusal(&shared, &dense("qwen3"), &none).contains("leave `shared_width` out"));
    assert!(refusal(&shared, &dense("mistral"), &none).contains("windows"));
    let moe = on(&split(8), &llama);
    assert!(refusal(&split(8), &moe, &none).contains("has experts"));
    let evidence = UpcycleInputs { evidence: Some(sample(&dense("qwen2"), "qwen2")), ..UpcycleInputs::default() };
    let of_activations = Upcycling::new(UpcycleMethod::Cluster { by: ClusterBy::Activations }, 8);
    assert!(refusal(&of_activations, &llama, &evidence).contains("the evidence was made for the model"));
    let unknown: Result<Upcycling, _> =
        serde_json::from_str(r#"{"method": {"type": "copy", "nois": 1}, "experts": 2}"#);
    assert!(unknown.unwrap_err().to_string().contains("nois"));
}

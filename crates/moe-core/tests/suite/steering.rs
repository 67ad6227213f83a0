//! Steering the routing of the bundled model: vectors fitted to prompts, pathways of neighbors, profiles of domains.
#![cfg(feature = "flex")]

use std::{path::PathBuf, sync::Arc};

use burn::tensor::Device;
use moe_core::{
    Engine, EngineOptions, Model,
    adaptive::{Intervention, RoutingConfig, Steering},
    data::{Sequence, Tokenizer, Wave},
    generate::{GenerateOptions, generate},
    steering::{
        Pathways, PathwaysMethod, ReferenceStore, RewiredLayers, Rewiring, RewiringReport, RoutingProfile, RowOverride,
    },
    trace::{LayerTrace, Nobody, Observer, Signals},
};

fn dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe")
}

fn model() -> Model {
    Model::open(dir(), &Device::flex(), None).unwrap()
}

fn encoded(texts: &[&str]) -> Vec<Vec<u32>> {
    let tokenizer = Tokenizer::from_dir(dir()).unwrap();
    texts.iter().map(|text| tokenizer.encode(text).unwrap()).collect()
}

fn prompts() -> Vec<Vec<u32>> {
    encoded(&[
        "Question: Hana finds 19 plums, then 23 more, and loses 2. How many plums remain?\nAnswer:",
        "The currency of Brunei is the",
        "Aruba lies in",
    ])
}

fn options() -> GenerateOptions {
    GenerateOptions { max_new_tokens: 10, ..GenerateOptions::default() }
}

fn loss(model: &Model, ids: &[u32]) -> f64 {
    let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
    engine.run(&Wave { id: 0, sequences: vec![Sequence::new(ids.to_vec())] }, &mut Nobody).unwrap().loss.unwrap()
}

#[test]
fn rewiring_that_does_nothing_is_the_model_and_one_that_does_lowers_the_loss_of_its_context() {
    let model = model();
    let expected = generate(&model, &prompts(), &options(), |_| false).unwrap();
    for idle in [Rewiring { steps: 0, ..Rewiring::default() }, Rewiring { learning_rate: 0.0, ..Rewiring::default() }] {
        let found = idle.generate(&model, &prompts(), &options(), |_| false).unwrap();
        assert_eq!(found.into_iter().map(|(tokens, _)| tokens).collect::<Vec<_>>(), expected);
    }
    let rewiring = Rewiring { every: 4, ..Rewiring::default() };
    let found = rewiring.generate(&model, &prompts(), &options(), |_| false).unwrap();
    for (completion, report) in &found {
        assert_eq!((completion.len(), report.losses.len()), (10, 3));
        assert!(report.losses.iter().all(|(before, after)| after < before), "{report:?}");
    }
    // in another order, and ended from outside
    let mut reversed = prompts();
    reversed.reverse();
    let mut again = rewiring.generate(&model, &reversed, &options(), |_| false).unwrap();
    again.reverse();
    assert_eq!(again, found);
    let ended = rewiring.generate(&model, &prompts(), &options(), |completion| completion.len() >= 6).unwrap();
    assert!(ended.iter().zip(&found).all(|(a, b)| a.0[..] == b.0[..6]));
}

#[test]
fn vectors_are_reset_and_stand_in_the_chosen_layers_alone() {
    let model = model();
    let context = prompts()[0].clone();
    let before = loss(&model, &context);
    let rewiring = Rewiring { layers: RewiredLayers::Highest { share: 0.5 }, ..Rewiring::default() };
    let rewired = rewiring.on(&model).unwrap();
    assert_eq!(loss(rewired.model(), &context).to_bits(), before.to_bits());
    let mut report = RewiringReport::default();
    rewiring.adapt(&rewired, &context, &mut report).unwrap();
    assert!(loss(rewired.model(), &context) < before && report.sweeps == 5);
    let moved = rewired.deltas().values().filter(|delta| delta.iter().any(|d| *d != 0.0)).count();
    assert_eq!(moved, 2);
    rewired.reset();
    assert_eq!(loss(rewired.model(), &context).to_bits(), before.to_bits());
    // a single token says nothing
    rewiring.adapt(&rewired, &context[..1], &mut report).unwrap();
    assert!(rewired.deltas().values().flatten().all(|d| *d == 0.0));
    let error = Rewiring { every: 0, ..Rewiring::default() }.on(&model).err().unwrap().to_string();
    assert!(error.contains("every: found 0"), "{error}");
}

fn store(model: &Model) -> ReferenceStore {
    let rows = [
        "finds 4 plums, then 5 more, and loses 1",
        "finds 8 plums, then 3 more, and loses 2",
        "finds 7 hats, then 7 more, and loses 3",
        "finds 12 pens, then 6 more, and loses 4",
    ];
    let names = ["Hana", "Ola", "Mia", "Ben"];
    let texts: Vec<String> = rows
        .iter()
        .zip(names)
        .map(|(row, name)| {
            format!(
                "Question: {name} {row}. How many {} remain?\nAnswer:",
                row.split(' ').nth(2).unwrap().trim_end_matches(',')
            )
        })
        .collect();
    let prompts = encoded(&texts.iter().map(String::as_str).collect::<Vec<_>>());
    let answers = generate(model, &prompts, &GenerateOptions { max_new_tokens: 4, ..options() }, |_| false).unwrap();
    let samples: Vec<_> = prompts.into_iter().zip(answers).collect();
    let mut wrong = samples.clone();
    wrong[0].1[0] += 1;
    assert_eq!(ReferenceStore::collect(model, &wrong).unwrap().references.len(), 3, "a wrong answer is kept");
    ReferenceStore::collect(model, &samples).unwrap()
}

#[test]
fn remixing_with_the_prompts_own_routing_is_the_model_and_others_do_not_raise_the_neighbors_loss() {
    let model = model();
    let store = store(&model);
    assert_eq!(store.references.len(), 4);
    let out = tempfile::tempdir().unwrap();
    let file = out.path().join("references.json");
    store.save(&file).unwrap();
    assert_eq!(ReferenceStore::load(&file).unwrap(), store);
    let prompt = prompts()[0].clone();
    let expected = generate(&model, std::slice::from_ref(&prompt), &options(), |_| false).unwrap().concat();
    let methods = [
        PathwaysMethod::Kernel { own: vec![1.0] },
        PathwaysMethod::Descent { steps: 0, rate: 1e-2, last_rate: 1e-5 },
        PathwaysMethod::Kernel { own: vec![0.0, 0.5, 1.0] },
        PathwaysMethod::Descent { steps: 10, rate: 1e-2, last_rate: 1e-5 },
    ];
    for (i, method) in methods.into_iter().enumerate() {
        let pathways = Pathways { most_similar: 1.0, layers: 2, method, ..Pathways::default() };
        let found = pathways.generate(&model, std::slice::from_ref(&prompt), &store, &options(), |_| false).unwrap();
        let (completion, remixed) = &found[0];
        assert!(remixed.losses.1 <= remixed.losses.0, "{remixed:?}");
        assert_eq!((remixed.rows.keys().copied().collect::<Vec<_>>(), remixed.neighbors.len()), (vec![2, 3], 3));
        if i < 2 {
            assert_eq!(*completion, expected);
        }
    }
    let many = Pathways { neighbors: 9, ..Pathways::default() };
    let error = many.generate(&model, &[prompt], &store, &options(), |_| false).unwrap_err().to_string();
    assert!(error.contains("neighbors: found 9, expected 1 to 4"), "{error}");
}

#[test]
fn scores_that_are_sigmoids_are_mixed_as_shares_are() {
    let dir = dir().with_file_name("tiny-deepseek");
    let model = Model::open(&dir, &Device::flex(), None).unwrap();
    let tokenizer = Tokenizer::from_dir(&dir).unwrap();
    let encode = |text: &str| tokenizer.encode(text).unwrap();
    let lands = ["Aruba", "Kenya", "Peru", "Japan", "Norway"].map(|land| encode(&format!("{land} lies in")));
    let options = GenerateOptions { max_new_tokens: 3, ..options() };
    let answers = generate(&model, &lands, &options, |_| false).unwrap();
    let samples: Vec<_> = lands.iter().cloned().zip(answers).skip(1).collect();
    let store = ReferenceStore::collect(&model, &samples).unwrap();
    assert_eq!(store.references.len(), 4);
    // Sigmoids are no shares: their sum is not 1.
    let sums = store.references[0].rows.values().map(|row| row.iter().sum::<f32>());
    assert!(sums.clone().count() == 3 && sums.clone().all(|sum| (sum - 1.0).abs() > 0.1));
    // With nothing of a prompt's own routing, its scores are those of the nearest reference, or stay as they are.
    let nearest = PathwaysMethod::Kernel { own: vec![0.0] };
    let pathways = Pathways { neighbors: 1, most_similar: 0.9999, layers: 2, method: nearest };
    let prompts: Vec<Vec<u32>> = store.references.iter().map(|reference| reference.prompt.clone()).collect();
    let found = pathways.generate(&model, &prompts, &store, &options, |_| false).unwrap();
    let mut changed = 0;
    for ((_, remixed), own) in found.iter().zip(&store.references) {
        let moved = remixed.losses.1 < remixed.losses.0;
        changed += usize::from(moved);
        let wanted = if moved { &store.references[remixed.neighbors[0]].rows } else { &own.rows };
        for (layer, logits) in &remixed.rows {
            let scores = model.router().scores(logits);
            let far = scores.iter().zip(&wanted[layer]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(far < 1e-5, "layer {layer}: {scores:?} {:?}", wanted[layer]);
        }
    }
    assert!(changed > 0, "{found:?}");
    let expected = generate(&model, &lands[..1], &options, |_| false).unwrap().concat();
    let method = PathwaysMethod::Kernel { own: vec![1.0] };
    let neutral = Pathways { most_similar: 1.0, layers: 2, method, ..Pathways::default() };
    let found = neutral.generate(&model, &lands[..1], &store, &options, |_| false).unwrap();
    assert_eq!(found[0].0, expected);
}

/// Logits that tokens were routed by.
#[derive(Default)]
struct Logits(Vec<(usize, Vec<f32>)>);

impl Observer for Logits {
    fn needs(&self) -> Signals {
        Signals::ROUTING
    }
    fn layer(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        self.0.push((trace.layer, trace.logits.to_vec()));
        Ok(())
    }
}

#[test]
fn an_override_changes_one_token_of_its_layers_in_as_many_passes_as_it_is_told() {
    let model = model();
    let rows = RowOverride::new();
    let under = model.routed_by(Arc::new(rows.routing(&[0, 1, 2, 3]))).unwrap();
    let wave = Wave { id: 0, sequences: prompts().into_iter().map(Sequence::new).collect() };
    let look = |model: &Model| {
        let mut seen = Logits::default();
        Engine::new(model, EngineOptions::default()).run(&wave, &mut seen).unwrap();
        seen.0
    };
    let before = look(&model);
    assert_eq!(look(&under), before);
    let new: Vec<f32> = (0..16).map(|e| e as f32 * 0.3).collect();
    rows.set(1, [(2, new.clone())].into(), 1);
    let changed = look(&under);
    assert_eq!(changed[..2], before[..2]);
    let starts: Vec<usize> = wave
        .sequences
        .iter()
        .scan(0, |at, s| {
            let start = *at;
            *at += s.len();
            Some(start)
        })
        .collect();
    for (t, row) in changed[2].1.chunks(16).enumerate() {
        let replaced = starts.iter().any(|start| start + 1 == t);
        assert_eq!(row == &new[..], replaced, "{t}");
    }
    assert_eq!(look(&under), before, "one pass");
}

#[test]
fn a_profile_steers_toward_the_experts_of_a_task() {
    let model = model();
    let sums: Vec<_> = (0..4)
        .map(|i| format!("Question: Hana finds {i} plums, then 2 more, and loses 1. How many plums remain?\nAnswer:"))
        .collect();
    let profile = |texts: &[&str]| {
        let mut seen = RoutingProfile::new();
        let sequences = encoded(texts).into_iter().map(Sequence::new).collect();
        Engine::new(&model, EngineOptions::default()).run(&Wave { id: 0, sequences }, &mut seen).unwrap();
        seen
    };
    let task = profile(&sums.iter().map(String::as_str).collect::<Vec<_>>());
    let general = profile(&["The currency of Brunei is the dollar", "Aruba lies in the Americas"]);
    let at = task.experts_beyond(&general, 0.2).unwrap();
    assert!(!at.is_empty());
    let layers = task.shared_layers(&general, 2).unwrap();
    let at: Vec<_> = at.into_iter().filter(|found| layers.contains(&found.layer)).collect();
    let steer = |lambda| RoutingConfig::Intervene(Intervention { at: at.clone(), mode: Steering::Soft { lambda } });
    let ids = prompts()[1].clone();
    assert_eq!(loss(&steer(0.0).on(&model).unwrap(), &ids).to_bits(), loss(&model, &ids).to_bits());
    if !at.is_empty() {
        assert_ne!(loss(&steer(0.5).on(&model).unwrap(), &ids), loss(&model, &ids));
    }
}

//! Routing rules on models: neutral settings, what they change, how they are exported and found again.
#![cfg(feature = "flex")]

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use burn::tensor::Device;
use moe_checkpoint::{RoutingKind, WriteOptions, write};
use moe_core::{
    Engine, EngineOptions, Model, Result,
    adaptive::{Forced, PerLayer, RoutingConfig, RunTime, TopK},
    data::{Sequence, Wave},
    generate::{GenerateOptions, generate},
    objective::TeacherLogits,
    trace::{LayerTrace, Nobody, Observer, Signals},
};

const FAMILIES: [&str; 8] = [
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "phimoe",
    "gemma4_text",
    "granitemoehybrid",
    "gemma4_text_ple",
];

fn fixture(name: &str) -> Model {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5").join(name);
    Model::open(dir, &Device::flex(), None).unwrap()
}

fn tiny_moe() -> Model {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    Model::open(dir, &Device::flex(), None).unwrap()
}

fn wave(vocab: usize) -> Wave {
    let sequence = |seed: usize, n: usize| {
        Sequence::new((0..n).map(|i| ((i * i * 7 + i * 3 + seed * 11) % vocab.min(90)) as u32).collect())
    };
    Wave { id: 0, sequences: vec![sequence(1, 13), sequence(2, 9)] }
}

fn loss(model: &Model) -> f64 {
    let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
    engine.run(&wave(model.config().vocab_size), &mut Nobody).unwrap().loss.unwrap()
}

fn completion(model: &Model) -> Vec<Vec<u32>> {
    let options = GenerateOptions { max_new_tokens: 8, ..GenerateOptions::default() };
    generate(model, &[vec![5, 9, 3], vec![7; 6]], &options, |_| false).unwrap()
}

fn rule(json: &str) -> RoutingConfig {
    json.parse().unwrap()
}

fn zeros(model: &Model) -> String {
    let layers = (0..model.config().layers.len()).filter_map(|layer| model.config().moe(layer));
    serde_json::to_string(&layers.map(|moe| vec![0.0; moe.num_experts()]).collect::<Vec<_>>()).unwrap()
}

#[test]
fn neutral_settings_leave_every_family_as_it_is_bit_for_bit() {
    for name in FAMILIES {
        let model = fixture(name);
        let (before, text) = (loss(&model).to_bits(), completion(&model));
        let (k, zeros) = (model.router().top_k(), zeros(&model));
        let mut neutral = vec![
            format!(r#"{{"type": "top_k", "k": {k}}}"#),
            format!(r#"{{"type": "ranks", "ranks": {:?}}}"#, (0..k).collect::<Vec<_>>()),
            r#"{"type": "top_p", "tau": 1.0}"#.to_string(),
            r#"{"type": "skip", "beta": 0.0}"#.to_string(),
            r#"{"type": "threshold", "logit": 3.0, "nulls": 0}"#.to_string(),
            r#"{"type": "threshold", "logit": -1e30}"#.to_string(),
            format!(r#"{{"type": "shift", "delta": {zeros}}}"#),
            r#"{"type": "intervene", "at": [], "mode": {"type": "ban"}}"#.to_string(),
        ];
        let sparsemixer = matches!(model.config().routing.kind, RoutingKind::Sparsemixer { .. });
        if !sparsemixer {
            neutral.push(format!(r#"{{"type": "bias", "bias": {zeros}}}"#));
            neutral.push(r#"{"type": "forced", "experts": [[0]]}"#.into());
        }
        for json in &neutral {
            let ruled = rule(json).on(&model).unwrap();
            assert_eq!(loss(&ruled).to_bits(), before, "{name}: {json}");
            assert_eq!(completion(&ruled), text, "{name}: {json}");
        }
        // nobody is dropped where there is room for all
        let roomy = rule(r#"{"type": "capacity", "factor": 1000.0}"#).on(&model).unwrap();
        assert_eq!(loss(&roomy).to_bits(), before, "{name}: capacity");
    }
}

/// Experts with a weight, per token and layer.
#[derive(Default)]
struct Used(Vec<f64>);

impl Observer for Used {
    fn needs(&self) -> Signals {
        Signals::ROUTING
    }
    fn layer(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        let tokens = (trace.logits.len() / trace.experts) as f64;
        self.0.push(trace.weights.iter().filter(|w| **w != 0.0).count() as f64 / tokens);
        Ok(())
    }
}

fn used(model: &Model, wave: &Wave) -> Vec<f64> {
    let mut used = Used::default();
    Engine::new(model, EngineOptions::default()).run(wave, &mut used).unwrap();
    used.0
}

#[test]
fn rules_change_what_they_say_in_every_family() {
    for name in FAMILIES {
        let model = fixture(name);
        let before = loss(&model);
        for json in [
            r#"{"type": "top_k", "k": 1}"#,
            r#"{"type": "top_p", "tau": 0.3}"#,
            r#"{"type": "top_p", "tau": 0.9, "mass": "all_experts"}"#,
            r#"{"type": "ranks", "ranks": [1]}"#,
            r#"{"type": "skip", "beta": 0.99}"#,
            r#"{"type": "capacity", "factor": 0.4}"#,
        ] {
            let ruled = rule(json).on(&model).unwrap();
            let after = loss(&ruled);
            // both of SparseMixer's weights may be close to 1
            let equal = name == "phimoe" && json.contains("skip");
            assert!(after.is_finite() && (equal || after != before), "{name}: {json}");
        }
        let one = rule(r#"{"type": "top_k", "k": 1}"#).on(&model).unwrap();
        assert!(used(&one, &wave(model.config().vocab_size)).iter().all(|used| *used == 1.0), "{name}");
    }
}

#[test]
fn the_number_of_experts_goes_into_the_config_and_the_rest_beside_the_model() {
    for name in ["qwen2_moe", "deepseek_v3", "gpt_oss", "hunyuan_v1_moe", "ernie4_5_moe", "gemma4_text"] {
        let model = fixture(name);
        let config = rule(r#"{"type": "top_k", "k": 1}"#);
        let ruled = config.on(&model).unwrap();
        let export = config.export(&model).unwrap().unwrap();
        let out = tempfile::tempdir().unwrap();
        let to = out.path().join("model");
        write(&export.on(model.checkpoint()).unwrap(), &to, &WriteOptions::default()).unwrap();
        let written = Model::open(&to, &Device::flex(), None).unwrap();
        assert_eq!(written.router().top_k(), 1, "{name}");
        assert_eq!(loss(&written).to_bits(), loss(&ruled).to_bits(), "{name}");
    }
    let model = fixture("qwen2_moe");
    let skip = rule(r#"{"type": "skip", "beta": 0.9}"#);
    assert!(skip.export(&model).unwrap().is_none());
    let out = tempfile::tempdir().unwrap();
    assert!(RunTime::beside(out.path()).unwrap().is_plain());
    let to = out.path().join("model");
    write(model.checkpoint(), &to, &WriteOptions::default()).unwrap();
    let run_time = RunTime { routing: Some(skip.clone()), layers: Some("0,1a".parse().unwrap()), ..RunTime::default() };
    run_time.save_beside(&to).unwrap();
    assert_eq!(RunTime::beside(&to).unwrap(), run_time);
    let expected = skip.on(&model.with_path("0,1a".parse().unwrap()).unwrap()).unwrap();
    let reopened = Model::open(&to, &Device::flex(), None).unwrap();
    assert_eq!(loss(&reopened).to_bits(), loss(&expected).to_bits());
    std::fs::write(to.join("run_time.json"), r#"{"routing": {"type": "skip", "betta": 1.0}}"#).unwrap();
    let error = Model::open(&to, &Device::flex(), None).unwrap_err().to_string();
    assert!(error.contains("run_time.json") && error.contains("betta"), "{error}");
}

#[test]
fn a_bias_on_the_selection_is_exported_where_a_tensor_holds_it_and_weights_stay_unbiased() {
    let model = fixture("deepseek_v3");
    let layers = (0..model.config().layers.len()).filter_map(|layer| model.config().moe(layer));
    let bias: Vec<Vec<f32>> =
        layers.map(|moe| (0..moe.num_experts()).map(|e| (e % 3) as f32 * 0.2).collect()).collect();
    let config = RoutingConfig::Bias(moe_core::adaptive::SelectionBias { bias });
    let ruled = config.on(&model).unwrap();
    assert_ne!(loss(&ruled), loss(&model));
    let export = config.export(&model).unwrap().unwrap();
    let written = Model::new(export.on(model.checkpoint()).unwrap(), &Device::flex(), None).unwrap();
    assert_eq!(loss(&written).to_bits(), loss(&ruled).to_bits());
    // a bias that is the same for all experts changes nothing
    let same = config_of(&model, 0.125);
    assert_eq!(loss(&same.on(&model).unwrap()).to_bits(), loss(&model).to_bits());
    assert!(config_of(&fixture("qwen2_moe"), 0.5).export(&fixture("qwen2_moe")).unwrap().is_none());
    let refused = config_of(&fixture("phimoe"), 0.5).on(&fixture("phimoe")).unwrap_err().to_string();
    assert!(refused.contains("SparseMixer"), "{refused}");
}

fn config_of(model: &Model, value: f32) -> RoutingConfig {
    let layers = (0..model.config().layers.len()).filter_map(|layer| model.config().moe(layer));
    let bias = layers.map(|moe| vec![value; moe.num_experts()]).collect();
    RoutingConfig::Bias(moe_core::adaptive::SelectionBias { bias })
}

#[test]
fn generation_follows_a_rule_token_by_token_as_a_sweep_does() {
    let model = tiny_moe();
    for json in [
        r#"{"type": "top_k", "k": 2}"#,
        r#"{"type": "top_p", "tau": 0.6}"#,
        r#"{"type": "skip", "beta": 0.5}"#,
        r#"{"type": "random", "k": 4}"#,
        r#"{"type": "intervene", "at": [{"layer": 1, "experts": [3]}], "mode": {"type": "hard"}}"#,
    ] {
        let ruled = rule(json).on(&model).unwrap();
        let prompts = [vec![50, 61, 72, 83], vec![99; 3]];
        let options = GenerateOptions { max_new_tokens: 6, ..GenerateOptions::default() };
        let together = generate(&ruled, &prompts, &options, |_| false).unwrap();
        // one token at a time without a cache
        for (prompt, expected) in prompts.iter().zip(&together) {
            let one = GenerateOptions { max_new_tokens: 1, ..options.clone() };
            let mut ids = prompt.clone();
            for token in expected {
                let next = generate(&ruled, &[ids.clone()], &one, |_| false).unwrap().concat();
                assert_eq!(next, [*token], "{json}");
                ids.extend(next);
            }
        }
    }
}

#[test]
fn what_depends_on_later_tokens_is_not_generated_with() {
    let model = fixture("qwen2_moe");
    for json in
        [r#"{"type": "capacity", "factor": 1.0}"#, r#"{"type": "expert_choice", "factor": 2.0, "acausal": true}"#]
    {
        let ruled = rule(json).on(&model).unwrap();
        assert!(loss(&ruled).is_finite());
        let error = generate(&ruled, &[vec![1, 2]], &GenerateOptions::default(), |_| false).unwrap_err().to_string();
        assert!(error.contains("later tokens"), "{error}");
    }
    let error = rule(r#"{"type": "expert_choice", "factor": 2.0}"#).on(&model).unwrap_err().to_string();
    assert!(error.contains("acausal"), "{error}");
}

#[test]
fn thresholds_are_calibrated_to_a_number_of_experts() {
    let model = tiny_moe();
    let wave = wave(model.config().vocab_size);
    for mean in [1.0, 2.5, 4.0] {
        for mass in ["trained_top_k", "all_experts"] {
            let config = rule(&format!(r#"{{"type": "top_p", "experts": {mean}, "mass": "{mass}"}}"#));
            assert!(config.needs_rows() && config.on(&model).is_err());
            let found = config.calibrated(&model, std::slice::from_ref(&wave)).unwrap();
            // on the rows themselves, layer by layer; what later layers see has changed by then
            let first = used(&found.on(&model).unwrap(), &wave)[0];
            assert!((first - mean).abs() < 0.15, "{mean} {mass}: {first}");
        }
    }
    let skip = rule("skip").calibrated(&model, &[wave]).unwrap();
    assert!(!skip.needs_rows());
    let error = rule(r#"{"type": "top_p", "experts": 9.0}"#).calibrated(&model, &[wave2()]).unwrap_err().to_string();
    assert!(error.contains("experts: found 9"), "{error}");
}

#[test]
fn experts_per_token_are_shared_out_where_they_are_missed_most() {
    let model = tiny_moe();
    let rows = [wave(90)];
    let per_layer = |config: &RoutingConfig| match config {
        RoutingConfig::TopK(TopK { k: PerLayer::Each(k), .. }) => k.clone(),
        other => panic!("{other:?}"),
    };
    for cost in ["divergence", "output", "random"] {
        let search = |more: &str| rule(&format!(r#"{{"type": "top_k_search", "cost": "{cost}", {more}}}"#));
        // All of its own: the model itself.
        let own = search(r#""experts": 4.0"#).calibrated(&model, &rows).unwrap();
        assert_eq!(per_layer(&own), [4; 4], "{cost}");
        assert_eq!(loss(&own.on(&model).unwrap()).to_bits(), loss(&model).to_bits());
        let asked = search(r#""experts": 2.3"#);
        assert_eq!(asked.needs_rows(), cost != "random");
        let k = per_layer(&asked.calibrated(&model, &rows).unwrap());
        // As many as fit into 2.3 times 4, since none of these layers gains by fewer.
        assert!(k.iter().sum::<usize>() == 9 && k.iter().all(|k| (1..=4).contains(k)), "{cost}: {k:?}");
        let more = per_layer(&search(r#""experts": 4.5, "most": 6"#).calibrated(&model, &rows).unwrap());
        assert!(more.iter().sum::<usize>() <= 18 && more.iter().all(|k| (4..=6).contains(k)), "{cost}: {more:?}");
        for (fields, expected) in [
            (r#""experts": 4.5"#, "experts: found 4.5"),
            (r#""experts": 0.5"#, "experts: found 0.5"),
            (r#""experts": 2.0, "most": 99"#, "experts per token of layer 0: found 99"),
        ] {
            let error = search(fields).calibrated(&model, &rows).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
    let divergence = |config: &RoutingConfig| {
        let engine = Engine::new(&model, EngineOptions::default());
        let teacher = TeacherLogits::record(&engine, &rows, 256).unwrap();
        moe_core::evaluate::divergence(&config.on(&model).unwrap(), &teacher, &rows).unwrap()
    };
    // On these rows, what is chosen by divergence is not worse than the same number everywhere.
    let chosen = rule(r#"{"type": "top_k_search", "experts": 2.0}"#).calibrated(&model, &rows).unwrap();
    let (chosen, same) = (divergence(&chosen), divergence(&rule(r#"{"type": "top_k", "k": 2}"#)));
    assert!(chosen <= same, "{chosen} {same}");
    assert!(rule(r#"{"type": "top_k_search", "experts": 2.0}"#).on(&model).is_err());
    let random = rule(r#"{"type": "top_k_search", "experts": 2.0, "cost": "random"}"#);
    assert!(!random.needs_rows() && !random.is_settled());
    let found = random.calibrated(&model, &[]).unwrap();
    assert!(found.is_settled());
    assert_eq!(loss(&random.on(&model).unwrap()).to_bits(), loss(&found.on(&model).unwrap()).to_bits());
}

fn wave2() -> Wave {
    wave(90)
}

#[test]
fn a_rule_goes_on_top_of_what_changes_the_routing_already() {
    let model = fixture("qwen2_moe");
    let skipped = rule(r#"{"type": "skip", "beta": 0.9}"#).on(&model).unwrap();
    let both = rule(r#"{"type": "top_k", "k": 1}"#).on(&skipped).unwrap();
    let one = rule(r#"{"type": "top_k", "k": 1}"#).on(&model).unwrap();
    assert_eq!(loss(&both).to_bits(), loss(&one).to_bits());
    let error = rule(r#"{"type": "top_k", "k": 2}"#).on(&one).unwrap_err().to_string();
    assert!(error.contains("rules that route layer 0") && error.contains("found two"), "{error}");
}

#[test]
fn labels_decide_about_their_sequences_alone() {
    let model = fixture("qwen2_moe");
    let forced = Forced {
        experts: vec![vec![0, 1], vec![2, 3]],
        label: None,
        weights: Default::default(),
        labels: [(0, vec![1])].into(),
    };
    let ruled = RoutingConfig::Forced(forced).on(&model).unwrap();
    let losses = |model: &Model| {
        let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
        engine.run(&wave(model.config().vocab_size), &mut Nobody).unwrap().sequence_losses.unwrap()
    };
    let (before, after) = (losses(&model), losses(&ruled));
    assert_ne!(before[0], after[0]);
    // experts have other numbers of tokens, which changes the last bits of their products
    assert!((before[1] - after[1]).abs() < 1e-5 * before[1] && (before[0] - after[0]).abs() > 1e-3 * before[0]);
}

#[test]
fn wrong_rules_are_explained() {
    let model = fixture("qwen2_moe");
    let message = |json: &str| match json.parse::<RoutingConfig>() {
        Ok(config) => config.on(&model).unwrap_err().to_string(),
        Err(error) => error.to_string(),
    };
    for (json, expected) in [
        ("top_q", "top_q"),
        (r#"{"type": "top_k", "k": 2, "j": 1}"#, "`j`"),
        (r#"{"type": "top_k", "k": 0}"#, "experts per token of layer 0: found 0, expected 1 to"),
        (r#"{"type": "top_k", "k": 999}"#, "found 999"),
        (r#"{"type": "top_k", "k": [1]}"#, "k: found 1 values, expected one for each of the"),
        (r#"{"type": "top_p", "tau": 1.5}"#, "tau of layer 0: found 1.5"),
        (r#"{"type": "top_p"}"#, "top_p"),
        (r#"{"type": "skip", "beta": -1.0}"#, "beta of layer 0: found -1"),
        (r#"{"type": "skip", "beta": 0.5, "share": 0.5}"#, "beta and share"),
        (r#"{"type": "capacity", "factor": 0.0}"#, "factor: found 0"),
        (r#"{"type": "forced", "experts": [[0, 0]], "label": 0}"#, "experts of label 0"),
        (r#"{"type": "forced", "experts": [[0]], "label": 3}"#, "label: found 3"),
        (r#"{"type": "shift", "delta": [[1.0]]}"#, "delta: found 1 values"),
        (
            r#"{"type": "intervene", "at": [{"layer": 99, "experts": []}], "mode": {"type": "ban"}}"#,
            "layer of an intervention: found 99",
        ),
        (
            r#"{"type": "intervene", "at": [{"layer": 0, "experts": [999]}], "mode": {"type": "ban"}}"#,
            "expert to steer in layer 0: found 999",
        ),
        (r#"{"type": "intervene", "at": [], "mode": {"type": "soft", "lambda": 3.0}}"#, "lambda: found 3"),
    ] {
        let found = message(json);
        assert!(found.contains(expected), "{json}: {found}");
    }
    let beside = Arc::new(moe_core::RemoveExperts::new().remove(0, [1]));
    let removed = model.with_overlays(None, Some(beside)).unwrap();
    let error = rule(r#"{"type": "top_k", "k": 1}"#).on(&removed).unwrap_err().to_string();
    assert!(error.contains("experts removed beside a rule"), "{error}");
}

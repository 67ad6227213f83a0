//! Models and texts that are not run say so.

use std::sync::Arc;

use burn::tensor::Device;
use moe_checkpoint::{LayerDrop, RoutingExport};
use moe_core::{
    Engine, EngineOptions, Error, Model,
    adaptive::RoutingConfig,
    data::{Sequence, Wave},
    depth::{DepthConfig, DepthRule, LayerPath},
    trace::{Observer, Signals},
};

use crate::{fixtures, observed::Recorder};

/// Checkpoints that can be pruned but not run say so before anything is read.
#[test]
fn models_that_are_not_run_are_refused_at_once() {
    for (name, field) in [("kimi_linear", "linear_num_heads"), ("qwen3_next", "linear_num_value_heads")] {
        let (from, dir) = (fixtures().join("tf5").join(name), tempfile::tempdir().unwrap());
        std::fs::copy(from.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        let mut config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
        config[field] = (2 * config[field].as_u64().unwrap()).into();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let error = Model::open(dir.path(), &Device::flex(), None).unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)), "{error}");
        assert!(error.to_string().contains(name) && error.to_string().contains("attn"), "{error}");
    }
}

/// A layer that takes the keys of another one does not run without it, except on texts in which all see all.
#[test]
fn layers_that_share_chosen_keys_need_the_layer_that_chooses() {
    let dir = fixtures().join("tf5/glm_moe_dsa_topk");
    let model = Model::open(dir, &Device::flex(), None).unwrap();
    let selection = model.config().attention.selects.clone().unwrap();
    assert_eq!(selection.chosen_by, [0, 0, 2]);
    let part = model.with_path("1-2".parse().unwrap()).unwrap();
    let run = |count: usize| {
        let ids = (0..count).map(|i| (i % 50) as u32).collect();
        let wave = Wave { id: 0, sequences: vec![Sequence::new(ids)] };
        Engine::new(&part, EngineOptions::default()).run(&wave, &mut Recorder::default())
    };
    run(selection.keys).unwrap();
    let error = run(selection.keys + 1).unwrap_err().to_string();
    assert!(error.contains("layer 0") && error.contains("6 tokens"), "{error}");
}

/// Layers that read keys of others, and whose inputs are in one table, stay together: said before anything runs.
#[test]
fn layers_that_belong_together_are_neither_left_out_nor_decided_about() {
    let model = Model::open(fixtures().join("tf5/gemma4_text_ple"), &Device::flex(), None).unwrap();
    let keys: Vec<_> = model.config().layers.iter().map(|layer| layer.keys_of).collect();
    assert_eq!(keys, [None, None, Some(0), Some(1)]);
    model.with_path(LayerPath::whole(4)).unwrap();
    #[derive(Debug)]
    struct Rule;
    impl DepthRule for Rule {}
    let skip: DepthConfig = r#"{"type": "token_skip"}"#.parse().unwrap();
    let waves = [Wave { id: 0, sequences: vec![Sequence::new(vec![1, 2, 3])] }];
    for error in [
        model.with_path("0-2".parse().unwrap()).unwrap_err().to_string(),
        model.with_depth_rule(Arc::new(Rule)).unwrap_err().to_string(),
        skip.calibrated(&model, &waves).unwrap_err().to_string(),
        LayerDrop::new([2]).on(model.checkpoint()).unwrap_err().to_string(),
        LayerDrop::check_model(model.checkpoint()).unwrap_err().to_string(),
    ] {
        assert!(error.contains("whose last layers read the keys and values of layers before them"), "{error}");
    }
}

/// What several residual streams and tables of the vocabulary have no place for is said before anything runs.
#[test]
fn streams_and_tables_refuse_what_they_have_no_place_for() {
    struct Streams;
    impl Observer for Streams {
        fn needs(&self) -> Signals {
            Signals::STREAMS
        }
    }
    #[derive(Debug)]
    struct Rule;
    impl DepthRule for Rule {}
    let model = Model::open(fixtures().join("tf5/deepseek_v4"), &Device::flex(), None).unwrap();
    let engine = Engine::new(&model, EngineOptions::default());
    let wave = Wave { id: 0, sequences: vec![Sequence::new((3..15).collect())] };
    let top_k: RoutingConfig = r#"{"type": "top_k", "k": 1}"#.parse().unwrap();
    let (fewer, logits) = (RoutingExport { top_k: Some(1), ..RoutingExport::default() }, vec![0.5; 12]);
    for (error, why) in [
        (engine.run(&wave, &mut Streams).unwrap_err().to_string(), "which has 2 of them"),
        (model.with_depth_rule(Arc::new(Rule)).unwrap_err().to_string(), "several residual streams"),
        (top_k.on(&model).unwrap_err().to_string(), "layer 0, which routes by a table"),
        (engine.route(0, &logits, None).unwrap_err().to_string(), "whose ids are not known in layer 0"),
        (fewer.on(model.checkpoint()).unwrap_err().to_string(), "tables of 2 for every token"),
    ] {
        assert!(error.contains(why), "{error}");
    }
    // The other layers choose by their scores.
    assert_eq!(engine.route(1, &logits, None).unwrap().selected.len(), 4);
}

//! Models and texts that are not run say so.

use burn::tensor::Device;
use moe_core::{
    Engine, EngineOptions, Error, Model,
    data::{Sequence, Wave},
    generate::{GenerateOptions, generate},
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

/// Texts in which an indexer would choose keys are refused by name, in sweeps and in generation.
#[test]
fn texts_longer_than_an_indexer_sees_are_refused() {
    for name in ["deepseek_v32", "glm_moe_dsa"] {
        let model = Model::open(fixtures().join("tf5").join(name), &Device::flex(), None).unwrap();
        let limit = model.config().attention.selects.unwrap();
        let ids = |count: usize| (0..count).map(|i| (i % 50) as u32).collect::<Vec<_>>();
        let run = |count: usize| {
            let wave = Wave { id: 0, sequences: vec![Sequence::new(ids(count))] };
            Engine::new(&model, EngineOptions::default()).run(&wave, &mut Recorder::default())
        };
        run(limit).unwrap();
        let options = GenerateOptions { max_new_tokens: 3, ..Default::default() };
        let generated = generate(&model, &[ids(limit - 2)], &options, |_| false).map(drop);
        for error in [run(limit + 1).map(drop).unwrap_err(), generated.unwrap_err()] {
            let text = error.to_string();
            assert!(text.contains(name) && text.contains("index_topk") && text.contains("65"), "{text}");
        }
    }
}

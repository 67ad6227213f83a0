//! Configs of released checkpoints and those that transformers 5 saves say the same in other words.

use crate::common;

use common::fixture as parity;
use moe_checkpoint::{Checkpoint, ModelConfig, Role};

#[test]
fn released_configs_and_saved_ones_describe_the_same_model() {
    let mut compared = 0;
    for entry in std::fs::read_dir(parity("tf5")).unwrap() {
        let dir = entry.unwrap().path();
        let Ok(released) = std::fs::read(dir.join("config.hub.json")) else { continue };
        let saved = Checkpoint::open(&dir).unwrap();
        let released = serde_json::from_slice(&released).unwrap();
        let mut found = ModelConfig::from_json(&released, saved.raw_generation_config()).unwrap();
        // Which class wrote a file is no part of the model.
        found.dtype.clone_from(&saved.config().dtype);
        assert_eq!(&found, saved.config(), "{}", dir.display());
        compared += 1;
    }
    assert!(compared > 0);
}

#[test]
fn an_error_about_a_text_model_names_the_field_in_the_whole_config() {
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(parity("tf5/qwen3_vl_moe_full").join("config.json")).unwrap()).unwrap();
    config["text_config"]["hidden_size"] = "wide".into();
    let text = ModelConfig::from_json(&config, None).unwrap_err().to_string();
    assert!(text.contains("text_config.hidden_size") && text.contains("wide"), "{text}");
    config["text_config"]["model_type"] = "something_moe_text".into();
    let text = ModelConfig::from_json(&config, None).unwrap_err().to_string();
    assert!(text.contains("qwen3_vl_moe_text") || !text.contains("not a Mixture-of-Experts"), "{text}");
}

#[test]
fn inputs_of_layers_are_found_in_a_text_model_inside_another() {
    let alone = Checkpoint::open(parity("tf5/gemma4_text_ple")).unwrap();
    let mut model = common::Model::load(&parity("tf5/gemma4_text_ple"));
    model.config = serde_json::json!({
        "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "text_config": model.config,
    });
    let inside =
        |(name, tensor): (String, common::Tensor)| (name.replacen("model.", "model.language_model.", 1), tensor);
    model.tensors = std::mem::take(&mut model.tensors).into_iter().map(inside).collect();
    let (_dir, whole) = model.open();
    let whole = whole.unwrap();
    assert_eq!(whole.config().layer_inputs, alone.config().layer_inputs);
    assert_eq!(whole.config().layers, alone.config().layers);
    for role in [Role::LayerInputEmbedding, Role::LayerInputProjection, Role::LayerInputNorm] {
        assert!(whole.role(role).unwrap().name.starts_with("model.language_model."), "{role}");
        assert_eq!(whole.read_f32(role).unwrap(), alone.read_f32(role).unwrap(), "{role}");
    }
    let row = alone.read_f32_columns(Role::LayerInputEmbedding, 7, 8..16).unwrap();
    assert_eq!(row, alone.read_f32_rows(Role::LayerInputEmbedding, 7..8).unwrap()[8..16]);
    for (row, columns) in [(53, 0..8), (0, 30..33)] {
        assert!(alone.read_f32_columns(Role::LayerInputEmbedding, row, columns).is_err());
    }
}

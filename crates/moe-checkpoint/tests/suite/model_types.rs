//! Every `model_type` of transformers 5.24 whose default config speaks of experts: `fixtures/moe_model_types.jsonl` has
//! what each says of them. Whatever is not read is refused by its name, and none is taken for a model without experts.

use moe_checkpoint::{Error, ModelConfig, UniformShape, families, family_of, uniform_shape_config};
use serde_json::{Value, json};

fn configs() -> Vec<Value> {
    let lines = include_str!("../fixtures/moe_model_types.jsonl").lines();
    lines.map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn no_mixture_of_experts_of_transformers_is_taken_for_another_model() {
    let configs = configs();
    assert!(configs.len() > 100, "{}", configs.len());
    for config in &configs {
        let model_type = config["model_type"].as_str().unwrap();
        match family_of(config) {
            Ok(family) => {
                let text = family.text_config(config)["model_type"].as_str().unwrap();
                assert!([model_type, text].contains(&family.model_type()), "{model_type}: {}", family.model_type());
            }
            Err(Error::UnknownFamily { found, known, .. }) => {
                assert_eq!(found, model_type);
                assert!(known.contains("qwen3_moe"), "{known}");
            }
            Err(error) => panic!("{model_type}: {error}"),
        }
    }
}

#[test]
fn every_family_that_transformers_knows_is_in_the_list() {
    let listed: Vec<String> = configs().iter().map(|config| config["model_type"].as_str().unwrap().into()).collect();
    // Kimi-K2, and Ling and Ring with full attention come with code of their own.
    let other = ["kimi_k2", "bailing_moe", "bailing_moe_v2"];
    for family in families().iter().filter(|family| !other.contains(&family.model_type())) {
        assert!(listed.iter().any(|name| name == family.model_type()), "{}", family.model_type());
    }
}

#[test]
fn the_second_ling_is_told_by_its_config_when_it_has_the_name_of_the_first() {
    let second: Value =
        serde_json::from_str(include_str!("../fixtures/parity/tf5/bailing_moe_v2/config.json")).unwrap();
    let mut first = second.clone();
    first["model_type"] = json!("bailing_moe");
    let read = |config: &Value| ModelConfig::from_json(config, None).unwrap();
    let renamed = ModelConfig { model_type: "bailing_moe_v2".into(), ..read(&first) };
    assert_eq!(renamed, read(&second));
    assert!(renamed.routing.correction_bias());
    (first["score_function"], first["scoring_func"]) = (json!("softmax"), json!("sigmoid"));
    let error = ModelConfig::from_json(&first, None).unwrap_err().to_string();
    assert!(error.contains("scoring_func") && error.contains("what score_function says"), "{error}");
    first["scoring_func"] = json!("softmax");
    let error = ModelConfig::from_json(&first, None).unwrap_err().to_string();
    assert!(error.contains("moe_router_enable_expert_bias"), "{error}");
}

#[test]
fn either_name_of_a_key_is_read_and_the_one_that_is_there_is_written() {
    let own: Value = serde_json::from_str(include_str!("../fixtures/parity/tf5/bailing_hybrid/config.json")).unwrap();
    let mut other = own.clone();
    let map = other.as_object_mut().unwrap();
    let names = [
        ("num_experts_per_token", "num_experts_per_tok"),
        ("num_expert_group", "n_group"),
        ("moe_renormalize", "norm_topk_prob"),
    ];
    for (from, to) in names {
        let value = map.remove(from).unwrap();
        map.insert(to.to_string(), value);
    }
    let read = |config: &Value| ModelConfig::from_json(config, None).unwrap();
    assert_eq!(read(&own), read(&other));
    for (config, [groups, top_k]) in
        [(own, ["num_expert_group", "num_experts_per_token"]), (other, ["n_group", "num_experts_per_tok"])]
    {
        let shape = UniformShape {
            width: 8,
            experts: Some(24),
            top_k: Some(6),
            groups: Some((6, 3)),
            ..UniformShape::default()
        };
        let written = uniform_shape_config(&config, shape).unwrap();
        assert_eq!((&written[groups], &written["topk_group"], &written[top_k]), (&json!(6), &json!(3), &json!(6)));
        assert_eq!(written.as_object().unwrap().len(), config.as_object().unwrap().len());
    }
}

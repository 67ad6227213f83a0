//! Every `model_type` of transformers 5.24 whose default config speaks of experts: `fixtures/moe_model_types.jsonl` has
//! what each says of them. Whatever is not read is refused by its name, and none is taken for a model without experts.

use moe_checkpoint::{Error, families, family_of};
use serde_json::Value;

fn configs() -> Vec<Value> {
    let lines = include_str!("fixtures/moe_model_types.jsonl").lines();
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
    // Kimi-K2 comes with code of its own.
    for family in families().iter().filter(|family| family.model_type() != "kimi_k2") {
        assert!(listed.iter().any(|name| name == family.model_type()), "{}", family.model_type());
    }
}

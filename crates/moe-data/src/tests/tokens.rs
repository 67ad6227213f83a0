//! Special and added tokens against transformers: tokens.json holds what `AutoTokenizer` makes of each directory
//! (`make_tokens.py`).

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::tokenizer::copied;
use super::*;
use crate::Conversation;

#[derive(Deserialize)]
struct Goldens {
    text: String,
    cases: Vec<Golden>,
}

#[derive(Deserialize)]
struct Golden {
    name: String,
    files: BTreeMap<String, Value>,
    ids: Vec<u32>,
    eos: Option<u32>,
    names: Map<String, Value>,
    decoded: String,
}

#[test]
fn declared_tokens_have_the_ids_of_transformers() {
    let goldens: Goldens = serde_json::from_str(include_str!("tokens.json")).unwrap();
    assert_eq!(goldens.cases.len(), 21);
    for golden in goldens.cases {
        let files: Vec<(String, String)> =
            golden.files.iter().map(|(name, file)| (name.clone(), file.to_string())).collect();
        let files: Vec<(&str, &str)> = files.iter().map(|(name, file)| (name.as_str(), file.as_str())).collect();
        let tokenizer = Tokenizer::from_dir(copied(&files).path()).unwrap();
        let name = golden.name;
        assert_eq!(tokenizer.encode(&goldens.text).unwrap(), golden.ids, "{name}");
        assert_eq!(tokenizer.decode(&golden.ids).unwrap(), golden.decoded, "{name}");
        assert_eq!(tokenizer.eos_id(), golden.eos, "{name}");
        // What a template may name.
        let template: String = golden.names.keys().map(|name| format!("{{{{ {name} }}}}")).collect();
        let texts: String = golden.names.values().filter_map(Value::as_str).collect();
        let dir = copied(&[&files[..], &[("chat_template.jinja", template.as_str())]].concat());
        let rendered = Tokenizer::from_dir(dir.path()).unwrap().render_chat(Conversation::new(&[]), false).unwrap();
        assert_eq!(rendered, texts, "{name}");
    }
}

#[test]
fn a_conversation_with_tools_takes_the_template_named_for_them() {
    let named = json!({"chat_template": [
        {"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools {{ tools|length }}"}, {"name": "rag", "template": "{% broken"}
    ]})
    .to_string();
    let by_name = json!({"chat_template": {"default": "plain", "tool_use": "tools {{ tools|length }}"}}).to_string();
    let single = json!({"chat_template": "plain"}).to_string();
    let tools = json!([{"name": "get"}]);
    let render = |files: &[(&str, &str)]| {
        let dir = copied(&[]);
        std::fs::create_dir(dir.path().join("additional_chat_templates")).unwrap();
        for (name, content) in files {
            std::fs::write(dir.path().join(name), content).unwrap();
        }
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        let conversation = Conversation::new(&[]);
        [
            tokenizer.render_chat(conversation, false).unwrap(),
            tokenizer.render_chat(Conversation { tools: Some(&tools), ..conversation }, false).unwrap(),
        ]
    };
    assert_eq!(render(&[("tokenizer_config.json", &named)]), ["plain", "tools 1"]);
    assert_eq!(render(&[("tokenizer_config.json", &by_name)]), ["plain", "tools 1"]);
    assert_eq!(render(&[("tokenizer_config.json", &single)]), ["plain", "plain"]);
    // Files of their own go before the configuration, all of them.
    let own = ("chat_template.jinja", "file");
    assert_eq!(render(&[("tokenizer_config.json", &named), own]), ["file", "file"]);
    let more = ("additional_chat_templates/tool_use.jinja", "file of {{ tools|length }}");
    assert_eq!(render(&[("tokenizer_config.json", &named), own, more]), ["file", "file of 1"]);
}

#[test]
fn a_vocabulary_in_another_format_comes_with_the_way_to_convert_it() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.model"), "").unwrap();
    std::fs::write(dir.path().join("qwen.tiktoken"), "").unwrap();
    let error = Tokenizer::from_dir(dir.path()).map(|_| ()).unwrap_err().to_string();
    let place = dir.path().display();
    assert_eq!(
        error,
        format!(
            "{place}/tokenizer.json: No such file; found qwen.tiktoken and tokenizer.model, from which transformers can make and save it: \
             python -c \"from transformers import AutoTokenizer as A; A.from_pretrained('{place}').save_pretrained('{place}')\""
        )
    );
}

#[test]
fn malformed_tokens_are_named() {
    for (name, content, expected) in [
        (
            "tokenizer_config.json",
            r#"{"added_tokens_decoder": []}"#,
            "\"added_tokens_decoder\": found [], expected an object of tokens by id",
        ),
        (
            "tokenizer_config.json",
            r#"{"added_tokens_decoder": {"x": {"content": "a"}}}"#,
            "\"added_tokens_decoder.x\": the name is not a token id",
        ),
        (
            "tokenizer_config.json",
            r#"{"added_tokens_decoder": {"1": {"content": "a", "lstrip": 1}}}"#,
            "\"added_tokens_decoder.1.lstrip\": found 1, expected true or false",
        ),
        (
            "tokenizer_config.json",
            r#"{"extra_special_tokens": "a"}"#,
            "\"extra_special_tokens\": found \"a\", expected a list or an object of tokens",
        ),
        (
            "tokenizer_config.json",
            r#"{"extra_special_tokens": ["a", 2]}"#,
            "\"extra_special_tokens[1]\": found 2, expected a string or an object with a string \"content\"",
        ),
        ("added_tokens.json", r#"{"a": "b"}"#, "\"a\": found \"b\", expected a token id"),
    ] {
        let dir = copied(&[(name, content)]);
        assert_eq!(message(Tokenizer::from_dir(dir.path()).map(|_| ())), format!("{name}: {expected}"));
    }
}

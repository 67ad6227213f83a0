//! The tokenizer against transformers 5.23 (tokenizers 0.23): `tokenizer(text)["input_ids"]` and `tokenizer.decode`.

use super::*;
use crate::Conversation;

#[test]
fn ids_are_those_of_transformers() {
    let tokenizer = tokenizer();
    let cases: [(&str, &[u32]); 7] = [
        (
            "Question: Quin finds 25 stamps, then 11 more, and loses 3. How many stamps remain?\nAnswer: 25 + 11 = 36 ; 36 - 3 = 33 #### 33\n",
            &[
                368, 26, 1585, 606, 221, 18, 21, 813, 12, 595, 221, 17, 17, 422, 12, 295, 607, 221, 19, 14, 366, 359,
                813, 590, 31, 199, 367, 26, 221, 18, 21, 446, 221, 17, 17, 338, 221, 19, 22, 608, 221, 19, 22, 444,
                221, 19, 338, 221, 19, 19, 369, 221, 19, 19, 199,
            ],
        ),
        ("Aruba lies in North America.\n", &[33, 792, 65, 677, 287, 763, 774, 14, 199]),
        (
            "Blastocladiales: fungi that carry out asexual reproduction by thick-walled resting spores that produce zoospores upon germination.\n",
            &[
                34, 76, 456, 420, 76, 336, 379, 262, 26, 1336, 73, 332, 547, 562, 703, 402, 558, 469, 315, 725, 68,
                1180, 362, 1788, 13, 87, 395, 279, 1754, 273, 468, 1948, 332, 812, 1182, 1933, 79, 321, 1163, 262, 756,
                263, 308, 672, 1159, 14, 199,
            ],
        ),
        ("", &[]),
        (" ", &[221]),
        (
            "naïve — 12 345 €\n\n\tx  y<|endoftext|>z",
            &[
                78, 65, 128, 108, 545, 221, 159, 223, 243, 221, 17, 18, 221, 19, 20, 21, 221, 159, 225, 106, 199, 199,
                198, 88, 221, 519, 0, 90,
            ],
        ),
        ("日本語", &[163, 246, 99, 163, 251, 106, 165, 104, 253]),
    ];
    for (text, ids) in cases {
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(ids).unwrap(), text.replace("<|endoftext|>", ""), "{text:?}");
    }
}

#[test]
fn the_end_of_a_sequence_is_known() {
    let tokenizer = tokenizer();
    assert_eq!((tokenizer.eos_id(), tokenizer.eos_ids(), tokenizer.vocab_size()), (Some(0), &[0][..], 2048));
    // A string or an object, beside a list of further ids. As in transformers, the older file of special tokens goes
    // first.
    let dir = copied(&[
        ("special_tokens_map.json", r#"{"eos_token": {"content": "!", "lstrip": false}, "bos_token": "\""}"#),
        (
            "tokenizer_config.json",
            r#"{"eos_token": {"content": "<|endoftext|>"}, "chat_template": "{{ bos_token }}{{ eos_token }}"}"#,
        ),
        ("generation_config.json", r#"{"eos_token_id": [3, 0, 5]}"#),
    ]);
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(tokenizer.eos_ids(), [1, 3, 0, 5]);
    assert_eq!(tokenizer.render_chat(Conversation::new(&[]), false).unwrap(), "\"!");
}

#[test]
fn truncation_and_padding_of_the_file_are_off() {
    let text = std::fs::read_to_string(bundled().join("tokenizer.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["truncation"] =
        serde_json::json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = serde_json::json!({
        "strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"
    });
    let (_dir, path) = file("tokenizer.json", json.to_string());
    let tokenizer = Tokenizer::from_dir(path.parent().unwrap()).unwrap();
    assert_eq!(tokenizer.encode("Aruba lies in").unwrap(), [33, 792, 65, 677, 287]);
    assert_eq!(tokenizer.eos_id(), None);
}

#[test]
fn chat_templates_are_found_where_they_are_published() {
    let named = r#"{"chat_template": [{"name": "rag", "template": "rag"}, {"name": "default", "template": "named"}]}"#;
    let render =
        |dir: TempDir| Tokenizer::from_dir(dir.path()).unwrap().render_chat(Conversation::new(&[]), false).unwrap();
    assert_eq!(render(copied(&[("tokenizer_config.json", named)])), "named");
    assert_eq!(render(copied(&[("tokenizer_config.json", named), ("chat_template.jinja", "own file")])), "own file");
}

#[test]
fn malformed_files_are_named() {
    let open = |files: &[(&str, &str)]| {
        let dir = copied(files);
        message(Tokenizer::from_dir(dir.path()).map(|_| ()))
    };
    let missing = tempfile::tempdir().unwrap();
    assert!(message(Tokenizer::from_dir(missing.path()).map(|_| ())).starts_with("tokenizer.json: No such file"));
    assert!(
        open(&[("tokenizer.json", "{}")]).starts_with("tokenizer.json: not a tokenizer of the tokenizers library: ")
    );
    for (name, content, expected) in [
        ("tokenizer_config.json", "{", "not valid JSON: EOF while parsing an object at line 1 column 1"),
        ("tokenizer_config.json", "[]", "found an array, expected a JSON object"),
        ("special_tokens_map.json", "3", "found a number, expected a JSON object"),
        (
            "tokenizer_config.json",
            r#"{"eos_token": "<|nowhere|>"}"#,
            "\"eos_token\" is \"<|nowhere|>\", which is not in the vocabulary of tokenizer.json",
        ),
        (
            "tokenizer_config.json",
            r#"{"eos_token": 3}"#,
            "\"eos_token\": found 3, expected a string or an object with a string \"content\"",
        ),
        (
            "generation_config.json",
            r#"{"eos_token_id": -1}"#,
            "\"eos_token_id\": found -1, expected a token id or a list of them",
        ),
        (
            "tokenizer_config.json",
            r#"{"chat_template": 1}"#,
            "\"chat_template\": found 1, expected a string or a list of named templates",
        ),
        (
            "tokenizer_config.json",
            r#"{"chat_template": []}"#,
            "\"chat_template\" is a list without a template named \"default\"",
        ),
        ("chat_template.jinja", "\n{% if %}", "chat template: unexpected end of block (line 2 of the template)"),
    ] {
        assert_eq!(open(&[(name, content)]), format!("{name}: {expected}"));
    }
}

/// The bundled tokenizer.json with other files beside it (or in its place).
pub(super) fn copied(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(bundled().join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    for (name, content) in files {
        std::fs::write(dir.path().join(name), content).unwrap();
    }
    dir
}

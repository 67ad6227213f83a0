//! What a bad data file is answered with.

use super::*;
use crate::LossOver;

#[test]
fn every_bad_file_is_named_with_its_line() {
    let good = r#"{"text": "Aruba lies in"}"#;
    for (name, content, expected) in [
        ("a.jsonl", "", "a.jsonl: the file has no row"),
        ("a.jsonl", "\n \n", "a.jsonl: the file has no row"),
        ("a.txt", "", "a.txt: the file has no row"),
        (
            "a.csv",
            good,
            "a.csv: unknown kind of data file; expected a name that ends in .jsonl or .json (rows), .jsonl.gz, .parquet or .txt (plain text)",
        ),
        (
            "a.jsonl",
            "{\"text\": \"\"}\n{\"input_ids\": [3]}",
            "a.jsonl: no usable row: all 2 have fewer than 2 tokens or no token that counts in the loss",
        ),
        (
            "a.jsonl",
            &format!("{good}\n\n{{oops}}"),
            "a.jsonl:3: not valid JSON: key must be a string at line 1 column 2",
        ),
        (
            "a.jsonl",
            &format!("{good}\n{{\"txt\": \"a\"}}"),
            r#"a.jsonl:2: fields ["txt"], expected one of "text"; "prompt" and "completion"; "messages" or "conversations"; "instruction" and "output"; "input_ids""#,
        ),
        (
            "a.jsonl",
            &format!("{good}\n{{\"input_ids\": [1, 2048]}}"),
            "a.jsonl:2: token id 2048 at position 1: expected less than the vocabulary size 2048",
        ),
        (
            "a.jsonl",
            r#"{"messages": [{"role": "user", "content": "hi"}]}"#,
            "a.jsonl:1: a row of \"messages\" needs a chat template: found neither chat_template.jinja nor \"chat_template\" in tokenizer_config.json",
        ),
    ] {
        assert_eq!(message(load(name, content, &DatasetOptions::default())), expected);
    }
    let (_dir, path) = file("a.txt", b"one\ntwo \xff three");
    let error = message(Dataset::load(path, Some(&tokenizer()), VOCAB_SIZE, &DatasetOptions::default()));
    assert_eq!(error, "a.txt:2: not valid UTF-8 after byte 4 of the line");
    let error = message(Dataset::load("/nowhere/a.jsonl", None, 1, &DatasetOptions::default()));
    assert!(error.starts_with("/nowhere/a.jsonl: No such file"), "{error}");
}

#[test]
fn a_tokenizer_larger_than_the_model_is_noticed() {
    let (_dir, path) = file("a.jsonl", r#"{"text": "Aruba lies in"}"#);
    let error = message(Dataset::load(path, Some(&tokenizer()), 700, &DatasetOptions::default()));
    assert_eq!(error, "a.jsonl:1: token id 792 at position 1: expected less than the vocabulary size 700");
}

#[test]
fn text_needs_a_tokenizer() {
    let (_dir, path) = file("a.jsonl", r#"{"text": "Aruba lies in"}"#);
    let error = message(Dataset::load(&path, None, VOCAB_SIZE, &DatasetOptions::default()));
    assert_eq!(
        error,
        "a.jsonl:1: a row of text needs a tokenizer.json; without one only rows of \"input_ids\" can be read"
    );
    let packing = DatasetOptions { packing: true, ..Default::default() };
    assert!(matches!(Dataset::load(&path, None, VOCAB_SIZE, &packing), Err(Error::NoTokenizer)));
    // tokenizer.json alone does not say which token ends a sequence.
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(bundled().join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let bare = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(
        message(Dataset::load(&path, Some(&bare), VOCAB_SIZE, &packing)),
        "packing rows needs an end-of-sequence token, and tokenizer_config.json names no \"eos_token\""
    );
}

#[test]
fn completions_are_not_made_up() {
    let options = DatasetOptions { loss: LossOver::Completions, ..Default::default() };
    for (name, content, place) in [
        ("a.jsonl", r#"{"text": "Aruba lies in"}"#, "a row of \"text\""),
        ("a.jsonl", r#"{"input_ids": [1, 2]}"#, "a row of \"input_ids\""),
        ("a.txt", "Aruba", "plain text"),
    ] {
        let expected = format!(
            "{name}:1: a loss over completions needs rows of \"prompt\" and \"completion\", of \"messages\", of \"instruction\" and \"output\" or of \"input_ids\" with \"labels\", found {place}"
        );
        assert_eq!(message(load(name, content, &options)), expected);
    }
}

#[test]
fn options_are_checked_before_the_file() {
    let error = |options| message(Dataset::load("/nowhere", None, 1, &options));
    assert_eq!(
        error(DatasetOptions { samples: Some(0), ..Default::default() }),
        "option samples: found 0, expected at least 1"
    );
    assert_eq!(
        error(DatasetOptions { length: 1, ..Default::default() }),
        "option length: found 1, expected at least 2"
    );
}

//! Rows as people hold them: forms, layouts, masks, mixtures.

use std::io::Write;

use serde_json::json;

use super::tokenizer::copied;
use super::*;
use crate::{Chat, LossOver, Preview, Reading, Row, Sequence, Source};

const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

/// The bundled tokenizer with a chat template.
fn chatting() -> Tokenizer {
    Tokenizer::from_dir(
        copied(&[("chat_template.jinja", TEMPLATE), ("tokenizer_config.json", r#"{"eos_token": "<|endoftext|>"}"#)])
            .path(),
    )
    .unwrap()
}

fn read(content: &str, options: &DatasetOptions) -> Result<Dataset, Error> {
    let (_dir, path) = file("a.jsonl", content);
    Dataset::load(path, Some(&chatting()), VOCAB_SIZE, options)
}

fn completions() -> DatasetOptions {
    DatasetOptions { loss: LossOver::Completions, ..Default::default() }
}

/// The whole text of a sequence, and what of it counts.
fn texts(sequence: &Sequence) -> (String, String) {
    let tokenizer = chatting();
    let counted: Vec<u32> = (0..sequence.len()).filter(|t| sequence.counts(*t)).map(|t| sequence.ids[t]).collect();
    (tokenizer.decode(&sequence.ids).unwrap(), tokenizer.decode(&counted).unwrap())
}

fn row(row: serde_json::Value) -> (String, String) {
    texts(&read(&row.to_string(), &completions()).unwrap().sequences[0])
}

#[test]
fn every_form_of_a_chat_is_the_same_chat() {
    let messages = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]);
    let shares =
        json!([{"from": "system", "value": "s"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]);
    let expected = ("<system>s;<user>Hi;<assistant>Yo;".to_owned(), "Yo;".to_owned());
    for form in [
        json!({"messages": messages}),
        json!({"messages": shares}),
        json!({"conversations": messages}),
        json!({"conversations": shares, "id": 7, "tools": []}),
        json!({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}], "system": "s"}),
        json!({"prompt": [messages[0], messages[1]], "completion": [messages[2]]}),
        json!({"instruction": "Hi", "input": "", "output": "Yo", "system": "s"}),
    ] {
        assert_eq!(row(form.clone()), expected, "{form}");
    }
    // Of a completion of messages, what the assistant said before does not count.
    let (text, counted) = row(
        json!({"prompt": [{"role": "assistant", "content": "A"}, {"role": "user", "content": "B"}],
        "completion": [{"role": "assistant", "content": "C"}, {"role": "user", "content": "D"}, {"role": "assistant", "content": "E"}]}),
    );
    assert_eq!((text.as_str(), counted.as_str()), ("<assistant>A;<user>B;<assistant>C;<user>D;<assistant>E;", "C;E;"));
    let (text, counted) = row(json!({"instruction": "Add", "input": "1+1", "output": "2", "history": [["a", "b"]]}));
    assert_eq!((text.as_str(), counted.as_str()), ("<user>a;<assistant>b;<user>Add\n1+1;<assistant>2;", "2;"));
    // Calls of tools as ShareGPT writes them.
    let Row::Messages(Chat { messages, .. }) = Row::parse(
        r#"{"conversations": [{"from": "human", "value": "w?"}, {"from": "function_call", "value": "{\"name\": \"get\", \"arguments\": {\"a\": 1}}"}, {"from": "observation", "value": "ok", "id": 3}]}"#,
    ).unwrap() else { panic!("no chat") };
    assert_eq!(
        messages[1],
        json!({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "get", "arguments": {"a": 1}}}]})
    );
    assert_eq!(messages[2], json!({"role": "tool", "content": "ok", "id": 3}));
}

#[test]
fn an_instruction_without_a_template_is_alpacas_text() {
    let options = completions();
    let data = load("a.jsonl", r#"{"instruction": "Add", "input": "1+1", "output": "2"}"#, &options).unwrap();
    let (text, counted) = texts(&data.sequences[0]);
    assert_eq!(
        text,
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that \
         appropriately completes the request.\n\n### Instruction:\nAdd\n\n### Input:\n1+1\n\n### Response:\n2"
    );
    assert_eq!(counted, "2");
    let data = load("a.jsonl", r#"{"instruction": "Add", "output": "2"}"#, &options).unwrap();
    assert!(texts(&data.sequences[0]).0.starts_with(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd\n\n### Response:\n"
    ));
}

#[test]
fn turns_marked_as_not_to_be_learned_do_not_count() {
    for mark in [
        json!({"weight": 0}),
        json!({"loss": false}),
        json!({"train": false}),
        json!({"training": 0}),
        json!({"masked": true}),
    ] {
        let mut first = json!({"role": "assistant", "content": "b"});
        first.as_object_mut().unwrap().extend(mark.as_object().unwrap().clone());
        let chat = json!({"messages": [{"role": "user", "content": "a", "weight": 1}, first, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1.0}]});
        let (text, counted) = row(chat.clone());
        assert_eq!((text.as_str(), counted.as_str()), ("<user>a;<assistant>b;<user>c;<assistant>d;", "d;"), "{mark}");
        // A loss over everything leaves them out too.
        let all = read(&chat.to_string(), &DatasetOptions::default()).unwrap();
        assert_eq!(texts(&all.sequences[0]).1, "user>a;<assistant><user>c;<assistant>d;");
    }
    for (message, expected) in [
        (
            json!({"role": "assistant", "content": "b", "weight": 0.5}),
            "field \"messages[0].weight\": found 0.5, expected 0 or 1: a turn counts or does not",
        ),
        (
            json!({"role": "assistant", "content": "b", "train": "no"}),
            "field \"messages[0].train\": found a string, expected a boolean, 0 or 1",
        ),
        (
            json!({"role": "user", "content": "b", "train": true}),
            "field \"messages[0].train\": found true in a message that is not the assistant's, expected a loss over the assistant's messages only",
        ),
    ] {
        let error = Row::parse(&json!({"messages": [message]}).to_string()).unwrap_err().to_string();
        assert_eq!(error, expected);
    }
}

#[test]
fn masks_of_token_ids_are_kept_and_padding_is_left_out() {
    let parse = |text: &str| Row::parse(text).map_err(|error| error.to_string());
    let masked = |ids: &[u32], loss: &[bool]| Ok(Row::Masked { ids: ids.to_vec(), loss: loss.to_vec() });
    assert_eq!(parse(r#"{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}"#), masked(&[1, 2, 3], &[false, true, true]));
    assert_eq!(
        parse(r#"{"input_ids": [1, 2, 3], "completion_mask": [0, 0, 1]}"#),
        masked(&[1, 2, 3], &[false, false, true])
    );
    assert_eq!(
        parse(r#"{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "assistant_masks": [1, 1, 0]}"#),
        masked(&[1, 2, 3], &[false, true, false])
    );
    assert_eq!(
        parse(
            r#"{"input_ids": [0, 0, 5, 6, 0], "attention_mask": [0, 0, 1, 1, 0], "labels": [-100, -100, -100, 6, -100]}"#
        ),
        masked(&[5, 6], &[false, true])
    );
    assert_eq!(parse(r#"{"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1]}"#), Ok(Row::Ids(vec![5, 6])));
    for (text, expected) in [
        (
            r#"{"input_ids": [1, 2], "labels": [1]}"#,
            r#"field "labels": found 1, expected as many integers as "input_ids" has"#,
        ),
        (
            r#"{"input_ids": [1, 2], "labels": [-100, 3]}"#,
            r#"field "labels[1]": found 3, expected -100 or the token id at the same place of "input_ids""#,
        ),
        (
            r#"{"input_ids": [1, 2], "attention_mask": [1, 2]}"#,
            r#"field "attention_mask[1]": found 2, expected 0 or 1"#,
        ),
        (
            r#"{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}"#,
            r#"field "attention_mask[1]": found 0, expected 1 between the first and the last token: only padding at the ends can be left out"#,
        ),
    ] {
        assert_eq!(parse(text), Err(expected.to_owned()));
    }
    // Both kinds of loss honor them.
    let rows = r#"{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}"#;
    for options in [DatasetOptions::default(), completions()] {
        assert_eq!(read(rows, &options).unwrap().loss_tokens(), 1);
    }
    // Rows with a mask and rows without one are packed together.
    let packed = DatasetOptions { packing: true, ..Default::default() };
    let rows = "{\"input_ids\": [1, 2]}\n{\"input_ids\": [3, 4], \"labels\": [-100, 4]}\n{\"input_ids\": [5, 6]}";
    let data = read(rows, &packed).unwrap();
    assert_eq!(data.sequences[0].ids, [1, 2, 0, 3, 4, 0, 5, 6]);
    assert_eq!(data.sequences[0].loss.as_deref(), Some(&[true, true, true, false, true, true, true, true][..]));
}

#[test]
fn completions_end_with_the_end_token_when_asked() {
    let ends = DatasetOptions { end_completions: true, ..completions() };
    let row = r#"{"prompt": "Aruba lies", "completion": " in"}"#;
    let sequence = &read(row, &ends).unwrap().sequences[0];
    assert_eq!(
        (sequence.ids.as_slice(), sequence.loss.as_deref()),
        (&[33, 792, 65, 677, 287, 0][..], Some(&[false, false, false, false, true, true][..]))
    );
    let all = DatasetOptions { loss: LossOver::All, ..ends.clone() };
    assert_eq!(read(row, &all).unwrap().sequences[0], Sequence::new(vec![33, 792, 65, 677, 287, 0]));
    // One that ends so already gets no second one, and a chat is its template's business.
    let ended = r#"{"prompt": "Aruba lies", "completion": " in<|endoftext|>"}"#;
    assert_eq!(read(ended, &all).unwrap().sequences[0].ids, [33, 792, 65, 677, 287, 0]);
    let chat = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    assert_eq!(read(chat, &ends).unwrap().sequences, read(chat, &completions()).unwrap().sequences);
}

#[test]
fn columns_are_mapped_and_choose_the_form() {
    let reading = |pairs: &[(&str, &str)]| DatasetOptions {
        reading: Reading {
            fields: pairs.iter().map(|(name, column)| ((*name).into(), (*column).into())).collect(),
            ..Default::default()
        },
        ..completions()
    };
    let question = r#"{"question": "Aruba lies", "answer": " in", "id": 3}"#;
    let data = read(question, &reading(&[("prompt", "question"), ("completion", "answer")])).unwrap();
    assert_eq!(texts(&data.sequences[0]).1, " in");
    let both = r#"{"text": "Hi there", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}"#;
    assert_eq!(texts(&read(both, &reading(&[("messages", "messages")])).unwrap().sequences[0]).1, "Yo;");
    assert_eq!(
        message(read(both, &completions())),
        "a.jsonl:1: the row could be read as \"text\" or as \"messages\": keep the fields of one of them, or choose by a field \
         (--field NAME=COLUMN, such as --field text=text)"
    );
    assert_eq!(
        message(read(question, &reading(&[("prompt", "query"), ("completion", "answer")]))),
        "a.jsonl:1: no column \"query\" to read \"prompt\" from; the row has [\"question\", \"answer\", \"id\"]"
    );
    let error = message(read(question, &reading(&[("promt", "question")])));
    assert!(error.starts_with("unknown field \"promt\"; a row may have text, prompt, completion,"), "{error}");
    // What a recipe without these options says stays what it was.
    assert_eq!(
        serde_json::to_value(DatasetOptions::default()).unwrap(),
        json!({"samples": 128, "length": 2048, "seed": null, "packing": false, "loss": "all"})
    );
}

#[test]
fn bad_rows_are_skipped_and_counted_when_asked() {
    let rows = "{\"input_ids\": [1, 2]}\n{\"input_ids\": [1, -2]}\n{oops}\n{\"input_ids\": [1, 9999]}\n{\"input_ids\": [3, 4]}\n";
    assert!(message(read(rows, &DatasetOptions::default())).starts_with("a.jsonl:2: field \"input_ids[1]\""));
    let reading = Reading { skip_bad_rows: true, ..Default::default() };
    let options = DatasetOptions { reading, ..Default::default() };
    for options in [options.clone(), DatasetOptions { seed: Some(3), ..options.clone() }] {
        let data = read(rows, &options).unwrap();
        assert_eq!((data.sequences.len(), data.skipped, data.dropped), (2, 3, 0));
        assert!(data.first_skipped.unwrap().contains("a.jsonl:"));
    }
    let error = message(read("{oops}", &options));
    assert!(error.starts_with("a.jsonl: no usable row: 1 could not be read, the first of them "), "{error}");
    // What is wrong with every row is no bad row.
    let (_dir, path) = file("a.jsonl", r#"{"text": "Aruba"}"#);
    assert!(matches!(Dataset::load(path, None, VOCAB_SIZE, &options), Err(Error::Row { .. })));
}

#[test]
fn the_same_rows_are_read_from_every_kind_of_file() {
    let rows = ["{\"input_ids\": [1, 2]}", "{\"input_ids\": [3, 4]}"];
    let expected = read(&rows.join("\n"), &DatasetOptions::default()).unwrap();
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(rows.join("\n").as_bytes()).unwrap();
    let packed = packed.finish().unwrap();
    let pretty = "{\n  \"input_ids\": [\n    1,\n    2\n  ]\n}\n{\n  \"input_ids\": [3, 4]\n}\n";
    for (name, content) in [
        ("a.jsonl", rows.join("\r\n\r\n").into_bytes()),
        ("a.ndjson", format!("\u{feff}{}", rows.join("\n")).into_bytes()),
        ("a.json", format!("[{}]", rows.join(",\n")).into_bytes()),
        ("a.json", pretty.into()),
        ("a.jsonl", pretty.into()),
        ("a.jsonl.gz", packed.clone()),
        ("a.json.gz", packed.clone()),
    ] {
        assert_eq!(load(name, content, &DatasetOptions::default()).unwrap(), expected, "{name}");
    }
    #[cfg(feature = "parquet")]
    assert_eq!(load("a.parquet", include_bytes!("rows.parquet"), &DatasetOptions::default()).unwrap(), expected);
    #[cfg(not(feature = "parquet"))]
    assert_eq!(
        message(load("a.parquet", include_bytes!("rows.parquet"), &DatasetOptions::default())),
        "a.parquet: reading Parquet needs the feature `parquet` of moe-data"
    );
    // A folder is its data files by name.
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in
        [("b.jsonl", rows[1]), ("a.json", rows[0]), ("dataset_info.json", "{}"), ("README.md", "#"), (".c.jsonl", "{}")]
    {
        std::fs::write(dir.path().join(name), content).unwrap();
    }
    assert_eq!(Dataset::load(dir.path(), None, VOCAB_SIZE, &DatasetOptions::default()).unwrap(), expected);
    let empty = tempfile::tempdir().unwrap();
    let error = Dataset::load(empty.path(), None, VOCAB_SIZE, &DatasetOptions::default()).unwrap_err().to_string();
    assert!(
        error.ends_with(
            "no data file in the folder; expected names that end in .jsonl, .json, .jsonl.gz, .parquet or .txt"
        ),
        "{error}"
    );
    assert_eq!(
        message(load("a.jsonl", "{\"input_ids\": [1, 2]}\n{\"input_ids\": \n", &DatasetOptions::default())),
        "a.jsonl:2: not valid JSON: EOF while parsing a value at line 1 column 13; a row is one JSON object per line, or all rows are \
         pretty-printed or one array"
    );
}

#[test]
fn several_files_are_joined_or_mixed_by_weight() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, id: u32, count: usize| {
        let path = dir.path().join(name);
        std::fs::write(&path, format!("{{\"input_ids\": [{id}, {id}]}}\n").repeat(count)).unwrap();
        path
    };
    let (a, b) = (write("a.jsonl", 1, 30), write("b.jsonl", 2, 30));
    let source = |path: &PathBuf, weight| Source { path: path.clone(), weight };
    let load = |sources: &[Source], samples| {
        let options = DatasetOptions { samples, ..Default::default() };
        Dataset::load_sources(sources, None, VOCAB_SIZE, &options)
            .map(|data| data.sequences.iter().map(|s| s.ids[0]).collect::<Vec<_>>())
    };
    let count = |ids: &[u32]| (ids.iter().filter(|id| **id == 1).count(), ids.iter().filter(|id| **id == 2).count());
    let joined = load(&[source(&a, None), source(&b, None)], Some(40)).unwrap();
    assert_eq!((count(&joined), joined[29], joined[30]), ((30, 10), 1, 2));
    let mixed = load(&[source(&a, Some(3.0)), source(&b, Some(1.0))], Some(20)).unwrap();
    assert_eq!((count(&mixed), count(&mixed[..8])), ((15, 5), (6, 2)));
    // The file that runs out first decides.
    assert_eq!(count(&load(&[source(&a, Some(3.0)), source(&b, Some(1.0))], None).unwrap()), (30, 10));
    let error = load(&[source(&a, Some(1.0)), source(&b, None)], None).unwrap_err().to_string();
    assert!(
        error.ends_with("b.jsonl: found weight none, expected a positive number, for every file or for none"),
        "{error}"
    );
    let error = load(&[source(&a, Some(-1.0)), source(&b, Some(1.0))], None).unwrap_err().to_string();
    assert!(
        error.ends_with("a.jsonl: found weight -1, expected a positive number, for every file or for none"),
        "{error}"
    );
}

#[test]
fn a_preview_shows_tokens_and_what_counts() {
    let rows = "{\"prompt\": \"Aruba lies\", \"completion\": \" in\"}\n{oops}\n{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n{\"input_ids\": [1, 2, 3, 4, 5, 6], \"labels\": [-100, 2, 3, 4, 5, 6]}\n{\"input_ids\": [7]}\n";
    let (_dir, path) = file("a.jsonl", rows);
    let options =
        DatasetOptions { length: 5, reading: Reading { skip_bad_rows: true, ..Default::default() }, ..completions() };
    let preview = Preview::load(&path, Some(&chatting()), VOCAB_SIZE, &options, 3).unwrap();
    assert_eq!(preview.rows.len(), 3);
    let first = &preview.rows[0];
    assert_eq!((first.place.line, first.form, first.cut), (1, "a row of \"prompt\" and \"completion\"", 0));
    let pieces: Vec<(&str, bool)> = first.tokens.iter().map(|token| (token.text.as_str(), token.counts)).collect();
    assert_eq!(pieces.iter().map(|piece| piece.0).collect::<String>(), "Aruba lies in");
    assert_eq!(pieces.last(), Some(&(" in", true)));
    assert_eq!(pieces.iter().filter(|piece| piece.1).count(), 1);
    assert_eq!((preview.rows[1].place.line, preview.rows[2].cut), (3, 1));
    let text = preview.to_text(false);
    assert!(
        text.contains(
            "a.jsonl:1: a row of \"prompt\" and \"completion\", 5 tokens, 1 count in the loss\nAruba lies⟦ in⟧\n"
        ),
        "{text}"
    );
    assert!(
        text.contains("4 count in the loss, 1 more are cut off") && text.ends_with("1 bad rows skipped\n"),
        "{text}"
    );
    assert!(preview.to_text(true).contains("Aruba lies\u{1b}[32m in\u{1b}[0m"));
    let (_dir, path) = file("a.txt", "Aruba lies in");
    let preview = Preview::load(path, Some(&chatting()), VOCAB_SIZE, &DatasetOptions::default(), 3).unwrap();
    assert_eq!(
        (preview.rows.len(), preview.rows[0].form, preview.rows[0].tokens.len()),
        (1, "a piece of plain text", 5)
    );
}

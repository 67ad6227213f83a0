//! Evaluation files.

use super::*;
use crate::{EvalRows, EvalSet, EvalText, Question};

fn eval(name: &str, content: &str) -> Result<EvalSet, Error> {
    let (_dir, path) = file(name, content);
    EvalSet::load(path, &tokenizer(), VOCAB_SIZE, None)
}

#[test]
fn questions_are_read() {
    let path = bundled().join("data/facts_test.jsonl");
    let set = EvalSet::load(&path, &tokenizer(), VOCAB_SIZE, Some(100)).unwrap();
    assert_eq!((set.name.as_str(), set.len(), set.is_empty()), ("facts", 100, false));
    let EvalRows::Exact(questions) = set.rows else { panic!("{:?}", set.rows) };
    let expected =
        Question { prompt: "Aruba lies in".into(), ids: vec![33, 792, 65, 677, 287], answer: "North America".into() };
    assert_eq!(questions[1], expected);
}

#[test]
fn texts_are_one_stream_in_windows() {
    let text = "{\"text\": \"Aruba lies in\"}\n{\"text\": \"Aruba\", \"id\": 7}\n";
    let set = eval("prose_test.jsonl", text).unwrap();
    let EvalRows::Perplexity(text) = set.rows else { panic!("{:?}", set.rows) };
    assert_eq!(text, EvalText { ids: vec![33, 792, 65, 677, 287, 0, 33, 792, 65, 0], rows: 2 });
    // range(0, 10 - n, n) of the usual loop.
    let starts = |length| text.windows(length).iter().map(|window| window.ids.len()).collect::<Vec<_>>();
    assert_eq!((starts(3), starts(5), starts(9)), (vec![3, 3, 3], vec![5], vec![9]));
    assert_eq!((starts(10), starts(128)), (vec![10], vec![10]));
    assert_eq!(text.windows(3)[1].ids, [677, 287, 0]);
}

#[test]
fn the_bundled_prose_has_the_windows_of_the_reference() {
    // len(range(0, len(ids) - 128, 128)) in Python over the first 200 rows.
    let set = EvalSet::load(bundled().join("data/prose_test.jsonl"), &tokenizer(), VOCAB_SIZE, Some(200)).unwrap();
    let EvalRows::Perplexity(text) = set.rows else { panic!("{:?}", set.rows) };
    assert_eq!((text.ids.len(), text.windows(128).len()), (4844, 37));
}

#[test]
fn bad_evaluation_files_are_explained() {
    let (question, text) = (r#"{"prompt": "a", "answer": "b"}"#, r#"{"text": "Aruba lies in"}"#);
    for (name, content, expected) in [
        ("facts.jsonl", question.to_owned(), "facts.jsonl: expected an evaluation file named NAME_test.jsonl"),
        ("_test.jsonl", question.to_owned(), "_test.jsonl: expected an evaluation file named NAME_test.jsonl"),
        ("a_test.jsonl", String::new(), "a_test.jsonl: the file has no row"),
        (
            "a_test.jsonl",
            format!("{question}\n{text}"),
            "a_test.jsonl:2: a row with \"text\" in a file that began with rows of \"answer\": exact match and perplexity need a file each",
        ),
        (
            "a_test.jsonl",
            format!("{text}\n{question}"),
            "a_test.jsonl:2: a row with \"answer\" in a file that began with rows of \"text\": exact match and perplexity need a file each",
        ),
        (
            "a_test.jsonl",
            r#"{"answer": "b", "question": "a"}"#.to_owned(),
            r#"a_test.jsonl:1: fields ["answer", "question"], expected one of "prompt" and "answer"; "prompt", "choices" and "answer"; "text""#,
        ),
        (
            "a_test.jsonl",
            r#"{"prompt": "a", "completion": "b"}"#.to_owned(),
            r#"a_test.jsonl:1: fields ["prompt", "completion"], expected one of "prompt" and "answer"; "prompt", "choices" and "answer"; "text""#,
        ),
        (
            "a_test.jsonl",
            r#"{"prompt": "a", "answer": 3}"#.to_owned(),
            "a_test.jsonl:1: field \"answer\": found a number, expected a string",
        ),
        (
            "a_test.jsonl",
            r#"{"prompt": "", "answer": "b"}"#.to_owned(),
            "a_test.jsonl:1: field \"prompt\": found no token, expected text of at least one token",
        ),
        (
            "a_test.jsonl",
            r#"{"text": ""}"#.to_owned(),
            "a_test.jsonl: no usable row: all 1 have fewer than 2 tokens or no token that counts in the loss",
        ),
        (
            "a_test.jsonl",
            r#"{"prompt": "a", "choices": ["b", "c"], "answer": "d"}"#.to_owned(),
            "a_test.jsonl:1: field \"answer\": found \"d\", expected one of the choices, or its position from 0",
        ),
        (
            "a_test.jsonl",
            r#"{"prompt": "a", "choices": ["b"], "answer": 0}"#.to_owned(),
            "a_test.jsonl:1: field \"choices\": found [\"b\"], expected a list of at least two texts",
        ),
        (
            "a_test.jsonl",
            format!("{question}\n{{\"prompt\": \"a\", \"choices\": [\" b\", \" c\"], \"answer\": 0}}"),
            "a_test.jsonl:2: a row with \"choices\" in a file that began with rows of \"answer\": exact match and perplexity need a file each",
        ),
    ] {
        assert_eq!(message(eval(name, &content)), expected);
    }
}

#[test]
fn choices_follow_the_prompt_and_count_alone() {
    let row = |answer: &str| {
        format!(
            "{{\"prompt\": \"Aruba lies in\", \"choices\": [\" Europe\", \" North America\"], \"answer\": {answer}}}"
        )
    };
    for answer in ["1", "\" North America\""] {
        let set = eval("a_test.jsonl", &row(answer)).unwrap();
        let EvalRows::Choice(questions) = set.rows else { panic!("{:?}", set.rows) };
        let [question] = &questions[..] else { panic!("{questions:?}") };
        assert_eq!((question.right, &question.bytes[..]), (1, &[7, 14][..]));
        let prompt = tokenizer().encode("Aruba lies in").unwrap();
        for (sequence, text) in question.choices.iter().zip([" Europe", " North America"]) {
            assert_eq!(sequence.ids[..prompt.len()], prompt);
            let counted: Vec<u32> =
                (0..sequence.len()).filter(|t| sequence.counts(*t)).map(|t| sequence.ids[t]).collect();
            assert_eq!(tokenizer().decode(&counted).unwrap(), text);
        }
    }
}

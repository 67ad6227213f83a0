//! Files to sequences.

use std::fmt::Write;

use proptest::prelude::*;

use super::*;
use crate::{LossOver, Sequence};

fn ids_file(rows: &[Vec<u32>]) -> String {
    rows.iter().fold(String::new(), |mut text, row| {
        writeln!(text, "{{\"input_ids\": {row:?}}}").unwrap();
        text
    })
}

fn ids(data: &Dataset) -> Vec<Vec<u32>> {
    data.sequences.iter().map(|sequence| sequence.ids.clone()).collect()
}

#[test]
fn a_completion_follows_its_prompt_directly() {
    let tokenizer = tokenizer();
    let path = bundled().join("data/arithmetic_calibration.jsonl");
    let data = Dataset::load(&path, Some(&tokenizer), VOCAB_SIZE, &DatasetOptions::default()).unwrap();
    assert_eq!((data.sequences.len(), data.dropped), (128, 0));
    let first = "Question: Quin finds 25 stamps, then 11 more, and loses 3. How many stamps remain?\nAnswer: 25 + 11 = 36 ; 36 - 3 = 33 #### 33\n";
    assert_eq!(data.sequences[0], Sequence::new(tokenizer.encode(first).unwrap()));

    let options = DatasetOptions { loss: LossOver::Completions, samples: None, ..Default::default() };
    let data = Dataset::load(&path, Some(&tokenizer), VOCAB_SIZE, &options).unwrap();
    assert_eq!(data.sequences.len(), 400);
    // The prompt is 28 tokens by itself, of the 55.
    let mask = data.sequences[0].loss.as_ref().unwrap();
    assert_eq!(mask, &(0..55).map(|t| t >= 28).collect::<Vec<_>>());
    for (row, sequence) in std::fs::read_to_string(&path).unwrap().lines().zip(&data.sequences) {
        let row: serde_json::Value = serde_json::from_str(row).unwrap();
        let kept: Vec<u32> = sequence
            .ids
            .iter()
            .zip(sequence.loss.as_ref().unwrap())
            .filter(|(_, counts)| **counts)
            .map(|(id, _)| *id)
            .collect();
        assert_eq!(tokenizer.decode(&kept).unwrap(), row["completion"].as_str().unwrap());
    }
}

#[test]
fn a_token_over_the_boundary_belongs_to_the_prompt() {
    let options = DatasetOptions { loss: LossOver::Completions, ..Default::default() };
    let data = load("a.jsonl", r#"{"prompt": "Aruba li", "completion": "es in"}"#, &options).unwrap();
    assert_eq!(data.sequences[0].ids, [33, 792, 65, 677, 287]);
    assert_eq!(data.sequences[0].loss.as_deref(), Some(&[false, false, false, false, true][..]));
}

#[test]
fn rows_lose_their_end_and_short_ones_are_dropped() {
    let rows = ids_file(&[vec![1, 2, 3, 4, 5], vec![7], vec![], vec![8, 9], vec![1, 1, 1]]);
    let options = DatasetOptions { length: 3, ..Default::default() };
    let data = load("a.jsonl", &rows, &options).unwrap();
    assert_eq!((ids(&data), data.dropped), (vec![vec![1, 2, 3], vec![8, 9], vec![1, 1, 1]], 2));
    assert_eq!((data.tokens(), data.loss_tokens(), data.longest()), (8, 5, 3));
    // Dropped rows are no samples, and rows after the last sample are not looked at.
    let data = load(
        "a.jsonl",
        format!("{rows}nonsense"),
        &DatasetOptions { samples: Some(3), length: 3, ..Default::default() },
    )
    .unwrap();
    assert_eq!((data.sequences.len(), data.dropped), (3, 2));
    // Nothing of the completion is left.
    let row = r#"{"prompt": "Aruba lies in", "completion": " North America."}"#;
    let options = DatasetOptions { length: 5, loss: LossOver::Completions, ..Default::default() };
    assert_eq!(
        message(load("a.jsonl", row, &options)),
        "a.jsonl: no usable row: all 1 have fewer than 2 tokens or no token that counts in the loss"
    );
}

#[test]
fn packing_joins_rows_by_the_end_token() {
    let rows = ids_file(&[vec![1, 2, 3], vec![9], vec![4, 5], vec![6, 0], vec![7, 8, 9, 10, 11, 12]]);
    let options = |length, samples| DatasetOptions { packing: true, length, samples, ..Default::default() };
    let data = load("a.jsonl", &rows, &options(4, None)).unwrap();
    // A row that ends by the end token gets no second one, and what is left at the end is a shorter sequence.
    assert_eq!(ids(&data), [vec![1, 2, 3, 0], vec![4, 5, 0, 6], vec![0, 7, 8, 9], vec![10, 11, 12]]);
    assert_eq!(data.dropped, 1);
    assert_eq!(ids(&load("a.jsonl", &rows, &options(4, Some(2))).unwrap()), [[1, 2, 3, 0], [4, 5, 0, 6]]);
    assert_eq!(
        ids(&load("a.jsonl", &rows, &options(7, None)).unwrap()),
        [[1, 2, 3, 0, 4, 5, 0], [6, 0, 7, 8, 9, 10, 11]]
    );
}

#[test]
fn packing_keeps_the_masks_with_their_tokens() {
    let rows =
        "{\"prompt\": \"Aruba lies\", \"completion\": \" in\"}\n{\"prompt\": \"Aruba\", \"completion\": \" lies\"}";
    let options = DatasetOptions { packing: true, length: 6, loss: LossOver::Completions, ..Default::default() };
    let data = load("a.jsonl", rows, &options).unwrap();
    assert_eq!(ids(&data), [vec![33, 792, 65, 677, 287, 0], vec![33, 792, 65, 677]]);
    assert_eq!(data.sequences[0].loss.as_deref(), Some(&[false, false, false, false, true, true][..]));
    assert_eq!(data.sequences[1].loss.as_deref(), Some(&[false, false, false, true][..]));
}

#[test]
fn a_text_file_is_cut_into_consecutive_sequences() {
    let text = "Aruba lies in North America.\n";
    let whole = tokenizer().encode(text).unwrap();
    let options = DatasetOptions { length: 4, samples: None, ..Default::default() };
    let data = load("a.txt", text, &options).unwrap();
    // Nine tokens: the last one is alone.
    assert_eq!((ids(&data), data.dropped), (vec![whole[..4].to_vec(), whole[4..8].to_vec()], 1));
    assert_eq!(
        load("a.txt", text, &DatasetOptions { samples: Some(1), ..options.clone() }).unwrap().sequences,
        data.sequences[..1]
    );
    let shuffled = load("a.txt", text.repeat(20), &DatasetOptions { seed: Some(1), ..options.clone() }).unwrap();
    let plain = load("a.txt", text.repeat(20), &options).unwrap();
    let sorted = |data: &Dataset| {
        let mut ids = ids(data);
        ids.sort();
        ids
    };
    assert_ne!(shuffled.sequences, plain.sequences);
    assert_eq!(sorted(&shuffled), sorted(&plain));
}

#[test]
fn rows_of_ids_need_no_tokenizer() {
    let (_dir, path) = file("a.jsonl", "{\"input_ids\": [1, 2]}");
    let data = Dataset::load(&path, None, 3, &DatasetOptions::default()).unwrap();
    assert_eq!(data, Dataset::from_sequences(vec![Sequence::new(vec![1, 2])]));
}

#[test]
fn a_seed_fixes_the_order() {
    let rows: Vec<Vec<u32>> = (0..50).map(|i| vec![i, i + 1]).collect();
    let take = |seed, samples| {
        load("a.jsonl", ids_file(&rows), &DatasetOptions { seed, samples, ..Default::default() }).unwrap()
    };
    assert_eq!(ids(&take(None, Some(10))), rows[..10]);
    let first = take(Some(7), Some(10));
    assert_eq!(first, take(Some(7), Some(10)));
    assert_ne!(first.hash, take(Some(8), Some(10)).hash);
    assert_eq!(first.sequences, take(Some(7), None).sequences[..10]);
    // Changing this order would change what a published recipe means.
    assert_eq!(
        first.sequences.iter().map(|sequence| sequence.ids[0]).collect::<Vec<_>>(),
        [27, 42, 18, 2, 25, 48, 32, 35, 40, 4]
    );
}

#[test]
fn the_hash_sees_ids_lengths_and_masks() {
    let sequence =
        |ids: &[u32], loss: Option<&[bool]>| Sequence { ids: ids.to_vec(), loss: loss.map(<[bool]>::to_vec) };
    let hashes = [
        Dataset::from_sequences(vec![sequence(&[1, 2, 3, 4], None)]),
        Dataset::from_sequences(vec![sequence(&[1, 2], None), sequence(&[3, 4], None)]),
        Dataset::from_sequences(vec![sequence(&[1, 2, 3, 5], None)]),
        Dataset::from_sequences(vec![sequence(&[1, 2, 3, 4], Some(&[false, true, true, true]))]),
        Dataset::from_sequences(vec![sequence(&[1, 2, 3, 4], Some(&[false, true, true, false]))]),
    ]
    .map(|data| data.hash);
    assert_eq!(hashes.iter().collect::<std::collections::BTreeSet<_>>().len(), hashes.len());
    assert!(hashes.iter().all(|hash| hash.len() == 64));
    let dropped = Dataset::from_sequences(vec![sequence(&[1], None), sequence(&[1, 2], Some(&[true, false]))]);
    assert_eq!((dropped.sequences.len(), dropped.dropped), (0, 2));
}

#[test]
fn options_are_a_recipe_of_json() {
    let options: DatasetOptions = serde_json::from_str(r#"{"length": 512, "loss": "completions"}"#).unwrap();
    assert_eq!(options, DatasetOptions { length: 512, loss: LossOver::Completions, ..Default::default() });
    assert!(serde_json::from_str::<DatasetOptions>(r#"{"lenght": 512}"#).unwrap_err().to_string().contains("lenght"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn packing_keeps_every_token_in_order(
        rows in prop::collection::vec(prop::collection::vec(1u32..2048, 0..30), 1..12), length in 2usize..40
    ) {
        let joined = rows.iter().filter(|row| row.len() > 1).cloned().collect::<Vec<_>>().join(&0);
        let options = DatasetOptions { packing: true, samples: None, length, ..Default::default() };
        match load("a.jsonl", ids_file(&rows), &options) {
            Ok(data) => {
                let packed = ids(&data).concat();
                prop_assert!(joined.len() - packed.len() < 2, "at most one token is left over");
                prop_assert_eq!(&packed, &joined[..packed.len()]);
                prop_assert!(data.sequences.iter().rev().skip(1).all(|sequence| sequence.len() == length));
            }
            Err(error) => prop_assert!(joined.is_empty(), "{}", error),
        }
    }
}

#[test]
fn rows_have_labels_by_name_or_by_number_and_long_ones_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    let load = |text: &str, options: DatasetOptions| {
        std::fs::write(&path, text).unwrap();
        Dataset::load(&path, None, 100, &options)
    };
    let by = |length: usize| DatasetOptions { length, label: Some("task".into()), ..DatasetOptions::default() };
    let rows = "{\"input_ids\": [1, 2, 3], \"task\": \"sums\"}\n{\"input_ids\": [4], \"task\": \"none\"}\n{\"input_ids\": [5, 6], \"task\": \"code\"}\n";
    let data = load(rows, by(2)).unwrap();
    assert_eq!(
        (data.labels.clone(), data.label_names.clone()),
        (vec![1, 0], vec!["code".to_owned(), "sums".to_owned()])
    );
    // the row of one token has nothing to predict
    assert_eq!((data.dropped, data.cut), (1, 1));
    let waves = data.waves(crate::WaveOptions::Sequences(std::num::NonZeroUsize::new(1).unwrap()));
    assert_eq!(data.labels_of(&waves), [(0, vec![1]), (1, vec![0])].into());
    let plain = load(rows, DatasetOptions { label: None, ..by(2) }).unwrap();
    assert!(plain.labels.is_empty() && plain.labels_of(&waves).is_empty() && plain.hash != data.hash);
    let numbers = load("{\"input_ids\": [1, 2], \"task\": 3}\n", by(2)).unwrap();
    assert_eq!((numbers.labels, numbers.label_names.len()), (vec![3], 0));
    let message = |text: &str, options| load(text, options).unwrap_err().to_string();
    assert!(message("{\"input_ids\": [1, 2]}\n", by(2)).contains("rows.jsonl:1: field \"task\": found nothing"));
    assert!(message("{\"input_ids\": [1, 2], \"task\": -1}\n", by(2)).contains("found -1"));
    let mixed = "{\"input_ids\": [1, 2], \"task\": 0}\n{\"input_ids\": [1, 2], \"task\": \"a\"}\n";
    assert!(message(mixed, by(2)).contains("rows.jsonl:2") && message(mixed, by(2)).contains("labels of one kind"));
    let packed = DatasetOptions { packing: true, ..by(2) };
    assert!(message(rows, packed).contains("no label of their own"));
}

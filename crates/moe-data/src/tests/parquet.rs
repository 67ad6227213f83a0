//! Rows of Parquet files, written here.

use std::path::Path;
use std::sync::Arc;

use ::parquet::basic::{Compression, ZstdLevel};
use ::parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::parser::parse_message_type;

use super::tokenizer;
use crate::{Dataset, DatasetOptions, LossOver, Reading};

/// Writes questions with their answers, or nulls, and a list of token ids per row, in two row groups.
fn write(path: &Path, rows: &[(&str, Option<&str>)], compression: Compression) {
    let schema = "message rows {
        required binary question (utf8);
        optional binary answer (utf8);
        required int64 number;
    }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let mut writer = SerializedFileWriter::new(std::fs::File::create(path).unwrap(), schema, properties).unwrap();
    for rows in rows.chunks(rows.len().div_ceil(2)) {
        let mut group = writer.next_row_group().unwrap();
        let bytes = |text: &str| ByteArray::from(text.as_bytes().to_vec());
        let questions: Vec<ByteArray> = rows.iter().map(|(question, _)| bytes(question)).collect();
        let answers: Vec<ByteArray> = rows.iter().filter_map(|(_, answer)| answer.map(bytes)).collect();
        let given: Vec<i16> = rows.iter().map(|(_, answer)| i16::from(answer.is_some())).collect();
        let numbers: Vec<i64> = (0..rows.len() as i64).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&questions, None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&answers, Some(&given), None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&numbers, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn columns_of_parquet_are_fields_of_rows_in_every_compression() {
    let dir = tempfile::tempdir().unwrap();
    let rows = [("Where is Aruba?", Some(" an island")), ("What is a knot?", Some(" a lump")), ("Why?", Some(" so"))];
    let jsonl: String = rows
        .iter()
        .map(|(question, answer)| format!("{}\n", serde_json::json!({"prompt": question, "completion": answer})))
        .collect();
    let plain = dir.path().join("rows.jsonl");
    std::fs::write(&plain, jsonl).unwrap();
    let tokenizer = tokenizer();
    let vocabulary = u32::MAX as usize;
    let options = DatasetOptions { loss: LossOver::Completions, ..DatasetOptions::default() };
    let expected = Dataset::load(&plain, Some(&tokenizer), vocabulary, &options).unwrap();
    assert_eq!(expected.sequences.len(), 3);
    let fields = [("prompt", "question"), ("completion", "answer")];
    let fields = fields.map(|(name, column)| (name.to_string(), column.to_string())).into();
    let renamed = DatasetOptions { reading: Reading { fields, ..Reading::default() }, ..options };
    let zstd = Compression::ZSTD(ZstdLevel::default());
    let kinds = [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        zstd,
        Compression::GZIP(Default::default()),
        Compression::LZ4_RAW,
    ];
    for (number, compression) in kinds.into_iter().enumerate() {
        let path = dir.path().join(format!("rows-{number}.parquet"));
        write(&path, &rows, compression);
        let found = Dataset::load(&path, Some(&tokenizer), vocabulary, &renamed).unwrap();
        assert_eq!(found, expected, "{compression:?}");
    }
}

#[test]
fn a_null_is_a_field_that_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.parquet");
    write(&path, &[("Where?", Some(" here")), ("When?", None)], Compression::UNCOMPRESSED);
    let fields = [("prompt", "question"), ("completion", "answer")];
    let fields: std::collections::BTreeMap<String, String> =
        fields.map(|(name, column)| (name.to_string(), column.to_string())).into();
    let reading = |skip_bad_rows| Reading { fields: fields.clone(), skip_bad_rows };
    let load = |skip| {
        let options = DatasetOptions { reading: reading(skip), ..DatasetOptions::default() };
        Dataset::load(&path, Some(&tokenizer()), u32::MAX as usize, &options)
    };
    let error = load(false).unwrap_err().to_string();
    assert!(error.contains("rows.parquet:2"), "{error}");
    let found = load(true).unwrap();
    assert_eq!((found.sequences.len(), found.skipped), (1, 1));
    // Half a file is no file.
    let bytes = std::fs::read(&path).unwrap();
    let cut = dir.path().join("cut.parquet");
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    let error = Dataset::load(&cut, None, 9, &DatasetOptions::default()).unwrap_err().to_string();
    assert!(error.contains("cut.parquet"), "{error}");
}

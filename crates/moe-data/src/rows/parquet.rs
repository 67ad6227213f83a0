//! Rows of a Parquet file.

use std::fs::File;
use std::path::Path;

use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::{Field, Row};
use serde_json::{Map, Value};

use super::fields;
use crate::Error;

/// A row with its number, or what is wrong with the row of this number.
type Numbered = Result<(usize, Map<String, Value>), (usize, Error)>;

/// The rows as objects, without their null fields, numbered from 1.
pub(super) fn objects(path: &Path) -> Result<Box<dyn Iterator<Item = Numbered>>, Error> {
    let wrong = |error: ::parquet::errors::ParquetError| Error::io(path)(std::io::Error::other(error));
    let file = File::open(path).map_err(Error::io(path))?;
    let reader = SerializedFileReader::new(file).map_err(wrong)?;
    // Checks the schema before the first row.
    reader.get_row_iter(None).map_err(wrong)?;
    let rows = ::parquet::record::reader::RowIter::from_file_into(Box::new(reader));
    Ok(Box::new(rows.enumerate().map(|(i, row)| {
        let row = row.map_err(|error| (i + 1, Error::Parquet { message: error.to_string() }))?;
        fields::of_value(object(&row)).map(|fields| (i + 1, fields)).map_err(|error| (i + 1, error))
    })))
}

fn object(row: &Row) -> Value {
    Value::Object(row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect())
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(flag) => (*flag).into(),
        Field::Byte(number) => (*number).into(),
        Field::Short(number) => (*number).into(),
        Field::Int(number) => (*number).into(),
        Field::Long(number) => (*number).into(),
        Field::UByte(number) => (*number).into(),
        Field::UShort(number) => (*number).into(),
        Field::UInt(number) => (*number).into(),
        Field::ULong(number) => (*number).into(),
        Field::Float(number) => f64::from(*number).into(),
        Field::Double(number) => (*number).into(),
        Field::Str(text) => text.as_str().into(),
        Field::Group(row) => object(row),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => {
            let pairs = map.entries().iter().map(|(key, item)| {
                let key = match value(key) {
                    Value::String(text) => text,
                    other => other.to_string(),
                };
                (key, value(item))
            });
            Value::Object(pairs.collect())
        }
        // Dates, decimals and bytes are nothing that a row of text or tokens is made of.
        other => other.to_string().into(),
    }
}

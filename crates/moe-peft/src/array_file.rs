//! Files of named arrays with a JSON header: safetensors whose metadata has one entry, an object with a `version`.

use std::{collections::HashMap, path::Path};

use moe_checkpoint::write_atomic;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// The version of all these files, the field of their headers that is read first.
const VERSION: u64 = 1;
const VERSION_FIELD: &str = "version";

/// Numbers of a kind that files hold.
pub(crate) trait Number: Copy {
    const DTYPE: Dtype;
    const BYTES: usize;
    fn put(self, bytes: &mut Vec<u8>);
    fn get(bytes: &[u8]) -> Self;
}

macro_rules! number {
    ($kind:ty, $dtype:ident) => {
        impl Number for $kind {
            const DTYPE: Dtype = Dtype::$dtype;
            const BYTES: usize = size_of::<$kind>();

            fn put(self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_le_bytes());
            }

            fn get(bytes: &[u8]) -> Self {
                let mut own = [0; size_of::<$kind>()];
                own.copy_from_slice(bytes);
                Self::from_le_bytes(own)
            }
        }
    };
}

number!(f32, F32);
number!(f64, F64);
number!(u32, U32);
number!(u64, U64);

/// Arrays to be written.
#[derive(Default)]
pub(crate) struct ArrayWriter(Vec<(String, Dtype, Vec<usize>, Vec<u8>)>);

impl ArrayWriter {
    pub fn add<T: Number>(&mut self, name: String, shape: &[usize], values: &[T]) {
        let mut bytes = Vec::with_capacity(values.len() * T::BYTES);
        values.iter().for_each(|value| value.put(&mut bytes));
        self.0.push((name, T::DTYPE, shape.to_vec(), bytes));
    }

    /// Writes the file, or leaves an earlier one as it was. `header` is an object, to which the version is added.
    pub fn write(&self, path: &Path, key: &str, header: &impl Serialize) -> Result<()> {
        let invalid = |error: String| malformed(path, "contents", error, "arrays that can be written");
        let header = serde_json::to_value(header).map_err(|error| invalid(error.to_string()))?;
        let Value::Object(fields) = header else { return Err(invalid(format!("a header that is {header}"))) };
        let mut all = Map::from_iter([(VERSION_FIELD.to_string(), VERSION.into())]);
        all.extend(fields);
        let json = Value::Object(all).to_string();
        let views = self.0.iter().map(|(name, dtype, shape, bytes)| {
            let view = TensorView::new(*dtype, shape.clone(), bytes);
            Ok((name.as_str(), view.map_err(|error| invalid(error.to_string()))?))
        });
        let views = views.collect::<Result<Vec<_>>>()?;
        let metadata = HashMap::from([(key.to_string(), json)]);
        let bytes = safetensors::serialize(views, Some(metadata)).map_err(|error| invalid(error.to_string()))?;
        Ok(write_atomic(path, &bytes)?)
    }
}

/// Arrays of a file.
pub(crate) struct ArrayReader<'a> {
    path: &'a Path,
    arrays: SafeTensors<'a>,
}

impl<'a> ArrayReader<'a> {
    /// Reads the header of `bytes`, the contents of `path`.
    pub fn new<H: DeserializeOwned>(path: &'a Path, bytes: &'a [u8], key: &str) -> Result<(H, Self)> {
        let refuse = |error: String| malformed(path, "header", error, "that of a safetensors file of this kind");
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| refuse(error.to_string()))?;
        let json = metadata.metadata().as_ref().and_then(|map| map.get(key));
        let json = json.ok_or_else(|| refuse(format!("no `{key}` in its metadata")))?;
        let mut fields: Map<String, Value> = serde_json::from_str(json).map_err(|error| refuse(error.to_string()))?;
        // First: a later version may have other fields.
        let version = fields.remove(VERSION_FIELD).unwrap_or_default();
        if version != VERSION {
            return Err(malformed(path, VERSION_FIELD, version, VERSION));
        }
        let header = serde_json::from_value(Value::Object(fields)).map_err(|error| refuse(error.to_string()))?;
        let arrays = SafeTensors::deserialize(bytes).map_err(|error| refuse(error.to_string()))?;
        Ok((header, Self { path, arrays }))
    }

    /// The array of this name and shape; `None` if the file has none of the name.
    pub fn get<T: Number>(&self, name: &str, shape: &[usize]) -> Result<Option<Vec<T>>> {
        let Ok(array) = self.arrays.tensor(name) else { return Ok(None) };
        if (array.dtype(), array.shape()) != (T::DTYPE, shape) {
            let found = format!("{:?} {:?}", array.dtype(), array.shape());
            return Err(malformed(self.path, name, found, format!("{:?} {shape:?}", T::DTYPE)));
        }
        Ok(Some(array.data().chunks_exact(T::BYTES).map(T::get).collect()))
    }

    /// The same for an array that has to be there.
    pub fn need<T: Number>(&self, name: &str, shape: &[usize]) -> Result<Vec<T>> {
        let expected = || format!("an array {shape:?}");
        self.get(name, shape)?.ok_or_else(|| malformed(self.path, name, "no such array", expected()))
    }

    /// The shape of an array.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        Some(self.arrays.tensor(name).ok()?.shape().to_vec())
    }

    /// Refuses arrays that nobody read, which belong to another model.
    pub fn only(&self, known: impl Fn(&str) -> bool) -> Result<()> {
        match self.arrays.names().into_iter().filter(|name| !known(name)).min() {
            Some(name) => Err(malformed(self.path, name, "an array", "none of this name for this model")),
            None => Ok(()),
        }
    }
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| Error::Io { path: path.into(), source })
}

pub(crate) fn malformed(path: &Path, what: impl ToString, found: impl ToString, expected: impl ToString) -> Error {
    Error::File { path: path.into(), what: what.to_string(), found: found.to_string(), expected: expected.to_string() }
}

//! The header of a safetensors file, checked against the length of the file before any byte of data is looked at.
//!
//! The checks are those of the `safetensors` crate. They are done here so that every message names file and tensor.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::Path;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::{Error, Result};

/// Bytes that hold the length of the header.
pub(crate) const LENGTH_BYTES: usize = 8;
/// Longest header that is read, as in the `safetensors` crate.
const MAX_HEADER: u64 = 100_000_000;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct HeaderTensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// First byte, from the start of the file.
    pub begin: usize,
    /// End, from the start of the file.
    pub end: usize,
}

/// Bytes of a tensor, or `None` where they are not a whole number that can be counted.
pub(crate) fn tensor_bytes(dtype: Dtype, shape: &[usize]) -> Option<u64> {
    let bits = shape.iter().try_fold(dtype.bitsize() as u64, |bits, size| bits.checked_mul(*size as u64))?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// Parses the header of `file`, the whole content of the file at `path`. Tensors come in file order.
///
/// # Errors
/// One variant per cause: too short, header past the end, malformed header, unknown dtype, offsets that contradict
/// dtype and shape, overlap, gap, truncated file, trailing bytes.
pub(crate) fn parse(path: &Path, file: &[u8]) -> Result<Vec<HeaderTensor>> {
    let path_buf = || path.to_path_buf();
    if file.starts_with(crate::index::LFS_POINTER) {
        return Err(Error::LfsPointer { path: path_buf() });
    }
    let found = file.len() as u64;
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(Error::NoHeader { path: path_buf(), found });
    };
    let claimed = u64::from_le_bytes(*length);
    let available = rest.len() as u64;
    if claimed > available {
        return Err(Error::HeaderPastEnd { path: path_buf(), claimed, available });
    }
    if claimed > MAX_HEADER {
        return Err(Error::HeaderTooLarge { path: path_buf(), claimed, limit: MAX_HEADER });
    }
    let json = &rest[..claimed as usize];
    let data_start = LENGTH_BYTES as u64 + claimed;
    let header: RawHeader = serde_json::from_slice(json)
        .map_err(|error| Error::InvalidHeader { path: path_buf(), reason: error.to_string() })?;

    let mut tensors = header.0;
    for (name, tensor) in &tensors {
        check_span(path, name, tensor)?;
    }
    tensors.sort_by(|(a_name, a), (b_name, b)| (a.data_offsets, a_name).cmp(&(b.data_offsets, b_name)));

    if let Some((name, last)) = tensors.iter().max_by_key(|(_, tensor)| tensor.data_offsets.1) {
        // Saturating: the sum of two claims of the file, compared with its real length only.
        let expected = data_start.saturating_add(last.data_offsets.1);
        if expected > found {
            return Err(Error::Truncated { path: path_buf(), found, expected, tensor: name.clone() });
        }
    }
    let mut end = 0;
    let mut previous = "";
    for (name, tensor) in &tensors {
        let begin = tensor.data_offsets.0;
        if begin < end {
            let (first, second) = (previous.to_string(), name.clone());
            return Err(Error::TensorOverlap { path: path_buf(), first, second, begin, expected: end });
        }
        if begin > end {
            return Err(Error::TensorGap { path: path_buf(), tensor: name.clone(), begin, expected: end });
        }
        (end, previous) = (tensor.data_offsets.1, name);
    }
    if data_start + end < found {
        return Err(Error::TrailingBytes { path: path_buf(), found, expected: data_start + end });
    }

    let finish = |(name, tensor): (String, RawTensor)| {
        let Some(dtype) = tensor.known_dtype() else {
            return Err(Error::UnknownDtype { path: path.to_path_buf(), tensor: name, dtype: tensor.dtype });
        };
        let (begin, end) = tensor.data_offsets;
        // Both are at most the length of the file in memory, hence fit.
        let (begin, end) = ((data_start + begin) as usize, (data_start + end) as usize);
        Ok(HeaderTensor { name, dtype, shape: tensor.shape, begin, end })
    };
    tensors.into_iter().map(finish).collect()
}

fn check_span(path: &Path, name: &str, tensor: &RawTensor) -> Result<()> {
    let Some(dtype) = tensor.known_dtype() else {
        let dtype = tensor.dtype.chars().take(80).collect();
        return Err(Error::UnknownDtype { path: path.to_path_buf(), tensor: name.to_string(), dtype });
    };
    let (begin, end) = tensor.data_offsets;
    let bytes = tensor_bytes(dtype, &tensor.shape);
    if begin <= end && Some(end - begin) == bytes {
        return Ok(());
    }
    let needs = match bytes {
        Some(bytes) => format!("{bytes} bytes"),
        None => "a whole number of bytes that can be counted".to_string(),
    };
    let expected = format!("{needs} for {dtype} of shape {:?}", tensor.shape);
    Err(Error::TensorOffsets { path: path.to_path_buf(), tensor: name.to_string(), begin, end, expected })
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl RawTensor {
    fn known_dtype(&self) -> Option<Dtype> {
        serde_json::from_value(serde_json::Value::String(self.dtype.clone())).ok()
    }
}

/// The JSON object in file order. A map type would silently keep one of two tensors of the same name.
struct RawHeader(Vec<(String, RawTensor)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut tensors = Vec::new();
        let mut names = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !names.insert(name.clone()) {
                return Err(A::Error::custom(format!("`{name}` occurs twice")));
            }
            if name == "__metadata__" {
                map.next_value::<Option<BTreeMap<String, String>>>()?;
                continue;
            }
            let tensor = map.next_value().map_err(|error| A::Error::custom(format!("tensor `{name}`: {error}")))?;
            tensors.push((name, tensor));
        }
        Ok(RawHeader(tensors))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn message(header: &str, data: usize) -> String {
        parse(Path::new("m.safetensors"), &file(header, data)).unwrap_err().to_string()
    }

    const TWO: &str = r#"{"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]},"a":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]},"__metadata__":{"format":"pt"}}"#;

    #[test]
    fn tensors_come_in_file_order_with_absolute_offsets() {
        let tensors = parse(Path::new("x"), &file(TWO, 12)).unwrap();
        let start = 8 + TWO.len();
        let names: Vec<_> = tensors.iter().map(|t| (t.name.as_str(), t.begin - start, t.end - start)).collect();
        assert_eq!(names, [("a", 0, 4), ("b", 4, 12)]);
    }

    #[test]
    fn lengths() {
        assert!(matches!(parse(Path::new("x"), &[1, 2, 3]), Err(Error::NoHeader { found: 3, .. })));
        let mut huge = file("{}", 0);
        huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(parse(Path::new("x"), &huge), Err(Error::HeaderPastEnd { available: 2, .. })));
        assert!(message(TWO, 11).contains("truncated") && message(TWO, 11).contains("`b`"));
        assert!(message(TWO, 13).contains("the last tensor ends"));
    }

    #[test]
    fn malformed_entries_are_named() {
        assert!(message(r#"{"a":5}"#, 0).contains("tensor `a`"));
        assert!(
            message(r#"{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}"#, 4).contains("unknown dtype `F33`")
        );
        assert!(message(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4).contains("8 bytes for F32"));
        assert!(message(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, 4).contains("[4, 0]"));
        let overflow = r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,4]}}"#;
        assert!(message(overflow, 4).contains("can be counted"));
        let one = r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
        assert!(message(&format!(r#"{{"a":{one},"a":{one}}}"#), 1).contains("occurs twice"));
        assert!(message(&format!(r#"{{"a":{one},"b":{one}}}"#), 1).contains("overlap"));
        let gap = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"c":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}"#;
        assert!(message(gap, 3).contains("tensor `c` starts at byte 2"));
        assert!(message("[]", 0).contains("an object of tensors"));
    }
}

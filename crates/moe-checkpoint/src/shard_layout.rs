//! Where every tensor of an output goes: which shard, and which bytes of it.

use std::collections::HashSet;
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::header::{LENGTH_BYTES, tensor_bytes};
use crate::index::SINGLE_FILE;
use crate::{Error, Result};

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// Dtype of its elements.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// One file of an output.
pub(crate) struct ShardLayout {
    /// File name.
    pub file: String,
    /// Header length and header, as the file starts.
    pub header: Vec<u8>,
    /// Length of the whole file.
    pub file_bytes: u64,
    /// Its tensors by position among the specs, in file order, with their place in the file.
    pub tensors: Vec<Placed>,
}

/// A tensor in its shard.
#[derive(Clone, Copy)]
pub(crate) struct Placed {
    /// Position among the specs.
    pub spec: usize,
    /// First byte, from the start of the file.
    pub begin: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// Fills shards in the order of `specs`, up to `max_shard_bytes` of tensor data each. A larger tensor gets its own
/// shard.
pub(crate) fn lay_out(specs: &[TensorSpec], max_shard_bytes: u64) -> Result<Vec<ShardLayout>> {
    let mut names = HashSet::new();
    let mut groups: Vec<(Vec<usize>, u64)> = Vec::new();
    let mut sizes = Vec::with_capacity(specs.len());
    for (position, spec) in specs.iter().enumerate() {
        let invalid = |reason: String| Err(Error::InvalidTensorSpec { tensor: spec.name.clone(), reason });
        if spec.name == "__metadata__" {
            return invalid("the name is reserved by safetensors".to_string());
        }
        if !names.insert(spec.name.as_str()) {
            return invalid("the name occurs twice".to_string());
        }
        // Bounded as file sizes are, so that sums over tensors cannot overflow before memory runs out.
        let bytes = tensor_bytes(spec.dtype, &spec.shape).filter(|bytes| *bytes <= i64::MAX as u64);
        let Some(bytes) = bytes else {
            return invalid(format!("{:?} of shape {:?} is not a whole number of bytes", spec.dtype, spec.shape));
        };
        sizes.push(bytes);
        match groups.last_mut() {
            Some((group, filled)) if filled.saturating_add(bytes) <= max_shard_bytes => {
                group.push(position);
                *filled += bytes;
            }
            _ => groups.push((vec![position], bytes)),
        }
    }
    let count = groups.len();
    let shards = groups.into_iter().enumerate().map(|(number, (group, _))| {
        let file = match count {
            1 => SINGLE_FILE.to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        lay_out_shard(file, group, specs, &sizes)
    });
    Ok(shards.collect())
}

fn lay_out_shard(file: String, mut group: Vec<usize>, specs: &[TensorSpec], sizes: &[u64]) -> ShardLayout {
    // Widest elements first, as the safetensors library orders them: readers view tensors in place and need alignment.
    group.sort_by_key(|position| std::cmp::Reverse(specs[*position].dtype.bitsize()));
    let mut entries = Map::new();
    entries.insert("__metadata__".to_string(), json!({"format": "pt"}));
    let mut end = 0u64;
    let mut tensors = Vec::with_capacity(group.len());
    for position in group {
        let (spec, bytes) = (&specs[position], sizes[position]);
        let (begin, dtype) = (end, spec.dtype.to_string());
        end += bytes;
        entries.insert(spec.name.clone(), json!({"dtype": dtype, "shape": spec.shape, "data_offsets": [begin, end]}));
        tensors.push(Placed { spec: position, begin, bytes });
    }
    let mut json = Value::Object(entries).to_string().into_bytes();
    // Spaces are allowed after the JSON; with them the data starts at a multiple of 8.
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = Vec::with_capacity(LENGTH_BYTES + json.len());
    header.extend_from_slice(&(json.len() as u64).to_le_bytes());
    header.extend_from_slice(&json);
    let data_start = header.len() as u64;
    tensors.iter_mut().for_each(|tensor| tensor.begin += data_start);
    ShardLayout { file, file_bytes: data_start + end, header, tensors }
}

impl ShardLayout {
    /// Whether `path` is this shard, complete. The data is trusted: a shard gets its name only after it was synced.
    pub fn is_complete(&self, path: &Path) -> bool {
        let start = || -> std::io::Result<bool> {
            use std::io::Read;
            let mut file = std::fs::File::open(path)?;
            if file.metadata()?.len() != self.file_bytes {
                return Ok(false);
            }
            let mut header = vec![0; self.header.len()];
            file.read_exact(&mut header)?;
            Ok(header == self.header)
        };
        start().unwrap_or(false)
    }
}

/// Content of the index of several shards.
pub(crate) fn index(specs: &[TensorSpec], shards: &[ShardLayout]) -> Value {
    let (bytes, parameters) = totals(specs, shards);
    let places =
        shards.iter().flat_map(|shard| shard.tensors.iter().map(|t| (specs[t.spec].name.clone(), &shard.file)));
    let mut places: Vec<_> = places.collect();
    places.sort();
    let weight_map: Map<String, Value> = places.into_iter().map(|(name, file)| (name, json!(file))).collect();
    json!({"metadata": {"total_parameters": parameters, "total_size": bytes}, "weight_map": weight_map})
}

/// Bytes and elements of all tensors.
pub(crate) fn totals(specs: &[TensorSpec], shards: &[ShardLayout]) -> (u64, u64) {
    let bytes = shards.iter().flat_map(|shard| &shard.tensors).map(|tensor| tensor.bytes).sum();
    let elements = |spec: &TensorSpec| spec.shape.iter().map(|size| *size as u64).product::<u64>();
    (bytes, specs.iter().map(elements).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> TensorSpec {
        TensorSpec { name: name.to_string(), dtype, shape: shape.to_vec() }
    }

    #[test]
    fn shards_fill_in_order_and_a_large_tensor_gets_its_own() {
        let specs = [
            spec("a", Dtype::U8, &[4]),
            spec("b", Dtype::U8, &[6]),
            spec("c", Dtype::U8, &[25]),
            spec("d", Dtype::U8, &[1]),
        ];
        let shards = lay_out(&specs, 10).unwrap();
        let groups: Vec<Vec<usize>> = shards.iter().map(|s| s.tensors.iter().map(|t| t.spec).collect()).collect();
        assert_eq!(groups, [vec![0, 1], vec![2], vec![3]]);
        assert_eq!(shards[1].file, "model-00002-of-00003.safetensors");
        let index = index(&specs, &shards);
        assert_eq!(index["metadata"], json!({"total_parameters": 36, "total_size": 36}));
        assert_eq!(lay_out(&specs, 1000).unwrap()[0].file, "model.safetensors");
    }

    #[test]
    fn wide_elements_stay_aligned() {
        let specs = [
            spec("a", Dtype::U8, &[3]),
            spec("b", Dtype::F32, &[1]),
            spec("c", Dtype::BF16, &[5]),
            spec("d", Dtype::F64, &[1]),
        ];
        for tensor in &lay_out(&specs, 1000).unwrap()[0].tensors {
            assert_eq!(tensor.begin % (specs[tensor.spec].dtype.bitsize() as u64 / 8), 0);
        }
    }

    #[test]
    fn headers_read_back() {
        let specs = [spec("a", Dtype::BF16, &[2, 0]), spec("b\"\u{e9}", Dtype::F32, &[]), spec("c", Dtype::I64, &[2])];
        let shard = &lay_out(&specs, 1000).unwrap()[0];
        let mut file = shard.header.clone();
        file.resize(shard.file_bytes as usize, 7);
        let read = crate::header::parse(Path::new("x"), &file).unwrap();
        let mut names: Vec<_> = read.iter().map(|t| (t.name.as_str(), t.dtype, t.shape.clone())).collect();
        names.sort_by(|a, b| a.0.cmp(b.0));
        assert_eq!(
            names,
            [("a", Dtype::BF16, vec![2, 0]), ("b\"\u{e9}", Dtype::F32, vec![]), ("c", Dtype::I64, vec![2])]
        );
        assert_eq!(safetensors::SafeTensors::deserialize(&file).unwrap().len(), 3);
    }

    #[test]
    fn impossible_specs_are_named() {
        let message = |specs: &[TensorSpec]| lay_out(specs, 10).err().unwrap().to_string();
        assert!(message(&[spec("x", Dtype::U8, &[1]), spec("x", Dtype::U8, &[1])]).contains("`x`"));
        assert!(message(&[spec("__metadata__", Dtype::U8, &[1])]).contains("reserved"));
        assert!(message(&[spec("y", Dtype::F32, &[usize::MAX, 2])]).contains("`y`"));
    }
}

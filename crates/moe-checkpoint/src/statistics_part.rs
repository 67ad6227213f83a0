//! What one layer added to the statistics of a wave in progress, and its file.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::artifact_file::{Kind, OutTensor, TensorFile, Tensors, tensor_bytes};
use crate::statistics::tensor_name;
use crate::{ArrayKind, Error, Result, Statistics, write_renamed};

const PART: Kind = Kind { name: "statistics of a layer", key: "moe.statistics.part", version: 1 };

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Meta {
    version: u64,
    layer: usize,
    /// Rows of the matrices in the file.
    matrices: BTreeMap<String, usize>,
    /// Of all values.
    digest: String,
}

impl Statistics {
    /// Writes what decoder layer `layer` has of the arrays, in f64, and the matrices that were added to since the last
    /// such call: what has changed while the layer was seen, for a wave that is gone on with in its middle. The file is
    /// [renamed](write_renamed), not synced.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save_part(&mut self, layer: usize, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let position = self.shape.position(layer);
        let mut hasher = blake3::Hasher::new();
        let (mut tensors, mut matrices): (Vec<OutTensor>, _) = (Vec::new(), BTreeMap::new());
        for (id, array) in &mut self.arrays {
            let (name, dims, values) = match (array.kind, position) {
                (ArrayKind::Matrix { columns, .. }, _) if std::mem::take(&mut array.touched) => {
                    let values = array.layers[0].as_slice();
                    let rows = values.len() / columns.max(1);
                    matrices.insert(id.clone(), rows);
                    (id.clone(), vec![rows, columns], values)
                }
                (ArrayKind::Matrix { .. }, _) | (_, None) => continue,
                (kind, Some(position)) => {
                    let dims = kind.dims(&self.shape, &self.shape.layers[position]);
                    (tensor_name(id, layer), dims, array.layers[position].as_slice())
                }
            };
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            hasher.update(&bytes);
            tensors.push((name, Dtype::F64, dims, bytes));
        }
        let digest = hasher.finalize().to_hex().to_string();
        let bytes = tensor_bytes(path, PART, &Meta { version: PART.version, layer, matrices, digest }, &tensors)?;
        write_renamed(path, &[&bytes]).map_err(|source| Error::Io { path: path.to_path_buf(), source })
    }

    /// Takes what a file of [`Statistics::save_part`] has in place of what is here. The arrays must be allocated.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::MalformedArtifact`] for a file of another layer or other arrays, or one that was cut
    /// short.
    pub fn load_part(&mut self, layer: usize, path: impl AsRef<Path>) -> Result<()> {
        let file = TensorFile::read(path.as_ref(), PART)?;
        let (meta, tensors): (Meta, Tensors<'_>) = file.parse()?;
        if meta.layer != layer {
            return Err(tensors.malformed(format!("layer {}, expected {layer}", meta.layer)));
        }
        if let Some(id) = meta.matrices.keys().find(|id| !self.arrays.contains_key(*id)) {
            return Err(tensors.malformed(format!("holds statistic `{id}`, which is not collected")));
        }
        let position = self.shape.position(layer);
        let mut hasher = blake3::Hasher::new();
        let mut read = Vec::new();
        for (id, array) in &self.arrays {
            let (name, dims, place) = match (array.kind, position, meta.matrices.get(id)) {
                (ArrayKind::Matrix { columns, .. }, _, Some(rows)) => (id.clone(), vec![*rows, columns], 0),
                (ArrayKind::Matrix { .. }, _, None) | (_, None, _) => continue,
                (kind, Some(position), _) => {
                    (tensor_name(id, layer), kind.dims(&self.shape, &self.shape.layers[position]), position)
                }
            };
            let values = tensors.f64(&name, &dims)?;
            hasher.update(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>());
            read.push((id.clone(), place, values));
        }
        if tensors.len() != read.len() || hasher.finalize().to_hex().as_str() != meta.digest {
            return Err(tensors.malformed("not what was written"));
        }
        for (id, place, values) in read {
            if let Some(array) = self.arrays.get_mut(&id) {
                array.layers[place] = values;
            }
        }
        Ok(())
    }
}

//! Files of tensors that are written and read one tensor at a time, so that memory holds nothing twice.

use std::fs::{self, File};
use std::path::Path;

use moe_checkpoint::SafetensorsFile;
use safetensors::tensor::{Dtype, TensorView};

use crate::error::{Error, Result};

/// Suffix of a file that is being written.
pub(super) const TEMPORARY: &str = ".tmp";

/// Values of a tensor to write.
#[derive(Clone, Copy)]
pub(super) enum Values<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
}

/// Writes a safetensors file under another name, syncs it, and gives it its name.
pub(super) fn write(path: &Path, tensors: &[(String, Vec<usize>, Values<'_>)]) -> Result<u64> {
    let temporary = path.with_added_extension(&TEMPORARY[1..]);
    let mut views = Vec::with_capacity(tensors.len());
    for (name, shape, values) in tensors {
        let (dtype, bytes): (_, &[u8]) = match values {
            Values::F32(values) => (Dtype::F32, bytemuck::cast_slice(values)),
            Values::F64(values) => (Dtype::F64, bytemuck::cast_slice(values)),
        };
        let view = TensorView::new(dtype, shape.clone(), bytes)
            .map_err(|error| Error::state(path, name, error, format!("values of shape {shape:?}")))?;
        views.push((name, view));
    }
    safetensors::serialize_to_file(views, None, &temporary)
        .map_err(|error| Error::io(&temporary)(std::io::Error::other(error)))?;
    let sync = || -> std::io::Result<u64> {
        let file = File::open(&temporary)?;
        file.sync_all()?;
        let bytes = file.metadata()?.len();
        fs::rename(&temporary, path)?;
        // Not every file system lets a directory be synced.
        path.parent().map(|parent| File::open(parent).and_then(|directory| directory.sync_all()));
        Ok(bytes)
    };
    sync().map_err(Error::io(path))
}

/// The values of a tensor of this shape.
pub(super) fn f32(file: &SafetensorsFile, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    check(file, name, Dtype::F32, shape)?;
    Ok(file.f32(name)?)
}

/// The values of an F64 tensor of this shape.
pub(super) fn f64(file: &SafetensorsFile, name: &str, shape: &[usize]) -> Result<Vec<f64>> {
    check(file, name, Dtype::F64, shape)?;
    Ok(file.f64(name)?)
}

fn check(file: &SafetensorsFile, name: &str, dtype: Dtype, shape: &[usize]) -> Result<()> {
    let found = file.tensor(name)?;
    if (found.dtype, found.shape.as_slice()) != (dtype, shape) {
        let (found, expected) = (format!("{:?} {:?}", found.dtype, found.shape), format!("{dtype:?} {shape:?}"));
        return Err(Error::state(file.path(), name, found, expected));
    }
    Ok(())
}

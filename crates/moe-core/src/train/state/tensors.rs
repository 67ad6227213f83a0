//! Files of tensors that are written and read one tensor at a time, so that memory holds nothing twice.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fs::{self, File};
use std::path::Path;

use moe_checkpoint::{SafetensorsFile, write_safetensors};
use safetensors::tensor::{Dtype, View};

use crate::error::{Error, Result};
use crate::train::Parameter;

/// Suffix of a file that is being written.
pub(super) const TEMPORARY: &str = ".tmp";

/// Values of a tensor to write.
#[derive(Clone, Copy)]
pub(super) enum Values<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
    /// Those of a parameter, which are read when it is their turn if they are not in memory.
    Of(&'a Parameter),
}

/// A tensor that is written.
struct Tensor<'a> {
    shape: &'a [usize],
    values: Values<'a>,
    /// Why values could not be read: the writer knows no errors.
    failed: &'a RefCell<Option<Error>>,
}

impl View for Tensor<'_> {
    fn dtype(&self) -> Dtype {
        match self.values {
            Values::F64(_) => Dtype::F64,
            Values::F32(_) | Values::Of(_) => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = match self.values {
            Values::F32(values) => return bytemuck::cast_slice(values).into(),
            Values::F64(values) => return bytemuck::cast_slice(values).into(),
            Values::Of(parameter) => parameter.read(),
        };
        match values {
            Ok(Cow::Borrowed(values)) => bytemuck::cast_slice(values).into(),
            Ok(Cow::Owned(values)) => bytemuck::cast_slice(&values).to_vec().into(),
            Err(error) => {
                self.failed.borrow_mut().get_or_insert(error);
                vec![0; self.data_len()].into()
            }
        }
    }

    fn data_len(&self) -> usize {
        match self.values {
            Values::F32(values) => 4 * values.len(),
            Values::F64(values) => 8 * values.len(),
            Values::Of(parameter) => 4 * parameter.len(),
        }
    }
}

/// Writes a safetensors file under another name, syncs it, and gives it its name.
pub(super) fn write(path: &Path, tensors: &[(String, Vec<usize>, Values<'_>)]) -> Result<u64> {
    let temporary = path.with_added_extension(&TEMPORARY[1..]);
    let failed = RefCell::new(None);
    let mut views = Vec::with_capacity(tensors.len());
    for (name, shape, values) in tensors {
        let tensor = Tensor { shape, values: *values, failed: &failed };
        if tensor.data_len() != shape.iter().product::<usize>() * tensor.dtype().bitsize() / 8 {
            let found = format!("{} bytes", tensor.data_len());
            return Err(Error::state(path, name, found, format!("values of shape {shape:?}")));
        }
        views.push((name.clone(), tensor));
    }
    let file = File::create(&temporary).map_err(Error::io(&temporary))?;
    let bytes = write_safetensors(&file, views, None).map_err(Error::io(&temporary))?;
    if let Some(error) = failed.take() {
        return Err(error);
    }
    let sync = || -> std::io::Result<u64> {
        file.sync_all()?;
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
        let (found, expected) = (format!("{:?} {:?}", found.dtype, found.shape), format!("{dtype} {shape:?}"));
        return Err(Error::state(file.path(), name, found, expected));
    }
    Ok(())
}

//! Layer inputs waiting for the backward sweep, in memory or in a file.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use burn::tensor::{Device, Tensor};

use crate::{
    error::{Error, Result},
    host::{self, HostView},
};

/// Tensors put in by index and taken out again. The file is anonymous: it disappears with the process.
#[derive(Debug)]
pub(crate) struct HiddenStore {
    slots: Vec<Option<Slot>>,
    file: Option<Spill>,
    /// Where in the file each slot was last, and how many bytes it had: its place for the next tensor.
    places: Vec<Option<(u64, u64)>>,
}

#[derive(Debug)]
struct Spill {
    dir: PathBuf,
    file: File,
    end: u64,
}

#[derive(Debug)]
enum Slot {
    Memory(Box<Tensor<2>>),
    File { at: u64, shape: [usize; 2], device: Device },
}

impl HiddenStore {
    /// A store of `slots` tensors; in a file in `spill_dir` if given.
    pub fn new(slots: usize, spill_dir: Option<&Path>) -> Result<Self> {
        let file = match spill_dir {
            Some(dir) => Some(Spill {
                file: tempfile::tempfile_in(dir).map_err(|source| Error::Spill { dir: dir.into(), source })?,
                dir: dir.into(),
                end: 0,
            }),
            None => None,
        };
        Ok(Self { slots: (0..slots).map(|_| None).collect(), file, places: vec![None; slots] })
    }

    pub fn put(&mut self, slot: usize, tensor: Tensor<2>) -> Result<()> {
        self.slots[slot] = Some(match &mut self.file {
            None => Slot::Memory(Box::new(tensor)),
            Some(spill) => {
                let view = HostView::new(&tensor);
                let bytes: &[u8] = bytemuck::cast_slice(view.as_slice());
                let size = bytes.len() as u64;
                let at = match self.places[slot] {
                    Some((at, room)) if room >= size => at,
                    _ => {
                        spill.end += size;
                        self.places[slot] = Some((spill.end - size, size));
                        spill.end - size
                    }
                };
                spill
                    .file
                    .seek(SeekFrom::Start(at))
                    .and_then(|_| spill.file.write_all(bytes))
                    .map_err(|source| Error::Spill { dir: spill.dir.clone(), source })?;
                Slot::File { at, shape: tensor.dims(), device: tensor.device() }
            }
        });
        Ok(())
    }

    /// Empties a slot.
    pub fn take(&mut self, slot: usize) -> Result<Tensor<2>> {
        let tensor = self.get(slot)?;
        self.slots[slot] = None;
        Ok(tensor)
    }

    /// A copy of what is in a slot.
    pub fn get(&mut self, slot: usize) -> Result<Tensor<2>> {
        match self.slots[slot].as_ref().expect("each slot is put before it is read") {
            Slot::Memory(tensor) => Ok(Tensor::clone(tensor)),
            Slot::File { at, shape, device } => {
                let spill = self.file.as_mut().expect("file slots come from a file");
                let mut values = vec![0.0f32; shape[0] * shape[1]];
                spill
                    .file
                    .seek(SeekFrom::Start(*at))
                    .and_then(|_| spill.file.read_exact(bytemuck::cast_slice_mut(&mut values)))
                    .map_err(|source| Error::Spill { dir: spill.dir.clone(), source })?;
                Ok(host::from_vec(values, *shape, device))
            }
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, pattern};

    #[test]
    fn memory_and_file_give_back_what_was_put() {
        let dir = tempfile::tempdir().unwrap();
        for spill in [None, Some(dir.path())] {
            let mut store = HiddenStore::new(3, spill).unwrap();
            for i in [2, 0, 1] {
                store.put(i, pattern([i + 1, 7], i as u32)).unwrap();
            }
            for i in [1, 2, 0] {
                assert_close(&store.get(i).unwrap(), &pattern([i + 1, 7], i as u32), 0.0);
                assert_close(&store.take(i).unwrap(), &pattern([i + 1, 7], i as u32), 0.0);
            }
            // a slot is filled again: smaller in its place, larger in a new one
            for (slot, rows) in [(1, 1), (0, 4)] {
                store.put(slot, pattern([rows, 7], 9)).unwrap();
            }
            store.put(2, pattern([3, 7], 5)).unwrap();
            for (slot, rows, seed) in [(1, 1, 9), (0, 4, 9), (2, 3, 5)] {
                assert_close(&store.take(slot).unwrap(), &pattern([rows, 7], seed), 0.0);
            }
            if let Some(file) = &store.file {
                assert_eq!(file.end, 4 * 7 * (1 + 2 + 3 + 4));
            }
        }
    }

    #[test]
    fn a_missing_spill_directory_is_named() {
        let error = HiddenStore::new(1, Some(Path::new("/nonexistent/spill"))).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/spill"), "{error}");
    }
}

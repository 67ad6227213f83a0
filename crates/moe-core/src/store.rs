//! Layer inputs waiting for the backward sweep: in memory, in an anonymous file, or in files that another process can
//! go on with.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use burn::tensor::{Device, Tensor};

use crate::{
    error::{Error, Result},
    host::{self, HostView},
    wave_files::{Part, WaveFiles, Writer, load},
};

/// Tensors put in by index and taken out again. The file is anonymous: it disappears with the process.
#[derive(Debug)]
pub(crate) struct HiddenStore {
    slots: Vec<Option<Slot>>,
    file: Option<Spill>,
    /// Files that stay, one by slot, and whether what is in them stays in memory, too.
    named: Option<(Arc<WaveFiles>, bool)>,
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
    Named { part: Part, device: Device, by: Writer },
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
        Ok(Self { slots: (0..slots).map(|_| None).collect(), file, named: None, places: vec![None; slots] })
    }

    /// A store of `slots` tensors with a file of a wave for each, which outlive the process. `in_memory`: what is put
    /// in need not be read back, and its files are written beside the work that follows.
    pub fn named(slots: usize, files: Arc<WaveFiles>, in_memory: bool) -> Self {
        let named = Some((files, in_memory));
        Self { slots: (0..slots).map(|_| None).collect(), file: None, named, places: vec![None; slots] }
    }

    /// Fills a slot of a store of files with `part`, whose file is there: its tensor, if this process wrote it.
    pub fn adopt(&mut self, slot: usize, part: Part, tensor: Option<Tensor<2>>, device: &Device) {
        let in_memory = self.named.as_ref().is_some_and(|(_, in_memory)| *in_memory);
        let by = if tensor.is_some() { Writer::This } else { Writer::Earlier };
        self.slots[slot] = Some(match tensor.filter(|_| in_memory) {
            Some(tensor) => Slot::Memory(Box::new(tensor)),
            None => Slot::Named { part, device: device.clone(), by },
        });
    }

    /// Writes a tensor to the file of `part`, and fills the slot with it.
    pub fn put_named(&mut self, slot: usize, part: Part, tensor: Tensor<2>) -> Result<()> {
        let (files, in_memory) = self.named.as_ref().expect("a store of files");
        files.save(part, &tensor)?;
        if !in_memory {
            files.finish()?;
        }
        let device = tensor.device();
        self.adopt(slot, part, Some(tensor), &device);
        Ok(())
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
            Slot::Named { part, device, by } => {
                let (files, _) = self.named.as_ref().expect("named slots are of a store of files");
                files.finish()?;
                let dir = files.directory();
                load(&part.path(dir), *by, device).map_err(|source| Error::Spill { dir: dir.into(), source })
            }
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

//! The files of a wave in progress, written beside the arithmetic.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, SyncSender},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use burn::tensor::{Device, Tensor};
use moe_checkpoint::write_renamed;

use crate::{
    error::{Error, Result},
    host::{self, HostView},
};

/// A tensor of a wave in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Input of a layer.
    Input(usize),
    /// Input of the feed-forward half of a layer.
    Middle(usize),
    /// Gradient at the input of a layer.
    Gradient(usize),
    /// A sum of blocks of a layer that a norm comes after, and which.
    Sum(usize, usize),
}

impl Part {
    /// Its file.
    pub fn path(self, dir: &Path) -> PathBuf {
        let (name, layer) = match self {
            Self::Input(layer) => ("input", layer),
            Self::Middle(layer) => ("middle", layer),
            Self::Gradient(layer) => ("gradient", layer),
            Self::Sum(layer, which) => return dir.join(format!("sum-{layer:04}-{which}.f32")),
        };
        dir.join(format!("{name}-{layer:04}.f32"))
    }
}

/// Bytes before the values of a tensor's file: rows, columns, checksum.
const HEADER: usize = 8 + 8 + 32;

/// Writes a tensor and its checksum.
fn save(path: &Path, tensor: &Tensor<2>) -> io::Result<()> {
    let view = HostView::new(tensor);
    let bytes: &[u8] = bytemuck::cast_slice(view.as_slice());
    let [rows, columns] = tensor.dims().map(|n| (n as u64).to_le_bytes());
    write_renamed(path, &[&rows, &columns, blake3::hash(bytes).as_bytes(), bytes])
}

/// Whether a file is as long as it says.
pub(crate) fn is_whole(path: &Path) -> bool {
    let check = || -> io::Result<bool> {
        let mut file = File::open(path)?;
        let mut header = [0; HEADER];
        file.read_exact(&mut header)?;
        let [rows, columns] = shape(&header);
        let values = rows.checked_mul(columns).and_then(|n| n.checked_mul(4));
        Ok(values.is_some_and(|bytes| file.metadata().is_ok_and(|found| found.len() == (HEADER + bytes) as u64)))
    };
    check().unwrap_or(false)
}

/// Who wrote a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Writer {
    /// This process, so that it is what was written.
    This,
    /// One before it, of which a power cut may have left anything.
    Earlier,
}

/// Reads what [`save`] wrote.
pub(crate) fn load(path: &Path, by: Writer, device: &Device) -> io::Result<Tensor<2>> {
    let wrong = || {
        let advice = "delete the directory to begin the wave anew";
        io::Error::new(io::ErrorKind::InvalidData, format!("{} is not what was written; {advice}", path.display()))
    };
    let mut file = File::open(path)?;
    let mut header = [0; HEADER];
    file.read_exact(&mut header)?;
    if !is_whole(path) {
        return Err(wrong());
    }
    let [rows, columns] = shape(&header);
    let mut values = vec![0.0f32; rows * columns];
    file.read_exact(bytemuck::cast_slice_mut(&mut values))?;
    if by == Writer::Earlier && blake3::hash(bytemuck::cast_slice(&values)).as_bytes() != &header[16..] {
        return Err(wrong());
    }
    Ok(host::from_vec(values, [rows, columns], device))
}

fn shape(header: &[u8; HEADER]) -> [usize; 2] {
    [0, 8].map(|at| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[at..at + 8]);
        u64::from_le_bytes(bytes) as usize
    })
}

/// Tensors that may wait to be written; one more is being written.
const WAITING: usize = 1;

/// Writes and deletes files of a directory in a thread of its own, in the order asked for: a file that is there says
/// that all before it are. What fails is an error of a later call, and nothing after it is written. Dropping it waits
/// for what was asked for.
pub(crate) struct WaveFiles {
    dir: PathBuf,
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
    failed: Mutex<Receiver<io::Error>>,
    unwanted: Arc<AtomicBool>,
}

enum Job {
    Tensor(PathBuf, Box<Tensor<2>>),
    Bytes(PathBuf, Vec<u8>),
    Delete(PathBuf),
    /// What comes before then waits for it, and for nothing else.
    Hold(Instant),
    /// Says that all before it is done.
    Reached(mpsc::Sender<()>),
}

impl Job {
    fn run(self) -> io::Result<()> {
        match self {
            Self::Tensor(path, tensor) => save(&path, &tensor),
            Self::Bytes(path, bytes) => write_renamed(path, &[&bytes]),
            Self::Delete(path) => {
                // What cannot be deleted is only in the way of other files.
                let _ = fs::remove_file(path);
                Ok(())
            }
            Self::Hold(_) => Ok(()),
            Self::Reached(waiting) => {
                let _ = waiting.send(());
                Ok(())
            }
        }
    }

    fn makes(&self, file: &Path) -> bool {
        matches!(self, Self::Tensor(path, _) | Self::Bytes(path, _) if path == file)
    }
}

/// Jobs that wait until a time, less the files that are deleted before it.
struct Held {
    until: Instant,
    jobs: Vec<Job>,
}

impl Held {
    /// What is to be done now that there is this job, in order.
    fn add(&mut self, job: Job) -> Vec<Job> {
        let waits = Instant::now() < self.until;
        match job {
            Job::Hold(until) => self.until = until,
            Job::Delete(file) if waits && self.jobs.iter().any(|job| job.makes(&file)) => {
                self.jobs.retain(|job| !job.makes(&file));
            }
            Job::Reached(_) => {
                self.jobs.push(job);
                return std::mem::take(&mut self.jobs);
            }
            job => self.jobs.push(job),
        }
        if waits { Vec::new() } else { std::mem::take(&mut self.jobs) }
    }
}

impl WaveFiles {
    /// In this directory, which is there.
    pub fn new(dir: PathBuf) -> Self {
        let (jobs, queue) = mpsc::sync_channel(WAITING);
        let (fails, failed) = mpsc::channel();
        let unwanted = Arc::new(AtomicBool::new(false));
        let dropped = unwanted.clone();
        let thread = std::thread::spawn(move || {
            let mut broken = false;
            let mut run = |job: Job| {
                if broken && !matches!(job, Job::Reached(_)) {
                    return;
                }
                if let Err(error) = job.run() {
                    broken = true;
                    let _ = fails.send(error);
                }
            };
            let mut held = Held { until: Instant::now(), jobs: Vec::new() };
            for job in queue {
                held.add(job).into_iter().for_each(&mut run);
            }
            if !dropped.load(Ordering::Relaxed) {
                held.jobs.into_iter().for_each(run);
            }
        });
        Self { dir, jobs: Some(jobs), thread: Some(thread), failed: Mutex::new(failed), unwanted }
    }

    /// Lets what is asked for wait so long, unless somebody [waits](Self::finish) for it: tensors stay in memory until
    /// then, and files that are deleted before it are never written.
    ///
    /// # Errors
    /// [`Error::Spill`] for a file asked for earlier.
    pub fn hold(&self, time: Duration) -> Result<()> {
        self.ask(Job::Hold(Instant::now() + time))
    }

    /// Nobody wants what still waits.
    pub fn forget(&self) {
        self.unwanted.store(true, Ordering::Relaxed);
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.dir
    }

    /// Asks for a tensor's file.
    ///
    /// # Errors
    /// [`Error::Spill`] for a file asked for earlier.
    pub fn save(&self, part: Part, tensor: &Tensor<2>) -> Result<()> {
        self.ask(Job::Tensor(part.path(&self.dir), Box::new(tensor.clone())))
    }

    /// Asks for a file of bytes.
    ///
    /// # Errors
    /// [`Error::Spill`] for a file asked for earlier.
    pub fn write(&self, name: &str, bytes: Vec<u8>) -> Result<()> {
        self.ask(Job::Bytes(self.dir.join(name), bytes))
    }

    /// Asks for a tensor's file to be gone.
    ///
    /// # Errors
    /// [`Error::Spill`] for a file asked for earlier.
    pub fn delete(&self, part: Part) -> Result<()> {
        self.ask(Job::Delete(part.path(&self.dir)))
    }

    /// Waits until all that was asked for is done.
    ///
    /// # Errors
    /// [`Error::Spill`] for what failed.
    pub fn finish(&self) -> Result<()> {
        let (done, reached) = mpsc::channel();
        self.ask(Job::Reached(done))?;
        let _ = reached.recv();
        self.check()
    }

    fn ask(&self, job: Job) -> Result<()> {
        self.check()?;
        let gone =
            || Error::Spill { dir: self.dir.clone(), source: io::Error::other("the thread that writes is gone") };
        self.jobs.as_ref().ok_or_else(gone)?.send(job).map_err(|_| gone())
    }

    fn check(&self) -> Result<()> {
        match self.failed.lock().unwrap_or_else(PoisonError::into_inner).try_recv() {
            Ok(source) => Err(Error::Spill { dir: self.dir.clone(), source }),
            Err(_) => Ok(()),
        }
    }
}

impl Drop for WaveFiles {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for WaveFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WaveFiles").field("dir", &self.dir).finish_non_exhaustive()
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        kernels::testing::{assert_close, pattern},
        store::HiddenStore,
    };

    #[test]
    fn files_of_a_wave_in_progress_give_back_what_was_put_and_tell_what_is_broken() {
        let dir = tempfile::tempdir().unwrap();
        let device = pattern([1, 1], 0).device();
        let files = || Arc::new(WaveFiles::new(dir.path().into()));
        for in_memory in [true, false] {
            let mut store = HiddenStore::named(2, files(), in_memory);
            store.put_named(1, Part::Middle(3), pattern([2, 5], 1)).unwrap();
            assert_close(&store.take(1).unwrap(), &pattern([2, 5], 1), 0.0);
            drop(store);
            let mut another = HiddenStore::named(2, files(), in_memory);
            another.adopt(0, Part::Middle(3), None, &device);
            assert_close(&another.get(0).unwrap(), &pattern([2, 5], 1), 0.0);
        }
        let path = Part::Middle(3).path(dir.path());
        let whole = fs::read(&path).unwrap();
        assert!(is_whole(&path) && !is_whole(&dir.path().join("none")));
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert!(!is_whole(&path));
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        fs::write(&path, &flipped).unwrap();
        assert!(is_whole(&path));
        let error = load(&path, Writer::Earlier, &device).unwrap_err().to_string();
        assert!(error.contains("middle-0003.f32 is not what was written"), "{error}");
    }

    #[test]
    fn files_that_wait_are_written_where_they_are_waited_for_and_where_the_work_stops_and_else_not_at_all() {
        let names = |dir: &Path| -> Vec<String> {
            let entries = fs::read_dir(dir).unwrap();
            entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
        };
        let held = |dir: &Path| {
            let files = WaveFiles::new(dir.into());
            files.hold(Duration::from_secs(3600)).unwrap();
            for layer in 0..3 {
                files.save(Part::Gradient(layer), &pattern([3, 2], 0)).unwrap();
                if layer > 0 {
                    files.delete(Part::Gradient(layer - 1)).unwrap();
                }
            }
            files
        };
        let dir = tempfile::tempdir().unwrap();
        let files = held(dir.path());
        files.forget();
        drop(files);
        assert!(names(dir.path()).is_empty(), "nobody wants them");
        drop(held(dir.path()));
        assert_eq!(names(dir.path()), ["gradient-0002.f32"], "the work has stopped");
        fs::remove_file(Part::Gradient(2).path(dir.path())).unwrap();
        let files = held(dir.path());
        files.finish().unwrap();
        assert_eq!(names(dir.path()), ["gradient-0002.f32"], "waited for");
        files.delete(Part::Gradient(2)).unwrap();
        files.hold(Duration::ZERO).unwrap();
        files.save(Part::Middle(1), &pattern([3, 2], 0)).unwrap();
        drop(files);
        assert_eq!(names(dir.path()), ["middle-0001.f32"], "the time is over, and a file that was there is gone");
    }

    #[test]
    fn files_are_made_and_deleted_in_order_and_a_failure_is_told_once_and_ends_the_writing() {
        let dir = tempfile::tempdir().unwrap();
        let files = WaveFiles::new(dir.path().into());
        for layer in 0..4 {
            files.save(Part::Gradient(layer), &pattern([3, 2], 0)).unwrap();
            if layer > 0 {
                files.delete(Part::Gradient(layer - 1)).unwrap();
            }
        }
        files.finish().unwrap();
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["gradient-0003.f32"]);
        fs::create_dir(Part::Input(1).path(dir.path()).with_extension("tmp")).unwrap();
        files.save(Part::Input(1), &pattern([3, 2], 0)).unwrap();
        let error = files.finish().unwrap_err().to_string();
        assert!(error.contains(&dir.path().display().to_string()), "{error}");
        files.save(Part::Input(2), &pattern([3, 2], 0)).unwrap();
        files.finish().unwrap();
        assert!(!is_whole(&Part::Input(2).path(dir.path())));
    }
}

//! A directory of statistics, one file per wave: what makes collecting resumable and shardable.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::artifact_file::{Kind, TEMPORARY_SUFFIX, parse_versioned, write_atomic};
use crate::group::Group;
use crate::output_dir::lock_directory;
use crate::{Error, MoeShape, Provenance, Result, Statistics};

const STORE: Kind = Kind { name: "statistics store", key: "", version: 1 };
const STORE_FILE: &str = "store.json";
const UNFINISHED: &str = "unfinished-";
const MARK: &str = ".group-";

/// A directory with `store.json` and one file per finished wave, `wave-000003.safetensors`, values rounded to f32.
///
/// [`StatisticsStore::fold`] always goes wave by wave in ascending id and adds in f64. Hence the waves of N processes,
/// brought together by [`StatisticsStore::absorb`], fold to the same bits as those of one process, and a collection
/// resumed after a kill to those of one that ran through. Every file is written atomically; what a killed process left
/// half written is ignored and removed by the next [`StatisticsStore::create_or_resume`].
///
/// One process writes to a store at a time, for which it is locked, or one [group](StatisticsStore::join) of processes;
/// others that share the work have a store each.
/// What a run has left of a wave in progress is in a directory of its own ([`StatisticsStore::unfinished`]), which no
/// other store takes over.
///
/// ```
/// use moe_checkpoint::{Fold, MoeLayerShape, MoeShape, Provenance, Statistics, StatisticsStore};
///
/// # let directory = tempfile::tempdir().unwrap();
/// # let directory = directory.path().join("statistics");
/// let shape = MoeShape { gateless: false, hidden_size: 4, top_k: 1, layers: vec![MoeLayerShape { layer: 0, widths: vec![2] }] };
/// let provenance = Provenance::new("model", "data", "{}");
/// let mut store = StatisticsStore::create_or_resume(&directory, &shape, &provenance)?;
/// for wave in (0..3).filter(|wave| !store.waves().contains(wave)).collect::<Vec<_>>() {
///     let mut statistics = Statistics::new(&shape, provenance.clone());
///     statistics.begin(wave);
///     statistics.unit_mut("fisher", Fold::Sum, 0, 0)?[1] += 0.25;
///     store.write(&statistics)?;
/// }
/// assert_eq!(store.fold()?.unit("fisher", 0, 0)?, [0.0, 0.75]);
/// # Ok::<(), moe_checkpoint::Error>(())
/// ```
#[derive(Debug)]
pub struct StatisticsStore {
    directory: PathBuf,
    shape: MoeShape,
    provenance: Provenance,
    waves: BTreeSet<u64>,
    /// Holds the lock while it lives; none where the store is only read, or another rank of the group holds it.
    _lock: Option<File>,
    /// What shows the other ranks of a group that the store is theirs, too.
    _mark: Option<Mark>,
}

/// A file that goes when this does.
#[derive(Debug)]
struct Mark(PathBuf);

impl Drop for Mark {
    fn drop(&mut self) {
        // What is left is removed by the next run.
        fs::remove_file(&self.0).ok();
    }
}

#[derive(Serialize, Deserialize)]
struct StoreFile {
    version: u64,
    shape: MoeShape,
    provenance: Provenance,
}

impl StatisticsStore {
    /// Starts a store, or goes on with the one that is there, which must be of the same model, data and recipe.
    ///
    /// # Errors
    /// [`Error::ProvenanceMismatch`] or [`Error::InvalidShape`] if the directory holds another collection,
    /// [`Error::MalformedArtifact`] if it holds wave files but no `store.json`, [`Error::OutputBusy`] while another
    /// process writes to it, [`Error::Io`].
    pub fn create_or_resume(directory: impl AsRef<Path>, shape: &MoeShape, provenance: &Provenance) -> Result<Self> {
        let directory = directory.as_ref();
        shape.validate()?;
        fs::create_dir_all(directory).map_err(io(directory))?;
        if directory.join(STORE_FILE).exists() {
            Self::open(directory)?.expect(shape, provenance, &directory.display().to_string(), true)?;
            let lock = lock_directory(directory)?;
            remove_leftovers(directory)?;
            // What another process had finished before it let go is there now.
            let store = Self { _lock: Some(lock), ..Self::open(directory)? };
            if store.provenance.crate_version != provenance.crate_version {
                let (found, now) = (&store.provenance.crate_version, &provenance.crate_version);
                tracing::warn!(
                    "{}: begun by version {found}, resumed by {now}; waves may round differently",
                    directory.display()
                );
            }
            for wave in &store.waves {
                let left = store.unfinished(*wave);
                if left.exists() {
                    fs::remove_dir_all(&left).map_err(io(&left))?;
                }
            }
            return Ok(store);
        }
        if let Some((_, path)) = wave_files(directory)?.into_iter().next() {
            return Err(Error::malformed(&path, STORE.name, format!("a wave file without a {STORE_FILE} beside it")));
        }
        let lock = lock_directory(directory)?;
        remove_leftovers(directory)?;
        let file = StoreFile { version: STORE.version, shape: shape.clone(), provenance: provenance.clone() };
        let path = directory.join(STORE_FILE);
        let json = serde_json::to_vec_pretty(&file).map_err(|e| Error::malformed(&path, STORE.name, e.to_string()))?;
        write_atomic(&path, &json)?;
        Ok(Self {
            directory: directory.to_path_buf(),
            shape: file.shape,
            provenance: file.provenance,
            waves: BTreeSet::new(),
            _lock: Some(lock),
            _mark: None,
        })
    }

    /// As [`StatisticsStore::create_or_resume`], for all ranks of a group: they call it with the same name, which may
    /// be one directory that several or all of them see, or one on the disk of each. Of those that see the same one,
    /// the first holds the lock, and each writes other waves.
    ///
    /// # Errors
    /// Those of [`StatisticsStore::create_or_resume`], and [`Error::Rank`].
    pub fn join(
        group: &dyn Group,
        directory: impl AsRef<Path>,
        shape: &MoeShape,
        provenance: &Provenance,
    ) -> Result<Self> {
        let directory = directory.as_ref();
        if group.size() == 1 {
            return Self::create_or_resume(directory, shape, provenance);
        }
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let name = format!("{MARK}{}-{}{TEMPORARY_SUFFIX}", std::process::id(), now.as_nanos());
        let name = String::from_utf8_lossy(&group.broadcast(0, name.into_bytes())?).into_owned();
        let mark = directory.join(name);
        let mut store = None;
        // One after the other: each sees what those before it have made.
        for turn in 0..group.size() {
            if turn == group.rank() {
                store = Some(match mark.exists() {
                    true => {
                        let store = Self::open(directory)?;
                        store.expect(shape, provenance, &directory.display().to_string(), true)?;
                        store
                    }
                    false => {
                        let store = Self::create_or_resume(directory, shape, provenance)?;
                        File::create(&mark).map_err(io(&mark))?;
                        Self { _mark: Some(Mark(mark.clone())), ..store }
                    }
                });
            }
            group.check(None)?;
        }
        store.ok_or_else(|| Error::Group(format!("found rank {}, expected one below {}", group.rank(), group.size())))
    }

    /// Whether a directory is a store.
    pub fn exists(directory: impl AsRef<Path>) -> bool {
        directory.as_ref().join(STORE_FILE).exists()
    }

    /// Opens a store that exists. Changes nothing on disk.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::MalformedArtifact`], [`Error::ArtifactVersion`].
    pub fn open(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = directory.as_ref();
        let path = directory.join(STORE_FILE);
        let json = fs::read_to_string(&path).map_err(io(&path))?;
        let StoreFile { shape, provenance, .. } = parse_versioned(&path, STORE, &json)?;
        shape.validate().map_err(|error| Error::malformed(&path, STORE.name, error.to_string()))?;
        let waves = wave_files(directory)?.into_keys().collect();
        Ok(Self { directory: directory.to_path_buf(), shape, provenance, waves, _lock: None, _mark: None })
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Shape of the model.
    pub fn shape(&self) -> &MoeShape {
        &self.shape
    }

    /// What the statistics are made from.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// Ids of the finished waves.
    pub fn waves(&self) -> &BTreeSet<u64> {
        &self.waves
    }

    /// Adds the statistics of exactly one wave, rounded to f32.
    ///
    /// # Errors
    /// [`Error::MalformedArtifact`] unless there is exactly one wave, [`Error::WaveOverlap`] if the store has it
    /// already, another provenance or shape, [`Error::NonFinite`], [`Error::Io`].
    pub fn write(&mut self, statistics: &Statistics) -> Result<()> {
        self.expect(statistics.shape(), statistics.provenance(), "the wave to write", false)?;
        let ids: Vec<u64> = statistics.waves().iter().copied().collect();
        let [wave] = ids[..] else {
            let reason = format!("a store takes one wave at a time, found waves {ids:?}");
            return Err(Error::malformed(&self.directory, STORE.name, reason));
        };
        if self.waves.contains(&wave) {
            return Err(Error::WaveOverlap { what: self.directory.display().to_string(), waves: vec![wave] });
        }
        statistics.write(&self.wave_path(wave), Dtype::F32)?;
        self.waves.insert(wave);
        Ok(())
    }

    /// Whether this store has all waves of another, byte for byte: it was taken over before.
    ///
    /// # Errors
    /// Those of [`StatisticsStore::open`], and [`Error::Io`].
    pub fn holds(&self, other: impl AsRef<Path>) -> Result<bool> {
        let other = Self::open(other)?;
        for wave in &other.waves {
            let bytes = |store: &Self| {
                let path = store.wave_path(*wave);
                fs::read(&path).map_err(io(&path))
            };
            if !self.waves.contains(wave) || bytes(self)? != bytes(&other)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Copies in the waves of another store of the same model, data and recipe. Everything is checked before the first
    /// file is copied.
    ///
    /// # Errors
    /// [`Error::WaveOverlap`] if both have a wave, [`Error::ProvenanceMismatch`], [`Error::InvalidShape`],
    /// [`Error::Io`], or a malformed file of the other store.
    pub fn absorb(&mut self, other: impl AsRef<Path>) -> Result<()> {
        let other = Self::open(other)?;
        let what = other.directory.display().to_string();
        self.expect(&other.shape, &other.provenance, &what, false)?;
        let both: Vec<u64> = self.waves.intersection(&other.waves).copied().collect();
        if !both.is_empty() {
            return Err(Error::WaveOverlap { what, waves: both });
        }
        for wave in &other.waves {
            other.load(*wave)?;
        }
        for wave in other.waves.iter().copied() {
            let from = other.wave_path(wave);
            write_atomic(self.wave_path(wave), &fs::read(&from).map_err(io(&from))?)?;
            self.waves.insert(wave);
        }
        Ok(())
    }

    /// The statistics of one wave.
    ///
    /// # Errors
    /// As [`Statistics::load`], and a file that holds another wave or provenance than its place says.
    pub fn load(&self, wave: u64) -> Result<Statistics> {
        let path = self.wave_path(wave);
        let statistics = Statistics::load(&path)?;
        self.expect(statistics.shape(), statistics.provenance(), &path.display().to_string(), false)?;
        if !statistics.waves().iter().eq([&wave]) {
            let reason = format!("holds waves {:?}, expected {wave}", statistics.waves());
            return Err(Error::malformed(&path, STORE.name, reason));
        }
        Ok(statistics)
    }

    /// The sum of all waves, in ascending id, in f64. Without waves, empty statistics.
    ///
    /// # Errors
    /// As [`StatisticsStore::load`], and waves that hold different arrays.
    pub fn fold(&self) -> Result<Statistics> {
        let mut folded = Statistics::new(&self.shape, self.provenance.clone());
        for wave in &self.waves {
            folded.fold(&self.load(*wave)?)?;
        }
        Ok(folded)
    }

    /// The directory for what a run that is stopped within a wave leaves of it. It is made by whoever uses it, and
    /// removed with the next [`StatisticsStore::create_or_resume`] if the wave is finished.
    pub fn unfinished(&self, wave: u64) -> PathBuf {
        self.directory.join(format!("{UNFINISHED}{wave:06}"))
    }

    fn wave_path(&self, wave: u64) -> PathBuf {
        self.directory.join(format!("wave-{wave:06}.safetensors"))
    }

    /// Checks that `what` is of this store's collection; `ours` tells which side was found and which was asked for.
    fn expect(&self, shape: &MoeShape, provenance: &Provenance, what: &str, resuming: bool) -> Result<()> {
        if resuming {
            provenance.expect(&self.provenance, what)?;
        } else {
            self.provenance.expect(provenance, what)?;
        }
        if *shape != self.shape {
            let describe = |s: &MoeShape| format!("{} MoE layers with {} units", s.layers.len(), s.units());
            let (store, given) = (describe(&self.shape), describe(shape));
            let (found, expected) = if resuming { (store, given) } else { (given, store) };
            return Err(Error::InvalidShape { field: format!("shape of {what}"), found, expected });
        }
        Ok(())
    }
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> Error + '_ {
    |source| Error::Io { path: path.to_path_buf(), source }
}

/// Finished waves by id. Only names this module writes count.
fn wave_files(directory: &Path) -> Result<BTreeMap<u64, PathBuf>> {
    let mut waves = BTreeMap::new();
    for entry in fs::read_dir(directory).map_err(io(directory))? {
        let entry = entry.map_err(io(directory))?;
        let name = entry.file_name();
        let id = name.to_str().and_then(|n| n.strip_prefix("wave-")?.strip_suffix(".safetensors")?.parse().ok());
        if let Some(id) = id.filter(|id| name.to_str() == Some(&format!("wave-{id:06}.safetensors"))) {
            waves.insert(id, entry.path());
        }
    }
    Ok(waves)
}

fn remove_leftovers(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory).map_err(io(directory))? {
        let path = entry.map_err(io(directory))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let ours = [".wave-", MARK, &format!(".{STORE_FILE}")].iter().any(|ours| name.starts_with(ours));
        if ours && name.ends_with(TEMPORARY_SUFFIX) {
            fs::remove_file(&path).map_err(io(&path))?;
        }
    }
    Ok(())
}

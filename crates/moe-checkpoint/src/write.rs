//! The one way in which a model is written to a directory, whatever it is made of.

use std::borrow::Cow;
use std::fmt;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::artifact_file::write_atomic;
use crate::experts::ExpertBlock;
use crate::formats;
use crate::index::read_json;
use crate::model_card;
use crate::output_dir::{Existing, OutputDir};
use crate::record::{RECORD_FILE, Record};
use crate::shard_layout::TensorSpec;
use crate::side_files::copy_side_files;
use crate::weights::TensorInfo;
use crate::writer::{ShardedWriter, WriterOptions, write_json};
use crate::{Checkpoint, Error, Result};

/// Bytes of a tensor that are copied at a time.
const COPY_BYTES: usize = 4 << 20;

/// How far the writing is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The tensor that was worked on.
    pub tensor: &'a str,
    /// Bytes of weights done, those of an earlier run included.
    pub done: u64,
    /// Bytes of weights in all.
    pub total: u64,
}

/// Called after every tensor, and after every expert of a tensor that holds several. An error stops the work with
/// [`Error::Interrupted`]; the output can be resumed.
pub type OnProgress<'a> = &'a dyn Fn(&Progress<'_>) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// How a model is written.
#[derive(Clone, Copy)]
pub struct WriteOptions<'a> {
    /// Most bytes of tensor data per file; a larger tensor gets its own file. 5 GB, as transformers.
    pub max_shard_bytes: u64,
    /// What to do about an output that is there already.
    pub existing: Existing,
    /// What was measured of the model, for its card: name and value.
    pub measured: &'a [(String, String)],
    /// Told how far it is.
    pub progress: Option<OnProgress<'a>>,
}

impl Default for WriteOptions<'_> {
    fn default() -> Self {
        let max_shard_bytes = WriterOptions::default().max_shard_bytes;
        Self { max_shard_bytes, existing: Existing::Refuse, measured: &[], progress: None }
    }
}

impl fmt::Debug for WriteOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { max_shard_bytes, existing, measured, progress } = self;
        f.debug_struct("WriteOptions")
            .field("max_shard_bytes", max_shard_bytes)
            .field("existing", existing)
            .field("measured", measured)
            .field("progress", &progress.is_some())
            .finish()
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteReport {
    /// Weight files, in order, under their final names.
    pub files: Vec<PathBuf>,
    /// Other files that were copied, relative to the directory.
    pub side_files: Vec<String>,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Elements of all tensors; a tied head counts once.
    pub parameters: u64,
}

/// What is made and written at a time.
enum Piece {
    /// Some bytes of a tensor.
    Range(Range<usize>),
    /// A block of an expert that the source makes.
    Block { layer: usize, set: usize, block: ExpertBlock },
}

/// Checks what can be known of an output beforehand: that it is not the directory the model is read from, whether it
/// exists, and that the file system has room for it.
///
/// # Errors
/// [`Error::OutputIsInput`], [`Error::OutputExists`], [`Error::OutputUnfinished`], [`Error::NoSpace`].
pub fn check_output(model: &Checkpoint, to: &Path, options: &WriteOptions<'_>) -> Result<()> {
    if matches!((model.dir().canonicalize(), to.canonicalize()), (Ok(a), Ok(b)) if a == b) {
        return Err(Error::OutputIsInput { path: to.to_path_buf() });
    }
    OutputDir::check(to, options.existing)?;
    match options.existing {
        Existing::Resume => Ok(()),
        _ => check_room(to, model.bytes_on_disk()),
    }
}

/// Checks that the file system of `to`, which need not exist yet, has room for so many bytes.
///
/// # Errors
/// [`Error::NoSpace`].
pub fn check_room(to: &Path, bytes: u64) -> Result<()> {
    check_space(to.ancestors().find(|path| path.exists()).unwrap_or(Path::new(".")), bytes)
}

/// Writes a model to the directory `to`, which appears whole or not at all: work happens in `TO.partial`, which a later
/// call with [`Existing::Resume`] continues.
///
/// Tensors that the model's source does not change are copied byte for byte, so that a method that changes nothing
/// reproduces every tensor; experts that it makes are made one at a time, while the one before is written. Memory is
/// that of two pieces: a matrix of one expert, or a tensor outside the experts. Side files and folders (tokenizer, chat
/// templates, generation config, license) are copied, `moe_record.json` tells how the model came about, and its card
/// (`README.md`; an earlier one is kept as `README.base.md`) tells people. What was written is opened and compared with
/// what was to be written before it gets its name.
///
/// ```no_run
/// use moe_checkpoint::{Checkpoint, WriteOptions, write};
///
/// // Here the model as it is; a plan, a merge or a fold on it gives another checkpoint to write.
/// let model = Checkpoint::open("models/Qwen1.5-MoE-A2.7B")?;
/// let report = write(&model, "out/copy", &WriteOptions::default())?;
/// println!("{} bytes in {} files", report.bytes, report.files.len());
/// # Ok::<(), moe_checkpoint::Error>(())
/// ```
///
/// # Errors
/// Before anything is written: those of [`check_output`], [`Error::ResumeMismatch`] for the unfinished output of
/// another model. Later: those of the model's source, [`Error::Io`], [`Error::Interrupted`]; the input and an earlier
/// output stay as they were.
pub fn write(model: &Checkpoint, to: impl AsRef<Path>, options: &WriteOptions<'_>) -> Result<WriteReport> {
    let to = to.as_ref();
    check_output(model, to, options)?;
    let output = OutputDir::create(to, options.existing)?;
    let specs: Vec<TensorSpec> = model.tensors().map(TensorInfo::spec).collect();
    let recipe = format!("write {} {}", model.fingerprint(), model.raw_config());
    let writer_options = WriterOptions { max_shard_bytes: options.max_shard_bytes, recipe };
    let writer = ShardedWriter::new(output.path(), writer_options, specs)?;
    check_space(output.path(), writer.remaining_bytes())?;
    let written = weights(model, writer, options)?;

    let mut side_files = copy_side_files(model.dir(), output.path())?;
    if !is_quantized_as_its_directory(model)? {
        for name in QUANTIZATION_FILES {
            if let Some(position) = side_files.iter().position(|file| file == name) {
                let path = output.path().join(side_files.remove(position));
                fs::remove_file(&path).map_err(|source| Error::io(&path, source))?;
            }
        }
    }
    let config = output.path().join("config.json");
    let original = model.dir().join("config.json");
    match original.is_file() && read_json(&original)? == *model.raw_config() {
        // Nothing changed: not even its spaces.
        true => write_atomic(&config, &fs::read(&original).map_err(|source| Error::io(&original, source))?)?,
        false => write_json(&config, model.raw_config())?,
    }
    if !model.steps().is_empty() {
        let record = Record::new(model.steps().to_vec());
        let json = serde_json::to_vec_pretty(&record)
            .map_err(|source| Error::InvalidJson { path: output.path().join(RECORD_FILE), source })?;
        write_atomic(output.path().join(RECORD_FILE), &json)?;
        model_card::write(model, output.path(), options.measured)?;
    }
    // Config, headers and lengths are checked before the output gets its name.
    let reopened = Checkpoint::open(output.path())?;
    for info in reopened.tensors() {
        let spec = model.info(&info.name)?.spec();
        if info.spec() != spec {
            let reason = format!("{:?} {:?} was written for {:?} {:?}", info.dtype, info.shape, spec.dtype, spec.shape);
            return Err(Error::InvalidTensorSpec { tensor: spec.name, reason });
        }
    }
    let parameters = reopened.parameters();
    drop(reopened);
    let out = output.commit()?;
    model.release();
    let files = written.files.iter().filter_map(|file| file.file_name()).map(|name| out.join(name)).collect();
    Ok(WriteReport { files, side_files, bytes: written.bytes, parameters })
}

/// Files beside `config.json` that tell how weights are quantized.
const QUANTIZATION_FILES: [&str; 3] = ["hf_quant_config.json", "quantize_config.json", "quant_config.json"];

/// Whether what those files say of the directory that a model came from holds for the model.
fn is_quantized_as_its_directory(model: &Checkpoint) -> Result<bool> {
    let config = model.dir().join("config.json");
    if model.quantization().is_none() || !config.is_file() {
        return Ok(model.quantization().is_some());
    }
    Ok(formats::entry(&read_json(&config)?) == formats::entry(model.raw_config()))
}

/// Writes all tensors. While one piece is written, the next is made.
fn weights(model: &Checkpoint, mut writer: ShardedWriter, options: &WriteOptions<'_>) -> Result<crate::Written> {
    let mut pieces: Vec<(&TensorInfo, Piece)> = Vec::new();
    let (mut total, mut done) = (0, 0);
    for info in model.tensors() {
        total += info.bytes;
        if writer.is_finished(&info.name)? {
            done += info.bytes;
        } else if let Some(made) = model.made(&info.name) {
            let block = |(set, block, _): &(usize, ExpertBlock, usize)| Piece::Block {
                layer: made.layer,
                set: *set,
                block: *block,
            };
            pieces.extend(made.blocks.iter().map(|made| (info, block(made))));
        } else {
            let grain = model.grain(&info.name);
            let (step, end) = ((COPY_BYTES / grain).max(1) * grain, info.bytes as usize);
            let ranges = (0..end).step_by(step).map(|start| start..end.min(start + step));
            pieces.extend(ranges.map(|range| (info, Piece::Range(range))));
        }
    }
    let make = |piece: Option<&(&TensorInfo, Piece)>| -> Result<Cow<'_, [u8]>> {
        match piece {
            None => Ok(Cow::Borrowed(&[])),
            Some((info, Piece::Range(range))) => model.tensor_bytes(&info.name, range.clone()),
            Some((_, Piece::Block { layer, set, block })) => model.block(*layer, *set, *block),
        }
    };
    let mut current = make(pieces.first())?;
    for (index, (info, piece)) in pieces.iter().enumerate() {
        let (written, next) = rayon::join(|| writer.append(&info.name, &current), || make(pieces.get(index + 1)));
        written?;
        done += current.len() as u64;
        // What is not a copy is gone with this.
        current = next?;
        match piece {
            Piece::Range(range) => model.release_range(&info.name, range.clone()),
            Piece::Block { layer, set, .. } => model.release_set(*layer, *set),
        }
        if let Some(progress) = options.progress {
            progress(&Progress { tensor: &info.name, done, total }).map_err(Error::Interrupted)?;
        }
    }
    writer.finish()
}

/// Refuses a file system without this much room: that of `dir`, which must exist. Nothing is refused where the system
/// does not tell.
///
/// # Errors
/// [`Error::NoSpace`].
#[cfg(unix)]
pub fn check_space(dir: &Path, needed: u64) -> Result<()> {
    // Not every file system tells.
    let Ok(space) = rustix::fs::statvfs(dir) else { return Ok(()) };
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    match needed > free {
        true => Err(Error::NoSpace { path: dir.to_path_buf(), needed, free }),
        false => Ok(()),
    }
}

/// Nothing is refused where the system does not tell.
///
/// # Errors
/// None.
#[cfg(not(unix))]
pub fn check_space(_dir: &Path, _needed: u64) -> Result<()> {
    Ok(())
}

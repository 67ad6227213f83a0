//! What can go wrong with files of this crate.

use std::path::{Path, PathBuf};

use safetensors::Dtype;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with files of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused an operation on a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A model shape that makes no sense or is not the expected one.
    #[error("{field}: found {found}, expected {expected}")]
    InvalidShape {
        /// What was looked at.
        field: String,
        /// What it was.
        found: String,
        /// What it should have been.
        expected: String,
    },
    /// A statistics, score or plan file that cannot be read as one.
    #[error("{}: not a valid {kind} file: {reason}", path.display())]
    MalformedArtifact {
        /// The file.
        path: PathBuf,
        /// What it should be.
        kind: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A file written by a newer version of this crate.
    #[error("{}: {kind} file of version {found}, this crate reads versions 1 to {supported}", path.display())]
    ArtifactVersion {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
        /// Its version.
        found: u64,
        /// The newest version that is read.
        supported: u64,
    },
    /// Statistics or scores of another model, data set or recipe.
    #[error("{what}: {field} is `{found}`, expected `{expected}`")]
    ProvenanceMismatch {
        /// What carries the provenance.
        what: String,
        /// The field that differs.
        field: &'static str,
        /// What was found.
        found: String,
        /// What was expected.
        expected: String,
    },
    /// The same wave twice.
    #[error("{what}: waves {waves:?} are already there; folding them again would count their data twice")]
    WaveOverlap {
        /// What brings the waves.
        what: String,
        /// Their ids.
        waves: Vec<u64>,
    },
    /// Statistics with other arrays than those they are folded with.
    #[error("the statistics hold {found}, expected {expected}")]
    StatisticsDiffer {
        /// Arrays found.
        found: String,
        /// Arrays expected.
        expected: String,
    },
    /// No array of this name.
    #[error("no statistic `{id}`; there are {known:?}")]
    UnknownStatistic {
        /// The name asked for.
        id: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// An array asked for with another granularity or fold than it has.
    #[error("statistic `{id}` was asked for as {found}, but is {expected}")]
    StatisticKind {
        /// The name.
        id: String,
        /// What was asked for.
        found: String,
        /// What it is.
        expected: String,
    },
    /// Not an MoE layer of the model.
    #[error("layer {layer} is not one of the MoE layers {known:?}")]
    UnknownLayer {
        /// The decoder layer index asked for.
        layer: usize,
        /// The MoE layers.
        known: Vec<usize>,
    },
    /// No such expert.
    #[error("layer {layer} has no expert {expert}: it has {count}")]
    UnknownExpert {
        /// Decoder layer index.
        layer: usize,
        /// The expert asked for.
        expert: usize,
        /// How many there are.
        count: usize,
    },
    /// A NaN or an infinity, or a number too large for f32.
    #[error("{what} of layer {layer}, expert {expert}{} is {value}, expected a finite number", unit_suffix(*unit))]
    NonFinite {
        /// What the value is.
        what: String,
        /// Decoder layer index.
        layer: usize,
        /// Index of the expert.
        expert: usize,
        /// Unit, where there is one value per unit.
        unit: Option<usize>,
        /// The value.
        value: f64,
    },
    /// A NaN or infinite value in a matrix of statistics.
    #[error("{what}: row {row}, column {column} is {value}, expected a finite number")]
    NonFiniteMatrix {
        /// What the matrix is.
        what: String,
        /// Row of the value, from 0.
        row: usize,
        /// Column of the value, from 0.
        column: usize,
        /// The value.
        value: f64,
    },
    /// A score table that contradicts itself or the model.
    #[error("invalid score table: {reason}")]
    InvalidScores {
        /// What is wrong with it.
        reason: String,
    },

    /// A model that could not be fetched from the Hub.
    #[error("model `{model}`: {reason}")]
    Hub {
        /// The id.
        model: String,
        /// What went wrong.
        reason: String,
    },
    /// The model path is not a directory.
    #[error("{}: not a directory; expected a model directory with config.json and safetensors weights", path.display())]
    NotADirectory {
        /// What was given.
        path: PathBuf,
    },
    /// A file that should hold JSON does not.
    #[error("{}: not valid JSON: {source}", path.display())]
    InvalidJson {
        /// The file.
        path: PathBuf,
        /// Cause, with line and column.
        source: serde_json::Error,
    },

    /// A required field is absent.
    #[error("{file}: field `{field}` is missing; expected {expected}")]
    MissingField {
        /// The file, `config.json` where its directory is not known.
        file: String,
        /// Dotted path of the field.
        field: String,
        /// What it should hold.
        expected: String,
    },
    /// A field holds something else than it should.
    #[error("{file}: field `{field}` is {found}; expected {expected}")]
    InvalidField {
        /// The file, `config.json` where its directory is not known.
        file: String,
        /// Dotted path of the field.
        field: String,
        /// The value found, shortened.
        found: String,
        /// What it should hold.
        expected: String,
    },
    /// Two fields that say the same thing differ.
    #[error("{file}: fields {first} and {second} contradict each other")]
    ConflictingFields {
        /// The file, `config.json` where its directory is not known.
        file: String,
        /// One field and its value.
        first: String,
        /// The other field and its value.
        second: String,
    },
    /// No family of this name is known.
    #[error("{file}: model_type `{found}` is not supported; known families: {known}")]
    UnknownFamily {
        /// The file, `config.json` where its directory is not known.
        file: String,
        /// The `model_type` found.
        found: String,
        /// Families that are known, comma separated.
        known: String,
    },
    /// The model has no routed experts.
    #[error("{file}: not a Mixture-of-Experts model: {reason}")]
    NotMoe {
        /// The file, `config.json` where its directory is not known.
        file: String,
        /// What shows it.
        reason: String,
    },
    /// The config announces quantized weights.
    #[error("{file}: quantized weights ({method}) are not read; expected f32, f16 or bf16 weights{also}")]
    Quantized {
        /// The file, `config.json` where its directory is not known.
        file: String,
        /// The quantization method of `quantization_config`.
        method: String,
        /// Quantizations that are read.
        also: &'static str,
    },

    /// The directory holds no weights that are read.
    #[error("{}: no weights: neither model.safetensors nor model.safetensors.index.json exists{hint}", dir.display())]
    NoWeights {
        /// The model directory.
        dir: PathBuf,
        /// What it holds instead and what can be done about it; empty if nothing is known.
        hint: String,
    },
    /// The index names a shard outside the model directory.
    #[error("{}: tensor `{tensor}` is mapped to `{shard}`; expected a path inside the model directory", index.display())]
    ShardOutsideDirectory {
        /// The index file.
        index: PathBuf,
        /// The tensor mapped there.
        tensor: String,
        /// The path found.
        shard: String,
    },
    /// A shard that the index names does not exist.
    #[error("{}: shard {} of tensor `{tensor}` does not exist", index.display(), shard.display())]
    MissingShard {
        /// The index file.
        index: PathBuf,
        /// The missing file.
        shard: PathBuf,
        /// A tensor it should hold.
        tensor: String,
    },
    /// The index names a tensor that its shard does not hold.
    #[error("{}: tensor `{tensor}` is not in its shard {}", index.display(), shard.display())]
    IndexTensorAbsent {
        /// The index file.
        index: PathBuf,
        /// The shard it should be in.
        shard: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// Two shards hold a tensor of the same name.
    #[error("tensor `{tensor}` is in two shards: {} and {}", first.display(), second.display())]
    TensorInTwoShards {
        /// The tensor.
        tensor: String,
        /// One shard.
        first: PathBuf,
        /// Another shard.
        second: PathBuf,
    },

    /// Git left a pointer in place of a large file.
    #[error("{}: a Git LFS pointer and not the file itself: `git lfs pull` fetches it", path.display())]
    LfsPointer {
        /// The file.
        path: PathBuf,
    },
    /// The file is too short to be safetensors.
    #[error("{}: truncated: {found} bytes, expected at least the 8 bytes of the header length", path.display())]
    NoHeader {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        found: u64,
    },
    /// The file has become shorter since it was opened.
    #[error("{}: shortened while it was open: {found} bytes, expected the {expected} that it was opened with", path.display())]
    Shortened {
        /// The file.
        path: PathBuf,
        /// Its length now, in bytes.
        found: u64,
        /// Its length when it was opened, in bytes.
        expected: u64,
    },
    /// The header would end past the end of the file.
    #[error("{}: the header of {claimed} bytes ends past the end of the file; expected at most {available} bytes", path.display())]
    HeaderPastEnd {
        /// The file.
        path: PathBuf,
        /// Header length that the file claims.
        claimed: u64,
        /// Bytes after the header length.
        available: u64,
    },
    /// The header is longer than any real one.
    #[error("{}: the header has {claimed} bytes; expected at most {limit}", path.display())]
    HeaderTooLarge {
        /// The file.
        path: PathBuf,
        /// Header length.
        claimed: u64,
        /// The limit.
        limit: u64,
    },
    /// The header is not a safetensors header.
    #[error("{}: invalid safetensors header: {reason}", path.display())]
    InvalidHeader {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A tensor has a dtype that safetensors does not define.
    #[error("{}: tensor `{tensor}` has unknown dtype `{dtype}`", path.display())]
    UnknownDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The dtype found.
        dtype: String,
    },
    /// Offsets of a tensor do not span what its dtype and shape need.
    #[error("{}: tensor `{tensor}` has data offsets [{begin}, {end}]; expected {expected}", path.display())]
    TensorOffsets {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// First byte, relative to the end of the header.
        begin: u64,
        /// End, relative to the end of the header.
        end: u64,
        /// What was expected of them.
        expected: String,
    },
    /// Two tensors share bytes.
    #[error("{}: tensors `{first}` and `{second}` overlap: the second starts at byte {begin}; expected {expected}", path.display())]
    TensorOverlap {
        /// The file.
        path: PathBuf,
        /// The earlier tensor.
        first: String,
        /// The later tensor.
        second: String,
        /// Where the later one starts, relative to the end of the header.
        begin: u64,
        /// Where the earlier one ends.
        expected: u64,
    },
    /// Bytes between two tensors belong to none.
    #[error("{}: tensor `{tensor}` starts at byte {begin} of the data; expected {expected}, where the one before it ends", path.display())]
    TensorGap {
        /// The file.
        path: PathBuf,
        /// The tensor after the gap.
        tensor: String,
        /// Where it starts, relative to the end of the header.
        begin: u64,
        /// Where it should start.
        expected: u64,
    },
    /// The file ends before its tensors do.
    #[error("{}: truncated: the file has {found} bytes; expected {expected}, where tensor `{tensor}` ends", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        found: u64,
        /// The length that the header asks for.
        expected: u64,
        /// The last tensor.
        tensor: String,
    },
    /// The file goes on after its tensors.
    #[error("{}: the file has {found} bytes; expected {expected}, where the last tensor ends", path.display())]
    TrailingBytes {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        found: u64,
        /// The length that the header asks for.
        expected: u64,
    },

    /// A tensor that the config calls for does not exist.
    #[error("{}: tensor `{tensor}` is missing; {reason}", dir.display())]
    MissingTensor {
        /// The model directory.
        dir: PathBuf,
        /// The tensor.
        tensor: String,
        /// Why it is expected: shape, and the config fields that ask for it.
        reason: String,
    },
    /// A tensor exists that the config has no place for.
    #[error("{}: tensor `{tensor}` is in the weights, but {reason}", file.display())]
    UnexpectedTensor {
        /// The shard that holds it.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Why it is not expected.
        reason: String,
    },
    /// A tensor has another shape than the config asks for.
    #[error("{}: tensor `{tensor}` has shape {found:?}; expected {expected:?} from {fields} in config.json", file.display())]
    UnexpectedShape {
        /// The shard.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Shape found.
        found: Vec<usize>,
        /// Shape expected.
        expected: Vec<usize>,
        /// The config fields that give the expected shape.
        fields: Box<str>,
    },
    /// A tensor has a dtype that is not read as weights.
    #[error("{}: tensor `{tensor}` has dtype {found:?}; expected {expected}", file.display())]
    UnsupportedDtype {
        /// The shard.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Dtype found.
        found: Dtype,
        /// Dtypes expected.
        expected: String,
    },
    /// A tensor holds FP8 or smaller weights.
    #[error("{}: tensor `{tensor}` has dtype {found:?}, a quantized weight that is not read so; expected {expected}", file.display())]
    QuantisedTensor {
        /// The shard.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Dtype found.
        found: Dtype,
        /// What would be read.
        expected: String,
    },
    /// A model cannot be quantized so, or its quantization cannot be kept.
    #[error("quantization ({format}): {reason}")]
    Quantize {
        /// The format.
        format: String,
        /// Why, and what can be done about it.
        reason: String,
    },
    /// A quantized weight has codes or scales that are no numbers.
    #[error("{}: tensor `{tensor}` ({format}) has elements or scales that are no numbers; expected finite ones: the file is damaged", file.display())]
    NotANumber {
        /// The shard.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The format of the weight.
        format: &'static str,
    },
    /// The routed experts of a layer are stored in no layout that is known, or in two at once.
    #[error("{}: routed experts of layer {layer} are in {found}; expected {expected}", dir.display())]
    ExpertLayout {
        /// The model directory.
        dir: PathBuf,
        /// Decoder layer index.
        layer: usize,
        /// Layouts found.
        found: String,
        /// Names that were expected.
        expected: String,
    },
    /// A layer, expert, row range or role was asked for that the model does not have.
    #[error("{what} {found} does not exist; expected {expected}")]
    OutOfRange {
        /// What was asked for.
        what: String,
        /// The value asked for.
        found: String,
        /// What exists.
        expected: String,
    },
    /// A protected expert or unit that does not exist.
    #[error("protected {what} does not exist: {expected}")]
    UnknownProtected {
        /// What was protected.
        what: String,
        /// What there is.
        expected: String,
    },
    /// Experts taken out of a layer whose router would not work without them.
    #[error("layer {layer}: {reason}")]
    BrokenRouting {
        /// Decoder layer index.
        layer: usize,
        /// What the router needs.
        reason: String,
    },
    /// A tensor was asked for that the checkpoint does not have.
    #[error("{}: the checkpoint has no tensor `{tensor}`", dir.display())]
    NoSuchTensor {
        /// The model directory.
        dir: PathBuf,
        /// The name asked for.
        tensor: String,
    },

    /// A planned output cannot be laid out.
    #[error("cannot write tensor `{tensor}`: {reason}")]
    InvalidTensorSpec {
        /// The tensor.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// Another number of bytes was written for a tensor than its dtype and shape need.
    #[error("tensor `{tensor}`: {found} bytes were written; expected {expected}")]
    WrittenLength {
        /// The tensor.
        tensor: String,
        /// Bytes given so far.
        found: u64,
        /// Bytes of the tensor.
        expected: u64,
    },
    /// A method that makes weights failed.
    #[error("{source}")]
    Method {
        /// What the method said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The output is the directory that the model is read from.
    #[error("{}: is the checkpoint itself; choose another directory", path.display())]
    OutputIsInput {
        /// The directory.
        path: PathBuf,
    },
    /// The file system has less room than the output needs.
    #[error("{}: the output needs {needed} bytes, but {free} are free; make room, or choose another directory", path.display())]
    NoSpace {
        /// The output directory.
        path: PathBuf,
        /// Bytes that are still to be written.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// Whoever watched the progress asked to stop.
    #[error("stopped: {0}")]
    Interrupted(Box<dyn std::error::Error + Send + Sync>),
    /// The output directory exists.
    #[error("{}: the output exists; remove it, choose another, or force", path.display())]
    OutputExists {
        /// The directory.
        path: PathBuf,
    },
    /// An interrupted earlier run left its work.
    #[error("{}: an earlier run left this unfinished; resume it, or force to start over", path.display())]
    OutputUnfinished {
        /// The partial directory.
        path: PathBuf,
    },
    /// Another process is writing the output.
    #[error("{}: another process is writing this output", path.display())]
    OutputBusy {
        /// The directory that it writes to.
        path: PathBuf,
    },
    /// Another process of the group has failed.
    #[error("rank {rank}: {message}")]
    Rank {
        /// Its place in the group.
        rank: usize,
        /// What it says.
        message: String,
    },
    /// The processes of a group, or their launcher, do not go together.
    #[error("processes that work together: {0}")]
    Group(String),
    /// The unfinished output was made by another plan.
    #[error("{}: the unfinished output was made from another plan or recipe ({found}); expected {expected}; force to start over", path.display())]
    ResumeMismatch {
        /// The resume record.
        path: PathBuf,
        /// Digest found.
        found: String,
        /// Digest of this run.
        expected: String,
    },
}

impl Error {
    /// An [`Error::Io`] about `path`.
    pub(crate) fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// Puts the directory before the bare file name of a config error.
    pub(crate) fn in_dir(mut self, dir: &Path) -> Self {
        match &mut self {
            Self::MissingField { file, .. }
            | Self::InvalidField { file, .. }
            | Self::ConflictingFields { file, .. }
            | Self::UnknownFamily { file, .. }
            | Self::NotMoe { file, .. }
            | Self::Quantized { file, .. } => *file = dir.join(&*file).display().to_string(),
            _ => {}
        }
        self
    }

    pub(crate) fn malformed(path: &Path, kind: &'static str, reason: impl Into<String>) -> Self {
        Error::MalformedArtifact { path: path.to_path_buf(), kind, reason: reason.into() }
    }
}

fn unit_suffix(unit: Option<usize>) -> String {
    unit.map(|unit| format!(", unit {unit}")).unwrap_or_default()
}

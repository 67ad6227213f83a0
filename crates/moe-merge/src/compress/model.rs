//! The experts of a checkpoint, compressed, in a directory.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use moe_checkpoint::{
    Checkpoint, Dtype, Existing, ExpertPart, MoeShape, OutputDir, SafetensorsFile, Statistics, Step, encode,
    write_atomic,
};
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};

use super::ranks::shared_out;
use super::{CompactExpert, Compression, LowRankSparse, Ranks, kept_rows};
use crate::in_place::{self, PartChange};
use crate::{Error, Result};

/// File that describes the directory.
pub const COMPACT_FILE: &str = "compact.json";
/// Version of the format.
const VERSION: u64 = 1;

/// The experts of a checkpoint as [`CompactExpert`]s, one file per stored set of weights. Everything else of the model
/// stays in the checkpoint it was made from.
#[derive(Clone, Debug)]
pub struct CompactModel {
    dir: PathBuf,
    description: Description,
}

/// What compressing did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompactReport {
    /// Parameters of the experts before.
    pub parameters_before: u64,
    /// And after.
    pub parameters_after: u64,
    /// Bytes of the experts before.
    pub bytes_before: u64,
    /// And after, the indices of rows included.
    pub bytes_after: u64,
    /// Rows of S of all matrices.
    pub rows: u64,
    /// Those that were kept.
    pub rows_kept: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Description {
    version: u64,
    model: String,
    shape: MoeShape,
    compression: Compression,
    report: CompactReport,
}

impl Compression {
    /// Compresses the experts of a checkpoint, grouped ones once, into `to`, which appears whole or not at all. Rows of
    /// S compete over all matrices of the model. `fisher` are statistics of this very checkpoint and the name of one
    /// per unit: scores of experts that share weights add up.
    ///
    /// Two passes: the first ranks rows and keeps one number for each, the second splits again and writes. Memory is
    /// that of a few copies of one expert.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for Fisher scores without statistics, [`Error::OtherModel`] for those of another
    /// model, an output that exists, and what keeps weights from being read.
    pub fn compress(
        &self,
        from: &Checkpoint,
        to: &Path,
        fisher: Option<(&Statistics, &str)>,
        force: bool,
    ) -> Result<CompactReport> {
        self.validate()?;
        if let Some((statistics, _)) = fisher
            && !from.is_model(&statistics.provenance().model)
        {
            let (path, expected) = (from.dir().to_path_buf(), statistics.provenance().model.clone());
            let fingerprint = from.fingerprint();
            return Err(Error::OtherModel { what: "statistics", path, found: fingerprint, expected });
        }
        self.check_scores(fisher.is_some())?;
        let sets = stored_sets(from);
        let ranks = self.ranks_of(from, &sets, fisher)?;
        let mut scores: Vec<Vec<f64>> = Vec::with_capacity(3 * sets.len());
        for (set, rank) in sets.iter().zip(&ranks) {
            let importance = fisher.map(|fisher| set.importance(fisher)).transpose()?;
            let split = CompactExpert::split(&from.expert(set.layer, set.experts[0])?, *rank)?;
            scores.extend(split.row_scores(self.rows, importance.as_deref())?);
        }
        let kept = kept_rows(&scores, self.keep_rows);
        let rows = scores.iter().map(|rows| rows.len() as u64).sum();
        store(self, from, to, force, rows, |at| {
            let set = &sets[at];
            let expert = from.expert(set.layer, set.experts[0])?;
            let kept = &kept[3 * at..3 * at + 3];
            Ok(CompactExpert::split(&expert, ranks[at])?.keep_rows([&kept[0], &kept[1], &kept[2]]))
        })
    }

    /// The rank of every stored set.
    fn ranks_of(&self, from: &Checkpoint, sets: &[Set], fisher: Option<(&Statistics, &str)>) -> Result<Vec<usize>> {
        let (Ranks::Importance, Some(fisher)) = (self.ranks, fisher) else { return Ok(vec![self.rank; sets.len()]) };
        let (mut importance, mut most) = (Vec::with_capacity(sets.len()), Vec::with_capacity(sets.len()));
        for set in sets {
            let units = set.importance(fisher)?;
            // Experts without units have matrices of no rank, and no share.
            importance.push(units.iter().sum());
            most.push(units.len().min(from.shape().hidden_size));
        }
        Ok(shared_out(&importance, &most, self.rank))
    }
}

/// Writes the stored sets of a checkpoint, of whose S there were `rows` rows, compressed, in the order of
/// [`stored_sets`].
pub(crate) fn store(
    compression: &Compression,
    from: &Checkpoint,
    to: &Path,
    force: bool,
    rows: u64,
    mut experts: impl FnMut(usize) -> Result<CompactExpert>,
) -> Result<CompactReport> {
    let mut report = CompactReport {
        parameters_before: 0,
        parameters_after: 0,
        bytes_before: 0,
        bytes_after: 0,
        rows,
        rows_kept: 0,
    };
    for layer in &from.shape().layers {
        report.bytes_before += from.expert_bytes_on_disk(layer.layer)?;
    }
    let output = OutputDir::create(to, if force { Existing::Force } else { Existing::Refuse })?;
    for (at, set) in stored_sets(from).iter().enumerate() {
        let compact = experts(at)?;
        let biases: usize = compact.biases.iter().flatten().map(Vec::len).sum();
        let matrices = [&compact.gate, &compact.up, &compact.down];
        report.parameters_before += (matrices.iter().map(|m| m.rows * m.cols).sum::<usize>() + biases) as u64;
        report.parameters_after += compact.parameters() as u64;
        report.rows_kept += matrices.iter().map(|m| m.kept.len() as u64).sum::<u64>();
        report.bytes_after += write(&set.path(output.path()), from, set, &compact)?;
    }
    let description = Description {
        version: VERSION,
        model: from.fingerprint(),
        shape: from.shape().clone(),
        compression: *compression,
        report,
    };
    let json = serde_json::to_vec_pretty(&description).map_err(|error| Error::invalid_plan(error.to_string()))?;
    write_atomic(output.path().join(COMPACT_FILE), &json)?;
    output.commit()?;
    Ok(report)
}

impl CompactModel {
    /// Opens a directory that [`Compression::compress`] wrote.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::InvalidPlan`], [`Error::Version`], naming the file.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref().to_path_buf();
        let path = dir.join(COMPACT_FILE);
        let json = fs::read_to_string(&path).map_err(Error::io(&path))?;
        let description: Description =
            serde_json::from_str(&json).map_err(|error| Error::invalid_plan(error.to_string()).in_file(&path))?;
        if description.version != VERSION {
            let found = description.version;
            return Err(Error::Version { path: Some(path), what: "compact model", found, supported: VERSION });
        }
        Ok(Self { dir, description })
    }

    /// Fingerprint of the checkpoint it was made from.
    pub fn model(&self) -> &str {
        &self.description.model
    }

    /// How it was compressed.
    pub fn compression(&self) -> &Compression {
        &self.description.compression
    }

    /// What that did.
    pub fn report(&self) -> &CompactReport {
        &self.description.report
    }

    /// A stored set of weights of a decoder layer: an expert, or those that share it in a grouped checkpoint.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::InvalidPlan`] for a malformed file.
    pub fn expert(&self, layer: usize, set: usize) -> Result<CompactExpert> {
        self.file(layer, set)?.expert()
    }
}

/// One stored set of weights.
#[derive(Clone, Debug)]
pub(crate) struct Set {
    pub layer: usize,
    pub set: usize,
    /// Experts that share it.
    pub experts: Vec<usize>,
}

impl Set {
    fn path(&self, dir: &Path) -> PathBuf {
        set_path(dir, self.layer, self.set)
    }

    fn importance(&self, (statistics, id): (&Statistics, &str)) -> Result<Vec<f64>> {
        let mut sum: Vec<f64> = Vec::new();
        for expert in &self.experts {
            let units = statistics.unit(id, self.layer, *expert)?;
            sum.resize(units.len(), 0.0);
            sum.iter_mut().zip(units).for_each(|(sum, v)| *sum += v);
        }
        Ok(sum)
    }
}

/// The stored sets of weights of a checkpoint, layer by layer.
pub(crate) fn stored_sets(from: &Checkpoint) -> Vec<Set> {
    let mut sets = Vec::new();
    for layer in &from.shape().layers {
        let Some(moe) = from.config().moe(layer.layer) else { continue };
        for set in 0..moe.stored_widths().len() {
            let experts = (0..moe.num_experts()).filter(|expert| moe.stored(*expert) == set).collect();
            sets.push(Set { layer: layer.layer, set, experts });
        }
    }
    sets
}

fn set_path(dir: &Path, layer: usize, set: usize) -> PathBuf {
    dir.join(format!("layer-{layer:03}-set-{set:04}.safetensors"))
}

const NAMES: [(&str, ExpertPart); 3] = [("gate", ExpertPart::Gate), ("up", ExpertPart::Up), ("down", ExpertPart::Down)];
const BIASES: [(&str, ExpertPart); 3] =
    [("gate.bias", ExpertPart::GateBias), ("up.bias", ExpertPart::UpBias), ("down.bias", ExpertPart::DownBias)];

/// Writes an expert in the dtypes of the checkpoint; gives the bytes of its tensors.
fn write(path: &Path, from: &Checkpoint, set: &Set, expert: &CompactExpert) -> Result<u64> {
    let malformed = |reason: String| Error::invalid_plan(reason).in_file(path);
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut floats = |name: String, dtype: Dtype, shape: Vec<usize>, values: &[f32]| {
        let mut bytes = Vec::new();
        if !encode(dtype, values, &mut bytes) {
            return Err(malformed(format!("`{name}` cannot be stored as {dtype}")));
        }
        tensors.push((name, dtype, shape, bytes));
        Ok(())
    };
    let dtype = |part| Ok::<_, Error>(from.expert_dtype(set.layer, set.experts[0], part)?.unwrap_or(Dtype::F32));
    let mut kept = Vec::new();
    for ((name, part), m) in NAMES.into_iter().zip([&expert.gate, &expert.up, &expert.down]) {
        let dtype = dtype(part)?;
        floats(format!("{name}.left"), dtype, vec![m.rows, m.rank], &m.left)?;
        floats(format!("{name}.right"), dtype, vec![m.rank, m.cols], &m.right)?;
        floats(format!("{name}.sparse"), dtype, vec![m.kept.len(), m.cols], &m.sparse)?;
        kept.push((format!("{name}.kept"), &m.kept));
    }
    for ((name, part), bias) in BIASES.into_iter().zip(&expert.biases) {
        if let Some(bias) = bias {
            floats(name.to_string(), dtype(part)?, vec![bias.len()], bias)?;
        }
    }
    for (name, rows) in kept {
        let bytes = rows.iter().flat_map(|row| row.to_le_bytes()).collect();
        tensors.push((name, Dtype::U32, vec![rows.len()], bytes));
    }
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(*dtype, shape.clone(), bytes);
        Ok((name.as_str(), view.map_err(|error| malformed(error.to_string()))?))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    let file =
        safetensors::serialize(views, None::<HashMap<String, String>>).map_err(|error| malformed(error.to_string()))?;
    write_atomic(path, &file)?;
    Ok(tensors.iter().map(|(.., bytes)| bytes.len() as u64).sum())
}

/// The file of a stored set.
struct SetFile {
    path: PathBuf,
    file: SafetensorsFile,
}

impl SetFile {
    fn open(path: PathBuf) -> Result<Self> {
        let file = SafetensorsFile::open(&path)?;
        Ok(Self { path, file })
    }

    fn malformed(&self, reason: String) -> Error {
        Error::invalid_plan(reason).in_file(&self.path)
    }

    fn matrix(&self, name: &str) -> Result<LowRankSparse> {
        let shape = |part: &str| Ok::<_, Error>(self.file.tensor(&format!("{name}.{part}"))?.shape.clone());
        let (left_shape, right_shape) = (shape("left")?, shape("right")?);
        let ([rows, rank], [inner, cols]) = (&left_shape[..], &right_shape[..]) else {
            return Err(self.malformed(format!("{name} has factors of shapes {left_shape:?} and {right_shape:?}")));
        };
        let kept_name = format!("{name}.kept");
        let spec = self.file.tensor(&kept_name)?;
        if spec.dtype != Dtype::U32 {
            return Err(self.malformed(format!("`{kept_name}` is {:?}, expected U32", spec.dtype)));
        }
        let kept: Vec<u32> =
            self.file.bytes(&kept_name)?.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        let floats = |part: &str| self.file.f32(&format!("{name}.{part}"));
        let (left, right, sparse) = (floats("left")?, floats("right")?, floats("sparse")?);
        let ascending =
            kept.windows(2).all(|pair| pair[0] < pair[1]) && kept.last().is_none_or(|k| (*k as usize) < *rows);
        if rank != inner || sparse.len() != kept.len() * cols || !ascending {
            return Err(self.malformed(format!("the parts of {name} do not fit together")));
        }
        Ok(LowRankSparse { rows: *rows, cols: *cols, rank: *rank, left, right, kept, sparse })
    }

    fn bias(&self, name: &str) -> Result<Option<Vec<f32>>> {
        match self.file.tensor(name) {
            Ok(_) => Ok(Some(self.file.f32(name)?)),
            Err(_) => Ok(None),
        }
    }

    fn expert(&self) -> Result<CompactExpert> {
        let [gate, up, down] = NAMES.map(|(name, _)| self.matrix(name));
        let [gate_bias, up_bias, down_bias] = BIASES.map(|(name, _)| self.bias(name));
        Ok(CompactExpert { gate: gate?, up: up?, down: down?, biases: [gate_bias?, up_bias?, down_bias?] })
    }

    /// A part of the expert with its matrix formed; `None` for a bias that it lacks.
    fn part(&self, part: ExpertPart) -> Result<Option<Vec<f32>>> {
        if let Some((name, _)) = NAMES.iter().find(|(_, found)| *found == part) {
            return Ok(Some(self.matrix(name)?.dense()));
        }
        match BIASES.iter().find(|(_, found)| *found == part) {
            Some((name, _)) => self.bias(name),
            None => Ok(None),
        }
    }

    /// Refuses a file whose matrices are not those of an expert of this shape, by its header.
    fn check(&self, hidden: usize, width: usize) -> Result<()> {
        for (name, part) in NAMES {
            let (rows, cols) = part.dims(hidden, width);
            let (left, right) =
                (self.file.tensor(&format!("{name}.left"))?, self.file.tensor(&format!("{name}.right"))?);
            let found = (left.shape.first().copied(), right.shape.last().copied());
            if found != (Some(rows), Some(cols)) {
                let shapes = format!("{:?} and {:?}", left.shape, right.shape);
                return Err(self.malformed(format!(
                    "{name} has factors of shapes {shapes}, expected [{rows}, r] and [r, {cols}]"
                )));
            }
        }
        Ok(())
    }
}

/// A model whose routed experts are compressed ones with their matrices formed.
#[derive(Clone, Debug)]
pub struct CompactedModel {
    model: Arc<Checkpoint>,
    report: CompactReport,
}

impl CompactedModel {
    /// The model: to be run, or [written](moe_checkpoint::write()) as a plain checkpoint.
    pub fn model(&self) -> &Arc<Checkpoint> {
        &self.model
    }

    /// What compressing did.
    pub fn report(&self) -> &CompactReport {
        &self.report
    }
}

/// Experts read from compressed ones.
struct Formed(CompactModel);

impl PartChange for Formed {
    fn part(&self, _: &Checkpoint, layer: usize, set: usize, part: ExpertPart) -> Result<Option<Vec<f32>>> {
        self.0.file(layer, set)?.part(part)
    }
}

impl CompactModel {
    /// The model that these experts were compressed from, with them in place of its own, their matrices formed as they
    /// are read. As f32 ([`Dtype::F32`]) it computes what the compressed experts do; in the dtype of each expert of the
    /// base (`None`) it is the plain checkpoint that stock loaders read.
    ///
    /// Reads all files once, for the fingerprint.
    ///
    /// ```no_run
    /// use std::sync::Arc;
    /// use moe_checkpoint::{Checkpoint, WriteOptions, write};
    /// use moe_merge::CompactModel;
    ///
    /// let merged = Arc::new(Checkpoint::open("out/merged")?);
    /// let plain = CompactModel::open("out/merged.compact")?.on(&merged, None)?;
    /// write(plain.model(), "out/plain", &WriteOptions::default())?;
    /// # Ok::<(), moe_merge::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::OtherModel`] for another model than they were compressed from; a file that is missing, malformed, or
    /// does not fit.
    pub fn on(&self, base: &Arc<Checkpoint>, dtype: Option<Dtype>) -> Result<CompactedModel> {
        if !base.is_model(self.model()) {
            let (path, expected) = (base.dir().to_path_buf(), self.model().to_string());
            return Err(Error::OtherModel { what: "compact model", path, found: base.fingerprint(), expected });
        }
        let base = base.dequantized()?;
        let mut hasher = blake3::Hasher::new();
        for set in stored_sets(&base) {
            let widths = base.config().moe(set.layer).map(|moe| moe.stored_widths()).unwrap_or_default();
            let file = self.file(set.layer, set.set)?;
            file.check(base.shape().hidden_size, widths.get(set.set).copied().unwrap_or_default())?;
            let read = fs::File::open(&file.path).and_then(|file| hasher.update_reader(file).map(drop));
            read.map_err(Error::io(&file.path))?;
        }
        let Description { compression, report, .. } = self.description;
        let recipe = serde_json::json!({
            "compression": compression, "report": report, "dtype": dtype.map(|dtype| format!("{dtype}")),
            "experts": hasher.finalize().to_hex().to_string(),
        });
        let summary = format!(
            "matrices of routed experts replaced by {} {} and {} of {} rows, {} parameters by {}",
            match compression.ranks {
                Ranks::Same => "rank",
                Ranks::Importance => "mean rank",
            },
            compression.rank,
            report.rows_kept,
            report.rows,
            report.parameters_before,
            report.parameters_after
        );
        let step = Step::new("compress", &base, recipe, summary);
        Ok(CompactedModel { model: in_place::model(&base, Formed(self.clone()), dtype, step)?, report })
    }

    fn file(&self, layer: usize, set: usize) -> Result<SetFile> {
        SetFile::open(set_path(&self.dir, layer, set))
    }
}

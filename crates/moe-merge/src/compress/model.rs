//! The experts of a checkpoint, compressed, in a directory.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use moe_checkpoint::{
    Checkpoint, Dtype, Existing, ExpertPart, MoeShape, OutputDir, RawMatrix, Statistics, encode, write_atomic,
};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};

use super::{CompactExpert, Compression, LowRankSparse, RowScore, kept_rows};
use crate::{Error, Result};

/// File that describes the directory.
pub const COMPACT_FILE: &str = "compact.json";
/// Version of the format.
const VERSION: u64 = 1;

/// The experts of a checkpoint as [`CompactExpert`]s, one file per stored set of weights. Everything else of the model stays in the
/// checkpoint it was made from.
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
    /// Compresses the experts of a checkpoint, grouped ones once, into `to`, which appears whole or not at all. Rows of S compete over
    /// all matrices of the model. `fisher` are statistics of this very checkpoint and the name of one per unit: scores of experts
    /// that share weights add up.
    ///
    /// Two passes: the first ranks rows and keeps one number for each, the second splits again and writes. Memory is that of a
    /// few copies of one expert.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for Fisher scores without statistics, [`Error::OtherModel`] for those of another model, an output
    /// that exists, and what keeps weights from being read.
    pub fn compress(
        &self,
        from: &Checkpoint,
        to: &Path,
        fisher: Option<(&Statistics, &str)>,
        force: bool,
    ) -> Result<CompactReport> {
        self.validate()?;
        let fingerprint = from.fingerprint();
        if let Some((statistics, _)) = fisher
            && statistics.provenance().model != fingerprint
        {
            let (path, expected) = (from.dir().to_path_buf(), statistics.provenance().model.clone());
            return Err(Error::OtherModel { what: "statistics", path, found: fingerprint, expected });
        }
        if self.rows == RowScore::Fisher && fisher.is_none() {
            return Err(Error::parameter("compression.rows", "`fisher`", "`magnitude`, or Fisher scores of units"));
        }
        let sets = stored_sets(from);
        let mut scores: Vec<Vec<f64>> = Vec::with_capacity(3 * sets.len());
        for set in &sets {
            let importance = fisher.map(|fisher| set.importance(fisher)).transpose()?;
            let split = CompactExpert::split(&from.expert(set.layer, set.experts[0])?, self.rank)?;
            scores.extend(split.row_scores(self.rows, importance.as_deref())?);
        }
        let kept = kept_rows(&scores, self.keep_rows);
        let rows = scores.iter().map(|rows| rows.len() as u64).sum();
        store(self, from, to, force, rows, |at| {
            let set = &sets[at];
            let expert = from.expert(set.layer, set.experts[0])?;
            let kept = &kept[3 * at..3 * at + 3];
            Ok(CompactExpert::split(&expert, self.rank)?.keep_rows([&kept[0], &kept[1], &kept[2]]))
        })
    }
}

/// Writes the stored sets of a checkpoint, of whose S there were `rows` rows, compressed, in the order of [`stored_sets`].
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
        read(&set_path(&self.dir, layer, set))
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

/// Writes an expert in the dtypes of the checkpoint; gives the bytes of its tensors.
fn write(path: &Path, from: &Checkpoint, set: &Set, expert: &CompactExpert) -> Result<u64> {
    let malformed = |reason: String| Error::invalid_plan(reason).in_file(path);
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut floats = |name: String, dtype: Dtype, shape: Vec<usize>, values: &[f32]| {
        let mut bytes = Vec::new();
        if !encode(dtype, values, &mut bytes) {
            return Err(malformed(format!("`{name}` cannot be stored as {dtype:?}")));
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
    let biases = ["gate.bias", "up.bias", "down.bias"].into_iter().zip(ExpertPart::BIASES).zip(&expert.biases);
    for ((name, part), bias) in biases {
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

fn read(path: &Path) -> Result<CompactExpert> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let malformed = |reason: String| Error::invalid_plan(reason).in_file(path);
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| malformed(error.to_string()))?;
    let floats = |name: &str| -> Result<(Vec<f32>, Vec<usize>)> {
        let view = tensors.tensor(name).map_err(|error| malformed(format!("{name}: {error}")))?;
        if !matches!(view.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(malformed(format!("{name} is {:?}", view.dtype())));
        }
        let cols = view.shape().iter().product();
        let matrix = RawMatrix { bytes: view.data().into(), dtype: view.dtype(), rows: 1, cols };
        Ok((matrix.to_f32(), view.shape().to_vec()))
    };
    let matrix = |name: &str| -> Result<LowRankSparse> {
        let (left, left_shape) = floats(&format!("{name}.left"))?;
        let (right, right_shape) = floats(&format!("{name}.right"))?;
        let (sparse, _) = floats(&format!("{name}.sparse"))?;
        let kept = tensors.tensor(&format!("{name}.kept")).map_err(|error| malformed(error.to_string()))?;
        let kept: Vec<u32> = kept.data().as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        let ([rows, rank], [inner, cols]) = (&left_shape[..], &right_shape[..]) else {
            return Err(malformed(format!("{name} has factors of shapes {left_shape:?} and {right_shape:?}")));
        };
        let ascending =
            kept.windows(2).all(|pair| pair[0] < pair[1]) && kept.last().is_none_or(|k| (*k as usize) < *rows);
        if rank != inner || sparse.len() != kept.len() * cols || !ascending {
            return Err(malformed(format!("the parts of {name} do not fit together")));
        }
        Ok(LowRankSparse { rows: *rows, cols: *cols, rank: *rank, left, right, kept, sparse })
    };
    let bias = |name: &str| match tensors.tensor(name) {
        Ok(_) => floats(name).map(|(values, _)| Some(values)),
        Err(_) => Ok(None),
    };
    Ok(CompactExpert {
        gate: matrix("gate")?,
        up: matrix("up")?,
        down: matrix("down")?,
        biases: [bias("gate.bias")?, bias("up.bias")?, bias("down.bias")?],
    })
}

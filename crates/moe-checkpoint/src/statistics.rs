//! Named accumulators over the routed experts of a model, and their file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::artifact_file::{Kind, OutTensor, TensorFile, Tensors, write_tensors};
use crate::statistics_array::combine_lowest;
use crate::{ArrayKind, Error, Extent, Fold, MoeLayerShape, MoeShape, Provenance, Result};

/// Version 2 added vectors and moments, version 3 matrices; files of earlier versions are read as they are.
pub(crate) const STATISTICS: Kind = Kind { name: "statistics", key: "moe.statistics", version: 3 };

/// How much data statistics have seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Tokens, without padding.
    pub tokens: u64,
    /// Sequences that were collected.
    pub sequences: u64,
    /// Tokens whose prediction enters the loss.
    pub loss_tokens: u64,
}

/// One named array, its values layer by layer; a matrix as if there were one layer.
#[derive(Clone, Debug)]
pub(crate) struct Array {
    pub(crate) kind: ArrayKind,
    fold: Fold,
    pub(crate) layers: Vec<Vec<f64>>,
    /// Of a matrix: whether it was lent for adding to since a part was saved.
    pub(crate) touched: bool,
}

impl PartialEq for Array {
    fn eq(&self, other: &Self) -> bool {
        (self.kind, self.fold, &self.layers) == (other.kind, other.fold, &other.layers)
    }
}

impl Array {
    pub(crate) fn new(kind: ArrayKind, fold: Fold, shape: &MoeShape) -> Self {
        let layers = match (kind, fold) {
            (ArrayKind::Matrix { .. }, Fold::Lowest { .. }) => vec![Vec::new()],
            (ArrayKind::Matrix { rows, columns }, _) => vec![vec![0.0; rows * columns]],
            _ => shape.layers.iter().map(|layer| vec![0.0; kind.len(shape, layer)]).collect(),
        };
        Self::of_layers(kind, fold, layers)
    }

    pub(crate) fn of_layers(kind: ArrayKind, fold: Fold, layers: Vec<Vec<f64>>) -> Self {
        Self { kind, fold, layers, touched: false }
    }

    pub(crate) fn fold(&self) -> Fold {
        self.fold
    }

    fn combine(&mut self, from: &Self, shape: &MoeShape) {
        match (self.kind, self.fold) {
            (ArrayKind::Matrix { rows, columns }, Fold::Lowest { key }) => {
                combine_lowest(&mut self.layers[0], &from.layers[0], [rows, columns], key);
            }
            (ArrayKind::Matrix { .. }, fold) => fold.combine(&mut self.layers[0], &from.layers[0]),
            (kind, fold) => {
                for ((into, from), layer) in self.layers.iter_mut().zip(&from.layers).zip(&shape.layers) {
                    let len = kind.vector_len(shape, layer);
                    into.chunks_mut(len).zip(from.chunks(len)).for_each(|(into, from)| fold.combine(into, from));
                }
            }
        }
    }

    /// Name, shape and values of its tensors in a file, and the layer of each.
    fn tensors<'a>(
        &'a self,
        id: &'a str,
        shape: &'a MoeShape,
    ) -> impl Iterator<Item = (String, Vec<usize>, &'a [f64], Option<&'a MoeLayerShape>)> {
        let matrix = match self.kind {
            ArrayKind::Matrix { columns, .. } => Some((id.to_string(), columns)),
            _ => None,
        };
        let of_model = matrix.into_iter().map(|(name, columns)| {
            let values = self.layers[0].as_slice();
            (name, vec![values.len() / columns.max(1), columns], values, None)
        });
        let is_matrix = matches!(self.kind, ArrayKind::Matrix { .. });
        let layers = shape.layers.iter().zip(&self.layers).filter(move |_| !is_matrix);
        of_model.chain(layers.map(|(layer, values)| {
            (tensor_name(id, layer.layer), self.kind.dims(shape, layer), values.as_slice(), Some(layer))
        }))
    }
}

/// Named arrays with a value per unit, a value per expert or a vector per expert, the waves they hold, how much data
/// that was, and where it came from.
///
/// Values are kept in f64. Sums of floats depend on their order; [`StatisticsStore`](crate::StatisticsStore) fixes the
/// order to ascending wave ids, which makes sharded, resumed and uninterrupted collections equal bit for bit.
///
/// ```
/// use moe_checkpoint::{Fold, MoeLayerShape, MoeShape, Provenance, Statistics};
///
/// let shape = MoeShape { gateless: false, hidden_size: 4, top_k: 1, layers: vec![MoeLayerShape { layer: 0, widths: vec![3, 2] }] };
/// let mut statistics = Statistics::new(&shape, Provenance::new("model", "data", "{}"));
/// statistics.begin(0);
/// statistics.unit_mut("fisher", Fold::Sum, 0, 1)?[0] += 0.5;
/// statistics.expert_mut("routed", Fold::Sum, 0)?[1] += 1.0;
/// statistics.add_counts(7, 1, 6);
/// assert_eq!(statistics.unit("fisher", 0, 1)?, [0.5, 0.0]);
/// # Ok::<(), moe_checkpoint::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    pub(crate) shape: MoeShape,
    /// Per MoE layer, the start of every expert's units.
    offsets: Vec<Vec<usize>>,
    provenance: Provenance,
    waves: BTreeSet<u64>,
    counts: Counts,
    pub(crate) arrays: BTreeMap<String, Array>,
}

impl Statistics {
    /// Empty statistics of a model of this shape.
    pub fn new(shape: &MoeShape, provenance: Provenance) -> Self {
        Self {
            shape: shape.clone(),
            offsets: shape.layers.iter().map(MoeLayerShape::offsets).collect(),
            provenance,
            waves: BTreeSet::new(),
            counts: Counts::default(),
            arrays: BTreeMap::new(),
        }
    }

    /// The same waves and counts, without arrays.
    pub(crate) fn empty_copy(&self) -> Self {
        let mut copy = Self::new(&self.shape, self.provenance.clone());
        (copy.waves, copy.counts) = (self.waves.clone(), self.counts);
        copy
    }

    /// Names the wave that the following additions belong to.
    pub fn begin(&mut self, wave: u64) {
        self.waves.insert(wave);
    }

    /// Shape of the model.
    pub fn shape(&self) -> &MoeShape {
        &self.shape
    }

    /// Where the values come from.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// Ids of the waves held.
    pub fn waves(&self) -> &BTreeSet<u64> {
        &self.waves
    }

    /// How much data the values were collected on.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Tokens seen, without padding.
    pub fn tokens(&self) -> u64 {
        self.counts.tokens
    }

    /// Sequences seen.
    pub fn sequences(&self) -> u64 {
        self.counts.sequences
    }

    /// Tokens whose prediction entered the loss.
    pub fn loss_tokens(&self) -> u64 {
        self.counts.loss_tokens
    }

    /// Adds to the counters.
    pub fn add_counts(&mut self, tokens: u64, sequences: u64, loss_tokens: u64) {
        self.counts.tokens += tokens;
        self.counts.sequences += sequences;
        self.counts.loss_tokens += loss_tokens;
    }

    /// Names of the arrays, sorted.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.arrays.keys().map(String::as_str)
    }

    /// Whether there is an array of this name.
    pub fn contains(&self, id: &str) -> bool {
        self.arrays.contains_key(id)
    }

    /// What an array holds.
    ///
    /// # Errors
    /// [`Error::UnknownStatistic`].
    pub fn kind(&self, id: &str) -> Result<ArrayKind> {
        Ok(self.array(id)?.kind)
    }

    /// Allocates an array for the whole model, with zeros, unless it is there: waves of one collection must hold the
    /// same arrays, added to or not.
    ///
    /// # Errors
    /// [`Error::StatisticKind`] for an array of this name with another kind or fold, or a fold that the kind does not
    /// take.
    pub fn allocate(&mut self, id: &str, kind: ArrayKind, fold: Fold) -> Result<()> {
        self.array_mut(id, kind, fold).map(drop)
    }

    /// Rounds every value to f32, as a wave file does.
    pub fn round_to_f32(&mut self) {
        let values = self.arrays.values_mut().flat_map(|array| array.layers.iter_mut().flatten());
        values.for_each(|value| *value = f64::from(*value as f32));
    }

    /// The values of one expert's units, `[width]`, for adding to. `layer` is the decoder layer index. The array is
    /// allocated for the whole model, with zeros, on its first use.
    ///
    /// # Errors
    /// An unknown layer or expert, or an array of this name with another kind or fold.
    pub fn unit_mut(&mut self, id: &str, fold: Fold, layer: usize, expert: usize) -> Result<&mut [f64]> {
        let (position, range) = self.unit_range(layer, expert)?;
        let array = self.array_mut(id, ArrayKind::Unit, fold)?;
        Ok(&mut array.layers[position][range])
    }

    /// The values of one layer's experts, `[num_experts]`, for adding to. As [`Statistics::unit_mut`] otherwise.
    ///
    /// # Errors
    /// An unknown layer, or an array of this name with another kind or fold.
    pub fn expert_mut(&mut self, id: &str, fold: Fold, layer: usize) -> Result<&mut [f64]> {
        let position = self.position(layer)?;
        let array = self.array_mut(id, ArrayKind::Expert, fold)?;
        Ok(&mut array.layers[position])
    }

    /// The vector of one expert, of the length that `extent` says, for adding to. As [`Statistics::unit_mut`]
    /// otherwise.
    ///
    /// # Errors
    /// An unknown layer or expert, or an array of this name with another kind or fold.
    pub fn vector_mut(
        &mut self,
        id: &str,
        extent: Extent,
        fold: Fold,
        layer: usize,
        expert: usize,
    ) -> Result<&mut [f64]> {
        let (position, range) = self.vector_range(extent, layer, expert)?;
        let array = self.array_mut(id, ArrayKind::Vector(extent), fold)?;
        Ok(&mut array.layers[position][range])
    }

    /// One matrix `[rows, columns]`, for adding to. As [`Statistics::unit_mut`] otherwise.
    ///
    /// # Errors
    /// An array of this name with another kind or fold; [`Fold::Lowest`], whose rows are put in by
    /// [`Statistics::add_rows`].
    pub fn matrix_mut(&mut self, id: &str, [rows, columns]: [usize; 2], fold: Fold) -> Result<&mut [f64]> {
        let kind = ArrayKind::Matrix { rows, columns };
        if matches!(fold, Fold::Lowest { .. }) {
            let expected = "a fold of matrices of fixed size".into();
            return Err(Error::StatisticKind {
                id: id.to_string(),
                found: format!("{kind}, folded by {fold}"),
                expected,
            });
        }
        let array = self.array_mut(id, kind, fold)?;
        array.touched = true;
        Ok(&mut array.layers[0])
    }

    /// Adds rows, row-major, to a matrix of at most `rows` that keeps those with the lowest first `key` numbers.
    ///
    /// # Errors
    /// An array of this name with another kind or fold; values that are no whole rows.
    pub fn add_rows(&mut self, id: &str, [rows, columns]: [usize; 2], key: usize, values: &[f64]) -> Result<()> {
        let array = self.array_mut(id, ArrayKind::Matrix { rows, columns }, Fold::Lowest { key })?;
        if !values.len().is_multiple_of(columns) {
            let found = format!("{} values", values.len());
            return Err(Error::StatisticKind { id: id.to_string(), found, expected: format!("rows of {columns}") });
        }
        array.touched = true;
        combine_lowest(&mut array.layers[0], values, [rows, columns], key);
        Ok(())
    }

    /// The values of a matrix, row-major, and how many columns it has.
    ///
    /// # Errors
    /// An unknown id, or an array of another kind.
    pub fn matrix(&self, id: &str) -> Result<(&[f64], usize)> {
        let array = self.array(id)?;
        match array.kind {
            ArrayKind::Matrix { columns, .. } => Ok((&array.layers[0], columns)),
            kind => {
                Err(Error::StatisticKind { id: id.to_string(), found: "a matrix".into(), expected: kind.to_string() })
            }
        }
    }

    /// The values of one expert's units, `[width]`.
    ///
    /// # Errors
    /// An unknown id, layer or expert, or an array of another kind.
    pub fn unit(&self, id: &str, layer: usize, expert: usize) -> Result<&[f64]> {
        let (position, range) = self.unit_range(layer, expert)?;
        Ok(&self.array_of(id, ArrayKind::Unit)?.layers[position][range])
    }

    /// The values of one layer's experts, `[num_experts]`.
    ///
    /// # Errors
    /// An unknown id or layer, or an array of another kind.
    pub fn expert(&self, id: &str, layer: usize) -> Result<&[f64]> {
        let position = self.position(layer)?;
        Ok(&self.array_of(id, ArrayKind::Expert)?.layers[position])
    }

    /// The vector of one expert, of the length that `extent` says.
    ///
    /// # Errors
    /// An unknown id, layer or expert, or an array of another kind.
    pub fn vector(&self, id: &str, extent: Extent, layer: usize, expert: usize) -> Result<&[f64]> {
        let (position, range) = self.vector_range(extent, layer, expert)?;
        Ok(&self.array_of(id, ArrayKind::Vector(extent))?.layers[position][range])
    }

    /// Combines other statistics into these, array by array as their [`Fold`] says. Empty statistics take whatever
    /// arrays the other has.
    ///
    /// # Errors
    /// Another shape or provenance, a wave that both hold, or other arrays; nothing is changed then.
    pub fn fold(&mut self, other: &Statistics) -> Result<()> {
        self.provenance.expect(&other.provenance, "the statistics to fold in")?;
        if self.shape != other.shape {
            return Err(Error::InvalidShape {
                field: "shape of the statistics to fold in".into(),
                found: format!("{} MoE layers, {} units", other.shape.layers.len(), other.shape.units()),
                expected: format!("that of {} MoE layers, {} units", self.shape.layers.len(), self.shape.units()),
            });
        }
        let both: Vec<u64> = self.waves.intersection(&other.waves).copied().collect();
        if !both.is_empty() {
            return Err(Error::WaveOverlap { what: "the statistics to fold in".into(), waves: both });
        }
        if self.waves.is_empty() && self.arrays.is_empty() {
            self.arrays = other.arrays.clone();
        } else {
            let signature = |s: &Statistics| -> Vec<(String, ArrayKind, Fold)> {
                s.arrays.iter().map(|(id, array)| (id.clone(), array.kind, array.fold)).collect()
            };
            let (ours, theirs) = (signature(self), signature(other));
            if ours != theirs {
                let told = |of: &[(String, ArrayKind, Fold)]| {
                    let one =
                        |(id, kind, fold): &(String, ArrayKind, Fold)| format!("`{id}` ({kind}, folded by {fold})");
                    of.iter().map(one).collect::<Vec<_>>().join(", ")
                };
                return Err(Error::StatisticsDiffer { found: told(&theirs), expected: told(&ours) });
            }
            for (array, from) in self.arrays.values_mut().zip(other.arrays.values()) {
                array.combine(from, &self.shape);
            }
        }
        self.waves.extend(&other.waves);
        self.add_counts(other.counts.tokens, other.counts.sequences, other.counts.loss_tokens);
        Ok(())
    }

    /// Writes a file that [`Statistics::load`] reads back to the same bits, atomically.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::NonFinite`] for a NaN or infinite value.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.write(path.as_ref(), Dtype::F64)
    }

    /// Writes the values as f32 or f64.
    pub(crate) fn write(&self, path: &Path, dtype: Dtype) -> Result<()> {
        let mut tensors: Vec<OutTensor> = Vec::new();
        for (id, array) in &self.arrays {
            for (name, dims, values, layer) in array.tensors(id, &self.shape) {
                // Finiteness is judged on what is written: an f64 can be too large for f32.
                let finite = |v: &f64| if dtype == Dtype::F32 { (*v as f32).is_finite() } else { v.is_finite() };
                if let Some(index) = values.iter().position(|v| !finite(v)) {
                    return Err(self.non_finite(id, array.kind, layer, index, values[index]));
                }
                let bytes = match dtype {
                    Dtype::F32 => values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect(),
                    _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                };
                tensors.push((name, dtype, dims, bytes));
            }
        }
        let meta = Meta {
            version: STATISTICS.version,
            shape: self.shape.clone(),
            provenance: self.provenance.clone(),
            waves: self.waves.clone(),
            counts: self.counts,
            arrays: self.arrays.iter().map(|(id, a)| (id.clone(), ArrayMeta { kind: a.kind, fold: a.fold })).collect(),
        };
        write_tensors(path, STATISTICS, &meta, &tensors)
    }

    /// Reads a file of [`Statistics::save`] or a wave file of a store.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::ArtifactVersion`] for a file of a newer version, [`Error::MalformedArtifact`] for
    /// anything else that is not such a file, [`Error::NonFinite`] for a NaN or infinite value.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let file = TensorFile::read(path.as_ref(), STATISTICS)?;
        let (meta, tensors): (Meta, Tensors<'_>) = file.parse()?;
        meta.shape.validate().map_err(|error| tensors.malformed(error.to_string()))?;
        let mut statistics = Self::new(&meta.shape, meta.provenance);
        statistics.waves = meta.waves;
        statistics.counts = meta.counts;
        let mut expected = 0;
        for (id, ArrayMeta { kind, fold }) in meta.arrays {
            if !kind.takes(fold) {
                return Err(tensors.malformed(format!("statistic `{id}`: {kind} cannot be folded by {fold}")));
            }
            let mut layers = Vec::with_capacity(meta.shape.layers.len());
            let mut read = |name: &str, dims: &[usize], layer: Option<&MoeLayerShape>| {
                let values = tensors.f64(name, dims)?;
                if let Some(index) = values.iter().position(|v| !v.is_finite()) {
                    return Err(statistics.non_finite(&id, kind, layer, index, values[index]));
                }
                layers.push(values);
                expected += 1;
                Ok(())
            };
            match (kind, fold) {
                (ArrayKind::Matrix { rows, columns }, Fold::Lowest { .. }) => {
                    let found = tensors.rows(&id)?;
                    if found > rows {
                        return Err(
                            tensors.malformed(format!("tensor `{id}` has {found} rows, expected {rows} at most"))
                        );
                    }
                    read(&id, &[found, columns], None)?;
                }
                (ArrayKind::Matrix { rows, columns }, _) => read(&id, &[rows, columns], None)?,
                _ => {
                    for layer in &meta.shape.layers {
                        read(&tensor_name(&id, layer.layer), &kind.dims(&meta.shape, layer), Some(layer))?;
                    }
                }
            }
            statistics.arrays.insert(id, Array::of_layers(kind, fold, layers));
        }
        if tensors.len() != expected {
            return Err(tensors.malformed(format!("{} tensors, expected {expected}", tensors.len())));
        }
        Ok(statistics)
    }

    fn position(&self, layer: usize) -> Result<usize> {
        self.shape
            .position(layer)
            .ok_or_else(|| Error::UnknownLayer { layer, known: self.shape.layers.iter().map(|l| l.layer).collect() })
    }

    fn unit_range(&self, layer: usize, expert: usize) -> Result<(usize, std::ops::Range<usize>)> {
        let position = self.position(layer)?;
        match self.offsets[position].get(expert..expert.saturating_add(2)) {
            Some([start, end]) => Ok((position, *start..*end)),
            _ => Err(Error::UnknownExpert { layer, expert, count: self.shape.layers[position].num_experts() }),
        }
    }

    fn array(&self, id: &str) -> Result<&Array> {
        self.arrays
            .get(id)
            .ok_or_else(|| Error::UnknownStatistic { id: id.to_string(), known: self.arrays.keys().cloned().collect() })
    }

    fn vector_range(&self, extent: Extent, layer: usize, expert: usize) -> Result<(usize, std::ops::Range<usize>)> {
        let (position, _) = self.unit_range(layer, expert)?;
        let len = extent.len(&self.shape, &self.shape.layers[position]);
        Ok((position, expert * len..(expert + 1) * len))
    }

    fn array_of(&self, id: &str, kind: ArrayKind) -> Result<&Array> {
        let array = self.array(id)?;
        if array.kind != kind {
            return Err(Error::StatisticKind {
                id: id.to_string(),
                found: kind.to_string(),
                expected: array.kind.to_string(),
            });
        }
        Ok(array)
    }

    fn array_mut(&mut self, id: &str, kind: ArrayKind, fold: Fold) -> Result<&mut Array> {
        // Looked up twice so that the usual case, an array in use, does not allocate the key.
        if !self.arrays.contains_key(id) && kind.takes(fold) {
            self.arrays.insert(id.to_string(), Array::new(kind, fold, &self.shape));
        }
        match self.arrays.get_mut(id) {
            Some(array) if array.kind == kind && array.fold == fold => Ok(array),
            other => Err(Error::StatisticKind {
                id: id.to_string(),
                found: format!("{kind}, folded by {fold}"),
                expected: other.map_or("a fold of that kind".into(), |a| format!("{}, folded by {}", a.kind, a.fold)),
            }),
        }
    }

    fn non_finite(&self, id: &str, kind: ArrayKind, layer: Option<&MoeLayerShape>, index: usize, value: f64) -> Error {
        let what = format!("statistic `{id}`");
        let Some(layer) = layer else {
            let columns = if let ArrayKind::Matrix { columns, .. } = kind { columns } else { 1 };
            return Error::NonFiniteMatrix { what, row: index / columns, column: index % columns, value };
        };
        let (what, expert, unit) = match kind {
            ArrayKind::Expert => (what, index, None),
            ArrayKind::Unit => {
                let offsets = layer.offsets();
                let expert = offsets.partition_point(|start| *start <= index).saturating_sub(1);
                (what, expert, Some(index - offsets[expert]))
            }
            ArrayKind::Vector(extent) => {
                let len = extent.len(&self.shape, layer).max(1);
                (format!("element {} of {what}", index % len), index / len, None)
            }
            ArrayKind::Matrix { .. } => (what, index, None),
        };
        Error::NonFinite { what, layer: layer.layer, expert, unit, value }
    }
}

pub(crate) fn tensor_name(id: &str, layer: usize) -> String {
    format!("{id}.layer.{layer}")
}

#[derive(Serialize, Deserialize)]
struct Meta {
    version: u64,
    shape: MoeShape,
    provenance: Provenance,
    waves: BTreeSet<u64>,
    counts: Counts,
    arrays: BTreeMap<String, ArrayMeta>,
}

#[derive(Serialize, Deserialize)]
struct ArrayMeta {
    #[serde(rename = "granularity")]
    kind: ArrayKind,
    fold: Fold,
}

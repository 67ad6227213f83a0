//! The stored tensors of a quantized model, made when they are read.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::convert;
use crate::expert_bytes::RawMatrix;
use crate::experts::{ExpertPart, ExpertTensor};
use crate::formats;
use crate::formats::scheme::{Parted, Scheme};
use crate::quantize::InputMoments;
use crate::record::Step;
use crate::source::{ModelSource, sliced};
use crate::weights::TensorInfo;
use crate::{Checkpoint, Result};

/// Matrices that are kept, since the stored tensors of one are asked for one after the other.
const KEPT: usize = 16;

/// What a matrix holds.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Content {
    /// A tensor of the model.
    Tensor(String),
    /// A part of a set of weights.
    Expert { layer: usize, set: usize, part: ExpertPart },
    /// Rows of gate and up of a set in turn, gate first.
    GateUp { layer: usize, set: usize },
    /// One of the matrices of a tensor of the model, of these sides; in the tensor transposed where said so.
    Matrix { name: String, matrix: usize, dims: (usize, usize), transposed: bool },
    /// Rows and columns of a matrix of a quantized weight of the base.
    Selected { weight: String, matrix: usize, rows: Vec<u32>, cols: Vec<u32> },
}

/// A quantized weight.
pub(super) struct Weight {
    /// Its name without quantization.
    pub name: String,
    /// Rows and columns of every matrix.
    pub dims: (usize, usize),
    pub scheme: Scheme,
    /// What its matrices hold; several in a fused layout.
    pub content: Vec<Content>,
}

impl Weight {
    pub fn stack(&self) -> usize {
        self.content.len()
    }
}

/// What a stored tensor holds.
pub(super) enum Stored {
    /// The tensor of the same name of the model without quantization.
    Plain,
    /// A stored tensor of the quantized base.
    Copy(String),
    /// Parts of a stored tensor of the quantized base, which is a stack of so many.
    Shares { name: String, stack: usize, of: Vec<usize> },
    /// One of the tensors that a weight is packed into, matrix after matrix.
    Part { weight: usize, part: usize },
    /// The same whatever the weight holds.
    Constant(Vec<u8>),
}

/// A model whose weights are quantized when they are read.
pub(super) struct QuantizedSource {
    /// The model without quantization.
    from: Arc<Checkpoint>,
    /// What it was made from: quantized itself, or the same.
    base: Arc<Checkpoint>,
    stored: BTreeMap<String, Stored>,
    weights: Vec<Weight>,
    step: Option<Step>,
    /// Whether the step was done to the model without quantization.
    on_plain: bool,
    /// Second moments of the inputs of experts, where these are rounded by them.
    moments: Option<InputMoments>,
    kept: Mutex<VecDeque<((usize, usize), Packed)>>,
}

/// The bytes that a matrix is packed into.
type Packed = Arc<Vec<Vec<u8>>>;

impl QuantizedSource {
    pub fn new(
        from: Arc<Checkpoint>,
        base: Arc<Checkpoint>,
        stored: BTreeMap<String, Stored>,
        weights: Vec<Weight>,
        step: Option<Step>,
    ) -> Self {
        let on_plain = step.is_none();
        Self { from, base, stored, weights, step, on_plain, moments: None, kept: Mutex::new(VecDeque::new()) }
    }

    /// A step that was done to the model without quantization.
    pub fn with_step(self, step: Option<Step>) -> Self {
        Self { step, on_plain: true, ..self }
    }

    pub fn with_moments(self, moments: Option<&InputMoments>) -> Self {
        Self { moments: moments.cloned(), ..self }
    }

    fn packed(&self, weight: usize, matrix: usize) -> Result<Packed> {
        let key = (weight, matrix);
        let find = |kept: &VecDeque<((usize, usize), Packed)>| {
            kept.iter().find(|(found, _)| *found == key).map(|(_, packed)| packed.clone())
        };
        if let Some(packed) = find(&self.kept.lock().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(packed);
        }
        let Weight { scheme, content, .. } = &self.weights[weight];
        let parted = match &content[matrix] {
            Content::Selected { weight, matrix, rows, cols } => {
                self.base.parted(weight, *matrix)?.map(|parted| scheme.select(&parted, rows, cols).0)
            }
            _ => None,
        };
        let parted = match parted {
            Some(parted) => parted,
            None => rounded(&self.from, &self.weights[weight], matrix, self.moments.as_ref())?,
        };
        let packed = Arc::new(scheme.pack(&parted));
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_back((key, packed.clone()));
        if kept.len() > KEPT {
            kept.pop_front();
        }
        Ok(packed)
    }
}

/// The values of a matrix.
fn values(from: &Checkpoint, content: &Content) -> Result<Vec<f32>> {
    let part = |layer: usize, set: usize, part: ExpertPart| -> Result<RawMatrix<'_>> {
        let missing = || crate::Error::OutOfRange {
            what: format!("layer {layer}, expert {set}"),
            found: format!("no {part}"),
            expected: "every part that its config has".to_string(),
        };
        from.set_part(layer, set, part)?.ok_or_else(missing)
    };
    Ok(match content {
        Content::Tensor(name) => from.tensor_f32(name)?,
        Content::Expert { layer, set, part: which } => part(*layer, *set, *which)?.to_f32(),
        Content::GateUp { layer, set } => {
            let [gate, up] = [ExpertPart::Gate, ExpertPart::Up].map(|which| part(*layer, *set, which));
            let (gate, up) = (gate?, up?);
            let cols = gate.cols.max(1);
            let (gate, up) = (gate.to_f32(), up.to_f32());
            gate.chunks(cols).zip(up.chunks(cols)).flat_map(|(gate, up)| [gate, up].concat()).collect()
        }
        Content::Matrix { name, matrix, dims: (rows, cols), transposed } => {
            let info = from.info(name)?;
            let one = rows * cols * info.dtype.bitsize() / 8;
            let mut values = Vec::with_capacity(rows * cols);
            convert::decode_f32(info.dtype, &from.tensor_bytes(name, matrix * one..(matrix + 1) * one)?, &mut values);
            match transposed {
                true => (0..rows * cols).map(|at| values[at % cols * rows + at / cols]).collect(),
                false => values,
            }
        }
        Content::Selected { .. } => Vec::new(),
    })
}

/// A matrix of a weight, rounded.
fn rounded(from: &Checkpoint, weight: &Weight, matrix: usize, moments: Option<&InputMoments>) -> Result<Parted> {
    let (content, dims) = (&weight.content[matrix], weight.dims);
    let values = values(from, content)?;
    let seen = match (moments, content) {
        (Some(moments), Content::Expert { layer, set, part }) => moments.of(*layer, *set, *part, dims.1)?,
        (Some(moments), Content::GateUp { layer, set }) => moments.of(*layer, *set, ExpertPart::Gate, dims.1)?,
        _ => None,
    };
    Ok(match seen {
        Some(moments) => weight.scheme.encode_second_order(&values, dims, moments),
        None => weight.scheme.encode(&values, dims),
    })
}

/// What rounding changes of the first matrix of every so many weights, relative to the matrices.
pub(super) fn relative_error(from: &Checkpoint, weights: &[Weight], moments: Option<&InputMoments>) -> Result<f64> {
    /// Matrices that are tried.
    const TRIED: usize = 12;
    let step = weights.len().div_ceil(TRIED).max(1);
    let (mut changed, mut whole) = (0f64, 0f64);
    for weight in weights.iter().step_by(step) {
        let values = values(from, &weight.content[0])?;
        let rounded = weight.scheme.decode(&rounded(from, weight, 0, moments)?);
        for (a, b) in values.iter().zip(&rounded) {
            changed += f64::from(a - b).powi(2);
            whole += f64::from(*a).powi(2);
        }
    }
    Ok(if whole > 0.0 { (changed / whole).sqrt() } else { 0.0 })
}

impl ModelSource for QuantizedSource {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        match self.stored.get(&tensor.name) {
            None | Some(Stored::Plain) => self.from.tensor_bytes(&tensor.name, range),
            Some(Stored::Copy(name)) => self.base.tensor_bytes(name, range),
            Some(Stored::Constant(bytes)) => Ok(Cow::Borrowed(&bytes[range])),
            Some(Stored::Shares { name, stack, of }) => {
                let bytes = self.base.info(name)?.bytes as usize;
                let one = (bytes / stack).max(1);
                let wanted = range.start / one..range.end.div_ceil(one);
                let mut out = Vec::with_capacity(wanted.len() * one);
                for share in &of[wanted.clone()] {
                    out.extend_from_slice(&self.base.tensor_bytes(name, formats::share(bytes, *share, *stack))?);
                }
                let start = wanted.start * one;
                Ok(sliced(Cow::Owned(out), range.start - start..range.end - start))
            }
            Some(Stored::Part { weight, part }) => {
                let one = (tensor.bytes as usize / self.weights[*weight].stack()).max(1);
                let wanted = range.start / one..range.end.div_ceil(one);
                let mut out = Vec::with_capacity(wanted.len() * one);
                for matrix in wanted.clone() {
                    out.extend_from_slice(&self.packed(*weight, matrix)?[*part]);
                }
                let start = wanted.start * one;
                Ok(sliced(Cow::Owned(out), range.start - start..range.end - start))
            }
        }
    }

    fn grain(&self, tensor: &TensorInfo) -> usize {
        match self.stored.get(&tensor.name) {
            None | Some(Stored::Plain) => self.from.grain(&tensor.name),
            Some(Stored::Copy(name)) => self.base.grain(name),
            Some(Stored::Constant(_)) => 1,
            Some(Stored::Shares { of, .. }) => tensor.bytes as usize / of.len().max(1),
            Some(Stored::Part { weight, .. }) => tensor.bytes as usize / self.weights[*weight].stack().max(1),
        }
    }

    fn release(&self, tensor: &TensorInfo, range: Range<usize>) {
        match self.stored.get(&tensor.name) {
            None | Some(Stored::Plain) => self.from.release_range(&tensor.name, range),
            Some(Stored::Copy(name)) => self.base.release_range(name, range),
            Some(Stored::Constant(_)) => {}
            Some(Stored::Shares { name, .. }) => drop(self.base.release_tensor(name)),
            Some(Stored::Part { weight, .. }) => {
                for content in &self.weights[*weight].content {
                    match content {
                        Content::Tensor(name) | Content::Matrix { name, .. } => {
                            drop(self.from.release_tensor(name));
                        }
                        Content::Expert { layer, set, .. } | Content::GateUp { layer, set } => {
                            self.from.release_set(*layer, *set);
                        }
                        Content::Selected { weight, .. } => drop(self.base.release_tensor(weight)),
                    }
                }
            }
        }
    }

    fn release_all(&self) {
        self.from.release();
        self.base.release();
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(if self.on_plain { &self.from } else { &self.base })
    }

    fn step(&self) -> Option<Step> {
        self.step.clone()
    }
}

/// Names of a layer's expert tensors in every layout, to be left out where experts are written anew.
pub(super) fn expert_names(from: &Checkpoint, layer: usize, experts: usize) -> Vec<String> {
    let fused = [ExpertTensor::FusedGateUp, ExpertTensor::FusedDown];
    let each = (0..experts).flat_map(|set| [ExpertTensor::Gate(set), ExpertTensor::Up(set), ExpertTensor::Down(set)]);
    fused.into_iter().chain(each).map(|tensor| from.expert_tensor_name(layer, tensor)).collect()
}

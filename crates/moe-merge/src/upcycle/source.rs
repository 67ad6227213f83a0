//! The made model as a source of weights.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use moe_checkpoint::{
    Checkpoint, Dtype, ExpertPart, ExpertWeights, LayerRole, ModelSource, RawMatrix, Result as CheckpointResult, Role,
    Step, TensorInfo, decode_f32, encode, sliced,
};
use rand::seq::SliceRandom;

use super::partition::Partition;
use super::start::{Start, generator, normal};
use super::{ClusterBy, RouterStart, UpcycleMethod, Upcycling};
use crate::evidence::{Evidence, TokenSample};
use crate::merged::encoded_part;
use crate::{Error, Result};

/// A tensor that the dense model does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Made {
    Router,
    Shared(ExpertPart),
    SharedGate,
}

/// Experts made of dense models.
pub(super) struct Upcycled {
    pub recipe: Upcycling,
    pub router: RouterStart,
    /// The base, and others in order.
    pub models: Vec<Arc<Checkpoint>>,
    pub evidence: Option<Arc<Evidence>>,
    pub domains: Vec<Arc<Evidence>>,
    /// Directions of experts by layer, `[experts, hidden]` each.
    pub prototypes: Option<BTreeMap<usize, Vec<f32>>>,
    /// Tensors of shared experts and routers, by name.
    pub made: BTreeMap<String, (usize, Made)>,
    /// The partition of each layer, from when it is asked for first.
    pub partitions: Vec<OnceLock<Partition>>,
    pub step: Step,
}

const DENSE: [(ExpertPart, LayerRole); 3] = [
    (ExpertPart::Gate, LayerRole::DenseGate),
    (ExpertPart::Up, LayerRole::DenseUp),
    (ExpertPart::Down, LayerRole::DenseDown),
];

/// The tokens that a layer saw, if there are any.
fn sampled(evidence: &Evidence, layer: usize) -> Option<&TokenSample> {
    evidence.layer(layer)?.sample.as_ref().filter(|sample| sample.tokens() > 0)
}

fn dense_role(layer: usize, part: ExpertPart) -> Option<Role> {
    DENSE.iter().find(|(of, _)| *of == part).map(|(_, role)| Role::Layer(layer, *role))
}

impl Upcycled {
    fn base(&self) -> &Arc<Checkpoint> {
        &self.models[0]
    }

    /// A part of the dense network of a model, and its dtype.
    fn dense(&self, model: usize, layer: usize, part: ExpertPart) -> Result<(Vec<f32>, Dtype)> {
        let lacking = || Error::invalid_plan(format!("layer {layer}: there is no {part}"));
        let role = dense_role(layer, part).ok_or_else(lacking)?;
        let model = &self.models[model];
        Ok((model.read_f32(role)?, model.role(role)?.dtype))
    }

    fn network(&self, layer: usize) -> Result<ExpertWeights> {
        let part = |part| self.dense(0, layer, part).map(|(values, _)| values);
        let (gate, up, down) = (part(ExpertPart::Gate)?, part(ExpertPart::Up)?, part(ExpertPart::Down)?);
        let hidden = self.base().config().hidden_size;
        let width = gate.len() / hidden;
        Ok(ExpertWeights { gate, up, down, width, hidden, ..ExpertWeights::default() })
    }

    /// Which units go where. Two threads may find it at the same time, and find the same.
    fn partition(&self, layer: usize) -> Result<&Partition> {
        let place = self.partitions.get(layer).ok_or_else(|| Error::invalid_plan(format!("no layer {layer}")))?;
        if let Some(partition) = place.get() {
            return Ok(partition);
        }
        let (parts, shared, seed) = (self.recipe.parts(), self.recipe.shared_width, self.recipe.seed);
        let hidden = self.base().config().hidden_size;
        let partition = match &self.recipe.method {
            UpcycleMethod::Cluster { by: ClusterBy::Weights } => {
                let (gate, _) = self.dense(0, layer, ExpertPart::Gate)?;
                Partition::clustered(gate, hidden, None, (shared, parts), seed.wrapping_add(layer as u64))
            }
            UpcycleMethod::Cluster { by: ClusterBy::Activations } => {
                let (features, activity) = self.activity(layer, self.sample(layer)?)?;
                let (tokens, seed) = (features.len() / activity.len(), seed.wrapping_add(layer as u64));
                Partition::clustered(features, tokens, Some(&activity), (shared, parts), seed)
            }
            UpcycleMethod::Domains { .. } => {
                let samples = self.domain_samples(layer)?;
                let activity = |sample| Ok(self.activity(layer, sample)?.1);
                let activity = samples.into_iter().map(activity).collect::<Result<Vec<Vec<f64>>>>()?;
                let width = self.recipe.width(activity.first().map_or(0, Vec::len));
                Partition::of_domains(&activity, shared, width)
            }
            _ => {
                let width = self.base().role(Role::Layer(layer, LayerRole::DenseGate))?.shape[0];
                Partition::contiguous(width, shared, parts)
            }
        };
        Ok(place.get_or_init(|| partition))
    }

    /// Absolute activations of every unit on a sample, `[units, tokens]`, and the mean of each.
    fn activity(&self, layer: usize, sample: &TokenSample) -> Result<(Vec<f32>, Vec<f64>)> {
        let network = self.network(layer)?;
        let units = network.unit_activations(&sample.inputs, self.base().config().hidden_act); // [S, I]
        let (tokens, width) = (sample.tokens(), network.width);
        let mut features = vec![0.0; width * tokens];
        for (token, row) in units.chunks_exact(width).enumerate() {
            row.iter().enumerate().for_each(|(unit, value)| features[unit * tokens + token] = value.abs());
        }
        let mean = |row: &[f32]| row.iter().map(|value| f64::from(*value)).sum::<f64>() / tokens as f64;
        let activity = features.chunks_exact(tokens).map(mean).collect();
        Ok((features, activity))
    }

    /// The tokens of each domain that a layer saw.
    fn domain_samples(&self, layer: usize) -> Result<Vec<&TokenSample>> {
        let missing = || Error::MissingEvidence { layer, part: "upcycling", what: "a sample of every domain".into() };
        self.domains.iter().map(|evidence| sampled(evidence, layer).ok_or_else(missing)).collect()
    }

    fn sample(&self, layer: usize) -> Result<&TokenSample> {
        let missing = || Error::MissingEvidence { layer, part: "upcycling", what: "a sample of tokens".into() };
        self.evidence.as_ref().and_then(|evidence| sampled(evidence, layer)).ok_or_else(missing)
    }

    fn router(&self, layer: usize, dtype: Dtype) -> Result<Vec<u8>> {
        let start = Start {
            start: self.router,
            layer,
            experts: self.recipe.experts,
            parts: self.recipe.parts(),
            top_k: self.recipe.top_k(),
            target: self.recipe.teacher_share(),
            hidden: self.base().config().hidden_size,
            seed: self.recipe.seed,
            prototypes: self.prototypes.as_ref().and_then(|rows| rows.get(&layer)).map(Vec::as_slice),
            sample: self.sample(layer).ok(),
            domains: self.domain_samples(layer)?,
        };
        let network = || Ok((self.network(layer)?, self.partition(layer)?.clone()));
        let rows = start.rows(network, self.base().config().hidden_act)?;
        encoded_part((layer, 0), ExpertPart::Gate, dtype, &rows)
    }

    fn made(&self, layer: usize, made: Made, tensor: &TensorInfo) -> Result<Vec<u8>> {
        match made {
            Made::Router => self.router(layer, tensor.dtype),
            // The sigmoid of 0 is a half, and the shared down projection is doubled.
            Made::SharedGate => Ok(vec![0; tensor.bytes as usize]),
            Made::Shared(part) => {
                let units: Cow<'_, [u32]> = match self.recipe.method {
                    UpcycleMethod::Ternary { .. } => {
                        let width = self.base().role(Role::Layer(layer, LayerRole::DenseGate))?.shape[0];
                        (0..width as u32).collect::<Vec<u32>>().into()
                    }
                    _ if self.recipe.shared_width == 0 => return Ok(vec![0; tensor.bytes as usize]),
                    _ => (&self.partition(layer)?.shared[..]).into(),
                };
                Ok(self.units((0, layer, 0), part, &units, 2.0)?.0)
            }
        }
    }

    /// Units of a part of a dense network, times a factor if it is the down projection, with the dtype.
    fn units(
        &self,
        (model, layer, expert): (usize, usize, usize),
        part: ExpertPart,
        units: &[u32],
        factor: f32,
    ) -> Result<(Vec<u8>, Dtype)> {
        let (values, dtype) = self.dense(model, layer, part)?;
        let selected = selected(&values, self.base().config().hidden_size, part, units, factor);
        Ok((encoded_part((layer, expert), part, dtype, &selected)?, dtype))
    }

    fn expert(&self, layer: usize, expert: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        let Some(role) = dense_role(layer, part) else { return Ok(None) };
        let hidden = self.base().config().hidden_size;
        let model = if let UpcycleMethod::Models { .. } = self.recipe.method { expert } else { 0 };
        let as_it_is = |from: &Checkpoint| -> Result<Vec<u8>> {
            let info = from.role(role)?;
            Ok(from.plain_bytes(&info.name, 0..info.bytes as usize)?.into_owned())
        };
        let (bytes, dtype) = match self.recipe.method {
            UpcycleMethod::Copy { noise } if noise > 0.0 && expert > 0 => {
                let (mut values, dtype) = self.dense(0, layer, part)?;
                let (_, deviation) = moments(values.iter().copied());
                let mut random = generator(self.recipe.seed, [layer as u64, expert as u64 + 1, part as u64]);
                values.iter_mut().for_each(|value| *value += normal(&mut random) * deviation * noise as f32);
                (encoded_part((layer, expert), part, dtype, &values)?, dtype)
            }
            UpcycleMethod::Drop { ratio } if ratio > 0.0 => self.dropped(layer, expert, part, ratio)?,
            UpcycleMethod::Ternary { zero } => {
                let (mut values, dtype) = self.dense(0, layer, part)?;
                match zero && part == ExpertPart::Down {
                    true => values.fill(0.0),
                    false => ternary(&mut values),
                }
                (encoded_part((layer, expert), part, dtype, &values)?, dtype)
            }
            UpcycleMethod::Domains { .. } => {
                let units = &self.partition(layer)?.parts[expert];
                self.units((0, layer, expert), part, units, 1.0)?
            }
            UpcycleMethod::Copy { .. } | UpcycleMethod::Drop { .. } | UpcycleMethod::Models { .. } => {
                let from = &self.models[model];
                (as_it_is(from)?, from.role(role)?.dtype)
            }
            UpcycleMethod::Split { .. } | UpcycleMethod::Cluster { .. } => {
                let parts = self.recipe.parts();
                let units = &self.partition(layer)?.parts[expert % parts];
                self.units((0, layer, expert), part, units, self.recipe.factor())?
            }
        };
        let cells = bytes.len() / (dtype.bitsize() / 8);
        let (rows, cols) = match part {
            ExpertPart::Down => (hidden, cells / hidden),
            _ => (cells / hidden, hidden),
        };
        Ok(Some(RawMatrix { bytes: bytes.into(), dtype, rows, cols }))
    }

    /// A copy with some units drawn anew: the same ones in all three matrices of an expert.
    fn dropped(&self, layer: usize, expert: usize, part: ExpertPart, ratio: f64) -> Result<(Vec<u8>, Dtype)> {
        let (mut values, dtype) = self.dense(0, layer, part)?;
        let hidden = self.base().config().hidden_size;
        let width = values.len() / hidden;
        let mut units: Vec<usize> = (0..width).collect();
        units.shuffle(&mut generator(self.recipe.seed, [layer as u64, expert as u64 + 1, 100]));
        units.truncate((ratio * width as f64).round() as usize);
        let cell = |unit: usize, i: usize| match part {
            ExpertPart::Down => i * width + unit,
            _ => unit * hidden + i,
        };
        let cells: Vec<usize> = units.iter().flat_map(|unit| (0..hidden).map(|i| cell(*unit, i))).collect();
        let (mean, deviation) = moments(cells.iter().map(|cell| values[*cell]));
        let mut random = generator(self.recipe.seed, [layer as u64, expert as u64 + 1, part as u64]);
        cells.into_iter().for_each(|cell| values[cell] = mean + normal(&mut random) * deviation);
        Ok((encoded_part((layer, expert), part, dtype, &values)?, dtype))
    }

    /// The mean of a tensor over the models.
    fn averaged(&self, tensor: &TensorInfo) -> CheckpointResult<Vec<u8>> {
        let mut sum = vec![0f64; tensor.elements() as usize];
        for model in &self.models {
            let mut values = Vec::new();
            decode_f32(tensor.dtype, &model.plain_bytes(&tensor.name, 0..tensor.bytes as usize)?, &mut values);
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += f64::from(value));
        }
        let mean: Vec<f32> = sum.into_iter().map(|sum| (sum / self.models.len() as f64) as f32).collect();
        let mut bytes = Vec::with_capacity(tensor.bytes as usize);
        // Dtypes were compared before.
        encode(tensor.dtype, &mean, &mut bytes);
        Ok(bytes)
    }

    fn averages(&self) -> bool {
        matches!(self.recipe.method, UpcycleMethod::Models { average: true })
    }
}

/// Units of a part: rows of gate and up, columns of down times a factor.
fn selected(values: &[f32], hidden: usize, part: ExpertPart, units: &[u32], factor: f32) -> Vec<f32> {
    let width = values.len() / hidden;
    match part {
        ExpertPart::Down => {
            values.chunks_exact(width).flat_map(|row| units.iter().map(|unit| row[*unit as usize] * factor)).collect()
        }
        _ => units.iter().flat_map(|unit| &values[*unit as usize * hidden..][..hidden]).copied().collect(),
    }
}

/// Rounds to -1, 0 and 1 times the mean absolute value.
fn ternary(values: &mut [f32]) {
    let sum: f64 = values.iter().map(|value| f64::from(value.abs())).sum();
    let scale = (sum / values.len().max(1) as f64) as f32;
    if scale > 0.0 {
        values.iter_mut().for_each(|value| *value = (*value / scale).round().clamp(-1.0, 1.0) * scale);
    }
}

/// Mean and standard deviation.
fn moments(values: impl Iterator<Item = f32> + Clone) -> (f32, f32) {
    let count = values.clone().count().max(1) as f64;
    let mean = values.clone().map(f64::from).sum::<f64>() / count;
    let square = values.map(|value| (f64::from(value) - mean).powi(2)).sum::<f64>() / count;
    (mean as f32, square.sqrt() as f32)
}

impl ModelSource for Upcycled {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> CheckpointResult<Cow<'_, [u8]>> {
        match self.made.get(&tensor.name) {
            Some((layer, made)) => {
                let bytes = self.made(*layer, *made, tensor).map_err(moe_checkpoint::Error::method)?;
                Ok(sliced(Cow::Owned(bytes), range))
            }
            None if self.averages() => Ok(sliced(Cow::Owned(self.averaged(tensor)?), range)),
            None => self.base().plain_bytes(&tensor.name, range),
        }
    }

    fn grain(&self, tensor: &TensorInfo) -> usize {
        match self.made.contains_key(&tensor.name) || self.averages() {
            true => tensor.bytes as usize,
            false => self.base().plain_grain(&tensor.name),
        }
    }

    fn makes_experts(&self, _layer: usize) -> bool {
        true
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> CheckpointResult<Option<RawMatrix<'_>>> {
        self.expert(layer, set, part).map_err(moe_checkpoint::Error::method)
    }

    fn release(&self, tensor: &TensorInfo, range: Range<usize>) {
        if !self.made.contains_key(&tensor.name) {
            self.models.iter().for_each(|model| model.release_plain(&tensor.name, range.clone()));
        }
    }

    fn release_expert(&self, layer: usize, set: usize) {
        let model = if let UpcycleMethod::Models { .. } = self.recipe.method { set } else { 0 };
        for (_, role) in DENSE {
            if let Ok(info) = self.models[model].role(Role::Layer(layer, role)) {
                let (name, bytes) = (info.name.clone(), info.bytes as usize);
                self.models[model].release_plain(&name, 0..bytes);
            }
        }
    }

    fn release_all(&self) {
        self.models.iter().for_each(|model| model.release());
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(Upcycled::base(self))
    }

    fn step(&self) -> Option<Step> {
        Some(self.step.clone())
    }
}

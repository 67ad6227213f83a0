//! Factors on input channels of experts, taken back by what comes before: the same model, with weights and activations
//! that are rounded with less damage (SmoothQuant, AWQ, EAQuant).

mod activation_aware;
mod expert_aware;
mod source;

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use activation_aware::{ActivationAware, SmoothedLayer};
pub use expert_aware::{ExpertAware, InputRanges};

use crate::config::{Activation, Ffn, NormKind, NormPlacement};
use crate::convert;
use crate::experts::ExpertPart;
use crate::family::{LayerRole, Role};
use crate::record::Step;
use crate::source::ModelDescription;
use crate::{Checkpoint, Error, Result};

pub(crate) use source::{Change, SmoothedSource};

/// Factors of one layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerSmoothing {
    /// Decoder layer.
    pub layer: usize,
    /// Factors `[H]` on the columns of everything that reads the norm before the experts: gate and up of routed and
    /// shared experts, router, gate of the shared expert. The norm is divided by them. Empty for none.
    #[serde(default)]
    pub inputs: Vec<f32>,
    /// Factors `[I]` on the columns of down of each expert, whose rows of up are divided by them. Empty for none.
    #[serde(default)]
    pub units: Vec<Vec<f32>>,
}

/// How factors are found. In JSON `{"type": "awq"}` or `{"type": "eaquant"}`, each with its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Smoothing {
    /// Searched for the least damage of rounding the weights (AWQ).
    Awq(ActivationAware),
    /// The largest that any expert of a layer asks for (EAQuant): for engines that round activations as well.
    Eaquant(ExpertAware),
}

impl Smoothing {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Quantize`] naming the one that is out of its range.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Awq(search) => search.check(),
            Self::Eaquant(smoothing) => smoothing.check(),
        }
    }
}

impl FromStr for Smoothing {
    type Err = Error;

    /// `awq` or `eaquant`, or JSON with parameters.
    fn from_str(text: &str) -> Result<Self> {
        let refused = |reason: String| Error::Quantize { format: text.chars().take(80).collect(), reason };
        match text.trim() {
            "awq" => Ok(Self::Awq(ActivationAware::default())),
            "eaquant" => Ok(Self::Eaquant(ExpertAware::default())),
            json if json.starts_with('{') => serde_json::from_str(json).map_err(|error| refused(error.to_string())),
            _ => Err(refused(
                "expected `awq`, `eaquant`, or JSON such as {\"type\": \"eaquant\", \"alpha\": 0.5}".into(),
            )),
        }
    }
}

/// A model with factors folded in.
///
/// Factors move nothing but the place of a magnitude: `norm / s` and `W s` for inputs, `up / u` and `down u` for units.
/// With powers of two ([`LayerSmoothing::powers_of_two`]) every product is exact, and the model computes the same
/// numbers to the bit wherever its kernels add in one order, but for norms whose weight is one plus what is stored.
/// There, and with other factors, the norm is rounded to its dtype, and the factors are those that the rounded norm
/// has, so that what is left is one rounding of every weight.
#[derive(Clone, Debug)]
pub struct Smoothed {
    model: Arc<Checkpoint>,
}

/// Name of the step in records.
const SMOOTH_METHOD: &str = "smooth";

impl LayerSmoothing {
    /// The same with every factor rounded to a power of two.
    #[must_use]
    pub fn powers_of_two(mut self) -> Self {
        let round = |factor: &mut f32| *factor = factor.log2().round().exp2();
        self.inputs.iter_mut().for_each(round);
        self.units.iter_mut().flatten().for_each(round);
        self
    }

    /// Whether nothing is changed.
    pub fn is_identity(&self) -> bool {
        self.inputs.iter().chain(self.units.iter().flatten()).all(|factor| *factor == 1.0)
    }
}

fn refused(layer: usize, reason: impl std::fmt::Display) -> Error {
    Error::Quantize { format: "smoothing".into(), reason: format!("layer {layer}: {reason}") }
}

/// Why the inputs of the experts of a layer have no norm of their own to take factors; `None` where they have.
pub(super) fn inputs_refusal(model: &Checkpoint, layer: usize) -> Option<String> {
    let config = model.config();
    match config.placement {
        NormPlacement::Before | NormPlacement::Both => {}
        NormPlacement::Parallel => return Some("attention reads the norm that the experts read".into()),
        NormPlacement::After => return Some("no norm stands before the experts".into()),
    }
    if config.expert_latent.is_some() {
        return Some("experts read a latent, and no norm".into());
    }
    if config.normed_residual.is_some() {
        return Some("what experts give is added to the norm that they read".into());
    }
    if config.moe(layer).is_some_and(|moe| moe.identities > 0) {
        return Some("identity experts give back what they read, factors and all".into());
    }
    model.role(Role::Layer(layer, LayerRole::FfnNorm)).err().map(|error| error.to_string())
}

/// Why units of experts of a layer take no factors; `None` where they do.
pub(super) fn units_refusal(model: &Checkpoint, layer: usize) -> Option<String> {
    let moe = model.config().moe(layer)?;
    let linear = matches!(
        model.config().hidden_act,
        Activation::Silu | Activation::Gelu | Activation::GeluTanh | Activation::Relu
    );
    if moe.gateless {
        return Some("without a gate a unit is no multiple of its up projection".into());
    }
    (!linear || moe.limit.is_some())
        .then(|| "units are bounded, so that they are no multiple of their up projection".into())
}

impl Smoothed {
    /// Why a layer takes no factors on its inputs and none on its units, `[inputs, units]`; `None` where it takes them.
    pub fn refusals(model: &Checkpoint, layer: usize) -> [Option<String>; 2] {
        [inputs_refusal(model, layer), units_refusal(model, layer)]
    }

    /// `base`, without quantization, with these factors.
    ///
    /// # Errors
    /// [`Error::Quantize`] for layers that do not take factors (no norm before the experts alone, bounded units,
    /// experts that share weights), for factors of another length, and for ones that are not finite and positive.
    pub fn on(base: &Arc<Checkpoint>, layers: &[LayerSmoothing]) -> Result<Self> {
        let from = base.dequantized()?;
        let mut changes: BTreeMap<String, Change> = BTreeMap::new();
        let mut experts: BTreeMap<usize, LayerSmoothing> = BTreeMap::new();
        for smoothing in layers.iter().filter(|layer| !layer.is_identity()) {
            let layer = smoothing.layer;
            let Some(Ffn::Moe(moe)) = from.config().layers.get(layer).map(|layer| &layer.ffn) else {
                return Err(refused(layer, "no layer with routed experts"));
            };
            if moe.sets.is_some() {
                return Err(refused(layer, "experts share weights: export them one by one first"));
            }
            let mut own = smoothing.clone();
            if own.inputs.iter().chain(own.units.iter().flatten()).any(|factor| !(factor.is_finite() && *factor > 0.0))
            {
                return Err(refused(layer, "factors are to be finite and above 0"));
            }
            if !own.inputs.is_empty() {
                inputs(&from, &mut own, &mut changes)?;
            }
            if !own.units.is_empty() {
                if let Some(reason) = units_refusal(&from, layer) {
                    return Err(refused(layer, reason));
                }
                let widths: Vec<usize> = own.units.iter().map(Vec::len).collect();
                let fits = |(found, width): (&usize, &usize)| *found == 0 || found == width;
                if widths.len() != moe.widths.len() || !widths.iter().zip(&moe.widths).all(fits) {
                    let reason = format!("factors of {widths:?} units for experts of {:?}", moe.widths);
                    return Err(refused(layer, reason));
                }
            }
            experts.insert(layer, own);
        }
        let mut hasher = blake3::Hasher::new();
        for (layer, own) in &experts {
            hasher.update(&(*layer as u64).to_le_bytes());
            for part in std::iter::once(&own.inputs).chain(&own.units) {
                hasher.update(&(part.len() as u64).to_le_bytes());
                for factor in part {
                    hasher.update(&factor.to_le_bytes());
                }
            }
        }
        let recipe = serde_json::json!({ "factors": hasher.finalize().to_hex().to_string() });
        let summary = format!("factors on the inputs of experts of {} layers, folded in", experts.len());
        let step = Step::new(SMOOTH_METHOD, &from, recipe, summary);
        let source = SmoothedSource::new(from.clone(), changes, experts, step);
        let model = Checkpoint::from_source(ModelDescription::of(&from), Arc::new(source))?;
        Ok(Self { model: Arc::new(model) })
    }

    /// The model: to be run, quantized, or written.
    pub fn model(&self) -> &Arc<Checkpoint> {
        &self.model
    }
}

/// The norm divided by the factors, and everything that reads it multiplied with those that the norm, as it is stored,
/// has.
fn inputs(from: &Checkpoint, own: &mut LayerSmoothing, changes: &mut BTreeMap<String, Change>) -> Result<()> {
    let (layer, config) = (own.layer, from.config());
    if let Some(reason) = inputs_refusal(from, layer) {
        return Err(refused(layer, reason));
    }
    let hidden = config.hidden_size;
    if own.inputs.len() != hidden {
        return Err(refused(layer, format!("{} factors for {hidden} channels", own.inputs.len())));
    }
    let norm = from.role(Role::Layer(layer, LayerRole::FfnNorm))?;
    let offset = if config.norm == NormKind::RmsOnePlus { 1.0 } else { 0.0 };
    let stored = from.tensor_f32(&norm.name)?;
    let divided: Vec<f32> =
        stored.iter().zip(&own.inputs).map(|(weight, factor)| (weight + offset) / factor - offset).collect();
    let mut bytes = Vec::new();
    convert::encode(norm.dtype, &divided, &mut bytes);
    let mut divided = Vec::new();
    convert::decode_f32(norm.dtype, &bytes, &mut divided);
    for ((factor, old), new) in own.inputs.iter_mut().zip(&stored).zip(&mut divided) {
        let ratio = (old + offset) / (*new + offset);
        match ratio.is_finite() && ratio > 0.0 {
            true => *factor = ratio,
            // A channel that the norm sets to 0 has nothing to move.
            false => (*factor, *new) = (1.0, *old),
        }
    }
    changes.insert(norm.name.clone(), Change::Values(divided));
    if config.norm == NormKind::Layer {
        let bias = from.role(Role::Layer(layer, LayerRole::FfnNormBias))?;
        let values = from.tensor_f32(&bias.name)?;
        let values = values.iter().zip(&own.inputs).map(|(bias, factor)| bias / factor).collect();
        changes.insert(bias.name.clone(), Change::Values(values));
    }
    let moe = config.moe(layer);
    let mut readers = Vec::new();
    if !config.routing.own_norm {
        readers.push(LayerRole::Router);
    }
    if let Some(shared) = moe.and_then(|moe| moe.shared.as_ref()).filter(|shared| !shared.apart) {
        match (shared.packed, shared.gateless) {
            (true, _) => readers.push(LayerRole::SharedGateUp),
            (_, true) => readers.push(LayerRole::SharedUp),
            _ => readers.extend([LayerRole::SharedGate, LayerRole::SharedUp]),
        }
        if shared.gated {
            readers.push(LayerRole::SharedExpertGate);
        }
    }
    for role in readers {
        let info = from.role(Role::Layer(layer, role))?;
        changes.insert(info.name.clone(), Change::Columns(own.inputs.clone()));
    }
    Ok(())
}

impl LayerSmoothing {
    /// The values `[rows, cols]` of a part of an expert with the factors.
    fn apply(&self, expert: usize, part: ExpertPart, values: &mut [f32]) {
        let units = self.units.get(expert).filter(|units| !units.is_empty());
        if matches!(part, ExpertPart::Gate | ExpertPart::Up) && !self.inputs.is_empty() {
            columns(values, &self.inputs);
        }
        match (part, units) {
            (ExpertPart::Up, Some(units)) => {
                let cols = (values.len() / units.len()).max(1);
                let rows = values.chunks_mut(cols).zip(units);
                rows.for_each(|(row, factor)| row.iter_mut().for_each(|value| *value /= factor));
            }
            (ExpertPart::UpBias, Some(units)) => {
                values.iter_mut().zip(units).for_each(|(value, factor)| *value /= factor);
            }
            (ExpertPart::Down, Some(units)) => columns(values, units),
            _ => {}
        }
    }
}

/// Multiplies the columns of a matrix with factors.
fn columns(values: &mut [f32], factors: &[f32]) {
    for row in values.chunks_mut(factors.len().max(1)) {
        row.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
    }
}

//! The quantization of a base kept through a method that takes experts and units out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use safetensors::Dtype;
use serde_json::Value;

use super::source::{Content, QuantizedSource, Stored, Weight};
use crate::experts::{ExpertLayout, ExpertPart, ExpertTensor};
use crate::formats::scheme::Scheme;
use crate::formats::{self, Packed, module};
use crate::ragged::{UniformShape, uniform_shape_config};
use crate::record::Step;
use crate::shard_layout::TensorSpec;
use crate::source::ModelDescription;
use crate::{Checkpoint, Error, Result};

/// Where a set of weights of a pruned model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MatrixOrigin {
    /// The set of weights of the base.
    pub set: usize,
    /// Its units that are left, ascending.
    pub units: Vec<u32>,
}

/// A pruned model in the quantization of its base.
#[derive(Clone, Debug)]
pub struct KeptQuantization {
    /// The model.
    pub model: Arc<Checkpoint>,
    /// Groups of elements whose scale no longer is that of all of their elements, so that they are rounded again.
    pub cut_groups: u64,
    /// What else a user should know.
    pub notes: Vec<String>,
}

impl KeptQuantization {
    /// `pruned`, which a method made of `base` without quantization, in the quantization of `base`. Experts whose units
    /// are all left are copied byte for byte; of others, groups whose elements were in one group keep its codes and its
    /// scale, and groups that are put together anew are rounded again. Tensors outside the experts are those of the
    /// base, but for those in `changed` (names without quantization), which stay without quantization.
    ///
    /// `origin` says where each set of weights of a layer of `pruned` comes from; `None` for one that is more than a
    /// selection, which stays without quantization.
    ///
    /// # Errors
    /// [`Error::Quantize`] where groups do not divide what is left, or where units are to go from a format that is read
    /// only.
    pub fn on(
        pruned: &Arc<Checkpoint>,
        base: &Arc<Checkpoint>,
        origin: &dyn Fn(usize, usize) -> Option<MatrixOrigin>,
        changed: &BTreeSet<String>,
    ) -> Result<Self> {
        let mut kept = Kept {
            pruned,
            base,
            stored: BTreeMap::new(),
            shares: BTreeMap::new(),
            weights: Vec::new(),
            replaced: BTreeSet::new(),
            cut: 0,
            notes: Vec::new(),
        };
        let mut experts: BTreeSet<String> = BTreeSet::new();
        let mut moved: BTreeMap<usize, Vec<Option<usize>>> = BTreeMap::new();
        for shape in &base.shape().layers {
            let names = super::source::expert_names(base, shape.layer, shape.num_experts());
            experts.extend(names);
        }
        for shape in &pruned.shape().layers {
            let sets = (0..shape.num_experts()).map(|set| origin(shape.layer, set)).collect::<Vec<_>>();
            kept.layer(shape.layer, &sets)?;
            moved.insert(shape.layer, sets.iter().map(|set| set.as_ref().map(|set| set.set)).collect());
        }
        for weight in base.quantized_weights().filter(|weight| !experts.contains(&weight.info.name)) {
            kept.outside(weight, changed)?;
        }
        kept.finish(&moved, None)
    }

    /// Whether layers may have different numbers of experts in the quantization of `base`: compressed-tensors says them
    /// in `moe_sparsity_config`, for experts that are stored one by one.
    pub fn counts_by_layer(base: &Checkpoint) -> bool {
        let one_by_one = |layer: usize| base.expert_layout(layer).is_ok_and(|found| found == ExpertLayout::PerExpert);
        formats::entry(base.raw_config())["quant_method"] == "compressed-tensors"
            && base.shape().layers.iter().all(|layer| one_by_one(layer.layer))
    }

    /// `changed`, which has the tensors of `base` without quantization and new values in those of `names`, in the
    /// quantization of `base`: new values are rounded to nearest in the format that the weight has, all other stored
    /// tensors are those of the base, byte for byte. Scales of activations stay those of the base.
    ///
    /// # Errors
    /// [`Error::Quantize`] for a weight with new values in a format that is read only.
    pub fn requantized(changed: &Arc<Checkpoint>, base: &Arc<Checkpoint>, names: &BTreeSet<String>) -> Result<Self> {
        let mut kept = Kept {
            pruned: changed,
            base,
            stored: BTreeMap::new(),
            shares: BTreeMap::new(),
            weights: Vec::new(),
            replaced: BTreeSet::new(),
            cut: 0,
            notes: Vec::new(),
        };
        for weight in base.quantized_weights() {
            match names.contains(&weight.info.name) {
                true => kept.requantized(weight)?,
                false => kept.copy(weight, &weight.info.name)?,
            }
        }
        let rounded = kept.weights.len();
        let recipe = serde_json::json!({ "rounded": rounded });
        let summary = format!("{rounded} weights with new values rounded in the format of the base");
        let step = Step::new(REQUANTIZE_METHOD, changed, recipe, summary);
        kept.finish(&BTreeMap::new(), Some(step))
    }
}

impl Kept<'_> {
    /// The model of everything that was listed.
    fn finish(self, moved: &BTreeMap<usize, Vec<Option<usize>>>, step: Option<Step>) -> Result<KeptQuantization> {
        let Kept { pruned, base, mut stored, shares, weights, replaced, cut, notes } = self;
        // Scales of caches and the like belong to no weight.
        let of_weights: BTreeSet<&String> =
            base.quantized_weights().flat_map(|weight| weight.parts.iter().chain(&weight.others)).collect();
        for info in base.tensors().filter(|info| base.is_scale(&info.name) && !of_weights.contains(&info.name)) {
            stored.insert(info.name.clone(), (info.spec(), Stored::Copy(info.name.clone())));
        }
        for (name, (stack, of)) in shares {
            let info = base.info(&name)?;
            let shape = [&[of.len()], &info.shape[1..]].concat();
            let spec = TensorSpec { name: name.clone(), dtype: info.dtype, shape };
            stored.insert(name.clone(), (spec, Stored::Shares { name, stack, of }));
        }
        for info in pruned.tensors().filter(|info| !replaced.contains(&info.name)) {
            stored.insert(info.name.clone(), (info.spec(), Stored::Plain));
        }
        let counted = !formats::entry(base.raw_config())["moe_sparsity_config"].is_null();
        let config = match KeptQuantization::counts_by_layer(base) {
            true if pruned.ragged() => with_counts(&uniform(pruned)?, pruned, base, moved),
            true if counted => with_counts(pruned.raw_config(), pruned, base, moved),
            _ => with_quantization(pruned.raw_config(), base.raw_config(), moved),
        };
        let description = ModelDescription {
            config,
            generation: pruned.raw_generation_config().cloned(),
            tensors: stored.values().map(|(spec, _)| spec.clone()).collect(),
        };
        let stored = stored.into_iter().map(|(name, (_, content))| (name, content)).collect();
        let source = QuantizedSource::new(pruned.clone(), base.clone(), stored, weights, None).with_step(step);
        let model = Arc::new(Checkpoint::from_source(description, Arc::new(source))?);
        Ok(KeptQuantization { model, cut_groups: cut, notes })
    }
}

/// Name of the step of [`KeptQuantization::requantized`] in records.
const REQUANTIZE_METHOD: &str = "requantize";

/// What is kept, while it is listed.
struct Kept<'a> {
    pruned: &'a Arc<Checkpoint>,
    base: &'a Arc<Checkpoint>,
    stored: BTreeMap<String, (TensorSpec, Stored)>,
    /// Stacks of the base: how many parts they have, and which are kept.
    shares: BTreeMap<String, (usize, Vec<usize>)>,
    weights: Vec<Weight>,
    /// Tensors of the pruned model that are stored as something else.
    replaced: BTreeSet<String>,
    cut: u64,
    notes: Vec<String>,
}

impl Kept<'_> {
    fn refused(&self, weight: &Packed, reason: String) -> Error {
        Error::Quantize { format: weight.format.to_string(), reason: format!("`{}`: {reason}", weight.info.name) }
    }

    /// A weight with new values, in the format of the base.
    fn requantized(&mut self, weight: &Packed) -> Result<()> {
        let name = &weight.info.name;
        let Some(scheme) = weight.scheme() else {
            return Err(self.refused(weight, "this format is read only: write the model in BF16".into()));
        };
        if weight.count() != weight.stack {
            return Err(self.refused(weight, "it shares stored tensors with others: write the model in BF16".into()));
        }
        let content = (0..weight.stack).map(|matrix| Content::Matrix {
            name: name.clone(),
            matrix,
            dims: weight.dims,
            transposed: weight.transposed,
        });
        let number = self.weights.len();
        for (index, stored) in weight.parts.iter().enumerate() {
            let spec = self.base.info(stored)?.spec();
            // The table of values of NF4 lies between codes and scales.
            let content = match (scheme.is_flat(), index) {
                (true, 1) => Stored::Copy(stored.clone()),
                (true, 2) => Stored::Part { weight: number, part: 1 },
                (_, part) => Stored::Part { weight: number, part },
            };
            self.stored.insert(spec.name.clone(), (spec, content));
        }
        for stored in &weight.others {
            let spec = self.base.info(stored)?.spec();
            self.stored.insert(spec.name.clone(), (spec, Stored::Copy(stored.clone())));
        }
        self.weights.push(Weight { name: name.clone(), dims: weight.dims, scheme, content: content.collect() });
        self.replaced.insert(name.clone());
        Ok(())
    }

    /// A weight outside the experts.
    fn outside(&mut self, weight: &Packed, changed: &BTreeSet<String>) -> Result<()> {
        let name = &weight.info.name;
        let Ok(info) = self.pruned.info(name) else { return Ok(()) };
        if changed.contains(name) || info.shape != weight.info.shape {
            self.notes.push(format!("`{name}` was changed and is written as {:?}", info.dtype));
            return Ok(());
        }
        self.copy(weight, name)
    }

    /// All stored tensors of a weight, under the name of another.
    fn copy(&mut self, weight: &Packed, name: &str) -> Result<()> {
        for stored in weight.parts.iter().chain(&weight.others) {
            let spec = TensorSpec { name: renamed(stored, &weight.info.name, name), ..self.base.info(stored)?.spec() };
            self.stored.insert(spec.name.clone(), (spec, Stored::Copy(stored.clone())));
        }
        self.replaced.insert(name.to_string());
        Ok(())
    }

    /// The experts of a layer.
    fn layer(&mut self, layer: usize, sets: &[Option<MatrixOrigin>]) -> Result<()> {
        let (old, new) = (self.base.expert_layout(layer)?, self.pruned.expert_layout(layer)?);
        match (old, new) {
            (ExpertLayout::PerExpert, ExpertLayout::PerExpert) => self.per_expert(layer, sets),
            (ExpertLayout::Interleaved, ExpertLayout::Interleaved) | (ExpertLayout::Fused, ExpertLayout::Fused) => {
                self.fused(layer, old, sets)
            }
            _ => {
                self.notes
                    .push(format!("experts of layer {layer} are in another layout and stay without quantization"));
                Ok(())
            }
        }
    }

    fn per_expert(&mut self, layer: usize, sets: &[Option<MatrixOrigin>]) -> Result<()> {
        let base = self.base;
        let hidden = base.config().expert_hidden_size();
        for (set, origin) in sets.iter().enumerate() {
            let Some(origin) = origin else {
                self.notes
                    .push(format!("expert {set} of layer {layer} is no selection and stays without quantization"));
                continue;
            };
            let width = base.shape().layer(layer).map_or(0, |shape| shape.widths[origin.set]);
            let tensor = |part, set| match part {
                ExpertPart::Gate => ExpertTensor::Gate(set),
                ExpertPart::Up => ExpertTensor::Up(set),
                _ => ExpertTensor::Down(set),
            };
            for part in ExpertPart::ALL {
                let [old, new] = [origin.set, set].map(|set| base.expert_tensor_name(layer, tensor(part, set)));
                let Some(weight) = base.quantized_weight(&old) else { continue };
                if origin.units.len() == width {
                    if weight.stack == 1 {
                        self.copy(weight, &new)?;
                        continue;
                    }
                    for stored in &weight.parts {
                        self.shares.entry(stored.clone()).or_insert((weight.stack, Vec::new())).1.push(weight.first);
                    }
                    self.replaced.insert(new);
                    continue;
                }
                let all = |side: usize| (0..side as u32).collect::<Vec<u32>>();
                let (rows, cols) = match part {
                    ExpertPart::Down => (all(hidden), origin.units.clone()),
                    _ => (origin.units.clone(), all(hidden)),
                };
                let content = Content::Selected { weight: old.clone(), matrix: 0, rows, cols };
                self.selected(weight, &new, vec![content])?;
            }
        }
        Ok(())
    }

    /// Experts of a layer in one stack.
    fn fused(&mut self, layer: usize, layout: ExpertLayout, sets: &[Option<MatrixOrigin>]) -> Result<()> {
        let base = self.base;
        let hidden = base.config().expert_hidden_size();
        let width = base.shape().layer(layer).map_or(0, |shape| shape.widths[0]);
        let Some(sets) = sets.iter().cloned().collect::<Option<Vec<MatrixOrigin>>>() else {
            self.notes.push(format!("experts of layer {layer} are no selection and stay without quantization"));
            return Ok(());
        };
        for (tensor, both) in [(ExpertTensor::FusedGateUp, true), (ExpertTensor::FusedDown, false)] {
            let name = base.expert_tensor_name(layer, tensor);
            let Some(weight) = base.quantized_weight(&name) else { continue };
            if sets.iter().all(|set| set.units.len() == width) {
                for stored in &weight.parts {
                    let of = sets.iter().map(|set| set.set).collect();
                    self.shares.insert(stored.clone(), (weight.stack, of));
                }
                self.replaced.insert(name);
                continue;
            }
            let content = sets.iter().map(|set| {
                let all: Vec<u32> = (0..hidden as u32).collect();
                let (rows, cols) = match (both, layout) {
                    (true, ExpertLayout::Interleaved) => {
                        (set.units.iter().flat_map(|u| [2 * u, 2 * u + 1]).collect(), all)
                    }
                    (true, _) => {
                        (set.units.iter().copied().chain(set.units.iter().map(|u| u + width as u32)).collect(), all)
                    }
                    (false, _) => (all, set.units.clone()),
                };
                Content::Selected { weight: name.clone(), matrix: set.set, rows, cols }
            });
            self.selected(weight, &name, content.collect())?;
        }
        Ok(())
    }

    /// Rows and columns of a weight, under another name.
    fn selected(&mut self, weight: &Packed, name: &str, content: Vec<Content>) -> Result<()> {
        let Some(scheme) = weight.scheme().filter(|scheme| !scheme.is_flat()) else {
            let reason = "units cannot be taken out of this format: prune whole experts, or write the model without quantization";
            return Err(self.refused(weight, reason.into()));
        };
        let mut dims = (0, 0);
        for content in &content {
            let Content::Selected { rows, cols, .. } = content else { continue };
            dims = (rows.len(), cols.len());
            self.cut += scheme.cut(weight.dims, rows, cols) as u64;
        }
        if let (Some(reason), None) = (scheme.misfit(dims), scheme.misfit(weight.dims)) {
            let reason =
                format!("{reason}: round the units that are kept to it, or write the model without quantization");
            return Err(self.refused(weight, reason));
        }
        let number = self.weights.len();
        for (part, stored) in weight.parts.iter().enumerate() {
            let info = self.base.info(stored)?;
            let shape = shape(&scheme, part, &info.shape, weight, dims, content.len());
            let spec = TensorSpec { name: renamed(stored, &weight.info.name, name), dtype: info.dtype, shape };
            self.stored.insert(spec.name.clone(), (spec, Stored::Part { weight: number, part }));
        }
        for stored in &weight.others {
            let spec = TensorSpec { name: renamed(stored, &weight.info.name, name), ..self.base.info(stored)?.spec() };
            let content = match stored.ends_with(".weight_shape") {
                false => Stored::Copy(stored.clone()),
                true => Stored::Constant(sides(spec.dtype, dims)),
            };
            self.stored.insert(spec.name.clone(), (spec, content));
        }
        self.replaced.insert(name.to_string());
        self.weights.push(Weight { name: name.to_string(), dims, scheme, content });
        Ok(())
    }
}

/// The name of a stored tensor of a weight that has another name.
fn renamed(stored: &str, old: &str, new: &str) -> String {
    match stored.strip_prefix(module(old)) {
        Some(ending) => format!("{}{ending}", module(new)),
        None => stored.to_string(),
    }
}

/// Rows and columns as a stored tensor has them.
fn sides(dtype: Dtype, (rows, cols): (usize, usize)) -> Vec<u8> {
    let sides = [rows, cols];
    match dtype {
        Dtype::I32 => sides.iter().flat_map(|side| (*side as i32).to_le_bytes()).collect(),
        _ => sides.iter().flat_map(|side| (*side as i64).to_le_bytes()).collect(),
    }
}

/// The shape of a stored tensor of a weight with other sides.
fn shape(
    scheme: &Scheme,
    part: usize,
    old: &[usize],
    weight: &Packed,
    (rows, cols): (usize, usize),
    stack: usize,
) -> Vec<usize> {
    let (bands, across) = scheme.groups((rows, cols));
    let old_rows = weight.dims.0;
    let stacked =
        |shape: Vec<usize>| if weight.stack > 1 || weight.transposed { [&[stack], &shape[..]].concat() } else { shape };
    match part {
        // Blocks of gpt-oss are a dimension of their own.
        0 if old.len() == 4 => stacked(vec![rows, across, old[3]]),
        0 => stacked(vec![rows, scheme.code_columns(cols)]),
        1 if old.len() <= 1 && old.iter().product::<usize>() == old_rows && old_rows != 1 => vec![rows],
        1 if old.len() <= 1 => old.to_vec(),
        1 => stacked(vec![bands, across]),
        2 if scheme.zeros => vec![(bands * scheme.bits()).div_ceil(32), across],
        _ => old.to_vec(),
    }
}

/// The config with what that of the base says of quantization. Experts that lists name by their numbers get their new
/// ones.
fn with_quantization(config: &Value, base: &Value, moved: &BTreeMap<usize, Vec<Option<usize>>>) -> Value {
    let mut config = config.clone();
    for key in ["quantization_config", "quantization", "expert_dtype"] {
        for text in [false, true] {
            let from = if text { &base["text_config"][key] } else { &base[key] };
            let into = if text { config.get_mut("text_config") } else { Some(&mut config) };
            if let (false, Some(Value::Object(into))) = (from.is_null(), into) {
                into.insert(key.to_string(), renumbered(from, moved));
            }
        }
    }
    config
}

/// The config of a stock model with as many experts as the layer with most has.
fn uniform(pruned: &Checkpoint) -> Result<Value> {
    let shape = pruned.shape();
    let experts = shape.layers.iter().map(|layer| layer.num_experts()).max();
    let width = shape.uniform_width().unwrap_or(0);
    uniform_shape_config(pruned.raw_config(), UniformShape { width, experts, ..UniformShape::default() })
}

/// The same with numbers of experts by layer, where they differ.
fn with_counts(
    config: &Value,
    pruned: &Checkpoint,
    base: &Checkpoint,
    moved: &BTreeMap<usize, Vec<Option<usize>>>,
) -> Value {
    let mut config = with_quantization(config, base.raw_config(), moved);
    let shape = pruned.shape();
    let layer = |layer: usize| shape.layer(layer).map(|shape| shape.num_experts());
    let counts: Vec<Option<usize>> = (0..pruned.config().layers.len()).map(layer).collect();
    let mut found = counts.iter().flatten();
    let first = found.next();
    let differ = found.any(|count| Some(count) != first);
    let text = config["text_config"]["quantization_config"].is_object();
    let entry =
        if text { &mut config["text_config"]["quantization_config"] } else { &mut config["quantization_config"] };
    entry["moe_sparsity_config"] = match differ {
        true => serde_json::json!({ "method": "prune", "num_experts": counts }),
        false => Value::Null,
    };
    config
}

fn renumbered(value: &Value, moved: &BTreeMap<usize, Vec<Option<usize>>>) -> Value {
    match value {
        Value::Array(items) => {
            let name = |item: &Value| match item {
                Value::String(name) => new_name(name, moved).map(Value::String),
                other => Some(renumbered(other, moved)),
            };
            Value::Array(items.iter().filter_map(name).collect())
        }
        Value::Object(fields) => {
            let fields =
                fields.iter().filter_map(|(key, value)| Some((new_name(key, moved)?, renumbered(value, moved))));
            Value::Object(fields.collect())
        }
        other => other.clone(),
    }
}

/// The name of a module after experts went: that of its expert's new number, `None` for an expert that went.
fn new_name(name: &str, moved: &BTreeMap<usize, Vec<Option<usize>>>) -> Option<String> {
    let number = |after: &str| {
        let (before, rest) = name.split_once(after)?;
        let digits = rest.split('.').next()?;
        Some((before.len() + after.len(), digits.len(), digits.parse::<usize>().ok()?))
    };
    let (Some((.., layer)), Some((start, length, expert))) = (number("layers."), number(".experts.")) else {
        return Some(name.to_string());
    };
    let Some(sets) = moved.get(&layer) else { return Some(name.to_string()) };
    let new = sets.iter().position(|set| *set == Some(expert))?;
    Some(format!("{}{new}{}", &name[..start], &name[start + length..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_name_experts_by_their_new_numbers() {
        let moved = BTreeMap::from([(3, vec![Some(1), Some(4)])]);
        let lists = serde_json::json!({
            "ignore": ["lm_head", "model.layers.3.mlp.experts.4.down_proj", "model.layers.3.mlp.experts.2.down_proj"],
            "layers": {"model.layers.3.mlp.experts.1.up_proj": {"bits": 8}, "model.layers.2.mlp.experts.9.up_proj": 1},
        });
        let expected = serde_json::json!({
            "ignore": ["lm_head", "model.layers.3.mlp.experts.1.down_proj"],
            "layers": {"model.layers.3.mlp.experts.0.up_proj": {"bits": 8}, "model.layers.2.mlp.experts.9.up_proj": 1},
        });
        assert_eq!(renumbered(&lists, &moved), expected);
    }
}

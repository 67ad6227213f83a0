//! A model without some of its decoder layers, as a checkpoint that stock loaders read.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::config::ModelConfig;
use crate::expert_bytes::RawMatrix;
use crate::experts::ExpertPart;
use crate::family::{LayerRole, Role};
use crate::ragged::Ragged;
use crate::source::{ModelDescription, ModelSource};
use crate::weights::TensorInfo;
use crate::{Checkpoint, Error, Result, Step};

/// Takes whole decoder layers out of a model. The layers that are left move together; what comes after the last layer
/// (layers that predict further tokens) moves with them.
///
/// The config is rewritten by what it says layer by layer: lists and patterns of one entry per layer lose theirs, lists
/// of layer numbers are counted anew, and a rhythm (`decoder_sparse_step`) becomes a list of the dense layers. The
/// result is parsed and compared with the layers that were kept, so that a config which cannot say what is left is
/// refused, with the layer that it gets wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerDrop {
    dropped: Vec<usize>,
}

struct Dropped {
    base: Arc<Checkpoint>,
    /// Names in the base by name.
    names: BTreeMap<String, String>,
    /// Layers of the base by layer.
    layers: Vec<usize>,
    step: Step,
}

impl LayerDrop {
    /// Takes out these layers, in any order.
    pub fn new(layers: impl IntoIterator<Item = usize>) -> Self {
        let mut dropped: Vec<usize> = layers.into_iter().collect();
        dropped.sort_unstable();
        dropped.dedup();
        Self { dropped }
    }

    /// The layers that it takes out, ascending.
    pub fn layers(&self) -> &[usize] {
        &self.dropped
    }

    /// Whether layers can be taken out of a model, whichever they are.
    ///
    /// # Errors
    /// [`Error::Method`] for a quantized, ragged or grouped model, and one whose layers belong together.
    pub fn check_model(base: &Checkpoint) -> Result<()> {
        if let Some(reason) = base.config().inseparable() {
            return refuse(format!("its layers belong together: it is a model {reason}"));
        }
        if base.quantization().is_some() {
            return refuse("the model is quantized, and its config may name layers; dequantize it first".into());
        }
        if Ragged::read(base.raw_config())?.is_some() || base.grouped() {
            return refuse("a ragged or grouped config says its experts layer by layer; drop layers before".into());
        }
        Ok(())
    }

    /// The model without these layers.
    ///
    /// # Errors
    /// Those of [`check_model`](Self::check_model); [`Error::Method`] for layers that do not exist, none or no MoE
    /// layer left, and a config that cannot say what is left. Those of [`Checkpoint::from_source`].
    pub fn on(&self, base: &Arc<Checkpoint>) -> Result<Arc<Checkpoint>> {
        Self::check_model(base)?;
        let count = base.config().layers.len();
        if let Some(layer) = self.dropped.last().filter(|layer| **layer >= count) {
            return refuse(format!("layer {layer} of a model with {count} layers"));
        }
        let kept: Vec<usize> = (0..count).filter(|layer| self.dropped.binary_search(layer).is_err()).collect();
        if !kept.iter().any(|layer| base.config().moe(*layer).is_some()) {
            return refuse("no layer with routed experts would be left".into());
        }
        let mut config = base.raw_config().clone();
        rewrite(base.family().text_config_mut(&mut config), &kept, base.config());
        let parsed = match ModelConfig::from_json(&config, base.raw_generation_config()) {
            Ok(parsed) => parsed,
            Err(error) => return refuse(format!("the config cannot say what is left: {error}")),
        };
        if parsed.layers.len() != kept.len() {
            return refuse(format!("the config would have {} layers instead of {}", parsed.layers.len(), kept.len()));
        }
        for (new, old) in kept.iter().enumerate() {
            if parsed.layers[new] != base.config().layers[*old] {
                let reason = "would be of another kind: its config follows a rhythm that the layers left do not";
                return refuse(format!("layer {new}, which was layer {old}, {reason}"));
            }
        }
        let same = ModelConfig { layers: parsed.layers.clone(), ..base.config().clone() };
        if parsed != same {
            return refuse("the config would say something else of the layers that are left".into());
        }
        let Some(prefix) = prefix_of_layers(base) else {
            return refuse("no tensor of a layer is known by name".into());
        };
        let layer_of = |name: &str| -> Option<usize> { name.strip_prefix(&prefix)?.split('.').next()?.parse().ok() };
        let mut names = BTreeMap::new();
        let mut tensors = Vec::new();
        for info in base.tensors() {
            let renumbered = |old: usize, new: usize| {
                let rest = &info.name[prefix.len() + old.to_string().len()..];
                format!("{prefix}{new}{rest}")
            };
            let new = match layer_of(&info.name) {
                None => info.name.clone(),
                // what predicts further tokens is numbered after the last layer
                Some(layer) if layer >= count => renumbered(layer, layer - self.dropped.len()),
                Some(layer) => match kept.iter().position(|old| *old == layer) {
                    Some(new) => renumbered(layer, new),
                    None => continue,
                },
            };
            names.insert(new.clone(), info.name.clone());
            tensors.push(crate::TensorSpec { name: new, ..info.spec() });
        }
        let recipe = json!({ "dropped": self.dropped });
        let listed: Vec<String> = self.dropped.iter().map(ToString::to_string).collect();
        let summary = format!("layers {} of {count} dropped", listed.join(", "));
        let step = Step::new("drop_layers", base, recipe, summary);
        let description = ModelDescription { config, tensors, ..ModelDescription::of(base) };
        let source = Dropped { base: base.clone(), names, layers: kept, step };
        Checkpoint::from_source(description, Arc::new(source)).map(Arc::new)
    }
}

fn refuse<T>(reason: String) -> Result<T> {
    Err(Error::method(std::io::Error::other(format!("dropping layers: {reason}"))))
}

/// What stands before the layer number in names of tensors, in the naming of this checkpoint.
fn prefix_of_layers(base: &Checkpoint) -> Option<String> {
    let roles = [LayerRole::AttentionNorm, LayerRole::FfnNorm, LayerRole::AttentionOutputNorm, LayerRole::Router];
    let count = base.config().layers.len();
    let known = (0..count).flat_map(|layer| roles.map(|role| (layer, base.role(Role::Layer(layer, role)))));
    known.into_iter().find_map(|(layer, info)| {
        let name = &info.ok()?.name;
        Some(name[..name.find(&format!(".{layer}."))? + 1].to_string())
    })
}

/// Rewrites what a config says layer by layer.
fn rewrite(config: &mut Value, kept: &[usize], old: &ModelConfig) {
    let count = old.layers.len();
    let Value::Object(map) = config else { return };
    let dense: Vec<usize> = (0..kept.len()).filter(|new| old.moe(kept[*new]).is_none()).collect();
    per_layer(map, kept, count);
    for key in ["num_hidden_layers", "num_layers", "n_layer"] {
        if map.contains_key(key) {
            map.insert(key.into(), json!(kept.len()));
        }
    }
    let position = |layer: usize| kept.iter().position(|old| *old == layer);
    let recounted = |value: &Value| -> Option<Value> {
        let numbers = value.as_array()?.iter().map(|n| n.as_u64().map(|n| n as usize));
        let numbers = numbers.collect::<Option<Vec<usize>>>()?;
        Some(json!(numbers.into_iter().filter_map(position).collect::<Vec<_>>()))
    };
    for key in ["mlp_only_layers", "moe_layers"] {
        if let Some(value) = map.get(key).and_then(recounted) {
            map.insert(key.into(), value);
        }
    }
    // every so many layers have experts: a rhythm that does not survive
    if map.get("decoder_sparse_step").is_some_and(|step| *step != json!(1)) {
        map.insert("decoder_sparse_step".into(), json!(1));
        map.insert("mlp_only_layers".into(), json!(dense));
    }
    let leading = dense.iter().enumerate().take_while(|(at, layer)| at == *layer).count();
    for key in ["first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"] {
        if map.contains_key(key) {
            map.insert(key.into(), json!(leading));
        }
    }
    if let Some(last) = map.get("moe_layer_end_index").and_then(Value::as_u64)
        && last as usize + 1 == count
    {
        map.insert("moe_layer_end_index".into(), json!(kept.len() - 1));
    }
}

/// Lists, and patterns of letters, of one entry per layer.
fn per_layer(map: &mut Map<String, Value>, kept: &[usize], count: usize) {
    let numbers_of_layers = ["mlp_only_layers", "moe_layers"];
    for (key, value) in map.iter_mut().filter(|(key, _)| !numbers_of_layers.contains(&key.as_str())) {
        match value {
            // lists of frequencies and of token ids are no lists of layers
            Value::Array(values)
                if values.len() == count
                    && (values.iter().all(Value::is_string) || key.contains("layer") || key.contains("topk")) =>
            {
                *values = kept.iter().map(|layer| values[*layer].clone()).collect();
            }
            Value::String(pattern) if key.contains("pattern") && pattern.chars().count() == count => {
                let letters: Vec<char> = pattern.chars().collect();
                *pattern = kept.iter().map(|layer| letters[*layer]).collect();
            }
            _ => {}
        }
    }
}

impl Dropped {
    fn name<'a>(&'a self, tensor: &'a TensorInfo) -> &'a str {
        self.names.get(&tensor.name).map_or(tensor.name.as_str(), String::as_str)
    }
}

impl ModelSource for Dropped {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let name = self.names.get(&tensor.name).map_or(tensor.name.as_str(), String::as_str);
        self.base.tensor_bytes(name, range)
    }

    fn grain(&self, tensor: &TensorInfo) -> usize {
        self.base.grain(self.name(tensor))
    }

    fn makes_experts(&self, layer: usize) -> bool {
        self.layers.get(layer).is_some_and(|layer| self.base.makes_experts(*layer))
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        self.base.set_part(self.layers[layer], set, part)
    }

    fn release(&self, tensor: &TensorInfo, range: Range<usize>) {
        self.base.release_range(self.name(tensor), range);
    }

    fn release_expert(&self, layer: usize, set: usize) {
        self.base.release_set(self.layers[layer], set);
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.base)
    }

    fn step(&self) -> Option<Step> {
        Some(self.step.clone())
    }
}

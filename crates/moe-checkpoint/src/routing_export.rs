//! Run-time routing that a stock config and stock tensors can hold: experts per token, and the bias of the selection.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use serde_json::json;

use crate::convert::encode;
use crate::expert_bytes::RawMatrix;
use crate::experts::ExpertPart;
use crate::family::{LayerRole, Role};
use crate::ragged::Ragged;
use crate::source::{ModelDescription, ModelSource, sliced};
use crate::weights::TensorInfo;
use crate::{Checkpoint, Error, Result, Step};

/// What of the routing is written into a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoutingExport {
    /// Experts per token, in all layers.
    pub top_k: Option<usize>,
    /// The bias on the selection of experts `[E]` by decoder layer, in place of the model's.
    pub selection_bias: BTreeMap<usize, Vec<f32>>,
}

struct Exported {
    base: Arc<Checkpoint>,
    /// Bytes of the biases, by tensor.
    biases: BTreeMap<String, Vec<u8>>,
    step: Step,
}

impl RoutingExport {
    /// The model with this routing: stock loaders read it.
    ///
    /// # Errors
    /// [`Error::InvalidField`] for a number of experts per token that the layers do not have, [`Error::Method`] for a
    /// family whose tensors hold no such bias, another number of biases than experts, and a model that only these
    /// crates open, whose config says nothing of its experts per token. Those of [`Checkpoint::from_source`].
    pub fn on(&self, base: &Arc<Checkpoint>) -> Result<Arc<Checkpoint>> {
        let refuse = |reason: String| Error::method(std::io::Error::other(reason));
        let mut description = ModelDescription::of(base);
        if let Some(top_k) = self.top_k {
            if base.config().routes_by_tables() && top_k != base.config().routing.top_k {
                let of = base.config().routing.top_k;
                return Err(refuse(format!(
                    "{top_k} experts per token: layers route by tables of {of} for every token"
                )));
            }
            if Ragged::read(base.raw_config())?.is_some() || base.grouped() {
                return Err(refuse(
                    "experts per token in a ragged or grouped checkpoint: keep routing.json beside it".into(),
                ));
            }
            let family = base.family();
            let serde_json::Value::Object(map) = family.text_config_mut(&mut description.config) else {
                return Err(refuse("config.json is no object".into()));
            };
            for key in family.top_k_keys() {
                match map.get_mut(*key) {
                    // families that write one number per layer
                    Some(serde_json::Value::Array(values)) => values.iter_mut().for_each(|value| *value = json!(top_k)),
                    Some(value) => *value = json!(top_k),
                    None => {}
                }
            }
        }
        let mut biases = BTreeMap::new();
        for (&layer, bias) in &self.selection_bias {
            let experts = base.config().moe(layer).map_or(0, |moe| moe.router_rows());
            if !base.config().routing.correction_bias() {
                let model_type = &base.config().model_type;
                return Err(refuse(format!("`{model_type}` has no tensor for a bias on the selection of experts")));
            }
            if bias.len() != experts {
                return Err(refuse(format!("{} biases for the {experts} experts of layer {layer}", bias.len())));
            }
            let info = base.role(Role::Layer(layer, LayerRole::CorrectionBias))?;
            let mut bytes = Vec::new();
            if !encode(info.dtype, bias, &mut bytes) {
                return Err(refuse(format!("tensor `{}`: biases in {:?}", info.name, info.dtype)));
            }
            biases.insert(info.name.clone(), bytes);
        }
        let recipe = json!({ "top_k": self.top_k, "selection_bias": self.selection_bias });
        let mut summary = Vec::new();
        summary.extend(self.top_k.map(|k| format!("{k} experts per token")));
        if !biases.is_empty() {
            summary.push(format!("biases on the selection in {} layers", biases.len()));
        }
        let step = Step::new("routing", base, recipe, summary.join(", "));
        let source = Exported { base: base.clone(), biases, step };
        Checkpoint::from_source(description, Arc::new(source)).map(Arc::new)
    }
}

impl ModelSource for Exported {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        match self.biases.get(&tensor.name) {
            Some(bytes) => Ok(sliced(Cow::Borrowed(bytes), range)),
            None => self.base.tensor_bytes(&tensor.name, range),
        }
    }

    fn grain(&self, tensor: &TensorInfo) -> usize {
        self.base.grain(&tensor.name)
    }

    fn makes_experts(&self, layer: usize) -> bool {
        self.base.makes_experts(layer)
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        self.base.set_part(layer, set, part)
    }

    fn release(&self, tensor: &TensorInfo, range: Range<usize>) {
        self.base.release_range(&tensor.name, range);
    }

    fn release_expert(&self, layer: usize, set: usize) {
        self.base.release_set(layer, set);
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.base)
    }

    fn step(&self) -> Option<Step> {
        Some(self.step.clone())
    }
}

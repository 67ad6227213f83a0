//! What an output form makes of a plan.

use std::collections::BTreeMap;

use moe_checkpoint::{Checkpoint, ExpertBiases, ExpertLayout, UniformShape, grouped_config, uniform_shape_config};
use serde_json::Value;

use super::OutputForm;
use crate::plan::MergePlan;
use crate::router::{RouterConfig, RouterMix, RouterRule};
use crate::{Error, Result};

/// What is written.
pub(crate) struct Target {
    pub form: OutputForm,
    /// The rule that was followed.
    pub router: RouterConfig,
    /// The new config.json.
    pub config: Value,
    /// MoE layers in ascending order.
    pub layers: Vec<TargetLayer>,
    /// What a user should know.
    pub notes: Vec<String>,
}

/// One MoE layer of a [`Target`].
pub(crate) struct TargetLayer {
    pub layer: usize,
    pub layout: ExpertLayout,
    pub biases: ExpertBiases,
    /// Width of every expert as written.
    pub widths: Vec<usize>,
    /// The group that every expert as written is made from, by position in the plan.
    pub groups: Vec<usize>,
    /// The dominant of every group of the plan: its dtypes are those of the merged expert.
    pub dominants: Vec<usize>,
    /// The new router; `None` if it stays.
    pub mix: Option<RouterMix>,
}

impl Target {
    pub fn new(plan: &MergePlan, from: &Checkpoint, form: OutputForm) -> Result<Self> {
        let refuse = |reason: String| Err(Error::Output { form: form.name(), reason });
        let mut notes = Vec::new();
        let mut router = plan.recipe.router;
        match form {
            OutputForm::Stock if router.keeps_rows() => {
                router = RouterConfig::Delete;
                if !plan.is_identity() {
                    notes.push(format!(
                        "recipe `{}` keeps all router rows, which stock loaders have no place for: rows of absorbed experts \
                         are deleted, and their tokens go to other experts; write `grouped` to keep them",
                        plan.recipe.name
                    ));
                }
            }
            OutputForm::StockCopies if !router.keeps_rows() && !plan.is_identity() => {
                return refuse(format!(
                    "recipe `{}` changes the router, so that there is nothing for copies to belong to; write `stock`",
                    plan.recipe.name
                ));
            }
            OutputForm::StockCopies if !plan.is_identity() => notes.push(
                "every absorbed expert is a copy of the merged one: nothing got smaller, on disk or in memory"
                    .to_string(),
            ),
            _ => {}
        }
        if !router.keeps_rows() && !plan.is_identity() {
            plan.validate_routing(from.config())?;
        }
        let mut layers = Vec::with_capacity(plan.layers.len());
        for (layer, shape) in plan.layers.iter().zip(&plan.shape.layers) {
            let map = layer.index_map(shape.num_experts());
            let groups: Vec<usize> = match form {
                OutputForm::StockCopies => map.iter().flatten().map(|group| *group as usize).collect(),
                _ => (0..layer.groups.len()).collect(),
            };
            let mix = if layer.is_identity() { None } else { router.mix(layer) };
            let layout = match (from.expert_layout(layer.layer)?, form) {
                (ExpertLayout::Mxfp4, _) => from.family().stock_layout(),
                (ExpertLayout::Ragged, OutputForm::Stock) => from.family().stock_layout(),
                (layout, _) => layout,
            };
            let width = |group: &usize| shape.widths[layer.groups[*group].dominant as usize];
            layers.push(TargetLayer {
                layer: layer.layer,
                layout,
                biases: from.config().moe(layer.layer).map_or(ExpertBiases::None, |moe| moe.biases),
                widths: groups.iter().map(width).collect(),
                groups,
                dominants: layer.groups.iter().map(|group| group.dominant as usize).collect(),
                mix,
            });
        }
        if plan.is_identity() && !from.ragged() {
            let config = from.raw_config().clone();
            return Ok(Self { form, router, config, layers, notes });
        }
        let config = match form {
            OutputForm::Stock => stock_config(plan, from, &mut notes)?,
            OutputForm::StockCopies => from.raw_config().clone(),
            OutputForm::Grouped => {
                let mut sets = BTreeMap::new();
                for (layer, shape) in plan.layers.iter().zip(&plan.shape.layers) {
                    let rows = match router.keeps_rows() {
                        true => layer.index_map(shape.num_experts()).into_iter().flatten().collect(),
                        false => (0..layer.groups.len() as u32).collect(),
                    };
                    sets.insert(layer.layer, rows);
                }
                grouped_config(from.raw_config(), &sets)?
            }
        };
        Ok(Self { form, router, config, layers, notes })
    }
}

/// The config of a checkpoint with as many experts as groups in each layer.
fn stock_config(plan: &MergePlan, from: &Checkpoint, notes: &mut Vec<String>) -> Result<Value> {
    let refuse = |reason: String| Err(Error::Output { form: OutputForm::Stock.name(), reason });
    let Some(width) = from.shape().uniform_width() else {
        return refuse("stock loaders read one width for all experts, but those of the checkpoint differ".into());
    };
    let Some(first) = plan.layers.first() else { return refuse("the model has no MoE layer".into()) };
    let count = first.groups.len();
    if let Some(other) = plan.layers.iter().find(|layer| layer.groups.len() != count) {
        return refuse(format!(
            "stock loaders read one number of experts for all layers, but layer {} has {count} groups and layer {} has {}; use \
             scope `layer`, or write `grouped`",
            first.layer,
            other.layer,
            other.groups.len()
        ));
    }
    let top_k = from.config().routing.top_k;
    if count < top_k {
        notes.push(format!("{count} experts are left per layer: each token gets all of them instead of {top_k}"));
    }
    let shape = UniformShape {
        width,
        experts: Some(count),
        top_k: (count < top_k).then_some(count),
        ..UniformShape::default()
    };
    Ok(uniform_shape_config(from.raw_config(), shape)?)
}

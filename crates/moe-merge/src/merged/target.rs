//! What an output form makes of a plan.

use std::collections::{BTreeMap, BTreeSet};

use moe_checkpoint::{
    Checkpoint, ExpertBiases, ExpertLayout, TopKClamp, UniformShape, grouped_config, ragged_config,
    uniform_shape_config,
};
use serde_json::Value;

use super::{OutputForm, check};
use crate::combination::Combination;
use crate::plan::MergePlan;
use crate::router::{RouterConfig, RouterMix, RouterRule};
use crate::{Error, Result};

/// What the merged model is.
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
    /// The group that every stored set of weights is made from, by position in the plan.
    pub groups: Vec<usize>,
    /// The dominant of every group of the plan: its dtypes are those of the merged expert.
    pub dominants: Vec<usize>,
    /// Units of the merged expert of every group of the plan.
    pub group_widths: Vec<usize>,
    /// The new router; `None` if it stays.
    pub mix: Option<RouterMix>,
    /// Whether no expert of the layer changes, so that its tensors are those of the base.
    pub copied: bool,
}

impl TargetLayer {
    /// Units of every stored set of weights.
    pub fn widths(&self) -> Vec<usize> {
        self.groups.iter().map(|group| self.group_widths[*group]).collect()
    }
}

impl Target {
    pub fn new(plan: &MergePlan, from: &Checkpoint, form: OutputForm) -> Result<Self> {
        let mut notes = Vec::new();
        let mut router = plan.recipe.router;
        let identity = plan.is_identity();
        if !identity {
            check::router(&plan.recipe, form)?;
        }
        match form {
            OutputForm::Stock if router.keeps_rows() => {
                router = RouterConfig::Delete;
                if !identity {
                    notes.push(format!(
                        "recipe `{}` keeps all router rows, which stock loaders have no place for: rows of absorbed experts \
                         are deleted, and their tokens go to other experts; write `grouped` to keep them",
                        plan.recipe.name
                    ));
                }
            }
            OutputForm::StockCopies if !identity => notes.push(
                "every absorbed expert is a copy of the merged one: nothing got smaller, on disk or in memory"
                    .to_string(),
            ),
            _ => {}
        }
        if !router.keeps_rows() && !identity {
            plan.validate_routing(from.config())?;
        }
        let stock = form != OutputForm::Grouped && !(identity && form == OutputForm::StockCopies);
        let mut layers = Vec::with_capacity(plan.layers.len());
        for (layer, shape) in plan.layers.iter().zip(&plan.shape.layers) {
            let map = layer.index_map(shape.num_experts());
            let groups: Vec<usize> = match form {
                OutputForm::StockCopies => map.iter().flatten().map(|group| *group as usize).collect(),
                _ => (0..layer.groups.len()).collect(),
            };
            let mix = if layer.is_identity() { None } else { router.mix(layer) };
            if mix.is_some() {
                check::table(from, layer.layer, form)?;
            }
            let own = from.expert_layout(layer.layer)?;
            let layout = if stock && own == ExpertLayout::Ragged { from.family().stock_layout() } else { own };
            layers.push(TargetLayer {
                layer: layer.layer,
                layout,
                biases: from.config().moe(layer.layer).map_or(ExpertBiases::None, |moe| moe.biases),
                groups,
                dominants: layer.groups.iter().map(|group| group.dominant as usize).collect(),
                group_widths: plan.recipe.combination.widths(layer, &shape.widths),
                mix,
                copied: layer.is_identity() && layout == own,
            });
        }
        let as_it_is = identity && layers.iter().all(|layer| layer.copied);
        let config = match form {
            _ if as_it_is => from.raw_config().clone(),
            OutputForm::Stock => stock_config(&layers, from, &mut notes)?,
            OutputForm::StockCopies if !from.ragged() => from.raw_config().clone(),
            OutputForm::StockCopies => {
                let width = one_width(&layers, form)?;
                uniform_shape_config(from.raw_config(), UniformShape { width, ..UniformShape::default() })?
            }
            OutputForm::Grouped => grouped(plan, from, &layers, router)?,
        };
        Ok(Self { form, router, config, layers, notes })
    }

    /// Whether the config has another number of experts than that of the base.
    pub fn renumbers(&self, from: &Checkpoint) -> bool {
        self.config != *from.raw_config()
    }
}

/// The width of all experts.
fn one_width(layers: &[TargetLayer], form: OutputForm) -> Result<usize> {
    let refuse = |reason: String| Err(Error::Output { form: form.name(), reason });
    let widths: BTreeSet<usize> = layers.iter().flat_map(TargetLayer::widths).collect();
    match widths.iter().copied().collect::<Vec<_>>()[..] {
        [width] => Ok(width),
        [] => refuse("the model has no MoE layer".into()),
        [least, .., most] => refuse(format!(
            "stock loaders read one width for all experts, but those of the result have {least} to {most} units; write \
             `grouped`"
        )),
    }
}

/// The config of a checkpoint with as many experts as groups in each layer.
fn stock_config(layers: &[TargetLayer], from: &Checkpoint, notes: &mut Vec<String>) -> Result<Value> {
    let refuse = |reason: String| Err(Error::Output { form: OutputForm::Stock.name(), reason });
    let width = one_width(layers, OutputForm::Stock)?;
    let Some(first) = layers.first() else { return refuse("the model has no MoE layer".into()) };
    let count = first.groups.len();
    if let Some(other) = layers.iter().find(|layer| layer.groups.len() != count) {
        return refuse(format!(
            "stock loaders read one number of experts for all layers, but layer {} has {count} groups and layer {} has {}; use \
             scope `layer`, or write `grouped`",
            first.layer,
            other.layer,
            other.groups.len()
        ));
    }
    let clamp = TopKClamp::of(from.config().routing.top_k, [count]);
    notes.extend(clamp.map(|clamp| clamp.to_string()));
    let shape =
        UniformShape { width, experts: Some(count), top_k: clamp.map(|clamp| clamp.after), ..UniformShape::default() };
    Ok(uniform_shape_config(from.raw_config(), shape)?)
}

/// The config of a checkpoint with a set of weights per group.
fn grouped(plan: &MergePlan, from: &Checkpoint, layers: &[TargetLayer], router: RouterConfig) -> Result<Value> {
    let (mut sets, mut widths, mut down_bias) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
    for ((layer, target), shape) in plan.layers.iter().zip(layers).zip(&plan.shape.layers) {
        let rows: Vec<u32> = match router.keeps_rows() {
            true => layer.index_map(shape.num_experts()).into_iter().flatten().collect(),
            false => (0..layer.groups.len() as u32).collect(),
        };
        widths.insert(layer.layer, rows.iter().map(|group| target.group_widths[*group as usize]).collect());
        sets.insert(layer.layer, rows);
        if target.biases == ExpertBiases::Down {
            down_bias.insert(layer.layer);
        }
    }
    Ok(match from.ragged() {
        true => grouped_config(&ragged_config(from.raw_config(), &widths, &down_bias)?, &sets)?,
        false => grouped_config(from.raw_config(), &sets)?,
    })
}

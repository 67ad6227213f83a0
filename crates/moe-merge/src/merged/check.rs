//! What can be known to be impossible before anything is read or run.

use std::sync::Arc;

use moe_checkpoint::{Checkpoint, ExpertLayout, Mtp};

use super::{OutputForm, mtp};
use crate::budget::Scope;
use crate::evidence::Evidence;
use crate::plan::MergePlan;
use crate::recipe::Recipe;
use crate::{Error, Result};

/// Refuses a form that has no place for the router of a recipe.
pub(super) fn router(recipe: &Recipe, form: OutputForm) -> Result<()> {
    match form {
        OutputForm::StockCopies if !recipe.router.keeps_rows() => {
            let reason = format!(
                "recipe `{}` changes the router, so that there is nothing for copies to belong to; write `stock`",
                recipe.name
            );
            Err(Error::Output { form: form.name(), reason })
        }
        _ => Ok(()),
    }
}

/// Refuses to take rows from the router of a layer that routes by a table: a token whose experts become one would go to
/// it twice.
pub(crate) fn table(base: &Checkpoint, layer: usize, form: OutputForm) -> Result<()> {
    if !base.config().moe(layer).is_some_and(|moe| moe.by_table) {
        return Ok(());
    }
    let reason = format!(
        "layer {layer} sends every token of the vocabulary to experts that a table names, which has no place for fewer \
         merged ones; write `grouped` with a recipe that keeps router rows, or exclude the layer"
    );
    Err(Error::Output { form: form.name(), reason })
}

/// Refuses a checkpoint whose experts share weights already.
pub(crate) fn not_grouped(base: &Checkpoint) -> Result<()> {
    if !base.grouped() {
        return Ok(());
    }
    let reason = "the experts of the checkpoint share sets of weights already: merge the model that it was made from";
    Err(Error::infeasible(base.dir().display().to_string(), reason))
}

/// The evidence that a plan is carried out with: none where its recipe fits on nothing.
///
/// # Errors
/// [`Error::MissingEvidence`], [`Error::InvalidEvidence`] for another than the plan was made from.
pub(super) fn evidence(plan: &MergePlan, given: Option<&Arc<Evidence>>) -> Result<Option<Arc<Evidence>>> {
    if !plan.recipe.fits_on_sample() {
        return Ok(None);
    }
    if let Some(evidence) = given {
        let digest = evidence.digest();
        if digest != plan.evidence {
            let expected = &plan.evidence;
            let reason = format!("its digest is {digest}, but the plan was made from evidence of digest {expected}");
            return Err(Error::invalid_evidence(reason));
        }
    }
    for layer in plan.layers.iter().filter(|layer| !layer.is_identity()) {
        match given.and_then(|evidence| evidence.layer(layer.layer)) {
            Some(evidence) => drop(evidence.sample("the recipe")?),
            None => {
                let what = "a sample of the layer's tokens".to_string();
                return Err(Error::MissingEvidence { layer: layer.layer, part: "the recipe", what });
            }
        }
    }
    Ok(given.cloned())
}

impl Recipe {
    /// Refuses what config and headers of a model show to be impossible, before evidence is collected: a model whose
    /// experts share weights already, a form that has no place for the router or for layers of different sizes, routing
    /// by groups of experts that the budget does not leave alike, layers that predict further tokens without a choice
    /// for them.
    ///
    /// ```no_run
    /// use moe_checkpoint::Checkpoint;
    /// use moe_merge::{OutputForm, Recipe};
    ///
    /// let model = Checkpoint::open("models/Qwen1.5-MoE-A2.7B")?;
    /// let refused = Recipe::named("ream")?.check(&model, OutputForm::StockCopies, None).unwrap_err();
    /// assert!(refused.to_string().contains("changes the router"));
    /// # Ok::<(), moe_merge::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidParameter`], [`Error::Infeasible`], [`Error::Output`], each with the reason.
    pub fn check(&self, base: &Checkpoint, form: OutputForm, mtp: Option<Mtp>) -> Result<()> {
        self.validate()?;
        not_grouped(base)?;
        let refuse = |reason: String| Err(Error::Output { form: form.name(), reason });
        let layers = &base.shape().layers;
        let (Some(first), counts) = (layers.first(), self.counts(base)?) else {
            return Err(Error::infeasible(base.dir().display().to_string(), "the model has no MoE layer"));
        };
        let changed = layers.iter().zip(&counts).any(|(layer, count)| *count < layer.num_experts());
        if !changed {
            return mtp::dropped(base, form, mtp, false).map(drop);
        }
        router(self, form)?;
        let deleted = form == OutputForm::Stock || !self.router.keeps_rows();
        if form == OutputForm::Stock {
            if self.budget.scope != Scope::Layer {
                return refuse(format!(
                    "stock loaders read one number of experts for all layers, but recipe `{}` shares its budget over \
                     layers; use scope `layer`, or write `grouped`",
                    self.name
                ));
            }
            if let Some(at) = counts.iter().position(|count| *count != counts[0]) {
                return refuse(format!(
                    "stock loaders read one number of experts for all layers, but layer {} would have {} and layer {} \
                     {}; write `grouped`",
                    first.layer, counts[0], layers[at].layer, counts[at]
                ));
            }
        }
        if form != OutputForm::Grouped && base.shape().uniform_width().is_none() {
            return refuse(
                "stock loaders read one width for all experts, but those of the model differ; write `grouped`".into(),
            );
        }
        let top_k = base.config().routing.top_k;
        for (layer, count) in layers.iter().zip(&counts) {
            let experts = layer.num_experts();
            if !deleted || *count == experts {
                continue;
            }
            table(base, layer.layer, form)?;
            if let Some(groups) = base.config().routing.groups() {
                if self.router.keeps_rows() {
                    return refuse(format!(
                        "recipe `{}` keeps all router rows and may take experts from any of the {} groups that the model \
                         routes by, but stock loaders need as many left in each; write `grouped`",
                        self.name, groups.count
                    ));
                }
                if self.budget.scope != Scope::Layer {
                    let what = format!("layer {}", layer.layer);
                    let reason = "routing by groups of experts needs as many in each group, which a budget that layers share \
                                  does not see to; use scope `layer`";
                    return Err(Error::infeasible(what, reason));
                }
                let (size, left) = (experts / groups.count.max(1), count / groups.count.max(1));
                // What grouping keeps: as many of each group, whichever they are. What is left over breaks the check.
                let over = count - left * groups.count;
                let kept = (0..experts).filter(|e| e % size.max(1) < left + usize::from(e / size.max(1) < over));
                base.config().routing.check_kept(layer.layer, experts, &kept.collect::<Vec<_>>())?;
            } else if *count < top_k && form == OutputForm::Grouped {
                return refuse(format!(
                    "layer {}: {count} router rows would be left, but a grouped checkpoint keeps `num_experts_per_tok` = \
                     {top_k}; write `stock`, or keep more",
                    layer.layer
                ));
            }
        }
        for layer in layers {
            // What comes of a ragged layout in stock loaders' is checked with widths alone.
            if form == OutputForm::Stock && base.expert_layout(layer.layer)? == ExpertLayout::Ragged {
                let moe = base.config().moe(layer.layer);
                let biases = moe.map(|moe| moe.biases).unwrap_or_default();
                let layout = base.family().stock_layout();
                if layout.tensors(base.shape().hidden_size, &layer.widths[..1], biases).is_none() {
                    return refuse(format!(
                        "layer {}: {layout} experts cannot have the biases {}",
                        layer.layer,
                        moe_checkpoint::human::variant(&biases)
                    ));
                }
            }
        }
        mtp::dropped(base, form, mtp, true).map(drop)
    }

    /// Groups of every layer as far as the budget alone says; layers that share it get their average.
    fn counts(&self, base: &Checkpoint) -> Result<Vec<usize>> {
        let layers = &base.shape().layers;
        if let Some(layer) = self.budget.exclude.iter().find(|layer| base.shape().layer(**layer).is_none()) {
            let known: Vec<usize> = layers.iter().map(|layer| layer.layer).collect();
            return Err(Error::parameter("budget.exclude", layer, format!("one of the MoE layers {known:?}")));
        }
        let count = |experts: usize, layer: usize| match self.budget.exclude.contains(&layer) {
            true => experts,
            false => self.budget.of_layer(experts),
        };
        Ok(layers.iter().map(|layer| count(layer.num_experts(), layer.layer)).collect())
    }
}

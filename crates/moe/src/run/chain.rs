//! The model of a chain before any of its steps has run: as large as config and budget show it to become.

use std::path::Path;
use std::sync::Arc;

use moe_checkpoint::{
    Checkpoint, Denominator, Granularity, LayerDrop, LayerScores, Mtp, Pool, ProtectionMask, ScoreTable, WholeScores,
};
use moe_core::depth::LayerChoice;
use moe_merge::{ExpertMap, LayerMap, OutputForm};
use moe_prune::{Budget, ExpertPruner, FineGrained, PrunePlan, Pruner, Questions, Scope, UnitPruner};

use crate::Result;
use crate::jobs::{StockForm, prune_plan, stock};
use crate::recipe::{Form, Prune};

/// What a scorer's table will be good for.
#[derive(Clone, Debug)]
pub(super) struct Scored {
    /// Name of the scorer.
    pub name: String,
    /// Of its scores.
    pub granularity: Granularity,
    /// Over which they compare.
    pub pool: Pool,
    /// Over which they add up.
    pub additive: Option<Pool>,
    /// Whether layers and experts are weighed beside them.
    pub wholes: bool,
}

/// What stands before a step.
pub(super) struct Chain {
    /// The model in its sizes; its values are anything. Where a size is not known, the larger one.
    pub model: Arc<Checkpoint>,
    /// What the last pruning was done to, if nothing came between.
    pub base: Option<Arc<Checkpoint>>,
    /// Whether experts share sets of weights.
    pub grouped: bool,
    /// Whether nothing was done to the model yet.
    pub untouched: bool,
}

impl Chain {
    /// Before the first step.
    pub fn new(model: Arc<Checkpoint>) -> Self {
        Self { grouped: model.grouped(), model, base: None, untouched: true }
    }

    /// After a pruning.
    ///
    /// # Errors
    /// Whatever the pruner or the form refuses whatever the scores are: a budget that cannot be met, widths that a form
    /// has no place for.
    pub fn prune(&mut self, step: &Prune, scored: &[Scored]) -> Result<()> {
        let model = self.stand_in(step, scored)?;
        self.base = Some(std::mem::replace(&mut self.model, model));
        self.untouched = false;
        Ok(())
    }

    /// After a merge, whose outcome has at most the size of what it is made from.
    pub fn merge(&mut self, form: OutputForm) {
        (self.base, self.untouched, self.grouped) = (None, false, form == OutputForm::Grouped);
    }

    /// After a search for as many experts of every layer; which ones only the running model knows.
    ///
    /// # Errors
    /// What no such model can be made of.
    pub fn evolve(&mut self, experts: usize, mtp: Option<Mtp>) -> Result<()> {
        let first: Vec<u32> = (0..experts as u32).collect();
        let layers = self.model.shape().layers.iter();
        let layers = layers.map(|layer| LayerMap::keep(layer.layer, &first, layer.num_experts())).collect();
        let model = ExpertMap::new(&self.model, layers)?.on(&self.model, mtp)?;
        (self.base, self.untouched, self.grouped, self.model) = (None, false, false, model);
        Ok(())
    }

    /// After fine-tuning, which changes values and gives experts that share sets of weights their own where it has to.
    pub fn tune(&mut self) {
        (self.base, self.untouched, self.grouped) = (None, false, false);
    }

    /// After quantization, which changes no shape.
    pub fn quantize(&mut self) {
        (self.base, self.untouched) = (None, false);
    }

    /// After layers were taken out. Which ones only the running model may know; they are taken from the end then.
    pub fn drop(&mut self, choice: Option<&LayerChoice>) {
        (self.base, self.untouched) = (None, false);
        let Some(choice) = choice else { return };
        let count = self.model.config().layers.len();
        let layers = match choice.needs_rows() {
            true => Ok((count - choice.count().min(count)..count).collect()),
            false => choice.layers(count, None),
        };
        let left = layers.ok().and_then(|layers: Vec<usize>| LayerDrop::new(layers).on(&self.model).ok());
        self.model = left.unwrap_or_else(|| self.model.clone());
    }

    fn stand_in(&self, step: &Prune, scored: &[Scored]) -> Result<Arc<Checkpoint>> {
        let base = &self.model;
        let (plan, chosen) = match (&step.plan, &step.keep_list) {
            // What an earlier step leaves has other indices, which only that step shows.
            (Some(_), _) | (_, Some(_)) if !self.untouched => return Ok(base.clone()),
            (Some(path), _) => {
                let plan = prune_plan(path, base, step.rebind)?;
                let chosen = stock::settled(step, &plan)?;
                (plan, chosen)
            }
            (None, Some(path)) => {
                let plan = PrunePlan::keep_only(base.shape(), base.fingerprint(), &super::check::mask(path)?)?;
                let chosen = stock::settled(step, &plan)?;
                (plan, chosen)
            }
            (None, None) => match self.planned(step, scored)? {
                Some(found) => found,
                None => return Ok(base.clone()),
            },
        };
        Ok(chosen.on(&plan, base, step.mtp, None, None)?.model().clone())
    }

    /// A plan by scores that say nothing; none where only the running model decides.
    fn planned(&self, step: &Prune, scored: &[Scored]) -> Result<Option<(PrunePlan, StockForm)>> {
        let base = &self.model;
        let Some(budget) = step.budget_on(base)? else { return Ok(None) };
        let table = |granularity, pool, additive, wholes| stand_in_scores(base, granularity, pool, additive, wholes);
        let named = |name: &Path| scored.iter().rev().find(|found| Path::new(&found.name) == name);
        let found = match &step.scores {
            None => scored.first(),
            Some(_) if step.chooses_scorer() => scored.first(),
            Some(name) => named(name),
        };
        let scores = match (found, &step.scores) {
            (Some(found), _) => table(found.granularity, found.pool, found.additive, found.wholes),
            (None, Some(path)) => {
                let file = ScoreTable::load(path)?;
                let wholes = file.layers.iter().all(|layer| layer.whole.is_some());
                table(file.granularity, file.pool, file.additive, wholes)
            }
            (None, None) => return Ok(None),
        };
        if let (Form::FineGrained, Budget::Ratio(ratio)) = (step.form, budget) {
            let pieces = FineGrained { top_k: step.pieces_per_token, ..FineGrained::new(step.pieces.unwrap_or(2)) };
            let plan = pieces.prune(&scores, base, ratio)?;
            return Ok(Some((plan, StockForm::pieces(pieces.pieces, pieces.top_k))));
        }
        let none = ProtectionMask::none();
        let pruner = step.pruner(&base.config().routing)?;
        pruner.needs().check_scores(&scores)?;
        if pruner.needs().probe == Questions::NONE && !(step.form == Form::Auto && step.pruner.is_none()) {
            let plan = pruner.prune(&scores, base.shape(), budget, &none)?.plan;
            let chosen = stock::settled(step, &plan)?;
            return Ok(Some((plan, chosen)));
        }
        // The running model decides what goes, or in which form: as much as this, if it can go like this.
        let granularity = pruner.needs().granularity;
        let like = table(granularity, Pool::Global, Some(Pool::Global), false);
        let found = match granularity {
            Granularity::Expert => {
                let pruner = ExpertPruner::new().for_routing(&base.config().routing);
                pruner.prune(&like, base.shape(), budget, &none)
            }
            Granularity::Unit => UnitPruner::new(Scope::Expert).prune(&like, base.shape(), budget, &none),
        };
        let Ok(found) = found else { return Ok(None) };
        Ok(stock::settled(step, &found.plan).ok().map(|chosen| (found.plan, chosen)))
    }
}

/// Scores without ties that say nothing, for what depends on no score.
fn stand_in_scores(
    model: &Checkpoint,
    granularity: Granularity,
    pool: Pool,
    additive: Option<Pool>,
    wholes: bool,
) -> ScoreTable {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        0.5 + (state >> 40) as f32 / (1 << 24) as f32
    };
    let layers = model.shape().layers.iter().map(|layer| LayerScores {
        layer: layer.layer,
        scores: layer
            .widths
            .iter()
            .map(|width| match granularity {
                Granularity::Unit => (0..*width).map(|_| next()).collect(),
                Granularity::Expert => vec![next()],
            })
            .collect(),
        routed: None,
        whole: wholes.then(|| WholeScores { layer: 1.0, experts: vec![1.0; layer.num_experts()] }),
    });
    ScoreTable {
        scorer: r#"{"type":"stand_in"}"#.into(),
        granularity,
        pool,
        additive,
        denominator: Denominator::None,
        layers: layers.collect(),
        provenance: moe_checkpoint::Provenance::new(model.fingerprint(), "", "{}"),
    }
}

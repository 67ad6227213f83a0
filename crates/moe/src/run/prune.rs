//! The steps that prune and repair.

use std::path::Path;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, Granularity, ScoreTable};
use moe_core::{Engine, EngineOptions};
use moe_importance::ScorerConfig;
use moe_prune::repair::RepairRequest;
use moe_prune::{
    Budget, EditSource, Edits, EngineProbe, FineGrained, ModelProbe, NoProbe, ProbeOptions, PrunePlan, PruneRequest,
    Pruner, Questions,
};

use super::artifacts::Artifacts;
use super::check::mask;
use super::steps::{Done, json, load, save};
use super::{PrunedState, Run};
use crate::jobs::{ScorerChoice, StockForm, choose_scorer, closest_stock_form, prune_plan, stock};
use crate::progress::Unit;
use crate::recipe::{Form, Prune, Repair};
use crate::{Error, Result};

impl Run<'_> {
    /// The scores that a pruning asks for.
    fn table(&self, name: Option<&Path>) -> Result<ScoreTable> {
        match name {
            None => self
                .scores
                .first()
                .map(|(_, table)| table.clone())
                .ok_or_else(|| Error::Usage("prune: no scores, neither of an earlier step nor a file".into())),
            Some(name) => match self.scores.iter().rev().find(|(scorer, _)| Path::new(scorer) == name) {
                Some((_, table)) => Ok(table.clone()),
                None => Ok(ScoreTable::load(name)?),
            },
        }
    }

    /// Every table that was scored on the model as it is now.
    fn candidates(&self) -> Vec<ScoreTable> {
        let of_this = |table: &&ScoreTable| self.model.is_model(&table.provenance.model);
        self.scores.iter().map(|(_, table)| table).filter(of_this).cloned().collect()
    }

    /// Which of some tables comes from the scorer that leaves the model closest to the full one.
    fn choose(&self, step: &Prune, base: &Arc<Checkpoint>, candidates: &[ScoreTable]) -> Result<ScorerChoice> {
        let config = |table: &ScoreTable| -> Result<ScorerConfig> {
            serde_json::from_str(&table.scorer).map_err(|error| Error::Invalid(format!("{}: {error}", table.scorer)))
        };
        let scorers = candidates.iter().map(config).collect::<Result<Vec<_>>>()?;
        let Some(budget) = step.budget_on(base)? else {
            return Err(Error::Usage("prune: needs scores and a budget".into()));
        };
        let pruner = step.comparing_pruner(&base.config().routing)?;
        let (model, calibration) = (self.engine_model()?, self.calibration()?);
        choose_scorer(&model, &scorers, &pruner, budget, &calibration.data, calibration.options, self.options.progress)
    }

    /// Drops units or experts.
    pub(super) fn prune(&mut self, step: &Prune) -> Result<Done> {
        let base = self.model.clone();
        let given = step.plan.as_ref().or(step.keep_list.as_ref());
        // What is known before the choice among scorers, if there is one: the table of each of them.
        let candidates = match (given, step.chooses_scorer()) {
            (None, true) => self.candidates(),
            (None, false) => vec![self.table(step.scores.as_deref())?],
            (Some(_), _) => Vec::new(),
        };
        let mut input = match given {
            Some(path) => std::fs::read_to_string(path).map_err(Error::io(path))?,
            None => String::new(),
        };
        for table in &candidates {
            input += &format!("{} {}", table.scorer, json(&table.provenance)?);
        }
        let data = self.calibration.as_ref().map_or(String::new(), |data| data.data.hash.clone());
        let of = [json(step)?, base.fingerprint(), input, json(&self.protect)?, data];
        let (dir, reused) = self.artifacts.begin("prune", &of.each_ref().map(String::as_str))?;
        if !reused {
            let best = match step.chooses_scorer() {
                true => {
                    let choice = self.choose(step, &base, &candidates)?;
                    save(&dir.join("scorer.json"), &choice)?;
                    choice.best
                }
                false => 0,
            };
            let (plan, chosen) = self.plan(step, &base, candidates.get(best))?;
            plan.save(dir.join("plan.json"))?;
            save(&dir.join("form.json"), &chosen)?;
            Artifacts::finish(&dir)?;
        }
        let plan = PrunePlan::load(dir.join("plan.json"))?;
        let chosen: StockForm = load(&dir.join("form.json"))?;
        let choice: Option<ScorerChoice> = match step.chooses_scorer() {
            true => Some(load(&dir.join("scorer.json"))?),
            false => None,
        };
        let scores = candidates.into_iter().nth(choice.as_ref().map_or(0, |choice| choice.best));
        let pruned = chosen.on(&plan, &base, step.mtp, scores.as_ref(), None)?;
        let by = choice.map_or(String::new(), |choice| format!("{}, ", choice.why()));
        let summary = format!("{by}{}, form {}{}", dropped(&plan), chosen.name(), chosen.why());
        self.model = pruned.model().clone();
        self.pruned =
            Some(PrunedState { base, plan, step: step.clone(), chosen, scores, edits: None, repaired: false });
        Ok(Done { summary, reused, artifact: Some(dir), ..Done::default() })
    }

    /// What a pruning keeps, and in which form.
    fn plan(
        &self,
        step: &Prune,
        base: &Arc<Checkpoint>,
        scores: Option<&ScoreTable>,
    ) -> Result<(PrunePlan, StockForm)> {
        if let Some(path) = &step.plan {
            let plan = prune_plan(path, base, step.rebind)?;
            let chosen = stock::settled(step, &plan)?;
            return Ok((plan, chosen));
        }
        if let Some(path) = &step.keep_list {
            let plan = PrunePlan::keep_only(base.shape(), base.fingerprint(), &mask(path)?)?;
            let chosen = stock::settled(step, &plan)?;
            return Ok((plan, chosen));
        }
        let (Some(scores), Some(budget)) = (scores, step.budget_on(base)?) else {
            return Err(Error::Usage("prune: needs scores and a budget".into()));
        };
        if let (Form::FineGrained, Budget::Ratio(ratio)) = (step.form, budget) {
            let pieces = FineGrained {
                top_k: step.pieces_per_token,
                ranking: (scores.granularity == Granularity::Unit).then_some(scores),
                ..FineGrained::new(step.pieces.unwrap_or(2))
            };
            let plan = pieces.prune(scores, base, ratio)?;
            return Ok((plan, StockForm::pieces(pieces.pieces, pieces.top_k)));
        }
        if let (Form::Auto, None, Budget::Ratio(ratio), Some(data)) =
            (step.form, &step.pruner, budget, &self.calibration)
            && scores.granularity == Granularity::Unit
            && self.protect.is_empty()
            && !matches!(step.budget, Some(Budget::ExpertsPerLayer(_)))
        {
            let model = self.engine_model()?;
            return closest_stock_form(&model, scores, ratio, &data.waves, step.mtp, self.options.progress);
        }
        let pruner = step.pruner(&base.config().routing)?;
        let request = PruneRequest::new(scores, base.shape(), budget, &self.protect);
        let plan = match pruner.needs().probe != Questions::NONE {
            false => pruner.prune_with(&request, &mut NoProbe)?.plan,
            true => {
                let calibration = self.calibration()?;
                let model = self.engine_model()?;
                let engine = Engine::new(&model, EngineOptions::default());
                let mut probe = EngineProbe::new(&engine, calibration.waves.clone(), ProbeOptions::default())?;
                let probe: &mut dyn ModelProbe = &mut probe;
                let mut plan = self.with_curves(&pruner, &request, scores, probe)?.prune_with(&request, probe)?.plan;
                // What the plan follows from, not where its curves happen to lie.
                plan.recipe["pruner"] = pruner.recipe();
                plan
            }
        };
        let chosen = stock::settled(step, &plan)?;
        Ok((plan, chosen))
    }

    /// Improves what the last pruning left.
    pub(super) fn repair(&mut self, step: &Repair) -> Result<Done> {
        let Some(mut pruned) = self.pruned.take() else {
            return Err(Error::Usage("repair: nothing was pruned just before it".into()));
        };
        let summary = match step {
            Repair::Refit(_) => "down columns refitted, each expert for itself",
            Repair::LayerRefit(_) => "down columns refitted, layer after layer",
            Repair::MeanOutput(_) => "mean outputs of what went are biases",
            Repair::RouterDistillation(_) => "routers distilled from the full model",
        };
        let repair = step.repair();
        let on_top = repair.needs().pruned;
        if pruned.repaired && !on_top {
            return Err(Error::Usage(
                "repair: refit and mean_output come before layer_refit and router_distillation, which change what they left".into(),
            ));
        }
        let keep_all = PrunePlan::keep_all(self.model.shape(), self.model.fingerprint());
        let calibration = self.calibration()?;
        let of = [
            json(step)?,
            self.model.fingerprint(),
            pruned.base.fingerprint(),
            pruned.plan.to_json()?,
            pruned.edits.as_ref().map_or(String::new(), |edits| edits.digest()),
            calibration.data.hash.clone(),
        ];
        let (dir, reused) = self.artifacts.begin("repair", &of.each_ref().map(String::as_str))?;
        let file = dir.join("edits.safetensors");
        if !reused {
            let teacher = self.model_of(pruned.base.clone())?;
            let student = self.model_of(self.model.clone())?;
            let bar = self.options.progress.bar("repairing", 0, Unit::Count("parts"));
            let mut tell = |done: usize, of: usize| {
                bar.total(of as u64);
                bar.at(done as u64);
            };
            let plan = &pruned.plan;
            let store = dir.join("seen");
            let others = self.artifacts.of_others(&store, self.options.absorb, self.options.progress);
            let request = RepairRequest {
                pruned: Some(&student),
                store: Some(&store),
                shard: self.options.shard,
                absorb: &others,
                group: self.options.group,
                ..RepairRequest::new(&teacher, plan, &calibration.waves)
            };
            // What is fitted to the pruned model has its indices, what is computed from the full one those of the plan.
            let edits = repair.repair(&request, &mut tell)?;
            if let Some(shard) = self.options.shard {
                return Ok(Done::share(shard, "the repair", dir));
            }
            let plan = if on_top { &keep_all } else { plan };
            self.on_first(|_| {
                edits.save(&file, plan)?;
                Artifacts::finish(&dir)
            })?;
        }
        if on_top {
            let edits: Arc<dyn EditSource> = Arc::new(Edits::load(&file, &keep_all)?);
            let repaired = pruned.chosen.as_it_is().on(&keep_all, &self.model, None, None, Some(edits))?;
            self.model = repaired.model().clone();
            pruned.repaired = true;
            self.pruned = Some(pruned);
            return Ok(Done { summary: summary.into(), reused, artifact: Some(dir), ..Done::default() });
        }
        let mut edits = Edits::load(&file, &pruned.plan)?;
        if let Some(earlier) = pruned.edits.as_deref() {
            let newer = std::mem::replace(&mut edits, earlier.clone());
            edits.extend(newer);
        }
        let edits = Arc::new(edits);
        let repaired = pruned.chosen.on(
            &pruned.plan,
            &pruned.base,
            pruned.step.mtp,
            pruned.scores.as_ref(),
            Some(edits.clone() as Arc<dyn EditSource>),
        )?;
        self.model = repaired.model().clone();
        pruned.edits = Some(edits);
        self.pruned = Some(pruned);
        Ok(Done { summary: summary.into(), reused, artifact: Some(dir), ..Done::default() })
    }
}

/// What a plan drops, in words: whole experts, units of those that stay, or both.
fn dropped(plan: &PrunePlan) -> String {
    let (mut experts, mut units_of_experts) = (0, 0);
    for (kept, shape) in plan.kept.iter().zip(&plan.shape.layers) {
        experts += kept.removed.len();
        units_of_experts += kept.removed.iter().map(|expert| shape.widths[*expert as usize]).sum::<usize>();
    }
    let (all_experts, units) =
        (plan.shape.layers.iter().map(|layer| layer.num_experts()).sum::<usize>(), plan.shape.units());
    let more = (units - plan.units_kept()).saturating_sub(units_of_experts);
    match (experts, more) {
        (0, _) => format!("{more} of {units} units dropped"),
        (_, 0) => format!("{experts} of {all_experts} experts dropped"),
        _ => format!("{experts} of {all_experts} experts and {more} of {units} units dropped"),
    }
}

//! The steps that prune and repair.

use std::path::Path;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, Granularity, ScoreTable};
use moe_core::{Engine, EngineOptions};
use moe_prune::repair::RepairRequest;
use moe_prune::{
    Budget, EditSource, Edits, EngineProbe, FineGrained, ModelProbe, NoProbe, ProbeOptions, PrunePlan, PruneRequest,
    Pruner, Questions,
};

use super::artifacts::Artifacts;
use super::check::mask;
use super::steps::{Done, json, load, save};
use super::stock::{self, Chosen};
use super::{PrunedState, Run};
use crate::jobs::prune_plan;
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

    /// Drops units or experts.
    pub(super) fn prune(&mut self, step: &Prune) -> Result<Done> {
        let base = self.model.clone();
        let given = step.plan.as_ref().or(step.keep_list.as_ref());
        let scores = match given {
            None => Some(self.table(step.scores.as_deref())?),
            Some(_) => None,
        };
        let input = match (given, &scores) {
            (Some(path), _) => std::fs::read_to_string(path).map_err(Error::io(path))?,
            (None, Some(table)) => format!("{} {}", table.scorer, json(&table.provenance)?),
            _ => String::new(),
        };
        let data = self.calibration.as_ref().map_or(String::new(), |data| data.data.hash.clone());
        let of = [json(step)?, base.fingerprint(), input, json(&self.protect)?, data];
        let (dir, reused) = self.artifacts.begin("prune", &of.each_ref().map(String::as_str))?;
        if !reused {
            let (plan, chosen) = self.plan(step, &base, scores.as_ref())?;
            plan.save(dir.join("plan.json"))?;
            save(&dir.join("form.json"), &chosen)?;
            Artifacts::finish(&dir)?;
        }
        let plan = PrunePlan::load(dir.join("plan.json"))?;
        let chosen: Chosen = load(&dir.join("form.json"))?;
        let pruned = chosen.on(&plan, &base, step.mtp, scores.as_ref(), None)?;
        let summary = format!("{}, form {}{}", dropped(&plan), chosen.name(), chosen.why());
        self.model = pruned.model().clone();
        self.pruned =
            Some(PrunedState { base, plan, step: step.clone(), chosen, scores, edits: None, repaired: false });
        Ok(Done { summary, reused, artifact: Some(dir), ..Done::default() })
    }

    /// What a pruning keeps, and in which form.
    fn plan(&self, step: &Prune, base: &Arc<Checkpoint>, scores: Option<&ScoreTable>) -> Result<(PrunePlan, Chosen)> {
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
            return Ok((plan, Chosen::pieces(pieces.pieces, pieces.top_k)));
        }
        if let (Form::Auto, None, Budget::Ratio(ratio), Some(data)) =
            (step.form, &step.pruner, budget, &self.calibration)
            && scores.granularity == Granularity::Unit
            && self.protect.is_empty()
            && !matches!(step.budget, Some(Budget::ExpertsPerLayer(_)))
        {
            let model = self.engine_model()?;
            return stock::search(&model, scores, ratio, data, step.mtp, self.options.progress);
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
                ..RepairRequest::new(&teacher, plan, &calibration.waves)
            };
            // What is fitted to the pruned model has its indices, what is computed from the full one those of the plan.
            let edits = repair.repair(&request, &mut tell)?;
            if let Some(shard) = self.options.shard {
                return Ok(Done::share(shard, "the repair", dir));
            }
            let plan = if on_top { &keep_all } else { plan };
            edits.save(&file, plan)?;
            Artifacts::finish(&dir)?;
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

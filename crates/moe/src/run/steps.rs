//! What each step does.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, Existing, Granularity, Provenance, ScoreTable, WriteOptions, write, write_json};
use moe_core::data::WaveOptions;
use moe_core::{Engine, EngineOptions, Model};
use moe_importance::{Scorer, StatisticId, SuperExperts};
use moe_prune::repair::RepairRequest;
use moe_prune::{
    Budget, EditSource, Edits, EngineProbe, FineGrained, ModelProbe, NoProbe, ProbeOptions, PrunePlan, PruneRequest,
    Pruner, Questions,
};
use serde::{Deserialize, Serialize};

use super::artifacts::{Artifacts, digest};
use super::check::mask;
use super::stock::{self, Chosen};
use super::{Measurement, PrunedState, Run};
use crate::eval_file::EvalFile;
use crate::jobs::prune_plan;
use crate::progress::Unit;
use crate::recipe::{Evaluate, Form, Protect, Prune, Repair, Score, Write};
use crate::{Error, Result, format};

/// What a step tells.
#[derive(Default)]
pub(super) struct Done {
    pub summary: String,
    pub reused: bool,
    pub artifact: Option<PathBuf>,
    pub measured: Vec<Measurement>,
}

/// JSON of what can be JSON.
pub(super) fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| Error::Invalid(error.to_string()))
}

pub(super) fn save(path: &Path, value: &impl Serialize) -> Result<()> {
    let value = serde_json::to_value(value).map_err(|error| Error::Invalid(error.to_string()))?;
    Ok(write_json(path, &value)?)
}

pub(super) fn load<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))
}

impl Run<'_> {
    /// Scores the model, or takes the scores of an earlier run.
    pub(super) fn score(&mut self, step: &Score) -> Result<Done> {
        let configs = step.scorers()?;
        let scorers = configs.iter().map(|config| config.build()).collect::<moe_importance::Result<Vec<_>>>()?;
        let super_experts = step.super_experts()?;
        let mut ids: Vec<StatisticId> = scorers.iter().flat_map(|scorer| scorer.needs().statistics).collect();
        ids.extend(super_experts.map(|options| options.needs()));
        let data = self.calibration.as_ref().map_or(String::new(), |data| data.data.hash.clone());
        let waves = format!("{:?}", self.recipe.data.wave_tokens);
        let wanted = ids.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
        let of_statistics = [self.identity(), data.clone(), waves.clone(), json(&wanted)?];
        let of = [json(step)?, self.identity(), data, waves];
        let (dir, reused) = self.artifacts.begin("score", &of.each_ref().map(String::as_str))?;
        let mut tokens = 0;
        if !reused {
            let statistics = match ids.is_empty() {
                true => moe_checkpoint::Statistics::new(
                    self.model.shape(),
                    Provenance::new(self.model.fingerprint(), "", "{}"),
                ),
                false => {
                    // Whatever is scored from the same statistics of the same model shares them.
                    let (store, _) =
                        self.artifacts.begin("statistics", &of_statistics.each_ref().map(String::as_str))?;
                    let data = self.calibration()?;
                    tokens = data.data.tokens();
                    let model = self.engine_model()?;
                    let bar = self.options.progress.bar("scoring", tokens as u64, Unit::Count("tokens"));
                    let calibration = data.observing(&model, ids).store(store);
                    calibration.run(&mut |at| bar.at(at.tokens_done))?
                }
            };
            for scorer in &scorers {
                scorer.score(&statistics, self.model.as_ref())?.save(score_file(&dir, scorer.as_ref()))?;
            }
            if let Some(options) = super_experts {
                let found = SuperExperts::find(&statistics, options)?;
                save(&dir.join("super_experts.json"), &found)?;
                save(&dir.join("protect.json"), &found.protected())?;
            }
            Artifacts::finish(&dir)?;
        }
        for scorer in &scorers {
            let table = ScoreTable::load(score_file(&dir, scorer.as_ref()))?;
            self.scores.push((scorer.name().to_string(), table));
        }
        if super_experts.is_some() {
            self.super_experts = Some(mask(&dir.join("protect.json"))?);
        }
        let names: Vec<&str> = scorers.iter().map(|scorer| scorer.name()).collect();
        let summary = match tokens {
            0 => format!("scores by {}", names.join(", ")),
            tokens => format!("scores by {} from one pass over {tokens} tokens", names.join(", ")),
        };
        Ok(Done { summary, reused, artifact: Some(dir), measured: vec![] })
    }

    /// Protects experts from what follows.
    pub(super) fn protect(&mut self, step: &Protect) -> Result<Done> {
        let more = match step {
            Protect::SuperExperts => self
                .super_experts
                .clone()
                .ok_or_else(|| Error::Usage("protect: no earlier score of this run looked for super experts".into()))?,
            Protect::File(path) => mask(path)?,
            Protect::Mask(mask) => mask.clone(),
        };
        more.validate(self.model.shape())?;
        self.protect.merge(&more);
        let summary = format!("{} experts protected, wholly or in part", self.protect.entries().len());
        Ok(Done { summary, ..Done::default() })
    }

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
        let summary = format!(
            "{}, form {}{}",
            dropped(&plan),
            chosen.name(),
            chosen.divergence.map_or(String::new(), |nats| format!(" (chosen by divergence: {nats:.4} nats)"))
        );
        self.model = pruned.model().clone();
        self.pruned =
            Some(PrunedState { base, plan, step: step.clone(), chosen, scores, edits: None, repaired: false });
        Ok(Done { summary, reused, artifact: Some(dir), measured: vec![] })
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
        let (Some(scores), Some(budget)) = (scores, step.budget) else {
            return Err(Error::Usage("prune: needs scores and a budget".into()));
        };
        let budget = budget.resolve(base)?;
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
            let teacher = Model::new(pruned.base.clone(), &self.device, self.max_memory)?;
            let student = Model::new(self.model.clone(), &self.device, self.max_memory)?;
            let bar = self.options.progress.bar("repairing", 0, Unit::Count("parts"));
            let mut tell = |done: usize, of: usize| {
                bar.total(of as u64);
                bar.at(done as u64);
            };
            let plan = &pruned.plan;
            let store = dir.join("seen");
            let request = RepairRequest {
                pruned: Some(&student),
                store: Some(&store),
                ..RepairRequest::new(&teacher, plan, &calibration.waves)
            };
            // What is fitted to the pruned model has its indices, what is computed from the full one those of the plan.
            let edits = repair.repair(&request, &mut tell)?;
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
            return Ok(Done { summary: summary.into(), reused, artifact: Some(dir), measured: vec![] });
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
        Ok(Done { summary: summary.into(), reused, artifact: Some(dir), measured: vec![] })
    }

    /// Measures the model.
    pub(super) fn evaluate(&mut self, step: &Evaluate) -> Result<Done> {
        let paths = if step.data.is_empty() { &self.recipe.data.eval } else { &step.data };
        let Some(tokenizer) = &self.tokenizer else {
            return Err(Error::Invalid(format!("{}: has no tokenizer.json", self.recipe.model.display())));
        };
        let files = EvalFile::load_all(paths, &step.options, Some(tokenizer), self.model.config())?;
        let recipes: Vec<serde_json::Value> = files.iter().map(EvalFile::recipe).collect();
        let of = [json(&step.options)?, self.identity(), serde_json::Value::from(recipes).to_string()];
        let (dir, reused) = self.artifacts.begin("evaluate", &of.each_ref().map(String::as_str))?;
        let file = dir.join("evaluation.json");
        if !reused {
            let model = self.engine_model()?;
            let waves = WaveOptions::Tokens(self.recipe.data.wave_tokens);
            let bar = self.options.progress.bar("measuring", files.len() as u64, Unit::Count("files"));
            let mut measured = Vec::with_capacity(files.len());
            for file in &files {
                bar.label(format!("measuring {}", file.name));
                let (value, _) = file.measure(&model, tokenizer, waves)?;
                measured.push(Measurement { key: file.key(), value });
                bar.step();
            }
            save(&file, &measured)?;
            Artifacts::finish(&dir)?;
        }
        self.measured = load(&file)?;
        let summary =
            format!("measured on {}", files.iter().map(|file| file.name.as_str()).collect::<Vec<_>>().join(", "));
        Ok(Done { summary, reused, artifact: Some(dir), measured: self.measured.clone() })
    }

    /// Puts what the model is run with beside a model that was written.
    fn write_run_time(&self, to: &Path) -> Result<()> {
        match self.run_time.is_plain() {
            true => Ok(()),
            false => Ok(self.run_time.save_beside(to)?),
        }
    }

    /// Writes the model.
    pub(super) fn write(&mut self, step: &Write) -> Result<Done> {
        let to = step.to.clone().unwrap_or_else(|| self.recipe.out.join("model"));
        let summary = format!("written to {}", to.display());
        if to.exists() && !self.options.force {
            // A finished directory of this very model is what the step would write.
            if Checkpoint::open(&to)?.is_model(&self.model.fingerprint()) {
                self.write_beside(&to)?;
                self.write_run_time(&to)?;
                self.written.push(to.clone());
                return Ok(Done { summary, reused: true, artifact: Some(to), measured: vec![] });
            }
            let advice = "force to replace it";
            return Err(Error::Invalid(format!("{}: another model is there; {advice}", to.display())));
        }
        let measured: Vec<(String, String)> =
            self.measured.iter().map(|found| (found.key.clone(), format!("{:.4}", found.value))).collect();
        let max_shard_bytes = match &step.shard_size {
            Some(size) => format::parse_size(size).map_err(Error::Usage)?,
            None => WriteOptions::default().max_shard_bytes,
        };
        let bar = self.options.progress.bar("writing", self.model.bytes_on_disk(), Unit::Bytes);
        let tell = |at: &moe_checkpoint::Progress<'_>| {
            bar.at(at.done);
            Ok(())
        };
        let existing = if self.options.force { Existing::Force } else { Existing::Resume };
        let options = WriteOptions { max_shard_bytes, existing, measured: &measured, progress: Some(&tell) };
        write(&self.model, &to, &options)?;
        let summary = match self.write_beside(&to)? {
            Some(adapter) => format!("{summary}, what goes with it to {}", adapter.display()),
            None => summary,
        };
        self.write_run_time(&to)?;
        self.written.push(to.clone());
        Ok(Done { summary, reused: false, artifact: Some(to), measured: vec![] })
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

fn score_file(dir: &Path, scorer: &dyn Scorer) -> PathBuf {
    let short = &digest(&[&scorer.recipe().to_string()])[..8];
    dir.join(format!("{}-{short}.safetensors", scorer.name()))
}

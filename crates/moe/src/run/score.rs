//! The steps that say what matters: scores, and what is protected.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use moe_checkpoint::{Provenance, ScoreTable};
use moe_importance::{Scorer, StatisticId, SuperExperts};

use super::Run;
use super::artifacts::{Artifacts, digest};
use super::check::mask;
use super::steps::{Done, json, save};
use crate::progress::Unit;
use crate::recipe::{Protect, Score};
use crate::{Error, Result};

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
                    let others = self.artifacts.of_others(&store, self.options.absorb, self.options.progress);
                    let calibration = data.observing(&model, ids, self.options.group).store(&store).absorb(others);
                    if let Some((index, count)) = self.options.shard {
                        calibration.shard(index, count).run(&mut |at| bar.at(at.tokens_done))?;
                        return Ok(Done::share((index, count), "what scores are made of", store));
                    }
                    calibration.run(&mut |at| bar.at(at.tokens_done))?
                }
            };
            self.on_first(|run| {
                for scorer in &scorers {
                    scorer.score(&statistics, run.model.as_ref())?.save(score_file(&dir, scorer.as_ref()))?;
                }
                if let Some(options) = super_experts {
                    let found = SuperExperts::find(&statistics, options)?;
                    save(&dir.join("super_experts.json"), &found)?;
                    save(&dir.join("protect.json"), &found.protected())?;
                }
                Artifacts::finish(&dir)
            })?;
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
        Ok(Done { summary, reused, artifact: Some(dir), ..Done::default() })
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
}

fn score_file(dir: &Path, scorer: &dyn Scorer) -> PathBuf {
    let short = &digest(&[&scorer.recipe().to_string()])[..8];
    dir.join(format!("{}-{short}.safetensors", scorer.name()))
}

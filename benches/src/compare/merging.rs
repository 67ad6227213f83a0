//! The study of ways to merge: what is measured, beside what, and the sizes of what is written.

use std::path::Path;

use moe_checkpoint::{WriteOptions, write, write_atomic};
use moe_core::Model;
use moe_merge::{EvidenceOptions, OutputForm, Recipe};
use serde::{Deserialize, Serialize};

use super::bench::Figures;
use super::case::{Amount, Case};
use super::catalog::{self, EVIDENCE, MERGES, Method, NO_REPAIR, RIVALS, TRAINED};
use super::lab::Job;
use super::merged::{self, SAMPLE};
use super::scored::Scored;
use super::settings::Settings;
use crate::{Error, Result};

/// What is merged and what it is compared with.
#[derive(Clone, Debug)]
pub struct Merging {
    /// Ways to merge by name.
    pub methods: Vec<&'static str>,
    /// A scorer and a way to prune each.
    pub rivals: Vec<(&'static str, &'static str)>,
}

impl Merging {
    /// The whole study.
    pub fn full() -> Self {
        Self { methods: MERGES.iter().map(|line| line.name).collect(), rivals: RIVALS.into() }
    }

    /// A small part of it.
    pub fn quick() -> Self {
        let left_out = ["ream-square", "sub-moe", "uncurl", TRAINED[1]];
        let mut merging = Self::full();
        merging.methods.retain(|method| !left_out.contains(method));
        merging
    }

    /// A scorer, or what merges go by, and a way to prune or merge, in the order of the tables.
    pub fn rows(&self) -> impl Iterator<Item = (&'static str, &'static str)> + '_ {
        self.rivals.iter().copied().chain(self.methods.iter().map(|method| (EVIDENCE, *method)))
    }

    /// Everything at every size, with answers at the size at which everything is compared; training only there.
    pub fn jobs(&self, settings: &Settings) -> Vec<Job> {
        let mut jobs = Vec::new();
        for (calibrated, seed) in settings.draws() {
            for ratio in &settings.ratios {
                let half = *ratio == settings.half;
                for (scorer, method) in self.rows().filter(|(_, method)| half || !TRAINED.contains(method)) {
                    let case = Case {
                        calibrated: calibrated.into(),
                        seed,
                        scorer: scorer.into(),
                        method: method.into(),
                        amount: Amount::ratio(*ratio),
                        repair: NO_REPAIR.into(),
                    };
                    jobs.push(Job { case, figures: if half { Figures::All } else { Figures::Predictions } });
                }
            }
        }
        jobs
    }

    /// Evidence that all of them read together.
    ///
    /// # Errors
    /// A way to merge that is not known.
    pub fn evidence(&self) -> Result<EvidenceOptions> {
        let recipes = self.methods.iter().map(|method| recipe(method, 0.0)).collect::<Result<Vec<_>>>()?;
        Ok(EvidenceOptions::for_recipes(recipes.iter().filter(|recipe| !recipe.sequential), SAMPLE))
    }
}

fn recipe(method: &str, ratio: f64) -> Result<Recipe> {
    match catalog::method(method)? {
        Method::Merge(merge) => merge.recipe(ratio),
        _ => Err(Error::Invalid(format!("{method} is not a way to merge"))),
    }
}

/// What a way to merge writes in one form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Form {
    /// The way to merge.
    pub method: String,
    /// The form.
    pub form: OutputForm,
    /// Bytes of the safetensors files; none where the recipe does not allow the form.
    pub bytes: Option<u64>,
}

impl Form {
    /// Writes every recipe in every form, at the size at which everything is compared, to see how large that is; or
    /// reads what an earlier run has found. The first entry is the full model's, as it is.
    ///
    /// # Errors
    /// Whatever stops a merge but a form that a recipe does not allow.
    pub fn measure_or_load(
        model: &Model,
        merging: &Merging,
        half: f64,
        scored: &Scored,
        root: &Path,
    ) -> Result<Vec<Self>> {
        let path = root.join("forms.json");
        let invalid = |error: serde_json::Error| Error::Invalid(format!("{}: {error}", path.display()));
        if path.exists() {
            return serde_json::from_slice(&std::fs::read(&path).map_err(Error::io(&path))?).map_err(invalid);
        }
        let full = bytes(model.checkpoint().dir())?;
        let mut forms = vec![Self { method: "(full model)".into(), form: OutputForm::StockCopies, bytes: Some(full) }];
        let scratch = root.join("scratch/forms");
        if scratch.exists() {
            std::fs::remove_dir_all(&scratch).map_err(Error::io(&scratch))?;
        }
        for method in &merging.methods {
            let recipe = recipe(method, half)?;
            if recipe.compression.is_some() {
                continue;
            }
            for form in [OutputForm::Grouped, OutputForm::Stock, OutputForm::StockCopies] {
                let to = scratch.join(format!("{method}-{form}"));
                let bytes = match merged::merged(model, &recipe, scored, form, &scratch) {
                    Ok((merged, _)) => {
                        write(merged.model(), &to, &WriteOptions::default())?;
                        Some(bytes(&to)?)
                    }
                    Err(Error::Merge(moe_merge::Error::Output { .. })) => None,
                    Err(error) => return Err(error),
                };
                forms.push(Self { method: (*method).to_owned(), form, bytes });
            }
        }
        std::fs::remove_dir_all(&scratch).map_err(Error::io(&scratch))?;
        write_atomic(&path, &serde_json::to_vec_pretty(&forms).map_err(invalid)?)?;
        Ok(forms)
    }
}

/// Bytes of the safetensors files of a directory.
fn bytes(dir: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            sum += path.metadata().map_err(Error::io(&path))?.len();
        }
    }
    Ok(sum)
}

//! The report of a recipe.

use std::fs;
use std::path::{Path, PathBuf};

use moe_checkpoint::{Checkpoint, ScoreTable, write_atomic};
use moe_core::data::Tokenizer;
use moe_core::{Model, device};
use moe_merge::MergePlan;
use moe_peft::TrainingCost;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{ByExpert, FrontierPoint, Quality, Report, Size, routing};
use crate::recipe::{Recipe, Step};
use crate::run::{Calibration, POINTS, RunReport, StepReport};
use crate::table::Table;
use crate::{Error, Result, format};

/// What stands for the model before the first step that changes it.
const BEFORE: &str = "before";

/// Writes `report.html` and `report.json` into the directory of a recipe.
///
/// # Errors
/// Files that cannot be written, models that cannot be opened.
pub fn write_run(recipe: &Recipe, report: &RunReport) -> Result<()> {
    let json = serde_json::to_vec_pretty(report).map_err(|error| Error::Invalid(format!("the report: {error}")))?;
    write_atomic(recipe.out.join("report.json"), &json)?;
    let mut page = Report::new(format!("{}: {} steps", super::model_name(&recipe.model), recipe.steps.len()));
    if !recipe.about.is_empty() {
        page.paragraph(&recipe.about);
    }
    page.section("What was done");
    page.table(&steps(report));
    let model = Checkpoint::open(&recipe.model)?;
    let names = names(&report.steps);
    page.quality(&qualities(&report.steps, &names))?;
    page.sizes(&sizes(&model, &report.steps, &names))?;
    let ratios: Vec<f64> = recipe.steps.iter().filter_map(ratio).collect();
    for step in &report.steps {
        let Some(artifact) = &step.artifact else { continue };
        match step.step.as_str() {
            "score" => {
                for (name, scores) in score_files(artifact)? {
                    page.importance(&name, &scores, &ratios)?;
                }
            }
            "merge" => page.groups(&MergePlan::load(artifact.join("plan.json"))?)?,
            "frontier" => {
                if let Some(points) = load::<Vec<FrontierPoint>>(&artifact.join(POINTS))? {
                    page.frontier(&points)?;
                }
            }
            "tune" => {
                let losses = match load::<TrainingCost>(&artifact.join("training.json"))? {
                    Some(cost) => cost.losses.iter().map(|point| (point.step, point.loss)).collect(),
                    None => Vec::new(),
                };
                page.losses(&[(step.summary.clone(), losses)])?;
            }
            _ => {}
        }
    }
    if let Some(last) = report.written.last() {
        page.routing(&routings(recipe, last)?)?;
    }
    for path in &report.written {
        page.widths(&path.display().to_string(), &Checkpoint::open(path)?)?;
    }
    page.section("The recipe");
    let recipe_json: Value = serde_json::to_value(recipe).map_err(|error| Error::Invalid(error.to_string()))?;
    page.preformatted(&format!("{recipe_json:#}"));
    page.write(recipe.out.join("report.html"))
}

fn steps(report: &RunReport) -> Table {
    let mut table = Table::new(["step", "what it did", "parameters", "bytes", "seconds"], 2);
    for step in &report.steps {
        let summary = if step.reused { format!("{} (reused)", step.summary) } else { step.summary.clone() };
        let (parameters, bytes) = (format::count(step.parameters), format::size(step.bytes));
        table.row([step.step.clone(), summary, parameters, bytes, format!("{:.1}", step.seconds)]);
    }
    table
}

/// What the model is called after each step: the last step that changed it, counted where one comes several times.
fn names(steps: &[StepReport]) -> Vec<String> {
    let changes = |step: &&StepReport| matches!(step.step.as_str(), "prune" | "merge" | "repair" | "tune" | "quantize");
    let name = |number: usize| {
        let so_far = &steps[..=number];
        let Some(last) = so_far.iter().rfind(changes) else { return BEFORE.to_string() };
        let times = so_far.iter().filter(|step| step.step == last.step).count();
        match steps.iter().filter(|step| step.step == last.step).count() {
            1 => last.step.clone(),
            _ => format!("{} {times}", last.step),
        }
    };
    (0..steps.len()).map(name).collect()
}

fn qualities(steps: &[StepReport], names: &[String]) -> Vec<Quality> {
    let measured = steps.iter().zip(names).filter(|(step, _)| !step.measured.is_empty());
    measured.map(|(step, name)| Quality { of: name.clone(), measured: step.measured.clone() }).collect()
}

/// The model as it was, and after each step that made it another size.
fn sizes(model: &Checkpoint, steps: &[StepReport], names: &[String]) -> Vec<Size> {
    let mut sizes = vec![Size::of(BEFORE, model)];
    for (step, name) in steps.iter().zip(names) {
        let size = Size { of: name.clone(), parameters: step.parameters, bytes: step.bytes };
        if sizes.last().is_some_and(|last| (last.parameters, last.bytes) != (size.parameters, size.bytes)) {
            sizes.push(size);
        }
    }
    sizes
}

/// The ratio that a pruning was asked for.
fn ratio(step: &Step) -> Option<f64> {
    match step {
        Step::Prune(prune) => match prune.budget {
            Some(moe_prune::Budget::Ratio(ratio)) => Some(ratio),
            _ => None,
        },
        _ => None,
    }
}

/// Score files of an artifact, with the names of their scorers, in the order of their names.
fn score_files(dir: &Path) -> Result<Vec<(String, ScoreTable)>> {
    let entries = fs::read_dir(dir).map_err(Error::io(dir))?;
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.map(|entry| entry.path()).map_err(Error::io(dir)))
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .collect();
    paths.sort();
    let read = |path: PathBuf| {
        let scores = ScoreTable::load(&path)?;
        Ok((super::scorer_name(&scores), scores))
    };
    paths.into_iter().map(read).collect()
}

/// JSON of a file, if it is there.
fn load<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let value = serde_json::from_str(&text);
    value.map(Some).map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))
}

/// Tokens per expert before and after, on the first wave of the calibration rows; nothing without such rows.
fn routings(recipe: &Recipe, written: &Path) -> Result<Vec<(String, ByExpert)>> {
    if recipe.data.calibration.is_empty() {
        return Ok(Vec::new());
    }
    let device = device::device(&recipe.device)?;
    let limit = recipe.max_memory.as_deref().map(format::parse_size).transpose().map_err(Error::Usage)?;
    let tokenizer = match recipe.model.join("tokenizer.json").exists() {
        true => Some(Tokenizer::from_dir(&recipe.model)?),
        false => None,
    };
    let mut routings = Vec::with_capacity(2);
    for (name, path) in [(BEFORE, recipe.model.as_path()), ("after", written)] {
        let model = Model::open(path, &device, limit)?;
        let seed = Some(recipe.seed).filter(|seed| *seed != 0);
        let rows = Calibration::load(&recipe.data, seed, tokenizer.as_ref(), model.config().vocab_size)?;
        routings.push((name.to_string(), routing(&model, &rows.waves[..rows.waves.len().min(1)])?));
    }
    Ok(routings)
}

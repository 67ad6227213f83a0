//! The report of a recipe.

use moe_checkpoint::{Checkpoint, write_atomic};
use serde_json::Value;

use super::Report;
use crate::figures::heat_map_of;
use crate::recipe::Recipe;
use crate::run::RunReport;
use crate::table::Table;
use crate::{Error, Result, format};

/// Writes `report.html` and `report.json` into the directory of a recipe.
///
/// # Errors
/// Files that cannot be written, models that cannot be opened.
pub fn write_run(recipe: &Recipe, report: &RunReport) -> Result<()> {
    let json = serde_json::to_vec_pretty(report).map_err(|error| Error::Invalid(format!("the report: {error}")))?;
    write_atomic(recipe.out.join("report.json"), &json)?;
    let mut page = Report::new(format!("{}: {} steps", recipe.model.display(), recipe.steps.len()));
    page.section("What was done");
    let mut table = Table::new(["step", "what it did", "parameters", "bytes", "seconds"], 2);
    for step in &report.steps {
        let summary = if step.reused { format!("{} (reused)", step.summary) } else { step.summary.clone() };
        let (parameters, bytes) = (format::count(step.parameters), format::size(step.bytes));
        table.row([step.step.clone(), summary, parameters, bytes, format!("{:.1}", step.seconds)]);
    }
    page.table(&table);
    let measured: Vec<_> = report.steps.iter().enumerate().filter(|(_, step)| !step.measured.is_empty()).collect();
    if !measured.is_empty() {
        page.section("What the model can do");
        let mut names: Vec<&str> = Vec::new();
        for found in measured.iter().flat_map(|(_, step)| &step.measured) {
            if !names.contains(&found.key.as_str()) {
                names.push(&found.key);
            }
        }
        let mut table = Table::new(["after step"].into_iter().chain(names.iter().copied()), 1);
        for (number, step) in measured {
            let value = |name: &&str| {
                let found = step.measured.iter().find(|found| found.key == *name);
                found.map_or(String::new(), |found| format!("{:.4}", found.value))
            };
            let before = report.steps[..number].iter().rev().find(|step| step.step != "evaluate");
            let label = before.map_or("(the model as it was)".to_string(), |step| step.summary.clone());
            table.row([label].into_iter().chain(names.iter().map(value)));
        }
        page.table(&table);
    }
    for path in &report.written {
        let model = Checkpoint::open(path)?;
        let widths: Vec<(usize, Vec<f64>)> = (0..model.config().layers.len())
            .filter_map(|layer| Some((layer, model.config().moe(layer)?)))
            .map(|(layer, moe)| (layer, moe.widths.iter().map(|width| *width as f64).collect()))
            .collect();
        page.section(&format!("{}: units of every expert", path.display()));
        let caption = "Units that each expert has: a row per MoE layer, a column per expert. Grey has none.";
        page.figure(&heat_map_of("Units of every expert in every layer", &widths)?, caption);
    }
    page.section("The recipe");
    let recipe_json: Value = serde_json::to_value(recipe).map_err(|error| Error::Invalid(error.to_string()))?;
    page.preformatted(&format!("{recipe_json:#}"));
    Ok(write_atomic(recipe.out.join("report.html"), page.to_html().as_bytes())?)
}

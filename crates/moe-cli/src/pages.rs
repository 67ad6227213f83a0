//! What verbs that measure show to people: `report.html`, from the sections that all reports share.

use std::path::Path;

use moe::report::{ByExpert, Quality, Report as Page, Size, model_name, routing};
use moe::run::Measurement;
use moe_checkpoint::ScoreTable;
use moe_core::Model;
use moe_core::data::Wave;
use moe_merge::{MergePlan, MergedModel};

use crate::compare::Compared;
use crate::eval::Measured;
use crate::merge::Loss;
use crate::table::Table;
use crate::{Result, format};

/// Ratios whose place in the ranking is shown.
const SHOWN_RATIOS: [f64; 3] = [0.25, 0.5, 0.75];

/// What scores look like: importance by every scorer, and where the tokens of the pass went. `loss` is in nats per
/// token.
///
/// # Errors
/// Those of drawing.
pub fn of_scores(model: &Path, tokens: u64, loss: Option<f64>, tables: &[(String, &ScoreTable)]) -> Result<Page> {
    let mut page = Page::new(format!("Scores of {}", model_name(model)));
    let loss = loss.map_or(String::new(), |loss| format!(", whose loss is {loss:.4} nats per token"));
    page.paragraph(&format!("{} tokens were collected in this run{loss}.", format::count(tokens)));
    for (name, table) in tables {
        page.importance(name, table, &SHOWN_RATIOS)?;
    }
    let counts = tables.iter().find(|(_, table)| table.layers.iter().all(|layer| layer.routed.is_some()));
    if let Some((_, table)) = counts {
        let of_layer = |counts: &Vec<u64>| counts.iter().map(|count| *count as f64).collect();
        let layers = table.layers.iter().map(|layer| (layer.layer, layer.routed.as_ref().map_or(vec![], of_layer)));
        page.routing(&[("on the calibration rows".to_string(), layers.collect())])?;
    }
    Ok(page)
}

/// What became of merged experts: groups, sizes, routing before and after on `waves`, and what was lost on test rows.
///
/// # Errors
/// Those of drawing; whatever stops the models.
pub fn of_merge(
    model: &Model,
    merged: &MergedModel,
    plan: &MergePlan,
    test: Option<Loss>,
    waves: &[Wave],
) -> Result<Page> {
    let report = merged.report();
    let mut page = Page::new(format!("{} merged by {}", model_name(model.checkpoint().dir()), plan.recipe.name));
    let [asked, achieved] = [report.ratio.asked, report.ratio.achieved].map(format::percent);
    page.paragraph(&format!("{achieved} of the experts went ({asked} asked), written as {}.", report.form));
    report.notes.iter().for_each(|note| page.paragraph(note));
    if let Some(Loss { before, after, divergence }) = test {
        let of = |of: &str, nats: f64, divergence: f64| Quality {
            of: of.into(),
            measured: [("test_nats", nats), ("test_divergence_nats", divergence)]
                .map(|(key, value)| Measurement { key: key.into(), value })
                .into(),
        };
        page.quality(&[of("before", before, 0.0), of("merged", after, divergence)])?;
    }
    page.sizes(&[Size::of("before", model.checkpoint()), Size::of("merged", merged.model())])?;
    page.groups(plan)?;
    let after = model.like(merged.model().clone())?;
    page.routing(&[("before".into(), routing(model, waves)?), ("merged".into(), routing(&after, waves)?)])?;
    page.widths("merged", merged.model())?;
    page.section("The recipe");
    page.preformatted(&serde_json::to_string_pretty(&plan.recipe).unwrap_or_default());
    Ok(page)
}

/// What was measured of a model, called `name`, with its size and the widths of its experts.
///
/// # Errors
/// Those of drawing.
pub fn of_measurements(name: &str, model: &Model, measured: &[Measured]) -> Result<Page> {
    let mut page = Page::new(format!("{name}, measured"));
    let found = measured.iter().map(|found| Measurement { key: found.key.clone(), value: found.value });
    page.quality(&[Quality { of: name.into(), measured: found.collect() }])?;
    let mut table = Table::new(["measured", "what it is", "tokens", "seconds"], 2);
    for Measured { key, what, tokens, seconds, .. } in measured {
        table.row([key.clone(), what.clone(), tokens.to_string(), format!("{seconds:.1}")]);
    }
    page.table(&table);
    page.sizes(&[Size::of(name, model.checkpoint())])?;
    page.widths(name, model.checkpoint())?;
    Ok(page)
}

/// Models on the same rows: what they measure, how far they are from the first, their sizes, and where the tokens of
/// the first wave go in each.
///
/// # Errors
/// Those of drawing.
pub fn of_comparison(models: &[Compared], routings: &[(String, ByExpert)]) -> Result<Page> {
    let mut page = Page::new(format!("{} models compared", models.len()));
    let quality = models.iter().map(|model| {
        let found = model.measured.iter().map(|found| Measurement { key: found.key.clone(), value: found.value });
        let divergence = Measurement { key: "divergence_nats".into(), value: model.divergence };
        Quality { of: model.name.clone(), measured: found.chain([divergence]).collect() }
    });
    page.quality(&quality.collect::<Vec<_>>())?;
    let sizes = models.iter().map(|model| {
        let Compared { name, parameters, bytes, .. } = model;
        Size { of: name.clone(), parameters: *parameters, bytes: *bytes }
    });
    page.sizes(&sizes.collect::<Vec<_>>())?;
    page.routing(routings)?;
    Ok(page)
}

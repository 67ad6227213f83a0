//! Files of a finished study.

use moe_checkpoint::write_atomic;
use serde_json::{Value, json};

use super::report;
use super::study::Finished;
use super::tables::{self, Section};
use crate::{Error, Result};

/// Writes `results.csv`, `results.json`, `tables.md` and `report.html`, and gives the tables.
///
/// # Errors
/// Files that cannot be written.
pub fn write(study: &Finished) -> Result<Vec<Section>> {
    let sections = tables::sections(study);
    let root = study.out.root();
    write_atomic(root.join("results.csv"), csv(study).as_bytes())?;
    write_atomic(root.join("tables.md"), tables::markdown(&sections).as_bytes())?;
    write_atomic(root.join("report.html"), report::html(study, &sections)?.as_bytes())?;
    study.out.finish(&json(study)?)?;
    Ok(sections)
}

/// A line per configuration.
fn csv(study: &Finished) -> String {
    use super::bench::Figures;

    let figures = study.lab.bench.names(Figures::All);
    let mut text = "calibrated,seed,scorer,method,dropped,repair,units,routed_parameters,parameters".to_owned();
    figures.iter().for_each(|name| text.push_str(&format!(",{name}")));
    text.push_str(",refused\n");
    for (case, record) in &study.summary.records {
        let super::Case { calibrated, seed, scorer, method, amount, repair } = case;
        let super::Record { units, routed_parameters, parameters, .. } = record;
        let sizes = format!("{units},{routed_parameters},{parameters}");
        text.push_str(&format!("{calibrated},{seed},{scorer},{method},{amount},{repair},{sizes}"));
        for name in &figures {
            text.push_str(&record.metrics.get(name).map_or(",".into(), |value| format!(",{value}")));
        }
        let refused =
            record.refused.as_ref().map_or(String::new(), |reason| format!("\"{}\"", reason.replace('"', "'")));
        text.push_str(&format!(",{refused}\n"));
    }
    text
}

/// Everything, for programs.
///
/// # Errors
/// A number that JSON does not have.
pub fn json(study: &Finished) -> Result<Value> {
    let records = serde_json::to_value(study.summary.records.values().collect::<Vec<_>>());
    let ranking: Vec<Value> = study
        .summary
        .ranking()
        .into_iter()
        .map(|(scorer, rank)| json!({ "scorer": scorer, "divergence": rank.exp() }))
        .collect();
    Ok(json!({
        "recipe": study.recipe,
        "base": study.summary.base,
        "ranking": ranking,
        "costs": study.costs,
        "forms": study.forms,
        "records": records.map_err(|error| Error::Invalid(error.to_string()))?,
    }))
}

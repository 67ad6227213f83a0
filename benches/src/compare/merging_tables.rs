//! The tables of the study of ways to merge.

use moe_merge::OutputForm;

use super::case::{Amount, Case};
use super::catalog::{EVIDENCE, MAIN_SCORER};
use super::merging::Merging;
use super::study::Finished;
use super::summary::Spread;
use super::tables::{Section, Tables, cell};
use crate::format::{count, percent, short, size};
use crate::table::Table;

/// All tables, in the order of reading.
pub(super) fn sections(study: &Finished, merging: &Merging) -> Vec<Section> {
    let tables = Tables { study, summary: &study.summary, half: Amount::ratio(study.settings.half) };
    let mut sections = vec![tables.setup(), sizes(&tables, merging)];
    for calibrated in &study.summary.calibrated {
        sections.push(at_half(&tables, merging, calibrated));
        sections.push(other_sizes(&tables, merging, calibrated));
    }
    sections.push(forms(study));
    sections
}

/// What a row is called: a way to merge by its name, a way to prune with its scorer.
pub(super) fn name(scorer: &str, method: &str) -> String {
    if scorer == EVIDENCE { method.to_owned() } else { format!("{scorer}, {method}") }
}

fn case(tables: &Tables<'_>, calibrated: &str, row: (&str, &str), amount: Amount) -> Case {
    tables.summary.case(calibrated, row.0, row.1, amount)
}

fn sizes(tables: &Tables<'_>, merging: &Merging) -> Section {
    let mut table = Table::new(["", "units", "parameters of routed experts", "all parameters"], 1);
    let mut row = |name: String, units: usize, routed: u64, all: u64| {
        table.row([name, count(units as u64), count(routed), count(all)]);
    };
    let checkpoint = tables.study.lab.bench.model.checkpoint();
    let shape = checkpoint.shape();
    row("(full model)".into(), shape.units(), shape.parameters(), checkpoint.parameters());
    for (scorer, method) in merging.rows() {
        let case = case(tables, &tables.summary.calibrated[0], (scorer, method), tables.half);
        if let Some(record) = tables.summary.record(&case) {
            row(name(scorer, method), record.units, record.routed_parameters, record.parameters);
        }
    }
    Section {
        id: "merged-equal-size".into(),
        title: format!("Sizes at {}", percent(tables.study.settings.half)),
        note: "What is held equal are the bytes of routed experts. Compressed experts keep more of them, at a rank that makes up for \
               it; indices of rows count in their bytes, not among the parameters. Routers that keep their rows are larger."
            .into(),
        table,
    }
}

/// Mean divergence on what was not calibrated on.
fn elsewhere(tables: &Tables<'_>, case: &Case, calibrated: &str) -> String {
    let others = tables.measured().filter(|name| *name != calibrated);
    let means: Vec<f64> =
        others.filter_map(|name| tables.summary.spread(case, name, "kl")).map(|spread| spread.mean).collect();
    Spread::of(&means).map_or("–".into(), |spread| short(spread.mean))
}

fn at_half(tables: &Tables<'_>, merging: &Merging, calibrated: &str) -> Section {
    let exact = tables.figure(calibrated) == "exact";
    let mut header = vec![""];
    if exact {
        header.push("exact match");
    }
    header.extend(["perplexity", "KL", "layer error", "KL elsewhere"]);
    let mut table = Table::new(header, 1);
    for row in merging.rows() {
        let case = case(tables, calibrated, row, tables.half);
        let figure = |figure: &str| cell(tables.summary.spread(&case, calibrated, figure), figure);
        let mut cells = vec![name(row.0, row.1)];
        cells.extend(exact.then(|| figure("exact")));
        cells.extend(["ppl", "kl", "layer"].map(figure));
        cells.push(elsewhere(tables, &case, calibrated));
        table.row(cells);
    }
    Section {
        id: format!("merged-{calibrated}"),
        title: format!("Calibrated on {calibrated}: at {}", percent(tables.study.settings.half)),
        note: format!(
            "On {calibrated}; KL in nats per predicted token, the last column on what was not calibrated on. Rows with a comma are ways \
             to prune with their scorer ({MAIN_SCORER} scores units)."
        ),
        table,
    }
}

fn other_sizes(tables: &Tables<'_>, merging: &Merging, calibrated: &str) -> Section {
    let half = tables.study.settings.half;
    let ratios: Vec<f64> = tables.study.settings.ratios.iter().copied().filter(|ratio| *ratio != half).collect();
    let columns = || ratios.iter().flat_map(|ratio| [("ppl", *ratio), ("kl", *ratio), ("layer", *ratio)]);
    let mut header = vec![String::new()];
    header.extend(columns().map(|(figure, ratio)| {
        let figure = match figure {
            "ppl" => "perplexity",
            "kl" => "KL",
            _ => "layer error",
        };
        format!("{figure}, {}", percent(ratio))
    }));
    let mut table = Table::new(header, 1);
    for row in merging.rows() {
        let value = |(figure, ratio): (&str, f64)| {
            let case = case(tables, calibrated, row, Amount::ratio(ratio));
            tables.summary.spread(&case, calibrated, figure).map(|spread| cell(Some(spread), figure))
        };
        let cells: Vec<Option<String>> = columns().map(value).collect();
        if cells.iter().any(Option::is_some) {
            let cells = cells.into_iter().map(|cell| cell.unwrap_or("–".into()));
            table.row(std::iter::once(name(row.0, row.1)).chain(cells));
        }
    }
    Section {
        id: format!("merged-sizes-{calibrated}"),
        title: format!("Calibrated on {calibrated}: at other sizes"),
        note: format!("On {calibrated}."),
        table,
    }
}

fn forms(study: &Finished) -> Section {
    const FORMS: [OutputForm; 3] = [OutputForm::Grouped, OutputForm::Stock, OutputForm::StockCopies];
    let mut table = Table::new(std::iter::once("").chain(FORMS.map(OutputForm::name)), 1);
    let full = study.forms.first().and_then(|form| form.bytes);
    let mut methods: Vec<&str> = study.forms.iter().skip(1).map(|form| form.method.as_str()).collect();
    methods.dedup();
    for method in methods {
        let bytes = |form: OutputForm| {
            let found = study.forms.iter().find(|entry| entry.method == method && entry.form == form);
            found.and_then(|entry| entry.bytes).map_or("refused".into(), size)
        };
        table.row(std::iter::once(method.to_owned()).chain(FORMS.map(bytes)));
    }
    Section {
        id: "merged-forms".into(),
        title: format!("Bytes on disk at {}", percent(study.settings.half)),
        note: format!("The full model takes {}.", full.map_or("–".into(), size)),
        table,
    }
}

//! What is shown at the end.

use std::path::Path;

use moe::run::Measurement;
use moe_core::data::Dataset;
use moe_core::evaluate::{Evaluation, Metric};

use super::{MethodResult, Results};
use crate::Result;
use crate::format::{count, size};
use crate::report::{Quality, Report};
use crate::table::Table;

fn value(evaluation: &Evaluation) -> String {
    match evaluation.metric {
        Metric::ExactMatch(share) | Metric::Choice(share) => format!("{share:.3}"),
        Metric::Perplexity(perplexity) if perplexity < 1000.0 => format!("{perplexity:.1}"),
        Metric::Perplexity(perplexity) => format!("{perplexity:.0}"),
    }
}

fn heading(evaluation: &Evaluation) -> String {
    match evaluation.metric {
        Metric::ExactMatch(_) => format!("{} exact", evaluation.name),
        Metric::Perplexity(_) => format!("{} ppl", evaluation.name),
        Metric::Choice(_) => format!("{} choice", evaluation.name),
    }
}

/// What was measured, as recipes call it.
fn key(evaluation: &Evaluation) -> String {
    let metric = match evaluation.metric {
        Metric::ExactMatch(_) => "exact",
        Metric::Perplexity(_) => "ppl",
        Metric::Choice(_) => "choice",
    };
    format!("{}_{metric}", evaluation.name)
}

/// What a training cost, by column.
const COSTS: [&str; 5] = ["steps", "trained values", "peak memory", "tokens/s", "last loss"];

/// What a method cost, as [`COSTS`] says.
fn costs(method: &MethodResult) -> [String; 5] {
    let training = &method.training;
    let last: Vec<f64> = training.losses.iter().rev().take(10).map(|point| point.loss).collect();
    [
        training.losses.len().to_string(),
        count(training.trained),
        training.peak_memory.map_or("–".into(), size),
        count(training.tokens_per_second as u64),
        format!("{:.3}", last.iter().sum::<f64>() / last.len().max(1) as f64),
    ]
}

/// Method by what it learnt, what it kept and what it cost.
pub fn table(results: &Results) -> Table {
    let mut header = vec!["method".to_owned()];
    header.extend(results.before.iter().map(heading));
    header.extend(COSTS.map(str::to_owned));
    let mut table = Table::new(header, 1);
    let none = ["", "", "", "", ""].map(str::to_owned);
    let row = |name: &str, evaluations: &[Evaluation], rest: [String; 5]| {
        std::iter::once(name.to_owned()).chain(evaluations.iter().map(value)).chain(rest).collect::<Vec<_>>()
    };
    if let Some(whole) = &results.whole {
        table.row(row("(whole model)", whole, none.clone()));
    }
    table.row(row(if results.whole.is_some() { "(half of it)" } else { "(before)" }, &results.before, none));
    for method in &results.methods {
        table.row(row(&method.name, &method.evaluations, costs(method)));
    }
    table
}

/// What became of rows that are too long, if there are any.
pub fn left_out(data: &Dataset, length: usize) -> Option<String> {
    let (dropped, cut, rows) = (data.dropped, data.cut, data.sequences.len() + data.dropped);
    (dropped + cut > 0).then(|| {
        format!(
            "{} of {} rows are left out: nothing in their first {length} tokens counts in the loss; {} are longer than --length \
             {length} and lose their end",
            count(dropped as u64),
            count(rows as u64),
            count(cut as u64)
        )
    })
}

/// What is printed.
pub fn text(results: &Results, out: &Path) -> String {
    let [rows, tokens, predicted] = results.data.map(count);
    let mut text = format!(
        "{}: trained on {rows} rows, {tokens} tokens, of which {predicted} count in the loss\n",
        results.model.display()
    );
    if results.left_out != [0, 0] {
        let [dropped, cut] = results.left_out.map(count);
        text.push_str(&format!(
            "{dropped} rows were left out, since nothing of them counts in the loss; {cut} lost their end\n"
        ));
    }
    text.push_str(&table(results).to_text());
    text.push_str("\nlast loss: mean of the last ten steps. Peak memory: of the process while it trained.\n");
    text.push_str(&format!(
        "each method's checkpoint, recipe, table of what was trained and metrics are in {0}/METHOD; figures in {0}/report.html\n",
        out.display()
    ));
    text
}

/// The report with the loss curves.
///
/// # Errors
/// Figures that cannot be drawn.
pub fn page(results: &Results) -> Result<Report> {
    let mut report = Report::new("Fine-tuning");
    let [rows, tokens, predicted] = results.data.map(count);
    report.paragraph(&format!(
        "{}, trained on {rows} rows with {tokens} tokens, of which {predicted} count in the loss.",
        results.model.display()
    ));
    let mut training = Table::new(["method"].into_iter().chain(COSTS), 1);
    for method in &results.methods {
        training.row([method.name.clone()].into_iter().chain(costs(method)));
    }
    report.table(&training);
    let quality = |of: &str, evaluations: &[Evaluation]| Quality {
        of: of.into(),
        measured: evaluations.iter().map(|found| Measurement { key: key(found), value: found.value() }).collect(),
    };
    let whole = results.whole.iter().map(|found| quality("whole model", found));
    let before = quality(if results.whole.is_some() { "half of it" } else { "before" }, &results.before);
    let after = results.methods.iter().map(|method| quality(&method.name, &method.evaluations));
    report.quality(&whole.chain([before]).chain(after).collect::<Vec<_>>())?;
    let losses = |method: &MethodResult| {
        (method.name.clone(), method.training.losses.iter().map(|point| (point.step, point.loss)).collect())
    };
    report.losses(&results.methods.iter().map(losses).collect::<Vec<_>>())?;
    report.section("Recipes");
    for method in &results.methods {
        let recipe = serde_json::to_string_pretty(&method.recipe).unwrap_or_default();
        report.preformatted(&format!("{}\n{recipe}", method.name));
    }
    Ok(report)
}

//! The report of a run.

use moe_checkpoint::write_atomic;

use super::job::{Job, parsed};
use super::prune::PrunedModel;
use super::results::Results;
use super::score::Scored;
use super::{Cost, calibration_line, measures, model_line};
use crate::Result;
use crate::figures::{Bars, bars, standalone};
use crate::format::{count, percent, size};
use crate::report::Report;
use crate::table::Table;

/// Everything about a run; the figures of quality also stand beside it, as files for light and for dark ground.
pub(super) fn page(
    job: &Job,
    scored: &Scored,
    pruned: &[PrunedModel],
    results: &Results,
    cost: &Cost,
) -> Result<Report> {
    let name = moe::report::model_name(&job.arguments.model_dir());
    let ratios: Vec<String> = job.arguments.ratio.iter().map(|ratio| percent(*ratio)).collect();
    let mut report = Report::new(format!("{name} with {} of its expert units dropped", ratios.join(" and ")));
    report.paragraph(&format!("{}.", model_line(job)));
    report.paragraph(&format!("{}.", upper(&calibration_line(job, scored, cost))));

    report.section("What is left");
    report.table(&results.table(&job.evals));
    report.paragraph(&format!("{}.", measures(job).join("; ")));
    for (column, file) in job.evals.iter().enumerate() {
        let figure = quality(job, results, column, file.is_exact());
        let better = if file.is_exact() { "higher is better" } else { "lower is better" };
        let svg = bars(&figure)?;
        for (ground, dark) in [("light", false), ("dark", true)] {
            write_atomic(job.out.figure(&file.key(), ground), standalone(&svg, dark).as_bytes())?;
        }
        report.figure(&svg, &format!("{}, {better}. Every bar is a checkpoint read back from disk.", file.key()));
    }

    let criterion = parsed(&scored.tables[0].scorer)["criterion"].as_str().unwrap_or("token").to_owned();
    report.importance(&format!("Fisher ({criterion})"), &scored.tables[0], &job.arguments.ratio)?;

    report.section("Widths after pruning");
    report.table(&widths(pruned));

    report.section("How it was made");
    report.table(&provenance(job, scored, cost));
    report.preformatted(&serde_json::to_string_pretty(&job.recipe()).unwrap_or_default());
    Ok(report)
}

fn quality(job: &Job, results: &Results, column: usize, exact: bool) -> Bars {
    let value = |metrics: &[(String, f64)]| metrics.get(column).map_or(f64::NAN, |(_, value)| *value);
    let of_ratio = |ratio: f64| {
        results.methods.iter().filter(move |result| result.ratio == ratio).map(|result| value(&result.eval.metrics))
    };
    let ratios = &job.arguments.ratio;
    Bars {
        title: job.evals[column].key(),
        groups: job.methods.iter().map(|method| method.name.to_string()).collect(),
        series: ratios
            .iter()
            .map(|ratio| (format!("{} dropped", percent(*ratio)), of_ratio(*ratio).collect()))
            .collect(),
        base: value(&results.base.metrics),
        limit: exact.then_some(1.0),
    }
}

/// Widths of Fisher's checkpoints, layer by layer.
fn widths(pruned: &[PrunedModel]) -> Table {
    let header = ["dropped", "layer", "units", "kept", "narrowest", "mean", "widest", "experts emptied", "bytes"];
    let mut table = Table::new(header, 0);
    for model in pruned.iter().filter(|model| model.method == "fisher") {
        for layer in &model.report.layers {
            table.row([
                percent(model.plan.ratio.achieved),
                layer.layer.to_string(),
                count(layer.units.before),
                count(layer.units.after),
                layer.min_width.to_string(),
                format!("{:.1}", layer.mean_width),
                layer.max_width.to_string(),
                layer.emptied.to_string(),
                format!("{} → {}", size(layer.bytes.before), size(layer.bytes.after)),
            ]);
        }
    }
    table
}

fn provenance(job: &Job, scored: &Scored, cost: &Cost) -> Table {
    let mut table = Table::new(["", ""], 2);
    let provenance = &scored.tables[0].provenance;
    table.row(["model", &job.arguments.model_dir().display().to_string()]);
    table.row(["model fingerprint", &provenance.model]);
    table.row(["calibration", &job.arguments.calibration.clone().unwrap_or_default().display().to_string()]);
    table.row(["calibration hash", &provenance.data]);
    table.row(["never routed to", &format!("{} experts", never_routed(scored))]);
    table.row(["mean loss on it", &scored.collected.loss.map_or("-".into(), |loss| format!("{loss:.4} nats"))]);
    table.row(["scope, export", &format!("{}, {}", job.arguments.scope, job.export)]);
    table.row(["device", &job.arguments.device]);
    table.row(["memory limit", &job.arguments.max_memory.map_or("none".into(), size)]);
    table.row(["peak memory", &cost.peak_memory.map_or("-".into(), size)]);
    let [scoring, writing, measuring] = cost.seconds.map(|seconds| format!("{seconds:.1} s"));
    table.row(["time", &format!("scoring {scoring}, writing {writing}, measuring {measuring}")]);
    table.row(["version", &provenance.crate_version]);
    table
}

fn never_routed(scored: &Scored) -> usize {
    let counts = scored.tables[0].layers.iter().filter_map(|layer| layer.routed.as_ref()).flatten();
    counts.filter(|count| **count == 0).count()
}

fn upper(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}

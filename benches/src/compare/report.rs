//! The report of the study.

use super::case::Amount;
use super::catalog::{EVIDENCE, EXPERTS, GLOBAL, GRID, LAYER, MAIN_SCORER, UNIFORM};
use super::study::Finished;
use super::tables::{Section, curves, knock_outs};
use crate::Result;
use crate::figures::{Bars, Lines, Point, bars, lines};
use crate::format::percent;
use crate::report::Report;

/// Ways to distribute the budget whose layers are shown.
const SHOWN: [&str; 6] = [UNIFORM, GLOBAL, "lamp", "depth_rising", "dp_measured", "evolution"];

/// What is shown of the study of ways to merge.
const MERGED_CURVES: [(&str, &str); 8] = [
    (MAIN_SCORER, GLOBAL),
    (MAIN_SCORER, UNIFORM),
    ("reap", EXPERTS),
    (EVIDENCE, "m-smoe"),
    (EVIDENCE, "hc-smoe"),
    (EVIDENCE, "ream"),
    (EVIDENCE, "mergemoe"),
    (EVIDENCE, "dern"),
];

/// Everything about a study in one HTML file.
///
/// # Errors
/// Those of drawing.
pub fn html(study: &Finished, sections: &[Section]) -> Result<String> {
    let mut report = Report::new(match study.settings.merging {
        None => "Ways to prune, compared at equal size",
        Some(_) => "Ways to merge, compared at equal size",
    });
    for section in sections {
        report.section(&section.title);
        report.paragraph(&section.note);
        for (svg, caption) in figures(study, &section.id)? {
            report.figure(&svg, &caption);
        }
        report.table(&section.table);
        if section.id == "equal-size" {
            for calibrated in &study.summary.calibrated {
                let key = (calibrated.clone(), study.summary.seeds[0]);
                if let Some(tables) = study.lab.scored.get(&key).and_then(|scored| scored.tables.get(MAIN_SCORER)) {
                    report.importance(
                        &format!("{MAIN_SCORER}, {calibrated}"),
                        &tables.units,
                        &study.settings.ratios,
                    )?;
                }
            }
        }
    }
    report.section("How it was made");
    report.preformatted(&serde_json::to_string_pretty(&study.recipe).unwrap_or_default());
    Ok(report.to_html())
}

/// Figures that go with a section, each with what it shows.
fn figures(study: &Finished, id: &str) -> Result<Vec<(String, String)>> {
    if let Some(calibrated) = id.strip_prefix("sizes-") {
        return Ok(vec![sizes(study, calibrated)?]);
    }
    if let Some(calibrated) = id.strip_prefix("merged-sizes-") {
        return Ok(vec![merged_sizes(study, calibrated)?]);
    }
    if let Some(measured) = id.strip_prefix("knock-out-") {
        return Ok(vec![knock_out(study, measured)?]);
    }
    match id {
        "allocators" => study.summary.calibrated.iter().map(|calibrated| layers(study, calibrated)).collect(),
        _ => Ok(Vec::new()),
    }
}

/// Divergence by size.
fn sizes(study: &Finished, calibrated: &str) -> Result<(String, String)> {
    let summary = &study.summary;
    let curve = |scorer: String| {
        let point = |ratio: &f64| {
            let spread = |method: &str| {
                summary.spread(&summary.case(calibrated, &scorer, method, Amount::ratio(*ratio)), calibrated, "kl")
            };
            let best = GRID.into_iter().filter_map(spread).min_by(|a, b| a.mean.total_cmp(&b.mean))?;
            Some(Point { x: 100.0 * ratio, y: best.mean, low: best.low, high: best.high })
        };
        let points = study.settings.ratios.iter().filter_map(point).collect();
        (scorer, points)
    };
    let figure = Lines {
        title: format!("{calibrated}: divergence from the full model, nats per token"),
        x: "units dropped, %".into(),
        series: curves(summary).into_iter().map(curve).collect(),
        base: None,
        logarithmic_x: false,
        logarithmic_y: true,
    };
    let caption =
        "Each scorer by the best of four ways to prune at that size. Whiskers: from the best to the worst draw.";
    Ok((lines(&figure)?, caption.into()))
}

/// Divergence by size, of ways to merge and what they are compared with.
fn merged_sizes(study: &Finished, calibrated: &str) -> Result<(String, String)> {
    let summary = &study.summary;
    let curve = |(scorer, method): (&str, &str)| {
        let point = |ratio: &f64| {
            let spread =
                summary.spread(&summary.case(calibrated, scorer, method, Amount::ratio(*ratio)), calibrated, "kl")?;
            Some(Point { x: 100.0 * ratio, y: spread.mean, low: spread.low, high: spread.high })
        };
        (super::merging_tables::name(scorer, method), study.settings.ratios.iter().filter_map(point).collect())
    };
    let figure = Lines {
        title: format!("{calibrated}: divergence from the full model, nats per token"),
        x: "bytes of experts dropped, %".into(),
        series: MERGED_CURVES
            .into_iter()
            .map(curve)
            .filter(|(_, points): &(_, Vec<Point>)| !points.is_empty())
            .collect(),
        base: None,
        logarithmic_x: false,
        logarithmic_y: true,
    };
    Ok((lines(&figure)?, "Whiskers: from the best to the worst draw.".into()))
}

/// A capability after knocking out units.
fn knock_out(study: &Finished, measured: &str) -> Result<(String, String)> {
    let summary = &study.summary;
    let exact = summary.measured.iter().any(|(name, exact)| name == measured && *exact);
    let figure = if exact { "exact" } else { "ppl" };
    let curve = |list: super::tables::KnockOut| {
        let point = |n: &u32| {
            let spread = list.spread(summary, *n, measured, figure)?;
            Some(Point { x: f64::from(*n), y: spread.mean, low: spread.low, high: spread.high })
        };
        let points = study.settings.knock_outs.iter().filter_map(point).collect();
        (list.name.clone(), points)
    };
    let lines_of = Lines {
        title: format!("{measured}: {}", if exact { "share of questions answered exactly" } else { "perplexity" }),
        x: "units taken out".into(),
        series: knock_outs(summary).into_iter().map(curve).collect(),
        base: summary.base.get(&format!("{measured}_{figure}")).copied(),
        logarithmic_x: true,
        logarithmic_y: !exact,
    };
    let caption = "The dashed line is the full model. Whiskers: from the best to the worst draw.";
    Ok((lines(&lines_of)?, caption.into()))
}

/// What every layer keeps.
fn layers(study: &Finished, calibrated: &str) -> Result<(String, String)> {
    let shape = study.lab.shape();
    let full = shape.layers.iter().map(|layer| layer.units()).max().unwrap_or(0) as f64;
    let kept = |method: &&str| {
        let case = study.summary.case(calibrated, MAIN_SCORER, method, Amount::ratio(study.settings.half));
        let record = study.summary.record(&case).filter(|record| record.refused.is_none())?;
        Some(((*method).to_owned(), record.layers.iter().map(|units| *units as f64).collect()))
    };
    let figure = Bars {
        title: format!("{calibrated}: units"),
        groups: shape.layers.iter().map(|layer| format!("layer {}", layer.layer)).collect(),
        series: SHOWN.iter().filter(|method| **method != LAYER).filter_map(kept).collect(),
        base: full,
        limit: Some(full),
    };
    let caption = format!(
        "Units that every layer keeps when {} of all are dropped by {MAIN_SCORER}, by the way the budget is distributed.",
        percent(study.settings.half)
    );
    Ok((bars(&figure)?, caption))
}

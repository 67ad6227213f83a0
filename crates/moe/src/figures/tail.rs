//! How scores fall off.

use moe_checkpoint::{Granularity, ScoreTable};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

use super::{FAINT, INK, SERIES, WIDTH, positive_range, svg, text};
use crate::Result;
use crate::format::{count, percent, tick};

/// Points of the curve.
const POINTS: usize = 600;

/// All scores of a model, of units or of experts, from the highest to the lowest on a logarithmic axis, with a line
/// where each of `ratios` (fractions dropped) would cut.
///
/// # Errors
/// Those of drawing.
pub fn tail(scores: &ScoreTable, ratios: &[f64]) -> Result<String> {
    let mut values: Vec<f64> =
        scores.layers.iter().flat_map(|layer| layer.scores.iter().flatten()).map(|score| f64::from(*score)).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    let zeros = values.iter().filter(|value| **value <= 0.0).count();
    let (low, high) = positive_range(values.iter().copied()).unwrap_or((0.1, 1.0));
    // Decades that hold the curve: at least one.
    let (low, high) = (10f64.powf(low.log10().floor()), 10f64.powf((high * 1.0001).log10().ceil()));
    let n = values.len().max(1);
    let sampled = (0..=POINTS).map(|point| (point * (n - 1)) / POINTS);
    let curve: Vec<(f64, f64)> = sampled
        .filter_map(|index| values.get(index).map(|value| (100.0 * index as f64 / n as f64, *value)))
        .take_while(|(_, value)| *value > 0.0)
        .collect();
    let (title, items) = match scores.granularity {
        Granularity::Unit => ("Unit scores from the highest to the lowest", "units"),
        Granularity::Expert => ("Expert scores from the highest to the lowest", "experts"),
    };
    svg(title, 320, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .margin_right(16)
            .x_label_area_size(46)
            .y_label_area_size(70)
            .build_cartesian_2d(0.0..100.0f64, (low..high).log_scale())?;
        let description = match zeros {
            0 => format!("{items}, highest first (% of {})", count(n as u64)),
            _ => format!("{items}, highest first (% of {}; {} score 0)", count(n as u64), count(zeros as u64)),
        };
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(FAINT)
            .axis_style(INK)
            .label_style(text(15, &INK, HPos::Center, VPos::Center))
            .axis_desc_style(text(16, &INK, HPos::Center, VPos::Center))
            .x_labels(11)
            .y_labels(8)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| tick(*y))
            .x_desc(description)
            .y_desc("score")
            .draw()?;
        for ratio in ratios {
            let x = 100.0 * (1.0 - ratio);
            chart.draw_series(DashedLineSeries::new([(x, low), (x, high)], 5, 4, INK.stroke_width(1)))?;
            let label = format!("{} dropped", percent(*ratio));
            let (px, py) = chart.backend_coord(&(x, high));
            let (horizontal, px) = if px > WIDTH as i32 - 120 { (HPos::Right, px - 5) } else { (HPos::Left, px + 5) };
            area.draw_text(&label, &text(15, &INK, horizontal, VPos::Top), (px, py + 4))?;
        }
        chart.draw_series(LineSeries::new(curve, SERIES[0].stroke_width(3)))?;
        Ok(())
    })
}

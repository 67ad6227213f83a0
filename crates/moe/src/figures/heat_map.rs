//! Importance of experts, layer by layer.

use moe_checkpoint::{Reduction, ScoreTable};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

use super::{DrawResult, FAINT, INK, WIDTH, positive_range, svg, text};
use crate::Result;
use crate::format::short;

/// Dark to bright, evenly spaced: part of the viridis map, in which equal steps look equal.
const COLORS: [RGBColor; 6] = [
    RGBColor(65, 44, 110),
    RGBColor(59, 82, 139),
    RGBColor(33, 145, 140),
    RGBColor(53, 183, 121),
    RGBColor(144, 215, 67),
    RGBColor(253, 231, 37),
];

/// A cell per layer and expert, colored by the logarithm of the sum of the expert's unit scores. Experts that score 0
/// are left grey.
///
/// # Errors
/// A table that is not valid.
pub fn heat_map(scores: &ScoreTable) -> Result<String> {
    let experts = scores.to_experts(Reduction::Sum)?;
    let rows: Vec<(usize, Vec<f64>)> = experts
        .layers
        .iter()
        .map(|layer| (layer.layer, layer.scores.iter().map(|score| f64::from(score[0])).collect()))
        .collect();
    heat_map_of("Importance of every expert in every layer", &rows)
}

/// The same for any values of experts: rows of decoder layers with a value per expert.
///
/// # Errors
/// A figure that cannot be drawn.
pub fn heat_map_of(title: &str, rows: &[(usize, Vec<f64>)]) -> Result<String> {
    let columns = rows.iter().map(|(_, row)| row.len()).max().unwrap_or(0).max(1);
    let range = positive_range(rows.iter().flat_map(|(_, row)| row.iter().copied())).unwrap_or((1.0, 1.0));

    let (left, right, top, bottom) = (58, 120, 8, 44);
    let cell_height = (480 / rows.len().max(1) as i32).clamp(6, 36);
    let height = top + bottom + cell_height * rows.len() as i32;
    let x = |column: usize| left + ((WIDTH as i32 - left - right) * column as i32) / columns as i32;
    let y = |row: usize| top + cell_height * row as i32;
    svg(title, height.max(150) as u32, |area| {
        let label = |size, h, v| text(size, &INK, h, v);
        let step = |count: usize, room: usize| count.div_ceil(room).max(1);
        let gap = i32::from(x(1) - x(0) > 6 && cell_height > 8);
        for (r, (layer, row)) in rows.iter().enumerate() {
            if r % step(rows.len(), 30) == 0 {
                let at = (left - 6, y(r) + cell_height / 2);
                area.draw_text(&layer.to_string(), &label(15, HPos::Right, VPos::Center), at)?;
            }
            for (e, score) in row.iter().enumerate() {
                let color = color(*score, range);
                area.draw(&Rectangle::new([(x(e), y(r)), (x(e + 1) - gap, y(r + 1) - gap)], color.filled()))?;
            }
        }
        for column in (0..columns).step_by(step(columns, 32)) {
            let at = ((x(column) + x(column + 1)) / 2, y(rows.len()) + 6);
            area.draw_text(&column.to_string(), &label(15, HPos::Center, VPos::Top), at)?;
        }
        let middle = ((left + WIDTH as i32 - right) / 2, y(rows.len()) + 24);
        area.draw_text("expert", &label(16, HPos::Center, VPos::Top), middle)?;
        let side = label(16, HPos::Center, VPos::Top).transform(FontTransform::Rotate270);
        area.draw_text("layer", &side, (8, top + cell_height * rows.len() as i32 / 2))?;
        legend(area, WIDTH as i32 - right + 24, top, range)
    })
}

fn legend(area: &super::Area<'_>, x: i32, y: i32, (low, high): (f64, f64)) -> DrawResult {
    let steps = 96;
    for step in 0..steps {
        let color = mix(1.0 - f64::from(step) / f64::from(steps - 1));
        area.draw(&Rectangle::new([(x, y + step), (x + 14, y + step + 1)], color.filled()))?;
    }
    for (value, at, vertical) in [(high, y, VPos::Top), (low, y + steps, VPos::Bottom)] {
        area.draw_text(&short(value), &text(15, &INK, HPos::Left, vertical), (x + 20, at))?;
    }
    area.draw(&Rectangle::new([(x, y + steps + 12), (x + 14, y + steps + 24)], FAINT.filled()))?;
    area.draw_text("0", &text(15, &INK, HPos::Left, VPos::Center), (x + 20, y + steps + 18))
}

fn color(score: f64, (low, high): (f64, f64)) -> RGBColor {
    match score > 0.0 {
        false => FAINT,
        true if high > low => mix((score / low).ln() / (high / low).ln()),
        true => mix(1.0),
    }
}

/// The color at a place in [0, 1].
fn mix(place: f64) -> RGBColor {
    let at = place.clamp(0.0, 1.0) * (COLORS.len() - 1) as f64;
    let index = (at as usize).min(COLORS.len() - 2);
    let (a, b, part) = (COLORS[index], COLORS[index + 1], at - index as f64);
    let channel = |a: u8, b: u8| (f64::from(a) + part * (f64::from(b) - f64::from(a))).round() as u8;
    RGBColor(channel(a.0, b.0), channel(a.1, b.1), channel(a.2, b.2))
}

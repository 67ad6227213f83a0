//! Figures as SVG that takes its colors from the page, light or dark.

mod bars;
mod heat_map;
mod lines;
mod tail;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

pub use bars::{Bars, bars};
pub use heat_map::{heat_map, heat_map_of};
pub use lines::{Lines, Point, lines};
pub use tail::tail;

use crate::report::escape;
use crate::{Error, Result};

/// Width of every figure, in pixels.
const WIDTH: u32 = 860;
/// Text and axes. Stands for the page's color in [`STYLE`].
const INK: RGBColor = RGBColor(1, 2, 3);
/// Grids and what is not important.
const FAINT: RGBColor = RGBColor(4, 5, 6);
/// Series, legible on light and on dark ground.
const SERIES: [RGBColor; 8] = [
    RGBColor(76, 120, 168),
    RGBColor(228, 135, 43),
    RGBColor(84, 162, 75),
    RGBColor(183, 105, 163),
    RGBColor(158, 118, 95),
    RGBColor(214, 86, 89),
    RGBColor(66, 158, 155),
    RGBColor(128, 132, 140),
];

/// Rules for the page that shows the figures: they use its variables `--ink` and `--faint`.
pub const STYLE: &str = "\
svg { max-width: 100%; height: auto; }
svg [fill=\"#010203\"] { fill: var(--ink); } svg [stroke=\"#010203\"] { stroke: var(--ink); }
svg [fill=\"#040506\"] { fill: var(--faint); } svg [stroke=\"#040506\"] { stroke: var(--faint); }
";

/// A figure as a file of its own, for pages whose colors it cannot take: for light ground, or for dark.
pub fn standalone(svg: &str, dark: bool) -> String {
    let (ink, faint) = if dark { ("#e3e7eb", "#3a424b") } else { ("#1d2329", "#d4d9de") };
    svg.replace("\"#010203\"", &format!("\"{ink}\"")).replace("\"#040506\"", &format!("\"{faint}\""))
}

/// Where a figure is drawn, in pixels.
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// What drawing into a string cannot raise, but its types allow.
type DrawResult = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// Draws a figure; `title` is what a reader who does not see it is told.
fn svg(title: &str, height: u32, draw: impl FnOnce(&Area<'_>) -> DrawResult) -> Result<String> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, (WIDTH, height)).into_drawing_area();
        draw(&area).and_then(|()| area.present()).map_err(|error| Error::Invalid(format!("figure: {error}")))?;
    }
    Ok(text.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{}\" ", escape(title)), 1))
}

/// Text of `size` pixels around a point.
fn text(size: u32, color: &RGBColor, horizontal: HPos, vertical: VPos) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(color).pos(Pos::new(horizontal, vertical))
}

/// Smallest and largest of positive, finite values.
fn positive_range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let positive = values.filter(|value| *value > 0.0 && value.is_finite());
    positive.fold(None, |range, value| match range {
        None => Some((value, value)),
        Some((low, high)) => Some((value.min(low), value.max(high))),
    })
}

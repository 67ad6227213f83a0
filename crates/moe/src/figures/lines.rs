//! Curves with the spread of their points.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

use super::{Area, DrawResult, FAINT, INK, SERIES, WIDTH, svg, text};
use crate::Result;
use crate::format::tick;

/// A point of a curve: where it is, its value, and the smallest and largest that were found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Place on the horizontal axis.
    pub x: f64,
    /// Value on the vertical axis.
    pub y: f64,
    /// Smallest value.
    pub low: f64,
    /// Largest value.
    pub high: f64,
}

/// What [`lines`] shows.
#[derive(Clone, Debug)]
pub struct Lines {
    /// What is measured.
    pub title: String,
    /// What the horizontal axis is.
    pub x: String,
    /// Names of the curves and their points, from left to right.
    pub series: Vec<(String, Vec<Point>)>,
    /// Value of the model as it was, if it has one.
    pub base: Option<f64>,
    /// Logarithmic horizontal axis, with a mark for each point.
    pub logarithmic_x: bool,
    /// Logarithmic vertical axis.
    pub logarithmic_y: bool,
}

/// An axis: values to places in [0, 1].
struct Axis {
    low: f64,
    high: f64,
    logarithmic: bool,
}

impl Axis {
    fn new(values: impl Iterator<Item = f64> + Clone, logarithmic: bool) -> Self {
        let usable = values.filter(|value| value.is_finite() && (!logarithmic || *value > 0.0));
        let low = usable.clone().fold(f64::INFINITY, f64::min);
        let high = usable.fold(f64::NEG_INFINITY, f64::max);
        match low <= high {
            true if low < high => Self { low, high, logarithmic },
            true if logarithmic => Self { low: low / 2.0, high: high * 2.0, logarithmic },
            true => Self { low: low - 0.5, high: high + 0.5, logarithmic },
            false => Self { low: 0.1, high: 1.0, logarithmic },
        }
    }

    /// Values that cannot be shown are at the nearer end.
    fn place(&self, value: f64) -> f64 {
        let part = match self.logarithmic {
            true => (value.max(f64::MIN_POSITIVE) / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        };
        if part.is_nan() { 1.0 } else { part.clamp(0.0, 1.0) }
    }

    /// Round values to mark: 1, 2 and 5 times powers of ten if there are few decades, or steps of one size.
    fn marks(&self) -> Vec<f64> {
        let marks = self.marks_of(self.logarithmic);
        // Within less than a decade there may be no power of ten, and steps of one size look even.
        if marks.len() < 2 { self.marks_of(false) } else { marks }
    }

    fn marks_of(&self, logarithmic: bool) -> Vec<f64> {
        if !logarithmic {
            let rough = (self.high - self.low) / 5.0;
            let power = 10f64.powf(rough.log10().floor());
            let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= rough);
            let step = step.unwrap_or(rough);
            let first = (self.low / step).ceil() as i64;
            return (first..).map(|i| i as f64 * step).take_while(|mark| *mark <= self.high * (1.0 + 1e-9)).collect();
        }
        let (first, last) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
        let factors: &[f64] = if last - first > 3 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let all = (first..=last).flat_map(|decade| factors.iter().map(move |factor| factor * 10f64.powi(decade)));
        all.filter(|mark| *mark >= self.low * (1.0 - 1e-9) && *mark <= self.high * (1.0 + 1e-9)).collect()
    }
}

/// Curves, each with a whisker from the smallest to the largest value of every point.
///
/// # Errors
/// Those of drawing.
pub fn lines(figure: &Lines) -> Result<String> {
    let points = || figure.series.iter().flat_map(|(_, points)| points);
    let x_axis = Axis::new(points().map(|point| point.x), figure.logarithmic_x);
    let values = points().flat_map(|point| [point.y, point.low, point.high]).chain(figure.base);
    let y_axis = Axis::new(values, figure.logarithmic_y);
    let longest = figure.series.iter().map(|(name, _)| name.len()).max().unwrap_or(0) as i32;
    let (left, right, top, bottom) = (62, 44 + 8 * longest.max(6), 34, 48);
    let height = 320i32.max(top + bottom + 20 * figure.series.len() as i32);
    let x = |value: f64| left + 10 + (x_axis.place(value) * f64::from(WIDTH as i32 - left - right - 20)) as i32;
    let y = |value: f64| height - bottom - (y_axis.place(value) * f64::from(height - bottom - top)) as i32;
    svg(&figure.title, height as u32, |area| {
        area.draw_text(&figure.title, &text(18, &INK, HPos::Left, VPos::Top), (left, 2))?;
        for mark in y_axis.marks() {
            area.draw(&PathElement::new([(left, y(mark)), (WIDTH as i32 - right, y(mark))], FAINT))?;
            area.draw_text(&tick(mark), &text(15, &INK, HPos::Right, VPos::Center), (left - 6, y(mark)))?;
        }
        let mut marks = match figure.logarithmic_x {
            true => points().map(|point| point.x).collect(),
            false => x_axis.marks(),
        };
        // Between whole numbers, such as steps, there is nothing.
        if points().all(|point| point.x.fract() == 0.0) {
            marks.retain(|mark| mark.fract() == 0.0);
        }
        marks.sort_by(f64::total_cmp);
        marks.dedup();
        for mark in marks {
            let at = (x(mark), height - bottom + 8);
            area.draw_text(&tick(mark), &text(15, &INK, HPos::Center, VPos::Top), at)?;
        }
        let middle = ((left + WIDTH as i32 - right) / 2, height - 20);
        area.draw_text(&figure.x, &text(16, &INK, HPos::Center, VPos::Top), middle)?;
        if let Some(base) = figure.base {
            for dash in (left..WIDTH as i32 - right).step_by(10) {
                area.draw(&PathElement::new([(dash, y(base)), (dash + 5, y(base))], INK))?;
            }
        }
        for (index, (name, points)) in figure.series.iter().enumerate() {
            let color = SERIES[index % SERIES.len()];
            curve(area, points, color, &x, &y)?;
            let (from, at) = (WIDTH as i32 - right + 14, top + 20 * index as i32);
            area.draw(&PathElement::new([(from, at + 7), (from + 16, at + 7)], color.stroke_width(3)))?;
            area.draw_text(name, &text(15, &INK, HPos::Left, VPos::Top), (from + 22, at))?;
        }
        Ok(())
    })
}

fn curve(
    area: &Area<'_>,
    points: &[Point],
    color: RGBColor,
    x: &impl Fn(f64) -> i32,
    y: &impl Fn(f64) -> i32,
) -> DrawResult {
    let path: Vec<(i32, i32)> = points.iter().map(|point| (x(point.x), y(point.y))).collect();
    area.draw(&PathElement::new(path.clone(), color.stroke_width(2)))?;
    for (point, at) in points.iter().zip(path) {
        area.draw(&Circle::new(at, 3, color.filled()))?;
        let whisker = [(at.0, y(point.low)), (at.0, y(point.high))];
        area.draw(&PathElement::new(whisker, color.stroke_width(1)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_round_and_inside() {
        let linear = Axis { low: 0.0, high: 1.0, logarithmic: false };
        assert_eq!(linear.marks().iter().map(|m| tick(*m)).collect::<Vec<_>>(), ["0", "0.2", "0.4", "0.6", "0.8", "1"]);
        let narrow = Axis { low: 3.6, high: 4.4, logarithmic: true };
        assert_eq!(narrow.marks().iter().map(|m| tick(*m)).collect::<Vec<_>>(), ["3.6", "3.8", "4", "4.2", "4.4"]);
        let logarithmic = Axis { low: 0.03, high: 2.0, logarithmic: true };
        let marks: Vec<String> = logarithmic.marks().iter().map(|m| tick(*m)).collect();
        assert_eq!(marks, ["0.05", "0.1", "0.2", "0.5", "1", "2"]);
        assert_eq!((logarithmic.place(0.03), logarithmic.place(2.0), logarithmic.place(-1.0)), (0.0, 1.0, 0.0));
    }

    #[test]
    fn any_values_can_be_drawn() {
        let point = |x, y| Point { x, y, low: y, high: y };
        for series in [
            vec![],
            vec![("one".to_string(), vec![point(1.0, 0.5)])],
            vec![("a < b".to_string(), vec![point(1.0, 0.0), point(64.0, f64::INFINITY), point(3.0, f64::NAN)])],
        ] {
            for logarithmic in [false, true] {
                let figure = Lines {
                    title: "quality".into(),
                    x: "units".into(),
                    series: series.clone(),
                    base: Some(1.0),
                    logarithmic_x: logarithmic,
                    logarithmic_y: logarithmic,
                };
                let svg = lines(&figure).unwrap();
                assert!(
                    svg.contains("aria-label=\"quality\"") && !svg.contains("NaN") && !svg.contains("inf"),
                    "{svg}"
                );
            }
        }
    }
}

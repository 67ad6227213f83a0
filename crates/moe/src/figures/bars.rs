//! One figure of merit, method by method.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

use super::{FAINT, INK, SERIES, WIDTH, svg, text};
use crate::Result;
use crate::format::{short, tick};

/// Steps of a linear axis.
const STEPS: f64 = 4.0;

/// What [`bars`] shows.
#[derive(Clone, Debug)]
pub struct Bars {
    /// What is measured.
    pub title: String,
    /// Names of the groups: methods.
    pub groups: Vec<String>,
    /// Names of the bars of each group, and their values by group. A name may be empty where there is one bar.
    pub series: Vec<(String, Vec<f64>)>,
    /// The value without pruning.
    pub base: f64,
    /// Top of the axis, if it has one.
    pub limit: Option<f64>,
}

/// Groups of bars, with a line at the value of the base. A wide range of positive values gets a logarithmic axis.
///
/// # Errors
/// Those of drawing.
pub fn bars(bars: &Bars) -> Result<String> {
    let values = || bars.series.iter().flat_map(|(_, values)| values).copied().chain([bars.base]);
    let finite = || values().filter(|value| value.is_finite());
    let (low, high) = (finite().fold(f64::INFINITY, f64::min), finite().fold(0.0, f64::max));
    let logarithmic = bars.limit.is_none() && low > 0.0 && high / low > 20.0;
    let (left, right, top, bottom, height) = (56, 64, 40, 32, 250i32);
    let (floor, ceiling) = match (bars.limit, logarithmic) {
        (Some(limit), _) => (0.0, limit),
        (None, false) => (0.0, STEPS * round_step(high * 1.08 / STEPS)),
        (None, true) => (10f64.powf(low.log10().floor()), 10f64.powf((high * 1.05).log10().ceil())),
    };
    let place = |value: f64| match logarithmic {
        true => (value / floor).ln() / (ceiling / floor).ln(),
        false => value / ceiling,
    };
    let y = |value: f64| {
        // what is not finite goes to the top
        let place = if value.is_finite() { place(value).clamp(0.0, 1.0) } else { 1.0 };
        height - bottom - (place * f64::from(height - bottom - top)).round() as i32
    };
    let ticks: Vec<f64> = match logarithmic {
        true => (0..=(ceiling / floor).log10().round() as i32).map(|decade| floor * 10f64.powi(decade)).collect(),
        false => (0..=STEPS as i32).map(|step| ceiling * f64::from(step) / STEPS).collect(),
    };
    let room = WIDTH as i32 - left - right;
    svg(&bars.title, height as u32, |area| {
        area.draw_text(&bars.title, &text(18, &INK, HPos::Left, VPos::Top), (left, 2))?;
        let mut x = WIDTH as i32 - right;
        let named = bars.series.iter().enumerate().filter(|(_, (name, _))| !name.is_empty());
        for (index, (name, _)) in named.rev() {
            x -= 7 * name.len() as i32;
            area.draw_text(name, &text(16, &INK, HPos::Left, VPos::Top), (x, 5))?;
            let color = SERIES[index % SERIES.len()];
            area.draw(&Rectangle::new([(x - 18, 6), (x - 6, 18)], color.filled()))?;
            x -= 34;
        }
        for value in ticks {
            area.draw(&PathElement::new([(left, y(value)), (left + room, y(value))], FAINT))?;
            area.draw_text(&tick(value), &text(15, &INK, HPos::Right, VPos::Center), (left - 6, y(value)))?;
        }
        let group_width = room / bars.groups.len().max(1) as i32;
        let bar = (group_width * 7 / 10 / bars.series.len().max(1) as i32).clamp(2, 90);
        for (g, group) in bars.groups.iter().enumerate() {
            let middle = left + group_width * g as i32 + group_width / 2;
            let label = shortened(group, (group_width / 9).max(4) as usize);
            area.draw_text(&label, &text(16, &INK, HPos::Center, VPos::Top), (middle, height - bottom + 8))?;
            let start = middle - bar * bars.series.len() as i32 / 2;
            for (s, (_, values)) in bars.series.iter().enumerate() {
                let (x, value) = (start + bar * s as i32, values[g]);
                let corners = [(x + 1, y(value)), (x + bar - 1, height - bottom)];
                area.draw(&Rectangle::new(corners, SERIES[s % SERIES.len()].filled()))?;
                let at = (x + bar / 2, y(value) - 2);
                area.draw_text(&short(value), &text(14, &INK, HPos::Center, VPos::Bottom), at)?;
            }
        }
        let base = y(bars.base);
        for dash in (left..left + room).step_by(10) {
            area.draw(&PathElement::new([(dash, base), (dash + 5, base)], INK))?;
        }
        let at = left + room + 6;
        area.draw_text("before", &text(14, &INK, HPos::Left, VPos::Bottom), (at, base - 1))?;
        area.draw_text(&short(bars.base), &text(14, &INK, HPos::Left, VPos::Top), (at, base + 1))
    })
}

/// A name of at most `most` characters: of a longer one its end, where paths differ.
fn shortened(name: &str, most: usize) -> String {
    let count = name.chars().count();
    match count > most {
        true => format!("…{}", name.chars().skip(count - most + 1).collect::<String>()),
        false => name.to_string(),
    }
}

/// The smallest of 1, 2, 2.5, 5, 10 times a power of ten that is not below `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.max(f64::MIN_POSITIVE).log10().floor());
    [1.0, 2.0, 2.5, 5.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|rounded| *rounded >= step)
        .unwrap_or(10.0 * power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_keep_their_ends() {
        assert_eq!(shortened("fisher", 6), "fisher");
        assert_eq!(shortened("out/models/half", 6), "…/half");
    }

    #[test]
    fn steps_are_round() {
        assert_eq!([0.9, 1.0, 1.1, 2.4, 3.0, 21.2, 70.0].map(round_step), [1.0, 1.0, 2.0, 2.5, 5.0, 25.0, 100.0]);
    }

    #[test]
    fn any_values_can_be_drawn() {
        for (values, limit) in [(vec![0.0, 1.0], Some(1.0)), (vec![3.0, f64::INFINITY], None), (vec![2.0, 4e5], None)] {
            let figure = Bars {
                title: "a < b".into(),
                groups: vec!["x".into(), "y".into()],
                series: vec![("50%".into(), values)],
                base: 1.0,
                limit,
            };
            let svg = bars(&figure).unwrap();
            assert!(svg.contains("aria-label=\"a &lt; b\"") && !svg.contains("NaN"), "{svg}");
        }
    }
}

//! What reports show, whichever verb writes them: importance, quality, sizes, losses, routing, widths.

use moe_checkpoint::{Checkpoint, Granularity, Reduction, ScoreTable};
use serde::{Deserialize, Serialize};

use super::Report;
use crate::Result;
use crate::figures::{Bars, Lines, Point, bars, heat_map, heat_map_of, lines, tail};
use crate::format::{count, percent, short, size};
use crate::run::Measurement;
use crate::table::Table;

/// Steps of training that a point of a loss curve is the mean of.
const STEPS_PER_POINT: usize = 10;

/// Models by bytes, the ones that no other beats marked.
pub fn frontier_table(points: &[FrontierPoint]) -> Table {
    let mut table = Table::new(["model", "how far", "bytes", "divergence", "best at its size"], 2);
    let best = FrontierPoint::best(points);
    let mut all: Vec<&FrontierPoint> = points.iter().collect();
    all.sort_by_key(|point| point.bytes);
    for point in all {
        let mark = if best.contains(&point) { "yes" } else { "" };
        // That of the whole model from itself may be a rounding below 0.
        let divergence = format!("{:.4}", point.divergence.max(0.0));
        table.row([point.of.clone(), point.what.clone(), size(point.bytes), divergence, mark.into()]);
    }
    table
}

/// What models reach at equal bytes: for the bytes of every model in one format, the least divergence of each model, in
/// any format or several, that is no larger; `–` where none is.
pub fn equal_bytes_table(points: &[FrontierPoint]) -> Table {
    let mut models: Vec<&str> = Vec::new();
    for model in points.iter().filter_map(FrontierPoint::model) {
        if !models.contains(&model) {
            models.push(model);
        }
    }
    let plain = |point: &&FrontierPoint| {
        let whole = point.model().is_some() && point.model() == models.first().copied();
        point.is_one_format() && !(whole && point.what == FrontierPoint::PLAIN)
    };
    let mut budgets: Vec<&FrontierPoint> = points.iter().filter(plain).collect();
    budgets.sort_by_key(|point| point.bytes);
    let header = ["at the bytes of", "bytes"].into_iter().chain(models.iter().copied());
    let mut table = Table::new(header, 1);
    for budget in budgets {
        let mut row = vec![format!("{}, {}", budget.model().unwrap_or(&budget.of), budget.what), size(budget.bytes)];
        row.extend(models.iter().map(|model| {
            let fits = points.iter().filter(|point| point.model() == Some(*model) && point.bytes <= budget.bytes);
            let least = fits.map(|point| point.divergence).min_by(f64::total_cmp);
            least.map_or("–".to_string(), |divergence| format!("{:.4}", divergence.max(0.0)))
        }));
        table.row(row);
    }
    table
}

/// A value for every expert of some decoder layers: the layer, and a value per expert.
pub type ByExpert = Vec<(usize, Vec<f64>)>;

/// What was measured of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Which model it is, in a word or two: it stands below a bar.
    pub of: String,
    /// The measurements, by their keys.
    pub measured: Vec<Measurement>,
}

/// A model between size and quality.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FrontierPoint {
    /// What was done, apart from how far: points of one name are one curve.
    pub of: String,
    /// How far, in words.
    pub what: String,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Divergence of its predictions from those of the whole model, in nats per token.
    pub divergence: f64,
}

impl FrontierPoint {
    /// What [`what`](Self::what) says of a model that is not rounded.
    pub const PLAIN: &'static str = "BF16";
    const ONE_FORMAT: &'static str = ", one format";
    const BY_LAYER: &'static str = ", by layer";

    /// What stands in [`of`](Self::of) for a model all of whose experts have one format.
    pub fn one_format(model: &str) -> String {
        format!("{model}{}", Self::ONE_FORMAT)
    }

    /// What stands in [`of`](Self::of) for a model whose layers have formats of their own.
    pub fn by_layer(model: &str) -> String {
        format!("{model}{}", Self::BY_LAYER)
    }

    /// The model of the curve, before it was rounded; `None` for a curve of several.
    pub fn model(&self) -> Option<&str> {
        self.of.strip_suffix(Self::ONE_FORMAT).or_else(|| self.of.strip_suffix(Self::BY_LAYER))
    }

    fn is_one_format(&self) -> bool {
        self.of.ends_with(Self::ONE_FORMAT)
    }

    /// Of some points, those that no other is both smaller and closer than, by bytes.
    pub fn best(points: &[Self]) -> Vec<&Self> {
        let beaten = |point: &Self| {
            points.iter().any(|other| {
                let no_worse = other.bytes <= point.bytes && other.divergence <= point.divergence;
                no_worse && (other.bytes, other.divergence) != (point.bytes, point.divergence)
            })
        };
        let mut best: Vec<&Self> = points.iter().filter(|point| !beaten(point)).collect();
        best.sort_by_key(|point| point.bytes);
        best
    }
}

/// How large a model is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Which model it is, in a word or two: it stands below a bar.
    pub of: String,
    /// Elements of all tensors.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
}

impl Size {
    /// That of a model, under a name.
    pub fn of(name: impl Into<String>, model: &Checkpoint) -> Self {
        Self { of: name.into(), parameters: model.parameters(), bytes: model.bytes_on_disk() }
    }
}

impl Report {
    /// What is best at a given size: divergence against bytes, a curve per way to save them, and a table in which the
    /// models that no other beats are marked.
    ///
    /// # Errors
    /// Those of drawing.
    pub fn frontier(&mut self, points: &[FrontierPoint]) -> Result<()> {
        self.section("What is best at a given size");
        let mut names: Vec<&str> = Vec::new();
        for point in points {
            if !names.contains(&point.of.as_str()) {
                names.push(&point.of);
            }
        }
        let curve = |name: &&str| {
            let mut of: Vec<&FrontierPoint> = points.iter().filter(|point| point.of == **name).collect();
            of.sort_by_key(|point| point.bytes);
            let place = |point: &&FrontierPoint| {
                let y = point.divergence.max(1e-6);
                Point { x: point.bytes as f64 / 1e6, y, low: y, high: y }
            };
            (name.to_string(), of.iter().map(place).collect())
        };
        let figure = Lines {
            title: "Divergence by size".into(),
            x: "megabytes of weights".into(),
            series: names.iter().map(curve).collect(),
            base: None,
            logarithmic_x: false,
            logarithmic_y: true,
        };
        let caption = "Divergence of next-token distributions from those of the whole model, in nats per token, by the bytes of \
                       all tensors. Lower left is better.";
        self.figure(&lines(&figure)?, caption);
        self.table(&frontier_table(points));
        self.paragraph(
            "At equal bytes: the least divergence that each model reaches in any format, one for all or by layer.",
        );
        self.table(&equal_bytes_table(points));
        Ok(())
    }

    /// Where importance sits: a heat map of layers and experts, the sorted tail of all scores with a line where each of
    /// `ratios` would cut, and a row of numbers per layer.
    ///
    /// # Errors
    /// A table that is not valid; those of drawing.
    pub fn importance(&mut self, name: &str, scores: &ScoreTable, ratios: &[f64]) -> Result<()> {
        self.section(&format!("Where importance sits: {name}"));
        let (sum, what) = match (scores.granularity, scores.to_experts(Reduction::Sum)) {
            (Granularity::Expert, table) => (table?, "its score"),
            (Granularity::Unit, Ok(table)) => (table, "the sum over its units"),
            (Granularity::Unit, Err(_)) => {
                (scores.to_experts(Reduction::Max)?, "its best unit, since scores do not add up")
            }
        };
        let caption = format!("Importance of every expert by {name}: {what}, in logarithmic colors. Grey is 0.");
        self.figure(&heat_map(&sum)?, &caption);
        let item = match scores.granularity {
            Granularity::Unit => "units",
            Granularity::Expert => "experts",
        };
        let cut = match ratios.is_empty() {
            true => String::new(),
            false => format!(" What lies right of a dashed line goes when {item} of the whole model compete."),
        };
        self.figure(&tail(scores, ratios)?, &format!("Scores of all {item} by {name}, from the highest.{cut}"));
        let mut table =
            Table::new(["layer", "experts", "least important", "mean", "most important", "never routed to"], 0);
        for layer in &sum.layers {
            let values: Vec<f64> = layer.flat();
            let (low, high) =
                values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(*v), b.max(*v)));
            let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
            let unused = layer.routed.as_ref().map(|counts| counts.iter().filter(|count| **count == 0).count());
            table.row([
                layer.layer.to_string(),
                values.len().to_string(),
                short(low),
                short(mean),
                short(high),
                unused.map_or("–".into(), |unused| unused.to_string()),
            ]);
        }
        self.table(&table);
        Ok(())
    }

    /// What models can do, each beside the first: a table with every number, and bars for every measurement that the
    /// first has where there are others. Keys are `NAME_exact` and `NAME_choice`, shares, or `NAME_ppl` and
    /// `NAME_nats`, of which less is better.
    ///
    /// # Errors
    /// Those of drawing.
    pub fn quality(&mut self, rows: &[Quality]) -> Result<()> {
        let Some((first, others)) = rows.split_first() else { return Ok(()) };
        self.section("What it can do");
        let mut keys: Vec<&str> = Vec::new();
        for found in rows.iter().flat_map(|row| &row.measured) {
            if !keys.contains(&found.key.as_str()) {
                keys.push(&found.key);
            }
        }
        let value =
            |row: &Quality, key: &str| row.measured.iter().find(|found| found.key == key).map(|found| found.value);
        let mut table = Table::new(["model"].into_iter().chain(keys.iter().copied()), 1);
        for row in rows {
            let cells = keys.iter().map(|key| value(row, key).map_or("–".into(), |value| format!("{value:.4}")));
            table.row([row.of.clone()].into_iter().chain(cells));
        }
        self.table(&table);
        for key in keys {
            let Some(base) = value(first, key) else { continue };
            let found: Vec<(&Quality, f64)> = others.iter().filter_map(|row| Some((row, value(row, key)?))).collect();
            if found.is_empty() {
                continue;
            }
            let share = key.ends_with("_exact") || key.ends_with("_choice");
            let figure = Bars {
                title: key.to_string(),
                groups: found.iter().map(|(row, _)| row.of.clone()).collect(),
                series: vec![(String::new(), found.iter().map(|(_, value)| *value).collect())],
                base,
                limit: share.then_some(1.0),
            };
            let better = if share { "higher is better" } else { "lower is better" };
            self.figure(&bars(&figure)?, &format!("{key}, {better}. Dashed: {}.", first.of));
        }
        Ok(())
    }

    /// How large models are: a table, and bars of their bytes beside the first.
    ///
    /// # Errors
    /// Those of drawing.
    pub fn sizes(&mut self, rows: &[Size]) -> Result<()> {
        let Some((first, others)) = rows.split_first() else { return Ok(()) };
        self.section("Sizes");
        let mut table = Table::new(["model", "parameters", "bytes", "of the first"], 1);
        for row in rows {
            let share = percent(row.bytes as f64 / first.bytes.max(1) as f64);
            table.row([row.of.clone(), count(row.parameters), size(row.bytes), share]);
        }
        self.table(&table);
        if !others.is_empty() {
            let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            let figure = Bars {
                title: "MiB on disk".into(),
                groups: others.iter().map(|row| row.of.clone()).collect(),
                series: vec![(String::new(), others.iter().map(|row| mib(row.bytes)).collect())],
                base: mib(first.bytes),
                limit: None,
            };
            self.figure(&bars(&figure)?, &format!("Bytes of all tensors. Dashed: {}.", first.of));
        }
        Ok(())
    }

    /// Loss curves of trainings: a name, and the step and loss of every step.
    ///
    /// # Errors
    /// Those of drawing.
    pub fn losses(&mut self, trainings: &[(String, Vec<(usize, f64)>)]) -> Result<()> {
        if trainings.iter().all(|(_, steps)| steps.is_empty()) {
            return Ok(());
        }
        self.section("Loss");
        let mean = |steps: &[(usize, f64)]| steps.iter().map(|(_, loss)| loss).sum::<f64>() / steps.len().max(1) as f64;
        let series = trainings.iter().map(|(name, steps)| {
            // Single steps are noise.
            let points = steps.chunks(STEPS_PER_POINT).map(|steps| {
                let (low, high) =
                    steps.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), (_, v)| (a.min(*v), b.max(*v)));
                Point { x: steps.last().map_or(0, |(step, _)| *step) as f64, y: mean(steps), low, high }
            });
            (name.clone(), points.collect())
        });
        let figure = Lines {
            title: "loss per predicted token".into(),
            x: "step".into(),
            series: series.collect(),
            base: None,
            logarithmic_x: false,
            logarithmic_y: true,
        };
        let caption = format!("Means over {STEPS_PER_POINT} steps, with the smallest and largest loss of them.");
        self.figure(&lines(&figure)?, &caption);
        let mut table = Table::new(["training", "steps", "first ten", "last ten"], 1);
        for (name, steps) in trainings {
            let (head, tail) = (steps.len().min(STEPS_PER_POINT), steps.len().saturating_sub(STEPS_PER_POINT));
            let ends = [mean(&steps[..head]), mean(&steps[tail..])].map(|loss| format!("{loss:.4}"));
            table.row([name.clone(), steps.len().to_string()].into_iter().chain(ends));
        }
        self.table(&table);
        Ok(())
    }

    /// Which experts tokens go to, in models one after the other: shares of a layer's choices, as heat maps, and per
    /// layer the largest share and the number of experts that the shares amount to (the exponential of their entropy).
    ///
    /// # Errors
    /// Those of drawing.
    pub fn routing(&mut self, models: &[(String, ByExpert)]) -> Result<()> {
        if models.iter().all(|(_, layers)| layers.is_empty()) {
            return Ok(());
        }
        self.section("Routing");
        let mut table = Table::new(["model", "layer", "experts", "in use", "effective", "largest share"], 1);
        for (name, layers) in models {
            let shares: ByExpert = layers.iter().map(|(layer, counts)| (*layer, shares(counts))).collect();
            let caption =
                format!("Share of the choices of a layer that goes to each expert, {name}. Grey is never chosen.");
            self.figure(&heat_map_of(&format!("Routing, {name}"), &shares)?, &caption);
            for (layer, shares) in &shares {
                let entropy: f64 = shares.iter().filter(|share| **share > 0.0).map(|share| -share * share.ln()).sum();
                table.row([
                    name.clone(),
                    layer.to_string(),
                    shares.len().to_string(),
                    shares.iter().filter(|share| **share > 0.0).count().to_string(),
                    format!("{:.1}", entropy.exp()),
                    percent(shares.iter().copied().fold(0.0, f64::max)),
                ]);
            }
        }
        self.table(&table);
        Ok(())
    }

    /// Units of every expert of a model.
    ///
    /// # Errors
    /// Those of drawing.
    pub fn widths(&mut self, name: &str, model: &Checkpoint) -> Result<()> {
        let layers: ByExpert = (0..model.config().layers.len())
            .filter_map(|layer| Some((layer, model.config().moe(layer)?)))
            .map(|(layer, moe)| (layer, moe.widths.iter().map(|width| *width as f64).collect()))
            .collect();
        if layers.is_empty() {
            return Ok(());
        }
        self.section(&format!("Units of every expert: {name}"));
        let caption = "Units that each expert has: a row per MoE layer, a column per expert. Grey has none.";
        self.figure(&heat_map_of("Units of every expert in every layer", &layers)?, caption);
        let mut table = Table::new(["layer", "experts", "narrowest", "mean", "widest"], 0);
        for (layer, widths) in &layers {
            let (low, high) = widths.iter().fold((f64::INFINITY, 0.0), |(a, b): (f64, f64), v| (a.min(*v), b.max(*v)));
            let mean = widths.iter().sum::<f64>() / widths.len().max(1) as f64;
            let numbers = [low, mean, high].map(|width| format!("{width:.1}").replace(".0", ""));
            table.row([layer.to_string(), widths.len().to_string()].into_iter().chain(numbers));
        }
        self.table(&table);
        Ok(())
    }
}

/// Parts of their sum; of nothing, zeros.
fn shares(counts: &[f64]) -> Vec<f64> {
    let sum: f64 = counts.iter().sum();
    counts.iter().map(|count| if sum > 0.0 { count / sum } else { 0.0 }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up_to_one_or_to_nothing() {
        assert_eq!(shares(&[1.0, 3.0]), [0.25, 0.75]);
        assert_eq!(shares(&[0.0, 0.0]), [0.0, 0.0]);
    }

    #[test]
    fn every_number_is_in_the_report() {
        let quality = |of: &str, value| Quality {
            of: of.into(),
            measured: vec![Measurement { key: "sums_exact".into(), value }],
        };
        let mut report = Report::new("numbers");
        report.quality(&[quality("before", 0.9975), quality("after", 0.6125)]).unwrap();
        report.routing(&[("before".into(), vec![(3, vec![1.0, 3.0, 0.0])])]).unwrap();
        report.losses(&[("lora".into(), (1..=25).map(|step| (step, 1.0 / step as f64)).collect())]).unwrap();
        let sizes = [("before", 6_400_000, 12_800_000), ("after", 3_200_000, 6_400_000)];
        let sizes = sizes.map(|(of, parameters, bytes)| Size { of: of.into(), parameters, bytes });
        report.sizes(&sizes).unwrap();
        let html = report.to_html();
        for number in ["0.9975", "0.6125", "75%", "12.21 MiB", "6,400,000", "50%", "25"] {
            assert!(html.contains(&format!(">{number}</td>")), "{number}\n{html}");
        }
        assert_eq!(html.matches("<svg ").count(), 4);
    }
}

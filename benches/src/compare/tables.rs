//! The tables of the study, each with an id under which a page of documentation shows it.

use moe_checkpoint::Granularity;

use super::case::{Amount, Case};
use super::catalog::{
    CONTROLS, EXPERTS, GLOBAL, GRID, LAYER, MAIN_SCORER, NO_REPAIR, SCORERS, STOCK_OF_SCORERS, UNIFORM,
};
use super::cost::Costs;
use super::merging_tables;
use super::settings::{KNOCK_OUT, REPAIRED, REPAIRS};
use super::study::Finished;
use super::summary::{Spread, Summary};
use crate::format::{count, percent, short};
use crate::table::Table;

/// A table and what is in it.
#[derive(Clone, Debug, PartialEq)]
pub struct Section {
    /// Its name in files.
    pub id: String,
    /// Its name for people.
    pub title: String,
    /// What the numbers are.
    pub note: String,
    /// The table.
    pub table: Table,
}

/// All tables of a study, in the order of reading.
pub fn sections(study: &Finished) -> Vec<Section> {
    if let Some(merging) = &study.settings.merging {
        return merging_tables::sections(study, merging);
    }
    let tables = Tables { study, summary: &study.summary, half: Amount::ratio(study.settings.half) };
    let mut sections = vec![tables.setup(), tables.equal_size(), tables.ranking()];
    for calibrated in &study.summary.calibrated {
        sections.push(tables.divergence(calibrated));
        sections.push(tables.answers(calibrated));
        sections.push(tables.sizes(calibrated));
    }
    sections.push(tables.repairs());
    sections.push(tables.gap());
    sections.extend(study.settings.stock_ratios.iter().map(|ratio| tables.stock_scorers(*ratio)));
    for calibrated in &study.summary.calibrated {
        sections.extend(study.settings.stock_ratios.iter().map(|ratio| tables.stock(calibrated, *ratio)));
    }
    sections.push(tables.allocators());
    sections.extend(study.summary.measured.iter().map(|(name, exact)| tables.knock_out(name, *exact)));
    sections.extend(study.costs.as_ref().map(cost));
    sections
}

/// All tables as markdown, between the marks that `docs/study.md` has them in.
pub fn markdown(sections: &[Section]) -> String {
    let section = |section: &Section| {
        let Section { id, table, .. } = section;
        format!("<!-- study:{id} -->\n\n{}\n<!-- /study:{id} -->\n", table.to_markdown())
    };
    sections.iter().map(section).collect::<Vec<_>>().join("\n")
}

/// What is held against [`GLOBAL`], before and after repair.
const GAP: [(&str, &str); 9] = [
    (LAYER, NO_REPAIR),
    (UNIFORM, NO_REPAIR),
    (UNIFORM, "refit"),
    (UNIFORM, "router_kd"),
    ("pieces4", NO_REPAIR),
    ("pieces4", "refit"),
    ("pieces4", "router_kd"),
    ("pieces4", "router_kd_all"),
    ("pieces4", "router_kd_refit"),
];

pub(super) struct Tables<'a> {
    pub study: &'a Finished,
    pub summary: &'a Summary,
    pub half: Amount,
}

/// A figure with its spread over draws.
pub(crate) fn cell(spread: Option<Spread>, figure: &str) -> String {
    let Some(Spread { mean, deviation, draws, .. }) = spread else { return "–".into() };
    let number = |value: f64| match figure {
        // no minus before a difference that rounds to nothing
        "exact" if value.abs() < 5e-4 => "0.000".to_owned(),
        "exact" => format!("{value:.3}"),
        _ => short(value),
    };
    match draws {
        1 => number(mean),
        _ => format!("{} ± {}", number(mean), number(deviation)),
    }
}

impl Tables<'_> {
    /// The figure that says how good a capability is: answers if there are any.
    pub fn figure(&self, capability: &str) -> &'static str {
        match self.summary.measured.iter().any(|(name, exact)| name == capability && *exact) {
            true => "exact",
            false => "ppl",
        }
    }

    pub fn quality(&self, case: &Case, capability: &str) -> String {
        let figure = self.figure(capability);
        cell(self.summary.spread(case, capability, figure), figure)
    }

    pub fn kl(&self, case: &Case, capability: &str) -> String {
        cell(self.summary.spread(case, capability, "kl"), "kl")
    }

    fn quality_name(&self, capability: &str) -> String {
        match self.figure(capability) {
            "exact" => format!("{capability}, exact match"),
            _ => format!("{capability}, perplexity"),
        }
    }

    pub fn measured(&self) -> impl Iterator<Item = &str> {
        self.summary.measured.iter().map(|(name, _)| name.as_str())
    }

    /// The best of the four ways to prune, by the mean divergence over draws.
    fn best_method(&self, calibrated: &str, scorer: &str, amount: Amount) -> Option<(&'static str, Spread)> {
        let spread = |method: &'static str| {
            let case = self.summary.case(calibrated, scorer, method, amount);
            Some((method, self.summary.spread(&case, calibrated, "kl")?))
        };
        GRID.into_iter().filter_map(spread).min_by(|a, b| a.1.mean.total_cmp(&b.1.mean))
    }

    pub fn setup(&self) -> Section {
        let header =
            ["capability", "calibration", "tokens", "tokens predicted", "questions", "perplexity", "exact match"];
        let mut table = Table::new(header, 1);
        let bench = &self.study.lab.bench;
        for rows in &bench.held_out {
            let draws = self.study.lab.scored.iter().filter(|((name, _), _)| *name == rows.name);
            let draws: Vec<_> = draws.map(|(_, scored)| (scored.sequences, scored.tokens)).collect();
            let range = |values: Vec<usize>| match (values.iter().min(), values.iter().max()) {
                (Some(low), Some(high)) if low == high => count(*low as u64),
                (Some(low), Some(high)) => format!("{} to {}", count(*low as u64), count(*high as u64)),
                _ => "–".into(),
            };
            let base = |figure: &str| bench.base.get(&format!("{}_{figure}", rows.name)).copied();
            table.row([
                rows.name.clone(),
                range(draws.iter().map(|draw| draw.0).collect()),
                range(draws.iter().map(|draw| draw.1).collect()),
                count(rows.predicted() as u64),
                rows.questions.as_ref().map_or("–".into(), |set| count(set.len() as u64)),
                base("ppl").map_or("–".into(), short),
                base("exact").map_or("–".into(), |value| format!("{value:.3}")),
            ]);
        }
        Section {
            id: "setup".into(),
            title: "What is calibrated and measured on".into(),
            note:
                "Sequences and tokens of one draw of calibration rows; tokens that perplexity and divergence are of, \
                   and questions answered, on other rows; figures of the full model."
                    .into(),
            table,
        }
    }

    fn equal_size(&self) -> Section {
        let mut table = Table::new(["way to prune", "units", "parameters of routed experts", "all parameters"], 1);
        let mut row = |name: &str, units: usize, routed: u64, all: u64| {
            table.row([name.to_owned(), count(units as u64), count(routed), count(all)]);
        };
        let checkpoint = self.study.lab.bench.model.checkpoint();
        let shape = checkpoint.shape();
        row("(full model)", shape.units(), shape.parameters(), checkpoint.parameters());
        let mut methods: Vec<&str> = GRID.into();
        methods.extend(self.study.settings.stock.iter().map(|(method, _)| *method));
        methods.extend(&self.study.settings.allocators);
        let mut seen: Vec<&str> = Vec::new();
        for method in methods {
            if seen.contains(&method) {
                continue;
            }
            seen.push(method);
            let case = self.summary.case(&self.summary.calibrated[0], MAIN_SCORER, method, self.half);
            if let Some(record) = self.summary.record(&case) {
                row(method, record.units, record.routed_parameters, record.parameters);
            }
        }
        Section {
            id: "equal-size".into(),
            title: format!("Sizes at {}", percent(self.study.settings.half)),
            note:
                "All keep the same number of units, which is what is held equal. Whole experts also lose their rows of \
                   the router; pieces have a copy of their expert's row each."
                    .into(),
            table,
        }
    }

    fn ranking(&self) -> Section {
        let mut header = vec!["scorer".to_owned(), "scores".to_owned()];
        header.extend(self.summary.calibrated.iter().cloned());
        header.push("geometric mean".into());
        let mut table = Table::new(header, 2);
        for (scorer, rank) in self.summary.ranking() {
            let mut cells = vec![scorer.clone(), self.granularity(&scorer).to_owned()];
            for calibrated in &self.summary.calibrated {
                cells.push(match self.best_method(calibrated, &scorer, self.half) {
                    Some((method, spread)) => format!("{} ({method})", cell(Some(spread), "kl")),
                    None => "–".into(),
                });
            }
            cells.push(short(rank.exp()));
            table.row(cells);
        }
        Section {
            id: "ranking".into(),
            title: format!("All scorers at {}", percent(self.study.settings.half)),
            note:
                "Divergence from the full model on the capability that was calibrated on, in nats per predicted token, \
                   by the best of four ways to prune, which is named. Mean and standard deviation over draws."
                    .into(),
            table,
        }
    }

    /// What a scorer scores by itself.
    fn granularity(&self, scorer: &str) -> &'static str {
        let tables = self.study.lab.scored.values().find_map(|scored| scored.tables.get(scorer));
        match tables.map(|tables| tables.own) {
            Some(Granularity::Expert) => "experts",
            _ => "units",
        }
    }

    fn grid_header(first: &str) -> Vec<String> {
        std::iter::once(first).chain(GRID).map(str::to_owned).collect()
    }

    fn divergence(&self, calibrated: &str) -> Section {
        let mut table = Table::new(Self::grid_header("scorer"), 1);
        for (scorer, _) in self.summary.ranking() {
            let mut cells = vec![scorer.clone()];
            cells.extend(
                GRID.map(|method| self.kl(&self.summary.case(calibrated, &scorer, method, self.half), calibrated)),
            );
            table.row(cells);
        }
        Section {
            id: format!("divergence-{calibrated}"),
            title: format!("{calibrated}: divergence at {}", percent(self.study.settings.half)),
            note: format!("Calibrated and measured on {calibrated}, in nats per predicted token."),
            table,
        }
    }

    fn answers(&self, calibrated: &str) -> Section {
        let mut header = Self::grid_header("scorer");
        let others: Vec<&str> = self.measured().filter(|name| *name != calibrated).collect();
        header.extend(others.iter().map(|name| format!("{} ({GLOBAL})", self.quality_name(name))));
        let mut table = Table::new(header, 1);
        let mut scorers = self.summary.best_scorers(self.study.settings.best);
        for control in CONTROLS {
            if !scorers.iter().any(|name| name == control) {
                scorers.push(control.into());
            }
        }
        for scorer in &scorers {
            let case = |method| self.summary.case(calibrated, scorer, method, self.half);
            let mut cells = vec![scorer.clone()];
            cells.extend(GRID.map(|method| self.quality(&case(method), calibrated)));
            cells.extend(others.iter().map(|name| self.quality(&case(GLOBAL), name)));
            table.row(cells);
        }
        Section {
            id: format!("answers-{calibrated}"),
            title: format!("{}: at {}", self.quality_name(calibrated), percent(self.study.settings.half)),
            note: format!(
                "Calibrated on {calibrated}; the best scorers and the controls. The last columns are what is left of what \
                 was not calibrated on."
            ),
            table,
        }
    }

    fn sizes(&self, calibrated: &str) -> Section {
        let ratios = &self.study.settings.ratios;
        let header = std::iter::once("scorer".to_owned()).chain(ratios.iter().map(|ratio| percent(*ratio)));
        let mut table = Table::new(header, 1);
        for scorer in self.curves() {
            let mut cells = vec![scorer.clone()];
            cells.extend(ratios.iter().map(|ratio| {
                match self.best_method(calibrated, &scorer, Amount::ratio(*ratio)) {
                    Some((method, spread)) => format!("{} ({method})", cell(Some(spread), "kl")),
                    None => "–".into(),
                }
            }));
            table.row(cells);
        }
        Section {
            id: format!("sizes-{calibrated}"),
            title: format!("{calibrated}: divergence by size"),
            note: "By the best of four ways to prune, which is named.".into(),
            table,
        }
    }

    /// Scorers whose curves are shown: the best, the main one, the controls.
    fn curves(&self) -> Vec<String> {
        curves(self.summary)
    }

    fn repairs(&self) -> Section {
        let mut rows = Vec::new();
        for scorer in self.summary.best_scorers(self.study.settings.repaired) {
            for method in REPAIRED {
                rows.extend(REPAIRS.map(|repair| [scorer.clone(), method.to_owned(), repair.to_owned()]));
            }
        }
        Section {
            id: "repairs".into(),
            title: format!("Repairs at {}", percent(self.study.settings.half)),
            note: "Figures of the capability that was calibrated on, and the mean divergence on those that were not."
                .into(),
            table: self.on_own(&rows, self.half),
        }
    }

    fn stock_scorers(&self, ratio: f64) -> Section {
        let mut rows = Vec::new();
        for (method, repair) in STOCK_OF_SCORERS {
            let scorers = std::iter::once(&MAIN_SCORER).chain(&self.study.settings.stock_scorers);
            rows.extend(scorers.map(|scorer| [*scorer, *method, *repair].map(str::to_owned)));
        }
        Section {
            id: format!("stock-scorers-{}", Amount::ratio(ratio)),
            title: format!("Exports by scorer, {} dropped", percent(ratio)),
            note: format!(
                "Figures of the capability that was calibrated on, and the mean divergence on those that were not. Stock loaders \
                 read {UNIFORM} and pieces; {GLOBAL} is ragged."
            ),
            table: self.on_own(&rows, Amount::ratio(ratio)),
        }
    }

    /// Scorer, way to prune and repair with the figures of each capability when it was calibrated on.
    fn on_own(&self, rows: &[[String; 3]], amount: Amount) -> Table {
        let mut header = ["scorer", "way to prune", "repair"].map(str::to_owned).to_vec();
        for calibrated in &self.summary.calibrated {
            header.push(self.quality_name(calibrated));
            header.push(format!("{calibrated}, KL"));
        }
        header.push("KL elsewhere".into());
        let mut table = Table::new(header, 3);
        for [scorer, method, repair] in rows {
            let mut cells = vec![scorer.clone(), method.clone(), repair.clone()];
            let mut elsewhere = Vec::new();
            for calibrated in &self.summary.calibrated {
                let case = self.summary.case(calibrated, scorer, method, amount).repaired(repair);
                cells.extend([self.quality(&case, calibrated), self.kl(&case, calibrated)]);
                let others = self.measured().filter(|name| name != calibrated);
                let spreads = others.filter_map(|name| self.summary.spread(&case, name, "kl"));
                elsewhere.extend(spreads.map(|spread| spread.mean));
            }
            cells.push(Spread::of(&elsewhere).map_or("–".into(), |spread| short(spread.mean)));
            table.row(cells);
        }
        table
    }

    fn stock(&self, calibrated: &str, ratio: f64) -> Section {
        let mut header = ["way to prune", "repair"].map(str::to_owned).to_vec();
        header.extend(self.measured().map(|name| self.quality_name(name)));
        header.extend(self.measured().map(|name| format!("{name}, KL")));
        let mut table = Table::new(header, 2);
        for (method, repair) in &self.study.settings.stock {
            let case = self.summary.case(calibrated, MAIN_SCORER, method, Amount::ratio(ratio)).repaired(repair);
            let mut cells = vec![(*method).to_owned(), (*repair).to_owned()];
            cells.extend(self.measured().map(|name| self.quality(&case, name)));
            cells.extend(self.measured().map(|name| self.kl(&case, name)));
            table.row(cells);
        }
        Section {
            id: format!("stock-{calibrated}-{}", Amount::ratio(ratio)),
            title: format!("Calibrated on {calibrated}, {} dropped: exports and repairs", percent(ratio)),
            note: format!(
                "{MAIN_SCORER}. Stock loaders read {UNIFORM}, {EXPERTS} and pieces; {LAYER} and {GLOBAL} are ragged."
            ),
            table,
        }
    }

    fn gap(&self) -> Section {
        let stock = &self.study.settings.stock;
        let columns: Vec<(&str, &str)> = GAP.into_iter().filter(|column| stock.contains(column)).collect();
        let mut header = ["calibrated on", "dropped", "figure"].map(str::to_owned).to_vec();
        header.push(format!("{GLOBAL} (ragged)"));
        header.extend(columns.iter().map(|(method, repair)| match *repair {
            NO_REPAIR => (*method).to_owned(),
            repair => format!("{method} + {repair}"),
        }));
        let mut table = Table::new(header, 3);
        for calibrated in &self.summary.calibrated {
            for ratio in &self.study.settings.stock_ratios {
                let figure = if self.figure(calibrated) == "exact" { "exact" } else { "kl" };
                let name = if figure == "exact" { "exact match" } else { "KL" };
                let case = |(method, repair): (&str, &str)| {
                    self.summary.case(calibrated, MAIN_SCORER, method, Amount::ratio(*ratio)).repaired(repair)
                };
                let value = |column: (&str, &str), seed: u64| {
                    self.summary.record(&case(column).with_seed(seed))?.metric(calibrated, figure)
                };
                // How far a column is behind the ragged export, draw by draw.
                let ragged = (GLOBAL, NO_REPAIR);
                let sign = if figure == "exact" { 1.0 } else { -1.0 };
                let behind = |column: (&str, &str)| {
                    let of_seed = |seed: &u64| Some(sign * (value(ragged, *seed)? - value(column, *seed)?));
                    Spread::of(&self.summary.seeds.iter().map(of_seed).collect::<Option<Vec<f64>>>()?)
                };
                let mut cells = vec![calibrated.clone(), percent(*ratio), name.to_owned()];
                cells.push(cell(self.summary.spread(&case(ragged), calibrated, figure), figure));
                cells.extend(columns.iter().map(|column| cell(behind(*column), figure)));
                table.row(cells);
            }
        }
        Section {
            id: "gap".into(),
            title: "Uniform against ragged".into(),
            note: format!(
                "{MAIN_SCORER}, on the capability that was calibrated on: {GLOBAL} as it is, and how far the others are behind it, \
                 draw by draw; below 0 they are ahead. Stock loaders read {UNIFORM} and pieces."
            ),
            table,
        }
    }

    fn allocators(&self) -> Section {
        let mut header = vec!["way to prune".to_owned()];
        for calibrated in &self.summary.calibrated {
            header.push(self.quality_name(calibrated));
            header.push(format!("{calibrated}, KL"));
        }
        let mut table = Table::new(header, 1);
        for method in [UNIFORM, LAYER, GLOBAL, EXPERTS].iter().chain(&self.study.settings.allocators) {
            let mut cells = vec![(*method).to_owned()];
            for calibrated in &self.summary.calibrated {
                let case = self.summary.case(calibrated, MAIN_SCORER, method, self.half);
                cells.extend([self.quality(&case, calibrated), self.kl(&case, calibrated)]);
            }
            table.row(cells);
        }
        Section {
            id: "allocators".into(),
            title: format!("Ways to distribute the budget, at {}", percent(self.study.settings.half)),
            note: format!("{MAIN_SCORER}, on the capability that was calibrated on."),
            table,
        }
    }

    fn knock_out(&self, measured: &str, exact: bool) -> Section {
        let figure = if exact { "exact" } else { "ppl" };
        let columns = knock_outs(self.summary);
        let mut header = vec!["units".to_owned()];
        header.extend(columns.iter().map(|column| column.name.clone()));
        let mut table = Table::new(header, 1);
        for n in &self.study.settings.knock_outs {
            let mut cells = vec![n.to_string()];
            cells.extend(columns.iter().map(|column| cell(column.spread(self.summary, *n, measured, figure), figure)));
            table.row(cells);
        }
        let base = self.summary.base.get(&format!("{measured}_{figure}")).copied().unwrap_or(f64::NAN);
        Section {
            id: format!("knock-out-{measured}"),
            title: format!("{} after knocking out units", self.quality_name(measured)),
            note: format!(
                "The highest-scored of {} units taken out. The full model has {}.",
                count(self.study.lab.shape().units() as u64),
                short(base)
            ),
            table,
        }
    }
}

/// What collecting cost.
fn cost(costs: &Costs) -> Section {
    let mut table = Table::new(["statistics for", "scorers", "seconds", "against one"], 1);
    let one = costs.of.iter().find(|cost| cost.name == "Fisher").map_or(f64::NAN, |cost| cost.seconds);
    for cost in &costs.of {
        table.row([
            cost.name.clone(),
            cost.scorers.to_string(),
            format!("{:.2}", cost.seconds),
            format!("{:.2}", cost.seconds / one),
        ]);
    }
    Section {
        id: "cost".into(),
        title: "What collecting statistics costs".into(),
        note: format!("One pass over {} tokens of {}; the fastest of three.", count(costs.tokens as u64), costs.rows),
        table,
    }
}

/// Scorers whose curves are shown: the three best, the main one, the controls.
pub(super) fn curves(summary: &Summary) -> Vec<String> {
    let mut scorers = summary.best_scorers(3);
    for name in std::iter::once(MAIN_SCORER).chain(CONTROLS) {
        let known = SCORERS.iter().any(|line| line.name == name) && summary.rank(name).is_some();
        if known && !scorers.iter().any(|scorer| scorer == name) {
            scorers.push(name.into());
        }
    }
    scorers
}

/// Units that are knocked out by one list of scores.
pub(super) struct KnockOut {
    /// What it is called.
    pub name: String,
    calibrated: String,
    scorer: &'static str,
    seeds: Vec<u64>,
}

impl KnockOut {
    /// A figure after `n` units went.
    pub fn spread(&self, summary: &Summary, n: u32, measured: &str, figure: &str) -> Option<Spread> {
        let case = summary.case(&self.calibrated, self.scorer, KNOCK_OUT, Amount::Units(n));
        let value = |seed: &u64| summary.record(&case.with_seed(*seed))?.metric(measured, figure);
        Spread::of(&self.seeds.iter().map(value).collect::<Option<Vec<f64>>>()?)
    }
}

/// The lists of scores by which units were knocked out: one per capability, and the controls.
pub(super) fn knock_outs(summary: &Summary) -> Vec<KnockOut> {
    let first = &summary.calibrated[0];
    let all = summary.seeds.clone();
    let of = |calibrated: &String| KnockOut {
        name: format!("{MAIN_SCORER}, {calibrated}"),
        calibrated: calibrated.clone(),
        scorer: MAIN_SCORER,
        seeds: all.clone(),
    };
    let control = |scorer: &'static str, seeds: Vec<u64>| KnockOut {
        name: scorer.into(),
        calibrated: first.clone(),
        scorer,
        seeds,
    };
    let mut lists: Vec<KnockOut> = summary.calibrated.iter().map(of).collect();
    lists.push(control("magnitude", vec![summary.seeds[0]]));
    lists.push(control("random", all.clone()));
    lists
}

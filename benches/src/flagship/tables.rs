//! The tables.

use std::collections::BTreeMap;

use moe_checkpoint::Checkpoint;

use super::entries::{CHOICES, CHOSEN, KNOCKED_OUT, knocked_out, scored};
use super::measured::Measured;
use super::{Arguments, Entry};
use crate::compare::catalog::{GLOBAL, STOCK_AUTO};
use crate::compare::{self, Case, Section, Spread, cell};
use crate::format::{count, percent, short, size};
use crate::table::Table;
use crate::{Error, Result};

/// All tables, each between the marks of its name.
pub(super) fn markdown(arguments: &Arguments, checkpoint: &Checkpoint, all: &[Measured]) -> Result<String> {
    let (name, entries) = (arguments.name.as_str(), arguments.entries());
    let mut sections = vec![section(format!("{name}-setup"), setup(all))];
    if !entries.is_empty() {
        let mut ratios = arguments.ratio.clone();
        ratios.sort_by(f64::total_cmp);
        let tables = Tables { arguments, entries, ratios };
        sections.push(section(format!("{name}-factor"), tables.factors(all)));
        for measured in all {
            let of = |table: &str| format!("{name}-{}-{table}", measured.domain);
            let key = measured.divergence();
            sections.push(section(of("kl"), tables.grid(measured, &key)));
            for key in measured.figures() {
                sections.push(section(of(&key), tables.grid(measured, &key)));
            }
            sections.push(section(of("recovered"), tables.recovered(measured)));
        }
        sections.push(section(format!("{name}-forms"), tables.forms(all)));
        sections.push(section(format!("{name}-bytes"), tables.bytes(checkpoint, all)?));
        sections.push(section(format!("{name}-scorers"), tables.scorers(all)));
    }
    if !arguments.knock_out.is_empty() {
        for measured in all {
            sections.push(section(format!("{name}-knock-out-{}", measured.domain), knock_outs(arguments, measured)));
        }
    }
    Ok(compare::markdown(&sections))
}

fn section(id: String, table: Table) -> Section {
    let id = format!("flagship-{id}");
    Section { title: id.clone(), id, note: String::new(), table }
}

/// How numbers of a figure are shown.
fn shown(spread: Option<Spread>, key: &str) -> String {
    let answers = ["_exact", "_choice"].iter().any(|ending| key.ends_with(ending));
    cell(spread, if answers { "exact" } else { "ppl" })
}

/// What a figure is called.
fn figure(key: &str) -> String {
    let (test, figure) = key.rsplit_once('_').unwrap_or((key, ""));
    let figure = match figure {
        "kl" => "KL",
        "ppl" => "perplexity",
        "exact" => "exact match",
        "choice" => "right choices",
        other => other,
    };
    format!("{test}, {figure}")
}

/// What is calibrated and measured on, and the full model.
fn setup(all: &[Measured]) -> Table {
    let header = ["domain", "sequences", "tokens", "measured on", "tokens predicted", "questions", "full model"];
    let mut table = Table::new(header, 1);
    for measured in all {
        let tokens = measured.draws.iter().map(|(_, tokens)| *tokens as u64);
        let (low, high) = (tokens.clone().min().unwrap_or(0), tokens.max().unwrap_or(0));
        let tokens = if low == high { count(low) } else { format!("{} to {}", count(low), count(high)) };
        for ((test, _, predicted, questions), key) in measured.tests.iter().zip(measured.figures()) {
            let value = measured.base.get(&key).and_then(|value| Spread::of(&[*value]));
            table.row([
                measured.domain.clone(),
                measured.draws.first().map_or(String::new(), |(sequences, _)| sequences.to_string()),
                tokens.clone(),
                test.clone(),
                count(*predicted as u64),
                if *questions == 0 { "–".into() } else { questions.to_string() },
                format!("{} {}", figure(&key).rsplit(", ").next().unwrap_or_default(), shown(value, &key)),
            ]);
        }
    }
    table
}

struct Tables<'a> {
    arguments: &'a Arguments,
    entries: Vec<&'static Entry>,
    /// In the order of the columns.
    ratios: Vec<f64>,
}

impl Tables<'_> {
    fn header(&self, first: &str) -> Vec<String> {
        [first.to_owned(), "stock".into()].into_iter().chain(self.ratios.iter().map(|r| percent(*r))).collect()
    }

    fn start(&self, entry: &Entry) -> Vec<String> {
        vec![entry.title.into(), if entry.stock { "yes" } else { "no" }.into()]
    }

    /// A figure of every method at every fraction.
    fn grid(&self, measured: &Measured, key: &str) -> Table {
        let mut table = Table::new(self.header(&figure(key)), 2);
        for entry in &self.entries {
            let mut cells = self.start(entry);
            let case = |ratio: &f64| entry.case(&measured.domain, 0, *ratio);
            cells.extend(self.ratios.iter().map(|ratio| shown(measured.spread(&case(ratio), key), key)));
            table.row(cells);
        }
        table
    }

    /// Divergences over that of uniform Fisher, as the geometric mean over domains.
    fn factors(&self, all: &[Measured]) -> Table {
        let mut table = Table::new(self.header("divergence over that of Fisher, uniform"), 2);
        let Some(uniform) = super::ENTRIES.iter().find(|entry| entry.name == "fisher-uniform") else { return table };
        let logarithm = |measured: &Measured, entry: &Entry, ratio: f64| -> Option<f64> {
            let mean = |entry: &Entry| {
                let case = entry.case(&measured.domain, 0, ratio);
                measured.spread(&case, &measured.divergence()).map(|spread| spread.mean.max(1e-9))
            };
            Some((mean(entry)? / mean(uniform)?).ln())
        };
        for entry in &self.entries {
            let mut cells = self.start(entry);
            cells.extend(self.ratios.iter().map(|ratio| {
                let all = all.iter().map(|measured| logarithm(measured, entry, *ratio)).collect::<Option<Vec<_>>>();
                all.and_then(|all| Spread::of(&all)).map_or("–".into(), |spread| short(spread.mean.exp()))
            }));
            table.row(cells);
        }
        table
    }

    /// Divergence and figures of merit after the recovery.
    fn recovered(&self, measured: &Measured) -> Table {
        let mut keys = vec![measured.divergence()];
        keys.extend(measured.figures());
        let mut ratios = self.arguments.recovered.clone();
        ratios.sort_by(f64::total_cmp);
        let columns: Vec<(f64, &String)> =
            ratios.iter().flat_map(|ratio| keys.iter().map(move |key| (*ratio, key))).collect();
        let header = columns.iter().map(|(ratio, key)| format!("{}: {}", percent(*ratio), figure(key)));
        let first = ["after the recovery".to_owned(), "stock".into()];
        let mut table = Table::new(first.into_iter().chain(header), 2);
        for entry in &self.entries {
            let mut cells = self.start(entry);
            cells.extend(columns.iter().map(|(ratio, key)| {
                let case = entry.recovered(&measured.domain, 0, *ratio, &self.arguments.recovery);
                shown(measured.spread(&case, key), key)
            }));
            table.row(cells);
        }
        table
    }

    /// The forms that were chosen, each with the number of draws that it was chosen in.
    fn forms(&self, all: &[Measured]) -> Table {
        let mut table = Table::new(["domain".to_owned()].into_iter().chain(self.ratios.iter().map(|r| percent(*r))), 1);
        let automatic = self.entries.iter().filter(|entry| entry.method == STOCK_AUTO);
        for (measured, entry) in all.iter().flat_map(|measured| automatic.clone().map(move |entry| (measured, entry))) {
            let chosen = |ratio: &f64| {
                let mut forms: BTreeMap<&str, usize> = BTreeMap::new();
                for seed in 0..measured.draws.len() as u64 {
                    let record = measured.record(&entry.case(&measured.domain, seed, *ratio));
                    if let Some(form) = record.and_then(|record| record.chosen.as_deref()) {
                        // Without what the others came to.
                        let form = form.split_once(" (").map_or(form, |(form, _)| form);
                        *forms.entry(form).or_default() += 1;
                    }
                }
                forms.into_iter().map(|(form, draws)| format!("{draws} × {form}")).collect::<Vec<_>>().join("; ")
            };
            let row = format!("{}: {}", measured.domain, entry.title);
            table.row([row].into_iter().chain(self.ratios.iter().map(chosen)));
        }
        table
    }

    /// Bytes of the routed experts that are left: the range over domains and draws.
    fn bytes(&self, checkpoint: &Checkpoint, all: &[Measured]) -> Result<Table> {
        let layers = checkpoint.shape().layers.iter();
        let bytes = layers.map(|layer| checkpoint.expert_bytes_on_disk(layer.layer));
        let bytes: u64 = bytes.sum::<moe_checkpoint::Result<u64>>()?;
        let parameters = checkpoint.shape().parameters();
        if parameters == 0 {
            return Err(Error::Invalid("no routed experts".into()));
        }
        let element = bytes as f64 / parameters as f64;
        let size = |parameters: u64| size((parameters as f64 * element).round() as u64);
        let mut table = Table::new(self.header("bytes of the routed experts"), 2);
        let whole = self.ratios.iter().map(|_| size(parameters));
        table.row(["(full model)".to_owned(), String::new()].into_iter().chain(whole));
        for entry in &self.entries {
            let mut cells = self.start(entry);
            cells.extend(self.ratios.iter().map(|ratio| {
                let seeds = |measured: &Measured| 0..measured.draws.len() as u64;
                let cases = all.iter().flat_map(|measured| seeds(measured).map(move |seed| (measured, seed)));
                let records = cases.filter_map(|(measured, seed)| {
                    measured.record(&entry.case(&measured.domain, seed, *ratio)).filter(|r| r.refused.is_none())
                });
                let left: Vec<u64> = records.map(|record| record.routed_parameters).collect();
                match (left.iter().min(), left.iter().max()) {
                    (Some(low), Some(high)) if low == high => size(*low),
                    (Some(low), Some(high)) => format!("{} to {}", size(*low), size(*high)),
                    _ => "–".into(),
                }
            }));
            table.row(cells);
        }
        Ok(table)
    }

    /// Divergences by scorer, and what is chosen.
    fn scorers(&self, all: &[Measured]) -> Table {
        let mut ratios = self.arguments.scored.clone();
        ratios.sort_by(f64::total_cmp);
        let columns: Vec<(&Measured, f64)> =
            all.iter().flat_map(|measured| ratios.iter().map(move |ratio| (measured, *ratio))).collect();
        let header = columns.iter().map(|(measured, ratio)| format!("{}, {}", measured.domain, percent(*ratio)));
        let mut table = Table::new(["divergence".to_owned(), "form".into()].into_iter().chain(header), 2);
        let mut row = |title: String, scorer: &str, method: &str, form: &str| {
            let kl = |(measured, ratio): &(&Measured, f64)| {
                let case = scored(&measured.domain, 0, *ratio, scorer, method);
                shown(measured.spread(&case, &measured.divergence()), "kl")
            };
            table.row([title, form.to_owned()].into_iter().chain(columns.iter().map(kl)));
        };
        for scorer in CHOICES {
            row(scorer.into(), scorer, STOCK_AUTO, "`auto`");
        }
        row("chosen (`--scorer auto`)".into(), CHOSEN, STOCK_AUTO, "`auto`");
        for scorer in CHOICES {
            row(scorer.into(), scorer, GLOBAL, "global");
        }
        let chosen = |(measured, ratio): &(&Measured, f64)| {
            let mut names: BTreeMap<String, usize> = BTreeMap::new();
            for seed in 0..measured.draws.len() as u64 {
                let case: Case = scored(&measured.domain, seed, *ratio, CHOSEN, STOCK_AUTO);
                let told = measured.record(&case).and_then(|record| record.chosen.as_deref());
                let name = told.and_then(|told| told.split_whitespace().nth(2));
                name.into_iter().for_each(|name| *names.entry(name.into()).or_default() += 1);
            }
            names.into_iter().map(|(name, draws)| format!("{draws} × {name}")).collect::<Vec<_>>().join(", ")
        };
        let told = columns.iter().map(chosen);
        table.row(["what was chosen".to_owned(), String::new()].into_iter().chain(told));
        table
    }
}

/// Figures without the units that score best.
fn knock_outs(arguments: &Arguments, measured: &Measured) -> Table {
    let keys = measured.figures();
    let header = ["units".to_owned(), "figure".into()].into_iter();
    let mut table = Table::new(header.chain(KNOCKED_OUT.map(String::from)), 2);
    for key in &keys {
        let whole = measured.base.get(key).and_then(|value| Spread::of(&[*value]));
        let whole = shown(whole, key);
        let cells = KNOCKED_OUT.iter().map(|_| whole.clone());
        table.row(["0".to_owned(), figure(key)].into_iter().chain(cells));
        for units in &arguments.knock_out {
            let cells = KNOCKED_OUT.iter().map(|scorer| {
                let case = knocked_out(&measured.domain, 0, scorer, *units);
                shown(measured.spread(&case, key), key)
            });
            table.row([units.to_string(), figure(key)].into_iter().chain(cells));
        }
    }
    table
}

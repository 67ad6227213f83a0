//! What is compared: a line per method.

use crate::compare::catalog::{EVIDENCE, EXPERTS, GLOBAL, MAIN_SCORER, NO_REPAIR, STOCK_AUTO, UNIFORM};
use crate::compare::{Amount, Case};

/// A method.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Its name in commands.
    pub name: &'static str,
    /// Its name in tables.
    pub title: &'static str,
    /// What it goes by.
    pub scorer: &'static str,
    /// The way to prune or to merge.
    pub method: &'static str,
    /// The same with the recovery in it, where it has one of its own.
    recovered: Option<&'static str>,
    /// A repair that belongs to the method.
    repair: &'static str,
    /// Whether stock loaders read what it writes.
    pub stock: bool,
}

const fn entry(name: &'static str, title: &'static str, scorer: &'static str, method: &'static str) -> Entry {
    Entry { name, title, scorer, method, recovered: None, repair: NO_REPAIR, stock: true }
}

const fn ragged(of: Entry) -> Entry {
    Entry { stock: false, ..of }
}

/// All methods, the claim first.
pub static ENTRIES: [Entry; 12] = [
    entry("auto", "`--scorer auto`, `auto`", CHOSEN, STOCK_AUTO),
    entry("fisher-auto", "Fisher, `auto`", MAIN_SCORER, STOCK_AUTO),
    entry("fisher-uniform", "Fisher, uniform", MAIN_SCORER, UNIFORM),
    ragged(entry("fisher-global", "Fisher, global", MAIN_SCORER, GLOBAL)),
    ragged(entry("heapr", "HEAPr", "heapr", GLOBAL)),
    ragged(entry("moe-slimming", "MoE-Slimming", "slimming", "moe-slimming")),
    entry("reap", "REAP", "reap", EXPERTS),
    entry("reap-sequential", "REAP, sequential", EVIDENCE, "reap-sequential"),
    Entry { repair: "mean_output", ..ragged(entry("mone", "MoNE", "mone", "mone")) },
    entry("dern", "DERN", EVIDENCE, "dern"),
    entry("ream", "REAM", EVIDENCE, "ream"),
    Entry { recovered: Some("mc-smoe-recovered"), ..ragged(entry("mc-smoe", "MC-SMoE", EVIDENCE, "mc-smoe")) },
];

/// Everything that is scored by. The first four are those that `auto` chooses from.
pub(super) const SCORERS: [&str; 9] =
    [MAIN_SCORER, "taylor", "coupled", "heapr", "reap", "mone", "slimming", "magnitude", "random"];
/// Scorers of units that are compared.
pub(super) const CHOICES: [&str; 4] = ["fisher", "taylor", "coupled", "heapr"];
/// Scorers whose best units are taken out, the last ones as controls.
pub(super) const KNOCKED_OUT: [&str; 6] = ["fisher", "taylor", "coupled", "heapr", "magnitude", "random"];
/// The name of the choice among [`CHOICES`].
pub(super) const CHOSEN: &str = "auto";

impl Entry {
    /// The configuration of a draw at a fraction that goes.
    pub fn case(&self, domain: &str, seed: u64, ratio: f64) -> Case {
        Case {
            calibrated: domain.into(),
            seed,
            scorer: self.scorer.into(),
            method: self.method.into(),
            amount: Amount::ratio(ratio),
            repair: self.repair.into(),
        }
    }

    /// The same after the recovery.
    pub fn recovered(&self, domain: &str, seed: u64, ratio: f64, recovery: &str) -> Case {
        let case = self.case(domain, seed, ratio);
        match (self.recovered, self.repair) {
            (Some(method), _) => Case { method: method.into(), ..case },
            (None, NO_REPAIR) => Case { repair: recovery.into(), ..case },
            (None, own) => Case { repair: format!("{own}+{recovery}"), ..case },
        }
    }
}

/// A scorer of units in the form that is chosen, or over the whole model.
pub(super) fn scored(domain: &str, seed: u64, ratio: f64, scorer: &str, method: &str) -> Case {
    let case = ENTRIES[0].case(domain, seed, ratio);
    Case { scorer: scorer.into(), method: method.into(), ..case }
}

/// The units that score best are taken out.
pub(super) fn knocked_out(domain: &str, seed: u64, scorer: &str, units: u32) -> Case {
    let case = scored(domain, seed, 0.5, scorer, "knock_out");
    Case { amount: Amount::Units(units), ..case }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::catalog;

    #[test]
    fn every_method_can_be_read_before_and_after_recovery() {
        for entry in &ENTRIES {
            for case in [entry.case("a", 0, 0.5), entry.recovered("a", 0, 0.5, "recovery")] {
                catalog::method(&case.method).unwrap_or_else(|error| panic!("{}: {error}", entry.name));
                catalog::repair(&case.repair).unwrap_or_else(|error| panic!("{}: {error}", entry.name));
            }
            assert_ne!(entry.case("a", 0, 0.5), entry.recovered("a", 0, 0.5, "recovery"), "{}", entry.name);
            let known = entry.scorer == EVIDENCE || entry.scorer == CHOSEN || SCORERS.contains(&entry.scorer);
            assert!(known, "{}", entry.name);
        }
        SCORERS.iter().for_each(|scorer| drop(catalog::scorer(scorer).unwrap()));
        assert!(CHOICES.iter().chain(&KNOCKED_OUT).all(|scorer| SCORERS.contains(scorer)));
    }
}

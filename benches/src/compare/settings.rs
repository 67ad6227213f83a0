//! How large the study is, and what is measured in it.

use std::collections::BTreeSet;

use super::bench::Figures;
use super::case::{Amount, Case};
use super::catalog::{
    self, CONTROLS, EXPERTS, GLOBAL, GRID, LAYER, MAIN_SCORER, NO_REPAIR, STOCK, STOCK_OF_SCORERS, STOCK_SCORERS,
    UNIFORM,
};
use super::lab::Job;
use super::merging::Merging;
use super::rows::Limits;

/// Capabilities of the bundled model.
pub const CAPABILITIES: [&str; 3] = ["arithmetic", "facts", "prose"];

/// How large the study is.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Capabilities to calibrate on.
    pub calibrated: Vec<&'static str>,
    /// Draws of the calibration rows.
    pub seeds: Vec<u64>,
    /// Sequences of a draw of questions.
    pub samples: usize,
    /// Windows of a draw of text: fewer than there are rows for, so that draws differ.
    pub text_samples: usize,
    /// Sequences that a repair on all rows takes, at most.
    pub repair_samples: usize,
    /// Tokens of a window or row.
    pub length: usize,
    /// Fractions that are dropped.
    pub ratios: Vec<f64>,
    /// Fraction at which everything else is compared.
    pub half: f64,
    /// Scorers by name.
    pub scorers: Vec<&'static str>,
    /// Scorers whose answers are counted, besides the controls.
    pub best: usize,
    /// Scorers whose configurations are repaired.
    pub repaired: usize,
    /// Ways to distribute the budget.
    pub allocators: Vec<&'static str>,
    /// Fractions at which exports for stock loaders are compared.
    pub stock_ratios: Vec<f64>,
    /// Exports and repairs that are compared there.
    pub stock: Vec<(&'static str, &'static str)>,
    /// Scorers that a few of the exports are compared with.
    pub stock_scorers: Vec<&'static str>,
    /// Units that are knocked out.
    pub knock_outs: Vec<u32>,
    /// Rows that are measured on.
    pub limits: Limits,
    /// Ways to merge, where they are what is studied.
    pub merging: Option<Merging>,
}

impl Settings {
    /// The whole study.
    pub fn full() -> Self {
        Self {
            calibrated: CAPABILITIES.into(),
            seeds: vec![0, 1, 2],
            samples: 128,
            text_samples: 64,
            repair_samples: usize::MAX,
            length: 128,
            ratios: vec![0.25, 0.375, 0.5, 0.625],
            half: 0.5,
            scorers: catalog::SCORERS.iter().map(|line| line.name).collect(),
            best: 10,
            repaired: 4,
            allocators: [catalog::UNIT_ALLOCATORS, catalog::EXPERT_ALLOCATORS].concat(),
            stock_ratios: vec![0.5, 0.625],
            stock: STOCK.into(),
            stock_scorers: STOCK_SCORERS.into(),
            knock_outs: vec![1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64],
            limits: Limits { rows: 600, answered: 200, tokens: 3000, length: 128 },
            merging: None,
        }
    }

    /// The study of ways to merge.
    pub fn merging() -> Self {
        let merging = Merging::full();
        let scorers: BTreeSet<&str> = merging.rivals.iter().map(|(scorer, _)| *scorer).collect();
        Self {
            ratios: vec![0.25, 0.375, 0.5],
            scorers: scorers.into_iter().collect(),
            merging: Some(merging),
            ..Self::full()
        }
    }

    /// A small part of it.
    pub fn quick_merging() -> Self {
        let Self { calibrated, seeds, samples, text_samples, limits, .. } = Self::quick();
        Self {
            calibrated,
            seeds,
            samples,
            text_samples,
            limits,
            ratios: vec![0.25, 0.5],
            merging: Some(Merging::quick()),
            ..Self::merging()
        }
    }

    /// A small part of it, for a look and for tests.
    pub fn quick() -> Self {
        Self {
            calibrated: vec!["arithmetic"],
            seeds: vec![0],
            samples: 24,
            text_samples: 8,
            repair_samples: 48,
            ratios: vec![0.25, 0.5],
            scorers: vec![MAIN_SCORER, "fisher_answers", "activation", "magnitude", "random", "frequency", "reap"],
            best: 2,
            repaired: 1,
            allocators: vec!["lamp", "dp_scores"],
            stock_ratios: vec![0.5],
            stock: vec![
                (UNIFORM, "none"),
                (UNIFORM, "refit"),
                ("pieces4", "none"),
                ("pieces4", "refit"),
                ("pieces4", "router_kd"),
                (LAYER, "none"),
            ],
            stock_scorers: vec!["fisher_answers"],
            knock_outs: vec![1, 8, 64],
            limits: Limits { rows: 60, answered: 16, tokens: 400, length: 64 },
            ..Self::full()
        }
    }

    fn case(&self, calibrated: &str, seed: u64, scorer: &str, method: &str, amount: Amount) -> Case {
        Case {
            calibrated: calibrated.into(),
            seed,
            scorer: scorer.into(),
            method: method.into(),
            amount,
            repair: NO_REPAIR.into(),
        }
    }

    /// Every capability with every draw.
    pub fn draws(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        self.calibrated.iter().flat_map(|name| self.seeds.iter().map(|seed| (*name, *seed)))
    }

    /// Every scorer with the four ways to prune, at every size.
    pub fn grid(&self) -> Vec<Job> {
        let mut jobs = Vec::new();
        for (calibrated, seed) in self.draws() {
            for scorer in &self.scorers {
                for ratio in &self.ratios {
                    for method in GRID {
                        let case = self.case(calibrated, seed, scorer, method, Amount::ratio(*ratio));
                        jobs.push(Job { case, figures: Figures::Predictions });
                    }
                }
            }
        }
        jobs
    }

    /// Answers of the best scorers and the controls.
    pub fn answers(&self, best: &[String]) -> Vec<Job> {
        let mut scorers: Vec<&str> = best.iter().map(String::as_str).collect();
        scorers.extend(CONTROLS.iter().filter(|name| self.scorers.contains(name)));
        scorers.dedup();
        let mut jobs = Vec::new();
        for (calibrated, seed) in self.draws() {
            for scorer in &scorers {
                for method in GRID {
                    let case = self.case(calibrated, seed, scorer, method, Amount::ratio(self.half));
                    jobs.push(Job { case, figures: Figures::All });
                }
            }
        }
        jobs
    }

    /// Repairs of the best scorers.
    pub fn repairs(&self, best: &[String]) -> Vec<Job> {
        let mut jobs = Vec::new();
        for (calibrated, seed) in self.draws() {
            for scorer in best.iter().take(self.repaired) {
                for method in REPAIRED {
                    for repair in REPAIRS {
                        let case = self.case(calibrated, seed, scorer, method, Amount::ratio(self.half));
                        jobs.push(Job { case: case.repaired(repair), figures: Figures::All });
                    }
                }
            }
        }
        jobs
    }

    /// Exports for stock loaders and the ragged ones they are compared with, all of them by the scores of one scorer,
    /// some by others.
    pub fn stock(&self) -> Vec<Job> {
        let mut jobs = Vec::new();
        for (calibrated, seed) in self.draws() {
            for ratio in &self.stock_ratios {
                let mut add = |scorer: &str, method: &str, repair: &str| {
                    let case = self.case(calibrated, seed, scorer, method, Amount::ratio(*ratio));
                    jobs.push(Job { case: case.repaired(repair), figures: Figures::All });
                };
                self.stock.iter().for_each(|(method, repair)| add(MAIN_SCORER, method, repair));
                for scorer in &self.stock_scorers {
                    STOCK_OF_SCORERS.iter().for_each(|(method, repair)| add(scorer, method, repair));
                }
            }
        }
        jobs
    }

    /// Ways to distribute the budget, by the scores of one scorer.
    pub fn allocators(&self) -> Vec<Job> {
        let mut jobs = Vec::new();
        for (calibrated, seed) in self.draws() {
            for method in [UNIFORM, LAYER, GLOBAL, EXPERTS].iter().chain(&self.allocators) {
                let case = self.case(calibrated, seed, MAIN_SCORER, method, Amount::ratio(self.half));
                jobs.push(Job { case, figures: Figures::All });
            }
        }
        jobs
    }

    /// The highest-scored units taken out. Scores that no rows were needed for do not depend on the capability.
    pub fn knock_outs(&self) -> Vec<Job> {
        let mut jobs = Vec::new();
        let mut add = |calibrated: &str, seed, scorer: &str| {
            for count in &self.knock_outs {
                let case = self.case(calibrated, seed, scorer, KNOCK_OUT, Amount::Units(*count));
                jobs.push(Job { case, figures: Figures::All });
            }
        };
        for calibrated in &self.calibrated {
            self.seeds.iter().for_each(|seed| add(calibrated, *seed, MAIN_SCORER));
        }
        let first = self.calibrated[0];
        add(first, self.seeds[0], "magnitude");
        self.seeds.iter().for_each(|seed| add(first, *seed, "random"));
        jobs
    }
}

/// Ways to prune that are repaired for the best scorers.
pub const REPAIRED: [&str; 2] = [UNIFORM, GLOBAL];
/// Their repairs.
pub const REPAIRS: [&str; 4] = [NO_REPAIR, "refit", "router_kd", "refit_router_kd"];

/// Name of the way to prune that takes out the best.
pub const KNOCK_OUT: &str = "knock_out";

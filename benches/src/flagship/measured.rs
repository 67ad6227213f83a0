//! Measuring all configurations of a domain.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;
use std::sync::Arc;

use moe::jobs::{ScorerChoice, choose_scorer};
use moe_core::Model;
use moe_core::data::{Dataset, EvalRows, EvalSet, Tokenizer};
use moe_core::evaluate::{EvaluateOptions, evaluate};
use moe_merge::{EvidenceOptions, collect_evidence};
use moe_prune::{Budget, Scope, UnitPruner};
use serde_json::{Value, json};

use super::Arguments;
use super::domain::Loaded;
use super::entries::{CHOICES, CHOSEN, KNOCKED_OUT, SCORERS, knocked_out, scored};
use crate::compare::catalog::{self, EVIDENCE, GLOBAL, Method, STOCK_AUTO, Scoring};
use crate::compare::{
    Amount, Bench, Case, Figures, HeldOut, Job, Journal, Lab, Metrics, Record, Runner, SAMPLE, Spread, score,
};
use crate::progress::Progress;
use crate::{Error, Result};

/// What was measured of a domain.
pub struct Measured {
    /// Its name.
    pub domain: String,
    /// The tests: name, what answers are called, tokens predicted, questions answered.
    pub tests: Vec<(String, Option<&'static str>, usize, usize)>,
    /// Sequences and tokens of each draw.
    pub draws: Vec<(usize, usize)>,
    /// Figures of the full model.
    pub base: Metrics,
    /// Every configuration.
    pub records: BTreeMap<Case, Record>,
}

impl Measured {
    /// The record of a configuration.
    pub fn record(&self, case: &Case) -> Option<&Record> {
        self.records.get(case)
    }

    /// A figure over the draws in which the configuration was measured; the seed of `case` plays no part.
    pub fn spread(&self, case: &Case, key: &str) -> Option<Spread> {
        let seeds = 0..self.draws.len() as u64;
        let value = |seed: u64| self.record(&case.with_seed(seed))?.metrics.get(key).copied();
        Spread::of(&seeds.filter_map(value).collect::<Vec<_>>())
    }

    /// Name of the divergence on the first test.
    pub fn divergence(&self) -> String {
        format!("{}_kl", self.tests[0].0)
    }

    /// Names of the figures of merit, a test each: answers where there are any.
    pub fn figures(&self) -> Vec<String> {
        self.tests.iter().map(|(name, answers, ..)| format!("{name}_{}", answers.unwrap_or("ppl"))).collect()
    }

    /// Everything as JSON.
    pub fn to_json(&self) -> Value {
        let records: Vec<Value> = self.records.values().map(|record| json!(record)).collect();
        json!({ "domain": self.domain, "base": self.base, "records": records })
    }
}

/// Measures what the journal of the domain in `root` does not have.
pub(super) fn measure(
    arguments: &Arguments,
    loaded: Loaded,
    model: Model,
    tokenizer: Tokenizer,
    root: &Path,
    progress: Progress,
) -> Result<Measured> {
    let Loaded { domain, mut held_out, draws } = loaded;
    if arguments.answered_only {
        held_out.iter_mut().try_for_each(|rows| keep_answered(rows, &model, &tokenizer))?;
    }
    let (name, wave_options) = (domain.name.as_str(), arguments.wave_options());
    let tests = held_out.iter().map(|rows| {
        let answered = rows.questions.as_ref().map_or(0, |set| set.len());
        (rows.name.clone(), rows.answers(), rows.predicted(), answered)
    });
    let tests = tests.collect();
    let bench = Bench::new(model, tokenizer, held_out, wave_options, arguments.teacher_tokens)?;
    let mut measured = Measured {
        domain: name.into(),
        tests,
        draws: draws.iter().map(|data| (data.sequences.len(), data.tokens())).collect(),
        base: bench.base.clone(),
        records: BTreeMap::new(),
    };
    let mut lab = Lab::new(bench, BTreeMap::new(), &root.join("scratch").join(name));
    let mut journal = Journal::open(&root.join(format!("{name}.jsonl")))?;
    for (seed, data) in draws.iter().enumerate() {
        let seed = seed as u64;
        let jobs = jobs(arguments, name, seed);
        let missing = |job: &Job| !journal.has(&job.case, &lab.bench.names(job.figures));
        if jobs.iter().any(missing) {
            let scoring = |scorer: &&str| Ok(((*scorer).to_owned(), Scoring::new(catalog::scorer(scorer)?, seed)?));
            let scorers = SCORERS.iter().map(scoring).collect::<Result<Vec<_>>>()?;
            progress.say(&format!("{name}, draw {seed}: scoring {} tokens", data.tokens()));
            let directory = root.join("statistics").join(format!("{name}-{seed}"));
            let mut found = score(&lab.bench.model, data, wave_options, &scorers, &directory, &mut |_| {})?;
            let merges = jobs.iter().filter(|job| job.case.scorer == EVIDENCE);
            let merges = merges.map(|job| recipe(&job.case)).collect::<Result<Vec<_>>>()?;
            if merges.iter().any(|recipe| !recipe.sequential) {
                let options = EvidenceOptions::for_recipes(merges.iter().filter(|recipe| !recipe.sequential), SAMPLE);
                let evidence = collect_evidence(&lab.bench.model, &found.waves, &options, None, &mut |_| {})?;
                found.evidence = Some(Arc::new(evidence));
            }
            lab.scored = [((name.to_owned(), seed), found)].into();
            let mut runner = Runner { journal, workers: arguments.workers, lab: &lab, progress };
            // What is chosen by measuring is one of the others under another name.
            let (chosen, jobs): (Vec<Job>, Vec<Job>) = jobs.into_iter().partition(|job| job.case.scorer == CHOSEN);
            runner.run(&format!("{name}, draw {seed}"), jobs)?;
            let mut choices: BTreeMap<Amount, ScorerChoice> = BTreeMap::new();
            for job in chosen.into_iter().map(|job| job.case) {
                if runner.journal.records().contains_key(&job) {
                    continue;
                }
                let choice = match choices.entry(job.amount) {
                    Entry::Occupied(found) => found.into_mut(),
                    Entry::Vacant(missing) => missing.insert(choose(arguments, &lab, data, job.amount)?),
                };
                let of = Case { scorer: CHOICES[choice.best].into(), ..job.clone() };
                runner.run(&format!("{name}, draw {seed}"), vec![Job { case: of.clone(), figures: Figures::All }])?;
                let missing = || Error::Invalid(format!("{of}: was not measured"));
                let record = runner.journal.records().get(&of).cloned().ok_or_else(missing)?;
                runner.journal.add(Record { case: job, chosen: Some(choice.why()), ..record })?;
            }
            journal = runner.journal;
        }
    }
    measured.records.clone_from(journal.records());
    Ok(measured)
}

/// Leaves of questions with choices those that the full model answers.
fn keep_answered(rows: &mut HeldOut, model: &Model, tokenizer: &Tokenizer) -> Result<()> {
    let Some(EvalSet { name, rows: EvalRows::Choice(questions) }) = &mut rows.questions else { return Ok(()) };
    let mut answered = Vec::new();
    for question in questions.drain(..) {
        let set = EvalSet { name: name.clone(), rows: EvalRows::Choice(vec![question.clone()]) };
        if evaluate(model, tokenizer, &set, &EvaluateOptions::default())?.value() == 1.0 {
            answered.push(question);
        }
    }
    if answered.is_empty() {
        return Err(Error::Invalid(format!("{name}: the full model answers no question")));
    }
    *questions = answered;
    Ok(())
}

/// All configurations of a draw, the most wanted first.
fn jobs(arguments: &Arguments, domain: &str, seed: u64) -> Vec<Job> {
    let entries = arguments.entries();
    let within = |draws: Option<usize>| seed < draws.unwrap_or(usize::MAX) as u64;
    let mut cases = Vec::new();
    for ratio in &arguments.ratio {
        cases.extend(entries.iter().map(|entry| entry.case(domain, seed, *ratio)));
        if arguments.recovered.contains(ratio) && within(arguments.recovered_draws) {
            let recovery = &arguments.recovery;
            cases.extend(entries.iter().map(|entry| entry.recovered(domain, seed, *ratio, recovery)));
        }
        if arguments.scored.contains(ratio) && within(arguments.scored_draws) && !entries.is_empty() {
            for scorer in CHOICES.into_iter().chain([CHOSEN]) {
                cases.push(scored(domain, seed, *ratio, scorer, STOCK_AUTO));
                cases.extend((scorer != CHOSEN).then(|| scored(domain, seed, *ratio, scorer, GLOBAL)));
            }
        }
    }
    for scorer in KNOCKED_OUT {
        cases.extend(arguments.knock_out.iter().map(|units| knocked_out(domain, seed, scorer, *units)));
    }
    let mut seen = std::collections::BTreeSet::new();
    cases.retain(|case| seen.insert(case.clone()));
    cases.into_iter().map(|case| Job { case, figures: Figures::All }).collect()
}

/// The recipe of a merge.
fn recipe(case: &Case) -> Result<moe_merge::Recipe> {
    match catalog::method(&case.method)? {
        Method::Merge(merge) => merge.recipe(0.0),
        _ => Err(Error::Invalid(format!("{case}: not a way to merge"))),
    }
}

/// The scorer whose model, with units of a layer competing, stays closest to the full one on rows that are held back.
fn choose(arguments: &Arguments, lab: &Lab, data: &Dataset, amount: Amount) -> Result<ScorerChoice> {
    let scorers = CHOICES.iter().map(|name| catalog::scorer(name)).collect::<Result<Vec<_>>>()?;
    let pruner = UnitPruner::new(Scope::Layer);
    let budget = Budget::Ratio(amount.fraction(lab.shape().units()));
    let waves = arguments.wave_options();
    choose_scorer(&lab.bench.model, &scorers, &pruner, budget, data, waves, Progress::hidden())
}

//! One pass for many scorers; interrupted, shared and plain collections are one.
#![cfg(feature = "flex")]

use crate::common;

use std::collections::BTreeSet;

use common::{Case, SameWeights, SequenceCase, collect_one, observe, provenance, shape};
use moe_checkpoint::{Pool, ScoreTable, Statistics, StatisticsStore};
use moe_core::WaveReport;
use moe_core::data::{Sequence, Wave};
use moe_core::trace::{Observer, Signals};
use moe_importance::collectors;
use moe_importance::scorers::{Activation, Combine, Random, RouterQuantity, RouterScore};
use moe_importance::statistics::{FISHER_TOKEN, ROUTED_TOKENS};
use moe_importance::{
    Collection, Error, NoWeights, Progress, Scorer, ScorerConfig, StatisticId, WaveRunner, collect, recipe,
};

fn case(seed: u64) -> Case {
    let sequences = [(4, 6), (9, 12), (3, 3)].map(|(rows, loss_tokens)| SequenceCase { rows, loss_tokens });
    Case::random(12, 10, &sequences, seed)
}

/// Ten scorers that the experts of a [`Case`] suffice for.
fn scorers() -> Vec<Box<dyn Scorer>> {
    [
        r#"{"type": "fisher", "criterion": "token"}"#,
        r#"{"type": "fisher", "criterion": "sequence"}"#,
        r#"{"type": "fisher", "criterion": "abs"}"#,
        r#"{"type": "activation"}"#,
        r#"{"type": "activation", "denominator": "routed_tokens"}"#,
        r#"{"type": "magnitude"}"#,
        r#"{"type": "router_score"}"#,
        r#"{"type": "router_score", "router": "weight", "unit": {"type": "fisher"}}"#,
        r#"{"type": "router_score", "combine": "multiply", "unit": {"type": "activation"}}"#,
        r#"{"type": "random", "seed": 4}"#,
    ]
    .map(|json| serde_json::from_str::<ScorerConfig>(json).unwrap().build().unwrap())
    .into()
}

fn bits(table: &ScoreTable) -> Vec<u32> {
    table.layers.iter().flat_map(|l| l.scores.iter().flatten()).map(|s| s.to_bits()).collect()
}

#[test]
fn one_collection_serves_ten_scorers() {
    let (case, scorers) = (case(1), scorers());
    let weights = SameWeights(case.weights());
    let mut all = Collection::for_scorers(&shape(&case, 2), provenance(), &scorers).unwrap();
    let ids: Vec<_> = all.ids().iter().map(|id| id.to_string()).collect();
    let sorted = [
        "activation.magnitude",
        "fisher.abs",
        "fisher.sequence",
        "fisher.token",
        "routing.probability",
        "routing.tokens",
        "routing.weight",
    ];
    assert_eq!(ids, sorted, "each statistic once");
    observe(&case, 0, &mut all).unwrap();
    let all = all.take().unwrap();
    for scorer in scorers {
        let alone = scorer.score(&collect_one(&case, &scorer.needs().statistics), &weights).unwrap();
        let shared = scorer.score(&all, &weights).unwrap();
        assert_eq!(bits(&alone), bits(&shared), "{}", scorer.recipe());
        assert_eq!(shared.pool, Pool::Global);
        assert_eq!(shared.scorer, scorer.recipe().to_string());
        let restored = serde_json::from_str::<ScorerConfig>(&shared.scorer).unwrap().build().unwrap();
        assert_eq!(bits(&restored.score(&all, &weights).unwrap()), bits(&shared));
    }
}

#[test]
fn a_collection_asks_for_no_more_than_its_collectors() {
    let needs = |ids: &[StatisticId]| Collection::new(&shape(&case(1), 2), provenance(), ids).unwrap().needs();
    assert_eq!(needs(&[]), Signals::NONE);
    assert_eq!(needs(&[ROUTED_TOKENS]), Signals::ROUTING);
    assert_eq!(needs(&Activation::default().needs().statistics), Signals::ROUTING | Signals::UNITS);
    assert_eq!(needs(&[FISHER_TOKEN, ROUTED_TOKENS]), Signals::ROUTING | Signals::GRADIENTS);
}

#[test]
fn unknown_and_doubled_statistics_are_refused() {
    let shape = shape(&case(1), 2);
    let error = Collection::new(&shape, provenance(), &[StatisticId::new("fisher.tokens")]).unwrap_err().to_string();
    assert!(error.contains("`fisher.tokens`") && error.contains("fisher.token, activation.magnitude"), "{error}");
    let twice = || Box::new(collectors::UnitSums::new(&[FISHER_TOKEN]));
    let error = Collection::with_collectors(&shape, provenance(), vec![twice(), twice()]).unwrap_err();
    assert!(matches!(error, Error::DuplicateStatistic { id } if id == "fisher.token"));
}

/// Runs the case of a wave's id; fails at one wave.
struct Runner {
    fail_at: Option<u64>,
    ran: Vec<u64>,
}

impl WaveRunner for Runner {
    fn run(&mut self, wave: &Wave, observer: &mut dyn Observer) -> moe_core::Result<WaveReport> {
        if self.fail_at == Some(wave.id) {
            // Half a wave must leave no trace.
            let case = case(99);
            observer.begin_wave(&case.wave(wave.id))?;
            case.show(3, 1, observer)?;
            return Err(moe_core::Error::Unsupported("a power cut".into()));
        }
        observe(&case(wave.id), wave.id, observer)?;
        self.ran.push(wave.id);
        let loss_tokens = wave.loss_tokens();
        Ok(WaveReport {
            tokens: wave.tokens(),
            loss_tokens,
            loss: Some(2.0 * loss_tokens as f64),
            sequence_losses: None,
        })
    }
}

/// Waves whose sequences are as long as those of their case.
fn waves(n: u64) -> Vec<Wave> {
    let sequences = |id| case(id).wave(id).sequences.iter().map(|s| Sequence::new(vec![0; s.tokens.len()])).collect();
    (0..n).map(|id| Wave { id, sequences: sequences(id) }).collect()
}

fn fresh() -> Collection<'static> {
    Collection::for_scorers(&shape(&case(0), 2), provenance(), &scorers()).unwrap()
}

fn run<'w>(
    waves: impl IntoIterator<Item = &'w Wave>,
    store: Option<&mut StatisticsStore>,
    fail_at: Option<u64>,
) -> (moe_importance::Result<Statistics>, Vec<u64>, Vec<Progress>) {
    let (mut runner, mut reports) = (Runner { fail_at, ran: vec![] }, vec![]);
    let result = collect(&mut runner, &mut fresh(), waves, store, &mut |progress| reports.push(*progress));
    (result, runner.ran, reports)
}

#[test]
fn resumed_sharded_and_storeless_collections_are_one() {
    let (waves, shape) = (waves(5), shape(&case(0), 2));
    let directory = tempfile::tempdir().unwrap();
    let open =
        |name: &str| StatisticsStore::create_or_resume(directory.path().join(name), &shape, &provenance()).unwrap();

    let (whole, ran, reports) = run(&waves, Some(&mut open("whole")), None);
    let whole = whole.unwrap();
    assert_eq!(ran, [0, 1, 2, 3, 4]);
    assert_eq!(*whole.waves(), BTreeSet::from_iter(0..5));
    assert_eq!(whole.tokens(), waves.iter().map(|w| w.tokens() as u64).sum::<u64>());
    assert_eq!(whole.sequences(), 15);
    assert_eq!((reports.len(), reports[0].waves_done, reports[0].loss), (6, 0, None));
    assert_eq!((reports[5].waves_done, reports[5].tokens_done, reports[5].loss), (5, whole.tokens(), Some(2.0)));

    let (interrupted, ran, _) = run(&waves, Some(&mut open("resumed")), Some(3));
    assert!(interrupted.unwrap_err().to_string().contains("a power cut"));
    assert_eq!(ran, [0, 1, 2]);
    let (resumed, ran, reports) = run(&waves, Some(&mut open("resumed")), None);
    assert_eq!(ran, [3, 4], "finished waves are not run again");
    assert_eq!((reports[0].waves_resumed, reports[0].waves_done), (3, 3));
    assert_eq!(resumed.unwrap(), whole);

    run(waves.iter().rev().filter(|w| w.id % 2 == 1), Some(&mut open("odd")), None).0.unwrap();
    let mut even = open("even");
    run(waves.iter().filter(|w| w.id % 2 == 0), Some(&mut even), None).0.unwrap();
    even.absorb(directory.path().join("odd")).unwrap();
    assert_eq!(even.fold().unwrap(), whole);

    assert_eq!(run(waves.iter().rev(), None, None).0.unwrap(), whole);
}

#[test]
fn what_cannot_be_collected_is_refused_before_the_model_runs() {
    let waves = waves(2);
    let (result, ran, _) = run(&[], None, None);
    assert!(matches!(result, Err(Error::NoData { counted: "waves", .. })));
    assert!(ran.is_empty());
    let (result, ran, _) = run([&waves[1], &waves[0], &waves[1]], None, None);
    assert!(matches!(result, Err(Error::DuplicateWave { id: 1 })));
    assert!(ran.is_empty());

    // A store of other statistics under the same provenance.
    let directory = tempfile::tempdir().unwrap();
    let mut store = StatisticsStore::create_or_resume(directory.path(), &shape(&case(0), 2), &provenance()).unwrap();
    let mut other = Collection::new(&shape(&case(0), 2), provenance(), &[ROUTED_TOKENS]).unwrap();
    let mut runner = Runner { fail_at: None, ran: vec![] };
    collect(&mut runner, &mut other, &waves[..1], Some(&mut store), &mut |_| {}).unwrap();
    let (result, ran, _) = run(&waves, Some(&mut store), None);
    assert!(result.unwrap_err().to_string().contains("routing.tokens"));
    assert!(ran.is_empty());
}

#[test]
fn a_collection_of_nothing_runs_nothing() {
    let mut collection = Collection::new(&shape(&case(0), 2), provenance(), &[]).unwrap();
    let mut runner = |_: &Wave, _: &mut dyn Observer| -> moe_core::Result<WaveReport> { panic!("nothing to see") };
    let statistics = collect(&mut runner, &mut collection, &waves(1), None, &mut |_| {}).unwrap();
    let table = Random::new(1).score(&statistics, &NoWeights).unwrap();
    assert_eq!(table.layers[0].scores.len(), 2);
}

#[test]
fn the_recipe_names_every_statistic_that_is_collected() {
    let recipe = recipe(&[ROUTED_TOKENS], &serde_json::json!({"tokens": 64})).unwrap();
    assert_eq!(recipe, r#"{"statistics":["routing.tokens","routing.weight"],"data":{"tokens":64}}"#);
}

#[test]
fn traces_that_do_not_fit_are_refused() {
    let small = case(1);
    let mut wide = shape(&small, 2);
    wide.layers[0].widths = vec![10, 11];
    let mut collection = Collection::new(&wide, provenance(), &[FISHER_TOKEN]).unwrap();
    let error = observe(&small, 0, &mut collection).unwrap_err().to_string();
    assert!(error.contains("layer 3, expert 1: units: found shape [16, 10], expected [16, 11]"), "{error}");
    let mut collection = Collection::new(&shape(&small, 3), provenance(), &[ROUTED_TOKENS]).unwrap();
    let error = observe(&small, 0, &mut collection).unwrap_err().to_string();
    assert!(error.contains("layer 3: experts: found 2, expected 3"), "{error}");
    let mut collection = Collection::new(&shape(&small, 2), provenance(), &[FISHER_TOKEN]).unwrap();
    let error = small.show(3, 1, &mut collection).unwrap_err().to_string();
    assert!(error.contains("found no wave"), "{error}");
}

#[test]
fn scorers_name_what_is_missing_or_broken() {
    let case = case(1);
    let weights = SameWeights(case.weights());
    let fisher = &scorers()[0];
    let error = fisher.score(&collect_one(&case, &[ROUTED_TOKENS]), &NoWeights).unwrap_err().to_string();
    assert_eq!(
        error,
        "scorer `fisher` needs statistic `fisher.token`, but the statistics hold routing.tokens, routing.weight"
    );
    let statistics = collect_one(&case, &Activation::default().needs().statistics);
    let error = Activation::default().score(&statistics, &NoWeights).unwrap_err().to_string();
    assert!(error.contains("weights of layer 3, expert 0"), "{error}");
    for run in 0..200 {
        let again = Activation::default().score(&statistics, &NoWeights).unwrap_err().to_string();
        assert_eq!(again, error, "run {run}: whichever thread is first");
    }
    let mut broken = case.weights();
    broken.down[7] = f32::NAN;
    let error = Activation::default().score(&statistics, &SameWeights(broken)).unwrap_err().to_string();
    assert!(error.contains("scorer `activation`: the score of layer 3, expert 0, unit 7 is NaN"), "{error}");
    let mut narrow = weights.0.clone();
    narrow.width = 9;
    let error = Activation::default().score(&statistics, &SameWeights(narrow)).unwrap_err().to_string();
    assert!(error.contains("weights of 9 units, but the statistics have 10"), "{error}");
    let empty = Statistics::new(&shape(&case, 2), provenance());
    assert!(matches!(fisher.score(&empty, &NoWeights), Err(Error::MissingStatistic { .. })));
    let mut unrun = Statistics::new(&shape(&case, 2), provenance());
    unrun.unit_mut("fisher.token", moe_checkpoint::Fold::Sum, 3, 0).unwrap();
    unrun.expert_mut("routing.tokens", moe_checkpoint::Fold::Sum, 3).unwrap();
    let error = fisher.score(&unrun, &NoWeights).unwrap_err().to_string();
    assert_eq!(error, "scorer `fisher`: no calibration data: found 0 tokens, expected at least 1");
}

#[test]
fn random_scores_depend_on_the_seed_and_the_place_alone() {
    let score = |seed, experts| {
        let case = case(0);
        let statistics = Statistics::new(&shape(&case, experts), provenance());
        Random::new(seed).score(&statistics, &NoWeights).unwrap()
    };
    let (small, large, other) = (score(1, 2), score(1, 5), score(2, 2));
    assert_eq!(small.layers[0].scores[..], large.layers[0].scores[..2], "further experts change nothing");
    assert_ne!(bits(&small), bits(&other));
    assert_ne!(small.layers[0].scores[0], small.layers[0].scores[1]);
    assert!(large.layers[0].scores.iter().flatten().all(|s| (0.0..1.0).contains(s)));
}

#[test]
fn router_scores_order_experts_and_then_units() {
    let case = case(1);
    let weights = SameWeights(case.weights());
    let statistics = collect_one(&case, &RouterScore::default().needs().statistics);
    let experts = RouterScore::default().experts(&statistics).unwrap();
    // Logits 0 and 2 for every token.
    let p = 1.0 / (1.0 + 2f32.exp());
    for (found, expected) in experts.layers[0].scores.iter().zip([p, 1.0 - p]) {
        assert!((found[0] - expected).abs() < 1e-6);
    }
    let table = RouterScore::default().score(&statistics, &weights).unwrap();
    let [low, high] = [0, 1].map(|e| table.layers[0].scores[e].clone());
    assert!(low.iter().all(|l| high.iter().all(|h| l < h)), "the tie-breaker never crosses experts");
    let by_weight = RouterScore::new(RouterQuantity::Weight, Combine::Multiply, Random::new(1));
    let table = by_weight.score(&collect_one(&case, &by_weight.needs().statistics), &NoWeights).unwrap();
    let random = Random::new(1).score(&statistics, &NoWeights).unwrap();
    assert_eq!(table.layers[0].scores[0], vec![0.0; 10], "never selected");
    let halves: Vec<f32> = random.layers[0].scores[1].iter().map(|s| s / 2.0).collect();
    assert_eq!(table.layers[0].scores[1], halves);
}

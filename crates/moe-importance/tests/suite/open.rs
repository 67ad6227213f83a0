//! What a program outside the crate builds on: scorers of its own, what tables say of themselves, and strict recipes.
//! None of it needs a model or Burn.

use moe_checkpoint::{
    Denominator, Fold, Granularity, MoeLayerShape, MoeShape, Pool, Provenance, Reduction, ScoreTable, Statistics,
};
use moe_importance::scorers::{Combine, Magnitude, Random, Units, check_needs, table};
use moe_importance::statistics::ROUTED_TOKENS;
use moe_importance::{
    ExpertWeightsSource, Needs, NoWeights, Scorer, ScorerConfig, StatisticId, SuperExpertOptions, SuperExperts,
};

/// A statistic that no collector of the crate knows, and a scorer of it.
const HEAT: StatisticId = StatisticId::new("own.heat");

struct Heat {
    power: i32,
}

impl Scorer for Heat {
    fn name(&self) -> &str {
        "heat"
    }

    fn recipe(&self) -> serde_json::Value {
        serde_json::json!({ "type": "heat", "power": self.power })
    }

    fn needs(&self) -> Needs {
        Needs::experts([HEAT, ROUTED_TOKENS]).within(Pool::Layer)
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> moe_importance::Result<ScoreTable> {
        check_needs(self, statistics)?;
        table(self, statistics, Denominator::None, |layer, expert, _| {
            Ok(vec![statistics.expert(HEAT.as_str(), layer)?[expert].powi(self.power)])
        })
    }
}

fn statistics() -> Statistics {
    let layers = vec![MoeLayerShape { layer: 1, widths: vec![3, 2] }, MoeLayerShape { layer: 4, widths: vec![2, 2] }];
    let shape = MoeShape { gateless: false, hidden_size: 4, top_k: 1, layers };
    let mut statistics = Statistics::new(&shape, Provenance::new("model", "data", "{}"));
    statistics.begin(0);
    for layer in [1, 4] {
        statistics.expert_mut(HEAT.as_str(), Fold::Sum, layer).unwrap().copy_from_slice(&[3.0, layer as f64]);
        statistics.expert_mut(ROUTED_TOKENS.as_str(), Fold::Sum, layer).unwrap().copy_from_slice(&[5.0, 0.0]);
    }
    statistics.add_counts(5, 1, 4);
    statistics
}

#[test]
fn a_scorer_of_another_crate_makes_tables_like_any_other() {
    let scorers: Vec<Box<dyn Scorer>> = vec![Box::new(Heat { power: 2 })];
    let found = scorers[0].score(&statistics(), &NoWeights).unwrap();
    assert_eq!(found.layers[0].scores, [[9.0], [1.0]]);
    assert_eq!(found.layers[1].scores, [[9.0], [16.0]]);
    assert_eq!(found.layers[0].routed, Some(vec![5, 0]));
    assert_eq!((found.granularity, found.pool, found.additive), (Granularity::Expert, Pool::Layer, None));
    assert_eq!(found.scorer, r#"{"type":"heat","power":2}"#);
    let magnitude = Random::new(3).score(&statistics(), &NoWeights).unwrap();
    let units = ScoreTable::broadcast(&found, &magnitude).unwrap();
    assert_eq!((units.pool, units.additive, units.denominator), (Pool::Layer, None, Denominator::Ranks));

    let empty = Statistics::new(statistics().shape(), Provenance::new("model", "data", "{}"));
    let error = scorers[0].score(&empty, &NoWeights).unwrap_err().to_string();
    assert_eq!(error, "scorer `heat` needs statistic `own.heat`, but the statistics hold none");
    let error = Heat { power: 900 }.score(&statistics(), &NoWeights).unwrap_err().to_string();
    assert_eq!(error, "scorer `heat`: the score of layer 1, expert 0, unit 0 is inf, expected a finite number");
}

fn needs(json: &str) -> Needs {
    serde_json::from_str::<ScorerConfig>(json).unwrap().build().unwrap().needs()
}

#[test]
fn pools_and_sums_are_what_the_scores_are_good_for() {
    use Pool::{Expert, Global, Layer};
    for (json, pool, additive) in [
        (r#"{"type":"fisher"}"#, Global, Some(Global)),
        (r#"{"type":"coupled"}"#, Global, Some(Global)),
        (r#"{"type":"coupled","denominator":"routed_tokens"}"#, Global, Some(Expert)),
        (r#"{"type":"magnitude"}"#, Global, Some(Global)),
        // Norms of outputs grow with depth.
        (r#"{"type":"reap"}"#, Layer, None),
        (r#"{"type":"reap","denominator":"all_tokens"}"#, Layer, Some(Layer)),
        (r#"{"type":"ean"}"#, Layer, Some(Layer)),
        (r#"{"type":"ean","denominator":"routed_tokens"}"#, Layer, None),
        (r#"{"type":"man"}"#, Layer, None),
        // Shares of traffic.
        (r#"{"type":"frequency"}"#, Global, None),
        (r#"{"type":"routing_weight"}"#, Global, None),
        (r#"{"type":"seer"}"#, Global, None),
        (r#"{"type":"dern"}"#, Global, None),
        (r#"{"type":"esft"}"#, Layer, None),
        // Ranks, whatever they are made of; products are amounts if the units are.
        (r#"{"type":"router_score"}"#, Global, None),
        (r#"{"type":"units","of":{"type":"reap"}}"#, Layer, None),
        (r#"{"type":"units","of":{"type":"reap"},"combine":"multiply"}"#, Layer, Some(Layer)),
        // Sums of units.
        (r#"{"type":"experts"}"#, Global, Some(Global)),
        (r#"{"type":"experts","reduction":"max"}"#, Global, None),
        (r#"{"type":"experts","of":{"type":"coupled","denominator":"routed_tokens"}}"#, Global, None),
    ] {
        let found = needs(json);
        assert_eq!((found.pool, found.additive), (pool, additive), "{json}");
    }
    let both = needs(r#"{"type":"units","of":{"type":"reap"},"tie_breaker":{"type":"coupled"}}"#);
    let ids: Vec<_> = both.statistics.iter().map(StatisticId::as_str).collect();
    assert_eq!(ids, ["output.norm_applied", "routing.tokens", "taylor.square"]);
    assert!(needs(r#"{"type":"units"}"#).weights && !needs(r#"{"type":"reap"}"#).weights);
}

#[test]
fn a_sum_of_what_does_not_add_up_is_refused_before_it_is_scored() {
    let ranks = ScorerConfig::from(Units::new(
        serde_json::from_str::<ScorerConfig>(r#"{"type":"frequency"}"#).unwrap(),
        Magnitude::new(),
        Combine::TieBreak,
    ));
    let error = ranks.clone().into_experts(Reduction::Sum).unwrap_err().to_string();
    assert!(error.contains("scores of `units` are not additive"), "{error}");
    assert!(ranks.into_experts(Reduction::Mean).is_ok());
}

#[test]
fn every_recipe_refuses_what_it_does_not_know() {
    for name in ScorerConfig::NAMES {
        let json = format!(r#"{{"type":"{name}","round_to":8}}"#);
        let error = serde_json::from_str::<ScorerConfig>(&json).unwrap_err().to_string();
        assert!(error.contains("field `round_to`: unknown field `round_to`"), "{name}: {error}");
        let nested = format!(r#"{{"type":"units","of":{json}}}"#);
        let error = serde_json::from_str::<ScorerConfig>(&nested).unwrap_err().to_string();
        assert!(error.contains("unknown field `round_to`"), "{name}: {error}");
    }
    fn unknown<T: serde::de::DeserializeOwned>(json: &str) {
        let error = serde_json::from_str::<T>(json).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("unknown field `round_to`"), "{}: {error}", std::any::type_name::<T>());
    }
    unknown::<SuperExpertOptions>(r#"{"percentile":99.0,"round_to":8}"#);
    unknown::<SuperExperts>(r#"{"options":{},"round_to":8}"#);
    unknown::<moe_checkpoint::ExpertId>(r#"{"layer":0,"expert":1,"round_to":8}"#);
    unknown::<moe_importance::super_experts::SuperExpert>(r#"{"layer":0,"expert":1,"max":1.0,"round_to":8}"#);
}

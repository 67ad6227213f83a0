//! Every scorer in every configuration that changes what it computes.

use moe_importance::{Scorer, ScorerConfig};

/// As JSON.
pub fn catalogue() -> Vec<String> {
    let mut all: Vec<String> = [
        r#"{"scorer":"magnitude"}"#,
        r#"{"scorer":"random","seed":3}"#,
        r#"{"scorer":"frequency"}"#,
        r#"{"scorer":"man"}"#,
        r#"{"scorer":"man","squared":true}"#,
        r#"{"scorer":"seer","count":"hard"}"#,
        r#"{"scorer":"seer","count":"soft"}"#,
        r#"{"scorer":"aimer"}"#,
        r#"{"scorer":"expert_magnitude"}"#,
        r#"{"scorer":"tenp"}"#,
        r#"{"scorer":"dern"}"#,
        r#"{"scorer":"esft","score":"token"}"#,
        r#"{"scorer":"esft","score":"gate"}"#,
        r#"{"scorer":"mone"}"#,
        r#"{"scorer":"router_score"}"#,
        r#"{"scorer":"router_score","router":"weight","combine":"multiply","unit":{"scorer":"activation"}}"#,
        r#"{"scorer":"units","of":{"scorer":"reap"},"tie_breaker":{"scorer":"heapr"}}"#,
        r#"{"scorer":"units","of":{"scorer":"frequency"},"tie_breaker":{"scorer":"fisher"},"combine":"multiply"}"#,
    ]
    .map(String::from)
    .into();
    let mut vary = |scorer: &str, fields: &[(&str, &[&str])]| {
        let mut of_scorer = vec![format!(r#"{{"scorer":"{scorer}""#)];
        for (field, values) in fields {
            let with = |json: &String| -> Vec<String> {
                values.iter().map(|value| format!(r#"{json},"{field}":{value}"#)).collect()
            };
            of_scorer = of_scorer.iter().flat_map(with).collect();
        }
        all.extend(of_scorer.into_iter().map(|json| json + "}"));
    };
    let denominator: (&str, &[&str]) = ("denominator", &[r#""all_tokens""#, r#""routed_tokens""#]);
    let gate: (&str, &[&str]) = ("gate", &[r#""as_applied""#, r#""renormalised""#, r#""softmax""#]);
    vary("fisher", &[("criterion", &[r#""token""#, r#""sequence""#, r#""abs""#])]);
    vary("heapr", &[denominator]);
    vary("coupled", &[denominator]);
    vary("taylor", &[("form", &[r#""magnitude""#, r#""sum""#, r#""loss_increase""#]), denominator]);
    vary("activation", &[denominator, ("weighting", &[r#""none""#, r#""weight""#, r#""square""#])]);
    vary("projection", &[denominator, ("weighting", &[r#""none""#, r#""weight""#])]);
    vary("routing_weight", &[gate, denominator]);
    vary("ean", &[denominator]);
    vary("reap", &[gate, ("power", &["1", "2"]), denominator]);
    vary("router_taylor", &[("form", &[r#""taylor""#, r#""abs""#, r#""square""#])]);
    vary("bias", &[("sample", &[r#""wave""#, r#""sequence""#]), ("around", &[r#""mean""#, r#""median""#])]);
    let reductions = ["\"sum\"", "\"mean\"", "\"max\"", r#"{"top":2}"#];
    vary("experts", &[("of", &[r#"{"scorer":"coupled"}"#]), ("reduction", &reductions)]);
    all
}

/// The scorers of [`catalogue`].
pub fn scorers() -> Vec<Box<dyn Scorer>> {
    let scorer = |json: &String| -> Box<dyn Scorer> {
        let config: ScorerConfig = serde_json::from_str(json).unwrap_or_else(|error| panic!("{json}: {error}"));
        config.build().unwrap_or_else(|error| panic!("{json}: {error}"))
    };
    catalogue().iter().map(scorer).collect()
}

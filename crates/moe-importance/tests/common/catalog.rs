//! Every scorer in every configuration that changes what it computes.

use moe_importance::{Scorer, ScorerConfig};

/// As JSON.
pub fn catalog() -> Vec<String> {
    let mut all: Vec<String> = [
        r#"{"type":"magnitude"}"#,
        r#"{"type":"random","seed":3}"#,
        r#"{"type":"frequency"}"#,
        r#"{"type":"man"}"#,
        r#"{"type":"man","squared":true}"#,
        r#"{"type":"seer","count":"hard"}"#,
        r#"{"type":"seer","count":"soft"}"#,
        r#"{"type":"aimer"}"#,
        r#"{"type":"expert_magnitude"}"#,
        r#"{"type":"tenp"}"#,
        r#"{"type":"dern"}"#,
        r#"{"type":"esft","score":"token"}"#,
        r#"{"type":"esft","score":"gate"}"#,
        r#"{"type":"mone"}"#,
        r#"{"type":"channel_norms"}"#,
        r#"{"type":"slimming"}"#,
        r#"{"type":"slimming","channels":{"type":"heapr"},"experts":{"type":"reap"}}"#,
        r#"{"type":"coalition"}"#,
        r#"{"type":"coalition","signed":true}"#,
        r#"{"type":"fisher","criterion":"abs","parts":["gate"]}"#,
        r#"{"type":"fisher","criterion":"abs","parts":["up","down"]}"#,
        r#"{"type":"router_score"}"#,
        r#"{"type":"router_score","router":"weight","combine":"multiply","unit":{"type":"activation"}}"#,
        r#"{"type":"units","of":{"type":"reap"},"tie_breaker":{"type":"heapr"}}"#,
        r#"{"type":"units","of":{"type":"frequency"},"tie_breaker":{"type":"fisher"},"combine":"multiply"}"#,
    ]
    .map(String::from)
    .into();
    let mut vary = |scorer: &str, fields: &[(&str, &[&str])]| {
        let mut of_scorer = vec![format!(r#"{{"type":"{scorer}""#)];
        for (field, values) in fields {
            let with = |json: &String| -> Vec<String> {
                values.iter().map(|value| format!(r#"{json},"{field}":{value}"#)).collect()
            };
            of_scorer = of_scorer.iter().flat_map(with).collect();
        }
        all.extend(of_scorer.into_iter().map(|json| json + "}"));
    };
    let denominator: (&str, &[&str]) = ("denominator", &[r#""all_tokens""#, r#""routed_tokens""#]);
    let gate: (&str, &[&str]) = ("gate", &[r#""as_applied""#, r#""renormalized""#, r#""softmax""#]);
    vary("fisher", &[("criterion", &[r#""token""#, r#""sequence""#, r#""abs""#])]);
    vary("heapr", &[denominator]);
    vary("coupled", &[denominator]);
    vary("taylor", &[("form", &[r#""magnitude""#, r#""sum""#, r#""loss_increase""#]), denominator]);
    vary("activation", &[denominator, ("weighting", &[r#""none""#, r#""weight""#, r#""square""#])]);
    vary("projection", &[denominator, ("weighting", &[r#""none""#, r#""weight""#])]);
    vary("routing_weight", &[gate, denominator]);
    vary("ean", &[denominator]);
    vary("reap", &[gate, ("power", &["1", "2"]), denominator]);
    vary("attribution", &[("order", &[r#""first""#, r#""second""#]), ("clip", &["true", "false"])]);
    vary("router_taylor", &[("form", &[r#""taylor""#, r#""abs""#, r#""square""#])]);
    vary("bias", &[("sample", &[r#""wave""#, r#""sequence""#]), ("around", &[r#""mean""#, r#""median""#])]);
    let reductions = ["\"sum\"", "\"mean\"", "\"max\"", r#"{"top":2}"#];
    vary("experts", &[("of", &[r#"{"type":"coupled"}"#]), ("reduction", &reductions)]);
    all
}

/// The scorers of [`catalog`].
pub fn scorers() -> Vec<Box<dyn Scorer>> {
    let scorer = |json: &String| -> Box<dyn Scorer> {
        let config: ScorerConfig = serde_json::from_str(json).unwrap_or_else(|error| panic!("{json}: {error}"));
        config.build().unwrap_or_else(|error| panic!("{json}: {error}"))
    };
    catalog().iter().map(scorer).collect()
}

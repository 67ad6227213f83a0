//! What is measured: rules of routing, paths of layers, ways of decoding.

use moe_core::depth::{LayerChoice, LayerPath};
use serde_json::{Value, json};

/// A way to run the model.
pub(super) enum Way {
    RunTime(Value),
    /// Found on rows with answers.
    Answers(Value),
    /// Toward the experts that facts use more often than all rows do, so strongly.
    Steer(f64),
    /// A method of `moe tune`, by its name.
    Train(&'static str),
    Drop(LayerChoice),
    Decode {
        config: Value,
        others: Vec<Value>,
    },
}

pub(super) struct Setting {
    pub table: &'static str,
    pub name: String,
    pub way: Way,
}

/// All settings of a model of so many experts per token and layers.
pub(super) fn settings(top_k: usize, layers: usize) -> Vec<Setting> {
    let skip = json!({ "type": "skip", "beta": 0.3 });
    let mut all = Vec::new();
    let mut routing = |name: String, rule: Value| {
        all.push(Setting { table: "routing", name, way: Way::RunTime(json!({ "routing": rule })) });
    };
    for k in (1..=top_k + 2).rev() {
        routing(format!("`top_k` {k}"), json!({ "type": "top_k", "k": k }));
    }
    // Fewer than the model's own.
    let means: &[f64] = if top_k > 2 { &[3.0, 2.0] } else { &[1.5] };
    for mean in means {
        let rule = |mass| json!({ "type": "top_p", "experts": mean, "mass": mass });
        routing(format!("`top_p`, {mean} of its own on average"), rule("trained_top_k"));
        routing(format!("`top_p`, {mean} of all on average"), rule("all_experts"));
    }
    for mean in means {
        let search = |cost| json!({ "type": "top_k_search", "experts": mean, "cost": cost });
        routing(format!("`top_k_search`, {mean} on average, by divergence"), search("divergence"));
        routing(format!("`top_k_search`, {mean} on average, by output"), search("output"));
        routing(format!("`top_k_search`, {mean} on average, by random inputs (LExI)"), search("random"));
    }
    routing("`skip`, NAEE's median".into(), json!({ "type": "skip" }));
    for share in [0.25, 0.5] {
        routing(format!("`skip`, {share} of all but the best"), json!({ "type": "skip", "share": share }));
    }
    routing("`threshold`, logit 0".into(), json!({ "type": "threshold", "logit": 0.0 }));
    routing("`ranks`, the second best alone".into(), json!({ "type": "ranks", "ranks": [1] }));
    routing("`random` routers".into(), json!({ "type": "random", "k": top_k }));
    let mut path = |path: String| {
        let way = Way::RunTime(json!({ "layers": path }));
        all.push(Setting { table: "depth", name: format!("path `{path}`"), way });
    };
    path(LayerPath::whole(layers).to_string());
    for layer in 0..layers {
        path(LayerPath::without(layers, layer..layer + 1).to_string());
    }
    let last = layers - 1;
    path(format!("0-{},{last}a", last - 1));
    path(format!("0-1,1-{last}"));
    for share in [0.1, 0.25] {
        let rule = json!({ "type": "token_skip", "share": share });
        let name = format!("`token_skip`, {share} of all tokens in each layer");
        all.push(Setting { table: "depth", name, way: Way::RunTime(json!({ "layers": rule })) });
    }
    let least = json!({ "type": "token_skip", "share": 0.25, "layers": { "type": "attention_rank", "layers": 1 } });
    let name = "`token_skip`, 0.25 of all tokens in the layer of least ARank".into();
    all.push(Setting { table: "depth", name, way: Way::RunTime(json!({ "layers": least })) });
    let routers = json!({ "type": "layer_routers", "search": { "simulations": 6 } });
    let name = "`layer_routers`, 6 trials a row".into();
    all.push(Setting { table: "depth", name, way: Way::Answers(json!({ "layers": routers })) });
    for rule in [
        LayerChoice::AttentionRank { layers: 1 },
        LayerChoice::Influence { layers: 1 },
        LayerChoice::Angular { layers: 1 },
        LayerChoice::Angular { layers: 2 },
    ] {
        let name = serde_json::to_string(&rule).unwrap_or_default();
        all.push(Setting { table: "depth", name: format!("dropped by `{name}`"), way: Way::Drop(rule) });
    }
    for method in ["null-experts", "recurrent-router", "gamma-mod", "final-router", "router-targets", "loss-free"] {
        all.push(Setting { table: "trained", name: format!("`{method}`"), way: Way::Train(method) });
    }
    for lambda in [-0.5, 0.0, 0.5, 1.0] {
        let name = format!("`intervene` toward the experts of facts, `lambda` {lambda}");
        all.push(Setting { table: "routing", name, way: Way::Steer(lambda) });
    }
    let weak = json!({ "routing": { "type": "top_k", "k": 1 } });
    let shallow = json!({ "layers": format!("0-{}", layers.saturating_sub(2)) });
    let mut decode = |name: &str, config: Value, others: Vec<Value>| {
        all.push(Setting { table: "decoding", name: name.into(), way: Way::Decode { config, others } });
    };
    decode("`plain`", json!({ "type": "plain" }), vec![]);
    for (of, draft) in [("one expert per token", &weak), ("all but the last layer", &shallow)] {
        for tokens in [2, 4] {
            let name = format!("`speculative`, {tokens} tokens by {of}");
            decode(&name, json!({ "type": "speculative", "tokens": tokens }), vec![draft.clone()]);
        }
        decode(&format!("`contrastive` against {of}"), json!({ "type": "contrastive" }), vec![draft.clone()]);
    }
    decode("`self_contrast`, the third expert", json!({ "type": "self_contrast" }), vec![]);
    let rewiring = json!({ "type": "rewiring", "every": 16 });
    decode("`rewiring`, every 16 tokens", rewiring, vec![]);
    decode("`pathways`, kernel of 3 neighbors", json!({ "type": "pathways" }), vec![]);
    decode("`self_contrast`, all that weigh enough", json!({ "type": "self_contrast", "weak": skip }), vec![]);
    let ranks = json!({ "type": "ranks", "ranks": (top_k..2 * top_k).collect::<Vec<_>>() });
    decode("`self_contrast`, the next experts", json!({ "type": "self_contrast", "weak": ranks }), vec![]);
    all
}

//! The targets.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use moe_checkpoint::{
    Checkpoint, Denominator, Granularity, LayerScores, ModelConfig, MoeLayerShape, MoeShape, Pool, ProtectionMask,
    Provenance, Record, SafetensorsFile, ScoreTable, Statistics, WholeScores,
};
use moe_data::{ChatTemplate, Conversation, Reading, Row, Rows, Tokenizer};
use moe_importance::ScorerConfig;
use moe_peft::lora::Maps;
use moe_peft::{codec, peft_files};
use moe_prune::{DistortionCurves, Edits, PrunePlan, Pruner, PrunerConfig};
use serde_json::{Map, Value, json};

use crate::{Target, root, scratch};

/// All targets.
pub const TARGETS: &[Target] = &[
    Target {
        name: "header",
        run: header,
        corpus: &["adapter_model.safetensors", "/expected.safetensors"],
        seeds: &[],
        made: nothing,
    },
    Target { name: "index", run: index, corpus: &["model.safetensors.index.json"], seeds: &[INDEX], made: nothing },
    Target {
        name: "config",
        run: config,
        corpus: &["/config.json", "config.hub.json", "hf_quant_config.json"],
        seeds: &["{}", r#"{"model_type": "mixtral"}"#],
        made: nothing,
    },
    Target {
        name: "tokenizer_config",
        run: tokenizer_config,
        corpus: &["tokenizer_config.json", "special_tokens_map.json"],
        seeds: &["{}", r#"{"eos_token": {"content": "</s>", "lstrip": false}, "chat_template": "{{ messages }}"}"#],
        made: nothing,
    },
    Target { name: "template", run: template, corpus: &[".jinja"], seeds: TEMPLATES, made: nothing },
    Target { name: "rows", run: rows, corpus: &[".jsonl"], seeds: ROWS, made: nothing },
    Target { name: "scores", run: scores, corpus: &[], seeds: &[], made: made_scores },
    Target { name: "statistics", run: statistics, corpus: &[], seeds: &[], made: made_statistics },
    Target { name: "plans", run: plans, corpus: &["plan.json"], seeds: PLANS, made: nothing },
    Target { name: "edits", run: edits, corpus: &["edits.safetensors"], seeds: &[], made: nothing },
    Target { name: "recipes", run: recipes, corpus: &["crates/moe/recipes/"], seeds: RECIPES, made: nothing },
    Target {
        name: "methods",
        run: methods,
        corpus: &[],
        seeds: &[
            r#"{"type": "fisher", "criterion": "abs"}"#,
            r#"{"type": "units", "of": {"type": "reap"}, "tie_breaker": {"type": "heapr"}}"#,
            r#"{"type": "unit", "allocator": {"type": "normalized", "by": "coverage"}, "limits": {"round_to": 8}}"#,
            r#"{"type": "two_level", "reduction": {"top": 3}}"#,
        ],
        made: nothing,
    },
    Target { name: "adapter_config", run: adapter_config, corpus: &["adapter_config.json"], seeds: &[], made: nothing },
    Target { name: "adapter", run: adapter, corpus: &["adapter_model.safetensors"], seeds: &[], made: nothing },
    Target { name: "delta", run: delta, corpus: &[".delta", ".mdelta"], seeds: &[], made: nothing },
    Target {
        name: "record",
        run: record,
        corpus: &["moe_record.json", "protect.json"],
        seeds: &[r#"[{"layer":1,"expert":68},{"layer":2,"expert":3,"units":[17]}]"#],
        made: nothing,
    },
];

const INDEX: &str = r#"{"metadata": {"total_size": 8}, "weight_map": {"lm_head.weight": "model.safetensors"}}"#;

const TEMPLATES: &[&str] = &[
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}",
    "{{ bos_token }}{% set ns = namespace(i=0) %}{% for m in messages[::-1] %}{{ m | tojson(indent=2) }}{% endfor %}",
    "{%- macro f(x, y=3) %}{{ x.split('/')[-1].upper() }}{% endmacro -%}{{ f('a/b') }}{{ strftime_now('%d %b %Y') }}",
    "{{ raise_exception('no') }}{{ 'x'.startswith('y') }}{{ range(3) | list | join(', ') }}",
];

const ROWS: &[&str] = &[
    r#"{"text": "a"}"#,
    r#"{"prompt": "a", "completion": "b"}"#,
    r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]}"#,
    r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#,
    r#"{"instruction": "a", "input": "b", "output": "c", "history": [["a", "b"]]}"#,
    r#"{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}"#,
    "[\n{\"text\": \"a\"},\n{\"text\": \"b\"}]\n",
    "\u{feff}{\"text\": \"a\"}\r\n\r\n{\"text\": null}",
];

const PLANS: &[&str] = &[
    r#"{"version":2,"model":"m","shape":{"gateless":false,"hidden_size":4,"top_k":1,"layers":[{"layer":0,"widths":[2,2]}]},"ratio":{"asked":0.5,"achieved":0.5},"recipe":{},"kept":[{"layer":0,"experts":[[0,1],[]],"removed":[1]}]}"#,
];

const RECIPES: &[&str] = &[
    r#"{"model":"m","out":"o","data":{"calibration":["a.jsonl"],"samples":8},"steps":[{"score":{"scorers":["reap"]}},{"prune":{"budget":{"ratio":0.5}}},{"write":{}}]}"#,
    r#"{"grouping": {"type": "retain"}, "combination": {"type": "average"}}"#,
    r#"{"method": {"type": "esft", "threshold": 0.3}, "train": {"clip": 0.5}}"#,
];

fn nothing() -> Vec<Vec<u8>> {
    Vec::new()
}

/// A shape, for files that are made here.
fn shape() -> MoeShape {
    let layer = |layer| MoeLayerShape { layer, widths: vec![3, 2] };
    MoeShape { gateless: false, hidden_size: 4, top_k: 1, layers: vec![layer(0), layer(2)] }
}

/// What a writer leaves in a file.
fn written(name: &str, write: impl Fn(&Path) -> moe_checkpoint::Result<()>) -> Vec<u8> {
    let path = scratch::file(name, &[]);
    write(&path)
        .and_then(|()| fs::read(&path).map_err(|source| moe_checkpoint::Error::Io { path: path.clone(), source }))
        .unwrap_or_else(|error| panic!("{error}"))
}

fn made_scores() -> Vec<Vec<u8>> {
    let table = |granularity, whole: bool| {
        let layers = shape().layers.into_iter().map(|layer| LayerScores {
            layer: layer.layer,
            scores: match granularity {
                Granularity::Unit => layer.widths.iter().map(|width| vec![0.5; *width]).collect(),
                Granularity::Expert => vec![vec![1.0]; layer.widths.len()],
            },
            routed: Some(vec![3, 0]),
            whole: whole.then(|| WholeScores { layer: 1.0, experts: vec![0.5, -0.5] }),
        });
        ScoreTable {
            scorer: r#"{"type":"reap"}"#.into(),
            granularity,
            pool: Pool::Layer,
            additive: None,
            denominator: Denominator::AllTokens,
            layers: layers.collect(),
            provenance: Provenance::new("model", "data", "{}"),
        }
    };
    [(Granularity::Unit, true), (Granularity::Unit, false), (Granularity::Expert, false)]
        .map(|(granularity, whole)| written("made", |path| table(granularity, whole).save(path)))
        .into()
}

fn made_statistics() -> Vec<Vec<u8>> {
    vec![written("made", |path| Statistics::new(&shape(), Provenance::new("model", "data", "{}")).save(path))]
}

/// The bundled model, which adapters and indices are read for.
static MODEL: LazyLock<Checkpoint> = LazyLock::new(|| {
    let path = root().join("examples/assets/tiny-moe");
    Checkpoint::open(&path).unwrap_or_else(|error| panic!("{error}"))
});

fn header(data: &[u8]) {
    let path = scratch::file("header.safetensors", data);
    let Ok(file) = SafetensorsFile::open(path) else { return };
    for tensor in file.tensors() {
        let bytes = file.bytes(&tensor.name).map(<[u8]>::len);
        assert!(bytes.is_ok(), "a tensor that is listed is there");
    }
}

fn index(data: &[u8]) {
    let config = root().join("examples/assets/tiny-moe/config.json");
    let read = fs::read(&config).unwrap_or_else(|error| panic!("{}: {error}", config.display()));
    scratch::file("index/config.json", &read);
    let path = scratch::file("index/model.safetensors.index.json", data);
    let _ = path.parent().map(Checkpoint::open);
}

fn config(data: &[u8]) {
    let Ok(value) = serde_json::from_slice::<Value>(data) else { return };
    let _ = ModelConfig::from_json(&value, None);
    let _ = ModelConfig::from_json(&json!({}), Some(&value));
}

fn tokenizer_config(data: &[u8]) {
    /// The smallest tokenizer that has what a config may speak of.
    const TOKENIZER: &str = r#"{"version":"1.0","added_tokens":[{"id":0,"content":"</s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":null,"pre_tokenizer":null,"post_processor":null,"decoder":null,"model":{"type":"WordLevel","vocab":{"</s>":0,"a":1,"<unk>":2},"unk_token":"<unk>"}}"#;
    scratch::file("tokenizer/tokenizer.json", TOKENIZER.as_bytes());
    let path = scratch::file("tokenizer/tokenizer_config.json", data);
    let Some(Ok(tokenizer)) = path.parent().map(Tokenizer::from_dir) else { return };
    let messages = [json!({"role": "user", "content": "a"})];
    let _ = tokenizer.render_chat(Conversation::new(&messages), true);
    let _ = tokenizer.encode("a a");
}

fn template(data: &[u8]) {
    let Ok(source) = std::str::from_utf8(data) else { return };
    let tokens = Map::from_iter([("bos_token".to_string(), json!("<s>")), ("eos_token".to_string(), json!("</s>"))]);
    let Ok(template) = ChatTemplate::new(source.to_string(), tokens) else { return };
    let messages = [
        json!({"role": "system", "content": "Be brief."}),
        json!({"role": "user", "content": "What is 2 + 2?"}),
        json!({"role": "assistant", "content": "4", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1.5}}}]}),
    ];
    let template = template.at_time(1_700_000_000);
    let _ = template.render(Conversation::new(&messages), true);
    let _ = template.render_turns(Conversation::new(&messages));
}

fn rows(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = Row::parse(text);
    }
    for name in ["rows.jsonl", "rows.json.gz", "rows.txt"] {
        let path = scratch::file(name, data);
        for skip_bad_rows in [false, true] {
            let reading = Reading { skip_bad_rows, ..Reading::default() };
            if let Ok(rows) = Rows::open(&path, &reading) {
                rows.take(1000).take_while(|row| skip_bad_rows || row.is_ok()).for_each(drop);
            }
        }
    }
}

fn scores(data: &[u8]) {
    let Ok(table) = ScoreTable::load(scratch::file("scores.safetensors", data)) else { return };
    let _ = table.never_routed();
    let _ = table.to_experts(moe_checkpoint::Reduction::Mean);
    let again = scratch::file("again.safetensors", &[]);
    table.save(&again).unwrap_or_else(|error| panic!("what was read can be written: {error}"));
    assert!(ScoreTable::load(&again).is_ok_and(|read| read == table), "what was written is what was read");
}

fn statistics(data: &[u8]) {
    let Ok(read) = Statistics::load(scratch::file("statistics.safetensors", data)) else { return };
    let _ = read.ids().count();
    let mut folded = read.clone();
    let _ = folded.fold(&read);
}

fn plans(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(plan) = PrunePlan::from_json(text) {
        let _ = (plan.pruned_shape(), plan.top_k_clamp(), plan.units_kept());
        let _ = plan.to_json();
        let _ = plan.then(&PrunePlan::keep_all(&plan.pruned_shape(), "m"));
    }
    let _ = moe_merge::MergePlan::from_json(text);
    let _ = DistortionCurves::load(scratch::file("curves.json", data));
}

fn edits(data: &[u8]) {
    let plan = PrunePlan::keep_all(MODEL.shape(), MODEL.fingerprint());
    let _ = Edits::load(scratch::file("edits.safetensors", data), &plan);
}

fn recipes(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(recipe) = serde_json::from_str::<moe::recipe::Recipe>(text) {
        let again = serde_json::to_string(&recipe).unwrap_or_else(|error| panic!("{error}"));
        let read =
            serde_json::from_str::<moe::recipe::Recipe>(&again).unwrap_or_else(|error| panic!("{again}: {error}"));
        assert_eq!(read, recipe, "{again}");
    }
    let _ = moe_merge::Recipe::from_json(text);
    let _ = serde_json::from_str::<moe_peft::Recipe>(text);
    let _ = serde_json::from_str::<moe_peft::MethodConfig>(text);
}

fn methods(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(config) = serde_json::from_str::<ScorerConfig>(text)
        && let Ok(scorer) = config.build()
    {
        let (_, recipe) = (scorer.needs(), scorer.recipe().to_string());
        let read = serde_json::from_str::<ScorerConfig>(&recipe);
        assert!(read.is_ok_and(|read| read == config), "{recipe}");
    }
    if let Ok(pruner) = serde_json::from_str::<PrunerConfig>(text) {
        let (_, recipe) = (pruner.needs(), pruner.recipe().to_string());
        let read = serde_json::from_str::<PrunerConfig>(&recipe);
        assert!(read.is_ok_and(|read| read == pruner), "{recipe}");
    }
}

fn adapter_config(data: &[u8]) {
    let path = scratch::file("peft/adapter_config.json", data);
    if let Ok(config) = peft_files::AdapterConfig::load(&path) {
        let _ = config.method();
    }
    let weights = first_of("crates/moe-peft/tests/fixtures/peft/lora_experts/adapter_model.safetensors");
    scratch::file("peft/adapter_model.safetensors", &weights);
    let _ = path.parent().map(|dir| peft_files::read(dir, &Maps::new(&MODEL), Default::default()));
}

fn adapter(data: &[u8]) {
    let config = first_of("crates/moe-peft/tests/fixtures/peft/lora_experts/adapter_config.json");
    scratch::file("adapter/adapter_config.json", &config);
    let path = scratch::file("adapter/adapter_model.safetensors", data);
    let _ = path.parent().map(|dir| peft_files::read(dir, &Maps::new(&MODEL), Default::default()));
}

fn delta(data: &[u8]) {
    let _ = codec::Delta::open(scratch::file("delta", data));
}

fn record(data: &[u8]) {
    let path = scratch::file("record/moe_record.json", data);
    let _ = path.parent().map(Record::load);
    let _ = serde_json::from_slice::<ProtectionMask>(data);
}

/// A file of the repository.
fn first_of(path: &str) -> Vec<u8> {
    let path: &Path = &root().join(path);
    fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

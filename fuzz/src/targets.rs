//! The targets.

use std::sync::LazyLock;

use moe_checkpoint::{Checkpoint, ModelConfig, ProtectionMask, Record, SafetensorsFile, ScoreTable, Statistics};
use moe_data::{ChatTemplate, Conversation, Reading, Row, Rows, Tokenizer};
use moe_importance::ScorerConfig;
use moe_peft::{codec, peft_files};
use moe_prune::{DistortionCurves, Edits, PrunePlan, Pruner, PrunerConfig};
use serde_json::{Map, Value, json};

use crate::made::{self, MAPS, PLAN};
use crate::{Target, scratch};

/// All targets.
pub const TARGETS: &[Target] = &[
    Target {
        name: "header",
        run: header,
        corpus: &["adapter_model.safetensors", "/expected.safetensors"],
        seeds: &[],
        made: made::headers,
    },
    Target {
        name: "index",
        run: index,
        corpus: &["model.safetensors.index.json"],
        seeds: &[INDEX],
        made: made::indices,
    },
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
    Target { name: "scores", run: scores, corpus: &[], seeds: &[], made: made::scores },
    Target { name: "statistics", run: statistics, corpus: &[], seeds: &[], made: made::statistics },
    Target { name: "plans", run: plans, corpus: &["plan.json"], seeds: PLANS, made: nothing },
    Target { name: "edits", run: edits, corpus: &["edits.safetensors"], seeds: &[], made: made::edits },
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
    Target { name: "adapter", run: adapter, corpus: &["adapter_model.safetensors"], seeds: &[], made: made::adapters },
    Target { name: "delta", run: delta, corpus: &[".delta", ".mdelta"], seeds: &[], made: made::deltas },
    Target {
        name: "record",
        run: record,
        corpus: &["moe_record.json", "protect.json"],
        seeds: &[
            r#"[{"layer":1,"expert":68},{"layer":2,"expert":3,"units":[17]}]"#,
            r#"{"version":1,"steps":[{"method":"prune","crate_version":"0.1.0","base":"b","digest":"d","summary":"s","recipe":{}}]}"#,
        ],
        made: nothing,
    },
];

/// Tensors, rows or elements of one input that are read at most.
const MOST: usize = 1000;

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
    r#"{"version":1,"model":"m","scorer":"{}","granularity":"unit","within":"compete","start":{"mean":0,"worst":0,"overlap":1},"curves":[{"layer":0,"points":[{"dropped":1,"distortion":{"mean":0.1,"worst":0.2,"overlap":0.9}}]}]}"#,
];

const RECIPES: &[&str] = &[
    r#"{"model":"m","out":"o","data":{"calibration":["a.jsonl"],"samples":8},"steps":[{"score":{"scorers":["reap"]}},{"prune":{"budget":{"ratio":0.5}}},{"write":{}}]}"#,
    r#"{"grouping": {"type": "retain"}, "combination": {"type": "average"}}"#,
    r#"{"method": {"type": "esft", "threshold": 0.3}, "train": {"clip": 0.5}}"#,
];

fn nothing() -> Vec<Vec<u8>> {
    Vec::new()
}

fn header(data: &[u8]) {
    let Ok(file) = SafetensorsFile::open(scratch::file("header.safetensors", data)) else { return };
    for tensor in file.tensors().take(MOST) {
        let bytes = file.bytes(&tensor.name).map(<[u8]>::len);
        assert!(bytes.is_ok(), "a tensor that is listed is there");
    }
}

fn index(data: &[u8]) {
    scratch::once("index/config.json", made::model_config);
    scratch::once("index/model.safetensors", made::model_weights);
    let path = scratch::file("index/model.safetensors.index.json", data);
    let _ = path.parent().map(Checkpoint::open);
}

fn config(data: &[u8]) {
    let Ok(value) = serde_json::from_slice::<Value>(data) else { return };
    let _ = ModelConfig::from_json(&value, None);
    let _ = ModelConfig::from_json(&Value::Object(Map::new()), Some(&value));
}

fn tokenizer_config(data: &[u8]) {
    /// The smallest tokenizer that has what a config may speak of.
    const TOKENIZER: &str = r#"{"version":"1.0","added_tokens":[{"id":0,"content":"</s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":null,"pre_tokenizer":null,"post_processor":null,"decoder":null,"model":{"type":"WordLevel","vocab":{"</s>":0,"a":1,"<unk>":2},"unk_token":"<unk>"}}"#;
    scratch::once("tokenizer/tokenizer.json", || TOKENIZER.into());
    let path = scratch::file("tokenizer/tokenizer_config.json", data);
    let Some(Ok(tokenizer)) = path.parent().map(Tokenizer::from_dir) else { return };
    let messages = [json!({"role": "user", "content": "a"})];
    let _ = tokenizer.render_chat(Conversation::new(&messages), true);
    let _ = tokenizer.encode("a a");
}

/// What templates render, and the names of tokens that they may use.
static CHAT: LazyLock<([Value; 3], Map<String, Value>)> = LazyLock::new(|| {
    let call = json!({"function": {"name": "f", "arguments": {"x": 1.5}}});
    let messages = [
        json!({"role": "system", "content": "Be brief."}),
        json!({"role": "user", "content": "What is 2 + 2?"}),
        json!({"role": "assistant", "content": "4", "tool_calls": [call]}),
    ];
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    (messages, tokens.into_iter().map(|(name, token)| (name.to_string(), json!(token))).collect())
});

fn template(data: &[u8]) {
    let Ok(source) = std::str::from_utf8(data) else { return };
    let (messages, tokens) = &*CHAT;
    let Ok(template) = ChatTemplate::new(source.to_string(), tokens.clone()) else { return };
    let template = template.at_time(1_700_000_000);
    // One that refuses the conversation refuses its turns.
    if template.render(Conversation::new(messages), true).is_ok() {
        let _ = template.render_turns(Conversation::new(messages));
    }
}

fn rows(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = Row::parse(text);
    }
    // The first bytes of gzip: anything else ends at once.
    let name = if data.starts_with(&[0x1f, 0x8b]) { "rows.json.gz" } else { "rows.jsonl" };
    let path = scratch::file(name, data);
    for skip_bad_rows in [false, true] {
        let Ok(rows) = Rows::open(&path, &Reading { skip_bad_rows, ..Reading::default() }) else { return };
        let mut all_read = true;
        for row in rows.take(MOST) {
            all_read &= row.is_ok();
            if !all_read && !skip_bad_rows {
                break;
            }
        }
        // Without a bad row there is none to leave out.
        if all_read {
            return;
        }
    }
}

fn scores(data: &[u8]) {
    let Ok(table) = ScoreTable::load(scratch::file("scores.safetensors", data)) else { return };
    let _ = table.never_routed();
    let _ = table.to_experts(moe_checkpoint::Reduction::Mean);
    let again = scratch::place("again.safetensors");
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
    let _ = Edits::load(scratch::file("edits.safetensors", data), &PLAN);
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
    let Ok(config) = peft_files::AdapterConfig::load(&path) else { return };
    let _ = config.method();
    scratch::once("peft/adapter_model.safetensors", || made::adapters().swap_remove(0));
    let _ = path.parent().map(|dir| peft_files::read(dir, &MAPS, Default::default()));
}

fn adapter(data: &[u8]) {
    scratch::once("adapter/adapter_config.json", made::adapter_config);
    let path = scratch::file("adapter/adapter_model.safetensors", data);
    let _ = path.parent().map(|dir| peft_files::read(dir, &MAPS, Default::default()));
}

fn delta(data: &[u8]) {
    let read = |data: &[u8]| {
        let Ok(delta) = codec::Delta::open(scratch::file("delta", data)) else { return };
        if delta.table().elements() <= MOST as u64 {
            let _ = delta.stream(|_, _| Ok(()));
        }
    };
    match with_digest(data) {
        Some(data) => read(&data),
        None => read(data),
    }
}

/// A delta with the digest of the payload that it has, which no change at random finds.
fn with_digest(data: &[u8]) -> Option<Vec<u8>> {
    const PREFIX: usize = 32;
    let begin = u64::from_le_bytes(*data.get(16..)?.first_chunk()?);
    let begin = usize::try_from(begin).ok().filter(|begin| *begin >= PREFIX)?;
    let payload = data.get(PREFIX..begin)?;
    let mut table: Value = serde_json::from_slice(data.get(begin..)?).ok()?;
    let table = table.as_object_mut()?;
    table.insert("payload_bytes".into(), json!(payload.len()));
    table.insert("payload_digest".into(), json!(blake3::hash(payload).to_hex().to_string()));
    let table = serde_json::to_vec(table).ok()?;
    let length = (table.len() as u64).to_le_bytes();
    Some([&data[..24], &length, payload, &table].concat())
}

fn record(data: &[u8]) {
    let path = scratch::file("record/moe_record.json", data);
    let _ = path.parent().map(Record::load);
    let _ = serde_json::from_slice::<ProtectionMask>(data);
}

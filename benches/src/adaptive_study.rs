//! Quality of a trained model under fewer experts, fewer layers and other ways of decoding, without other weights:
//! against the experts per token, the layers that run, and the time.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Parser;
use moe::eval_file::{EvalFile, EvalOptions};
use moe_core::Model;
use moe_core::adaptive::RunTime;
use moe_core::data::{Tokenizer, Wave, WaveOptions};
use moe_core::decode::{Decoding, DecodingConfig};
use moe_core::depth::{LayerChoice, LayerPath};
use serde_json::{Value, json};

use crate::{Error, Result};

/// Measures the bundled model under rules of routing, paths of layers and ways of decoding
#[derive(Clone, Debug, Parser)]
pub struct Arguments {
    /// File for the tables
    #[arg(long, value_name = "FILE", default_value = "out/adaptive-study.md")]
    pub out: PathBuf,
    /// Draws of calibration and evaluation rows
    #[arg(long, default_value_t = 3)]
    pub draws: usize,
    /// Rows of each evaluation file per draw
    #[arg(long, default_value_t = 60)]
    pub rows: usize,
    /// Model directory, with rows in its folder `data`
    #[arg(long, value_name = "DIR", default_value = crate::TINY_MOE)]
    pub model: PathBuf,
}

/// What is measured.
const SETS: [&str; 3] = ["arithmetic", "facts", "prose"];

/// A way to run the model.
enum Way {
    RunTime(Value),
    Drop(LayerChoice),
    Decode { config: Value, others: Vec<Value> },
}

struct Setting {
    table: &'static str,
    name: String,
    way: Way,
}

/// One measurement of a setting.
#[derive(Clone, Debug, Default)]
struct Measured {
    quality: Vec<f64>,
    experts: f64,
    layers: f64,
    seconds: f64,
    acceptance: Option<f64>,
}

fn settings(top_k: usize, layers: usize) -> Vec<Setting> {
    let mut all = Vec::new();
    let mut routing = |name: String, rule: Value| {
        all.push(Setting { table: "routing", name, way: Way::RunTime(json!({ "routing": rule })) });
    };
    for k in (1..=top_k + 2).rev() {
        routing(format!("`top_k` {k}"), json!({ "type": "top_k", "k": k }));
    }
    for mean in [3.0, 2.0] {
        let rule = |mass| json!({ "type": "top_p", "experts": mean, "mass": mass });
        routing(format!("`top_p`, {mean} of its own on average"), rule("trained_top_k"));
        routing(format!("`top_p`, {mean} of all on average"), rule("all_experts"));
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
    for rule in
        [LayerChoice::Influence { layers: 1 }, LayerChoice::Angular { layers: 1 }, LayerChoice::Angular { layers: 2 }]
    {
        let name = serde_json::to_string(&rule).unwrap_or_default();
        all.push(Setting { table: "depth", name: format!("dropped by `{name}`"), way: Way::Drop(rule) });
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
    let ranks = json!({ "type": "ranks", "ranks": (top_k..2 * top_k).collect::<Vec<_>>() });
    decode("`self_contrast`, the next experts", json!({ "type": "self_contrast", "weak": ranks }), vec![]);
    all
}

/// Some lines of a file, beginning anew where it ends.
fn lines(from: &Path, to: &Path, first: usize, count: usize) -> Result<()> {
    let text = std::fs::read_to_string(from).map_err(Error::io(from))?;
    let all: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    if all.is_empty() {
        return Err(Error::Invalid(format!("{}: no rows", from.display())));
    }
    let some: Vec<&str> = (0..count.min(all.len())).map(|i| all[(first + i) % all.len()]).collect();
    std::fs::write(to, some.join("\n") + "\n").map_err(Error::io(to))
}

/// What a draw measures on, and what thresholds are found on.
struct Draw {
    files: Vec<EvalFile>,
    waves: Vec<Wave>,
}

impl Draw {
    fn new(number: usize, arguments: &Arguments, model: &Model, tokenizer: &Tokenizer, dir: &Path) -> Result<Self> {
        let data = arguments.model.join("data");
        let (mut paths, mut rows) = (Vec::new(), Vec::new());
        for set in SETS {
            let path = dir.join(format!("{set}_test.jsonl"));
            lines(&data.join(format!("{set}_test.jsonl")), &path, number * arguments.rows, arguments.rows)?;
            paths.push(path);
            let path = dir.join(format!("{set}_calibration.jsonl"));
            lines(&data.join(format!("{set}_calibration.jsonl")), &path, number * 40, 40)?;
            rows.push(moe::recipe::DataFile::Path(path));
        }
        let options = EvalOptions { rows: arguments.rows, max_new_tokens: 28, ..EvalOptions::default() };
        let files = EvalFile::load_all(&paths, &options, Some(tokenizer), model.config())?;
        let data = moe::recipe::Data { calibration: rows, length: 128, ..moe::recipe::Data::default() };
        let waves = moe::run::Calibration::load(&data, None, Some(tokenizer), model.config().vocab_size)?.waves;
        Ok(Self { files, waves })
    }
}

fn under(model: &Model, options: &Value, waves: &[Wave]) -> Result<Model> {
    let run_time: RunTime =
        serde_json::from_value(options.clone()).map_err(|error| Error::Invalid(format!("{options}: {error}")))?;
    let run_time = run_time.calibrated(model, waves)?;
    let again = Model::new(model.checkpoint().clone(), model.device(), model.max_memory())?;
    Ok(run_time.on(&again)?.unwrap_or(again))
}

fn measure(setting: &Setting, model: &Model, tokenizer: &Tokenizer, draw: &Draw) -> Result<Measured> {
    let mut measured = Measured::default();
    let (mut decoding, mut others) = (DecodingConfig::Plain, Vec::new());
    let model = match &setting.way {
        Way::RunTime(options) => under(model, options, &draw.waves)?,
        Way::Drop(rule) => {
            let seen = rule.measure(model, &draw.waves)?;
            let layers = rule.layers(model.config().layers.len(), seen.as_deref())?;
            let left = moe_checkpoint::LayerDrop::new(layers).on(model.checkpoint())?;
            Model::new(left, model.device(), model.max_memory())?
        }
        Way::Decode { config, others: of } => {
            decoding =
                serde_json::from_value(config.clone()).map_err(|error| Error::Invalid(format!("{config}: {error}")))?;
            for options in of {
                others.push(under(model, options, &draw.waves)?);
            }
            under(model, &json!({}), &draw.waves)?
        }
    };
    let decoding = Decoding::new(decoding, &model, others.iter().collect())?;
    let (mut proposed, mut accepted) = (0, 0);
    for file in &draw.files {
        let start = Instant::now();
        let (value, _, report) = file.measure_with(&model, tokenizer, WaveOptions::default(), &decoding)?;
        measured.seconds += start.elapsed().as_secs_f64();
        measured.quality.push(value);
        (proposed, accepted) = (proposed + report.proposed, accepted + report.accepted);
    }
    measured.experts = model.expert_rows() as f64 / model.routed_tokens().max(1) as f64;
    measured.layers = model.path().length();
    measured.acceptance = (proposed > 0).then(|| f64::from(accepted as u32) / f64::from(proposed as u32));
    Ok(measured)
}

/// Mean and standard deviation.
fn shown(values: impl Iterator<Item = f64> + Clone) -> String {
    let n = values.clone().count().max(1) as f64;
    let mean = values.clone().sum::<f64>() / n;
    let spread = (values.map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0)).sqrt();
    format!("{mean:.3} ± {spread:.3}")
}

/// Measures everything, writes the tables, and gives them.
///
/// # Errors
/// Whatever keeps the model from being opened or run.
pub fn run(arguments: &Arguments) -> Result<String> {
    let device = moe_core::device::device("default")?;
    let model = Model::open(&arguments.model, &device, None)?;
    let tokenizer = Tokenizer::from_dir(&arguments.model)?;
    let scratch = tempfile::tempdir().map_err(Error::io(Path::new("a temporary directory")))?;
    let mut draws = Vec::new();
    for number in 0..arguments.draws.max(1) {
        let dir = scratch.path().join(number.to_string());
        std::fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
        draws.push(Draw::new(number, arguments, &model, &tokenizer, &dir)?);
    }
    let all = settings(model.router().top_k(), model.config().layers.len());
    let mut tables = String::new();
    for table in ["routing", "depth", "decoding"] {
        let keys: Vec<String> = draws[0].files.iter().map(EvalFile::key).collect();
        tables += &format!(
            "<!-- study:adaptive-{table} -->\n\n| | {} | experts per token | layers | seconds |",
            keys.join(" | ")
        );
        tables += if table == "decoding" { " accepted |\n" } else { "\n" };
        tables += &format!("|---|{}--:|--:|--:|", "--:|".repeat(keys.len()));
        tables += if table == "decoding" { "--:|\n" } else { "\n" };
        for setting in all.iter().filter(|setting| setting.table == table) {
            let found =
                draws.iter().map(|draw| measure(setting, &model, &tokenizer, draw)).collect::<Result<Vec<_>>>()?;
            let quality = (0..keys.len()).map(|i| shown(found.iter().map(move |m| m.quality[i])));
            let quality: Vec<String> = quality.collect();
            let experts = found.iter().map(|m| m.experts).sum::<f64>() / found.len() as f64;
            let seconds = found.iter().map(|m| m.seconds).sum::<f64>() / found.len() as f64;
            tables += &format!(
                "| {} | {} | {experts:.2} | {} | {seconds:.2} |",
                setting.name,
                quality.join(" | "),
                found[0].layers
            );
            let accepted: Vec<f64> = found.iter().filter_map(|m| m.acceptance).collect();
            tables += &match (table, accepted.is_empty()) {
                ("decoding", false) => format!(" {} |\n", shown(accepted.iter().copied())),
                ("decoding", true) => " |\n".to_string(),
                _ => "\n".to_string(),
            };
        }
        tables += &format!("\n<!-- /study:adaptive-{table} -->\n\n");
    }
    if let Some(parent) = arguments.out.parent() {
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
    }
    std::fs::write(&arguments.out, &tables).map_err(Error::io(&arguments.out))?;
    Ok(tables)
}

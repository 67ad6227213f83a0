//! Quality of a trained model under fewer experts, fewer layers and other ways of decoding, without other weights:
//! against the experts per token, the layers that run, and the time.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Parser;
use moe::eval_file::{EvalFile, EvalOptions};
use moe::jobs::score;
use moe_checkpoint::BasePrecision;
use moe_core::adaptive::RunTime;
use moe_core::data::{Dataset, LossOver, Tokenizer, Wave, WaveOptions};
use moe_core::decode::{Decoding, DecodingConfig, DecodingReport};
use moe_core::depth::{LayerChoice, LayerPath};
use moe_core::{Engine, EngineOptions, Model};
use moe_importance::scorers::Reap;
use moe_prune::{
    Candidate, EngineProbe, ExpertPruner, MixedPrecision, ProbeOptions, PrunerConfig, Sensitivities, best_allocation,
};
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
    /// What the tables of another model are called: `adaptive-NAME-routing` and so on
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
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
    /// Share of the layers of a model against itself that ran once.
    shared: Option<f64>,
}

fn settings(top_k: usize, layers: usize) -> Vec<Setting> {
    let skip = json!({ "type": "skip", "beta": 0.3 });
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
    for share in [0.1, 0.25] {
        let rule = json!({ "type": "token_skip", "share": share });
        let name = format!("`token_skip`, {share} of all tokens in each layer");
        all.push(Setting { table: "depth", name, way: Way::RunTime(json!({ "layers": rule })) });
    }
    for rule in [
        LayerChoice::AttentionRank { layers: 1 },
        LayerChoice::Influence { layers: 1 },
        LayerChoice::Angular { layers: 1 },
        LayerChoice::Angular { layers: 2 },
    ] {
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
    let rewiring = json!({ "type": "rewiring", "every": 16 });
    decode("`rewiring`, every 16 tokens", rewiring, vec![]);
    decode("`pathways`, kernel of 3 neighbors", json!({ "type": "pathways" }), vec![]);
    decode("`self_contrast`, all that weigh enough", json!({ "type": "self_contrast", "weak": skip }), vec![]);
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
    /// Rows of facts and sums with their answers, which references are found on.
    answers: Vec<Wave>,
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
        let load = |calibration, loss| {
            let data = moe::recipe::Data { calibration, length: 128, loss, ..moe::recipe::Data::default() };
            moe::run::Calibration::load(&data, None, Some(tokenizer), model.config().vocab_size)
        };
        let answered = rows.iter().filter(|file| !file.path().ends_with("prose_calibration.jsonl")).cloned().collect();
        let answers = load(answered, LossOver::Completions)?.waves;
        Ok(Self { files, waves: load(rows, LossOver::All)?.waves, answers })
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
            decoding = decoding.calibrated(model, &draw.answers)?;
            for options in of {
                others.push(under(model, options, &draw.waves)?);
            }
            under(model, &json!({}), &draw.waves)?
        }
    };
    let decoding = Decoding::new(decoding, &model, others.iter().collect())?;
    let mut did = DecodingReport::default();
    for file in &draw.files {
        let start = Instant::now();
        let (value, _, report) = file.measure_with(&model, tokenizer, WaveOptions::default(), &decoding)?;
        measured.seconds += start.elapsed().as_secs_f64();
        measured.quality.push(value);
        did.add(&report);
    }
    measured.experts = model.expert_rows() as f64 / model.routed_tokens().max(1) as f64;
    measured.layers = model.path().length();
    (measured.acceptance, measured.shared) = (did.acceptance(), did.shared());
    Ok(measured)
}

/// What competes for a budget of bytes before experts are rounded.
const CANDIDATES: [&str; 5] = [
    r#"{"type": "whole"}"#,
    r#"{"type": "pruned", "pruner": {"type": "expert"}, "ratio": 0.25}"#,
    r#"{"type": "pruned", "pruner": {"type": "expert"}, "ratio": 0.5}"#,
    r#"{"type": "layers", "choice": {"type": "influence", "layers": 1}}"#,
    r#"{"type": "layers", "choice": {"type": "influence", "layers": 2}}"#,
];

/// Layers, experts and bits in one budget: the divergence that each candidate is predicted to have within so many
/// bytes, in how many draws it is the best.
fn budget_table(named: &str, model: &Model, draws: &[Draw]) -> Result<String> {
    let formats = [BasePrecision::Int4, BasePrecision::Int8].map(|precision| precision.format(model.checkpoint()));
    let how = MixedPrecision::new(formats.into());
    // by draw and candidate
    let mut found: Vec<Vec<Sensitivities>> = Vec::new();
    let mut names = Vec::new();
    for draw in draws {
        let engine = Engine::new(model, EngineOptions::default());
        let probe = EngineProbe::new(&engine, draw.waves.clone(), ProbeOptions::default())?;
        let sequences = draw.waves.iter().flat_map(|wave| wave.sequences.clone()).collect();
        let scores = score(model, &Dataset::from_sequences(sequences), &Reap::default())?;
        let mut of_draw = Vec::new();
        names.clear();
        for json in CANDIDATES {
            let mut candidate: Candidate =
                serde_json::from_str(json).map_err(|error| Error::Invalid(format!("{json}: {error}")))?;
            if let Candidate::Pruned { pruner, .. } = &mut candidate {
                *pruner = PrunerConfig::Expert(ExpertPruner::new().for_routing(&model.config().routing));
            }
            let made = candidate.on(model, Some(&scores), &draw.waves)?;
            let made = Model::new(made, model.device(), model.max_memory())?;
            of_draw.push(how.measure(&made, &probe, &mut |_, _| ())?);
            names.push(candidate.to_string());
        }
        found.push(of_draw);
    }
    let whole = model.checkpoint().bytes_on_disk();
    let mut table =
        format!("<!-- study:adaptive-{named}budget -->\n\n| share of the bytes | {} |\n", names.join(" | "));
    table += &format!("|--:|{}\n", "--:|".repeat(names.len()));
    for share in [0.3, 0.35, 0.4, 0.5, 0.6] {
        let bytes = (share * whole as f64) as u64;
        let cell = |candidate: usize| {
            let fits: Option<Vec<f64>> =
                found.iter().map(|of| of[candidate].allocate(bytes).ok().map(|found| found.predicted)).collect();
            let chosen = |of: &&Vec<Sensitivities>| best_allocation(of, bytes).is_some_and(|(i, _)| i == candidate);
            let best = found.iter().filter(chosen).count();
            match fits {
                Some(values) if best > 0 => format!("{}, best of {best}", shown(values.into_iter())),
                Some(values) => shown(values.into_iter()),
                None => "–".into(),
            }
        };
        let cells: Vec<String> = (0..names.len()).map(cell).collect();
        table += &format!("| {share} | {} |\n", cells.join(" | "));
    }
    Ok(table + &format!("\n<!-- /study:adaptive-{named}budget -->\n\n"))
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
    let named = arguments.name.as_ref().map_or(String::new(), |name| format!("{name}-"));
    for table in ["routing", "depth", "decoding"] {
        let keys: Vec<String> = draws[0].files.iter().map(EvalFile::key).collect();
        tables += &format!(
            "<!-- study:adaptive-{named}{table} -->\n\n| | {} | experts per token | layers | seconds |",
            keys.join(" | ")
        );
        tables += if table == "decoding" { " accepted | layers shared |\n" } else { "\n" };
        tables += &format!("|---|{}--:|--:|--:|", "--:|".repeat(keys.len()));
        tables += if table == "decoding" { "--:|--:|\n" } else { "\n" };
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
            if table == "decoding" {
                for of in [|m: &Measured| m.acceptance, |m: &Measured| m.shared] {
                    let shares: Vec<f64> = found.iter().filter_map(of).collect();
                    let cell = if shares.is_empty() { String::new() } else { shown(shares.iter().copied()) };
                    tables += &format!(" {cell} |");
                }
            }
            tables.push('\n');
        }
        tables += &format!("\n<!-- /study:adaptive-{named}{table} -->\n\n");
    }
    tables += &budget_table(&named, &model, &draws)?;
    if let Some(parent) = arguments.out.parent() {
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
    }
    std::fs::write(&arguments.out, &tables).map_err(Error::io(&arguments.out))?;
    Ok(tables)
}

//! Experts of a dense model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use clap::Parser;
use moe_checkpoint::{Checkpoint, Existing, WriteOptions, check_output, write};
use moe_core::Model;
use moe_core::data::{Sequence, Source, Tokenizer, Wave};
use moe_merge::{
    Evidence, EvidenceOptions, PartScale, RouterStart, UpcycleInputs, UpcycleMethod, UpcycleReport, Upcycling,
    collect_evidence,
};
use serde::de::DeserializeOwned;

use crate::{Error, Result, cli};

/// Makes a Mixture of Experts of a dense model (llama, mistral, qwen2, qwen3), or of several
///
/// Copies and parts keep the function of the dense model; train what does not with moe tune.
#[derive(Clone, Debug, Parser)]
#[command(
    after_help = "Examples:\n  moe upcycle --model SmolLM2-135M --method split --experts 8 --shared-width 512 --out OUT\n  \
moe upcycle --model Qwen3-0.6B --method '{\"type\": \"drop\", \"ratio\": 0.5}' --experts 8 --top-k 2 --out OUT\n  \
moe upcycle --model DIR --method '{\"type\": \"cluster\", \"by\": \"activations\"}' --experts 8 --top-k 4 --data rows.jsonl --out OUT\n  \
moe upcycle --model CHAT --method models --from CODE --from MATH --experts 3 --prompts prompts.json --out OUT\n\n\
Methods: copy (noise 0), drop (ratio 0.5), split (copies 1), cluster (by weights or activations), domains (share 0.5; a \
file of --data per expert), ternary (zero false), models (average false).\n\
Routers: zero, random (std 0.02), teacher (ridge 0.01; needs --data)."
)]
pub struct Arguments {
    /// Directory of a dense Hugging Face checkpoint
    #[arg(long)]
    pub model: PathBuf,
    /// What an expert is: copy, drop, split, cluster, domains, ternary or models, or one with its numbers as JSON
    #[arg(long, value_name = "NAME|JSON", value_parser = tagged::<UpcycleMethod>)]
    pub method: UpcycleMethod,
    /// Routed experts per layer
    #[arg(long, value_name = "N", value_parser = cli::at_least(1))]
    pub experts: usize,
    /// Experts per token [default: all parts of one network, or two networks]
    #[arg(long, value_name = "K", value_parser = cli::at_least(1))]
    pub top_k: Option<usize>,
    /// Units of the network that every token runs through
    #[arg(long, value_name = "UNITS", default_value_t = 0)]
    pub shared_width: usize,
    /// What routers begin with: zero, random or teacher, or one with its numbers as JSON [default: zero where all
    /// experts run, teacher where there is --data and experts are parts, else random]
    #[arg(long, value_name = "NAME|JSON", value_parser = tagged::<RouterStart>)]
    pub router: Option<RouterStart>,
    /// What the chosen k of N parts are multiplied by: mean for N / k, sum for 1
    #[arg(long, value_name = "NAME", value_parser = named::<PartScale>, default_value = "mean")]
    pub scale: PartScale,
    /// Seed of what is drawn: noise, redrawn units, routers, clusters
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub draw: u64,
    /// Another dense model of the same sizes, for the method models; repeatable, an expert each
    #[arg(long, value_name = "DIR")]
    pub from: Vec<PathBuf>,
    /// JSON file with a list of prompts per expert: routers begin with the mean of what each layer reads on them
    #[arg(long, value_name = "FILE", conflicts_with = "router")]
    pub prompts: Option<PathBuf>,
    /// Rows to run the dense model on, for clusters by activations, the teacher, and domains, a file each
    #[command(flatten)]
    pub data: cli::DataArguments,
    /// Tokens of each layer that are kept of them
    #[arg(long, default_value_t = 2048, value_parser = cli::at_least(1))]
    pub sample: usize,
    /// New directory for the model
    #[arg(long)]
    pub out: PathBuf,
    /// Check everything and do nothing
    #[arg(long)]
    pub check: bool,
    /// Memory to stay within, such as 8GiB; never changes results
    #[arg(long, value_parser = cli::bytes)]
    pub max_memory: Option<u64>,
    /// flex (CPU), wgpu, vulkan or cuda, as far as compiled in
    #[arg(long, default_value = "default")]
    pub device: String,
    /// Go on with an output that an earlier run left unfinished
    #[arg(long, conflicts_with = "force")]
    pub resume: bool,
    /// Replace an output that exists
    #[arg(long)]
    pub force: bool,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// A tagged value by its name alone, or as JSON.
fn tagged<T: DeserializeOwned>(text: &str) -> std::result::Result<T, String> {
    let value = match text.trim_start().starts_with('{') {
        true => serde_json::from_str(text).map_err(|error| error.to_string())?,
        false => serde_json::json!({ "type": text }),
    };
    serde_json::from_value(value).map_err(|error| error.to_string())
}

/// A value by its name.
fn named<T: DeserializeOwned>(text: &str) -> std::result::Result<T, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}

/// Checks everything, runs the dense model where that is needed, and writes. `None` if everything was only to be
/// checked.
///
/// # Errors
/// Whatever is wrong with the arguments or the files they name, and whatever stops the run.
pub fn run(arguments: &Arguments) -> Result<Option<UpcycleReport>> {
    let existing = match (arguments.force, arguments.resume) {
        (true, _) => Existing::Force,
        (_, true) => Existing::Resume,
        _ => Existing::Refuse,
    };
    let dense = Arc::new(Checkpoint::open_dense(&arguments.model)?);
    let open = |dir: &PathBuf| Checkpoint::open_dense(dir).map(Arc::new);
    let others = arguments.from.iter().map(open).collect::<moe_checkpoint::Result<Vec<_>>>()?;
    let router = if arguments.prompts.is_some() { Some(RouterStart::Prototypes) } else { arguments.router };
    let recipe = Upcycling {
        method: arguments.method.clone(),
        experts: arguments.experts,
        top_k: arguments.top_k,
        shared_width: arguments.shared_width,
        router,
        scale: arguments.scale,
        seed: arguments.draw,
    };
    let sampled = !arguments.data.data.is_empty();
    let by_domain = matches!(recipe.method, UpcycleMethod::Domains { .. });
    if !sampled && recipe.needs_sample() {
        let reason = "--data FILE: clusters by activations, domains and the teacher look at tokens";
        return Err(Error::Usage(reason.into()));
    }
    let one = Upcycling::one_expert().on(&dense, &UpcycleInputs::default())?.model().clone();
    if sampled && !recipe.needs_sample() && !matches!(recipe.router(true), RouterStart::Teacher { .. }) {
        return Err(Error::Usage("--data: neither this method nor this router looks at tokens".into()));
    }
    let prompts = prompts(arguments)?;
    // Everything that the numbers and the models show, before any token is run.
    let stand_in = UpcycleInputs {
        others: others.clone(),
        evidence: (sampled && !by_domain).then(|| Arc::new(Evidence::none(&one))),
        domains: match by_domain {
            true => arguments.data.data.iter().map(|_| Arc::new(Evidence::none(&one))).collect(),
            false => Vec::new(),
        },
        prototypes: prompts.is_some().then(|| {
            let rows = vec![0.0; recipe.experts * dense.config().hidden_size];
            (0..dense.config().layers.len()).map(|layer| (layer, rows.clone())).collect()
        }),
    };
    let checked = recipe.on(&dense, &stand_in)?;
    check_output(checked.model(), &arguments.out, &WriteOptions { existing, ..WriteOptions::default() })?;
    let runs = sampled || prompts.is_some();
    let tokenizer = match runs && arguments.model.join("tokenizer.json").exists() {
        true => Some(Tokenizer::from_dir(&arguments.model)?),
        false => None,
    };
    let waves = |data: &cli::DataArguments| {
        let rows = data.load(tokenizer.as_ref(), dense.config().vocab_size)?;
        Ok::<_, Error>(rows.waves(data.waves()))
    };
    // The rows of each sample: of each domain, or of all files.
    let samples = match (sampled, by_domain) {
        (true, true) => {
            let of = |file: &Source| waves(&cli::DataArguments { data: vec![file.clone()], ..arguments.data.clone() });
            arguments.data.data.iter().map(of).collect::<Result<Vec<_>>>()?
        }
        (true, false) => vec![waves(&arguments.data)?],
        (false, _) => Vec::new(),
    };
    let prompts = prompts.map(|prompts| tokens(&prompts, tokenizer.as_ref())).transpose()?;
    if arguments.check {
        return Ok(None);
    }
    let mut inputs = UpcycleInputs { others, ..UpcycleInputs::default() };
    if runs {
        let model = Model::new(one, &moe_core::device::device(&arguments.device)?, arguments.max_memory)?;
        let mut evidence = samples.iter().map(|waves| sample(&model, waves, arguments.sample).map(Arc::new));
        match by_domain {
            true => inputs.domains = evidence.collect::<Result<_>>()?,
            false => inputs.evidence = evidence.next().transpose()?,
        }
        inputs.prototypes = prompts.map(|prompts| prototypes(&model, &prompts)).transpose()?;
    }
    let made = recipe.on(&dense, &inputs)?;
    let options = WriteOptions { existing, ..WriteOptions::default() };
    write(made.model(), &arguments.out, &options)?;
    Ok(Some(made.report().clone()))
}

/// The prompts of a file, a list per expert.
fn prompts(arguments: &Arguments) -> Result<Option<Vec<Vec<String>>>> {
    let Some(path) = &arguments.prompts else { return Ok(None) };
    let json = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let prompts: Vec<Vec<String>> = serde_json::from_str(&json).map_err(|error| {
        Error::Invalid(format!("{}: expected a list of prompts per expert: {error}", path.display()))
    })?;
    if prompts.len() != arguments.experts || prompts.iter().any(Vec::is_empty) {
        let counts: Vec<usize> = prompts.iter().map(Vec::len).collect();
        let expected = arguments.experts;
        return Err(Error::Invalid(format!(
            "{}: expected {expected} lists of at least one prompt, found lists of {counts:?}",
            path.display()
        )));
    }
    Ok(Some(prompts))
}

/// The tokens of prompts, a wave per expert.
fn tokens(prompts: &[Vec<String>], tokenizer: Option<&Tokenizer>) -> Result<Vec<Wave>> {
    let tokenizer = tokenizer.ok_or_else(|| Error::Invalid("--prompts: the model has no tokenizer.json".into()))?;
    let mut waves = Vec::with_capacity(prompts.len());
    for (id, prompts) in prompts.iter().enumerate() {
        let ids = prompts.iter().map(|prompt| Ok(Sequence::new(tokenizer.encode(prompt)?)));
        waves.push(Wave { id: id as u64, sequences: ids.collect::<Result<Vec<_>>>()? });
    }
    Ok(waves)
}

fn sample(model: &Model, waves: &[Wave], sample: usize) -> Result<Evidence> {
    let options = EvidenceOptions { statistics: BTreeSet::new(), dense_outputs: false, sample, seed: 0 };
    Ok(collect_evidence(model, waves, &options, None, &mut |_| {})?)
}

/// Directions of experts by layer: the means of what the layer's network reads on the prompts of each, of unit length.
fn prototypes(model: &Model, prompts: &[Wave]) -> Result<BTreeMap<usize, Vec<f32>>> {
    let hidden = model.config().hidden_size;
    let mut rows: BTreeMap<usize, Vec<f32>> = BTreeMap::new();
    for wave in prompts {
        for layer in sample(model, std::slice::from_ref(wave), wave.tokens())?.layers {
            let inputs = layer.sample.map(|sample| sample.inputs).unwrap_or_default();
            let mut mean = vec![0f64; hidden];
            for row in inputs.chunks_exact(hidden) {
                mean.iter_mut().zip(row).for_each(|(mean, value)| *mean += f64::from(*value));
            }
            let length = mean.iter().map(|value| value * value).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
            rows.entry(layer.layer).or_default().extend(mean.iter().map(|value| (value / length) as f32));
        }
    }
    Ok(rows)
}

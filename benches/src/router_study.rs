//! What happens to routing when a model is fine-tuned, and what methods that concern routing do about it.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Parser;
use moe_core::adapters::{ExpertSite, LayerSite, Site};
use moe_core::data::{Dataset, DatasetOptions, EvalSet, LossOver, Tokenizer, Wave, WaveOptions};
use moe_core::evaluate::{EvaluateOptions, evaluate};
use moe_core::router::Routed;
use moe_core::trace::{Nobody, Observer, Signals};
use moe_core::train::{Keep, Schedule, TrainOptions, train};
use moe_core::{Engine, EngineOptions, Model, RoutingOverlay};
use moe_peft::compressed_experts::CompressedExperts;
use moe_peft::condenser::{CondenserCounts, CondenserMode, CondenserOptions, Condensers, Starved, gini};
use moe_peft::dense_mixer::DenseMixer;
use moe_peft::esft::Esft;
use moe_peft::model_weights::OwnWeights;
use moe_peft::{AdapterSet, FineTune, Setting, TuningMethod};

use crate::table::Table;
use crate::{Error, Result, TINY_MOE, cli};

/// Fine-tunes a model in ways that concern its routing, in equal steps on the same waves, and tells what it learnt, how
/// uneven its routing became, and which experts gradients reach.
#[derive(Clone, Debug, Parser)]
#[command(name = "router_study")]
pub struct Arguments {
    /// Directory of a Hugging Face checkpoint [default: the bundled tiny-moe]
    #[arg(long, requires = "train", requires = "test")]
    pub model: Option<PathBuf>,
    /// Rows to train on [default: division of the bundled model]
    #[arg(long)]
    pub train: Option<PathBuf>,
    /// Rows to measure on, in a file named NAME_test.jsonl
    #[arg(long)]
    pub test: Option<PathBuf>,
    /// Steps of each way to train
    #[arg(long, default_value_t = 80, value_parser = cli::at_least(2))]
    pub steps: usize,
    /// Orders of the training data, over which results are averaged
    #[arg(long, default_value_t = 3, value_parser = cli::at_least(1))]
    pub seeds: usize,
    /// Sequences of a step
    #[arg(long, default_value_t = 16, value_parser = cli::at_least(1))]
    pub sequences: usize,
    /// Learning rate
    #[arg(long, default_value_t = 5e-4)]
    pub rate: f64,
    /// What a step adds to or takes from the biases of phase one
    #[arg(long, default_value_t = 0.01)]
    pub bias_speed: f32,
    /// File for the tables as Markdown
    #[arg(long)]
    pub out: Option<PathBuf>,
}

/// A way to train.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Frozen,
    Router,
    Dense,
    BiasOnly,
    Additive,
    Budget,
    Best,
    Compressed,
}

impl Way {
    const ALL: [Self; 8] = [
        Self::Frozen,
        Self::Router,
        Self::Dense,
        Self::BiasOnly,
        Self::Additive,
        Self::Budget,
        Self::Best,
        Self::Compressed,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Frozen => "experts, router frozen",
            Self::Router => "experts and router",
            Self::Dense => "experts and router, DenseMixer",
            Self::BiasOnly => "experts and router, bias of condensers only",
            Self::Additive => "experts and router, 2 condensers, additive",
            Self::Budget => "experts and router, 2 condensers, budget",
            Self::Best => "experts and router, best half of the experts per token",
            Self::Compressed => "experts and router, the other half compressed",
        }
    }

    fn condensers(self) -> Option<CondenserMode> {
        match self {
            Self::BiasOnly | Self::Additive => Some(CondenserMode::Additive),
            Self::Budget => Some(CondenserMode::Budget),
            _ => None,
        }
    }
}

/// Lets only the first experts of each token run.
struct First(usize);

impl RoutingOverlay for First {
    fn routed(&self, _: usize, routed: &mut Routed) {
        for weights in routed.weights.chunks_exact_mut(routed.top_k.max(1)) {
            let first = self.0.min(weights.len());
            weights[first..].fill(0.0);
        }
    }
}

struct Study {
    base: Model,
    tokenizer: Tokenizer,
    waves: Vec<Wave>,
    held_out: Vec<Wave>,
    test: EvalSet,
    steps: usize,
    rate: f64,
    bias_speed: f32,
}

/// What a way to train came to.
struct Outcome {
    values: usize,
    losses: [f64; 2],
    exact: f64,
    /// Experts per token and layer that run.
    experts: f64,
    /// Gini coefficient of routing of each MoE layer.
    gini: Vec<f64>,
}

/// Runs all ways and gives their tables; writes them if a file is named.
///
/// # Errors
/// Files that do not fit, and whatever stops a model.
pub fn run(arguments: &Arguments) -> Result<String> {
    let study = Study::load(arguments)?;
    let mut outcomes = BTreeMap::new();
    for (i, way) in Way::ALL.into_iter().enumerate() {
        let runs = (0..arguments.seeds as u64).map(|seed| study.train(way, seed)).collect::<Result<Vec<_>>>()?;
        outcomes.insert(i, runs);
    }
    let stock = study.gini(&study.base)?;

    let mut losses = Table::new(
        ["trained", "values", "experts per token", "loss before", "loss after", "from", "to", "exact match"],
        1,
    );
    for (i, way) in Way::ALL.into_iter().enumerate() {
        let runs: &Vec<Outcome> = &outcomes[&i];
        let mean = |of: fn(&Outcome) -> f64| runs.iter().map(of).sum::<f64>() / runs.len() as f64;
        let after = runs.iter().map(|run| run.losses[1]);
        losses.row([
            way.name().to_string(),
            runs[0].values.to_string(),
            format!("{:.2}", mean(|run| run.experts)),
            format!("{:.4}", mean(|run| run.losses[0])),
            format!("{:.4}", mean(|run| run.losses[1])),
            format!("{:.4}", after.clone().fold(f64::INFINITY, f64::min)),
            format!("{:.4}", after.fold(0.0, f64::max)),
            format!("{:.3}", mean(|run| run.exact)),
        ]);
    }

    let layers = study.layers();
    let header = ["model".to_string()].into_iter().chain(layers.iter().map(|l| format!("layer {l}")));
    let mut uneven = Table::new(header.chain(["mean".to_string()]), 1);
    let mut add = |name: &str, values: &[f64]| {
        let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
        let cells = values.iter().chain([&mean]).map(|value| format!("{value:.3}"));
        uneven.row([name.to_string()].into_iter().chain(cells));
    };
    add("before training", &stock);
    for (i, way) in Way::ALL.into_iter().enumerate().filter(|(_, way)| *way != Way::Best && *way != Way::Compressed) {
        let runs = &outcomes[&i];
        let mean = |layer: usize| runs.iter().map(|run| run.gini[layer]).sum::<f64>() / runs.len() as f64;
        add(way.name(), &(0..layers.len()).map(mean).collect::<Vec<_>>());
    }

    let mut reach =
        Table::new(["router gradient", "experts with a gradient", "heard by the router per token", "cosine"], 1);
    study.reach()?.into_iter().for_each(|row| reach.row(row));

    let tables: Vec<String> = [("router-losses", &losses), ("router-gini", &uneven), ("router-reach", &reach)]
        .into_iter()
        .map(|(id, table)| format!("<!-- study:{id} -->\n\n{}\n<!-- /study:{id} -->\n", table.to_markdown()))
        .collect();
    if let Some(path) = &arguments.out {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
        }
        std::fs::write(path, tables.join("\n")).map_err(Error::io(path))?;
    }
    Ok([&losses, &uneven, &reach].map(|table| format!("{}\n", table.to_text())).concat())
}

impl Study {
    fn load(arguments: &Arguments) -> Result<Self> {
        let dir = arguments.model.clone().unwrap_or_else(|| TINY_MOE.into());
        let file = |given: &Option<PathBuf>, name: &str| {
            given.clone().unwrap_or_else(|| Path::new(TINY_MOE).join("data").join(name))
        };
        let base = Model::open(&dir, &moe_core::device::device("default")?, None)?;
        let tokenizer = Tokenizer::from_dir(&dir)?;
        let vocabulary = base.config().vocab_size;
        let load = |path: &Path, samples: usize| {
            let options = DatasetOptions {
                samples: Some(samples),
                length: 512,
                loss: LossOver::Completions,
                ..DatasetOptions::default()
            };
            Dataset::load(path, Some(&tokenizer), vocabulary, &options)
        };
        let test = file(&arguments.test, "division_test.jsonl");
        let trained = load(&file(&arguments.train, "division_train.jsonl"), arguments.steps * arguments.sequences)?;
        let held_out = load(&test, 100)?;
        let count = WaveOptions::Sequences(NonZeroUsize::new(arguments.sequences).unwrap_or(NonZeroUsize::MIN));
        Ok(Self {
            waves: moe_core::data::waves(&trained.sequences, count),
            held_out: moe_core::data::waves(&held_out.sequences, WaveOptions::default()),
            test: EvalSet::load(&test, &tokenizer, vocabulary, Some(100))?,
            base,
            tokenizer,
            steps: arguments.steps,
            rate: arguments.rate,
            bias_speed: arguments.bias_speed,
        })
    }

    fn layers(&self) -> Vec<usize> {
        let config = self.base.config();
        (0..config.layers.len()).filter(|&layer| config.moe(layer).is_some()).collect()
    }

    fn options(&self, steps: usize, seed: u64) -> TrainOptions {
        TrainOptions {
            epochs: steps,
            max_steps: Some(steps),
            schedule: Schedule::constant(self.rate),
            evaluate_every: None,
            keep: Keep::Last,
            seed,
            ..TrainOptions::default()
        }
    }

    fn train(&self, way: Way, seed: u64) -> Result<Outcome> {
        let half = self.base.config().routing.top_k / 2;
        let mut set = AdapterSet::new();
        OwnWeights { experts: true, router: way != Way::Frozen, ..OwnWeights::default() }
            .install(&Setting::new(&self.base), &mut set)?;
        if way == Way::Dense {
            DenseMixer::default().install(&Setting::new(&self.base), &mut set)?;
        }
        if way == Way::Compressed {
            CompressedExperts { auxiliary: half }.install(&Setting::new(&self.base), &mut set)?;
        }
        let options = |mode| CondenserOptions { speed: self.bias_speed, mode, ..CondenserOptions::default() };
        let condensers = way.condensers().map(|mode| Condensers::new(self.base.config(), options(mode)));
        let condensers = condensers.transpose()?.map(Arc::new);
        let base = match &condensers {
            Some(condensers) => {
                condensers.count_in(&mut set);
                condensers.applied_to(&self.base)?
            }
            None if way == Way::Best => {
                let main = self.base.config().routing.top_k - half;
                self.base.with_overlays(None, Some(Arc::new(First(main))))?
            }
            None => self.base.with_overlays(None, None)?,
        };
        let values = set.bank().values();
        let mut task = FineTune::new(&base, Arc::new(set))?.with_evaluation(self.held_out.clone());
        if let Some(condensers) = &condensers {
            task = task.with_hooks(condensers.clone());
        }
        let mut parameters = task.set().bank().parameters()?;
        let before = moe_core::train::TrainingTask::evaluate(&mut task, &mut parameters)?;
        let mut ignore = |_: &moe_core::train::TrainEvent| Ok(());
        match condensers.filter(|_| way != Way::BiasOnly) {
            // half of the steps for each phase
            Some(condensers) => {
                let first = self.steps / 2;
                train(&mut task, &mut parameters, &self.waves, &self.options(first, seed), &mut ignore)?;
                condensers.select(&CondenserCounts::Each(2), Starved::Lowest)?;
                condensers.set_speed(self.bias_speed / 20.0)?;
                let rest = self.options(self.steps - first, seed);
                train(&mut task, &mut parameters, &self.waves, &rest, &mut ignore)?;
            }
            None => {
                train(&mut task, &mut parameters, &self.waves, &self.options(self.steps, seed), &mut ignore)?;
            }
        }
        let after = moe_core::train::TrainingTask::evaluate(&mut task, &mut parameters)?;
        let bank = task.set().bank();
        bank.settle(parameters)?;
        let model = task.model();
        let exact = evaluate(model, &self.tokenizer, &self.test, &EvaluateOptions::default())?.value();
        let gini = self.gini(model)?;
        let rows = model.expert_rows();
        let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
        let mut pairs = 0;
        for wave in &self.held_out {
            pairs += engine.run(wave, &mut Nobody)?.tokens * self.layers().len();
        }
        let experts = (model.expert_rows() - rows) as f64 / pairs.max(1) as f64;
        Ok(Outcome { values, losses: [before, after], exact, experts, gini })
    }

    fn gini(&self, model: &Model) -> Result<Vec<f64>> {
        let used = self.used(model)?;
        Ok(self.layers().iter().map(|layer| gini(&used(*layer))).collect())
    }

    /// Shares of the experts of a layer in its selections.
    fn used(&self, model: &Model) -> Result<impl Fn(usize) -> Vec<f64> + use<>> {
        let scores = Esft::default().scores(moe_importance::Calibration::of_waves(model, &self.held_out))?;
        Ok(move |layer| scores.layer(layer).map(|scores| scores.flat()).unwrap_or_default())
    }

    /// What a single question's gradients reach, by where the router's gradient comes from.
    fn reach(&self) -> Result<Vec<[String; 4]>> {
        struct Trains;
        impl Observer for Trains {
            fn needs(&self) -> Signals {
                Signals::PARAMETERS
            }
        }
        let mut wave = self.waves[0].clone();
        wave.sequences.truncate(1);
        let experts = |layer: usize| self.base.config().moe(layer).map_or(0, |moe| moe.num_experts());
        let k = self.base.config().routing.top_k;
        let mut sparse: Option<Vec<f32>> = None;
        let mut rows = Vec::new();
        for name in ["chosen experts", "all experts: DenseMixer", "chosen experts and 2 condensers"] {
            let mut set = AdapterSet::new();
            OwnWeights { experts: true, router: true, ..OwnWeights::default() }
                .install(&Setting::new(&self.base), &mut set)?;
            let mut base = self.base.with_overlays(None, None)?;
            let mut heard = k as f64;
            if name.contains("DenseMixer") {
                DenseMixer::default().install(&Setting::new(&self.base), &mut set)?;
                heard = experts(self.layers()[0]) as f64;
            }
            if name.contains("condensers") {
                let condensers = Condensers::new(self.base.config(), CondenserOptions::default())?;
                let used = self.used(&self.base)?;
                for layer in self.layers() {
                    condensers.add_usage(layer, &used(layer))?;
                }
                condensers.step();
                condensers.select(&CondenserCounts::Each(2), Starved::Lowest)?;
                base = condensers.applied_to(&self.base)?;
            }
            let set = Arc::new(set);
            let model = base.with_adapters(set.clone())?;
            let options = EngineOptions { loss: true, ..EngineOptions::default() };
            Engine::new(&model, options).run(&wave, &mut Trains)?;
            if name.contains("condensers") {
                let pairs = wave.sequences[0].ids.len() * self.layers().len();
                heard = model.expert_rows() as f64 / pairs as f64;
            }
            let gradient = |site: Site| set.bank().get(&site.path()).map(|live| live.gradient()).unwrap_or_default();
            let (mut reached, mut all, mut router) = (0, 0, Vec::new());
            for layer in self.layers() {
                router.extend(gradient(Site::Layer(layer, LayerSite::Router)));
                for expert in 0..experts(layer) {
                    let of = gradient(Site::Expert { layer, expert, map: ExpertSite::Down });
                    (reached, all) = (reached + usize::from(of.iter().any(|g| *g != 0.0)), all + 1);
                }
            }
            let first = sparse.get_or_insert_with(|| router.clone());
            rows.push([
                name.to_string(),
                format!("{reached} of {all}"),
                format!("{heard:.2}"),
                format!("{:.3}", cosine(first, &router)),
            ]);
        }
        Ok(rows)
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE)
}

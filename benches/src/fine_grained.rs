//! Experts as equal pieces: how many, how many per token, with which factors; the best is written.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use clap::Parser;
use moe_checkpoint::{Checkpoint, Existing, ScoreTable, WriteOptions, check_output, write};
use moe_core::Model;
use moe_core::data::{Dataset, DatasetOptions, EvalSet, Tokenizer, Wave, WaveOptions};
use moe_core::evaluate::{EvaluateOptions, evaluate};
use moe_importance::scorers::{Criterion, Fisher};
use moe_importance::{Calibration, ScorerConfig};
use moe_prune::{
    Budget, Export, FineGrained, Mtp, ProtectionMask, PruneForm, PruneOptions, PrunePlan, Pruner, ScaleFit, Scope,
    TrialOptions, UnitPruner,
};
use serde::Serialize;

use crate::table::Table;
use crate::{Error, Result, TINY_MOE, cli};

/// Prunes the routed experts of a checkpoint and writes what is left as pieces of one width, each an expert of its own,
/// which stock loaders read. Tries numbers of pieces and of pieces per token, and writes the export that stays closest
/// to the model.
#[derive(Clone, Debug, Parser)]
#[command(name = "fine_grained")]
pub struct Arguments {
    /// Directory of a Hugging Face checkpoint [default: the bundled tiny-moe]
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Rows to score and calibrate on: .jsonl or .txt [default: arithmetic of the bundled model]
    #[arg(long)]
    pub calibration: Option<PathBuf>,
    /// Rows to measure on, in a file named NAME_test.jsonl; repeatable
    #[arg(long)]
    pub eval: Vec<PathBuf>,
    /// Fraction of the units to drop
    #[arg(long, default_value_t = 0.5, value_parser = cli::ratio)]
    pub ratio: f64,
    /// Pieces that an expert is cut into; a list with commas
    #[arg(long, value_delimiter = ',', default_values_t = [2, 4], value_parser = cli::at_least(1))]
    pub pieces: Vec<usize>,
    /// Pieces per token, as fractions of the experts per token times the pieces of an expert; a list with commas
    #[arg(long, value_delimiter = ',', default_values_t = [0.5, 0.625, 0.75, 1.0])]
    pub per_token: Vec<f64>,
    /// Factors of experts: a number for all, or whole or kept (fitted to what they give, as a whole or by what is
    /// kept); a list
    #[arg(long, value_delimiter = ',', default_values_t = [Factors::Whole, Factors::Constant(0.75)])]
    pub factors: Vec<Factors>,
    /// Also measure the plain exports: one width for all, and ragged
    #[arg(long)]
    pub controls: bool,
    /// What becomes of layers that predict further tokens, in models that have them: drop or prune
    #[arg(long)]
    pub mtp: Option<Mtp>,
    /// New directory for the best export
    #[arg(long)]
    pub out: PathBuf,
    /// Sequences to calibrate on, at most; half as many more are for the comparison
    #[arg(long, default_value_t = 128, value_parser = cli::at_least(2))]
    pub samples: usize,
    /// Tokens per sequence, at most
    #[arg(long, default_value_t = 2048, value_parser = cli::at_least(2))]
    pub length: usize,
    /// Rows of an evaluation file, at most
    #[arg(long, default_value_t = 200, value_parser = cli::at_least(1))]
    pub eval_rows: usize,
    /// flex (CPU), wgpu, vulkan or cuda, as far as compiled in
    #[arg(long, default_value = "default")]
    pub device: String,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// What the factors of experts are fitted to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Factors {
    /// [`ScaleFit::Whole`].
    Whole,
    /// [`ScaleFit::Kept`].
    Kept,
    /// The same for all.
    Constant(f32),
}

impl fmt::Display for Factors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole => f.write_str("whole"),
            Self::Kept => f.write_str("kept"),
            Self::Constant(value) => write!(f, "{value}"),
        }
    }
}

impl FromStr for Factors {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse::<f32>()) {
            ("whole", _) => Ok(Self::Whole),
            ("kept", _) => Ok(Self::Kept),
            (_, Ok(value)) if value.is_finite() => Ok(Self::Constant(value)),
            _ => Err(format!("found `{text}`, expected a number, whole or kept")),
        }
    }
}

/// One export and what it can do.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What it is.
    pub export: Export,
    /// Pieces of an expert.
    pub pieces: Option<usize>,
    /// Pieces per token.
    pub top_k: Option<usize>,
    /// Its factors.
    pub factors: Option<Factors>,
    /// Smallest, mean and largest factor.
    pub factor_range: Option<[f32; 3]>,
    /// Mean cross-entropy on the comparison data, in nats.
    pub loss: Option<f64>,
    /// Divergence from the model on the comparison data, in nats.
    pub divergence: Option<f64>,
    /// Figures of merit by name.
    pub metrics: Vec<(String, f64)>,
}

/// All exports that were tried.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// In the order tried.
    pub rows: Vec<Row>,
    /// Which of them was written.
    pub best: usize,
    /// Directory of the model that was written.
    pub out: PathBuf,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let metrics = self.rows.iter().flat_map(|row| row.metrics.iter().map(|(name, _)| name.clone()));
        let mut names: Vec<String> = Vec::new();
        metrics.for_each(|name| {
            if !names.contains(&name) {
                names.push(name)
            }
        });
        let header = ["export", "pieces", "per token", "factors", "min", "mean", "max", "loss", "divergence"];
        let mut table = Table::new(header.into_iter().map(String::from).chain(names.clone()), 1);
        let shown = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.4}"));
        for row in &self.rows {
            let count = |value: Option<usize>| value.map_or(String::new(), |value| value.to_string());
            let range = row.factor_range.map(|range| range.map(|value| format!("{value:.3}")));
            let metric = |name: &String| shown(row.metrics.iter().find(|(n, _)| n == name).map(|(_, value)| *value));
            let mut cells = vec![row.export.to_string(), count(row.pieces), count(row.top_k)];
            cells.push(row.factors.map_or(String::new(), |factors| factors.to_string()));
            cells.extend(range.unwrap_or_default());
            cells.extend([shown(row.loss), shown(row.divergence)]);
            cells.extend(names.iter().map(metric));
            table.row(cells);
        }
        writeln!(f, "{}", table.to_text())?;
        let best = &self.rows[self.best];
        let (pieces, top_k) = (best.pieces.unwrap_or_default(), best.top_k.unwrap_or_default());
        writeln!(f, "{}: {pieces} pieces per expert, {top_k} per token", self.out.display())
    }
}

/// The closest export so far.
struct Best<'a> {
    divergence: f64,
    /// Its row in the report.
    row: usize,
    plan: PrunePlan,
    how: FineGrained<'a>,
    scales: Vec<Vec<f32>>,
}

/// Scores, tries, measures and writes.
///
/// # Errors
/// Arguments and files that do not fit, and whatever stops a model.
pub fn run(arguments: &Arguments) -> Result<Report> {
    if arguments.out.exists() {
        return Err(Error::Invalid(format!("{}: exists", arguments.out.display())));
    }
    if let Some(bad) = arguments.per_token.iter().find(|part| !(**part > 0.0 && **part <= 16.0)) {
        return Err(Error::Usage(format!("--per-token {bad}: expected a number above 0")));
    }
    let dir = arguments.model.clone().unwrap_or_else(|| TINY_MOE.into());
    let data = |name: &str| Path::new(TINY_MOE).join("data").join(name);
    let calibration = match (&arguments.calibration, &arguments.model) {
        (Some(path), _) => path.clone(),
        (None, None) => data("arithmetic_calibration.jsonl"),
        (None, Some(_)) => return Err(Error::Usage("--model needs --calibration".into())),
    };
    let device = moe_core::device::device(&arguments.device)?;
    let checkpoint = Arc::new(Checkpoint::open(&dir)?);
    check_output(&checkpoint, &arguments.out, &WriteOptions { existing: Existing::Refuse, ..Default::default() })?;
    // What cannot be, before hours of scoring.
    let mut cuts = Vec::new();
    for &pieces in &arguments.pieces {
        let all = checkpoint.config().routing.top_k * pieces;
        let mut top_k: Vec<usize> =
            arguments.per_token.iter().map(|part| ((all as f64 * part).round() as usize).max(1)).collect();
        top_k.dedup();
        for &top_k in &top_k {
            let how = FineGrained { top_k: Some(top_k), ..FineGrained::new(pieces) };
            how.check(&checkpoint, arguments.ratio)?;
            options(how, arguments.mtp).check(&checkpoint)?;
        }
        cuts.push((pieces, top_k));
    }
    let tokenizer = Tokenizer::from_dir(&dir)?;
    let vocabulary = checkpoint.config().vocab_size;
    let mut evals = arguments.eval.clone();
    if arguments.model.is_none() && evals.is_empty() {
        evals = ["arithmetic_test.jsonl", "facts_test.jsonl"].map(data).into();
    }
    let evals = evals.iter().map(|path| EvalSet::load(path, &tokenizer, vocabulary, Some(arguments.eval_rows)));
    let evals = evals.collect::<std::result::Result<Vec<_>, _>>()?;
    let data_options = DatasetOptions {
        samples: Some(arguments.samples + arguments.samples / 2),
        length: arguments.length,
        ..DatasetOptions::default()
    };
    let data = Dataset::load(&calibration, Some(&tokenizer), vocabulary, &data_options)?;
    let split = data.sequences.len() * 2 / 3;
    let wave_options = WaveOptions::Tokens(NonZeroUsize::new(16384).unwrap_or(NonZeroUsize::MIN));
    let (scored, compared) = data.sequences.split_at(split.max(1));
    if compared.is_empty() {
        return Err(Error::Invalid(format!("{}: fewer than two sequences", calibration.display())));
    }
    let (scored, compared) =
        (moe_core::data::waves(scored, wave_options), moe_core::data::waves(compared, wave_options));
    let model = Model::new(checkpoint.clone(), &device, None)?;
    let scores = score(&model, &scored)?;

    let mut rows = Vec::new();
    let measure = |plan: &PrunePlan, options: &PruneOptions<'_>| -> Result<Vec<(String, f64)>> {
        // Layers that predict further tokens are not run.
        let options = PruneOptions { mtp: Some(Mtp::Drop), ..options.clone() };
        let model = Model::new(plan.on(&checkpoint, &options)?.model().clone(), &device, None)?;
        let options = EvaluateOptions::default();
        let one = |set: &EvalSet| {
            let found = evaluate(&model, &tokenizer, set, &options)?;
            Ok((found.key(), found.value()))
        };
        evals.iter().map(one).collect()
    };
    if arguments.controls {
        for (scope, form) in [(Scope::Expert, PruneForm::Uniform), (Scope::Layer, PruneForm::Ragged)] {
            let plan = UnitPruner::new(scope).prune(
                &scores,
                checkpoint.shape(),
                Budget::Ratio(arguments.ratio),
                &ProtectionMask::none(),
            )?;
            rows.push(Row {
                export: form.export(),
                pieces: None,
                top_k: None,
                factors: None,
                factor_range: None,
                loss: None,
                divergence: None,
                metrics: measure(&plan.plan, &PruneOptions::new(form))?,
            });
        }
    }
    let mut best: Option<Best<'_>> = None;
    for (pieces, top_k) in cuts {
        let how = FineGrained { ranking: Some(&scores), ..FineGrained::new(pieces) };
        let plan =
            FineGrained { top_k: top_k.iter().min().copied(), ..how }.prune(&scores, &checkpoint, arguments.ratio)?;
        for &factors in &arguments.factors {
            let (fit, constant) = match factors {
                Factors::Whole => (Some(ScaleFit::Whole), 1.0),
                Factors::Kept => (Some(ScaleFit::Kept), 1.0),
                Factors::Constant(value) => (None, value),
            };
            let given: Vec<Vec<f32>> =
                checkpoint.shape().layers.iter().map(|layer| vec![constant; layer.num_experts()]).collect();
            let trials = TrialOptions {
                top_k: &top_k,
                fit,
                edits: None,
                calibration: &scored,
                comparison: &compared,
                teacher_tokens: vocabulary.min(256),
            };
            for trial in (FineGrained { scales: Some(&given), ..how }).try_top_k(&model, &plan, &trials)? {
                let how = FineGrained { top_k: Some(trial.top_k), ..how };
                let metrics =
                    measure(&plan, &options(FineGrained { scales: Some(&trial.scales), ..how }, arguments.mtp))?;
                let all = trial.scales.iter().flatten();
                let mean = all.clone().sum::<f32>() / all.clone().count().max(1) as f32;
                let (min, max) = all.fold((f32::MAX, f32::MIN), |(low, high), v| (low.min(*v), high.max(*v)));
                if best.as_ref().is_none_or(|best| trial.divergence < best.divergence) {
                    let (row, plan, scales) = (rows.len(), plan.clone(), trial.scales);
                    best = Some(Best { divergence: trial.divergence, row, plan, how, scales });
                }
                rows.push(Row {
                    export: Export::FineGrained,
                    pieces: Some(pieces),
                    top_k: Some(trial.top_k),
                    factors: Some(factors),
                    factor_range: Some([min, mean, max]),
                    loss: Some(trial.loss),
                    divergence: Some(trial.divergence),
                    metrics,
                });
            }
        }
    }
    let Some(Best { row, plan, how, scales, .. }) = best else {
        return Err(Error::Usage("nothing to try: --pieces, --per-token and --factors name at least one each".into()));
    };
    let pruned = plan.on(&checkpoint, &options(FineGrained { scales: Some(&scales), ..how }, arguments.mtp))?;
    write(pruned.model(), &arguments.out, &WriteOptions::default())?;
    Ok(Report { rows, best: row, out: arguments.out.clone() })
}

/// What is made of a plan.
fn options(how: FineGrained<'_>, mtp: Option<Mtp>) -> PruneOptions<'_> {
    PruneOptions { mtp, ..PruneOptions::new(PruneForm::FineGrained(how)) }
}

/// Fisher scores per token.
fn score(model: &Model, waves: &[Wave]) -> Result<ScoreTable> {
    let scorer = ScorerConfig::from(Fisher::new(Criterion::Token)).build()?;
    let statistics = Calibration::of_waves(model, waves).scorers([&*scorer]).run(&mut |_| {})?;
    Ok(scorer.score(&statistics, model.checkpoint().as_ref())?)
}

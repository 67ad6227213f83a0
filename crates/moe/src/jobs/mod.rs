//! The usual jobs, a function each: what the verbs of the program do to files, done to models in memory.
//!
//! Every function that changes a model gives a [`Model`] again, which can be measured, changed further or written. The
//! crate's page shows them together.
//!
//! The jobs that verbs of the program and steps of recipes share keep what they find in directories, so that they go on
//! where they were stopped: [`Merging`], [`train_parts`], [`quantize_calibrated`], [`train`] and [`save`],
//! [`SavedPlan`].
//!
//! For progress, shards, protection, repairs and budgets that ask the model, take the types behind these functions
//! ([`Calibration`], [`PruneRequest`](moe_prune::PruneRequest), …) or a [`Recipe`](crate::recipe::Recipe).

mod frontier;
mod merging;
mod plans;
mod quantizing;
mod scorer_choice;
pub(crate) mod stock;
mod tuning;

use std::path::{Path, PathBuf};

pub use frontier::{FrontierOptions, frontier};
pub use merging::{Merged, Merging, train_parts};
pub use plans::{SavedPlan, prune_plan};
pub use quantizing::{
    QuantizeCalibration, QuantizeRows, QuantizeWith, QuantizedModel, SmoothingSummary, quantize_calibrated,
    quantize_mixed,
};
pub use scorer_choice::{ScorerChoice, TriedScorer, choose_scorer};
pub use stock::{StockForm, TriedForm, closest_stock_form};
pub use tuning::{save, train, trained_on};

use moe_checkpoint::{Existing, ProtectionMask, ScoreTable};
use moe_core::Model;
use moe_core::data::{Dataset, DatasetOptions, LossOver, Tokenizer, WaveOptions};
use moe_importance::{Calibration, Scorer};
use moe_merge::{EvidenceOptions, MergeOptions, OutputForm, collect_evidence};
use moe_peft::TrainingRun;
use moe_peft::fold::FoldPrecision;
use moe_prune::{Budget, PruneForm, PruneOptions, Pruner};

use crate::eval_file::{EvalFile, EvalOptions};
use crate::run::Measurement;
use crate::{Error, Result};

/// Tokens of each layer that alignments and least squares of merging see.
const SAMPLED_TOKENS: usize = 2048;
/// Steps of training between saved states.
const SAVE_EVERY: usize = 50;

/// The first `samples` rows of a file, as the model's tokenizer and chat template read them: `{"text"}`,
/// `{"prompt", "completion"}`, `{"messages"}` or `{"input_ids"}`.
///
/// # Errors
/// A file that cannot be read as that.
pub fn rows(model: &Model, path: impl AsRef<Path>, samples: usize) -> Result<Dataset> {
    load(model, path.as_ref(), DatasetOptions { samples: Some(samples), ..DatasetOptions::default() })
}

/// Rows to train on: as [`rows`], with the loss over completions alone, which end as the model ends them.
///
/// # Errors
/// A file that cannot be read as that, or whose rows have no completions.
pub fn training_rows(model: &Model, path: impl AsRef<Path>, samples: usize) -> Result<Dataset> {
    let options = DatasetOptions {
        samples: Some(samples),
        loss: LossOver::Completions,
        end_completions: true,
        ..DatasetOptions::default()
    };
    load(model, path.as_ref(), options)
}

fn load(model: &Model, path: &Path, options: DatasetOptions) -> Result<Dataset> {
    let dir = model.checkpoint().dir();
    let tokenizer = match dir.join("tokenizer.json").exists() {
        true => Some(Tokenizer::from_dir(dir)?),
        false => None,
    };
    Ok(Dataset::load(path, tokenizer.as_ref(), model.config().vocab_size, &options)?)
}

/// Scores a model by one pass over `data`. Several scorers from one pass: [`Calibration::scorers`].
///
/// # Errors
/// Whatever stops the pass, or the scorer.
pub fn score(model: &Model, data: &Dataset, scorer: &dyn Scorer) -> Result<ScoreTable> {
    let calibration = Calibration::new(model, data, WaveOptions::default()).scorers([scorer]);
    Ok(scorer.score(&calibration.run(&mut |_| ())?, model.checkpoint().as_ref())?)
}

/// The model with the units or experts dropped that `pruner` chooses. For pruners that need no more than scores.
///
/// # Errors
/// A budget that cannot be met, scores that the pruner cannot use, a form that the outcome cannot have.
pub fn prune(
    model: &Model,
    scores: &ScoreTable,
    pruner: &dyn Pruner,
    budget: Budget,
    form: PruneForm<'_>,
) -> Result<Model> {
    let base = model.checkpoint();
    let budget = budget.resolve_as(base, form == PruneForm::Uniform)?;
    let plan = pruner.prune(scores, base.shape(), budget, &ProtectionMask::none())?.plan;
    let pruned = plan.on(base, &PruneOptions::new(form))?;
    Ok(model.like(pruned.model().clone())?)
}

/// The model with its experts merged by a recipe, on evidence from `data`. For recipes that do not go layer by layer.
///
/// # Errors
/// Parts of the recipe that do not go together or not with the model, one that goes layer by layer, whatever stops the
/// pass.
pub fn merge(model: &Model, data: &Dataset, recipe: &moe_merge::Recipe, form: OutputForm) -> Result<Model> {
    if recipe.sequential {
        let reason = "goes layer by layer: merge_sequentially, or the step merge of a recipe, carries it out";
        return Err(Error::Usage(format!("recipe `{}` {reason}", recipe.name)));
    }
    let base = model.checkpoint();
    recipe.check(base, form, None)?;
    let waves = data.waves(WaveOptions::default());
    let options = EvidenceOptions::for_recipe(recipe, SAMPLED_TOKENS);
    let evidence = collect_evidence(model, &waves, &options, None, &mut |_| ())?;
    let plan = recipe.plan(base, &evidence, &ProtectionMask::none())?;
    let options = MergeOptions { evidence: Some(evidence.into()), ..MergeOptions::new(form) };
    Ok(model.like(plan.on(base, &options)?.model().clone())?)
}

/// Fine-tunes a model by a recipe, in waves of `step_tokens` tokens, and saves into `directory` what came of it: the
/// model with what was trained in its weights, the adapter, the states to go on from. Gives the folder of the model.
///
/// # Errors
/// A method that does not suit the model, whatever stops the training, a method whose outcome no weight can hold.
pub fn tune(
    model: &Model,
    data: &Dataset,
    recipe: &moe_peft::Recipe,
    step_tokens: usize,
    directory: impl AsRef<Path>,
) -> Result<PathBuf> {
    let directory = directory.as_ref();
    let Some(step_tokens) = std::num::NonZeroUsize::new(step_tokens) else {
        return Err(Error::Usage("step_tokens: found 0, expected at least 1".into()));
    };
    std::fs::create_dir_all(directory).map_err(Error::io(directory))?;
    let waves = data.waves(WaveOptions::Tokens(step_tokens));
    let labels = data.labels_of(&waves);
    let run = TrainingRun {
        model,
        waves: &waves,
        labels: &labels,
        directory,
        save_every: SAVE_EVERY,
        resume: false,
        fold: FoldPrecision::Bf16,
    };
    let saved = run.train(recipe, &mut |_| Ok(()))?.save(model, directory, Existing::Refuse)?;
    saved.model.ok_or_else(|| Error::Invalid("what was trained stays beside the weights, in the adapter".into()))
}

/// What a model can do on rows of a file named `NAME_test.jsonl`: perplexity of text, share of exact answers, share of
/// right choices. `tokenizer` is the directory of the tokenizer, since a model that was made in memory may have none.
///
/// # Errors
/// A file that cannot be read as that; whatever stops the model.
pub fn measure(
    model: &Model,
    tokenizer: impl AsRef<Path>,
    path: impl AsRef<Path>,
    options: &EvalOptions,
) -> Result<Measurement> {
    let tokenizer = Tokenizer::from_dir(tokenizer)?;
    let files = EvalFile::load_all(&[path.as_ref().to_path_buf()], options, Some(&tokenizer), model.config())?;
    let file = &files[0];
    let (value, _) = file.measure(model, &tokenizer, WaveOptions::default())?;
    Ok(Measurement { key: file.key(), value })
}

//! Training in a directory that keeps its states: what `moe tune` and the step `tune` carry out.

use std::sync::Arc;

use burn::tensor::Device;
use moe_checkpoint::group::Group;
use moe_checkpoint::{BasePrecision, Checkpoint, Existing, write_atomic, write_json};
use moe_core::Model;
use moe_core::train::TrainEvent;
use moe_peft::{Recipe, RunEvent, SavedPaths, Trained, TrainingRun};

use crate::progress::{Progress, Unit};
use crate::{Error, Result};

/// The model as it is trained on: rounded to a precision if one is asked for, and, if it is quantized, packed in memory
/// and decoded wherever it is used.
///
/// # Errors
/// Widths that the precision cannot divide, weights that cannot be read.
pub fn trained_on(
    checkpoint: &Arc<Checkpoint>,
    precision: Option<BasePrecision>,
    device: &Device,
    max_memory: Option<u64>,
) -> Result<Model> {
    let base = match precision {
        Some(precision) => precision.on(checkpoint)?.model().clone(),
        None => checkpoint.packed_in_memory()?,
    };
    let packed = base.quantization().is_some();
    let model = Model::new(base, device, max_memory)?;
    Ok(if packed { model.with_weights_decoded_per_use() } else { model })
}

/// Trains by a recipe, called `name`, with the other ranks of a group, and shows how far it is. The directory of the
/// run gets `trainable.txt`, a table of what is trained, which is also shown if `told`; warnings always are.
///
/// # Errors
/// What is wrong with the recipe for this model and these rows, before anything runs; whatever stops the training.
pub fn train(
    run: &TrainingRun<'_>,
    recipe: &Recipe,
    name: &str,
    told: bool,
    group: &dyn Group,
    progress: Progress,
) -> Result<Trained> {
    let mut bar = None;
    let trained = run.train_in_group(group, recipe, &mut |event| {
        match event {
            RunEvent::Begins { phase, trainable } => {
                write_atomic(run.directory.join("trainable.txt"), trainable.to_string().as_bytes())?;
                match told {
                    true => progress.say(&trainable.to_string()),
                    false => trainable.warnings.iter().for_each(|warning| progress.say(&format!("{name}: {warning}"))),
                }
                bar = Some(progress.bar(format!("{name}, {}", phase.name), phase.steps as u64, Unit::Count("steps")));
            }
            RunEvent::Train { event: TrainEvent::Step { step, loss, .. }, .. } => {
                if let Some(bar) = &bar {
                    bar.at(*step as u64);
                    bar.label(format!("{name}: loss {loss:.3}"));
                }
            }
            RunEvent::Train { .. } => {}
        }
        Ok(())
    })?;
    Ok(trained)
}

/// Saves what was trained into the directory of its run: the model with it in its weights, the adapter, the recipe, and
/// what it cost.
///
/// # Errors
/// What no weight can hold and no file of adapters, files that cannot be written.
pub fn save(run: &TrainingRun<'_>, recipe: &Recipe, trained: &Trained) -> Result<SavedPaths> {
    let saved = trained.save(run.model, run.directory, Existing::Force)?;
    let json = |value: serde_json::Result<serde_json::Value>| value.map_err(|error| Error::Invalid(error.to_string()));
    write_json(&run.directory.join("recipe.json"), &json(serde_json::to_value(recipe))?)?;
    write_json(&run.directory.join("training.json"), &json(serde_json::to_value(&trained.cost))?)?;
    Ok(saved)
}

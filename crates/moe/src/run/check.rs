//! Everything that can be wrong before work.

use std::sync::Arc;

use moe_checkpoint::{
    Checkpoint, Existing, ExpertBiases, Granularity, ProtectionMask, ScoreTable, WriteOptions, check_output,
};
use moe_core::data::{Tokenizer, Wave, WaveOptions};
use moe_core::trace::Signals;
use moe_core::{Engine, EngineOptions, Model};
use moe_importance::StatisticId;
use moe_peft::MethodConfig;
use moe_prune::repair::RepairRequest;
use moe_prune::{Budget, Mtp, PruneForm, PruneOptions, PrunePlan, Pruner, Questions};

use super::artifacts::Artifacts;
use super::chain::{Chain, Scored};
use super::disk::Disk;
use super::{Calibration, Run, RunOptions};
use crate::eval_file::EvalFile;
use crate::jobs::Merging;
use crate::recipe::{Form, Protect, Prune, Recipe, Step};
use crate::{Error, Result, format};

/// The steps as far as the recipe alone tells: what stands before each.
#[derive(Default)]
struct Before {
    scored: Vec<Scored>,
    super_experts: bool,
    pruned: Option<Form>,
    merged: bool,
    tuned: bool,
    /// Whether something stays beside the weights, which no step that changes experts could take along.
    beside: bool,
    /// Whether the model is run in another way than its config says.
    adapted: bool,
    /// Whether that is a mixture, which the next stage of its training may start from.
    mixture: bool,
}

impl Before {
    /// Whether the model is the one that the recipe begins with.
    fn unchanged(&self) -> bool {
        self.pruned.is_none() && !self.merged && !self.tuned
    }
}

/// A run of which everything that can be known has been checked.
pub(crate) fn checked<'a>(recipe: &'a Recipe, options: RunOptions<'a>) -> Result<Run<'a>> {
    if recipe.steps.is_empty() {
        return Err(Error::Usage("steps: a recipe needs at least one".into()));
    }
    for (field, path) in [("model", &recipe.model), ("out", &recipe.out)] {
        if path.as_os_str().is_empty() {
            return Err(Error::Usage(format!("{field}: missing, expected a directory")));
        }
    }
    check_share(recipe, options)?;
    let artifacts = Artifacts::new(&recipe.out, recipe.precision);
    artifacts.check(options.resume || options.check)?;
    let device = moe_core::device::device(&recipe.device)?;
    let max_memory = recipe.max_memory.as_deref().map(format::parse_size).transpose();
    let max_memory = max_memory.map_err(|reason| Error::Usage(format!("max_memory: {reason}")))?;
    let model = Arc::new(Checkpoint::open(&recipe.model)?);
    if model.shape().units() == 0 {
        let reason = "it has no routed experts: not a Mixture-of-Experts model";
        return Err(Error::Invalid(format!("{}: {reason}", recipe.model.display())));
    }
    let vocabulary = model.config().vocab_size;
    let tokenizer = match recipe.model.join("tokenizer.json").exists() {
        true => Some(Tokenizer::from_dir(&recipe.model)?),
        false => None,
    };
    let calibration = match recipe.data.calibration.is_empty() {
        true => None,
        false => {
            let seed = (recipe.seed != 0).then_some(recipe.seed);
            Some(Calibration::load(&recipe.data, seed, tokenizer.as_ref(), vocabulary)?)
        }
    };
    EvalFile::load_all(&recipe.data.eval, &Default::default(), tokenizer.as_ref(), model.config())?;

    let engine_of = |model: &Arc<Checkpoint>| -> moe_core::Result<Model> {
        Ok(Model::new(model.clone(), &device, max_memory)?.with_precision(recipe.precision))
    };
    // A wave has to be held, whatever is done with it.
    let holds = |model: &Arc<Checkpoint>, waves: &[Wave]| -> moe_core::Result<()> {
        let largest = waves.iter().map(Wave::tokens).max().unwrap_or(0);
        Engine::new(&engine_of(model)?, EngineOptions::default()).plan(largest, Signals::NONE).map(drop)
    };
    let mut chain = Chain::new(model.clone());
    let mut before = Before::default();
    let mut disk = Disk::default();
    for (number, step) in recipe.steps.iter().enumerate() {
        let named = |error: Error| {
            let text = format!("step {} ({}): {error}", number + 1, step.name());
            match error {
                // Files, not what the recipe says.
                Error::Io { .. } | Error::Checkpoint(_) | Error::Data(_) => Error::Invalid(text),
                _ => Error::Usage(text),
            }
        };
        let needs_data = || match &calibration {
            Some(calibration) => Ok(calibration),
            None => Err(named(Error::Usage("data.calibration names no file, which it needs".into()))),
        };
        let goes_on = matches!(step, Step::Tune(tune) if before.mixture && tune.starts_from_mixture(recipe.seed)?);
        let changes =
            !matches!(step, Step::Score(_) | Step::Protect(_) | Step::Adapt(_) | Step::Evaluate(_) | Step::Write(_));
        if before.beside && changes && !goes_on {
            let reason = "what an earlier tune leaves beside the weights (an adapter, a mixture, condensers, compressed experts) would \
                          be lost; it comes after this step, or is folded";
            return Err(named(Error::Usage(reason.into())));
        }
        if before.adapted && changes {
            let reason =
                "an earlier adapt changes how the model is run; it comes after the steps that change the model";
            return Err(named(Error::Usage(reason.into())));
        }
        match step {
            Step::Score(score) => {
                let scorers = score.scorers().map_err(named)?;
                let mut ids: Vec<StatisticId> = Vec::new();
                for config in &scorers {
                    let scorer = config.build()?;
                    let needs = scorer.needs();
                    before.scored.push(Scored {
                        name: scorer.name().to_string(),
                        granularity: needs.granularity,
                        pool: needs.pool,
                        additive: needs.additive,
                        wholes: needs.wholes,
                    });
                    ids.extend(needs.statistics);
                }
                if let Some(options) = score.super_experts().map_err(named)? {
                    before.super_experts = true;
                    ids.push(options.needs());
                }
                if !ids.is_empty() {
                    let store = recipe.out.join("steps");
                    let engine_model = engine_of(&chain.model)?;
                    let seen = needs_data()?.observing(&engine_model, ids, options.group).store(store.clone());
                    seen.check().map_err(|e| named(e.into()))?;
                    disk.add(&store, seen.space().map_err(|e| named(e.into()))?).map_err(named)?;
                }
            }
            Step::Protect(Protect::SuperExperts) if !before.super_experts => {
                return Err(named(Error::Usage("no earlier score looks for super_experts".into())));
            }
            Step::Protect(Protect::File(path)) => {
                mask(path)?.validate(model.shape())?;
            }
            Step::Protect(_) => {}
            Step::Prune(prune) => {
                check_prune(prune, &model, &before, calibration.is_some()).map_err(named)?;
                chain.prune(prune, &before.scored).map_err(named)?;
                before.pruned = Some(prune.form);
            }
            Step::Merge(merge) => {
                let merging = merge.recipe().map_err(named)?;
                let data = needs_data()?;
                if let Some(training) = &merge.training {
                    training.validate().map_err(|error| named(error.into()))?;
                } else {
                    let compression = merging.compression.as_ref();
                    compression.map_or(Ok(()), |how| how.check_scores(false)).map_err(|error| named(error.into()))?;
                }
                let engine_model = engine_of(&chain.model)?;
                let merging = Merging {
                    model: &engine_model,
                    waves: &data.waves,
                    recipe: &merging,
                    protect: &ProtectionMask::none(),
                    form: merge.form,
                    mtp: merge.mtp,
                    sample: merge.sample,
                    at_once: false,
                    absorb: &[],
                    group: options.group,
                };
                match before.unchanged() {
                    true => merging.check().map_err(named)?,
                    false => holds(&chain.model, &data.waves).map_err(|error| named(error.into()))?,
                }
                let bytes = merging.check_passes(&recipe.out.join("steps")).map_err(named)?;
                disk.add(&recipe.out, bytes).map_err(named)?;
                chain.merge(merge.form);
                (before.pruned, before.merged) = (None, true);
            }
            Step::Tune(tune) => {
                let unchanged = before.unchanged();
                let engine_model = engine_of(if unchanged { &model } else { &chain.model })?;
                super::tune::check(tune, recipe, tokenizer.as_ref(), &engine_model, unchanged && !goes_on)
                    .map_err(named)?;
                let trained = tune.recipe(recipe.seed)?;
                before.beside = tune.stays_beside(&trained);
                before.mixture = matches!(trained.method, MethodConfig::Mixture(_));
                (before.pruned, before.tuned) = (None, true);
                chain.tune();
            }
            Step::Repair(repair) => {
                let data = needs_data()?;
                let repair = repair.repair();
                let has_biases =
                    |layer: usize| model.config().moe(layer).is_some_and(|moe| moe.biases != ExpertBiases::None);
                let biased = model.shape().layers.iter().all(|layer| has_biases(layer.layer));
                match before.pruned {
                    None => {
                        return Err(named(Error::Usage("nothing was pruned just before it".into())));
                    }
                    Some(form) if repair.needs().biases && form != Form::Ragged && !biased => {
                        let reason = "it gives experts a bias, which stock forms have no place for: form ragged";
                        return Err(named(Error::Usage(reason.into())));
                    }
                    Some(_) => {}
                }
                if chain.grouped && repair.needs().own_weights {
                    let reason = "experts share sets of weights, which it cannot change for each: merge to form stock";
                    return Err(named(Error::Usage(reason.into())));
                }
                let full = engine_of(chain.base.as_ref().unwrap_or(&chain.model))?;
                let pruned = engine_of(&chain.model)?;
                let plan = PrunePlan::keep_all(full.checkpoint().shape(), full.checkpoint().fingerprint());
                let request = RepairRequest { pruned: Some(&pruned), ..RepairRequest::new(&full, &plan, &data.waves) };
                repair.check(&request).map_err(|error| named(error.into()))?;
            }
            Step::Quantize(quantize) => {
                let how = quantize.options().map_err(named)?;
                quantize.with().check(&model).map_err(named)?;
                if quantize.reads_rows() {
                    holds(&chain.model, &needs_data()?.waves).map_err(|error| named(error.into()))?;
                }
                if before.unchanged() {
                    moe_checkpoint::Quantized::on(&model, &how).map_err(|error| named(error.into()))?;
                }
                (before.pruned, before.tuned) = (None, true);
                chain.quantize();
            }
            Step::Sparsify(sparsify) => {
                sparsify.sparsity.validate().map_err(|error| named(error.into()))?;
                let engine_model = engine_of(&chain.model)?;
                let store = recipe.out.join("steps");
                let seen = needs_data()?
                    .observing(&engine_model, super::sparsify::SEEN.to_vec(), options.group)
                    .store(store.clone());
                seen.check().map_err(|error| named(error.into()))?;
                disk.add(&store, seen.space().map_err(|error| named(error.into()))?).map_err(named)?;
                (before.pruned, before.tuned) = (None, true);
                chain.quantize();
            }
            Step::Evolve(evolve) => {
                holds(&chain.model, &needs_data()?.waves).map_err(|error| named(error.into()))?;
                let search = evolve.search(recipe.seed);
                search.check(&chain.model).map_err(|error| named(error.into()))?;
                chain.evolve(evolve.experts, evolve.mtp).map_err(named)?;
                (before.pruned, before.merged) = (None, true);
            }
            Step::Decompose(decompose) => {
                let compression = decompose.compression();
                compression.validate().map_err(|error| named(error.into()))?;
                if compression.needs_scores() {
                    let engine_model = engine_of(&chain.model)?;
                    let store = recipe.out.join("steps");
                    let ids = super::decompose::SEEN.to_vec();
                    let seen = needs_data()?.observing(&engine_model, ids, options.group).store(store.clone());
                    seen.check().map_err(|error| named(error.into()))?;
                    disk.add(&store, seen.space().map_err(|error| named(error.into()))?).map_err(named)?;
                }
                (before.pruned, before.tuned) = (None, true);
                chain.quantize();
            }
            Step::Adapt(adapt) => {
                let on = before.unchanged().then(|| engine_of(&model)).transpose()?;
                super::adapt::check(adapt, on.as_ref(), calibration.is_some()).map_err(named)?;
                // what stands in a file beside the model would be lost
                before.adapted |= !adapt.run_time().map_err(named)?.is_plain();
                (before.pruned, before.tuned) = (None, true);
                chain.drop(adapt.drop.as_ref());
            }
            Step::Frontier(frontier) => {
                holds(&chain.model, &needs_data()?.waves).map_err(|error| named(error.into()))?;
                frontier.check(&chain.model).map_err(named)?;
                if chain.grouped || recipe.steps[..number].iter().any(|step| matches!(step, Step::Quantize(_))) {
                    let reason = "an earlier step quantizes the model or lets experts share weights: measure before it";
                    return Err(named(Error::Usage(reason.into())));
                }
                if before.beside || before.adapted {
                    let reason =
                        "what an earlier step leaves beside the weights would not be measured: measure before it";
                    return Err(named(Error::Usage(reason.into())));
                }
            }
            Step::Evaluate(evaluate) => {
                let paths = if evaluate.data.is_empty() { &recipe.data.eval } else { &evaluate.data };
                if paths.is_empty() {
                    return Err(named(Error::Usage("neither data of its own nor data.eval".into())));
                }
                let files = EvalFile::load_all(paths, &evaluate.options, tokenizer.as_ref(), model.config())?;
                let engine_model = engine_of(&chain.model)?;
                for file in &files {
                    file.check_memory(&engine_model, WaveOptions::Tokens(recipe.data.wave_tokens))?;
                }
            }
            Step::Write(write) => {
                let to = write.to.clone().unwrap_or_else(|| recipe.out.join("model"));
                if let Some(size) = &write.shard_size {
                    format::parse_size(size).map_err(|reason| named(Error::Usage(format!("shard_size: {reason}"))))?;
                }
                let existing = if options.force { Existing::Force } else { Existing::Resume };
                if !(options.resume && to.exists()) {
                    check_output(&chain.model, &to, &WriteOptions { existing, ..WriteOptions::default() })?;
                    disk.add(&to, chain.model.bytes_on_disk()).map_err(named)?;
                }
            }
        }
    }
    Ok(Run {
        recipe,
        options,
        device,
        max_memory,
        artifacts,
        tokenizer,
        calibration,
        model,
        scores: Vec::new(),
        super_experts: None,
        protect: ProtectionMask::none(),
        pruned: None,
        beside: None,
        run_time: moe_core::adaptive::RunTime::beside(&recipe.model)?,
        measured: Vec::new(),
        written: Vec::new(),
    })
}

/// Refuses a share of what cannot be shared out, and shares that are not there.
fn check_share(recipe: &Recipe, options: RunOptions<'_>) -> Result<()> {
    if let Some(missing) = options.absorb.iter().find(|other| !other.join("steps").is_dir()) {
        let path = missing.display();
        return Err(Error::Invalid(format!("{path}: found no steps, expected the output directory of another run")));
    }
    let Some((index, count)) = options.shard else { return Ok(()) };
    if options.group.size() > 1 {
        let found = format!("share {index} of {count} beside {} processes that share the work", options.group.size());
        return Err(Error::Usage(format!("found {found}, expected one or the other")));
    }
    for step in &recipe.steps {
        let shares = match step {
            Step::Score(_) => true,
            Step::Merge(merge) => !merge.recipe()?.sequential,
            Step::Repair(repair) => repair.repair().needs().shares,
            _ => false,
        };
        if shares {
            return Ok(());
        }
    }
    let reason = "no step whose work can be shared out: expected scores, a merge on one pass, refit or mean_output";
    Err(Error::Usage(format!("a share: {reason}")))
}

/// A protection mask from a file.
pub(super) fn mask(path: &std::path::Path) -> Result<ProtectionMask> {
    let json = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&json).map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))
}

/// The mtp choice, or the one that needs none.
pub(super) fn prune_options<'a>(form: PruneForm<'a>, mtp: Option<Mtp>) -> PruneOptions<'a> {
    PruneOptions { mtp, ..PruneOptions::new(form) }
}

/// A choice among scorers, which needs some to choose from and rows to measure on.
fn check_choice(prune: &Prune, model: &Arc<Checkpoint>, before: &Before, has_data: bool) -> Result<()> {
    if before.scored.is_empty() {
        return Err(Error::Usage(
            "scores: auto chooses among the scorers of earlier scores, but there are none".into(),
        ));
    }
    if !has_data {
        return Err(Error::Usage("data.calibration names no file, on which scores: auto measures".into()));
    }
    if prune.comparing_pruner(&model.config().routing)?.needs().probe != Questions::NONE {
        let reason = "scores: auto, but the pruner asks the running model, which takes one scorer; name it";
        return Err(Error::Usage(reason.into()));
    }
    Ok(())
}

fn check_prune(prune: &Prune, model: &Arc<Checkpoint>, before: &Before, has_data: bool) -> Result<()> {
    let form = prune.form.with(moe_prune::FineGrained::new(prune.pieces.unwrap_or(2)));
    prune_options(form, prune.mtp).check(model)?;
    if let Some(path) = prune.plan.as_ref().or(prune.keep_list.as_ref()) {
        if prune.scores.is_some() || prune.budget.is_some() || prune.pruner.is_some() {
            return Err(Error::Usage("a plan or a list of what stays goes without scores, budget and pruner".into()));
        }
        let plan = match (&prune.plan, &prune.keep_list) {
            (Some(_), Some(_)) => return Err(Error::Usage("a plan and a list of what stays: one of them".into())),
            (Some(path), None) => PrunePlan::load(path)?,
            // What an earlier step leaves has other indices, which only that step shows.
            _ if !before.unchanged() => return mask(path).map(drop),
            _ => PrunePlan::keep_only(model.shape(), model.fingerprint(), &mask(path)?)?,
        };
        // The first step on the model as it is can be compared wholly.
        if before.unchanged() {
            plan.validate(model.shape())?;
        }
        return Ok(());
    }
    let pruner = prune.pruner(&model.config().routing)?;
    if pruner.needs().probe != Questions::NONE && !has_data {
        return Err(Error::Usage("data.calibration names no file, on which the pruner asks the running model".into()));
    }
    let (Some(budget), Some(resolved)) = (prune.budget, prune.budget_on(model)?) else {
        return Err(Error::Usage("budget: says not how much is kept".into()));
    };
    resolved.validate(model.shape())?;
    if matches!(budget, Budget::ExpertsPerLayer(_)) && pruner.needs().granularity != Granularity::Expert {
        let reason = "experts_per_layer: the pruner drops units; expert, novice, subset or genetic drop whole experts";
        return Err(Error::Usage(reason.into()));
    }
    match &prune.scores {
        None if before.scored.is_empty() => Err(Error::Usage("no earlier score, and no score file".into())),
        Some(_) if prune.chooses_scorer() => check_choice(prune, model, before, has_data),
        Some(name) if !before.scored.iter().any(|scored| std::path::Path::new(&scored.name) == name.as_path()) => {
            ScoreTable::load(name)?;
            Ok(())
        }
        _ => Ok(()),
    }
}

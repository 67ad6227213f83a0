//! What a file that a verb wrote is.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use moe::recipe::Recipe;
use moe_checkpoint::{ProtectionMask, Record, SafetensorsFile, ScoreTable, Statistics, StatisticsStore};
use moe_merge::{CompactModel, Evidence, MergePlan};
use moe_peft::codec::{Delta, DeltaBase};
use moe_peft::{SavedKind, SavedTuning};
use moe_prune::{DistortionCurves, PrunePlan};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{Error, Result};

/// Longest header of a safetensors file that is read.
const MAX_HEADER: u64 = 100_000_000;

/// The first line of a file of JSON lines; null for none that is JSON.
pub(super) fn first_line(path: &Path) -> Result<Value> {
    let file = File::open(path).map_err(Error::io(path))?;
    let mut line = String::new();
    BufReader::new(file).read_line(&mut line).map_err(Error::io(path))?;
    Ok(serde_json::from_str(&line).unwrap_or(Value::Null))
}

pub(super) fn file(path: &Path) -> Result<Value> {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    match extension {
        "safetensors" => tensors(path),
        "json" => document(path),
        "jsonl" => ranking(path),
        _ => match Delta::open(path) {
            Ok(delta) => Ok(delta_facts(&delta)),
            Err(_) => Err(Error::Invalid(format!(
                "{}: neither a model directory, nor scores, statistics, evidence, a plan, edits, curves, an adapter, a delta, a recipe or \
                 rows of data",
                path.display()
            ))),
        },
    }
}

/// What JSON calls a value: a name, or a name and what is in it.
fn named(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(name)) => name,
        Ok(value) => value.to_string(),
        Err(error) => error.to_string(),
    }
}

/// JSON where text is JSON.
fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| json!(text))
}

fn tensors(path: &Path) -> Result<Value> {
    let (metadata, count) = header(path)?;
    let has = |key: &str| metadata.contains_key(key);
    if has("moe.scores") {
        let table = ScoreTable::load(path)?;
        return Ok(json!({
            "kind": "scores",
            "scorer": table.scorer,
            "granularity": named(&table.granularity),
            "compared within": named(&table.pool),
            "add up within": table.additive.map_or("nothing".to_string(), |pool| named(&pool)),
            "layers": table.layers.len(),
            "never routed": table.never_routed().len(),
            "model": table.provenance.model,
            "data": table.provenance.data,
            "recipe": parsed(&table.provenance.recipe),
            "operations": ["moe prune --model DIR --scores FILE --ratio 0.5 --out DIR"],
        }));
    }
    if has("moe.statistics") {
        return Ok(statistics(&Statistics::load(path)?));
    }
    if has("moe.edits") {
        let edits = parsed(&metadata["moe.edits"]);
        return Ok(json!({
            "kind": "edits of a pruned model",
            "plan": edits["plan"],
            "recipe": edits["recipe"],
            "tensors": count,
            "operations": ["moe apply --model DIR --plan PLAN --edits FILE --out DIR"],
        }));
    }
    if has("moe.merge_evidence") {
        let evidence = Evidence::load(path)?;
        let sums: Vec<&String> = evidence.layers.first().iter().flat_map(|layer| layer.sums.keys()).collect();
        return Ok(json!({
            "kind": "evidence of merging",
            "model": evidence.model,
            "data": evidence.data,
            "layers": evidence.layers.len(),
            "sums": sums,
            "sampled tokens": evidence.layers.first().and_then(|l| l.sample.as_ref()).map_or(0, |sample| sample.tokens()),
            "operations": ["moe apply --model DIR --plan MERGE_PLAN --evidence FILE --out DIR"],
        }));
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    for kind in SavedKind::BESIDE_WEIGHTS {
        if name == kind.file() {
            return Ok(json!({
                "kind": kind.to_string(),
                "tensors": count,
                "operations": ["stands beside the weights of a checkpoint: moe eval --model DIR reads both"],
            }));
        }
    }
    if let Ok(delta) = Delta::open(path) {
        return Ok(delta_facts(&delta));
    }
    Ok(json!({ "kind": "tensors", "tensors": count, "metadata": metadata.keys().collect::<Vec<_>>() }))
}

/// The metadata of a safetensors file, and how many tensors it has.
fn header(path: &Path) -> Result<(BTreeMap<String, String>, usize)> {
    let invalid = |reason: String| Error::Invalid(format!("{}: no safetensors file: {reason}", path.display()));
    let mut file = File::open(path).map_err(Error::io(path))?;
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|error| invalid(error.to_string()))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return Err(invalid(format!("found a header of {length} bytes, expected {MAX_HEADER} at most")));
    }
    let mut json = Vec::new();
    file.take(length).read_to_end(&mut json).map_err(Error::io(path))?;
    let mut fields: BTreeMap<String, Value> =
        serde_json::from_slice(&json).map_err(|error| invalid(error.to_string()))?;
    let metadata = fields.remove("__metadata__").unwrap_or_else(|| json!({}));
    let metadata = serde_json::from_value(metadata).map_err(|error| invalid(error.to_string()))?;
    Ok((metadata, fields.len()))
}

fn statistics(statistics: &Statistics) -> Value {
    let provenance = statistics.provenance();
    json!({
        "kind": "statistics",
        "waves": statistics.waves().len(),
        "tokens": statistics.tokens(),
        "sequences": statistics.sequences(),
        "statistics": statistics.ids().collect::<Vec<_>>(),
        "model": provenance.model,
        "data": provenance.data,
        "operations": ["score without running the model: moe score --model DIR --statistics PATH --scorer NAME --out DIR"],
    })
}

pub(super) fn statistics_store(path: &Path) -> Result<Value> {
    let store = StatisticsStore::open(path)?;
    let provenance = store.provenance();
    Ok(json!({
        "kind": "statistics",
        "waves": store.waves().len(),
        "model": provenance.model,
        "data": provenance.data,
        "recipe": parsed(&provenance.recipe),
        "operations": [
            "score without running the model: moe score --model DIR --statistics PATH --scorer NAME --out DIR",
            "take over the waves of a shard: moe score … --absorb DIR"
        ],
    }))
}

pub(super) fn compact(path: &Path) -> Result<Value> {
    let compact = CompactModel::open(path)?;
    let report = compact.report();
    Ok(json!({
        "kind": "compact experts: low rank and sparse rows of a merged model",
        "model": compact.model(),
        "compression": compact.compression(),
        "parameters before": report.parameters_before,
        "parameters after": report.parameters_after,
        "bytes before": report.bytes_before,
        "bytes after": report.bytes_after,
        "operations": ["the dense model: moe merge … --dense DIR"],
    }))
}

/// An adapter, mixture, condensers or compressed experts in a folder of their own.
pub(super) fn tuned(path: &Path, saved: &SavedTuning) -> Result<Value> {
    let kinds: Vec<String> = saved.kinds().iter().map(ToString::to_string).collect();
    let mut facts = json!({ "kind": format!("adapter: {}", kinds.join(", ")) });
    for kind in saved.kinds() {
        let file = path.join(kind.file());
        if file.extension().is_some_and(|extension| extension == "json") {
            let config = json_file(&file)?;
            let fields =
                ["peft_type", "r", "lora_alpha", "target_modules", "target_parameters", "base_model_name_or_path"];
            for field in fields.into_iter().chain(["experts", "gate"]) {
                if let Some(value) = config.get(field) {
                    facts[field] = value.clone();
                }
            }
        }
    }
    let (mut tensors, mut parameters) = (0, 0);
    for entry in std::fs::read_dir(path).map_err(Error::io(path))? {
        let file = entry.map_err(Error::io(path))?.path();
        if file.extension().is_some_and(|extension| extension == "safetensors") {
            let weights = SafetensorsFile::open(&file)?;
            tensors += weights.tensors().count();
            let sizes = weights.tensors().map(|tensor| tensor.shape.iter().map(|size| *size as u64).product::<u64>());
            parameters += sizes.sum::<u64>();
        }
    }
    (facts["tensors"], facts["parameters"]) = (json!(tensors), json!(parameters));
    let mut operations = vec!["moe eval --model DIR --adapter DIR", "moe generate --model DIR --adapter DIR"];
    if saved.kinds().contains(&SavedKind::Lora) {
        operations.push("moe adapter merge --model DIR --adapter DIR --out DIR");
    }
    facts["operations"] = json!(operations);
    Ok(facts)
}

fn delta_facts(delta: &Delta) -> Value {
    let table = delta.table();
    let base = match &table.base {
        DeltaBase::Checkpoint { fingerprint } => format!("checkpoint {fingerprint}"),
        DeltaBase::Adapter { .. } => "none: it is an adapter by itself".to_string(),
    };
    json!({
        "kind": "delta",
        "base": base,
        "coding": serde_json::to_value(&table.coding).unwrap_or_default(),
        "tensors": table.tensors.len(),
        "operations": ["moe delta apply FILE --base DIR --out DIR"],
    })
}

fn json_file(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))
}

/// The experts of every layer, ranked.
fn ranking(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let mut scorers: BTreeMap<String, usize> = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        let found: moe::expert_ranking::ExpertRanking = serde_json::from_str(line)
            .map_err(|error| Error::Invalid(format!("{}:{}: {error}", path.display(), number + 1)))?;
        *scorers.entry(found.scorer).or_default() += 1;
    }
    Ok(json!({
        "kind": "experts of every layer from the best to the worst",
        "layers by scorer": scorers,
        "operations": ["for engines that drop experts when they load a model: the first n of a line stay"],
    }))
}

fn document(path: &Path) -> Result<Value> {
    let value = json_file(path)?;
    if value.get("kept").is_some() {
        let plan = PrunePlan::load(path)?;
        let removed: usize = plan.kept.iter().map(|layer| layer.removed.len()).sum();
        return Ok(json!({
            "kind": "plan of pruning",
            "model": plan.model,
            "units kept": format!("{} of {}", plan.units_kept(), plan.shape.units()),
            "experts removed": removed,
            "ratio": format!("{:.4} asked, {:.4} achieved", plan.ratio.asked, plan.ratio.achieved),
            "never routed": plan.never_routed.len(),
            "recipe": plan.recipe,
            "operations": ["moe apply --model DIR --plan FILE --out DIR", "moe compare DIR --plan FILE --data NAME_test.jsonl"],
        }));
    }
    if value.pointer("/layers/0/groups").is_some() {
        let plan = MergePlan::load(path)?;
        let groups: usize = plan.layers.iter().map(|layer| layer.groups.len()).sum();
        let experts: usize = plan.shape.layers.iter().map(|layer| layer.num_experts()).sum();
        return Ok(json!({
            "kind": "plan of merging",
            "model": plan.model,
            "recipe": plan.recipe.name,
            "experts": format!("{experts} become {groups}"),
            "operations": ["moe apply --model DIR --plan FILE --out DIR"],
        }));
    }
    if value.get("curves").is_some() && value.get("within").is_some() {
        let curves = DistortionCurves::load(path)?;
        let points: usize = curves.curves.iter().map(|curve| curve.points.len()).sum();
        return Ok(json!({
            "kind": "distortion curves",
            "model": curves.model,
            "scorer": parsed(&curves.scorer),
            "granularity": named(&curves.granularity),
            "within": named(&curves.within),
            "curves": format!("{} of {points} points", curves.curves.len()),
            "operations": [
                "moe prune --allocator '{\"type\":\"rate_distortion\",\"curves\":{\"file\":{\"path\":\"FILE\"}}}' --scores FILE … at any ratio"
            ],
        }));
    }
    if let Ok(mask) = serde_json::from_value::<ProtectionMask>(value.clone()) {
        return Ok(json!({
            "kind": "experts or units by name: a protection mask, or a list of what stays",
            "entries": mask.entries().len(),
            "operations": ["moe prune --protect FILE …", "moe merge --protect FILE …", "moe prune --keep-list FILE …"],
        }));
    }
    if value.pointer("/steps/0/method").is_some() || (value.get("version").is_some() && value.get("steps").is_some()) {
        let record: Record = serde_json::from_value(value)
            .map_err(|error| Error::Invalid(format!("{}: a record of a model: {error}", path.display())))?;
        let steps: Vec<String> = record.steps.iter().map(|step| format!("{}: {}", step.method, step.summary)).collect();
        return Ok(json!({ "kind": "record of a model", "steps": steps }));
    }
    if value.get("steps").is_some() {
        let recipe = Recipe::load(path)?;
        let steps: Vec<&str> = recipe.steps.iter().map(|step| step.name()).collect();
        return Ok(json!({
            "kind": "recipe",
            "about": recipe.about,
            "model": recipe.model,
            "steps": steps.join(", "),
            "operations": ["moe run FILE --check", "moe run FILE"],
        }));
    }
    if value.get("method").is_some() {
        let recipe: moe_peft::Recipe = serde_json::from_value(value)
            .map_err(|error| Error::Invalid(format!("{}: a recipe of fine-tuning: {error}", path.display())))?;
        return Ok(json!({
            "kind": "recipe of fine-tuning",
            "method": recipe.method,
            "operations": ["moe tune --recipe FILE --model DIR --data FILE --out DIR"],
        }));
    }
    Err(Error::Invalid(format!(
        "{}: JSON, but neither a plan, curves, a mask, a record, a recipe nor rows of data",
        path.display()
    )))
}

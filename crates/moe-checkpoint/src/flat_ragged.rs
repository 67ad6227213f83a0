//! The layout of ragged experts that the vLLM plugin of HectorHHZ/Less-is-MoE reads (its `docs/RAGGED_EXPERTS.md`,
//! format versions 1 and 2): the bytes of our own [ragged](crate::ragged_config) layout under other names. Version 1 is
//! for families whose experts are SiLU without biases, version 2 for gpt-oss and Gemma 4, whose experts it describes by
//! their activation and whether they have biases. The documentation does not name the tensors of biases; the names are
//! those of the plugin's code (`intdim/ragged.py`).
//!
//! | here | there |
//! |---|---|
//! | `model_type` ends in `_ragged` | `architectures` begin with `Ragged`, `model_type` is the original one |
//! | `moe_ragged.expert_widths` | `less_is_moe.expert_intermediate_sizes` |
//! | `….experts.ragged_gate_up` `[2U, H]` | `….experts.gate_up_proj` `[2U * H]` |
//! | `….experts.ragged_down` `[H * U]` | `….experts.down_proj` `[H * U]` |
//! | `….experts.ragged_gate_up_bias` `[2U]` | `….experts.gate_up_proj_bias` `[2U]` |
//! | `….experts.ragged_down_bias` `[E, H]` | `….experts.down_proj_bias` `[E, H]` |
//!
//! Layers and experts keep their original indices there, so that experts that went with their rows of the router have
//! no place.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::config::Ffn;
use crate::family::CONFIG;
use crate::index::read_json;
use crate::json::Fields;
use crate::side_files::copy_side_files;
use crate::weights::TensorInfo;
use crate::{
    Checkpoint, Error, Existing, ExpertBiases, ModelDescription, ModelSource, OutputDir, Result, SafetensorsFile,
    ShardedWriter, TensorSpec, WriterOptions, Written, ragged_config, sliced, write_json,
};

/// Key of the plugin's object in `config.json`.
const KEY: &str = "less_is_moe";
/// What its architectures begin with.
const PREFIX: &str = "Ragged";

/// A family that the plugin reads.
struct Described {
    model_type: &'static str,
    architecture: &'static str,
    /// Activation and biases as version 2 says them; none where version 1 implies them.
    experts: Option<(&'static str, bool)>,
}

impl Described {
    const fn plain(model_type: &'static str, architecture: &'static str) -> Self {
        Self { model_type, architecture, experts: None }
    }

    fn version(&self) -> usize {
        if self.experts.is_some() { 2 } else { 1 }
    }

    /// What the plugin calls the layout.
    fn layout(&self) -> &'static str {
        if self.experts.is_some() { "flat_gate_up_down_v2" } else { "flat_gate_up_down_v1" }
    }

    fn biases(&self) -> ExpertBiases {
        if self.experts.is_some_and(|(_, biases)| biases) { ExpertBiases::All } else { ExpertBiases::None }
    }

    /// Whether experts compute what the plugin takes for granted, as far as the config of the family may say otherwise.
    fn check(&self, fields: &Fields<'_>) -> Result<()> {
        let named = |key: &str, expected: &str| match fields.string(key)? {
            Some(found) if found != expected => Err(fields.invalid(key, format!("\"{expected}\""))),
            _ => Ok(()),
        };
        match self.model_type {
            "gemma4_text" => named("hidden_activation", "gelu_pytorch_tanh")?,
            _ => named("hidden_act", "silu")?,
        }
        let limit = fields.value("swiglu_limit").and_then(Value::as_f64).unwrap_or(7.0);
        if self.model_type == "gpt_oss" && limit != 7.0 {
            return Err(fields.invalid("swiglu_limit", "7"));
        }
        if fields.value("quantization_config").is_some_and(|found| !found.is_null()) {
            return Err(fields.invalid("quantization_config", "none: the plugin reads BF16"));
        }
        Ok(())
    }
}

/// Model types that the plugin reads.
const FAMILIES: [Described; 6] = [
    Described::plain("qwen2_moe", "Qwen2MoeForCausalLM"),
    Described::plain("olmoe", "OlmoeForCausalLM"),
    Described::plain("qwen3_moe", "Qwen3MoeForCausalLM"),
    Described::plain("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"),
    Described { model_type: "gpt_oss", architecture: "GptOssForCausalLM", experts: Some(("swigluoai", true)) },
    Described { model_type: "gemma4_text", architecture: "Gemma4ForCausalLM", experts: Some(("gelu_tanh", false)) },
];

/// The family of a model type.
fn described(model_type: &str) -> Option<&'static Described> {
    FAMILIES.iter().find(|family| family.model_type == model_type)
}

/// Names of the model types there are.
fn known() -> String {
    FAMILIES.map(|family| family.model_type).join(", ")
}

/// Our name of the tensor, and the plugin's. The first two are one dimension there.
const NAMES: [(&str, &str); 4] = [
    ("ragged_gate_up", "gate_up_proj"),
    ("ragged_down", "down_proj"),
    ("ragged_gate_up_bias", "gate_up_proj_bias"),
    ("ragged_down_bias", "down_proj_bias"),
];
/// Bytes copied at a time.
const COPY_BYTES: usize = 4 << 20;
/// Bytes of one sample of a fingerprint.
const SAMPLE: usize = 4096;

/// Writes a ragged model into a new directory in the plugin's layout.
///
/// # Errors
/// [`Error::Method`] for a model that the layout cannot hold: not ragged, of another family, with experts that went
/// with their rows of the router, or with biases that a repair added; what keeps bytes from being read or written.
pub fn write_flat_ragged(model: &Checkpoint, to: impl AsRef<Path>, existing: Existing) -> Result<Written> {
    let config = flat_config(model)?;
    let specs: Vec<TensorSpec> = model.tensors().map(|info| flat_spec(info.spec())).collect();
    let output = OutputDir::create(to.as_ref(), existing)?;
    let recipe = json!({ "layout": config[KEY]["weight_layout"], "model": model.fingerprint() }).to_string();
    let mut writer = ShardedWriter::new(output.path(), WriterOptions { recipe, ..WriterOptions::default() }, specs)?;
    for info in model.tensors() {
        let name = flat_name(&info.name).unwrap_or_else(|| info.name.clone());
        if writer.is_finished(&name)? {
            continue;
        }
        let total = info.bytes as usize;
        let mut at = 0;
        while at < total {
            let end = (at + COPY_BYTES).min(total);
            writer.append(&name, &model.tensor_bytes(&info.name, at..end)?)?;
            at = end;
        }
    }
    let written = writer.finish()?;
    write_json(&output.path().join(CONFIG), &config)?;
    if let Some(generation) = model.raw_generation_config() {
        write_json(&output.path().join("generation_config.json"), generation)?;
    }
    copy_side_files(model.dir(), output.path())?;
    let directory = output.commit()?;
    let name = |file: &PathBuf| file.file_name().map(|name| directory.join(name));
    Ok(Written { files: written.files.iter().filter_map(name).collect(), ..written })
}

/// Whether a directory is in the plugin's layout.
pub fn is_flat_ragged(dir: impl AsRef<Path>) -> bool {
    read_json(&dir.as_ref().join(CONFIG)).is_ok_and(|config| config.get(KEY).is_some())
}

/// Opens a directory in the plugin's layout: a ragged [`Checkpoint`] like any other, whose bytes stay in the files.
///
/// # Errors
/// A config that is not of this layout, version or a family that it has, naming the field; those of
/// [`Checkpoint::from_source`].
pub fn open_flat_ragged(dir: impl AsRef<Path>) -> Result<Checkpoint> {
    let dir = dir.as_ref();
    let flat = read_json(&dir.join(CONFIG))?;
    let config = own_config(&flat).map_err(|error| error.in_dir(dir))?;
    let generation = dir.join("generation_config.json");
    let generation = if generation.exists() { Some(read_json(&generation)?) } else { None };
    let mut paths: Vec<PathBuf> = std::fs::read_dir(dir)
        .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
        .map_err(|source| Error::io(dir, source))?
        .into_iter()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .collect();
    paths.sort();
    let (mut files, mut places, mut tensors) = (Vec::new(), BTreeMap::new(), Vec::new());
    let hidden = config.get("hidden_size").and_then(Value::as_u64).unwrap_or(1).max(1) as usize;
    for path in paths {
        let file = SafetensorsFile::open(&path)?;
        for spec in file.tensors() {
            let own = own_spec(spec, hidden)?;
            places.insert(own.name.clone(), (files.len(), spec.name.clone()));
            tensors.push(own);
        }
        files.push(file);
    }
    let source = Flat { dir: dir.to_path_buf(), files, places };
    Checkpoint::from_source_in(dir.to_path_buf(), ModelDescription { config, generation, tensors }, Arc::new(source))
}

/// The files of a directory in the plugin's layout, under our names.
struct Flat {
    dir: PathBuf,
    files: Vec<SafetensorsFile>,
    /// File and name there, by our name.
    places: BTreeMap<String, (usize, String)>,
}

impl ModelSource for Flat {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let Some((file, name)) = self.places.get(&tensor.name) else {
            return Err(refused(&self.dir, format!("no tensor {}", tensor.name)));
        };
        Ok(sliced(Cow::Borrowed(self.files[*file].bytes(name)?), range))
    }

    fn grain(&self, _tensor: &TensorInfo) -> usize {
        1
    }

    fn release_all(&self) {
        self.files.iter().for_each(SafetensorsFile::release);
    }

    /// Over the config, the tensors and three samples of each, as of any directory.
    fn fingerprint(&self, model: &Checkpoint) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut add = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        add(model.raw_config().to_string().as_bytes());
        for (own, (file, name)) in &self.places {
            // What was opened has these tensors; bytes that are gone since are none.
            let bytes = self.files[*file].bytes(name).unwrap_or_default();
            add(format!("{own} {}", bytes.len()).as_bytes());
            let sample = SAMPLE.min(bytes.len());
            for start in [0, (bytes.len() - sample) / 2, bytes.len() - sample] {
                add(&bytes[start..start + sample]);
            }
        }
        hasher.finalize().to_hex().to_string()
    }
}

fn refused(path: &Path, reason: String) -> Error {
    Error::Method { source: format!("{}: not for the flat layout of ragged experts: {reason}", path.display()).into() }
}

/// The plugin's name of one of our tensors of experts.
fn flat_name(name: &str) -> Option<String> {
    let (experts, tensor) = name.rsplit_once('.')?;
    let (_, flat) = NAMES.iter().find(|(own, _)| *own == tensor)?;
    experts.ends_with("experts").then(|| format!("{experts}.{flat}"))
}

fn flat_spec(spec: TensorSpec) -> TensorSpec {
    match flat_name(&spec.name) {
        Some(name) if name.ends_with("_bias") => TensorSpec { name, ..spec },
        Some(name) => TensorSpec { name, shape: vec![spec.shape.iter().product()], ..spec },
        None => spec,
    }
}

/// Ours of one of the plugin's.
fn own_spec(spec: &TensorSpec, hidden: usize) -> Result<TensorSpec> {
    let found = spec.name.rsplit_once('.').filter(|(experts, _)| experts.ends_with(".experts"));
    let own = found.and_then(|(experts, tensor)| {
        NAMES.iter().find(|(_, flat)| *flat == tensor).map(|(own, _)| (format!("{experts}.{own}"), *own))
    });
    let Some((name, own)) = own else { return Ok(spec.clone()) };
    if own.ends_with("_bias") {
        return Ok(TensorSpec { name, ..spec.clone() });
    }
    let [elements] = spec.shape[..] else {
        let reason = format!("shape {:?}, expected one dimension: experts one after the other", spec.shape);
        return Err(Error::InvalidTensorSpec { tensor: spec.name.clone(), reason });
    };
    if elements % hidden != 0 {
        let reason = format!("{elements} elements, expected a multiple of hidden_size = {hidden}");
        return Err(Error::InvalidTensorSpec { tensor: spec.name.clone(), reason });
    }
    let shape = if own == NAMES[0].0 { vec![elements / hidden, hidden] } else { vec![elements] };
    Ok(TensorSpec { name, shape, ..spec.clone() })
}

/// The plugin's config of a ragged model.
fn flat_config(model: &Checkpoint) -> Result<Value> {
    let no = |reason: String| refused(model.dir(), reason);
    if !model.ragged() || model.grouped() {
        return Err(no("expected a ragged checkpoint whose experts share no weights".into()));
    }
    let config = model.config();
    let Some(family) = described(&config.model_type) else {
        return Err(no(format!("family {}, the layout is for {}", config.model_type, known())));
    };
    family.check(&Fields::new(model.raw_config(), CONFIG)?)?;
    let mut sizes = Map::new();
    let counts: BTreeSet<usize> = model.shape().layers.iter().map(|layer| layer.num_experts()).collect();
    for (number, layer) in config.layers.iter().enumerate() {
        let Ffn::Moe(moe) = &layer.ffn else {
            return Err(no(format!(
                "layer {number} is dense, the layout is for models of which every layer has experts"
            )));
        };
        if moe.biases != family.biases() {
            let reason = "experts have biases that the family has not, for which the layout has no place";
            return Err(no(format!("layer {number}: {reason}")));
        }
        sizes.insert(number.to_string(), json!(moe.widths));
    }
    let mut raw = model.raw_config().clone();
    let asked = ["num_experts", "num_local_experts"].iter().find_map(|key| raw.get(key)).and_then(Value::as_u64);
    if counts.len() != 1 || asked != counts.first().map(|count| *count as u64) {
        let reason = "experts went with their rows of the router; the layout keeps every expert, if only with width 0";
        return Err(no(reason.into()));
    }
    let Value::Object(fields) = &mut raw else { return Err(no("config.json is no object".into())) };
    fields.shift_remove("moe_ragged");
    fields.insert("model_type".into(), json!(family.model_type));
    fields.insert("architectures".into(), json!([format!("{PREFIX}{}", family.architecture)]));
    let mut object = json!({
        "format_version": family.version(), "weight_layout": family.layout(), "expert_intermediate_sizes": sizes,
    });
    if let Some((activation, bias)) = family.experts {
        object["expert_options"] = json!({ "activation": activation, "bias": bias });
    }
    fields.insert(KEY.into(), object);
    Ok(raw)
}

/// Our config of the plugin's.
fn own_config(flat: &Value) -> Result<Value> {
    let fields = Fields::new(flat, CONFIG)?;
    let object = fields.object(KEY)?;
    let object = object.ok_or_else(|| fields.missing(KEY, "an object: the directory is in another layout"))?;
    let Some(family) = fields.string("model_type")?.and_then(described) else {
        return Err(fields.invalid("model_type", format!("one of {}", known())));
    };
    let version = object.required_integer("format_version", 1, usize::MAX)?;
    if version != family.version() {
        return Err(object.invalid("format_version", format!("{}, that of this family", family.version())));
    }
    if object.string("weight_layout")? != Some(family.layout()) {
        return Err(object.invalid("weight_layout", format!("\"{}\"", family.layout())));
    }
    let options = family.experts.map(|(activation, bias)| json!({ "activation": activation, "bias": bias }));
    if let Some(expected) = options.filter(|expected| object.value("expert_options") != Some(expected)) {
        return Err(object.invalid("expert_options", expected.to_string()));
    }
    family.check(&fields)?;
    let layers = object.object("expert_intermediate_sizes")?;
    let layers = layers.ok_or_else(|| object.missing("expert_intermediate_sizes", "widths by layer"))?;
    let mut widths = BTreeMap::new();
    for key in layers.keys() {
        let layer = key.parse::<usize>().ok().filter(|layer| layer.to_string() == key);
        let layer = layer.ok_or_else(|| layers.invalid(key, "decoder layer indices as keys"))?;
        let list = layers.integers(key, 0, crate::families::MAX_SIZE)?;
        widths.insert(layer, list.ok_or_else(|| layers.invalid(key, "a list of widths"))?);
    }
    let mut stock = flat.clone();
    if let Value::Object(fields) = &mut stock {
        fields.shift_remove(KEY);
        fields.insert("architectures".into(), json!([family.architecture]));
    }
    ragged_config(&stock, &widths, &BTreeSet::new())
}

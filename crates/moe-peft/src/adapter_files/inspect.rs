//! What an adapter is.

use std::{collections::BTreeMap, fmt, path::Path};

use burn::tensor::Device;
use moe_checkpoint::human::{count, size};
use moe_checkpoint::{Checkpoint, SafetensorsFile};
use serde::Serialize;
use serde_json::Value;

use crate::{
    AdapterSet, Error, Result, SavedKind,
    codec::Delta,
    compressed_experts::CompressedLayers,
    condenser::Condensers,
    lora::{Maps, Targets},
    mixture::{self, Mixture},
    open,
    peft_files::{self, AdapterConfig},
};

/// What is known of an adapter without its model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AdapterFacts {
    /// What it is, in words: several, where they stand side by side.
    pub kinds: Vec<String>,
    /// Tensors in its files.
    pub tensors: usize,
    /// Numbers in them.
    pub values: u64,
    /// Bytes of the files with its values.
    pub bytes: u64,
    /// For a LoRA, its options.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraFacts>,
    /// For others, the options or the table that they carry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub options: Option<Value>,
    /// Its tensors by the last name of their module.
    pub modules: BTreeMap<String, ModuleFacts>,
    /// Maps of a model that it fits, if it was compared with one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fits: Option<usize>,
}

/// Options of a LoRA.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LoraFacts {
    /// Version of PEFT that wrote it.
    pub peft_version: Option<String>,
    /// The model it was trained on, as the file says.
    pub base_model: Option<String>,
    /// Rank of the additions.
    pub r: usize,
    /// Numerator of the scale.
    pub lora_alpha: f64,
    /// Whether the scale is by the root of the rank.
    pub use_rslora: bool,
    /// Whether it has magnitudes.
    pub use_dora: bool,
    /// How it began.
    pub init_lora_weights: Value,
    /// Whether it is an addition to what the weights kept when it was begun.
    pub residual: bool,
    /// Modules that were named.
    pub target_modules: Option<Targets>,
    /// Parameters that were named.
    pub target_parameters: Option<Vec<String>>,
    /// Patterns with a rank or alpha of their own.
    pub patterns: usize,
    /// Modules saved whole.
    pub modules_to_save: Vec<String>,
    /// Trained rows of the embeddings.
    pub trained_tokens: usize,
    /// Which biases of the model were trained.
    pub bias: String,
}

/// Tensors of modules of one name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ModuleFacts {
    /// How many.
    pub tensors: usize,
    /// Numbers in them.
    pub values: u64,
}

/// Looks at an adapter: a directory, or the file of a delta. With the directory of a model, also whether it fits it.
///
/// # Errors
/// What keeps files from being read, and, with a model, from fitting it.
pub fn inspect(path: &Path, base: Option<&Path>) -> Result<AdapterFacts> {
    if path.is_file() {
        return of_delta(path);
    }
    let kinds = open(path)?.kinds().to_vec();
    let mut facts = AdapterFacts {
        kinds: kinds.iter().map(ToString::to_string).collect(),
        tensors: 0,
        values: 0,
        bytes: 0,
        lora: None,
        options: None,
        modules: BTreeMap::new(),
        fits: None,
    };
    for kind in &kinds {
        let file = match kind {
            SavedKind::Lora => peft_files::MODEL_FILE,
            SavedKind::Mixture => mixture::MODEL_FILE,
            SavedKind::CompressedExperts => CompressedLayers::FILE,
            SavedKind::Condensers | SavedKind::NullExperts | SavedKind::RecurrentRouter | SavedKind::Duo => kind.file(),
        };
        facts.add_file(&path.join(file))?;
        match kind {
            SavedKind::Lora => facts.lora = Some(lora(&AdapterConfig::load(&path.join(peft_files::CONFIG_FILE))?)),
            SavedKind::Mixture => facts.options = Some(json(&path.join(mixture::CONFIG_FILE))?),
            _ => {}
        }
    }
    if let Some(base) = base {
        let base = Checkpoint::open(base)?;
        let maps = Maps::new(&base);
        facts.fits = Some(match kinds.first() {
            Some(SavedKind::Condensers) => {
                Condensers::load(path.join(Condensers::FILE), base.config())?.layers().count()
            }
            Some(SavedKind::Mixture) => {
                Mixture::load(path, &mut AdapterSet::new(), &maps, &Device::default())?.places()
            }
            Some(SavedKind::Lora) => {
                let options = peft_files::ReadOptions { on_residual: true };
                peft_files::read(path, &maps, options)?.maps.len()
            }
            _ => base.shape().layers.len(),
        });
    }
    Ok(facts)
}

impl AdapterFacts {
    fn add_file(&mut self, path: &Path) -> Result<()> {
        let file = SafetensorsFile::open(path)?;
        self.bytes += std::fs::metadata(path).map_err(|source| Error::Io { path: path.into(), source })?.len();
        for tensor in file.tensors() {
            let values = tensor.shape.iter().map(|size| *size as u64).product::<u64>();
            let module = self.modules.entry(module_name(&tensor.name)).or_default();
            (module.tensors, module.values) = (module.tensors + 1, module.values + values);
            (self.tensors, self.values) = (self.tensors + 1, self.values + values);
        }
        Ok(())
    }
}

/// `q_proj` of `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`; `experts` of modules within experts
/// stay together.
fn module_name(tensor: &str) -> String {
    let path =
        [".lora_", ".mixture.", ".token_adapter.", ".base_layer."].iter().filter_map(|mark| tensor.find(mark)).min();
    let path = match path {
        Some(end) => &tensor[..end],
        None => tensor.rsplit_once('.').map_or(tensor, |(path, _)| path),
    };
    let last = path.rsplit('.').find(|name| !name.is_empty() && name.parse::<usize>().is_err()).unwrap_or(path);
    match path.contains(".experts.") {
        true => format!("experts {last}"),
        false => last.to_string(),
    }
}

fn lora(config: &AdapterConfig) -> LoraFacts {
    let patterns = config.rank_pattern.iter().map(|p| p.iter().count()).sum::<usize>()
        + config.alpha_pattern.iter().map(|p| p.iter().count()).sum::<usize>();
    LoraFacts {
        peft_version: config.peft_version.clone(),
        base_model: config.base_model_name_or_path.clone(),
        r: config.r,
        lora_alpha: config.lora_alpha,
        use_rslora: config.use_rslora.unwrap_or(false),
        use_dora: config.use_dora.unwrap_or(false),
        init_lora_weights: config.init_lora_weights.clone(),
        residual: config.residual().is_some(),
        target_modules: config.target_modules.clone(),
        target_parameters: config.target_parameters.clone(),
        patterns,
        modules_to_save: config.modules_to_save.clone().unwrap_or_default(),
        trained_tokens: config.trainable_token_indices.as_ref().map_or(0, Vec::len),
        bias: config.bias.clone(),
    }
}

fn json(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.into(), source })?;
    serde_json::from_slice(&bytes).map_err(|error| crate::array_file::malformed(path, "contents", error, "JSON"))
}

fn of_delta(path: &Path) -> Result<AdapterFacts> {
    let delta = Delta::open(path)?;
    let table = delta.table();
    let mut modules: BTreeMap<String, ModuleFacts> = BTreeMap::new();
    for tensor in &table.tensors {
        let module = modules.entry(module_name(&tensor.name)).or_default();
        module.tensors += 1;
        module.values += tensor.shape.iter().map(|size| *size as u64).product::<u64>();
    }
    let options = serde_json::json!({"base": table.base, "coding": table.coding, "crate_version": table.crate_version});
    Ok(AdapterFacts {
        kinds: vec!["a delta".into()],
        tensors: table.tensors.len(),
        values: table.elements(),
        bytes: delta.bytes(),
        lora: None,
        options: Some(options),
        modules,
        fits: None,
    })
}

impl fmt::Display for AdapterFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kinds, tensors, values, bytes, lora, options, modules, fits } = self;
        writeln!(f, "{}: {tensors} tensors, {} values, {}", kinds.join(" and "), count(*values), size(*bytes))?;
        if let Some(lora) = lora {
            let LoraFacts { r, lora_alpha, use_rslora, use_dora, init_lora_weights, .. } = lora;
            let begun = init_lora_weights.to_string();
            let begun = match begun.trim_matches('"') {
                "true" => "at zero".to_string(),
                "false" => "at random".to_string(),
                other => format!("as {other}"),
            };
            write!(f, "r {r}, lora_alpha {lora_alpha}, begun {begun}")?;
            for (name, on) in [("rsLoRA", *use_rslora), ("DoRA", *use_dora)] {
                if on {
                    write!(f, ", {name}")?;
                }
            }
            if lora.patterns > 0 {
                write!(f, ", {} patterns of rank and alpha", lora.patterns)?;
            }
            writeln!(f)?;
            if lora.residual {
                writeln!(f, "an addition to what the weights kept when it was begun, not to the weights")?;
            }
            if !lora.modules_to_save.is_empty() {
                writeln!(f, "saved whole: {}", lora.modules_to_save.join(", "))?;
            }
            if lora.trained_tokens > 0 {
                writeln!(f, "trained rows of the embeddings: {}", lora.trained_tokens)?;
            }
            if let Some(base) = &lora.base_model {
                let version = lora.peft_version.as_deref().unwrap_or("unknown");
                writeln!(f, "trained on {base}, written by PEFT {version}")?;
            }
        }
        if let Some(options) = options {
            writeln!(f, "{options}")?;
        }
        for (module, ModuleFacts { tensors, values }) in modules {
            writeln!(f, "  {module:<24} {tensors:>6} tensors {values:>12} values")?;
        }
        match fits {
            Some(maps) => writeln!(f, "fits the model at {maps} places"),
            None => Ok(()),
        }
    }
}

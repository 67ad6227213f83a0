//! Mixture-of-Experts models of candle-transformers, to compare with: what they compute, and how fast they are.
//!
//! candle 0.11.1 has Qwen2-MoE, Qwen3-MoE, Mixtral and DeepSeek-V2. It reads `rope_theta` where transformers 4 wrote
//! it, experts one by one, and no quantized checkpoint; its Mixtral wants a sliding window. Its masks are causal and
//! nothing else, so that the texts of a batch have to be of one length.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{deepseek2, mixtral, qwen2_moe, qwen3_moe};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::{Error, Result};

/// A model of candle with what it has seen of its texts.
pub struct Candle {
    model: Kind,
    /// Tokens of each text so far.
    seen: usize,
}

enum Kind {
    Qwen2Moe(qwen2_moe::Model),
    Qwen3Moe(qwen3_moe::ModelForCausalLM),
    /// As it is, and as it was before any text, which it cannot forget.
    Mixtral(Box<[mixtral::Model; 2]>),
    DeepseekV2(deepseek2::DeepSeekV2),
}

impl Candle {
    /// Opens a checkpoint, in f32.
    ///
    /// # Errors
    /// A directory that cannot be read, a model that candle does not have or would compute otherwise than its config
    /// says, and whatever candle finds wrong.
    pub fn open(directory: &Path) -> Result<Self> {
        let path = directory.join("config.json");
        let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
        let config: Value = serde_json::from_str(&text).map_err(|error| invalid(&path, error))?;
        let known = readable(&config).map_err(|error| invalid(&path, error))?;
        let files = files(directory)?;
        // SAFETY: nobody writes the files of a checkpoint that is being measured.
        let weights = unsafe { VarBuilder::from_mmaped_safetensors(&files, DType::F32, &Device::Cpu) };
        let weights = weights.map_err(|error| invalid(directory, error))?;
        let model = match config["model_type"].as_str() {
            Some("qwen2_moe") => qwen2_moe::Model::new(&read(known, &path)?, weights).map(Kind::Qwen2Moe),
            Some("qwen3_moe") => qwen3_moe::ModelForCausalLM::new(&read(known, &path)?, weights).map(Kind::Qwen3Moe),
            Some("mixtral") => mixtral::Model::new(&read(known, &path)?, weights)
                .map(|model| Kind::Mixtral(Box::new([model.clone(), model]))),
            Some("deepseek_v2") => deepseek2::DeepSeekV2::new(&read(known, &path)?, weights).map(Kind::DeepseekV2),
            other => return Err(invalid(&path, format!("model_type is {other:?}; candle has no such model"))),
        };
        let model = model.map_err(|error| invalid(directory, error))?;
        Ok(Self { model, seen: 0 })
    }

    /// Begins new texts.
    pub fn restart(&mut self) {
        match &mut self.model {
            Kind::Qwen2Moe(model) => model.clear_kv_cache(),
            Kind::Qwen3Moe(model) => model.clear_kv_cache(),
            Kind::Mixtral(models) => models[0] = models[1].clone(),
            Kind::DeepseekV2(model) => model.clear_kv_cache(),
        }
        self.seen = 0;
    }

    /// Logits `[B, V]` after further tokens of each text, as many of each.
    ///
    /// # Errors
    /// Whatever candle finds wrong.
    pub fn logits(&mut self, tokens: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        let length = tokens.first().map_or(0, |tokens| tokens.len());
        if tokens.iter().any(|tokens| tokens.len() != length) || length == 0 {
            return Err(Error::Invalid(
                "the texts of a batch are of other lengths, which candle has no mask for".into(),
            ));
        }
        let mut run = || {
            let ids = Tensor::from_vec(tokens.concat(), (tokens.len(), length), &Device::Cpu)?;
            let logits = match &mut self.model {
                Kind::Qwen2Moe(model) => model.forward(&ids, self.seen)?,
                Kind::Qwen3Moe(model) => model.forward(&ids, self.seen)?,
                Kind::Mixtral(models) => models[0].forward(&ids, self.seen)?,
                Kind::DeepseekV2(model) => model.forward(&ids, self.seen)?,
            };
            let vocabulary = logits.dim(candle_core::D::Minus1)?;
            logits.reshape((tokens.len(), vocabulary))?.to_vec2::<f32>()
        };
        let logits = run().map_err(|error| Error::Invalid(format!("candle: {error}")))?;
        self.seen += length;
        Ok(logits)
    }

    /// Continues prompts of one length by the likeliest tokens, so many each.
    ///
    /// # Errors
    /// As [`Candle::logits`].
    pub fn generate(&mut self, prompts: &[&[u32]], new_tokens: usize) -> Result<Vec<Vec<u32>>> {
        self.restart();
        let mut made = vec![Vec::with_capacity(new_tokens); prompts.len()];
        let mut next: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.to_vec()).collect();
        for _ in 0..new_tokens {
            let tokens: Vec<&[u32]> = next.iter().map(Vec::as_slice).collect();
            let chosen: Vec<u32> = self.logits(&tokens)?.iter().map(|logits| likeliest(logits)).collect();
            made.iter_mut().zip(&chosen).for_each(|(made, token)| made.push(*token));
            next = chosen.into_iter().map(|token| vec![token]).collect();
        }
        Ok(made)
    }
}

/// The first of the largest.
fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

/// The config as candle reads it, unless it says what candle leaves aside.
fn readable(config: &Value) -> std::result::Result<Value, String> {
    let mut known = config.clone();
    let rope = &config["rope_parameters"];
    if let Some(theta) = rope.get("rope_theta") {
        known["rope_theta"] = theta.clone();
    }
    let kind = [&config["rope_scaling"], rope].into_iter().find_map(|rope| rope["rope_type"].as_str());
    if kind.is_some_and(|kind| kind != "default") {
        return Err(format!("rope_type is {kind:?}, which candle does not compute"));
    }
    if config["mlp_only_layers"].as_array().is_some_and(|layers| !layers.is_empty()) {
        return Err("mlp_only_layers names layers, which candle does not look for".into());
    }
    if config.get("quantization_config").is_some_and(|entry| !entry.is_null()) {
        return Err("candle reads no quantized checkpoint".into());
    }
    // Qwen's windows are switched by a field of their own, Mixtral's are not.
    let switched = config.get("use_sliding_window").map(|on| on.as_bool() == Some(true));
    if switched.unwrap_or(!config["sliding_window"].is_null()) {
        return Err(format!(
            "sliding_window is {}, beyond which candle sees while it generates",
            config["sliding_window"]
        ));
    }
    known["sliding_window"] = config["max_position_embeddings"].clone();
    let absent = [
        ("use_flash_attn", json!(false)),
        ("n_group", json!(1)),
        ("topk_group", json!(1)),
        ("max_window_layers", json!(0)),
    ];
    for (field, without) in absent {
        if known.get(field).is_none_or(Value::is_null) {
            known[field] = without;
        }
    }
    Ok(known)
}

fn read<C: DeserializeOwned>(known: Value, path: &Path) -> Result<C> {
    serde_json::from_value(known).map_err(|error| invalid(path, error))
}

/// Weight files of a directory.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).map_err(Error::io(directory))? {
        let path = entry.map_err(Error::io(directory))?.path();
        let is_weights = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("model"));
        if is_weights && path.extension().is_some_and(|extension| extension == "safetensors") {
            files.push(path);
        }
    }
    match files.is_empty() {
        true => Err(invalid(directory, "no model*.safetensors")),
        false => Ok(files),
    }
}

fn invalid(path: &Path, error: impl std::fmt::Display) -> Error {
    Error::Invalid(format!("{}: {error}", path.display()))
}

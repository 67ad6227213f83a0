//! Methods by name, and as JSON.

use moe_core::train::{AdamW, Decay, Keep, Optimizer, Schedule, TrainOptions};
use moe_peft::compressed_experts::CompressedExperts;
use moe_peft::esft::Esft;
use moe_peft::layer_sampling::LayerSampling;
use moe_peft::lora::LoraConfig;
use moe_peft::mixture::MixtureConfig;
use moe_peft::model_weights::OwnWeights;
use moe_peft::router_loss::RouterLosses;
use moe_peft::smt::Smt;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What is trained, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// What is trained.
    pub method: Method,
    /// Losses on the routers, none by default.
    #[serde(default)]
    pub router_losses: RouterLosses,
    /// Whether routers that are trained get the gradient of all experts, as if all had run.
    #[serde(default)]
    pub dense_mixer: bool,
    /// How.
    #[serde(default = "training")]
    pub train: TrainOptions,
}

/// What is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Method {
    /// Some of the model's own weights.
    Own(OwnWeights),
    /// All of them.
    Full,
    /// The experts that the training rows use.
    Esft(Esft),
    /// The blocks with the strongest gradients.
    Smt(Smt),
    /// A few layers at a time.
    Layers(LayerTurns),
    /// Low-rank additions.
    Lora(Box<LoraConfig>),
    /// Mixtures of low-rank additions, of which a router chooses for every token.
    Mixture(Box<MixtureConfig>),
    /// Fewer experts per token, and factors from those that do not run.
    CompressedExperts(Compressed),
}

/// Compressed experts, and what is trained beside them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compressed {
    /// How many experts of a token do not run.
    pub experts: CompressedExperts,
    /// The model's own weights that are trained as well.
    #[serde(default)]
    pub own: OwnWeights,
}

/// A few layers at a time, and the low rank that gradients of their matrices are projected to, if any.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LayerTurns {
    /// Which layers when.
    pub sampling: LayerSampling,
    /// Low-rank projection of gradients (GaLore).
    pub projection: Option<moe_core::train::Projection>,
}

/// A method of the list.
#[derive(Clone, Copy, Debug)]
pub struct Line {
    /// Its name.
    pub name: &'static str,
    /// What it does, in a few words.
    pub words: &'static str,
    /// Its highest learning rate on the bundled model.
    pub rate: f64,
    json: &'static str,
}

const fn line(name: &'static str, words: &'static str, rate: f64, json: &'static str) -> Line {
    Line { name, words, rate, json }
}

/// All methods with a name.
#[rustfmt::skip]
pub const METHODS: &[Line] = &[
    line("full", "all weights", 3e-4, r#"{"type": "full"}"#),
    line("esft-token", "the experts that the rows go to", 2e-3, r#"{"type": "esft", "score": "token", "threshold": 0.2}"#),
    line("esft-gate", "the same by routing weight", 2e-3, r#"{"type": "esft", "score": "gate", "threshold": 0.1}"#),
    line("smt", "the blocks with the strongest gradients", 5e-4, r#"{"type": "smt", "block": 16, "warmup_steps": 20, "attention": {"share": 0.02}, "feed_forward": {"share": 0.06}}"#),
    line("lisa", "two layers at a time", 5e-4, r#"{"type": "layers", "sampling": {"layers": 2, "every": 10}}"#),
    line("owlore", "layers by their outliers, low-rank gradients", 1e-3, r#"{"type": "layers", "sampling": {"layers": 2, "every": 10, "weights": {"outliers": {"times_mean": 3}}}, "projection": {"rank": 16, "gap": 20}}"#),
    line("lora", "rank 16 beside attention", 3e-3, r#"{"type": "lora", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}"#),
    line("lora-experts", "rank 16 beside attention, 2 beside every expert", 3e-3, r#"{"type": "lora", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "rank_pattern": {"experts.gate_up_proj": 2, "experts.down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 4, "experts.down_proj": 4}}"#),
    line("dora", "the same as lora, with lengths by themselves", 3e-3, r#"{"type": "lora", "r": 16, "lora_alpha": 32, "use_dora": true, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}"#),
    line("mola", "MoLA: four of rank 4 beside each map of attention, two per token", 3e-3, r#"{"type": "mixture", "experts": 4, "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}"#),
    line("mixlora", "MixLoRA: four of rank 8 beside the shared expert, one router for gate, up and down", 5e-3, r#"{"type": "mixture", "experts": 4, "r": 8, "lora_alpha": 16, "blocks": true, "router_std": 0.02}"#),
    line("flylora", "FlyLoRA: sparse frozen projections of rank 32 beside attention, 8 ranks per token", 5e-3, r#"{"type": "mixture", "r": 32, "lora_alpha": 64, "gate": {"type": "sparse", "k": 8, "score": "signed", "bias_rate": 0.01}, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}"#),
    line("router", "routers alone", 1e-2, r#"{"type": "own", "router": true}"#),
    line("shared", "shared experts and their gates", 2e-3, r#"{"type": "own", "shared": true, "shared_gate": true}"#),
];

/// Methods that the bundled model is taught by if none is named.
pub const DEFAULT_METHODS: &[&str] = &[
    "full",
    "esft-token",
    "smt",
    "lisa",
    "owlore",
    "lora",
    "lora-experts",
    "dora",
    "mola",
    "mixlora",
    "flylora",
    "router",
    "shared",
];

/// Training options of the methods with a name: AdamW, warm-up and cosine, 200 steps.
pub fn training() -> TrainOptions {
    TrainOptions {
        epochs: 1_000,
        max_steps: Some(200),
        schedule: Schedule { peak: 1e-3, warmup: 0.05, decay: Decay::Cosine, final_share: 0.1, ..Schedule::default() },
        optimizer: Optimizer::AdamW(AdamW::default()),
        clip: Some(1.0),
        evaluate_every: None,
        keep: Keep::Last,
        ..TrainOptions::default()
    }
}

impl Recipe {
    /// The recipe of a name.
    ///
    /// # Errors
    /// [`Error::Usage`] that lists the names.
    pub fn named(name: &str) -> Result<Self> {
        let Some(line) = METHODS.iter().find(|line| line.name == name) else {
            let known: Vec<&str> = METHODS.iter().map(|line| line.name).collect();
            return Err(Error::Usage(format!("--method {name}: known are {}", known.join(", "))));
        };
        let method = serde_json::from_str(line.json).map_err(|error| Error::Usage(format!("{name}: {error}")))?;
        let mut train = training();
        train.schedule.peak = line.rate;
        Ok(Self { method, train, router_losses: RouterLosses::default(), dense_mixer: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_a_recipe_that_can_be_written_and_read() {
        for line in METHODS {
            let recipe = Recipe::named(line.name).unwrap();
            let json = serde_json::to_string(&recipe).unwrap();
            assert_eq!(serde_json::from_str::<Recipe>(&json).unwrap(), recipe, "{json}");
            recipe.train.validate().unwrap();
        }
        assert!(DEFAULT_METHODS.iter().all(|name| Recipe::named(name).is_ok()));
        assert!(Recipe::named("prayer").unwrap_err().to_string().contains("full, esft-token"));
        let unknown = r#"{"method": {"type": "esft", "treshold": 1}}"#;
        assert!(serde_json::from_str::<Recipe>(unknown).unwrap_err().to_string().contains("treshold"));
    }
}

//! What the bundled model is trained with: it is small, and learns at rates that a real one would not survive.

use moe_peft::{METHODS, Recipe};
use serde_json::{Value, json};

use crate::{Error, Result};

/// A method on the bundled model.
struct Bundled {
    name: &'static str,
    /// Highest learning rate.
    rate: f64,
    /// Options in place of the published ones, where the model is too small for those.
    json: &'static str,
}

const fn bundled(name: &'static str, rate: f64, json: &'static str) -> Bundled {
    Bundled { name, rate, json }
}

#[rustfmt::skip]
const BUNDLED: &[Bundled] = &[
    bundled("full", 3e-4, ""),
    bundled("esft-token", 2e-3, ""),
    bundled("esft-gate", 2e-3, ""),
    bundled("smt", 5e-4, r#"{"type": "smt", "block": 16, "warmup_steps": 20, "attention": {"share": 0.02}, "feed_forward": {"share": 0.06}}"#),
    bundled("lisa", 5e-4, r#"{"type": "layers", "sampling": {"layers": 2, "every": 10}}"#),
    bundled("owlore", 1e-3, r#"{"type": "layers", "sampling": {"layers": 2, "every": 10, "weights": {"outliers": {"times_mean": 3}}}, "projection": {"rank": 16, "gap": 20}}"#),
    bundled("lora", 3e-3, ""),
    bundled("lora-experts", 3e-3, ""),
    bundled("dora", 3e-3, ""),
    bundled("corda", 3e-3, ""),
    bundled("mola", 3e-3, r#"{"type": "mixture", "experts": 4, "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}"#),
    bundled("mixlora", 5e-3, r#"{"type": "mixture", "experts": 4, "r": 8, "lora_alpha": 16, "blocks": true, "router_std": 0.02}"#),
    bundled("llava-mole", 5e-3, ""),
    bundled("dynmole", 3e-3, ""),
    bundled("lora-mixer-experts", 3e-3, ""),
    bundled("lora-mixer-router", 3e-3, ""),
    bundled("smora", 3e-3, ""),
    bundled("moram", 5e-3, ""),
    bundled("flylora", 5e-3, ""),
    bundled("null-experts", 2e-3, ""),
    bundled("recurrent-router", 3e-3, ""),
    bundled("duo", 1e-2, ""),
    bundled("gamma-mod", 5e-3, ""),
    bundled("final-router", 1e-3, ""),
    bundled("router-targets", 3e-3, ""),
    bundled("label-experts", 5e-4, ""),
    bundled("loss-free", 5e-4, ""),
    bundled("smoe-dropout", 1e-3, ""),
    bundled("mote", 2e-3, ""),
    bundled("condensers", 5e-4, ""),
    bundled("compressed-experts", 5e-4, ""),
    bundled("router", 1e-2, ""),
    bundled("shared", 2e-3, ""),
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

/// Training options of the bundled model: AdamW, warm-up and cosine, 200 steps.
fn training(rate: f64) -> Value {
    json!({
        "epochs": 1_000,
        "max_steps": 200,
        "schedule": {
            "peak": rate, "warmup": 0.05, "warmup_steps": null, "decay": "cosine", "final_share": 0.1
        },
        "optimizer": { "type": "adamw", "beta2": 0.999, "weight_decay": 0.0 },
    })
}

/// The recipe of a name: as published, or as the bundled model is trained.
///
/// # Errors
/// [`Error::Usage`] that lists the names.
pub fn named(name: &str, for_bundled: bool) -> Result<Recipe> {
    if name.ends_with(".json") {
        return Ok(Recipe::load(name.as_ref())?);
    }
    let unknown = || {
        let known: Vec<&str> = METHODS.iter().map(|method| method.name).collect();
        Error::Usage(format!("--method {name}: known are {}", known.join(", ")))
    };
    let mut recipe = Recipe::named(name).map_err(|_| unknown())?;
    if for_bundled && let Some(bundled) = BUNDLED.iter().find(|bundled| bundled.name == name) {
        if !bundled.json.is_empty() {
            recipe.method =
                serde_json::from_str(bundled.json).map_err(|error| Error::Usage(format!("{name}: {error}")))?;
        }
        recipe.change_training(training(bundled.rate))?;
    }
    Ok(recipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundled_model_has_rates_of_its_own_and_other_models_the_published_ones() {
        for method in METHODS {
            let recipe = named(method.name, true).unwrap();
            recipe.train.validate().unwrap();
            assert_eq!(recipe.train.max_steps, Some(200), "{}", method.name);
            assert!(recipe.train.schedule.peak > named(method.name, false).unwrap().train.schedule.peak);
        }
        assert!(DEFAULT_METHODS.iter().all(|name| named(name, true).is_ok()));
        assert_eq!(named("esft-token", false).unwrap().train.schedule.peak, 1e-5);
        assert!(named("prayer", true).unwrap_err().to_string().contains("known are full, esft-token"));
    }
}

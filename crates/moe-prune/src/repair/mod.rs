//! Repairs: better weights for what a pruner left, found by running the model on calibration waves.
//!
//! Each repair gives [`Edits`] to apply beside the plan. From cheap to dear:
//!
//! | repair | what changes | what it needs |
//! |---|---|---|
//! | [`MeanOutput`] | a bias per expert: the mean of what the dropped units gave | one forward sweep; a format with biases |
//! | [`Refit`] | kept down columns, each expert for itself, in closed form | one forward sweep; a Gram matrix per expert |
//! | [`LayerRefit`] | kept down columns of a layer together, layer after layer | two forward sweeps side by side |
//! | [`RouterDistillation`] | router rows, by gradient descent on the divergence from the full model | some epochs of forward and backward sweeps |
//!
//! All of them are deterministic. [`layer_errors`] measures what they achieve in each layer,
//! [`moe_core::evaluate::divergence`] at the end of the model. [`PrunePlan::on`](crate::PrunePlan::on) gives the
//! model that a plan and edits make, to be run without writing it; edits of that model, in its own indices, are brought to those of the
//! plan by [`Edits::of_plan`](crate::Edits::of_plan).

mod layer_refit;
mod linear;
mod mean_output;
mod measure;
mod refit;
mod ridge;
mod router_kd;
mod tokens;

pub use layer_refit::{LayerFit, LayerRefit, Refitted, Target};
pub use mean_output::MeanOutput;
pub use measure::{LayerError, layer_errors};
pub use refit::Refit;
pub use ridge::RidgeScale;
pub use router_kd::{RouterDistillation, RouterDistilled};
pub use tokens::TokenWeight;

use moe_core::Model;

use crate::{Edits, Error, PrunePlan, Result};

/// Told after each MoE layer: how many are done, and how many there are.
pub type OnLayer<'a> = &'a mut dyn FnMut(usize, usize);

/// No edits yet, made like this.
fn edits_by(recipe: serde_json::Value) -> Edits {
    let mut edits = Edits::new();
    edits.recipe = recipe;
    edits
}

/// Refuses a plan of another model.
fn check_plan(plan: &PrunePlan, model: &Model) -> Result<()> {
    let checkpoint = model.checkpoint();
    plan.validate(checkpoint.shape())?;
    plan.validate_routing(checkpoint.config())?;
    if !checkpoint.is_model(&plan.model) {
        let (path, found) = (checkpoint.dir().to_path_buf(), checkpoint.fingerprint().to_string());
        return Err(Error::OtherModel { path, found, expected: plan.model.clone() });
    }
    Ok(())
}

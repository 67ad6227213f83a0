//! Repairs: better weights for what a pruner left, found by running the model on calibration waves.
//!
//! Each [`Repair`] gives [`Edits`] to apply beside the plan. From cheap to dear:
//!
//! | repair | what changes | what it needs |
//! |---|---|---|
//! | [`MeanOutput`] | a bias per expert: the mean of what the dropped units gave | one forward sweep; a format with biases |
//! | [`Refit`] | kept down columns, each expert for itself, in closed form | one forward sweep; a Gram matrix per expert |
//! | [`LayerRefit`] | kept down columns of a layer together, layer after layer | two forward sweeps side by side |
//! | [`RouterDistillation`] | router rows, by gradient descent on the divergence from the full model | some epochs of forward and backward sweeps |
//!
//! What [`MeanOutput`] sees of the full model is a [`Calibration`](moe_importance::Calibration): kept wave by wave,
//! gone on with, shared out. The refits go through the model layer by layer, all waves at once: [`LayerRefit`] since
//! each layer has to see the layers before it as they were refitted; [`Refit`], whose layers do not depend on each
//! other, since its Gram matrices of a whole model are too much to keep wave by wave (10 GB for each wave of
//! Qwen1.5-MoE at a tenth of its units, where one layer takes 0.9 GB in memory). With a [store](RepairRequest::store),
//! what a refit has done of a layer is kept, and a run that was stopped does not do it again. [`RouterDistillation`] is
//! a training. Processes share [`Refit`] by layers and [`MeanOutput`] by waves ([`RepairRequest::shard`],
//! [`RepairRequest::absorb`]), to the bits of one process; the other two are one chain of steps, each of which follows
//! from the one before. The ranks of a group that run at the same time share all four ([`RepairRequest::group`]):
//! [`LayerRefit`] and [`RouterDistillation`] by the waves of a layer and of a step.
//!
//! All of them are deterministic. [`layer_errors`] measures what they achieve in each layer,
//! [`moe_core::evaluate::divergence`] at the end of the model. [`PrunePlan::on`](crate::PrunePlan::on) gives the
//! model that a plan and edits make, to be run without writing it; edits of that model, in its own indices, are brought
//! to those of the plan by [`Edits::of_plan`](crate::Edits::of_plan).

mod finished_layers;
mod layer_refit;
mod linear;
mod mean_output;
mod measure;
mod messages;
mod refit;
mod ridge;
mod router_kd;
mod tokens;

use std::path::{Path, PathBuf};

use moe_checkpoint::Checkpoint;
use moe_checkpoint::group::{Alone, Group};
use moe_core::data::Wave;
use moe_core::{Engine, EngineOptions, Model};
use serde_json::Value;

pub use layer_refit::{LayerFit, LayerRefit, Refitted, Target};
pub use mean_output::MeanOutput;
pub use measure::{LayerError, layer_errors};
pub use refit::Refit;
pub use ridge::RidgeScale;
pub use router_kd::{RouterDistillation, RouterDistilled};
pub use tokens::TokenWeight;

use crate::{Edits, Error, PrunePlan, Result};

/// Told how far a repair is: parts done, and parts in all. Refits count MoE layers, what is a calibration tokens,
/// trainings steps.
pub type OnProgress<'a> = &'a mut dyn FnMut(usize, usize);

/// What a repair works on.
#[derive(Clone, Copy, Debug)]
pub struct RepairRequest<'a> {
    /// The full model.
    pub model: &'a Model,
    /// What is left of it.
    pub plan: &'a PrunePlan,
    /// The model that the plan, and repairs before this one, have made; for those that [need](RepairNeeds::pruned) it.
    pub pruned: Option<&'a Model>,
    /// Data to repair on.
    pub waves: &'a [Wave],
    /// Where a repair that can keeps what it has seen, to go on from.
    pub store: Option<&'a Path>,
    /// Does only the part `index` of `count`, counted from 0, for a repair whose work can be
    /// [shared](RepairNeeds::shares): its parts are layers or waves, dealt out in turn. The part is then in the store;
    /// the edits are those of the part, and of use only to whoever looks at it.
    pub shard: Option<(usize, usize)>,
    /// Stores of other parts of the same work, which are taken over.
    pub absorb: &'a [PathBuf],
    /// The ranks that repair together: all make the same request, and get the same edits, those of one process. What a
    /// repair does not share out is done by every rank.
    pub group: &'a dyn Group,
}

impl<'a> RepairRequest<'a> {
    /// Of a plan for this model: no pruned model, nothing kept.
    pub fn new(model: &'a Model, plan: &'a PrunePlan, waves: &'a [Wave]) -> Self {
        Self { model, plan, pruned: None, waves, store: None, shard: None, absorb: &[], group: &Alone }
    }

    /// Whether the part at this position is done here.
    fn is_own(&self, position: usize) -> bool {
        let (index, count) = self.shard.unwrap_or((self.group.rank(), self.group.size()));
        position % count == index
    }

    /// The pruned model, for a repair that needs it.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] if there is none.
    pub fn pruned(&self) -> Result<&'a Model> {
        self.pruned.ok_or_else(|| Error::InvalidParameter {
            field: "pruned",
            found: "none".into(),
            expected: "the pruned model, which this repair changes".into(),
        })
    }
}

/// What a repair must be given, and what its edits must find.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepairNeeds {
    /// The pruned model. The edits are in its indices then; otherwise in those of the plan's model.
    pub pruned: bool,
    /// A format in which experts have biases.
    pub biases: bool,
    /// Experts with weights of their own: it changes those of each, which is not possible where several share a set.
    pub own_weights: bool,
    /// Its work can be shared out: it heeds [`RepairRequest::shard`] and [`RepairRequest::absorb`].
    pub shares: bool,
}

/// Makes the weights that a plan has left better. One of your own needs these three functions; [`Edits`] are applied by
/// [`PruneOptions::edits`](crate::PruneOptions::edits).
///
/// ```
/// use moe_prune::repair::{OnProgress, Repair, RepairNeeds, RepairRequest};
/// use moe_prune::{Edits, ExpertEdit, Result};
/// use serde_json::{Value, json};
///
/// /// Makes what is left of each expert as much larger as the expert got smaller.
/// struct Louder;
///
/// impl Repair for Louder {
///     fn recipe(&self) -> Value {
///         json!({ "repair": "louder" })
///     }
///
///     fn needs(&self) -> RepairNeeds {
///         RepairNeeds::default()
///     }
///
///     fn repair(&self, request: &RepairRequest<'_>, _: OnProgress<'_>) -> Result<Edits> {
///         let mut edits = Edits::new();
///         edits.recipe = self.recipe();
///         for kept in &request.plan.kept {
///             for (expert, units) in kept.experts.iter().enumerate().filter(|(_, units)| !units.is_empty()) {
///                 let weights = request.model.checkpoint().expert(kept.layer, expert)?;
///                 let factor = weights.width as f32 / units.len() as f32;
///                 // [H, kept units]
///                 let rows = weights.down.chunks_exact(weights.width);
///                 let down = rows.flat_map(|row| units.iter().map(move |unit| factor * row[*unit as
///                 usize])).collect(); edits.set_expert(kept.layer, expert, ExpertEdit { down: Some(down), down_bias:
///                 None });
///             }
///         }
///         Ok(edits)
///     }
/// }
/// ```
pub trait Repair {
    /// What it is called and how it works, as it is recorded with its edits.
    fn recipe(&self) -> Value;

    /// What it must be given.
    fn needs(&self) -> RepairNeeds;

    /// The weights that take the place of those that the plan left.
    ///
    /// # Errors
    /// Parameters out of range and a plan of another model, before anything is run; then whatever stops the run.
    fn repair(&self, request: &RepairRequest<'_>, on_progress: OnProgress<'_>) -> Result<Edits>;

    /// Checks what models and data show before anything is run: that experts have [weights of their
    /// own](RepairNeeds::own_weights) where they must, and that the sweeps fit into the memory of the models. Neither
    /// the plan nor the values of weights need be known yet.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`], and [`Error::Model`] for too little memory.
    fn check(&self, request: &RepairRequest<'_>) -> Result<()> {
        own_weights(self.needs(), request)?;
        check_shares(self.needs(), request)?;
        for model in [Some(request.model), request.pruned].into_iter().flatten() {
            Engine::new(model, EngineOptions::default()).plan_layerwise(request.waves)?;
        }
        Ok(())
    }
}

/// Refuses experts that share sets of weights.
fn own_weights(needs: RepairNeeds, request: &RepairRequest<'_>) -> Result<()> {
    let checkpoint = request.model.checkpoint();
    if needs.own_weights && checkpoint.grouped() {
        return Err(Error::InvalidParameter {
            field: "repair",
            found: format!("experts of `{}` that share sets of weights", checkpoint.config().model_type),
            expected: "experts with weights of their own, such as merging writes in form stock or stock-copies".into(),
        });
    }
    Ok(())
}

/// Refuses to share what cannot be, and shares that nobody would find again.
fn check_shares(needs: RepairNeeds, request: &RepairRequest<'_>) -> Result<()> {
    let refused =
        |field, found: String, expected: &str| Err(Error::InvalidParameter { field, found, expected: expected.into() });
    if !needs.shares && (request.shard.is_some() || !request.absorb.is_empty()) {
        let expected = "a repair whose parts do not follow from each other, such as refit and mean_output";
        return refused("shard", "a repair that is done in one process".into(), expected);
    }
    match request.shard {
        Some((index, count)) if index >= count => {
            refused("shard", format!("{index}/{count}"), "an index below the count, from 0")
        }
        Some(_) if request.group.size() > 1 => {
            let found = format!("a shard beside {} processes that share the work", request.group.size());
            refused("shard", found, "one or the other")
        }
        Some(_) if request.store.is_none() => refused("store", "none".into(), "one, which a shard leaves its part in"),
        _ => Ok(()),
    }
}

/// No edits yet, made like this.
fn edits_by(recipe: Value) -> Edits {
    let mut edits = Edits::new();
    edits.recipe = recipe;
    edits
}

/// Refuses a plan of another model.
fn check_plan(plan: &PrunePlan, checkpoint: &Checkpoint) -> Result<()> {
    plan.validate(checkpoint.shape())?;
    plan.validate_routing(checkpoint.config())?;
    if !checkpoint.is_model(&plan.model) {
        let (path, found) = (checkpoint.dir().to_path_buf(), checkpoint.fingerprint().to_string());
        return Err(Error::OtherModel { path, found, expected: plan.model.clone() });
    }
    Ok(())
}

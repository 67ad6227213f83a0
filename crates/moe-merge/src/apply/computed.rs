//! Where merged experts come from.

use moe_checkpoint::Checkpoint;

use crate::combination::{Combination, GroupSink, LayerJob};
use crate::evidence::Evidence;
use crate::experts::LayerExperts;
use crate::plan::MergePlan;
use crate::router::RouterAddition;
use crate::{Error, Result};

/// The merged experts of a plan, layer by layer.
pub trait MergedExperts: Send + Sync {
    /// Gives what becomes of every group of a decoder layer, once each, and what is added to router rows.
    ///
    /// # Errors
    /// Those of the combination and of `sink`.
    fn layer(&self, layer: usize, sink: GroupSink<'_>) -> Result<Vec<RouterAddition>>;

    /// Whether a layer may add anything to router rows.
    fn adds_to_router(&self) -> bool {
        false
    }

    /// A hash of everything they depend on but the plan and the checkpoint.
    fn digest(&self) -> String;
}

/// Experts merged as a plan says, when they are asked for.
pub struct ComputedExperts<'a> {
    plan: &'a MergePlan,
    checkpoint: &'a Checkpoint,
    evidence: Option<&'a Evidence>,
}

impl<'a> ComputedExperts<'a> {
    /// Checks that everything the plan's recipe fits on is there.
    ///
    /// # Errors
    /// [`Error::MissingEvidence`] for a layer without sampled tokens where some are needed; [`Error::InvalidEvidence`] for
    /// evidence other than what the plan was made from.
    pub fn new(plan: &'a MergePlan, checkpoint: &'a Checkpoint, evidence: Option<&'a Evidence>) -> Result<Self> {
        let evidence = evidence.filter(|_| plan.recipe.fits_on_sample());
        if let Some(evidence) = evidence {
            let digest = evidence.digest();
            if digest != plan.evidence {
                let expected = &plan.evidence;
                let reason =
                    format!("its digest is {digest}, but the plan was made from evidence of digest {expected}");
                return Err(Error::invalid_evidence(reason));
            }
        }
        if plan.recipe.fits_on_sample() {
            for layer in plan.layers.iter().filter(|layer| !layer.is_identity()) {
                let found = evidence.and_then(|evidence| evidence.layer(layer.layer));
                match found {
                    Some(evidence) => drop(evidence.sample("the recipe")?),
                    None => {
                        let what = "a sample of the layer's tokens".to_string();
                        return Err(Error::MissingEvidence { layer: layer.layer, part: "the recipe", what });
                    }
                }
            }
        }
        Ok(Self { plan, checkpoint, evidence })
    }
}

impl MergedExperts for ComputedExperts<'_> {
    fn layer(&self, layer: usize, sink: GroupSink<'_>) -> Result<Vec<RouterAddition>> {
        let plan = self.plan.layer(layer).ok_or_else(|| Error::invalid_plan(format!("no layer {layer}")))?;
        let recipe = &self.plan.recipe;
        let experts = LayerExperts { checkpoint: self.checkpoint, layer };
        let job = LayerJob {
            plan,
            experts: &experts,
            sample: self.evidence.and_then(|evidence| evidence.layer(layer)?.sample.as_ref()),
            activation: self.checkpoint.config().hidden_act,
            alignment: &recipe.alignment,
            reference: recipe.reference,
        };
        recipe.combination.combine(&job, sink)
    }

    fn adds_to_router(&self) -> bool {
        self.plan.recipe.combination.adds_to_router()
    }

    fn digest(&self) -> String {
        // The plan holds the digest of the evidence.
        "computed".to_string()
    }
}

//! From a recipe and evidence to a plan.

use moe_checkpoint::{Checkpoint, LayerRole, Role};
use moe_checkpoint::{ExpertId, ProtectionMask, Ratio};

use crate::budget::LayerShare;
use crate::combination::Combination;
use crate::context::LayerContext;
use crate::evidence::{Evidence, LayerEvidence};
use crate::experts::LayerExperts;
use crate::grouping::{Grouping, Groups};
use crate::merged::not_grouped;
use crate::plan::{Group, LayerPlan, MERGE_PLAN_VERSION, MergePlan};
use crate::recipe::Recipe;
use crate::{Error, Result};

impl Recipe {
    /// The plan of this recipe for a checkpoint. Experts of which anything is protected are left alone: they absorb
    /// nobody and nobody absorbs them.
    ///
    /// The plan is a deterministic function of its arguments. A recipe that is sequential is planned here on what
    /// `evidence` says of all layers at once; feature `engine` merges layer by layer.
    ///
    /// ```no_run
    /// use moe_checkpoint::Checkpoint;
    /// use moe_merge::{Evidence, Recipe};
    /// use moe_checkpoint::ProtectionMask;
    ///
    /// let model = Checkpoint::open("models/Qwen1.5-MoE-A2.7B")?;
    /// let evidence = Evidence::load("evidence.safetensors")?;
    /// let plan = Recipe::named("hc-smoe")?.plan(&model, &evidence, &ProtectionMask::none())?;
    /// plan.save("plan.json")?;
    /// # Ok::<(), moe_merge::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::OtherModel`] for evidence of another model, [`Error::MissingEvidence`], [`Error::Infeasible`],
    /// [`Error::InvalidEvidence`], a protection mask of another model.
    pub fn plan(&self, checkpoint: &Checkpoint, evidence: &Evidence, protect: &ProtectionMask) -> Result<MergePlan> {
        self.validate()?;
        let fingerprint = checkpoint.fingerprint();
        if !checkpoint.is_model(&evidence.model) {
            let (path, expected) = (checkpoint.dir().to_path_buf(), evidence.model.clone());
            return Err(Error::OtherModel { what: "evidence", path, found: fingerprint, expected });
        }
        not_grouped(checkpoint)?;
        let shape = checkpoint.shape();
        evidence.validate(shape)?;
        protect.validate(shape)?;
        let mut shares = Vec::with_capacity(shape.layers.len());
        for layer in &shape.layers {
            let experts = layer.num_experts();
            let unknown = LayerEvidence { layer: layer.layer, ..LayerEvidence::default() };
            let known = evidence.layer(layer.layer).unwrap_or(&unknown);
            let importance = match self.budget.exclude.contains(&layer.layer) {
                true => vec![0.0; experts],
                false => self.importance.of(known, experts)?,
            };
            let protected = protected_experts(protect, layer.layer, experts);
            shares.push(LayerShare { layer: layer.layer, importance, protected });
        }
        let counts = self.budget.counts(&shares)?;
        let mut layers = Vec::with_capacity(shares.len());
        for (share, count) in shares.iter().zip(&counts) {
            let mut router = checkpoint.read_f32(Role::Layer(share.layer, LayerRole::Router))?;
            router.truncate(share.importance.len() * checkpoint.config().hidden_size);
            let unknown = LayerEvidence { layer: share.layer, ..LayerEvidence::default() };
            let context = LayerContext {
                layer: share.layer,
                experts: &LayerExperts { checkpoint, layer: share.layer },
                router: Some(&router),
                evidence: evidence.layer(share.layer).unwrap_or(&unknown),
                activation: checkpoint.config().expert_activation(share.layer),
                importance: &share.importance,
                protected: &share.protected,
                router_groups: self.router_groups(checkpoint),
            };
            layers.push(self.plan_layer(&context, *count)?);
        }
        let kept: usize = counts.iter().sum();
        let never_used = evidence.layers.iter().flat_map(|known| {
            known.never_used().into_iter().map(|expert| ExpertId { layer: known.layer, expert: expert as usize })
        });
        let digest = if evidence.layers.is_empty() { String::new() } else { evidence.digest() };
        let plan = MergePlan {
            version: MERGE_PLAN_VERSION,
            model: fingerprint,
            shape: shape.clone(),
            ratio: self.ratio(&shares, kept),
            recipe: self.clone(),
            evidence: digest,
            never_used: never_used.collect(),
            layers,
        };
        plan.validate(shape)?;
        Ok(plan)
    }

    /// Groups of the router of a model that must stay of one size, since rows go.
    pub(crate) fn router_groups(&self, checkpoint: &Checkpoint) -> usize {
        let groups = checkpoint.config().routing.groups().filter(|_| !self.router.keeps_rows());
        groups.map_or(1, |groups| groups.count)
    }

    /// The plan of one layer with exactly `count` groups.
    ///
    /// # Errors
    /// As [`Recipe::plan`].
    pub fn plan_layer(&self, context: &LayerContext<'_>, count: usize) -> Result<LayerPlan> {
        let experts = context.count();
        let Groups { groups, dissolved } = self.grouping.group(context, count)?;
        let weights = self.combination.weights();
        let groups = groups.into_iter().map(|group| {
            Ok(Group {
                dominant: group.dominant as u32,
                weights: rounded(&weights.of(&group.members, context.evidence, experts)?),
                members: group.members.iter().map(|e| *e as u32).collect(),
            })
        });
        let indices = |flags: &[bool]| (0u32..).zip(flags).filter(|(_, f)| **f).map(|(e, _)| e).collect::<Vec<_>>();
        let plan = LayerPlan {
            layer: context.layer,
            groups: groups.collect::<Result<_>>()?,
            dissolved: dissolved.iter().map(|e| *e as u32).collect(),
            protected: indices(context.protected),
            importance: rounded(context.importance),
        };
        Ok(plan)
    }

    fn ratio(&self, shares: &[LayerShare], kept: usize) -> Ratio {
        let experts: usize = shares.iter().map(|share| share.importance.len()).sum();
        let asked = shares.iter().map(|share| match self.budget.exclude.contains(&share.layer) {
            true => 0,
            false => share.importance.len() - self.budget.of_layer(share.importance.len()),
        });
        let of_all = |gone: usize| gone as f64 / experts.max(1) as f64;
        Ratio { asked: of_all(asked.sum()), achieved: of_all(experts - kept) }
    }
}

fn rounded(values: &[f64]) -> Vec<f32> {
    values.iter().map(|v| *v as f32).collect()
}

/// Which experts of a layer a mask protects, wholly or in part.
pub(crate) fn protected_experts(protect: &ProtectionMask, layer: usize, experts: usize) -> Vec<bool> {
    let mut flags = vec![false; experts];
    for entry in protect.entries().into_iter().filter(|entry| entry.layer == layer) {
        flags[entry.expert] = true;
    }
    flags
}

//! A grouping of your own, for merging.
//!
//! This one deals the experts of a layer out to the groups like cards, the most important first, so that every group
//! has as much of what matters.

use std::sync::Arc;

use moe::prelude::*;
use moe_checkpoint::ProtectionMask;
use moe_merge::{
    Amount, EvidenceOptions, Features, Grouping, GroupingConfig, Groups, LayerContext, MergeOptions, MergedModel,
    OutputForm, Recipe, collect_evidence,
};
use serde_json::{Value, json};

/// Rank r of the experts that are not protected goes to group `r mod n`.
pub struct Dealt;

impl Grouping for Dealt {
    fn recipe(&self) -> Value {
        json!({ "type": "dealt" })
    }

    fn needs(&self) -> Vec<Features> {
        // Experts are not compared: importance is enough.
        Vec::new()
    }

    fn group(&self, context: &LayerContext<'_>, count: usize) -> moe_merge::Result<Groups> {
        let mut labels = vec![None; context.count()];
        let (alone, free): (Vec<usize>, Vec<usize>) = context.ranked().into_iter().partition(|e| context.protected[*e]);
        let groups = count.saturating_sub(alone.len()).max(1);
        free.iter().enumerate().for_each(|(rank, expert)| labels[*expert] = Some(rank % groups));
        alone.iter().enumerate().for_each(|(further, expert)| labels[*expert] = Some(groups + further));
        // What is no division into `count` groups is refused by whoever asked.
        Ok(Groups::of_labels(&labels, context.importance))
    }
}

/// The model in this directory with half of its experts.
pub fn run(model: &str) -> Result<MergedModel, Box<dyn std::error::Error>> {
    let model = Model::open(model, &device("flex")?, None)?;
    let checkpoint = model.checkpoint();
    let tokenizer = Tokenizer::from_dir(checkpoint.dir())?;
    let options = DatasetOptions { samples: Some(16), length: 64, ..DatasetOptions::default() };
    let rows = checkpoint.dir().join("data/prose_calibration.jsonl");
    let waves =
        Dataset::load(&rows, Some(&tokenizer), checkpoint.config().vocab_size, &options)?.waves(WaveOptions::default());

    // M-SMoE, but for its groups.
    let recipe = Recipe { grouping: GroupingConfig::own(Dealt), ..Recipe::named("m-smoe")? };
    let recipe = recipe.with_amount(Amount::Ratio(0.5));
    let evidence = collect_evidence(&model, &waves, &EvidenceOptions::for_recipe(&recipe, 0), None, &mut |_| ())?;
    let plan = recipe.plan(checkpoint, &evidence, &ProtectionMask::none())?;
    let options = MergeOptions { evidence: Some(Arc::new(evidence)), ..MergeOptions::new(OutputForm::Grouped) };
    Ok(plan.on(checkpoint, &options)?)
}

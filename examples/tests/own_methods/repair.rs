//! A repair of your own.
//!
//! This one makes what is left of an expert as loud as the whole expert was: one factor on its down columns, from the
//! norms of its outputs with all units and with those that stay, on rows of the bundled model.

use std::collections::BTreeMap;
use std::sync::Arc;

use moe::prelude::*;
use moe_checkpoint::Checkpoint;
use moe_core::host::HostView;
use moe_core::trace::{ExpertTrace, Observer, Signals};
use moe_prune::repair::{OnProgress, Repair, RepairNeeds, RepairRequest};
use moe_prune::{Edits, ExpertEdit, PruneForm, PruneOptions};
use serde_json::{Value, json};

/// `|f| / |f'|` of each expert on the down columns that stay.
struct AsLoud;

impl Repair for AsLoud {
    fn recipe(&self) -> Value {
        json!({ "repair": "as_loud" })
    }

    fn needs(&self) -> RepairNeeds {
        // Neither the pruned model nor a format with biases, but experts that share nothing.
        RepairNeeds { own_weights: true, ..RepairNeeds::default() }
    }

    fn repair(&self, request: &RepairRequest<'_>, on_progress: OnProgress<'_>) -> moe_prune::Result<Edits> {
        let engine = Engine::new(request.model, EngineOptions::default());
        let mut squares = Squares { plan: request.plan, model: request.model, sums: BTreeMap::new() };
        for (done, wave) in request.waves.iter().enumerate() {
            engine.run(wave, &mut squares)?;
            on_progress(done + 1, request.waves.len());
        }
        let mut edits = Edits::new();
        edits.recipe = self.recipe();
        for ((layer, expert), [whole, kept]) in squares.sums.into_iter().filter(|(_, [_, kept])| *kept > 0.0) {
            let weights = request.model.checkpoint().expert(layer, expert)?;
            let units =
                &request.plan.kept.iter().find(|kept| kept.layer == layer).expect("it was seen").experts[expert];
            let factor = (whole / kept).sqrt() as f32;
            let rows = weights.down.chunks_exact(weights.width); // [H, I]
            let down = rows.flat_map(|row| units.iter().map(move |unit| factor * row[*unit as usize])).collect();
            edits.set_expert(layer, expert, ExpertEdit { down: Some(down), down_bias: None });
        }
        Ok(edits)
    }
}

/// `sum |f|^2` and `sum |f'|^2` of each expert that loses units.
struct Squares<'a> {
    plan: &'a PrunePlan,
    model: &'a Model,
    sums: BTreeMap<(usize, usize), [f64; 2]>,
}

impl Observer for Squares<'_> {
    fn needs(&self) -> Signals {
        Signals::UNITS
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> moe_core::Result<()> {
        let Some(units) = trace.units else { return Ok(()) };
        let [_, width] = units.dims();
        let kept = self.plan.kept.iter().find(|kept| kept.layer == trace.layer);
        let Some(kept) = kept.map(|kept| &kept.experts[trace.expert]).filter(|kept| kept.len() < width) else {
            return Ok(());
        };
        let weights = self.model.checkpoint().expert(trace.layer, trace.expert)?;
        let sums = self.sums.entry((trace.layer, trace.expert)).or_default();
        for row in HostView::new(units).as_slice().chunks_exact(width) {
            for down in weights.down.chunks_exact(width) {
                let whole: f32 = down.iter().zip(row).map(|(w, u)| w * u).sum();
                let left: f32 = kept.iter().map(|unit| down[*unit as usize] * row[*unit as usize]).sum();
                sums[0] += f64::from(whole).powi(2);
                sums[1] += f64::from(left).powi(2);
            }
        }
        Ok(())
    }
}

/// The model in this directory with half of the units of each expert, repaired, and the edits.
pub fn run(model: &str) -> Result<(Arc<Checkpoint>, Edits), Box<dyn std::error::Error>> {
    let model = Model::open(model, &device("flex")?, None)?;
    let checkpoint = model.checkpoint();
    let tokenizer = Tokenizer::from_dir(checkpoint.dir())?;
    let options = DatasetOptions { samples: Some(8), length: 48, ..DatasetOptions::default() };
    let rows = checkpoint.dir().join("data/prose_calibration.jsonl");
    let waves =
        Dataset::load(&rows, Some(&tokenizer), checkpoint.config().vocab_size, &options)?.waves(WaveOptions::default());

    // Every other unit goes, whatever it does.
    let mut plan = PrunePlan::keep_all(checkpoint.shape(), checkpoint.fingerprint());
    for units in plan.kept.iter_mut().flat_map(|layer| &mut layer.experts) {
        units.retain(|unit| unit % 2 == 0);
    }
    plan.ratio.achieved = 1.0 - plan.units_kept() as f64 / plan.shape.units() as f64;
    let request = RepairRequest::new(&model, &plan, &waves);
    AsLoud.check(&request)?;
    let edits = AsLoud.repair(&request, &mut |_, _| ())?;
    let options = PruneOptions { edits: Some(Arc::new(edits.clone())), ..PruneOptions::new(PruneForm::Uniform) };
    Ok((plan.on(checkpoint, &options)?.model().clone(), edits))
}

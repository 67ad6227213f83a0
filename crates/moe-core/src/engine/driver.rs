//! One wave through all layers.

use super::{
    Engine, WaveReport,
    backward::{Backward, input_slot, middle_slot},
    forward::{FfnPass, LayerTape},
    prepare::Prepared,
};
use crate::{
    adapters::Depth, data::Wave, error::Result, memory::Keep, objective::Objective, store::HiddenStore, trace::Observer,
};

impl Engine<'_> {
    pub(super) fn sweep(
        &self,
        wave: &Wave,
        observer: &mut dyn Observer,
        objective: Option<&mut dyn Objective>,
    ) -> Result<WaveReport> {
        let needs = observer.needs();
        let prepared = Prepared::new(self.model, wave)?;
        let plan = self.plan_with(prepared.ids.len(), needs.backward(), objective.is_some())?;
        self.model.set_residency(plan.residency);
        observer.begin_wave(&prepared.info)?;

        let config = self.model.config();
        let layers = config.layers.len();
        let first_moe = (0..layers).find(|&l| config.moe(l).is_some());
        let observed =
            (needs.gradients || needs.router_gradients).then_some(first_moe).flatten().map(Depth::FeedForward);
        let trained = self.model.adapters().filter(|_| needs.parameters).map(|adapters| adapters.depth());
        let depth = observed.into_iter().chain(trained).fold(Depth::Head, Depth::deeper);
        if let Some(adapters) = self.model.adapters() {
            adapters.begin_wave(&prepared.info);
        }
        let last_moe = (0..layers).rev().find(|&l| config.moe(l).is_some());
        let to_the_end = objective.is_some() || needs.hidden;
        let stop = if to_the_end { layers } else { last_moe.map_or(0, |l| l + 1) };
        let spill = plan.spill.then_some(self.options.spill_dir.as_path());
        let mut store = HiddenStore::new(2 * layers, spill)?;
        let mut tapes: Vec<LayerTape> = (0..layers).map(|_| LayerTape::default()).collect();

        let mut x = self.model.embed(&prepared.ids)?;
        for (layer, tape) in tapes.iter_mut().enumerate().take(stop) {
            if needs.hidden {
                observer.hidden(layer, &x)?;
            }
            let backward = needs.backward() && depth.reaches_feed_forward(layer);
            let through = backward && depth.reaches_attention(layer);
            let keep = if backward { plan.keep[layer] } else { Keep::default() };
            let middle = self.attention_forward(layer, &x, &prepared, tape, keep.attention && through)?;
            if through {
                store.put(input_slot(layer), x)?;
            }
            let skip_output = !to_the_end && Some(layer) == last_moe;
            let pass = FfnPass { keep, needs, skip_output, ..FfnPass::new(layer, &prepared.info) };
            x = self.ffn_forward(pass, &middle, tape, observer)?;
            if backward {
                store.put(middle_slot(layer), middle)?;
            }
        }

        let mut report = WaveReport::new(&prepared.info);
        if let Some(objective) = objective
            && let Some(dx) = self.head(x, &prepared, needs, objective, observer, &mut report)?
        {
            let sweep = Backward { prepared: &prepared, store, tapes, depth, needs };
            self.backward(sweep, dx, observer)?;
        }
        observer.end_wave(&prepared.info)?;
        self.model.checkpoint().release();
        Ok(report)
    }
}

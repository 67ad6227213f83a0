//! Sweeps of all waves layer by layer: the same as sweeps of each wave, until a layer is changed.
#![cfg(feature = "flex")]

use std::{path::Path, sync::Arc};

use burn::tensor::{Device, Tensor};
use moe_core::{
    Engine, EngineOptions, Error, ExpertOverlay, KeepUnits, LayerChange, LayerOutput, LayerVisitor, Model,
    RemoveExperts, Result,
    data::{Sequence, Wave},
    host::HostView,
    trace::{ExpertTrace, LayerTrace, Nobody, Observer, Signals, WaveInfo},
};

fn fixture(name: &str, max_memory: Option<u64>) -> Model {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5").join(name);
    Model::open(dir, &Device::flex(), max_memory).unwrap()
}

fn waves() -> Vec<Wave> {
    waves_below(90)
}

fn waves_below(ids: usize) -> Vec<Wave> {
    let sequence =
        |seed: usize, n: usize| Sequence::new((0..n).map(|i| ((i * i * 7 + i * 3 + seed * 11) % ids) as u32).collect());
    vec![
        Wave { id: 3, sequences: vec![sequence(1, 13), sequence(2, 5)] },
        Wave { id: 1, sequences: vec![sequence(3, 20)] },
        Wave { id: 8, sequences: vec![sequence(4, 4)] },
    ]
}

/// Everything a sweep shows, as `(layer, wave, kind, bits)`, and what changes.
#[derive(Default)]
struct Log {
    wave: u64,
    events: Vec<(usize, u64, &'static str, Vec<u32>)>,
    ended: Vec<usize>,
    inputs: Vec<(usize, usize, Vec<u32>)>,
    outputs: Vec<(usize, usize, Vec<u32>)>,
    change: Option<(usize, LayerChange)>,
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn tensor_bits(x: &Tensor<2>) -> Vec<u32> {
    bits(HostView::new(x).as_slice())
}

impl Observer for Log {
    fn needs(&self) -> Signals {
        Signals { units: true, outputs: true, hidden: true, streams: true, logits: true, ..Signals::ROUTING }
    }
    fn begin_wave(&mut self, wave: &WaveInfo) -> Result<()> {
        self.wave = wave.id;
        Ok(())
    }
    fn layer(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        assert_eq!(trace.wave.id, self.wave);
        self.events.push((trace.layer, self.wave, "logits", bits(trace.logits)));
        self.events.push((trace.layer, self.wave, "weights", bits(trace.weights)));
        Ok(())
    }
    fn expert(&mut self, trace: &ExpertTrace<'_>) -> Result<()> {
        self.events.push((trace.layer, self.wave, "units", tensor_bits(trace.units.unwrap())));
        self.events.push((trace.layer, self.wave, "output", tensor_bits(trace.output.unwrap())));
        Ok(())
    }
    fn hidden(&mut self, layer: usize, hidden: &Tensor<2>) -> Result<()> {
        self.events.push((layer, self.wave, "hidden", tensor_bits(hidden)));
        Ok(())
    }
    fn logits(&mut self, first: usize, logits: &HostView, _: usize) -> Result<()> {
        self.events.push((usize::MAX, self.wave, "head", [vec![first as u32], bits(logits.as_slice())].concat()));
        Ok(())
    }

    fn output(&mut self, output: &LayerOutput<'_>) -> Result<()> {
        assert_eq!(output.wave.id, self.wave);
        self.inputs.push((output.layer, output.position, tensor_bits(output.input)));
        self.outputs.push((output.layer, output.position, tensor_bits(output.output)));
        Ok(())
    }
}

impl LayerVisitor for Log {
    fn end_layer(&mut self, layer: usize) -> Result<LayerChange> {
        self.ended.push(layer);
        let change = self.change.as_ref().filter(|(at, _)| *at == layer);
        Ok(change.map(|(_, change)| change.clone()).unwrap_or_default())
    }
}

fn options() -> EngineOptions {
    EngineOptions { head_tokens: 6, loss: true, ..EngineOptions::default() }
}

#[test]
fn without_changes_it_is_the_ordinary_sweep_to_the_last_bit() {
    // deepseek_v3 begins with a dense layer, granitemoe scales what a layer adds, layers of gemma4_text_ple read the
    // keys of others and inputs of their own
    for name in ["qwen2_moe", "deepseek_v3", "granitemoe", "gemma4_text_ple"] {
        let model = fixture(name, None);
        let waves = waves_below(model.config().vocab_size.min(90));
        let engine = Engine::new(&model, options());
        let mut ordinary = Log::default();
        let expected: Vec<_> = waves.iter().map(|wave| engine.run(wave, &mut ordinary).unwrap()).collect();
        ordinary.events.sort();

        // with all the memory there is, and with the least, where streams wait in a file
        let starved = fixture(name, Some(1));
        let refused = Engine::new(&starved, options()).run_layerwise(&waves, &mut Log::default());
        let Err(Error::Memory { needed: least, .. }) = refused else { panic!("{refused:?}") };
        for max_memory in [None, Some(least)] {
            let model = fixture(name, max_memory);
            let mut log = Log::default();
            let reports = Engine::new(&model, options()).run_layerwise(&waves, &mut log).unwrap();
            assert_eq!(reports, expected, "{name}");
            log.events.sort();
            assert!(log.events == ordinary.events, "{name}: other events");
            let moe: Vec<usize> =
                (0..model.config().layers.len()).filter(|&l| model.config().moe(l).is_some()).collect();
            assert_eq!(log.ended, moe);
            // the output of a layer is the input of the next, but for what it makes of an input of its own
            if model.config().layer_inputs.is_some() {
                continue;
            }
            for (layer, position, output) in &log.outputs {
                let next = (layer + 1, waves[*position].id, "hidden", output.clone());
                let last = layer + 1 == model.config().layers.len();
                assert!(last || log.events.binary_search(&next).is_ok(), "{name} {layer} {position}");
            }
        }
    }
}

#[test]
fn a_changed_layer_is_what_the_next_layers_see() {
    let model = fixture("qwen2_moe", None);
    let experts = model.config().moe(0).unwrap().num_experts();
    let units = |e: usize| (0..4u32).filter(move |u| (u + e as u32).is_multiple_of(2)).collect::<Vec<_>>();
    let halved: Arc<dyn ExpertOverlay> =
        Arc::new((0..experts).fold(KeepUnits::new(), |overlay, e| overlay.keep(0, e, units(e))));
    let removed = Arc::new(RemoveExperts::new().remove(0, [1]));
    let changes = [
        LayerChange { experts: Some(halved.clone()), routing: None },
        LayerChange { experts: None, routing: Some(removed.clone()) },
        LayerChange { experts: Some(halved), routing: Some(removed) },
    ];
    for change in changes {
        let changed = model.with_overlays(change.experts.clone(), change.routing.clone()).unwrap();
        let changed_engine = Engine::new(&changed, options());
        let expected: Vec<_> = waves().iter().map(|w| changed_engine.run(w, &mut Nobody).unwrap()).collect();
        let mut log = Log { change: Some((0, change.clone())), ..Log::default() };
        let found = Engine::new(&model, options()).run_layerwise(&waves(), &mut log).unwrap();
        assert_eq!(found, expected, "{change:?}");

        // one layer alone
        let mut ordinary = Log::default();
        Engine::new(&model, options()).run_layerwise(&waves(), &mut ordinary).unwrap();
        assert_eq!((&log.outputs[..3], &log.inputs[..3]), (&ordinary.outputs[..3], &ordinary.inputs[..3]));
        assert!(log.inputs[3..] != ordinary.inputs[3..]);
        let position = log.inputs[0].1;
        let x: Vec<f32> = log.inputs[0].2.iter().map(|b| f32::from_bits(*b)).collect();
        let hidden = model.config().hidden_size;
        let x = Tensor::<1>::from_floats(x.as_slice(), model.device()).reshape([x.len() / hidden, hidden]);
        let engine = Engine::new(&model, options());
        let alone = engine.feed_forward_changed(0, &x, &change, &mut Nobody).unwrap();
        let mut sweep = engine.layer_sweep(&waves()).unwrap();
        let mut again = Log { change: Some((0, change.clone())), ..Log::default() };
        assert_eq!((sweep.next_moe_layer(), sweep.step(&mut again).unwrap()), (Some(0), Some(0)));
        assert_eq!(tensor_bits(&alone), tensor_bits(&sweep.stream(position).unwrap()));
        assert!(sweep.stream(3).unwrap_err().to_string().contains("position of a wave"));
    }
}

#[test]
fn a_change_comes_on_top_of_the_models_own_overlay() {
    let model = fixture("qwen2_moe", None);
    let all = |units: &[u32]| -> Arc<dyn ExpertOverlay> {
        let experts = model.config().moe(0).unwrap().num_experts();
        Arc::new((0..experts).fold(KeepUnits::new(), |overlay, e| overlay.keep(0, e, units.to_vec())))
    };
    let own = model.with_overlay(all(&[0, 2, 3])).unwrap();
    // units 0 and 2 of what the overlay leaves are units 0 and 3
    let mut log =
        Log { change: Some((0, LayerChange { experts: Some(all(&[0, 2])), routing: None })), ..Log::default() };
    let found = Engine::new(&own, options()).run_layerwise(&waves(), &mut log).unwrap();
    let both = model.with_overlay(all(&[0, 3])).unwrap();
    let engine = Engine::new(&both, options());
    let expected: Vec<_> = waves().iter().map(|w| engine.run(w, &mut Nobody).unwrap()).collect();
    assert_eq!(found, expected);
}

#[test]
fn gradients_and_empty_lists_are_refused() {
    struct Gradients;
    impl Observer for Gradients {
        fn needs(&self) -> Signals {
            Signals::GRADIENTS
        }
    }
    impl LayerVisitor for Gradients {
        fn end_layer(&mut self, _: usize) -> Result<LayerChange> {
            Ok(LayerChange::default())
        }
    }
    let model = fixture("qwen2_moe", None);
    let engine = Engine::new(&model, options());
    assert!(engine.run_layerwise(&waves(), &mut Gradients).unwrap_err().to_string().contains("gradients"));
    assert!(engine.run_layerwise(&[], &mut Log::default()).unwrap_err().to_string().contains("at least one"));
}

/// Runs every half again on what it is shown.
struct Again<'a> {
    engine: &'a Engine<'a>,
    halves: usize,
}

impl Observer for Again<'_> {
    fn needs(&self) -> Signals {
        Signals { streams: true, ..Signals::NONE }
    }
    fn output(&mut self, output: &LayerOutput<'_>) -> Result<()> {
        let again = self.engine.feed_forward(output.layer, output.half(), &mut Nobody)?;
        assert_eq!(tensor_bits(&again), tensor_bits(output.output), "layer {}", output.layer);
        self.halves += 1;
        Ok(())
    }
}

#[test]
fn a_half_that_is_run_again_on_what_it_was_given_gives_the_same_bits_in_every_family() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5");
    let mut entries: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    let mut families = 0;
    for path in entries {
        let Ok(model) = Model::open(&path, &Device::flex(), None) else { continue };
        if !(0..model.config().layers.len()).any(|layer| model.config().moe(layer).is_some()) {
            continue;
        }
        // Several streams are mixed anew by every half: there is nothing before and after one.
        let streams = model.config().streams.is_some();
        let engine = Engine::new(&model, options());
        let mut again = Again { engine: &engine, halves: 0 };
        let ids = (0..13).map(|i| (i * i * 7 + i * 3) % model.config().vocab_size.min(90) as u32).collect();
        let found = engine.run(&Wave { id: 0, sequences: vec![Sequence::new(ids)] }, &mut again);
        if streams {
            assert!(matches!(found, Err(Error::Unsupported(_))), "{}", path.display());
            continue;
        }
        found.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(again.halves > 0, "{}", path.display());
        families += 1;
    }
    assert!(families > 50, "{families}");
}

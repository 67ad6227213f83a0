//! Distillation as an objective: divergences of models from themselves and from others, and gradients against
//! difference quotients.
#![cfg(feature = "flex")]

use std::{path::Path, sync::Arc};

use burn::tensor::Device;
use moe_checkpoint::{LayerRole, Role};
use moe_core::{
    CrossEntropy, Distillation, Engine, EngineOptions, ExpertGains, Model, RemoveExperts, Result, RoutingOverlay,
    TeacherLogits,
    data::{Sequence, Wave},
    evaluate::divergence,
    host::HostView,
    objective::TeacherRecorder,
    trace::{Nobody, Observer, RouterGradients, Signals},
};

fn fixture(name: &str) -> Model {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5").join(name);
    Model::open(dir, &Device::flex(), None).unwrap()
}

/// Two waves; the second has tokens that do not count.
fn waves() -> Vec<Wave> {
    let ids =
        |seed: usize, n: usize| -> Vec<u32> { (0..n).map(|i| ((i * i * 7 + i * 3 + seed * 11) % 90) as u32).collect() };
    let masked = Sequence { ids: ids(3, 8), loss: Some((0..8).map(|i| i % 3 != 1).collect()) };
    vec![
        Wave { id: 4, sequences: vec![Sequence::new(ids(1, 11)), Sequence::new(ids(2, 6))] },
        Wave { id: 7, sequences: vec![masked] },
    ]
}

fn predicted() -> usize {
    waves().iter().map(Wave::loss_tokens).sum()
}

fn record(model: &Model, top: usize) -> TeacherLogits {
    let options = EngineOptions { head_tokens: 5, ..EngineOptions::default() };
    TeacherLogits::record(&Engine::new(model, options), &waves(), top).unwrap()
}

fn pruned(model: &Model) -> Model {
    let layers = model.config().layers.len();
    let removed = (0..layers).fold(RemoveExperts::new(), |removed, layer| removed.remove(layer, [1]));
    model.with_overlays(None, Some(Arc::new(removed))).unwrap()
}

#[test]
fn a_model_does_not_diverge_from_itself() {
    let model = fixture("qwen2_moe");
    let vocab = model.config().vocab_size;
    for top in [1, 8, vocab, 2 * vocab] {
        let teacher = record(&model, top);
        assert_eq!((teacher.top(), teacher.positions()), (top.min(vocab), predicted()));
        assert_eq!(teacher.waves().collect::<Vec<_>>(), [4, 7]);
        let kl = divergence(&model, &teacher, &waves()).unwrap();
        assert!(kl.abs() < 1e-6, "{kl}");
    }
    assert_eq!(TeacherLogits::bytes(10, 8, vocab), 680);
    assert_eq!(TeacherLogits::bytes(10, vocab, vocab), 40 * (vocab as u64 + 1));
}

#[test]
fn fewer_teacher_tokens_see_less_of_the_divergence() {
    let model = fixture("qwen2_moe");
    let student = pruned(&model);
    let vocab = model.config().vocab_size;
    let found: Vec<f64> =
        [1, 4, 16, vocab].iter().map(|&top| divergence(&student, &record(&model, top), &waves()).unwrap()).collect();
    assert!(found[0] > 0.0 && found.is_sorted(), "{found:?}");

    // the whole vocabulary, against the plain formula
    struct Logits(Vec<f32>);
    impl Observer for Logits {
        fn needs(&self) -> Signals {
            Signals { logits: true, ..Signals::NONE }
        }
        fn logits(&mut self, _: usize, logits: &HostView, _: usize) -> Result<()> {
            self.0.extend_from_slice(logits.as_slice());
            Ok(())
        }
    }
    let mut kl = 0.0;
    for wave in waves() {
        let log_probs = |model: &Model| -> Vec<f64> {
            let mut logits = Logits(Vec::new());
            Engine::new(model, EngineOptions::default()).run(&wave, &mut logits).unwrap();
            let rows = logits.0.chunks(vocab);
            rows.flat_map(|row| {
                let sum = row.iter().map(|z| f64::from(*z).exp()).sum::<f64>().ln();
                row.iter().map(move |z| f64::from(*z) - sum)
            })
            .collect()
        };
        let (p, q) = (log_probs(&model), log_probs(&student));
        let mut t = 0;
        for sequence in &wave.sequences {
            for position in 1..=sequence.len() {
                if sequence.counts(position) {
                    kl += (t * vocab..(t + 1) * vocab).map(|i| p[i].exp() * (p[i] - q[i])).sum::<f64>();
                }
                t += 1;
            }
        }
    }
    let expected = kl / predicted() as f64;
    assert!((found[3] - expected).abs() < 1e-5 * (1.0 + expected), "{} {expected}", found[3]);
}

#[test]
fn recording_is_the_cross_entropy_and_so_is_run_with_it() {
    let model = fixture("deepseek_v3");
    let engine = Engine::new(&model, EngineOptions { loss: true, ..EngineOptions::default() });
    let mut recorder = TeacherRecorder::new(model.config().vocab_size, 4).unwrap();
    for wave in waves() {
        let plain = engine.run(&wave, &mut Nobody).unwrap();
        assert_eq!(plain, engine.run_with(&wave, &mut CrossEntropy, &mut Nobody).unwrap());
        assert_eq!(plain, engine.run_with(&wave, &mut recorder, &mut Nobody).unwrap());
    }
    assert_eq!(recorder.finish().positions(), predicted());
}

#[test]
fn the_gradient_of_the_divergence_matches_a_difference_quotient() {
    struct Router(usize, Vec<f32>);
    impl RoutingOverlay for Router {
        fn router(&self, layer: usize) -> Option<Vec<f32>> {
            (layer == self.0).then(|| self.1.clone())
        }
    }
    struct Gradient(usize, Vec<f64>);
    impl Observer for Gradient {
        fn needs(&self) -> Signals {
            Signals::ROUTER_GRADIENTS
        }
        fn router(&mut self, g: &RouterGradients<'_>) -> Result<()> {
            let hidden = g.input.dims()[1];
            let input = HostView::new(g.input);
            if g.layer == self.0 {
                for (d_logits, x) in g.d_logits.chunks(g.experts).zip(input.as_slice().chunks(hidden)) {
                    for (e, d) in d_logits.iter().enumerate() {
                        self.1[e * hidden..][..hidden].iter_mut().zip(x).for_each(|(w, x)| *w += f64::from(d * x));
                    }
                }
            }
            Ok(())
        }
    }
    for (name, top) in [("qwen2_moe", 8), ("qwen2_moe", usize::MAX), ("deepseek_v3", 8)] {
        let model = fixture(name);
        let experts = model.config().moe(1).unwrap().num_experts();
        let teacher = {
            let gains = ExpertGains::new().set(1, (0..experts).map(|e| 0.5 + e as f32 * 0.3).collect::<Vec<_>>());
            record(&model.with_overlays(None, Some(Arc::new(gains))).unwrap(), top)
        };
        let weight = model.checkpoint().read_f32(Role::Layer(1, LayerRole::Router)).unwrap();
        let mut found = Gradient(1, vec![0.0; weight.len()]);
        let engine = Engine::new(&model, EngineOptions { head_tokens: 4, ..EngineOptions::default() });
        let mut total = 0.0;
        for wave in waves() {
            total += engine.run_with(&wave, &mut Distillation::new(&teacher), &mut found).unwrap().loss.unwrap();
        }
        assert!((divergence(&model, &teacher, &waves()).unwrap() * predicted() as f64 - total).abs() < 1e-6);
        // a step so small that no token changes its experts
        let norm = found.1.iter().map(|g| g * g).sum::<f64>().sqrt();
        let at = |h: f64| {
            let moved = weight.iter().zip(&found.1).map(|(w, g)| w + (h * g / norm) as f32).collect();
            let moved = model.with_overlays(None, Some(Arc::new(Router(1, moved)))).unwrap();
            divergence(&moved, &teacher, &waves()).unwrap() * predicted() as f64
        };
        let numeric = (at(3e-4) - at(-3e-4)) / 6e-4;
        assert!(norm > 1e-3 && (numeric - norm).abs() < 1e-2 * norm + 1e-4, "{name} {top}: {numeric} {norm}");
    }
}

#[test]
fn waves_that_the_teacher_has_not_seen_are_refused() {
    let model = fixture("qwen2_moe");
    let teacher = record(&model, 4);
    let mut others = waves();
    others[0].id = 5;
    let message = |waves: &[Wave]| divergence(&model, &teacher, waves).unwrap_err().to_string();
    assert!(message(&others).contains("wave of a distillation: found 5"), "{}", message(&others));
    let mut longer = waves();
    longer[0].sequences[1].ids.push(3);
    assert!(message(&longer).contains("wave 4"), "{}", message(&longer));
    assert!(message(&[]).contains("predicted tokens"));
    let error = TeacherLogits::record(&Engine::new(&model, EngineOptions::default()), &waves(), 0).unwrap_err();
    assert!(error.to_string().contains("at least one"));
}

//! Running a written checkpoint.

use std::path::Path;
use std::sync::Arc;

use moe_core::data::{Sequence, Wave};
use moe_core::device::device;
use moe_core::host::HostView;
use moe_core::trace::{Observer, Signals};
use moe_core::{Engine, EngineOptions, ExpertOverlay, Model};

/// Token ids without a pattern, in two sequences.
pub fn wave(vocabulary: usize) -> Wave {
    let ids = |salt: usize, count| (0..count).map(|i| ((i * 37 + salt * 11 + i * i) % vocabulary) as u32).collect();
    Wave { id: 0, sequences: vec![Sequence::new(ids(1, 13)), Sequence::new(ids(2, 8))] }
}

#[derive(Default)]
struct Logits(Vec<f32>);

impl Observer for Logits {
    fn needs(&self) -> Signals {
        Signals { logits: true, ..Signals::NONE }
    }

    fn logits(&mut self, _: usize, logits: &HostView, _: usize) -> moe_core::Result<()> {
        self.0.extend_from_slice(logits.as_slice());
        Ok(())
    }
}

/// Logits of [`wave`].
pub fn logits_of(model: &Model) -> Vec<f32> {
    let mut logits = Logits::default();
    let wave = wave(model.config().vocab_size);
    Engine::new(model, EngineOptions::default()).run(&wave, &mut logits).unwrap();
    logits.0
}

/// Logits of a checkpoint.
pub fn logits(directory: &Path) -> Vec<f32> {
    logits_of(&Model::open(directory, &device("flex").unwrap(), None).unwrap())
}

/// Logits of a checkpoint under changed experts.
pub fn overlaid_logits(directory: &Path, overlay: impl ExpertOverlay + 'static) -> Vec<f32> {
    let model = Model::open(directory, &device("flex").unwrap(), None).unwrap();
    logits_of(&model.with_overlay(Arc::new(overlay)).unwrap())
}

/// Largest difference, relative to the largest expected value.
pub fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().all(|value| value.is_finite()));
    let largest = expected.iter().fold(0.0f32, |max, value| max.max(value.abs()));
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

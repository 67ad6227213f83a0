//! Logits of checkpoints, which other programs have computed as well.

use std::path::{Path, PathBuf};

use moe_core::data::{Sequence, Wave};
use moe_core::device::device;
use moe_core::host::HostView;
use moe_core::trace::{Observer, Signals};
use moe_core::{Engine, EngineOptions, Model};

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/moe-checkpoint/tests/fixtures")
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

pub fn logits(directory: &Path, ids: &[u32]) -> Vec<f32> {
    logits_of(&Model::open(directory, &device("flex").unwrap(), None).unwrap(), ids)
}

pub fn logits_of(model: &Model, ids: &[u32]) -> Vec<f32> {
    let wave = Wave { id: 0, sequences: vec![Sequence::new(ids.to_vec())] };
    let mut logits = Logits::default();
    Engine::new(model, EngineOptions::default()).run(&wave, &mut logits).unwrap();
    logits.0
}

//! Reading the files of a layer before it runs.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use super::Model;

/// Whether a thread asks for a layer at the moment; a disk that cannot follow is not asked for more.
#[derive(Default)]
pub(super) struct ReadAhead(Arc<AtomicBool>);

impl Model {
    /// Has the files of a layer read, if it does not stay in memory, while another one computes. A thread of its own
    /// waits for the disk, so that none of those that compute does. What it reads the system keeps or drops as it sees
    /// fit: results and the memory of the process do not depend on it.
    pub(crate) fn read_ahead(&self, layer: usize) {
        if self.stays(layer) || self.ahead.0.swap(true, Ordering::AcqRel) {
            return;
        }
        let (checkpoint, busy) = (self.checkpoint.clone(), self.ahead.0.clone());
        let ask = move || {
            checkpoint.read_ahead(layer);
            busy.store(false, Ordering::Release);
        };
        if thread::Builder::new().name("read-ahead".into()).spawn(ask).is_err() {
            // Only speed depends on it.
            self.ahead.0.store(false, Ordering::Release);
        }
    }

    /// Whether all weights of a layer stay in memory once they have been read.
    fn stays(&self, layer: usize) -> bool {
        let experts = self.config().moe(layer).map_or(0, |moe| moe.num_experts());
        let last = match experts {
            0 => None,
            _ => match self.expert_index(layer, experts - 1) {
                Ok(Some(index)) => Some(index),
                _ => return false,
            },
        };
        let residency = self.lock().residency;
        layer < residency.layers && last.is_none_or(|last| last < residency.experts)
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use std::time::{Duration, Instant};

    use burn::tensor::Device;

    use super::*;
    use crate::memory::Residency;

    #[test]
    fn layers_that_stay_are_not_asked_for_and_others_one_at_a_time() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
        let model = Model::open(dir, &Device::flex(), None).unwrap();
        let (layers, experts) = (model.config().layers.len(), 64);
        let stays = |residency: Residency| {
            model.set_residency(residency);
            (0..layers).map(|layer| model.stays(layer)).collect::<Vec<_>>()
        };
        let of = |layers: usize, experts: usize| Residency { head: true, layers, experts };
        assert_eq!(stays(of(layers, experts)), [true; 4]);
        assert_eq!(stays(of(layers, 47)), [true, true, false, false]);
        assert_eq!(stays(of(1, experts)), [true, false, false, false]);
        assert_eq!(stays(Residency::default()), [false; 4]);
        let end = Instant::now() + Duration::from_secs(20);
        for layer in 0..layers {
            model.read_ahead(layer);
            while model.ahead.0.load(Ordering::Acquire) {
                assert!(Instant::now() < end, "the thread ends");
                thread::yield_now();
            }
        }
    }
}

//! What a delta takes.

use serde::{Deserialize, Serialize};

/// Sizes of a delta that was written.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeltaReport {
    /// Tensors in it.
    pub tensors: usize,
    /// Elements of the task vector; of the tensors in it for plain deltas.
    pub elements: u64,
    /// Elements that are kept.
    pub kept: u64,
    /// Standard deviation of the task vector, where it was needed.
    pub sigma: Option<f64>,
    /// The number that signs are multiplied by, as stored.
    pub scale: Option<f32>,
    /// Bytes of the coded elements.
    pub payload_bytes: u64,
    /// Bytes of the file: the payload, and the table with the names of the tensors.
    pub file_bytes: u64,
    /// Bytes of the payload by the formula for random positions, where there is one.
    pub expected_bytes: Option<u64>,
    /// Bytes of the elements at 16 bits each.
    pub dense_bytes: u64,
}

impl DeltaReport {
    /// How many times smaller than 16 bits per element the file is.
    pub fn ratio(&self) -> f64 {
        self.dense_bytes as f64 / self.file_bytes.max(1) as f64
    }

    /// Bits of the payload per element.
    pub fn bits_per_element(&self) -> f64 {
        8.0 * self.payload_bytes as f64 / self.elements.max(1) as f64
    }
}

//! The address of one routed expert.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One routed expert of a model: `{"layer":1,"expert":68}` in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertId {
    /// Decoder layer index.
    pub layer: usize,
    /// Expert in the layer.
    pub expert: usize,
}

impl fmt::Display for ExpertId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {}, expert {}", self.layer, self.expert)
    }
}

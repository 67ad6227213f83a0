//! What new values changed.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

/// What became of every new value, compared bit by bit with what it stands in place of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// Tensors that have other values than those of the base, and the maps that changed them. For a tensor of many
    /// experts, each of their maps.
    pub changed: BTreeMap<String, Vec<String>>,
    /// Maps and vectors whose new values are, rounded to the dtype of the tensor, the old ones.
    pub unchanged: Vec<String>,
    /// What was trained and is in no weight, since it is no weight: it stays beside the model.
    pub left_out: Vec<String>,
    /// Sets of experts before and after in layers where experts shared them: who changed has a set of its own.
    pub ungrouped: BTreeMap<usize, [usize; 2]>,
}

impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Names that are written out.
        const NAMES: usize = 8;
        let listed = |names: &[String]| {
            let more = names.len().saturating_sub(NAMES);
            let names = names[..names.len() - more].join(", ");
            if more > 0 { format!("{names} and {more} more") } else { names }
        };
        write!(f, "{} tensors changed", self.changed.len())?;
        if !self.unchanged.is_empty() {
            let (count, names) = (self.unchanged.len(), listed(&self.unchanged));
            write!(f, "; {count} matrices are, rounded, as they were: {names}")?;
        }
        if !self.left_out.is_empty() {
            write!(f, "; left beside the weights: {}", listed(&self.left_out))?;
        }
        for (layer, [before, after]) in &self.ungrouped {
            write!(f, "; experts of layer {layer} share {after} sets of weights instead of {before}")?;
        }
        Ok(())
    }
}

//! Alignment: which unit of one expert stands for which of another.
//!
//! An expert is the sum of its units, so their order means nothing. Averaging two experts unit by unit does mean
//! something only after their units are matched.

mod activations;
mod assignment;
mod pca;
mod weights;

use std::sync::OnceLock;

use moe_checkpoint::{Activation, ExpertWeights};
use serde::{Deserialize, Serialize};

pub use activations::ActivationMatching;
pub use assignment::assign;
pub use pca::{PcaMatching, UnitBasis};
pub use weights::WeightMatching;

use crate::evidence::TokenSample;
use crate::experts::ExpertSource;
use crate::{Error, Result};

/// What a match may look at beside the weights.
#[derive(Clone, Copy)]
pub struct AlignmentContext<'a> {
    /// Sampled tokens of the layer.
    pub sample: Option<&'a TokenSample>,
    /// How gate and up become a unit.
    pub activation: Activation,
    /// Decoder layer index, for messages.
    pub layer: usize,
    /// All experts of the layer.
    pub experts: &'a dyn ExpertSource,
    /// What units are compared in, found when the first two are.
    pub basis: &'a OnceLock<UnitBasis>,
}

/// Matches the units of two experts of one width.
pub trait Alignment {
    /// Cost `[I, I]` of putting unit `j` of `expert` in the place of unit `i` of `reference`: row `i`, column `j`.
    ///
    /// # Errors
    /// [`Error::MissingEvidence`].
    fn costs(
        &self,
        reference: &ExpertWeights,
        expert: &ExpertWeights,
        context: &AlignmentContext<'_>,
    ) -> Result<Vec<f32>>;

    /// Whether it looks at sampled tokens.
    fn needs_sample(&self) -> bool {
        false
    }

    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`].
    fn validate(&self) -> Result<()> {
        Ok(())
    }
}

/// Every alignment, as JSON tagged by `type`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum AlignmentConfig {
    /// Units stay in the order they have.
    #[default]
    None,
    /// By weights.
    Weights(WeightMatching),
    /// By activations on sampled tokens.
    Activations(ActivationMatching),
    /// By weights in few dimensions.
    Pca(PcaMatching),
    /// The sum of the costs of activations and of weights in few dimensions (REAM).
    ActivationsAndPca {
        /// Of activations.
        #[serde(default)]
        activations: ActivationMatching,
        /// Of weights.
        #[serde(default)]
        pca: PcaMatching,
    },
}

impl AlignmentConfig {
    fn parts(&self) -> Vec<&dyn Alignment> {
        match self {
            Self::None => vec![],
            Self::Weights(alignment) => vec![alignment],
            Self::Activations(alignment) => vec![alignment],
            Self::Pca(alignment) => vec![alignment],
            Self::ActivationsAndPca { activations, pca } => vec![activations, pca],
        }
    }

    /// Whether it looks at sampled tokens.
    pub fn needs_sample(&self) -> bool {
        self.parts().into_iter().any(Alignment::needs_sample)
    }

    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`].
    pub fn validate(&self) -> Result<()> {
        self.parts().into_iter().try_for_each(Alignment::validate)
    }

    /// The order of `expert`'s units that fits `reference` best: slot `i` gets unit `order[i]`. `None` if nothing is
    /// aligned.
    ///
    /// Memory: the cost matrix, as f32 and as f64, `12 I^2` bytes, beside the unit vectors of both experts.
    ///
    /// # Errors
    /// As [`Alignment::costs`]; [`Error::Numerics`] for costs that are not finite.
    pub fn order(
        &self,
        reference: &ExpertWeights,
        expert: &ExpertWeights,
        context: &AlignmentContext<'_>,
    ) -> Result<Option<Vec<u32>>> {
        let mut total: Option<Vec<f32>> = None;
        for part in self.parts() {
            let costs = part.costs(reference, expert, context)?;
            match &mut total {
                None => total = Some(costs),
                Some(total) => total.iter_mut().zip(&costs).for_each(|(sum, cost)| *sum += cost),
            }
        }
        total.map(|costs| assign(&costs, reference.width)).transpose()
    }
}

/// Distances of the rows of two matrices of unit rows, from their inner products.
fn unit_distances(products: Vec<f32>) -> Vec<f32> {
    let mut distances = products;
    distances.iter_mut().for_each(|p| *p = (2.0 - 2.0 * p.clamp(-1.0, 1.0)).sqrt());
    distances
}

fn missing_sample(layer: usize) -> Error {
    let what = "a sample of the layer's tokens".to_string();
    Error::MissingEvidence { layer, part: "activation matching", what }
}

#[cfg(test)]
mod tests;

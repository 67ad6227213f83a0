//! Experts that are drawn.

use super::{RunTimeRouting, members::Members};
use crate::{
    Model,
    error::{Error, Result},
    overlay::RouterTokens,
    router::{Routed, Router},
};

/// Another route of equal compute for every token: as many experts as the model's, the best by logits with Gumbel
/// noise, and hence without repetition; their weights are what the model's rule gives these experts by the logits as
/// they are. How routes are sampled to see whether the router's are right (arXiv 2605.07260).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampledRoutes {
    /// Factor on the noise; 0 is the model's own route.
    pub temperature: f64,
    /// Seed of the noise: another one for every route of a token.
    pub seed: u64,
}

impl SampledRoutes {
    /// The rules of a model's layers.
    ///
    /// # Errors
    /// [`Error::Input`] for a temperature out of range; [`Error::Unsupported`] for SparseMixer, which has no weights
    /// for other experts than its own.
    pub fn on(&self, model: &Model) -> Result<RunTimeRouting> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::input("temperature", self.temperature, "a finite number of 0 or more"));
        }
        model.router().check_bias()?;
        RunTimeRouting::everywhere(model.config(), *self)
    }

    /// Gumbel noise of an expert for a token of a wave.
    fn noise(&self, tokens: &RouterTokens<'_>, token: usize, expert: usize) -> f32 {
        let mut hasher = blake3::Hasher::new();
        for part in [self.seed, tokens.wave.id, tokens.layer as u64, token as u64, expert as u64] {
            hasher.update(&part.to_le_bytes());
        }
        let hash = hasher.finalize();
        let bits = hash.as_bytes()[..8].iter().fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
        let even = ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        (self.temperature * -(-even.ln()).ln()) as f32
    }
}

impl Members for SampledRoutes {
    fn choose(&self, tokens: &RouterTokens<'_>, router: &Router) -> Result<Routed> {
        if self.temperature == 0.0 {
            return Ok(router.route(tokens.logits, tokens.experts, tokens.bias));
        }
        let experts = tokens.experts.max(1);
        let noisy = |(i, z): (usize, &f32)| z + self.noise(tokens, i / experts, i % experts);
        let noisy: Vec<f32> = tokens.logits.iter().enumerate().map(noisy).collect();
        let mut routed = router.route(&noisy, tokens.experts, tokens.bias);
        router.weigh_members(tokens.logits, &mut routed, |_| true);
        Ok(routed)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::overlay::RoutingRule;

    pub fn rule(temperature: f64, seed: u64) -> impl RoutingRule {
        SampledRoutes { temperature, seed }
    }
}

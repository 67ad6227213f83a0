//! What a routing looked like, for logs.

use serde::{Deserialize, Serialize};

use crate::routing::{Routing, host};

/// The loads and the decisiveness of one layer's router on one batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoutingRecord {
    /// How many tokens each expert has.
    pub loads: Vec<usize>,
    /// The mean weight of the tokens that an expert has, 0 for an expert without any.
    pub mean_weights: Vec<f32>,
    /// The largest load over the mean load: 1 at perfect balance.
    pub max_over_mean: f32,
    /// The entropy of the loads over that of equal loads: 1 at perfect balance, 0 if one expert has all.
    pub load_entropy: f32,
    /// The mean entropy of a token's probabilities, in nats.
    pub token_entropy: f32,
    /// Experts without a token.
    pub idle: usize,
    /// Experts per token.
    pub experts_per_token: f32,
}

impl RoutingRecord {
    /// Reads a routing back from the device and sums it up.
    pub fn of(routing: &Routing) -> Self {
        let (assignment, experts) = (&routing.assignment, routing.num_experts);
        let (tokens, slots) = (assignment.tokens(), assignment.slots());
        let (loads, weights) = (assignment.loads(experts), host(&routing.weights));
        let mut sums = vec![0f32; experts];
        for token in 0..tokens {
            for (slot, &expert) in assignment.token(token).iter().enumerate() {
                if let Some(sum) = sums.get_mut(expert as usize) {
                    *sum += weights[token * slots + slot];
                }
            }
        }
        let mean_weights = sums.iter().zip(&loads).map(|(sum, &load)| sum / load.max(1) as f32).collect();
        let total = assignment.filled();
        let share = |load: usize| load as f32 / total.max(1) as f32;
        let entropy: f32 = loads.iter().filter(|&&load| load > 0).map(|&load| -share(load) * share(load).ln()).sum();
        let largest = loads.iter().max().copied().unwrap_or(0);
        RoutingRecord {
            mean_weights,
            max_over_mean: share(largest) * experts as f32,
            load_entropy: if experts > 1 { entropy / (experts as f32).ln() } else { 1.0 },
            token_entropy: host(&crate::losses::entropy(routing))[0],
            idle: loads.iter().filter(|&&load| load == 0).count(),
            experts_per_token: total as f32 / tokens.max(1) as f32,
            loads,
        }
    }
}

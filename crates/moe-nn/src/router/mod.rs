//! Routers: which experts a token goes to, and with what weight.
//!
//! Scores are tensors on the device, with gradients; the choice is made on the host, where ties go to the lower index
//! on every backend.

mod balanced;
mod expert_choice;
mod hash;
mod mlp;
mod null_experts;
mod random;
mod recurrent;
mod top_k;
mod top_p;

pub use balanced::{BalancedRouter, BalancedRouterConfig};
pub use expert_choice::{ExpertChoiceRouter, ExpertChoiceRouterConfig};
pub use hash::{HashRouter, HashRouterConfig};
pub use mlp::{GateKind, MlpRouter, MlpRouterConfig};
pub use null_experts::{NullExpertRouter, NullExpertRouterConfig};
pub use random::{GrowthSchedule, RandomRouter, RandomRouterConfig};
pub use recurrent::{GruCell, GruCellConfig, RecurrentRouter, RecurrentRouterConfig};
pub use top_k::{GroupLimit, Noise, TopKRouter, TopKRouterConfig};
pub use top_p::{TopPRouter, TopPRouterConfig};

use burn::module::{Module, ModuleDisplay};
use burn::nn::{Initializer, Linear, LinearConfig};
use burn::tensor::{Device, Tensor};

use crate::assignment::Assignment;
use crate::routing::{RouteContext, Routing};

/// Says which experts each token goes to.
pub trait Router: Module + ModuleDisplay {
    /// The number of experts it chooses from.
    fn num_experts(&self) -> usize;

    /// Routes `[tokens, hidden]`.
    ///
    /// # Panics
    ///
    /// If the context lacks what this router needs.
    fn route(&self, x: Tensor<2>, context: &RouteContext) -> Routing;
}

/// A gate `hidden -> columns` as routers of language models begin: normal with a deviation of 0.02.
pub(crate) fn gate(d_model: usize, columns: usize, bias: bool, device: &Device) -> Linear {
    let initializer = Initializer::Normal { mean: 0.0, std: 0.02 };
    LinearConfig::new(d_model, columns).with_bias(bias).with_initializer(initializer).init(device)
}

/// The `k` highest entries of a row, best first, lower index first among equals.
pub(crate) fn top(row: &[f32], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    let better = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
    if k < order.len() {
        order.select_nth_unstable_by(k, better);
        order.truncate(k);
    }
    order.sort_unstable_by(better);
    order
}

/// The `k` highest experts of every row of `values`, `[tokens, columns]`.
pub(crate) fn top_of_rows(values: &[f32], columns: usize, k: usize) -> Assignment {
    let experts = values.chunks_exact(columns).flat_map(|row| top(row, k)).collect();
    Assignment::new(values.len() / columns, k, experts)
}

/// Checks a number of experts per token.
pub(crate) fn check_top_k(top_k: usize, num_experts: usize) {
    assert!(
        (1..=num_experts).contains(&top_k),
        "experts per token must be within 1..={num_experts}, the number of experts; found {top_k}"
    );
}

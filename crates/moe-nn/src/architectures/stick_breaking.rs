//! ModuleFormer's attention: experts of queries and outputs, and weights that break a stick.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::activation::{sigmoid, softplus};
use burn::tensor::{DType, Device};
use burn::tensor::{IndexingUpdateOp, Tensor, TensorData};

use crate::assignment::Segments;
use crate::experts::matrices;
use crate::grouped::grouped_product;
use crate::router::{MlpRouter, MlpRouterConfig, Router};
use crate::routing::{RouteContext, Routing};

/// Configuration of [`StickBreakingAttention`].
#[derive(Config, Debug)]
pub struct StickBreakingAttentionConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Heads of one expert.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The gate, whose sizes are those of the attention: its `d_model` is replaced by that above.
    pub router: MlpRouterConfig,
}

/// The attention of ModuleFormer (arXiv 2306.04640). An expert is a query and an output projection; keys and values are
/// common to all. A token attends with the queries of each of its experts, and adds up their outputs times the weights
/// of its gate. There are no positions: weights are those of [`stick_breaking`], which prefer near tokens by
/// themselves. Train the gate with [`mutual_information`](crate::losses::mutual_information).
#[derive(Module, Debug)]
pub struct StickBreakingAttention {
    /// The gate.
    pub router: MlpRouter,
    /// Hidden to the queries of an expert, `[experts, hidden, heads * head_dim]`.
    pub query: Param<Tensor<3>>,
    /// Values to hidden, `[experts, heads * head_dim, hidden]`.
    pub output: Param<Tensor<3>>,
    /// Hidden to keys, with a bias.
    pub key: Linear,
    /// Hidden to values, with a bias.
    pub value: Linear,
    heads: usize,
}

impl StickBreakingAttentionConfig {
    /// Makes the attention.
    ///
    /// # Panics
    ///
    /// If a size is 0, or a token takes more experts than there are.
    pub fn init(&self, device: &Device) -> StickBreakingAttention {
        let (d, width, experts) = (self.d_model, self.heads * self.head_dim, self.router.num_experts);
        assert!(d > 0 && width > 0, "attention needs sizes above 0, found {} heads of {}", self.heads, self.head_dim);
        StickBreakingAttention {
            router: MlpRouterConfig { d_model: d, ..self.router.clone() }.init(device),
            query: matrices(experts, d, width, device),
            output: matrices(experts, width, d, device),
            key: LinearConfig::new(d, width).init(device),
            value: LinearConfig::new(d, width).init(device),
            heads: self.heads,
        }
    }
}

/// The weights of stick-breaking attention, `[batch, heads, tokens, tokens] -> [batch, heads, tokens, tokens]`: each
/// query walks back from itself, and key k gets the share `sigmoid(z_k)` of what the keys between them left,
/// `prod_{k < j <= query} (1 - sigmoid(z_j))`. Rows sum to at most 1: what is left is given to nobody.
pub fn stick_breaking(logits: Tensor<4>) -> Tensor<4> {
    let ([_, _, tokens, _], device) = (logits.dims(), logits.device());
    let triangle = |seen: fn(usize, usize) -> bool| {
        let rows = (0..tokens).flat_map(|row| (0..tokens).map(move |column| f32::from(seen(row, column))));
        let data = TensorData::new(rows.collect::<Vec<f32>>(), [1, 1, tokens, tokens]);
        Tensor::<4>::from_data(data, (&device, DType::F32))
    };
    let seen = triangle(|query, key| key <= query);
    let later = triangle(|row, column| row > column);
    let logits = logits.cast(DType::F32);
    let left = -softplus(logits.clone(), 1.0) * seen.clone(); // log(1 - sigmoid(z))
    sigmoid(logits) * seen * left.matmul(later).exp()
}

impl StickBreakingAttention {
    /// `[batch, tokens, hidden] -> [batch, tokens, hidden]`, with the routing of all tokens; a token sees itself and
    /// those before it.
    pub fn forward(&self, x: Tensor<3>) -> (Tensor<3>, Routing) {
        let ([batch, tokens, hidden], device, dtype) = (x.dims(), x.device(), x.dtype());
        let (rows, heads) = (batch * tokens, self.heads);
        let width = self.key.weight.dims()[1];
        let head = width / heads;
        let flat = x.clone().reshape([rows, hidden]);
        let context = RouteContext { causal: true, ..RouteContext::default() };
        let routing = self.router.route(flat.clone(), &context);
        let slots = routing.assignment.slots();
        let segments = Segments::of(&routing.assignment, routing.num_experts);
        let (of_token, of_place) = (segments.tokens(&device), segments.places(&device));

        let sorted = grouped_product(flat.select(0, of_token.clone()), self.query.val(), segments.offsets());
        let places = Tensor::<2>::zeros([rows * slots, width], (&device, dtype));
        let queries = places.select_assign(0, of_place.clone(), sorted, IndexingUpdateOp::Add);
        // Heads of all slots side by side: [batch, slots * heads, tokens, head].
        let queries = queries.reshape([batch, tokens, slots * heads, head]).swap_dims(1, 2);
        let common = |map: &Linear| {
            let all = map.forward(x.clone()).reshape([batch, tokens, 1, heads, head]).repeat_dim(2, slots);
            all.reshape([batch, tokens, slots * heads, head]).swap_dims(1, 2)
        };
        let logits = queries.matmul(common(&self.key).transpose()) / (head as f64).sqrt();
        let seen = stick_breaking(logits).cast(dtype).matmul(common(&self.value));

        let seen = seen.swap_dims(1, 2).reshape([rows * slots, width]).select(0, of_place.clone());
        let outputs = grouped_product(seen, self.output.val(), segments.offsets());
        let weights = routing.weights.clone().reshape([rows * slots, 1]).select(0, of_place).cast(dtype);
        let zeros = Tensor::<2>::zeros([rows, hidden], (&device, dtype));
        let sum = zeros.select_assign(0, of_token, outputs * weights, IndexingUpdateOp::Add);
        (sum.reshape([batch, tokens, hidden]), routing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stick_is_broken_from_the_nearest_key_to_the_farthest() {
        let device = Device::default();
        let z = [[0.3, 9.0, 9.0], [-1.0, 0.5, 9.0], [2.0, -0.7, 0.1f32]];
        let found = stick_breaking(Tensor::from_floats([[z]], &device)).try_to_vec_as::<f32>().unwrap();
        let share = |z: f32| 1.0 / (1.0 + (-z).exp());
        for (query, row) in z.into_iter().enumerate() {
            let mut left = 1.0;
            for (key, z) in row.into_iter().enumerate().rev() {
                let expected = if key > query { 0.0 } else { left * share(z) };
                left -= expected;
                assert!((found[query * 3 + key] - expected).abs() < 1e-6, "query {query}, key {key}");
            }
        }
    }
}

//! Memory layers: very many experts of width one, found by product keys.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::{Initializer, Linear, LinearConfig};
use burn::tensor::activation::softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::experts::Activation;
use crate::router::top;
use crate::routing::host;

/// What a slot holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryValues {
    /// A vector that is added (product-key memory, arXiv 1907.05242).
    #[default]
    Vector,
    /// An expert of width one, `v * act(u . x)` (PEER, arXiv 2407.04153; with `Activation::Identity`, the values of
    /// UltraMemV2, arXiv 2508.18756).
    Expert,
}

/// Configuration of [`MemoryLayer`].
#[derive(Config, Debug)]
pub struct MemoryLayerConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Keys per side; the layer has the square of it slots.
    pub keys: usize,
    /// Slots per head and token.
    #[config(default = 8)]
    pub top_k: usize,
    /// Heads, whose slots are added.
    #[config(default = 1)]
    pub heads: usize,
    /// Width of a key of one side.
    #[config(default = 16)]
    pub key_dim: usize,
    /// What a slot holds.
    #[config(default = "MemoryValues::Expert")]
    pub values: MemoryValues,
    /// The activation of experts of width one.
    #[config(default = "Activation::Gelu")]
    pub activation: Activation,
    /// Whether scores are a softmax over a head's slots; otherwise they are used as they are.
    #[config(default = true)]
    pub softmax: bool,
}

/// A memory layer. A query has two halves; a slot's score is the sum of the scores of its row's and its column's key;
/// the best slots are found among the best rows times the best columns, which is exact, since a slot of the answer has
/// both of its keys among them. Ties go to the lower slot.
///
/// Tables are read by one `select` each, whose gradient is of the size of the table: for tables of up to some ten
/// million numbers.
#[derive(Module, Debug)]
pub struct MemoryLayer {
    /// Hidden to `heads * 2 * key_dim`.
    pub query: Linear,
    /// Keys of rows and of columns, `[2, heads, key_dim, keys]`.
    pub keys: Param<Tensor<4>>,
    /// What experts of width one read, `[slots, hidden]`.
    pub reads: Option<Param<Tensor<2>>>,
    /// What slots give, `[slots, hidden]`.
    pub values: Param<Tensor<2>>,
    heads: usize,
    top_k: usize,
    softmax: bool,
    #[module(skip)]
    activation: Activation,
}

impl MemoryLayerConfig {
    /// Makes the layer.
    ///
    /// # Panics
    ///
    /// If there are fewer keys per side than slots per head and token.
    pub fn init(&self, device: &Device) -> MemoryLayer {
        let (d, n, heads) = (self.d_model, self.keys, self.heads);
        assert!((1..=n).contains(&self.top_k), "slots per head must be within 1..={n}, the keys; found {}", self.top_k);
        assert!(heads > 0, "there is no head");
        let normal = |std: f64| Initializer::Normal { mean: 0.0, std };
        let table = |std: f64| normal(std).init([n * n, d], device);
        let reads = self.values == MemoryValues::Expert;
        MemoryLayer {
            query: LinearConfig::new(d, heads * 2 * self.key_dim).with_bias(false).init(device),
            keys: normal((self.key_dim as f64).powf(-0.5)).init([2, heads, self.key_dim, n], device),
            reads: reads.then(|| table((d as f64).powf(-0.5))),
            values: table((d as f64).powf(-0.5)),
            heads,
            top_k: self.top_k,
            softmax: self.softmax,
            activation: self.activation,
        }
    }
}

impl MemoryLayer {
    /// The number of slots.
    pub fn slots(&self) -> usize {
        self.values.dims()[0]
    }

    /// `[tokens, hidden] -> [tokens, hidden]`, with the slots of each token, `tokens * heads * top_k` of them.
    pub fn forward(&self, x: Tensor<2>) -> (Tensor<2>, Vec<u32>) {
        let ([tokens, hidden], device) = (x.dims(), x.device());
        let [_, heads, key_dim, n] = self.keys.dims();
        let k = self.top_k;
        let query = self.query.forward(x.clone()).reshape([tokens, heads, 2, key_dim]);
        let query = query.permute([2, 1, 0, 3]); // [2, heads, tokens, key_dim]
        let sides = query.matmul(self.keys.val()); // [2, heads, tokens, keys]
        let found = host(&sides);
        let side = |side: usize, head: usize, token: usize| {
            let from = ((side * heads + head) * tokens + token) * n;
            &found[from..from + n]
        };
        let (mut rows, mut columns) = (Vec::new(), Vec::new());
        for token in 0..tokens {
            for head in 0..heads {
                for slot in best_slots(side(0, head, token), side(1, head, token), k) {
                    rows.push(i64::from(slot / n as u32));
                    columns.push(i64::from(slot % n as u32));
                }
            }
        }
        let slots: Vec<u32> = rows.iter().zip(&columns).map(|(row, column)| (row * n as i64 + column) as u32).collect();
        // [heads, tokens, k], as the scores of a side are.
        let indices = |values: Vec<i64>| {
            let index = Tensor::<3, Int>::from_data(TensorData::new(values, [tokens, heads, k]), &device);
            index.swap_dims(0, 1)
        };
        let scores = |side: usize, index: Tensor<3, Int>| {
            sides.clone().narrow(0, side, 1).reshape([heads, tokens, n]).gather(2, index)
        };
        let scores = scores(0, indices(rows)) + scores(1, indices(columns)); // [heads, tokens, k]
        let scores = if self.softmax { softmax(scores, 2) } else { scores };
        let weights = scores.swap_dims(0, 1).reshape([tokens, heads * k, 1]);
        let count = slots.len();
        let index = slots.iter().map(|slot| i64::from(*slot)).collect::<Vec<i64>>();
        let index = Tensor::<1, Int>::from_data(TensorData::new(index, [count]), &device);
        let fetch =
            |table: &Param<Tensor<2>>| table.val().select(0, index.clone()).reshape([tokens, self.heads * k, hidden]);
        let weights = match &self.reads {
            Some(reads) => {
                let inner = fetch(reads).matmul(x.reshape([tokens, hidden, 1])); // [tokens, heads * k, 1]
                weights * self.activation.of(inner)
            }
            None => weights,
        };
        let output = weights.swap_dims(1, 2).matmul(fetch(&self.values)).reshape([tokens, hidden]);
        (output, slots)
    }
}

/// The `k` slots with the highest sums of a row's and a column's score.
fn best_slots(rows: &[f32], columns: &[f32], k: usize) -> Vec<u32> {
    let n = columns.len() as u32;
    let mut candidates: Vec<u32> = Vec::with_capacity(k * k);
    let best_columns = top(columns, k);
    for row in top(rows, k) {
        candidates.extend(best_columns.iter().map(|column| row * n + column));
    }
    candidates.sort_unstable();
    let sums: Vec<f32> =
        candidates.iter().map(|slot| rows[(slot / n) as usize] + columns[(slot % n) as usize]).collect();
    top(&sums, k).into_iter().map(|place| candidates[place as usize]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn product_keys_find_what_a_search_of_all_slots_finds() {
        for seed in 0..50 {
            let score = |i: usize| ((i * 7919 + seed * 104_729) % 1013) as f32 / 97.0;
            let rows: Vec<f32> = (0..12).map(score).collect();
            let columns: Vec<f32> = (12..24).map(score).collect();
            let all: Vec<f32> = rows.iter().flat_map(|row| columns.iter().map(move |column| row + column)).collect();
            let sum = |slots: &[u32]| slots.iter().map(|slot| all[*slot as usize]).collect::<Vec<f32>>();
            assert_eq!(sum(&best_slots(&rows, &columns, 5)), sum(&top(&all, 5)));
        }
    }
}

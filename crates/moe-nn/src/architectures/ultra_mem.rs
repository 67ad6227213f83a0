//! UltraMemV2: a memory beside every feed-forward network, with Tucker-decomposed retrieval.

use burn::config::Config;
use burn::module::{Module, Param, RunningState};
use burn::nn::{Initializer, Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::tensor::{Device, Int, Tensor, TensorData};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::tucker::{Tucker, leading_pair};
use crate::experts::Activation;
use crate::routing::host;

/// How values begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum UltraMemInit {
    /// Normal with a deviation of 0.02, as the released code has it.
    #[default]
    Released,
    /// With the deviation at which outputs vary as those of a feed-forward network do. The paper's equation 26 gives
    /// the fourth power of the deviation, as its derivation shows.
    VarianceMatched {
        /// Width of the feed-forward network.
        d_ff: usize,
        /// Layers of the model.
        layers: usize,
        /// Standard deviation of the scores of retrieved slots, whose mean is about 1.
        score_deviation: f64,
    },
}

/// Configuration of [`UltraMem`].
#[derive(Config, Debug)]
pub struct UltraMemConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Keys per side that one layer would have without sharing; the table has their square of rows per layer.
    pub keys: usize,
    /// Layers that read the table.
    #[config(default = 1)]
    pub layers: usize,
    /// The share of the table that a layer reaches; none for tables of its own, `1 / layers`.
    pub share: Option<f64>,
    /// Slots per token.
    #[config(default = 8)]
    pub top_k: usize,
    /// Width of a key of one side.
    #[config(default = 16)]
    pub key_dim: usize,
    /// Width of what a slot gives, a multiple of `cores`.
    #[config(default = 32)]
    pub value_dim: usize,
    /// Width of what a slot reads.
    #[config(default = 16)]
    pub pre_value_dim: usize,
    /// Components of a score.
    #[config(default = 2)]
    pub rank: usize,
    /// Scores of a slot, each for its part of the value.
    #[config(default = 2)]
    pub cores: usize,
    /// Whether each component has a query of its own, as in the paper; the code's default is one for all.
    #[config(default = true)]
    pub query_per_rank: bool,
    /// Key pairs per row of the table and side (implicit value expansion).
    #[config(default = 1)]
    pub expand: usize,
    /// What is applied to what a slot reads; the published layer has nothing there.
    #[config(default = "Activation::Identity")]
    pub activation: Activation,
    /// How values begin.
    #[config(default = "UltraMemInit::Released")]
    pub init: UltraMemInit,
    /// Seed of the permutation of slots, where there are more than rows.
    #[config(default = 0)]
    pub seed: u64,
}

/// The rows of a memory, which several layers may read.
#[derive(Module, Debug)]
pub struct MemoryTable {
    /// What slots read, `[rows, pre_value_dim]`.
    pub reads: Param<Tensor<2>>,
    /// What slots give, `[rows, value_dim]`.
    pub values: Param<Tensor<2>>,
}

/// The retrieval and projections of one layer.
#[derive(Module, Debug)]
pub struct UltraMemLayer {
    /// Hidden to queries of both sides.
    pub query: Linear,
    /// Norm of queries over a key's width.
    pub query_norm: RmsNorm,
    /// Norm of keys.
    pub key_norm: RmsNorm,
    /// Keys of both sides, `[2, rank, keys, key_dim]`.
    pub keys: Param<Tensor<4>>,
    /// What joins the components of both sides to scores, `[cores, rank, rank]`.
    pub cores: Param<Tensor<3>>,
    /// The leading singular vectors of the sum of the cores, `[2, rank]`, which rank the keys of a side: recorded, not
    /// trained by gradients.
    pub sides: RunningState<Tensor<2>>,
    /// Hidden to what slots read.
    pub project: Linear,
    /// What slots give to hidden.
    pub output: Linear,
    top_k: usize,
    first_row: usize,
    #[module(skip)]
    activation: Activation,
    /// The row, before `first_row`, of each slot: none where slots are rows.
    #[module(skip)]
    rows_of_slots: Option<Vec<u32>>,
}

/// UltraMemV2 (arXiv 2508.18756). A slot (i, j) has `cores` scores `s_i C_c t_j`, with s and t what a query has in
/// common with the keys of its row and column; candidates are the best rows times the best columns by the rank-one part
/// of the cores, which finds the best of those with positive scores. What a slot gives is `(P x . read) (score_c
/// value_c)`: an expert of width one without activation. Put it behind a norm, beside the feed-forward network of every
/// block, and add both: `x + ffn(norm(x)) + memory(norm(x))`.
///
/// Call [`UltraMem::update_sides`] after every step of the optimizer. Values are to learn at four times the common
/// rate, falling to it over the training.
#[derive(Module, Debug)]
pub struct UltraMem {
    /// The rows of all layers.
    pub table: MemoryTable,
    /// The layers.
    pub layers: Vec<UltraMemLayer>,
}

impl UltraMemConfig {
    /// Keys per side of a layer before expansion.
    fn side(&self) -> usize {
        let share = self.share.unwrap_or(1.0 / self.layers as f64);
        let rows = share * (self.layers * self.keys * self.keys) as f64;
        // A private table has exactly the square of `keys`, whatever the division above rounds to.
        (rows + 1e-6).sqrt().floor() as usize
    }

    fn value_deviation(&self) -> f64 {
        match self.init {
            UltraMemInit::Released => 0.02,
            UltraMemInit::VarianceMatched { d_ff, layers, score_deviation } => {
                let slots = (self.pre_value_dim * self.top_k * self.value_dim * layers) as f64;
                let fourth = 0.2 * (d_ff * self.d_model) as f64 / (slots * (1.0 + score_deviation.powi(2)));
                fourth.powf(0.25)
            }
        }
    }

    /// Makes the memory.
    ///
    /// # Panics
    ///
    /// If a size is 0, values do not divide into the cores, the share is not within `1 / layers` and 1, or a token
    /// takes more slots than there are.
    pub fn init(&self, device: &Device) -> UltraMem {
        let sizes = [self.d_model, self.keys, self.layers, self.key_dim, self.value_dim, self.pre_value_dim];
        assert!(sizes.iter().chain(&[self.rank, self.cores, self.expand]).all(|size| *size > 0), "a size is 0: {self}");
        assert!(
            self.value_dim.is_multiple_of(self.cores),
            "values of {} do not divide into {} cores",
            self.value_dim,
            self.cores
        );
        let share = self.share.unwrap_or(1.0 / self.layers as f64);
        let least = 1.0 / self.layers as f64 - 1e-9;
        assert!((least..=1.0).contains(&share), "the share must be within 1/{} and 1, found {share}", self.layers);
        let slots = (self.side() * self.expand).pow(2);
        assert!((1..=slots).contains(&self.top_k), "slots per token must be within 1..={slots}, found {}", self.top_k);
        let normal = |std: f64| Initializer::Normal { mean: 0.0, std };
        let rows = self.layers * self.keys * self.keys;
        let table = |width: usize| normal(self.value_deviation()).init([rows, width], device);
        UltraMem {
            table: MemoryTable { reads: table(self.pre_value_dim), values: table(self.value_dim) },
            layers: (0..self.layers).map(|layer| self.layer(layer, device)).collect(),
        }
    }

    fn layer(&self, layer: usize, device: &Device) -> UltraMemLayer {
        let normal = |std: f64| Initializer::Normal { mean: 0.0, std };
        let linear = |from: usize, to: usize, std: f64| {
            LinearConfig::new(from, to).with_bias(false).with_initializer(normal(std)).init(device)
        };
        let (width, side) = (self.key_dim as f64, self.side() * self.expand);
        let norm = || RmsNorm {
            gamma: Initializer::Constant { value: width.powf(-0.4) }.init([self.key_dim], device),
            ..RmsNormConfig::new(self.key_dim).init(device)
        };
        let queries = if self.query_per_rank { self.rank } else { 1 };
        let rows = self.side().pow(2);
        let made = UltraMemLayer {
            query: linear(self.d_model, 2 * queries * self.key_dim, width.powf(-0.5)),
            query_norm: norm(),
            key_norm: norm(),
            keys: normal(width.powf(-0.5)).init([2, self.rank, side, self.key_dim], device),
            cores: Initializer::Uniform { min: 0.0, max: 1.0 }.init([self.cores, self.rank, self.rank], device),
            sides: RunningState::new(Tensor::zeros([2, self.rank], device)),
            project: linear(self.d_model, self.pre_value_dim, (self.d_model as f64).powf(-0.5)),
            output: linear(self.value_dim, self.d_model, (self.value_dim as f64).powf(-0.5)),
            top_k: self.top_k,
            first_row: layer * self.keys * self.keys,
            activation: self.activation,
            rows_of_slots: (self.expand > 1).then(|| {
                let mut addresses: Vec<u32> = (0..(side * side) as u32).collect();
                addresses.shuffle(&mut ChaCha8Rng::seed_from_u64(self.seed.wrapping_add(layer as u64)));
                addresses.into_iter().map(|address| address % rows as u32).collect()
            }),
        };
        made.update_sides();
        made
    }
}

impl UltraMemLayer {
    /// Finds the leading singular vectors of the cores anew, with the sign that is nearest to that of the last ones.
    pub fn update_sides(&self) {
        let [cores, rank, _] = self.cores.dims();
        let values = host(&self.cores.val());
        let sum = |cell: usize| (0..cores).map(|core| f64::from(values[core * rank * rank + cell])).sum::<f64>();
        let last: Vec<f64> = host(&self.sides.value_sync()).into_iter().map(f64::from).collect();
        let pair = leading_pair(&(0..rank * rank).map(sum).collect::<Vec<f64>>(), &last);
        let pair: Vec<f32> = pair.into_iter().map(|value| value as f32).collect();
        let device = self.sides.value_sync().device();
        self.sides.update(Tensor::from_data(TensorData::new(pair, [2, rank]), &device));
        self.sides.value_sync();
    }

    /// `[tokens, hidden] -> [tokens, hidden]`, with the rows of the table that each token read, `tokens * top_k`.
    pub fn forward(&self, x: Tensor<2>, table: &MemoryTable) -> (Tensor<2>, Vec<u32>) {
        let (tokens, device, k) = (x.dims()[0], x.device(), self.top_k);
        let [_, rank, side, key_dim] = self.keys.dims();
        let query = self.query.forward(x.clone());
        let queries = query.dims()[1] / (2 * key_dim);
        let query = query.reshape([tokens, 2, queries, key_dim]).permute([1, 2, 0, 3]);
        let query = self.query_norm.forward(query).repeat_dim(1, rank / queries); // [2, rank, tokens, key_dim]
        let keys = self.key_norm.forward(self.keys.val());
        let scores = query.matmul(keys.transpose()); // [2, rank, tokens, side]

        let (found, cores) = (host(&scores), host(&self.cores.val()));
        let sides = host(&self.sides.value_sync());
        let tucker = Tucker { rank, side, cores: &cores, sides: &sides };
        let (mut rows, mut columns) = (Vec::new(), Vec::new());
        for token in 0..tokens {
            let of = |s: usize, component: usize| &found[((s * rank + component) * tokens + token) * side..][..side];
            let components = |s: usize| (0..rank).map(|component| of(s, component)).collect::<Vec<_>>();
            for slot in tucker.best(&components(0), &components(1), k) {
                rows.push(i64::from(slot) / side as i64);
                columns.push(i64::from(slot) % side as i64);
            }
        }
        let slots = rows.iter().zip(&columns).map(|(row, column)| (row * side as i64 + column) as usize);
        let total = table.values.dims()[0];
        let read: Vec<u32> = slots
            .map(|slot| {
                let row = self.rows_of_slots.as_ref().map_or(slot, |rows| rows[slot] as usize);
                ((row + self.first_row) % total) as u32
            })
            .collect();

        // Components of the chosen keys, [tokens * k, rank].
        let of_side = |s: usize, index: Vec<i64>| {
            let index = Tensor::<3, Int>::from_data(TensorData::new(index, [1, tokens, k]), &device);
            let scores = scores.clone().narrow(0, s, 1).reshape([rank, tokens, side]);
            scores.gather(2, index.repeat_dim(0, rank)).reshape([rank, tokens * k]).transpose()
        };
        let count = self.cores.dims()[0];
        let cores = self.cores.val().permute([1, 0, 2]).reshape([rank, count * rank]);
        let joined = of_side(0, rows).matmul(cores).reshape([tokens * k, count, rank]);
        let scores = (joined * of_side(1, columns).reshape([tokens * k, 1, rank])).sum_dim(2); // [tokens * k, cores, 1]

        let index: Vec<i64> = read.iter().map(|row| i64::from(*row)).collect();
        let index = Tensor::<1, Int>::from_data(TensorData::new(index, [tokens * k]), &device);
        let (reads, values) = (table.reads.val().select(0, index.clone()), table.values.val().select(0, index));
        let ([_, pre], [_, width]) = (reads.dims(), values.dims());
        let inner = reads.reshape([tokens, k, pre]).matmul(self.project.forward(x).reshape([tokens, pre, 1]));
        let inner = self.activation.of(inner).reshape([tokens * k, 1, 1]);
        let given = values.reshape([tokens * k, count, width / count]) * (scores * inner);
        let given = given.reshape([tokens, k, width]).sum_dim(1).reshape([tokens, width]);
        (self.output.forward(given), read)
    }
}

impl UltraMem {
    /// What layer `layer` adds to a token, `[tokens, hidden] -> [tokens, hidden]`, with the rows of the table that each
    /// token read.
    ///
    /// # Panics
    ///
    /// If there is no such layer.
    pub fn forward(&self, layer: usize, x: Tensor<2>) -> (Tensor<2>, Vec<u32>) {
        self.layers[layer].forward(x, &self.table)
    }

    /// Brings what ranks the keys of a side in line with the cores: after every step of the optimizer.
    pub fn update_sides(&self) {
        self.layers.iter().for_each(UltraMemLayer::update_sides);
    }
}

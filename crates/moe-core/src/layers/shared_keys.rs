//! Attention that reads the keys and values of a layer before it, and has none of its own.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use burn::tensor::Tensor;

use super::{ChosenKeys, Linear, Norm};
use crate::{
    adapters::Wanted,
    error::{Error, Result},
    kernels::{attention::AttentionShape, rope::RotaryTable, rows::RowAccumulator},
};

/// The query projection of a layer that reads keys and values of a layer before it.
#[derive(Clone, Debug)]
pub struct QueryOnly {
    /// `[heads * D, H]`.
    pub query: Linear,
    /// Norm of every query head `[D]`.
    pub norm: Option<Norm>,
    /// Whether queries are rotated.
    pub rotary: bool,
    /// The layer whose keys and values it reads.
    pub keys_of: usize,
}

/// Queries as projected, where there is a norm.
#[derive(Clone, Debug)]
pub(super) struct Saved(Option<Tensor<2>>);

impl QueryOnly {
    /// Rotated queries `[T, heads * D]` of the normed input `z [T, H]`.
    pub(super) fn project(&self, z: &Tensor<2>, table: &RotaryTable, shape: &AttentionShape) -> (Tensor<2>, Saved) {
        let q = self.query.forward(z);
        let saved = Saved(self.norm.is_some().then(|| q.clone()));
        let q = match &self.norm {
            Some(norm) => norm.forward(&by_head(&q, shape)).reshape(q.dims()),
            None => q,
        };
        (if self.rotary { table.rotate(q, shape.heads, 0, false) } else { q }, saved)
    }

    /// Gradient with respect to `z`, if it is wanted, from that of the queries.
    pub(super) fn backward(
        &self,
        z: &dyn Fn() -> Tensor<2>,
        Saved(saved): &Saved,
        table: &RotaryTable,
        shape: &AttentionShape,
        dq: Tensor<2>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        let dq = if self.rotary { table.rotate(dq, shape.heads, 0, true) } else { dq };
        let dq = match (&self.norm, saved) {
            (Some(norm), Some(q)) => {
                norm.backward(&by_head(q, shape), &by_head(&dq, shape), wanted.parameters).reshape(q.dims())
            }
            _ => dq,
        };
        self.query.backward(z, &dq, wanted)
    }
}

/// Rows `[T * heads, D]` of `x [T, heads * D]`.
fn by_head(x: &Tensor<2>, shape: &AttentionShape) -> Tensor<2> {
    let [n, columns] = x.dims();
    x.clone().reshape([n * columns / shape.head_dim, shape.head_dim])
}

/// Keys `[T, kv_heads * D]` and values `[T, kv_heads * D_v]`, or the gradients at them.
type Pair = [Tensor<2>; 2];

/// Keys and values of the tokens of a wave in the layers that lend theirs to layers after them; and on the way back the
/// gradients at them.
#[derive(Debug, Default)]
pub struct SharedKeys {
    forward: Mutex<BTreeMap<usize, Pair>>,
    gradients: Mutex<BTreeMap<usize, Pair>>,
}

impl SharedKeys {
    pub(super) fn put(&self, layer: usize, keys: &Tensor<2>, values: &Tensor<2>) {
        lock(&self.forward).insert(layer, [keys.clone(), values.clone()]);
    }

    /// Keys and values of a layer.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the layer did not run on these tokens.
    pub(super) fn get(&self, layer: usize) -> Result<Pair> {
        lock(&self.forward).get(&layer).cloned().ok_or_else(|| {
            Error::Unsupported(format!("tokens without layer {layer}, whose keys and values a layer after it reads"))
        })
    }

    /// Adds the gradients that a layer after this one has at its keys and values.
    pub(super) fn add_gradients(&self, layer: usize, [keys, values]: Pair) {
        let mut gradients = lock(&self.gradients);
        let sum = match gradients.remove(&layer) {
            Some(others) => added(others, [keys, values]),
            None => [keys, values],
        };
        gradients.insert(layer, sum);
    }

    /// The gradients at the keys and values of a layer: its own, and those of the layers after it, which are forgotten.
    pub(super) fn with_gradients(&self, layer: usize, own: Pair) -> Pair {
        match lock(&self.gradients).remove(&layer) {
            Some(others) => added(own, others),
            None => own,
        }
    }
}

fn added([a, b]: Pair, [c, d]: Pair) -> Pair {
    [(a, c), (b, d)].map(|(a, b)| {
        let mut sum = RowAccumulator::from_tensor(a);
        sum.add(&b);
        sum.into_tensor()
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What layers hand to layers after them beside the residual stream, for the tokens of a wave.
#[derive(Debug, Default)]
pub struct Handover {
    /// The keys that indexers chose.
    pub chosen: ChosenKeys,
    /// Keys and values.
    pub keys: SharedKeys,
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::{
        super::{
            AttentionLayer, Projections,
            tests::{HIDDEN, TOKENS, check_quotients, grouped, linear, norm, table},
        },
        *,
    };
    use crate::kernels::testing::pattern;

    #[test]
    fn gradients_at_keys_of_a_layer_before_flow_through_the_layer_that_made_them() {
        let lender = AttentionLayer { lent_as: Some(3), ..grouped(true, None) };
        let reader = |seed| AttentionLayer {
            projections: Projections::QueryOnly(Box::new(QueryOnly {
                query: linear([8, HIDDEN], seed),
                norm: Some(norm(4, seed + 1, false)),
                rotary: true,
                keys_of: 3,
            })),
            ..grouped(true, None)
        };
        let layers = [lender, reader(30), reader(40)];
        let (x, dy, table) = (pattern([TOKENS, HIDDEN], 20), pattern([TOKENS, HIDDEN], 21), table(4, false));
        let sequences = [0..2, 2..TOKENS];
        // The streams before every layer, and what the layers left.
        let forward = |x: &Tensor<2>, handover: &Handover| {
            let (mut streams, mut tapes) = (vec![x.clone()], Vec::new());
            for layer in &layers {
                let x = &streams[streams.len() - 1];
                let tape = layer.project(x, &table, handover).unwrap();
                let next = layer.mix(x, &tape, &sequences);
                streams.push(next);
                tapes.push(tape);
            }
            (streams, tapes)
        };
        let handover = Handover::default();
        let (streams, tapes) = forward(&x, &handover);
        let wanted = Wanted { input: true, parameters: false };
        let mut d = dy.clone();
        for (i, layer) in layers.iter().enumerate().rev() {
            d = layer.backward(&streams[i], &tapes[i], &sequences, &table, d, &handover, wanted).unwrap();
        }
        check_quotients(&x, &dy, d, |x| forward(x, &Handover::default()).0.pop().unwrap());
    }

    #[test]
    fn keys_of_a_layer_that_did_not_run_are_refused() {
        let error = SharedKeys::default().get(3).unwrap_err().to_string();
        assert!(error.contains("without layer 3"), "{error}");
    }
}

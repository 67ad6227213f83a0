//! The choice of the keys that queries see: by an indexer of the layer's own, or as a layer before it chose.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use burn::tensor::Tensor;

use super::{Norm, slice_rows};
use crate::{
    error::{Error, Result},
    kernels::{
        attention::Selection,
        indexer::{IndexerShape, select},
        rope::RotaryTable,
        weight::Weight,
    },
};

/// An indexer. It is not trained, and no gradient goes through what it chooses.
#[derive(Clone, Debug)]
pub struct IndexerLayer {
    /// From the latent of queries `[heads * D, R_q]`.
    pub query: Weight,
    /// One head of keys `[D, H]`.
    pub key: Weight,
    /// LayerNorm of the keys `[D]`.
    pub key_norm: Norm,
    /// Weights of the heads `[heads, H]`.
    pub heads: Weight,
    /// Its sizes.
    pub shape: IndexerShape,
    /// Whether neighboring columns are rotated together.
    pub interleaved: bool,
}

/// What an indexer makes of some tokens.
#[derive(Clone, Debug)]
pub struct Indexed {
    /// Rotated queries `[n, heads * D]`.
    pub queries: Tensor<2>,
    /// Rotated keys `[n, D]`.
    pub keys: Tensor<2>,
    /// Weights of the heads `[n, heads]`.
    pub heads: Tensor<2>,
}

impl IndexerLayer {
    /// What it makes of what attention reads, `z [n, H]`, and of the normed latent of queries `[n, R_q]`.
    pub fn read(&self, z: &Tensor<2>, latent: &Tensor<2>, table: &RotaryTable) -> Indexed {
        let table = table.paired(self.interleaved);
        let IndexerShape { heads, head_dim, .. } = self.shape;
        let factor = ((heads * head_dim) as f32).powf(-0.5);
        Indexed {
            queries: table.rotate(self.query.forward(latent, None), heads, 0, false),
            keys: table.rotate(self.key_norm.forward(&self.key.forward(z, None)), 1, 0, false),
            heads: self.heads.forward(z, None).mul_scalar(factor),
        }
    }
}

/// How the keys of a layer are chosen.
#[derive(Clone, Debug)]
pub enum KeyChoice {
    /// By the layer's own indexer.
    Own {
        /// The indexer.
        indexer: Box<IndexerLayer>,
        /// The layer, if others take the same keys.
        shared_as: Option<usize>,
    },
    /// As a layer before chose.
    Of {
        /// That layer.
        layer: usize,
        /// Most keys that a query sees.
        keys: usize,
    },
}

impl KeyChoice {
    /// Most keys that a query sees.
    pub fn keys(&self) -> usize {
        match self {
            Self::Own { indexer, .. } => indexer.shape.keys,
            Self::Of { keys, .. } => *keys,
        }
    }

    /// The keys of the queries of some tokens. Spans are their rows and the keys of their sequences, or nothing for a
    /// sequence in which all see all; `indexed` is asked for what the layer's own indexer made of the tokens.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the layer that chooses did not run on these tokens.
    pub(crate) fn choose(
        &self,
        chosen: &ChosenKeys,
        indexed: impl FnOnce() -> Indexed,
        spans: impl FnOnce(&Indexed) -> Vec<(Range<usize>, Option<Tensor<2>>)>,
    ) -> Result<Arc<Selection>> {
        match self {
            Self::Own { indexer, shared_as } => {
                let indexed = indexed();
                let spans = spans(&indexed);
                let selection = Arc::new(select(&indexed.queries, &indexed.heads, &spans, indexer.shape));
                if let Some(layer) = shared_as {
                    chosen.put(*layer, selection.clone());
                }
                Ok(selection)
            }
            Self::Of { layer, keys } => chosen.get(*layer).ok_or_else(|| {
                Error::Unsupported(format!(
                    "sequences of more than {keys} tokens without layer {layer}, whose indexer chooses the keys of a \
                     layer after it"
                ))
            }),
        }
    }
}

/// Spans of whole sequences with their keys; nothing for those in which all queries see all.
pub(crate) fn whole_sequences(
    indexed: &Indexed,
    sequences: &[Range<usize>],
    most: usize,
) -> Vec<(Range<usize>, Option<Tensor<2>>)> {
    let span = |s: &Range<usize>| (s.clone(), (s.len() > most).then(|| slice_rows(&indexed.keys, s)));
    sequences.iter().map(span).collect()
}

/// The keys that layers chose for the tokens of a wave, where layers after them take the same.
#[derive(Debug, Default)]
pub struct ChosenKeys(Mutex<BTreeMap<usize, Arc<Selection>>>);

impl ChosenKeys {
    fn put(&self, layer: usize, selection: Arc<Selection>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(layer, selection);
    }

    /// Takes what `other` has.
    pub(crate) fn follow(&self, other: &Self) {
        let found = other.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = found;
    }

    fn get(&self, layer: usize) -> Option<Arc<Selection>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&layer).cloned()
    }
}

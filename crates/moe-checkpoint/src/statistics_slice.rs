//! A part of statistics that one of several processes folds.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::statistics::Array;
use crate::{ArrayKind, Counts, Error, Fold, MoeShape, Provenance, Result, Statistics};

/// The share of every array that one of several owners folds: an equal part of the values of every layer, vectors
/// whole, and a sample of rows with one owner alone.
///
/// What is added value by value is added alike whoever does it: slices of waves, folded in the order of the waves by
/// their owners, are put together to the very bits of [`Statistics::fold`] over whole waves.
///
/// ```
/// use moe_checkpoint::{Fold, MoeLayerShape, MoeShape, Provenance, Statistics, StatisticsSlice};
///
/// let shape = MoeShape { gateless: false, hidden_size: 4, top_k: 1, layers: vec![MoeLayerShape { layer: 0, widths: vec![3, 2] }] };
/// let mut wave = Statistics::new(&shape, Provenance::new("model", "data", "{}"));
/// wave.begin(0);
/// wave.unit_mut("fisher", Fold::Sum, 0, 1)?[0] += 0.5;
/// let slices = (0..2).map(|owner| wave.slice(owner, 2)).collect();
/// assert_eq!(StatisticsSlice::whole(slices)?, wave);
/// # Ok::<(), moe_checkpoint::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct StatisticsSlice(Statistics);

/// What stands before the values of a slice in a message.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Meta {
    waves: BTreeSet<u64>,
    counts: Counts,
    /// Kind, fold and number of values by layer.
    arrays: BTreeMap<String, (ArrayKind, Fold, Vec<usize>)>,
    wide: bool,
}

/// All of them: what a group of one folds.
impl From<Statistics> for StatisticsSlice {
    fn from(whole: Statistics) -> Self {
        Self(whole)
    }
}

impl Statistics {
    /// The slice of owner `owner` of `owners`.
    pub fn slice(&self, owner: usize, owners: usize) -> StatisticsSlice {
        let mut slice = self.empty_copy();
        for (place, (id, array)) in self.arrays.iter().enumerate() {
            let of = |(layer, values): (usize, &Vec<f64>)| match (array.kind, array.fold()) {
                (_, Fold::Lowest { .. }) => {
                    if place % owners == owner {
                        values.clone()
                    } else {
                        Vec::new()
                    }
                }
                (kind, _) => {
                    let whole = kind.atom_len(&self.shape, self.shape.layers.get(layer));
                    let atoms = values.len() / whole;
                    values[whole * (atoms * owner / owners)..whole * (atoms * (owner + 1) / owners)].to_vec()
                }
            };
            let layers = array.layers.iter().enumerate().map(of).collect();
            slice.arrays.insert(id.clone(), Array::of_layers(array.kind, array.fold(), layers));
        }
        StatisticsSlice(slice)
    }
}

impl StatisticsSlice {
    /// Of no wave yet.
    pub fn new(shape: &MoeShape, provenance: Provenance) -> Self {
        Self(Statistics::new(shape, provenance))
    }

    /// Combines the same owner's slice of other waves into this one, as [`Statistics::fold`] does whole ones.
    ///
    /// # Errors
    /// Those of [`Statistics::fold`].
    pub fn fold(&mut self, other: &Self) -> Result<()> {
        self.0.fold(&other.0)
    }

    /// The statistics that the slices of all owners are, in their order.
    ///
    /// # Errors
    /// [`Error::Group`] for slices of different waves or arrays, or none.
    pub fn whole(slices: Vec<Self>) -> Result<Statistics> {
        let mut slices = slices.into_iter().map(|slice| slice.0);
        let mut whole = slices.next().ok_or_else(|| Error::Group("found no slices of statistics".into()))?;
        for slice in slices {
            let ids = |of: &Statistics| of.arrays.keys().cloned().collect::<Vec<_>>();
            if (slice.waves(), slice.counts()) != (whole.waves(), whole.counts()) || ids(&slice) != ids(&whole) {
                let found = format!("waves {:?} of {:?}", slice.waves(), ids(&slice));
                let expected = format!("waves {:?} of {:?}", whole.waves(), ids(&whole));
                return Err(Error::Group(format!("slices of statistics: found {found}, expected {expected}")));
            }
            for (into, from) in whole.arrays.values_mut().zip(slice.arrays.into_values()) {
                into.layers.iter_mut().zip(from.layers).for_each(|(into, from)| into.extend(from));
            }
        }
        Ok(whole)
    }

    /// Bytes that its values take in memory.
    pub fn bytes(&self) -> usize {
        8 * self.values()
    }

    fn values(&self) -> usize {
        self.0.arrays.values().flat_map(|array| &array.layers).map(Vec::len).sum()
    }

    /// As a message: values as f32, which those of a wave's file are, or as f64 (`wide`).
    ///
    /// # Errors
    /// [`Error::Group`] for what is no JSON.
    pub fn to_message(&self, wide: bool) -> Result<Vec<u8>> {
        let arrays =
            self.0.arrays.iter().map(|(id, array)| {
                (id.clone(), (array.kind, array.fold(), array.layers.iter().map(Vec::len).collect()))
            });
        let meta = Meta { waves: self.0.waves().clone(), counts: self.0.counts(), arrays: arrays.collect(), wide };
        let meta =
            serde_json::to_vec(&meta).map_err(|error| Error::Group(format!("a slice of statistics: {error}")))?;
        let mut message = Vec::with_capacity(8 + meta.len() + if wide { 8 } else { 4 } * self.values());
        message.extend((meta.len() as u64).to_le_bytes());
        message.extend(meta);
        for value in self.0.arrays.values().flat_map(|array| array.layers.iter().flatten()) {
            match wide {
                true => message.extend(value.to_le_bytes()),
                false => message.extend((*value as f32).to_le_bytes()),
            }
        }
        Ok(message)
    }

    /// Of a message, for statistics of this shape and provenance.
    ///
    /// # Errors
    /// [`Error::Group`] for what is no such message.
    pub fn from_message(shape: &MoeShape, provenance: Provenance, message: &[u8]) -> Result<Self> {
        let bad = |reason: String| Error::Group(format!("a slice of statistics from another rank: {reason}"));
        let short = || bad(format!("found {} bytes, expected more", message.len()));
        let (len, rest) = message.split_first_chunk::<8>().ok_or_else(short)?;
        let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| short())?;
        let (meta, mut values) = rest.split_at_checked(len).ok_or_else(short)?;
        let meta: Meta = serde_json::from_slice(meta).map_err(|error| bad(error.to_string()))?;
        let width = if meta.wide { 8 } else { 4 };
        let mut slice = Statistics::new(shape, provenance);
        meta.waves.iter().for_each(|wave| slice.begin(*wave));
        slice.add_counts(meta.counts.tokens, meta.counts.sequences, meta.counts.loss_tokens);
        for (id, (kind, fold, lens)) in meta.arrays {
            if !kind.takes(fold) || lens.len() != Array::new(kind, fold, shape).layers.len() {
                return Err(bad(format!("`{id}` ({kind}, folded by {fold}) in {} layers", lens.len())));
            }
            let mut layers = Vec::with_capacity(lens.len());
            for len in lens {
                let bytes = len.checked_mul(width).and_then(|bytes| values.split_at_checked(bytes));
                let (of_layer, rest) = bytes.ok_or_else(short)?;
                values = rest;
                layers.push(match meta.wide {
                    true => of_layer.as_chunks::<8>().0.iter().map(|v| f64::from_le_bytes(*v)).collect(),
                    false => of_layer.as_chunks::<4>().0.iter().map(|v| f64::from(f32::from_le_bytes(*v))).collect(),
                });
            }
            slice.arrays.insert(id, Array::of_layers(kind, fold, layers));
        }
        match values.is_empty() {
            true => Ok(Self(slice)),
            false => Err(bad(format!("{} bytes too many", values.len()))),
        }
    }
}

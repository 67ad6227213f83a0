//! New values for maps and vectors of a model: the one way in which trained values and adapters get into weights.
//!
//! A [`Rewrite`] says which maps get a new matrix and which tensors new rows; [`Rewrite::on`] is the model that has
//! them. Matrices are made when they are asked for, from those of the base, and rounded to the dtype of the tensor that
//! holds them.
//!
//! Experts of a [grouped](Checkpoint::grouped) checkpoint share sets of weights, but each may get a matrix of its own.
//! Whoever does gets a set of its own with it: there is no place in which two experts could be given one matrix by
//! mistake.

mod changes;
mod layout;
mod source;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
};

use moe_checkpoint::{Checkpoint, Dtype, Step, decode_f32, encode};
use moe_core::adapters::Site;

pub use changes::Changes;
pub(crate) use layout::{Layout, Part};

use crate::{Error, Result};
use source::Source;

/// A new matrix of a linear map.
pub(crate) trait NewMatrix: Send + Sync {
    /// `[out, in]`.
    fn dims(&self) -> [usize; 2];

    /// Whether it does not depend on the old one, which is then not read.
    fn replaces(&self) -> bool {
        false
    }

    /// The matrix, row-major, from the old one; that is empty if it is [replaced](Self::replaces).
    fn matrix(&self, old: &[f32]) -> Result<Vec<f32>>;
}

/// New values of a tensor outside linear maps, by rows of its first dimension.
pub(crate) trait NewRows: Send + Sync {
    /// What changes it, for the report.
    fn what(&self) -> String;

    /// Some rows, row-major.
    fn rows(&self, rows: Range<usize>, base: &Checkpoint) -> Result<Vec<f32>>;
}

/// Fails if what new values are made of may be other than it was.
pub(crate) type Unchanged = Box<dyn Fn() -> Result<()> + Send + Sync>;

/// Which weights of a model get new values.
pub(crate) struct Rewrite {
    /// New matrices.
    pub maps: BTreeMap<Site, Box<dyn NewMatrix>>,
    /// New rows, by the name of the tensor.
    pub tensors: BTreeMap<String, Box<dyn NewRows>>,
    /// Asked before anything is made.
    pub unchanged: Unchanged,
}

/// A model with new values.
#[derive(Clone)]
pub(crate) struct Rewritten {
    model: Arc<Checkpoint>,
    source: Arc<Source>,
}

impl Rewrite {
    /// `base`, which has no quantization, with the new values; `step` gets the layout that it has then.
    pub fn on(self, base: &Arc<Checkpoint>, step: impl FnOnce(&Layout) -> Step) -> Result<Rewritten> {
        let layout = Layout::new(base, &self)?;
        let step = step(&layout);
        let description = layout.description.clone();
        let source = Arc::new(Source::new(base.clone(), self, layout, step));
        let model = Arc::new(Checkpoint::from_source(description, source.clone())?);
        Ok(Rewritten { model, source })
    }
}

impl Rewritten {
    pub fn model(&self) -> &Arc<Checkpoint> {
        &self.model
    }

    /// Names of the tensors that may have new values.
    pub fn tensors(&self) -> BTreeSet<String> {
        self.source.tensors()
    }

    /// What became of every map and tensor: makes all of them.
    pub fn changes(&self) -> Result<Changes> {
        self.source.changes()
    }
}

/// Values as a file holds them.
pub(crate) fn encoded(tensor: &str, dtype: Dtype, values: &[f32]) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(values.len() * dtype.bitsize() / 8);
    if !encode(dtype, values, &mut bytes) {
        return Err(Error::input(format!("dtype of tensor `{tensor}`"), dtype, "F32, F16 or BF16"));
    }
    let mut largest = 0f32;
    for value in values {
        if !value.is_finite() {
            return Err(Error::input(format!("new values of tensor `{tensor}`"), value, "finite numbers"));
        }
        largest = largest.max(value.abs());
    }
    // A finite number may be too large for the dtype.
    let (mut stored, mut again) = (Vec::new(), Vec::new());
    encode(dtype, &[largest], &mut stored);
    decode_f32(dtype, &stored, &mut again);
    match again.first().is_some_and(|value| value.is_finite()) {
        true => Ok(bytes),
        false => Err(Error::input(format!("new values of tensor `{tensor}`"), largest, format!("numbers of {dtype}"))),
    }
}

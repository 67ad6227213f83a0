//! Self-attention with its norm and residual, whatever makes queries, keys and values.

use std::{ops::Range, sync::Arc};

use burn::tensor::{Tensor, activation::sigmoid};

use super::{
    GroupedProjections, Handover, KeyChoice, LatentProjections, Linear, Norm, QueryOnly, grouped,
    indexer::{Indexed, whole_sequences},
    latent, scaled, shared_keys,
};
use crate::{
    adapters::Wanted,
    error::Result,
    kernels::{
        attention::{AttentionShape, Selection, attention, attention_backward},
        rope::RotaryTable,
        rows::RowAccumulator,
    },
};

/// Self-attention with its norm.
#[derive(Clone, Debug)]
pub struct AttentionLayer {
    /// Input norm, where there is one.
    pub norm: Option<Norm>,
    /// Norm of the output, where there is one.
    pub output_norm: Option<Norm>,
    /// What makes queries, keys and values.
    pub projections: Projections,
    /// Output projection `[H, heads * D_v]`.
    pub output: Linear,
    /// Heads, scale, window and sinks.
    pub shape: AttentionShape,
    /// How the keys that a query sees are chosen, where they are.
    pub choice: Option<KeyChoice>,
    /// The layer, if layers after it read its keys and values.
    pub lent_as: Option<usize>,
    /// Factor on the output before it is added to the input.
    pub residual: f32,
    /// Factor on the normed input, where the output is added to that instead of the input itself.
    pub carry: Option<f32>,
}

/// What makes queries, keys and values of the normed input.
#[derive(Clone, Debug)]
pub enum Projections {
    /// One projection each.
    Grouped(Box<GroupedProjections>),
    /// Through low-rank latents.
    Latent(Box<LatentProjections>),
    /// Of queries alone: keys and values are those of a layer before.
    QueryOnly(Box<QueryOnly>),
}

/// What the backward pass of [`AttentionLayer`] needs of the forward pass.
#[derive(Clone, Debug)]
pub struct AttentionTape {
    /// Rotated queries `[T, heads * D]`.
    pub q: Tensor<2>,
    /// Rotated keys `[T, kv_heads * D]`.
    pub k: Tensor<2>,
    /// Values `[T, kv_heads * D_v]`.
    pub v: Tensor<2>,
    /// Logits of the gates on the outputs of the heads `[T, heads * D_v]`, where the layer has them.
    pub gate: Option<Tensor<2>>,
    /// The keys that queries see, where these are not all before them.
    pub selection: Option<Arc<Selection>>,
    saved: Saved,
}

// One per layer, and nearly always the larger one.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug)]
enum Saved {
    Grouped(grouped::Saved),
    Latent(latent::Saved),
    QueryOnly(shared_keys::Saved),
}

/// What generation keeps of some tokens, and their queries.
#[derive(Clone, Debug)]
pub struct CacheEntry {
    /// Queries `[n, heads * D]` in the form that fits the cached keys.
    pub q: Tensor<2>,
    /// Keys `[n, kv_heads * D]` to cache; `None` where the layer reads those of [a layer
    /// before](AttentionLayer::keys_of).
    pub k: Option<Tensor<2>>,
    /// Values `[n, kv_heads * D_v]` to cache; `None` without keys, and where these serve as values.
    pub v: Option<Tensor<2>>,
    /// Logits of the gates on the outputs of the heads `[n, heads * D_v]`, where the layer has them.
    pub gate: Option<Tensor<2>>,
    /// What the layer's own indexer makes of the tokens, where it has one.
    pub indexed: Option<Indexed>,
}

impl AttentionLayer {
    /// What the projections read.
    fn normed(&self, x: &Tensor<2>) -> Tensor<2> {
        self.norm.as_ref().map_or_else(|| x.clone(), |norm| norm.forward(x))
    }

    /// The layer before this one whose keys and values it reads, if it makes none of its own.
    pub fn keys_of(&self) -> Option<usize> {
        match &self.projections {
            Projections::QueryOnly(of) => Some(of.keys_of),
            Projections::Grouped(_) | Projections::Latent(_) => None,
        }
    }

    /// Queries, keys and values of `x [T, H]`, rotated by `table`; keys and values that are those of a layer before
    /// from `handover`.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) where that layer did not run.
    pub fn project(&self, x: &Tensor<2>, table: &RotaryTable, handover: &Handover) -> Result<AttentionTape> {
        let z = self.normed(x);
        let tape = match &self.projections {
            Projections::Grouped(grouped) => {
                let ([q, k, v], gate, saved) = grouped.project(&z, table, &self.shape);
                AttentionTape { q, k, v, gate, selection: None, saved: Saved::Grouped(saved) }
            }
            Projections::Latent(latent) => {
                let ([q, k, v], saved) = latent.project(&z, table);
                AttentionTape { q, k, v, gate: latent.gates(&z), selection: None, saved: Saved::Latent(saved) }
            }
            Projections::QueryOnly(of) => {
                let [k, v] = handover.keys.get(of.keys_of)?;
                let (q, saved) = of.project(&z, table, &self.shape);
                AttentionTape { q, k, v, gate: None, selection: None, saved: Saved::QueryOnly(saved) }
            }
        };
        if let Some(layer) = self.lent_as {
            handover.keys.put(layer, &tape.k, &tape.v);
        }
        Ok(tape)
    }

    /// The same, with the keys that the queries of `sequences` see.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) where a layer that makes or chooses them did not run.
    pub fn project_chosen(
        &self,
        x: &Tensor<2>,
        table: &RotaryTable,
        sequences: &[Range<usize>],
        handover: &Handover,
    ) -> Result<AttentionTape> {
        let mut tape = self.project(x, table, handover)?;
        let longest = sequences.iter().map(Range::len).max().unwrap_or(0);
        if let Some(choice) = self.choice.as_ref().filter(|choice| longest > choice.keys()) {
            let indexed = || self.indexed(&self.normed(x), &tape.saved, table).expect("the layer has an indexer");
            let spans = |indexed: &Indexed| whole_sequences(indexed, sequences, choice.keys());
            tape.selection = Some(choice.choose(&handover.chosen, indexed, spans)?);
        }
        Ok(tape)
    }

    /// What the layer's own indexer makes of `z`.
    fn indexed(&self, z: &Tensor<2>, saved: &Saved, table: &RotaryTable) -> Option<Indexed> {
        match (&self.choice, &self.projections, saved) {
            (Some(KeyChoice::Own { indexer, .. }), Projections::Latent(latent), Saved::Latent(saved)) => {
                Some(indexer.read(z, &latent.query_latent(saved)?, table))
            }
            _ => None,
        }
    }

    /// `x + attention(norm(x))`, given the projections of `x`.
    pub fn mix(&self, x: &Tensor<2>, tape: &AttentionTape, sequences: &[Range<usize>]) -> Tensor<2> {
        let heads = attention(&tape.q, &tape.k, &tape.v, sequences, &self.shape, tape.selection.as_deref());
        self.residual(x, &gated(heads, tape.gate.as_ref()))
    }

    /// `x + norm(output(heads))`, the latter times the residual factor.
    pub fn residual(&self, x: &Tensor<2>, heads: &Tensor<2>) -> Tensor<2> {
        let output = self.output.forward(heads);
        let output = match &self.output_norm {
            Some(norm) => norm.forward(&output),
            None => output,
        };
        let mut sum = RowAccumulator::from_tensor(scaled(output, self.residual));
        match self.carry {
            Some(carry) => sum.add(&scaled(self.normed(x), carry)),
            None => sum.add(x),
        }
        sum.into_tensor()
    }

    /// Gradient with respect to `x`, if it is wanted, from the gradient of [`mix`](Self::mix)'s result; and those of
    /// what is trained. Gradients at keys and values of a layer before go into `handover`, and come from there to the
    /// layer that made them.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        x: &Tensor<2>,
        tape: &AttentionTape,
        sequences: &[Range<usize>],
        table: &RotaryTable,
        dy: Tensor<2>,
        handover: &Handover,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        let selection = tape.selection.as_deref();
        let heads = || attention(&tape.q, &tape.k, &tape.v, sequences, &self.shape, selection);
        let through = Wanted { input: true, ..wanted };
        let d_output = scaled(dy.clone(), self.residual);
        let d_output = match &self.output_norm {
            Some(norm) => {
                let output = self.output.forward(&gated(heads(), tape.gate.as_ref()));
                norm.backward(&output, &d_output, wanted.parameters)
            }
            None => d_output,
        };
        let (d_heads, d_gate) = match &tape.gate {
            None => (self.output.backward(heads, &d_output, through)?, None),
            Some(gate) => {
                let (heads, open) = (heads(), sigmoid(gate.clone()));
                let d_gated = self.output.backward(|| heads.clone() * open.clone(), &d_output, through)?;
                let closing = open.clone() * open.clone().neg().add_scalar(1.0); // the derivative of the sigmoid
                (d_gated.clone() * open, Some(d_gated * heads * closing))
            }
        };
        let (dq, dk, dv) = attention_backward(&tape.q, &tape.k, &tape.v, sequences, &self.shape, selection, &d_heads);
        drop(d_heads);
        let [dk, dv] = match self.lent_as {
            Some(layer) => handover.keys.with_gradients(layer, [dk, dv]),
            None => [dk, dv],
        };
        let z = || self.normed(x);
        // a norm that is trained is behind the projections
        let trained = self.norm.as_ref().is_some_and(Norm::is_trained);
        let wanted_z = Wanted { input: wanted.input || trained, ..wanted };
        let dz = match (&self.projections, &tape.saved) {
            (Projections::Grouped(grouped), Saved::Grouped(saved)) => {
                grouped.backward(&z, saved, &tape.v, table, &self.shape, [dq, dk, dv], d_gate, wanted_z)
            }
            (Projections::Latent(latent), Saved::Latent(saved)) => {
                latent.backward(&z, saved, table, [dq, dk, dv], d_gate, wanted_z)
            }
            (Projections::QueryOnly(of), Saved::QueryOnly(saved)) => {
                handover.keys.add_gradients(of.keys_of, [dk, dv]);
                of.backward(&z, saved, table, &self.shape, dq, wanted_z)
            }
            _ => unreachable!("a tape belongs to the layer that wrote it"),
        }?;
        let dz = match self.carry {
            Some(carry) => {
                let mut dz = RowAccumulator::from_tensor(dz);
                dz.add(&scaled(dy.clone(), carry));
                dz.into_tensor()
            }
            None => dz,
        };
        let dx = match &self.norm {
            Some(norm) => norm.backward(x, &dz, wanted.parameters),
            None => dz,
        };
        wanted.input.then(|| {
            let mut dx = RowAccumulator::from_tensor(dx);
            if self.carry.is_none() {
                dx.add(&dy);
            }
            dx.into_tensor()
        })
    }

    /// What generation keeps of the tokens `x [n, H]`.
    pub fn cache_entry(&self, x: &Tensor<2>, table: &RotaryTable) -> CacheEntry {
        let z = self.normed(x);
        match &self.projections {
            Projections::Grouped(grouped) => {
                let ([q, k, v], gate, _) = grouped.project(&z, table, &self.shape);
                CacheEntry { q, k: Some(k), v: Some(v), gate, indexed: None }
            }
            Projections::Latent(latent) => {
                let (q, k, saved) = latent.absorbed(&z, table);
                let indexed = self.indexed(&z, &Saved::Latent(saved), table);
                CacheEntry { q, k: Some(k), v: None, gate: latent.gates(&z), indexed }
            }
            Projections::QueryOnly(of) => {
                let (q, _) = of.project(&z, table, &self.shape);
                CacheEntry { q, k: None, v: None, gate: None, indexed: None }
            }
        }
    }

    /// Shape of attention over cached keys.
    pub fn cached_shape(&self) -> AttentionShape {
        match &self.projections {
            Projections::Grouped(_) | Projections::QueryOnly(_) => self.shape.clone(),
            Projections::Latent(latent) => latent.absorbed_shape(&self.shape),
        }
    }

    /// Outputs of the heads from those of attention over cached keys, with the gates of the [entry](CacheEntry::gate).
    pub fn cached_heads(&self, heads: Tensor<2>, gate: Option<&Tensor<2>>) -> Tensor<2> {
        match &self.projections {
            Projections::Grouped(_) | Projections::QueryOnly(_) => gated(heads, gate),
            Projections::Latent(latent) => gated(latent.expand_absorbed(heads), gate),
        }
    }
}

/// `heads * sigmoid(gate)`.
fn gated(heads: Tensor<2>, gate: Option<&Tensor<2>>) -> Tensor<2> {
    match gate {
        Some(gate) => heads * sigmoid(gate.clone()),
        None => heads,
    }
}

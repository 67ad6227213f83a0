//! How much of what attention could say a layer does say.

use burn::tensor::Tensor;

use crate::{
    Engine, EngineOptions, Model,
    data::{Sequence, Wave},
    error::{Error, Result},
    host::{self, HostView},
    kernels::{
        attention::{AttentionShape, Selection, attention},
        rope::Positions,
    },
    layers::{Handover, MixerLayer, slice_rows},
    trace::{Observer, Signals, WaveInfo},
};

/// Tokens of a sequence that are looked at, at most: maps grow with their square, ranks with their cube.
const TOKENS: usize = 256;
/// Sequences that are looked at, at most.
const SEQUENCES: usize = 32;

/// ARank (gamma-MoD, arXiv 2410.13859): the rank of the attention maps of every layer, mean over heads and sequences;
/// `None` for layers whose tokens are mixed by something else than attention over keys. A low rank says that tokens
/// attend alike, which makes a layer a candidate for skipping.
///
/// Singular values above `T * eps * s_max` count, with `eps` that of f32, as `torch.linalg.matrix_rank` counts them:
/// the paper does not say its tolerance. The first 32 sequences of `waves` are looked at, and of each the first 256
/// tokens.
///
/// # Errors
/// [`Error::Input`] for no sequence; whatever stops the model.
pub fn attention_ranks(model: &Model, waves: &[Wave]) -> Result<Vec<Option<f64>>> {
    let cut = |sequence: &Sequence| Sequence::new(sequence.ids.iter().take(TOKENS).copied().collect());
    let sequences: Vec<Sequence> = waves.iter().flat_map(|wave| &wave.sequences).take(SEQUENCES).map(cut).collect();
    if sequences.is_empty() {
        return Err(Error::input("sequences to measure attention on", 0, "at least one"));
    }
    let engine = Engine::new(model, EngineOptions::default());
    let mut ranks = Ranks { model, wave: None, handover: Vec::new(), sums: vec![None; model.config().layers.len()] };
    for (id, sequence) in sequences.into_iter().enumerate() {
        engine.run(&Wave { id: id as u64, sequences: vec![sequence] }, &mut ranks)?;
    }
    Ok(ranks.sums.into_iter().map(|found| found.map(|(sum, count)| sum / count.max(1.0))).collect())
}

struct Ranks<'m> {
    model: &'m Model,
    wave: Option<WaveInfo>,
    /// Keys that layers chose, for every sequence.
    handover: Vec<Handover>,
    /// Sum of the ranks of every layer, and their number.
    sums: Vec<Option<(f64, f64)>>,
}

impl Observer for Ranks<'_> {
    fn needs(&self) -> Signals {
        Signals { hidden: true, ..Signals::NONE }
    }

    fn begin_wave(&mut self, wave: &WaveInfo) -> Result<()> {
        self.wave = Some(wave.clone());
        self.handover = wave.sequences.iter().map(|_| Handover::default()).collect();
        Ok(())
    }

    fn hidden(&mut self, layer: usize, hidden: &Tensor<2>) -> Result<()> {
        let MixerLayer::Attention(attention) = self.model.mixer(layer)? else { return Ok(()) };
        let Some(wave) = &self.wave else { return Ok(()) };
        for (sequence, handover) in wave.sequences.iter().zip(&self.handover) {
            let tokens = sequence.tokens.len();
            let tables = self.model.rotary_tables(&[Positions { range: 0..tokens, length: tokens }]);
            let x = slice_rows(hidden, &sequence.tokens);
            let table = tables.of(self.model.config(), layer);
            let tape = attention.project_chosen(&x, table, std::slice::from_ref(&(0..tokens)), handover)?;
            let (sum, count) = self.sums[layer].get_or_insert((0.0, 0.0));
            for map in maps(&tape.q, &tape.k, &attention.shape, tape.selection.as_deref()) {
                *sum += rank(&map, tokens)? as f64;
                *count += 1.0;
            }
        }
        Ok(())
    }
}

/// The attention map `[T, T]` of every head of one sequence: what attention makes of values that are one-hot.
fn maps(q: &Tensor<2>, k: &Tensor<2>, shape: &AttentionShape, selection: Option<&Selection>) -> Vec<Vec<f32>> {
    let tokens = q.dims()[0];
    let mut one_hot = vec![0.0f32; tokens * shape.kv_heads * tokens];
    for t in 0..tokens {
        for head in 0..shape.kv_heads {
            one_hot[(t * shape.kv_heads + head) * tokens + t] = 1.0;
        }
    }
    let values = host::from_vec(one_hot, [tokens, shape.kv_heads * tokens], &q.device());
    let shape = AttentionShape { value_dim: tokens, ..shape.clone() };
    let found = HostView::new(&attention(q, k, &values, std::slice::from_ref(&(0..tokens)), &shape, selection));
    let rows = |head: usize| {
        let row = move |t: usize| (t * shape.heads + head) * tokens..(t * shape.heads + head + 1) * tokens;
        (0..tokens).map(row)
    };
    (0..shape.heads).map(|head| rows(head).flat_map(|row| found.as_slice()[row].to_vec()).collect()).collect()
}

/// Rank of a square matrix by its singular values.
fn rank(map: &[f32], side: usize) -> Result<usize> {
    let matrix = faer::Mat::from_fn(side, side, |i, j| f64::from(map[i * side + j]));
    let values = matrix.singular_values();
    let values = values.map_err(|_| Error::input("singular values of an attention map", "none", "numbers"))?;
    let largest = values.iter().copied().fold(0.0, f64::max);
    let tolerance = side as f64 * f64::from(f32::EPSILON) * largest;
    Ok(values.iter().filter(|value| **value > tolerance).count())
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn maps_are_causal_distributions_and_ranks_are_those_of_the_definition() {
        let device = Device::flex();
        let (tokens, shape) = (
            6,
            AttentionShape {
                heads: 2,
                kv_heads: 1,
                head_dim: 4,
                value_dim: 4,
                scale: 0.5,
                window: None,
                chunk: None,
                sinks: None,
            },
        );
        let values = |seed: f32, n: usize| (0..n).map(|i| (i as f32 * 1.7 + seed).sin()).collect::<Vec<f32>>();
        let q = host::from_vec(values(0.3, tokens * 8), [tokens, 8], &device);
        let k = host::from_vec(values(1.1, tokens * 4), [tokens, 4], &device);
        let found = maps(&q, &k, &shape, None);
        let (q, k) = (HostView::new(&q), HostView::new(&k));
        for (head, map) in found.iter().enumerate() {
            for t in 0..tokens {
                let score = |s: usize| -> f64 {
                    (0..4).map(|d| q.as_slice()[t * 8 + head * 4 + d] * k.as_slice()[s * 4 + d]).sum::<f32>() as f64
                        * 0.5
                };
                let sum: f64 = (0..=t).map(|s| score(s).exp()).sum();
                for s in 0..tokens {
                    let expected = if s <= t { score(s).exp() / sum } else { 0.0 };
                    assert!((f64::from(map[t * tokens + s]) - expected).abs() < 1e-5, "{head} {t} {s}");
                }
            }
            assert_eq!(rank(map, tokens).unwrap(), tokens);
        }
        // everybody looks at the first token alone; two groups that look alike
        let first: Vec<f32> = (0..16).map(|i| f32::from(u8::from(i % 4 == 0))).collect();
        assert_eq!(rank(&first, 4).unwrap(), 1);
        let two: Vec<f32> = (0..16).map(|i| f32::from(u8::from((i / 4) % 2 == i % 4))).collect();
        assert_eq!(rank(&two, 4).unwrap(), 2);
    }
}

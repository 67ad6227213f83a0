//! How much each layer changes what goes through it.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    host::HostView,
    trace::{LayerOutput, Observer, Signals, WaveInfo},
};

/// Collects, over the tokens of waves, how much layers and spans of layers change the residual stream: block influence
/// (ShortGPT, arXiv 2403.03853) over all tokens, angular distance (arXiv 2403.17887) at the last token of every
/// sequence.
///
/// Blind to scale, both: a layer that only makes the stream longer counts as doing nothing, so that the
/// [ratio of norms](LayerInfluence::norm_ratio) stands beside them. The stream after the last layer is taken before the
/// final norm.
#[derive(Clone, Debug, Default)]
pub struct Influence {
    layers: usize,
    wave: Option<WaveInfo>,
    /// What entered the layer that runs.
    entered: Vec<f32>,
    at: usize,
    sums: Vec<Sums>,
    /// Last tokens of the sequences of the wave by layer input `[L + 1][S, H]`.
    last: Vec<Vec<f32>>,
    /// Sum of the angular distances of every pair of layer inputs `[L + 1, L + 1]`.
    angles: Vec<f64>,
    sequences: u64,
    tokens: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    cosine: f64,
    ratio: f64,
    /// Of the feed-forward half of an MoE layer, and its tokens.
    half: (f64, u64),
}

/// What was seen of a layer, and of the spans that begin with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerInfluence {
    /// Decoder layer.
    pub layer: usize,
    /// `1 - cos` of what enters and leaves it, mean over tokens, in [0, 2].
    pub block: f64,
    /// The same of its feed-forward half alone, in layers with routed experts.
    pub feed_forward: Option<f64>,
    /// Length of what leaves it over that of what enters it, mean over tokens.
    pub norm_ratio: f64,
    /// Angular distance `arccos(cos) / pi` over the span of n layers that begins with it, for n = 1, 2, ..; mean over
    /// the last tokens of sequences, in [0, 1].
    pub spans: Vec<f64>,
    /// Mean rank of its attention maps over heads and sequences, where it was measured
    /// ([`attention_ranks`](super::attention_ranks)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_rank: Option<f64>,
}

/// Cosine of two rows, in [-1, 1], and their lengths. Of a row of zeros, a half.
fn cosine(a: &[f32], b: &[f32]) -> (f64, f64, f64) {
    let (mut dot, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(b) {
        let (x, y) = (f64::from(*x), f64::from(*y));
        (dot, aa, bb) = (dot + x * y, aa + x * x, bb + y * y);
    }
    let cosine = dot / (aa.sqrt() * bb.sqrt());
    (if cosine.is_nan() { 0.5 } else { cosine.clamp(-1.0, 1.0) }, aa.sqrt(), bb.sqrt())
}

impl Influence {
    /// Has seen nothing of a model with so many layers.
    pub fn new(layers: usize) -> Self {
        let side = layers + 1;
        Self { layers, sums: vec![Sums::default(); layers], angles: vec![0.0; side * side], ..Self::default() }
    }

    /// What was seen of every layer.
    ///
    /// # Errors
    /// [`Error::Input`] if no token was seen.
    pub fn layers(&self) -> Result<Vec<LayerInfluence>> {
        if self.tokens == 0 {
            return Err(Error::input("tokens to measure layers on", 0, "at least one"));
        }
        let (tokens, side) = (self.tokens as f64, self.layers + 1);
        let of = |(layer, sums): (usize, &Sums)| LayerInfluence {
            layer,
            block: 1.0 - sums.cosine / tokens,
            feed_forward: (sums.half.1 > 0).then(|| 1.0 - sums.half.0 / sums.half.1 as f64),
            norm_ratio: sums.ratio / tokens,
            spans: (layer + 1..side).map(|end| self.angles[layer * side + end] / self.sequences as f64).collect(),
            attention_rank: None,
        };
        Ok(self.sums.iter().enumerate().map(of).collect())
    }

    /// The stream at the border of two layers.
    fn stream(&mut self, border: usize, x: &Tensor<2>) -> Result<()> {
        let Some(wave) = &self.wave else { return Ok(()) };
        let view = HostView::new(x);
        let (values, columns) = (view.as_slice(), x.dims()[1]);
        if border > 0 {
            if border != self.at + 1 {
                let expected = format!("layer {}: all layers in order", self.at + 1);
                return Err(Error::input("layer of the stream", border, expected));
            }
            let sums = &mut self.sums[border - 1];
            for (before, after) in self.entered.chunks_exact(columns).zip(values.chunks_exact(columns)) {
                let (cosine, from, to) = cosine(before, after);
                sums.cosine += cosine;
                sums.ratio += to / from.max(f64::MIN_POSITIVE);
            }
        }
        let last = |s: &crate::trace::SequenceInfo| &values[(s.tokens.end - 1) * columns..s.tokens.end * columns];
        self.last.push(wave.sequences.iter().flat_map(last).copied().collect());
        (self.entered, self.at) = (values.to_vec(), border);
        Ok(())
    }
}

impl Observer for Influence {
    fn needs(&self) -> Signals {
        Signals { hidden: true, streams: true, ..Signals::NONE }
    }

    fn begin_wave(&mut self, wave: &WaveInfo) -> Result<()> {
        (self.wave, self.at) = (Some(wave.clone()), 0);
        self.last.clear();
        Ok(())
    }

    fn hidden(&mut self, layer: usize, hidden: &Tensor<2>) -> Result<()> {
        self.stream(layer, hidden)
    }

    fn last_hidden(&mut self, hidden: &Tensor<2>) -> Result<()> {
        self.stream(self.layers, hidden)
    }

    fn output(&mut self, output: &LayerOutput<'_>) -> Result<()> {
        let columns = output.input.dims()[1];
        let (before, after) = (HostView::new(output.input), HostView::new(output.output));
        let half = &mut self.sums[output.layer].half;
        for (before, after) in before.as_slice().chunks_exact(columns).zip(after.as_slice().chunks_exact(columns)) {
            half.0 += cosine(before, after).0;
            half.1 += 1;
        }
        Ok(())
    }

    fn end_wave(&mut self, wave: &WaveInfo) -> Result<()> {
        let side = self.layers + 1;
        if self.last.len() != side {
            return Err(Error::input("borders of layers seen", self.last.len(), side));
        }
        let sequences = wave.sequences.len();
        let columns = self.last[0].len() / sequences.max(1);
        for a in 0..side {
            for b in a + 1..side {
                let pairs = self.last[a].chunks_exact(columns).zip(self.last[b].chunks_exact(columns));
                let sum: f64 = pairs.map(|(x, y)| cosine(x, y).0.acos() / std::f64::consts::PI).sum();
                self.angles[a * side + b] += sum;
            }
        }
        self.sequences += sequences as u64;
        self.tokens += wave.tokens as u64;
        self.wave = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turned_row_has_influence_two_and_a_longer_one_none() {
        let row = [0.3f32, -1.2, 0.7];
        let turned: Vec<f32> = row.iter().map(|x| -2.0 * x).collect();
        let (c, from, to) = cosine(&row, &turned);
        assert!((1.0 - c - 2.0).abs() < 1e-12 && (c.acos() / std::f64::consts::PI - 1.0).abs() < 1e-7);
        assert!((to / from - 2.0).abs() < 1e-6);
        let longer: Vec<f32> = row.iter().map(|x| 3.0 * x).collect();
        assert!((1.0 - cosine(&row, &longer).0).abs() < 1e-12);
        assert_eq!(cosine(&row, &[0.0; 3]).0, 0.5);
    }
}

//! The values of an adapter, on the host.

use std::collections::BTreeMap;

use moe_checkpoint::{ExpertMatrix, ExpertPart, MatrixId, Role};

use super::{
    config::{LoraConfig, scale},
    linear::Start,
    maps::Maps,
};
use crate::{Error, Result};

/// `s B A`, an addition to one map.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// `A [rank, in]`.
    pub a: Vec<f32>,
    /// `B [out, rank]`.
    pub b: Vec<f32>,
    /// The rank.
    pub rank: usize,
    /// `lora_alpha`.
    pub alpha: f64,
    /// Whether the scale is `alpha / sqrt(rank)` instead of `alpha / rank`.
    pub rslora: bool,
    /// DoRA's magnitude `[out]`.
    pub magnitude: Option<Vec<f32>>,
    /// `c [out]`, which `B` adds (`lora_bias`): the scale times it is added to the output.
    pub bias: Option<Vec<f32>>,
    /// `A_0` and `B_0`, what the adapter was in the beginning, if that is taken from the weight.
    pub(crate) start: Option<Start>,
}

impl LowRank {
    /// An addition of `a [rank, in]` and `b [out, rank]` that counts `alpha / rank`.
    pub fn new(a: Vec<f32>, b: Vec<f32>, rank: usize, alpha: f64) -> Self {
        Self { a, b, rank, alpha, rslora: false, magnitude: None, bias: None, start: None }
    }

    /// What it counts.
    pub fn scale(&self) -> f64 {
        scale(self.alpha, self.rank, self.rslora)
    }

    /// `[out, in]` of the map it is for.
    pub fn dims(&self) -> [usize; 2] {
        [self.b.len() / self.rank.max(1), self.a.len() / self.rank.max(1)]
    }

    /// Trained and frozen numbers.
    pub fn values(&self) -> usize {
        let long = |values: &Option<Vec<f32>>| values.as_ref().map_or(0, Vec::len);
        self.a.len() + self.b.len() + long(&self.magnitude) + long(&self.bias)
    }

    /// Whether the weight has to give up what the adapter was in the beginning.
    pub fn changes_base(&self) -> bool {
        self.start.is_some()
    }

    /// The same as an addition to the weight as it is, of twice the rank: `A' = [A; A_0]`, `B' = [B, -B_0]`, `alpha' =
    /// 2 alpha` (with rsLoRA `sqrt(2) alpha`), so that the scale stays.
    pub fn plain(&self) -> Self {
        let Some(start) = &self.start else { return self.clone() };
        let rank = self.rank + start.rank;
        let out = self.dims()[0];
        let mut b = Vec::with_capacity(out * rank);
        for row in 0..out {
            b.extend(&self.b[row * self.rank..(row + 1) * self.rank]);
            b.extend(start.b[row * start.rank..(row + 1) * start.rank].iter().map(|b| -b));
        }
        let alpha = self.scale() * if self.rslora { (rank as f64).sqrt() } else { rank as f64 };
        Self {
            a: [self.a.as_slice(), &start.a].concat(),
            b,
            rank,
            alpha,
            rslora: self.rslora,
            magnitude: self.magnitude.clone(),
            bias: self.bias.clone(),
            start: None,
        }
    }

    /// Without what the adapter was in the beginning: for the weight that has given it up.
    pub fn on_residual(&self) -> Self {
        Self { start: None, ..self.clone() }
    }

    /// What the weight gives up, `s B_0 A_0`, as an addition of a negative sign.
    pub fn residual(&self) -> Option<Self> {
        let start = self.start.as_ref()?;
        let scale = self.scale();
        let b = start.b.iter().map(|b| -b).collect();
        Some(Self::new(start.a.clone(), b, start.rank, scale * start.rank as f64))
    }

    /// Whether `dims` and the rank are those of the values.
    pub(crate) fn check(&self, map: MatrixId, [out, inputs]: [usize; 2]) -> Result<()> {
        let wrong = |what: &str, found: usize, expected: String| {
            Err(Error::input(format!("{what} of {map}"), format!("{found} values"), expected))
        };
        if self.rank == 0 || self.a.len() != self.rank * inputs {
            return wrong("A", self.a.len(), format!("{} x {inputs}", self.rank));
        }
        if self.b.len() != self.rank * out {
            return wrong("B", self.b.len(), format!("{out} x {}", self.rank));
        }
        for (what, values) in [("the magnitude", &self.magnitude), ("the bias", &self.bias)] {
            if let Some(values) = values.as_ref().filter(|values| values.len() != out) {
                return wrong(what, values.len(), out.to_string());
            }
        }
        Ok(())
    }
}

/// The values of an adapter: an addition to each of some maps of a model, and tensors in place of others.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct LoraWeights {
    /// Additions by map.
    pub maps: BTreeMap<MatrixId, LowRank>,
    /// Tensors that stand in place of the base's (`modules_to_save`, trained biases): not those of experts.
    pub whole: BTreeMap<Role, Vec<f32>>,
    /// Rows `[H]` of the embeddings that stand in place of the base's, by token (`trainable_token_indices`). Where
    /// embeddings and output head are one tensor, they are rows of both.
    pub tokens: BTreeMap<u32, Vec<f32>>,
    /// Share of inputs that are dropped in training.
    pub dropout: f64,
    /// What the adapter was made from, or read with.
    pub config: LoraConfig,
}

impl LoraWeights {
    /// Trained and frozen numbers.
    pub fn values(&self) -> usize {
        let others = self.whole.values().chain(self.tokens.values()).map(Vec::len);
        self.maps.values().map(LowRank::values).chain(others).sum()
    }

    /// The same as additions to the weights as they are: what began as a part of a weight doubles its rank.
    pub fn plain(&self) -> Self {
        Self { maps: self.maps.iter().map(|(map, low)| (*map, low.plain())).collect(), ..self.clone() }
    }

    /// Checks that every map is one of the model, and has its shape.
    ///
    /// # Errors
    /// [`Error::Input`] names the map.
    pub fn check(&self, maps: &Maps<'_>) -> Result<()> {
        for (map, low) in &self.maps {
            let dims = maps.dims(*map).ok_or_else(|| Error::input("an adapted map", map, "a map of the model"))?;
            low.check(*map, dims)?;
        }
        for (role, values) in &self.whole {
            let len: usize = maps.checkpoint().plain_role(*role)?.shape.iter().product();
            if values.len() != len {
                let what = format!("values of `{}` saved whole", maps.tensor_name(*role));
                return Err(Error::input(what, values.len(), len));
            }
        }
        let config = maps.checkpoint().config();
        for (token, row) in &self.tokens {
            if *token as usize >= config.vocab_size || row.len() != config.hidden_size {
                let found = format!("token {token} with {} values", row.len());
                let expected = format!("a token below {} with {}", config.vocab_size, config.hidden_size);
                return Err(Error::input("a trained row of the embeddings", found, expected));
            }
        }
        Ok(())
    }
}

impl Maps<'_> {
    /// The weight of a map as f32, `[out, in]`.
    ///
    /// # Errors
    /// Those of reading; [`Error::Input`] for a map that the model does not have.
    pub fn matrix(&self, map: MatrixId) -> Result<Vec<f32>> {
        let missing = || Error::input("a map", map, "a map of the model");
        let MatrixId::Expert { layer, expert, part } = map else {
            self.dims(map).ok_or_else(missing)?;
            let role = match map {
                MatrixId::Layer(layer, role) => Role::Layer(layer, role),
                MatrixId::Embedding => Role::Embedding,
                _ => Role::LmHead,
            };
            return Ok(self.checkpoint().read_f32(role)?);
        };
        let read = |part: ExpertPart| -> Result<Vec<f32>> {
            let matrix = self.checkpoint().expert_part(layer, expert, part)?.ok_or_else(missing)?;
            Ok(matrix.to_f32())
        };
        let matrix = match part {
            ExpertMatrix::Gate => read(ExpertPart::Gate)?,
            ExpertMatrix::Up => read(ExpertPart::Up)?,
            ExpertMatrix::Down => read(ExpertPart::Down)?,
            ExpertMatrix::GateUp => [read(ExpertPart::Gate)?, read(ExpertPart::Up)?].concat(),
        };
        self.checkpoint().release_expert(layer, expert)?;
        Ok(matrix)
    }
}

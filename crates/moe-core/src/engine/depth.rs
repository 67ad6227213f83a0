//! Layers that some sequences pass or repeat, and feed-forward halves that some tokens skip.

use burn::tensor::Tensor;

use super::{
    Engine,
    forward::{FfnPass, LayerTape},
    prepare::Prepared,
};
use crate::{
    decode::part_of,
    depth::DepthRule,
    error::{Error, Result},
    host::HostView,
    kernels::{
        rope::Positions,
        rows::{RowAccumulator, gather_rows},
    },
    layers::Handover,
    trace::{HalfInput, Nobody, Observer, SequenceInfo, Signals, WaveInfo},
};

/// Factors of a layer, one for each token.
fn checked(factors: Option<Vec<f32>>, layer: usize, tokens: usize) -> Result<Option<Vec<f32>>> {
    match factors {
        Some(factors) if factors.len() != tokens || factors.iter().any(|f| !f.is_finite()) => {
            let found = format!("{} numbers", factors.len());
            Err(Error::input(format!("factors of layer {layer}"), found, format!("{tokens} finite numbers")))
        }
        factors => Ok(factors),
    }
}

/// `x + factor (y - x)` for every row; rows with a factor of 1 stay as they are.
pub(super) fn blend(x: &Tensor<2>, y: Tensor<2>, factors: &[f32]) -> Tensor<2> {
    if factors.iter().all(|factor| *factor == 1.0) {
        return y;
    }
    let x = HostView::new(x);
    let mut blended = RowAccumulator::from_tensor(y);
    blended.on_host(|values, columns| {
        let pairs = values.chunks_exact_mut(columns).zip(x.as_slice().chunks_exact(columns));
        for ((y, x), factor) in pairs.zip(factors).filter(|(_, factor)| **factor != 1.0) {
            y.iter_mut().zip(x).for_each(|(y, x)| *y = x + factor * (*y - x));
        }
    });
    blended.into_tensor()
}

/// The ids of some rows, where they are known.
fn ids_of(ids: &[u32], rows: &[u32]) -> Vec<u32> {
    rows.iter().filter_map(|row| ids.get(*row as usize)).copied().collect()
}

impl Engine<'_> {
    /// Refuses what a depth rule must not say.
    ///
    /// # Errors
    /// [`Error::Input`] names the layer.
    pub(crate) fn check_times(&self, layer: usize, times: &[u8], sequences: usize) -> Result<()> {
        if times.len() != sequences || times.iter().any(|times| *times > 2) {
            let expected = format!("0, 1 or 2 for each of {sequences} sequences");
            return Err(Error::input(format!("rounds of layer {layer}"), format!("{times:?}"), expected));
        }
        Ok(())
    }

    /// The feed-forward half of a layer for the tokens that a rule says, and what they get of it.
    pub(crate) fn decided_feed_forward(
        &self,
        layer: usize,
        half: HalfInput<'_>,
        wave: &WaveInfo,
        rule: &dyn DepthRule,
        observer: &mut dyn Observer,
    ) -> Result<Tensor<2>> {
        let needs = observer.needs();
        let pass = |wave| FfnPass { needs, ..FfnPass::new(layer, wave) };
        let tokens = half.stream.dims()[0];
        let factors = checked(rule.factors(layer, half.read, wave)?, layer, tokens)?;
        let Some(factors) = factors.filter(|f| f.iter().any(|f| *f != 1.0)) else {
            return self.ffn_forward(pass(wave), half, &mut LayerTape::default(), observer);
        };
        let rows: Vec<u32> = (0..tokens as u32).filter(|t| factors[*t as usize] != 0.0).collect();
        if rows.is_empty() {
            return Ok(half.stream.clone());
        }
        let count = |range: &std::ops::Range<usize>| factors[range.clone()].iter().filter(|f| **f != 0.0).count();
        let mut sequences = Vec::with_capacity(wave.sequences.len());
        let mut start = 0;
        for sequence in &wave.sequences {
            let n = count(&sequence.tokens);
            sequences.push(SequenceInfo { tokens: start..start + n, loss_tokens: sequence.loss_tokens });
            start += n;
        }
        let some = WaveInfo { id: wave.id, tokens: rows.len(), ids: ids_of(&wave.ids, &rows), sequences };
        let (input, read) = (gather_rows(half.stream, &rows), gather_rows(half.read, &rows));
        let some_of = HalfInput { stream: &input, read: &read };
        let mut output = self.ffn_forward(pass(&some), some_of, &mut LayerTape::default(), observer)?;
        output = blend(&input, output, &rows.iter().map(|t| factors[*t as usize]).collect::<Vec<_>>());
        let mut whole = RowAccumulator::from_tensor(half.stream.clone());
        whole.set_rows(&rows, &output);
        Ok(whole.into_tensor())
    }

    /// What each token of a wave gets of the feed-forward half of a layer, where a rule says.
    ///
    /// # Errors
    /// [`Error::Input`] for another number of factors than tokens.
    pub(super) fn factors(&self, layer: usize, read: &Tensor<2>, wave: &WaveInfo) -> Result<Option<Vec<f32>>> {
        let Some(rule) = self.model.depth_rule() else { return Ok(None) };
        checked(rule.factors(layer, read, wave)?, layer, wave.tokens)
    }

    /// The gradient at what a layer with factors gives, taken apart: that at what its feed-forward half gives, and that
    /// at what enters it besides the way through the half. The half is run again for it.
    pub(super) fn factors_backward(
        &self,
        layer: usize,
        middle: &Tensor<2>,
        wave: &WaveInfo,
        (factors, dy): (&[f32], Tensor<2>),
        parameters: bool,
    ) -> Result<(Tensor<2>, Tensor<2>)> {
        let half = HalfInput { stream: middle, read: middle };
        let whole = self.ffn_forward(FfnPass::new(layer, wave), half, &mut LayerTape::default(), &mut Nobody)?;
        let columns = middle.dims()[1];
        let (x, y, d) = (HostView::new(middle), HostView::new(&whole), HostView::new(&dy));
        let rows = x.as_slice().chunks_exact(columns).zip(y.as_slice().chunks_exact(columns));
        let along = |((x, y), d): ((&[f32], &[f32]), &[f32])| -> f32 {
            x.iter().zip(y).zip(d).map(|((x, y), d)| d * (y - x)).sum()
        };
        let d_factors: Vec<f32> = rows.zip(d.as_slice().chunks_exact(columns)).map(along).collect();
        let through = match self.model.depth_rule() {
            Some(rule) => rule.factors_backward(layer, middle, wave, &d_factors, parameters)?,
            None => None,
        };
        let times = |of: &dyn Fn(f32) -> f32| {
            let mut scaled = RowAccumulator::from_tensor(dy.clone());
            scaled.on_host(|values, columns| {
                for (row, factor) in values.chunks_exact_mut(columns).zip(factors) {
                    row.iter_mut().for_each(|d| *d *= of(*factor));
                }
            });
            scaled
        };
        let mut around = times(&|factor| 1.0 - factor);
        if let Some(through) = through {
            around.add(&through);
        }
        Ok((times(&|factor| factor).into_tensor(), around.into_tensor()))
    }

    /// A layer in a sweep, as a rule decides it.
    pub(super) fn decided_layer(
        &self,
        layer: usize,
        x: Tensor<2>,
        prepared: &Prepared,
        rule: &dyn DepthRule,
        observer: &mut dyn Observer,
    ) -> Result<Tensor<2>> {
        let count = prepared.spans.len();
        let times = match rule.times(layer, &x, &prepared.info)? {
            Some(times) => {
                self.check_times(layer, &times, count)?;
                times
            }
            None => vec![1; count],
        };
        let mixer = self.model.mixer(layer)?;
        let mut x = x;
        for round in 0..2 {
            let run: Vec<usize> = (0..count).filter(|i| times[*i] > round).collect();
            if run.is_empty() {
                break;
            }
            if run.len() == count {
                let table = prepared.tables.of(self.model.config(), layer);
                let projected = mixer.project(&x, table, &prepared.spans, &Handover::default())?;
                let middle = mixer.mix(&x, &projected, &prepared.spans);
                self.model.count().pass_half(x.dims()[0]);
                x = self.decided_feed_forward(layer, self.half(&x, &middle), &prepared.info, rule, observer)?;
                continue;
            }
            let (part, rows, spans) = part_of(&x, &prepared.spans, &run);
            let positions: Vec<_> = spans.iter().map(|s| Positions { range: 0..s.len(), length: s.len() }).collect();
            let tables = self.model.rotary_tables(&positions);
            let table = tables.of(self.model.config(), layer);
            let projected = mixer.project(&part, table, &spans, &Handover::default())?;
            let middle = mixer.mix(&part, &projected, &spans);
            self.model.count().pass_half(part.dims()[0]);
            let sequence = |(i, span): (&usize, &std::ops::Range<usize>)| SequenceInfo {
                tokens: span.clone(),
                loss_tokens: prepared.info.sequences[*i].loss_tokens,
            };
            let sequences = run.iter().zip(&spans).map(sequence).collect();
            let ids = ids_of(&prepared.info.ids, &rows);
            let some = WaveInfo { id: prepared.info.id, tokens: rows.len(), ids, sequences };
            let part = self.decided_feed_forward(layer, self.half(&part, &middle), &some, rule, observer)?;
            let mut whole = RowAccumulator::from_tensor(x);
            whole.set_rows(&rows, &part);
            x = whole.into_tensor();
        }
        self.model.check_reads()?;
        Ok(x)
    }

    /// Refuses signals that a model cannot give while layers are passed or repeated.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub(super) fn check_depth(&self, needs: Signals) -> Result<()> {
        let refuse = |what: &str| Err(Error::Unsupported(what.to_string()));
        self.check_streams(needs)?;
        if let Some(rule) = self.model.depth_rule() {
            if needs.experts() || needs.streams || needs.gradients {
                return refuse("observed experts while depth is decided as a model runs");
            }
            if needs.backward() && (!rule.is_by_token() || self.model.config().is_parallel()) {
                return refuse(
                    "gradients while sequences pass or repeat layers, or of halves that run side by side and that tokens skip",
                );
            }
        }
        if !self.model.path().ascends() && (needs.backward() || needs.experts()) {
            return refuse(
                "gradients and observed experts of a model whose path repeats layers, or changes their order",
            );
        }
        Ok(())
    }

    /// Refuses to show the residual stream around the halves of layers where there are several.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub(super) fn check_streams(&self, needs: Signals) -> Result<()> {
        match (&self.model.config().streams, needs.streams) {
            (Some(streams), true) => Err(Error::Unsupported(format!(
                "the residual stream before and after the experts of `{}`, which has {} of them that every half of a \
                 layer mixes anew: refits, measured distortions of layers and what else compares the two",
                self.model.config().model_type,
                streams.count
            ))),
            _ => Ok(()),
        }
    }

    /// Refuses a path of layers and rules of depth where a sweep knows none.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub(super) fn check_whole(&self, what: &str) -> Result<()> {
        match self.model.depth_rule().is_none() && self.model.path().is_whole(self.model.config().layers.len()) {
            true => Ok(()),
            false => Err(Error::Unsupported(format!("{what} of a model under a path of layers"))),
        }
    }
}

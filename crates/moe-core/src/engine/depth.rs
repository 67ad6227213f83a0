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
    trace::{HalfInput, Observer, SequenceInfo, Signals, WaveInfo},
};

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
        let Some(factors) = rule.factors(layer, half.read, wave)?.filter(|f| f.iter().any(|f| *f != 1.0)) else {
            return self.ffn_forward(pass(wave), half, &mut LayerTape::default(), observer);
        };
        if factors.len() != tokens || factors.iter().any(|f| !f.is_finite()) {
            let found = format!("{} numbers", factors.len());
            return Err(Error::input(format!("factors of layer {layer}"), found, format!("{tokens} finite numbers")));
        }
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
        let some = WaveInfo { id: wave.id, tokens: rows.len(), sequences };
        let (input, read) = (gather_rows(half.stream, &rows), gather_rows(half.read, &rows));
        let some_of = HalfInput { stream: &input, read: &read };
        let mut output = self.ffn_forward(pass(&some), some_of, &mut LayerTape::default(), observer)?;
        if rows.iter().any(|t| factors[*t as usize] != 1.0) {
            let input = HostView::new(&input);
            let mut scaled = RowAccumulator::from_tensor(output);
            scaled.on_host(|values, columns| {
                let pairs = values.chunks_exact_mut(columns).zip(input.as_slice().chunks_exact(columns));
                for ((y, x), t) in pairs.zip(&rows).filter(|(_, t)| factors[**t as usize] != 1.0) {
                    y.iter_mut().zip(x).for_each(|(y, x)| *y = x + factors[*t as usize] * (*y - x));
                }
            });
            output = scaled.into_tensor();
        }
        let mut whole = RowAccumulator::from_tensor(half.stream.clone());
        whole.set_rows(&rows, &output);
        Ok(whole.into_tensor())
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
                let projected = mixer.project(&x, prepared.tables.of(self.model.config(), layer));
                let middle = mixer.mix(&x, &projected, &prepared.spans);
                x = self.decided_feed_forward(layer, self.half(&x, &middle), &prepared.info, rule, observer)?;
                continue;
            }
            let (part, rows, spans) = part_of(&x, &prepared.spans, &run);
            let positions: Vec<_> = spans.iter().map(|s| Positions { range: 0..s.len(), length: s.len() }).collect();
            let tables = self.model.rotary_tables(&positions);
            let projected = mixer.project(&part, tables.of(self.model.config(), layer));
            let middle = mixer.mix(&part, &projected, &spans);
            let sequence = |(i, span): (&usize, &std::ops::Range<usize>)| SequenceInfo {
                tokens: span.clone(),
                loss_tokens: prepared.info.sequences[*i].loss_tokens,
            };
            let sequences = run.iter().zip(&spans).map(sequence).collect();
            let some = WaveInfo { id: prepared.info.id, tokens: rows.len(), sequences };
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
        if self.model.depth_rule().is_some() && (needs.backward() || needs.experts() || needs.streams) {
            return refuse("gradients and observed experts while depth is decided as a model runs");
        }
        if !self.model.path().ascends() && (needs.backward() || needs.experts()) {
            return refuse(
                "gradients and observed experts of a model whose path repeats layers, or changes their order",
            );
        }
        Ok(())
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

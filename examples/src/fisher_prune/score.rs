//! One pass over the calibration data, and the scores of every method from it.

use std::time::Instant;

use moe_checkpoint::{MoeShape, ScoreTable, StatisticsStore};
use moe_core::data::Wave;
use moe_core::host::HostView;
use moe_core::trace::{ExpertTrace, LayerTrace, Observer, Signals, WaveInfo};
use moe_core::{Engine, EngineOptions};
use moe_importance::{Progress as CollectProgress, collect};

use super::job::Job;
use crate::Result;
use crate::progress::{Bar, Progress, Unit};

/// Scores of all methods and how they came about.
#[derive(Debug)]
pub struct Scored {
    /// One table per method.
    pub tables: Vec<ScoreTable>,
    /// The end of the collection.
    pub collected: CollectProgress,
    /// Seconds of running the model in this run.
    pub seconds: f64,
}

impl Scored {
    /// Calibration tokens per second, of the waves that this run collected, if there were any.
    pub fn tokens_per_second(&self, tokens_resumed: u64) -> Option<f64> {
        let tokens = self.collected.tokens_done.saturating_sub(tokens_resumed);
        (tokens > 0 && self.seconds > 0.0).then(|| tokens as f64 / self.seconds)
    }
}

/// Runs the model over the waves that the output directory does not hold yet, and scores.
///
/// # Errors
/// Whatever stops the collection; files of another run in the output directory.
pub fn score(job: &mut Job, progress: Progress) -> Result<(Scored, Option<f64>)> {
    let shape = job.model.checkpoint().shape().clone();
    let mut store = StatisticsStore::create_or_resume(job.out.statistics(), &shape, job.collection.provenance())?;
    let engine = Engine::new(&job.model, EngineOptions::default());
    let total = job.calibration.tokens() as u64;
    let bar = progress.bar("scoring", total, Unit::Count("tokens"));
    let (mut last, mut resumed) = (CollectProgress::default(), None);
    let start = Instant::now();
    let mut done = 0u64;
    let done = std::cell::Cell::from_mut(&mut done);
    let mut runner = |wave: &Wave, observer: &mut dyn Observer| {
        let mut ticking =
            Ticking { inner: observer, bar: &bar, shape: &shape, from: done.get(), tokens: wave.tokens() };
        engine.run(wave, &mut ticking)
    };
    let statistics =
        collect(&mut runner, &mut job.collection, &job.waves, Some(&mut store), &mut |at: &CollectProgress| {
            resumed.get_or_insert(at.tokens_done);
            done.set(at.tokens_done);
            bar.at(at.tokens_done);
            last = *at;
        })?;
    let seconds = start.elapsed().as_secs_f64();
    drop(bar);
    let score = |method: &super::job::Method| method.scorer.score(&statistics, job.model.checkpoint().as_ref());
    let tables = job.methods.iter().map(score).collect::<moe_importance::Result<Vec<_>>>()?;
    tables[0].save(job.out.scores())?;
    let scored = Scored { tables, collected: last, seconds };
    let speed = scored.tokens_per_second(resumed.unwrap_or_default());
    Ok((scored, speed))
}

/// Passes a sweep on and moves a bar inside the wave: a wave of a large model takes minutes.
struct Ticking<'a> {
    inner: &'a mut dyn Observer,
    bar: &'a Bar,
    shape: &'a MoeShape,
    /// Tokens of the waves before.
    from: u64,
    /// Tokens of this wave.
    tokens: usize,
}

impl Ticking<'_> {
    /// The part of the work of a forward sweep, where a backward sweep follows: it recomputes and costs about twice as much.
    const FORWARD: f64 = 1.0 / 3.0;

    fn at(&self, part: f64) {
        self.bar.at(self.from + (part * self.tokens as f64) as u64);
    }

    /// Position of an MoE layer, and their number.
    fn place(&self, layer: usize) -> (f64, f64) {
        let place = self.shape.layers.iter().position(|l| l.layer == layer).unwrap_or_default();
        (place as f64, self.shape.layers.len() as f64)
    }
}

impl Observer for Ticking<'_> {
    fn needs(&self) -> Signals {
        self.inner.needs()
    }

    fn begin_wave(&mut self, wave: &WaveInfo) -> moe_core::Result<()> {
        self.inner.begin_wave(wave)
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        let (place, layers) = self.place(trace.layer);
        self.at(Self::FORWARD * place / layers);
        self.inner.layer(trace)
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> moe_core::Result<()> {
        if trace.backward.is_some() {
            let (place, layers) = self.place(trace.layer);
            let experts = self.shape.layer(trace.layer).map_or(1, |l| l.num_experts()) as f64;
            let back = (layers - 1.0 - place + trace.expert as f64 / experts) / layers;
            self.at(Self::FORWARD + (1.0 - Self::FORWARD) * back);
        }
        self.inner.expert(trace)
    }

    fn hidden(&mut self, layer: usize, hidden: &burn::tensor::Tensor<2>) -> moe_core::Result<()> {
        self.inner.hidden(layer, hidden)
    }

    fn logits(&mut self, first: usize, logits: &HostView, vocab: usize) -> moe_core::Result<()> {
        self.inner.logits(first, logits, vocab)
    }

    fn end_wave(&mut self, wave: &WaveInfo) -> moe_core::Result<()> {
        self.inner.end_wave(wave)
    }
}

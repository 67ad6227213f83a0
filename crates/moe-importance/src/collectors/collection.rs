//! The collectors of one run, as one observer.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use moe_checkpoint::{MoeShape, Provenance, Statistics};
use moe_core::trace::{ExpertTrace, LayerOutput, LayerTrace, Observer, RouterGradients, Signals, SweepPart, WaveInfo};

use super::{Collector, collectors_for};
use crate::statistics::{StatisticId, StatisticSpec};
use crate::{Error, Result, Scorer};

/// The collectors that a list of scorers needs, each once: watches a run as one [`Observer`] and holds the statistics
/// of the wave in progress.
///
/// Memory is that of one wave's statistics, 8 bytes per statistic and unit of the model. [`Collection::take`] hands a
/// finished wave out.
pub struct Collection<'a> {
    collectors: Vec<Box<dyn Collector + 'a>>,
    /// What each collector needs; asked once.
    needs: Vec<Signals>,
    shape: MoeShape,
    provenance: Provenance,
    current: Option<Statistics>,
    finished: Option<Statistics>,
    /// Where parts of the wave in progress are kept.
    parts: Option<PathBuf>,
    /// What an earlier run has seen of the wave that begins next.
    resumed: Option<Statistics>,
}

impl fmt::Debug for Collection<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collection").field("statistics", &self.ids()).field("provenance", &self.provenance).finish()
    }
}

impl<'a> Collection<'a> {
    /// The collectors of this crate that provide `ids`.
    ///
    /// # Errors
    /// [`Error::UnknownStatistic`], or a shape that makes no sense.
    pub fn new(shape: &MoeShape, provenance: Provenance, ids: &[StatisticId]) -> Result<Self> {
        Self::with_collectors(shape, provenance, collectors_for(ids)?)
    }

    /// The collectors that all of `scorers` need together.
    ///
    /// # Errors
    /// As [`Collection::new`].
    pub fn for_scorers(shape: &MoeShape, provenance: Provenance, scorers: &[Box<dyn Scorer>]) -> Result<Self> {
        let ids: BTreeSet<StatisticId> = scorers.iter().flat_map(|scorer| scorer.needs().statistics).collect();
        Self::new(shape, provenance, &Vec::from_iter(ids))
    }

    /// Any collectors, those of other crates included.
    ///
    /// # Errors
    /// [`Error::DuplicateStatistic`] if two provide the same statistic, or a shape that makes no sense.
    pub fn with_collectors(
        shape: &MoeShape,
        provenance: Provenance,
        collectors: Vec<Box<dyn Collector + 'a>>,
    ) -> Result<Self> {
        shape.validate()?;
        let mut seen = BTreeSet::new();
        for spec in collectors.iter().flat_map(|c| c.statistics()) {
            if !seen.insert(&spec.id) {
                return Err(Error::DuplicateStatistic { id: spec.id.to_string() });
            }
        }
        let needs = collectors.iter().map(|c| c.needs()).collect();
        Ok(Self {
            collectors,
            needs,
            shape: shape.clone(),
            provenance,
            current: None,
            finished: None,
            parts: None,
            resumed: None,
        })
    }

    /// Statistics that this collection makes, sorted.
    pub fn ids(&self) -> Vec<StatisticId> {
        let ids: BTreeSet<_> = self.specs().map(|spec| spec.id.clone()).collect();
        ids.into_iter().collect()
    }

    /// Shape of the model.
    pub fn shape(&self) -> &MoeShape {
        &self.shape
    }

    /// Provenance that the statistics will carry.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// Whether the whole model has to run for a collector that sees it through its adapters.
    pub fn needs_forward(&self) -> bool {
        self.collectors.iter().any(|c| c.needs_forward())
    }

    /// Whether a wave can be gone on with in its middle.
    pub(crate) fn goes_on(&self) -> bool {
        self.collectors.iter().all(|c| c.goes_on())
    }

    /// Keeps what is seen of each layer of the next wave in this directory.
    pub(crate) fn keep_parts(&mut self, directory: Option<PathBuf>) {
        self.parts = directory;
    }

    /// Begins the next wave with what is kept of it in this directory, where the sweep through `layers` decoder layers
    /// came to `done`.
    ///
    /// # Errors
    /// Files that are missing or not what was written.
    pub(crate) fn resume(&mut self, directory: &Path, done: SweepPart, layers: usize) -> Result<()> {
        let (forward, back) = match done {
            SweepPart::Forward(layer) => (layer + 1, layers),
            SweepPart::Head => (layers, layers),
            SweepPart::Backward(layer) => (layers, layer),
        };
        let parts = (0..forward).map(SweepPart::Forward).chain((back..layers).rev().map(SweepPart::Backward));
        let mut statistics = self.empty()?;
        for part in parts {
            if let Some((layer, name)) = part_file(part) {
                statistics.load_part(layer, directory.join(name))?;
            }
        }
        self.resumed = Some(statistics);
        Ok(())
    }

    /// Takes the statistics of the wave that has been finished last, if they have not been taken.
    pub fn take(&mut self) -> Option<Statistics> {
        self.finished.take()
    }

    /// Statistics with every array allocated: waves must hold the same arrays, whatever was routed where.
    pub(crate) fn empty(&self) -> Result<Statistics> {
        let mut statistics = Statistics::new(&self.shape, self.provenance.clone());
        for StatisticSpec { id, kind, fold } in self.specs() {
            statistics.allocate(id.as_str(), *kind, *fold)?;
        }
        Ok(statistics)
    }

    fn specs(&self) -> impl Iterator<Item = &StatisticSpec> {
        self.collectors.iter().flat_map(|c| c.statistics())
    }

    fn begin(&mut self, wave: &WaveInfo) -> Result<()> {
        // A wave that failed half-way leaves its part behind, which must not leak into the next.
        let mut statistics = match self.resumed.take() {
            Some(resumed) => resumed,
            None => self.empty()?,
        };
        statistics.begin(wave.id);
        statistics.add_counts(wave.tokens as u64, wave.sequences.len() as u64, wave.loss_tokens() as u64);
        self.finished = None;
        self.collectors.iter_mut().try_for_each(|collector| collector.begin_wave(wave))?;
        self.current = Some(statistics);
        Ok(())
    }

    fn end(&mut self, wave: &WaveInfo) -> Result<()> {
        match self.current.take() {
            Some(mut statistics) if statistics.waves().contains(&wave.id) => {
                self.collectors.iter_mut().try_for_each(|collector| collector.end_wave(wave, &mut statistics))?;
                self.finished = Some(statistics);
                Ok(())
            }
            current => Err(Error::WaveOrder {
                what: "end of a wave",
                found: format!("wave {}", wave.id),
                expected: current.map_or("none: no wave has begun".into(), |s| format!("wave {:?}", s.waves())),
            }),
        }
    }

    fn see_layer(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        check_layer(trace, &self.shape)?;
        let current = in_progress(&mut self.current, "routing of a layer")?;
        for (collector, needs) in self.collectors.iter_mut().zip(&self.needs) {
            if needs.routing {
                collector.layer(trace, current)?;
            }
        }
        Ok(())
    }

    fn see_expert(&mut self, trace: &ExpertTrace<'_>) -> Result<()> {
        check_expert(trace, &self.shape)?;
        let current = in_progress(&mut self.current, "trace of an expert")?;
        for (collector, needs) in self.collectors.iter_mut().zip(&self.needs) {
            if needs.experts() {
                collector.expert(trace, current)?;
            }
        }
        Ok(())
    }

    fn see_output(&mut self, output: &LayerOutput<'_>) -> Result<()> {
        let current = in_progress(&mut self.current, "output of a layer")?;
        for (collector, needs) in self.collectors.iter_mut().zip(&self.needs) {
            if needs.streams {
                collector.output(output, current)?;
            }
        }
        Ok(())
    }

    fn see_again(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        check_layer(trace, &self.shape)?;
        in_progress(&mut self.current, "routing of a layer")?;
        let to_come = self.experts_come_back();
        for (collector, needs) in self.collectors.iter_mut().zip(&self.needs) {
            if needs.routing && to_come {
                collector.recall(trace)?;
            }
        }
        Ok(())
    }

    /// Whether experts are shown in the backward sweep: as their gradients are.
    fn experts_come_back(&self) -> bool {
        self.needs.iter().any(|needs| needs.gradients)
    }

    fn end_part(&mut self, part: SweepPart) -> Result<()> {
        let backward = self.experts_come_back();
        let current = in_progress(&mut self.current, "end of a layer")?;
        if let SweepPart::Forward(layer) | SweepPart::Backward(layer) = part
            && backward == matches!(part, SweepPart::Backward(_))
        {
            self.collectors.iter_mut().try_for_each(|collector| collector.end_layer(layer, current))?;
        }
        if let (Some(directory), Some((layer, name))) = (&self.parts, part_file(part)) {
            current.save_part(layer, directory.join(name))?;
        }
        Ok(())
    }

    fn see_router(&mut self, gradients: &RouterGradients<'_>) -> Result<()> {
        check_router(gradients, &self.shape)?;
        let current = in_progress(&mut self.current, "gradients of a router")?;
        for (collector, needs) in self.collectors.iter_mut().zip(&self.needs) {
            if needs.router_gradients {
                collector.router(gradients, current)?;
            }
        }
        Ok(())
    }
}

impl Observer for Collection<'_> {
    fn needs(&self) -> Signals {
        self.needs.iter().fold(Signals::NONE, |all, needs| all | *needs)
    }

    fn begin_wave(&mut self, wave: &WaveInfo) -> moe_core::Result<()> {
        self.begin(wave).map_err(moe_core::Error::observer)
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        self.see_layer(trace).map_err(moe_core::Error::observer)
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> moe_core::Result<()> {
        self.see_expert(trace).map_err(moe_core::Error::observer)
    }

    fn router(&mut self, gradients: &RouterGradients<'_>) -> moe_core::Result<()> {
        self.see_router(gradients).map_err(moe_core::Error::observer)
    }

    fn output(&mut self, output: &LayerOutput<'_>) -> moe_core::Result<()> {
        self.see_output(output).map_err(moe_core::Error::observer)
    }

    fn recall(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        self.see_again(trace).map_err(moe_core::Error::observer)
    }

    fn done(&mut self, part: SweepPart) -> moe_core::Result<()> {
        self.end_part(part).map_err(moe_core::Error::observer)
    }

    fn end_wave(&mut self, wave: &WaveInfo) -> moe_core::Result<()> {
        self.end(wave).map_err(moe_core::Error::observer)
    }
}

/// The layer of a part of a sweep, and the file of what was seen of it.
fn part_file(part: SweepPart) -> Option<(usize, String)> {
    match part {
        SweepPart::Forward(layer) => Some((layer, format!("forward-{layer:04}.safetensors"))),
        SweepPart::Backward(layer) => Some((layer, format!("backward-{layer:04}.safetensors"))),
        SweepPart::Head => None,
    }
}

fn in_progress<'a>(current: &'a mut Option<Statistics>, what: &'static str) -> Result<&'a mut Statistics> {
    current.as_mut().ok_or_else(|| Error::WaveOrder {
        what,
        found: "no wave".into(),
        expected: "a wave in progress".into(),
    })
}

/// Collectors index by what a trace says, so that a wrong trace is refused here, once for all of them.
fn check_layer(trace: &LayerTrace<'_>, shape: &MoeShape) -> Result<()> {
    let fail = |field, found: String, expected: String| Error::Trace {
        layer: trace.layer,
        expert: None,
        field,
        found,
        expected,
    };
    let experts = shape.layer(trace.layer).map(|l| l.num_experts());
    if experts != Some(trace.experts) {
        return Err(fail(
            "experts",
            trace.experts.to_string(),
            experts.map_or("no MoE layer".into(), |n| n.to_string()),
        ));
    }
    let tokens = trace.wave.tokens;
    for (field, found, expected) in [
        ("logits", trace.logits.len(), tokens * trace.experts),
        ("selected", trace.selected.len(), tokens * trace.top_k),
        ("weights", trace.weights.len(), tokens * trace.top_k),
    ] {
        if found != expected {
            return Err(fail(field, format!("{found} values"), expected.to_string()));
        }
    }
    match trace.selected.iter().find(|expert| **expert as usize >= trace.experts) {
        Some(expert) => Err(fail("selected", format!("expert {expert}"), format!("below {}", trace.experts))),
        None => Ok(()),
    }
}

fn check_router(gradients: &RouterGradients<'_>, shape: &MoeShape) -> Result<()> {
    let fail = |field, found: String, expected: String| {
        Err(Error::Trace { layer: gradients.layer, expert: None, field, found, expected })
    };
    let experts = shape.layer(gradients.layer).map(|l| l.num_experts());
    if experts != Some(gradients.experts) {
        let expected = experts.map_or("no MoE layer".into(), |n| n.to_string());
        return fail("router gradients", format!("{} experts", gradients.experts), expected);
    }
    // Its width is that of the residual stream, which experts that read a latent do not have.
    let (tokens, [found, _]) = (gradients.wave.tokens, gradients.input.dims());
    if found != tokens {
        return fail("router input", format!("{found} rows"), tokens.to_string());
    }
    match gradients.d_logits.len() {
        found if found == tokens * gradients.experts => Ok(()),
        found => fail("d_logits", format!("{found} values"), (tokens * gradients.experts).to_string()),
    }
}

fn check_expert(trace: &ExpertTrace<'_>, shape: &MoeShape) -> Result<()> {
    let fail = |field, found: String, expected: String| {
        Err(Error::Trace { layer: trace.layer, expert: Some(trace.expert), field, found, expected })
    };
    let Some(width) = shape.layer(trace.layer).and_then(|l| l.widths.get(trace.expert)).copied() else {
        return fail("expert", "an expert that the model does not have".into(), "one of its shape".into());
    };
    let (n, hidden) = (trace.rows.len(), shape.hidden_size);
    let gradients = trace.backward.as_ref();
    for (field, tensor, expected) in [
        ("input", Some(trace.input), [n, hidden]),
        ("units", trace.units, [n, width]),
        ("output", trace.output, [n, hidden]),
        ("backward.upstream", gradients.map(|g| g.upstream), [n, hidden]),
        ("backward.units", gradients.map(|g| g.units), [n, width]),
        ("backward.gate_up", gradients.map(|g| g.gate_up), [n, 2 * width]),
    ] {
        if let Some(found) = tensor.map(|t| t.dims()).filter(|dims| *dims != expected) {
            return fail(field, format!("shape {found:?}"), format!("{expected:?}"));
        }
    }
    if trace.routing_weights.len() != n {
        return fail("routing_weights", trace.routing_weights.len().to_string(), n.to_string());
    }
    let mut end = 0;
    for segment in trace.segments {
        if segment.rows.start != end || segment.rows.end < end {
            return fail("segments", format!("rows {:?} after row {end}", segment.rows), "consecutive rows".into());
        }
        end = segment.rows.end;
    }
    if end != n { fail("segments", format!("{end} rows"), n.to_string()) } else { Ok(()) }
}

//! What routed experts and routers read, for rounding that looks at it: second moments, largest magnitudes, a sample.

use burn::tensor::Tensor;
use moe_checkpoint::{ArrayKind, Checkpoint, ExpertPart, Fold, InputMoments, InputRanges, RouterInputs, Statistics};
use moe_core::host::HostView;
use moe_core::kernels::outer::add_transposed_product;
use moe_core::trace::{ExpertTrace, LayerTrace, Signals};

use super::Collector;
use crate::Result;
use crate::statistics::{StatisticId, StatisticSpec};

/// `X^T X` of what every routed expert is given, `[H, H]`, and of its units, `[I, I]`, over the tokens routed to it:
/// what [`InputMoments`] are made of. That is `H^2 + I^2` numbers per expert.
#[derive(Debug)]
pub struct ExpertInputs {
    statistics: Vec<StatisticSpec>,
}

impl ExpertInputs {
    /// Of all routed experts of a model.
    pub fn of(model: &Checkpoint) -> Self {
        let hidden = model.shape().hidden_size;
        let mut statistics = Vec::new();
        for layer in &model.shape().layers {
            for (expert, width) in layer.widths.iter().enumerate() {
                for (part, side) in [(ExpertPart::Gate, hidden), (ExpertPart::Down, *width)] {
                    statistics.push(StatisticSpec {
                        id: StatisticId::from(InputMoments::statistic(layer.layer, expert, part)),
                        kind: ArrayKind::Matrix { rows: side, columns: side },
                        fold: Fold::Sum,
                    });
                }
            }
        }
        Self { statistics }
    }
}

fn add(x: &Tensor<2>, id: &str, into: &mut Statistics) -> Result<()> {
    let side = x.dims()[1];
    let mut gram = vec![0.0; side * side];
    add_transposed_product(x, 0..side, x, 0..side, 1.0, &mut gram);
    let sums = into.matrix_mut(id, [side, side], Fold::Sum)?;
    sums.iter_mut().zip(gram).for_each(|(sum, value)| *sum += f64::from(value));
    Ok(())
}

impl Collector for ExpertInputs {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.statistics
    }

    fn needs(&self) -> Signals {
        Signals { units: true, ..Signals::NONE }
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>, into: &mut Statistics) -> Result<()> {
        add(trace.input, &InputMoments::statistic(trace.layer, trace.expert, ExpertPart::Gate), into)?;
        match trace.units {
            Some(units) => add(units, &InputMoments::statistic(trace.layer, trace.expert, ExpertPart::Down), into),
            None => Ok(()),
        }
    }
}

/// The largest magnitude of every channel that a routed expert reads, `[1, H]`, and of its units, `[1, I]`: what
/// [`InputRanges`] are made of.
#[derive(Debug)]
pub struct ExpertInputRanges {
    statistics: Vec<StatisticSpec>,
}

impl ExpertInputRanges {
    /// Of all routed experts of a model.
    pub fn of(model: &Checkpoint) -> Self {
        let hidden = model.config().expert_hidden_size();
        let mut statistics = Vec::new();
        for layer in &model.shape().layers {
            for (expert, width) in layer.widths.iter().enumerate() {
                for (part, side) in [(ExpertPart::Gate, hidden), (ExpertPart::Down, *width)] {
                    statistics.push(StatisticSpec {
                        id: StatisticId::from(InputRanges::statistic(layer.layer, expert, part)),
                        kind: ArrayKind::Matrix { rows: 1, columns: side },
                        fold: Fold::Max,
                    });
                }
            }
        }
        Self { statistics }
    }
}

impl Collector for ExpertInputRanges {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.statistics
    }

    fn needs(&self) -> Signals {
        Signals { units: true, ..Signals::NONE }
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>, into: &mut Statistics) -> Result<()> {
        for (part, x) in [(ExpertPart::Gate, Some(trace.input)), (ExpertPart::Down, trace.units)] {
            let Some(x) = x else { continue };
            let side = x.dims()[1];
            let id = InputRanges::statistic(trace.layer, trace.expert, part);
            let largest = into.matrix_mut(&id, [1, side], Fold::Max)?;
            for row in HostView::new(x).as_slice().chunks_exact(side.max(1)) {
                row.iter().zip(&mut *largest).for_each(|(value, most)| *most = most.max(f64::from(value.abs())));
            }
        }
        Ok(())
    }
}

/// A sample of what the routers read, the same however waves are shared out: what [`RouterInputs`] are made of.
#[derive(Debug)]
pub struct RouterSample {
    statistics: Vec<StatisticSpec>,
    columns: usize,
    /// The first expert of every token of the wave, by which a row is taken once.
    first: Vec<u32>,
    wave: u64,
}

impl RouterSample {
    /// Of all routers of a model.
    pub fn of(model: &Checkpoint) -> Self {
        let columns = RouterInputs::KEY + model.config().hidden_size;
        let spec = |layer: usize| StatisticSpec {
            id: StatisticId::from(RouterInputs::statistic(layer)),
            kind: ArrayKind::Matrix { rows: RouterInputs::ROWS, columns },
            fold: Fold::Lowest { key: RouterInputs::KEY },
        };
        let statistics = model.shape().layers.iter().map(|layer| spec(layer.layer)).collect();
        Self { statistics, columns, first: Vec::new(), wave: 0 }
    }
}

/// Two numbers of 24 bits, which f32 holds, that order a token.
fn key(wave: u64, token: u32) -> [f64; 2] {
    let mut z = (wave << 32 | u64::from(token)).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    [(z >> 40) as f64, (z & 0xFF_FFFF) as f64]
}

impl Collector for RouterSample {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.statistics
    }

    fn needs(&self) -> Signals {
        Signals { routing: true, units: true, ..Signals::NONE }
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn layer(&mut self, trace: &LayerTrace<'_>, _: &mut Statistics) -> Result<()> {
        self.recall(trace)
    }

    fn recall(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        self.wave = trace.wave.id;
        self.first = trace.selected.iter().step_by(trace.top_k.max(1)).copied().collect();
        Ok(())
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>, into: &mut Statistics) -> Result<()> {
        let view = HostView::new(trace.input);
        let hidden = trace.input.dims()[1];
        let mut rows = Vec::new();
        for (token, x) in trace.rows.iter().zip(view.as_slice().chunks_exact(hidden.max(1))) {
            if self.first.get(*token as usize) == Some(&(trace.expert as u32)) {
                rows.extend(key(self.wave, *token));
                rows.extend(x.iter().copied().map(f64::from));
            }
        }
        let id = RouterInputs::statistic(trace.layer);
        Ok(into.add_rows(&id, [RouterInputs::ROWS, self.columns], RouterInputs::KEY, &rows)?)
    }
}

//! Second moments of the inputs of routed experts, for rounding that makes up for its errors.

use burn::tensor::Tensor;
use moe_checkpoint::{ArrayKind, Checkpoint, ExpertPart, Fold, InputMoments, Statistics};
use moe_core::kernels::outer::add_transposed_product;
use moe_core::trace::{ExpertTrace, Signals};

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

//! The objective at the end of the forward sweep.

use burn::tensor::Tensor;

use super::{Engine, WaveReport, prepare::Prepared};
use crate::{
    error::{Error, Result},
    host::HostView,
    kernels::rows::{RowAccumulator, gather_rows},
    objective::Objective,
    trace::{Observer, Signals},
};

impl Engine<'_> {
    /// Adds the objective of every predicted position to `report`; the gradient of their sum at the last layer's output
    /// if the observer needs one.
    pub(super) fn head(
        &self,
        x: Tensor<2>,
        prepared: &Prepared,
        needs: Signals,
        objective: &mut dyn Objective,
        observer: &mut dyn Observer,
        report: &mut WaveReport,
    ) -> Result<Option<Tensor<2>>> {
        objective.begin_wave(&prepared.info)?;
        let norm = self.model.final_norm()?;
        let tokens = prepared.targets.len();
        // logits of positions without a target are computed only if someone looks at them
        let rows: Vec<u32> =
            (0..tokens as u32).filter(|&t| needs.logits || prepared.targets[t as usize].is_some()).collect();
        let mut losses = vec![0.0; tokens];
        let mut dx = needs.backward().then(|| RowAccumulator::zeros(tokens, x.dims()[1], self.model.device()));
        for rows in rows.chunks(self.options.head_tokens) {
            let x = gather_rows(&x, rows);
            let blocks = self.model.head_forward(&norm.forward(&x))?; // [chunk, V_b] each
            if needs.logits {
                let logits = HostView::new(&Tensor::cat(blocks.clone(), 1));
                observer.logits(rows[0] as usize, &logits, self.model.config().vocab_size)?;
            }
            let targets: Vec<Option<u32>> = rows.iter().map(|&t| prepared.targets[t as usize]).collect();
            let result = objective.losses(blocks, &targets, dx.is_some())?;
            for (&t, loss) in rows.iter().zip(result.losses) {
                losses[t as usize] = loss;
            }
            if let Some(dx) = &mut dx {
                let dh = self.model.head_backward(&norm.forward(&x), result.d_logits, needs.parameters)?;
                dx.add_rows(rows, None, &norm.backward(&x, &dh, needs.parameters));
            }
        }
        self.model.check_reads()?;
        let sums: Vec<f64> = prepared.spans.iter().map(|s| losses[s.clone()].iter().sum()).collect();
        let total: f64 = sums.iter().sum();
        if !total.is_finite() {
            return Err(Error::NotFinite { what: "the loss".into(), wave: prepared.info.id });
        }
        (report.loss, report.sequence_losses) = (Some(total), Some(sums));
        Ok(dx.map(RowAccumulator::into_tensor))
    }
}

//! Objectives made of others.

use burn::tensor::Tensor;

use super::Objective;
use crate::{
    error::{Error, Result},
    kernels::loss::Losses,
    trace::WaveInfo,
};

/// An objective of `logits / T`. A teacher that was recorded through one of temperature T is compared with through
/// another of the same T.
#[derive(Clone, Copy, Debug)]
pub struct Tempered<O> {
    objective: O,
    temperature: f32,
}

impl<O> Tempered<O> {
    /// `objective` at a temperature.
    ///
    /// # Errors
    /// [`Error::Input`] for a temperature that is not above 0.
    pub fn new(objective: O, temperature: f64) -> Result<Self> {
        match temperature.is_finite() && temperature > 0.0 {
            true => Ok(Self { objective, temperature: temperature as f32 }),
            false => Err(Error::input("temperature", temperature, "a finite number above 0")),
        }
    }

    /// The objective itself.
    pub fn into_inner(self) -> O {
        self.objective
    }
}

impl<O: Objective> Objective for Tempered<O> {
    fn begin_wave(&mut self, wave: &WaveInfo) -> Result<()> {
        self.objective.begin_wave(wave)
    }

    fn losses(&mut self, blocks: Vec<Tensor<2>>, targets: &[Option<u32>], gradient: bool) -> Result<Losses> {
        let scaled = |blocks: Vec<Tensor<2>>| blocks.into_iter().map(|z| z.div_scalar(self.temperature)).collect();
        let Losses { losses, d_logits } = self.objective.losses(scaled(blocks), targets, gradient)?;
        Ok(Losses { losses, d_logits: scaled(d_logits) })
    }
}

/// A weighted sum of objectives.
#[derive(Default)]
pub struct Blend<'o> {
    terms: Vec<(f64, Box<dyn Objective + 'o>)>,
}

impl std::fmt::Debug for Blend<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.terms.iter().map(|(weight, _)| weight)).finish()
    }
}

impl<'o> Blend<'o> {
    /// With one more objective; one of weight 0 is left out.
    pub fn with(mut self, weight: f64, objective: impl Objective + 'o) -> Self {
        if weight != 0.0 {
            self.terms.push((weight, Box::new(objective)));
        }
        self
    }
}

impl Objective for Blend<'_> {
    fn begin_wave(&mut self, wave: &WaveInfo) -> Result<()> {
        self.terms.iter_mut().try_for_each(|(_, objective)| objective.begin_wave(wave))
    }

    fn losses(&mut self, blocks: Vec<Tensor<2>>, targets: &[Option<u32>], gradient: bool) -> Result<Losses> {
        let mut sum: Option<Losses> = None;
        for (weight, objective) in &mut self.terms {
            let Losses { losses, d_logits } = objective.losses(blocks.clone(), targets, gradient)?;
            let losses = losses.into_iter().map(|loss| *weight * loss);
            let d_logits = d_logits.into_iter().map(|d| d.mul_scalar(*weight as f32));
            sum = Some(match sum {
                None => Losses { losses: losses.collect(), d_logits: d_logits.collect() },
                Some(sum) => Losses {
                    losses: sum.losses.iter().zip(losses).map(|(a, b)| a + b).collect(),
                    d_logits: sum.d_logits.into_iter().zip(d_logits).map(|(a, b)| a + b).collect(),
                },
            });
        }
        match sum {
            Some(sum) => Ok(sum),
            // Nothing to minimize: the gradient is 0.
            None => Ok(Losses {
                losses: vec![0.0; targets.len()],
                d_logits: match gradient {
                    true => blocks.iter().map(Tensor::zeros_like).collect(),
                    false => Vec::new(),
                },
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        CrossEntropy, Distillation, host,
        host::HostView,
        objective::TeacherRecorder,
        trace::{SequenceInfo, WaveInfo},
    };

    /// Logits of two tokens over a vocabulary of three, in two blocks.
    fn blocks(logits: [[f32; 3]; 2]) -> Vec<Tensor<2>> {
        let device = crate::device::device("flex").unwrap();
        let columns = |from: usize, to: usize| logits.iter().flat_map(|row| row[from..to].to_vec()).collect();
        vec![host::from_vec(columns(0, 2), [2, 2], &device), host::from_vec(columns(2, 3), [2, 1], &device)]
    }

    fn softmax(row: [f32; 3], temperature: f64) -> [f64; 3] {
        let e = row.map(|z| (f64::from(z) / temperature).exp());
        e.map(|v| v / e.iter().sum::<f64>())
    }

    #[test]
    fn distillation_at_a_temperature_beside_a_task_is_what_it_is_by_hand() {
        let (teacher, student) = ([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]], [[0.0, 1.0, 0.5], [1.0, 1.0, -2.0]]);
        let targets = [Some(2), None];
        let wave = WaveInfo {
            id: 7,
            tokens: 2,
            ids: Vec::new(),
            sequences: vec![SequenceInfo { tokens: 0..2, loss_tokens: 1 }],
        };
        let mut recorder = Tempered::new(TeacherRecorder::new(3, 3).unwrap(), 2.0).unwrap();
        recorder.begin_wave(&wave).unwrap();
        recorder.losses(blocks(teacher), &targets, false).unwrap();
        let recorded = recorder.into_inner().finish();

        let distillation = Tempered::new(Distillation::new(&recorded), 2.0).unwrap();
        let mut blend = Blend::default().with(1.0, CrossEntropy).with(0.2, distillation).with(0.0, CrossEntropy);
        blend.begin_wave(&wave).unwrap();
        let Losses { losses, d_logits } = blend.losses(blocks(student), &targets, true).unwrap();
        let (p, q, own) = (softmax(teacher[0], 2.0), softmax(student[0], 2.0), softmax(student[0], 1.0));
        let divergence: f64 = p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum();
        assert!((losses[0] - (-own[2].ln() + 0.2 * divergence)).abs() < 1e-6, "{losses:?}");
        assert_eq!(losses[1], 0.0);
        let found: Vec<f32> = d_logits.iter().flat_map(|d| HostView::new(d).as_slice().to_vec()).collect();
        for (token, at) in [(0, 0), (1, 1), (2, 4)] {
            let task = own[token] - f64::from(u8::from(token == 2));
            let expected = task + 0.2 * (q[token] - p[token]) / 2.0;
            assert!((f64::from(found[at]) - expected).abs() < 1e-6, "{token}: {found:?}");
        }
        assert_eq!([found[2], found[3], found[5]], [0.0; 3]);
        assert!(Tempered::new(CrossEntropy, 0.0).unwrap_err().to_string().contains("temperature"));
        let nothing = Blend::default().losses(blocks(student), &targets, true).unwrap();
        assert_eq!(nothing.losses, [0.0, 0.0]);
    }
}

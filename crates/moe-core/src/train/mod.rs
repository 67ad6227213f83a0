//! Training by gradient descent: parameters, optimizers, schedules, and the loop around them.
//!
//! A [`TrainingTask`] says how a wave gives gradients and what figure is to fall; [`train`] shuffles, accumulates
//! micro-batches, clips, steps, evaluates, stops early and keeps the best parameters. It knows nothing of what the
//! parameters are: whatever can be named, has values and gets gradients. Deterministic: the same waves, options and
//! task give the same bits, and [`train_saved`] gives them also when it is killed and resumed, [`train_in_group`] for
//! any number of processes.
//!
//! ```
//! use moe_core::data::{Sequence, Wave};
//! use moe_core::train::{BatchLoss, Parameters, Schedule, TrainOptions, TrainingTask, train};
//!
//! /// Pulls `w` towards the first token of every wave.
//! struct Pull;
//!
//! impl TrainingTask for Pull {
//!     fn accumulate(&mut self, wave: &Wave, parameters: &mut Parameters) -> moe_core::Result<BatchLoss> {
//!         let difference = parameters.get("w").unwrap().values[0] - wave.sequences[0].ids[0] as f32;
//!         if let Some(gradient) = parameters.gradient_mut("w") {
//!             gradient[0] += difference;
//!         }
//!         Ok(BatchLoss { loss: f64::from(difference).powi(2) / 2.0, tokens: 1 })
//!     }
//!     fn update(&mut self, _: &Parameters) -> moe_core::Result<()> {
//!         Ok(())
//!     }
//!     fn evaluate(&mut self, parameters: &mut Parameters) -> moe_core::Result<f64> {
//!         Ok(f64::from(parameters.get("w").unwrap().values[0] - 3.0).abs())
//!     }
//! }
//!
//! let mut parameters = Parameters::new();
//! parameters.insert("w", vec![0.0]);
//! let waves = [Wave { id: 0, sequences: vec![Sequence::new(vec![3, 0])] }];
//! let options = TrainOptions { epochs: 200, schedule: Schedule::constant(0.1), ..TrainOptions::default() };
//! let report = train(&mut Pull, &mut parameters, &waves, &options, &mut |_| Ok(()))?;
//! assert!(report.best.unwrap().value < 0.3);
//! # Ok::<(), moe_core::Error>(())
//! ```

mod events;
mod group;
mod guard;
mod keeper;
mod optimizer;
mod options;
mod order;
mod parameters;
mod run;
mod schedule;
mod state;
mod stored;
mod task;
mod together;

pub use events::{JsonLines, OnEvent, Stop, TrainEvent};
pub use group::{ParameterGroup, Projection};
pub use keeper::Best;
pub use optimizer::{AdaGrad, AdamW, Adan, Lamb, Lion, Optimizer, RmsProp, Sgd};
pub use options::{Explosion, Keep, TrainOptions};
pub use parameters::{OptimizerState, Parameter, Parameters, StateArray};
pub use run::{TrainReport, train, train_in_group, train_saved};
pub use schedule::{Decay, Schedule};
pub use state::Saving;
pub use stored::StoredValues;
pub use task::{BatchLoss, TaskState, TrainingTask};

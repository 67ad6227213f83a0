//! Training by gradient descent: parameters, AdamW, schedules, and the loop around them.
//!
//! A [`TrainingTask`] says how a wave gives gradients and what figure is to fall; [`train`] shuffles, accumulates micro-batches, clips,
//! steps, evaluates and keeps the best parameters. It knows nothing of what the parameters are: router rows today, and whatever else
//! can be named, has values and gets gradients. Deterministic: the same waves, options and task give the same bits.

mod adamw;
mod parameters;
mod run;
mod schedule;

pub use adamw::AdamW;
pub use parameters::{Parameter, Parameters};
pub use run::{
    BatchLoss, Best, JsonLines, OnEvent, StepOf, TrainEvent, TrainOptions, TrainReport, TrainingTask, train,
};
pub use schedule::{Decay, Schedule};

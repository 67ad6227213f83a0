//! Task vectors as files: what fine-tuning changed, and little else.
//!
//! A [`TaskVector`] is the difference of two checkpoints, or an adapter. [`ComPeft`] keeps its largest elements as signs at coded positions, a [`PlainDelta`]
//! whole tensors or dense differences; both write a [`Delta`] file (`docs/delta-format.md`), which [`Delta::apply`] adds to the base, checkpoint to
//! checkpoint, or [`Delta::restore_adapter`] turns back into an adapter. Everything is a stream: no pass holds more than a piece of a tensor.
//!
//! ```no_run
//! use moe_checkpoint::Checkpoint;
//! use moe_peft::codec::{ComPeft, Delta, DeltaOptions, TaskVector};
//! use std::path::Path;
//!
//! let (base, tuned) = (Checkpoint::open("base")?, Checkpoint::open("tuned")?);
//! let vector = TaskVector::Checkpoints { base: &base, tuned: &tuned };
//! let report = ComPeft::default().encode(vector, Path::new("task.delta"))?;
//! println!("{} bytes, {:.0} times smaller than 16 bits per element", report.file_bytes, report.ratio());
//! Delta::open("task.delta")?.apply(&base, Path::new("restored"), &DeltaOptions::default())?;
//! # Ok::<(), moe_peft::Error>(())
//! ```

mod apply;
mod compeft;
mod file;
mod golomb;
mod plain;
mod report;
mod source;

pub use apply::DeltaOptions;
pub use compeft::{ComPeft, KeptValues};
pub use file::{Delta, DeltaBase, DeltaCoding, DeltaTable, DeltaTensor};
pub use golomb::{expected_bits, rice_parameter};
pub use plain::PlainDelta;
pub use report::DeltaReport;
pub use source::TaskVector;

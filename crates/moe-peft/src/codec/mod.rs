//! Task vectors as files: what fine-tuning changed, and little else.
//!
//! A [`TaskVector`] is the difference of two checkpoints, or an adapter. [`ComPeft`] keeps its largest elements as
//! signs at coded positions, a [`PlainDelta`] whole tensors or dense differences; both write a [`Delta`] file
//! (`docs/delta-format.md`), which [`Delta::on`] adds to the base, as a model of its own, or [`Delta::restore_adapter`]
//! turns back into an adapter. Checkpoints are streams: no pass holds more than a piece of a tensor.
//!
//! ```no_run
//! use moe_checkpoint::{Checkpoint, WriteOptions, write};
//! use moe_peft::codec::{ComPeft, Delta, TaskVector};
//! use std::{path::Path, sync::Arc};
//!
//! let (base, tuned) = (Arc::new(Checkpoint::open("base")?), Checkpoint::open("tuned")?);
//! let vector = TaskVector::Checkpoints { base: &base, tuned: &tuned };
//! let report = ComPeft::default().encode(vector, Path::new("task.delta"))?;
//! println!("{} bytes, {:.0} times smaller than 16 bits per element", report.file_bytes, report.ratio());
//! let restored = Delta::open("task.delta")?.on(&base)?;
//! write(restored.model(), "restored", &WriteOptions::default())?;
//! # Ok::<(), moe_peft::Error>(())
//! ```

mod compeft;
mod decode;
mod file;
mod golomb;
mod patched;
mod plain;
mod report;
mod restore;
mod source;

pub use compeft::{ComPeft, KeptValues};
pub use file::{Delta, DeltaBase, DeltaCoding, DeltaTable, DeltaTensor};
pub use golomb::{expected_bits, rice_parameter};
pub use patched::{DELTA, Patched};
pub use plain::PlainDelta;
pub use report::DeltaReport;
pub use source::TaskVector;

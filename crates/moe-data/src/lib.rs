//! Data of a language model: rows of text become [`Sequence`]s of token ids with a loss mask, sequences become
//! [`Wave`]s.
//!
//! A row is `{"text"}`, `{"prompt", "completion"}` (joined with nothing in between), `{"messages"}` (rendered by the
//! tokenizer's chat template) or `{"input_ids"}`; a `.txt` file is one long text. No special token is added unless the
//! tokenizer adds it, a row longer than the limit loses its end, and a row with nothing to predict is dropped and
//! counted.
//!
//! ```no_run
//! use moe_data::{Dataset, DatasetOptions, Tokenizer, WaveOptions};
//! # fn main() -> moe_data::Result<()> {
//! let tokenizer = Tokenizer::from_dir("model")?;
//! let options = DatasetOptions { samples: Some(64), length: 512, ..Default::default() };
//! let data = Dataset::load("calibration.jsonl", Some(&tokenizer), 151_936, &options)?;
//! let waves = data.waves(WaveOptions::default());
//! println!("{} sequences, {} tokens, {} waves, {} rows dropped", data.sequences.len(), data.tokens(), waves.len(), data.dropped);
//! # Ok(())
//! # }
//! ```
//!
//! # Features
#![doc = document_features::document_features!()]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod answers;
mod dataset;
mod encode;
mod error;
mod eval_set;
mod mixture;
mod preview;
mod rows;
mod sequence;
mod template;
mod tokenizer;
mod waves;

#[cfg(test)]
mod tests;

pub use answers::extract_answer;
pub use dataset::{Dataset, DatasetOptions};
pub use encode::{LossOver, RowEncoder};
pub use error::{Error, Result};
pub use eval_set::{ChoiceQuestion, EvalRows, EvalSet, EvalSetOptions, EvalText, Question};
pub use mixture::Source;
pub use preview::{Preview, PreviewRow, PreviewToken};
pub use rows::{Chat, Place, Reading, Row, Rows};
pub use sequence::Sequence;
pub use template::{ChatTemplate, Conversation};
pub use tokenizer::Tokenizer;
pub use waves::{Wave, WaveOptions, shard, waves};

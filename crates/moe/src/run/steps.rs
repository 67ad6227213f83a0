//! What steps tell, and the steps that measure and write.

use std::path::{Path, PathBuf};

use moe_checkpoint::group::{Alone, Group};
use moe_checkpoint::{Checkpoint, Existing, WriteOptions, write, write_json};
use moe_core::data::WaveOptions;
use moe_core::decode::Decoding;
use serde::{Deserialize, Serialize};

use super::artifacts::Artifacts;
use super::{Measurement, Run};
use crate::eval_file::EvalFile;
use crate::progress::Unit;
use crate::recipe::{Evaluate, Write};
use crate::{Error, Result, format};

/// What a step tells.
#[derive(Default)]
pub(super) struct Done {
    pub summary: String,
    pub reused: bool,
    pub artifact: Option<PathBuf>,
    pub measured: Vec<Measurement>,
    /// Only a share of the step was done, so that the run ends here.
    pub share: bool,
}

impl Done {
    /// One share of a step.
    pub fn share((index, count): (usize, usize), of: &str, artifact: PathBuf) -> Self {
        let summary = format!("share {index} of {count} of {of}; a run that takes over all shares goes on from them");
        Self { summary, artifact: Some(artifact), share: true, ..Self::default() }
    }
}

/// JSON of what can be JSON.
pub(super) fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| Error::Invalid(error.to_string()))
}

pub(super) fn save(path: &Path, value: &impl Serialize) -> Result<()> {
    let value = serde_json::to_value(value).map_err(|error| Error::Invalid(error.to_string()))?;
    Ok(write_json(path, &value)?)
}

pub(super) fn load<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))
}

impl Run<'_> {
    /// Measures the model.
    pub(super) fn evaluate(&mut self, step: &Evaluate) -> Result<Done> {
        if self.options.shard.is_some() {
            let summary = "not measured by a run that does a share".into();
            return Ok(Done { summary, ..Done::default() });
        }
        let paths = if step.data.is_empty() { &self.recipe.data.eval } else { &step.data };
        let Some(tokenizer) = &self.tokenizer else {
            return Err(Error::Invalid(format!("{}: has no tokenizer.json", self.recipe.model.display())));
        };
        let files = EvalFile::load_all(paths, &step.options, Some(tokenizer), self.model.config())?;
        let recipes: Vec<serde_json::Value> = files.iter().map(EvalFile::recipe).collect();
        let of = [json(&step.options)?, self.identity(), serde_json::Value::from(recipes).to_string()];
        let (dir, reused) = self.artifacts.begin("evaluate", &of.each_ref().map(String::as_str))?;
        let file = dir.join("evaluation.json");
        if !reused {
            let model = self.engine_model()?;
            let decoding = Decoding::new(self.run_time.decoding.clone().unwrap_or_default(), &model, vec![])?;
            let waves = WaveOptions::Tokens(self.recipe.data.wave_tokens);
            let bar = self.options.progress.bar("measuring", files.len() as u64, Unit::Count("files"));
            // Likelihoods are shared out by waves, answers by files.
            let group: &dyn Group = if decoding.is_plain() { self.options.group } else { &Alone };
            let mut values = vec![0.0; files.len()];
            let measure = |group: &dyn Group, file: &EvalFile| -> Result<f64> {
                bar.label(format!("measuring {}", file.name));
                let (value, _, _) = file.measure_in_group(group, &model, tokenizer, waves, &decoding)?;
                bar.step();
                Ok(value)
            };
            let (exact, others): (Vec<usize>, Vec<usize>) = (0..files.len()).partition(|at| files[*at].is_exact());
            for at in others {
                values[at] = measure(group, &files[at])?;
            }
            let dealt = exact.iter().skip(group.rank()).step_by(group.size());
            let own =
                dealt.map(|at| Ok(measure(&Alone, &files[*at])?.to_le_bytes().to_vec())).collect::<Result<_>>()?;
            for (at, message) in exact.iter().zip(group.share_dealt(own, exact.len())?) {
                let value = message.as_slice().try_into().map_err(|_| Error::Invalid("a figure cut off".into()))?;
                values[*at] = f64::from_le_bytes(value);
            }
            let of = |(file, value): (&EvalFile, f64)| Measurement { key: file.key(), value };
            let measured: Vec<Measurement> = files.iter().zip(values).map(of).collect();
            let keep = || {
                save(&file, &measured)?;
                Artifacts::finish(&dir)
            };
            match decoding.is_plain() {
                true => self.on_first(|_| keep())?,
                false => keep()?,
            }
        }
        self.measured = load(&file)?;
        let summary =
            format!("measured on {}", files.iter().map(|file| file.name.as_str()).collect::<Vec<_>>().join(", "));
        Ok(Done { summary, reused, artifact: Some(dir), measured: self.measured.clone(), ..Done::default() })
    }

    /// Puts what the model is run with beside a model that was written.
    fn write_run_time(&self, to: &Path) -> Result<()> {
        match self.run_time.is_plain() {
            true => Ok(()),
            false => Ok(self.run_time.save_beside(to)?),
        }
    }

    /// Writes the model.
    pub(super) fn write(&mut self, step: &Write) -> Result<Done> {
        let to = step.to.clone().unwrap_or_else(|| self.recipe.out.join("model"));
        let summary = format!("written to {}", to.display());
        if to.exists() && !self.options.force {
            // A finished directory of this very model is what the step would write.
            if Checkpoint::open(&to)?.is_model(&self.model.fingerprint()) {
                self.write_beside(&to)?;
                self.write_run_time(&to)?;
                self.written.push(to.clone());
                return Ok(Done { summary, reused: true, artifact: Some(to), ..Done::default() });
            }
            let advice = "force to replace it";
            return Err(Error::Invalid(format!("{}: another model is there; {advice}", to.display())));
        }
        let measured: Vec<(String, String)> =
            self.measured.iter().map(|found| (found.key.clone(), format!("{:.4}", found.value))).collect();
        let max_shard_bytes = match &step.shard_size {
            Some(size) => format::parse_size(size).map_err(Error::Usage)?,
            None => WriteOptions::default().max_shard_bytes,
        };
        let bar = self.options.progress.bar("writing", self.model.bytes_on_disk(), Unit::Bytes);
        let tell = |at: &moe_checkpoint::Progress<'_>| {
            bar.at(at.done);
            Ok(())
        };
        let existing = if self.options.force { Existing::Force } else { Existing::Resume };
        let options = WriteOptions { max_shard_bytes, existing, measured: &measured, progress: Some(&tell) };
        write(&self.model, &to, &options)?;
        let summary = match self.write_beside(&to)? {
            Some(adapter) => format!("{summary}, what goes with it to {}", adapter.display()),
            None => summary,
        };
        self.write_run_time(&to)?;
        self.written.push(to.clone());
        Ok(Done { summary, reused: false, artifact: Some(to), ..Done::default() })
    }
}

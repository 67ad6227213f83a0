//! A run whose arguments have been checked against the files they name.

use std::sync::Arc;

use moe_checkpoint::Checkpoint;
use moe_core::Model;
use moe_core::data::{Dataset, DatasetOptions, Tokenizer, Wave, WaveOptions};
use moe_importance::scorers::{Activation, Combine, Fisher, Magnitude, Random, RouterQuantity, RouterScore};
use moe_importance::{Calibration, Scorer, ScorerConfig};
use moe_prune::{Export, PruneOptions};
use serde_json::{Value, json};

use super::arguments::{Arguments, DEFAULT_OUT};
use crate::{Error, Result};
use moe::eval_file::{EvalFile, EvalOptions};
use moe::out_dir::{Existing, OutDir};

/// A way to score units.
pub struct Method {
    /// Its name in tables, files and JSON.
    pub name: &'static str,
    /// The scorer.
    pub scorer: Box<dyn Scorer>,
}

/// Everything that a run needs, loaded and checked. Nothing has been written yet.
pub struct Job {
    /// The arguments, completed.
    pub arguments: Arguments,
    /// How pruned checkpoints are written.
    pub export: Export,
    /// The same, with everything else that is said of it.
    pub options: PruneOptions<'static>,
    /// The model, its weights unread.
    pub model: Model,
    /// Its tokenizer, unless the directory has none.
    pub tokenizer: Option<Tokenizer>,
    /// Sequences to score on.
    pub calibration: Dataset,
    /// The same in waves.
    pub waves: Vec<Wave>,
    /// What is measured.
    pub evals: Vec<EvalFile>,
    /// Fisher first, then the controls.
    pub methods: Vec<Method>,
    /// How they are cut.
    pub wave_options: WaveOptions,
    /// Where everything goes.
    pub out: OutDir,
    /// What to do if that exists.
    pub existing: Existing,
}

impl Job {
    /// Checks the arguments and the files they name, and that the memory limit can hold the work. This is everything
    /// that can be wrong before hours of work.
    ///
    /// # Errors
    /// What is wrong.
    pub fn new(arguments: Arguments) -> Result<Self> {
        let arguments = arguments.complete()?;
        let existing = match (&arguments.out, arguments.resume, arguments.force) {
            (_, true, _) => Existing::Resume,
            (Some(_), _, false) => Existing::Refuse,
            _ => Existing::Replace,
        };
        let out = arguments.out.clone().unwrap_or_else(|| DEFAULT_OUT.into());
        let out = OutDir::check(&out, existing)?;
        let device = moe_core::device::device(&arguments.device)?;

        let dir = arguments.model_dir();
        let checkpoint = Arc::new(Checkpoint::open(&dir)?);
        let shape = checkpoint.shape();
        if shape.units() == 0 {
            let reason = "no routed experts to prune: not a Mixture-of-Experts model";
            return Err(Error::Invalid(format!("{}: {reason}", dir.display())));
        }
        let export = arguments.export.unwrap_or(Export::Ragged);
        let form = export.form().ok_or_else(|| Error::Usage(format!("--export {export}: see fine_grained")))?;
        let options = PruneOptions { mtp: arguments.mtp, ..PruneOptions::new(form) };
        options.check(&checkpoint)?;
        let vocab_size = checkpoint.config().vocab_size;
        let tokenizer = match dir.join("tokenizer.json").exists() {
            true => Some(Tokenizer::from_dir(&dir)?),
            false => None,
        };
        let eval =
            // Answers as long as those of the bundled model.
            EvalOptions {
                rows: arguments.eval_rows,
                length: arguments.eval_length,
                generate: arguments.generate,
                max_new_tokens: 28,
                ..EvalOptions::default()
            };
        let evals = EvalFile::load_all(&arguments.eval, &eval, tokenizer.as_ref(), checkpoint.config())?;
        let data_options = DatasetOptions {
            samples: Some(arguments.samples),
            length: arguments.length,
            seed: arguments.seed,
            ..DatasetOptions::default()
        };
        let file = arguments.calibration.clone().unwrap_or_default();
        let calibration = Dataset::load(&file, tokenizer.as_ref(), vocab_size, &data_options)?;
        let wave_options = WaveOptions::Tokens(arguments.wave_tokens);
        let waves = calibration.waves(wave_options);

        let methods = methods(&arguments)?;
        let model = Model::new(checkpoint, &device, arguments.max_memory)?;
        for eval in &evals {
            eval.check_memory(&model, wave_options)?;
        }
        let job = Self {
            export,
            options,
            model,
            tokenizer,
            calibration,
            waves,
            wave_options,
            evals,
            methods,
            out,
            existing,
            arguments,
        };
        job.observed().check()?;
        if existing == Existing::Resume {
            job.out.check_resumable(&job.recipe())?;
            job.collection().check()?;
        }
        Ok(job)
    }

    fn observed(&self) -> Calibration<'_> {
        Calibration::new(&self.model, &self.calibration, self.wave_options)
            .scorers(self.methods.iter().map(|method| &*method.scorer))
    }

    /// What the model is run over the calibration data for, kept in the output directory.
    pub fn collection(&self) -> Calibration<'_> {
        self.observed().store(self.out.statistics())
    }

    /// What the run is, for the output directory and the report.
    pub fn recipe(&self) -> Value {
        let Arguments { ratio, scope, samples, length, seed, wave_tokens, .. } = &self.arguments;
        let scorers: Vec<Value> = self.methods.iter().map(|method| method.scorer.recipe()).collect();
        let evals: Vec<Value> = self.evals.iter().map(EvalFile::recipe).collect();
        json!({
            "program": "fisher_prune_qwen",
            "crate_version": env!("CARGO_PKG_VERSION"),
            "model": self.arguments.model_dir(),
            "model_fingerprint": self.model.checkpoint().fingerprint(),
            "calibration": {
                "file": self.arguments.calibration,
                "hash": self.calibration.hash,
                "samples": samples,
                "length": length,
                "seed": seed,
                "wave_tokens": wave_tokens,
            },
            "scorers": scorers,
            "scope": scope,
            "ratios": ratio,
            "export": self.export,
            "eval": evals,
        })
    }
}

/// Fisher, and the controls if they are asked for.
fn methods(arguments: &Arguments) -> Result<Vec<Method>> {
    let mut configs: Vec<ScorerConfig> = vec![Fisher::new(arguments.criterion).into()];
    if arguments.controls {
        let seed = arguments.seed.unwrap_or_default();
        configs.push(Activation::default().into());
        configs.push(Magnitude::new().into());
        // what the router sends to an expert; units of one expert go by magnitude
        configs.push(RouterScore::new(RouterQuantity::Weight, Combine::TieBreak, Magnitude::new()).into());
        configs.push(Random::new(seed).into());
    }
    let method =
        |config: &ScorerConfig| -> Result<Method> { Ok(Method { name: config.name(), scorer: config.build()? }) };
    configs.iter().map(method).collect()
}

/// JSON in a string as JSON.
pub(super) fn parsed(json: &str) -> Value {
    serde_json::from_str(json).unwrap_or_else(|_| Value::String(json.into()))
}

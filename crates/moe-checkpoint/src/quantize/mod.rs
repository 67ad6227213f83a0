//! Quantization: a model whose weights are rounded to few bits, in the files that engines serve.

mod base_precision;
mod entry;
mod expert_formats;
mod held;
mod keep;
mod router;
mod second_order;
mod smoothing;
mod source;
mod weight_format;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use base_precision::BasePrecision;
pub use expert_formats::{ExpertFormat, ExpertFormats, expert_bytes};
pub use keep::{KeptQuantization, MatrixOrigin};
pub use router::{RoundedRouter, RouterInputs, RouterRounding};
pub use second_order::InputMoments;
pub use smoothing::{ActivationAware, ExpertAware, InputRanges, LayerSmoothing, Smoothed, SmoothedLayer, Smoothing};
pub use weight_format::WeightFormat;

use crate::compression::BeforeAfter;
use crate::config::Ffn;
use crate::experts::{ExpertLayout, ExpertPart, ExpertTensor};
use crate::family::{LayerRole, Role};
use crate::human::count;
use crate::record::Step;
use crate::source::ModelDescription;
use crate::{Checkpoint, Error, Result};

use source::{Content, QuantizedSource, Stored, Weight};

/// Which weights are quantized. Embeddings, head, norms, routers and layers of multi-token prediction never are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum QuantizedPart {
    /// Routed experts: nearly all bytes of a Mixture-of-Experts model.
    #[default]
    Experts,
    /// Routed and shared experts, dense FFNs and the projections of softmax attention.
    Linear,
}

/// How a model is quantized.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizeOptions {
    /// The format that weights are written in.
    pub format: WeightFormat,
    /// Which weights.
    #[serde(default)]
    pub part: QuantizedPart,
}

impl QuantizeOptions {
    /// Routed experts in this format.
    pub fn new(format: WeightFormat) -> Self {
        Self { format, part: QuantizedPart::default() }
    }
}

/// A quantized model, not yet written.
#[derive(Clone, Debug)]
pub struct Quantized {
    model: Arc<Checkpoint>,
    report: QuantizeReport,
}

/// What quantization does to a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantizeReport {
    /// The format.
    pub format: WeightFormat,
    /// Weights that are quantized.
    pub weights: usize,
    /// Elements of those.
    pub elements: u64,
    /// Bytes of all tensors.
    pub bytes: BeforeAfter,
    /// Root mean square of what rounding changed over that of the weights, over a sample of one matrix per layer.
    pub relative_error: f64,
    /// What else a user should know.
    pub notes: Vec<String>,
}

impl fmt::Display for QuantizeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { format, weights, elements, bytes, relative_error, notes } = self;
        writeln!(
            f,
            "{format}: {weights} weights of {} elements, {:.2}% relative error",
            count(*elements),
            100.0 * relative_error
        )?;
        let factor = bytes.before as f64 / bytes.after.max(1) as f64;
        writeln!(f, "weights: {} ({factor:.2} times smaller)", bytes.sizes())?;
        notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))
    }
}

/// Name of the step in records.
pub const QUANTIZE_METHOD: &str = "quantize";

impl Quantized {
    /// The quantized model of a base, rounded to nearest whenever its weights are read: what it computes in memory is
    /// what is written, bit for bit. A base that is quantized already is dequantized first.
    ///
    /// Experts are written one by one, as engines expect quantized ones, whatever the layout of the base; those of
    /// gpt-oss in the layout of gpt-oss, in MXFP4 alone.
    ///
    /// ```no_run
    /// use std::sync::Arc;
    /// use moe_checkpoint::{Checkpoint, QuantizeOptions, Quantized, WeightFormat, WriteOptions, write};
    ///
    /// let base = Arc::new(Checkpoint::open("models/Qwen3-30B-A3B")?);
    /// let format: WeightFormat = "int4".parse()?;
    /// let quantized = Quantized::on(&base, &QuantizeOptions::new(format))?;
    /// println!("{}", quantized.report());
    /// write(quantized.model(), "out/int4", &WriteOptions::default())?;
    /// # Ok::<(), moe_checkpoint::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Quantize`] with the reason: parameters that the format does not have, widths that it cannot divide, a
    /// layout of experts that it has no place for.
    pub fn on(base: &Arc<Checkpoint>, options: &QuantizeOptions) -> Result<Self> {
        Self::rounded(base, options, None, None)
    }

    /// The same with a format of its own for every routed expert (mixed precision); [`QuantizeOptions::format`] is that
    /// of weights outside the routed experts, where these are quantized. Experts that stay as they are have to be
    /// stored one by one in the base.
    ///
    /// # Errors
    /// As [`Quantized::on`] and [`ExpertFormats::new`].
    pub fn mixed(
        base: &Arc<Checkpoint>,
        options: &QuantizeOptions,
        formats: &ExpertFormats,
        moments: Option<&InputMoments>,
    ) -> Result<Self> {
        let formats = ExpertFormats::new(base, formats.groups().to_vec())?;
        if options.part == QuantizedPart::Linear && !options.format.is_mixable() {
            let reason = "no engine reads it beside other formats: choose fp8_channels, mxfp4, nvfp4 or integers";
            return Err(Error::Quantize { format: options.format.to_string(), reason: reason.into() });
        }
        Self::rounded(base, options, Some(&formats), moments)
    }

    /// The same with routed experts rounded so that what rounding a column changes of the output is taken back by the
    /// columns after it (GPTQ, arXiv 2210.17323), by the second moments of their inputs. Experts that no token of the
    /// calibration was routed to, and weights outside the experts, are rounded to nearest.
    ///
    /// # Errors
    /// As [`Quantized::on`]; moments of another model are an error when weights are read.
    pub fn calibrated(base: &Arc<Checkpoint>, options: &QuantizeOptions, moments: &InputMoments) -> Result<Self> {
        if matches!(options.format, WeightFormat::Nf4 | WeightFormat::Ternary) {
            let reason = "scales run across rows, so that errors cannot be passed on: leave calibration out";
            return Err(Error::Quantize { format: options.format.to_string(), reason: reason.into() });
        }
        Self::rounded(base, options, None, Some(moments))
    }

    fn rounded(
        base: &Arc<Checkpoint>,
        options: &QuantizeOptions,
        formats: Option<&ExpertFormats>,
        moments: Option<&InputMoments>,
    ) -> Result<Self> {
        let refused = |reason: String| Error::Quantize { format: options.format.to_string(), reason };
        options.format.check().map_err(refused)?;
        let from = base.dequantized()?;
        let mut notes = Vec::new();
        if let Some(before) = base.quantization() {
            notes.push(format!("the base, quantized as {before}, is rounded a second time"));
        }
        if from.ragged() || from.grouped() {
            let what = if from.ragged() { "experts of different widths" } else { "experts that share weights" };
            return Err(refused(format!("no engine reads quantized {what}: export with one width first")));
        }
        let by_expert = formats.map(ExpertFormats::by_expert);
        for format in by_expert.iter().flat_map(|formats| formats.values().flatten()) {
            format.check().map_err(refused)?;
        }
        let fused = formats.is_none() && options.format == WeightFormat::Mxfp4 && from.config().model_type == "gpt_oss";
        if fused && options.part == QuantizedPart::Linear {
            return Err(refused("gpt-oss has routed experts in MXFP4 alone: choose the part `experts`".into()));
        }
        let mut made = Made {
            from: &from,
            options,
            by_expert: by_expert.unwrap_or_default(),
            stored: BTreeMap::new(),
            weights: Vec::new(),
            formats: Vec::new(),
            kept: Vec::new(),
        };
        for (layer, config) in from.config().layers.iter().enumerate() {
            if let Ffn::Moe(moe) = &config.ffn {
                match fused {
                    true => made.fused(layer, moe.num_experts())?,
                    false => made.per_expert(layer, moe.num_experts())?,
                }
            }
        }
        if options.part == QuantizedPart::Linear {
            made.linear()?;
        }
        let Made { mut stored, weights, formats: of_weights, kept, by_expert, .. } = made;
        if let Some((name, reason)) = kept.first() {
            notes.push(format!("{} matrices stay as they are, such as `{name}`: {reason}", kept.len()));
        }
        if from.mtp_tensors().next().is_some() {
            notes.push("layers that predict further tokens stay as they are".into());
        }
        let mut replaced: BTreeSet<String> = weights.iter().map(|weight| weight.name.clone()).collect();
        for layer in &from.shape().layers {
            let names = source::expert_names(&from, layer.layer, layer.num_experts());
            // Experts that stay as they are, one by one.
            let stays = |expert: &usize| by_expert.get(&(layer.layer, *expert)).is_some_and(Option::is_none);
            let kept: Vec<String> = (0..layer.num_experts())
                .filter(stays)
                .flat_map(|set| [ExpertTensor::Gate(set), ExpertTensor::Up(set), ExpertTensor::Down(set)])
                .map(|tensor| from.expert_tensor_name(layer.layer, tensor))
                .collect();
            if let Some(name) = kept.iter().find(|name| from.info(name).is_err()) {
                let reason = format!("`{name}` cannot stay as it is: experts of this model are stored together");
                return Err(refused(reason));
            }
            replaced.extend(names.into_iter().filter(|name| !kept.contains(name)));
        }
        for info in from.tensors().filter(|info| !replaced.contains(&info.name)) {
            stored.insert(info.name.clone(), (info.spec(), Stored::Plain));
        }
        let dense = entry::dense_modules(&from, &replaced);
        let mut config = from.raw_config().clone();
        if let Some(config) = config.as_object_mut() {
            let entry = match formats {
                Some(_) => entry::mixed_entry(&entry::targets(&weights, &of_weights), &dense),
                None => entry::entry(options, &dense, fused),
            };
            config.insert("quantization_config".into(), entry);
        }
        let elements = weights.iter().map(|weight| (weight.stack() * weight.dims.0 * weight.dims.1) as u64).sum();
        let summary = match formats {
            Some(_) => format!("mixed precision ({} weights)", weights.len()),
            None => format!("{} ({} weights)", options.format, weights.len()),
        };
        let mut recipe = serde_json::to_value(options).map_err(|error| refused(error.to_string()))?;
        if let (Some(moments), Some(recipe)) = (moments, recipe.as_object_mut()) {
            recipe.insert("calibration".into(), moments.digest().into());
            notes.push("experts are rounded with error feedback, by the second moments of their inputs".into());
        }
        if let (Some(formats), Some(recipe)) = (formats, recipe.as_object_mut()) {
            recipe.insert("experts".into(), serde_json::json!(formats));
            let mut counts: BTreeMap<String, usize> = BTreeMap::new();
            for group in formats.groups() {
                let name = group.format.as_ref().map_or("as it is".to_string(), ToString::to_string);
                *counts.entry(name).or_default() += group.experts.len();
            }
            if counts.len() > 1 {
                notes.push(
                    "transformers 5.24 reads all experts in the format of the first group of the config, wrongly: load it where the \
                     scheme of every module is looked up"
                        .into(),
                );
            }
            notes.extend(counts.into_iter().map(|(name, count)| format!("{count} experts: {name}")));
        }
        let step = Step::new(QUANTIZE_METHOD, base, recipe, summary);
        let description = ModelDescription {
            config,
            generation: from.raw_generation_config().cloned(),
            tensors: stored.values().map(|(spec, _)| spec.clone()).collect(),
        };
        let count = weights.len();
        let relative_error = source::relative_error(&from, &weights, moments)?;
        let stored = stored.into_iter().map(|(name, (_, content))| (name, content)).collect();
        let source = QuantizedSource::new(from, base.clone(), stored, weights, Some(step)).with_moments(moments);
        let model = Arc::new(Checkpoint::from_source(description, Arc::new(source))?);
        let bytes = BeforeAfter { before: base.bytes_on_disk(), after: model.bytes_on_disk() };
        let format = options.format.clone();
        Ok(Self { model, report: QuantizeReport { format, weights: count, elements, bytes, relative_error, notes } })
    }

    /// The model: to be run, to be changed further, or to be written with [`write`](crate::write()).
    pub fn model(&self) -> &Arc<Checkpoint> {
        &self.model
    }

    /// What quantization does to the base.
    pub fn report(&self) -> &QuantizeReport {
        &self.report
    }
}

/// The quantized weights while they are listed.
struct Made<'a> {
    from: &'a Checkpoint,
    options: &'a QuantizeOptions,
    /// Formats of single experts, in mixed precision.
    by_expert: BTreeMap<(usize, usize), Option<WeightFormat>>,
    stored: BTreeMap<String, (crate::TensorSpec, Stored)>,
    weights: Vec<Weight>,
    /// The format of each.
    formats: Vec<WeightFormat>,
    /// Weights that stay as they are, and why.
    kept: Vec<(String, String)>,
}

impl Made<'_> {
    fn refused(&self, reason: String) -> Error {
        Error::Quantize { format: self.options.format.to_string(), reason }
    }

    /// Adds a weight of this name; refuses or keeps one whose sides do not fit.
    fn add(
        &mut self,
        name: &str,
        dims: (usize, usize),
        content: Vec<Content>,
        must: bool,
        format: &WeightFormat,
    ) -> Result<()> {
        let scheme = format.scheme();
        if let Some(reason) = scheme.misfit(dims) {
            if must {
                return Err(self.refused(format!("`{name}`: {reason}; {}", format.way_out())));
            }
            self.kept.push((name.to_string(), reason));
            return Ok(());
        }
        let weight = self.weights.len();
        for (spec, part) in format.stored(name, dims, content.len()) {
            let content = match part {
                weight_format::StoredPart::Made(part) => Stored::Part { weight, part },
                weight_format::StoredPart::Constant(bytes) => Stored::Constant(bytes),
            };
            self.stored.insert(spec.name.clone(), (spec, content));
        }
        self.weights.push(Weight { name: name.to_string(), dims, scheme, content });
        self.formats.push(format.clone());
        Ok(())
    }

    /// Experts of a layer, one by one.
    fn per_expert(&mut self, layer: usize, experts: usize) -> Result<()> {
        let family = self.from.family();
        if !family.layouts().contains(&ExpertLayout::PerExpert) {
            return Err(self.refused(format!(
                "experts of `{}` are stored fused with their biases, which engines read in MXFP4 alone: choose `mxfp4`",
                family.model_type()
            )));
        }
        for set in 0..experts {
            let own = self.by_expert.get(&(layer, set)).cloned();
            let Some(format) = own.unwrap_or_else(|| Some(self.options.format.clone())) else { continue };
            let tensors = [ExpertTensor::Gate(set), ExpertTensor::Up(set), ExpertTensor::Down(set)];
            for (part, tensor) in ExpertPart::ALL.into_iter().zip(tensors) {
                let name = self.from.expert_tensor_name(layer, tensor);
                let width = self.from.shape().layer(layer).map_or(0, |shape| shape.widths[set]);
                let dims = part.dims(self.from.config().expert_hidden_size(), width);
                let content = Content::Expert { layer, set, part };
                self.add(&name, dims, vec![content], true, &format)?;
            }
        }
        Ok(())
    }

    /// Experts of gpt-oss.
    fn fused(&mut self, layer: usize, experts: usize) -> Result<()> {
        let hidden = self.from.config().expert_hidden_size();
        let width = self.from.shape().layer(layer).map_or(0, |shape| shape.widths[0]);
        let both = (0..experts).map(|set| Content::GateUp { layer, set }).collect();
        let down = (0..experts).map(|set| Content::Expert { layer, set, part: ExpertPart::Down }).collect();
        let name = |tensor| self.from.expert_tensor_name(layer, tensor);
        let names = [name(ExpertTensor::FusedGateUp), name(ExpertTensor::FusedDown)];
        let format = &self.options.format.clone();
        self.add(&names[0], (2 * width, hidden), both, true, format)?;
        self.add(&names[1], (hidden, width), down, true, format)
    }

    /// The other linear maps of the decoder layers.
    fn linear(&mut self) -> Result<()> {
        use LayerRole::{
            DenseDown, DenseGate, DenseUp, Key, LatentKvDown, LatentKvUp, LatentQueryDown, LatentQueryUp, Output,
            Query, SharedDown, SharedGate, SharedUp, Value,
        };
        const ROLES: [LayerRole; 14] = [
            Query,
            Key,
            Value,
            Output,
            LatentQueryDown,
            LatentQueryUp,
            LatentKvDown,
            LatentKvUp,
            DenseGate,
            DenseUp,
            DenseDown,
            SharedGate,
            SharedUp,
            SharedDown,
        ];
        for layer in 0..self.from.config().layers.len() {
            for role in ROLES {
                let Ok(info) = self.from.role(Role::Layer(layer, role)) else { continue };
                let (name, [rows, cols]) =
                    (info.name.clone(), <[usize; 2]>::try_from(&info.shape[..]).unwrap_or_default());
                let format = self.options.format.clone();
                self.add(&name, (rows, cols), vec![Content::Tensor(name.clone())], false, &format)?;
            }
        }
        Ok(())
    }
}

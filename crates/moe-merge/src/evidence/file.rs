//! Evidence as a safetensors file.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use moe_checkpoint::{Dtype, write_atomic};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};

use super::{Evidence, LayerEvidence, OutputMean, TokenSample};
use crate::{Error, Result};

/// Key of the description in the file's metadata.
const KEY: &str = "moe.merge_evidence";
/// Version of the format.
const VERSION: u64 = 1;

#[derive(Serialize, Deserialize)]
struct Meta {
    version: u64,
    model: String,
    data: String,
    layers: Vec<LayerMeta>,
}

#[derive(Serialize, Deserialize)]
struct LayerMeta {
    layer: usize,
    tokens: u64,
    sums: Vec<String>,
    logit_gram: bool,
    outputs: Vec<OutputMean>,
    sample: Option<SampleMeta>,
}

#[derive(Serialize, Deserialize)]
struct SampleMeta {
    hidden: usize,
    experts: usize,
    top_k: usize,
}

/// Name, dtype, shape and bytes of everything that is not in the description.
pub(super) fn tensors(evidence: &Evidence) -> Vec<(String, Dtype, Vec<usize>, Vec<u8>)> {
    let mut out = Vec::new();
    for layer in &evidence.layers {
        let mut f64s = |name: String, values: &[f64]| {
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            out.push((format!("layer.{}.{name}", layer.layer), Dtype::F64, vec![values.len()], bytes));
        };
        for (name, values) in &layer.sums {
            f64s(format!("sum.{name}"), values);
        }
        if let Some(gram) = &layer.logit_gram {
            f64s("logit_gram".into(), gram);
        }
        for (mean, values) in &layer.outputs {
            f64s(format!("outputs.{}", mean.name()), values);
        }
        if let Some(sample) = &layer.sample {
            let f32s = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
            let selected = sample.selected.iter().flat_map(|v| v.to_le_bytes()).collect();
            for (name, dtype, len, bytes) in [
                ("inputs", Dtype::F32, sample.inputs.len(), f32s(&sample.inputs)),
                ("logits", Dtype::F32, sample.logits.len(), f32s(&sample.logits)),
                ("selected", Dtype::U32, sample.selected.len(), selected),
                ("weights", Dtype::F32, sample.weights.len(), f32s(&sample.weights)),
            ] {
                out.push((format!("layer.{}.sample.{name}", layer.layer), dtype, vec![len], bytes));
            }
        }
    }
    out
}

impl Evidence {
    /// Writes a file that [`Evidence::load`] reads back to the same bits, atomically.
    ///
    /// # Errors
    /// [`Error::InvalidEvidence`] if it cannot be written so, [`Error::Checkpoint`] for the file system.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let layers = self.layers.iter().map(|layer| LayerMeta {
            layer: layer.layer,
            tokens: layer.tokens,
            sums: layer.sums.keys().cloned().collect(),
            logit_gram: layer.logit_gram.is_some(),
            outputs: layer.outputs.keys().copied().collect(),
            sample: layer.sample.as_ref().map(|s| SampleMeta { hidden: s.hidden, experts: s.experts, top_k: s.top_k }),
        });
        let meta =
            Meta { version: VERSION, model: self.model.clone(), data: self.data.clone(), layers: layers.collect() };
        let json = serde_json::to_string(&meta).map_err(|error| Error::invalid_evidence(error.to_string()))?;
        let tensors = tensors(self);
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            let view = TensorView::new(*dtype, shape.clone(), bytes);
            Ok((name.as_str(), view.map_err(|error| Error::invalid_evidence(error.to_string()))?))
        });
        let views = views.collect::<Result<Vec<_>>>()?;
        let bytes = safetensors::serialize(views, Some(HashMap::from([(KEY.to_string(), json)])))
            .map_err(|error| Error::invalid_evidence(error.to_string()))?;
        Ok(write_atomic(path, &bytes)?)
    }

    /// Reads a file of [`Evidence::save`].
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::InvalidEvidence`], [`Error::Version`], naming the file.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        read(&bytes).map_err(|error| error.in_file(path))
    }
}

fn read(bytes: &[u8]) -> Result<Evidence> {
    let invalid = |error: String| Error::invalid_evidence(error);
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| invalid(error.to_string()))?;
    let json = header.metadata().as_ref().and_then(|map| map.get(KEY));
    let json = json.ok_or_else(|| invalid(format!("no `{KEY}` in its metadata")))?;
    #[derive(Deserialize)]
    struct Versioned {
        version: u64,
    }
    let malformed = |error: serde_json::Error| invalid(error.to_string());
    let Versioned { version: found } = serde_json::from_str(json).map_err(malformed)?;
    if found == 0 || found > VERSION {
        return Err(Error::Version { path: None, what: "merge evidence", found, supported: VERSION });
    }
    let meta: Meta = serde_json::from_str(json).map_err(malformed)?;
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| invalid(error.to_string()))?;
    let get = |name: String, dtype: Dtype| -> Result<Vec<u8>> {
        let view = tensors.tensor(&name).map_err(|error| invalid(format!("{name}: {error}")))?;
        match view.dtype() == dtype {
            true => Ok(view.data().to_vec()),
            false => Err(invalid(format!("{name} is {:?}, expected {dtype}", view.dtype()))),
        }
    };
    let mut layers = Vec::with_capacity(meta.layers.len());
    for LayerMeta { layer, tokens, sums, logit_gram, outputs, sample } in meta.layers {
        let f64s = |name: &str| -> Result<Vec<f64>> {
            let bytes = get(format!("layer.{layer}.{name}"), Dtype::F64)?;
            Ok(bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect())
        };
        let f32s = |name: &str| -> Result<Vec<f32>> {
            let bytes = get(format!("layer.{layer}.sample.{name}"), Dtype::F32)?;
            Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        };
        let sums = sums.into_iter().map(|name| Ok((name.clone(), f64s(&format!("sum.{name}"))?)));
        let outputs = outputs.into_iter().map(|mean| Ok((mean, f64s(&format!("outputs.{}", mean.name()))?)));
        let sample = match sample {
            None => None,
            Some(SampleMeta { hidden, experts, top_k }) => {
                let selected = get(format!("layer.{layer}.sample.selected"), Dtype::U32)?;
                let selected = selected.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
                let (inputs, logits, weights) = (f32s("inputs")?, f32s("logits")?, f32s("weights")?);
                Some(TokenSample { inputs, logits, selected, weights, hidden, experts, top_k })
            }
        };
        layers.push(LayerEvidence {
            layer,
            tokens,
            sums: sums.collect::<Result<BTreeMap<_, _>>>()?,
            logit_gram: logit_gram.then(|| f64s("logit_gram")).transpose()?,
            outputs: outputs.collect::<Result<BTreeMap<_, _>>>()?,
            sample,
        });
    }
    Ok(Evidence { model: meta.model, data: meta.data, layers })
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_importance::statistics::ROUTED_TOKENS;

    #[test]
    fn a_file_reads_back_to_the_same_bits() {
        let sample = TokenSample {
            inputs: vec![0.1, -0.2],
            logits: vec![1.0, f32::NEG_INFINITY],
            selected: vec![1],
            weights: vec![0.3],
            hidden: 2,
            experts: 2,
            top_k: 1,
        };
        let layer = LayerEvidence {
            layer: 3,
            tokens: 17,
            sums: BTreeMap::from([(ROUTED_TOKENS.to_string(), vec![16.0, 1.0])]),
            logit_gram: Some(vec![0.1, 0.2, 0.2, 0.4]),
            outputs: BTreeMap::from([(OutputMean::Routed, vec![0.5; 4])]),
            sample: Some(sample),
        };
        let empty = LayerEvidence { layer: 5, ..LayerEvidence::default() };
        let evidence = Evidence { model: "m".into(), data: "d".into(), layers: vec![layer, empty] };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evidence.safetensors");
        evidence.save(&path).unwrap();
        let read = Evidence::load(&path).unwrap();
        assert_eq!(read, evidence);
        assert_eq!(read.digest(), evidence.digest());
        let mut other = evidence.clone();
        other.layers[0].tokens += 1;
        assert_ne!(other.digest(), evidence.digest());
        std::fs::write(&path, b"nothing").unwrap();
        assert!(Evidence::load(&path).unwrap_err().to_string().contains("evidence.safetensors"));
    }
}

//! Importance scores of units or experts, with what a user of them must know, and their file.

use std::fmt;
use std::path::Path;

use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::artifact_file::{Kind, OutTensor, TensorFile, Tensors, write_tensors};
use crate::human::variant;
use crate::{Error, ExpertId, MoeLayerShape, MoeShape, Provenance, Result};

/// Version 2 added what may be added up; tables of version 1 may not.
const SCORES: Kind = Kind { name: "scores", key: "moe.scores", version: 2 };

/// Whether there is a value for every unit or for every expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// One value per FFN intermediate dimension of every expert.
    Unit,
    /// One value per expert.
    Expert,
}

/// The widest pool over which values may be compared. Ordered from narrow to wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pool {
    /// Only units of the same expert.
    Expert,
    /// Anything in the same layer.
    Layer,
    /// Anything in the model.
    Global,
}

impl fmt::Display for Granularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&variant(self))
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&variant(self))
    }
}

impl Pool {
    /// Whether values of this pool may be compared over `wanted`.
    pub fn supports(self, wanted: Pool) -> bool {
        self >= wanted
    }
}

/// What sums were divided by to become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Denominator {
    /// All tokens of the calibration data, routed to the expert or not.
    AllTokens,
    /// The tokens routed to the expert.
    RoutedTokens,
    /// Sequences of the calibration data.
    Sequences,
    /// Sums were not divided.
    None,
    /// Nothing: the values are places in an order, not amounts.
    Ranks,
}

impl fmt::Display for Denominator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&variant(self))
    }
}

/// Scores of the units or experts of a model. Higher is always more important.
///
/// ```
/// use moe_checkpoint::{Denominator, Granularity, LayerScores, Pool, Provenance, Reduction, ScoreTable};
///
/// let table = ScoreTable {
///     scorer: r#"{"type":"magnitude"}"#.into(),
///     granularity: Granularity::Unit,
///     pool: Pool::Global,
///     additive: Some(Pool::Global),
///     denominator: Denominator::None,
///     layers: vec![LayerScores { layer: 0, scores: vec![vec![1.0, 2.0], vec![4.0]], routed: None, whole: None }],
///     provenance: Provenance::new("model", "", "{}"),
/// };
/// table.validate()?;
/// assert_eq!(table.to_experts(Reduction::Sum)?.layers[0].scores, [[3.0], [4.0]]);
/// # Ok::<(), moe_checkpoint::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreTable {
    /// Recipe of the scorer, as JSON.
    pub scorer: String,
    /// What a value belongs to.
    pub granularity: Granularity,
    /// Over what values may be compared.
    pub pool: Pool,
    /// Over what values may be added, so that the sum stands for the items together: a loss, an amount of output. None
    /// for shares, ranks, ratios and the like, and wherever a value is not known to be an amount.
    pub additive: Option<Pool>,
    /// What sums were divided by.
    pub denominator: Denominator,
    /// MoE layers in ascending decoder layer order.
    pub layers: Vec<LayerScores>,
    /// Model, data and recipe.
    pub provenance: Provenance,
}

/// Scores of one MoE layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerScores {
    /// Decoder layer index.
    pub layer: usize,
    /// `[experts][units]`; one value per expert with [`Granularity::Expert`].
    pub scores: Vec<Vec<f32>>,
    /// Tokens routed to each expert, if the model was run.
    pub routed: Option<Vec<u64>>,
    /// What the layer and its experts weigh as wholes, beside the scores of their units.
    pub whole: Option<WholeScores>,
}

/// What a scorer of units says of a layer and of its experts as wholes: how a budget is shared out among them, where
/// that does not follow from which of their units matter.
#[derive(Clone, Debug, PartialEq)]
pub struct WholeScores {
    /// Of the layer, beside other layers: an amount from 0 on.
    pub layer: f32,
    /// Of every expert, beside the others of the layer; below 0 where the layer is better without it.
    pub experts: Vec<f32>,
}

impl LayerScores {
    /// All scores of the layer, expert after expert: with [`Granularity::Expert`], one for each.
    pub fn flat(&self) -> Vec<f64> {
        self.scores.iter().flatten().copied().map(f64::from).collect()
    }
}

impl ScoreTable {
    /// Experts that no calibration token was routed to, in order; none where the table does not know.
    pub fn never_routed(&self) -> Vec<ExpertId> {
        let unused = |layer: &LayerScores| {
            let experts = layer.routed.iter().flatten().enumerate().filter(|(_, count)| **count == 0);
            experts.map(|(expert, _)| ExpertId { layer: layer.layer, expert }).collect::<Vec<_>>()
        };
        self.layers.iter().flat_map(unused).collect()
    }

    /// Whether scores may be added over `wanted`.
    pub fn adds_up(&self, wanted: Pool) -> bool {
        self.additive.is_some_and(|pool| pool.supports(wanted))
    }

    /// Checks the table by itself: layers strictly ascending, one value per expert where that is the granularity, one
    /// routed count per expert, and every score finite.
    ///
    /// # Errors
    /// [`Error::InvalidScores`], [`Error::NonFinite`] naming layer, expert and unit.
    pub fn validate(&self) -> Result<()> {
        let invalid = |reason: String| Err(Error::InvalidScores { reason });
        if let Some(additive) = self.additive.filter(|additive| *additive > self.pool) {
            let pool = self.pool;
            return invalid(format!("additive: found {additive}, expected {pool} at most, the pool of comparisons"));
        }
        for pair in self.layers.windows(2) {
            if pair[0].layer >= pair[1].layer {
                return invalid(format!(
                    "layer {} stands before layer {}, expected ascending",
                    pair[0].layer, pair[1].layer
                ));
            }
        }
        for LayerScores { layer, scores, routed, whole } in &self.layers {
            if let Some(whole) = whole {
                self.validate_whole(*layer, scores.len(), whole)?;
            }
            if let Some(routed) = routed.as_ref().filter(|routed| routed.len() != scores.len()) {
                return invalid(format!("layer {layer}: {} routed counts for {} experts", routed.len(), scores.len()));
            }
            for (expert, values) in scores.iter().enumerate() {
                if self.granularity == Granularity::Expert && values.len() != 1 {
                    return invalid(format!(
                        "layer {layer}, expert {expert}: {} values, expected one per expert",
                        values.len()
                    ));
                }
                if let Some(unit) = values.iter().position(|value| !value.is_finite()) {
                    return Err(Error::NonFinite {
                        what: "score".into(),
                        layer: *layer,
                        expert,
                        unit: (self.granularity == Granularity::Unit).then_some(unit),
                        value: f64::from(values[unit]),
                    });
                }
            }
        }
        Ok(())
    }

    fn validate_whole(&self, layer: usize, experts: usize, whole: &WholeScores) -> Result<()> {
        let invalid = |reason: String| Err(Error::InvalidScores { reason: format!("layer {layer}: {reason}") });
        if self.granularity == Granularity::Expert {
            return invalid("weights of wholes beside scores of experts, expected none".into());
        }
        if whole.experts.len() != experts {
            return invalid(format!("weights of {} experts, expected {experts}", whole.experts.len()));
        }
        if !(whole.layer.is_finite() && whole.layer >= 0.0) {
            return invalid(format!("weight of the layer {}, expected a number from 0 on", whole.layer));
        }
        match whole.experts.iter().position(|weight| !weight.is_finite()) {
            None => Ok(()),
            Some(expert) => {
                let value = f64::from(whole.experts[expert]);
                Err(Error::NonFinite { what: "weight".into(), layer, expert, unit: None, value })
            }
        }
    }

    /// [`ScoreTable::validate`], and that the table is of a model of this shape.
    ///
    /// # Errors
    /// Those of [`ScoreTable::validate`]; [`Error::InvalidScores`] names the first layer or expert that differs.
    pub fn validate_for(&self, shape: &MoeShape) -> Result<()> {
        self.validate()?;
        let invalid = |reason: String| Err(Error::InvalidScores { reason });
        let (found, expected): (Vec<_>, Vec<_>) =
            (self.layers.iter().map(|l| l.layer).collect(), shape.layers.iter().map(|l| l.layer).collect());
        if found != expected {
            return invalid(format!("scores of MoE layers {found:?}, but the model has {expected:?}"));
        }
        for (scores, MoeLayerShape { layer, widths }) in self.layers.iter().zip(&shape.layers) {
            let found = scores.scores.len();
            if found != widths.len() {
                return invalid(format!(
                    "layer {layer}: scores of {found} experts, but the model has {}",
                    widths.len()
                ));
            }
            if self.granularity == Granularity::Expert {
                continue;
            }
            for (expert, (values, width)) in scores.scores.iter().zip(widths).enumerate() {
                if values.len() != *width {
                    return invalid(format!(
                        "layer {layer}, expert {expert}: scores of {} units, but the expert has {width}",
                        values.len()
                    ));
                }
            }
        }
        Ok(())
    }

    /// Scores of the MoE layer with this decoder layer index.
    pub fn layer(&self, layer: usize) -> Option<&LayerScores> {
        self.layers.binary_search_by_key(&layer, |l| l.layer).ok().map(|position| &self.layers[position])
    }

    /// Writes a safetensors file: `layer.{i}` `[experts, units]` f32 per MoE layer, `i` the decoder layer index
    /// (experts narrower than the widest of their layer are padded with NaN; the metadata has the widths), `routed.{i}`
    /// `[experts]` i64, `whole.{i}` `[1 + experts]` f32 (the layer, then its experts), everything else as JSON under
    /// the metadata key `moe.scores`. Atomic.
    ///
    /// # Errors
    /// Those of [`ScoreTable::validate`], [`Error::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.validate()?;
        let mut tensors: Vec<OutTensor> = Vec::new();
        for LayerScores { layer, scores, routed, whole } in &self.layers {
            let units = scores.iter().map(Vec::len).max().unwrap_or(0);
            let padded = scores
                .iter()
                .flat_map(|values| values.iter().copied().chain(std::iter::repeat_n(f32::NAN, units - values.len())));
            let bytes = padded.flat_map(f32::to_le_bytes).collect();
            tensors.push((format!("layer.{layer}"), Dtype::F32, vec![scores.len(), units], bytes));
            if let Some(routed) = routed {
                let bytes = routed.iter().flat_map(|count| count.to_le_bytes()).collect();
                tensors.push((format!("routed.{layer}"), Dtype::I64, vec![routed.len()], bytes));
            }
            if let Some(WholeScores { layer: weight, experts }) = whole {
                let bytes = [&[*weight], &experts[..]].concat().into_iter().flat_map(f32::to_le_bytes).collect();
                tensors.push((format!("whole.{layer}"), Dtype::F32, vec![1 + experts.len()], bytes));
            }
        }
        let meta = Meta {
            version: SCORES.version,
            scorer: self.scorer.clone(),
            granularity: self.granularity,
            pool: self.pool,
            additive: self.additive,
            denominator: self.denominator,
            provenance: self.provenance.clone(),
            layers: self
                .layers
                .iter()
                .map(|l| MoeLayerShape { layer: l.layer, widths: l.scores.iter().map(Vec::len).collect() })
                .collect(),
        };
        write_tensors(path.as_ref(), SCORES, &meta, &tensors)
    }

    /// Reads a file of [`ScoreTable::save`].
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::ArtifactVersion`] for a file of a newer version, [`Error::MalformedArtifact`] for
    /// anything else that is not such a file, and those of [`ScoreTable::validate`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let file = TensorFile::read(path.as_ref(), SCORES)?;
        let (meta, tensors): (Meta, Tensors<'_>) = file.parse()?;
        let mut layers = Vec::with_capacity(meta.layers.len());
        let mut expected = meta.layers.len();
        for MoeLayerShape { layer, widths } in meta.layers {
            let units = widths.iter().copied().max().unwrap_or(0);
            let values = tensors.f32(&format!("layer.{layer}"), &[widths.len(), units])?;
            let scores = widths.iter().enumerate().map(|(e, width)| values[e * units..][..*width].to_vec()).collect();
            let name = format!("routed.{layer}");
            let routed = if tensors.contains(&name) {
                expected += 1;
                let counts = tensors.i64(&name, &[widths.len()])?;
                let counts: Option<Vec<u64>> = counts.into_iter().map(|count| count.try_into().ok()).collect();
                Some(counts.ok_or_else(|| tensors.malformed(format!("tensor `{name}` has a negative count")))?)
            } else {
                None
            };
            let name = format!("whole.{layer}");
            let whole = match tensors.contains(&name) {
                false => None,
                true => {
                    expected += 1;
                    let values = tensors.f32(&name, &[1 + widths.len()])?;
                    Some(WholeScores { layer: values[0], experts: values[1..].to_vec() })
                }
            };
            layers.push(LayerScores { layer, scores, routed, whole });
        }
        if tensors.len() != expected {
            return Err(tensors.malformed(format!("{} tensors, expected {expected}", tensors.len())));
        }
        let Meta { scorer, granularity, pool, additive, denominator, provenance, .. } = meta;
        let table = Self { scorer, granularity, pool, additive, denominator, layers, provenance };
        table.validate().map_err(|error| match error {
            Error::InvalidScores { reason } => tensors.malformed(reason),
            other => other,
        })?;
        Ok(table)
    }
}

#[derive(Serialize, Deserialize)]
struct Meta {
    version: u64,
    scorer: String,
    granularity: Granularity,
    pool: Pool,
    #[serde(default)]
    additive: Option<Pool>,
    denominator: Denominator,
    provenance: Provenance,
    layers: Vec<MoeLayerShape>,
}

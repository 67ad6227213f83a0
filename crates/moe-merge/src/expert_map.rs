//! Experts and rows of the router as sums of those of another model.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, ExpertPart, Mtp, Ratio, Role, Step, write_atomic};
use serde::{Deserialize, Serialize};

use crate::in_place::{self, PartChange};
use crate::merged::{MergeOptions, OutputForm, not_grouped, router_rows};
use crate::plan::{Group, LayerPlan, MERGE_PLAN_VERSION, MergePlan};
use crate::recipe::Recipe;
use crate::router::RouterMix;
use crate::{Error, Result};

/// Version of the file.
const VERSION: u64 = 1;
/// Name of the method in the record of a model.
pub const EXPERT_MAP: &str = "expert-map";

/// Two matrices `[r, E]` per layer, from its E experts to the r that are left: `router` makes rows of the router (and
/// its biases) from the old ones, `experts` the weights of experts from the old ones, matrix by matrix and unit by
/// unit. Rows of a single 1 keep experts as they are.
///
/// Source: EEP (arXiv 2407.00945), whose router mapping and expert merging matrices these are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertMap {
    version: u64,
    /// Fingerprint of the model.
    model: String,
    /// MoE layers in ascending order.
    layers: Vec<LayerMap>,
}

/// The matrices of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerMap {
    /// Decoder layer index.
    pub layer: usize,
    /// The old expert that each new one began as, ascending.
    pub kept: Vec<u32>,
    /// `[r][E]`.
    pub router: Vec<Vec<f32>>,
    /// `[r][E]`.
    pub experts: Vec<Vec<f32>>,
}

impl LayerMap {
    /// Keeps these of so many experts as they are.
    pub fn keep(layer: usize, kept: &[u32], experts: usize) -> Self {
        let row = |expert: &u32| (0..experts as u32).map(|old| f32::from(old == *expert)).collect::<Vec<f32>>();
        let rows: Vec<Vec<f32>> = kept.iter().map(row).collect();
        Self { layer, kept: kept.to_vec(), router: rows.clone(), experts: rows }
    }

    fn validate(&self, experts: usize) -> Result<()> {
        let invalid = |reason: String| Err(Error::invalid_plan(format!("layer {}: {reason}", self.layer)));
        let ascending = self.kept.windows(2).all(|pair| pair[0] < pair[1]);
        if self.kept.is_empty() || !ascending || self.kept.iter().any(|expert| *expert as usize >= experts) {
            return invalid(format!("kept experts {:?}, expected some of {experts}, ascending", self.kept));
        }
        for (name, rows) in [("router", &self.router), ("experts", &self.experts)] {
            if rows.len() != self.kept.len() || rows.iter().any(|row| row.len() != experts) {
                let widths: Vec<usize> = rows.iter().map(Vec::len).collect();
                return invalid(format!("{name} has rows of {widths:?}, expected {} of {experts}", self.kept.len()));
            }
            if rows.iter().flatten().any(|value| !value.is_finite()) {
                return invalid(format!("{name} has numbers that are not finite"));
            }
        }
        Ok(())
    }
}

/// Old experts and factors of a row, without those of factor 0.
fn parts(row: &[f32]) -> Vec<(usize, f64)> {
    row.iter()
        .enumerate()
        .filter(|(_, factor)| **factor != 0.0)
        .map(|(old, factor)| (old, f64::from(*factor)))
        .collect()
}

impl ExpertMap {
    /// The map of these layers of a model.
    ///
    /// # Errors
    /// [`Error::InvalidPlan`] names the layer.
    pub fn new(base: &Checkpoint, layers: Vec<LayerMap>) -> Result<Self> {
        let map = Self { version: VERSION, model: base.fingerprint(), layers };
        map.validate(base)?;
        Ok(map)
    }

    /// The matrices.
    pub fn layers(&self) -> &[LayerMap] {
        &self.layers
    }

    fn validate(&self, base: &Checkpoint) -> Result<()> {
        let (found, expected): (Vec<usize>, Vec<usize>) = (
            self.layers.iter().map(|map| map.layer).collect(),
            base.shape().layers.iter().map(|layer| layer.layer).collect(),
        );
        if found != expected {
            return Err(Error::invalid_plan(format!("matrices of layers {found:?}, but the model has {expected:?}")));
        }
        for (map, shape) in self.layers.iter().zip(&base.shape().layers) {
            map.validate(shape.num_experts())?;
            let mixed = map.experts.iter().any(|row| parts(row).len() > 1);
            if mixed && shape.widths.iter().any(|width| *width != shape.widths[0]) {
                let reason = "experts of different widths cannot be added up".into();
                return Err(Error::Incompatible { layer: map.layer, experts: vec![], reason });
            }
        }
        Ok(())
    }

    /// The model that it makes of its base: as many experts in every layer, for stock loaders. Experts are made when
    /// they are read.
    ///
    /// # Errors
    /// [`Error::OtherModel`]; [`Error::InvalidPlan`]; layers that keep different numbers of experts; a routing by
    /// groups that breaks; layers that predict further tokens, without `mtp`.
    pub fn on(&self, base: &Arc<Checkpoint>, mtp: Option<Mtp>) -> Result<Arc<Checkpoint>> {
        if !base.is_model(&self.model) {
            let (path, expected) = (base.dir().to_path_buf(), self.model.clone());
            return Err(Error::OtherModel { what: "expert map", path, found: base.fingerprint(), expected });
        }
        not_grouped(base)?;
        self.validate(base)?;
        let plan = self.plan(base);
        let options = MergeOptions { mtp, ..MergeOptions::new(OutputForm::Stock) };
        let small = plan.on(base, &options)?.model().clone();
        let base = base.dequantized()?;
        let mut routers = HashMap::new();
        for map in &self.layers {
            let mix = RouterMix {
                rows: map.router.iter().map(|row| parts(row)).collect(),
                bias: vec![0.0; map.router.len()],
            };
            for role in router_rows::ROLES {
                if let Some((bytes, _)) = router_rows::mixed(&base, map.layer, role, &mix)? {
                    routers.insert(small.family().tensor_name(Role::Layer(map.layer, role)), bytes);
                }
            }
        }
        let (before, after) = (plan.experts(), plan.groups());
        let recipe = serde_json::to_value(self).map_err(|error| Error::invalid_plan(error.to_string()))?;
        let step = Step::new(EXPERT_MAP, &small, recipe, format!("{after} experts as sums of {before}"));
        let layers = self.layers.iter().map(|map| (map.layer, map.clone())).collect();
        in_place::model(&small, Mapped { base, layers, routers }, None, step)
    }

    /// The plan that keeps what every new expert began as.
    fn plan(&self, base: &Checkpoint) -> MergePlan {
        let shape = base.shape();
        let layer = |(map, shape): (&LayerMap, &moe_checkpoint::MoeLayerShape)| LayerPlan {
            layer: map.layer,
            groups: map.kept.iter().map(|e| Group { dominant: *e, members: vec![*e], weights: vec![1.0] }).collect(),
            dissolved: (0..shape.num_experts() as u32).filter(|e| map.kept.binary_search(e).is_err()).collect(),
            ..LayerPlan::default()
        };
        let layers: Vec<LayerPlan> = self.layers.iter().zip(&shape.layers).map(layer).collect();
        let all: usize = shape.layers.iter().map(|layer| layer.num_experts()).sum();
        let kept: usize = layers.iter().map(|layer| layer.groups.len()).sum();
        let ratio = (all - kept) as f64 / all.max(1) as f64;
        MergePlan {
            version: MERGE_PLAN_VERSION,
            model: self.model.clone(),
            shape: shape.clone(),
            ratio: Ratio { asked: ratio, achieved: ratio },
            recipe: Recipe::keep_all(EXPERT_MAP),
            evidence: String::new(),
            never_used: Vec::new(),
            layers,
        }
    }

    /// Writes it as JSON, atomically.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for the file system.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let json = serde_json::to_vec(self).map_err(|error| Error::invalid_plan(error.to_string()))?;
        Ok(write_atomic(path, &json)?)
    }

    /// Reads one; what it says is checked by [`ExpertMap::on`].
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::InvalidPlan`], [`Error::Version`], naming the file.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let json = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let map: Self =
            serde_json::from_str(&json).map_err(|error| Error::invalid_plan(error.to_string()).in_file(path))?;
        match map.version {
            VERSION => Ok(map),
            found => {
                Err(Error::Version { path: Some(path.to_path_buf()), what: "expert map", found, supported: VERSION })
            }
        }
    }
}

struct Mapped {
    /// The model whose experts are added up.
    base: Arc<Checkpoint>,
    layers: BTreeMap<usize, LayerMap>,
    /// Tensors of routers, by name.
    routers: HashMap<String, Vec<u8>>,
}

impl PartChange for Mapped {
    fn part(&self, _: &Checkpoint, layer: usize, set: usize, part: ExpertPart) -> Result<Option<Vec<f32>>> {
        let Some(map) = self.layers.get(&layer) else { return Ok(None) };
        let row = parts(&map.experts[set]);
        if row == [(map.kept[set] as usize, 1.0)] {
            return Ok(None);
        }
        let mut sum: Vec<f64> = Vec::new();
        for (old, factor) in row {
            let Some(own) = self.base.set_part(layer, old, part)? else { return Ok(None) };
            let values = own.to_f32();
            sum.resize(values.len(), 0.0);
            sum.iter_mut().zip(&values).for_each(|(sum, value)| *sum += factor * f64::from(*value));
            self.base.release_set(layer, old);
        }
        if sum.is_empty() {
            // A row of zeros: an expert that gives nothing.
            let Some(own) = self.base.set_part(layer, map.kept[set] as usize, part)? else { return Ok(None) };
            sum = vec![0.0; own.rows * own.cols];
        }
        Ok(Some(sum.into_iter().map(|value| value as f32).collect()))
    }

    fn tensor(&self, name: &str) -> Option<&[u8]> {
        self.routers.get(name).map(Vec::as_slice)
    }
}

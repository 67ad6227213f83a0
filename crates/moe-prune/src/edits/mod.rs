//! Weights that a repair changes, beside a plan.
//!
//! A plan says what stays; an [`EditSource`] says which of what stays has other values: down projections refitted to
//! what is left, a bias in place of what an expert used to give, a retrained router. All of it is in the indices of the
//! model that the plan is for.

mod file;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

pub use file::EditsFile;

use crate::{Error, PrunePlan, Result};

/// Other values for one expert. `H` is the hidden size.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExpertEdit {
    /// Down projection `[H, kept]`, row-major, columns in the order of the plan's kept units.
    pub down: Option<Vec<f32>>,
    /// Bias `[H]`, added to the expert's output before the routing weight. Takes the place of a bias that is there.
    pub down_bias: Option<Vec<f32>>,
}

impl ExpertEdit {
    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.down.is_none() && self.down_bias.is_none()
    }
}

/// Number of values in the parts of an [`ExpertEdit`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EditSizes {
    /// Of [`ExpertEdit::down`].
    pub down: Option<usize>,
    /// Of [`ExpertEdit::down_bias`].
    pub down_bias: Option<usize>,
}

/// Where changed weights come from. Must be pure: asked twice, it answers the same.
pub trait EditSource: Send + Sync {
    /// What changes in an expert of the original model, by decoder layer and expert index.
    ///
    /// # Errors
    /// Values that cannot be read.
    fn expert(&self, layer: usize, expert: usize) -> Result<Option<ExpertEdit>>;

    /// The router weight `[E, H]` in place of the model's, with rows for all original experts; those of removed experts
    /// are not looked at.
    ///
    /// # Errors
    /// Values that cannot be read.
    fn router(&self, layer: usize) -> Result<Option<Vec<f32>>>;

    /// Identifies the content, so that an interrupted export is only continued with the same edits.
    fn digest(&self) -> String;

    /// How large the parts of [`EditSource::expert`] are, where they can be told without reading them.
    ///
    /// # Errors
    /// Those of [`EditSource::expert`].
    fn sizes(&self, layer: usize, expert: usize) -> Result<EditSizes> {
        let edit = self.expert(layer, expert)?.unwrap_or_default();
        Ok(EditSizes { down: edit.down.map(|v| v.len()), down_bias: edit.down_bias.map(|v| v.len()) })
    }
}

/// Edits in memory.
///
/// ```
/// use moe_prune::{EditSource, Edits, ExpertEdit};
///
/// let mut edits = Edits::new();
/// edits.set_expert(2, 7, ExpertEdit { down: None, down_bias: Some(vec![0.5; 4]) });
/// assert_eq!(edits.expert(2, 7)?.unwrap().down_bias, Some(vec![0.5; 4]));
/// assert_eq!(edits.expert(2, 6)?, None);
/// # Ok::<(), moe_prune::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Edits {
    experts: BTreeMap<(usize, usize), ExpertEdit>,
    routers: BTreeMap<usize, Vec<f32>>,
    /// How the edits were made; saved with them.
    pub recipe: Value,
}

impl Edits {
    /// No edit.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets what changes in an expert, by decoder layer and index of the original model.
    pub fn set_expert(&mut self, layer: usize, expert: usize, edit: ExpertEdit) {
        match edit.is_empty() {
            true => drop(self.experts.remove(&(layer, expert))),
            false => drop(self.experts.insert((layer, expert), edit)),
        }
    }

    /// Sets the router weight `[E, H]` of a layer.
    pub fn set_router(&mut self, layer: usize, weight: Vec<f32>) {
        self.routers.insert(layer, weight);
    }

    /// Adds other edits of the same plan, which win where both change the same matrix or bias. The recipe becomes a
    /// list of both.
    pub fn extend(&mut self, other: Self) {
        for (id, edit) in other.experts {
            let own = self.experts.entry(id).or_default();
            own.down = edit.down.or(own.down.take());
            own.down_bias = edit.down_bias.or(own.down_bias.take());
        }
        self.routers.extend(other.routers);
        let mut recipes = Vec::new();
        for recipe in [std::mem::take(&mut self.recipe), other.recipe] {
            match recipe {
                Value::Null => {}
                Value::Array(list) => recipes.extend(list),
                one => recipes.push(one),
            }
        }
        self.recipe = Value::Array(recipes);
    }

    /// Edits of the model that a plan leaves as edits beside that plan: experts get the indices that they have in the
    /// model the plan is for, and routers rows of zeros for removed experts, which nothing looks at.
    ///
    /// # Errors
    /// [`Error::InvalidEdits`] for an expert or a router that the plan does not leave.
    pub fn of_plan(self, plan: &PrunePlan) -> Result<Self> {
        let kept = |layer: usize| {
            let missing = || Error::invalid_edits(format!("layer {layer}: the plan has no such MoE layer"));
            plan.layer(layer).map(|kept| (kept, kept.experts_kept())).ok_or_else(missing)
        };
        let mut edits = Self { recipe: self.recipe, ..Self::new() };
        for ((layer, expert), edit) in self.experts {
            let (_, experts) = kept(layer)?;
            let old = *experts.get(expert).ok_or_else(|| {
                let found = experts.len();
                Error::invalid_edits(format!("layer {layer}, expert {expert}: the plan leaves {found} experts"))
            })?;
            edits.set_expert(layer, old, edit);
        }
        for (layer, weight) in self.routers {
            let (layer_kept, experts) = kept(layer)?;
            let hidden = router_width(plan, weight.len(), experts.len()).ok_or_else(|| {
                let (found, rows, hidden) = (weight.len(), experts.len(), plan.shape.hidden_size);
                Error::invalid_edits(format!(
                    "layer {layer}: router has {found} values, expected [{rows}, {hidden}], a row for every expert \
                     that is left"
                ))
            })?;
            let mut rows = vec![0.0; layer_kept.experts.len() * hidden];
            for (row, old) in weight.chunks_exact(hidden).zip(experts) {
                rows[old * hidden..(old + 1) * hidden].copy_from_slice(row);
            }
            edits.set_router(layer, rows);
        }
        Ok(edits)
    }

    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.experts.is_empty() && self.routers.is_empty()
    }

    /// Edited experts with their decoder layer and index, ascending.
    pub fn experts(&self) -> impl Iterator<Item = ((usize, usize), &ExpertEdit)> {
        self.experts.iter().map(|(id, edit)| (*id, edit))
    }

    /// Edited routers with their decoder layer, ascending.
    pub fn routers(&self) -> impl Iterator<Item = (usize, &[f32])> {
        self.routers.iter().map(|(layer, weight)| (*layer, weight.as_slice()))
    }

    /// Writes a safetensors file, atomically: `layer.{i}.expert.{e}.down` `[H, kept]`, `layer.{i}.expert.{e}.down_bias`
    /// `[H]` and `layer.{i}.router` `[E, H]`, all f32; [`PrunePlan::digest`], the digest of the edits and their recipe
    /// as JSON under the metadata key `moe.edits`.
    ///
    /// # Errors
    /// [`Error::InvalidEdits`] for edits that are not of this plan, [`Error::Io`].
    pub fn save(&self, path: impl AsRef<Path>, plan: &PrunePlan) -> Result<()> {
        self.validate(plan)?;
        file::save(self, path.as_ref(), plan)
    }

    /// Reads a whole file of [`Edits::save`]; [`EditsFile::open`] reads one expert at a time.
    ///
    /// # Errors
    /// Those of [`EditsFile`].
    pub fn load(path: impl AsRef<Path>, plan: &PrunePlan) -> Result<Self> {
        let file = EditsFile::open(path, plan)?;
        let mut edits = Self { recipe: file.recipe().clone(), ..Self::new() };
        for kept in &plan.kept {
            for expert in 0..kept.experts.len() {
                edits.set_expert(kept.layer, expert, file.expert(kept.layer, expert)?.unwrap_or_default());
            }
            if let Some(weight) = file.router(kept.layer)? {
                edits.set_router(kept.layer, weight);
            }
        }
        Ok(edits)
    }

    /// [`PrunePlan::validate_edits`], and that nothing is edited that the model does not have.
    fn validate(&self, plan: &PrunePlan) -> Result<()> {
        let known = |layer, expert| plan.layer(layer).is_some_and(|kept| expert < kept.experts.len());
        if let Some((layer, expert)) = self.experts.keys().find(|(layer, expert)| !known(*layer, *expert)) {
            return Err(Error::invalid_edits(format!("layer {layer}, expert {expert}: the model has no such expert")));
        }
        if let Some(layer) = self.routers.keys().find(|layer| plan.layer(**layer).is_none()) {
            return Err(Error::invalid_edits(format!("layer {layer}: the model has no such MoE layer")));
        }
        for ((layer, expert), edit) in &self.experts {
            let parts = [&edit.down, &edit.down_bias];
            let values = parts.into_iter().flatten().flatten();
            check_finite(values, || format!("layer {layer}, expert {expert}"))?;
        }
        for (layer, weight) in &self.routers {
            check_finite(weight, || format!("router of layer {layer}"))?;
        }
        plan.validate_edits(self)
    }
}

/// Width of the rows of a router of so many values and experts: that of what experts read or, where these read a latent
/// of the residual stream, more, since routers read the stream itself. `None` if it cannot be.
fn router_width(plan: &PrunePlan, values: usize, experts: usize) -> Option<usize> {
    let width = values.checked_div(experts)?;
    (width * experts == values && width >= plan.shape.hidden_size).then_some(width)
}

impl EditSource for Edits {
    fn expert(&self, layer: usize, expert: usize) -> Result<Option<ExpertEdit>> {
        Ok(self.experts.get(&(layer, expert)).cloned())
    }

    fn router(&self, layer: usize) -> Result<Option<Vec<f32>>> {
        Ok(self.routers.get(&layer).cloned())
    }

    /// A BLAKE3 hash of all values and their places.
    fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut part = |tag: u8, place: [usize; 2], values: &[f32]| {
            hasher.update(&[tag]);
            for number in [place[0], place[1], values.len()] {
                hasher.update(&(number as u64).to_le_bytes());
            }
            for values in values.chunks(1 << 14) {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                hasher.update(&bytes);
            }
        };
        for (&(layer, expert), edit) in &self.experts {
            for (tag, values) in [(0, &edit.down), (1, &edit.down_bias)] {
                values.iter().for_each(|values| part(tag, [layer, expert], values));
            }
        }
        self.routers.iter().for_each(|(layer, weight)| part(2, [*layer, 0], weight));
        hasher.finalize().to_hex().to_string()
    }

    fn sizes(&self, layer: usize, expert: usize) -> Result<EditSizes> {
        let edit = self.experts.get(&(layer, expert));
        let size = |part: Option<&Vec<f32>>| part.map(Vec::len);
        Ok(EditSizes {
            down: size(edit.and_then(|edit| edit.down.as_ref())),
            down_bias: size(edit.and_then(|edit| edit.down_bias.as_ref())),
        })
    }
}

impl PrunePlan {
    /// Checks that edits fit this plan: values of kept experts only, of the right number.
    ///
    /// # Errors
    /// [`Error::InvalidEdits`] names the layer and expert.
    pub fn validate_edits(&self, edits: &dyn EditSource) -> Result<()> {
        let hidden = self.shape.hidden_size;
        for kept in &self.kept {
            let layer = kept.layer;
            for (expert, units) in kept.experts.iter().enumerate() {
                let sizes = edits.sizes(layer, expert)?;
                let what = |part: &str| format!("layer {layer}, expert {expert}: {part}");
                if sizes != EditSizes::default() && kept.removed.binary_search(&(expert as u32)).is_ok() {
                    return Err(Error::invalid_edits(what("the plan removes it, nothing of it can be edited")));
                }
                if let Some(found) = sizes.down.filter(|found| *found != hidden * units.len()) {
                    let expected = format!("down has {found} values, expected [{hidden}, {}]", units.len());
                    return Err(Error::invalid_edits(what(&expected)));
                }
                if let Some(found) = sizes.down_bias.filter(|found| *found != hidden) {
                    return Err(Error::invalid_edits(what(&format!(
                        "down_bias has {found} values, expected {hidden}"
                    ))));
                }
            }
            if let Some(found) = edits.router(layer)?.map(|weight| weight.len()) {
                let experts = kept.experts.len();
                if router_width(self, found, experts).is_none() {
                    return Err(Error::invalid_edits(format!(
                        "layer {layer}: router has {found} values, expected [{experts}, {hidden}], a row for every \
                         original expert"
                    )));
                }
            }
        }
        Ok(())
    }

    /// A BLAKE3 hash of the model and of what is kept of it: plans that do the same have the same.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.model.as_bytes());
        let mut number = |value: usize| {
            hasher.update(&(value as u64).to_le_bytes());
        };
        for kept in &self.kept {
            number(kept.layer);
            for units in kept.experts.iter().chain([&kept.removed]) {
                number(units.len());
                units.iter().for_each(|unit| number(*unit as usize));
            }
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// Refuses values that are not finite.
fn check_finite<'a>(values: impl IntoIterator<Item = &'a f32>, what: impl Fn() -> String) -> Result<()> {
    match values.into_iter().find(|value| !value.is_finite()) {
        None => Ok(()),
        Some(value) => Err(Error::invalid_edits(format!("{}: a value is {value}, expected finite ones", what()))),
    }
}

#[cfg(test)]
mod tests;

//! Adapters in the weights of a model.

use std::{collections::BTreeMap, fmt, ops::Range, sync::Arc};

use moe_checkpoint::{Checkpoint, Step};
use moe_core::{
    adapters::Site,
    kernels::product::{Matrix, product},
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Error, Result,
    lora::{LoraWeights, LowRank, Map, Maps, Naming, magnitudes},
    parameter_bank::add_values,
    rewrite::{Changes, Layout, NewMatrix, Rewrite, Rewritten},
};

/// Name of the method in the record of a model. Its recipe is a [`MergeRecipe`].
pub const MERGE: &str = "merge_adapters";

/// One addition that was merged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AppliedMap {
    /// The adapter.
    pub adapter: String,
    /// Path of the map's module.
    pub module: String,
    /// Tensors of the model that it went into.
    pub tensors: Vec<String>,
    /// Its rank.
    pub rank: usize,
    /// What it counts, with the adapter's weight.
    pub scale: f64,
}

/// What was merged, as the record of a model has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergeRecipe {
    /// Every addition, by adapter and map.
    pub applied: Vec<AppliedMap>,
    /// A hash of all values, as 64 hex digits.
    pub values: String,
}

/// A model with each adapter, times its weight, added to its weights: `W + sum w s B A`, and for DoRA `W + w (g (W + s B A) - W)`, rounded
/// to the dtype it is stored in.
///
/// What no adapter touches is that of the base, byte for byte, so that merging nothing gives the same tensors and config. A quantized base
/// becomes plain floats. Experts that share a set of weights in a grouped checkpoint get sets of their own where they have additions.
///
/// ```no_run
/// use std::sync::Arc;
/// use moe_checkpoint::{Checkpoint, WriteOptions, write};
/// use moe_peft::{lora::Maps, merge::Merged, peft_files};
///
/// let base = Arc::new(Checkpoint::open("models/OLMoE-1B-7B-0924")?);
/// let adapter = peft_files::read("adapter", &Maps::new(&base), Default::default())?;
/// let merged = Merged::on(&base, &[("adapter", &adapter, 1.0)])?;
/// write(merged.model(), "out/merged", &WriteOptions::default())?;
/// # Ok::<(), moe_peft::Error>(())
/// ```
#[derive(Clone)]
pub struct Merged {
    rewritten: Rewritten,
    recipe: Arc<MergeRecipe>,
}

impl fmt::Debug for Merged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Merged").field("model", self.model()).field("additions", &self.recipe.applied.len()).finish()
    }
}

impl Merged {
    /// Merges adapters by name and weight into `base`.
    ///
    /// # Errors
    /// Those of [`LoraWeights::check`]; [`Error::Input`] for weights that are not finite, and for two adapters of one name. Later, of reading
    /// the model: [`moe_checkpoint::Error::Method`] for numbers that are not finite or too large for the dtype they are stored in, naming the
    /// tensor.
    pub fn on(base: &Arc<Checkpoint>, adapters: &[(&str, &LoraWeights, f64)]) -> Result<Self> {
        let plain = base.dequantized()?;
        let maps = Maps::new(&plain);
        let mut sites: BTreeMap<Site, Additions> = BTreeMap::new();
        for (index, (name, weights, weight)) in adapters.iter().enumerate() {
            weights.check(&maps)?;
            if !weight.is_finite() {
                return Err(Error::input(format!("weight of adapter `{name}`"), weight, "a finite number"));
            }
            if adapters[..index].iter().any(|(other, ..)| other == name) {
                return Err(Error::input("adapters", format!("`{name}` twice"), "a name of its own for each"));
            }
            for (map, low) in &weights.maps {
                let (site, rows, dims) = place(&maps, *map)?;
                let additions = sites.entry(site).or_insert_with(|| Additions { dims, terms: Vec::new() });
                additions.terms.push((rows, low.plain(), *weight));
            }
        }
        let maps_changed = sites.len();
        let boxed = sites.into_iter().map(|(site, additions)| (site, Box::new(additions) as Box<dyn NewMatrix>));
        let rewrite = Rewrite { maps: boxed.collect(), tensors: BTreeMap::new(), unchanged: Box::new(|| Ok(())) };
        let layout = Layout::new(&plain, &rewrite)?;
        let recipe = MergeRecipe { applied: applied(&maps, &layout, adapters)?, values: digest(adapters) };
        let summary = format!(
            "{} additions of {} adapters merged into {maps_changed} linear maps",
            recipe.applied.len(),
            adapters.len()
        );
        let json = json!(recipe);
        let rewritten = rewrite.on(&plain, |_| Step::new(MERGE, &plain, json, summary))?;
        Ok(Self { rewritten, recipe: Arc::new(recipe) })
    }

    /// What the weights kept when `adapter` was begun as a part of them: `W - s B_0 A_0`. To it belongs the adapter that is
    /// [written](crate::peft_files::write()) with `on_residual`.
    ///
    /// # Errors
    /// [`Error::Input`] for an adapter that took nothing; else those of [`Merged::on`].
    pub fn residual(base: &Arc<Checkpoint>, adapter: &LoraWeights) -> Result<Self> {
        let maps: BTreeMap<Map, LowRank> =
            adapter.maps.iter().filter_map(|(map, low)| Some((*map, low.residual()?))).collect();
        if maps.is_empty() {
            let expected = "PiSSA, OLoRA or CorDA, which take a part of the weights";
            return Err(Error::input("init_lora_weights", adapter.config.init_lora_weights, expected));
        }
        Self::on(base, &[("residual", &LoraWeights { maps, ..adapter.clone() }, 1.0)])
    }

    /// The model with the adapters.
    pub fn model(&self) -> &Arc<Checkpoint> {
        self.rewritten.model()
    }

    /// Every addition, and the tensors that it went into.
    pub fn applied(&self) -> &[AppliedMap] {
        &self.recipe.applied
    }

    /// Which tensors have other values than those of the base, and which maps are rounded to what they were. Makes all new values to compare
    /// them.
    ///
    /// # Errors
    /// Those of reading the model.
    pub fn changes(&self) -> Result<Changes> {
        self.rewritten.changes()
    }
}

/// Where the engine computes a map: the place, which of its rows, and the shape of all.
fn place(maps: &Maps<'_>, map: Map) -> Result<(Site, Range<usize>, [usize; 2])> {
    let missing = || Error::input("an adapted map", map, "a map of the model");
    let (site, rows, out) = maps.site(map).ok_or_else(missing)?;
    let [_, inputs] = maps.dims(map).ok_or_else(missing)?;
    Ok((site, rows, [out, inputs]))
}

/// Low-rank additions to some rows of a map, with the weights of their adapters.
struct Additions {
    dims: [usize; 2],
    terms: Vec<(Range<usize>, LowRank, f64)>,
}

impl NewMatrix for Additions {
    fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn matrix(&self, old: &[f32]) -> Result<Vec<f32>> {
        let inputs = self.dims[1];
        let mut matrix = old.to_vec();
        for (rows, low, factor) in &self.terms {
            let range = rows.start * inputs..rows.end * inputs;
            let weight = &old[range.clone()];
            let delta = match &low.magnitude {
                None => delta(low, factor * low.scale()),
                Some(m) => {
                    let mut adapted = delta(low, low.scale());
                    adapted.iter_mut().zip(weight).for_each(|(d, w)| *d += w);
                    let norms = magnitudes(weight, low, [rows.len(), inputs]);
                    let rows = adapted.chunks_exact_mut(inputs.max(1)).zip(weight.chunks_exact(inputs.max(1)));
                    for ((row, w), (m, n)) in rows.zip(m.iter().zip(&norms)) {
                        let g = if *n == 0.0 { 1.0 } else { m / n };
                        row.iter_mut().zip(w).for_each(|(d, w)| *d = *factor as f32 * (g * *d - w));
                    }
                    adapted
                }
            };
            matrix[range].iter_mut().zip(delta).for_each(|(w, d)| *w += d);
        }
        Ok(matrix)
    }
}

/// `s B A [out, in]`.
fn delta(low: &LowRank, s: f64) -> Vec<f32> {
    let [out, inputs] = low.dims();
    let mut delta = vec![0.0; out * inputs];
    let (a, b) = (Matrix::new(&low.a, low.rank, inputs), Matrix::new(&low.b, out, low.rank));
    product(&mut delta, inputs, 0, false, s as f32, b, a);
    delta
}

/// Every addition and where it went.
fn applied(maps: &Maps<'_>, layout: &Layout, adapters: &[(&str, &LoraWeights, f64)]) -> Result<Vec<AppliedMap>> {
    let mut applied = Vec::new();
    for (adapter, weights, weight) in adapters {
        for (map, low) in &weights.maps {
            let (site, rows, _) = place(maps, *map)?;
            let (mut tensors, mut start) = (Vec::new(), 0);
            for part in layout.parts.get(&site).into_iter().flatten() {
                if rows.start < start + part.rows && start < rows.end {
                    tensors.push(part.tensor.clone());
                }
                start += part.rows;
            }
            tensors.dedup();
            applied.push(AppliedMap {
                adapter: (*adapter).to_string(),
                module: maps.path(*map, Naming::PerExpert),
                tensors,
                rank: low.rank,
                scale: weight * low.scale(),
            });
        }
    }
    Ok(applied)
}

/// A hash of everything that is merged.
fn digest(adapters: &[(&str, &LoraWeights, f64)]) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut add = |bytes: &[u8]| {
        hasher.update(bytes);
    };
    for (name, weights, weight) in adapters {
        add(&(name.len() as u64).to_le_bytes());
        add(name.as_bytes());
        add(&weight.to_le_bytes());
        add(&(weights.maps.len() as u64).to_le_bytes());
        for (map, low) in &weights.maps {
            let low = low.plain();
            add(map.to_string().as_bytes());
            add(&low.scale().to_le_bytes());
            [Some(&low.a), Some(&low.b), low.magnitude.as_ref()]
                .into_iter()
                .flatten()
                .for_each(|values| add_values(values, &mut add));
        }
    }
    hasher.finalize().to_hex().to_string()
}

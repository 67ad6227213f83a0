//! Adapters in the weights of a model.

use std::{collections::BTreeMap, fmt, ops::Range, sync::Arc};

use moe_checkpoint::{Checkpoint, LayerRole, LayerSite, MatrixId, Role, Step};
use moe_core::{
    adapters::Site,
    kernels::product::{Matrix, product},
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Error, Result,
    lora::{LoraWeights, LowRank, Maps, Naming, magnitudes},
    model_weights::tied,
    parameter_bank::add_values,
    rewrite::{Changes, Layout, NewMatrix, NewRows, Rewrite, Rewritten},
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
    /// Its rank; 0 for values that stand in place of the base's.
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

/// A model with each adapter, times its weight, added to its weights: `W + sum w s B A`, and for DoRA `W + w (g (W + s
/// B A) - W)`, rounded to the dtype it is stored in.
///
/// What no adapter touches is that of the base, byte for byte, so that merging nothing gives the same tensors and
/// config. A quantized base becomes plain floats. Experts that share a set of weights in a grouped checkpoint get sets
/// of their own where they have additions.
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
    /// Those of [`LoraWeights::check`]; [`Error::Input`] for weights that are not finite, and for two adapters of one
    /// name. Later, of reading the model: [`moe_checkpoint::Error::Method`] for numbers that are not finite or too
    /// large for the dtype they are stored in, naming the tensor.
    pub fn on(base: &Arc<Checkpoint>, adapters: &[(&str, &LoraWeights, f64)]) -> Result<Self> {
        let plain = base.dequantized()?;
        let maps = Maps::new(&plain);
        let mut sites: BTreeMap<Site, Additions> = BTreeMap::new();
        let mut tensors: BTreeMap<Role, Vec<(Part, f64)>> = BTreeMap::new();
        for (index, (name, weights, weight)) in adapters.iter().enumerate() {
            weights.check(&maps)?;
            if !weight.is_finite() {
                return Err(Error::input(format!("weight of adapter `{name}`"), weight, "a finite number"));
            }
            if adapters[..index].iter().any(|(other, ..)| other == name) {
                return Err(Error::input("adapters", format!("`{name}` twice"), "a name of its own for each"));
            }
            for (map, low) in &weights.maps {
                let part = match map {
                    MatrixId::Embedding | MatrixId::Head => {
                        let role = if *map == MatrixId::Head { Role::LmHead } else { Role::Embedding };
                        tensors.entry(role).or_default().push((Part::Low(low.plain()), *weight));
                        continue;
                    }
                    _ => low.plain(),
                };
                if let Some(bias) = &low.bias {
                    let role = bias_of(&plain, *map)?;
                    let scaled = bias.iter().map(|c| (low.scale() * f64::from(*c)) as f32).collect();
                    tensors.entry(role).or_default().push((Part::Added(scaled), *weight));
                }
                let (site, rows, dims) = place(&maps, *map)?;
                let additions = sites.entry(site).or_insert_with(|| Additions { dims, terms: Vec::new() });
                additions.terms.push((rows, part, *weight));
            }
            for (role, values) in &weights.whole {
                tensors.entry(*role).or_default().push((Part::Whole(values.clone()), *weight));
            }
            if !weights.tokens.is_empty() {
                tensors.entry(Role::Embedding).or_default().push((Part::Rows(weights.tokens.clone()), *weight));
            }
        }
        if let Some(role) = tensors.iter().find_map(|(role, _)| covered(*role).filter(|site| sites.contains_key(site)))
        {
            let expected = "one of both: an addition to a matrix, or another one in its place";
            return Err(Error::input(format!("adapters of {role}"), "an addition, and a matrix saved whole", expected));
        }
        check_tied(&plain, &tensors)?;
        let maps_changed = sites.len();
        let boxed = sites.into_iter().map(|(site, additions)| (site, Box::new(additions) as Box<dyn NewMatrix>));
        let mut rows: BTreeMap<String, Box<dyn NewRows>> = BTreeMap::new();
        for (role, parts) in tensors {
            let name = plain.role(role)?.name.clone();
            rows.insert(name.clone(), Box::new(NewTensor { name, role, parts }));
        }
        let tensors_changed = rows.len();
        let rewrite = Rewrite { maps: boxed.collect(), tensors: rows, unchanged: Box::new(|| Ok(())) };
        let layout = Layout::new(&plain, &rewrite)?;
        let recipe = MergeRecipe { applied: applied(&maps, &layout, adapters)?, values: digest(adapters) };
        let summary = format!(
            "{} parts of {} adapters merged into {maps_changed} linear maps and {tensors_changed} other tensors",
            recipe.applied.len(),
            adapters.len()
        );
        let json = json!(recipe);
        let rewritten = rewrite.on(&plain, |_| Step::new(MERGE, &plain, json, summary))?;
        Ok(Self { rewritten, recipe: Arc::new(recipe) })
    }

    /// What the weights kept when `adapter` was begun as a part of them: `W - s B_0 A_0`. To it belongs the adapter
    /// that is
    /// [written](crate::peft_files::write()) with `on_residual`.
    ///
    /// # Errors
    /// [`Error::Input`] for an adapter that took nothing; else those of [`Merged::on`].
    pub fn residual(base: &Arc<Checkpoint>, adapter: &LoraWeights) -> Result<Self> {
        let maps: BTreeMap<MatrixId, LowRank> =
            adapter.maps.iter().filter_map(|(map, low)| Some((*map, low.residual()?))).collect();
        if maps.is_empty() {
            let expected = "PiSSA, OLoRA or CorDA, which take a part of the weights";
            return Err(Error::input("init_lora_weights", adapter.config.init_lora_weights, expected));
        }
        let taken = LoraWeights { maps, whole: BTreeMap::new(), tokens: BTreeMap::new(), ..adapter.clone() };
        Self::on(base, &[("residual", &taken, 1.0)])
    }

    /// The model with the adapters.
    pub fn model(&self) -> &Arc<Checkpoint> {
        self.rewritten.model()
    }

    /// Every addition, and the tensors that it went into.
    pub fn applied(&self) -> &[AppliedMap] {
        &self.recipe.applied
    }

    /// Which tensors have other values than those of the base, and which maps are rounded to what they were. Makes all
    /// new values to compare them.
    ///
    /// # Errors
    /// Those of reading the model.
    pub fn changes(&self) -> Result<Changes> {
        self.rewritten.changes()
    }
}

/// Where the engine computes a map: the place, which of its rows, and the shape of all.
fn place(maps: &Maps<'_>, map: MatrixId) -> Result<(Site, Range<usize>, [usize; 2])> {
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
            let delta = change(&old[range.clone()], low, *factor);
            matrix[range].iter_mut().zip(delta).for_each(|(w, d)| *w += d);
        }
        Ok(matrix)
    }
}

/// What an addition, times the weight of its adapter, changes of `weight [out, in]`.
fn change(weight: &[f32], low: &LowRank, factor: f64) -> Vec<f32> {
    let Some(m) = &low.magnitude else { return delta(low, factor * low.scale()) };
    let [out, inputs] = low.dims();
    let mut adapted = delta(low, low.scale());
    adapted.iter_mut().zip(weight).for_each(|(d, w)| *d += w);
    let norms = magnitudes(weight, low, [out, inputs]);
    let rows = adapted.chunks_exact_mut(inputs.max(1)).zip(weight.chunks_exact(inputs.max(1)));
    for ((row, w), (m, n)) in rows.zip(m.iter().zip(&norms)) {
        let g = if *n == 0.0 { 1.0 } else { m / n };
        row.iter_mut().zip(w).for_each(|(d, w)| *d = factor as f32 * (g * *d - w));
    }
    adapted
}

/// Something that adapters do to a tensor outside of the maps of layers.
enum Part {
    /// A low-rank addition to embeddings or output head.
    Low(LowRank),
    /// Other values.
    Whole(Vec<f32>),
    /// Other rows of the embeddings.
    Rows(BTreeMap<u32, Vec<f32>>),
    /// Values to be added.
    Added(Vec<f32>),
}

/// A tensor with everything that adapters do to it, and their weights.
struct NewTensor {
    name: String,
    role: Role,
    parts: Vec<(Part, f64)>,
}

impl NewRows for NewTensor {
    fn what(&self) -> String {
        format!("`{}`", self.name)
    }

    fn rows(&self, rows: Range<usize>, base: &Checkpoint) -> Result<Vec<f32>> {
        let columns: usize = base.role(self.role)?.shape.iter().skip(1).product();
        let old = match columns {
            1 => base.read_f32(self.role)?[rows.clone()].to_vec(),
            _ => base.read_f32_rows(self.role, rows.clone())?,
        };
        let range = rows.start * columns..rows.end * columns;
        let mut new = old.clone();
        for (part, factor) in &self.parts {
            let weight = *factor as f32;
            match part {
                Part::Low(low) => {
                    let b = low.b[rows.start * low.rank..rows.end * low.rank].to_vec();
                    let magnitude = low.magnitude.as_ref().map(|m| m[rows.clone()].to_vec());
                    let changed = change(&old, &LowRank { b, magnitude, bias: None, ..low.clone() }, *factor);
                    new.iter_mut().zip(changed).for_each(|(new, d)| *new += d);
                }
                // Exactly what was saved, where it stands alone.
                Part::Whole(values) if *factor == 1.0 && self.parts.len() == 1 => {
                    new.copy_from_slice(&values[range.clone()])
                }
                Part::Whole(values) => {
                    let values = values[range.clone()].iter().zip(&old);
                    new.iter_mut().zip(values).for_each(|(new, (value, old))| *new += weight * (value - old));
                }
                Part::Rows(own) => {
                    for (row, values) in own.range(rows.start as u32..rows.end as u32) {
                        let at = (*row as usize - rows.start) * columns;
                        for (i, value) in values.iter().enumerate() {
                            new[at + i] = match *factor == 1.0 {
                                true => *value,
                                false => new[at + i] + weight * (value - old[at + i]),
                            };
                        }
                    }
                }
                Part::Added(values) => {
                    new.iter_mut().zip(&values[range.clone()]).for_each(|(new, d)| *new += weight * d);
                }
            }
        }
        Ok(new)
    }
}

/// The map of a layer that a tensor is the whole of.
fn covered(role: Role) -> Option<Site> {
    match role {
        Role::Layer(layer, role) => LayerSite::of(role).map(|(site, _)| Site::Layer(layer, site)),
        _ => None,
    }
}

/// The bias that a map has in the base, which takes up that of an addition.
fn bias_of(base: &Checkpoint, map: MatrixId) -> Result<Role> {
    use LayerRole::*;
    let role = match map {
        MatrixId::Layer(layer, role) => match role {
            Query => Some(QueryBias),
            Key => Some(KeyBias),
            Value => Some(ValueBias),
            Output => Some(OutputBias),
            LatentQueryDown => Some(LatentQueryDownBias),
            LatentKvDown => Some(LatentKvDownBias),
            Router => Some(RouterBias),
            _ => None,
        }
        .map(|bias| Role::Layer(layer, bias)),
        _ => None,
    };
    role.filter(|role| base.role(*role).is_ok()).ok_or_else(|| {
        Error::Unsupported(format!("merging a bias of B (`lora_bias`) into {map}, which has no bias in the model"))
    })
}

/// Refuses to change a tensor that is embeddings and output head for one of both alone.
fn check_tied(base: &Checkpoint, tensors: &BTreeMap<Role, Vec<(Part, f64)>>) -> Result<()> {
    let rows_alone = |parts: &[(Part, f64)]| parts.iter().all(|(part, _)| matches!(part, Part::Rows(_)));
    let (embedding, head) = (tensors.get(&Role::Embedding), tensors.get(&Role::LmHead));
    let one = head.is_some() || embedding.is_some_and(|parts| !rows_alone(parts));
    match one && tied(base)? {
        true => Err(Error::Unsupported(
            "merging an adapter of embeddings or output head, which are one tensor in this model and would both change"
                .into(),
        )),
        false => Ok(()),
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
        let module = |role: Role| -> Result<AppliedMap> {
            let tensors = vec![maps.checkpoint().role(role)?.name.clone()];
            let (adapter, module) = ((*adapter).to_string(), maps.module_of(role));
            Ok(AppliedMap { adapter, module, tensors, rank: 0, scale: *weight })
        };
        for role in weights.whole.keys().copied().chain((!weights.tokens.is_empty()).then_some(Role::Embedding)) {
            applied.push(module(role)?);
        }
        for (map, low) in &weights.maps {
            if let Some(role) = match map {
                MatrixId::Embedding => Some(Role::Embedding),
                MatrixId::Head => Some(Role::LmHead),
                _ => None,
            } {
                applied.push(AppliedMap { rank: low.rank, scale: weight * low.scale(), ..module(role)? });
                continue;
            }
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
            [Some(&low.a), Some(&low.b), low.magnitude.as_ref(), low.bias.as_ref()]
                .into_iter()
                .flatten()
                .for_each(|values| add_values(values, &mut add));
        }
        for (role, values) in &weights.whole {
            add(format!("{role}").as_bytes());
            add_values(values, &mut add);
        }
        for (token, row) in &weights.tokens {
            add(&token.to_le_bytes());
            add_values(row, &mut add);
        }
    }
    hasher.finalize().to_hex().to_string()
}

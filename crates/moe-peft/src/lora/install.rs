//! Adapters in the model.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use burn::tensor::Device;
use moe_checkpoint::{Checkpoint, LayerSite, MatrixId, Role};
use moe_core::{Model, adapters::Site, train::Parameters};

use super::{
    config::{Init, LoraConfig},
    corda::Covariances,
    dora::Magnitude,
    dropout::{Dropout, SweepClock},
    embedding::{EmbeddingTerm, LoraEmbedding, TiedRows, TokenRows},
    linear::{LoraLinear, Term},
    maps::{Maps, Naming},
    weights::{LoraWeights, LowRank},
};
use crate::{
    AdapterSet, Artifacts, Error, Installed, Live, Result, Setting, TuningMethod,
    model_weights::{OwnEmbedding, OwnMatrix, OwnVector, tied},
    trainable_tensors,
};

/// Adapters that were put into a set.
#[derive(Debug)]
pub struct Lora {
    /// When sweeps are; only for dropout.
    clock: Arc<SweepClock>,
    adapters: BTreeMap<String, Named>,
}

#[derive(Debug)]
struct Named {
    weights: LoraWeights,
    live: BTreeMap<MatrixId, Values>,
    /// Tensors in place of the base's, in pieces.
    whole: BTreeMap<Role, Vec<Arc<Live>>>,
    tokens: Option<Arc<Live>>,
}

/// The values of one addition. Of the output head, `B` and what is as long as it come in the blocks that the head is
/// computed in.
#[derive(Clone, Debug)]
struct Values {
    a: Arc<Live>,
    b: Vec<Arc<Live>>,
    magnitude: Vec<Arc<Live>>,
    bias: Vec<Arc<Live>>,
}

/// What adapters come to, by place.
#[derive(Default)]
struct Places {
    sites: BTreeMap<Site, (Vec<Term>, [usize; 2])>,
    head: BTreeMap<(usize, usize), Vec<Term>>,
    embedding: Vec<EmbeddingTerm>,
}

/// What values are registered with.
struct Builder<'a> {
    set: &'a mut AdapterSet,
    checkpoint: &'a Checkpoint,
    device: &'a Device,
    /// `.NAME` of an adapter that is not called `default`.
    suffix: String,
}

impl Builder<'_> {
    fn live(&mut self, name: String, shape: [usize; 2], values: &[f32]) -> Result<Arc<Live>> {
        let live = Live::new(format!("{name}{}", self.suffix), shape, values.to_vec(), self.device)?;
        self.set.bank_mut().insert(live.clone())?;
        Ok(live)
    }

    /// The blocks of rows of the output head.
    fn blocks(&self) -> Vec<Range<usize>> {
        Model::head_row_blocks(self.checkpoint.config()).collect()
    }

    /// A matrix `[V, columns]` in those blocks.
    fn in_blocks(&mut self, name: &str, columns: usize, values: &[f32]) -> Result<Vec<Arc<Live>>> {
        let blocks = self.blocks();
        let whole = blocks.len() == 1;
        let block = |rows: Range<usize>| {
            let name = if whole { name.to_string() } else { format!("{name}.rows_{}_{}", rows.start, rows.end) };
            self.live(name, [rows.len(), columns], &values[rows.start * columns..rows.end * columns])
        };
        blocks.into_iter().map(block).collect()
    }

    /// A tensor in place of the base's.
    fn whole(&mut self, role: Role, path: &str, values: &[f32]) -> Result<Vec<Arc<Live>>> {
        let hidden = self.checkpoint.config().hidden_size;
        let name = format!("{path}.whole");
        match role {
            Role::Embedding | Role::LmHead => {
                let lives = self.in_blocks(&name, hidden, values)?;
                let blocks = self.blocks();
                if role == Role::Embedding {
                    let rows = blocks.first().map_or(1, ExactSizeIterator::len);
                    self.set.add_embedding(Arc::new(OwnEmbedding::new(lives.clone(), rows, hidden)))?;
                    return Ok(lives);
                }
                for (rows, live) in blocks.into_iter().zip(&lives) {
                    self.set.add_head(rows, Arc::new(OwnMatrix(live.clone())))?;
                }
                Ok(lives)
            }
            role => {
                if let Some(vector) = trainable_tensors::vectors(self.checkpoint).into_iter().find(|v| v.role == role) {
                    let live = self.live(name, [1, vector.len], values)?;
                    self.set.add_vector(role, vector.depth, Arc::new(OwnVector(live.clone())))?;
                    return Ok(vec![live]);
                }
                let site = match role {
                    Role::Layer(layer, role) => LayerSite::of(role).map(|(site, _)| (layer, site)),
                    _ => None,
                };
                let Some((layer, site)) =
                    site.filter(|(layer, site)| trainable_tensors::roles(self.checkpoint, *layer, *site).count() == 1)
                else {
                    let what = format!(
                        "`{path}` saved whole: only matrices and vectors that the model computes by themselves"
                    );
                    return Err(Error::Unsupported(what));
                };
                let shape = <[usize; 2]>::try_from(&self.checkpoint.plain_role(role)?.shape[..]).unwrap_or_default();
                let live = self.live(name, shape, values)?;
                self.set.add(Site::Layer(layer, site), Arc::new(OwnMatrix(live.clone())))?;
                Ok(vec![live])
            }
        }
    }

    /// Rows of the embeddings in place of the base's, and of the output head where that is the same tensor.
    fn tokens(&mut self, tokens: &BTreeMap<u32, Vec<f32>>) -> Result<Option<Arc<Live>>> {
        if tokens.is_empty() {
            return Ok(None);
        }
        let hidden = self.checkpoint.config().hidden_size;
        let values: Vec<f32> = tokens.values().flatten().copied().collect();
        let live = self.live("model.embed_tokens.rows".into(), [tokens.len(), hidden], &values)?;
        let rows: BTreeMap<u32, usize> = tokens.keys().copied().zip(0..).collect();
        if tied(self.checkpoint)? {
            for block in self.blocks() {
                let own: Vec<(usize, usize)> = rows
                    .iter()
                    .filter(|(id, _)| block.contains(&(**id as usize)))
                    .map(|(id, own)| (*id as usize - block.start, *own))
                    .collect();
                if !own.is_empty() {
                    let tied = TiedRows { dims: [block.len(), hidden], rows: own, live: live.clone() };
                    self.set.add_head(block, Arc::new(tied))?;
                }
            }
        }
        self.set.add_embedding(Arc::new(TokenRows { rows, hidden, live: live.clone() }))?;
        Ok(Some(live))
    }
}

impl Lora {
    /// Puts adapters by name into `set`. Several additions to one map add up. Trained values are called like PEFT's
    /// tensors: `model.layers.0.self_attn.q_proj.lora_A`, with `.NAME` for adapters that are not called `default`.
    ///
    /// # Errors
    /// [`Error::Input`] for a map or shape that the model does not have, and for a place that already has an adapter in
    /// the set; [`Error::Unsupported`] for DoRA on embeddings or with a bias, and for tensors saved whole that nothing
    /// can stand in for.
    pub fn install(
        set: &mut AdapterSet,
        maps: &Maps<'_>,
        adapters: &[(&str, LoraWeights)],
        device: &Device,
    ) -> Result<Self> {
        let seed = adapters.first().map_or(0, |(_, weights)| weights.config.seed);
        let clock = SweepClock::new(seed);
        let mut lora = Self { clock: clock.clone(), adapters: BTreeMap::new() };
        let mut places = Places::default();
        let checkpoint = maps.checkpoint();
        for (index, (name, weights)) in adapters.iter().enumerate() {
            weights.check(maps)?;
            let suffix = if *name == "default" { String::new() } else { format!(".{name}") };
            let mut builder = Builder { set, checkpoint, device, suffix };
            let mut named =
                Named { weights: weights.clone(), live: BTreeMap::new(), whole: BTreeMap::new(), tokens: None };
            for (position, (map, low)) in weights.maps.iter().enumerate() {
                let dropout = (weights.dropout > 0.0).then(|| Dropout {
                    rate: weights.dropout as f32,
                    place: (index as u64) << 32 | position as u64,
                    clock: clock.clone(),
                });
                named.live.insert(*map, addition(&mut builder, maps, *map, low, dropout, &mut places)?);
            }
            for (role, values) in &weights.whole {
                let path = maps.tensor_name(*role);
                named.whole.insert(*role, builder.whole(*role, &path, values)?);
            }
            named.tokens = builder.tokens(&weights.tokens)?;
            if lora.adapters.insert((*name).to_string(), named).is_some() {
                return Err(Error::input("adapters", format!("`{name}` twice"), "a name of its own for each"));
            }
        }
        let Places { sites, head, embedding } = places;
        for (site, (terms, dims)) in sites {
            set.add(site, Arc::new(LoraLinear::new(dims, terms)))?;
        }
        let hidden = checkpoint.config().hidden_size;
        for ((start, end), terms) in head {
            set.add_head(start..end, Arc::new(LoraLinear::new([end - start, hidden], terms)))?;
        }
        if !embedding.is_empty() {
            set.add_embedding(Arc::new(LoraEmbedding { hidden, terms: embedding }))?;
        }
        set.add_listener(clock);
        Ok(lora)
    }

    /// The clock that dropout goes by: to be told of steps, and of evaluations.
    pub fn clock(&self) -> &Arc<SweepClock> {
        &self.clock
    }

    /// The adapter of this name with its present values, which have to be [lent](crate::Bank::lend) or settled.
    pub fn weights(&self, name: &str) -> Option<LoraWeights> {
        self.read(name, |live| Some(live.to_vec()))
    }

    /// The same with values that an optimizer has.
    pub fn weights_from(&self, name: &str, parameters: &Parameters) -> Option<LoraWeights> {
        self.read(name, |live| parameters.get(live.name()).map(|parameter| parameter.values.clone()))
    }

    fn read(&self, name: &str, values: impl Fn(&Live) -> Option<Vec<f32>>) -> Option<LoraWeights> {
        let Named { weights, live, whole, tokens } = self.adapters.get(name)?;
        let joined = |lives: &[Arc<Live>]| -> Option<Vec<f32>> {
            Some(lives.iter().map(|live| values(live)).collect::<Option<Vec<_>>>()?.concat())
        };
        let some = |lives: &[Arc<Live>]| -> Option<Option<Vec<f32>>> {
            if lives.is_empty() { Some(None) } else { joined(lives).map(Some) }
        };
        let mut weights = weights.clone();
        for (map, low) in &mut weights.maps {
            let Values { a, b, magnitude, bias } = live.get(map)?;
            let (magnitude, bias) = (some(magnitude)?, some(bias)?);
            *low = LowRank { a: values(a)?, b: joined(b)?, magnitude, bias, ..low.clone() };
        }
        for (role, values) in &mut weights.whole {
            *values = joined(whole.get(role)?)?;
        }
        if let Some(live) = tokens {
            let values = values(live)?;
            let rows = values.chunks_exact(live.shape()[1].max(1));
            weights.tokens.values_mut().zip(rows).for_each(|(row, values)| *row = values.to_vec());
        }
        Some(weights)
    }
}

/// Registers an addition to a map, and puts it where the engine computes the map.
fn addition(
    builder: &mut Builder<'_>,
    maps: &Maps<'_>,
    map: MatrixId,
    low: &LowRank,
    dropout: Option<Dropout>,
    places: &mut Places,
) -> Result<Values> {
    let missing = || Error::input("an adapted map", map, "a map of the model");
    let [out, inputs] = maps.dims(map).ok_or_else(missing)?;
    let path = maps.path(map, Naming::PerExpert);
    let (scale, start) = (low.scale() as f32, low.start.clone());
    if map == MatrixId::Embedding {
        if low.magnitude.is_some() || low.bias.is_some() || start.is_some() || dropout.is_some() {
            let what = "an addition to embeddings with DoRA, a bias, dropout, or a part of the weight to begin with";
            return Err(Error::Unsupported(what.into()));
        }
        let a = builder.live(format!("{path}.lora_A"), [low.rank, inputs], &low.a)?;
        let b = builder.live(format!("{path}.lora_B"), [out, low.rank], &low.b)?;
        places.embedding.push(EmbeddingTerm { a: a.clone(), b: b.clone(), scale });
        return Ok(Values { a, b: vec![b], magnitude: Vec::new(), bias: Vec::new() });
    }
    if low.magnitude.is_some() && low.bias.is_some() {
        return Err(Error::Unsupported(format!("DoRA with a bias of B, as that of {map}")));
    }
    let a = builder.live(format!("{path}.lora_A"), [low.rank, inputs], &low.a)?;
    let name = |kind: &str| format!("{path}.{kind}");
    let (b, magnitude, bias) = match map {
        MatrixId::Head => {
            let b = builder.in_blocks(&name("lora_B"), low.rank, &low.b)?;
            let mut long = |kind: &str, values: &Option<Vec<f32>>| match values {
                Some(values) => {
                    let blocks = builder.in_blocks(&name(kind), 1, values)?;
                    Ok::<_, Error>(blocks)
                }
                None => Ok(Vec::new()),
            };
            (b, long("lora_magnitude_vector", &low.magnitude)?, long("lora_bias", &low.bias)?)
        }
        _ => {
            let b = builder.live(name("lora_B"), [out, low.rank], &low.b)?;
            let mut long = |kind: &str, values: &Option<Vec<f32>>| match values {
                Some(values) => Ok::<_, Error>(vec![builder.live(name(kind), [1, out], values)?]),
                None => Ok(Vec::new()),
            };
            (vec![b], long("lora_magnitude_vector", &low.magnitude)?, long("lora_bias", &low.bias)?)
        }
    };
    let values = Values { a, b, magnitude, bias };
    if out == 0 || inputs == 0 {
        // An expert without units: there is nothing to add to.
        return Ok(values);
    }
    let term = |block: usize, rows: Range<usize>, start| Term {
        rows,
        a: values.a.clone(),
        b: values.b[block].clone(),
        scale,
        start,
        magnitude: values.magnitude.get(block).cloned().map(Magnitude::new),
        bias: values.bias.get(block).cloned(),
        dropout: dropout.clone(),
    };
    if map == MatrixId::Head {
        for (block, rows) in builder.blocks().into_iter().enumerate() {
            let start = start.as_ref().map(|start| start.rows(rows.clone()));
            let terms = places.head.entry((rows.start, rows.end)).or_default();
            terms.push(term(block, 0..rows.len(), start));
        }
    } else {
        let (site, rows, width) = maps.site(map).ok_or_else(missing)?;
        let new = || (Vec::new(), [width, inputs]);
        places.sites.entry(site).or_insert_with(new).0.push(term(0, rows, start));
    }
    Ok(values)
}
/// Waves that CorDA's covariances are taken from.
const COVARIANCE_WAVES: usize = 16;

impl TuningMethod for LoraConfig {
    /// # Errors
    /// As [`LoraConfig::targets`].
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        let maps = Maps::new(on.model.checkpoint());
        self.saved_whole(&maps, self.targets(&maps)?.keys()).map(drop)
    }

    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        let maps = Maps::new(on.model.checkpoint());
        let lora = Lora::install(set, &maps, &[("default", self.outlined(&maps)?)], on.model.device())?;
        Ok(Artifacts { lora: Some(Arc::new(lora)), ..Artifacts::default() }.into())
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        let maps = Maps::new(on.model.checkpoint());
        let covariances = match self.init_lora_weights {
            Init::Corda(_) => {
                let targets: Vec<MatrixId> = self.targets(&maps)?.into_keys().collect();
                let waves = &on.waves[..on.waves.len().min(COVARIANCE_WAVES)];
                Some(Covariances::collect(on.model, waves, &targets, None)?)
            }
            _ => None,
        };
        let weights = self.init(&maps, covariances.as_ref())?;
        let lora = Lora::install(set, &maps, &[("default", weights)], on.model.device())?;
        Ok(Artifacts { lora: Some(Arc::new(lora)), ..Artifacts::default() }.into())
    }
}

//! Adapters in the model.

use std::{collections::BTreeMap, sync::Arc};

use burn::tensor::Device;
use moe_core::{adapters::Site, train::Parameters};

use super::{
    config::{Init, LoraConfig},
    corda::Covariances,
    dora::Magnitude,
    dropout::{Dropout, SweepClock},
    linear::{LoraLinear, Term},
    maps::{Map, Maps, Naming},
    weights::{LoraWeights, LowRank},
};
use crate::{AdapterSet, Artifacts, Error, Installed, Live, Result, Setting, TuningMethod};

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
    live: BTreeMap<Map, Values>,
}

/// The values of one addition.
#[derive(Clone, Debug)]
struct Values {
    a: Arc<Live>,
    b: Arc<Live>,
    magnitude: Option<Arc<Live>>,
}

impl Lora {
    /// Puts adapters by name into `set`. Several additions to one map add up. Trained values are called like PEFT's tensors:
    /// `model.layers.0.self_attn.q_proj.lora_A`, with `.NAME` for adapters that are not called `default`.
    ///
    /// # Errors
    /// [`Error::Input`] for a map or shape that the model does not have, and for a place that already has an adapter in the set.
    pub fn install(
        set: &mut AdapterSet,
        maps: &Maps<'_>,
        adapters: &[(&str, LoraWeights)],
        device: &Device,
    ) -> Result<Self> {
        let seed = adapters.first().map_or(0, |(_, weights)| weights.config.seed);
        let clock = SweepClock::new(seed);
        let mut lora = Self { clock: clock.clone(), adapters: BTreeMap::new() };
        let mut sites: BTreeMap<Site, (Vec<Term>, [usize; 2])> = BTreeMap::new();
        for (index, (name, weights)) in adapters.iter().enumerate() {
            weights.check(maps)?;
            let mut live = BTreeMap::new();
            for (position, (map, low)) in weights.maps.iter().enumerate() {
                let (Some((site, rows, width)), Some([out, inputs])) = (maps.site(*map), maps.dims(*map)) else {
                    return Err(Error::input("an adapted map", map, "a map of the model"));
                };
                let path = maps.path(*map, Naming::PerExpert);
                let suffix = if *name == "default" { String::new() } else { format!(".{name}") };
                let mut bank = |kind: &str, shape: [usize; 2], values: &[f32]| -> Result<Arc<Live>> {
                    let live = Live::new(format!("{path}.{kind}{suffix}"), shape, values.to_vec(), device)?;
                    set.bank_mut().insert(live.clone())?;
                    Ok(live)
                };
                let a = bank("lora_A", [low.rank, inputs], &low.a)?;
                let b = bank("lora_B", [out, low.rank], &low.b)?;
                let magnitude = match &low.magnitude {
                    Some(m) => Some(bank("lora_magnitude_vector", [1, out], m)?),
                    None => None,
                };
                live.insert(*map, Values { a: a.clone(), b: b.clone(), magnitude: magnitude.clone() });
                let dropout = (weights.dropout > 0.0).then(|| Dropout {
                    rate: weights.dropout as f32,
                    place: (index as u64) << 32 | position as u64,
                    clock: clock.clone(),
                });
                let term = Term {
                    rows,
                    a,
                    b,
                    scale: low.scale() as f32,
                    start: low.start.clone(),
                    magnitude: magnitude.map(Magnitude::new),
                    dropout,
                };
                if out == 0 || inputs == 0 {
                    // An expert without units: there is nothing to add to.
                    continue;
                }
                sites.entry(site).or_insert_with(|| (Vec::new(), [width, inputs])).0.push(term);
            }
            let installed = Named { weights: weights.clone(), live };
            if lora.adapters.insert((*name).to_string(), installed).is_some() {
                return Err(Error::input("adapters", format!("`{name}` twice"), "a name of its own for each"));
            }
        }
        for (site, (terms, dims)) in sites {
            set.add(site, Arc::new(LoraLinear::new(dims, terms)))?;
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
        let Named { weights, live } = self.adapters.get(name)?;
        let mut weights = weights.clone();
        for (map, low) in &mut weights.maps {
            let Values { a, b, magnitude } = live.get(map)?;
            let magnitude = match magnitude {
                Some(m) => Some(values(m)?),
                None => None,
            };
            *low = LowRank { a: values(a)?, b: values(b)?, magnitude, ..low.clone() };
        }
        Some(weights)
    }
}

/// Waves that CorDA's covariances are taken from.
const COVARIANCE_WAVES: usize = 16;

impl TuningMethod for LoraConfig {
    /// # Errors
    /// As [`LoraConfig::targets`].
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        self.targets(&Maps::new(on.model.checkpoint())).map(drop)
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
                let targets: Vec<Map> = self.targets(&maps)?.into_keys().collect();
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

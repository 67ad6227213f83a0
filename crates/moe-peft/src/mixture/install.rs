//! A mixture in a model.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use burn::tensor::Device;
use moe_checkpoint::{LayerRole, MatrixId};
use moe_core::{adapters::Site, trace::WaveInfo, train::Parameters};
use rand::seq::SliceRandom;

use super::{
    balance::{Balance, Group, Running, Scope},
    block::MixtureBlock,
    config::MixtureConfig,
    gate::Gate,
    linear::{Earlier, Mixture as MapMixture, MixtureLinear},
    router::{Router, Selection},
    state::{KeepsSelection, MixtureHooks, Preservation},
    store::{CONFIG_FILE, read_store},
};
use crate::{
    AdapterSet, Artifacts, Error, Installed, Live, Result, Setting, SweepListener, TuningMethod,
    lora::{Dropout, LoraWeights, LowRank, Maps, Naming, SweepClock, kaiming, normal, random},
};

/// A mixture that was put into a set.
#[derive(Debug)]
pub struct Mixture {
    pub(super) config: MixtureConfig,
    clock: Arc<SweepClock>,
    running: Arc<Running>,
    groups: Vec<Arc<Group>>,
    maps: BTreeMap<MatrixId, Arc<MapMixture>>,
    blocks: BTreeMap<usize, Arc<MixtureBlock>>,
    /// Routers by the path of what they are for.
    pub(super) routers: BTreeMap<String, Arc<Router>>,
    /// All values, trained or not, by name.
    pub(super) values: BTreeMap<String, Arc<Live>>,
    /// Atoms of earlier tasks, by path.
    pub(super) earlier: BTreeMap<String, Earlier>,
}

/// Values that a mixture begins with instead of new ones.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Stored {
    pub values: BTreeMap<String, Vec<f32>>,
    pub selection: BTreeMap<String, Vec<f32>>,
    pub earlier: BTreeMap<String, Earlier>,
}

/// Which weights stand for those that depend on the token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MeanWeights {
    /// Their means over all tokens that the mixture was run on.
    Observed,
    /// This for every expert or rank: 1 for the dense average of FlyLoRA's tasks.
    Constant(f64),
}

/// Told of a wave before the routers and groups.
#[derive(Debug)]
struct Begin {
    running: Arc<Running>,
    routers: Vec<Arc<Router>>,
    groups: Vec<Arc<Group>>,
}

impl SweepListener for Begin {
    fn begin_wave(&self, wave: &WaveInfo) {
        self.running.begin(wave);
        self.routers.iter().for_each(|router| router.begin_wave(wave));
        self.groups.iter().for_each(|group| group.begin_wave(wave));
    }

    fn losses(&self) -> Vec<(&'static str, f64)> {
        match self.groups.first() {
            Some(group) if group.balance != (Balance::None {}) => {
                vec![("mixture_balance", self.groups.iter().map(|group| group.loss()).sum())]
            }
            _ => Vec::new(),
        }
    }
}

struct Builder<'a> {
    config: &'a MixtureConfig,
    set: &'a mut AdapterSet,
    device: &'a Device,
    stored: &'a Stored,
    clock: Arc<SweepClock>,
    running: Arc<Running>,
    groups: BTreeMap<(usize, usize), Arc<Group>>,
    routers: BTreeMap<String, Arc<Router>>,
    values: BTreeMap<String, Arc<Live>>,
}

impl Mixture {
    /// Puts a new mixture into `set`. Trained values are called `PATH.mixture.lora_A`, `.lora_B`, `.router` and
    /// `.router_bias`.
    ///
    /// # Errors
    /// Those of [`MixtureConfig::validate`] and of the targets; [`Error::Input`] for a layer without experts where one
    /// is needed, blocks in a model without dense or shared ones, and a place that already has an adapter in the set.
    pub fn install(config: &MixtureConfig, set: &mut AdapterSet, maps: &Maps<'_>, device: &Device) -> Result<Self> {
        Self::install_with(config, set, maps, device, &Stored::default())
    }

    pub(super) fn install_with(
        config: &MixtureConfig,
        set: &mut AdapterSet,
        maps: &Maps<'_>,
        device: &Device,
        stored: &Stored,
    ) -> Result<Self> {
        let layers = maps.checkpoint().config().layers.len();
        config.validate(layers)?;
        let (clock, running) = (SweepClock::new(config.seed), Arc::new(Running::default()));
        let mut builder = Builder {
            config,
            set,
            device,
            stored,
            clock: clock.clone(),
            running: running.clone(),
            groups: BTreeMap::new(),
            routers: BTreeMap::new(),
            values: BTreeMap::new(),
        };
        let (mut by_map, mut blocks) = (BTreeMap::new(), BTreeMap::new());
        if config.blocks {
            for layer in 0..layers {
                if let Some(block) = builder.block(maps, layer)? {
                    blocks.insert(layer, Arc::new(block));
                }
            }
            if blocks.is_empty() {
                return Err(Error::input("blocks", "a model without dense blocks and shared experts", "one with some"));
            }
        } else {
            for map in config.lora().targets(maps)?.into_keys() {
                if let Some(mixture) = builder.map(maps, map)? {
                    by_map.insert(map, Arc::new(mixture));
                }
            }
        }
        let Builder { groups, routers, values, .. } = builder;
        let groups: Vec<Arc<Group>> = groups.into_values().collect();
        let mut sites: BTreeMap<Site, MixtureLinear> = BTreeMap::new();
        for (map, mixture) in &by_map {
            let (Some((site, _, width)), Some([_, inputs])) = (maps.site(*map), maps.dims(*map)) else { continue };
            let new = || MixtureLinear { dims: [width, inputs], mixtures: Vec::new() };
            sites.entry(site).or_insert_with(new).mixtures.push(mixture.clone());
        }
        for (site, linear) in sites {
            set.add(site, Arc::new(linear))?;
        }
        for (layer, block) in &blocks {
            set.add_block(*layer, block.clone())?;
        }
        set.add_listener(clock.clone());
        let begin =
            Begin { running: running.clone(), routers: routers.values().cloned().collect(), groups: groups.clone() };
        set.add_listener(Arc::new(begin));
        let earlier = stored.earlier.clone();
        Ok(Self { config: config.clone(), clock, running, groups, maps: by_map, blocks, routers, values, earlier })
    }

    /// Places that have a mixture: maps, or blocks as a whole.
    pub fn places(&self) -> usize {
        self.maps.len() + self.blocks.len()
    }

    /// What it was made from.
    pub fn config(&self) -> &MixtureConfig {
        &self.config
    }

    /// The clock that dropout and biases of selections go by: to be told of steps, and of evaluations.
    pub fn clock(&self) -> &Arc<SweepClock> {
        &self.clock
    }

    /// Gives the sequences of waves labels: the type of sample for LoRAMoE, the task for LoRA-Mixer, by wave and by
    /// sequence in it.
    pub fn set_labels(&self, labels: BTreeMap<u64, Vec<usize>>) {
        self.running.set_labels(labels);
    }

    /// The balance loss of the last wave, summed over routers or what counts together.
    pub fn balance_loss(&self) -> f64 {
        self.groups.iter().map(|group| group.loss()).sum()
    }

    /// Mean weights of the experts, or ranks, of everything that has a router, by path.
    pub fn mean_weights(&self) -> BTreeMap<String, Vec<f64>> {
        let mean = |router: &Router| router.selection.lock().unwrap_or_else(PoisonError::into_inner).mean();
        self.routers.iter().filter_map(|(path, router)| Some((path.clone(), mean(router)?))).collect()
    }

    /// The mixture as plain additions, where it is some: with one expert of weight 1.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for every other: what it adds depends on the token.
    pub fn merge(&self) -> Result<LoraWeights> {
        let single = |router: &Arc<Router>| {
            router.width == 1
                && matches!(self.config.gate, Gate::TopK { .. } | Gate::TopP { .. } | Gate::Top1 {} | Gate::Dense {})
        };
        let whole = |router: &Arc<Router>| matches!(self.config.gate, Gate::Sparse { k, .. } if k >= router.width);
        match self.routers.iter().find(|(_, router)| !single(router) && !whole(router)) {
            None if self.blocks.is_empty() => self.approximate_merge(MeanWeights::Constant(1.0)),
            None => Err(Error::Unsupported("merging mixtures of blocks".into())),
            Some((path, router)) => Err(Error::Unsupported(format!(
                "merging the mixture at {path}: which of its {} experts are used depends on the token; `approximate_merge` takes their \
                 means",
                router.width
            ))),
        }
    }

    /// Plain additions with constant weights in place of the gates: an approximation, which loses what the routers
    /// decide.
    ///
    /// # Errors
    /// [`Error::Input`] if means are asked for and the mixture was never run; [`Error::Unsupported`] for blocks.
    pub fn approximate_merge(&self, weights: MeanWeights) -> Result<LoraWeights> {
        if !self.blocks.is_empty() {
            return Err(Error::Unsupported("merging mixtures of blocks".into()));
        }
        let mut merged = LoraWeights { config: self.config.lora(), ..LoraWeights::default() };
        for (map, mixture) in &self.maps {
            let means = match weights {
                MeanWeights::Constant(weight) => vec![weight; mixture.router.width],
                MeanWeights::Observed => {
                    let selection = mixture.router.selection.lock().unwrap_or_else(PoisonError::into_inner);
                    selection.mean().ok_or_else(|| {
                        Error::input(format!("mean weights of {map}"), "no token", "a run over some data first")
                    })?
                }
            };
            let ([rank, _], out) = (mixture.a.shape(), mixture.rows.len());
            let (a, b) = (mixture.a.to_vec(), mixture.b.to_vec());
            let before = mixture.earlier.as_ref().map_or(0, |earlier| earlier.rank);
            let all = before + rank;
            let per = all / means.len().max(1);
            let mut joined = Vec::with_capacity(out * all);
            for row in 0..out {
                for i in 0..all {
                    let value = match &mixture.earlier {
                        Some(earlier) if i < before => f64::from(earlier.b[row * before + i]),
                        _ => f64::from(mixture.scale) * f64::from(b[row * rank + i - before]),
                    };
                    joined.push((means[i / per] * value) as f32);
                }
            }
            let earlier = mixture.earlier.as_ref().map_or(&[][..], |earlier| &earlier.a);
            merged.maps.insert(*map, LowRank::new([earlier, &a].concat(), joined, all, all as f64));
        }
        Ok(merged)
    }

    /// The values for the next task: atoms so far are frozen and stay, and new ones are added. To be installed in a set
    /// of its own.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for mixtures other than of atoms that activate themselves; those of [`Mixture::install`].
    pub fn next_task(&self, seed: u64, set: &mut AdapterSet, maps: &Maps<'_>, device: &Device) -> Result<Self> {
        if !matches!(self.config.gate, Gate::SelfActivated { .. }) {
            return Err(Error::Unsupported("growing a mixture that does not activate itself".into()));
        }
        let mut stored = Stored::default();
        for (map, mixture) in &self.maps {
            let ([rank, _], out) = (mixture.a.shape(), mixture.rows.len());
            let b = mixture.b.to_vec();
            let (before, old_a, old_b) = match &mixture.earlier {
                Some(earlier) => (earlier.rank, earlier.a.clone(), earlier.b.clone()),
                None => (0, Vec::new(), Vec::new()),
            };
            let mut joined = Vec::with_capacity(out * (before + rank));
            for row in 0..out {
                joined.extend(&old_b[row * before..(row + 1) * before]);
                joined.extend(b[row * rank..(row + 1) * rank].iter().map(|b| mixture.scale * b));
            }
            let earlier = Earlier { a: [old_a, mixture.a.to_vec()].concat(), b: joined, rank: before + rank };
            stored.earlier.insert(maps.path(*map, Naming::PerExpert), earlier);
        }
        let config = MixtureConfig { seed, ..self.config.clone() };
        Self::install_with(&config, set, maps, device, &stored)
    }

    /// All values by name, those of an optimizer where it has them.
    pub(super) fn all_values(&self, parameters: Option<&Parameters>) -> BTreeMap<String, Vec<f32>> {
        let value = |live: &Live| match parameters.and_then(|parameters| parameters.get(live.name())) {
            Some(parameter) => parameter.values.clone(),
            None => live.to_vec(),
        };
        self.values.iter().map(|(name, live)| (name.clone(), value(live))).collect()
    }
}

impl Builder<'_> {
    /// Values under a name: stored ones, or new ones; in the bank if they are trained.
    fn live(
        &mut self,
        name: String,
        shape: [usize; 2],
        trained: bool,
        new: impl FnOnce() -> Vec<f32>,
    ) -> Result<Arc<Live>> {
        let values = self.stored.values.get(&name).cloned().unwrap_or_else(new);
        let live = Live::new(name.clone(), shape, values, self.device)?;
        if trained {
            self.set.bank_mut().insert(live.clone())?;
        }
        self.values.insert(name, live.clone());
        Ok(live)
    }

    fn router(&mut self, path: &str, layer: usize, width: usize, inputs: usize, logits: usize) -> Result<Arc<Router>> {
        let config = self.config;
        let id = self.routers.len();
        let key = match config.balance {
            Balance::Load { scope: Scope::Model, .. } => (0, 0),
            Balance::Load { scope: Scope::Layer, .. } => (layer, 0),
            _ => (layer, id),
        };
        let running = self.running.clone();
        let group = self.groups.entry(key).or_insert_with(|| Group::new(config.balance, running)).clone();
        let trained = config.train_router;
        let (mut weight, mut bias) = (None, None);
        if config.gate.has_router() || config.inference_gate.is_some_and(|gate| gate.has_router()) {
            let mut random = random(config.seed, &format!("{path}.router"));
            let new = || match config.router_std {
                Some(std) => (0..logits * inputs).map(|_| (std * normal(&mut random)) as f32).collect(),
                None => kaiming(&mut random, logits, inputs),
            };
            weight = Some(self.live(format!("{path}.mixture.router"), [logits, inputs], trained, new)?);
            if config.router_bias {
                let new = || vec![0.0; logits];
                bias = Some(self.live(format!("{path}.mixture.router_bias"), [1, logits], trained, new)?);
            }
        }
        let biased = self.stored.selection.get(path).cloned().unwrap_or_else(|| vec![0.0; width]);
        let router = Arc::new(Router {
            id,
            gate: config.gate,
            inference_gate: config.inference_gate,
            width,
            weight,
            bias,
            trained,
            group,
            running: self.running.clone(),
            clock: self.clock.clone(),
            selection: Mutex::new(Selection::new(biased)),
        });
        self.routers.insert(path.to_string(), router.clone());
        Ok(router)
    }

    fn dropout(&self, place: u64) -> Option<Dropout> {
        let rate = self.config.lora_dropout as f32;
        (rate > 0.0).then(|| Dropout { rate, place, clock: self.clock.clone() })
    }

    fn map(&mut self, maps: &Maps<'_>, map: MatrixId) -> Result<Option<MapMixture>> {
        let (Some((site, rows, _)), Some([out, inputs])) = (maps.site(map), maps.dims(map)) else { return Ok(None) };
        let layer = site.layer();
        let config = self.config;
        let path = maps.path(map, Naming::PerExpert);
        let layers = maps.checkpoint().config().layers.len();
        let earlier = self.stored.earlier.get(&path).cloned();
        let by_rank = config.gate.is_by_rank();
        let (rank, width) = match by_rank {
            true => (config.r, config.r + earlier.as_ref().map_or(0, |earlier| earlier.rank)),
            false => {
                let experts = config.experts.of(layer, layers);
                if experts == 0 {
                    return Ok(None);
                }
                (experts * config.r, experts)
            }
        };
        let logits = match config.gate {
            Gate::Ranks { partition, .. } => rank / partition,
            _ => width,
        };
        let sparse = match config.gate {
            // 1 / density: n / p = r / k
            Gate::Sparse { k, .. } => Some((inputs / (config.r / k).max(1)).max(1)),
            _ => None,
        };
        let place = self.routers.len() as u64;
        let router = self.router(&path, layer, width, inputs, logits)?;
        let mut numbers = random(config.seed, &path);
        let train_a = config.train_experts && sparse.is_none();
        let a = self.live(format!("{path}.mixture.lora_A"), [rank, inputs], train_a, || match sparse {
            Some(nonzero) => {
                let mut a = vec![0.0; rank * inputs];
                for row in a.chunks_exact_mut(inputs) {
                    let mut places: Vec<usize> = (0..inputs).collect();
                    places.shuffle(&mut numbers);
                    places[..nonzero].iter().for_each(|at| row[*at] = (normal(&mut numbers) / rank as f64) as f32);
                }
                a
            }
            None => kaiming(&mut numbers, rank, inputs),
        })?;
        let b =
            self.live(format!("{path}.mixture.lora_B"), [out, rank], config.train_experts, || vec![0.0; out * rank])?;
        Ok(Some(MapMixture {
            rows,
            router,
            a,
            b,
            train_a,
            train_b: config.train_experts,
            scale: config.scale() as f32,
            earlier,
            router_sees_dropped: matches!(config.gate, Gate::Ranks { .. }),
            dropout: self.dropout(place),
        }))
    }

    /// The mixture of the dense block or shared expert of a layer, if it has one.
    fn block(&mut self, maps: &Maps<'_>, layer: usize) -> Result<Option<MixtureBlock>> {
        use LayerRole::{DenseDown, DenseGate, DenseUp, SharedDown, SharedGate, SharedUp};
        let config = self.config;
        let kinds = [[DenseGate, DenseUp, DenseDown], [SharedGate, SharedUp, SharedDown]];
        let there = |role| maps.dims(MatrixId::Layer(layer, role)).is_some();
        if let Some([_, up, _]) = kinds.iter().find(|[gate, up, _]| there(*up) && !there(*gate)) {
            let what = format!("a mixture in place of {up} of layer {layer}, which has no gate");
            return Err(Error::Unsupported(what));
        }
        let own = |roles: &&[LayerRole; 3]| there(roles[0]);
        let Some(roles) = kinds.iter().find(own) else { return Ok(None) };
        let experts = config.experts.of(layer, maps.checkpoint().config().layers.len());
        if experts == 0 {
            return Ok(None);
        }
        let gate_path = maps.path(MatrixId::Layer(layer, roles[0]), Naming::PerExpert);
        let path = gate_path.rsplit_once('.').map_or(gate_path.as_str(), |(path, _)| path).to_string();
        let hidden = maps.checkpoint().config().hidden_size;
        let place = 3 * self.routers.len() as u64;
        let router = self.router(&path, layer, experts, hidden, experts)?;
        let mut lives = Vec::with_capacity(3);
        for role in roles {
            let map = MatrixId::Layer(layer, *role);
            let [out, inputs] = maps.dims(map).unwrap_or_default();
            let path = maps.path(map, Naming::PerExpert);
            let mut numbers = random(config.seed, &path);
            let (rank, trained) = (experts * config.r, config.train_experts);
            let new = || kaiming(&mut numbers, rank, inputs);
            let a = self.live(format!("{path}.mixture.lora_A"), [rank, inputs], trained, new)?;
            let b = self.live(format!("{path}.mixture.lora_B"), [out, rank], trained, || vec![0.0; out * rank])?;
            lives.push((a, b));
        }
        let Ok(lives) = <[_; 3]>::try_from(lives) else { return Ok(None) };
        let dropout = [0, 1, 2].map(|map| self.dropout(place + map));
        let scale = config.scale() as f32;
        Ok(Some(MixtureBlock { router, maps: lives, rank: config.r, scale, trained: config.train_experts, dropout }))
    }
}

impl MixtureConfig {
    /// The values that [`start`](Self::start) gives.
    fn started(&self) -> Result<Stored> {
        let Some(dir) = &self.start else { return Ok(Stored::default()) };
        let (earlier, mut stored) = read_store(dir)?;
        let places = |config: &Self| {
            let Self { experts, r, target_modules, exclude_modules, naming, blocks, .. } = config.clone();
            (experts, r, target_modules, exclude_modules, naming, blocks)
        };
        if places(self) != places(&earlier) || self.gate.is_by_rank() != earlier.gate.is_by_rank() {
            let path = dir.join(CONFIG_FILE);
            let found = serde_json::to_string(&earlier).unwrap_or_default();
            let expected = "experts, r, targets, naming, blocks and kind of gate as in the mixture that starts from it";
            return Err(crate::array_file::malformed(&path, "options", found, expected));
        }
        if self.router_bias != earlier.router_bias {
            stored.values.retain(|name, _| !name.ends_with(".router_bias"));
        }
        Ok(stored)
    }

    /// Checks that labels are there where they are needed, and that they name experts.
    fn check_labels(&self, on: &Setting<'_>) -> Result<()> {
        let localized = matches!(self.balance, Balance::Localized { weight, .. } if weight > 0.0);
        if self.gate != (Gate::Label {}) && !localized {
            return Ok(());
        }
        let expected = "a label for every row: name the field of the rows that has it in `labels` of the recipe";
        if on.labels.is_empty() {
            let what = if localized { "labels for a localized balance" } else { "labels for `gate`: label" };
            return Err(Error::input(what, "none", expected));
        }
        if let Some(wave) = on.waves.iter().find(|w| on.labels.get(&w.id).map_or(0, Vec::len) != w.sequences.len()) {
            let found = on.labels.get(&wave.id).map_or(0, Vec::len);
            return Err(Error::input(format!("labels of wave {}", wave.id), found, wave.sequences.len()));
        }
        let layers = on.model.config().layers.len();
        let experts = (0..layers).map(|layer| self.experts.of(layer, layers)).filter(|n| *n > 0).min().unwrap_or(0);
        let most = if localized { 2 } else { experts };
        match on.labels.values().flatten().find(|label| **label >= most) {
            Some(label) => Err(Error::input("a label", label, format!("below {most}"))),
            None => Ok(()),
        }
    }
}

impl TuningMethod for MixtureConfig {
    /// # Errors
    /// Those of [`MixtureConfig::validate`] and of the targets; [`Error::Input`] for missing labels where gate or
    /// balance go by them, and [`Error::File`] for a `start` that does not fit.
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        let maps = Maps::new(on.model.checkpoint());
        self.validate(on.model.config().layers.len())?;
        self.check_labels(on)?;
        if !self.train_experts && self.start.is_none() {
            let expected =
                "the directory of a saved mixture: new experts add nothing, and a router over them learns nothing";
            return Err(Error::input("start, without `train_experts`", "none", expected));
        }
        if !self.blocks {
            self.lora().targets(&maps)?;
        }
        self.started().map(drop)
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        let maps = Maps::new(on.model.checkpoint());
        self.validate(on.model.config().layers.len())?;
        self.check_labels(on)?;
        let stored = self.started()?;
        let mixture = Arc::new(Mixture::install_with(self, set, &maps, on.model.device(), &stored)?);
        let experts = |name: &&String| name.ends_with(".lora_A") || name.ends_with(".lora_B");
        if let Some(dir) = &self.start
            && let Some(missing) = mixture.values.keys().filter(experts).find(|name| !stored.values.contains_key(*name))
        {
            let path = dir.join(super::MODEL_FILE);
            return Err(crate::array_file::malformed(&path, format!("tensor `{missing}`"), "none", "every expert"));
        }
        mixture.set_labels(on.labels.clone());
        let preservation = (self.preservation > 0.0).then(|| {
            let trained = set.bank().iter().map(|live| live.name().to_owned());
            let start = trained.filter(|name| experts(&name)).map(|name| (name.clone(), stored.values[&name].clone()));
            Preservation { coefficient: self.preservation, start: start.collect() }
        });
        let hooks = MixtureHooks { selection: KeepsSelection(mixture.clone()), preservation };
        let artifacts = Artifacts { mixture: Some(mixture), ..Artifacts::default() };
        Ok(Installed { hooks: Some(Box::new(hooks)), artifacts, ..Installed::default() })
    }
}

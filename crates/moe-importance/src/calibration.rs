//! Calibration: what to observe of a model on which data, kept where.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use moe_checkpoint::group::{Alone, Group};
use moe_checkpoint::{Provenance, Statistics, StatisticsStore, check_space};
use moe_core::data::{Dataset, Sequence, Wave, WaveOptions, shard};
use moe_core::{Engine, EngineOptions, Model, Precision};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::collect::Collecting;
use crate::collectors::{Collection, Collector, collectors_for};
use crate::finished_waves::{fold_stores, held_by};
use crate::progress::Progress;
use crate::statistics::{ROUTER_GRADIENT_SQUARES, StatisticId};
use crate::{Error, Result, Scorer};

/// One run of a model over data to see something of it: for scorers, for merging, for the start of adapters, for which
/// experts a task uses. What is seen is a [`Collector`]'s business, and becomes [`Statistics`]; this is the rest of the
/// work, done once: the store, resuming, shards, folding, and progress.
///
/// ```no_run
/// use moe_core::data::{Dataset, WaveOptions};
/// use moe_core::{Model, device::device};
/// use moe_importance::{Calibration, ScorerConfig};
///
/// # fn run(data: Dataset) -> Result<(), Box<dyn std::error::Error>> {
/// let model = Model::open("models/Qwen1.5-MoE-A2.7B", &device("default")?, None)?;
/// let scorer = serde_json::from_str::<ScorerConfig>(r#"{"type": "reap"}"#)?.build()?;
/// let statistics = Calibration::new(&model, &data, WaveOptions::default())
///     .statistics(scorer.needs().statistics)
///     .store("statistics") // a run that was killed goes on with the layer it was in
///     .run(&mut |at| eprintln!("{} of {} tokens", at.tokens_done, at.tokens))?;
/// scorer.score(&statistics, model.checkpoint().as_ref())?.save("reap.safetensors")?;
/// # Ok(())
/// # }
/// ```
///
/// A store that holds more statistics than are asked for serves as well: its waves are gone on with as they were begun,
/// and any scorer that reads some of them can be asked later.
pub struct Calibration<'a> {
    model: &'a Model,
    waves: Vec<Wave>,
    data: String,
    how: Value,
    statistics: BTreeSet<StatisticId>,
    collectors: Vec<Box<dyn Collector + 'a>>,
    store: Option<PathBuf>,
    absorb: Vec<PathBuf>,
    shard: Option<(usize, usize)>,
    group: &'a dyn Group,
}

/// What decides the numbers of a wave's file, besides model and data: the recipe of its [`Provenance`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CollectionRecipe {
    /// All statistics of a wave.
    statistics: BTreeSet<String>,
    /// How the data was cut into waves.
    data: Value,
    /// How products were computed.
    #[serde(default, skip_serializing_if = "Precision::is_f32")]
    precision: Precision,
    /// Parameters of collectors that have some.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    collectors: Vec<Value>,
}

/// The recipe that a [`Provenance`] of statistics carries, as one line of JSON: which statistics, and how the data was
/// cut into waves, since both decide what is in a wave's file. `data` is whatever describes the latter, such as
/// [`WaveOptions`].
///
/// # Errors
/// [`Error::UnknownStatistic`]; [`Error::InvalidField`] if `data` is not JSON.
pub fn recipe(ids: &[StatisticId], data: &impl Serialize) -> Result<String> {
    let data = serde_json::to_value(data).map_err(|error| Error::InvalidField {
        scorer: "recipe".into(),
        field: "data".into(),
        reason: error.to_string(),
    })?;
    let collectors = collectors_for(ids)?;
    Ok(recipe_of(collectors.iter().map(|collector| &**collector), data, Precision::F32))
}

fn recipe_of<'c>(
    collectors: impl Iterator<Item = &'c (dyn Collector + 'c)> + Clone,
    data: Value,
    precision: Precision,
) -> String {
    let ids = collectors.clone().flat_map(|c| c.statistics()).map(|spec| spec.id.to_string()).collect();
    let parameters = collectors.filter_map(|collector| collector.recipe()).collect();
    serde_json::json!(CollectionRecipe { statistics: ids, data, precision, collectors: parameters }).to_string()
}

impl<'a> Calibration<'a> {
    /// Of a model on a data set, cut into waves like this. Nothing is observed yet.
    pub fn new(model: &'a Model, data: &Dataset, how: WaveOptions) -> Self {
        let value = serde_json::to_value(how).unwrap_or(Value::Null);
        Self::with(model, data.waves(how), data.hash.clone(), value)
    }

    /// Of a model on waves that are there already. Their tokens stand for the data in the provenance.
    pub fn of_waves(model: &'a Model, waves: &[Wave]) -> Self {
        Self::with(model, waves.to_vec(), waves_hash(waves), Value::Null)
    }

    fn with(model: &'a Model, waves: Vec<Wave>, data: String, how: Value) -> Self {
        Self {
            model,
            waves,
            data,
            how,
            statistics: BTreeSet::new(),
            collectors: Vec::new(),
            store: None,
            absorb: Vec::new(),
            shard: None,
            group: &Alone,
        }
    }

    /// Observes these statistics of the crate as well.
    #[must_use]
    pub fn statistics(mut self, ids: impl IntoIterator<Item = StatisticId>) -> Self {
        self.statistics.extend(ids);
        self
    }

    /// Observes what these scorers need as well.
    #[must_use]
    pub fn scorers<'s>(self, scorers: impl IntoIterator<Item = &'s dyn Scorer>) -> Self {
        let ids: Vec<StatisticId> = scorers.into_iter().flat_map(|scorer| scorer.needs().statistics).collect();
        self.statistics(ids)
    }

    /// Observes what this collector sees as well.
    #[must_use]
    pub fn collector(mut self, collector: Box<dyn Collector + 'a>) -> Self {
        self.collectors.push(collector);
        self
    }

    /// Keeps every finished wave in this directory, and goes on with those that it has. What is needed to go on within
    /// a wave is there, too, as long as the wave is in progress: two tensors `[T, H]` for each layer that the backward
    /// sweep comes back to.
    #[must_use]
    pub fn store(mut self, directory: impl Into<PathBuf>) -> Self {
        self.store = Some(directory.into());
        self
    }

    /// Takes over the waves of the store of another run of the same job.
    #[must_use]
    pub fn absorb(mut self, directories: impl IntoIterator<Item = PathBuf>) -> Self {
        self.absorb.extend(directories);
        self
    }

    /// Runs only the waves `index`, `index + count`, …: one of `count` processes that share the work, each with a
    /// store.
    #[must_use]
    pub fn shard(mut self, index: usize, count: usize) -> Self {
        self.shard = Some((index, count));
        self
    }

    /// Shares the waves with the other ranks of a group, which all run the same calibration: in each round every rank
    /// runs one of the waves that no rank has in its store. Then each rank adds up its slice of the arrays over all
    /// waves, in their order, so that the bits are those of one process. [`Calibration::run`] gives all of it to every
    /// rank.
    ///
    /// A store may be one directory that all ranks see, or one on the disk of each. Stores to
    /// [absorb](Calibration::absorb) are taken over by rank 0. Progress is that of the whole group, and within a round
    /// that of the rank.
    #[must_use]
    pub fn group(mut self, group: &'a dyn Group) -> Self {
        self.group = group;
        self
    }

    /// Checks what config, files, memory and disk can show: that the statistics are known, that every wave fits into
    /// the model's memory, that the store is one of this calibration or of more, and that there is room for the waves
    /// that it lacks. Nothing is written.
    ///
    /// # Errors
    /// [`Error::UnknownStatistic`], [`Error::DuplicateStatistic`], [`Error::StoreLacks`], a store of another model,
    /// data or cut, a shard that is not below the number of shards, no waves, and [`moe_core::Error::Memory`].
    pub fn check(&self) -> Result<()> {
        let known = self.registered()?;
        let provenance = self.provenance(&known)?;
        let config = self.model.config();
        if let Some(width) = config.expert_latent
            && known.iter().flat_map(|c| c.statistics()).any(|spec| spec.id == ROUTER_GRADIENT_SQUARES)
        {
            return Err(crate::collectors::latent_router_rows(config.hidden_size, width));
        }
        let signals = self.collectors.iter().chain(&known).fold(moe_core::trace::Signals::NONE, |s, c| s | c.needs());
        if let Some(directory) = self.store.as_deref().filter(|directory| StatisticsStore::exists(directory)) {
            let store = StatisticsStore::open(directory)?;
            if self.larger(&store, &provenance)?.is_none() {
                provenance.expect(store.provenance(), &directory.display().to_string())?;
            }
        }
        let engine = Engine::new(self.model, self.options());
        for wave in self.own_waves()? {
            engine.plan(wave.tokens(), signals)?;
        }
        if let Some(directory) = &self.store {
            let existing = directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("."));
            check_space(existing, self.space()?)?;
        }
        Ok(())
    }

    /// Bytes that the statistics of the waves which the store lacks will take there.
    ///
    /// # Errors
    /// [`Error::UnknownStatistic`], a store that cannot be read, a shard that is not below the number of shards, and no
    /// waves.
    pub fn space(&self) -> Result<u64> {
        let Some(directory) = &self.store else { return Ok(0) };
        let mut left = self.own_waves()?;
        if StatisticsStore::exists(directory) {
            let store = StatisticsStore::open(directory)?;
            left.retain(|wave| !store.waves().contains(&wave.id));
        }
        let known = self.registered()?;
        let specs = self.collectors.iter().chain(&known).flat_map(|c| c.statistics());
        let values: usize = specs.map(|spec| spec.kind.values(self.shape())).sum();
        Ok((left.len() * values * 4) as u64)
    }

    /// Runs every wave that the store does not hold yet and folds. The result depends on model, data and what is
    /// observed alone, to the last bit: not on interruptions, shards, or there being a store.
    ///
    /// `progress` is called before the first wave, within waves as layers and experts are done, and after each.
    ///
    /// # Errors
    /// Those of [`Calibration::check`], before the model is run; then whatever stops the model or an observer, and
    /// files that cannot be written; and what stops another rank of the group, or is not the same there.
    pub fn run(self, progress: &mut dyn FnMut(&Progress)) -> Result<Statistics> {
        let group = self.group;
        group.agree(self.on_this_rank(progress))
    }

    fn on_this_rank(mut self, progress: &mut dyn FnMut(&Progress)) -> Result<Statistics> {
        self.check()?;
        let mut known = self.registered()?;
        let mut provenance = self.provenance(&known)?;
        let mut store = None;
        if let Some(directory) = &self.store {
            if StatisticsStore::exists(directory)
                && let Some(larger) = self.larger(&StatisticsStore::open(directory)?, &provenance)?
            {
                provenance = larger;
            }
            self.same_everywhere(&provenance)?;
            let mut opened = StatisticsStore::join(self.group, directory, self.shape(), &provenance)?;
            for other in self.absorb.iter().filter(|_| self.group.rank() == 0) {
                // A run that goes on has taken them over before.
                if !opened.holds(other)? {
                    opened.absorb(other)?;
                }
            }
            store = Some(opened);
        } else if let Some(other) = self.absorb.first() {
            let reason = format!("found {}, expected none: there is no store to take it into", other.display());
            return Err(Error::InvalidField { scorer: "calibration".into(), field: "absorb".into(), reason });
        } else {
            self.same_everywhere(&provenance)?;
        }
        let waves = self.own_waves()?;
        if let Some(store) = &store {
            let held = held_by(self.group, store)?;
            if waves.iter().all(|wave| held.contains_key(&wave.id)) {
                // What was collected may be more than this program knows how to collect.
                progress(&Progress::resumed(&waves));
                return fold_stores(self.group, store);
            }
            self.statistics.extend(statistics_of(&provenance).into_iter().map(StatisticId::from));
            known = self.registered()?;
        }
        let options = self.options();
        let shape = self.shape();
        self.collectors.append(&mut known);
        let mut collection = Collection::with_collectors(shape, provenance, self.collectors)?;
        let mut engine = Engine::new(self.model, options);
        let (runner, collection, group) = (&mut engine, &mut collection, self.group);
        Collecting { runner, collection, progress, within: true, group }.run(&waves, store.as_mut())
    }

    /// Whether all ranks of the group have the same to do: another model, data set or cut on one of them would give
    /// sums of everything and nothing.
    fn same_everywhere(&self, provenance: &Provenance) -> Result<()> {
        if self.group.size() == 1 {
            return Ok(());
        }
        let Provenance { model, data, recipe, .. } = provenance;
        let own = self.own_waves()?;
        for (what, value) in [("model", model), ("data", data), ("recipe", recipe), ("waves", &waves_hash(&own))] {
            self.group.same(what, value)?;
        }
        Ok(())
    }

    fn shape(&self) -> &'a moe_checkpoint::MoeShape {
        self.model.checkpoint().shape()
    }

    fn own_waves(&self) -> Result<Vec<Wave>> {
        let waves = match self.shard {
            None => self.waves.clone(),
            Some((index, count)) => shard(self.waves.clone(), index, count).map_err(moe_core::Error::from)?,
        };
        match waves.is_empty() {
            true => Err(Error::NoData { what: "calibration".into(), counted: "waves" }),
            false => Ok(waves),
        }
    }

    fn options(&self) -> EngineOptions {
        // A collector that sees the model through its adapters asks for no signal, but all of the model has to run.
        EngineOptions { loss: self.collectors.iter().any(|c| c.needs_forward()), ..EngineOptions::default() }
    }

    fn provides(&self, id: &StatisticId) -> bool {
        self.collectors.iter().flat_map(|c| c.statistics()).any(|spec| spec.id == *id)
    }

    /// The collectors of this crate for what no other provides.
    fn registered(&self) -> Result<Vec<Box<dyn Collector + 'a>>> {
        let ids: Vec<StatisticId> = self.statistics.iter().filter(|id| !self.provides(id)).cloned().collect();
        Ok(collectors_for(&ids)?.into_iter().map(|collector| collector as Box<dyn Collector + 'a>).collect())
    }

    fn provenance(&self, known: &[Box<dyn Collector + 'a>]) -> Result<Provenance> {
        let all = self.collectors.iter().chain(known);
        let mut seen = BTreeSet::new();
        if let Some(spec) = all.clone().flat_map(|c| c.statistics()).find(|spec| !seen.insert(spec.id.clone())) {
            return Err(Error::DuplicateStatistic { id: spec.id.to_string() });
        }
        let all = all.map(|collector| &**collector as &dyn Collector);
        let recipe = recipe_of(all, self.how.clone(), self.model.precision());
        Ok(Provenance::new(self.model.checkpoint().fingerprint(), self.data.clone(), recipe))
    }

    /// The provenance of a store of the same data that holds more than is asked for; none if it is this calibration's,
    /// or another in any other respect.
    fn larger(&self, store: &StatisticsStore, ours: &Provenance) -> Result<Option<Provenance>> {
        let theirs = store.provenance();
        if ours.recipe == theirs.recipe || (&ours.model, &ours.data) != (&theirs.model, &theirs.data) {
            return Ok(None);
        }
        let parse = |provenance: &Provenance| serde_json::from_str::<CollectionRecipe>(&provenance.recipe).ok();
        let (Some(wanted), Some(held)) = (parse(ours), parse(theirs)) else { return Ok(None) };
        if (&wanted.data, wanted.precision) != (&held.data, held.precision)
            || wanted.collectors.iter().any(|c| !held.collectors.contains(c))
        {
            return Ok(None);
        }
        let missing: Vec<&str> = wanted.statistics.difference(&held.statistics).map(String::as_str).collect();
        match missing.is_empty() {
            true => Ok(Some(theirs.clone())),
            false => Err(Error::StoreLacks {
                store: store.directory().to_path_buf(),
                missing: missing.join(", "),
                found: Vec::from_iter(held.statistics).join(", "),
            }),
        }
    }
}

impl std::fmt::Debug for Calibration<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let own = self.collectors.iter().flat_map(|c| c.statistics()).map(|spec| &spec.id);
        f.debug_struct("Calibration")
            .field("waves", &self.waves.len())
            .field("statistics", &self.statistics.iter().chain(own).collect::<Vec<_>>())
            .field("store", &self.store.as_deref().map(Path::display))
            .field("shard", &self.shard)
            .finish_non_exhaustive()
    }
}

fn statistics_of(provenance: &Provenance) -> BTreeSet<String> {
    serde_json::from_str::<CollectionRecipe>(&provenance.recipe).map(|recipe| recipe.statistics).unwrap_or_default()
}

/// A hash of the tokens of waves, 64 hex digits.
pub fn waves_hash(waves: &[Wave]) -> String {
    let mut hasher = blake3::Hasher::new();
    for Wave { id, sequences } in waves {
        hasher.update(&id.to_le_bytes());
        for Sequence { ids, .. } in sequences {
            hasher.update(&(ids.len() as u64).to_le_bytes());
            for id in ids {
                hasher.update(&id.to_le_bytes());
            }
        }
    }
    hasher.finalize().to_hex().to_string()
}

//! Both phases in a model: the warm-up, and the blocks.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use moe_core::{Model, adapters::Site, host, kernels::weight::Weight, train::Parameters};
use serde::{Deserialize, Serialize};

use super::{Warmup, sum_gradients};
use crate::{
    AdapterSet, Artifacts, Error, Installed, Live, Phase, Result, Setting, TrainingHooks, TuningMethod,
    model_weights::{Block, OwnBlocks, OwnEmbedding, OwnMatrix, OwnVector, OwnWeights, tied, vector_name},
    parked_values::OfCheckpoint,
    smt::{BlockScores, BlockSelection, Smt},
    trainable_tensors::{self, Place},
};

/// Sums the gradients of a warm-up, step by step. Cloning shares the sums.
#[derive(Clone, Debug)]
pub struct BlockWatch(Arc<Mutex<BlockScores>>);

impl BlockWatch {
    /// For the maps of a model.
    ///
    /// # Errors
    /// As [`Smt::validate`].
    pub fn new(smt: Smt, model: &Model) -> Result<Self> {
        let places = trainable_tensors::linear_maps(model.checkpoint());
        let vocabulary = trainable_tensors::vocabulary(model.checkpoint())?;
        Ok(Self(Arc::new(Mutex::new(BlockScores::new(smt, &places, vocabulary)?))))
    }

    /// The sums so far.
    pub fn scores(&self) -> BlockScores {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl TrainingHooks for BlockWatch {
    fn gradients(&mut self, _: usize, factor: f64, parameters: &mut Parameters) -> Result<BTreeMap<String, f64>> {
        let mut scores = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let sites: Vec<Site> = scores.sites().collect();
        for site in sites {
            let Some(parameter) = parameters.get(&site.path()) else { continue };
            let gradient = parameter.gradient();
            if !gradient.is_empty() {
                let scaled: Vec<f32> = gradient.iter().map(|g| (f64::from(*g) * factor) as f32).collect();
                scores.add(site, &scaled);
            }
        }
        Ok(BTreeMap::new())
    }

    fn state_save(&self) -> Result<moe_core::train::TaskState> {
        let scores = self.scores();
        let arrays = scores.arrays().map(|(site, sums)| {
            let array = moe_core::train::StateArray { shape: vec![sums.len()], values: sums.to_vec() };
            (site.path(), array)
        });
        Ok(moe_core::train::TaskState { json: serde_json::Value::Null, arrays: arrays.collect() })
    }

    fn state_load(&mut self, state: moe_core::train::TaskState, _: &AdapterSet, _: &mut Parameters) -> Result<()> {
        let mut scores = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        scores.restore(|site| state.arrays.get(&site.path()).map(|array| array.values.clone()))
    }
}

impl Smt {
    /// Puts the selected blocks into a set, where they are trained; everything else is frozen, at the values of the
    /// warm-up if `warmed` has them (as [`OwnWeights::full`] names them), else at those of the checkpoint.
    ///
    /// # Errors
    /// What keeps weights from being read; [`Error::Input`] for blocks that are not there.
    pub fn install_blocks(
        &self,
        model: &Model,
        selection: &BlockSelection,
        warmed: Option<Parameters>,
        set: &mut AdapterSet,
    ) -> Result<()> {
        let (checkpoint, device) = (model.checkpoint(), model.device());
        let mut warm: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        if let Some(mut warmed) = warmed {
            let names: Vec<String> = warmed.iter().map(|(name, _)| name.to_owned()).collect();
            for name in names {
                if let Some(parameter) = warmed.remove(&name) {
                    warm.insert(name, parameter.values);
                }
            }
        }
        for Place { site, dims } in trainable_tensors::linear_maps(checkpoint) {
            let own = warm.remove(&site.path());
            match (selection.get(&site), own) {
                (Some(blocks), own) => {
                    let name = blocks_name(site);
                    let matrix = match &own {
                        Some(values) => values.clone(),
                        None => trainable_tensors::read(checkpoint, site)?,
                    };
                    let base = own.map(|values| Weight::dense(host::from_vec(values, dims, device)));
                    let adapter = OwnBlocks::new(&name, dims, blocks.clone(), &matrix, base, device)?;
                    set.bank_mut().insert(adapter.live().clone())?;
                    set.add(site, Arc::new(adapter))?;
                }
                (None, Some(values)) => {
                    set.add_frozen(site, Arc::new(OwnMatrix(frozen(&site.path(), dims, values, device)?)))?
                }
                (None, None) => {}
            }
        }
        for vector in trainable_tensors::vectors(checkpoint) {
            let name = vector_name(vector.role);
            if let Some(values) = warm.remove(&name) {
                let live = frozen(&name, [1, vector.len], values, device)?;
                set.add_frozen_vector(vector.role, Arc::new(OwnVector(live)))?;
            }
        }
        attach_vocabulary(model, warm, set)?;
        checkpoint.release();
        Ok(())
    }

    /// What a warm-up of [`Warmup::FullFineTuning`] trains: all weights.
    pub fn warmup_weights(&self) -> OwnWeights {
        OwnWeights::full()
    }

    /// Steps of the warm-up and of the blocks in a training of so many.
    fn split(&self, steps: usize) -> (usize, usize) {
        let warmup = self.warmup_steps.min(steps.saturating_sub(1)).max(1);
        (warmup, steps.saturating_sub(warmup).max(1))
    }

    /// The blocks that a warm-up without updates selects. Kept in the directory, if there is one: on a large model they
    /// take long to find.
    fn found(&self, on: &Setting<'_>) -> Result<BlockSelection> {
        let places = trainable_tensors::linear_maps(on.model.checkpoint());
        let signature = self.signature(on)?;
        let path = on.directory.map(|directory| directory.join(SELECTION));
        if let Some(kept) = path.as_ref().and_then(|path| std::fs::read(path).ok())
            && let Ok(kept) = serde_json::from_slice::<Kept>(&kept)
            && kept.signature == signature
        {
            let sites: BTreeMap<String, Site> = places.iter().map(|place| (place.site.path(), place.site)).collect();
            let known = |(path, blocks): (String, Vec<[usize; 4]>)| {
                let block = |[a, b, c, d]: [usize; 4]| Block { rows: a..b, columns: c..d };
                Some((*sites.get(&path)?, blocks.into_iter().map(block).collect()))
            };
            return Ok(kept.blocks.into_iter().filter_map(known).collect());
        }
        let selection = sum_gradients(self, on, self.warmup_steps)?.select()?;
        if let Some(path) = path {
            let corners = |block: &Block| [block.rows.start, block.rows.end, block.columns.start, block.columns.end];
            let blocks = |(site, blocks): (&Site, &Vec<Block>)| (site.path(), blocks.iter().map(corners).collect());
            let kept = Kept { signature, blocks: selection.iter().map(blocks).collect() };
            moe_checkpoint::write_json(&path, &serde_json::json!(kept))?;
        }
        Ok(selection)
    }

    /// What a selection depends on.
    fn signature(&self, on: &Setting<'_>) -> Result<String> {
        let recipe =
            serde_json::json!({ "method": self, "router_losses": on.router_losses, "waves": on.waves_per_step });
        let mut hasher = blake3::Hasher::new();
        hasher.update(recipe.to_string().as_bytes()).update(on.model.checkpoint().fingerprint().as_bytes());
        for sequence in on.waves.iter().flat_map(|wave| &wave.sequences) {
            let counted = (0..sequence.ids.len()).map(|t| u32::from(sequence.counts(t)));
            let length = u32::try_from(sequence.ids.len()).unwrap_or(u32::MAX);
            for number in std::iter::once(length).chain(sequence.ids.iter().copied()).chain(counted) {
                hasher.update(&number.to_le_bytes());
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }
}

/// File of the blocks that a warm-up found.
const SELECTION: &str = "blocks.json";

/// Blocks by map, as first and last row and column.
#[derive(Serialize, Deserialize)]
struct Kept {
    signature: String,
    blocks: BTreeMap<String, Vec<[usize; 4]>>,
}

impl TuningMethod for Smt {
    /// # Errors
    /// As [`Smt::validate`]; [`Error::Input`] for a budget of fewer than one block.
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        self.validate()?;
        let checkpoint = on.model.checkpoint();
        let places = trainable_tensors::linear_maps(checkpoint);
        BlockScores::new(*self, &places, trainable_tensors::vocabulary(checkpoint)?)?.check_budget()
    }

    fn phases(&self, steps: usize) -> Vec<Phase> {
        let (warmup, blocks) = self.split(steps);
        let blocks_phase = |steps| Phase { name: "blocks", steps };
        match self.warmup {
            Warmup::GradientsOnly => vec![blocks_phase(steps)],
            Warmup::FullFineTuning => vec![Phase { name: "warm-up", steps: warmup }, blocks_phase(blocks)],
        }
    }

    /// All maps whose blocks may be chosen.
    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        if self.warmup == Warmup::FullFineTuning && on.phase == 0 {
            return self.warmup_weights().outline(on, set);
        }
        let checkpoint = on.model.checkpoint();
        let maps = trainable_tensors::linear_maps(checkpoint).into_iter();
        for Place { site, dims } in maps.filter(|map| self.targets(map.site) && !map.dims.contains(&0)) {
            let stored = Arc::new(OfCheckpoint::Map(checkpoint.clone(), site));
            let live = Live::of_base(blocks_name(site), dims, stored, on.model.device());
            set.bank_mut().insert(live.clone())?;
            set.add(site, Arc::new(OwnMatrix(live)))?;
        }
        Ok(Installed::default())
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        let (selection, warmed) = match (self.warmup, on.take_before()) {
            (Warmup::GradientsOnly, _) => (self.found(on)?, None),
            (Warmup::FullFineTuning, None) => {
                let installed = self.warmup_weights().install(on, set)?;
                let watch = BlockWatch::new(*self, on.model)?;
                let artifacts = Artifacts { blocks: Some(watch.clone()), ..Artifacts::default() };
                return Ok(Installed { hooks: Some(Box::new(watch)), artifacts, ..installed });
            }
            (Warmup::FullFineTuning, Some(before)) => {
                let watch = before.artifacts.blocks;
                let watch =
                    watch.ok_or_else(|| Error::input("the phase before blocks", "another", "the warm-up of SMT"))?;
                (watch.scores().select()?, Some(before.parameters))
            }
        };
        self.install_blocks(on.model, &selection, warmed, set)?;
        Ok(Installed::default())
    }
}

/// Name of the trained blocks of a map among the parameters.
fn blocks_name(site: Site) -> String {
    format!("{}.blocks", site.path())
}

fn frozen(name: &str, shape: [usize; 2], values: Vec<f32>, device: &burn::tensor::Device) -> Result<Arc<Live>> {
    let live = Live::new(name, shape, values, device)?;
    live.set_trained(false);
    Ok(live)
}

/// Embeddings and head at the values of the warm-up.
fn attach_vocabulary(model: &Model, mut warm: BTreeMap<String, Vec<f32>>, set: &mut AdapterSet) -> Result<()> {
    let hidden = model.config().hidden_size;
    let ranges: Vec<_> = model.head_rows().collect();
    let mut blocks = |prefix: &str| -> Result<Option<Vec<Arc<Live>>>> {
        let mut lives = Vec::new();
        for rows in &ranges {
            let name = format!("{prefix}.rows_{}_{}", rows.start, rows.end);
            let Some(values) = warm.remove(&name) else { return Ok(None) };
            lives.push(frozen(&name, [rows.len(), hidden], values, model.device())?);
        }
        Ok(Some(lives))
    };
    let embedding = blocks("embeddings")?;
    let tied = tied(model.checkpoint())?;
    let head = if tied { embedding.clone() } else { blocks("head")? };
    for (rows, live) in ranges.iter().zip(head.into_iter().flatten()) {
        set.add_head(rows.clone(), Arc::new(OwnMatrix(live)))?;
    }
    if let Some(blocks) = embedding {
        let rows = ranges.first().map_or(1, ExactSizeIterator::len);
        set.add_frozen_embedding(Arc::new(OwnEmbedding::new(blocks, rows, hidden)))?;
    }
    Ok(())
}

//! SMT: a warm-up of full fine-tuning that finds the blocks, and the training of the blocks.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use moe_core::{Model, adapters::Site, host, kernels::weight::Weight, train::Parameters};

use crate::{
    AdapterSet, Live, Result, TrainingHooks,
    model_weights::{OwnBlocks, OwnEmbedding, OwnMatrix, OwnVector, OwnWeights},
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
        Ok(Self(Arc::new(Mutex::new(BlockScores::new(smt, &trainable_tensors::linear_maps(model.checkpoint()))?))))
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
    /// Puts the selected blocks into a set, where they are trained; everything else is frozen, at the values of the warm-up if `warmed` has
    /// them (as [`OwnWeights::full`] names them), else at those of the checkpoint.
    ///
    /// # Errors
    /// What keeps weights from being read; [`Error::Input`](crate::Error::Input) for blocks that are not there.
    pub fn attach(
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
                    let name = format!("{}.blocks", site.path());
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
            let name = super::vector_name(vector.role);
            if let Some(values) = warm.remove(&name) {
                let live = frozen(&name, [1, vector.len], values, device)?;
                set.add_frozen_vector(vector.role, Arc::new(OwnVector(live)))?;
            }
        }
        attach_vocabulary(model, warm, set)?;
        checkpoint.release();
        Ok(())
    }

    /// What the warm-up trains: all weights.
    pub fn warmup_weights(&self) -> OwnWeights {
        OwnWeights::full()
    }
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
    let tied = super::tied(model.checkpoint())?;
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

//! Fixtures and helpers of the tests that read and write checkpoints.

#[allow(dead_code)]
#[path = "../../../moe-checkpoint/tests/common/checkpoints.rs"]
mod files;
#[allow(dead_code)]
#[path = "../../../moe-prune/tests/common/run.rs"]
pub mod run;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use files::every_checkpoint;
#[allow(unused_imports)]
pub use files::{contents, files, parity};
use moe_checkpoint::{
    Checkpoint, ExpertLayout, ExpertPart, ModelDescription, ModelSource, Mtp, ProtectionMask, RawMatrix, Step,
    TensorInfo, TensorSpec, WriteOptions, ragged_config, write,
};
use moe_merge::{
    Amount, Evidence, Features, Gram, LayerEvidence, MergeOptions, MergePlan, MergeReport, Metric, OutputForm, Recipe,
    Result, Similarity, TokenSample,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Numbers in [-1, 1).
pub fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// One checkpoint of every family, layout, dtype and routing, by name.
pub fn checkpoints() -> Vec<(String, Arc<Checkpoint>)> {
    let variants = ["_padded", "_sliding", "_linear", "_long", "_yarn", "_longrope", "_sharded", "_tanh"];
    let name = |dir: &PathBuf| {
        let names = dir.components().rev().take(2).map(|part| part.as_os_str().to_str().unwrap().to_string());
        names.collect::<Vec<_>>().join("-")
    };
    let all = every_checkpoint().into_iter().map(|dir| (name(&dir), dir));
    let some = all.filter(|(name, _)| !variants.iter().any(|variant| name.contains(variant)));
    // what becomes of further layers is a test of its own
    some.map(|(name, dir)| (name, open(dir))).filter(|(_, model)| model.mtp_tensors().next().is_none()).collect()
}

/// Evidence that no run of the model gave: every kind that recipes read, without a pattern.
pub fn evidence(model: &Checkpoint) -> Evidence {
    let shape = model.shape();
    let layers = shape.layers.iter().map(|layer| {
        let (experts, seed) = (layer.num_experts(), 100 * layer.layer as u64);
        let positive = |salt: u64| noise(experts, seed + salt).iter().map(|v| f64::from(v.abs()) + 0.01).collect();
        let sums: BTreeMap<String, Vec<f64>> = [
            "routing.tokens",
            "routing.weight",
            "routing.renormalized",
            "output.norm_applied",
            "output.norm_softmax",
            "output.norm_softmax_square",
        ]
        .iter()
        .enumerate()
        .map(|(salt, name)| (name.to_string(), positive(salt as u64)))
        .collect();
        let columns: Vec<f64> = noise(experts * 20, seed + 7).iter().map(|v| f64::from(*v)).collect();
        let (tokens, hidden, top_k) = (60, shape.hidden_size, shape.top_k);
        let selected = (0..tokens).flat_map(|t| (0..top_k).map(move |k| ((t * 5 + k) % experts) as u32));
        LayerEvidence {
            layer: layer.layer,
            tokens: tokens as u64,
            sums,
            logit_gram: Some(Gram::of_vectors(&columns, experts).values),
            outputs: BTreeMap::new(),
            sample: Some(TokenSample {
                inputs: noise(tokens * hidden, seed + 8),
                logits: noise(tokens * experts, seed + 9),
                selected: selected.collect(),
                weights: vec![1.0 / top_k as f32; tokens * top_k],
                hidden,
                experts,
                top_k,
            }),
        }
    });
    Evidence { model: model.fingerprint(), data: "noise".into(), layers: layers.collect() }
}

/// A recipe that needs no evidence but routed counts: usage, router rows, aligned averages, uniform.
pub fn plain(ratio: f64) -> Recipe {
    let mut recipe = Recipe::named("uncurl").unwrap().with_amount(Amount::Ratio(ratio));
    recipe.grouping = moe_merge::GroupingConfig::Dominant(moe_merge::Dominant {
        similarity: Similarity::of(Features::RouterRows, Metric::Cosine),
        capacity: None,
    });
    recipe.router = moe_merge::RouterConfig::Keep;
    recipe
}

/// The plan of a recipe on made-up evidence.
pub fn plan(recipe: &Recipe, model: &Checkpoint) -> MergePlan {
    recipe.plan(model, &evidence(model), &ProtectionMask::none()).unwrap()
}

/// Options that drop further layers where there are any.
pub fn options(form: OutputForm, model: &Checkpoint) -> MergeOptions {
    let mtp = model.mtp_tensors().next().map(|_| Mtp::Drop);
    MergeOptions { mtp, ..MergeOptions::new(form) }
}

/// Writes what a plan makes of a model.
pub fn written(plan: &MergePlan, base: &Arc<Checkpoint>, out: &Path, options: &MergeOptions) -> Result<MergeReport> {
    let merged = plan.on(base, options)?;
    write(merged.model(), out, &WriteOptions::default())?;
    Ok(merged.report().clone())
}

/// A checkpoint, open.
pub fn open(dir: impl AsRef<Path>) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(dir).unwrap())
}

/// Whether the weights are copied without being dequantized.
pub fn plain_bytes(model: &Checkpoint) -> bool {
    model.quantization().is_none()
}

/// A model whose experts have their first units only, `widths(layer, expert)` of them: what unit pruning leaves.
pub fn narrowed(base: &Arc<Checkpoint>, widths: impl Fn(usize, usize) -> usize) -> Arc<Checkpoint> {
    let of = |layer: usize, count: usize| (layer, (0..count).map(|expert| widths(layer, expert)).collect::<Vec<_>>());
    let widths: BTreeMap<usize, Vec<usize>> =
        base.shape().layers.iter().map(|layer| of(layer.layer, layer.num_experts())).collect();
    let mut description = ModelDescription::of(base);
    description.config = ragged_config(base.raw_config(), &widths, &Default::default()).unwrap();
    for (layer, widths) in &widths {
        let (hidden, moe) = (base.shape().hidden_size, base.config().moe(*layer).unwrap());
        let tensors = |layout: ExpertLayout, widths: &[usize]| layout.tensors(hidden, widths, moe.biases).unwrap();
        let name = |tensor| base.expert_tensor_name(*layer, tensor);
        let old = tensors(base.expert_layout(*layer).unwrap(), &moe.widths);
        let old: Vec<String> = old.into_iter().map(|tensor| name(tensor.tensor)).collect();
        description.tensors.retain(|spec| !old.contains(&spec.name));
        for tensor in tensors(ExpertLayout::Ragged, widths) {
            let part = tensor.blocks[0].1.parts()[0];
            let dtype = base.expert_dtype(*layer, 0, part).unwrap().unwrap();
            description.tensors.push(TensorSpec { name: name(tensor.tensor), dtype, shape: tensor.shape });
        }
    }
    Arc::new(Checkpoint::from_source(description, Arc::new(Narrowed { base: base.clone(), widths })).unwrap())
}

struct Narrowed {
    base: Arc<Checkpoint>,
    widths: BTreeMap<usize, Vec<usize>>,
}

impl ModelSource for Narrowed {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> moe_checkpoint::Result<Cow<'_, [u8]>> {
        self.base.tensor_bytes(&tensor.name, range)
    }

    fn makes_experts(&self, _layer: usize) -> bool {
        true
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> moe_checkpoint::Result<Option<RawMatrix<'_>>> {
        let Some(whole) = self.base.set_part(layer, set, part)? else { return Ok(None) };
        let (rows, cols) = part.dims(self.base.shape().hidden_size, self.widths[&layer][set]);
        let size = whole.element_bytes();
        let row = |row: usize| whole.row(row).unwrap()[..cols * size].to_vec();
        let bytes: Vec<u8> = (0..rows).flat_map(row).collect();
        Ok(Some(RawMatrix { bytes: bytes.into(), dtype: whole.dtype, rows, cols }))
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.base)
    }

    fn step(&self) -> Option<Step> {
        Some(Step::new("narrow", &self.base, serde_json::json!(self.widths), "experts of fewer units"))
    }
}

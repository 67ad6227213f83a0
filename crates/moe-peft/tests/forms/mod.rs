//! Models in forms that methods leave behind: experts that share weights, experts of different widths.

#![allow(dead_code, reason = "every test binary uses some of it")]

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use moe_checkpoint::{
    Checkpoint, ExpertLayout, ExpertPart, ModelDescription, ModelSource, RawMatrix, Result, TensorInfo, TensorSpec,
    grouped_config, ragged_config,
};

/// Every checkpoint with the numbers that transformers computes.
pub fn fixtures() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity");
    let list = |generation| std::fs::read_dir(root.join(generation)).unwrap().map(|entry| entry.unwrap().path());
    let mut all: Vec<PathBuf> = ["tf4", "tf5"].into_iter().flat_map(list).collect();
    all.sort();
    assert!(all.len() > 30);
    all
}

pub fn open(dir: impl AsRef<Path>) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(dir).unwrap())
}

/// Sets of weights that are sets of a base, as many units of them as are told.
struct Form {
    base: Arc<Checkpoint>,
    /// Set of the base and width of each set, by layer.
    sets: BTreeMap<usize, Vec<(usize, usize)>>,
}

/// The model whose experts `2 n` and `2 n + 1` share the weights of the former.
pub fn grouped(base: &Arc<Checkpoint>) -> Arc<Checkpoint> {
    form(base, true, |width, _| width)
}

/// The model whose experts have different widths, one of them none.
pub fn ragged(base: &Arc<Checkpoint>) -> Arc<Checkpoint> {
    form(base, false, narrower)
}

/// A checkpoint that is grouped and ragged.
pub fn grouped_ragged(base: &Arc<Checkpoint>) -> Arc<Checkpoint> {
    form(base, true, narrower)
}

fn narrower(width: usize, set: usize) -> usize {
    match set {
        1 => 0,
        other => width - other % 3,
    }
}

fn form(base: &Arc<Checkpoint>, grouped: bool, width: impl Fn(usize, usize) -> usize) -> Arc<Checkpoint> {
    let base = base.dequantized().unwrap();
    let mut description = ModelDescription::of(&base);
    let (mut sets, mut widths, mut shared) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut ragged = false;
    for layer in base.shape().layers.iter().map(|layer| layer.layer) {
        let moe = base.config().moe(layer).unwrap();
        let of = |expert: usize| if grouped { expert / 2 } else { expert };
        let count = of(moe.num_experts() - 1) + 1;
        let origin = |set: usize| if grouped { 2 * set } else { set };
        let own: Vec<(usize, usize)> =
            (0..count).map(|set| (origin(set), width(moe.widths[origin(set)], set))).collect();
        let of_experts: Vec<usize> = (0..moe.num_experts()).map(|expert| own[of(expert)].1).collect();
        ragged |= of_experts != moe.widths;
        widths.insert(layer, of_experts);
        shared.insert(layer, (0..moe.num_experts()).map(|expert| of(expert) as u32).collect::<Vec<u32>>());
        sets.insert(layer, own);
    }
    let hidden = base.config().expert_hidden_size();
    for (layer, own) in &sets {
        let moe = base.config().moe(*layer).unwrap();
        let before = base.expert_layout(*layer).unwrap();
        let after = if ragged { ExpertLayout::Ragged } else { before };
        let names = |layout: ExpertLayout, widths: &[usize]| {
            let tensors = layout.tensors(hidden, widths, moe.biases).unwrap();
            tensors.into_iter().map(|t| (base.expert_tensor_name(*layer, t.tensor), t)).collect::<Vec<_>>()
        };
        let old: BTreeSet<String> = names(before, &moe.stored_widths()).into_iter().map(|(name, _)| name).collect();
        description.tensors.retain(|spec| !old.contains(&spec.name));
        let new: Vec<usize> = own.iter().map(|(_, width)| *width).collect();
        for (name, tensor) in names(after, &new) {
            let (set, block) = tensor.blocks[0];
            let dtype = base.expert_dtype(*layer, own[set].0, block.parts()[0]).unwrap().unwrap();
            description.tensors.push(TensorSpec { name, dtype, shape: tensor.shape });
        }
    }
    if ragged {
        description.config = ragged_config(&description.config, &widths, &BTreeSet::new()).unwrap();
    }
    if grouped {
        description.config = grouped_config(&description.config, &shared).unwrap();
    }
    let source = Form { base, sets };
    Arc::new(Checkpoint::from_source(description, Arc::new(source)).unwrap())
}

impl ModelSource for Form {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        self.base.tensor_bytes(&tensor.name, range)
    }

    fn makes_experts(&self, _: usize) -> bool {
        true
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        let (origin, width) = self.sets[&layer][set];
        let Some(matrix) = self.base.set_part(layer, origin, part)? else { return Ok(None) };
        let (rows, cols) = part.dims(self.base.config().expert_hidden_size(), width);
        let size = matrix.element_bytes();
        let kept = (0..rows).flat_map(|row| matrix.row(row).unwrap()[..cols * size].to_vec()).collect();
        Ok(Some(RawMatrix { bytes: Cow::Owned(kept), dtype: matrix.dtype, rows, cols }))
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.base)
    }

    fn fingerprint(&self, model: &Checkpoint) -> String {
        format!("{}{}", self.base.fingerprint(), model.raw_config())
    }
}

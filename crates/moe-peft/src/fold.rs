//! Trained values in the weights of a model.

use std::{collections::BTreeMap, fmt, ops::Range, sync::Arc};

use burn::tensor::Device;
use moe_checkpoint::{Checkpoint, KeptQuantization, QuantizeOptions, Quantized, Role, Step, WeightFormat};
use moe_core::{
    Model,
    adapters::{Adapters, EmbeddingAdapter, LinearAdapter, Site, VectorAdapter},
    host,
    kernels::weight::Weight,
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    AdapterSet, Error, Result,
    model_weights::tied,
    parameter_bank::add_values,
    rewrite::{Layout, NewMatrix, NewRows, Rewrite, Rewritten},
    trainable_tensors,
};

pub use crate::rewrite::Changes;

/// What quantized weights become when adapters are folded into them. Weights without quantization stay in their dtype.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FoldPrecision {
    /// The whole model in BF16: the decoded weights with what was trained, rounded once.
    #[default]
    Bf16,
    /// The format of the base: matrices with new values are rounded to it again, all others keep their bytes. As small
    /// as the base; what was trained is rounded with the weight, so measure it.
    AsBase,
}

/// Name of the method in the record of a model.
pub const FOLD: &str = "fold";

/// A model with the adapters of a set folded in: each `w` is the [matrix](LinearAdapter::matrix) that it is with its
/// adapter, rounded to the dtype it is stored in.
///
/// Everything reads the [model](Folded::model) as it reads a directory: the engine evaluates the very bytes that
/// [`moe_checkpoint::write`] writes. Matrices are made one at a time when they are asked for; tensors that nothing
/// changed are those of the base, byte for byte. A quantized base becomes plain floats, or is
/// [rounded again](FoldPrecision::AsBase). Experts that share a set of
/// weights in a grouped checkpoint get sets of their own where they have adapters.
///
/// ```no_run
/// use std::sync::Arc;
/// use moe_checkpoint::{Checkpoint, WriteOptions, write};
/// use moe_peft::{AdapterSet, fold::Folded};
///
/// let base = Arc::new(Checkpoint::open("models/Qwen1.5-MoE-A2.7B")?);
/// let set = AdapterSet::new(); // with what was trained
/// let folded = Folded::on(&base, &set)?;
/// write(folded.model(), "out/tuned", &WriteOptions::default())?;
/// println!("{}", folded.changes()?);
/// # Ok::<(), moe_peft::Error>(())
/// ```
#[derive(Clone)]
pub struct Folded {
    rewritten: Rewritten,
    /// The same in the quantization of the base.
    requantized: Option<Arc<Checkpoint>>,
    beside: Option<Arc<AdapterSet>>,
    left_out: Vec<String>,
}

impl fmt::Debug for Folded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Folded").field("model", self.model()).field("left_out", &self.left_out).finish()
    }
}

/// What folding a set will do, as far as that can be told before it is trained.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FoldCheck {
    /// Bytes of the weights that will be written.
    pub bytes: u64,
    /// What somebody might not expect: weights that become plain floats, experts that get sets of their own, what no
    /// weight can hold.
    pub remarks: Vec<String>,
}

impl Folded {
    /// Folds `set` into `base`. The values must be [settled](crate::Bank::settle), and stay so as long as the model is
    /// used.
    ///
    /// # Errors
    /// Those of [`Folded::check`], and [`Error::Input`] for values that an optimizer has. Later, of reading the model:
    /// [`moe_checkpoint::Error::Method`] for values that were handed to an optimizer in the meantime, and for numbers
    /// that are not finite or too large for the dtype they are stored in, naming the tensor.
    pub fn on(base: &Arc<Checkpoint>, set: &AdapterSet) -> Result<Self> {
        let plain = base.dequantized()?;
        foldable(&plain, set)?;
        if let Some(live) = set.bank().unsettled() {
            return Err(Error::input(format!("values of {}", live.name()), "with an optimizer", "settled ones"));
        }
        let left_out = left_out(set);
        let digest = digest(set, [plain.config().vocab_size, plain.config().hidden_size]);
        let maps: Vec<String> = set.sites().map(|(site, _)| site.path()).collect();
        let summary = format!("what was trained is part of the weights: {} linear maps", maps.len());
        let recipe = json!({"values": digest, "maps": maps, "left_out": left_out});
        let rewrite = rewrite(&plain, set)?;
        let rewritten = rewrite.on(&plain, |_| Step::new(FOLD, &plain, recipe, summary))?;
        Ok(Self { rewritten, requantized: None, beside: set.beside_weights().map(Arc::new), left_out })
    }

    /// The same, with quantized weights in this precision.
    ///
    /// # Errors
    /// As [`Folded::on`]; [`moe_checkpoint::Error::Quantize`] for [`FoldPrecision::AsBase`] on a format that is read
    /// only.
    pub fn in_precision(base: &Arc<Checkpoint>, set: &AdapterSet, precision: FoldPrecision) -> Result<Self> {
        let folded = Self::on(base, set)?;
        if precision == FoldPrecision::Bf16 || base.quantization().is_none() {
            return Ok(folded);
        }
        let names = folded.rewritten.tensors();
        let kept = KeptQuantization::requantized(folded.rewritten.model(), base, &names)?;
        Ok(Self { requantized: Some(kept.model), ..folded })
    }

    /// The same with its routed experts packed in the format that they were trained in.
    ///
    /// # Errors
    /// [`moe_checkpoint::Error::Quantize`] for widths that the format cannot divide.
    pub fn packed(self, format: &WeightFormat) -> Result<Self> {
        let quantized = Quantized::on(self.rewritten.model(), &QuantizeOptions::new(format.clone()))?;
        Ok(Self { requantized: Some(quantized.model().clone()), ..self })
    }

    /// Whether a set can be folded into `base`, before it is trained: its values are not read.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an adapter that depends on its input, for a block adapter, and for a head that is
    /// trained apart from the embeddings it is tied to; [`Error::Input`] for adapters that do not fit the model; those
    /// of reading headers.
    pub fn check(base: &Arc<Checkpoint>, set: &AdapterSet) -> Result<FoldCheck> {
        Self::check_in_precision(base, set, FoldPrecision::Bf16)
    }

    /// The same, with quantized weights in this precision.
    ///
    /// # Errors
    /// As [`Folded::check`]; [`moe_checkpoint::Error::Quantize`] for [`FoldPrecision::AsBase`] on a format that is read
    /// only.
    pub fn check_in_precision(base: &Arc<Checkpoint>, set: &AdapterSet, precision: FoldPrecision) -> Result<FoldCheck> {
        let plain = base.dequantized()?;
        foldable(&plain, set)?;
        let rewrite = rewrite(&plain, set)?;
        let layout = Layout::new(&plain, &rewrite)?;
        let mut remarks = Vec::new();
        let mut bytes = layout.bytes();
        match (base.quantization(), precision) {
            (Some(quantization), FoldPrecision::Bf16) => {
                remarks.push(format!("the weights, quantized as {quantization}, will be written as BF16"));
            }
            (Some(quantization), FoldPrecision::AsBase) => {
                let names = layout.tensors().into_iter().chain(rewrite.tensors.keys().cloned()).collect();
                KeptQuantization::requantized(&plain, base, &names)?;
                bytes = base.bytes_on_disk();
                remarks.push(format!("weights with new values will be rounded again, as {quantization}"));
            }
            (None, _) => {}
        }
        if !layout.ungrouped.is_empty() {
            let [before, after] =
                layout.ungrouped.values().fold([0, 0], |sum, sets| [sum[0] + sets[0], sum[1] + sets[1]]);
            remarks.push(format!(
                "experts of {} layers share sets of weights and are trained one by one: {after} sets will be written in place \
                 of {before}, {} in place of {}",
                layout.ungrouped.len(),
                moe_checkpoint::human::size(layout.bytes()),
                moe_checkpoint::human::size(base.bytes_on_disk()),
            ));
        }
        remarks.extend(
            left_out(set).into_iter().map(|what| format!("{what}: no weight can hold it, it stays beside the model")),
        );
        Ok(FoldCheck { bytes, remarks })
    }

    /// The model with what was trained.
    pub fn model(&self) -> &Arc<Checkpoint> {
        self.requantized.as_ref().unwrap_or(self.rewritten.model())
    }

    /// The model as it is written, to be run, with what [no weight holds](Changes::left_out) beside it.
    ///
    /// # Errors
    /// Those of [`Model::new`].
    pub fn run(&self, device: &Device, max_memory: Option<u64>) -> Result<Model> {
        let model = Model::new(self.model().clone(), device, max_memory)?;
        match &self.beside {
            Some(set) => Ok(model.with_adapters(set.clone())?),
            None => Ok(model),
        }
    }

    /// Which tensors have other values than those of the base, which maps are rounded to what they were, and what was
    /// left out. Makes all new values to compare them.
    ///
    /// # Errors
    /// Those of reading the model.
    pub fn changes(&self) -> Result<Changes> {
        Ok(Changes { left_out: self.left_out.clone(), ..self.rewritten.changes()? })
    }
}

/// Refuses what no weights can be.
fn foldable(base: &Checkpoint, set: &AdapterSet) -> Result<()> {
    let input = |place: String| {
        Err(Error::Unsupported(format!(
            "folding the adapter of {place}: it depends on its input, or adds to its output"
        )))
    };
    if let Some((site, _)) = set.sites().find(|(_, adapter)| !adapter.is_linear()) {
        return input(site.to_string());
    }
    if let Some((rows, _)) = set.heads().find(|(_, adapter)| !adapter.is_linear()) {
        return input(format!("rows {rows:?} of the output head"));
    }
    if let Some(layer) = set.first_block() {
        let what = format!("folding the adapter of the block of layer {layer}: it decides by its input");
        return Err(Error::Unsupported(what));
    }
    if set.embedding().is_some() && !set.has_head() && tied(base)? {
        let what = "folding an adapter of the embeddings into the output head, which is the same tensor and has none";
        return Err(Error::Unsupported(what.into()));
    }
    if set.has_head() && set.embedding().is_none() && tied(base)? {
        let what = "folding an adapter of the output head into the embeddings, which are the same tensor and have none";
        return Err(Error::Unsupported(what.into()));
    }
    Ok(())
}

/// What of a set is no weight.
fn left_out(set: &AdapterSet) -> Vec<String> {
    set.modulated_layers().map(|layer| format!("factors on the experts of layer {layer}")).collect()
}

/// A hash of everything that the new values follow from besides the base.
fn digest(set: &AdapterSet, [vocabulary, hidden]: [usize; 2]) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut add = |bytes: &[u8]| {
        hasher.update(bytes);
    };
    let name = |name: &str, add: &mut dyn FnMut(&[u8])| {
        add(&(name.len() as u64).to_le_bytes());
        add(name.as_bytes());
    };
    for (site, adapter) in set.sites() {
        name(&site.path(), &mut add);
        adapter.digest(&mut add);
    }
    for (rows, adapter) in set.heads() {
        name(&format!("head {rows:?}"), &mut add);
        adapter.digest(&mut add);
    }
    for (role, adapter) in set.vectors() {
        name(&format!("{role}"), &mut add);
        add_values(&host::into_vec(adapter.value()), &mut add);
    }
    if let Some(embedding) = set.embedding() {
        name("embeddings", &mut add);
        let ids: Vec<u32> = (0..vocabulary as u32).collect();
        let nothing = |ids: &[u32]| if embedding.replaces() { Vec::new() } else { vec![0.0; ids.len() * hidden] };
        ids.chunks(1024).for_each(|ids| add_values(&embedding.rows(ids, &nothing(ids)), &mut add));
    }
    hasher.finalize().to_hex().to_string()
}

fn rewrite(base: &Checkpoint, set: &AdapterSet) -> Result<Rewrite> {
    let device = set.bank().iter().next().map(|live| live.device().clone()).unwrap_or_default();
    let mut maps: BTreeMap<Site, Box<dyn NewMatrix>> = BTreeMap::new();
    for (site, adapter) in set.sites() {
        let what = site.to_string();
        maps.insert(*site, Box::new(Trained { what, adapter: adapter.clone(), device: device.clone() }));
    }
    let mut tensors: BTreeMap<String, Box<dyn NewRows>> = BTreeMap::new();
    let mut left: BTreeMap<Role, Arc<dyn VectorAdapter>> =
        set.vectors().map(|(role, adapter)| (*role, adapter.clone())).collect();
    for place in trainable_tensors::vectors(base) {
        if let Some(adapter) = left.remove(&place.role) {
            let vector = Vector { role: place.role, adapter };
            tensors.insert(base.role(place.role)?.name.clone(), Box::new(vector));
        }
    }
    if let Some(role) = left.keys().next() {
        return Err(Error::input("a trained vector", role, "a vector of the model"));
    }
    if let Some(embedding) = set.embedding() {
        tensors.insert(base.role(Role::Embedding)?.name.clone(), Box::new(Embeddings(embedding)));
    }
    if set.has_head() && !tied(base)? {
        let blocks = set.heads().map(|(rows, adapter)| (rows, adapter.clone())).collect();
        tensors.insert(base.role(Role::LmHead)?.name.clone(), Box::new(Head { blocks, device }));
    }
    let bank = set.bank().clone();
    let handed_over = bank.handed_over();
    let unchanged = move || match bank.handed_over() == handed_over {
        true => Ok(()),
        false => Err(Error::input("values that were folded", "values an optimizer had since", "the same values")),
    };
    Ok(Rewrite { maps, tensors, unchanged: Box::new(unchanged) })
}

/// The matrix that a map is with its adapter.
struct Trained {
    what: String,
    adapter: Arc<dyn LinearAdapter>,
    device: Device,
}

impl NewMatrix for Trained {
    fn dims(&self) -> [usize; 2] {
        self.adapter.dims()
    }

    fn replaces(&self) -> bool {
        self.adapter.replaces()
    }

    fn matrix(&self, old: &[f32]) -> Result<Vec<f32>> {
        matrix_of(&*self.adapter, old, &self.what, &self.device)
    }
}

fn matrix_of(adapter: &dyn LinearAdapter, old: &[f32], what: &str, device: &Device) -> Result<Vec<f32>> {
    let shape = if old.is_empty() { [0, 0] } else { adapter.dims() };
    let base = Weight::dense(host::from_vec(old.to_vec(), shape, device));
    let matrix = adapter.matrix(&base).map(host::into_vec);
    matrix.ok_or_else(|| Error::Unsupported(format!("folding the adapter of {what}: it depends on its input")))
}

struct Vector {
    role: Role,
    adapter: Arc<dyn VectorAdapter>,
}

impl NewRows for Vector {
    fn what(&self) -> String {
        self.role.to_string()
    }

    fn rows(&self, rows: Range<usize>, _: &Checkpoint) -> Result<Vec<f32>> {
        let values = host::into_vec(self.adapter.value());
        let length =
            || Error::input(format!("new values of {}", self.role), values.len(), format!("at least {}", rows.end));
        Ok(values.get(rows.clone()).ok_or_else(length)?.to_vec())
    }
}

struct Embeddings(Arc<dyn EmbeddingAdapter>);

impl NewRows for Embeddings {
    fn what(&self) -> String {
        "embeddings".into()
    }

    fn rows(&self, rows: Range<usize>, base: &Checkpoint) -> Result<Vec<f32>> {
        let old = match self.0.replaces() {
            true => Vec::new(),
            false => base.read_f32_rows(Role::Embedding, rows.clone())?,
        };
        Ok(self.0.rows(&rows.map(|row| row as u32).collect::<Vec<_>>(), &old))
    }
}

/// Blocks of rows of the head; rows of no block stay as they are.
struct Head {
    blocks: Vec<(Range<usize>, Arc<dyn LinearAdapter>)>,
    device: Device,
}

impl NewRows for Head {
    fn what(&self) -> String {
        "the output head".into()
    }

    fn rows(&self, rows: Range<usize>, base: &Checkpoint) -> Result<Vec<f32>> {
        let columns = base.config().hidden_size;
        let mut values = base.read_f32_rows(Role::LmHead, rows.clone())?;
        for (block, adapter) in &self.blocks {
            let both = block.start.max(rows.start)..block.end.min(rows.end);
            if both.is_empty() {
                continue;
            }
            let old = if adapter.replaces() { Vec::new() } else { base.read_f32_rows(Role::LmHead, block.clone())? };
            let matrix = matrix_of(&**adapter, &old, "the output head", &self.device)?;
            let part = (both.start - block.start) * columns..(both.end - block.start) * columns;
            let new = matrix.get(part).ok_or_else(|| {
                let found = format!("{:?}", adapter.dims());
                Error::input("shape of the adapter of the output head", found, format!("{} x {columns}", block.len()))
            })?;
            let own = &mut values[(both.start - rows.start) * columns..(both.end - rows.start) * columns];
            // What is as it was stays so to the bit, signs of zeros included.
            own.iter_mut()
                .zip(new)
                .filter(|(old, new)| adapter.replaces() || old != new)
                .for_each(|(old, new)| *old = *new);
        }
        Ok(values)
    }
}

//! Reading a directory.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use moe_checkpoint::{Dtype, ExpertMatrix, MatrixId, RawMatrix, Role};
use safetensors::SafeTensors;

use super::{
    CONFIG_FILE, MODEL_FILE, PREFIX,
    config::AdapterConfig,
    fused::{FusedExperts, FusedLayout, deinterleave},
    write::transposed,
};
use crate::{
    Error, Result,
    lora::{Compiled, LoraWeights, LowRank, Maps, Naming, Start, ends_with},
};

/// How a directory is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadOptions {
    /// The model is what the weights kept when the adapter was begun with PiSSA, OLoRA or the like. Otherwise such
    /// files are refused, since the adapter alone does not tell what was taken.
    pub on_residual: bool,
}

/// The tensors of one module.
#[derive(Debug, Default)]
struct Module {
    a: Option<Values>,
    b: Option<Values>,
    bias: Option<Values>,
    magnitude: Option<Values>,
}

/// What a file has.
#[derive(Debug, Default)]
struct Contents {
    modules: BTreeMap<String, Module>,
    /// Additions to embeddings, `A [r, V]` and `B [H, r]`.
    embeddings: BTreeMap<String, Module>,
    whole: BTreeMap<Role, Vec<f32>>,
    /// Trained rows of the embeddings `[n, H]`.
    tokens: Option<Values>,
}

#[derive(Clone, Debug)]
struct Values {
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// Reads the adapter in `dir` for the model of `maps`.
///
/// # Errors
/// [`Error::Io`] and [`Error::File`] for files that are missing or malformed; those of [`AdapterConfig::load`]; for a
/// tensor that belongs to nothing in the model, and one whose shape does not fit, [`Error::File`] with its name.
pub fn read(dir: impl AsRef<Path>, maps: &Maps<'_>, options: ReadOptions) -> Result<LoraWeights> {
    let dir = dir.as_ref();
    let config_path = dir.join(CONFIG_FILE);
    let config = AdapterConfig::load(&config_path)?;
    if let Some(init) = config.residual().filter(|_| !options.on_residual) {
        return Err(Error::File {
            path: config_path,
            what: "init_lora_weights".into(),
            found: format!("\"{init}\", which takes a part of the base weights"),
            expected: "the adapter as it began, too, which PEFT saves before the first step \
                       (`path_initial_model_for_weight_conversion`): what the weights gave up follows from it alone, since decomposing \
                       them again gives other vectors. `moe adapter convert` makes a plain adapter of both (`--initial DIR`); or say that \
                       the model is what the weights kept"
                .into(),
        });
    }
    let reader = Reader { dir, maps, config: &config, path: dir.join(MODEL_FILE) };
    let Contents { modules, embeddings, whole, tokens } = reader.contents()?;
    let of_experts = |path: &String| {
        maps.find_expert_matrix(path).is_some() || maps.find_experts(path.trim_end_matches(".base_layer")).is_some()
    };
    let fused = modules.keys().any(of_experts);
    let naming = if fused { Naming::Fused } else { Naming::PerExpert };
    let mut found = reader.maps(modules)?;
    reader.embeddings(embeddings, &mut found)?;
    let tokens = reader.tokens(tokens)?;
    let (dropout, config) = (config.lora_dropout, config.lora(naming));
    let weights = LoraWeights { maps: found, whole, tokens, dropout, config };
    weights.check(maps)?;
    Ok(weights)
}

/// Reads an adapter that began as a part of the weights (PiSSA, OLoRA, CorDA, ..) together with the adapter as it
/// began, `initial`, which PEFT saves before training: as additions to the weights as they are.
/// [Written](super::write()), it is the plain adapter of twice the rank that PEFT's
/// `path_initial_model_for_weight_conversion` gives.
///
/// # Errors
/// Those of [`read`]; [`Error::File`] for an initial adapter of other maps or ranks.
pub fn read_converted(dir: impl AsRef<Path>, initial: impl AsRef<Path>, maps: &Maps<'_>) -> Result<LoraWeights> {
    let on_residual = ReadOptions { on_residual: true };
    let (mut weights, first) = (read(dir, maps, on_residual)?, read(initial.as_ref(), maps, on_residual)?);
    let error = |what: String, found: String, expected: String| Error::File {
        path: initial.as_ref().join(MODEL_FILE),
        what,
        found,
        expected,
    };
    if weights.maps.keys().ne(first.maps.keys()) {
        let missing = weights.maps.keys().find(|map| !first.maps.contains_key(map));
        let what = missing.or_else(|| first.maps.keys().find(|map| !weights.maps.contains_key(map)));
        let what = what.map_or_else(|| "maps".to_string(), |map| format!("addition to {map}"));
        return Err(error(what, "only one of both adapters has it".into(), "the adapter as it began".into()));
    }
    for ((map, low), first) in weights.maps.iter_mut().zip(first.maps.into_values()) {
        if low.rank != first.rank || (low.scale() - first.scale()).abs() > 1e-9 * low.scale().abs() {
            let of = |low: &LowRank| format!("rank {}, which counts {}", low.rank, low.scale());
            return Err(error(format!("addition to {map}"), of(&first), of(low)));
        }
        low.start = Some(Start { a: first.a, b: first.b, rank: first.rank });
    }
    Ok(weights)
}

struct Reader<'a> {
    dir: &'a Path,
    maps: &'a Maps<'a>,
    config: &'a AdapterConfig,
    path: std::path::PathBuf,
}

impl Reader<'_> {
    fn error(&self, what: impl ToString, found: impl ToString, expected: impl ToString) -> Error {
        Error::File {
            path: self.path.clone(),
            what: what.to_string(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }

    /// Tensors by what they are.
    fn contents(&self) -> Result<Contents> {
        if !self.path.exists() && self.dir.join("adapter_model.bin").exists() {
            let path = self.dir.join("adapter_model.bin");
            return Err(Error::Unsupported(format!("{}: a pickle; save it as {MODEL_FILE}", path.display())));
        }
        let bytes = std::fs::read(&self.path).map_err(|source| Error::Io { path: self.path.clone(), source })?;
        let file =
            SafeTensors::deserialize(&bytes).map_err(|error| self.error("contents", error, "a safetensors file"))?;
        let mut contents = Contents::default();
        for (name, view) in file.tensors() {
            let inner = name.strip_prefix(PREFIX).unwrap_or(&name);
            if view.shape().contains(&0) {
                return Err(self.error(
                    format!("tensor `{name}`"),
                    format!("an empty tensor of shape {:?}", view.shape()),
                    "its numbers: DeepSpeed ZeRO-3 saves empty tensors unless weights are gathered first \
                     (`stage3_gather_16bit_weights_on_model_save`, or zero_to_fp32.py over the checkpoint)",
                ));
            }
            if !matches!(view.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                return Err(self.error(format!("tensor `{name}`"), view.dtype().to_string(), "F32, F16 or BF16"));
            }
            let matrix = RawMatrix {
                bytes: view.data().into(),
                dtype: view.dtype(),
                rows: view.shape().iter().product(),
                cols: 1,
            };
            let values = Values { shape: view.shape().to_vec(), values: matrix.to_f32() };
            if values.values.iter().any(|value| !value.is_finite()) {
                return Err(self.error(format!("tensor `{name}`"), "a number that is not finite", "finite numbers"));
            }
            let Some((path, kind)) = split(inner) else {
                self.whole(&name, inner, values, &mut contents.whole)?;
                continue;
            };
            let modules = match kind {
                Kind::EmbeddingA | Kind::EmbeddingB => &mut contents.embeddings,
                _ => &mut contents.modules,
            };
            let slot = match kind {
                Kind::Tokens => &mut contents.tokens,
                kind => {
                    let module = modules.entry(path.to_string()).or_default();
                    match kind {
                        Kind::A | Kind::EmbeddingA => &mut module.a,
                        Kind::B | Kind::EmbeddingB => &mut module.b,
                        Kind::Bias => &mut module.bias,
                        _ => &mut module.magnitude,
                    }
                }
            };
            if slot.replace(values).is_some() {
                return Err(self.error(format!("tensor `{name}`"), "a second one for its module", "one adapter"));
            }
        }
        let Contents { modules, embeddings, whole, tokens } = &contents;
        if modules.is_empty() && embeddings.is_empty() && whole.is_empty() && tokens.is_none() {
            return Err(self.error("tensors", "none", "those of a LoRA"));
        }
        Ok(contents)
    }

    /// A tensor of the model itself: one saved whole, or what PEFT saves of embeddings beside an addition to them.
    fn whole(&self, name: &str, inner: &str, values: Values, into: &mut BTreeMap<Role, Vec<f32>>) -> Result<()> {
        let beside = inner.contains(".base_layer.");
        let mut plain = inner.replace(".base_layer.", ".");
        if let Some((path, rest)) = plain.split_once(".modules_to_save.") {
            // with the name of the adapter, as files before PEFT 0.8 may have it
            let last = rest.rsplit_once('.').map_or(rest, |(_, last)| last);
            plain = format!("{path}.{last}");
        }
        let Some(role) = self.maps.find_tensor(&plain) else {
            let expected = "lora_A, lora_B, lora_magnitude_vector, or a tensor of the model outside its experts";
            return Err(self.error(format!("tensor `{name}`"), "no part of a LoRA for this model", expected));
        };
        let shape = &self.maps.checkpoint().plain_role(role)?.shape;
        if values.shape != *shape {
            let found = format!("{:?}", values.shape);
            return Err(self.error(format!("shape of tensor `{name}`"), found, format!("{shape:?}, as in the model")));
        }
        if beside && matches!(role, Role::Embedding | Role::LmHead) {
            let base = self.maps.checkpoint().read_f32(role)?;
            // Copies may be rounded to another dtype.
            let near = |(a, b): (&f32, &f32)| (a - b).abs() <= b.abs() / 128.0 + 1e-6;
            return match values.values.iter().zip(&base).all(near) {
                true => Ok(()),
                false => {
                    let expected = "those of the model, to which the addition belongs";
                    Err(self.error(format!("tensor `{name}`"), "other values than the model's", expected))
                }
            };
        }
        match into.insert(role, values.values) {
            None => Ok(()),
            Some(_) => Err(self.error(format!("tensor `{name}`"), "a second one", "one adapter")),
        }
    }

    /// Additions to embeddings: `A [r, V]` and `B [H, r]`, the other way around than beside linear maps.
    fn embeddings(&self, modules: BTreeMap<String, Module>, found: &mut BTreeMap<MatrixId, LowRank>) -> Result<()> {
        let ranks = Compiled::new("rank_pattern", self.config.rank_pattern.as_ref().unwrap_or(&Default::default()))?;
        let alphas = Compiled::new("alpha_pattern", self.config.alpha_pattern.as_ref().unwrap_or(&Default::default()))?;
        for (path, module) in modules {
            let what = format!("tensors of `{path}`");
            if self.maps.find(&path) != Some(MatrixId::Embedding) {
                return Err(self.error(what, "no embeddings of the model", "those of its tokens"));
            }
            let [vocabulary, hidden] = self.maps.dims(MatrixId::Embedding).unwrap_or_default();
            let (a, b, rank) = self.pair(&path, &module, 1)?;
            self.shapes(&path, &module, [rank, vocabulary], [hidden, rank])?;
            self.rank(&path, rank, ranks.find(&path).unwrap_or(self.config.r))?;
            let alpha = alphas.find(&path).unwrap_or(self.config.lora_alpha);
            let low = LowRank::new(transposed(&b, rank), transposed(&a, vocabulary), rank, alpha);
            found.insert(MatrixId::Embedding, LowRank { rslora: self.config.use_rslora.unwrap_or(false), ..low });
        }
        Ok(())
    }

    /// Trained rows of the embeddings, by token.
    fn tokens(&self, rows: Option<Values>) -> Result<BTreeMap<u32, Vec<f32>>> {
        let indices = self.config.trainable_token_indices.clone().unwrap_or_default();
        let hidden = self.maps.checkpoint().config().hidden_size;
        let shape = rows.as_ref().map_or_else(|| vec![0, hidden], |rows| rows.shape.clone());
        if shape != [indices.len(), hidden] {
            let expected = format!("[{}, {hidden}], a row for each of `trainable_token_indices`", indices.len());
            return Err(self.error("trained rows of the embeddings", format!("{shape:?}"), expected));
        }
        let values = rows.map(|rows| rows.values).unwrap_or_default();
        // PEFT keeps them in the order of the list.
        Ok(indices.into_iter().zip(values.chunks_exact(hidden.max(1)).map(<[f32]>::to_vec)).collect())
    }

    fn maps(&self, modules: BTreeMap<String, Module>) -> Result<BTreeMap<MatrixId, LowRank>> {
        let ranks = Compiled::new("rank_pattern", self.config.rank_pattern.as_ref().unwrap_or(&Default::default()))?;
        let alphas = Compiled::new("alpha_pattern", self.config.alpha_pattern.as_ref().unwrap_or(&Default::default()))?;
        let share = |path: &str| {
            (ranks.find(path).unwrap_or(self.config.r), alphas.find(path).unwrap_or(self.config.lora_alpha))
        };
        let mut found = BTreeMap::new();
        // modules of fused experts: layer, and what is nested, the outermost first
        let mut experts: BTreeMap<usize, BTreeMap<usize, (String, Module)>> = BTreeMap::new();
        for (path, module) in modules {
            let outer = path.trim_end_matches(".base_layer");
            if let Some(layer) = self.maps.find_experts(outer) {
                let depth = (path.len() - outer.len()) / ".base_layer".len();
                experts.entry(layer).or_default().insert(depth, (path, module));
                continue;
            }
            if let Some((layer, part)) = self.maps.find_expert_matrix(&path) {
                self.one_width(layer, &path)?;
                self.fused_part(layer, part, (path, module), &share, &mut found)?;
                continue;
            }
            let Some(map) = self.maps.find(&path) else {
                let expected = "a module of the model; the adapter is of another one";
                return Err(self.error(format!("tensors of `{path}`"), "no such map in the model", expected));
            };
            let dims = self.maps.dims(map).unwrap_or_default();
            let (a, b, rank) = self.pair(&path, &module, 1)?;
            let (expected, alpha) = share(&path);
            self.shapes(&path, &module, [rank, dims[1]], [dims[0], rank])?;
            self.rank(&path, rank, expected)?;
            let mut low = LowRank::new(a, b, rank, alpha);
            low.rslora = self.config.use_rslora.unwrap_or(false);
            low.bias = match (module.bias, self.config.lora_bias) {
                (Some(bias), true) if bias.shape == [dims[0]] => Some(bias.values),
                (None, false) => None,
                (bias, wanted) => {
                    let found =
                        bias.map_or_else(|| "no bias of B".into(), |bias| format!("a bias of B {:?}", bias.shape));
                    let expected = if wanted {
                        format!("one [{}], with `lora_bias`", dims[0])
                    } else {
                        "none without `lora_bias`".into()
                    };
                    return Err(self.error(format!("tensors of `{path}`"), found, expected));
                }
            };
            low.magnitude = match (module.magnitude, self.config.use_dora.unwrap_or(false)) {
                (Some(m), true) => Some(m.values),
                (None, false) => None,
                (Some(_), false) => {
                    return Err(self.error(format!("tensors of `{path}`"), "a magnitude", "none without `use_dora`"));
                }
                (None, true) => {
                    return Err(self.error(format!("tensors of `{path}`"), "no magnitude", "one with `use_dora`"));
                }
            };
            if found.insert(map, low).is_some() {
                return Err(self.error(format!("tensors of `{path}`"), "a second addition to its map", "one"));
            }
        }
        for (layer, nested) in experts {
            self.fused(layer, nested, &share, &mut found)?;
        }
        Ok(found)
    }

    /// The parameters of a module of experts.
    fn fused(
        &self,
        layer: usize,
        nested: BTreeMap<usize, (String, Module)>,
        share: &dyn Fn(&str) -> (usize, f64),
        found: &mut BTreeMap<MatrixId, LowRank>,
    ) -> Result<()> {
        let dims = |part| self.maps.dims(MatrixId::Expert { layer, expert: 0, part }).unwrap_or_default();
        let base = self.maps.experts_path(layer, Naming::Fused);
        let targets = self.config.target_parameters.clone().unwrap_or_default();
        let parameters = self.maps.fused_parameters(layer);
        let [first, _] = parameters.map(|(part, _)| part);
        let named: Vec<ExpertMatrix> = parameters
            .into_iter()
            .filter(|(_, name)| targets.iter().any(|target| ends_with(&format!("{base}.{name}"), target)))
            .map(|(part, _)| part)
            .collect();
        self.one_width(layer, &base)?;
        let fits = |part: ExpertMatrix, module: &Module| {
            let (Some(a), Some(b)) = (&module.a, &module.b) else { return false };
            let [out, inputs] = dims(part);
            let shape = (a.shape.last().copied().unwrap_or(0), b.shape.first().copied().unwrap_or(0));
            shape == (inputs, out) || shape == (out, inputs)
        };
        // the first that was registered is the innermost
        let mut parts: Vec<ExpertMatrix> = match (nested.len(), named.as_slice()) {
            (2, _) => vec![ExpertMatrix::Down, first],
            (1, [part]) => vec![*part],
            (1, _) => {
                let Some((path, module)) = nested.values().next() else { return Ok(()) };
                let all: Vec<ExpertMatrix> =
                    [first, ExpertMatrix::Down].into_iter().filter(|part| fits(*part, module)).collect();
                if all.len() != 1 {
                    let found = format!("shapes that fit {} parameters", all.len());
                    return Err(self.error(format!("tensors of `{path}`"), found, "`target_parameters` that name one"));
                }
                all
            }
            (n, _) => {
                return Err(self.error(format!("tensors of `{base}`"), format!("{n} parameters"), "at most two"));
            }
        };
        if nested.len() == 2 {
            let agree =
                |parts: &[ExpertMatrix]| parts.iter().zip(nested.values()).all(|(p, (_, module))| fits(*p, module));
            if !agree(&parts) {
                parts.reverse();
            }
        }
        for (part, of_part) in parts.into_iter().zip(nested.into_values()) {
            self.fused_part(layer, part, of_part, share, found)?;
        }
        Ok(())
    }

    /// Fused experts have one width.
    fn one_width(&self, layer: usize, path: &str) -> Result<()> {
        let widths = self.maps.checkpoint().config().moe(layer).map(|moe| moe.widths.clone()).unwrap_or_default();
        match widths.windows(2).any(|pair| pair[0] != pair[1]) {
            true => Err(self.error(format!("tensors of `{path}`"), "fused experts", "one by one: their widths differ")),
            false => Ok(()),
        }
    }

    /// One parameter of all experts of a layer.
    fn fused_part(
        &self,
        layer: usize,
        part: ExpertMatrix,
        (path, module): (String, Module),
        share: &dyn Fn(&str) -> (usize, f64),
        found: &mut BTreeMap<MatrixId, LowRank>,
    ) -> Result<()> {
        let dims = self.maps.dims(MatrixId::Expert { layer, expert: 0, part }).unwrap_or_default();
        let (transposed, version) = (self.maps.is_transposed(), self.config.version());
        let (base, name) = self.maps.fused_parameter(layer, part);
        let parameter = format!("{base}.{name}");
        let stored = self.maps.fused_experts(layer, part);
        let (a, b, rank) = self.pair(&path, &module, stored)?;
        let (expected, alpha) = share(&parameter);
        self.rank(&path, rank, expected)?;
        let shape = (a.len() / (rank * stored).max(1), b.len() / (rank * stored).max(1));
        let layout =
            FusedLayout::find(&format!("tensors of `{path}`"), shape, dims, transposed, version).map_err(|error| {
                match error {
                    Error::Input { what, found, expected } => self.error(what, found, expected),
                    error => error,
                }
            })?;
        if module.magnitude.is_some() || self.config.use_dora.unwrap_or(false) {
            return Err(self.error(format!("tensors of `{path}`"), "`use_dora`", "none for fused experts"));
        }
        let fused = FusedExperts { a, b, rank, experts: stored };
        for expert in 0..self.maps.experts(layer) {
            let (a, mut b) = fused.expert(expert, dims, layout);
            if part == ExpertMatrix::GateUp && transposed {
                b = deinterleave(&b, rank);
            }
            let low = LowRank { rslora: self.config.use_rslora.unwrap_or(false), ..LowRank::new(a, b, rank, alpha) };
            let taken: BTreeSet<ExpertMatrix> = match part {
                ExpertMatrix::GateUp => [ExpertMatrix::GateUp, ExpertMatrix::Gate, ExpertMatrix::Up].into(),
                part => [part].into(),
            };
            if taken.iter().any(|part| found.contains_key(&MatrixId::Expert { layer, expert, part: *part })) {
                let what = format!("tensors of `{path}`");
                return Err(self.error(what, format!("a second addition to expert {expert}"), "one"));
            }
            found.insert(MatrixId::Expert { layer, expert, part }, low);
        }
        Ok(())
    }

    /// `A`, `B` and the rank per expert.
    fn pair(&self, path: &str, module: &Module, experts: usize) -> Result<(Vec<f32>, Vec<f32>, usize)> {
        let missing = |which: &str| self.error(format!("tensors of `{path}`"), format!("no {which}"), "both of a pair");
        let a = module.a.as_ref().ok_or_else(|| missing("lora_A"))?;
        let b = module.b.as_ref().ok_or_else(|| missing("lora_B"))?;
        let ([rows, _], [_, columns]) = (&a.shape[..], &b.shape[..]) else {
            let found = format!("A {:?} and B {:?}", a.shape, b.shape);
            return Err(self.error(format!("tensors of `{path}`"), found, "two matrices"));
        };
        if rows != columns || *rows == 0 || !rows.is_multiple_of(experts) {
            let found = format!("A {:?} and B {:?}", a.shape, b.shape);
            let expected = format!("A [n, ..] and B [.., n], n a multiple of {experts}");
            return Err(self.error(format!("tensors of `{path}`"), found, expected));
        }
        Ok((a.values.clone(), b.values.clone(), rows / experts))
    }

    fn shapes(&self, path: &str, module: &Module, a: [usize; 2], b: [usize; 2]) -> Result<()> {
        let magnitude = [b[0]];
        let expected =
            [(&module.a, "lora_A", &a[..]), (&module.b, "lora_B", &b), (&module.magnitude, "magnitude", &magnitude)];
        for (values, name, expected) in expected {
            if let Some(values) = values.as_ref().filter(|values| values.shape != expected) {
                let what = format!("{name} of `{path}`");
                return Err(self.error(what, format!("{:?}", values.shape), format!("{expected:?}")));
            }
        }
        Ok(())
    }

    fn rank(&self, path: &str, found: usize, expected: usize) -> Result<()> {
        match found == expected {
            true => Ok(()),
            false => {
                let expected = format!("{expected}, by `r` and `rank_pattern`");
                Err(self.error(format!("rank of `{path}`"), found, expected))
            }
        }
    }
}

enum Kind {
    A,
    B,
    Bias,
    Magnitude,
    EmbeddingA,
    EmbeddingB,
    Tokens,
}

/// The module and the part of it that a tensor is. Names of adapters within a name are passed over.
fn split(name: &str) -> Option<(&str, Kind)> {
    let marker = |text: &str| name.find(text).map(|at| (&name[..at], &name[at + text.len()..]));
    if let Some((path, rest)) = marker(".lora_A.") {
        return rest.ends_with("weight").then_some((path, Kind::A));
    }
    if let Some((path, rest)) = marker(".lora_B.") {
        let kind = if rest.ends_with("bias") { Kind::Bias } else { Kind::B };
        return Some((path, kind));
    }
    if let Some((path, _)) = marker(".lora_magnitude_vector") {
        return Some((path, Kind::Magnitude));
    }
    for (text, kind) in [
        (".lora_embedding_A", Kind::EmbeddingA),
        (".lora_embedding_B", Kind::EmbeddingB),
        (".token_adapter.trainable_tokens_delta", Kind::Tokens),
    ] {
        if let Some((path, _)) = marker(text) {
            return Some((path, kind));
        }
    }
    None
}

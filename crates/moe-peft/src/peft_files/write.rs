//! Writing a directory.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
};

use moe_checkpoint::{Dtype, ExpertMatrix, LayerRole, MatrixId, Role, write_atomic, write_json};
use safetensors::tensor::TensorView;

use super::{
    CONFIG_FILE, MODEL_FILE, PREFIX,
    config::{AdapterConfig, VERSION},
    fused::{FusedExperts, interleave, join_gate_up},
};
use crate::{
    Error, Result,
    lora::{LoraWeights, LowRank, Maps, Naming, Patterns, Targets, ends_with},
    trainable_tensors,
};

/// How a directory is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteOptions {
    /// Experts one by one, for transformers 4, or fused, for transformers 5. Both load in PEFT 0.21 where it knows the
    /// family.
    pub naming: Naming,
    /// Leave what the adapter took from the weights in the beginning to a base that [`crate::merge`] writes. Otherwise
    /// it becomes a plain adapter of twice the rank.
    pub on_residual: bool,
    /// Put into `B` what additions count, so that one `lora_alpha` without patterns and without rsLoRA says it for all:
    /// what llama.cpp's converter reads, which knows no `alpha_pattern` and no rsLoRA.
    pub one_alpha: bool,
    /// `base_model_name_or_path`.
    pub base_model: Option<String>,
    /// `task_type`.
    pub task_type: String,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self {
            naming: Naming::Fused,
            on_residual: false,
            one_alpha: false,
            base_model: None,
            task_type: "CAUSAL_LM".into(),
        }
    }
}

/// A module or parameter that is written.
struct Written {
    /// Path that patterns are matched with.
    path: String,
    /// Path in the names of tensors.
    key: String,
    parameter: bool,
    embedding: bool,
    low: LowRank,
    /// `[rows of A, in]`, `[out, columns of B]`.
    shapes: [[usize; 2]; 2],
}

/// Writes `weights` as PEFT does. Both files appear whole or not at all.
///
/// With [`Naming::Fused`], additions to gate and up become one of both ranks, and experts of unequal ranks are filled
/// up with zeros. With [`Naming::PerExpert`], one addition to gate and up becomes two with the same `A`.
///
/// # Errors
/// Those of [`check`]; [`Error::Io`].
pub fn write(dir: impl AsRef<Path>, weights: &LoraWeights, maps: &Maps<'_>, options: &WriteOptions) -> Result<()> {
    let dir = dir.as_ref();
    let (written, config) = prepare(weights, maps, options)?;
    let others = others(weights, maps, &written)?;
    std::fs::create_dir_all(dir).map_err(|source| Error::Io { path: dir.to_path_buf(), source })?;
    write_atomic(dir.join(MODEL_FILE), &serialize(&written, others, dir)?)?;
    write_json(&dir.join(CONFIG_FILE), &config.to_json(&options.task_type))?;
    Ok(())
}

/// Whether [`write()`] can write `weights`. It can then write the same adapter with other values, too: to be asked
/// before training.
///
/// # Errors
/// [`Error::Unsupported`] for DoRA on fused experts, and for fused experts of different widths; [`Error::Input`] for a
/// map that the model does not have, for maps of which some have DoRA or rsLoRA and some have not, and without any map.
pub fn check(weights: &LoraWeights, maps: &Maps<'_>, options: &WriteOptions) -> Result<()> {
    prepare(weights, maps, options).map(drop)
}

impl WriteOptions {
    /// The same with the naming that can hold `weights`: fused, as in transformers 5, unless PEFT has no fused form for
    /// them, which are DoRA on experts and experts of different widths.
    #[must_use]
    pub fn fitting(self, weights: &LoraWeights, maps: &Maps<'_>) -> Self {
        let widths = |layer| {
            let moe = maps.checkpoint().config().moe(layer);
            moe.is_some_and(|moe| moe.widths.iter().any(|width| *width != moe.widths[0]))
        };
        let apart = weights.maps.iter().any(|(map, low)| match map {
            MatrixId::Expert { layer, .. } => low.magnitude.is_some() || widths(*layer),
            _ => false,
        });
        Self { naming: if apart { Naming::PerExpert } else { Naming::Fused }, ..self }
    }
}

/// What is written.
fn prepare(weights: &LoraWeights, maps: &Maps<'_>, options: &WriteOptions) -> Result<(Vec<Written>, AdapterConfig)> {
    weights.check(maps)?;
    let chosen: BTreeMap<MatrixId, LowRank> = weights
        .maps
        .iter()
        .map(|(map, low)| (*map, if options.on_residual { low.on_residual() } else { low.plain() }))
        .collect();
    let rslora = same(chosen.values().map(|low| low.rslora), "use_rslora")?;
    let dora = same(chosen.values().map(|low| low.magnitude.is_some()), "use_dora")?;
    let mut written = Vec::new();
    let mut fused: BTreeMap<(usize, bool), Vec<Option<LowRank>>> = BTreeMap::new();
    for (map, low) in &chosen {
        match (*map, options.naming) {
            (MatrixId::Expert { .. }, Naming::Fused) if dora => {
                return Err(Error::Unsupported(format!(
                    "{map}: PEFT has no DoRA for fused experts; write them one by one"
                )));
            }
            (MatrixId::Expert { layer, expert, part: ExpertMatrix::Gate | ExpertMatrix::Up }, Naming::Fused)
                if chosen.contains_key(&MatrixId::Expert { layer, expert, part: ExpertMatrix::GateUp }) =>
            {
                let found = "one to both, and one to it alone";
                return Err(Error::input(format!("additions to {map}"), found, "one; combine them first"));
            }
            (MatrixId::Expert { layer, expert, part }, Naming::Fused) => {
                let down = part == ExpertMatrix::Down;
                let slots = fused.entry((layer, down)).or_insert_with(|| vec![None; maps.experts(layer)]);
                match part {
                    ExpertMatrix::Down | ExpertMatrix::GateUp => slots[expert] = Some(low.clone()),
                    part if maps.fused_parameters(layer)[0].0 == part => slots[expert] = Some(low.clone()),
                    ExpertMatrix::Gate | ExpertMatrix::Up => {
                        let of = |part| chosen.get(&MatrixId::Expert { layer, expert, part });
                        let width = low.dims()[0];
                        slots[expert] = join_gate_up(of(ExpertMatrix::Gate), of(ExpertMatrix::Up), width);
                    }
                }
            }
            (MatrixId::Expert { layer, expert, part: ExpertMatrix::GateUp }, Naming::PerExpert) => {
                let half = low.b.len() / 2;
                for (part, b) in [(ExpertMatrix::Gate, &low.b[..half]), (ExpertMatrix::Up, &low.b[half..])] {
                    let m = low.magnitude.as_ref().map(|m| match part {
                        ExpertMatrix::Gate => m[..m.len() / 2].to_vec(),
                        _ => m[m.len() / 2..].to_vec(),
                    });
                    let low = LowRank { b: b.to_vec(), magnitude: m, ..low.clone() };
                    written.push(linear(maps.path(MatrixId::Expert { layer, expert, part }, options.naming), low));
                }
            }
            (map @ (MatrixId::Expert { .. } | MatrixId::Layer(..)), naming) => {
                let mut item = linear(maps.path(map, naming), low.clone());
                // transformers 5 keeps the router as a parameter
                if naming == Naming::Fused && matches!(map, MatrixId::Layer(_, LayerRole::Router)) {
                    item.parameter = true;
                    item.path = format!("{}.weight", item.path);
                }
                written.push(item);
            }
            (map @ (MatrixId::Embedding | MatrixId::Head), naming) => {
                let embedding = map == MatrixId::Embedding;
                written.push(Written { embedding, ..linear(maps.path(map, naming), low.clone()) });
            }
        }
    }
    if let Some(with) = written.iter().find(|item| item.low.bias.is_some()) {
        if let Some(item) = fused.keys().next() {
            let what = format!("a bias of B at `{}` beside fused experts of layer {}", with.path, item.0);
            return Err(Error::Unsupported(format!("{what}: PEFT has no bias for them; write them one by one")));
        }
        // One for all, as PEFT has it.
        for item in written.iter_mut().filter(|item| !item.embedding) {
            let out = item.low.dims()[0];
            item.low.bias.get_or_insert_with(|| vec![0.0; out]);
        }
    }
    for ((layer, down), experts) in &fused {
        written.push(fused_parameter(maps, *layer, *down, experts, fused.contains_key(&(*layer, !down)), rslora)?);
    }
    let mut keys = BTreeSet::new();
    if let Some(twice) = written.iter().find(|item| !keys.insert(item.key.as_str())) {
        let expected = "one; combine them first";
        return Err(Error::input(format!("additions to `{}`", twice.key), "two", expected));
    }
    if written.is_empty() {
        return Err(Error::input("an adapter to write", "no addition", "at least one"));
    }
    let rslora = rslora && !options.one_alpha;
    if options.one_alpha {
        fold_scales(&mut written);
    }
    let mut config = config(&written, weights, maps, options, rslora, dora);
    let vectors = trainable_tensors::vectors(maps.checkpoint());
    let bias = |role: &Role| vectors.iter().any(|vector| vector.role == *role && !vector.norm);
    let modules: BTreeSet<String> = weights.whole.keys().filter(|r| !bias(r)).map(|r| maps.module_of(*r)).collect();
    config.modules_to_save = (!modules.is_empty()).then(|| modules.into_iter().collect());
    if weights.whole.keys().any(bias) {
        config.bias = "all".into();
    }
    config.lora_bias = written.iter().any(|item| item.low.bias.is_some());
    config.trainable_token_indices = (!weights.tokens.is_empty()).then(|| weights.tokens.keys().copied().collect());
    Ok((written, config))
}

/// Gives every addition one `lora_alpha`, that of the rank most of them have, and puts the rest of what it counts into
/// `B`.
fn fold_scales(written: &mut [Written]) {
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    written.iter().for_each(|item| *counts.entry(item.low.rank).or_default() += 1);
    let most = counts.iter().max_by_key(|(rank, count)| (**count, std::cmp::Reverse(**rank)));
    let alpha = most.map_or(1, |(rank, _)| *rank) as f64;
    for Written { low, .. } in written {
        let factor = low.scale() * low.rank as f64 / alpha;
        let scaled = |values: &mut Vec<f32>| values.iter_mut().for_each(|b| *b = (f64::from(*b) * factor) as f32);
        scaled(&mut low.b);
        low.bias.as_mut().map(scaled);
        (low.alpha, low.rslora) = (alpha, false);
    }
}

/// A tensor of a file: name, shape, values.
type Named = (String, Vec<usize>, Vec<f32>);

/// Tensors in place of the base's: those of modules saved whole, trained biases, trained rows of the embeddings.
fn others(weights: &LoraWeights, maps: &Maps<'_>, written: &[Written]) -> Result<Vec<Named>> {
    let mut tensors = Vec::new();
    for (role, values) in &weights.whole {
        let name = maps.tensor_name(*role);
        // A bias of a module that has an addition is within what the addition wraps.
        let name = match name.rsplit_once('.') {
            Some((module, "bias")) if written.iter().any(|item| item.key == module) => {
                format!("{module}.base_layer.bias")
            }
            _ => name,
        };
        tensors.push((name, maps.checkpoint().plain_role(*role)?.shape.clone(), values.clone()));
    }
    if !weights.tokens.is_empty() {
        let path = maps.path(MatrixId::Embedding, Naming::Fused);
        let rows: Vec<f32> = weights.tokens.values().flatten().copied().collect();
        let shape = vec![weights.tokens.len(), maps.checkpoint().config().hidden_size];
        tensors.push((format!("{path}.token_adapter.trainable_tokens_delta"), shape, rows));
    }
    Ok(tensors)
}

fn same(mut values: impl Iterator<Item = bool>, what: &str) -> Result<bool> {
    let first = values.next().unwrap_or(false);
    match values.all(|value| value == first) {
        true => Ok(first),
        false => Err(Error::input(what, "maps with and without it", "one for the whole adapter, as PEFT has it")),
    }
}

fn linear(path: String, low: LowRank) -> Written {
    let [out, inputs] = low.dims();
    let shapes = [[low.rank, inputs], [out, low.rank]];
    Written { key: path.clone(), path, parameter: false, embedding: false, low, shapes }
}

/// One parameter of the experts of a layer; `both`: the other one is adapted, too, so that gate and up are within down.
fn fused_parameter(
    maps: &Maps<'_>,
    layer: usize,
    down: bool,
    experts: &[Option<LowRank>],
    both: bool,
    rslora: bool,
) -> Result<Written> {
    let [first, second] = maps.fused_parameters(layer);
    let (part, _) = if down { second } else { first };
    let dims = |expert| maps.dims(MatrixId::Expert { layer, expert, part }).unwrap_or_default();
    let [out, inputs] = dims(0);
    if (0..experts.len()).any(|expert| dims(expert) != [out, inputs]) {
        return Err(Error::Unsupported(format!(
            "fused adapters of layer {layer}: its experts have different widths; write them one by one"
        )));
    }
    let mut experts = experts.to_vec();
    experts.resize(maps.fused_experts(layer, part), None);
    let (mut fused, scale) = FusedExperts::from_experts(&experts, [out, inputs]);
    let columns = fused.rank * fused.experts;
    if !down && maps.is_transposed() {
        fused.b = interleave(&fused.b, columns);
    }
    let (base, name) = maps.fused_parameter(layer, part);
    let nested = both && !down && !maps.expert_matrices_are_modules();
    let alpha = scale * if rslora { (fused.rank as f64).sqrt() } else { fused.rank as f64 };
    let low = LowRank { rslora, ..LowRank::new(fused.a, fused.b, fused.rank, alpha) };
    Ok(Written {
        path: format!("{base}.{name}"),
        key: if nested { format!("{base}.base_layer") } else { base },
        parameter: true,
        embedding: false,
        low,
        shapes: [[columns, inputs], [out, columns]],
    })
}

fn config(
    written: &[Written],
    weights: &LoraWeights,
    maps: &Maps<'_>,
    options: &WriteOptions,
    rslora: bool,
    dora: bool,
) -> AdapterConfig {
    // what most have is the rule, the rest are exceptions
    let mut counts: BTreeMap<(usize, u64), usize> = BTreeMap::new();
    written.iter().for_each(|item| *counts.entry((item.low.rank, alpha(&item.low).to_bits())).or_default() += 1);
    let most = counts.iter().map(|(key, count)| (*count, std::cmp::Reverse(*key))).max();
    let (r, bits) = most.map_or((8, 8f64.to_bits()), |(_, std::cmp::Reverse(key))| key);
    let lora_alpha = f64::from_bits(bits);
    let (mut rank_pattern, mut alpha_pattern) = (Patterns::default(), Patterns::default());
    for item in written {
        // a path of its own dots and all: they match themselves
        if item.low.rank != r {
            rank_pattern.push(&item.path, item.low.rank);
        }
        if alpha(&item.low) != lora_alpha {
            alpha_pattern.push(&item.path, alpha(&item.low));
        }
    }
    let paths = |parameter: bool| -> BTreeSet<&str> {
        written.iter().filter(|item| item.parameter == parameter).map(|item| item.path.as_str()).collect()
    };
    let all_modules: Vec<String> = maps
        .all()
        .iter()
        .filter(|map| match options.naming {
            Naming::Fused => !matches!(map, MatrixId::Expert { .. } | MatrixId::Layer(_, LayerRole::Router)),
            Naming::PerExpert => true,
        })
        .chain(&[MatrixId::Embedding, MatrixId::Head])
        .map(|map| maps.path(*map, options.naming))
        .chain(outside(maps))
        .collect();
    let moe_layers = maps.checkpoint().shape().layers.iter().map(|layer| layer.layer);
    let all_parameters: Vec<String> = moe_layers
        .flat_map(|layer| {
            let router = maps.path(MatrixId::Layer(layer, LayerRole::Router), Naming::Fused);
            let experts = maps.fused_parameters(layer).map(|(part, _)| {
                let (module, name) = maps.fused_parameter(layer, part);
                format!("{module}.{name}")
            });
            experts.into_iter().chain([format!("{router}.weight")])
        })
        .collect();
    let parameters = shortest(&paths(true), &all_parameters, 3);
    AdapterConfig {
        peft_type: "LORA".into(),
        peft_version: Some(VERSION.into()),
        base_model_name_or_path: options.base_model.clone(),
        r,
        lora_alpha,
        lora_dropout: weights.dropout,
        target_modules: Some(Targets::List(shortest(&paths(false), &all_modules, 1))),
        target_parameters: (!parameters.is_empty()).then_some(parameters),
        rank_pattern: Some(rank_pattern),
        alpha_pattern: Some(alpha_pattern),
        use_rslora: Some(rslora),
        use_dora: Some(dora),
        ..AdapterConfig::default()
    }
}

/// Paths of the modules outside the decoder, such as those of a vision tower, that files tell of: of every tensor the
/// module that has it, and the one around that, which PEFT may take for a target.
fn outside<'a>(maps: &'a Maps<'_>) -> impl Iterator<Item = String> + 'a {
    let checkpoint = maps.checkpoint();
    let is_outside = |name: &str| checkpoint.family().layer_of(name).is_none() && !checkpoint.is_mtp(name);
    let others = checkpoint.tensors().filter(move |info| is_outside(&info.name));
    others.flat_map(|info| {
        let module = info.name.rsplit_once('.').map(|(module, _)| module);
        let around = module.and_then(|module| module.rsplit_once('.')).map(|(around, _)| around);
        [module, around].into_iter().flatten().map(str::to_string).collect::<Vec<_>>()
    })
}

/// A matrix with so many columns, the other way around.
pub(super) fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns.max(1)).copied()).collect()
}

/// `lora_alpha`, without the rounding of a root.
fn alpha(low: &LowRank) -> f64 {
    let rounded = low.alpha.round();
    if (low.alpha - rounded).abs() < 1e-9 { rounded } else { low.alpha }
}

/// `chosen` paths by their last `segments`, where that names no other of `all`.
fn shortest(chosen: &BTreeSet<&str>, all: &[String], segments: usize) -> Vec<String> {
    let mut names = BTreeSet::new();
    for path in chosen {
        let start = path.rmatch_indices('.').nth(segments - 1).map_or(0, |(at, _)| at + 1);
        let name = &path[start..];
        let others = all.iter().any(|other| ends_with(other, name) && !chosen.contains(other.as_str()));
        names.insert(if others { (*path).to_string() } else { name.to_string() });
    }
    names.into_iter().collect()
}

fn serialize(written: &[Written], others: Vec<(String, Vec<usize>, Vec<f32>)>, dir: &Path) -> Result<Vec<u8>> {
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    for (name, shape, values) in others {
        tensors.push((format!("{PREFIX}{name}"), shape, bytes(&values)));
    }
    for Written { key, low, shapes: [a, b], embedding, .. } in written {
        if *embedding {
            // PEFT keeps them the other way around: A [r, V], B [H, r].
            let ([rank, hidden], [vocabulary, _]) = (*a, *b);
            let (first, second) = (transposed(&low.b, rank), transposed(&low.a, hidden));
            tensors.push((format!("{PREFIX}{key}.lora_embedding_A"), vec![rank, vocabulary], bytes(&first)));
            tensors.push((format!("{PREFIX}{key}.lora_embedding_B"), vec![hidden, rank], bytes(&second)));
            continue;
        }
        if let Some(bias) = &low.bias {
            tensors.push((format!("{PREFIX}{key}.lora_B.bias"), vec![bias.len()], bytes(bias)));
        }
        tensors.push((format!("{PREFIX}{key}.lora_A.weight"), a.to_vec(), bytes(&low.a)));
        tensors.push((format!("{PREFIX}{key}.lora_B.weight"), b.to_vec(), bytes(&low.b)));
        if let Some(m) = &low.magnitude {
            tensors.push((format!("{PREFIX}{key}.lora_magnitude_vector"), vec![m.len()], bytes(m)));
        }
    }
    let malformed = |error: safetensors::SafeTensorError| Error::File {
        path: dir.join(MODEL_FILE),
        what: "tensors".into(),
        found: error.to_string(),
        expected: "values of their shapes".into(),
    };
    let mut views = Vec::with_capacity(tensors.len());
    for (name, shape, bytes) in &tensors {
        views.push((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(malformed)?));
    }
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize(views, Some(metadata)).map_err(malformed)
}

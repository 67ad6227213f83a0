//! Everything of a model that can be trained, against difference quotients of the loss.

use std::{
    collections::BTreeMap,
    ops::Range,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use burn::tensor::{Device, Tensor};
use moe_checkpoint::{Checkpoint, LayerRole, Role};
use moe_core::{
    Engine, EngineOptions, Model,
    adapters::{
        Adapters, BlockAdapter, Depth, EmbeddingAdapter, ExpertSite, LayerSite, LinearAdapter, Site, Tokens,
        VectorAdapter, Wanted,
    },
    data::{Sequence, Wave},
    experts::ExpertTensors,
    host,
    kernels::{outer::add_transposed_product, weight::Weight},
    trace::{Nobody, Observer, Signals},
};

#[derive(Debug)]
struct Values {
    values: Mutex<Vec<f32>>,
    gradient: Mutex<Vec<f32>>,
}

impl Values {
    fn new(values: Vec<f32>) -> Arc<Self> {
        Arc::new(Self { gradient: Mutex::new(vec![0.0; values.len()]), values: Mutex::new(values) })
    }

    fn get(&self) -> Vec<f32> {
        self.values.lock().unwrap().clone()
    }

    fn add(&self, gradient: &[f32]) {
        self.gradient.lock().unwrap().iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g);
    }
}

/// A weight that is trained itself, in place of the checkpoint's.
#[derive(Debug)]
struct Own(Arc<Values>, [usize; 2]);

impl Own {
    fn tensor(&self) -> Tensor<2> {
        host::from_vec(self.0.get(), self.1, &Device::flex())
    }
}

impl LinearAdapter for Own {
    fn dims(&self) -> [usize; 2] {
        self.1
    }

    fn replaces(&self) -> bool {
        true
    }

    fn forward(&self, _: &Weight, x: &Tensor<2>, _: Tokens<'_>) -> Tensor<2> {
        x.clone().matmul(self.tensor().transpose())
    }

    fn backward(&self, _: &Weight, x: &Tensor<2>, dy: &Tensor<2>, _: Tokens<'_>, wanted: Wanted) -> Option<Tensor<2>> {
        if wanted.parameters {
            let mut sum = self.0.gradient.lock().unwrap();
            add_transposed_product(dy, 0..self.1[0], x, 0..self.1[1], 1.0, &mut sum);
        }
        wanted.input.then(|| dy.clone().matmul(self.tensor()))
    }

    fn matrix(&self, _: &Weight) -> Option<Tensor<2>> {
        Some(self.tensor())
    }

    fn digest(&self, add: &mut dyn FnMut(&[u8])) {
        self.0.get().iter().for_each(|value| add(&value.to_le_bytes()));
    }
}

/// `w x + relu(w x) * v x`: depends on its input.
#[derive(Debug)]
struct Bent(Arc<Values>, [usize; 2]);

impl Bent {
    fn parts(&self, base: &Weight, x: &Tensor<2>) -> [Tensor<2>; 3] {
        let v = host::from_vec(self.0.get(), self.1, &Device::flex());
        [base.forward(x, None), x.clone().matmul(v.clone().transpose()), v]
    }
}

impl LinearAdapter for Bent {
    fn dims(&self) -> [usize; 2] {
        self.1
    }

    fn is_linear(&self) -> bool {
        false
    }

    fn forward(&self, base: &Weight, x: &Tensor<2>, _: Tokens<'_>) -> Tensor<2> {
        let [w, v, _] = self.parts(base, x);
        w.clone() + w.clamp_min(0.0) * v
    }

    fn backward(
        &self,
        base: &Weight,
        x: &Tensor<2>,
        dy: &Tensor<2>,
        _: Tokens<'_>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        let [w, vx, v] = self.parts(base, x);
        let d_vx = dy.clone() * w.clone().clamp_min(0.0);
        if wanted.parameters {
            let mut sum = self.0.gradient.lock().unwrap();
            add_transposed_product(&d_vx, 0..self.1[0], x, 0..self.1[1], 1.0, &mut sum);
        }
        let d_w = dy.clone() + (dy.clone() * vx).mask_fill(w.lower_equal_elem(0.0), 0.0);
        wanted.input.then(|| base.backward(&d_w) + d_vx.matmul(v))
    }

    fn matrix(&self, _: &Weight) -> Option<Tensor<2>> {
        None
    }

    fn digest(&self, _: &mut dyn FnMut(&[u8])) {}
}

#[derive(Debug)]
struct OwnVector(Arc<Values>);

impl VectorAdapter for OwnVector {
    fn value(&self) -> Tensor<1> {
        let values = self.0.get();
        let len = values.len();
        host::from_vec(values, [len], &Device::flex())
    }

    fn add_gradient(&self, gradient: &[f32]) {
        self.0.add(gradient);
    }
}

#[derive(Debug)]
struct OwnEmbedding(Arc<Values>, usize);

impl EmbeddingAdapter for OwnEmbedding {
    fn replaces(&self) -> bool {
        true
    }

    fn rows(&self, ids: &[u32], _: &[f32]) -> Vec<f32> {
        let values = self.0.get();
        ids.iter().flat_map(|id| values[*id as usize * self.1..][..self.1].to_vec()).collect()
    }

    fn add_gradient(&self, ids: &[u32], gradient: &[f32]) {
        let mut sum = self.0.gradient.lock().unwrap();
        for (id, row) in ids.iter().zip(gradient.chunks_exact(self.1)) {
            sum[*id as usize * self.1..][..self.1].iter_mut().zip(row).for_each(|(sum, g)| *sum += g);
        }
    }
}

/// The block times a matrix `[H, H]`, which is trained.
#[derive(Debug)]
struct Turned(Arc<Values>, usize);

impl Turned {
    fn matrix(&self) -> Tensor<2> {
        host::from_vec(self.0.get(), [self.1; 2], &Device::flex())
    }
}

impl BlockAdapter for Turned {
    fn forward(&self, base: &ExpertTensors, x: &Tensor<2>, tokens: Tokens<'_>) -> Tensor<2> {
        let units = base.units(&base.pre_activations_for(x, tokens));
        base.output_for(&units, tokens).matmul(self.matrix())
    }

    fn backward(
        &self,
        base: &ExpertTensors,
        x: &Tensor<2>,
        dy: &Tensor<2>,
        tokens: Tokens<'_>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        let gate_up = base.pre_activations_for(x, tokens);
        let y = base.output_for(&base.units(&gate_up), tokens);
        let mut sum = self.0.gradient.lock().unwrap();
        add_transposed_product(&y, 0..self.1, dy, 0..self.1, 1.0, &mut sum);
        let d = dy.clone().matmul(self.matrix().transpose());
        let d_gate_up = base.backward_for(&gate_up, &d, None, tokens, false, false).d_gate_up;
        wanted.input.then(|| base.gate_up.backward(&d_gate_up))
    }
}

#[derive(Debug, Default)]
struct Everything {
    linear: BTreeMap<Site, Arc<dyn LinearAdapter>>,
    head: BTreeMap<usize, Arc<Own>>,
    vectors: BTreeMap<String, Arc<OwnVector>>,
    blocks: BTreeMap<usize, Arc<Turned>>,
    embedding: Option<Arc<OwnEmbedding>>,
    parameters: Vec<(String, Arc<Values>)>,
    depth: Option<Depth>,
}

impl Adapters for Everything {
    fn linear(&self, site: Site) -> Option<Arc<dyn LinearAdapter>> {
        self.linear.get(&site).cloned()
    }

    fn head(&self, rows: Range<usize>) -> Option<Arc<dyn LinearAdapter>> {
        self.head.get(&rows.start).map(|own| own.clone() as _)
    }

    fn vector(&self, role: Role) -> Option<Arc<dyn VectorAdapter>> {
        self.vectors.get(&format!("{role:?}")).map(|own| own.clone() as _)
    }

    fn block(&self, layer: usize) -> Option<Arc<dyn BlockAdapter>> {
        self.blocks.get(&layer).map(|own| own.clone() as _)
    }

    fn embedding(&self) -> Option<Arc<dyn EmbeddingAdapter>> {
        self.embedding.clone().map(|own| own as _)
    }

    fn depth(&self) -> Depth {
        self.depth.unwrap_or(Depth::Embedding)
    }
}

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5").join(name)
}

fn noise(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| (((i * 7919 + seed * 104_729 + 17) % 1009) as f32 / 504.5 - 1.0) * 0.3).collect()
}

const VECTORS: [LayerRole; 19] = [
    LayerRole::AttentionNorm,
    LayerRole::AttentionNormBias,
    LayerRole::FfnNorm,
    LayerRole::FfnNormBias,
    LayerRole::QueryBias,
    LayerRole::KeyBias,
    LayerRole::ValueBias,
    LayerRole::OutputBias,
    LayerRole::QueryNorm,
    LayerRole::KeyNorm,
    LayerRole::LatentQueryNorm,
    LayerRole::LatentKvNorm,
    LayerRole::DeltaNorm,
    LayerRole::LayerInputOutputNorm,
    LayerRole::AttentionOutputNorm,
    LayerRole::FfnOutputNorm,
    LayerRole::SharedNorm,
    LayerRole::SharedOutputNorm,
    LayerRole::ExpertsOutputNorm,
];

impl Everything {
    /// All of a model's weights, in place of the checkpoint's.
    fn own(checkpoint: &Checkpoint) -> Self {
        let mut all = Self::default();
        let config = checkpoint.config();
        let shape = |role: Role| checkpoint.role(role).ok().map(|info| info.shape.to_vec());
        let read = |role: Role| checkpoint.read_f32(role).unwrap();
        let mut parameters = Vec::new();
        let mut keep = |name: String, values: Vec<f32>| {
            let values = Values::new(values);
            parameters.push((name, values.clone()));
            values
        };
        for layer in 0..config.layers.len() {
            for site in LayerSite::ALL {
                let roles = site.roles();
                let role = |r: &LayerRole| Role::Layer(layer, *r);
                let Some(dims) = shape(role(&roles[0])) else { continue };
                let values: Vec<f32> = roles.iter().flat_map(|r| read(role(r))).collect();
                let columns = *dims.last().unwrap();
                let dims = [values.len() / columns, columns];
                let site = Site::Layer(layer, site);
                let own = Own(keep(site.to_string(), values), dims);
                all.linear.insert(site, Arc::new(own));
            }
            for vector in VECTORS {
                let role = Role::Layer(layer, vector);
                if shape(role).is_some() {
                    let own = OwnVector(keep(format!("{role:?}"), read(role)));
                    all.vectors.insert(format!("{role:?}"), Arc::new(own));
                }
            }
            for expert in 0..config.moe(layer).map_or(0, |moe| moe.num_experts()) {
                let weights = checkpoint.expert(layer, expert).unwrap();
                let (width, hidden) = (weights.width, weights.hidden);
                let gate_up = [weights.gate, weights.up].concat();
                for (map, values, dims) in [
                    (ExpertSite::GateUp, gate_up, [2 * width, hidden]),
                    (ExpertSite::Down, weights.down, [hidden, width]),
                ] {
                    let site = Site::Expert { layer, expert, map };
                    all.linear.insert(site, Arc::new(Own(keep(site.to_string(), values), dims)));
                }
            }
        }
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        all.head.insert(0, Arc::new(Own(keep("head".into(), read(Role::LmHead)), [vocab, hidden])));
        all.embedding = Some(Arc::new(OwnEmbedding(keep("embedding".into(), read(Role::Embedding)), hidden)));
        for role in [Role::FinalNorm, Role::FinalNormBias] {
            if shape(role).is_some() {
                all.vectors.insert(format!("{role:?}"), Arc::new(OwnVector(keep(format!("{role:?}"), read(role)))));
            }
        }
        all.parameters = parameters;
        all
    }
}

struct Trains;

impl Observer for Trains {
    fn needs(&self) -> Signals {
        Signals::PARAMETERS
    }
}

fn wave(vocab: usize) -> Wave {
    let ids = |n: usize, seed: usize| (0..n).map(|i| ((i * 31 + seed * 13 + 5) % vocab) as u32).collect::<Vec<_>>();
    Wave { id: 0, sequences: vec![Sequence::new(ids(13, 1)), Sequence::new(ids(9, 2))] }
}

fn loss(model: &Model, wave: &Wave) -> f64 {
    let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
    engine.run(wave, &mut Nobody).unwrap().loss.unwrap()
}

/// Trains in no sweep what is not wanted, and compares each parameter's gradient along a random direction.
fn check(model: &Model, all: Arc<Everything>, names: impl Fn(&str) -> bool) -> usize {
    let wave = wave(model.config().vocab_size);
    let adapted = model.with_adapters(all.clone()).unwrap();
    Engine::new(&adapted, EngineOptions::default()).run(&wave, &mut Trains).unwrap();
    let mut checked = 0;
    for (i, (name, values)) in all.parameters.iter().enumerate().filter(|(_, (name, _))| names(name)) {
        let start = values.get();
        let gradient = values.gradient.lock().unwrap().clone();
        // along the gradient the difference is largest against rounding, with some noise so that signs matter
        let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        if norm < 1e-4 {
            continue;
        }
        let direction: Vec<f32> =
            gradient.iter().zip(noise(start.len(), i)).map(|(g, n)| (f64::from(*g) / norm) as f32 + 0.1 * n).collect();
        let slope: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
        let at = |h: f64| {
            *values.values.lock().unwrap() =
                start.iter().zip(&direction).map(|(v, d)| (f64::from(*v) + h * f64::from(*d)) as f32).collect();
            loss(&adapted, &wave)
        };
        // steps that change the loss by so much, to both sides: a large one may change the choice of experts, and so
        // may even a small one to one side, and a small one is lost in rounding
        let here = at(0.0);
        let quotients = [2e-2, 4e-3, 1e-3].map(|change| {
            let h = change / slope;
            let (more, less) = (at(h), at(-h));
            [(more - less) / (2.0 * h), (more - here) / h, (here - less) / h]
        });
        at(0.0);
        let close = quotients.iter().flatten().any(|numeric| (numeric - slope).abs() < 0.03 * slope.abs());
        assert!(close, "{name}: gradient along a direction {slope}, difference quotients {quotients:?}");
        checked += 1;
    }
    checked
}

#[test]
fn everything_that_is_trained_has_the_gradient_of_a_difference_quotient() {
    // biases and a gated shared expert; latents, groups and a dense layer; norms of heads; gated DeltaNet in both forms
    // of its files; keys and values that later layers read, inputs of the layers' own
    let names = ["qwen2_moe", "deepseek_v2", "qwen3_moe", "deepseek_v3", "qwen3_next", "qwen3_5_moe_text"];
    for name in names.into_iter().chain(["gemma4_text_ple", "flex_olmo"]) {
        let model = Model::open(fixture(name), &Device::flex(), None).unwrap();
        let all = Arc::new(Everything::own(model.checkpoint()));
        let checked = check(&model, all.clone(), |_| true);
        assert!(checked * 10 > all.parameters.len() * 7, "{name}: {checked} of {}", all.parameters.len());
    }
    // norms with biases; the gradient through its routers is an estimate, not a derivative, so only what no router
    // reads
    let model = Model::open(fixture("phimoe"), &Device::flex(), None).unwrap();
    let last = format!("of layer {}", model.config().layers.len() - 1);
    let above = |name: &str| name.contains("FinalNorm") || (name.contains("of expert") && name.contains(&last));
    assert!(check(&model, Arc::new(Everything::own(model.checkpoint())), above) > 4);
}

#[test]
fn own_weights_equal_to_the_checkpoints_change_nothing() {
    let model = Model::open(fixture("qwen2_moe"), &Device::flex(), None).unwrap();
    let adapted = model.with_adapters(Arc::new(Everything::own(model.checkpoint()))).unwrap();
    let wave = wave(model.config().vocab_size);
    assert!((loss(&model, &wave) - loss(&adapted, &wave)).abs() < 1e-4);
}

#[test]
fn maps_that_depend_on_their_input_and_whole_blocks_have_their_gradients() {
    let model = Model::open(fixture("qwen2_moe"), &Device::flex(), None).unwrap();
    let own = Everything::own(model.checkpoint());
    let hidden = model.config().hidden_size;
    let mut all = Everything::default();
    for (i, (site, adapter)) in own.linear.iter().enumerate() {
        if matches!(site, Site::Layer(_, LayerSite::SharedDown | LayerSite::SharedGateUp)) {
            continue;
        }
        let dims = adapter.dims();
        let values = Values::new(noise(dims[0] * dims[1], i));
        all.parameters.push((site.to_string(), values.clone()));
        all.linear.insert(*site, Arc::new(Bent(values, dims)));
    }
    for layer in 0..model.config().layers.len() {
        let values = Values::new(noise(hidden * hidden, layer));
        all.parameters.push((format!("block of layer {layer}"), values.clone()));
        all.blocks.insert(layer, Arc::new(Turned(values, hidden)));
    }
    all.depth = Some(Depth::Attention(0));
    assert!(check(&model, Arc::new(all), |_| true) > 20);
}

#[test]
fn a_sweep_goes_as_deep_as_something_is_trained() {
    let model = Model::open(fixture("qwen2_moe"), &Device::flex(), None).unwrap();
    let last = model.config().layers.len() - 1;
    let reached = |depth: Depth| {
        let all = Arc::new(Everything { depth: Some(depth), ..Everything::own(model.checkpoint()) });
        let adapted = model.with_adapters(all.clone()).unwrap();
        let wave = wave(model.config().vocab_size);
        Engine::new(&adapted, EngineOptions::default()).run(&wave, &mut Trains).unwrap();
        let touched = |(name, values): &(String, Arc<Values>)| {
            values.gradient.lock().unwrap().iter().any(|g| *g != 0.0).then(|| name.clone())
        };
        all.parameters.iter().filter_map(touched).collect::<Vec<_>>()
    };
    let has = |names: &[String], text: &str| names.iter().any(|name| name.contains(text));
    let top = reached(Depth::FeedForward(last));
    assert!(has(&top, "head") && has(&top, &format!("of layer {last}")));
    assert!(!has(&top, &format!("query of layer {last}")) && !has(&top, "embedding"));
    assert!(has(&reached(Depth::Attention(last)), &format!("query of layer {last}")));
    assert!(!has(&reached(Depth::Attention(0)), "embedding"));
    assert!(has(&reached(Depth::Embedding), "embedding"));
}

#[test]
fn an_adapter_of_another_shape_is_refused_by_name() {
    let model = Model::open(fixture("qwen2_moe"), &Device::flex(), None).unwrap();
    let site = Site::Expert { layer: 1, expert: 2, map: ExpertSite::Down };
    let mut all = Everything { depth: Some(Depth::Head), ..Everything::default() };
    all.linear.insert(site, Arc::new(Own(Values::new(vec![0.0; 6]), [2, 3])));
    let adapted = model.with_adapters(Arc::new(all)).unwrap();
    let error = Engine::new(&adapted, EngineOptions { loss: true, ..EngineOptions::default() })
        .run(&wave(model.config().vocab_size), &mut Nobody)
        .unwrap_err();
    assert!(error.to_string().contains("down of expert 2 of layer 1: found [2, 3]"), "{error}");
}

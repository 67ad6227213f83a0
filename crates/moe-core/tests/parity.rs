//! What transformers computes for tiny checkpoints of each family, compared with what we compute: logits, layer inputs,
//! router logits, loss and expert gradients, to 1e-4 absolute; the same bits whether weights are resident or streamed;
//! and what generation with its cache continues with against the logits of a whole sweep.
#![cfg(feature = "flex")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use burn::tensor::{Device, Tensor};
use moe_checkpoint::{Checkpoint, ExpertPart, QuantizeOptions, Quantized, QuantizedPart, RopeScaling};
use moe_core::{
    Engine, EngineOptions, Error, Model, Result,
    data::{Sequence, Wave},
    generate::{GenerateOptions, generate},
    host::HostView,
    kernels::weight::Weight,
    overlay::KeepUnits,
    trace::{ExpertTrace, LayerTrace, Observer, Signals},
};
use safetensors::SafeTensors;

const TOLERANCE: f32 = 1e-4;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity")
}

/// Everything a sweep can show, row-major.
#[derive(Default)]
struct Recorder {
    hidden: BTreeMap<usize, Vec<f32>>,
    router_logits: Vec<Vec<f32>>,
    /// Routing weights `[T, E]`, zero for experts not selected.
    routing: Vec<Vec<f32>>,
    logits: Vec<f32>,
    /// (layer, expert) -> gradients of its weights.
    gradients: BTreeMap<(usize, usize), Gradients>,
}

/// Gradients of one expert's weights.
#[derive(Default)]
struct Gradients {
    /// `[2I, H]`.
    gate_up: Vec<f32>,
    /// `[H, I]`.
    down: Vec<f32>,
    /// `[2I]`.
    gate_up_bias: Vec<f32>,
    /// `[H]`.
    down_bias: Vec<f32>,
}

impl Gradients {
    fn parts(&self) -> [(&'static str, &[f32]); 4] {
        [
            ("gate_up", &self.gate_up),
            ("down", &self.down),
            ("gate_up bias", &self.gate_up_bias),
            ("down bias", &self.down_bias),
        ]
    }
}

impl Observer for Recorder {
    fn needs(&self) -> Signals {
        Signals {
            routing: true,
            units: true,
            outputs: true,
            gradients: true,
            hidden: true,
            logits: true,
            ..Signals::NONE
        }
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        self.router_logits.push(trace.logits.to_vec());
        let mut routing = vec![0.0; trace.logits.len()];
        for (slot, (&expert, &weight)) in trace.selected.iter().zip(trace.weights).enumerate() {
            routing[slot / trace.top_k * trace.experts + expert as usize] = weight;
        }
        self.routing.push(routing);
        Ok(())
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> Result<()> {
        let backward = trace.backward.expect("asked for");
        let weights = Tensor::<1>::from_floats(trace.routing_weights, &trace.input.device()).unsqueeze_dim::<2>(1);
        let gate_up = backward.gate_up.clone().transpose().matmul(trace.input.clone());
        let upstream = backward.upstream.clone() * weights;
        let down = upstream.clone().transpose().matmul(trace.units.expect("asked for").clone());
        // the output signal is f(x): check it against its definition on the way
        let output = trace.expert_weights.output(trace.units.unwrap());
        let (a, b) = (HostView::new(&output), HostView::new(trace.output.expect("asked for")));
        assert!(a.as_slice().iter().zip(b.as_slice()).all(|(a, b)| (a - b).abs() < 1e-5));
        let values = |x: Tensor<2>| HostView::new(&x).as_slice().to_vec();
        let gradients = Gradients {
            gate_up: values(gate_up),
            down: values(down),
            gate_up_bias: values(backward.gate_up.clone().sum_dim(0)),
            down_bias: values(upstream.sum_dim(0)),
        };
        self.gradients.insert((trace.layer, trace.expert), gradients);
        Ok(())
    }

    fn hidden(&mut self, layer: usize, hidden: &Tensor<2>) -> Result<()> {
        self.hidden.insert(layer, HostView::new(hidden).as_slice().to_vec());
        Ok(())
    }

    fn logits(&mut self, first: usize, logits: &HostView, vocab: usize) -> Result<()> {
        assert_eq!(first * vocab, self.logits.len());
        self.logits.extend_from_slice(logits.as_slice());
        Ok(())
    }
}

struct Expected<'a>(SafeTensors<'a>);

impl Expected<'_> {
    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        let view = self.0.tensor(name).ok()?;
        Some(view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
    }

    fn integers(&self, name: &str) -> Option<(Vec<i64>, Vec<usize>)> {
        let view = self.0.tensor(name).ok()?;
        let values = view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
        Some((values, view.shape().to_vec()))
    }
}

/// Largest difference; fails above [`TOLERANCE`].
#[track_caller]
fn assert_close(what: &str, found: &[f32], expected: &[f32]) -> f32 {
    assert_near(what, found, expected, TOLERANCE)
}

/// Largest difference; fails above the tolerance.
#[track_caller]
fn assert_near(what: &str, found: &[f32], expected: &[f32], tolerance: f32) -> f32 {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= tolerance, "{what}: differs by {worst}");
    assert!(found.iter().all(|x| x.is_finite()), "{what}: not finite");
    worst
}

/// Rows of a `[rows, ..]` array.
fn pick(values: &[f32], rows: &[usize], count: usize) -> Vec<f32> {
    let width = values.len() / count;
    rows.iter().flat_map(|&r| values[r * width..(r + 1) * width].iter().copied()).collect()
}

/// The softmax of every row.
fn softmax_rows(values: &[f32], columns: usize) -> Vec<f32> {
    let row = |row: &[f32]| {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = row.iter().map(|x| (x - max).exp()).sum();
        row.iter().map(|x| (x - max).exp() / sum).collect::<Vec<_>>()
    };
    values.chunks_exact(columns).flat_map(row).collect()
}

fn run(dir: &Path, wave: &Wave, max_memory: Option<u64>) -> Result<(Recorder, f64)> {
    let model = Model::open(dir, &Device::flex(), max_memory)?;
    let mut recorder = Recorder::default();
    let report =
        Engine::new(&model, EngineOptions { head_tokens: 16, ..Default::default() }).run(wave, &mut recorder)?;
    assert_eq!(report.loss_tokens, wave.loss_tokens());
    Ok((recorder, report.loss.expect("asked for") / report.loss_tokens as f64))
}

fn check(name: &str) {
    let dir = fixtures().join(name);
    let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let expected = Expected(SafeTensors::deserialize(&bytes).unwrap());
    let (ids, shape) = expected.integers("input_ids").unwrap();
    let mask = expected.integers("attention_mask").map_or_else(|| vec![1; ids.len()], |(mask, _)| mask);
    let count = ids.len();
    let valid: Vec<usize> = (0..count).filter(|&i| mask[i] == 1).collect();
    let sequences = (0..shape[0])
        .map(|s| {
            let row = s * shape[1]..(s + 1) * shape[1];
            Sequence::new(row.filter(|&i| mask[i] == 1).map(|i| ids[i] as u32).collect())
        })
        .collect();
    let wave = Wave { id: 0, sequences };

    let (found, loss) = run(&dir, &wave, None).unwrap();
    assert_close(&format!("{name} loss"), &[loss as f32], &expected.floats("loss").unwrap());
    let logits = pick(&expected.floats("logits").unwrap(), &valid, count);
    let logits = assert_close(&format!("{name} logits"), &found.logits, &logits);
    let mut hidden = 0.0f32;
    for (layer, values) in &found.hidden {
        // files of long texts leave the embeddings out
        let Some(all) = expected.floats(&format!("hidden.{layer}")) else {
            assert!(*layer == 0 && name.ends_with("_long"), "{name}: no hidden.{layer}");
            continue;
        };
        hidden = hidden.max(assert_close(&format!("{name} hidden.{layer}"), values, &pick(&all, &valid, count)));
    }
    let mut router = None;
    assert!(!found.router_logits.is_empty());
    // what transformers 4 reports for gpt-oss are the routing weights
    let reported = if name == "tf4/gpt_oss" { &found.routing } else { &found.router_logits };
    for (n, values) in reported.iter().enumerate() {
        // transformers 4 does not report them for all families
        let Some(all) = expected.floats(&format!("router_logits.{n}")) else { continue };
        // what transformers reports for Gemma 4 are the probabilities
        let values = if name.contains("gemma4") { &softmax_rows(values, all.len() / count) } else { values };
        let worst = assert_close(&format!("{name} router_logits.{n}"), values, &pick(&all, &valid, count));
        router = Some(router.unwrap_or(0.0f32).max(worst));
    }
    assert!(router.is_some() || name.starts_with("tf4/"), "{name}: no router logits");
    check_choices(name, &found, &expected, &valid);
    let gradients = check_gradients(name, &dir, &found, &expected, wave.loss_tokens() as f32);
    let router = router.map_or("      -".into(), |r| format!("{r:.1e}"));
    println!("{name:<28} logits {logits:.1e} hidden {hidden:.1e} router {router} gradients {gradients:.1e}");
    check_generation(name, &dir, &wave);

    // Streamed: the least memory that works, so nothing is resident or kept and layer inputs go to a file.
    let Error::Memory { needed, .. } = run(&dir, &wave, Some(1)).err().expect("one byte is too little") else {
        panic!("expected a memory error")
    };
    let (streamed, streamed_loss) = run(&dir, &wave, Some(needed)).unwrap();
    assert_eq!(loss.to_bits(), streamed_loss.to_bits(), "{name}: streamed loss");
    let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&found.logits), bits(&streamed.logits), "{name}: streamed logits");
    for (key, gradients) in &found.gradients {
        for ((part, a), (_, b)) in gradients.parts().into_iter().zip(streamed.gradients[key].parts()) {
            assert_eq!(bits(a), bits(b), "{name}: streamed {part} gradient of {key:?}");
        }
    }
}

/// Greedy continuations, whose keys and values are cached, are the most likely tokens of a sweep over the whole text.
fn check_generation(name: &str, dir: &Path, wave: &Wave) {
    let model = Model::open(dir, &Device::flex(), None).unwrap();
    let vocab = model.config().vocab_size;
    let prompts: Vec<Vec<u32>> =
        wave.sequences.iter().zip([11, 4]).map(|(s, n)| s.ids[..n.min(s.ids.len())].to_vec()).collect();
    let options = GenerateOptions { max_new_tokens: 9, ..Default::default() };
    let completions = generate(&model, &prompts, &options, |_| false).unwrap();
    for (prompt, completion) in prompts.iter().zip(completions) {
        assert_eq!(completion.len(), 9);
        let sequences = vec![Sequence::new([prompt.as_slice(), &completion].concat())];
        let (swept, _) = run(dir, &Wave { id: 0, sequences }, None).unwrap();
        for (i, &token) in completion.iter().enumerate() {
            let logits = &swept.logits[(prompt.len() - 1 + i) * vocab..][..vocab];
            let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert!(best - logits[token as usize] < 1e-4, "{name}: token {i} of the continuation");
        }
    }
}

/// The experts of every token and their weights, where a file has them.
fn check_choices(name: &str, found: &Recorder, expected: &Expected<'_>, valid: &[usize]) {
    for (n, routing) in found.routing.iter().enumerate() {
        let Some((index, shape)) = expected.integers(&format!("topk_index.{n}")) else { continue };
        let weights = expected.floats(&format!("topk_weight.{n}")).unwrap();
        let (top_k, experts) = (shape[1], routing.len() / valid.len());
        let mut dense = vec![0.0; routing.len()];
        for (row, &token) in valid.iter().enumerate() {
            for slot in token * top_k..(token + 1) * top_k {
                dense[row * experts + index[slot] as usize] = weights[slot];
            }
        }
        // transformers keeps the factor of Step-3.7 apart from them
        let factor = if name.contains("step3p7") { 3.0 } else { 1.0 };
        dense.iter_mut().for_each(|weight| *weight *= factor);
        assert_close(&format!("{name} routing weights {n}"), routing, &dense);
    }
}

/// Gradients of an expert's weights under any of the names and layouts that transformers gives them; `None` for a layer
/// that a file has none of.
fn expected_gradients(
    expected: &Expected<'_>,
    layer: usize,
    expert: usize,
    width: usize,
    h: usize,
) -> Option<Gradients> {
    let block = |x: Vec<f32>, size: usize| x[expert * size..(expert + 1) * size].to_vec();
    let names = expected.0.names();
    let of_layer = |name: &&&str| name.starts_with("grad.") && name.contains(&format!("layers.{layer}."));
    let prefix =
        |name: &&str| -> Option<String> { Some(name[..name.find(".experts.")? + ".experts".len()].to_string()) };
    if let Some(prefix) = names.iter().filter(|name| of_layer(name)).find_map(prefix) {
        let tensor = |name: &str| expected.floats(&format!("{prefix}.{name}"));
        if let (Some(gate_up), Some(down)) = (tensor("gate_up_proj"), tensor("down_proj")) {
            let (gate_up, down) = (block(gate_up, 2 * width * h), block(down, width * h));
            let shape = expected.0.tensor(&format!("{prefix}.gate_up_proj")).unwrap().shape().to_vec();
            if prefix.contains(".feed_forward.") && shape[1..] == [h, 2 * width] {
                // Llama 4: transposed, the columns of gate before those of up
                return Some(Gradients {
                    gate_up: (0..2 * width * h).map(|i| gate_up[i % h * 2 * width + i / h]).collect(),
                    down: (0..h * width).map(|i| down[i % width * h + i / width]).collect(),
                    ..Default::default()
                });
            }
            let Some(gate_up_bias) = tensor("gate_up_proj_bias") else {
                return Some(Gradients { gate_up, down, ..Default::default() });
            };
            // gpt-oss: transposed, gate and up columns alternate
            let column = |row: usize| if row < width { 2 * row } else { 2 * (row - width) + 1 };
            let gate_up_bias = block(gate_up_bias, 2 * width);
            return Some(Gradients {
                gate_up: (0..2 * width * h).map(|i| gate_up[i % h * 2 * width + column(i / h)]).collect(),
                down: (0..h * width).map(|i| down[i % width * h + i / width]).collect(),
                gate_up_bias: (0..2 * width).map(|row| gate_up_bias[column(row)]).collect(),
                down_bias: block(tensor("down_proj_bias").unwrap(), h),
            });
        }
        if let (Some(up), Some(down)) = (tensor("up_proj"), tensor("down_proj")) {
            // without a gate: that of gate and up together, since one matrix is both
            return Some(Gradients {
                gate_up: block(up, width * h),
                down: block(down, width * h),
                ..Default::default()
            });
        }
        for [gate, up, down] in [["gate_proj", "up_proj", "down_proj"], ["w1", "w3", "w2"]] {
            if (0..64).all(|e| tensor(&format!("{e}.{down}.weight")).is_none()) {
                continue;
            }
            // an expert without tokens has no gradient in the per-expert layout
            let part = |p: &str| tensor(&format!("{expert}.{p}.weight")).unwrap_or_else(|| vec![0.0; width * h]);
            let gate_up = [part(gate), part(up)].concat();
            return Some(Gradients { gate_up, down: part(down), ..Default::default() });
        }
    }
    None
}

/// Largest difference of all gradients.
fn check_gradients(name: &str, dir: &Path, found: &Recorder, expected: &Expected<'_>, loss_tokens: f32) -> f32 {
    let config = moe_checkpoint::Checkpoint::open(dir).unwrap().config().clone();
    let (mut checked, mut worst) = (0, 0.0f32);
    // some variants of a family leave them to the others
    if !expected.0.names().iter().any(|name| name.starts_with("grad.")) {
        return worst;
    }
    for (layer, _) in config.layers.iter().enumerate() {
        let Some(moe) = config.moe(layer) else { continue };
        for (e, &width) in moe.widths.iter().enumerate() {
            // newer files have those of some layers, the first one among them
            let hidden = config.expert_hidden_size();
            let Some(gradients) = expected_gradients(expected, layer, e, width, hidden) else {
                assert!(checked > 0, "{name}: no gradients of layer {layer}");
                continue;
            };
            assert_eq!(
                moe.biases == moe_checkpoint::ExpertBiases::All,
                !gradients.down_bias.is_empty(),
                "{name}: biases"
            );
            for (i, (part, expected)) in gradients.parts().into_iter().enumerate() {
                if expected.is_empty() {
                    continue;
                }
                let mean = match found.gradients.get(&(layer, e)) {
                    Some(found) if moe.gateless && i == 0 => {
                        let (gate, up) = found.gate_up.split_at(found.gate_up.len() / 2);
                        gate.iter().zip(up).map(|(gate, up)| (gate + up) / loss_tokens).collect()
                    }
                    Some(found) => found.parts()[i].1.iter().map(|v| v / loss_tokens).collect(),
                    None => vec![0.0; expected.len()],
                };
                let what = format!("{name} layer {layer} expert {e} {part} gradient");
                worst = worst.max(assert_close(&what, &mean, expected));
                checked += 1;
            }
        }
    }
    assert!(checked > 0);
    worst
}

/// Where the processor has matrix units, experts stored as bf16 go there as they are, biased or not; through an overlay
/// they are f32.
#[test]
fn packed_experts_compute_what_f32_experts_do() {
    for name in
        ["tf5/qwen2_moe_bf16", "tf5/gpt_oss_bf16", "tf5/gpt_oss_mxfp4", "tf5/deepseek_v3_bf16", "tf5/deepseek_v3_fp8"]
    {
        let packed = Model::open(fixtures().join(name), &Device::flex(), None).unwrap();
        let dense = packed.with_overlay(Arc::new(KeepUnits::new())).unwrap();
        let expert = packed.expert(1, 0).unwrap();
        let form = format!("{:?}{:?}", expert.gate_up, expert.down);
        assert_eq!(
            form.matches("Packed[").count(),
            if Weight::prefers_bf16(&Device::flex()) { 2 } else { 0 },
            "{form}"
        );
        assert_eq!(expert.down_bias.is_some(), packed.config().moe(1).unwrap().biases.has(ExpertPart::DownBias));
        let ids = (0..23).map(|i| (i * 7 + 3) % packed.config().vocab_size as u32).collect();
        let wave = Wave { id: 0, sequences: vec![Sequence::new(ids)] };
        let [packed, dense] = [packed, dense].map(|model| {
            let mut recorder = Recorder::default();
            Engine::new(&model, EngineOptions::default()).run(&wave, &mut recorder).unwrap();
            recorder
        });
        assert_near(&format!("{name} logits"), &packed.logits, &dense.logits, 1e-5);
        assert_eq!(packed.gradients.len(), dense.gradients.len());
        for (key, gradients) in &packed.gradients {
            for ((part, a), (_, b)) in gradients.parts().into_iter().zip(dense.gradients[key].parts()) {
                assert_near(&format!("{name} {part} of {key:?}"), a, b, 1e-5);
            }
        }
    }
}

/// Quantized checkpoints compute what transformers computes for the weights that the packages of their formats decode,
/// each rounded once to BF16.
#[test]
fn quantized_checkpoints_compute_what_their_dequantized_weights_do() {
    let root = fixtures().join("../quantized");
    let mut names: Vec<_> = std::fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.retain(|path| path.is_dir());
    names.sort();
    assert_eq!(names.len(), 37);
    let mut worst = 0.0f32;
    for dir in names {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
        let expected = Expected(SafeTensors::deserialize(&bytes).unwrap());
        let (ids, shape) = expected.integers("input_ids").unwrap();
        let sequences =
            ids.chunks(shape[1]).map(|row| Sequence::new(row.iter().map(|id| *id as u32).collect())).collect();
        let (found, _) = run(&dir, &Wave { id: 0, sequences }, None).unwrap_or_else(|error| panic!("{name}: {error}"));
        worst = worst.max(assert_close(&name, &found.logits, &expected.floats("logits_bf16").unwrap()));
    }
    println!("largest difference of logits {worst:e}");
}

/// What is quantized here computes what stock transformers computes of it, written and dequantized to BF16 by its own
/// reader: `xtask/scripts/quantized.py` left the logits of the last two positions.
#[test]
fn quantized_models_compute_what_transformers_makes_of_their_files() {
    const CASES: [(&str, &str); 7] = [
        ("tiny-moe/fp8_blocks", r#"{"type": "fp8_blocks", "block": [32, 32]}"#),
        ("tiny-moe/fp8_channels", "fp8_channels"),
        ("tiny-moe/mxfp4", "mxfp4"),
        ("tiny-moe/int4", r#"{"type": "int", "bits": 4, "group_size": 32}"#),
        ("tiny-moe/int4_channels", r#"{"type": "int", "bits": 4, "group_size": null}"#),
        ("tiny-moe/int8", r#"{"type": "int", "bits": 8, "group_size": 32}"#),
        ("gpt_oss/mxfp4", "mxfp4"),
    ];
    let bytes = std::fs::read(fixtures().join("../quantized_exports.safetensors")).unwrap();
    let expected = Expected(SafeTensors::deserialize(&bytes).unwrap());
    assert_eq!(expected.0.names().len(), CASES.len() + 1);
    let (ids, _) = expected.integers("input_ids").unwrap();
    let wave = Wave { id: 0, sequences: vec![Sequence::new(ids.iter().map(|id| *id as u32).collect())] };
    for (name, format) in CASES {
        let (dir, part) = match name.starts_with("gpt_oss") {
            true => (fixtures().join("../quantized/mxfp4-gpt_oss"), QuantizedPart::Experts),
            false => {
                let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
                (dir, QuantizedPart::Linear)
            }
        };
        let base = Arc::new(Checkpoint::open(dir).unwrap());
        let options = QuantizeOptions { format: format.parse().unwrap(), part };
        let quantized = Quantized::on(&base, &options).unwrap();
        let model = Model::new(quantized.model().clone(), &Device::flex(), None).unwrap();
        let mut recorder = Recorder::default();
        Engine::new(&model, EngineOptions::default()).run(&wave, &mut recorder).unwrap();
        let logits = expected.floats(name).unwrap();
        assert_close(name, &recorder.logits[recorder.logits.len() - logits.len()..], &logits);
    }
}

/// Pruned checkpoints, run by transformers and left by `xtask/scripts/roundtrip.py` with the logits that it computes:
/// `MOE_EXPORTS=out/roundtrip cargo test --release --workspace --test parity -- --ignored --nocapture`
#[test]
#[ignore = "needs exports that transformers has run"]
fn exports_compute_what_transformers_computes() {
    let root = PathBuf::from(std::env::var("MOE_EXPORTS").expect("MOE_EXPORTS names a directory"));
    // tests run elsewhere than the command
    let root = if root.is_relative() { Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(root) } else { root };
    let list = |dir: &Path| {
        let mut found: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        found.sort();
        found
    };
    let (mut worst, mut compared) = (0.0f32, 0);
    for dir in list(&root).iter().flat_map(|model| list(model)) {
        let name = dir.strip_prefix(&root).unwrap().display().to_string();
        let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
        let expected = Expected(SafeTensors::deserialize(&bytes).unwrap());
        let (ids, shape) = expected.integers("input_ids").unwrap();
        match moe_checkpoint::Checkpoint::open(&dir).unwrap().config().rope.scaling {
            RopeScaling::LongRope { original_max_position, .. } if shape[1] > original_max_position => {
                println!("{name}: transformers keeps the frequencies of short texts (docs/families.md)");
                continue;
            }
            _ => {}
        }
        let sequences =
            ids.chunks(shape[1]).map(|row| Sequence::new(row.iter().map(|id| *id as u32).collect())).collect();
        match run(&dir, &Wave { id: 0, sequences }, None) {
            Ok((found, _)) => {
                worst = worst.max(assert_close(&name, &found.logits, &expected.floats("logits").unwrap()))
            }
            Err(Error::Unsupported(reason)) => {
                println!("{name}: {reason} is not implemented");
                continue;
            }
            Err(error) => panic!("{name}: {error}"),
        }
        compared += 1;
    }
    assert!(compared > 0);
    println!("{compared} exports: logits differ by at most {worst:.1e}");
}

/// Checkpoints that can be pruned but not run say so before anything is read.
#[test]
fn models_that_are_not_run_are_refused_at_once() {
    let name = "kimi_linear";
    let error = Model::open(fixtures().join("../unrun").join(name), &Device::flex(), None).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
    assert!(error.to_string().contains(name) && error.to_string().contains("attention"), "{error}");
}

/// Texts in which an indexer would choose keys are refused by name, in sweeps and in generation.
#[test]
fn texts_longer_than_an_indexer_sees_are_refused() {
    for name in ["deepseek_v32", "glm_moe_dsa"] {
        let model = Model::open(fixtures().join("tf5").join(name), &Device::flex(), None).unwrap();
        let limit = model.config().attention.selects.unwrap();
        let ids = |count: usize| (0..count).map(|i| (i % 50) as u32).collect::<Vec<_>>();
        let run = |count: usize| {
            let wave = Wave { id: 0, sequences: vec![Sequence::new(ids(count))] };
            Engine::new(&model, EngineOptions::default()).run(&wave, &mut Recorder::default())
        };
        run(limit).unwrap();
        let options = GenerateOptions { max_new_tokens: 3, ..Default::default() };
        let generated = generate(&model, &[ids(limit - 2)], &options, |_| false).map(drop);
        for error in [run(limit + 1).map(drop).unwrap_err(), generated.unwrap_err()] {
            let text = error.to_string();
            assert!(text.contains(name) && text.contains("index_topk") && text.contains("65"), "{text}");
        }
    }
}

macro_rules! parity {
    ($($test:ident: $fixture:literal),* $(,)?) => {
        $(#[test]
        fn $test() {
            check($fixture);
        })*

        /// A fixture nobody compares with would be a hole.
        #[test]
        fn every_fixture_is_checked() {
            let checked = [$($fixture),*];
            for generation in ["tf4", "tf5"] {
                for entry in std::fs::read_dir(fixtures().join(generation)).unwrap() {
                    let name = format!("{generation}/{}", entry.unwrap().file_name().to_string_lossy());
                    assert!(checked.contains(&name.as_str()), "{name} is not in the list");
                }
            }
        }
    };
}

parity! {
    tf4_deepseek_v2: "tf4/deepseek_v2",
    tf4_deepseek_v3: "tf4/deepseek_v3",
    tf4_glm4_moe: "tf4/glm4_moe",
    tf4_gpt_oss: "tf4/gpt_oss",
    tf4_mixtral: "tf4/mixtral",
    tf4_olmoe: "tf4/olmoe",
    tf4_phimoe: "tf4/phimoe",
    tf4_qwen2_moe: "tf4/qwen2_moe",
    tf4_qwen2_moe_padded: "tf4/qwen2_moe_padded",
    tf4_qwen2_moe_sliding: "tf4/qwen2_moe_sliding",
    tf4_qwen3_moe: "tf4/qwen3_moe",
    tf5_afmoe: "tf5/afmoe",
    tf5_cohere2_moe: "tf5/cohere2_moe",
    tf5_deepseek_v2: "tf5/deepseek_v2",
    tf5_deepseek_v2_group: "tf5/deepseek_v2_group",
    tf5_deepseek_v2_yarn: "tf5/deepseek_v2_yarn",
    tf5_deepseek_v3: "tf5/deepseek_v3",
    tf5_deepseek_v3_bf16: "tf5/deepseek_v3_bf16",
    tf5_deepseek_v3_fp8: "tf5/deepseek_v3_fp8",
    tf5_deepseek_v32: "tf5/deepseek_v32",
    tf5_deepseek_v3_yarn: "tf5/deepseek_v3_yarn",
    tf5_dots1: "tf5/dots1",
    tf5_ernie4_5_moe: "tf5/ernie4_5_moe",
    tf5_exaone_moe: "tf5/exaone_moe",
    tf5_flex_olmo: "tf5/flex_olmo",
    tf5_gemma4_full: "tf5/gemma4_full",
    tf5_gemma4_text: "tf5/gemma4_text",
    tf5_gemma4_text_long: "tf5/gemma4_text_long",
    tf5_glm4_moe: "tf5/glm4_moe",
    tf5_glm4_moe_lite: "tf5/glm4_moe_lite",
    tf5_glm4_moe_lite_group: "tf5/glm4_moe_lite_group",
    tf5_glm4v_moe_full: "tf5/glm4v_moe_full",
    tf5_glm_moe_dsa: "tf5/glm_moe_dsa",
    tf5_gpt_oss: "tf5/gpt_oss",
    tf5_gpt_oss_bf16: "tf5/gpt_oss_bf16",
    tf5_gpt_oss_mxfp4: "tf5/gpt_oss_mxfp4",
    tf5_granitemoe: "tf5/granitemoe",
    tf5_granitemoehybrid: "tf5/granitemoehybrid",
    tf5_granitemoehybrid_long: "tf5/granitemoehybrid_long",
    tf5_granitemoehybrid_rope: "tf5/granitemoehybrid_rope",
    tf5_granitemoeshared: "tf5/granitemoeshared",
    tf5_hunyuan_v1_moe: "tf5/hunyuan_v1_moe",
    tf5_hy_v3: "tf5/hy_v3",
    tf5_kimi_k2: "tf5/kimi_k2",
    tf5_kimi_k25_full: "tf5/kimi_k25_full",
    tf5_lfm2_moe: "tf5/lfm2_moe",
    tf5_llama4_full: "tf5/llama4_full",
    tf5_llama4_text: "tf5/llama4_text",
    tf5_llama4_text_long: "tf5/llama4_text_long",
    tf5_llama4_text_topk2: "tf5/llama4_text_topk2",
    tf5_minimax_m2: "tf5/minimax_m2",
    tf5_mistral4: "tf5/mistral4",
    tf5_mistral4_full: "tf5/mistral4_full",
    tf5_mixtral: "tf5/mixtral",
    tf5_mixtral_gelu_tanh: "tf5/mixtral_gelu_tanh",
    tf5_moonlight: "tf5/moonlight",
    tf5_nemotron_h: "tf5/nemotron_h",
    tf5_nemotron_h_latent: "tf5/nemotron_h_latent",
    tf5_nemotron_h_long: "tf5/nemotron_h_long",
    tf5_olmoe: "tf5/olmoe",
    tf5_phimoe: "tf5/phimoe",
    tf5_phimoe_longrope: "tf5/phimoe_longrope",
    tf5_qwen2_moe: "tf5/qwen2_moe",
    tf5_qwen2_moe_bf16: "tf5/qwen2_moe_bf16",
    tf5_qwen2_moe_linear: "tf5/qwen2_moe_linear",
    tf5_qwen2_moe_mixed: "tf5/qwen2_moe_mixed",
    tf5_qwen2_moe_padded: "tf5/qwen2_moe_padded",
    tf5_qwen2_moe_sliding: "tf5/qwen2_moe_sliding",
    tf5_qwen3_5_moe_full: "tf5/qwen3_5_moe_full",
    tf5_qwen3_5_moe_full_saved: "tf5/qwen3_5_moe_full_saved",
    tf5_qwen3_5_moe_text: "tf5/qwen3_5_moe_text",
    tf5_qwen3_5_moe_text_long: "tf5/qwen3_5_moe_text_long",
    tf5_qwen3_5_moe_text_native: "tf5/qwen3_5_moe_text_native",
    tf5_qwen3_5_moe_text_padded: "tf5/qwen3_5_moe_text_padded",
    tf5_qwen3_moe: "tf5/qwen3_moe",
    tf5_qwen3_moe_gelu: "tf5/qwen3_moe_gelu",
    tf5_qwen3_moe_long: "tf5/qwen3_moe_long",
    tf5_qwen3_moe_sharded: "tf5/qwen3_moe_sharded",
    tf5_qwen3_moe_yarn: "tf5/qwen3_moe_yarn",
    tf5_qwen3_next: "tf5/qwen3_next",
    tf5_qwen3_next_long: "tf5/qwen3_next_long",
    tf5_qwen3_next_mixed: "tf5/qwen3_next_mixed",
    tf5_qwen3_omni_moe_thinker: "tf5/qwen3_omni_moe_thinker",
    tf5_qwen3_vl_moe_full: "tf5/qwen3_vl_moe_full",
    tf5_qwen3_vl_moe_full_saved: "tf5/qwen3_vl_moe_full_saved",
    tf5_qwen3_vl_moe_mixed: "tf5/qwen3_vl_moe_mixed",
    tf5_sarvam_moe: "tf5/sarvam_moe",
    tf5_step3p7_full: "tf5/step3p7_full",
}

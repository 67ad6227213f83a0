//! What transformers computes for tiny checkpoints of each family, compared with what we compute: logits, layer inputs, router
//! logits, loss and expert gradients, to 1e-4 absolute; and the same bits whether weights are resident or streamed.
#![cfg(feature = "flex")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use burn::tensor::{Device, Tensor};
use moe_core::{
    Engine, EngineOptions, Error, Model, Result,
    data::{Sequence, Wave},
    host::HostView,
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
    logits: Vec<f32>,
    /// (layer, expert) -> gradients of gate_up `[2I, H]` and down `[H, I]`.
    gradients: BTreeMap<(usize, usize), (Vec<f32>, Vec<f32>)>,
}

impl Observer for Recorder {
    fn needs(&self) -> Signals {
        Signals { routing: true, units: true, outputs: true, gradients: true, hidden: true, logits: true }
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        self.router_logits.push(trace.logits.to_vec());
        Ok(())
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> Result<()> {
        let backward = trace.backward.expect("asked for");
        let weights = Tensor::<1>::from_floats(trace.routing_weights, &trace.input.device()).unsqueeze_dim::<2>(1);
        let gate_up = backward.gate_up.clone().transpose().matmul(trace.input.clone());
        let upstream = backward.upstream.clone() * weights;
        let down = upstream.transpose().matmul(trace.units.expect("asked for").clone());
        // the output signal is f(x): check it against its definition on the way
        let output = trace.units.unwrap().clone().matmul(trace.expert_weights.down.to_tensor().transpose());
        let (a, b) = (HostView::new(&output), HostView::new(trace.output.expect("asked for")));
        assert!(a.as_slice().iter().zip(b.as_slice()).all(|(a, b)| (a - b).abs() < 1e-5));
        let values = |x: &Tensor<2>| HostView::new(x).as_slice().to_vec();
        self.gradients.insert((trace.layer, trace.expert), (values(&gate_up), values(&down)));
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

#[track_caller]
fn assert_close(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= TOLERANCE, "{what}: differs by {worst}");
    assert!(found.iter().all(|x| x.is_finite()), "{what}: not finite");
}

/// Rows of a `[rows, ..]` array.
fn pick(values: &[f32], rows: &[usize], count: usize) -> Vec<f32> {
    let width = values.len() / count;
    rows.iter().flat_map(|&r| values[r * width..(r + 1) * width].iter().copied()).collect()
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
    assert_close(&format!("{name} logits"), &found.logits, &pick(&expected.floats("logits").unwrap(), &valid, count));
    for (layer, hidden) in &found.hidden {
        let all = expected.floats(&format!("hidden.{layer}")).unwrap();
        assert_close(&format!("{name} hidden.{layer}"), hidden, &pick(&all, &valid, count));
    }
    assert!(!found.router_logits.is_empty());
    for (n, logits) in found.router_logits.iter().enumerate() {
        let all = expected.floats(&format!("router_logits.{n}")).unwrap();
        assert_close(&format!("{name} router_logits.{n}"), logits, &pick(&all, &valid, count));
    }
    check_gradients(name, &dir, &found, &expected, wave.loss_tokens() as f32);

    // Streamed: the least memory that works, so nothing is resident or kept and layer inputs go to a file.
    let Error::Memory { needed, .. } = run(&dir, &wave, Some(1)).err().expect("one byte is too little") else {
        panic!("expected a memory error")
    };
    let (streamed, streamed_loss) = run(&dir, &wave, Some(needed)).unwrap();
    assert_eq!(loss.to_bits(), streamed_loss.to_bits(), "{name}: streamed loss");
    let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&found.logits), bits(&streamed.logits), "{name}: streamed logits");
    for (key, (gate_up, down)) in &found.gradients {
        assert_eq!(bits(gate_up), bits(&streamed.gradients[key].0), "{name}: streamed gate_up gradient of {key:?}");
        assert_eq!(bits(down), bits(&streamed.gradients[key].1), "{name}: streamed down gradient of {key:?}");
    }
}

fn check_gradients(name: &str, dir: &Path, found: &Recorder, expected: &Expected<'_>, loss_tokens: f32) {
    let config = moe_checkpoint::Checkpoint::open(dir).unwrap().config().clone();
    let h = config.hidden_size;
    let mut checked = 0;
    for (layer, _) in config.layers.iter().enumerate() {
        let Some(moe) = config.moe(layer) else { continue };
        for (e, &width) in moe.widths.iter().enumerate() {
            let prefix = format!("grad.model.layers.{layer}.mlp.experts");
            let (gate_up, down) = match expected.floats(&format!("{prefix}.gate_up_proj")) {
                Some(fused) => {
                    let n = 2 * width * h;
                    let down = expected.floats(&format!("{prefix}.down_proj")).unwrap();
                    (fused[e * n..(e + 1) * n].to_vec(), down[e * n / 2..(e + 1) * n / 2].to_vec())
                }
                None => {
                    // an expert without tokens has no gradient in the per-expert layout
                    let part = |p: &str| {
                        expected.floats(&format!("{prefix}.{e}.{p}.weight")).unwrap_or_else(|| vec![0.0; width * h])
                    };
                    ([part("gate_proj"), part("up_proj")].concat(), part("down_proj"))
                }
            };
            let zero = (vec![0.0; 2 * width * h], vec![0.0; width * h]);
            let ours = found.gradients.get(&(layer, e)).unwrap_or(&zero);
            let mean = |x: &[f32]| x.iter().map(|v| v / loss_tokens).collect::<Vec<_>>();
            assert_close(&format!("{name} layer {layer} expert {e} gate_up gradient"), &mean(&ours.0), &gate_up);
            assert_close(&format!("{name} layer {layer} expert {e} down gradient"), &mean(&ours.1), &down);
            checked += 1;
        }
    }
    assert!(checked > 0);
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
    tf4_qwen2_moe: "tf4/qwen2_moe",
    tf4_qwen2_moe_padded: "tf4/qwen2_moe_padded",
    tf4_qwen2_moe_sliding: "tf4/qwen2_moe_sliding",
    tf4_qwen3_moe: "tf4/qwen3_moe",
    tf5_qwen2_moe: "tf5/qwen2_moe",
    tf5_qwen2_moe_bf16: "tf5/qwen2_moe_bf16",
    tf5_qwen2_moe_linear: "tf5/qwen2_moe_linear",
    tf5_qwen2_moe_mixed: "tf5/qwen2_moe_mixed",
    tf5_qwen2_moe_padded: "tf5/qwen2_moe_padded",
    tf5_qwen2_moe_sliding: "tf5/qwen2_moe_sliding",
    tf5_qwen3_moe: "tf5/qwen3_moe",
    tf5_qwen3_moe_long: "tf5/qwen3_moe_long",
    tf5_qwen3_moe_sharded: "tf5/qwen3_moe_sharded",
    tf5_qwen3_moe_yarn: "tf5/qwen3_moe_yarn",
}

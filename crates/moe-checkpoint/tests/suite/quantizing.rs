//! Quantization: what is computed in memory is what is written, in every format.

use crate::common;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::{assert_parts, fixture, message};
use moe_checkpoint::{
    BasePrecision, Checkpoint, Existing, ExpertPart, KeptQuantization, MatrixOrigin, ModelDescription, ModelSource,
    QUANTIZE_METHOD, QuantizeOptions, Quantized, QuantizedPart, Record, TensorInfo, WeightFormat, WriteOptions, write,
};

fn tiny_moe() -> Arc<Checkpoint> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    Arc::new(Checkpoint::open(dir).unwrap())
}

fn open(name: &str) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(fixture(name)).unwrap())
}

fn int(bits: usize, group_size: Option<usize>, symmetric: bool) -> WeightFormat {
    WeightFormat::Int { bits, group_size, symmetric }
}

/// Formats whose groups divide 96 and 128, with the largest relative error of a normal distribution, in per cent.
fn formats() -> Vec<(WeightFormat, f64)> {
    vec![
        (WeightFormat::Fp8Blocks { block: [32, 32] }, 3.0),
        (WeightFormat::Fp8Channels, 3.0),
        (WeightFormat::Mxfp4, 14.0),
        (WeightFormat::Nvfp4, 11.0),
        (WeightFormat::Nf4, 11.0),
        (int(4, Some(32), true), 12.0),
        (int(4, Some(32), false), 11.0),
        (int(4, None, true), 16.0),
        (int(8, Some(32), true), 1.0),
    ]
}

fn weights(model: &Checkpoint) -> Vec<Vec<f32>> {
    let mut out = Vec::new();
    for layer in &model.shape().layers {
        for expert in 0..layer.num_experts() {
            for part in ExpertPart::ALL {
                out.push(model.expert_part(layer.layer, expert, part).unwrap().unwrap().to_f32());
            }
        }
    }
    out
}

#[test]
fn what_is_written_is_what_the_model_in_memory_is() {
    let dir = tempfile::tempdir().unwrap();
    let base = tiny_moe();
    let plain = weights(&base);
    for (format, bound) in formats() {
        for part in [QuantizedPart::Experts, QuantizedPart::Linear] {
            let options = QuantizeOptions { format: format.clone(), part };
            let quantized = Quantized::on(&base, &options).unwrap_or_else(|error| panic!("{format}: {error}"));
            let (model, report) = (quantized.model(), quantized.report());
            let out = dir.path().join("out");
            let written =
                write(model, &out, &WriteOptions { existing: Existing::Force, ..Default::default() }).unwrap();
            let reopened = Checkpoint::open(&out).unwrap();
            assert!(reopened.quantization().is_some() && model.quantization() == reopened.quantization(), "{format}");
            assert_eq!((written.bytes, report.bytes.after), (model.bytes_on_disk(), model.bytes_on_disk()));
            for info in model.tensors() {
                assert!(
                    model.bytes(&info.name).unwrap() == reopened.bytes(&info.name).unwrap(),
                    "{format}: {}",
                    info.name
                );
            }
            let (in_memory, on_disk) = (weights(model), weights(&reopened));
            assert!(in_memory == on_disk, "{format}");
            // Errors are those of so many bits.
            let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
            let apart = square(&mut plain.iter().flatten().zip(in_memory.iter().flatten()).map(|(a, b)| a - b));
            let error = 100.0 * (apart / square(&mut plain.iter().flatten().copied())).sqrt();
            assert!(error < bound && error > bound / 20.0, "{format}: {error}%");
            assert!((100.0 * report.relative_error - error).abs() < bound / 4.0, "{format}: {report}");
            assert_eq!(model.parameters(), base.parameters(), "{format}");
            let linear = part == QuantizedPart::Linear;
            let attention = model.dequantized_f32("model.layers.1.self_attn.q_proj.weight").unwrap();
            assert_eq!(attention.is_some(), linear, "{format}");
            for dense in
                ["model.layers.1.mlp.gate.weight", "lm_head.weight", "model.layers.1.mlp.shared_expert_gate.weight"]
            {
                assert!(
                    model.dequantized_f32(dense).unwrap().is_none() && model.info(dense).is_ok(),
                    "{format}: {dense}"
                );
            }
            let record = Record::load(&out).unwrap();
            assert_eq!(record.recipe::<QuantizeOptions>(QUANTIZE_METHOD).unwrap(), Some(options), "{format}");
            // Layers that were quantized can be kept so: every stored tensor is the same.
            let base = Arc::new(reopened);
            let origin = |layer: usize, set: usize| {
                let width = base.shape().layer(layer)?.widths[set];
                Some(MatrixOrigin { set, units: (0..width as u32).collect() })
            };
            let kept = KeptQuantization::on(&base.dequantized().unwrap(), &base, &origin, &BTreeSet::new()).unwrap();
            assert_eq!((kept.cut_groups, kept.model.raw_config()), (0, base.raw_config()), "{format}");
            assert!(
                kept.model.tensors().map(|info| info.spec()).eq(base.tensors().map(|info| info.spec())),
                "{format}"
            );
        }
    }
}

#[test]
fn bytes_are_those_of_the_format() {
    let base = tiny_moe();
    let of = |format: WeightFormat| {
        let model = Quantized::on(&base, &QuantizeOptions::new(format)).unwrap();
        (0..4).map(|layer| model.model().expert_bytes_on_disk(layer).unwrap()).sum::<u64>()
    };
    let elements = 4 * 16 * 3 * 96 * 128u64;
    assert_eq!(base.expert_bytes_on_disk(0).unwrap() * 4, 2 * elements);
    assert_eq!(of(WeightFormat::Fp8Blocks { block: [32, 32] }), elements + 4 * elements / 1024);
    assert_eq!(of(WeightFormat::Mxfp4), elements / 2 + elements / 32);
    assert_eq!(of(WeightFormat::Nvfp4), elements / 2 + elements / 16 + 4 * 4 * 16 * 3);
    // Codes, F32 scales, the table of values and a text with the shape.
    let state = r#"{"quant_type":"nf4","blocksize":64,"dtype":"bfloat16","shape":[128,96]}"#.len() as u64;
    assert_eq!(of(WeightFormat::Nf4), elements / 2 + 4 * elements / 64 + (64 + state) * 4 * 16 * 3);
    // Codes, BF16 scales, and 16 bytes of shape per matrix.
    assert_eq!(of(int(4, Some(32), true)), elements / 2 + 2 * elements / 32 + 16 * 4 * 16 * 3);
}

#[test]
fn experts_of_gpt_oss_are_written_in_its_own_layout() {
    let dir = tempfile::tempdir().unwrap();
    // Its width is 24 without quantization; the one in MXFP4 has whole groups.
    let base = open("tf5/gpt_oss_mxfp4");
    let quantized = Quantized::on(&base, &QuantizeOptions::new(WeightFormat::Mxfp4)).unwrap();
    assert!(quantized.report().notes.iter().any(|note| note.contains("second time")), "{}", quantized.report());
    let out = dir.path().join("out");
    write(quantized.model(), &out, &WriteOptions::default()).unwrap();
    let written = Checkpoint::open(&out).unwrap();
    assert_eq!(written.quantization(), base.quantization());
    assert!(written.tensors().map(|info| info.spec()).eq(base.tensors().map(|info| info.spec())));
    // What is on the grid of MXFP4 stays there, wherever its group has a large code.
    let (a, b) = (weights(&base), weights(&written));
    let same = a.iter().flatten().zip(b.iter().flatten()).filter(|(a, b)| a == b).count();
    assert!(same * 10 > a.iter().flatten().count() * 9, "{same}");
    assert_parts(
        &message(Quantized::on(&base, &QuantizeOptions::new(WeightFormat::Nvfp4)).map(|_| ())),
        &["gpt_oss", "MXFP4 alone", "mxfp4"],
    );
}

#[test]
fn what_cannot_be_is_said_before_any_weight_is_read() {
    let base = tiny_moe();
    let refusal = |format: WeightFormat| message(Quantized::on(&base, &QuantizeOptions::new(format)).map(|_| ()));
    assert_parts(&refusal(WeightFormat::Fp8Blocks { block: [128, 128] }), &["experts.0.gate_proj", "96 rows", "block"]);
    assert_parts(&refusal(int(4, Some(128), true)), &["experts.0.down_proj", "96 columns", "`group_size`"]);
    assert_parts(&refusal(int(3, Some(32), true)), &["3 bits", "4 or 8"]);
    assert_parts(&refusal(int(4, Some(12), true)), &["groups of 12", "multiple of 8"]);
    let unread = message("int5".parse::<WeightFormat>().map(|_| ()));
    assert_parts(&unread, &["int5", "fp8_blocks", "nvfp4"]);
    let misspelled = message(r#"{"type": "int", "bits": 4, "groupsize": 32}"#.parse::<WeightFormat>().map(|_| ()));
    assert_parts(&misspelled, &["groupsize"]);
    assert_eq!(r#"{"type": "int", "bits": 4}"#.parse::<WeightFormat>().unwrap(), int(4, Some(128), true));
    assert_eq!("fp8_channels".parse::<WeightFormat>().unwrap(), WeightFormat::Fp8Channels);
}

#[test]
fn matrices_outside_the_experts_that_do_not_fit_stay_as_they_are_and_are_named() {
    // 24 units and 12 x 4 outputs of attention, in groups of 8.
    let base = open("tf5/qwen3_moe");
    let options = QuantizeOptions { format: WeightFormat::Fp8Blocks { block: [8, 32] }, part: QuantizedPart::Linear };
    let wrong = Quantized::on(&base, &options).map(|_| ());
    assert_parts(&message(wrong), &["down_proj", "24 columns", "multiple of 32"]);
    let options = QuantizeOptions { format: WeightFormat::Fp8Blocks { block: [16, 8] }, part: QuantizedPart::Linear };
    assert_parts(&message(Quantized::on(&base, &options).map(|_| ())), &["gate_proj", "24 rows", "multiple of 16"]);
    let options = QuantizeOptions { format: WeightFormat::Fp8Blocks { block: [8, 8] }, part: QuantizedPart::Linear };
    let quantized = Quantized::on(&base, &options).unwrap();
    let lists = quantized.model().raw_config()["quantization_config"]["modules_to_not_convert"].clone();
    let lists: Vec<String> = serde_json::from_value(lists).unwrap();
    let router = "model.layers.1.mlp.gate".to_string();
    assert!(lists.contains(&router) && lists.contains(&"lm_head".to_string()), "{lists:?}");
    assert!(fs::read_dir(base.dir()).unwrap().count() > 1);
}

#[test]
fn a_model_held_in_memory_is_the_same_and_holds_what_would_be_made_again() {
    let base = tiny_moe();
    assert!(Arc::ptr_eq(&base.packed_in_memory().unwrap(), &base), "nothing of it is quantized");
    for format in [WeightFormat::Nf4, int(4, Some(32), false), WeightFormat::Mxfp4] {
        let options = QuantizeOptions { format: format.clone(), part: QuantizedPart::Linear };
        let quantized = Quantized::on(&base, &options).unwrap();
        let held = quantized.model().packed_in_memory().unwrap();
        assert_eq!(held.fingerprint(), quantized.model().fingerprint());
        assert_eq!(held.packed_bytes(), quantized.model().packed_bytes());
        let expert = "model.layers.1.mlp.experts.3.down_proj.weight";
        for info in quantized.model().tensors() {
            let bytes = held.bytes(&info.name).unwrap();
            assert!(bytes == quantized.model().bytes(&info.name).unwrap(), "{format}: {}", info.name);
            let borrowed = matches!(bytes, std::borrow::Cow::Borrowed(_));
            assert!(borrowed || !info.name.starts_with(expert), "{format}: {} is made again", info.name);
        }
        assert!(weights(&held) == weights(quantized.model()), "{format}");
        // A held model is no other than the held one.
        assert!(Arc::ptr_eq(&held.packed_in_memory().unwrap(), &held));
    }
}

/// The bundled model with twice the down projection of an expert.
struct Doubled(Arc<Checkpoint>, String);

impl ModelSource for Doubled {
    fn bytes(&self, tensor: &TensorInfo, range: std::ops::Range<usize>) -> moe_checkpoint::Result<Cow<'_, [u8]>> {
        let bytes = self.0.tensor_bytes(&tensor.name, range)?;
        if tensor.name != self.1 {
            return Ok(bytes);
        }
        let double =
            |bytes: &[u8]| half::bf16::from_f32(2.0 * half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32());
        Ok(Cow::Owned(bytes.chunks(2).flat_map(|bytes| double(bytes).to_le_bytes()).collect()))
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.0)
    }
}

#[test]
fn new_values_are_rounded_in_the_format_of_the_base_and_the_rest_is_copied() {
    let base = tiny_moe();
    let changed = "model.layers.1.mlp.experts.3.down_proj.weight".to_string();
    for (format, _) in formats() {
        let options = QuantizeOptions { format: format.clone(), part: QuantizedPart::Experts };
        let quantized = Quantized::on(&base, &options).unwrap().model().clone();
        let plain = quantized.dequantized().unwrap();
        let description = ModelDescription::of(&plain);
        let doubled = Doubled(plain.clone(), changed.clone());
        let doubled = Arc::new(Checkpoint::from_source(description, Arc::new(doubled)).unwrap());
        let names = BTreeSet::from([changed.clone()]);
        let again = KeptQuantization::requantized(&doubled, &quantized, &names).unwrap().model;
        assert_eq!(again.raw_config(), quantized.raw_config(), "{format}");
        assert!(again.tensors().map(|info| info.spec()).eq(quantized.tensors().map(|info| info.spec())), "{format}");
        let other = |info: &&TensorInfo| again.bytes(&info.name).unwrap() != quantized.bytes(&info.name).unwrap();
        let others: Vec<&str> = again.tensors().filter(other).map(|info| info.name.as_str()).collect();
        let stem = changed.strip_suffix(".weight").unwrap();
        assert!(!others.is_empty() && others.iter().all(|name| name.starts_with(stem)), "{format}: {others:?}");
        // Twice a matrix that is on the grid is on the grid, with twice the scales; integers need not reach their ends.
        let [found, old] = [&again, &quantized].map(|model| model.dequantized_f32(&changed).unwrap().unwrap());
        let apart: f64 = found.iter().zip(&old).map(|(a, b)| f64::from(a - 2.0 * b).powi(2)).sum();
        let whole: f64 = found.iter().map(|value| f64::from(*value).powi(2)).sum();
        let bound = if matches!(format, WeightFormat::Int { .. }) { 0.08 } else { 0.01 };
        assert!((apart / whole).sqrt() < bound, "{format}: {}", (apart / whole).sqrt());
        assert_eq!(again.steps().last().unwrap().method, "requantize");
        assert_ne!(again.fingerprint(), quantized.fingerprint());
    }
    let gptq = Arc::new(Checkpoint::open(quantized_fixture("gptq-v1-sym-qwen3_moe")).unwrap());
    let plain = gptq.dequantized().unwrap();
    let name = gptq.plain_tensors().find(|info| info.name.contains("experts.0.down_proj")).unwrap().name.clone();
    let refused = KeptQuantization::requantized(&plain, &gptq, &BTreeSet::from([name])).map(|_| ());
    assert_parts(&message(refused), &["GPTQ", "down_proj", "read only", "BF16"]);
}

fn quantized_fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantized").join(name)
}

#[test]
fn precisions_of_a_base_fit_the_model() {
    let base = tiny_moe();
    let format = |name: &str| name.parse::<BasePrecision>().unwrap().format(&base);
    assert_eq!(format("int4"), int(4, Some(32), true));
    assert_eq!(format("fp8"), WeightFormat::Fp8Channels);
    for name in ["nf4", "int4", "int6", "int8", "fp8", "mxfp4", "nvfp4"] {
        let precision: BasePrecision = name.parse().unwrap();
        assert_eq!(precision.to_string(), name);
        let quantized = precision.on(&base).unwrap();
        let attention = quantized.model().dequantized_f32("model.layers.1.self_attn.q_proj.weight").unwrap();
        assert!(attention.is_some(), "{name}");
    }
    let unknown = "nf5".parse::<BasePrecision>().map(|_| ());
    assert_parts(&message(unknown), &["nf5", "nf4, int4, int6, int8, fp8, mxfp4"]);
}

//! Delta files: what they hold, what they take, and what they are added to.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, Dtype, Existing, SafetensorsFile, WriteOptions, encode, write};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use moe_peft::codec::{
    ComPeft, Delta, DeltaCoding, DeltaReport, DeltaTable, DeltaTensor, KeptValues, PlainDelta, TaskVector,
};

const BASES: [&str; 2] = ["qwen2_moe_bf16", "qwen2_moe_mixed"];

fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../moe-checkpoint/tests/fixtures/parity/tf5")).join(name)
}

fn write_tensors(path: &Path, tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn write_adapter(directory: &Path, dtype: Dtype, tensors: &[(&str, Vec<usize>, &[f32])]) {
    fs::create_dir_all(directory).unwrap();
    let tensors = tensors.iter().map(|(name, shape, values)| {
        let mut bytes = Vec::new();
        encode(dtype, values, &mut bytes);
        (name.to_string(), dtype, shape.clone(), bytes)
    });
    write_tensors(&directory.join("adapter_model.safetensors"), tensors.collect());
    fs::write(directory.join("adapter_config.json"), r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 0.1}"#).unwrap();
}

/// An adapter of one vector.
fn vector(directory: &Path, values: &[f32]) -> PathBuf {
    let path = directory.join("adapter");
    write_adapter(&path, Dtype::F32, &[("x", vec![values.len()], values)]);
    path
}

fn adapter(directory: &Path) -> TaskVector<'_> {
    TaskVector::Adapter { directory, start: 0.0 }
}

/// All elements of a delta, one tensor after the other.
fn decoded(path: &Path) -> Vec<f32> {
    let mut all = Vec::new();
    Delta::open(path)
        .unwrap()
        .stream(|_, tau| {
            all.extend(tau);
            Ok(())
        })
        .unwrap();
    all
}

fn coded(values: &[f32], options: ComPeft) -> (Vec<f32>, DeltaReport) {
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (vector(directory.path(), values), directory.path().join("delta"));
    let report = options.encode(adapter(&from), &to).unwrap();
    assert_eq!(report.file_bytes, fs::metadata(&to).unwrap().len());
    (decoded(&to), report)
}

fn scaled(density: f64, alpha: f64) -> ComPeft {
    ComPeft { density, values: KeptValues::Scaled { alpha } }
}

fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| generator.random_range(-1.0..1.0f32)).collect()
}

#[test]
fn the_example_of_the_paper_page() {
    let (found, report) = coded(&[0.5, -0.1, 0.2, -0.9, 0.05], scaled(0.4, 1.0));
    let sigma = report.sigma.unwrap();
    assert!((sigma - 0.524404).abs() < 1e-6, "{sigma}");
    let scale = report.scale.unwrap();
    // sigma in 16 bits
    assert!(
        (f64::from(scale) - sigma).abs() <= sigma * 2f64.powi(-11) && scale == half::f16::from_f32(0.524404).to_f32()
    );
    assert_eq!((found, report.kept), (vec![scale, 0.0, 0.0, -scale, 0.0], 2));
    let (found, report) = coded(&[0.5, -0.1, 0.2, -0.9, 0.05], scaled(0.4, 2.0));
    assert_eq!(found[0], report.scale.unwrap());
    assert!((found[0] - 2.0 * scale).abs() < 1e-3);
}

#[test]
fn exactly_so_many_are_kept_and_the_first_of_equals() {
    let values = [0.5f32, -0.5, 0.25, 0.5, -0.5, 0.75];
    for (density, kept) in [(0.0, 0), (0.16, 0), (0.17, 1), (0.5, 3), (0.8, 4), (0.84, 5), (1.0, 6)] {
        let (found, report) = coded(&values, scaled(density, 1.0));
        assert_eq!(report.kept, kept, "{density}");
        let order = [5, 0, 1, 3, 4, 2];
        for (rank, at) in order.into_iter().enumerate() {
            assert_eq!(found[at] != 0.0, rank < kept as usize, "{density}, {at}");
            assert!(found[at] == 0.0 || found[at].signum() == values[at].signum());
        }
    }
    // 0.29 * 100 is 28.999999999999996
    assert_eq!(coded(&noise(100, 3), scaled(0.29, 1.0)).1.kept, 29);
    // zeros need no place, and are none after coding
    let (found, report) = coded(&[0.0, -0.0, 3.0, 0.0], scaled(1.0, 1.0));
    assert_eq!((report.kept, &found[..2], found[3]), (1, &[0.0, 0.0][..], 0.0));
    assert_eq!(coded(&[], scaled(1.0, 1.0)).1.kept, 0);
}

#[test]
fn kept_values_may_be_means_or_themselves() {
    let values = [4.0f32, -1.0, -2.0, 0.5];
    let code = |values_: KeptValues| coded(&values, ComPeft { density: 0.75, values: values_ }).0;
    assert_eq!(code(KeptValues::MeanMagnitude), [2.334, -2.334, -2.334, 0.0].map(|v| half::f16::from_f32(v).to_f32()));
    assert_eq!(
        code(KeptValues::SignedMean),
        [1.0f32 / 3.0, -1.0 / 3.0, -1.0 / 3.0, 0.0].map(|v| half::f16::from_f32(v).to_f32())
    );
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        assert_eq!(code(KeptValues::Unchanged { dtype }), [4.0, -1.0, -2.0, 0.0]);
    }
    let values = noise(1000, 4);
    let (found, _) = coded(&values, ComPeft { density: 1.0, values: KeptValues::Unchanged { dtype: Dtype::F32 } });
    assert_eq!(found, values);
}

/// Random masks cost what the formula says, from one in fifty to all, and come back.
#[test]
fn sizes_follow_the_formula() {
    for (seed, density) in [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9, 1.0].into_iter().enumerate() {
        let values = noise(300_000, seed as u64);
        let (found, report) = coded(&values, scaled(density, 1.0));
        let (bytes, expected) = (report.payload_bytes as f64, report.expected_bytes.unwrap() as f64);
        assert!((bytes / expected - 1.0).abs() < 0.03, "{density}: {bytes} and {expected}");
        assert!(report.file_bytes - report.payload_bytes < 600, "{report:?}");
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|a, b| values[*b].abs().total_cmp(&values[*a].abs()).then(a.cmp(b)));
        let scale = report.scale.unwrap();
        let mut right = vec![0.0; values.len()];
        order[..report.kept as usize].iter().for_each(|at| right[*at] = scale * values[*at].signum());
        assert!(found == right, "{density}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn any_signs_come_back(signs in prop::collection::vec(prop::sample::select(vec![-1i8, 0, 0, 0, 1]), 1..400), start in 0f32..2.0) {
        let values: Vec<f32> = signs.iter().map(|sign| f32::from(*sign) * 0.125).collect();
        let directory = tempfile::tempdir().unwrap();
        let from = directory.path().join("adapter");
        let split = values.len() / 3;
        let shifted: Vec<f32> = values.iter().map(|value| value + start).collect();
        let tensors = [("b.one", vec![split], &shifted[..split]), ("a.two", vec![values.len() - split, 1], &shifted[split..])];
        write_adapter(&from, Dtype::F32, &tensors);
        let to = directory.path().join("delta");
        let vector = TaskVector::Adapter { directory: &from, start };
        let report = scaled(1.0, 1.0).encode(vector, &to).unwrap();
        // rounding of the shift aside, which zeros survive
        let scale = report.scale.unwrap();
        let found = decoded(&to);
        let by_name: Vec<i8> = signs[split..].iter().chain(&signs[..split]).copied().collect();
        prop_assert_eq!(found.len(), by_name.len());
        for (found, sign) in found.iter().zip(by_name) {
            prop_assert_eq!(*found, f32::from(sign) * scale);
        }
        let out = directory.path().join("out");
        Delta::open(&to).unwrap().restore_adapter(&out, Existing::Refuse).unwrap();
        let file = SafetensorsFile::open(out.join("adapter_model.safetensors")).unwrap();
        prop_assert_eq!(&file.tensor("a.two").unwrap().shape, &vec![values.len() - split, 1]);
        for (value, sign) in file.f32("b.one").unwrap().iter().zip(&signs[..split]) {
            prop_assert_eq!(*value, f32::from(*sign) * scale + start);
        }
    }

    #[test]
    fn changed_bytes_are_errors(at in 0usize..2000, bit in 0u8..8, cut in 0usize..2000) {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (vector(directory.path(), &noise(1000, 9)), directory.path().join("delta"));
        scaled(0.2, 1.0).encode(adapter(&from), &to).unwrap();
        let bytes = fs::read(&to).unwrap();
        let mut changed = bytes.clone();
        let at = at % bytes.len();
        changed[at] ^= 1 << bit;
        fs::write(&to, &changed).unwrap();
        // Bytes 12 to 15 are unused; a change of the table may leave another valid table.
        if let Ok(delta) = Delta::open(&to) {
            let payload = 32..32 + delta.table().payload_bytes as usize;
            prop_assert!(!payload.contains(&at));
            let _ = delta.stream(|_, _| Ok(()));
            let _ = delta.restore_adapter(&directory.path().join("out"), Existing::Refuse);
        }
        fs::write(&to, &bytes[..cut % bytes.len()]).unwrap();
        prop_assert!(Delta::open(&to).is_err());
    }
}

/// Payloads that are wrong although their digest is right.
#[test]
fn payloads_that_do_not_fit_their_table_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (vector(directory.path(), &noise(200, 2)), directory.path().join("delta"));
    scaled(0.5, 1.0).encode(adapter(&from), &to).unwrap();
    let bytes = fs::read(&to).unwrap();
    let table = Delta::open(&to).unwrap().table().clone();
    let written = |change: &dyn Fn(&mut DeltaTable, &mut Vec<u8>)| {
        let (mut table, mut payload) = (table.clone(), bytes[32..32 + table.payload_bytes as usize].to_vec());
        change(&mut table, &mut payload);
        table.payload_bytes = payload.len() as u64;
        table.payload_digest = blake3::hash(&payload).to_hex().to_string();
        let json = serde_json::to_vec(&table).unwrap();
        let mut file = bytes[..16].to_vec();
        file.extend((32 + payload.len() as u64).to_le_bytes());
        file.extend((json.len() as u64).to_le_bytes());
        file.extend(payload);
        file.extend(json);
        fs::write(&to, file).unwrap();
        Delta::open(&to)
    };
    let with = |change: &dyn Fn(&mut DeltaTable, &mut Vec<u8>)| {
        let result = written(change).and_then(|delta| delta.stream(|_, _| Ok(())));
        result.map_err(|error| error.to_string())
    };
    assert!(with(&|_, _| ()).is_ok());
    assert!(with(&|_, payload| payload.fill(0xFF)).unwrap_err().contains("damaged code"));
    assert!(with(&|_, payload| payload.truncate(payload.len() / 2)).is_err());
    let kept = |kept| {
        move |table: &mut DeltaTable, _: &mut Vec<u8>| {
            table.coding = DeltaCoding::Ternary { kept, rice: 0, scale: 0 };
        }
    };
    assert!(with(&kept(u64::MAX)).unwrap_err().contains("coding"));
    assert!(with(&kept(201)).unwrap_err().contains("coding"));
    let huge = |table: &mut DeltaTable, _: &mut Vec<u8>| table.tensors[0].shape = vec![usize::MAX, 3];
    assert!(with(&huge).unwrap_err().contains("shape"));
    let int = |table: &mut DeltaTable, _: &mut Vec<u8>| table.tensors[0].dtype = Dtype::I32;
    assert!(with(&int).unwrap_err().contains("I32"));
    let twice = |table: &mut DeltaTable, _: &mut Vec<u8>| table.tensors.push(table.tensors[0].clone());
    assert!(with(&twice).unwrap_err().contains("order of tensors"));
    let dense = |table: &mut DeltaTable, _: &mut Vec<u8>| table.coding = DeltaCoding::Difference { dtype: Dtype::F32 };
    assert!(with(&dense).unwrap_err().contains("payload"));
    // A petabyte of zeros, of which the payload says nothing.
    let zeros = |table: &mut DeltaTable, _: &mut Vec<u8>| table.tensors[0].shape = vec![1 << 50];
    let out = directory.path().join("out");
    let error = written(&zeros).unwrap().restore_adapter(&out, Existing::Refuse).unwrap_err().to_string();
    assert!(error.contains("bytes") && error.contains("free") && !out.exists(), "{error}");
}

/// A checkpoint of the base's shape with `change` applied to the elements of every tensor, by name.
fn tuned(base: &Checkpoint, to: &Path, change: &dyn Fn(&str, &mut [f32])) {
    fs::create_dir_all(to).unwrap();
    let mut tensors = Vec::new();
    for info in base.tensors() {
        let (mut values, mut bytes) = (base.tensor_f32(&info.name).unwrap(), Vec::new());
        change(&info.name, &mut values);
        encode(info.dtype, &values, &mut bytes);
        tensors.push((info.name.clone(), info.dtype, info.shape.clone(), bytes));
    }
    write_tensors(&to.join("model.safetensors"), tensors);
    fs::copy(base.dir().join("config.json"), to.join("config.json")).unwrap();
}

fn weights(checkpoint: &Checkpoint) -> BTreeMap<String, Vec<u8>> {
    checkpoint.tensors().map(|info| (info.name.clone(), checkpoint.bytes(&info.name).unwrap().to_vec())).collect()
}

#[test]
fn checkpoints_come_back_from_base_and_delta() {
    for name in BASES {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let base = Arc::new(Checkpoint::open(fixture(name)).unwrap());
        let experts = |name: &str| name.contains("experts");
        tuned(&base, &at("tuned"), &|name, values| {
            if experts(name) {
                let noise = noise(values.len(), name.len() as u64);
                values.iter_mut().zip(noise).for_each(|(value, noise)| *value += 0.01 * noise);
            }
        });
        let after = Arc::new(Checkpoint::open(at("tuned")).unwrap());
        let vector = TaskVector::Checkpoints { base: &base, tuned: &after };

        // whole tensors: byte for byte
        let report = PlainDelta::Changed.encode(vector, &at("changed.delta")).unwrap();
        assert_eq!(report.tensors, base.tensors().filter(|info| experts(&info.name)).count());
        let options = WriteOptions { max_shard_bytes: 40_000, ..WriteOptions::default() };
        let delta = Delta::open(at("changed.delta")).unwrap();
        assert_eq!(delta.bytes(), report.file_bytes);
        let written = write(delta.on(&base).unwrap().model(), at("changed"), &options).unwrap();
        assert!(written.files.len() > 1);
        let restored = Checkpoint::open(at("changed")).unwrap();
        assert_eq!(weights(&restored), weights(&after));
        assert!(delta.stream(|_, _| Ok(())).unwrap_err().to_string().contains("whole tensors"));

        // differences in f32 round to the same
        let plain = PlainDelta::Difference { dtype: Dtype::F32 };
        plain.encode(vector, &at("difference.delta")).unwrap();
        let difference = Delta::open(at("difference.delta")).unwrap().on(&base).unwrap();
        write(difference.model(), at("difference"), &WriteOptions::default()).unwrap();
        let restored = Checkpoint::open(at("difference")).unwrap();
        let (found, right) = (weights(&restored), weights(&after));
        let different = found.iter().zip(&right).filter(|(a, b)| a != b).count();
        for info in base.tensors() {
            let (found, right) = (restored.tensor_f32(&info.name).unwrap(), after.tensor_f32(&info.name).unwrap());
            assert!(found.iter().zip(&right).all(|(a, b)| (a - b).abs() <= 1e-6), "{}", info.name);
        }
        assert!(name != "qwen2_moe_bf16" || different == 0, "{different}");

        // signs: what the delta says, rounded to the dtype of the base, and nothing where there was no change
        let report = scaled(0.1, 1.0).encode(vector, &at("task.delta")).unwrap();
        let total: u64 = base.tensors().map(|info| info.elements()).sum();
        assert_eq!((report.elements, report.kept), (total, total / 10));
        let delta = Delta::open(at("task.delta")).unwrap();
        let patched = delta.on(&base).unwrap();
        write(patched.model(), at("task"), &WriteOptions::default()).unwrap();
        let restored = Checkpoint::open(at("task")).unwrap();
        let mut tau: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        let collect = |tensor: &DeltaTensor, piece: &[f32]| {
            tau.entry(tensor.name.clone()).or_default().extend(piece);
            Ok(())
        };
        delta.stream(collect).unwrap();
        for info in base.tensors() {
            let mut right = base.tensor_f32(&info.name).unwrap();
            right.iter_mut().zip(&tau[&info.name]).for_each(|(value, tau)| *value += tau);
            let mut bytes = Vec::new();
            encode(info.dtype, &right, &mut bytes);
            assert!(restored.bytes(&info.name).unwrap() == bytes, "{}", info.name);
            assert!(experts(&info.name) || tau[&info.name].iter().all(|tau| *tau == 0.0));
        }
        assert_eq!(restored.raw_config(), base.raw_config());

        // another base, and the same output twice
        let error = delta.on(&after).unwrap_err().to_string();
        assert!(error.contains("fingerprint of the base"), "{error}");
        assert!(write(patched.model(), at("task"), &WriteOptions::default()).is_err());
        let error = delta.restore_adapter(&at("other"), Existing::Refuse).unwrap_err().to_string();
        assert!(error.contains("expected an adapter"), "{error}");
    }
}

#[test]
fn a_base_with_a_delta_reads_alike_by_any_ranges_and_runs_as_it_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    for name in BASES {
        let base = Arc::new(Checkpoint::open(fixture(name)).unwrap());
        tuned(&base, &at(&format!("{name}-tuned")), &|tensor, values| {
            let noise = noise(values.len(), tensor.len() as u64);
            values.iter_mut().zip(noise).for_each(|(value, noise)| *value += 0.01 * noise);
        });
        let after = Checkpoint::open(at(&format!("{name}-tuned"))).unwrap();
        let vector = TaskVector::Checkpoints { base: &base, tuned: &after };
        let file = at(&format!("{name}.delta"));
        let sparse = ComPeft { density: 0.3, values: KeptValues::Unchanged { dtype: Dtype::F32 } };
        let encode: [&dyn Fn(); 4] = [
            &|| PlainDelta::Changed.encode(vector, &file).map(drop).unwrap(),
            &|| PlainDelta::Difference { dtype: Dtype::BF16 }.encode(vector, &file).map(drop).unwrap(),
            &|| sparse.encode(vector, &file).map(drop).unwrap(),
            &|| scaled(0.05, 1.0).encode(vector, &file).map(drop).unwrap(),
        ];
        for (index, encode) in encode.into_iter().enumerate() {
            encode();
            let patched = Delta::open(&file).unwrap().on(&base).unwrap();
            let out = at(&format!("{name}-{index}"));
            write(patched.model(), &out, &WriteOptions::default()).unwrap();
            let written = Checkpoint::open(&out).unwrap();
            assert_eq!(weights(patched.model()), weights(&written));
            assert!(weights(&written) != weights(&base) && written.steps()[0].method == "delta");
            for info in patched.model().tensors() {
                let (whole, length) = (written.bytes(&info.name).unwrap(), info.bytes as usize);
                for range in [0..length / 3, length / 3..length, length / 2..length / 2 + 1, 1..length.min(8)] {
                    let part = patched.model().tensor_bytes(&info.name, range.clone()).unwrap();
                    assert!(*part == whole[range], "{}", info.name);
                }
            }
            let layer = base.shape().layers[0].layer;
            assert_eq!(patched.model().expert(layer, 1).unwrap(), written.expert(layer, 1).unwrap());
        }
    }
}

#[test]
fn a_delta_of_long_tensors_is_read_from_the_middle() {
    // Two experts of more elements than are decoded at a time.
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let mut config: serde_json::Value =
        serde_json::from_slice(&fs::read(fixture("qwen3_moe").join("config.json")).unwrap()).unwrap();
    let (hidden, width, experts) = (256, 768, 2);
    for (key, value) in [
        ("hidden_size", hidden),
        ("moe_intermediate_size", width),
        ("num_experts", experts),
        ("num_experts_per_tok", 1),
        ("num_hidden_layers", 1),
        ("vocab_size", 8),
        ("num_attention_heads", 2),
        ("num_key_value_heads", 2),
        ("head_dim", 4),
    ] {
        config[key] = value.into();
    }
    for key in ["layer_types", "num_local_experts"] {
        config.as_object_mut().unwrap().remove(key);
    }
    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".into(), vec![8, hidden]),
        ("lm_head.weight".into(), vec![8, hidden]),
        ("model.norm.weight".into(), vec![hidden]),
    ];
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    for name in ["input_layernorm", "post_attention_layernorm"] {
        tensors.push((layer(name), vec![hidden]));
    }
    for name in ["self_attn.q_norm", "self_attn.k_norm"] {
        tensors.push((layer(name), vec![4]));
    }
    for name in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] {
        tensors.push((layer(name), vec![8, hidden]));
    }
    tensors.push((layer("self_attn.o_proj"), vec![hidden, 8]));
    tensors.push((layer("mlp.gate"), vec![experts, hidden]));
    tensors.push(("model.layers.0.mlp.experts.gate_up_proj".into(), vec![experts, 2 * width, hidden]));
    tensors.push(("model.layers.0.mlp.experts.down_proj".into(), vec![experts, hidden, width]));
    for (dir, seed) in [("base", 1), ("tuned", 2)] {
        fs::create_dir_all(at(dir)).unwrap();
        let made = tensors.iter().map(|(name, shape)| {
            let mut bytes = Vec::new();
            encode(Dtype::BF16, &noise(shape.iter().product(), seed + name.len() as u64), &mut bytes);
            (name.clone(), Dtype::BF16, shape.clone(), bytes)
        });
        write_tensors(&at(dir).join("model.safetensors"), made.collect());
        fs::write(at(dir).join("config.json"), config.to_string()).unwrap();
    }
    let base = Arc::new(Checkpoint::open(at("base")).unwrap());
    let tuned = Checkpoint::open(at("tuned")).unwrap();
    scaled(0.2, 1.0).encode(TaskVector::Checkpoints { base: &base, tuned: &tuned }, &at("delta")).unwrap();
    let patched = Delta::open(at("delta")).unwrap().on(&base).unwrap();
    write(patched.model(), at("out"), &WriteOptions::default()).unwrap();
    let written = Checkpoint::open(at("out")).unwrap();
    assert_eq!(weights(patched.model()), weights(&written));
    // The other order, so that nothing depends on what was read before.
    for expert in (0..experts).rev() {
        assert_eq!(patched.model().expert(0, expert).unwrap(), written.expert(0, expert).unwrap());
    }
    let name = "model.layers.0.mlp.experts.gate_up_proj";
    let mut right = base.tensor_f32(name).unwrap();
    let mut start = 0;
    let add = |tensor: &DeltaTensor, tau: &[f32]| {
        if tensor.name == name {
            right[start..start + tau.len()].iter_mut().zip(tau).for_each(|(value, tau)| *value += tau);
            start += tau.len();
        }
        Ok(())
    };
    Delta::open(at("delta")).unwrap().stream(add).unwrap();
    let mut bytes = Vec::new();
    encode(Dtype::BF16, &right, &mut bytes);
    assert!(written.bytes(name).unwrap() == bytes);
}

#[test]
fn adapters_come_back_whole() {
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (directory.path().join("adapter"), directory.path().join("delta"));
    // one tensor is longer than a piece
    let (long, short) = (noise(300_001, 1), noise(48, 2));
    write_adapter(
        &from,
        Dtype::BF16,
        &[("b.lora_A.weight", vec![300_001], &long), ("a.lora_B.weight", vec![6, 8], &short)],
    );
    let file = |directory: &Path| fs::read(directory.join("adapter_model.safetensors")).unwrap();
    PlainDelta::Changed.encode(adapter(&from), &to).unwrap();
    let out = directory.path().join("out");
    Delta::open(&to).unwrap().restore_adapter(&out, Existing::Refuse).unwrap();
    let (a, b) = (from.join("adapter_model.safetensors"), out.join("adapter_model.safetensors"));
    let (a, b) = (SafetensorsFile::open(a).unwrap(), SafetensorsFile::open(b).unwrap());
    assert!(a.tensors().eq(b.tensors()) && a.tensors().all(|t| a.bytes(&t.name).unwrap() == b.bytes(&t.name).unwrap()));
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config, serde_json::json!({"peft_type": "LORA", "r": 2, "lora_alpha": 0.1}));
    // kept as they are, in their dtype, all of them
    let unchanged = KeptValues::Unchanged { dtype: Dtype::BF16 };
    ComPeft { density: 1.0, values: unchanged }.encode(adapter(&from), &to).unwrap();
    Delta::open(&to).unwrap().restore_adapter(&out, Existing::Force).unwrap();
    let again = SafetensorsFile::open(out.join("adapter_model.safetensors")).unwrap();
    assert!(a.tensors().all(|t| a.bytes(&t.name).unwrap() == again.bytes(&t.name).unwrap()));
    // the same input gives the same bytes
    scaled(0.05, 1.0).encode(adapter(&from), &to).unwrap();
    let first = fs::read(&to).unwrap();
    scaled(0.05, 1.0).encode(adapter(&from), &to).unwrap();
    assert!(fs::read(&to).unwrap() == first && !file(&from).is_empty());
    let error = Delta::open(&to).unwrap().on(&Arc::new(Checkpoint::open(fixture(BASES[0])).unwrap()));
    assert!(error.unwrap_err().to_string().contains("expected a checkpoint"));
}

#[test]
fn bad_input_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let from = vector(directory.path(), &[1.0, f32::NAN]);
    let to = directory.path().join("delta");
    let message = |options: ComPeft| options.encode(adapter(&from), &to).unwrap_err().to_string();
    assert!(message(scaled(1.5, 1.0)).contains("density: found 1.5"));
    assert!(message(scaled(0.5, 0.0)).contains("alpha"));
    let values = KeptValues::Unchanged { dtype: Dtype::I8 };
    assert!(message(ComPeft { density: 0.5, values }).contains("I8"));
    assert!(message(scaled(0.5, 1.0)).contains("task vector of x: found NaN"));
    let plain = PlainDelta::Difference { dtype: Dtype::U8 }.encode(adapter(&from), &to);
    assert!(plain.unwrap_err().to_string().contains("U8"));
    assert!(!to.exists());
    let [base, other] = BASES.map(|name| Checkpoint::open(fixture(name)).unwrap());
    let vector = TaskVector::Checkpoints { base: &base, tuned: &other };
    assert!(scaled(0.1, 1.0).encode(vector, &to).is_err());
    fs::write(&to, b"PK some other file that is long enough").unwrap();
    assert!(Delta::open(&to).unwrap_err().to_string().contains("first bytes"));
    fs::write(&to, b"MOEDELTA\x02\0\0\0 and so on, long enough.").unwrap();
    assert!(Delta::open(&to).unwrap_err().to_string().contains("version: found 2"));
}

#[test]
fn options_are_json() {
    let options: ComPeft = serde_json::from_str(r#"{"density": 0.05, "values": {"scaled": {"alpha": 2.0}}}"#).unwrap();
    assert_eq!(options, scaled(0.05, 2.0));
    let unchanged: ComPeft = serde_json::from_str(r#"{"values": {"unchanged": {"dtype": "F16"}}}"#).unwrap();
    assert_eq!(unchanged.values, KeptValues::Unchanged { dtype: Dtype::F16 });
    assert!(serde_json::from_str::<ComPeft>(r#"{"k": 3}"#).is_err());
}

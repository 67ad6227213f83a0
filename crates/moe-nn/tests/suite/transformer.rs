//! Decoders against what transformers computes, and the way back.
#![cfg(feature = "checkpoint")]

use crate::common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{Int, Tensor, TensorData};
use common::*;
use moe_checkpoint::{Checkpoint, WriteOptions, write};
use moe_nn::*;

const FAMILIES: [&str; 5] = ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v2"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5").join(name)
}

/// The ids `[2, 19]` that transformers read, and its logits.
fn expected(name: &str) -> (Vec<i64>, Vec<f32>) {
    let bytes = std::fs::read(fixture(name).join("expected.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("input_ids").unwrap();
    let ids = ids.data().chunks_exact(8).map(|id| i64::from_le_bytes(id.try_into().unwrap())).collect();
    let logits = file.tensor("logits").unwrap();
    (ids, logits.data().chunks_exact(4).map(|value| f32::from_le_bytes(value.try_into().unwrap())).collect())
}

fn ids(name: &str) -> Tensor<2, Int> {
    Tensor::from_data(TensorData::new(expected(name).0, [2, 19]), &plain())
}

#[track_caller]
fn assert_parity(model: &MoeTransformer, name: &str) {
    let logits = values(&model.forward(ids(name)).logits);
    let expected = expected(name).1;
    assert_eq!(logits.len(), expected.len());
    let difference = logits.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(difference < 1e-4, "{name}: {difference}");
}

#[test]
fn five_families_compute_what_transformers_computes() {
    for name in FAMILIES {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        let (model, config) = MoeTransformer::from_checkpoint(&checkpoint, &plain()).unwrap();
        assert_parity(&model, name);
        assert_eq!(model.num_params() as u64, checkpoint.parameters(), "{name}");
        assert_eq!(config.num_layers, model.blocks.len());
    }
}

#[test]
fn what_was_loaded_is_written_byte_for_byte() {
    for name in FAMILIES {
        let out = tempfile::tempdir().unwrap();
        let base = Arc::new(Checkpoint::open(fixture(name)).unwrap());
        let (model, config) = MoeTransformer::from_checkpoint(&base, &plain()).unwrap();
        let made = model.to_checkpoint(&config, Some(&base)).unwrap();
        write(&made, out.path().join("out"), &WriteOptions::default()).unwrap();
        let written = Checkpoint::open(out.path().join("out")).unwrap();
        assert_eq!(written.raw_config(), base.raw_config());
        for info in base.tensors() {
            assert!(written.bytes(&info.name).unwrap() == base.bytes(&info.name).unwrap(), "{name}: {}", info.name);
        }
    }
}

#[test]
fn a_model_of_its_own_becomes_a_stock_checkpoint() {
    let shared = SharedExpertConfig::new(16, 12).with_gated(true);
    let qwen2 = (AttentionConfig::new(4, 2, 8).with_qkv_bias(true), Some(shared));
    let qwen3 = (AttentionConfig::new(4, 2, 8).with_qk_norm(QkNorm::Head), None);
    for (family, (attention, shared)) in [("qwen2_moe", qwen2), ("qwen3_moe", qwen3)] {
        let out = tempfile::tempdir().unwrap();
        let config = TransformerConfig::new(60, 16, 3, attention, MoeConfig::new(16, 8, 4).with_shared(shared))
            .with_dense_layers(vec![0])
            .with_d_ff(24);
        let model = config.init(&plain());
        write(&model.to_checkpoint(&config, None).unwrap(), out.path().join("out"), &WriteOptions::default()).unwrap();
        let written = Checkpoint::open(out.path().join("out")).unwrap();
        assert_eq!(written.config().model_type, family);
        let (read, _) = MoeTransformer::from_checkpoint(&written, &plain()).unwrap();
        let ids = Tensor::<2, Int>::from_data(TensorData::from([[3i64, 1, 4, 1, 5, 9]]), &plain());
        assert_close(&read.forward(ids.clone()).logits, &model.forward(ids).logits, 1e-5);
    }
}

#[test]
fn a_token_does_not_see_later_ones() {
    let checkpoint = Checkpoint::open(fixture("qwen2_moe")).unwrap();
    let (model, _) = MoeTransformer::from_checkpoint(&checkpoint, &plain()).unwrap();
    let ids = ids("qwen2_moe");
    let part = model.forward(ids.clone().narrow(1, 0, 7)).logits;
    assert_close(&part, &model.forward(ids).logits.narrow(1, 0, 7), 1e-4);
}

#[test]
fn what_modules_lack_is_listed_wholly() {
    let refusal = |name: &str| {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        MoeTransformer::from_checkpoint(&checkpoint, &plain()).unwrap_err().to_string()
    };
    let gpt_oss = refusal("gpt_oss");
    for part in ["`gpt_oss` cannot be represented", "sinks", "clamped", "biases"] {
        assert!(gpt_oss.contains(part), "{gpt_oss}");
    }
    assert!(refusal("deepseek_v3").contains("its routing is no softmax"));
    let config =
        TransformerConfig::new(60, 16, 1, AttentionConfig::new(4, 2, 8).with_clip(Some(1.0)), MoeConfig::new(16, 8, 4));
    let refused = config.init(&plain()).to_checkpoint(&config, None).unwrap_err().to_string();
    assert!(refused.contains("bounds") && refused.contains("no shared expert with a gate"), "{refused}");
}

#[test]
fn a_few_steps_lower_the_loss() {
    use burn_optim::{AdamWConfig, GradientsParams};
    let losses = LossWeights { balance: 0.01, z: 0.001, ..LossWeights::default() };
    let moe = MoeConfig::new(16, 16, 4).with_losses(losses);
    let mut model = TransformerConfig::new(20, 16, 2, AttentionConfig::new(4, 2, 4), moe).init(&autodiff());
    let mut optimizer = AdamWConfig::new().init();
    let text: Vec<i64> = (0..48).map(|i| (i * i) % 7).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(text, [4, 12]), &autodiff());
    let mut seen = Vec::new();
    for _ in 0..40 {
        let output = model.forward(ids.clone());
        let loss = output.next_token_loss(ids.clone());
        seen.push(values(&loss)[0]);
        let gradients = (loss + output.router_loss.unwrap()).backward();
        model = optimizer.step(0.01, model.clone(), GradientsParams::from_grads(gradients, &model));
    }
    assert!(seen[39] < 0.5 * seen[0], "{seen:?}");
}

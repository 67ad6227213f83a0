//! LoRA, rsLoRA and DoRA against huggingface/peft and against difference quotients, on files, in training and merged.

use crate::common;

use std::{path::Path, sync::Arc};

use common::*;
use moe_checkpoint::{Checkpoint, ExpertMatrix, LayerRole, MatrixId, write};
use moe_core::{
    Engine, EngineOptions, Model,
    data::Wave,
    trace::Nobody,
    train::{AdamW, Optimizer},
};
use moe_peft::{
    AdapterSet,
    lora::{CordaMethod, Init, Lora, LoraConfig, LoraWeights, Maps, Naming, Targets, corda::Covariances},
    merge::{Combination, Merged, combine},
    peft_files::{self, ReadOptions, WriteOptions},
};

/// The adapters of peft 0.21.2 and their base models.
const PARITY: [(&str, &str); 7] = [
    ("lora_attention", "qwen2_moe"),
    ("rslora_attention", "qwen2_moe"),
    ("dora_attention", "qwen2_moe"),
    ("lora_experts", "qwen2_moe"),
    ("lora_down_only", "mixtral"),
    ("lora_longcat", "longcat_flash"),
    ("lora_deepseek_v4", "deepseek_v4_saved"),
];

fn parity(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft").join(name)
}

fn installed(model: &Model, adapters: &[(&str, LoraWeights)]) -> (Arc<AdapterSet>, Lora) {
    let mut set = AdapterSet::new();
    let maps = Maps::new(model.checkpoint());
    let lora = Lora::install(&mut set, &maps, adapters, &device()).unwrap();
    (Arc::new(set), lora)
}

fn attention() -> LoraConfig {
    LoraConfig {
        r: 4,
        target_modules: Some(Targets::list(["q_proj", "k_proj", "v_proj", "o_proj"])),
        ..LoraConfig::default()
    }
}

/// Every linear map of the model, experts one by one.
fn everything() -> LoraConfig {
    let mut targets = vec!["q_proj", "k_proj", "v_proj", "o_proj", "gate", "gate_proj", "up_proj", "down_proj"];
    targets.push("shared_expert_gate");
    LoraConfig { r: 2, lora_alpha: 6.0, target_modules: Some(Targets::list(targets)), ..LoraConfig::default() }
}

fn fused() -> LoraConfig {
    LoraConfig {
        r: 3,
        lora_alpha: 6.0,
        target_modules: Some(Targets::list(["q_proj"])),
        target_parameters: vec!["mlp.experts.gate_up_proj".into(), "mlp.experts.down_proj".into()],
        ..LoraConfig::default()
    }
}

/// Maps of experts without a gate, of blocks like them beside, and around experts that read a latent.
fn gateless() -> [&'static str; 4] {
    ["up_proj", "down_proj", "fc1_latent_proj", "fc2_latent_proj"]
}

/// Values of an adapter that does something.
fn trained(config: &LoraConfig, maps: &Maps<'_>) -> LoraWeights {
    let mut weights = config.init(maps, None).unwrap();
    for (seed, low) in weights.maps.values_mut().enumerate() {
        low.b = noise(low.b.len(), seed + 1);
    }
    weights
}

#[test]
fn logits_losses_and_trained_logits_are_those_of_peft() {
    for (name, base) in PARITY {
        let model = model(base);
        let expected = Expected::load(&parity(name).join("expected.safetensors"));
        let maps = Maps::new(model.checkpoint());
        let weights = peft_files::read(parity(name), &maps, ReadOptions::default()).unwrap();
        let (set, lora) = installed(&model, &[("default", weights)]);
        let adapted = model.with_adapters(set.clone()).unwrap();
        let wave = expected.wave();
        let difference = distance(&logits(&adapted, &wave), &expected.values("logits"));
        assert!(difference < 1e-4, "{name}: logits differ by {difference}");

        let adamw = Optimizer::AdamW(AdamW { weight_decay: 0.01, ..AdamW::default() });
        let mut parameters = set.bank().parameters().unwrap();
        let predicted = wave.sequences.iter().map(|s| s.loss_tokens()).sum::<usize>() as f64;
        for (step, loss) in expected.doubles("train_losses").into_iter().enumerate() {
            set.bank().lend(&mut parameters, true).unwrap();
            let found = train_loss(&adapted, &wave) / predicted;
            set.bank().take_back(&mut parameters, true).unwrap();
            assert!((found - loss).abs() < 1e-4, "{name}: loss {found} instead of {loss} at step {step}");
            adamw.step(&mut parameters, 1e-2, 1.0 / predicted).unwrap();
        }
        assert_eq!(lora.weights_from("default", &parameters).unwrap().maps.len(), lora_maps(&parameters));
        set.bank().settle(parameters).unwrap();
        let difference = distance(&logits(&adapted, &wave), &expected.values("logits_after"));
        assert!(difference < 1e-4, "{name}: logits after training differ by {difference}");
    }
}

fn lora_maps(parameters: &moe_core::train::Parameters) -> usize {
    parameters.iter().filter(|(name, _)| name.ends_with("lora_A")).count()
}

#[test]
fn files_survive_writing_in_both_namings() {
    for (name, base) in PARITY {
        let model = model(base);
        let maps = Maps::new(model.checkpoint());
        let weights = peft_files::read(parity(name), &maps, ReadOptions::default()).unwrap();
        let expected = Expected::load(&parity(name).join("expected.safetensors"));
        for naming in [Naming::Fused, Naming::PerExpert] {
            let dir = tempfile::tempdir().unwrap();
            let options = WriteOptions { naming, ..WriteOptions::default() };
            peft_files::write(dir.path(), &weights, &maps, &options).unwrap();
            let again = peft_files::read(dir.path(), &maps, ReadOptions::default()).unwrap();
            if naming == Naming::Fused {
                assert_eq!(again.maps, weights.maps, "{name}");
                let (a, b) = (tensors(&parity(name)), tensors(dir.path()));
                assert_eq!(a, b, "{name}: tensors are those of peft");
            }
            let adapted = model.with_adapters(installed(&model, &[("default", again)]).0).unwrap();
            let difference = distance(&logits(&adapted, &expected.wave()), &expected.values("logits"));
            assert!(difference < 1e-4, "{name} {naming:?}: {difference}");
        }
    }
}

fn tensors(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let bytes = std::fs::read(dir.join(peft_files::MODEL_FILE)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<_> = file.tensors().into_iter().map(|(name, view)| (name, view.data().to_vec())).collect();
    all.sort();
    all
}

#[test]
fn experts_one_by_one_become_fused_with_the_same_outputs() {
    for base in ["qwen2_moe", "mixtral", "gpt_oss"] {
        let model = model(base);
        let maps = Maps::new(model.checkpoint());
        let mut config = everything();
        config.target_modules = Some(match base {
            "mixtral" => Targets::list(["w1", "w2", "w3", "gate"]),
            "gpt_oss" => Targets::list(["gate_proj", "up_proj", "down_proj", "router"]),
            _ => Targets::list(["gate_proj", "up_proj", "down_proj", "gate"]),
        });
        // unequal ranks and scales, and an expert without any
        let (up, down) = if base == "mixtral" { ("w3", "w2") } else { ("up_proj", "down_proj") };
        config.rank_pattern.push(format!(r"layers\.0\..*experts\.1\.{up}"), 3);
        config.rank_pattern.push(format!(r"experts\.2\.{down}"), 0);
        config.alpha_pattern.push(format!(r"layers\.1\..*experts\.0\.{down}"), 1.0);
        let weights = trained(&config, &maps);
        let without = MatrixId::Expert { layer: 0, expert: 2, part: ExpertMatrix::Down };
        assert!(!weights.maps.contains_key(&without));
        let wave = wave(model.config().vocab_size);
        let expected =
            logits(&model.with_adapters(installed(&model, &[("default", weights.clone())]).0).unwrap(), &wave);
        assert!(distance(&expected, &logits(&model, &wave)) > 1e-2);
        let dir = tempfile::tempdir().unwrap();
        peft_files::write(dir.path(), &weights, &maps, &WriteOptions::default()).unwrap();
        let fused = peft_files::read(dir.path(), &maps, ReadOptions::default()).unwrap();
        assert_eq!(fused.config.naming, Naming::Fused);
        let part = |layer, expert| &fused.maps[&MatrixId::Expert { layer, expert, part: ExpertMatrix::GateUp }];
        assert_eq!((part(0, 1).rank, part(0, 0).rank), (5, 5));
        assert_eq!((part(1, 0).rank, part(1, 0).alpha), (4, 12.0));
        let found = logits(&model.with_adapters(installed(&model, &[("default", fused)]).0).unwrap(), &wave);
        assert!(distance(&expected, &found) < 1e-4, "{base}: {}", distance(&expected, &found));
    }
}

#[test]
fn a_fresh_adapter_changes_no_bit() {
    for (base, dora) in [("qwen2_moe", false), ("qwen2_moe", true), ("deepseek_v3", false), ("deepseek_v2", true)] {
        let model = model(base);
        let maps = Maps::new(model.checkpoint());
        let config =
            LoraConfig { target_modules: Some(Targets::Pattern(".*".into())), use_dora: dora, ..LoraConfig::default() };
        let weights = config.init(&maps, None).unwrap();
        assert_eq!(weights.maps.len(), maps.all().len());
        let (set, _) = installed(&model, &[("default", weights)]);
        let adapted = model.with_adapters(set.clone()).unwrap();
        let wave = wave(model.config().vocab_size);
        assert_eq!(logits(&model, &wave), logits(&adapted, &wave), "{base} {dora}");
        // and A gets no gradient, B does
        train_loss(&adapted, &wave);
        let any = |kind: &str| {
            set.bank().iter().filter(|l| l.name().ends_with(kind)).any(|l| l.gradient().iter().any(|g| *g != 0.0))
        };
        assert!(!any("lora_A") && any("lora_B"));
    }
}

#[test]
fn gradients_are_those_of_difference_quotients() {
    for (base, config) in [
        ("qwen2_moe", everything()),
        ("qwen2_moe", fused()),
        ("deepseek_v2", LoraConfig { target_modules: Some(Targets::Pattern(".*".into())), ..everything() }),
    ] {
        let model = model(base);
        let weights = trained(&config, &Maps::new(model.checkpoint()));
        let (set, _) = installed(&model, &[("default", weights)]);
        let checked = check_gradients(&model, &set, &wave(model.config().vocab_size));
        assert!(checked * 10 > set.bank().iter().count() * 6, "{base}: {checked}");
    }
}

#[test]
fn what_began_as_a_part_of_the_weight_has_the_gradients_of_difference_quotients() {
    let model = model("qwen2_moe");
    let maps = Maps::new(model.checkpoint());
    let mut config = everything();
    config.init_lora_weights = Init::Pissa { niter: None };
    config.rank_pattern.push("shared_expert_gate", 1);
    let mut weights = config.init(&maps, None).unwrap();
    for (seed, low) in weights.maps.values_mut().enumerate() {
        low.b.iter_mut().zip(noise(1 << 12, seed)).for_each(|(b, n)| *b += 0.3 * n);
    }
    let (set, _) = installed(&model, &[("default", weights)]);
    assert!(check_gradients(&model, &set, &wave(model.config().vocab_size)) > 60);
}

#[test]
fn magnitudes_have_the_gradient_of_a_quotient_and_directions_that_of_a_constant_norm() {
    let model = model("qwen2_moe");
    let config = LoraConfig { use_dora: true, ..everything() };
    let weights = trained(&config, &Maps::new(model.checkpoint()));
    let (set, _) = installed(&model, &[("default", weights)]);
    let wave = wave(model.config().vocab_size);
    let checked = check_gradients_of(&model, &set, &wave, |name| name.contains("magnitude"));
    assert!(checked > 30, "{checked}");
}

#[test]
fn dropout_drops_in_steps_alone_and_has_the_gradients_of_what_is_left() {
    let model = model("qwen2_moe");
    let config = LoraConfig { lora_dropout: 0.3, seed: 5, ..everything() };
    let weights = trained(&config, &Maps::new(model.checkpoint()));
    let (plain, _) = installed(&model, &[("default", LoraWeights { dropout: 0.0, ..weights.clone() })]);
    let (set, lora) = installed(&model, &[("default", weights)]);
    let adapted = model.with_adapters(set.clone()).unwrap();
    let wave = wave(model.config().vocab_size);
    let whole = logits(&model.with_adapters(plain).unwrap(), &wave);
    assert_eq!(logits(&adapted, &wave), whole);
    lora.clock().train(3);
    let dropped = logits(&adapted, &wave);
    assert!(distance(&dropped, &whole) > 1e-3);
    assert_eq!(logits(&adapted, &wave), dropped);
    assert!(check_gradients(&model, &set, &wave) > 60);
    lora.clock().evaluate();
    assert_eq!(logits(&adapted, &wave), whole);
}

#[test]
fn dropout_and_magnitudes_go_together() {
    let model = model("qwen2_moe");
    let config = LoraConfig { lora_dropout: 0.3, use_dora: true, ..everything() };
    let mut weights = trained(&config, &Maps::new(model.checkpoint()));
    for (seed, low) in weights.maps.values_mut().enumerate() {
        let m = low.magnitude.as_mut().unwrap();
        m.iter_mut().zip(noise(1 << 12, seed)).for_each(|(m, n)| *m *= 1.0 + n);
    }
    let (set, lora) = installed(&model, &[("default", weights)]);
    lora.clock().train(1);
    let wave = wave(model.config().vocab_size);
    assert!(check_gradients_of(&model, &set, &wave, |name| name.contains("magnitude")) > 30);
}

#[test]
fn adapters_on_one_map_add_up() {
    let model = model("qwen2_moe");
    let maps = Maps::new(model.checkpoint());
    let (a, b) = (trained(&everything(), &maps), trained(&LoraConfig { seed: 1, r: 3, ..attention() }, &maps));
    let wave = wave(model.config().vocab_size);
    let both = logits(&model.with_adapters(installed(&model, &[("a", a.clone()), ("b", b.clone())]).0).unwrap(), &wave);
    let cat = combine(&[(&a, 1.0), (&b, 1.0)], Combination::Cat).unwrap();
    let one = logits(&model.with_adapters(installed(&model, &[("default", cat)]).0).unwrap(), &wave);
    assert!(distance(&both, &one) < 1e-4);
    let alone = logits(&model.with_adapters(installed(&model, &[("default", a.clone())]).0).unwrap(), &wave);
    assert!(distance(&both, &alone) > 1e-3);
    let mut set = AdapterSet::new();
    assert!(Lora::install(&mut set, &maps, &[("a", a.clone()), ("a", a)], &device()).is_err());
}

/// What is both gate and up has one adapter, whose gradient is that of both; fused files call it `up_proj`, as
/// transformers 5 does.
#[test]
fn experts_without_a_gate_have_adapters_on_their_up_projection() {
    let model = model("nemotron_h_latent");
    let maps = Maps::new(model.checkpoint());
    let wave = wave(model.config().vocab_size);
    let one_by_one = LoraConfig { target_modules: Some(Targets::list(gateless())), ..everything() };
    let parameters = ["experts.up_proj", "experts.down_proj"].map(String::from).to_vec();
    let together = LoraConfig { target_modules: None, target_parameters: parameters, ..fused() };
    for (config, parts) in
        [(one_by_one, &["up_proj", "fc1_latent", "fc2_latent", "shared_experts"][..]), (together, &["up_proj"])]
    {
        let weights = trained(&config, &maps);
        let (set, _) = installed(&model, &[("default", weights.clone())]);
        let adapted = logits(&model.with_adapters(set.clone()).unwrap(), &wave);
        assert!(distance(&adapted, &logits(&model, &wave)) > 1e-2);
        for part in parts {
            assert!(check_gradients_of(&model, &set, &wave, |live| live.contains(part)) > 0, "{part}");
        }
        for naming in [Naming::PerExpert, Naming::Fused] {
            let dir = tempfile::tempdir().unwrap();
            let options = WriteOptions { naming, ..WriteOptions::default() };
            peft_files::write(dir.path(), &weights, &maps, &options).unwrap();
            let again = peft_files::read(dir.path(), &maps, ReadOptions::default()).unwrap();
            assert_eq!(again.maps.keys().collect::<Vec<_>>(), weights.maps.keys().collect::<Vec<_>>());
            let found = logits(&model.with_adapters(installed(&model, &[("default", again)]).0).unwrap(), &wave);
            assert!(distance(&found, &adapted) < 1e-5);
        }
    }
    let gate = LoraConfig { target_modules: Some(Targets::list(["gate_proj"])), ..everything() };
    assert!(gate.init(&maps, None).unwrap_err().to_string().contains("`gate_proj`, which no module is called"));
}

#[test]
fn merged_is_adapted_and_nothing_merged_is_the_checkpoint() {
    for (base, config, dora) in [
        ("qwen2_moe", everything(), false),
        ("qwen2_moe", everything(), true),
        ("qwen2_moe", fused(), false),
        ("gpt_oss", LoraConfig { target_modules: Some(Targets::list(["q_proj", "router"])), ..fused() }, false),
        (
            "granitemoe",
            LoraConfig { target_modules: None, target_parameters: vec!["experts.down_proj".into()], ..fused() },
            false,
        ),
        (
            "deepseek_v3",
            LoraConfig { target_modules: Some(Targets::Pattern("all-linear".into())), ..everything() },
            false,
        ),
        ("nemotron_h_latent", LoraConfig { target_modules: Some(Targets::list(gateless())), ..everything() }, false),
        ("nemotron_h_latent", LoraConfig { target_modules: Some(Targets::list(gateless())), ..everything() }, true),
    ] {
        let model = model(base);
        let maps = Maps::new(model.checkpoint());
        let weights = trained(&LoraConfig { use_dora: dora, ..config }, &maps);
        let wave = wave(model.config().vocab_size);
        let adapted =
            logits(&model.with_adapters(installed(&model, &[("default", weights.clone())]).0).unwrap(), &wave);
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("merged");
        let merging = Merged::on(model.checkpoint(), &[("default", &weights, 1.0)]).unwrap();
        write(merging.model(), &out, &moe_checkpoint::WriteOptions::default()).unwrap();
        assert_eq!(merging.applied().len(), weights.maps.len());
        let merged = Model::open(&out, &device(), None).unwrap();
        let difference = distance(&logits(&merged, &wave), &adapted);
        assert!(difference < 2e-5 * largest(&adapted).max(1.0), "{base} {dora}: {difference}");
        let touched: std::collections::BTreeSet<_> = merging.applied().iter().flat_map(|a| &a.tensors).collect();
        assert_eq!(merging.changes().unwrap().changed.len(), touched.len());
        for info in model.checkpoint().tensors() {
            let same = merged.checkpoint().bytes(&info.name).unwrap() == model.checkpoint().bytes(&info.name).unwrap();
            assert_eq!(same, !touched.contains(&info.name), "{base}: {}", info.name);
        }
        // nothing
        let none = dir.path().join("none");
        let nothing = Merged::on(model.checkpoint(), &[]).unwrap();
        write(nothing.model(), &none, &moe_checkpoint::WriteOptions::default()).unwrap();
        assert_eq!(nothing.changes().unwrap(), moe_peft::merge::Changes::default());
        same_checkpoint(model.checkpoint(), &none);
        let fresh = LoraWeights {
            maps: weights
                .maps
                .iter()
                .map(|(map, low)| {
                    let mut low = low.clone();
                    low.b.iter_mut().for_each(|b| *b = 0.0);
                    low.magnitude = None;
                    (*map, low)
                })
                .collect(),
            ..weights.clone()
        };
        let zero = dir.path().join("zero");
        let fresh = Merged::on(model.checkpoint(), &[("fresh", &fresh, 1.0)]).unwrap();
        write(fresh.model(), &zero, &moe_checkpoint::WriteOptions::default()).unwrap();
        assert!(fresh.changes().unwrap().changed.is_empty());
        same_checkpoint(model.checkpoint(), &zero);
    }
}

fn same_checkpoint(from: &Checkpoint, dir: &Path) {
    let other = Checkpoint::open(dir).unwrap();
    assert_eq!(std::fs::read(from.dir().join("config.json")).unwrap(), std::fs::read(dir.join("config.json")).unwrap());
    for info in from.tensors() {
        assert_eq!(from.bytes(&info.name).unwrap(), other.bytes(&info.name).unwrap(), "{}", info.name);
    }
}

#[test]
fn an_interrupted_merge_resumes_to_the_same_bytes() {
    let model = model("qwen2_moe");
    let weights = trained(&everything(), &Maps::new(model.checkpoint()));
    let dir = tempfile::tempdir().unwrap();
    let adapters = [("default", &weights, 0.5)];
    let merged = Merged::on(model.checkpoint(), &adapters).unwrap();
    let options = moe_checkpoint::WriteOptions { max_shard_bytes: 20_000, ..Default::default() };
    let whole = dir.path().join("whole");
    write(merged.model(), &whole, &options).unwrap();
    let stop = |progress: &moe_checkpoint::Progress<'_>| match progress.done * 2 > progress.total {
        true => Err("stopped".into()),
        false => Ok(()),
    };
    let parts = dir.path().join("parts");
    let stopping = moe_checkpoint::WriteOptions { progress: Some(&stop), ..options };
    assert!(write(merged.model(), &parts, &stopping).is_err() && !parts.exists());
    // Another process has the same model.
    let merged = Merged::on(model.checkpoint(), &adapters).unwrap();
    let options = moe_checkpoint::WriteOptions { existing: moe_checkpoint::Existing::Resume, ..options };
    write(merged.model(), &parts, &options).unwrap();
    same_checkpoint(&Checkpoint::open(&whole).unwrap(), &parts);
    let itself = write(merged.model(), model.checkpoint().dir(), &options);
    assert!(itself.unwrap_err().to_string().contains("is the checkpoint itself"));
}

#[test]
fn adapters_that_begin_as_a_part_of_the_weight_change_nothing_and_keep_the_rest_in_two_ways() {
    let model = model("qwen2_moe");
    let maps = Maps::new(model.checkpoint());
    let wave = wave(model.config().vocab_size);
    let plain = logits(&model, &wave);
    let which: Vec<MatrixId> = maps.all().iter().copied().filter(|map| matches!(map, MatrixId::Layer(..))).collect();
    let covariances = Covariances::collect(&model, std::slice::from_ref(&wave), &which, None).unwrap();
    for init in [
        Init::Pissa { niter: None },
        Init::Pissa { niter: Some(4) },
        Init::Olora,
        Init::Corda(CordaMethod::Ipm),
        Init::Corda(CordaMethod::Kpm),
        Init::Orthogonal,
        Init::Gaussian,
    ] {
        let config = LoraConfig { init_lora_weights: init, r: 4, lora_alpha: 6.0, use_rslora: true, ..attention() };
        let mut weights = config.init(&maps, Some(&covariances)).unwrap();
        let adapted = |weights: &LoraWeights| {
            logits(&model.with_adapters(installed(&model, &[("default", weights.clone())]).0).unwrap(), &wave)
        };
        assert!(distance(&adapted(&weights), &plain) < 1e-5, "{init}");
        for (seed, low) in weights.maps.values_mut().enumerate() {
            low.b.iter_mut().zip(noise(1 << 12, seed)).for_each(|(b, n)| *b += 0.2 * n);
        }
        let expected = adapted(&weights);
        assert!(distance(&expected, &plain) > 1e-3);
        // twice the rank beside the weight as it is
        let dir = tempfile::tempdir().unwrap();
        peft_files::write(dir.path(), &weights, &maps, &WriteOptions::default()).unwrap();
        let again = peft_files::read(dir.path(), &maps, ReadOptions::default()).unwrap();
        assert!(again.maps.values().all(|low| low.rank == if init.changes_base() { 8 } else { 4 }));
        assert!(distance(&adapted(&again), &expected) < 1e-4, "{init}");
        if init.changes_base() {
            // the adapter as it is beside what the weight kept
            let base = dir.path().join("base");
            let residual = Merged::residual(model.checkpoint(), &weights).unwrap();
            write(residual.model(), &base, &moe_checkpoint::WriteOptions::default()).unwrap();
            let base = Model::open(&base, &device(), None).unwrap();
            let options = WriteOptions { on_residual: true, ..WriteOptions::default() };
            peft_files::write(dir.path(), &weights, &maps, &options).unwrap();
            let again = peft_files::read(dir.path(), &Maps::new(base.checkpoint()), ReadOptions::default()).unwrap();
            assert!(again.maps.values().all(|low| low.rank == 4));
            let found = logits(&base.with_adapters(installed(&base, &[("default", again)]).0).unwrap(), &wave);
            assert!(distance(&found, &expected) < 2e-4, "{init}: {}", distance(&found, &expected));
        }
    }
    assert!(
        LoraConfig { init_lora_weights: Init::Corda(CordaMethod::Ipm), ..fused() }
            .init(&maps, Some(&covariances))
            .unwrap_err()
            .to_string()
            .contains("covariance of the inputs of")
    );
}

#[test]
fn targets_follow_the_rules_of_peft() {
    let model = model("qwen2_moe");
    let maps = Maps::new(model.checkpoint());
    let count = |config: LoraConfig| config.targets(&maps).map(|found| found.len());
    let list = |names: &[&str]| Some(Targets::list(names.iter().copied()));
    let layers = model.config().layers.len();
    assert_eq!(count(LoraConfig { target_modules: list(&["q_proj"]), ..LoraConfig::default() }).unwrap(), layers);
    // `gate` is not `shared_expert_gate`, and the end of a path not the middle of a name
    assert_eq!(count(LoraConfig { target_modules: list(&["gate"]), ..LoraConfig::default() }).unwrap(), layers);
    // experts by name, or only the shared one where experts are no modules
    let gates = LoraConfig { target_modules: list(&["gate_proj"]), ..LoraConfig::default() };
    assert_eq!(count(gates.clone()).unwrap(), layers * 9);
    assert_eq!(count(LoraConfig { naming: Naming::Fused, ..gates.clone() }).unwrap(), layers);
    let pattern = |text: &str| Some(Targets::Pattern(text.into()));
    let some =
        LoraConfig { target_modules: pattern(r".*layers\.[01]\.self_attn\.(q|v)_proj"), ..LoraConfig::default() };
    assert_eq!(count(some).unwrap(), 4);
    let linear = LoraConfig { target_modules: pattern("all-linear"), naming: Naming::Fused, ..LoraConfig::default() };
    // q, k, v, o, gate, up, down and gate of the shared expert
    assert_eq!(count(linear.clone()).unwrap(), layers * 8);
    assert_eq!(
        count(LoraConfig { exclude_modules: list(&["o_proj", "shared_expert_gate"]), ..linear }).unwrap(),
        layers * 6
    );
    let one = LoraConfig { layers_to_transform: Some(vec![1]), ..gates.clone() };
    assert_eq!(count(one.clone()).unwrap(), 9);
    assert_eq!(count(LoraConfig { layers_pattern: Some(vec!["layers".into()]), ..one.clone() }).unwrap(), 9);
    assert!(count(LoraConfig { layers_pattern: Some(vec!["blocks".into()]), ..one }).is_err());
    let mut ranks = gates;
    ranks.rank_pattern.push(r"experts\.3\.gate_proj", 5);
    ranks.rank_pattern.push(r"gate_proj", 0);
    let found = ranks.targets(&maps).unwrap();
    assert!(found.len() == layers && found.values().all(|share| share.rank == 5));
    let mut experts = fused();
    experts.rank_pattern.push(r"experts\.3\.down_proj", 7);
    experts.rank_pattern.push("experts.gate_up_proj", 1);
    let found = experts.targets(&maps).unwrap();
    let share = |expert, part| found[&MatrixId::Expert { layer: 1, expert, part }].rank;
    assert_eq!((share(3, ExpertMatrix::Down), share(2, ExpertMatrix::Down), share(3, ExpertMatrix::GateUp)), (7, 3, 1));
    let router = LoraConfig { target_parameters: vec!["mlp.gate.weight".into()], ..LoraConfig::default() };
    assert_eq!(router.targets(&maps).unwrap().keys().next(), Some(&MatrixId::Layer(0, LayerRole::Router)));
    for (config, text) in [
        (LoraConfig { target_modules: list(&["q_proj", "query"]), ..LoraConfig::default() }, "`query`"),
        (LoraConfig { target_modules: pattern("q_proj"), ..LoraConfig::default() }, "`q_proj`, which no module's path"),
        (LoraConfig { target_modules: pattern("("), ..LoraConfig::default() }, "a regular expression"),
        (LoraConfig { target_parameters: vec!["experts".into()], ..LoraConfig::default() }, "`experts`"),
        (LoraConfig { target_modules: list(&["gate_proj"]), ..fused() }, "targets of gate of expert 0 of layer 0"),
    ] {
        let error = config.targets(&maps).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
}

#[test]
fn files_of_another_model_and_options_that_matter_are_refused_by_name() {
    let model = model("qwen2_moe");
    let maps = Maps::new(model.checkpoint());
    let error = peft_files::read(parity("lora_down_only"), &maps, ReadOptions::default()).unwrap_err().to_string();
    assert!(error.contains("adapter_model.safetensors") && error.contains("experts"), "{error}");
    let changed = |change: &dyn Fn(&mut serde_json::Value)| {
        let dir = tempfile::tempdir().unwrap();
        for file in [peft_files::CONFIG_FILE, peft_files::MODEL_FILE] {
            std::fs::copy(parity("lora_experts").join(file), dir.path().join(file)).unwrap();
        }
        let path = dir.path().join(peft_files::CONFIG_FILE);
        let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        std::fs::write(&path, json.to_string()).unwrap();
        peft_files::read(dir.path(), &maps, ReadOptions::default()).unwrap_err().to_string()
    };
    assert!(changed(&|json| json["init_lora_weights"] = "pissa".into()).contains("init_lora_weights"));
    assert!(changed(&|json| json["lora_bias"] = true.into()).contains("`lora_bias`"));
    assert!(changed(&|json| json["r"] = 5.into()).contains("rank of `"));
    // of another model: no such module
    let other = common::model("deepseek_v3");
    let error = peft_files::read(parity("lora_attention"), &Maps::new(other.checkpoint()), ReadOptions::default());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("no such map in the model") && error.contains("self_attn.k_proj"), "{error}");
}

#[test]
fn the_order_before_0_19_1_is_read_to_the_same_additions() {
    let model = model("mixtral");
    let maps = Maps::new(model.checkpoint());
    let weights = peft_files::read(parity("lora_down_only"), &maps, ReadOptions::default()).unwrap();
    // A [E r, out] and B [in, r E] of the same additions
    let bytes = std::fs::read(parity("lora_down_only").join(peft_files::MODEL_FILE)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| {
        let view = file.tensor(name).unwrap();
        view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<_>>()
    };
    let (experts, rank) = (4, 2);
    let mut out = std::collections::BTreeMap::new();
    for name in file.names() {
        let shape = file.tensor(name).unwrap().shape().to_vec();
        let expert = name.contains("experts");
        if expert && name.ends_with("lora_A.weight") {
            // old B[i, rho E + e] = A[e r + rho, i]
            let (values, width) = (floats(name), shape[1]);
            let old = (0..width).flat_map(|i| (0..rank * experts).map(move |c| (i, c / experts, c % experts)));
            let old: Vec<f32> = old.map(|(i, rho, e)| values[(e * rank + rho) * width + i]).collect();
            out.insert(name.replace("lora_A", "lora_B"), (vec![width, rank * experts], old));
        } else if expert {
            // old A[e r + rho, o] = B[o, rho E + e]
            let (values, height) = (floats(name), shape[0]);
            let old = (0..experts * rank).flat_map(|row| (0..height).map(move |o| (row / rank, row % rank, o)));
            let old: Vec<f32> = old.map(|(e, rho, o)| values[o * rank * experts + rho * experts + e]).collect();
            out.insert(name.replace("lora_B", "lora_A"), (vec![experts * rank, height], old));
        } else {
            out.insert(name.to_string(), (shape, floats(name)));
        }
    }
    let dir = tempfile::tempdir().unwrap();
    write_safetensors(&dir.path().join(peft_files::MODEL_FILE), &out);
    std::fs::copy(parity("lora_down_only").join(peft_files::CONFIG_FILE), dir.path().join(peft_files::CONFIG_FILE))
        .unwrap();
    assert_eq!(peft_files::read(dir.path(), &maps, ReadOptions::default()).unwrap().maps, weights.maps);
}

#[test]
fn numbering_the_experts_otherwise_numbers_their_additions_otherwise() {
    let base = fixture("qwen2_moe");
    let dir = tempfile::tempdir().unwrap();
    let order = [3, 0, 7, 1, 2, 6, 5, 4];
    permuted(&base, dir.path(), &order);
    let (one, two) = (model("qwen2_moe"), Model::open(dir.path(), &device(), None).unwrap());
    let weights = trained(&everything(), &Maps::new(one.checkpoint()));
    let mut moved = weights.clone();
    for (map, low) in &weights.maps {
        match *map {
            MatrixId::Expert { layer, expert, part } => {
                let expert = order.iter().position(|old| *old == expert).unwrap();
                moved.maps.insert(MatrixId::Expert { layer, expert, part }, low.clone());
            }
            MatrixId::Layer(_, LayerRole::Router) => {
                let mut low = low.clone();
                let rows = |row: usize| low.b[row * low.rank..(row + 1) * low.rank].to_vec();
                low.b = order.iter().flat_map(|old| rows(*old)).collect();
                moved.maps.insert(*map, low);
            }
            _ => {}
        }
    }
    let wave = wave(97);
    let run = |model: &Model, weights: &LoraWeights| {
        logits(&model.with_adapters(installed(model, &[("default", weights.clone())]).0).unwrap(), &wave)
    };
    assert!(distance(&run(&one, &weights), &run(&two, &moved)) < 1e-4);
    assert!(distance(&run(&one, &weights), &run(&two, &weights)) > 1e-3);
}

#[test]
fn a_sweep_without_gradients_is_that_of_generation() {
    // adapters in loss and logits alike
    let model = model("qwen2_moe");
    let weights = trained(&fused(), &Maps::new(model.checkpoint()));
    let adapted = model.with_adapters(installed(&model, &[("default", weights)]).0).unwrap();
    let wave: Wave = wave(97);
    let engine = Engine::new(&adapted, EngineOptions { loss: true, ..EngineOptions::default() });
    let loss = engine.run(&wave, &mut Nobody).unwrap().loss.unwrap();
    assert!((loss - train_loss(&adapted, &wave)).abs() < 1e-3);
}

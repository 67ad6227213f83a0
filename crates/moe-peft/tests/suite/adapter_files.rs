//! Adapters as people hold them: every kind of tensor that PEFT saves, run, merged, converted and combined, as files.

use crate::common;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use common::{Expected, check_gradients_of, device, distance, fixture, logits, model};
use moe_checkpoint::{Checkpoint, Existing, LayerRole, MatrixId, Role};
use moe_core::Model;
use moe_peft::{
    AdapterSet,
    adapter_files::{AdapterInput, AdapterLayout, CombineAdapters, ConvertAdapter, MergeAdapters, inspect},
    codec::{ComPeft, KeptValues, PlainDelta, TaskVector},
    fold::Folded,
    lora::{Lora, LoraConfig, LoraWeights, Maps, Naming, Targets},
    merge::Combination,
    open,
    peft_files::{self, ReadOptions, WriteOptions},
};

fn peft(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft").join(name)
}

/// Adapters of qwen2_moe by peft 0.21.2 that stand beside the weights as they are.
const PLAIN: [&str; 6] = [
    "lora_head_embeddings",
    "lora_modules_to_save",
    "lora_bias",
    "lora_trained_biases",
    "lora_token_rows",
    "lora_patterns",
];

fn with(model: &Model, weights: LoraWeights) -> (Model, Arc<AdapterSet>) {
    let mut set = AdapterSet::new();
    Lora::install(&mut set, &Maps::new(model.checkpoint()), &[("default", weights)], &device()).unwrap();
    let set = Arc::new(set);
    (model.with_adapters(set.clone()).unwrap(), set)
}

fn near(found: &[f32], expected: &[f32], what: &str) {
    let difference = distance(found, expected);
    assert!(difference < 1e-4, "{what}: logits differ by {difference}");
}

#[test]
fn every_kind_of_tensor_gives_the_logits_of_peft_and_merged_those_of_peft_merged() {
    let model = model("qwen2_moe");
    let dir = tempfile::tempdir().unwrap();
    for name in PLAIN {
        let expected = Expected::load(&peft(name).join("expected.safetensors"));
        let wave = expected.wave();
        let adapted = open(peft(name)).unwrap().onto(&model).unwrap().0;
        near(&logits(&adapted, &wave), &expected.values("logits"), name);
        let out = dir.path().join(name);
        let merged = MergeAdapters::new(fixture("qwen2_moe"), vec![AdapterInput::new(peft(name))], &out).run().unwrap();
        assert!(merged.changed > 0 && !merged.applied.is_empty());
        let merged = Model::open(&out, &device(), None).unwrap();
        near(&logits(&merged, &wave), &expected.values("merged_logits"), name);
    }
}

/// Experts without a gate, as PEFT adapts their parameters, with the shared expert, a dense layer and attention: read,
/// run, merged, and written under the names and with the shapes that PEFT itself gives such an adapter.
#[test]
fn an_adapter_of_experts_without_a_gate_gives_the_logits_of_peft_and_is_written_as_peft_writes_it() {
    let model = model("nemotron_h");
    let maps = Maps::new(model.checkpoint());
    let from = peft("lora_gateless");
    let expected = Expected::load(&from.join("expected.safetensors"));
    let wave = expected.wave();
    near(&logits(&open(&from).unwrap().onto(&model).unwrap().0, &wave), &expected.values("logits"), "read");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("merged");
    MergeAdapters::new(fixture("nemotron_h"), vec![AdapterInput::new(from.clone())], &out).run().unwrap();
    let merged = Model::open(&out, &device(), None).unwrap();
    near(&logits(&merged, &wave), &expected.values("merged_logits"), "merged");
    let weights = peft_files::read(&from, &maps, ReadOptions::default()).unwrap();
    for naming in [Naming::Fused, Naming::PerExpert] {
        let out = dir.path().join(format!("{naming:?}"));
        peft_files::write(&out, &weights, &maps, &WriteOptions { naming, ..WriteOptions::default() }).unwrap();
        let again = peft_files::read(&out, &maps, ReadOptions::default()).unwrap();
        assert_eq!(again.maps, weights.maps, "{naming:?}");
        near(&logits(&with(&model, again).0, &wave), &expected.values("logits"), "written");
    }
    let shapes = |dir: &Path| {
        let bytes = std::fs::read(dir.join(peft_files::MODEL_FILE)).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut shapes: Vec<_> = tensors.iter().map(|(name, t)| (name.to_string(), t.shape().to_vec())).collect();
        shapes.sort();
        shapes
    };
    assert_eq!(shapes(&dir.path().join("Fused")), shapes(&from));
}

#[test]
fn adapters_survive_writing_and_reading_with_all_that_is_in_them() {
    let model = model("qwen2_moe");
    let maps = Maps::new(model.checkpoint());
    let dir = tempfile::tempdir().unwrap();
    for name in PLAIN {
        let weights = peft_files::read(peft(name), &maps, ReadOptions::default()).unwrap();
        for naming in [Naming::Fused, Naming::PerExpert] {
            for one_alpha in [false, true] {
                let options = WriteOptions { naming, one_alpha, ..WriteOptions::default() };
                let out = dir.path().join(format!("{name} {naming:?} {one_alpha}"));
                peft_files::write(&out, &weights, &maps, &options).unwrap();
                let again = peft_files::read(&out, &maps, ReadOptions::default()).unwrap();
                assert_eq!((&again.whole, &again.tokens), (&weights.whole, &weights.tokens), "{name}");
                let config: serde_json::Value =
                    serde_json::from_slice(&std::fs::read(out.join(peft_files::CONFIG_FILE)).unwrap()).unwrap();
                if one_alpha {
                    assert_eq!(config["alpha_pattern"], serde_json::json!({}), "{name}");
                    assert_eq!(config["use_rslora"], false);
                } else {
                    assert_eq!(again.maps, weights.maps, "{name}");
                }
                let expected = Expected::load(&peft(name).join("expected.safetensors"));
                let found = logits(&with(&model, again).0, &expected.wave());
                near(&found, &expected.values("logits"), name);
            }
        }
    }
}

#[test]
fn what_is_trained_of_adapters_that_were_read_has_its_gradient() {
    let model = model("qwen2_moe");
    let maps = Maps::new(model.checkpoint());
    let wave = common::wave(model.config().vocab_size);
    for (name, part) in [
        ("lora_head_embeddings", "lm_head"),
        ("lora_head_embeddings", "embed_tokens"),
        ("lora_modules_to_save", "lm_head"),
        ("lora_bias", "lora_bias"),
        ("lora_trained_biases", "k_proj"),
    ] {
        let weights = peft_files::read(peft(name), &maps, ReadOptions::default()).unwrap();
        let (_, set) = with(&model, weights);
        let checked = check_gradients_of(&model, &set, &wave, |live| live.contains(part));
        assert!(checked > 0, "{name}: nothing of {part}");
    }
    // rows that occur
    let mut weights = peft_files::read(peft("lora_token_rows"), &maps, ReadOptions::default()).unwrap();
    let row = weights.tokens.values().next().unwrap().clone();
    weights.tokens = wave.sequences[0].ids[..3].iter().map(|id| (*id, row.clone())).collect();
    let (_, set) = with(&model, weights);
    assert_eq!(check_gradients_of(&model, &set, &wave, |live| live.contains("embed_tokens")), 1);
}

/// New adapters train modules whole and rows of the embeddings, as PEFT's `modules_to_save` and
/// `trainable_token_indices`; saved and read again, they are the same.
#[test]
fn a_new_adapter_trains_modules_and_rows_beside_its_additions() {
    let model = model("qwen2_moe");
    let maps = Maps::new(model.checkpoint());
    let wave = common::wave(model.config().vocab_size);
    let token = wave.sequences[0].ids[1];
    let config = LoraConfig {
        target_modules: Some(Targets::list(["q_proj"])),
        modules_to_save: vec!["lm_head".into(), "layers.1.post_attention_layernorm".into()],
        trainable_token_indices: vec![token],
        ..LoraConfig::default()
    };
    let weights = config.init(&maps, None).unwrap();
    let norm = Role::Layer(1, LayerRole::FfnNorm);
    assert_eq!(weights.whole.keys().copied().collect::<Vec<_>>(), [Role::LmHead, norm]);
    let (begun, set) = with(&model, weights.clone());
    assert_eq!(logits(&begun, &wave), logits(&model, &wave), "it begins as the model");
    for part in ["lm_head", "post_attention_layernorm", "embed_tokens"] {
        assert!(check_gradients_of(&model, &set, &wave, |live| live.contains(part)) > 0, "{part}");
    }
    let mut trained = weights;
    trained.whole.values_mut().chain(trained.tokens.values_mut()).flatten().for_each(|x| *x = 1.5 * *x + 0.01);
    let dir = tempfile::tempdir().unwrap();
    peft_files::write(dir.path(), &trained, &maps, &WriteOptions::default()).unwrap();
    let again = peft_files::read(dir.path(), &maps, ReadOptions::default()).unwrap();
    assert_eq!((&again.whole, &again.tokens), (&trained.whole, &trained.tokens));
    assert!(distance(&logits(&with(&model, again).0, &wave), &logits(&model, &wave)) > 1e-2);

    let refused = |change: &dyn Fn(&mut LoraConfig)| {
        let mut config = config.clone();
        change(&mut config);
        config.init(&maps, None).unwrap_err().to_string()
    };
    let unknown = refused(&|config| config.modules_to_save = vec!["lm_heads".into()]);
    assert!(unknown.contains("`lm_heads`, which no module is called"), "{unknown}");
    let twice = refused(&|config| config.modules_to_save = vec!["q_proj".into()]);
    assert!(twice.contains("one of both"), "{twice}");
    let past = refused(&|config| config.trainable_token_indices = vec![1 << 20]);
    assert!(past.contains("trainable_token_indices") && past.contains("vocabulary"), "{past}");
    let both = refused(&|config| config.modules_to_save = vec!["embed_tokens".into()]);
    assert!(both.contains("one of both"), "{both}");
    let tied = common::model("ernie4_5_moe");
    let error = config.init(&Maps::new(tied.checkpoint()), None).unwrap_err().to_string();
    assert!(error.contains("one tensor in this model"), "{error}");
}

#[test]
fn rows_of_tied_embeddings_are_rows_of_the_head_and_other_adapters_of_one_of_both_are_not_merged() {
    let model = model("ernie4_5_moe");
    let wave = common::wave(model.config().vocab_size);
    let hidden = model.config().hidden_size;
    let row = |seed| common::noise(hidden, seed);
    let tokens = wave.sequences[0].ids[..2].iter().zip(1..).map(|(id, seed)| (*id, row(seed))).collect();
    let weights = LoraWeights { tokens, ..LoraWeights::default() };
    let (adapted, set) = with(&model, weights.clone());
    let beside = logits(&adapted, &wave);
    assert!(distance(&beside, &logits(&model, &wave)) > 1e-2);
    assert_eq!(check_gradients_of(&model, &set, &wave, |_| true), 1);
    let merged = moe_peft::merge::Merged::on(model.checkpoint(), &[("rows", &weights, 1.0)]).unwrap();
    let merged = Model::new(merged.model().clone(), &device(), None).unwrap();
    near(&logits(&merged, &wave), &beside, "merged");
    let folded = Folded::on(model.checkpoint(), &set).unwrap();
    near(&logits(&folded.run(&device(), None).unwrap(), &wave), &beside, "folded");
    let dims = Maps::new(model.checkpoint()).dims(MatrixId::Head).unwrap();
    let low = moe_peft::lora::LowRank::new(row(3), common::noise(dims[0], 4), 1, 1.0);
    for map in [MatrixId::Head, MatrixId::Embedding] {
        let one = LoraWeights { maps: [(map, low.clone())].into(), ..LoraWeights::default() };
        let error = moe_peft::merge::Merged::on(model.checkpoint(), &[("one", &one, 1.0)]).unwrap_err().to_string();
        assert!(error.contains("one tensor in this model"), "{error}");
        let (_, set) = with(&model, one);
        let error = Folded::check(model.checkpoint(), &set).unwrap_err().to_string();
        assert!(error.contains("the same tensor"), "{error}");
    }
}

#[test]
fn adapters_that_began_as_a_part_of_the_weights_are_converted_as_peft_converts_them() {
    let model = model("qwen2_moe");
    let maps = Maps::new(model.checkpoint());
    let dir = tempfile::tempdir().unwrap();
    for name in ["lora_pissa", "lora_olora"] {
        let expected = Expected::load(&peft(name).join("expected.safetensors"));
        let wave = expected.wave();
        // alone they do not tell what was taken from the weights
        let error = peft_files::read(peft(name), &maps, ReadOptions::default()).unwrap_err().to_string();
        assert!(error.contains("init_lora_weights"), "{error}");
        let input = AdapterInput { initial: Some(peft(name).join("initial")), ..AdapterInput::new(peft(name)) };
        let (adapted, _) = with(&model, input.read(&maps).unwrap());
        near(&logits(&adapted, &wave), &expected.values("logits"), name);
        let out = dir.path().join(name);
        ConvertAdapter::new(fixture("qwen2_moe"), input.clone(), &out).run().unwrap();
        let (ours, theirs) = (
            peft_files::read(out, &maps, ReadOptions::default()).unwrap(),
            peft_files::read(peft(name).join("converted"), &maps, ReadOptions::default()).unwrap(),
        );
        assert_eq!(ours.maps.keys().collect::<Vec<_>>(), theirs.maps.keys().collect::<Vec<_>>());
        for (map, low) in &ours.maps {
            let other = &theirs.maps[map];
            assert_eq!((low.rank, low.scale()), (other.rank, other.scale()), "{map}");
        }
        for weights in [ours, theirs] {
            near(&logits(&with(&model, weights).0, &wave), &expected.values("logits"), name);
        }
        let merged = dir.path().join(format!("{name} merged"));
        MergeAdapters::new(fixture("qwen2_moe"), vec![input], &merged).run().unwrap();
        near(&logits(&Model::open(&merged, &device(), None).unwrap(), &wave), &expected.values("logits"), name);
        // the initial adapter of another one
        let wrong = AdapterInput { initial: Some(peft("lora_head_embeddings")), ..AdapterInput::new(peft(name)) };
        assert!(wrong.read(&maps).unwrap_err().to_string().contains("only one of both adapters has it"));
    }
}

#[test]
fn jobs_over_adapter_files_give_what_the_library_gives() {
    let (base, model) = (fixture("qwen2_moe"), model("qwen2_moe"));
    let dir = tempfile::tempdir().unwrap();
    let wave = common::wave(model.config().vocab_size);
    let out = |name: &str| dir.path().join(name);
    let merged = |adapters: Vec<AdapterInput>, name: &str| {
        MergeAdapters::new(&base, adapters, out(name)).run().unwrap();
        logits(&Model::open(out(name), &device(), None).unwrap(), &wave)
    };
    let (experts, attention) = (AdapterInput::new(peft("lora_experts")), AdapterInput::new(peft("lora_attention")));
    let both = vec![experts.clone().weighted(0.5), attention.clone().weighted(-0.25)];
    let expected = merged(both.clone(), "merged");
    assert!(distance(&expected, &logits(&model, &wave)) > 1e-3);
    // side by side, in either layout
    for (naming, name) in [(Naming::Fused, "fused"), (Naming::PerExpert, "apart")] {
        let job = CombineAdapters::new(&base, both.clone(), Combination::Cat, out(name));
        let layout = AdapterLayout { naming: Some(naming), one_alpha: true };
        let written = CombineAdapters { layout, ..job }.run().unwrap();
        assert_eq!((written.layout, written.replaced), (naming, 0));
        near(&merged(vec![AdapterInput::new(out(name))], &format!("{name} merged")), &expected, name);
        let facts = inspect(&out(name), Some(&base)).unwrap();
        assert_eq!(facts.kinds, ["a LoRA"]);
        assert!(facts.fits.unwrap() > 0 && facts.lora.unwrap().patterns > 0);
        let shown = inspect(&out(name), None).unwrap().to_string();
        assert!(shown.contains("q_proj") && shown.contains("experts"), "{shown}");
    }
    // a weight goes into what is written
    let half = ConvertAdapter::new(&base, experts.clone().weighted(0.5), out("half"));
    ConvertAdapter { layout: AdapterLayout { naming: Some(Naming::PerExpert), one_alpha: false }, ..half }
        .run()
        .unwrap();
    let one = merged(vec![AdapterInput::new(out("half"))], "half merged");
    near(&one, &merged(vec![experts.clone().weighted(0.5)], "half of it"), "half");
    // nothing is replaced unasked
    let again = MergeAdapters::new(&base, vec![experts.clone()], out("half merged"));
    assert!(again.run().unwrap_err().to_string().contains("half merged"));
    MergeAdapters { existing: Existing::Force, ..again }.run().unwrap();
    let error = MergeAdapters::new(&base, vec![], out("none")).run().unwrap_err().to_string();
    assert!(error.contains("adapters: found 0"), "{error}");

    // deltas: of a checkpoint below adapters, and of an adapter
    let tuned = moe_checkpoint::Checkpoint::open(out("merged")).unwrap();
    let file = out("delta.moe");
    let vector = TaskVector::Checkpoints { base: model.checkpoint(), tuned: &tuned };
    PlainDelta::Changed.encode(vector, &file).unwrap();
    near(&merged(vec![AdapterInput::new(&file)], "patched"), &expected, "delta");
    let facts = inspect(&file, None).unwrap();
    assert!(facts.kinds == ["a delta"] && facts.options.unwrap()["coding"].is_object());
    let negative: Vec<AdapterInput> = both.iter().map(|input| input.clone().weighted(-input.weight)).collect();
    let back = merged([vec![AdapterInput::new(&file)], negative].concat(), "and back");
    assert!(distance(&back, &logits(&model, &wave)) < 1e-3);
    let small = out("adapter.moe");
    let vector = TaskVector::Adapter { directory: &peft("lora_attention"), start: 0.0 };
    ComPeft { density: 0.9, values: KeptValues::Unchanged { dtype: moe_checkpoint::Dtype::F32 } }
        .encode(vector, &small)
        .unwrap();
    let error = MergeAdapters::new(&base, vec![AdapterInput::new(&small)], out("no")).run().unwrap_err().to_string();
    assert!(error.contains("the delta of an adapter") && !out("no").exists(), "{error}");
    ConvertAdapter::new(&base, AdapterInput::new(&small), out("restored")).run().unwrap();
    assert!(inspect(&out("restored"), Some(&base)).unwrap().fits.unwrap() > 0);
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains(".restored")), "{left:?}");
}

#[test]
fn an_adapter_that_zero_3_left_empty_is_refused_by_its_cause() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(peft("lora_attention").join(peft_files::CONFIG_FILE), dir.path().join(peft_files::CONFIG_FILE))
        .unwrap();
    let tensors = ["lora_A", "lora_B"]
        .map(|part| (format!("base_model.model.model.layers.0.self_attn.q_proj.{part}.weight"), (vec![0], Vec::new())));
    common::write_safetensors(&dir.path().join(peft_files::MODEL_FILE), &tensors.into());
    let job = MergeAdapters::new(fixture("qwen2_moe"), vec![AdapterInput::new(dir.path())], dir.path().join("out"));
    let error = job.run().unwrap_err().to_string();
    assert!(error.contains("DeepSpeed ZeRO-3") && error.contains("q_proj.lora_"), "{error}");
    assert!(!dir.path().join("out").exists());
}

#[test]
fn what_no_weights_can_hold_is_refused_with_the_way_out() {
    use moe_peft::mixture::{Experts, Mixture, MixtureConfig};
    let (base, model) = (fixture("qwen2_moe"), model("qwen2_moe"));
    let dir = tempfile::tempdir().unwrap();
    let maps = Maps::new(model.checkpoint());
    let config = MixtureConfig {
        r: 2,
        experts: Experts::Everywhere(2),
        target_modules: Some(moe_peft::lora::Targets::list(["q_proj"])),
        ..MixtureConfig::default()
    };
    let mut set = AdapterSet::new();
    let mixture = Mixture::install(&config, &mut set, &maps, &device()).unwrap();
    mixture.save(dir.path().join("mixture"), None).unwrap();
    let input = AdapterInput::new(dir.path().join("mixture"));
    let error = MergeAdapters::new(&base, vec![input.clone()], dir.path().join("out")).run().unwrap_err().to_string();
    assert!(error.contains("depends on the token"), "{error}");
    let means = AdapterInput { experts_at: Some(0.5), ..input };
    let report = MergeAdapters::new(&base, vec![means], dir.path().join("out")).run().unwrap();
    assert_eq!(report.applied.len(), model.config().layers.len());
    let facts = inspect(&dir.path().join("mixture"), Some(&base)).unwrap();
    assert_eq!((facts.kinds, facts.fits), (vec!["a mixture of LoRA experts".to_string()], Some(report.applied.len())));
    let wrong = AdapterInput { experts_at: Some(0.5), ..AdapterInput::new(peft("lora_attention")) };
    assert!(wrong.read(&maps).unwrap_err().to_string().contains("weight of the experts"));
}

/// By fixture: the modules that transformers has, numbers of layers and experts as `N`
/// (`xtask/scripts/module_names.py`).
#[test]
fn modules_are_called_as_transformers_calls_them_in_memory() {
    let known: BTreeMap<String, BTreeSet<String>> =
        serde_json::from_str(include_str!("../fixtures/modules.json")).unwrap();
    assert!(known.len() > 70);
    let number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let pattern =
        |path: &str| path.split('.').map(|part| if number(part) { "N" } else { part }).collect::<Vec<_>>().join(".");
    for (name, modules) in &known {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        let maps = Maps::new(&checkpoint);
        for map in maps.all() {
            let path = match *map {
                // JetMoE has a module for either parameter.
                MatrixId::Expert { .. } if name == "jetmoe" => continue,
                MatrixId::Expert { layer, .. } => maps.experts_path(layer, Naming::Fused),
                map => maps.path(map, Naming::Fused),
            };
            // transformers takes this matrix of Sarvam apart.
            if !path.ends_with(".query_key_value") {
                assert!(modules.contains(&pattern(&path)), "{name}: {path} is none of {modules:?}");
            }
            match map {
                MatrixId::Expert { layer, .. } => assert_eq!(maps.find_experts(&path), Some(*layer), "{name}: {path}"),
                // A block beside the experts may be called dense and shared.
                map => {
                    let found = maps.find(&path).and_then(|found| maps.dims(found));
                    assert_eq!(found, maps.dims(*map), "{name}: {path}");
                }
            }
        }
    }
}

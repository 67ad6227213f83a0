//! What is trained on any form of a model gets into its weights: folded, merged, measured and written alike.

use crate::chain;
use crate::common;
use crate::forms;
use crate::tuning;

use std::sync::Arc;

use chain::{dora, experts, install, learn_much, learn_nothing, run, trained, written_alike};
use common::{distance, largest, logits, noise, wave};
use forms::{fixtures, grouped, grouped_ragged, open, ragged};
use moe_checkpoint::{Checkpoint, Role, WriteOptions, write};
use moe_peft::{
    AdapterSet, Setting, TuningMethod,
    fold::Folded,
    lora::{Maps, Targets},
    merge::Merged,
    model_weights::OwnWeights,
};

/// A checkpoint in every form.
fn every_form(base: &Arc<Checkpoint>) -> Vec<(&'static str, Arc<Checkpoint>)> {
    let mut forms = vec![("as it is", base.clone())];
    forms.extend([("grouped", grouped(base)), ("ragged", ragged(base)), ("grouped and ragged", grouped_ragged(base))]);
    forms
}

#[test]
fn adapters_of_experts_that_learnt_nothing_leave_every_model_in_every_form_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    for (index, fixture) in fixtures().iter().enumerate() {
        for (form, base) in every_form(&open(fixture)) {
            let what = format!("{}, {form}", fixture.display());
            learn_nothing(&base, &dir.path().join(format!("{index} {form}")), &what);
        }
    }
}

#[test]
fn trained_experts_of_every_form_are_in_the_weights_as_they_were_beside_them() {
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "qwen2_moe",
        "qwen2_moe_mixed",
        "qwen2_moe_bf16",
        "gpt_oss",
        "gpt_oss_mxfp4",
        "deepseek_v3_fp8",
        "granitemoe",
        "mixtral",
        "deepseek_v2_group",
    ] {
        for (form, base) in every_form(&open(common::fixture(name))) {
            for config in [experts(), dora()] {
                let what = format!("{name}, {form}, DoRA {}", config.use_dora);
                learn_much(&base, &config, &dir.path().join(&what), &what);
            }
        }
    }
}

#[test]
fn experts_that_share_weights_part_where_they_are_trained_and_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let base = grouped(&open(common::fixture("qwen2_moe")));
    let model = run(&base);
    let wave = wave(model.config().vocab_size);
    let layer = base.shape().layers[0].layer;
    let experts = base.config().moe(layer).unwrap().num_experts();
    let sets = base.config().moe(layer).unwrap().stored_widths().len();
    assert_eq!(sets, experts / 2);

    // Two experts that share a set, trained to be different.
    let mut set = AdapterSet::new();
    let only = [(layer, [0, 1].into())].into();
    OwnWeights::these_experts(only).install(&Setting::new(&model), &mut set).unwrap();
    for (seed, live) in set.bank().iter().enumerate() {
        let moved = live.to_vec().iter().zip(noise(1 << 16, seed)).map(|(value, noise)| value + noise).collect();
        tuning::put(set.bank(), live.name(), moved);
    }
    let set = Arc::new(set);
    let remarks = Folded::check(&base, &set).unwrap().remarks;
    assert!(remarks.len() == 1 && remarks[0].contains("share sets of weights"), "{remarks:?}");
    let folded = Folded::on(&base, &set).unwrap();
    let adapted = logits(&model.with_adapters(set.clone()).unwrap(), &wave);
    assert!(distance(&adapted, &logits(&model, &wave)) > 1e-2);
    let written = written_alike(folded.model(), &dir.path().join("two"), "two");
    assert!(distance(&logits(&written, &wave), &adapted) < 2e-5 * largest(&adapted).max(1.0));
    let moe = written.checkpoint().config().moe(layer).unwrap().clone();
    assert_eq!(moe.stored_widths().len(), sets + 1);
    assert_eq!((moe.stored(2), moe.stored(3)), (2, 2));
    let changes = folded.changes().unwrap();
    assert_eq!(changes.ungrouped, [(layer, [sets, sets + 1])].into());
    assert_eq!(changes.changed.values().flatten().count(), 3 * 2, "gate, up and down of two: {changes:?}");

    // All of all layers: no expert shares any more, and the model is one that stock loaders know.
    let mut set = AdapterSet::new();
    OwnWeights { experts: true, ..OwnWeights::default() }.install(&Setting::new(&model), &mut set).unwrap();
    let folded = Folded::on(&base, &set).unwrap();
    assert!(!folded.model().grouped());
    assert_eq!(folded.model().raw_config()["model_type"], "qwen2_moe");
    assert_eq!(logits(&run(folded.model()), &wave), logits(&model, &wave));
    for expert in 0..experts {
        assert_eq!(folded.model().expert(layer, expert).unwrap(), base.expert(layer, expert).unwrap());
    }
}

#[test]
fn models_of_methods_are_bases_of_others() {
    let dir = tempfile::tempdir().unwrap();
    let base = open(common::fixture("deepseek_v3_fp8"));
    let model = run(&base);
    let wave = wave(model.config().vocab_size);
    let weights = trained(&experts(), &model);
    // An adapter, and what was trained on top of it, without a directory in between.
    let merged = Merged::on(&base, &[("default", &weights, 0.5)]).unwrap();
    let on_top = run(merged.model());
    let (task, parameters) = tuning::train_own(&on_top, &OwnWeights::full(), 2);
    task.set().bank().settle(parameters).unwrap();
    let folded = Folded::on(merged.model(), task.set()).unwrap();
    let steps: Vec<&str> = folded.model().steps().iter().map(|step| step.method.as_str()).collect();
    assert_eq!(steps, ["merge_adapters", "fold"]);
    let written = written_alike(folded.model(), &dir.path().join("both"), "both");
    // Trained values are f32, and written as the BF16 that FP8 became: what is measured is what is written.
    assert_eq!(logits(&folded.run(model.device(), None).unwrap(), &wave), logits(&written, &wave));
    // A base that was written in between gives the same.
    write(merged.model(), dir.path().join("merged"), &WriteOptions::default()).unwrap();
    let between = Folded::on(&open(dir.path().join("merged")), task.set()).unwrap();
    for info in folded.model().tensors() {
        assert!(
            between.model().bytes(&info.name).unwrap() == folded.model().bytes(&info.name).unwrap(),
            "{}",
            info.name
        );
    }
}

#[test]
fn a_fold_knows_when_its_values_were_trained_on_and_when_they_are_others() {
    let model = common::model("qwen2_moe");
    let base = model.checkpoint();
    let weights = trained(&experts(), &model);
    let (set, _) = install(&model, &weights);
    let folded = Folded::on(base, &set).unwrap();
    let mut other = weights.clone();
    other.maps.values_mut().for_each(|low| low.alpha *= 2.0);
    let (scaled, _) = install(&model, &other);
    assert_ne!(Folded::on(base, &scaled).unwrap().model().fingerprint(), folded.model().fingerprint());
    let (same, _) = install(&model, &weights);
    assert_eq!(Folded::on(base, &same).unwrap().model().fingerprint(), folded.model().fingerprint());

    let layer = base.shape().layers[0].layer;
    assert!(folded.model().expert(layer, 0).is_ok());
    let parameters = set.bank().parameters().unwrap();
    let unsettled = Folded::on(base, &set).unwrap_err().to_string();
    assert!(unsettled.contains("with an optimizer"), "{unsettled}");
    set.bank().settle(parameters).unwrap();
    let changed = folded.model().expert(layer, 0).unwrap_err().to_string();
    assert!(changed.contains("values that were folded"), "{changed}");
    assert!(Folded::on(base, &set).unwrap().model().expert(layer, 0).is_ok());
}

#[test]
fn numbers_that_a_dtype_cannot_hold_are_named_with_their_tensor() {
    let model = common::model("qwen2_moe_bf16");
    let mut set = AdapterSet::new();
    OwnWeights { norms: true, ..OwnWeights::default() }.install(&Setting::new(&model), &mut set).unwrap();
    let name = set.bank().iter().next().unwrap().name().to_string();
    for (value, expected) in [(f32::NAN, "finite numbers"), (f32::MAX, "numbers of BF16")] {
        let mut values = set.bank().get(&name).unwrap().to_vec();
        values[0] = value;
        tuning::put(set.bank(), &name, values);
        let folded = Folded::on(model.checkpoint(), &set).unwrap();
        let error = folded.changes().unwrap_err().to_string();
        assert!(error.contains("norm") && error.contains(expected), "{error}");
    }
}

#[test]
fn what_cannot_be_folded_is_said_before_it_is_trained() {
    use moe_peft::mixture::{Mixture, MixtureConfig};
    let model = common::model("qwen2_moe");
    let maps = Maps::new(model.checkpoint());
    for config in [
        MixtureConfig { target_modules: Some(Targets::list(["q_proj"])), ..MixtureConfig::lora_moe() },
        MixtureConfig { blocks: true, target_modules: None, ..MixtureConfig::mix_lora() },
    ] {
        let mut set = AdapterSet::new();
        Mixture::install(&config, &mut set, &maps, model.device()).unwrap();
        let error = Folded::check(model.checkpoint(), &set).unwrap_err().to_string();
        assert!(error.contains("its input"), "{error}");
    }

    // A head that is tied to the embeddings cannot change alone.
    let tied = common::model("ernie4_5_moe");
    let role = |role| tied.checkpoint().role(role).unwrap().name.clone();
    assert_eq!(role(Role::LmHead), role(Role::Embedding));
    let mut whole = AdapterSet::new();
    OwnWeights { head: true, ..OwnWeights::default() }.install(&Setting::new(&tied), &mut whole).unwrap();
    Folded::check(tied.checkpoint(), &whole).unwrap();
    let mut alone = AdapterSet::new();
    for (rows, adapter) in whole.heads() {
        alone.add_head(rows, adapter.clone()).unwrap();
    }
    let error = Folded::check(tied.checkpoint(), &alone).unwrap_err().to_string();
    assert!(error.contains("the same tensor"), "{error}");

    // An adapter of another model.
    let mut other = AdapterSet::new();
    OwnWeights { experts: true, ..OwnWeights::default() }.install(&Setting::new(&model), &mut other).unwrap();
    let error = Folded::check(common::model("deepseek_v3").checkpoint(), &other).unwrap_err().to_string();
    assert!(error.contains("new values"), "{error}");
}

#[test]
fn what_is_no_weight_is_left_out_aloud_and_runs_beside_the_weights() {
    use moe_peft::compressed_experts::CompressedExperts;
    let model = common::model("qwen2_moe");
    let wave = wave(model.config().vocab_size);
    let mut set = AdapterSet::new();
    OwnWeights::router().install(&Setting::new(&model), &mut set).unwrap();
    CompressedExperts { auxiliary: 1 }.install(&Setting::new(&model), &mut set).unwrap();
    let set = Arc::new(set);
    let layers = model.checkpoint().shape().layers.len();
    assert_eq!(Folded::check(model.checkpoint(), &set).unwrap().remarks.len(), layers);
    let folded = Folded::on(model.checkpoint(), &set).unwrap();
    let changes = folded.changes().unwrap();
    assert_eq!((changes.left_out.len(), changes.unchanged.len()), (layers, layers));
    let adapted = logits(&model.with_adapters(set).unwrap(), &wave);
    assert!(distance(&adapted, &logits(&model, &wave)) > 1e-3);
    assert_eq!(logits(&folded.run(model.device(), None).unwrap(), &wave), adapted);
}

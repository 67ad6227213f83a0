//! Null experts, recurrent routers, balancing biases and random routers: gradients on whole models, neutral beginnings,
//! what is saved and opened again.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::Device;
use moe_checkpoint::Existing;
use moe_core::{
    Engine, EngineOptions, Model,
    adaptive::RunTime,
    data::{Sequence, Wave},
    generate::{GenerateOptions, generate},
    trace::{Nobody, Observer, Signals},
};
use moe_peft::{
    AdapterSet, Recipe, Setting, TrainingRun, TuningMethod,
    null_experts::{NullExpertOptions, NullExpertTuning, NullExperts, NullInit},
    recurrent_router::{Cell, RecurrentForm, RecurrentOptions, RecurrentRouter, RecurrentRouterTuning},
};

fn model(name: &str) -> Model {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5");
    Model::open(fixtures.join(name), &Device::flex(), None).unwrap()
}

fn waves(model: &Model, count: u64) -> Vec<Wave> {
    let vocab = model.config().vocab_size.min(90);
    let sequence = |seed: usize, n: usize| {
        Sequence::new((0..n).map(|i| ((i * i * 7 + i * 3 + seed * 11) % vocab) as u32).collect())
    };
    (0..count)
        .map(|id| Wave { id, sequences: vec![sequence(id as usize + 1, 13), sequence(id as usize + 4, 9)] })
        .collect()
}

fn loss(model: &Model, wave: &Wave) -> f64 {
    let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
    engine.run(wave, &mut Nobody).unwrap().loss.unwrap()
}

struct Trains;

impl Observer for Trains {
    fn needs(&self) -> Signals {
        Signals::PARAMETERS
    }
}

fn sweep(model: &Model, wave: &Wave) {
    let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
    engine.run(wave, &mut Trains).unwrap();
}

/// Compares gradients of everything in the bank with difference quotients of the loss.
fn check(model: &Model, set: AdapterSet, wave: &Wave, least: usize) {
    let set = Arc::new(set);
    let trained = model.with_adapters(set.clone()).unwrap();
    sweep(&trained, wave);
    let gradients: Vec<(String, Vec<f32>)> =
        set.bank().iter().map(|live| (live.name().to_string(), live.gradient())).collect();
    let mut compared = 0;
    for (name, gradient) in gradients {
        let mut order: Vec<usize> = (0..gradient.len()).collect();
        order.sort_by(|a, b| gradient[*b].abs().total_cmp(&gradient[*a].abs()));
        for &i in order.iter().take(4) {
            let at = |h: f32| {
                let mut parameters = set.bank().parameters().unwrap();
                parameters.get_mut(&name).unwrap().values[i] += h;
                set.bank().lend(&mut parameters, false).unwrap();
                let loss = loss(&trained, wave);
                set.bank().take_back(&mut parameters, false).unwrap();
                parameters.get_mut(&name).unwrap().values[i] -= h;
                set.bank().settle(parameters).unwrap();
                loss
            };
            let slope = |h: f32| (at(h) - at(-h)) / (2.0 * f64::from(h));
            let (numeric, wider) = (slope(5e-3), slope(1e-2));
            // a step that changes which experts later tokens go to says nothing
            if (numeric - wider).abs() < 0.03 * numeric.abs().max(0.05) {
                let found = f64::from(gradient[i]);
                assert!((numeric - found).abs() < 0.05 * found.abs().max(0.1), "{name} {i}: {numeric} {found}");
                compared += 1;
            }
        }
    }
    assert!(compared >= least, "{compared}");
}

#[test]
fn gradients_of_a_recurrent_router_go_through_the_states_of_all_layers() {
    for (cell, form) in [
        (Cell::Gru, RecurrentForm::Beside),
        (Cell::Gru, RecurrentForm::Instead),
        (Cell::Rnn, RecurrentForm::Beside),
        (Cell::Identity, RecurrentForm::Instead),
    ] {
        let model = model("qwen2_moe");
        let wave = &waves(&model, 1)[0];
        let options = RecurrentOptions { width: 6, cell, form, seed: 3 };
        let router = RecurrentRouter::new(&model, options).unwrap();
        let mut set = AdapterSet::new();
        router.train_in(&mut set).unwrap();
        // outputs that are not zero
        let mut parameters = set.bank().parameters().unwrap();
        let names: Vec<String> = parameters.iter().map(|(name, _)| name.to_string()).collect();
        for name in names.iter().filter(|name| name.ends_with("output")) {
            let values = &mut parameters.get_mut(name).unwrap().values;
            values.iter_mut().enumerate().for_each(|(i, v)| *v = (i as f32 * 1.7).sin());
        }
        set.bank().settle(parameters).unwrap();
        check(&router.applied_to(&model).unwrap(), set, wave, 8);
    }
}

#[test]
fn gradients_of_null_experts_match_difference_quotients() {
    let model = model("qwen3_moe");
    let wave = &waves(&model, 1)[0];
    let nulls = NullExperts::new(&model, &NullExpertOptions::default()).unwrap();
    let mut set = AdapterSet::new();
    nulls.train_in(&mut set).unwrap();
    check(&nulls.applied_to(&model).unwrap(), set, wave, 4);
}

#[test]
fn what_is_put_beside_a_model_begins_as_the_model_bit_for_bit() {
    let model = model("qwen2_moe");
    let wave = &waves(&model, 1)[0];
    let before = loss(&model, wave).to_bits();
    let router = RecurrentRouter::new(&model, RecurrentOptions { width: 8, ..RecurrentOptions::default() }).unwrap();
    let beside = router.applied_to(&model).unwrap();
    assert_eq!(loss(&beside, wave).to_bits(), before);
    // again: states begin anew in every sweep
    assert_eq!(loss(&beside, wave).to_bits(), before);
    let none = NullExpertOptions { nulls: Some(0), top_k: Some(model.router().top_k()), init: NullInit::Zeros };
    let nulls = NullExperts::new(&model, &none).unwrap();
    assert_eq!(loss(&nulls.applied_to(&model).unwrap(), wave).to_bits(), before);
    assert!(beside.with_path("0".parse().unwrap()).is_ok() && router.applied_to(&beside).is_err());
}

#[test]
fn a_recurrent_router_has_no_memory_of_earlier_tokens() {
    let model = model("qwen2_moe");
    let options = RecurrentOptions { width: 8, form: RecurrentForm::Instead, ..RecurrentOptions::default() };
    let model = RecurrentRouter::new(&model, options).unwrap().applied_to(&model).unwrap();
    let options = GenerateOptions { max_new_tokens: 6, ..GenerateOptions::default() };
    let together = generate(&model, &[vec![5, 9, 3], vec![7; 4]], &options, |_| false).unwrap();
    for (prompt, expected) in [vec![5, 9, 3], vec![7; 4]].iter().zip(together) {
        let mut ids = prompt.clone();
        for token in expected {
            let one = GenerateOptions { max_new_tokens: 1, ..options.clone() };
            let next = generate(&model, &[ids.clone()], &one, |_| false).unwrap().concat();
            assert_eq!(next, [token]);
            ids.extend(next);
        }
    }
}

#[test]
fn every_method_is_trained_saved_and_opened_again_as_it_was() {
    for (name, family, method) in [
        ("null-experts", "qwen3_moe", r#"{"type": "null_experts"}"#),
        ("null-experts", "qwen3_moe", r#"{"type": "null_experts", "lora": {"r": 4, "target_modules": ["q_proj"]}}"#),
        ("gamma-mod", "qwen2_moe", r#"{"type": "token_skip", "run": 0.6}"#),
        ("gamma-mod", "deepseek_v3", r#"{"type": "token_skip", "shared": false, "scaled": false, "bias": -0.05}"#),
        ("final-router", "qwen3_moe", r#"{"type": "final_router", "routes": 3, "fragile": 1.0}"#),
        ("final-router", "deepseek_v3", r#"{"type": "final_router", "routes": 3, "fragile": 1.0}"#),
        ("router-targets", "qwen2_moe", r#"{"type": "router_targets"}"#),
        ("recurrent-router", "qwen2_moe", r#"{"type": "recurrent_router", "router": {"width": 8}}"#),
        ("duo", "qwen2_moe", r#"{"type": "duo", "small": 1, "steps": 4, "temperatures": [1.0, 0.5]}"#),
        ("loss-free", "qwen2_moe", r#"{"type": "loss_free", "speed": 0.05}"#),
        ("loss-free", "deepseek_v3", r#"{"type": "loss_free", "speed": 0.05}"#),
        ("smoe-dropout", "qwen2_moe", r#"{"type": "smoe_dropout", "steps": 4}"#),
    ] {
        let base = model(family);
        let waves = waves(&base, 3);
        let json = format!(
            r#"{{"method": {method}, "router_losses": {{"shares": {{"entropy": 0.01, "sequence_balance": 0.01}}}},
            "train": {{"max_steps": 4, "schedule": {{"type": "schedule", "peak": 0.003}}}}}}"#
        );
        let mut recipe: Recipe =
            serde_json::from_str(&json.replace(r#", "schedule": {"type": "schedule", "peak": 0.003}"#, "")).unwrap();
        recipe.train.schedule.peak = 3e-3;
        let out = tempfile::tempdir().unwrap();
        let labels = Default::default();
        let training = TrainingRun {
            model: &base,
            waves: &waves,
            labels: &labels,
            directory: out.path(),
            save_every: 2,
            resume: false,
            fold: Default::default(),
        };
        let trained = training.train(&recipe, &mut |_| Ok(())).unwrap();
        let saved = trained.save(&base, out.path(), Existing::Force).unwrap();
        let expected = loss(&trained.as_written(&base, None).unwrap().unwrap(), &waves[0]);
        // large everywhere, as it began
        assert!(name == "duo" || expected != loss(&base, &waves[0]), "{name}");
        let dir = saved.model.unwrap();
        let reopened = Model::open(&dir, &Device::flex(), None).unwrap();
        let reopened = match moe_peft::open(&dir) {
            Ok(kinds) => kinds.onto(&reopened).unwrap().0,
            Err(_) => reopened,
        };
        assert_eq!(loss(&reopened, &waves[0]).to_bits(), expected.to_bits(), "{name} {family}");
        let beside = RunTime::beside(&dir).unwrap();
        assert_eq!(
            beside.is_plain(),
            name != "gamma-mod"
                && (!matches!(name, "loss-free" | "smoe-dropout") || (name, family) == ("loss-free", "deepseek_v3")),
            "{name}"
        );
    }
}

#[test]
fn a_choice_of_sizes_begins_large_has_the_gradient_of_its_mixture_and_meets_its_budget() {
    use moe_core::train::{Schedule, TrainOptions, train};
    use moe_peft::{
        FineTune,
        duo::{Duo, DuoTuning},
    };
    let model = model("qwen2_moe");
    let waves = waves(&model, 2);
    let method = DuoTuning { budget: 0.25, coefficient: 50.0, temperatures: [1.0, 1.0], ..DuoTuning::default() };
    let duo = Duo::new(&model, &method).unwrap();
    let hard = duo.applied_to(&model).unwrap();
    assert_eq!(loss(&hard, &waves[0]).to_bits(), loss(&model, &waves[0]).to_bits());
    assert_eq!(duo.share(), 1.0);
    // without the budget's loss, which the objective does not show
    let free = Duo::new(&model, &DuoTuning { coefficient: 0.0, ..method.clone() }).unwrap();
    free.set_temperature(Some(0.8));
    let mut set = AdapterSet::new();
    free.train_in(&mut set).unwrap();
    check(&free.applied_to(&model).unwrap(), set, &waves[0], 4);
    // a large coefficient: the mean share goes to the budget
    duo.set_temperature(Some(1.0));
    let mut set = AdapterSet::new();
    duo.train_in(&mut set).unwrap();
    let set = Arc::new(set);
    let mut task = FineTune::new(&hard, set.clone()).unwrap();
    let mut parameters = set.bank().parameters().unwrap();
    let options = TrainOptions {
        epochs: 60,
        schedule: Schedule::constant(0.02),
        evaluate_every: None,
        ..TrainOptions::default()
    };
    train(&mut task, &mut parameters, &waves, &options, &mut |_| Ok(())).unwrap();
    set.bank().settle(parameters).unwrap();
    loss(&hard, &waves[0]);
    assert!((duo.share() - 0.25).abs() < 0.08, "{}", duo.share());
}

#[test]
fn wrong_methods_are_explained() {
    let base = model("deepseek_v3");
    let setting = Setting::new(&base);
    let message = |method: &dyn TuningMethod| method.check(&setting).unwrap_err().to_string();
    assert!(message(&NullExpertTuning::default()).contains("null experts with routing"));
    let none =
        RecurrentRouterTuning { router: RecurrentOptions { width: 0, ..Default::default() }, ..Default::default() };
    assert!(message(&none).contains("width: found 0"));
    let base = model("qwen3_moe");
    let setting = Setting::new(&base);
    let odd =
        NullExpertTuning { experts: NullExpertOptions { nulls: Some(3), ..Default::default() }, ..Default::default() };
    assert!(odd.check(&setting).unwrap_err().to_string().contains("a multiple of the"));
}

#[test]
fn experts_that_predict_a_token_alone_are_right_for_it() {
    use moe_peft::router_loss::RouterTargets;
    let model = model("qwen2_moe");
    let waves = waves(&model, 1);
    let experts = model.config().moe(1).unwrap().num_experts();
    let targets = RouterTargets::by_trial(&model, 1, &waves, 0.5).unwrap();
    let row = &targets.targets[&(0, 1)];
    assert_eq!(row.len(), waves[0].tokens() * experts);
    // the last token of a sequence has nothing to predict
    assert!(row[12 * experts..13 * experts].iter().all(|right| !right));
    let setting = Setting::new(&model).with_waves(&waves);
    targets.check(&setting).unwrap();
    let fewer = RouterTargets { targets: Arc::new([((0, 1), vec![true; 3])].into()), ..targets };
    assert!(fewer.check(&setting).unwrap_err().to_string().contains("targets of wave 0 in layer 1: found 3"));
    assert!(RouterTargets::by_trial(&model, 99, &waves, 0.5).is_err());
}

#[test]
fn scores_of_skipping_have_the_gradient_of_what_they_scale_and_choose_so_many_tokens_of_each_sequence() {
    use moe_peft::token_skip::{TokenSkipRouter, TokenSkipTuning};
    for (family, shared) in [("qwen2_moe", true), ("deepseek_v3", false), ("phimoe", true)] {
        let model = model(family);
        let wave = &waves(&model, 1)[0];
        // all tokens run, each by the sigmoid of its score; the loss of the choice is not in the objective
        let method = TokenSkipTuning { run: 1.0, bias: 0.3, coefficient: 0.0, shared, ..TokenSkipTuning::default() };
        let router = TokenSkipRouter::new(&model, &method, &[0, 1]).unwrap();
        let mut set = AdapterSet::new();
        router.train_in(&mut set).unwrap();
        let under = router.applied_to(&model).unwrap();
        set.tell_training(Some(1));
        check(&under, set, wave, 3);
        // sequences of 13 and 9 tokens in two layers
        let method = TokenSkipTuning { run: 0.5, ..method };
        let router = TokenSkipRouter::new(&model, &method, &[0, 1]).unwrap();
        let mut set = AdapterSet::new();
        router.train_in(&mut set).unwrap();
        set.tell_training(Some(1));
        let set = Arc::new(set);
        sweep(&router.applied_to(&model).unwrap().with_adapters(set.clone()).unwrap(), wave);
        assert_eq!(router.share(), (7 + 5) as f64 / 22.0, "{family}");
        // after training every token decides for itself; a bias above 0 lets all of them run
        set.tell_training(None);
        loss(&router.applied_to(&model).unwrap(), wave);
        assert_eq!(router.share(), 1.0, "{family}");
    }
    // without the factor it begins as the model
    let model = model("qwen2_moe");
    let wave = &waves(&model, 1)[0];
    let method = TokenSkipTuning { scaled: false, ..TokenSkipTuning::default() };
    let plain = TokenSkipRouter::new(&model, &method, &[1]).unwrap().applied_to(&model).unwrap();
    assert_eq!(loss(&plain, wave).to_bits(), loss(&model, wave).to_bits());
    assert!(TokenSkipRouter::new(&model, &method, &[99]).unwrap_err().to_string().contains("below"));
}

#[test]
fn the_loss_of_the_choice_pulls_scores_to_who_was_chosen() {
    use moe_core::train::{Schedule, TrainOptions, train};
    use moe_peft::{
        FineTune,
        token_skip::{TokenSkipRouter, TokenSkipTuning},
    };
    let model = model("qwen2_moe");
    let waves = waves(&model, 2);
    // half of the tokens are chosen, whose scores begin alike and above 0
    let method = TokenSkipTuning { coefficient: 20.0, bias: 0.2, ..TokenSkipTuning::default() };
    let router = TokenSkipRouter::new(&model, &method, &[1]).unwrap();
    let mut set = AdapterSet::new();
    router.train_in(&mut set).unwrap();
    let set = Arc::new(set);
    let under = router.applied_to(&model).unwrap();
    let choice = |set: &Arc<AdapterSet>| {
        set.tell_training(Some(1));
        loss(&under.with_adapters(set.clone()).unwrap(), &waves[0]);
        let found = set.losses()["token_skip"];
        set.tell_training(None);
        found
    };
    let before = choice(&set);
    let mut task = FineTune::new(&under, set.clone()).unwrap();
    let mut parameters = set.bank().parameters().unwrap();
    let options = TrainOptions {
        epochs: 40,
        schedule: Schedule::constant(0.03),
        evaluate_every: None,
        ..TrainOptions::default()
    };
    train(&mut task, &mut parameters, &waves, &options, &mut |_| Ok(())).unwrap();
    set.bank().settle(parameters).unwrap();
    assert!(choice(&set) < 0.8 * before, "{before} {}", choice(&set));
    // and then a token knows by itself: some skip
    loss(&under, &waves[0]);
    assert!(router.share() < 1.0, "{}", router.share());
}

/// Layers that a training sweep went back through.
#[derive(Default)]
struct Back(Vec<usize>);

impl Observer for Back {
    fn needs(&self) -> Signals {
        Signals::PARAMETERS
    }

    fn done(&mut self, part: moe_core::trace::SweepPart) -> moe_core::Result<()> {
        if let moe_core::trace::SweepPart::Backward(layer) = part {
            self.0.push(layer);
        }
        Ok(())
    }
}

#[test]
fn the_last_router_is_taught_by_better_routes_and_costs_the_backward_pass_of_its_layer_alone() {
    use moe_core::data::{Dataset, DatasetOptions, LossOver, Tokenizer, WaveOptions};
    use moe_core::train::{Schedule, TrainOptions, train};
    use moe_peft::{
        FineTune,
        final_router::{FinalRouterTuning, route_gaps},
        fold::Folded,
        model_weights::OwnWeights,
    };
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    let whole = Model::open(&dir, &Device::flex(), None).unwrap();
    let tokenizer = Tokenizer::from_dir(&dir).unwrap();
    let options =
        DatasetOptions { samples: Some(48), length: 64, loss: LossOver::Completions, ..DatasetOptions::default() };
    let rows = Dataset::load(dir.join("data/facts_calibration.jsonl"), Some(&tokenizer), 2048, &options).unwrap();
    let waves = rows.waves(WaveOptions::Sequences(std::num::NonZeroUsize::new(12).unwrap()));
    // the rows of the last router, each in the place of its neighbor
    let mut set = AdapterSet::new();
    let last = OwnWeights { layers: Some([3].into()), ..OwnWeights::router() };
    last.install(&Setting::new(&whole), &mut set).unwrap();
    let mut parameters = set.bank().parameters().unwrap();
    let name = parameters.iter().next().unwrap().0.to_string();
    let hidden = whole.config().hidden_size;
    parameters.get_mut(&name).unwrap().values.rotate_left(hidden);
    set.bank().settle(parameters).unwrap();
    let planted = Folded::on(whole.checkpoint(), &set).unwrap().run(&Device::flex(), None).unwrap();
    let all = |model: &Model| waves.iter().map(|wave| loss(model, wave)).sum::<f64>();
    let (right, wrong) = (all(&whole), all(&planted));
    assert!(wrong > right + 1.0, "{right} {wrong}");
    let gaps =
        route_gaps(&planted, &waves[..1], &FinalRouterTuning { routes: 8, ..FinalRouterTuning::default() }).unwrap();
    assert_eq!(gaps.iter().map(|gap| gap.tokens).sum::<usize>(), waves[0].loss_tokens());
    assert!(gaps.iter().all(|gap| gap.gap >= 0.0) && gaps.iter().any(|gap| gap.gap > 0.0), "{gaps:?}");
    let method = FinalRouterTuning { fragile: 0.9, sharpness: 0.2, ..FinalRouterTuning::default() };
    let setting = Setting::new(&planted).with_waves(&waves);
    let mut set = AdapterSet::new();
    method.install(&setting, &mut set).unwrap();
    let set = Arc::new(set);
    let mut back = Back::default();
    let trained = planted.with_adapters(set.clone()).unwrap();
    let engine = Engine::new(&trained, EngineOptions { loss: true, ..EngineOptions::default() });
    engine.run(&waves[0], &mut back).unwrap();
    assert_eq!(back.0, [3]);
    let mut task = FineTune::new(&planted, set.clone()).unwrap();
    let mut parameters = set.bank().parameters().unwrap();
    assert_eq!(parameters.iter().count(), 1);
    let options = TrainOptions {
        epochs: 12,
        schedule: Schedule::constant(5e-3),
        evaluate_every: None,
        ..TrainOptions::default()
    };
    train(&mut task, &mut parameters, &waves, &options, &mut |_| Ok(())).unwrap();
    set.bank().settle(parameters).unwrap();
    let taught = all(&trained);
    assert!(taught < wrong - 0.4 * (wrong - right), "{right} {wrong} {taught}");
    // no routes, nothing to teach
    let mut set = AdapterSet::new();
    FinalRouterTuning { routes: 0, ..method }.install(&setting, &mut set).unwrap();
    let set = Arc::new(set);
    sweep(&planted.with_adapters(set.clone()).unwrap(), &waves[0]);
    assert!(set.bank().iter().next().unwrap().gradient().iter().all(|d| *d == 0.0));
    let dense = FinalRouterTuning::default().check(&Setting::new(&model("glm4_moe"))).err().map(|e| e.to_string());
    assert!(dense.is_none(), "{dense:?}");
}

#[test]
fn experts_are_trained_on_the_rows_of_their_labels() {
    use moe_peft::label_experts::LabelExperts;
    let model = model("qwen2_moe");
    let waves = waves(&model, 2);
    let labels = [(0, vec![0, 1]), (1, vec![1, 0])].into();
    let mut setting = Setting::new(&model).with_waves(&waves);
    setting.labels = &labels;
    let method = LabelExperts { experts: Some(vec![vec![0], vec![2, 3]]), ..LabelExperts::default() };
    let mut set = AdapterSet::new();
    let installed = method.install(&setting, &mut set).unwrap();
    let set = Arc::new(set);
    let under = installed.model(&model).with_adapters(set.clone()).unwrap();
    sweep(&under, &waves[0]);
    for live in set.bank().iter() {
        let reached = ["experts.0.", "experts.2.", "experts.3."].iter().any(|of| live.name().contains(of));
        let has = live.gradient().iter().any(|d| *d != 0.0);
        assert_eq!(has, reached, "{}", live.name());
    }
    let mut set = AdapterSet::new();
    let none = method.install(&Setting::new(&model).with_waves(&waves), &mut set).unwrap_err().to_string();
    assert!(none.contains("labels of rows"), "{none}");
}

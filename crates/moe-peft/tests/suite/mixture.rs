//! Mixtures of LoRA experts: against plain LoRA, naive sums and difference quotients.

use crate::common;

use std::{collections::BTreeMap, sync::Arc};

use burn::tensor::Tensor;
use common::*;
use moe_checkpoint::ExpertWeights;
use moe_core::{
    Model,
    adapters::{Adapters, Tokens},
    data::Wave,
    experts::ExpertTensors,
    host,
};
use moe_peft::{
    AdapterSet, TrainingHooks,
    lora::{Lora, Maps, Targets},
    mixture::{Allocation, Balance, Experts, Gate, KeepsSelection, MeanWeights, Mixture, MixtureConfig, Score},
};

fn installed(model: &Model, config: &MixtureConfig) -> (Arc<AdapterSet>, Mixture) {
    let mut set = AdapterSet::new();
    let mixture = Mixture::install(config, &mut set, &Maps::new(model.checkpoint()), &device()).unwrap();
    (Arc::new(set), mixture)
}

/// Every recipe, small.
fn recipes() -> Vec<(&'static str, MixtureConfig)> {
    let small = |config: MixtureConfig| MixtureConfig { r: 2, lora_alpha: 6.0, lora_dropout: 0.0, ..config };
    let list = |names: &[&str]| Some(Targets::list(names.iter().copied()));
    let some =
        || list(&["q_proj", "v_proj", "shared_expert.gate_proj", "shared_expert.down_proj", "experts.1.up_proj"]);
    let everywhere = Experts::PerLayer(vec![3, 1, 4]);
    vec![
        (
            "mola",
            small(MixtureConfig {
                target_modules: some(),
                experts: everywhere,
                balance: Balance::mola(0.5),
                ..MixtureConfig::mola(Allocation::Triangle)
            }),
        ),
        (
            "mix_lora",
            small(MixtureConfig { balance: Balance::mixtral(0.5), router_std: Some(0.5), ..MixtureConfig::mix_lora() }),
        ),
        ("llava_mole", small(MixtureConfig::llava_mole())),
        ("dyn_mole", small(MixtureConfig { target_modules: some(), ..MixtureConfig::dyn_mole() })),
        ("lora_moe", small(MixtureConfig { target_modules: some(), ..MixtureConfig::lora_moe() })),
        ("lora_mixer_experts", small(MixtureConfig::lora_mixer_experts())),
        ("lora_mixer_router", small(MixtureConfig::lora_mixer_router())),
        (
            "smora",
            MixtureConfig {
                r: 6,
                gate: Gate::Ranks { k: 3, partition: 1, bias_rate: 0.01 },
                target_modules: some(),
                ..MixtureConfig::smora()
            },
        ),
        (
            "moram",
            MixtureConfig {
                r: 6,
                gate: Gate::SelfActivated { k: 3, temperature: 0.3, threshold: 0.1 },
                target_modules: some(),
                ..MixtureConfig::moram()
            },
        ),
        (
            "fly_lora",
            MixtureConfig {
                r: 6,
                gate: Gate::Sparse { k: 3, score: Score::Signed, bias_rate: 0.01 },
                target_modules: some(),
                ..MixtureConfig::fly_lora()
            },
        ),
    ]
}

/// Sets values of a settled bank by name.
fn change(set: &AdapterSet, f: impl Fn(&str, [usize; 2], &mut Vec<f32>)) {
    let shapes: BTreeMap<String, [usize; 2]> =
        set.bank().iter().map(|live| (live.name().to_string(), live.shape())).collect();
    let mut parameters = set.bank().parameters().unwrap();
    for (name, shape) in &shapes {
        f(name, *shape, &mut parameters.get_mut(name).unwrap().values);
    }
    set.bank().settle(parameters).unwrap();
}

/// Makes the experts do something.
fn stir(set: &AdapterSet) {
    change(set, |name, _, values| {
        if name.ends_with("lora_B") {
            *values = noise(values.len(), name.len());
        }
    });
}

fn labels(mixture: &Mixture) {
    mixture.set_labels([(0, vec![1, 0])].into());
}

fn run(model: &Model, set: &Arc<AdapterSet>, wave: &Wave) -> Vec<f32> {
    logits(&model.with_adapters(set.clone()).unwrap(), wave)
}

#[test]
fn a_fresh_mixture_changes_nothing() {
    let model = model("qwen2_moe");
    let wave = wave(97);
    let base = logits(&model, &wave);
    for (name, config) in recipes() {
        let (set, mixture) = installed(&model, &config);
        labels(&mixture);
        let found = run(&model, &set, &wave);
        // weights that add up to 1 do so to rounding where they multiply the frozen block
        match config.blocks {
            true => assert!(distance(&found, &base) < 1e-5, "{name}"),
            false => assert_eq!(found, base, "{name}"),
        }
        if config.train_experts {
            stir(&set);
            assert!(distance(&run(&model, &set, &wave), &base) > 1e-3, "{name}");
        }
    }
}

#[test]
fn gradients_are_those_of_difference_quotients_with_the_balance_in_the_loss() {
    let model = model("qwen2_moe");
    let wave = wave(97);
    let predicted = wave.sequences.iter().map(|s| s.loss_tokens()).sum::<usize>() as f64;
    for (name, mut config) in recipes() {
        // both stages of LoRA-Mixer at once; and no bias that moves between the sweeps of a quotient
        (config.train_experts, config.train_router) = (true, config.gate != (Gate::Label {}));
        config.gate = match config.gate {
            Gate::Ranks { k, partition, .. } => Gate::Ranks { k, partition, bias_rate: 0.0 },
            Gate::Sparse { k, score, .. } => Gate::Sparse { k, score, bias_rate: 0.0 },
            gate => gate,
        };
        let (set, mixture) = installed(&model, &config);
        labels(&mixture);
        stir(&set);
        mixture.clock().train(1);
        let adapted = model.with_adapters(set.clone()).unwrap();
        let checked = check_gradients_with(
            &set,
            |with_gradients| {
                let loss = if with_gradients { train_loss(&adapted, &wave) } else { loss(&adapted, &wave) };
                loss + predicted * mixture.balance_loss()
            },
            |_| true,
        );
        assert!(checked >= 6, "{name}: {checked}");
    }
}

#[test]
fn dropout_in_a_mixture_has_the_gradients_of_what_is_left() {
    let model = model("qwen2_moe");
    let wave = wave(97);
    for (name, config) in recipes().into_iter().filter(|(name, _)| ["mola", "mix_lora", "smora"].contains(name)) {
        let mut config = MixtureConfig { lora_dropout: 0.3, balance: Balance::None {}, ..config };
        if let Gate::Ranks { k, partition, .. } = config.gate {
            config.gate = Gate::Ranks { k, partition, bias_rate: 0.0 };
        }
        let (set, mixture) = installed(&model, &config);
        stir(&set);
        let whole = run(&model, &set, &wave);
        mixture.clock().train(2);
        assert!(distance(&run(&model, &set, &wave), &whole) > 1e-4, "{name}");
        assert!(check_gradients(&model, &set, &wave) >= 6, "{name}");
    }
}

#[test]
fn one_expert_is_plain_lora() {
    let model = model("qwen2_moe");
    let wave = wave(97);
    let maps = Maps::new(model.checkpoint());
    let config = MixtureConfig {
        experts: Experts::Everywhere(1),
        target_modules: Some(Targets::Pattern("all-linear".into())),
        ..recipes()[0].1.clone()
    };
    let (set, mixture) = installed(&model, &config);
    stir(&set);
    let plain = mixture.merge().unwrap();
    let mut other = AdapterSet::new();
    Lora::install(&mut other, &maps, &[("default", plain)], &device()).unwrap();
    let difference = distance(&run(&model, &set, &wave), &run(&model, &Arc::new(other), &wave));
    assert!(difference < 1e-5, "{difference}");
}

#[test]
fn all_ranks_of_a_sparse_projection_are_a_plain_adapter_and_the_projection_is_frozen() {
    let model = model("qwen2_moe");
    let wave = wave(97);
    let gate = Gate::Sparse { k: 6, score: Score::Signed, bias_rate: 0.0 };
    let config = MixtureConfig { gate, ..recipes()[9].1.clone() };
    let (set, mixture) = installed(&model, &config);
    stir(&set);
    let mut other = AdapterSet::new();
    let maps = Maps::new(model.checkpoint());
    Lora::install(&mut other, &maps, &[("default", mixture.merge().unwrap())], &device()).unwrap();
    assert!(distance(&run(&model, &set, &wave), &run(&model, &Arc::new(other), &wave)) < 1e-5);
    // A is not trained; a row has in k / r non-zeros
    assert!(set.bank().iter().all(|live| live.name().ends_with("lora_B")));
    let config = MixtureConfig { gate: Gate::Sparse { k: 3, score: Score::Signed, bias_rate: 0.0 }, ..config };
    let (_, mixture) = installed(&model, &config);
    let merged = mixture.approximate_merge(MeanWeights::Constant(1.0)).unwrap();
    for low in merged.maps.values() {
        let inputs = low.a.len() / low.rank;
        assert!(low.a.chunks_exact(inputs).all(|row| row.iter().filter(|a| **a != 0.0).count() == inputs / 2));
    }
}

#[test]
fn numbering_the_experts_otherwise_changes_nothing() {
    let model = model("qwen2_moe");
    let wave = wave(97);
    let order = [2, 0, 1];
    for (name, config) in
        recipes().into_iter().filter(|(name, _)| ["mola", "mix_lora", "lora_moe", "dyn_mole"].contains(name))
    {
        let config = MixtureConfig { experts: Experts::Everywhere(3), ..config };
        let (set, mixture) = installed(&model, &config);
        stir(&set);
        let before = (run(&model, &set, &wave), mixture.balance_loss());
        let r = config.r;
        change(&set, |name, [rows, columns], values| {
            let old = values.clone();
            match name.rsplit('.').next().unwrap() {
                "lora_A" => {
                    *values = order.iter().flat_map(|e| old[e * r * columns..(e + 1) * r * columns].to_vec()).collect()
                }
                "lora_B" => {
                    let row = |row: usize| {
                        order.iter().flat_map(move |e| (e * r..(e + 1) * r).map(move |c| row * columns + c))
                    };
                    *values = (0..rows).flat_map(row).map(|at| old[at]).collect();
                }
                _ => *values = order.iter().flat_map(|e| old[e * columns..(e + 1) * columns].to_vec()).collect(),
            }
        });
        let after = (run(&model, &set, &wave), mixture.balance_loss());
        assert!(distance(&before.0, &after.0) < 1e-4, "{name}");
        assert!((before.1 - after.1).abs() < 1e-5, "{name}");
    }
}

#[test]
fn a_block_is_the_sum_of_whole_experts() {
    let model = model("qwen2_moe");
    for (_, config) in recipes().into_iter().filter(|(_, config)| config.blocks) {
        let (set, _) = installed(&model, &config);
        stir(&set);
        let block = set.block(1).unwrap();
        let value = |end: &str| {
            let path = format!("model.layers.1.mlp.shared_expert{end}");
            set.bank().get(&path).unwrap().to_vec()
        };
        let (hidden, width, n, r) = (32, 48, 5, config.r);
        let weights = ExpertWeights {
            gate: noise(width * hidden, 1),
            up: noise(width * hidden, 2),
            down: noise(hidden * width, 3),
            width,
            hidden,
            ..ExpertWeights::default()
        };
        let x = noise(n * hidden, 4);
        let tensor: Tensor<2> = host::from_vec(x.clone(), [n, hidden], &device());
        let found =
            host::into_vec(block.forward(&ExpertTensors::new(weights.clone(), &device()), &tensor, Tokens::WAVE));
        let experts = match config.experts {
            Experts::Everywhere(n) => n,
            _ => unreachable!("blocks here have the same everywhere"),
        };
        let scale = config.scale() as f32;
        let adapted = |name: &str, weight: &[f32], dims: [usize; 2], expert: usize| {
            let (a, b) = (value(&format!(".{name}.mixture.lora_A")), value(&format!(".{name}.mixture.lora_B")));
            let mut weight = weight.to_vec();
            for o in 0..dims[0] {
                for i in 0..dims[1] {
                    let rank = expert * r..(expert + 1) * r;
                    weight[o * dims[1] + i] +=
                        scale * rank.map(|c| b[o * experts * r + c] * a[c * dims[1] + i]).sum::<f32>();
                }
            }
            weight
        };
        let router = value(".mixture.router");
        for t in 0..n {
            let x = &x[t * hidden..(t + 1) * hidden];
            let dot = |w: &[f32], x: &[f32]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f32>();
            let z: Vec<f32> = router.chunks_exact(hidden).map(|row| dot(row, x)).collect();
            let total: f32 = z.iter().map(|z| z.exp()).sum();
            let p: Vec<f32> = z.iter().map(|z| z.exp() / total).collect();
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
            let k = if config.gate == (Gate::Top1 {}) { 1 } else { 2 };
            let sum: f32 = order[..k].iter().map(|e| p[*e]).sum();
            let mut expected = vec![0.0; hidden];
            for e in &order[..k] {
                let gate = adapted("gate_proj", &weights.gate, [width, hidden], *e);
                let up = adapted("up_proj", &weights.up, [width, hidden], *e);
                let down = adapted("down_proj", &weights.down, [hidden, width], *e);
                let unit = |j: usize| {
                    let g = dot(&gate[j * hidden..(j + 1) * hidden], x);
                    g / (1.0 + (-g).exp()) * dot(&up[j * hidden..(j + 1) * hidden], x)
                };
                let units: Vec<f32> = (0..width).map(unit).collect();
                let w = p[*e] / sum;
                expected.iter_mut().zip(down.chunks_exact(width)).for_each(|(y, row)| *y += w * dot(row, &units));
            }
            assert!(distance(&found[t * hidden..(t + 1) * hidden], &expected) < 1e-4);
        }
    }
}

#[test]
fn a_weight_of_one_gives_the_router_no_gradient() {
    let model = model("qwen2_moe");
    let config = MixtureConfig { balance: Balance::None {}, ..recipes()[2].1.clone() };
    let (set, _) = installed(&model, &config);
    stir(&set);
    train_loss(&model.with_adapters(set.clone()).unwrap(), &wave(97));
    for live in set.bank().iter() {
        let any = live.gradient().iter().any(|g| *g != 0.0);
        assert_eq!(any, !live.name().contains("router"), "{}", live.name());
    }
}

#[test]
fn labels_train_their_expert_and_the_second_stage_trains_routers_alone() {
    let model = model("qwen2_moe");
    let wave = wave(97);
    let (set, mixture) = installed(&model, &recipes()[5].1);
    mixture.set_labels([(0, vec![2, 2])].into());
    stir(&set);
    train_loss(&model.with_adapters(set.clone()).unwrap(), &wave);
    let r = 2;
    for live in set.bank().iter().filter(|live| live.name().ends_with("lora_A")) {
        let columns = live.shape()[1];
        for (expert, rows) in live.gradient().chunks_exact(r * columns).enumerate() {
            assert_eq!(rows.iter().any(|g| *g != 0.0), expert == 2, "{}", live.name());
        }
    }
    let (set, _) = installed(&model, &recipes()[6].1);
    assert!(set.bank().iter().all(|live| live.name().ends_with("router")));
    // the best 3 of 3 are all of them
    let soft = MixtureConfig { experts: Experts::Everywhere(3), train_experts: true, ..recipes()[6].1.clone() };
    let (set, mixture) = installed(&model, &soft);
    stir(&set);
    let best = run(&model, &set, &wave);
    mixture.clock().train(1);
    assert!(distance(&best, &run(&model, &set, &wave)) < 1e-5);
}

#[test]
fn biases_of_selections_move_after_waves_of_training_alone() {
    let model = model("qwen2_moe");
    let wave = wave(97);
    for (name, config) in
        recipes().into_iter().filter(|(_, config)| matches!(config.gate, Gate::Ranks { .. } | Gate::Sparse { .. }))
    {
        let (set, mixture) = installed(&model, &config);
        stir(&set);
        let dir = tempfile::tempdir().unwrap();
        let mixture = Arc::new(mixture);
        let biases = || {
            mixture.save(dir.path(), None).unwrap();
            let bytes = std::fs::read(dir.path().join(moe_peft::mixture::MODEL_FILE)).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let mut all = BTreeMap::new();
            for (name, view) in file.tensors().into_iter().filter(|(name, _)| name.ends_with("selection_bias")) {
                let values = view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
                all.insert(name, values.collect::<Vec<_>>());
            }
            all.into_values().flatten().collect::<Vec<_>>()
        };
        let first = run(&model, &set, &wave);
        assert_eq!(run(&model, &set, &wave), first, "{name}");
        assert!(biases().iter().all(|b| *b == 0.0));
        mixture.clock().train(1);
        train_loss(&model.with_adapters(set.clone()).unwrap(), &wave);
        mixture.clock().evaluate();
        run(&model, &set, &wave);
        let moved = biases();
        let state = KeepsSelection(mixture.clone()).state_save().unwrap();
        assert_eq!(state.arrays.values().flat_map(|array| array.values.clone()).collect::<Vec<_>>(), moved);
        let (other_set, other) = installed(&model, &config);
        let mut other = KeepsSelection(Arc::new(other));
        other.state_load(state, &other_set, &mut moe_core::train::Parameters::new()).unwrap();
        assert!(other.state_save().unwrap().arrays.values().any(|array| array.values.iter().any(|b| *b != 0.0)));
        assert!(moved.iter().any(|b| *b != 0.0) && moved.iter().all(|b| b.abs() <= 0.010_001), "{name}");
        run(&model, &set, &wave);
        assert_eq!(biases(), moved, "{name}");
    }
}

#[test]
fn mixtures_survive_files_with_the_state_of_their_routers() {
    let model = model("qwen2_moe");
    let maps = Maps::new(model.checkpoint());
    let wave = wave(97);
    for (name, config) in recipes() {
        let (set, mixture) = installed(&model, &config);
        labels(&mixture);
        stir(&set);
        mixture.clock().train(1);
        train_loss(&model.with_adapters(set.clone()).unwrap(), &wave);
        mixture.clock().evaluate();
        let expected = run(&model, &set, &wave);
        let dir = tempfile::tempdir().unwrap();
        mixture.save(dir.path(), None).unwrap();
        let mut again = AdapterSet::new();
        let loaded = Mixture::load(dir.path(), &mut again, &maps, &device()).unwrap();
        labels(&loaded);
        assert_eq!(run(&model, &Arc::new(again), &wave), expected, "{name}");
        // another model
        let other = common::model("deepseek_v3");
        let error = Mixture::load(dir.path(), &mut AdapterSet::new(), &Maps::new(other.checkpoint()), &device());
        assert!(error.is_err(), "{name}");
    }
}

#[test]
fn a_mixture_says_that_it_does_not_merge_and_its_means_are_an_approximation() {
    let model = model("qwen2_moe");
    let wave = wave(97);
    let maps = Maps::new(model.checkpoint());
    let base = logits(&model, &wave);
    for (name, config) in recipes() {
        let (set, mixture) = installed(&model, &config);
        labels(&mixture);
        stir(&set);
        let error = mixture.merge().unwrap_err().to_string();
        assert!(error.starts_with("not supported: merging"), "{name}: {error}");
        if config.blocks {
            assert!(mixture.approximate_merge(MeanWeights::Constant(1.0)).is_err());
            continue;
        }
        let exact = run(&model, &set, &wave);
        let merged = mixture.approximate_merge(MeanWeights::Observed).unwrap();
        let mut other = AdapterSet::new();
        Lora::install(&mut other, &maps, &[("default", merged)], &device()).unwrap();
        let found = run(&model, &Arc::new(other), &wave);
        if config.train_experts {
            assert!(distance(&found, &base) > 1e-4 && distance(&found, &exact) > 1e-6, "{name}");
        }
    }
    let never = installed(&model, &recipes()[0].1).1;
    assert!(never.approximate_merge(MeanWeights::Observed).unwrap_err().to_string().contains("no token"));
}

#[test]
fn atoms_of_earlier_tasks_stay() {
    let model = model("qwen2_moe");
    let wave = wave(97);
    let maps = Maps::new(model.checkpoint());
    let (set, mixture) = installed(&model, &recipes()[8].1);
    stir(&set);
    let first = run(&model, &set, &wave);
    let mut next = AdapterSet::new();
    let grown = mixture.next_task(9, &mut next, &maps, &device()).unwrap();
    let next = Arc::new(next);
    // as many trained values as before: the earlier ones are not among them
    assert_eq!(next.bank().values(), set.bank().values());
    // new atoms of no output still take part in the norm and the choice
    let drift = distance(&run(&model, &next, &wave), &first);
    assert!(drift > 1e-5 && drift.is_finite(), "{drift}");
    stir(&next);
    assert!(check_gradients(&model, &next, &wave) >= 6);
    let dir = tempfile::tempdir().unwrap();
    grown.save(dir.path(), None).unwrap();
    let mut again = AdapterSet::new();
    let loaded = Mixture::load(dir.path(), &mut again, &maps, &device()).unwrap();
    assert_eq!(run(&model, &Arc::new(again), &wave), run(&model, &next, &wave));
    assert!(loaded.next_task(1, &mut AdapterSet::new(), &maps, &device()).is_ok());
    assert!(installed(&model, &recipes()[0].1).1.next_task(1, &mut AdapterSet::new(), &maps, &device()).is_err());
}

#[test]
fn a_mixture_learns_on_the_training_loop() {
    use moe_core::train::{Schedule, TrainOptions, train};
    use moe_peft::FineTune;
    let model = model("qwen2_moe");
    for (name, config) in recipes().into_iter().filter(|(name, _)| !name.starts_with("lora_mixer")) {
        let (set, mixture) = installed(&model, &config);
        labels(&mixture);
        let wave = wave(97);
        let mut parameters = set.bank().parameters().unwrap();
        let mut task = FineTune::new(&model, set.clone()).unwrap().with_evaluation(vec![wave.clone()]);
        let schedule = Schedule { peak: 1e-2, ..Schedule::default() };
        let options = TrainOptions {
            epochs: 12,
            waves_per_step: 1,
            evaluate_every: Some(12),
            schedule,
            ..TrainOptions::default()
        };
        let report = train(&mut task, &mut parameters, &[wave], &options, &mut |_| Ok(())).unwrap();
        let (before, last) = (report.before.unwrap(), report.last.unwrap());
        assert!(last < before - 0.05, "{name}: {before} to {last}");
        assert!(!mixture.clock().is_training());
    }
}

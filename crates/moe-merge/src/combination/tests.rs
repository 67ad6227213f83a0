use super::*;
use crate::alignment::WeightMatching;
use crate::testing::{biased_expert, expert, noise, shuffled};

const HIDDEN: usize = 6;

/// Merges experts 0.. into one group with these weights.
struct Bench {
    experts: Vec<ExpertWeights>,
    weights: Vec<f64>,
    alignment: AlignmentConfig,
    sample: Option<TokenSample>,
}

impl Bench {
    fn new(experts: Vec<ExpertWeights>, weights: &[f64]) -> Self {
        Self { experts, weights: weights.to_vec(), alignment: AlignmentConfig::None, sample: None }
    }

    fn plan(&self) -> LayerPlan {
        let members: Vec<u32> = (0..self.experts.len() as u32).collect();
        let dominant = self.weights.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
        LayerPlan {
            layer: 2,
            groups: vec![Group {
                dominant: dominant.unwrap().0 as u32,
                members,
                weights: self.weights.iter().map(|w| *w as f32).collect(),
            }],
            ..LayerPlan::default()
        }
    }

    fn merge(&self, combination: &dyn Combination) -> Result<ExpertWeights> {
        let plan = self.plan();
        let job = LayerJob {
            plan: &plan,
            experts: &self.experts,
            sample: self.sample.as_ref(),
            activation: Activation::Silu,
            alignment: &self.alignment,
            basis: &OnceLock::new(),
            reference: Reference::Dominant,
        };
        let mut merged = None;
        combination.combine(&job, &mut |group, found| {
            assert_eq!(group, 0);
            merged = Some(match found {
                Merged::Changed(weights) => *weights,
                Merged::Unchanged(expert) => self.experts[expert].clone(),
            });
            Ok(())
        })?;
        Ok(merged.unwrap())
    }
}

fn sample(tokens: usize, experts: usize) -> TokenSample {
    // Each token is routed to two experts in turn.
    let selected: Vec<u32> = (0..2 * tokens).map(|slot| (slot % experts) as u32).collect();
    TokenSample {
        inputs: noise(tokens * HIDDEN, 91),
        logits: vec![0.0; tokens * experts],
        weights: noise(2 * tokens, 92).iter().map(|w| w.abs() + 0.1).collect(),
        selected,
        hidden: HIDDEN,
        experts,
        top_k: 2,
    }
}

fn by(importance: Importance) -> GroupWeights {
    GroupWeights::by(importance)
}

fn average() -> Average {
    Average { weights: by(Importance::Usage) }
}

fn close(a: &[f32], b: &[f32], tolerance: f32) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= tolerance)
}

/// Root mean square difference of two experts' outputs from what a group should give.
fn error(bench: &Bench, merged: &ExpertWeights, tokens: &TokenSample) -> f64 {
    let found = merged.forward(&tokens.inputs, Activation::Silu);
    let mut expected = vec![0.0f64; found.len()];
    for (expert, weight) in bench.experts.iter().zip(&bench.weights) {
        let outputs = expert.forward(&tokens.inputs, Activation::Silu);
        expected.iter_mut().zip(outputs).for_each(|(e, y)| *e += weight * f64::from(y));
    }
    let squares = found.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>();
    (squares / found.len() as f64).sqrt()
}

#[test]
fn an_average_is_the_hand_computed_one() {
    for make in [expert, biased_expert] {
        let bench = Bench::new(vec![make(HIDDEN, 4, 1), make(HIDDEN, 4, 2)], &[0.75, 0.25]);
        let merged = bench.merge(&average()).unwrap();
        let mean = |part: fn(&ExpertWeights) -> Vec<f32>| -> Vec<f32> {
            let [a, b] = [part(&bench.experts[0]), part(&bench.experts[1])];
            a.iter().zip(&b).map(|(a, b)| (0.75 * f64::from(*a) + 0.25 * f64::from(*b)) as f32).collect()
        };
        assert_eq!(merged.gate, mean(|w| w.gate.clone()));
        assert_eq!(merged.up, mean(|w| w.up.clone()));
        assert_eq!(merged.down, mean(|w| w.down.clone()));
        assert_eq!(merged.gate_bias.unwrap_or_default(), mean(|w| w.gate_bias.clone().unwrap_or_default()));
        assert_eq!(merged.down_bias.unwrap_or_default(), mean(|w| w.down_bias.clone().unwrap_or_default()));
    }
}

#[test]
fn permuted_copies_merge_to_the_expert_with_alignment_and_not_without() {
    let original = expert(HIDDEN, 9, 3);
    let copies: Vec<ExpertWeights> = [10, 11].map(|seed| original.select_units(&shuffled(9, seed)).unwrap()).into();
    let mut bench = Bench::new([vec![original.clone()], copies].concat(), &[0.5, 0.3, 0.2]);
    let unaligned = bench.merge(&average()).unwrap();
    assert!(!close(&unaligned.gate, &original.gate, 1e-3));
    bench.alignment = AlignmentConfig::Weights(WeightMatching::default());
    assert_eq!(bench.merge(&average()).unwrap(), original);
}

#[test]
fn the_numbering_of_members_does_not_matter() {
    let experts: Vec<ExpertWeights> = (0..4).map(|seed| expert(HIDDEN, 7, seed + 20)).collect();
    let weights = [0.4, 0.3, 0.2, 0.1];
    let order = [2, 0, 3, 1];
    let mut bench = Bench::new(experts.clone(), &weights);
    let mut moved = Bench::new(order.map(|e: usize| experts[e].clone()).to_vec(), &order.map(|e: usize| weights[e]));
    let tokens = sample(80, 4);
    let mut to = [0; 4];
    order.iter().enumerate().for_each(|(at, e)| to[*e] = at as u32);
    moved.sample = Some(tokens.renamed(&to));
    bench.sample = Some(tokens);
    let least_squares =
        LeastSquaresDown { weights: by(Importance::Usage), target: FitTarget::Routed, ridge: 1e-3, min_tokens: 36 };
    let subspace = Subspace { weights: by(Importance::Usage), rank: SubspaceRank::Rank(3) };
    for alignment in [AlignmentConfig::None, AlignmentConfig::Weights(WeightMatching::default())] {
        (bench.alignment, moved.alignment) = (alignment.clone(), alignment);
        assert_eq!(bench.merge(&average()).unwrap(), moved.merge(&average()).unwrap());
        for combination in [&subspace as &dyn Combination, &least_squares] {
            let (a, b) = (bench.merge(combination).unwrap(), moved.merge(combination).unwrap());
            assert!(close(&a.down, &b.down, 1e-4) && close(&a.gate, &b.gate, 1e-5));
        }
    }
}

#[test]
fn zero_weights_become_a_mean_or_a_floor() {
    let evidence = |usage: &[f64]| LayerEvidence {
        tokens: 8,
        sums: [("routing.tokens".to_string(), usage.to_vec())].into(),
        ..LayerEvidence::default()
    };
    let weights = |zeros, usage: &[f64], members: &[usize]| {
        let weights = GroupWeights { importance: Importance::Usage, zeros };
        weights.of(members, &evidence(usage), usage.len()).unwrap()
    };
    assert_eq!(weights(Zeros::Mean, &[6.0, 2.0, 0.0], &[0, 1]), [0.75, 0.25]);
    assert_eq!(weights(Zeros::Mean, &[8.0, 0.0, 0.0], &[0, 2]), [1.0, 0.0]);
    assert_eq!(weights(Zeros::Mean, &[8.0, 0.0, 0.0], &[1, 2]), [0.5, 0.5]);
    assert_eq!(weights(Zeros::Floor, &[3.0, 0.0, 1.0], &[0, 1, 2]), [0.6, 0.2, 0.2]);
    assert_eq!(weights(Zeros::Floor, &[8.0, 0.0, 0.0], &[0, 2]), [1.0 / 1.5, 0.5 / 1.5]);
    assert_eq!(weights(Zeros::Floor, &[8.0, 0.0, 0.0], &[1, 2]), [0.5, 0.5]);
    // The least important expert may be of another group.
    let saliency = [0.30, 0.22, 0.15, 0.10, 0.04, 0.004, 0.0, 0.0];
    let floored = weights(Zeros::Floor, &saliency, &[0, 6]);
    assert!((floored[0] - 0.30 / 0.304).abs() < 1e-6 && (floored[1] - 0.004 / 0.304).abs() < 1e-6, "{floored:?}");
    assert_eq!(weights(Zeros::Mean, &[0.0, 1.0], &[0]), [1.0]);
}

#[test]
fn a_subspace_of_full_rank_is_the_average_and_a_smaller_one_its_projection() {
    let bench = Bench::new((0..3).map(|seed| expert(HIDDEN, 5, seed + 30)).collect(), &[0.5, 0.3, 0.2]);
    let average = bench.merge(&average()).unwrap();
    let of = |rank| bench.merge(&Subspace { weights: by(Importance::Usage), rank }).unwrap();
    assert_eq!(of(SubspaceRank::Full), average);
    for rank in [SubspaceRank::Rank(6), SubspaceRank::Energy(1.0)] {
        let full = of(rank);
        assert!(close(&full.gate, &average.gate, 1e-5) && close(&full.down, &average.down, 1e-5), "{rank:?}");
    }
    // The definition: U S sum_e w_e V_e from the SVD of the matrices side by side.
    let rank = 2;
    let found = of(SubspaceRank::Rank(rank));
    let side =
        faer::Mat::from_fn(5, 3 * HIDDEN, |i, j| f64::from(bench.experts[j / HIDDEN].gate[i * HIDDEN + j % HIDDEN]));
    let svd = side.thin_svd().unwrap();
    let (u, s, v) = (svd.U(), svd.S().column_vector(), svd.V());
    for i in 0..5 {
        for h in 0..HIDDEN {
            let expected: f64 = (0..rank)
                .map(|r| {
                    let merged: f64 = (0..3).map(|e| bench.weights[e] * v[(e * HIDDEN + h, r)]).sum();
                    u[(i, r)] * s[r] * merged
                })
                .sum();
            assert!((f64::from(found.gate[i * HIDDEN + h]) - expected).abs() < 1e-5);
        }
    }
    assert!(Subspace { weights: by(Importance::Equal), rank: SubspaceRank::Energy(0.0) }.validate().is_err());
}

#[test]
fn a_fitted_down_is_never_worse_than_the_average_and_exact_where_it_can_be() {
    let mut bench = Bench::new((0..3).map(|seed| expert(HIDDEN, 8, seed + 40)).collect(), &[0.5, 0.3, 0.2]);
    let tokens = sample(200, 3);
    bench.sample = Some(tokens.clone());
    let fit =
        |ridge| LeastSquaresDown { weights: by(Importance::Usage), target: FitTarget::Weighted, ridge, min_tokens: 36 };
    let plain = bench.merge(&average()).unwrap();
    let errors: Vec<f64> = [1e-9, 1e-3, 1.0, 1e6]
        .map(|ridge| {
            let merged = bench.merge(&fit(ridge)).unwrap();
            assert_eq!((&merged.gate, &merged.up), (&plain.gate, &plain.up));
            error(&bench, &merged, &tokens)
        })
        .into();
    let average_error = error(&bench, &plain, &tokens);
    assert!(errors.windows(2).all(|pair| pair[0] <= pair[1] * (1.0 + 1e-6)), "{errors:?}");
    assert!(errors.iter().all(|e| *e <= average_error * (1.0 + 1e-6)), "{errors:?} {average_error}");
    assert!(errors[0] < 0.8 * average_error, "{errors:?} {average_error}");

    // Twins with other down projections: the merged units are theirs, so the mean of their downs is exact.
    let mut twin = bench.experts[0].clone();
    twin.down = noise(HIDDEN * 8, 77);
    bench = Bench { experts: vec![bench.experts[0].clone(), twin], weights: vec![0.5, 0.5], ..bench };
    bench.sample = Some(sample(200, 2));
    let merged = bench.merge(&fit(1e-6)).unwrap();
    assert!(close(&merged.down, &bench.merge(&average()).unwrap().down, 1e-4));
}

#[test]
fn a_routed_fit_minimizes_what_tokens_lose() {
    let mut bench = Bench::new((0..2).map(|seed| expert(HIDDEN, 8, seed + 50)).collect(), &[0.6, 0.4]);
    let tokens = sample(300, 2);
    bench.sample = Some(tokens.clone());
    let loss = |merged: &ExpertWeights| -> f64 {
        let outputs = merged.forward(&tokens.inputs, Activation::Silu);
        let of: Vec<Vec<f32>> = bench.experts.iter().map(|e| e.forward(&tokens.inputs, Activation::Silu)).collect();
        let gates: Vec<Vec<f32>> = (0..2).map(|e| tokens.weights_of(e)).collect();
        let squares = (0..outputs.len()).map(|k| {
            let t = k / HIDDEN;
            let expected = gates[0][t] * of[0][k] + gates[1][t] * of[1][k];
            f64::from((gates[0][t] + gates[1][t]) * outputs[k] - expected).powi(2)
        });
        squares.sum()
    };
    let of = |target| LeastSquaresDown { weights: by(Importance::Usage), target, ridge: 1e-9, min_tokens: 36 };
    let routed = loss(&bench.merge(&of(FitTarget::Routed)).unwrap());
    let weighted = loss(&bench.merge(&of(FitTarget::Weighted)).unwrap());
    let plain = loss(&bench.merge(&average()).unwrap());
    assert!(routed < weighted && routed < plain, "{routed} {weighted} {plain}");
    // Too few tokens: the average stays.
    bench.sample = Some(sample(30, 2));
    let merged = bench.merge(&of(FitTarget::Routed)).unwrap();
    assert_eq!(merged, bench.merge(&average()).unwrap());
    bench.sample = None;
    let message = bench.merge(&of(FitTarget::Routed)).unwrap_err().to_string();
    assert!(message.contains("layer 2") && message.contains("sample"), "{message}");
}

#[test]
fn a_narrow_expert_counts_as_one_with_units_of_zeros() {
    let (narrow, wide) = (expert(HIDDEN, 4, 1), expert(HIDDEN, 5, 2));
    let bench = Bench::new(vec![narrow.clone(), wide.clone()], &[0.25, 0.75]);
    let merged = bench.merge(&average()).unwrap();
    assert_eq!((merged.width, merged.gate.len(), merged.down.len()), (5, 5 * HIDDEN, 5 * HIDDEN));
    // Units in the order they have; the last is three quarters of the wide expert's.
    for at in 0..5 * HIDDEN {
        let (row, column) = (at / 5, at % 5);
        let own = |w: &ExpertWeights| if column < w.width { w.down[row * w.width + column] } else { 0.0 };
        assert!((merged.down[at] - 0.25 * own(&narrow) - 0.75 * own(&wide)).abs() < 1e-6);
        let gate = narrow.gate.get(at).copied().unwrap_or(0.0);
        assert!((merged.gate[at] - 0.25 * gate - 0.75 * wide.gate[at]).abs() < 1e-6);
    }
    let mixed = Bench::new(vec![expert(HIDDEN, 4, 1), biased_expert(HIDDEN, 4, 2)], &[0.5, 0.5]);
    assert!(mixed.merge(&average()).unwrap_err().to_string().contains("biases"));
    // Experts without any units.
    let none = Bench::new(vec![expert(HIDDEN, 0, 1), expert(HIDDEN, 0, 2)], &[0.5, 0.5]);
    assert_eq!(none.merge(&average()).unwrap(), expert(HIDDEN, 0, 3));
}

#[test]
fn the_dominant_alone_is_untouched() {
    let bench = Bench::new((0..3).map(|seed| expert(HIDDEN, 4, seed + 60)).collect(), &[0.2, 0.5, 0.3]);
    assert_eq!(bench.merge(&DominantOnly {}).unwrap(), bench.experts[1]);
}

#[test]
fn the_order_of_units_does_not_change_what_is_merged() {
    let experts: Vec<ExpertWeights> = (0..3).map(|seed| expert(HIDDEN, 10, seed + 80)).collect();
    let shuffles: Vec<Vec<u32>> = (0..3).map(|seed| shuffled(10, seed + 5)).collect();
    let moved = experts.iter().zip(&shuffles).map(|(expert, order)| expert.select_units(order).unwrap()).collect();
    let weights = [0.5, 0.3, 0.2];
    let (mut bench, mut moved) = (Bench::new(experts, &weights), Bench::new(moved, &weights));
    for bench in [&mut bench, &mut moved] {
        bench.alignment = AlignmentConfig::Weights(WeightMatching::default());
        bench.sample = Some(sample(80, 3));
    }
    let target = FitTarget::Weighted;
    let weights = by(Importance::Usage);
    let fit = LeastSquaresDown { weights, target, ridge: 1e-2, min_tokens: 36 };
    let subspace = Subspace { weights, rank: SubspaceRank::Rank(4) };
    let x = noise(20 * HIDDEN, 3);
    for combination in [&average() as &dyn Combination, &subspace, &fit] {
        let of = |bench: &Bench| bench.merge(combination).unwrap().forward(&x, Activation::Silu);
        assert!(close(&of(&bench), &of(&moved), 1e-3));
    }
    // Of the average, unit by unit: the order of the reference.
    assert_eq!(moved.merge(&average()).unwrap(), bench.merge(&average()).unwrap().select_units(&shuffles[0]).unwrap());
}

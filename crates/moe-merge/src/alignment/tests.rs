use std::sync::OnceLock;

use moe_checkpoint::{Activation, ExpertWeights};

use super::*;
use crate::testing::{biased_expert, expert, noise, shuffled};

const HIDDEN: usize = 8;

fn every_alignment() -> Vec<AlignmentConfig> {
    let (activations, pca) = (ActivationMatching {}, PcaMatching { components: 4 });
    vec![
        AlignmentConfig::Weights(WeightMatching { normalize: false }),
        AlignmentConfig::Weights(WeightMatching { normalize: true }),
        AlignmentConfig::Activations(activations),
        AlignmentConfig::Pca(pca),
        AlignmentConfig::ActivationsAndPca { activations, pca },
    ]
}

fn sample() -> TokenSample {
    TokenSample { inputs: noise(HIDDEN * 50, 8), hidden: HIDDEN, experts: 1, ..TokenSample::default() }
}

fn order(alignment: &AlignmentConfig, a: &ExpertWeights, b: &ExpertWeights) -> Vec<u32> {
    let sample = sample();
    let (experts, basis) = (vec![a.clone(), b.clone()], OnceLock::new());
    let (activation, experts) = (Activation::Silu, &experts as &dyn ExpertSource);
    let context = AlignmentContext { sample: Some(&sample), activation, layer: 0, experts, basis: &basis };
    alignment.order(a, b, &context).unwrap().unwrap()
}

#[test]
fn a_planted_order_is_undone_exactly() {
    for width in [1, 2, 13, 40] {
        for weights in [expert(HIDDEN, width, 5), biased_expert(HIDDEN, width, 5)] {
            let permuted = weights.select_units(&shuffled(width, 3)).unwrap();
            for alignment in every_alignment() {
                let order = order(&alignment, &weights, &permuted);
                assert_eq!(permuted.select_units(&order).unwrap(), weights, "{alignment:?} {width}");
            }
        }
    }
}

#[test]
fn a_match_survives_noise_and_follows_the_order_of_the_units() {
    let width = 24;
    let weights = expert(HIDDEN, width, 6);
    let mut noisy = weights.clone();
    for (part, seed) in [(&mut noisy.gate, 1), (&mut noisy.up, 2), (&mut noisy.down, 3)] {
        part.iter_mut().zip(noise(HIDDEN * width, seed)).for_each(|(v, n)| *v += 0.05 * n);
    }
    let shuffle = shuffled(width, 4);
    let permuted = noisy.select_units(&shuffle).unwrap();
    for alignment in every_alignment() {
        let order = order(&alignment, &weights, &permuted);
        assert_eq!(permuted.select_units(&order).unwrap(), noisy, "{alignment:?}");
        // Units of the reference in another order: the same pairs.
        let reference = weights.select_units(&shuffle).unwrap();
        let moved = super::tests::order(&alignment, &reference, &permuted);
        let expected: Vec<u32> = shuffle.iter().map(|slot| order[*slot as usize]).collect();
        assert_eq!(moved, expected, "{alignment:?}");
    }
}

#[test]
fn weights_are_matched_by_their_largest_products() {
    // One hidden dimension: units are numbers, and sorted numbers have the largest sum of products.
    let one = |gate: &[f32]| ExpertWeights {
        gate: gate.to_vec(),
        up: vec![0.0; gate.len()],
        down: vec![0.0; gate.len()],
        width: gate.len(),
        hidden: 1,
        ..ExpertWeights::default()
    };
    let raw = AlignmentConfig::Weights(WeightMatching { normalize: false });
    assert_eq!(order(&raw, &one(&[1.0, 3.0, 2.0]), &one(&[10.0, 20.0, 30.0])), [0, 2, 1]);
}

#[test]
fn activations_need_a_sample_and_none_needs_nothing() {
    let weights = expert(HIDDEN, 3, 1);
    let (experts, basis) = (vec![weights.clone()], OnceLock::new());
    let (activation, experts) = (Activation::Silu, &experts as &dyn ExpertSource);
    let context = AlignmentContext { sample: None, activation, layer: 7, experts, basis: &basis };
    for alignment in every_alignment().into_iter().filter(AlignmentConfig::needs_sample) {
        let message = alignment.order(&weights, &weights, &context).unwrap_err().to_string();
        assert!(message.contains("layer 7") && message.contains("sample"), "{message}");
    }
    assert_eq!(AlignmentConfig::None.order(&weights, &weights, &context).unwrap(), None);
    let json = r#"{"type": "activations_and_pca", "pca": {"components": 32}}"#;
    let AlignmentConfig::ActivationsAndPca { pca, .. } = serde_json::from_str(json).unwrap() else { panic!() };
    assert_eq!(pca.components, 32);
    assert!(AlignmentConfig::Pca(PcaMatching { components: 0 }).validate().is_err());
}

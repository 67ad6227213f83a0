//! Zeros in the weights of experts, in every layout: where they should be, and nothing else changed.

use crate::common;

use std::sync::Arc;

use common::checkpoints;
use moe_checkpoint::{ArrayKind, Checkpoint, ExpertPart, Extent, Fold, Provenance, Statistics, WriteOptions, write};
use moe_merge::{INPUT_SQUARES, Sparsity, UNIT_SQUARES};

/// Squares of inputs that differ by expert, unit and element.
fn statistics(model: &Checkpoint) -> Statistics {
    let shape = model.shape();
    let mut statistics = Statistics::new(shape, Provenance::new(model.fingerprint(), "rows", "{}"));
    statistics.allocate(INPUT_SQUARES, ArrayKind::Vector(Extent::Hidden), Fold::Sum).unwrap();
    statistics.allocate(UNIT_SQUARES, ArrayKind::Unit, Fold::Sum).unwrap();
    let value = |i: usize, expert: usize| ((i * 7919 + expert * 31) % 101) as f64 + 0.5;
    for layer in &shape.layers {
        for (expert, width) in layer.widths.iter().enumerate() {
            let inputs = statistics.vector_mut(INPUT_SQUARES, Extent::Hidden, Fold::Sum, layer.layer, expert).unwrap();
            inputs.iter_mut().enumerate().for_each(|(h, square)| *square = value(h, expert));
            let units = statistics.unit_mut(UNIT_SQUARES, Fold::Sum, layer.layer, expert).unwrap();
            assert_eq!(units.len(), *width);
            units.iter_mut().enumerate().for_each(|(j, square)| *square = value(j, expert + 3));
        }
    }
    statistics
}

fn part(model: &Checkpoint, layer: usize, expert: usize, part: ExpertPart) -> Vec<f32> {
    model.expert_part(layer, expert, part).unwrap().map(|matrix| matrix.to_f32()).unwrap_or_default()
}

#[test]
fn the_least_weights_of_every_row_are_zero_and_the_rest_is_the_base() {
    for (name, base) in checkpoints() {
        if base.grouped() || base.quantization().is_some() {
            continue;
        }
        let statistics = statistics(&base);
        for sparsity in [Sparsity::Unstructured(0.5), Sparsity::TWO_OF_FOUR] {
            let sparse = sparsity.on(&base, &statistics).unwrap_or_else(|error| panic!("{name}: {error}"));
            let (model, mut zeros, mut weights) = (sparse.model(), 0, 0);
            for layer in base.shape().layers.clone() {
                for expert in 0..layer.num_experts() {
                    let gateless = base.shape().gateless;
                    for of in ExpertPart::ALL.into_iter().filter(|part| !(gateless && *part == ExpertPart::Gate)) {
                        let (before, after) =
                            (part(&base, layer.layer, expert, of), part(model, layer.layer, expert, of));
                        let squares = match of {
                            ExpertPart::Down => statistics.unit(UNIT_SQUARES, layer.layer, expert).unwrap().to_vec(),
                            _ => {
                                statistics.vector(INPUT_SQUARES, Extent::Hidden, layer.layer, expert).unwrap().to_vec()
                            }
                        };
                        for (before, after) in before.chunks(squares.len()).zip(after.chunks(squares.len())) {
                            let gone = (0..squares.len()).filter(|i| after[*i] == 0.0 && before[*i] != 0.0).count();
                            assert!(gone <= sparsity.zeros(squares.len()), "{name}");
                            let kept = (0..squares.len()).filter(|i| after[*i] != 0.0);
                            assert!(kept.clone().all(|i| after[i].to_bits() == before[i].to_bits()), "{name}");
                            if let Sparsity::Unstructured(_) = sparsity {
                                let size = |i: usize| f64::from(before[i]).abs() * squares[i].sqrt();
                                let least = kept.map(size).fold(f64::INFINITY, f64::min);
                                let most =
                                    (0..squares.len()).filter(|i| after[*i] == 0.0).map(size).fold(0.0, f64::max);
                                assert!(most <= least, "{name}: {most} went, {least} stayed");
                            }
                            zeros += sparsity.zeros(squares.len()) as u64;
                            weights += squares.len() as u64;
                        }
                    }
                }
            }
            assert_eq!((sparse.report().zeros, sparse.report().weights), (zeros, weights), "{name}");
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("sparse");
            write(model, &out, &WriteOptions::default()).unwrap();
            let written = Arc::new(Checkpoint::open(&out).unwrap());
            assert!(written.is_model(&model.fingerprint()), "{name}");
            assert_eq!(written.config(), base.config(), "{name}: stock loaders read it as the base");
        }
    }
}

#[test]
fn statistics_of_another_model_are_refused() {
    let (_, base) = checkpoints().into_iter().find(|(_, base)| !base.grouped()).unwrap();
    let other = Statistics::new(base.shape(), Provenance::new("another", "", "{}"));
    let error = Sparsity::TWO_OF_FOUR.on(&base, &other).unwrap_err().to_string();
    assert!(error.contains("another"), "{error}");
    let empty = Statistics::new(base.shape(), Provenance::new(base.fingerprint(), "", "{}"));
    let error = Sparsity::TWO_OF_FOUR.on(&base, &empty).unwrap_err().to_string();
    assert!(error.contains(INPUT_SQUARES), "{error}");
}

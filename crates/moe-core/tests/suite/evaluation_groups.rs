//! Likelihoods that the ranks of a group share: the bits of one process, on every rank.

use std::num::NonZeroUsize;
use std::path::Path;

use burn::tensor::Device;
use moe_checkpoint::group::Threads;
use moe_core::Model;
use moe_core::data::{Sequence, WaveOptions};
use moe_core::evaluate::{cross_entropy, cross_entropy_in_group, sequence_losses, sequence_losses_in_group};

#[test]
fn any_number_of_ranks_measures_the_bits_of_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    let model = Model::open(path, &Device::flex(), None).unwrap();
    let sequence = |i: u32| Sequence::new((0..4 + i).map(|t| (t * 31 + i * 7) % 60).collect());
    let sequences: Vec<Sequence> = (0..7).map(sequence).collect();
    let how = WaveOptions::Sequences(NonZeroUsize::new(2).unwrap());
    let (loss, tokens) = cross_entropy(&model, &sequences, how).unwrap();
    let losses = sequence_losses(&model, &sequences, how).unwrap();
    assert_eq!(losses.len(), 7);
    for ranks in 1..=5 {
        let all = Threads::run(ranks, |group| {
            let total = cross_entropy_in_group(group, &model, &sequences, how).unwrap();
            (total, sequence_losses_in_group(group, &model, &sequences, how).unwrap())
        });
        for (total, each) in all {
            assert_eq!((total, &each), ((loss, tokens), &losses), "{ranks} ranks");
        }
    }
}

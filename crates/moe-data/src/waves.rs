//! Waves: the fixed groups of sequences that chunking, sharding, saving and folding work in.

use std::num::NonZeroUsize;

use serde::{Deserialize, Serialize};

use super::{Error, Sequence};

/// A fixed list of sequences. Tokens of a wave are concatenated without padding, so that statistics never see padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wave {
    /// Position of the wave in the whole data set, the same in every shard: folding goes in the order of these ids.
    pub id: u64,
    /// The sequences, each at least two tokens long when they come from a [`Dataset`](super::Dataset).
    pub sequences: Vec<Sequence>,
}

impl Wave {
    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(Sequence::len).sum()
    }

    /// Predicted tokens that count in the loss, over all sequences.
    pub fn loss_tokens(&self) -> usize {
        self.sequences.iter().map(Sequence::loss_tokens).sum()
    }
}

/// How many sequences go into one wave. Part of a recipe: it is never derived from free memory, because another
/// grouping sums in another order and may change the last bits of a statistic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaveOptions {
    /// Sequences in order for as long as the wave has at most this many tokens; a longer sequence is a wave of its own.
    Tokens(NonZeroUsize),
    /// Exactly this many sequences; the last wave may have fewer.
    Sequences(NonZeroUsize),
}

impl Default for WaveOptions {
    /// 16,384 tokens.
    fn default() -> Self {
        Self::Tokens(NonZeroUsize::new(16384).expect("a non-zero literal"))
    }
}

/// Groups sequences into waves with ids 0, 1, 2, … Greedy and in order, so that the same sequences always give the same
/// waves.
pub fn waves(sequences: &[Sequence], options: WaveOptions) -> Vec<Wave> {
    let mut waves: Vec<Wave> = Vec::new();
    let mut tokens = 0;
    for sequence in sequences {
        let fits = waves.last().is_some_and(|wave| match options {
            WaveOptions::Tokens(target) => tokens + sequence.len() <= target.get(),
            WaveOptions::Sequences(count) => wave.sequences.len() < count.get(),
        });
        if !fits {
            waves.push(Wave { id: waves.len() as u64, sequences: Vec::new() });
            tokens = 0;
        }
        tokens += sequence.len();
        waves.last_mut().expect("a wave was pushed above").sequences.push(sequence.clone());
    }
    waves
}

/// The waves `index`, `index + count`, `index + 2 * count`, … with the ids they have in the whole data set.
///
/// # Errors
/// [`Error::Shard`] if `index` is not below `count`.
pub fn shard(waves: Vec<Wave>, index: usize, count: usize) -> Result<Vec<Wave>, Error> {
    if index >= count {
        return Err(Error::Shard { index, count });
    }
    Ok(waves.into_iter().skip(index).step_by(count).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sequences(lengths: &[usize]) -> Vec<Sequence> {
        lengths.iter().enumerate().map(|(i, n)| Sequence::new(vec![i as u32; *n])).collect()
    }

    fn tokens(n: usize) -> WaveOptions {
        WaveOptions::Tokens(NonZeroUsize::new(n).unwrap())
    }

    #[test]
    fn a_wave_stops_before_the_token_target_is_passed() {
        let lengths = |options| {
            waves(&sequences(&[4, 6, 5, 30, 2, 2]), options)
                .iter()
                .map(|wave| wave.sequences.iter().map(Sequence::len).collect::<Vec<_>>())
                .collect::<Vec<_>>()
        };
        assert_eq!(lengths(tokens(10)), [vec![4, 6], vec![5], vec![30], vec![2, 2]]);
        assert_eq!(lengths(WaveOptions::Sequences(NonZeroUsize::new(4).unwrap())), [vec![4, 6, 5, 30], vec![2, 2]]);
    }

    #[test]
    fn a_shard_past_the_count_is_refused() {
        assert_eq!(
            shard(vec![], 2, 2).unwrap_err().to_string(),
            "shard 2 of 2: the index must be below the number of shards"
        );
        assert!(shard(vec![], 0, 0).is_err());
    }

    #[test]
    fn options_are_one_line_of_json() {
        let options: WaveOptions = serde_json::from_str(r#"{"sequences": 8}"#).unwrap();
        assert_eq!(options, WaveOptions::Sequences(NonZeroUsize::new(8).unwrap()));
        assert!(serde_json::from_str::<WaveOptions>(r#"{"tokens": 0}"#).is_err());
    }

    proptest! {
        #[test]
        fn shards_partition_the_waves(
            lengths in prop::collection::vec(2usize..40, 0..60), target in 1usize..100, count in 1usize..7
        ) {
            let whole = waves(&sequences(&lengths), tokens(target));
            prop_assert_eq!(&whole, &waves(&sequences(&lengths), tokens(target)));
            prop_assert!(whole.iter().enumerate().all(|(i, wave)| wave.id == i as u64));
            prop_assert!(whole.iter().all(|wave| wave.tokens() <= target || wave.sequences.len() == 1));
            let flat: Vec<_> = whole.iter().flat_map(|wave| wave.sequences.clone()).collect();
            prop_assert_eq!(flat, sequences(&lengths));
            let mut parts: Vec<_> = (0..count).flat_map(|i| shard(whole.clone(), i, count).unwrap()).collect();
            parts.sort_by_key(|wave| wave.id);
            prop_assert_eq!(parts, whole);
        }
    }
}

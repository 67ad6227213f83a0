//! Every target on its corpus, and on inputs that were changed at random: read or refused, and never a panic.

use moe_fuzz::TARGETS;

/// Numbers without a pattern (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end.max(1) as u64) as usize
    }

    /// The input with a few bytes changed, cut, doubled or put from another input.
    fn changed(&mut self, input: &[u8], other: &[u8]) -> Vec<u8> {
        let mut bytes = input.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len() + 1);
            match self.below(6) {
                0 => bytes.truncate(at),
                1 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                2 if at < bytes.len() => bytes[at] = b"0{}[],:\"\\\x00\xff-9eE"[self.below(15)],
                3 => bytes.insert(at, self.below(256) as u8),
                4 => {
                    let end = (at + self.below(40)).min(bytes.len());
                    bytes.drain(at..end);
                }
                _ => {
                    let from = self.below(other.len() + 1);
                    let part = other[from..(from + self.below(60)).min(other.len())].to_vec();
                    bytes.splice(at..at, part);
                }
            }
        }
        bytes
    }
}

#[test]
fn every_target_reads_or_refuses_its_corpus_and_what_is_like_it() {
    for target in TARGETS {
        let inputs = target.inputs().unwrap();
        (target.run)(b"");
        (target.run)(&[0xff; 64]);
        (target.run)(&u64::MAX.to_le_bytes());
        let mut random = Random(7);
        for input in &inputs {
            (target.run)(input);
        }
        for _ in 0..if inputs.is_empty() { 0 } else { 300 } {
            let (one, other) = (random.below(inputs.len()), random.below(inputs.len()));
            (target.run)(&random.changed(&inputs[one], &inputs[other]));
        }
    }
}

#[test]
fn names_are_distinct_and_corpora_are_there() {
    let mut names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), TARGETS.len());
    for name in ["header", "config", "tokenizer_config", "rows", "recipes", "adapter", "adapter_config", "template"] {
        let target = TARGETS.iter().find(|target| target.name == name).unwrap();
        assert!(target.inputs().unwrap().len() > 2, "{name}");
    }
}

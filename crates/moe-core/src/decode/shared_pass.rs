//! Two decoders of one checkpoint that differ in their routing, in one pass as far as they agree.

use burn::tensor::Tensor;

use super::{
    DecodingReport,
    decoder::{Decoder, Wanted},
};
use crate::{
    error::Result,
    layers::ChosenKeys,
    trace::{HalfInput, WaveInfo},
};

/// A strong and a weak routing of one model go through its layers together. Half a layer runs once for both where what
/// enters it is the same: the attention half, and whatever mixes tokens in its place, until a sequence had another
/// stream in that layer; the feed-forward half where all tokens of the step go to the same experts with the same
/// weights. Everything is computed on the rows, and by the kernels, of two passes by themselves, and gives their bits.
pub(crate) struct SharedPass {
    /// Whether the weak decoder has a cache of its own, by place and sequence.
    apart: Vec<Vec<bool>>,
}

impl SharedPass {
    /// For decoders with so many sequences that have been fed nothing; `None` where layers are decided while they run,
    /// or read the keys of others, which one of two caches would lack.
    pub fn new(strong: &Decoder<'_>, weak: &Decoder<'_>, sequences: usize) -> Option<Self> {
        let (a, b) = (strong.model(), weak.model());
        let apart = a.config().shares_keys();
        let alike = !apart && a.path() == b.path() && a.depth_rule().is_none() && b.depth_rule().is_none();
        alike.then(|| Self { apart: a.path().steps().iter().map(|_| vec![false; sequences]).collect() })
    }

    /// Feeds both new tokens of the sequences `active`; logits `[sequences, V]` after the last ones of each decoder.
    pub fn feed(
        &mut self,
        [strong, weak]: [&mut Decoder<'_>; 2],
        active: &[usize],
        input: &[Vec<u32>],
        report: &mut DecodingReport,
    ) -> Result<[Tensor<2>; 2]> {
        let (fed, mut x) = strong.begin(active, input)?;
        let batch = fed.batch(active);
        let weak_chosen = ChosenKeys::default();
        let weak_batch = fed.batch_of(active, &weak_chosen);
        // the weak stream, where it is another one
        let mut other: Option<Tensor<2>> = None;
        let path = strong.model().path().clone();
        for (place, step) in path.steps().iter().enumerate() {
            let layer = step.layer;
            let (middle, other_middle) = match step.attention {
                false => (x.clone(), other.clone()),
                true => {
                    report.weak_halves += active.len();
                    let apart = other.is_some() || active.iter().any(|s| self.apart[place][*s]);
                    let other_middle = match apart {
                        false => {
                            report.shared_halves += active.len();
                            None
                        }
                        true => {
                            for &sequence in active {
                                if !std::mem::replace(&mut self.apart[place][sequence], true) {
                                    weak.keep_as(strong, place, sequence);
                                }
                            }
                            Some(weak.mix(place, layer, other.as_ref().unwrap_or(&x), &weak_batch)?)
                        }
                    };
                    let middle = strong.mix(place, layer, &x, &batch)?;
                    if other_middle.is_none() {
                        weak_chosen.follow(batch.chosen);
                    }
                    (middle, other_middle)
                }
            };
            if !step.feed_forward {
                (x, other) = (middle, other_middle);
                continue;
            }
            report.weak_halves += active.len();
            let half = strong.engine().half(&x, &middle);
            let same = other_middle.is_none() && agree(strong, weak, layer, half, batch.info)?;
            let output = strong.feed_forward(layer, half, &batch)?;
            other = match same {
                true => {
                    report.shared_halves += active.len();
                    None
                }
                false => {
                    let (x, middle) = (other.as_ref().unwrap_or(&x), other_middle.as_ref().unwrap_or(&middle));
                    Some(weak.feed_forward(layer, weak.engine().half(x, middle), &batch)?)
                }
            };
            x = output;
        }
        let logits = strong.end(active, &fed, &x, Wanted::Last)?;
        let weak_logits = match &other {
            Some(other) => weak.end(active, &fed, other, Wanted::Last)?,
            None => {
                weak.has_fed(active, &fed);
                logits.clone()
            }
        };
        Ok([logits, weak_logits])
    }
}

/// Whether both send all tokens to the same experts with the same weights.
fn agree(strong: &Decoder<'_>, weak: &Decoder<'_>, layer: usize, half: HalfInput<'_>, info: &WaveInfo) -> Result<bool> {
    let a = strong.engine().routed(layer, half, info)?;
    let b = weak.engine().routed(layer, half, info)?;
    // an expert with a weight of zero may run in one of them and not in the other
    Ok(a == b && a.is_none_or(|routed| routed.weights.iter().all(|weight| *weight != 0.0)))
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use std::path::Path;

    use burn::tensor::Device;

    use super::*;
    use crate::{Model, adaptive::RoutingConfig, host::HostView};

    fn bits(logits: &Tensor<2>) -> Vec<u32> {
        HostView::new(logits).as_slice().iter().map(|z| z.to_bits()).collect()
    }

    #[test]
    fn one_pass_gives_the_bits_of_two_and_shares_what_agrees() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5");
        let prompts = [vec![5, 9, 3, 44], vec![7; 3], vec![31]];
        for name in ["qwen3_moe", "deepseek_v3", "qwen3_next", "nemotron_h", "lfm2_moe", "cohere2_moe"] {
            let model = Model::open(fixtures.join(name), &Device::flex(), None).unwrap();
            let k = model.router().top_k();
            let same: Vec<String> = (0..k).map(|rank| rank.to_string()).collect();
            let same = format!(r#"{{"type": "ranks", "ranks": [{}]}}"#, same.join(","));
            let median = r#"{"type": "skip", "beta": 0.7}"#.to_string();
            let one = r#"{"type": "top_k", "k": 1}"#.to_string();
            let mut shared = Vec::new();
            for weak in [&same, &median, &one] {
                let weak = weak.parse::<RoutingConfig>().unwrap().on(&model).unwrap();
                let lengths = vec![12; 3];
                let mut alone = [&model, &weak].map(|model| Decoder::new(model, lengths.clone()));
                let mut both = [&model, &weak].map(|model| Decoder::new(model, lengths.clone()));
                let mut pass = SharedPass::new(&both[0], &both[1], 3).unwrap();
                let mut report = DecodingReport::default();
                let (mut active, mut input) = (vec![0, 1, 2], prompts.to_vec());
                for step in 0..6u32 {
                    let expected = [0, 1].map(|i| bits(&alone[i].feed(&active, &input, Wanted::Last).unwrap()));
                    let [a, b] = &mut both;
                    let found = pass.feed([a, b], &active, &input, &mut report).unwrap();
                    assert_eq!(found.map(|logits| bits(&logits)), expected, "{name} {step}");
                    if step == 2 {
                        active.remove(1);
                    }
                    input = active.iter().map(|s| vec![11 + step + *s as u32]).collect();
                }
                shared.push((report.shared_halves, report.weak_halves));
            }
            // where no expert is another one, everything; elsewhere what comes before the first that is
            assert_eq!(shared[0].0, shared[0].1, "{name}");
            assert!(shared[1].0 <= shared[0].0 && shared[2].0 < shared[2].1 && shared[2].0 > 0, "{name} {shared:?}");
        }
    }
}

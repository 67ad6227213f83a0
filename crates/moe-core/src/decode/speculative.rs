//! Speculative decoding: a draft proposes tokens, the model accepts those that it would have drawn itself.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{Decoder, DecodingReport, Sampling, Wanted, sampling::greedy};
use crate::{
    error::{Error, Result},
    host::HostView,
};

/// The draft proposes `tokens` tokens at a time, which the model checks in one pass. A proposal `x` is accepted with
/// probability `min(1, p(x) / q(x))`, and the first refused one replaced by a draw from `max(0, p - q)`, normalized, so
/// that what comes out has exactly the model's distribution (arXiv 2211.17192, 2302.01318); under greedy choice, it is
/// the model's own text. A pruned model becomes useful that way even where quality must not change.
///
/// The pass over several tokens sums in another order than one over a single token, so that logits, and choices between
/// nearly equal ones, may differ in their last bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Speculative {
    /// Tokens that are proposed at a time, at least 1.
    pub tokens: usize,
}

impl Default for Speculative {
    fn default() -> Self {
        Self { tokens: 4 }
    }
}

impl Speculative {
    /// # Errors
    /// [`Error::Input`] for no tokens.
    pub fn validate(&self) -> Result<()> {
        match self.tokens {
            0 => Err(Error::input("tokens of a speculation", 0, "at least 1")),
            _ => Ok(()),
        }
    }
}

/// Whether a token proposed by `q` is accepted under `p`, given a number in [0, 1); otherwise what is drawn from is
/// left.
fn accepts(p: &[f32], q: &[f32], token: u32, random: f32) -> bool {
    let (p, q) = (p[token as usize], q[token as usize]);
    // random q < p, without a division
    random * q < p
}

/// What is drawn from after a refusal: `max(0, p - q)`, normalized.
fn left(p: &[f32], q: &[f32]) -> Vec<f32> {
    let mut rest: Vec<f32> = p.iter().zip(q).map(|(p, q)| (p - q).max(0.0)).collect();
    let sum: f32 = rest.iter().sum();
    if sum <= 0.0 {
        // p and q agree up to rounding
        return p.to_vec();
    }
    rest.iter_mut().for_each(|r| *r /= sum);
    rest
}

/// The token up to which probabilities reach `random` times their sum.
fn draw(p: &[f32], random: f32) -> u32 {
    let mut remaining = random * p.iter().sum::<f32>();
    let mut last = 0;
    for (id, p) in p.iter().enumerate().filter(|(_, p)| **p > 0.0) {
        last = id;
        if remaining < *p {
            break;
        }
        remaining -= p;
    }
    last as u32
}

/// A sequence whose completion grows.
struct Growing {
    /// Prompt and completion.
    ids: Vec<u32>,
    prompt: usize,
    random: Option<ChaCha8Rng>,
}

impl Growing {
    fn number(&mut self) -> f32 {
        self.random.as_mut().map_or(0.0, |random| random.random())
    }
}

/// Continues prompts together; `ended(completion)` as in generation. One random stream per prompt where tokens are
/// sampled.
pub(crate) fn speculate(
    mut target: Decoder<'_>,
    mut draft: Decoder<'_>,
    prompts: &[Vec<u32>],
    random: Vec<ChaCha8Rng>,
    (speculative, sampling, stop, most): (&Speculative, Sampling, &[u32], usize),
    ended: &mut impl FnMut(&[u32]) -> bool,
) -> Result<(Vec<Vec<u32>>, DecodingReport)> {
    let mut random = random.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
    let mut all: Vec<Growing> = prompts
        .iter()
        .map(|prompt| Growing { ids: prompt.clone(), prompt: prompt.len(), random: random.next().flatten() })
        .collect();
    let mut report = DecodingReport::default();
    let mut active: Vec<usize> = (0..prompts.len()).filter(|_| most > 0).collect();
    while !active.is_empty() {
        // what may still come, less the token that the model adds itself
        let room = |s: usize| most - (all[s].ids.len() - all[s].prompt);
        let counts: Vec<usize> = active.iter().map(|&s| speculative.tokens.min(room(s) - 1)).collect();
        let proposals = propose(&mut draft, &mut all, &active, &counts, sampling)?;
        // the model reads what it has not seen, and the proposals
        target.mark(&active);
        let input: Vec<Vec<u32>> = active
            .iter()
            .zip(&proposals)
            .map(|(&s, proposed)| {
                let unseen = all[s].ids[target.fed(s)..].iter().copied();
                unseen.chain(proposed.iter().map(|(token, _)| *token)).collect()
            })
            .collect();
        let starts: Vec<usize> = active.iter().map(|&s| target.fed(s)).collect();
        let wanted: Vec<usize> = proposals.iter().map(|proposed| proposed.len() + 1).collect();
        let logits = target.feed(&active, &input, Wanted::Tail(&wanted))?;
        let vocabulary = target.model().config().vocab_size;
        let view = HostView::new(&logits);
        let mut rows = view.as_slice().chunks_exact(vocabulary);
        let mut still = Vec::new();
        for (i, &s) in active.iter().enumerate() {
            // the row after the last known token, and those after the proposals
            let own: Vec<&[f32]> = rows.by_ref().take(wanted[i]).collect();
            let proposed = &proposals[i];
            let sequence = &mut all[s];
            let mut new = Vec::with_capacity(proposed.len() + 1);
            let mut accepted = 0;
            for ((token, q), logits) in proposed.iter().zip(&own) {
                let p = sampling.distribution(logits);
                if accepts(&p, q, *token, sequence.number()) {
                    new.push(*token);
                    accepted += 1;
                    continue;
                }
                new.push(draw(&left(&p, q), sequence.number()));
                break;
            }
            if accepted == proposed.len() {
                new.push(match sampling {
                    Sampling::Greedy => greedy(own[accepted]),
                    _ => draw(&sampling.distribution(own[accepted]), sequence.number()),
                });
            }
            report.steps += 1;
            report.proposed += proposed.len();
            report.accepted += accepted;
            let mut done = false;
            for token in new {
                if stop.contains(&token) {
                    done = true;
                    break;
                }
                sequence.ids.push(token);
                let completion = &sequence.ids[sequence.prompt..];
                if ended(completion) || completion.len() == most {
                    done = true;
                    break;
                }
            }
            // all but the last token have been read rightly: the model goes on from there
            let read = (sequence.ids.len() - 1).min(starts[i] + input[i].len());
            target.rewind(s, read);
            if !done {
                let keep = draft.fed(s).min(read);
                draft.rewind(s, keep);
                still.push(s);
            }
        }
        active = still;
    }
    let completions: Vec<Vec<u32>> = all.into_iter().map(|sequence| sequence.ids[sequence.prompt..].to_vec()).collect();
    report.tokens = completions.iter().map(Vec::len).sum();
    Ok((completions, report))
}

/// Tokens that a draft proposes for each sequence, and the distribution each was drawn from.
type Proposals = Vec<Vec<(u32, Vec<f32>)>>;

fn propose(
    draft: &mut Decoder<'_>,
    all: &mut [Growing],
    active: &[usize],
    counts: &[usize],
    sampling: Sampling,
) -> Result<Proposals> {
    let mut proposals: Proposals = active.iter().map(|_| Vec::new()).collect();
    draft.mark(active);
    for round in 0..counts.iter().copied().max().unwrap_or(0) {
        let which: Vec<usize> = (0..active.len()).filter(|i| counts[*i] > round).collect();
        let running: Vec<usize> = which.iter().map(|i| active[*i]).collect();
        let input: Vec<Vec<u32>> = which
            .iter()
            .map(|&i| match round {
                0 => all[active[i]].ids[draft.fed(active[i])..].to_vec(),
                _ => vec![proposals[i][round - 1].0],
            })
            .collect();
        let logits = draft.feed(&running, &input, Wanted::Last)?;
        let vocabulary = draft.model().config().vocab_size;
        let view = HostView::new(&logits);
        for (&i, logits) in which.iter().zip(view.as_slice().chunks_exact(vocabulary)) {
            let q = sampling.distribution(logits);
            let token = match sampling {
                Sampling::Greedy => greedy(logits),
                _ => draw(&q, all[active[i]].number()),
            };
            proposals[i].push((token, q));
        }
    }
    Ok(proposals)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn what_comes_out_has_the_distribution_of_the_model() {
        let (p, q) = ([0.5f32, 0.2, 0.25, 0.05, 0.0], [0.1f32, 0.4, 0.1, 0.2, 0.2]);
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let (n, mut counts, mut accepted) = (400_000, [0usize; 5], 0);
        for _ in 0..n {
            let token = draw(&q, random.random());
            if accepts(&p, &q, token, random.random()) {
                counts[token as usize] += 1;
                accepted += 1;
            } else {
                counts[draw(&left(&p, &q), random.random()) as usize] += 1;
            }
        }
        for (count, p) in counts.iter().zip(p) {
            assert!((*count as f64 / f64::from(n) - f64::from(p)).abs() < 3e-3, "{counts:?}");
        }
        // sum of min(p, q)
        assert!((f64::from(accepted) / f64::from(n) - 0.45).abs() < 3e-3, "{accepted}");
    }

    #[test]
    fn a_draft_that_is_the_model_is_always_accepted() {
        let p = [0.5f32, 0.2, 0.25, 0.05];
        assert!((0..4).all(|token| accepts(&p, &p, token, 0.999_999)));
        assert_eq!(left(&p, &p), p);
        assert!(!accepts(&[0.0, 1.0], &[1.0, 0.0], 0, 0.0));
        assert_eq!(draw(&[0.0, 0.3, 0.0, 0.7, 0.0], 0.9999), 3);
        assert_eq!(draw(&[0.0, 0.3, 0.0, 0.7, 0.0], 0.0), 1);
        assert!(Speculative { tokens: 0 }.validate().unwrap_err().to_string().contains("at least 1"));
    }
}

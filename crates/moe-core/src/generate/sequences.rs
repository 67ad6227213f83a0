//! Sequences that are generated together and come and go between tokens: what a server needs.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Sampling, check_causal, plan_of};
use crate::{
    decode::{Decoder, Wanted},
    error::{Error, Result},
    host::HostView,
    memory,
    model::Model,
};

/// Tokens of prompts that are read in one step, so that long prompts hold up nobody for long.
const PROMPT_TOKENS: usize = 512;
/// Of those, tokens whose scores are asked for: logits are as long as the vocabulary.
const SCORED_TOKENS: usize = 128;

/// What is asked of one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceOptions {
    /// New tokens, at most; none for a prompt that is only scored.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Token ids that end the sequence (not part of it).
    pub stop: Vec<u32>,
    /// Whether tokens come with their log-probabilities, and how many of the likeliest alternatives with theirs.
    pub scores: Option<usize>,
    /// Whether the tokens of the prompt are scored as well.
    pub score_prompt: bool,
}

impl Default for SequenceOptions {
    fn default() -> Self {
        Self { max_new_tokens: 64, sampling: Sampling::Greedy, stop: Vec::new(), scores: None, score_prompt: false }
    }
}

/// A token with what the model thought of it.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredToken {
    /// The token.
    pub id: u32,
    /// The logarithm of its probability under the model itself, whatever was sampled from; 0 where no scores were asked
    /// for.
    pub log_probability: f32,
    /// The likeliest tokens in its place, best first.
    pub likeliest: Vec<(u32, f32)>,
}

/// What a step made of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub enum Made {
    /// The next tokens of the prompt were scored; the first one of a prompt has no score and is not among them.
    Scored {
        /// Which sequence.
        sequence: usize,
        /// The tokens.
        tokens: Vec<ScoredToken>,
    },
    /// A new token.
    Token {
        /// Which sequence.
        sequence: usize,
        /// The token.
        token: ScoredToken,
    },
    /// The sequence has ended, and its number is free.
    Ended {
        /// Which sequence.
        sequence: usize,
        /// The stop token that ended it, unless it ended at its last token.
        stop: Option<ScoredToken>,
    },
}

/// Sequences of one model.
///
/// ```no_run
/// use moe_core::{Model, device::device, generate::{Made, SequenceOptions, Sequences}};
///
/// let model = Model::open("models/Qwen1.5-MoE-A2.7B", &device("default")?, None)?;
/// let mut sequences = Sequences::new(&model)?;
/// let first = sequences.begin(vec![1, 2, 3], SequenceOptions::default())?;
/// while !sequences.is_empty() {
///     for made in sequences.step()? {
///         if let Made::Token { sequence, token } = made {
///             println!("{sequence}: {}", token.id);
///         }
///     }
/// }
/// # Ok::<(), moe_core::Error>(())
/// ```
pub struct Sequences<'m> {
    model: &'m Model,
    decoder: Decoder<'m>,
    /// By number.
    running: Vec<Option<Running>>,
    /// Numbers in the order in which they came.
    order: Vec<usize>,
}

struct Running {
    options: SequenceOptions,
    random: Option<ChaCha8Rng>,
    /// The prompt, then new tokens.
    tokens: Vec<u32>,
    prompt: usize,
    /// Tokens that the model has read.
    read: usize,
}

impl Running {
    fn in_the_end(&self) -> usize {
        self.prompt + self.options.max_new_tokens
    }
}

impl<'m> Sequences<'m> {
    /// No sequences yet.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for routing of a token by what comes after it.
    pub fn new(model: &'m Model) -> Result<Self> {
        check_causal(model)?;
        Ok(Self { model, decoder: Decoder::new(model, Vec::new()), running: Vec::new(), order: Vec::new() })
    }

    /// Sequences that have not ended.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether all have ended.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Checks what [`begin`](Self::begin) would refuse however few sequences there are.
    ///
    /// # Errors
    /// As those of [`begin`](Self::begin).
    pub fn check(model: &Model, prompt: &[u32], options: &SequenceOptions) -> Result<()> {
        options.sampling.validate()?;
        if prompt.is_empty() {
            return Err(Error::input("prompt", "no tokens", "at least one"));
        }
        let vocabulary = model.config().vocab_size;
        if let Some(id) = prompt.iter().find(|id| **id as usize >= vocabulary) {
            return Err(Error::input("token id", id, format!("below the vocabulary size {vocabulary}")));
        }
        let (tokens, longest) = (prompt.len() + options.max_new_tokens, model.config().max_position_embeddings);
        if longest > 0 && tokens > longest {
            let found = format!("{} and {} new ones", prompt.len(), options.max_new_tokens);
            return Err(Error::input("tokens of the prompt", found, format!("{longest} together at most")));
        }
        plan_of(model, Self::pieces(model, 1, prompt.len()), 1, tokens as u64, memory::limit(model.max_memory()))?;
        Ok(())
    }

    /// A further sequence, that takes part from the next step on: its number among those that have not ended.
    ///
    /// # Errors
    /// [`Error::Input`] for an empty prompt, an id outside the vocabulary, more tokens than the model has positions
    /// for, or sampling parameters out of range; [`Error::Memory`] if the memory limit cannot hold it beside the
    /// others.
    pub fn begin(&mut self, prompt: Vec<u32>, options: SequenceOptions) -> Result<usize> {
        Self::check(self.model, &prompt, &options)?;
        let new = prompt.len() + options.max_new_tokens;
        let all: usize = self.running.iter().flatten().map(Running::in_the_end).sum::<usize>() + new;
        let longest = self.running.iter().flatten().map(|running| running.prompt).max().unwrap_or(0).max(prompt.len());
        let count = self.len() + 1;
        let limit = memory::limit(self.model.max_memory());
        let plan = plan_of(self.model, Self::pieces(self.model, count, longest), count as u64, all as u64, limit)?;
        self.model.set_residency(plan.residency);
        let random = match options.sampling {
            Sampling::TopP { seed, .. } => Some(ChaCha8Rng::seed_from_u64(seed)),
            Sampling::Greedy => None,
        };
        let sequence = self.decoder.admit(new);
        let running = Running { options, random, prompt: prompt.len(), tokens: prompt, read: 0 };
        if sequence == self.running.len() {
            self.running.push(None);
        }
        self.running[sequence] = Some(running);
        self.order.push(sequence);
        Ok(sequence)
    }

    /// Tokens and logits of a step, at most. Where depth is decided from a prompt, it is read as a whole.
    fn pieces(model: &Model, sequences: usize, longest: usize) -> [usize; 2] {
        let whole = model.depth_rule().is_some();
        [PROMPT_TOKENS, SCORED_TOKENS].map(|piece| sequences + if whole { longest.max(piece) } else { piece })
    }

    /// Ends a sequence, as when nobody waits for it. One that has ended already is none of them.
    pub fn end(&mut self, sequence: usize) {
        if self.running.get_mut(sequence).and_then(Option::take).is_some() {
            self.decoder.dismiss(sequence);
            self.order.retain(|other| *other != sequence);
        }
    }

    /// Reads the next pieces of prompts, and makes the next token of every sequence whose prompt was read.
    ///
    /// # Errors
    /// Whatever stops the model. What the sequences have read is then not known: they are all ended.
    pub fn step(&mut self) -> Result<Vec<Made>> {
        let stepped = self.try_step();
        if stepped.is_err() {
            self.order.clone().into_iter().for_each(|sequence| self.end(sequence));
        }
        stepped
    }

    fn try_step(&mut self) -> Result<Vec<Made>> {
        let whole_prompts = self.model.depth_rule().is_some();
        let (mut room, mut scored_room) = (PROMPT_TOKENS, SCORED_TOKENS);
        let (mut active, mut input, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
        for &sequence in &self.order {
            let Some(running) = &self.running[sequence] else { continue };
            let unread = running.tokens.len() - running.read;
            let in_prompt = running.read < running.prompt;
            let scores = in_prompt && running.options.score_prompt;
            let piece = match (in_prompt, whole_prompts, scores) {
                (false, ..) => unread,
                (true, true, _) if room == PROMPT_TOKENS => unread,
                (true, true, _) => 0,
                (true, false, true) => unread.min(room).min(scored_room),
                (true, false, false) => unread.min(room),
            };
            if piece == 0 {
                continue;
            }
            if in_prompt {
                room = room.saturating_sub(piece);
                scored_room = scored_room.saturating_sub(if scores { piece } else { 0 });
            }
            active.push(sequence);
            input.push(running.tokens[running.read..running.read + piece].to_vec());
            // Of a piece of a prompt that is not its end nothing is needed, but a step without logits is none.
            wanted.push(if scores { piece } else { 1 });
        }
        if active.is_empty() {
            return Ok(Vec::new());
        }
        let logits = HostView::new(&self.decoder.feed(&active, &input, Wanted::Tail(&wanted))?);
        let vocabulary = self.model.config().vocab_size;
        let (mut made, mut ended, mut row) = (Vec::new(), Vec::new(), 0);
        for ((sequence, piece), wanted) in active.into_iter().zip(input).zip(wanted) {
            let rows = logits.as_slice()[row * vocabulary..(row + wanted) * vocabulary].chunks_exact(vocabulary);
            row += wanted;
            let Some(running) = &mut self.running[sequence] else { continue };
            let start = running.read;
            running.read += piece.len();
            if running.options.score_prompt && start < running.prompt {
                let next = &running.tokens[start + 1..running.prompt.min(running.read + 1)];
                let top = running.options.scores.unwrap_or(0);
                let tokens: Vec<_> = rows.clone().zip(next).map(|(row, id)| scored(row, *id, Some(top))).collect();
                if !tokens.is_empty() {
                    made.push(Made::Scored { sequence, tokens });
                }
            }
            if running.read < running.tokens.len() {
                continue;
            }
            let new = running.tokens.len() - running.prompt;
            let end = match rows.last().filter(|_| new < running.options.max_new_tokens) {
                None => Some(None),
                Some(row) => {
                    let number = running.random.as_mut().map_or(0.0, |random| random.random::<f32>());
                    let token = scored(row, running.options.sampling.choose(row, number), running.options.scores);
                    if running.options.stop.contains(&token.id) {
                        Some(Some(token))
                    } else {
                        running.tokens.push(token.id);
                        made.push(Made::Token { sequence, token });
                        (new + 1 == running.options.max_new_tokens).then_some(None)
                    }
                }
            };
            if let Some(stop) = end {
                made.push(Made::Ended { sequence, stop });
                ended.push(sequence);
            }
        }
        ended.into_iter().for_each(|sequence| self.end(sequence));
        Ok(made)
    }
}

/// A token by the logits of its place, and so many alternatives.
fn scored(logits: &[f32], id: u32, top: Option<usize>) -> ScoredToken {
    let Some(top) = top else { return ScoredToken { id, log_probability: 0.0, likeliest: Vec::new() } };
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    let of = |logit: f32| (f64::from(logit - max) - sum.ln()) as f32;
    let mut order: Vec<u32> = if top > 0 { (0..logits.len() as u32).collect() } else { Vec::new() };
    let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if top < order.len() && top > 0 {
        order.select_nth_unstable_by(top - 1, by_logit);
        order.truncate(top);
    }
    order.sort_unstable_by(by_logit);
    let likeliest = order.into_iter().map(|id| (id, of(logits[id as usize]))).collect();
    ScoredToken { id, log_probability: of(logits[id as usize]), likeliest }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use std::collections::BTreeMap;

    use burn::tensor::Device;

    use super::*;
    use crate::generate::{GenerateOptions, generate};

    fn fixture(name: &str) -> Model {
        let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity");
        Model::open(fixtures.join(name), &Device::flex(), None).unwrap()
    }

    fn prompt(seed: u32, length: u32) -> Vec<u32> {
        (0..length).map(|i| (seed * 17 + i * 5) % 50 + 3).collect()
    }

    /// What is made until all have ended, by sequence.
    fn finish(sequences: &mut Sequences<'_>, texts: &mut BTreeMap<usize, Vec<u32>>) {
        while !sequences.is_empty() {
            take(sequences.step().unwrap(), texts);
        }
    }

    fn take(made: Vec<Made>, texts: &mut BTreeMap<usize, Vec<u32>>) {
        for made in made {
            if let Made::Token { sequence, token } = made {
                texts.entry(sequence).or_default().push(token.id);
            }
        }
    }

    #[test]
    fn sequences_that_come_and_go_are_continued_as_alone() {
        // Keys and values; latents; recurrent states and convolutions, whose numbers are given to others; keys and
        // values that other layers read.
        for name in ["tf5/qwen2_moe", "tf5/deepseek_v3_yarn", "tf5/qwen3_next", "tf5/gemma4_text_ple"] {
            let model = fixture(name);
            let options = |max_new_tokens| SequenceOptions { max_new_tokens, ..SequenceOptions::default() };
            let alone = |prompt: &Vec<u32>, max_new_tokens| {
                let options = GenerateOptions { max_new_tokens, ..GenerateOptions::default() };
                generate(&model, std::slice::from_ref(prompt), &options, |_| false).unwrap().concat()
            };
            let prompts = [prompt(1, 5), prompt(2, 9), prompt(3, 3)];
            let mut sequences = Sequences::new(&model).unwrap();
            let mut texts = BTreeMap::new();
            let first = sequences.begin(prompts[0].clone(), options(12)).unwrap();
            let gone = sequences.begin(prompts[1].clone(), options(30)).unwrap();
            for _ in 0..4 {
                take(sequences.step().unwrap(), &mut texts);
            }
            sequences.end(gone);
            assert_eq!(texts.remove(&gone).unwrap(), alone(&prompts[1], 4), "{name}");
            let last = sequences.begin(prompts[2].clone(), options(6)).unwrap();
            assert_eq!(last, gone, "the number is free");
            finish(&mut sequences, &mut texts);
            assert_eq!(texts[&first], alone(&prompts[0], 12), "{name}");
            assert_eq!(texts[&last], alone(&prompts[2], 6), "{name}");
        }
    }

    #[test]
    fn prompts_are_scored_as_the_loss_scores_them_whatever_their_pieces() {
        use crate::data::{Sequence, Wave};
        use crate::{Engine, EngineOptions};

        let model = fixture("tf5/deepseek_v3_yarn");
        // More than one piece.
        let prompt = prompt(4, SCORED_TOKENS as u32 + 40);
        let wave = Wave { id: 0, sequences: vec![Sequence::new(prompt.clone())] };
        let engine = Engine::new(&model, EngineOptions { loss: true, ..EngineOptions::default() });
        let loss = engine.run(&wave, &mut crate::trace::Nobody).unwrap().loss.unwrap();
        let options =
            SequenceOptions { max_new_tokens: 0, scores: Some(2), score_prompt: true, ..SequenceOptions::default() };
        let mut sequences = Sequences::new(&model).unwrap();
        sequences.begin(prompt.clone(), options).unwrap();
        let (mut tokens, mut steps) = (Vec::new(), 0);
        while !sequences.is_empty() {
            steps += 1;
            for made in sequences.step().unwrap() {
                match made {
                    Made::Scored { tokens: new, .. } => tokens.extend(new),
                    Made::Ended { stop, .. } => assert_eq!(stop, None),
                    Made::Token { .. } => panic!("no token was asked for"),
                }
            }
        }
        assert_eq!(steps, 2);
        assert_eq!(tokens.iter().map(|token| token.id).collect::<Vec<_>>(), prompt[1..]);
        let sum: f64 = tokens.iter().map(|token| f64::from(token.log_probability)).sum();
        assert!((sum + loss).abs() < 1e-3 * loss, "{sum} {loss}");
        for token in tokens {
            let [(best, first), (_, second)] = token.likeliest[..] else { panic!("{token:?}") };
            assert!(first >= second && token.log_probability <= first);
            assert!(token.id != best || token.log_probability == first);
        }
    }

    #[test]
    fn what_cannot_be_generated_is_refused_before_it_begins() {
        let model = fixture("tf5/qwen2_moe");
        let mut sequences = Sequences::new(&model).unwrap();
        let mut refused = |prompt: Vec<u32>, options| sequences.begin(prompt, options).unwrap_err().to_string();
        let options = SequenceOptions::default();
        assert!(refused(vec![], options.clone()).contains("no tokens"));
        assert!(refused(vec![u32::MAX], options.clone()).contains("vocabulary"));
        let endless = SequenceOptions { max_new_tokens: 1 << 30, ..options.clone() };
        assert!(refused(vec![3], endless).contains("together at most"));
        let sampling = Sampling::TopP { temperature: 0.0, top_p: 1.0, seed: 0 };
        assert!(refused(vec![3], SequenceOptions { sampling, ..options }).contains("temperature"));
        assert!(sequences.is_empty() && sequences.step().unwrap().is_empty());
    }
}

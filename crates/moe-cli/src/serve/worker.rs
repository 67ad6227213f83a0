//! The thread that owns the model: continues all sequences together, a token each per step.

use std::collections::VecDeque;

use moe_core::generate::{Made, ScoredToken, Sequences};
use moe_core::{Error as CoreError, Model};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{Receiver, UnboundedSender};

use super::requests::{Choice, Job, Refused, Served};
use super::text::Text;

/// A token as replies tell it.
#[derive(Clone, Debug, PartialEq)]
pub struct Told {
    /// Its text.
    pub text: String,
    /// The logarithm of its probability; none for the first token of a prompt.
    pub log_probability: Option<f32>,
    /// The likeliest tokens in its place, best first.
    pub likeliest: Vec<(String, f32)>,
}

/// What becomes of a completion.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Tokens, and the text that can be shown now.
    Made {
        /// Text that follows what was shown before.
        text: String,
        /// The tokens, those of the prompt included where they are asked for.
        tokens: Vec<Told>,
    },
    /// It is complete.
    Ended {
        /// Whether by a stop, rather than at its last token.
        stopped: bool,
        /// New tokens.
        tokens: usize,
    },
    /// It cannot be made.
    Failed(Refused),
}

/// A request that waits, and whoever waits for it.
pub struct Request {
    /// What is asked for.
    pub job: Job,
    /// Takes what becomes of each completion, by its index.
    pub events: UnboundedSender<(usize, Event)>,
}

/// A completion under way.
struct Open {
    index: usize,
    choice: Choice,
    events: UnboundedSender<(usize, Event)>,
    text: Text,
    tokens: usize,
}

impl Open {
    fn tell(&self, event: Event) {
        // Whoever asked may have gone; the sequence ends before the next step.
        let _ = self.events.send((self.index, event));
    }

    fn gone(&self) -> bool {
        self.events.is_closed()
    }
}

/// Answers requests until nobody can send any more.
///
/// # Errors
/// A model that cannot generate.
pub fn work(model: &Model, served: &Served, batch: usize, requests: &mut Receiver<Request>) -> moe_core::Result<()> {
    let mut sequences = Sequences::new(model)?;
    let mut waiting: VecDeque<Open> = VecDeque::new();
    // By number of the sequence.
    let mut running: Vec<Option<Open>> = Vec::new();
    loop {
        while waiting.is_empty() && sequences.len() < batch {
            let request = match sequences.is_empty() {
                true => match requests.blocking_recv() {
                    Some(request) => request,
                    None => return Ok(()),
                },
                false => match requests.try_recv() {
                    Ok(request) => request,
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
                },
            };
            let Request { job, events } = request;
            waiting.extend(job.choices.into_iter().enumerate().map(|(index, choice)| Open {
                index,
                text: Text::new(choice.stop.clone()),
                choice,
                events: events.clone(),
                tokens: 0,
            }));
        }
        waiting.retain(|open| !open.gone());
        for (sequence, place) in running.iter_mut().enumerate() {
            if place.as_ref().is_some_and(Open::gone) {
                sequences.end(sequence);
                *place = None;
            }
        }
        while sequences.len() < batch
            && let Some(open) = waiting.pop_front()
        {
            let choice = &open.choice;
            match sequences.begin(choice.prompt.clone(), choice.options.clone()) {
                Ok(sequence) => {
                    begun(&open, served);
                    running.resize_with(running.len().max(sequence + 1), || None);
                    running[sequence] = Some(open);
                }
                // There is room when others have ended.
                Err(CoreError::Memory { .. }) if !sequences.is_empty() => {
                    waiting.push_front(open);
                    break;
                }
                Err(error) => open.tell(Event::Failed(Refused::wrong(error))),
            }
        }
        match sequences.step() {
            Ok(made) => made.into_iter().for_each(|made| take(made, &mut sequences, &mut running, served)),
            Err(error) => {
                tracing::error!("{error}");
                let failed = Refused { status: 500, kind: "server_error", message: error.to_string() };
                running.iter_mut().filter_map(Option::take).for_each(|open| open.tell(Event::Failed(failed.clone())));
            }
        }
    }
}

/// Tells what goes before a completion.
fn begun(open: &Open, served: &Served) {
    let tokens = match (open.choice.prompt.first(), open.choice.options.score_prompt) {
        (Some(first), true) => {
            vec![Told { text: served.tokenizer.token_text(*first), log_probability: None, likeliest: Vec::new() }]
        }
        _ => Vec::new(),
    };
    if let Some(text) = &open.choice.echo {
        open.tell(Event::Made { text: text.clone(), tokens });
    }
}

fn take(made: Made, sequences: &mut Sequences<'_>, running: &mut [Option<Open>], served: &Served) {
    match made {
        Made::Scored { sequence, tokens } => {
            if let Some(open) = &running[sequence] {
                let tokens = tokens.iter().map(|token| told(token, served)).collect();
                open.tell(Event::Made { text: String::new(), tokens });
            }
        }
        Made::Token { sequence, token } => {
            let Some(open) = &mut running[sequence] else { return };
            open.tokens += 1;
            let (text, ended) = open.text.push(token.id, &served.tokenizer);
            let tokens = match open.choice.options.scores {
                Some(_) => vec![told(&token, served)],
                None => Vec::new(),
            };
            if !text.is_empty() || !tokens.is_empty() {
                open.tell(Event::Made { text, tokens });
            }
            if ended {
                open.tell(Event::Ended { stopped: true, tokens: open.tokens });
                running[sequence] = None;
                sequences.end(sequence);
            }
        }
        Made::Ended { sequence, stop } => {
            let Some(mut open) = running[sequence].take() else { return };
            let text = open.text.finish(&served.tokenizer);
            // Clients that read scores count on one token more than the prompt has, whatever it is.
            let scored = stop.iter().filter(|_| open.choice.options.scores.is_some());
            let tokens: Vec<Told> = scored.map(|token| told(token, served)).collect();
            if !text.is_empty() || !tokens.is_empty() {
                open.tell(Event::Made { text, tokens });
            }
            open.tell(Event::Ended { stopped: stop.is_some(), tokens: open.tokens });
        }
    }
}

fn told(token: &ScoredToken, served: &Served) -> Told {
    let text = |id: u32| served.tokenizer.token_text(id);
    Told {
        text: text(token.id),
        log_probability: Some(token.log_probability),
        likeliest: token.likeliest.iter().map(|(id, value)| (text(*id), *value)).collect(),
    }
}

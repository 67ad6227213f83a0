//! Many or one expert per token and layer, under a budget: what is chosen at random, what is best, and what a router
//! learns (Duo-LLM, arXiv 2410.10846).

use moe_core::Model;
use moe_core::adaptive::RunTime;
use moe_core::data::{Sequence, Wave, WaveOptions};
use moe_core::evaluate::sequence_losses;
use moe_peft::duo::DuoTuning;
use moe_peft::{MethodConfig, Recipe};
use serde_json::json;

use super::trained::train;
use super::{Draw, shown};
use crate::{Error, Result};

/// Shares of the layers or tokens that get all their experts.
const BUDGETS: [f64; 3] = [0.25, 0.5, 0.75];
/// Rate at which the learned router is trained.
const RATE: f64 = 1e-2;

/// Losses of the held-out rows in nats per predicted token, for each way of choosing.
#[derive(Default)]
struct Found {
    random: f64,
    same: f64,
    own: f64,
    learned: f64,
    share: f64,
}

/// The table: nats per predicted token of the held-out rows.
pub(super) fn table(named: &str, model: &Model, draws: &[Draw]) -> Result<String> {
    let config = model.config();
    let layers = (0..config.layers.len()).filter(|layer| config.moe(*layer).is_some()).count();
    let mut found: Vec<[Found; BUDGETS.len()]> = Vec::new();
    let mut whole = Vec::new();
    for draw in draws {
        let patterns = patterns(model, layers, draw)?;
        whole.push(patterns[patterns.len() - 1].mean());
        let mut of_draw: [Found; BUDGETS.len()] = Default::default();
        for (at, budget) in BUDGETS.into_iter().enumerate() {
            let large = (budget * layers as f64).round() as u32;
            let (learned, share) = learned(model, draw, budget)?;
            of_draw[at] = Found { learned, share, ..chosen(&patterns, large) };
        }
        found.push(of_draw);
    }
    let mut table = format!(
        "<!-- study:adaptive-{named}duo -->\n\n| layers or tokens with all experts | a random pattern | the best pattern | \
         the best of each row | learned by token | its share |\n|--:|--:|--:|--:|--:|--:|\n"
    );
    for (at, budget) in BUDGETS.into_iter().enumerate() {
        let of = |value: fn(&Found) -> f64| shown(found.iter().map(move |draw| value(&draw[at])));
        let cells = [of(|f| f.random), of(|f| f.same), of(|f| f.own), of(|f| f.learned), of(|f| f.share)];
        table += &format!("| {budget} | {} |\n", cells.join(" | "));
    }
    let whole = shown(whole.into_iter());
    table += &format!("| 1 | {whole} | {whole} | {whole} | | |\n");
    Ok(table + &format!("\n<!-- /study:adaptive-{named}duo -->\n\n"))
}

/// Losses of every held-out row where some layers have all experts and the others one.
struct Pattern {
    large: u32,
    losses: Vec<f64>,
    tokens: f64,
}

impl Pattern {
    /// Nats per token.
    fn mean(&self) -> f64 {
        self.losses.iter().sum::<f64>() / self.tokens
    }
}

/// All patterns, that of all layers the last.
fn patterns(model: &Model, layers: usize, draw: &Draw) -> Result<Vec<Pattern>> {
    if layers > 12 {
        return Err(Error::Invalid(format!("{layers} layers with experts: all patterns of at most 12 can be tried")));
    }
    let sequences = sequences(&draw.held_out);
    let tokens = sequences.iter().map(Sequence::loss_tokens).sum::<usize>() as f64;
    let big = model.router().top_k();
    let pattern = |code: u32| {
        let k: Vec<usize> = (0..layers).map(|layer| if code >> layer & 1 == 1 { big } else { 1 }).collect();
        let rule: RunTime = serde_json::from_value(json!({ "routing": { "type": "top_k", "k": k } }))
            .map_err(|error| Error::Invalid(error.to_string()))?;
        let under = rule.on(model)?;
        let losses = sequence_losses(under.as_ref().unwrap_or(model), &sequences, WaveOptions::default())?;
        Ok(Pattern { large: code.count_ones(), losses, tokens })
    };
    (0..1 << layers).map(pattern).collect()
}

/// What a random pattern of so many large layers gives, the best one for all rows, and the best one of each row.
fn chosen(patterns: &[Pattern], large: u32) -> Found {
    let with: Vec<&Pattern> = patterns.iter().filter(|pattern| pattern.large == large).collect();
    let random = with.iter().map(|pattern| pattern.mean()).sum::<f64>() / with.len() as f64;
    let same = with.iter().map(|pattern| pattern.mean()).fold(f64::INFINITY, f64::min);
    let least = |row: usize| with.iter().map(|pattern| pattern.losses[row]).fold(f64::INFINITY, f64::min);
    let own = (0..with[0].losses.len()).map(least).sum::<f64>() / with[0].tokens;
    Found { random, same, own, ..Found::default() }
}

/// Loss and share of large choices of a router that is trained on the draw's calibration rows.
fn learned(model: &Model, draw: &Draw, budget: f64) -> Result<(f64, f64)> {
    let mut recipe = Recipe::from(MethodConfig::Duo(DuoTuning { budget, ..DuoTuning::default() }));
    recipe.train.schedule.peak = RATE;
    let trained = train(model, draw, &recipe)?;
    let missing = || Error::Invalid("the training left no choice of sizes".into());
    let duo = trained.artifacts.duo.as_ref().ok_or_else(missing)?;
    duo.set_temperature(None);
    let under = duo.applied_to(model)?;
    let sequences = sequences(&draw.held_out);
    let tokens = sequences.iter().map(Sequence::loss_tokens).sum::<usize>() as f64;
    let (mut loss, mut share) = (0.0, 0.0);
    for sequence in &sequences {
        loss += sequence_losses(&under, std::slice::from_ref(sequence), WaveOptions::default())?.iter().sum::<f64>();
        share += duo.share() / sequences.len() as f64;
    }
    Ok((loss / tokens, share))
}

fn sequences(waves: &[Wave]) -> Vec<Sequence> {
    waves.iter().flat_map(|wave| wave.sequences.iter().cloned()).collect()
}

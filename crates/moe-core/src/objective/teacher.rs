//! Next-token distributions of one model as the target of another.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use burn::tensor::Tensor;
use moe_checkpoint::group::{Group, pack, unpack};

use super::{CrossEntropy, Objective};
use crate::{
    data::Wave,
    engine::Engine,
    error::{Error, Result},
    kernels::{
        divergence::{Distribution, divergence, largest},
        loss::Losses,
    },
    trace::{Nobody, WaveInfo},
};

/// Next-token distributions of a model at the predicted positions of some waves: the log-probabilities of its `top`
/// most likely tokens, and that of all others together.
///
/// With fewer tokens than the vocabulary has, the others count as one token, which makes the divergence from it a lower
/// bound of the divergence from the whole distribution (the data processing inequality).
///
/// Held in memory: `8 top + 4` bytes per predicted token, or `4 V + 4` with the whole vocabulary, see
/// [`bytes`](Self::bytes).
#[derive(Clone, Debug, PartialEq)]
pub struct TeacherLogits {
    top: usize,
    vocab: usize,
    waves: BTreeMap<u64, TeacherWave>,
}

/// Distributions at the predicted positions of a wave, in order.
#[derive(Clone, Debug, PartialEq)]
struct TeacherWave {
    info: WaveInfo,
    /// `[n, top]`, most likely first; empty if all tokens are kept, in order.
    ids: Vec<u32>,
    /// `[n, top]`.
    log_probs: Vec<f32>,
    /// Log-probability of all other tokens `[n]`; minus infinity if there are none.
    rest: Vec<f32>,
}

impl TeacherLogits {
    /// Runs `waves` through `engine` and keeps the distributions of its model.
    ///
    /// # Errors
    /// Those of [`Engine::run_with`]; [`Error::Input`] for no tokens to keep or two waves of one id.
    pub fn record<'w>(engine: &Engine<'_>, waves: impl IntoIterator<Item = &'w Wave>, top: usize) -> Result<Self> {
        let mut recorder = TeacherRecorder::new(engine.model().config().vocab_size, top)?;
        for wave in waves {
            engine.run_with(wave, &mut recorder, &mut Nobody)?;
        }
        Ok(recorder.finish())
    }

    /// As [`record`](Self::record), with the other ranks of a group, which each run every Nth wave and are all left
    /// with the distributions of all.
    ///
    /// # Errors
    /// Those of [`record`](Self::record), and what has stopped another rank.
    pub fn record_in_group<'w>(
        group: &dyn Group,
        engine: &Engine<'_>,
        waves: impl IntoIterator<Item = &'w Wave>,
        top: usize,
    ) -> Result<Self> {
        let waves: Vec<&Wave> = waves.into_iter().collect();
        let dealt = waves.iter().skip(group.rank()).step_by(group.size());
        let mut all = Self::record(engine, dealt.clone().copied(), top)?;
        if group.size() == 1 {
            return Ok(all);
        }
        let own = dealt.filter_map(|wave| all.waves.get(&wave.id)).map(TeacherWave::to_message).collect();
        let messages = group.share_dealt(own, waves.len())?;
        for (wave, message) in waves.iter().zip(&messages) {
            if let Entry::Vacant(missing) = all.waves.entry(wave.id) {
                missing.insert(TeacherWave::from_message(WaveInfo::of(wave), message)?);
            }
        }
        match all.waves.len() == waves.len() {
            true => Ok(all),
            false => Err(Error::input("waves of a teacher", waves.len(), format!("{} ids", all.waves.len()))),
        }
    }

    /// Tokens kept per position, the vocabulary size at most.
    pub fn top(&self) -> usize {
        self.top
    }

    /// Ids of the waves it holds.
    pub fn waves(&self) -> impl Iterator<Item = u64> + '_ {
        self.waves.keys().copied()
    }

    /// Positions it holds.
    pub fn positions(&self) -> usize {
        self.waves.values().map(|wave| wave.rest.len()).sum()
    }

    /// The distribution at a predicted position of a wave, counted from 0.
    pub fn distribution(&self, wave: u64, position: usize) -> Option<Distribution<'_>> {
        let wave = self.waves.get(&wave)?;
        let kept = position * self.top..(position + 1) * self.top;
        let rest = *wave.rest.get(position)?;
        Some(Distribution { ids: wave.ids.get(kept.clone()), log_probs: &wave.log_probs[kept], rest })
    }

    /// Bytes that `positions` predicted tokens take.
    pub fn bytes(positions: usize, top: usize, vocab: usize) -> u64 {
        let per_position = if top < vocab { 8 * top + 4 } else { 4 * vocab + 4 };
        positions as u64 * per_position as u64
    }
}

impl TeacherWave {
    /// Its values, for the other ranks of a group.
    fn to_message(&self) -> Vec<u8> {
        let parts =
            [bytemuck::cast_slice(&self.ids), bytemuck::cast_slice(&self.log_probs), bytemuck::cast_slice(&self.rest)];
        pack(parts)
    }

    fn from_message(info: WaveInfo, message: &[u8]) -> Result<Self> {
        let [ids, log_probs, rest] = unpack(message)?[..] else {
            return Err(Error::input("wave of a teacher from another rank", message.len(), "three parts"));
        };
        Ok(Self {
            info,
            ids: bytemuck::pod_collect_to_vec(ids),
            log_probs: bytemuck::pod_collect_to_vec(log_probs),
            rest: bytemuck::pod_collect_to_vec(rest),
        })
    }
}

/// Records [`TeacherLogits`] during any run of the teacher, as its objective; itself it is the cross-entropy.
#[derive(Clone, Debug)]
pub struct TeacherRecorder {
    logits: TeacherLogits,
    wave: u64,
}

impl TeacherRecorder {
    /// Keeps the `top` most likely of `vocab` tokens.
    ///
    /// # Errors
    /// [`Error::Input`] if `top` is 0.
    pub fn new(vocab: usize, top: usize) -> Result<Self> {
        if top == 0 {
            return Err(Error::input("teacher tokens per position", 0, "at least one"));
        }
        Ok(Self { logits: TeacherLogits { top: top.min(vocab), vocab, waves: BTreeMap::new() }, wave: 0 })
    }

    /// What was recorded.
    pub fn finish(self) -> TeacherLogits {
        self.logits
    }
}

impl Objective for TeacherRecorder {
    fn begin_wave(&mut self, wave: &WaveInfo) -> Result<()> {
        self.wave = wave.id;
        let empty = TeacherWave { info: wave.clone(), ids: Vec::new(), log_probs: Vec::new(), rest: Vec::new() };
        match self.logits.waves.insert(wave.id, empty) {
            None => Ok(()),
            Some(_) => Err(Error::input("wave of a teacher", wave.id, "an id that was not recorded before")),
        }
    }

    fn losses(&mut self, blocks: Vec<Tensor<2>>, targets: &[Option<u32>], gradient: bool) -> Result<Losses> {
        let predicted: Vec<bool> = targets.iter().map(Option::is_some).collect();
        let kept = largest(&blocks, &predicted, self.logits.top);
        let wave = self.logits.waves.get_mut(&self.wave).expect("begun before its losses");
        for row in kept {
            wave.ids.extend(row.ids);
            wave.log_probs.extend(row.log_probs);
            wave.rest.push(row.rest);
        }
        CrossEntropy.losses(blocks, targets, gradient)
    }
}

/// The divergence KL(teacher || model) of each predicted position's next-token distribution, in nats. Waves must be
/// those the teacher was recorded on; targets only say which positions count.
#[derive(Debug)]
pub struct Distillation<'t> {
    teacher: &'t TeacherLogits,
    wave: Option<&'t TeacherWave>,
    at: usize,
}

impl<'t> Distillation<'t> {
    /// The divergence from `teacher`.
    pub fn new(teacher: &'t TeacherLogits) -> Self {
        Self { teacher, wave: None, at: 0 }
    }
}

impl Objective for Distillation<'_> {
    fn begin_wave(&mut self, wave: &WaveInfo) -> Result<()> {
        let Some(found) = self.teacher.waves.get(&wave.id) else {
            return Err(Error::input("wave of a distillation", wave.id, "one that the teacher was recorded on"));
        };
        if found.info != *wave {
            let field = format!("tokens and sequences of wave {} of a distillation", wave.id);
            let told = |wave: &WaveInfo| {
                let each = wave.sequences.iter().map(|s| format!("{} ({} predicted)", s.tokens.len(), s.loss_tokens));
                format!("sequences of {} tokens", each.collect::<Vec<_>>().join(", "))
            };
            let expected = format!("what the teacher was recorded on, {}", told(&found.info));
            return Err(Error::input(field, told(wave), expected));
        }
        (self.wave, self.at) = (Some(found), 0);
        Ok(())
    }

    fn losses(&mut self, blocks: Vec<Tensor<2>>, targets: &[Option<u32>], gradient: bool) -> Result<Losses> {
        let vocab: usize = blocks.iter().map(|block| block.dims()[1]).sum();
        if vocab != self.teacher.vocab {
            return Err(Error::input("vocabulary of a distillation", vocab, self.teacher.vocab));
        }
        let wave = self.wave.expect("begun before its losses");
        let top = self.teacher.top;
        let rows: Vec<Option<Distribution<'_>>> = targets
            .iter()
            .map(|target| {
                target.as_ref()?;
                let kept = self.at * top..(self.at + 1) * top;
                let rest = wave.rest[self.at];
                self.at += 1;
                Some(Distribution { ids: wave.ids.get(kept.clone()), log_probs: &wave.log_probs[kept], rest })
            })
            .collect();
        Ok(divergence(blocks, &rows, gradient))
    }
}

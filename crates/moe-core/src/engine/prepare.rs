//! A wave as the sweeps need it.

use std::ops::Range;

use crate::{
    data::Wave,
    error::{Error, Result},
    kernels::rope::Positions,
    layers::Handover,
    model::{Model, RotaryTables},
    trace::WaveInfo,
};

/// A wave prepared for the model.
pub(super) struct Prepared {
    pub info: WaveInfo,
    pub ids: Vec<u32>,
    /// Next token of each position, where it counts.
    pub targets: Vec<Option<u32>>,
    pub spans: Vec<Range<usize>>,
    pub tables: RotaryTables,
    /// What layers hand to layers after them.
    pub handover: Handover,
}

impl Prepared {
    pub fn new(model: &Model, wave: &Wave) -> Result<Self> {
        let info = WaveInfo::of(wave);
        let (mut ids, mut targets, mut spans) = (Vec::new(), Vec::new(), Vec::new());
        for (i, sequence) in wave.sequences.iter().enumerate() {
            if sequence.ids.is_empty() {
                return Err(Error::input(format!("wave {} sequence {i}", wave.id), "no tokens", "at least one"));
            }
            let start = ids.len();
            ids.extend_from_slice(&sequence.ids);
            for t in 1..=sequence.ids.len() {
                targets.push(sequence.counts(t).then(|| sequence.ids[t]));
            }
            spans.push(start..ids.len());
        }
        if ids.is_empty() {
            return Err(Error::input(format!("wave {}", wave.id), "no sequences", "at least one"));
        }
        let positions: Vec<_> = spans.iter().map(|s| Positions { range: 0..s.len(), length: s.len() }).collect();
        let tables = model.rotary_tables(&positions);
        Ok(Self { info, ids, targets, spans, tables, handover: Handover::default() })
    }
}

//! What a model has computed so far, for means per token.

use std::sync::atomic::{AtomicU64, Ordering};

/// What forward passes have computed, generation included. Counts grow: the [difference](Self::since) of two is what
/// was computed between them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Tokens that have entered the first layer.
    pub tokens: u64,
    /// Pairs of a token and a half of a layer (attention or feed-forward) that it has passed.
    pub halves: u64,
    /// Pairs of a token and a layer with experts that has routed it.
    pub routed_tokens: u64,
    /// Pairs of a token and a routed expert.
    pub expert_rows: u64,
}

impl Work {
    /// What was computed after `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            tokens: self.tokens - before.tokens,
            halves: self.halves - before.halves,
            routed_tokens: self.routed_tokens - before.routed_tokens,
            expert_rows: self.expert_rows - before.expert_rows,
        }
    }

    /// Routed experts of a token in a layer, on average; 0 without any.
    pub fn experts_per_token(&self) -> f64 {
        self.expert_rows as f64 / self.routed_tokens.max(1) as f64
    }

    /// Layers that a token has passed, on average, where attention and feed-forward are a half each: a layer that runs
    /// twice counts twice, a token that passes the attention alone counts for a half.
    pub fn layers_per_token(&self) -> f64 {
        self.halves as f64 / 2.0 / self.tokens.max(1) as f64
    }
}

/// The counts while they grow.
#[derive(Debug, Default)]
pub(crate) struct WorkCounts {
    tokens: AtomicU64,
    halves: AtomicU64,
    routed_tokens: AtomicU64,
    expert_rows: AtomicU64,
}

fn add(to: &AtomicU64, count: usize) {
    to.fetch_add(count as u64, Ordering::Relaxed);
}

impl WorkCounts {
    pub fn get(&self) -> Work {
        Work {
            tokens: self.tokens.load(Ordering::Relaxed),
            halves: self.halves.load(Ordering::Relaxed),
            routed_tokens: self.routed_tokens.load(Ordering::Relaxed),
            expert_rows: self.expert_rows.load(Ordering::Relaxed),
        }
    }

    /// So many tokens enter the first layer.
    pub fn enter(&self, tokens: usize) {
        add(&self.tokens, tokens);
    }

    /// So many tokens pass a half of a layer.
    pub fn pass_half(&self, tokens: usize) {
        add(&self.halves, tokens);
    }

    /// So many tokens are routed in a layer.
    pub fn route(&self, tokens: usize) {
        add(&self.routed_tokens, tokens);
    }

    /// So many tokens go through an expert.
    pub fn expert(&self, rows: usize) {
        add(&self.expert_rows, rows);
    }
}

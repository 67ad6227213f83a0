//! Progress of long work on stderr, with the time left; nothing where stderr is not a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Where progress is shown.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    hidden: bool,
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Anything; the word that follows the number.
    Count(&'static str),
    /// Bytes.
    Bytes,
}

impl Progress {
    /// On stderr, if that is a terminal.
    pub fn stderr() -> Self {
        Self { hidden: false }
    }

    /// Nowhere.
    pub fn hidden() -> Self {
        Self { hidden: true }
    }

    /// Writes lines, unless nothing is to be seen.
    pub fn say(&self, text: &str) {
        if !self.hidden {
            eprintln!("{}", text.trim_end());
        }
    }

    /// A bar over `total`; it vanishes when dropped.
    pub fn bar(&self, label: impl Into<String>, total: u64, unit: Unit) -> Bar {
        let target = if self.hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let numbers = match unit {
            Unit::Count(word) => format!("{{human_pos}}/{{human_len}} {word}"),
            Unit::Bytes => "{binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}".into(),
        };
        let template = format!("{{msg:30!}} [{{bar:30}}] {numbers}, {{elapsed}} so far, {{eta}} left");
        let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::with_draw_target(Some(total), target).with_style(style.progress_chars("=> "));
        bar.set_message(label.into());
        bar.enable_steady_tick(std::time::Duration::from_millis(250));
        Bar(bar)
    }
}

/// A progress bar.
#[derive(Debug)]
pub struct Bar(ProgressBar);

impl Bar {
    /// Says what is being done.
    pub fn label(&self, label: impl Into<String>) {
        self.0.set_message(label.into());
    }

    /// How much there is in all.
    pub fn total(&self, total: u64) {
        self.0.set_length(total);
    }

    /// How much is done.
    pub fn at(&self, position: u64) {
        self.0.set_position(position);
    }

    /// One more is done.
    pub fn step(&self) {
        self.0.inc(1);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

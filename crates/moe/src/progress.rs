//! Progress of long work on stderr, with the time left: a bar on a terminal, elsewhere a line every 30 seconds.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Time between two lines of a log.
const INTERVAL: Duration = Duration::from_secs(30);

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
    /// Bytes, with their units.
    Bytes,
}

impl Progress {
    /// On stderr.
    pub fn stderr() -> Self {
        Self { hidden: false }
    }

    /// Progress that nobody sees.
    pub fn hidden() -> Self {
        Self { hidden: true }
    }

    /// Writes lines, unless nothing is to be seen.
    pub fn say(&self, text: &str) {
        if !self.hidden {
            eprintln!("{}", text.trim_end());
        }
    }

    /// A bar over `total`, which vanishes when dropped. Where stderr is no terminal, a line every 30 seconds of work.
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
        bar.enable_steady_tick(Duration::from_millis(250));
        let log = (!self.hidden && !std::io::stderr().is_terminal()).then(|| Log::new(unit, INTERVAL));
        Bar { bar, log: log.map(Mutex::new) }
    }
}

/// A progress bar, or lines of a log.
#[derive(Debug)]
pub struct Bar {
    bar: ProgressBar,
    log: Option<Mutex<Log>>,
}

/// When the next line is due, and what speed is measured from: the first position, which an earlier run may have
/// reached.
#[derive(Debug)]
struct Log {
    unit: Unit,
    interval: Duration,
    last: Instant,
    first: Option<(Instant, u64)>,
}

impl Log {
    fn new(unit: Unit, interval: Duration) -> Self {
        Self { unit, interval, last: Instant::now(), first: None }
    }

    /// The line for this position, if one is due.
    fn line(&mut self, label: &str, done: u64, total: u64) -> Option<String> {
        let (begun, from) = *self.first.get_or_insert((Instant::now(), done));
        if self.last.elapsed() < self.interval {
            return None;
        }
        self.last = Instant::now();
        let number = |n: u64| match self.unit {
            Unit::Count(_) => n.to_string(),
            Unit::Bytes => HumanBytes(n).to_string(),
        };
        let word = if let Unit::Count(word) = self.unit { format!(" {word}") } else { String::new() };
        let speed = done.saturating_sub(from) as f64 / begun.elapsed().as_secs_f64().max(1e-9);
        let left = (speed > 0.0).then(|| total.saturating_sub(done) as f64 / speed);
        let left = left.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let left = left.map_or("time left unknown".into(), |left| format!("{} left", HumanDuration(left)));
        let speed = match self.unit {
            Unit::Count(_) => format!("{speed:.1}{word}/s"),
            Unit::Bytes => format!("{}/s", HumanBytes(speed as u64)),
        };
        Some(format!("{label}: {} of {}{word}, {speed}, {left}", number(done), number(total)))
    }
}

impl Bar {
    /// Says what is being done.
    pub fn label(&self, label: impl Into<String>) {
        self.bar.set_message(label.into());
    }

    /// How much there is in all.
    pub fn total(&self, total: u64) {
        self.bar.set_length(total);
    }

    /// How much is done.
    pub fn at(&self, position: u64) {
        self.bar.set_position(position);
        self.log();
    }

    /// One more is done.
    pub fn step(&self) {
        self.bar.inc(1);
        self.log();
    }

    fn log(&self) {
        let Some(log) = &self.log else { return };
        let (done, total) = (self.bar.position(), self.bar.length().unwrap_or_default());
        if let Some(line) = log.lock().unwrap_or_else(PoisonError::into_inner).line(&self.bar.message(), done, total) {
            // A log that cannot be written to does not stop the work.
            let _ = writeln!(std::io::stderr(), "{line}");
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_has_a_line_where_one_is_due_with_speed_and_time_left() {
        let mut log = Log::new(Unit::Count("tokens"), Duration::ZERO);
        let first = log.line("collecting", 100, 400).unwrap();
        assert_eq!(first, "collecting: 100 of 400 tokens, 0.0 tokens/s, time left unknown");
        // What an earlier run did counts as done, but not into the speed.
        log.first = Some((Instant::now() - Duration::from_secs(10), 100));
        let line = log.line("collecting", 200, 400).unwrap();
        assert!(line.starts_with("collecting: 200 of 400 tokens, "), "{line}");
        let speed: f64 = line.split(", ").nth(1).unwrap().trim_end_matches(" tokens/s").parse().unwrap();
        assert!((9.0..=10.0).contains(&speed), "{line}");
        assert!(line.ends_with("seconds left"), "{line}");
        let mut rare = Log::new(Unit::Bytes, Duration::from_secs(3600));
        assert_eq!(rare.line("writing", 1, 2), None);
        rare.interval = Duration::ZERO;
        assert!(rare.line("writing", 1024, 4096).unwrap().starts_with("writing: 1.00 KiB of 4.00 KiB, "));
    }
}

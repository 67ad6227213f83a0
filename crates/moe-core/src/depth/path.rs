//! The layers that tokens go through, in order.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// A decoder layer, or a half of it, that tokens go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PathStep {
    /// Decoder layer.
    pub layer: usize,
    /// Whether its attention half runs, or whatever mixes tokens in its place.
    pub attention: bool,
    /// Whether its feed-forward half runs.
    pub feed_forward: bool,
}

impl PathStep {
    /// A whole layer.
    pub fn whole(layer: usize) -> Self {
        Self { layer, attention: true, feed_forward: true }
    }
}

/// The layers that tokens go through, in order: some may be left out, repeated, or run with one of their halves.
///
/// As text, and in JSON, a list of layers and ranges, from 0: `0-3,5,5,6a,7f` runs layers 0 to 3, layer 5 twice, the
/// attention of layer 6 and the feed-forward half of layer 7. A layer that is repeated reads and writes keys and values
/// of its own in each round, so that a cache and a whole pass agree.
///
/// ```
/// use moe_core::depth::LayerPath;
///
/// let path: LayerPath = "0-2,4,4,5f".parse()?;
/// assert_eq!(path.to_string(), "0-2,4,4,5f");
/// assert_eq!(path.steps().len(), 6);
/// assert_eq!(LayerPath::without(6, 2..4).to_string(), "0-1,4-5");
/// # Ok::<(), moe_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerPath {
    steps: Vec<PathStep>,
}

impl LayerPath {
    /// These steps.
    pub fn new(steps: Vec<PathStep>) -> Self {
        Self { steps }
    }

    /// All layers of a model, once.
    pub fn whole(layers: usize) -> Self {
        Self { steps: (0..layers).map(PathStep::whole).collect() }
    }

    /// All layers but those of a span `[a, b)`.
    pub fn without(layers: usize, span: std::ops::Range<usize>) -> Self {
        Self { steps: (0..layers).filter(|layer| !span.contains(layer)).map(PathStep::whole).collect() }
    }

    /// The steps, in order.
    pub fn steps(&self) -> &[PathStep] {
        &self.steps
    }

    /// Whether it is all layers of a model of so many, once and in order.
    pub fn is_whole(&self, layers: usize) -> bool {
        *self == Self::whole(layers)
    }

    /// Layers that it runs, a half as one half.
    pub fn length(&self) -> f64 {
        self.steps.iter().map(|step| 0.5 * f64::from(u8::from(step.attention) + u8::from(step.feed_forward))).sum()
    }

    /// Whether every layer stands in it at most once, and each after those before it.
    pub fn ascends(&self) -> bool {
        self.steps.windows(2).all(|pair| pair[0].layer < pair[1].layer)
    }

    /// Checks it against a model of so many layers.
    ///
    /// # Errors
    /// [`Error::Input`] for a layer that does not exist, no layer at all, and a step that runs nothing.
    pub fn check(&self, layers: usize) -> Result<()> {
        if self.steps.is_empty() {
            return Err(Error::input("layers of a path", 0, "at least one"));
        }
        for step in &self.steps {
            if step.layer >= layers {
                return Err(Error::input("layer of a path", step.layer, format!("below {layers}")));
            }
            if !step.attention && !step.feed_forward {
                return Err(Error::input(format!("halves of layer {} of a path", step.layer), "none", "at least one"));
            }
        }
        Ok(())
    }
}

impl fmt::Display for LayerPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut at = 0;
        while at < self.steps.len() {
            let step = self.steps[at];
            let mut end = at + 1;
            let follows = |end: usize| self.steps[end] == PathStep { layer: step.layer + end - at, ..step };
            while end < self.steps.len() && follows(end) {
                end += 1;
            }
            if at > 0 {
                f.write_str(",")?;
            }
            match end - at {
                1 => write!(f, "{}", step.layer)?,
                n => write!(f, "{}-{}", step.layer, step.layer + n - 1)?,
            }
            match (step.attention, step.feed_forward) {
                (true, true) => {}
                (true, false) => f.write_str("a")?,
                (false, _) => f.write_str("f")?,
            }
            at = end;
        }
        Ok(())
    }
}

impl FromStr for LayerPath {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |part: &str| {
            let expected =
                "layers and ranges such as `0-3,5,5,6a,7f`, `a` for attention and `f` for feed-forward alone";
            Error::input("path of layers", format!("`{part}`"), expected)
        };
        let mut steps = Vec::new();
        for part in text.split(',').map(str::trim) {
            let (range, attention, feed_forward) = match part.as_bytes().last() {
                Some(b'a') => (&part[..part.len() - 1], true, false),
                Some(b'f') => (&part[..part.len() - 1], false, true),
                _ => (part, true, true),
            };
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let number = |text: &str| text.trim().parse::<usize>().map_err(|_| wrong(part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last || last - first > 100_000 {
                return Err(wrong(part));
            }
            steps.extend((first..=last).map(|layer| PathStep { layer, attention, feed_forward }));
        }
        Ok(Self { steps })
    }
}

impl Serialize for LayerPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LayerPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_steps_say_the_same() {
        for text in ["0", "0-3", "3,2,1", "0-1,1-2", "2a,2f", "0a-1", "0-2f,4"] {
            let parsed = text.parse::<LayerPath>();
            if text == "0a-1" {
                assert!(parsed.unwrap_err().to_string().contains("0a-1"));
                continue;
            }
            let path = parsed.unwrap();
            assert_eq!(path.to_string().parse::<LayerPath>().unwrap(), path, "{text}");
            let json = serde_json::to_string(&path).unwrap();
            assert_eq!(serde_json::from_str::<LayerPath>(&json).unwrap(), path);
        }
        assert!("".parse::<LayerPath>().is_err() && "3-1".parse::<LayerPath>().is_err());
        assert_eq!("1a,1f,2".parse::<LayerPath>().unwrap().length(), 2.0);
    }

    #[test]
    fn a_path_is_checked_against_the_layers() {
        let path: LayerPath = "0-3,9".parse().unwrap();
        assert!(path.check(9).unwrap_err().to_string().contains("found 9, expected below 9"));
        path.check(10).unwrap();
        assert!(path.ascends() && !"0,0".parse::<LayerPath>().unwrap().ascends());
        assert!(LayerPath::whole(4).is_whole(4) && !path.is_whole(10));
        assert!(LayerPath::new(vec![]).check(2).is_err());
    }
}

//! Parameters that are trained alike.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How the parameters of some names are trained. A parameter belongs to the first group whose pattern matches its name,
/// or to none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ParameterGroup {
    /// Pattern of the whole name: `*` stands for any characters, `?` for one.
    pub pattern: String,
    /// Factor of the learning rate, 0 or more.
    pub learning_rate: f64,
    /// Whether the optimizer's weight decay counts.
    pub weight_decay: bool,
    /// Whether these parameters start inactive. A task may activate them.
    pub frozen: bool,
    /// Projection of their gradients.
    pub projection: Option<Projection>,
    /// Whether the pattern may match no parameter at the start, because a task adds them later.
    pub later: bool,
}

impl Default for ParameterGroup {
    fn default() -> Self {
        let pattern = "*".to_string();
        Self { pattern, learning_rate: 1.0, weight_decay: true, frozen: false, projection: None, later: false }
    }
}

impl ParameterGroup {
    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        if !(self.learning_rate >= 0.0 && self.learning_rate.is_finite()) {
            let field = format!("learning_rate of group {}", self.pattern);
            return Err(Error::input(field, self.learning_rate, "a finite number of 0 or more"));
        }
        self.projection.map_or(Ok(()), |projection| projection.validate())
    }

    /// Whether the pattern matches a name.
    pub fn matches(&self, name: &str) -> bool {
        glob(self.pattern.as_bytes(), name.as_bytes())
    }
}

/// Optimizes in a space of low rank: of a gradient `R [m, n]`, AdamW sees `R V [m, r]` if `m >= n` and `U^T R [r, n]`
/// otherwise, where U and V are the first singular vectors of a recent gradient; its direction is taken back by the
/// same vectors.
///
/// Source: GaLore (arXiv 2403.03507) as used by OwLore (arXiv 2405.18380). Applies to the last two dimensions of a
/// parameter's shape; vectors are trained without. Signs of new singular vectors are those that agree with the vectors
/// they replace.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Projection {
    /// Singular vectors, at most the smaller dimension.
    pub rank: usize,
    /// Steps after which the vectors are taken from the gradient anew.
    pub gap: u64,
    /// Factor of the direction.
    pub scale: f64,
    /// Whether the moments start from zero when the vectors change. The reference keeps them, though they belong to the
    /// earlier vectors.
    pub reset_moments: bool,
}

impl Default for Projection {
    fn default() -> Self {
        Self { rank: 256, gap: 100, scale: 1.0, reset_moments: false }
    }
}

impl Projection {
    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        if self.rank == 0 {
            return Err(Error::input("rank of a projection", 0, "at least 1"));
        }
        if self.gap == 0 {
            return Err(Error::input("gap of a projection", 0, "at least 1"));
        }
        if !(self.scale > 0.0 && self.scale.is_finite()) {
            return Err(Error::input("scale of a projection", self.scale, "a finite number above 0"));
        }
        Ok(())
    }
}

/// Whether a pattern of `*` and `?` matches all of `name`.
fn glob(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    // where to go on after a mismatch: behind the last star, one character further
    let mut back: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                back = Some((p + 1, n));
                p += 1;
            }
            Some(c) if *c == b'?' || *c == name[n] => (p, n) = (p + 1, n + 1),
            _ => match back {
                Some((star, from)) => {
                    (p, n) = (star, from + 1);
                    back = Some((star, from + 1));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        let matches = |pattern: &str, name: &str| glob(pattern.as_bytes(), name.as_bytes());
        assert!(matches("*", "") && matches("*", "a.b") && matches("a.b", "a.b") && matches("a?b", "a.b"));
        assert!(matches("layer.*.router", "layer.12.router") && matches("*lora_A*", "x.lora_A.weight"));
        assert!(matches("*a*ab", "baaab") && matches("**x", "x") && matches("x**", "x"));
        assert!(!matches("layer.*.router", "layer.12.router.bias") && !matches("a", "ab") && !matches("?", ""));
        assert!(!matches("*ab", "aba") && !matches("", "a"));
    }

    #[test]
    fn fields_out_of_range_are_named() {
        let message = |group: ParameterGroup| group.validate().unwrap_err().to_string();
        let group = ParameterGroup::default;
        assert!(message(ParameterGroup { learning_rate: -1.0, ..group() }).contains("learning_rate of group *"));
        let projection = |projection| ParameterGroup { projection: Some(projection), ..group() };
        assert!(message(projection(Projection { rank: 0, ..Projection::default() })).contains("rank"));
        assert!(message(projection(Projection { gap: 0, ..Projection::default() })).contains("gap"));
        assert!(message(projection(Projection { scale: 0.0, ..Projection::default() })).contains("scale"));
    }
}

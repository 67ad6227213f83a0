//! What a LoRA is: PEFT's options under PEFT's names.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{MapAccess, Visitor},
    ser::SerializeMap,
};
use serde_json::Value;

use super::maps::Naming;
use crate::{Error, Result};

/// A low-rank adapter: LoRA (arXiv 2106.09685), with `use_rslora` rsLoRA (2312.03732), with `use_dora` DoRA
/// (2402.09353). The fields are those of PEFT's `LoraConfig`; what PEFT has not is `naming` and `seed`.
///
/// ```
/// use moe_peft::lora::{LoraConfig, Targets};
///
/// let config: LoraConfig = serde_json::from_str(
///     r#"{"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"],
///         "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
///         "rank_pattern": {"experts.gate_up_proj": 1, "experts.down_proj": 1}}"#,
/// )?;
/// config.validate()?;
/// assert_eq!(config.target_modules, Some(Targets::List(vec!["q_proj".into(), "v_proj".into()])));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank of an addition.
    pub r: usize,
    /// An addition counts `lora_alpha / r`, with `use_rslora` `lora_alpha / sqrt(r)`.
    pub lora_alpha: f64,
    /// Share of inputs that are dropped in training, in [0, 1). 0 for experts in `target_parameters`.
    pub lora_dropout: f64,
    /// Which modules: a list of names or ends of paths, a regular expression that the whole path has to match, or
    /// `all-linear`.
    pub target_modules: Option<Targets>,
    /// Which parameters, by name or end of path: fused experts (`mlp.experts.gate_up_proj`), a router
    /// (`mlp.gate.weight`).
    pub target_parameters: Vec<String>,
    /// Modules that are left out, in the same forms.
    pub exclude_modules: Option<Targets>,
    /// Only these decoder layers; for a list of target modules.
    pub layers_to_transform: Option<Vec<usize>>,
    /// What stands before the number of a layer in a path, if `layers_to_transform` is to count only there.
    pub layers_pattern: Option<Vec<String>>,
    /// Other ranks, by regular expression at the end of a path; the first that matches. 0: no addition. For a single
    /// expert of `target_parameters` the path has its number: `experts.3.gate_up_proj`.
    pub rank_pattern: Patterns<usize>,
    /// Other `lora_alpha`, in the same way.
    pub alpha_pattern: Patterns<f64>,
    /// Scale with the root of the rank.
    pub use_rslora: bool,
    /// Train the length of every output row by itself.
    pub use_dora: bool,
    /// How `A` and `B` begin.
    pub init_lora_weights: Init,
    /// Modules outside experts whose own tensors are trained whole beside the additions, by name or end of path:
    /// `lm_head`, `embed_tokens`, norms, routers. Every number of theirs is trained and saved, and an optimizer keeps
    /// moments of each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub modules_to_save: Vec<String>,
    /// Tokens whose rows of the embeddings are trained, such as new ones; rows of both where embeddings and output head
    /// are one tensor.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trainable_token_indices: Vec<u32>,
    /// Whose module names `target_modules` and the patterns are about.
    pub naming: Naming,
    /// Where random values and dropout begin.
    pub seed: u64,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: None,
            target_parameters: Vec::new(),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            use_rslora: false,
            use_dora: false,
            init_lora_weights: Init::Kaiming,
            modules_to_save: Vec::new(),
            trainable_token_indices: Vec::new(),
            naming: Naming::PerExpert,
            seed: 0,
        }
    }
}

impl LoraConfig {
    /// # Errors
    /// [`Error::Input`] names the field that is out of range or does not go with another.
    pub fn validate(&self) -> Result<()> {
        if self.r == 0 {
            return Err(Error::input("r", 0, "a rank of at least 1"));
        }
        let alphas = self.alpha_pattern.iter().map(|(key, alpha)| (format!("alpha_pattern.{key}"), alpha));
        for (field, alpha) in alphas.chain([("lora_alpha".to_string(), &self.lora_alpha)]) {
            if !(*alpha > 0.0 && alpha.is_finite()) {
                return Err(Error::input(field, alpha, "a finite number above 0"));
            }
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(Error::input("lora_dropout", self.lora_dropout, "a number in [0, 1)"));
        }
        if self.target_modules.is_none() && self.target_parameters.is_empty() {
            return Err(Error::input(
                "target_modules",
                "none, nor any in `target_parameters`",
                "what is to be adapted",
            ));
        }
        if self.layers_to_transform.is_some() && !matches!(self.target_modules, Some(Targets::List(_))) {
            let expected = "a list in `target_modules`, or none of it";
            return Err(Error::input("layers_to_transform", "with a pattern or `target_parameters` alone", expected));
        }
        if self.init_lora_weights == Init::Orthogonal && !self.r.is_multiple_of(2) {
            return Err(Error::input("r", self.r, "an even rank for `init_lora_weights`: \"orthogonal\""));
        }
        if self.use_dora && self.init_lora_weights.changes_base() {
            let expected = "one that leaves the weight as it is, with `use_dora`";
            return Err(Error::input("init_lora_weights", self.init_lora_weights, expected));
        }
        if !self.target_parameters.is_empty() {
            if self.lora_dropout != 0.0 {
                let expected = "0 with `target_parameters`, as PEFT has it";
                return Err(Error::input("lora_dropout", self.lora_dropout, expected));
            }
            if self.use_dora {
                return Err(Error::input("use_dora", true, "false with `target_parameters`, as PEFT has it"));
            }
        }
        Ok(())
    }

    /// What an addition of this rank counts.
    pub fn scale(&self, alpha: f64, rank: usize) -> f64 {
        scale(alpha, rank, self.use_rslora)
    }
}

/// `alpha / r`, or `alpha / sqrt(r)`.
pub(crate) fn scale(alpha: f64, rank: usize, rslora: bool) -> f64 {
    alpha / if rslora { (rank as f64).sqrt() } else { rank as f64 }
}

/// Which modules.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Targets {
    /// Paths, or ends of paths after a dot.
    List(Vec<String>),
    /// `all-linear`, or a regular expression.
    Pattern(String),
}

impl Targets {
    /// A list.
    pub fn list<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Self::List(names.into_iter().map(Into::into).collect())
    }
}

/// Values by regular expression, in the order in which they are tried.
#[derive(Clone, Debug, PartialEq)]
pub struct Patterns<T>(Vec<(String, T)>);

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Patterns<T> {
    /// Adds one, to be tried last.
    pub fn push(&mut self, key: impl Into<String>, value: T) {
        self.0.push((key.into(), value));
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &T)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<T> FromIterator<(String, T)> for Patterns<T> {
    fn from_iter<I: IntoIterator<Item = (String, T)>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

impl<T: Serialize> Serialize for Patterns<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patterns<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Patterns<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of values by pattern")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Patterns(entries))
            }
        }
        deserializer.deserialize_map(Entries(std::marker::PhantomData))
    }
}

/// How `A` and `B` begin (`init_lora_weights`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum Init {
    /// `true`: `A` uniform in ±1/sqrt(in) (Kaiming with a = sqrt 5), `B` zero.
    Kaiming,
    /// `A` normal with deviation 1/r, `B` zero.
    Gaussian,
    /// `false`: both Kaiming. The adapted model is another one from the start; for tests.
    Random,
    /// `A` and `B` random in orthogonal subspaces of the rank, so that `B A = 0`; an even rank.
    Orthogonal,
    /// The leading singular triples of the weight (arXiv 2404.02948); the weight keeps the rest.
    Pissa {
        /// Rounds of the subspace iteration that finds them; exact if `None`.
        niter: Option<usize>,
    },
    /// `Q R` of the weight (arXiv 2406.01775): first columns of `Q`, first rows of `R`; the weight keeps the rest.
    Olora,
    /// Singular triples of the weight times the covariance of its inputs (arXiv 2406.05223); the weight keeps the rest.
    Corda(CordaMethod),
}

/// Which components CorDA trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CordaMethod {
    /// Instruction-previewed: the largest, by covariances from the task.
    Ipm,
    /// Knowledge-preserved: the smallest, by covariances from what is to be kept.
    Kpm,
}

impl Init {
    /// Whether the adapter begins as a part of the weight, which then keeps only the rest.
    pub fn changes_base(self) -> bool {
        matches!(self, Self::Pissa { .. } | Self::Olora | Self::Corda(_))
    }
}

impl TryFrom<Value> for Init {
    type Error = String;

    fn try_from(value: Value) -> std::result::Result<Self, String> {
        let found = match &value {
            Value::Bool(true) => Some(Self::Kaiming),
            Value::Bool(false) => Some(Self::Random),
            Value::String(text) => match text.to_lowercase().as_str() {
                "gaussian" => Some(Self::Gaussian),
                "orthogonal" => Some(Self::Orthogonal),
                "pissa" => Some(Self::Pissa { niter: None }),
                "olora" => Some(Self::Olora),
                "corda" | "corda_ipm" => Some(Self::Corda(CordaMethod::Ipm)),
                "corda_kpm" => Some(Self::Corda(CordaMethod::Kpm)),
                text => text
                    .strip_prefix("pissa_niter_")
                    .and_then(|n| n.parse().ok())
                    .map(|niter| Self::Pissa { niter: Some(niter) }),
            },
            _ => None,
        };
        found.ok_or_else(|| {
            format!(
                "init_lora_weights: found {value}, expected true, false, \"gaussian\", \"orthogonal\", \"pissa\", \"pissa_niter_N\", \
                 \"olora\", \"corda_ipm\" or \"corda_kpm\""
            )
        })
    }
}

impl From<Init> for Value {
    fn from(init: Init) -> Self {
        match init {
            Init::Kaiming => true.into(),
            Init::Random => false.into(),
            Init::Gaussian => "gaussian".into(),
            Init::Orthogonal => "orthogonal".into(),
            Init::Pissa { niter: None } => "pissa".into(),
            Init::Pissa { niter: Some(n) } => format!("pissa_niter_{n}").into(),
            Init::Olora => "olora".into(),
            Init::Corda(CordaMethod::Ipm) => "corda_ipm".into(),
            Init::Corda(CordaMethod::Kpm) => "corda_kpm".into(),
        }
    }
}

impl fmt::Display for Init {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Value::from(*self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_survives_json_and_bad_fields_are_named() {
        let mut config = LoraConfig {
            target_modules: Some(Targets::list(["q_proj"])),
            init_lora_weights: Init::Pissa { niter: Some(4) },
            ..LoraConfig::default()
        };
        config.rank_pattern.push("layers.1.*q_proj", 3);
        config.rank_pattern.push("a", 1);
        let json = serde_json::to_string(&config).unwrap();
        assert!(json.contains(r#""rank_pattern":{"layers.1.*q_proj":3,"a":1}"#), "{json}");
        assert_eq!(serde_json::from_str::<LoraConfig>(&json).unwrap(), config);
        let error = |change: fn(&mut LoraConfig)| {
            let mut config = LoraConfig { target_modules: Some(Targets::list(["q_proj"])), ..LoraConfig::default() };
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(error(|c| c.r = 0).starts_with("r: found 0"));
        assert!(error(|c| c.lora_alpha = f64::NAN).starts_with("lora_alpha"));
        assert!(error(|c| c.lora_dropout = 1.0).starts_with("lora_dropout"));
        assert!(error(|c| c.alpha_pattern.push("x", -1.0)).starts_with("alpha_pattern.x"));
        assert!(error(|c| c.target_modules = None).starts_with("target_modules"));
        assert!(error(|c| (c.r, c.init_lora_weights) = (3, Init::Orthogonal)).starts_with("r: found 3"));
        assert!(error(|c| (c.use_dora, c.init_lora_weights) = (true, Init::Olora)).starts_with("init_lora_weights"));
        let fused = |c: &mut LoraConfig| c.target_parameters = vec!["mlp.experts.down_proj".into()];
        let mut config = LoraConfig { lora_dropout: 0.1, ..LoraConfig::default() };
        fused(&mut config);
        assert!(config.validate().unwrap_err().to_string().starts_with("lora_dropout"));
        assert!(serde_json::from_str::<LoraConfig>(r#"{"init_lora_weights": "eva"}"#).is_err());
        assert!(serde_json::from_str::<LoraConfig>(r#"{"rank": 3}"#).is_err());
    }

    #[test]
    fn scales() {
        let config = LoraConfig { use_rslora: true, ..LoraConfig::default() };
        assert_eq!(config.scale(8.0, 16), 2.0);
        assert_eq!(LoraConfig::default().scale(8.0, 16), 0.5);
    }
}

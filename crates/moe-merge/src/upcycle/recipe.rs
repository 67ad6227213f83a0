//! How experts are made of a dense model, as data.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How a dense model becomes a Mixture of Experts.
///
/// ```
/// use moe_merge::{UpcycleMethod, Upcycling};
///
/// let copies = Upcycling::new(UpcycleMethod::Copy { noise: 0.0 }, 8);
/// assert_eq!((copies.top_k(), copies.parts()), (2, 1));
/// let parts: Upcycling = serde_json::from_str(r#"{"method": {"type": "split"}, "experts": 8}"#)?;
/// assert_eq!((parts.top_k(), parts.parts()), (8, 8)); // all parts are the dense network
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upcycling {
    /// What an expert is.
    pub method: UpcycleMethod,
    /// The number of routed experts.
    pub experts: usize,
    /// Experts per token; see [`Upcycling::top_k`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// Units of the dense network that every token runs through, as a shared expert. Only where experts are parts.
    #[serde(default)]
    pub shared_width: usize,
    /// What the router begins with; see [`Upcycling::router`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router: Option<RouterStart>,
    /// What the chosen parts of a network are multiplied by. Only where experts are parts of one network.
    #[serde(default)]
    pub scale: PartScale,
    /// Seed of everything that is drawn.
    #[serde(default)]
    pub seed: u64,
}

/// What an expert is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub enum UpcycleMethod {
    /// A copy of the network (sparse upcycling, arXiv 2212.05055): whatever the router, the function is that of the
    /// dense model.
    Copy {
        /// Normal noise on the weights of all copies but the first, in standard deviations of each matrix.
        #[serde(default)]
        noise: f64,
    },
    /// A copy with units drawn anew, others in every expert (Drop-Upcycling, arXiv 2502.19261): normal, with the mean
    /// and the deviation of the weights they replace.
    Drop {
        /// The fraction of units drawn anew.
        #[serde(default = "half")]
        ratio: f64,
    },
    /// A part of the network, in the order of its units. All parts together are the network. With copies, every copy is
    /// cut, and its parts are chosen together: Dynamic-DINO's granularity (arXiv 2507.17436).
    Split {
        /// Copies that are cut; a divisor of the number of experts.
        #[serde(default = "one")]
        copies: usize,
    },
    /// A part of the network: units that belong together (MoEfication, arXiv 2110.01786; FactorLLM, arXiv 2408.11855).
    Cluster {
        /// What makes units belong together.
        #[serde(default)]
        by: ClusterBy,
    },
    /// The units that are most active on the rows of one domain, out of those that are not shared (Read-ME,
    /// arXiv 2410.19123): experts overlap where domains do. Needs a sample of tokens per domain, an expert each.
    Domains {
        /// The share of the network's units that a domain keeps, shared ones included.
        #[serde(default = "half")]
        share: f64,
    },
    /// The network with its weights rounded to -1, 0 and 1 times the mean absolute value of each matrix, beside the
    /// whole network as the shared expert (MoTE, arXiv 2506.14435).
    Ternary {
        /// Whether experts begin with a down projection of zeros, so that the function stays that of the dense model,
        /// which they would be added to. Not so in the paper.
        #[serde(default)]
        zero: bool,
    },
    /// The network of one of several dense models of the same sizes: the base and others in order (mergekit-moe; the
    /// feed-forward experts of BAM, arXiv 2408.08274).
    Models {
        /// Whether everything else is the mean over the models (BAM) instead of that of the base (mergekit-moe).
        #[serde(default)]
        average: bool,
    },
}

fn half() -> f64 {
    0.5
}

fn one() -> usize {
    1
}

/// What makes units belong together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ClusterBy {
    /// The directions of their gate rows are near.
    #[default]
    Weights,
    /// They are active on the same tokens of a sample: the absolute activations have a high cosine. Shared units are
    /// those that are active most, on average.
    Activations,
}

/// What the chosen `k` of `N` parts are multiplied by, at equal weights. With all parts both are the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum PartScale {
    /// `N / k`: the chosen parts stand for all (FactorLLM). The length of the output is kept if parts point the same
    /// way.
    #[default]
    Mean,
    /// 1: the parts that are not chosen are left out (MoEfication). The better start where parts point different ways,
    /// as those of trained networks do.
    Sum,
}

/// What a router begins with. Weights are a softmax of the logits, renormalized over the chosen experts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub enum RouterStart {
    /// Zeros: equal weights. With fewer experts per token than there are, all tokens take the first ones until it is
    /// trained.
    Zero,
    /// Normal numbers; parts of one copy have the same.
    Random {
        /// Their standard deviation.
        #[serde(default = "std")]
        std: f64,
    },
    /// What the network itself says on a sample of tokens, fitted by ridge regression: the experts whose outputs are
    /// nearest to the network's own output times `k / E`, FactorLLM's prior-approximate target; with
    /// [`PartScale::Sum`], nearest to the whole output, of which they leave least; with [`UpcycleMethod::Domains`], the
    /// expert of the domain that a token is of. Only where experts are parts.
    Teacher {
        /// The ridge, relative to the mean square of an input.
        #[serde(default = "ridge")]
        ridge: f64,
    },
    /// Directions that are given, one per expert and layer, such as mean hidden states of prompts for each
    /// (mergekit-moe).
    Prototypes,
}

fn std() -> f64 {
    0.02
}

fn ridge() -> f64 {
    0.01
}

impl Upcycling {
    /// A recipe with defaults.
    pub fn new(method: UpcycleMethod, experts: usize) -> Self {
        Self { method, experts, top_k: None, shared_width: 0, router: None, scale: PartScale::Mean, seed: 0 }
    }

    /// The dense model as a Mixture of one expert: its very function, for whatever observes experts.
    pub fn one_expert() -> Self {
        Self::new(UpcycleMethod::Split { copies: 1 }, 1)
    }

    /// Parts that one network is cut into.
    pub fn parts(&self) -> usize {
        match self.method {
            UpcycleMethod::Split { copies } => self.experts / copies.max(1),
            UpcycleMethod::Cluster { .. } => self.experts,
            _ => 1,
        }
    }

    /// What the down projection of a part is multiplied by, since weights of the chosen experts sum to one.
    pub(super) fn factor(&self) -> f32 {
        match self.scale {
            PartScale::Mean => self.parts() as f32,
            PartScale::Sum => self.top_k() as f32,
        }
    }

    /// The share of the network's output that the teacher wants an expert to be near.
    pub(super) fn teacher_share(&self) -> f32 {
        match self.scale {
            PartScale::Mean => self.top_k() as f32 / self.experts as f32,
            PartScale::Sum => 1.0,
        }
    }

    /// Width of an expert that is made of a network of width `dense`.
    pub(super) fn width(&self, dense: usize) -> usize {
        match self.method {
            UpcycleMethod::Domains { share } => (share * dense as f64).round() as usize - self.shared_width,
            UpcycleMethod::Ternary { .. } => dense,
            _ => (dense - self.shared_width) / self.parts(),
        }
    }

    /// Width of the shared expert beside experts that are made of a network of width `dense`.
    pub(super) fn shared(&self, dense: usize) -> usize {
        if let UpcycleMethod::Ternary { .. } = self.method { dense } else { self.shared_width }
    }

    /// Whether experts are units of one network, so that some of them may be shared, and a teacher tells which to take.
    fn cuts(&self) -> bool {
        use UpcycleMethod::{Cluster, Domains, Split};
        matches!(self.method, Cluster { .. } | Split { copies: 1 } | Domains { .. })
    }

    /// Experts per token: if not given, all parts of one network, one expert of a domain or of ternary weights, else
    /// two (one of one).
    pub fn top_k(&self) -> usize {
        let usual = match self.method {
            UpcycleMethod::Domains { .. } | UpcycleMethod::Ternary { .. } => 1,
            _ if self.parts() > 1 => self.parts(),
            _ => 2,
        };
        self.top_k.unwrap_or_else(|| usual.min(self.experts))
    }

    /// What the router begins with: if not given, zeros where all experts run, the teacher where there is a sample and
    /// experts are parts, else random numbers.
    pub fn router(&self, sampled: bool) -> RouterStart {
        self.router.unwrap_or(match () {
            () if self.top_k() == self.experts && self.cuts() => RouterStart::Zero,
            () if sampled && self.cuts() => RouterStart::Teacher { ridge: ridge() },
            () => RouterStart::Random { std: std() },
        })
    }

    /// Whether it needs a sample of tokens.
    pub fn needs_sample(&self) -> bool {
        matches!(self.method, UpcycleMethod::Cluster { by: ClusterBy::Activations } | UpcycleMethod::Domains { .. })
            || matches!(self.router, Some(RouterStart::Teacher { .. }))
    }

    /// Whether the function is that of the dense model before any training, but for rounding.
    pub fn is_exact(&self) -> bool {
        match self.method {
            UpcycleMethod::Copy { noise } => noise == 0.0,
            UpcycleMethod::Drop { ratio } => ratio == 0.0,
            UpcycleMethod::Split { copies: 1 } | UpcycleMethod::Cluster { .. } => {
                self.top_k() == self.experts && matches!(self.router(false), RouterStart::Zero)
            }
            UpcycleMethod::Split { .. } => {
                self.top_k().is_multiple_of(self.parts())
                    && matches!(self.router(false), RouterStart::Random { std } if std > 0.0)
            }
            UpcycleMethod::Ternary { zero } => zero,
            UpcycleMethod::Domains { .. } | UpcycleMethod::Models { .. } => false,
        }
    }

    /// Checks the numbers among themselves.
    pub(super) fn validate(&self, width: usize, models: usize, (sampled, domains): (bool, usize)) -> Result<()> {
        let invalid = |field, found: String, expected: String| Err(Error::parameter(field, found, expected));
        let Self { experts, shared_width, .. } = *self;
        if experts == 0 {
            return invalid("experts", "0".into(), "at least 1".into());
        }
        if self.top_k() == 0 || self.top_k() > experts {
            return invalid("top_k", self.top_k().to_string(), format!("1 to the number of experts {experts}"));
        }
        match self.method {
            UpcycleMethod::Copy { noise } if !(noise.is_finite() && noise >= 0.0) => {
                return invalid("noise", noise.to_string(), "a number of at least 0".into());
            }
            UpcycleMethod::Drop { ratio } if !(0.0..=1.0).contains(&ratio) => {
                return invalid("ratio", ratio.to_string(), "0 to 1".into());
            }
            UpcycleMethod::Split { copies } if copies == 0 || !experts.is_multiple_of(copies) => {
                return invalid("copies", copies.to_string(), format!("a divisor of the {experts} experts"));
            }
            UpcycleMethod::Domains { share } => {
                let kept = (share * width as f64).round();
                if !(share > 0.0 && share <= 1.0) || kept <= shared_width as f64 {
                    let expected = format!("0 to 1, and more than the {shared_width} shared of {width} units");
                    return invalid("share", share.to_string(), expected);
                }
                if domains != experts {
                    return invalid("experts", experts.to_string(), format!("{domains}, one per domain"));
                }
            }
            UpcycleMethod::Models { .. } if models != experts => {
                return invalid("experts", experts.to_string(), format!("{models}, one per model, the base included"));
            }
            _ => {}
        }
        if models > 1 && !matches!(self.method, UpcycleMethod::Models { .. }) {
            return invalid("method", self.name().into(), "`models`, since several models are given".into());
        }
        if domains > 0 && !matches!(self.method, UpcycleMethod::Domains { .. }) {
            return invalid("method", self.name().into(), "`domains`, since samples of domains are given".into());
        }
        let (parts, cut) = (self.parts(), self.cuts());
        if shared_width > 0 && !cut {
            return invalid(
                "shared_width",
                shared_width.to_string(),
                "0 where experts are not parts of one network".into(),
            );
        }
        if self.scale == PartScale::Sum && !(cut && domains == 0) {
            return invalid("scale", "sum".into(), "mean where experts are not parts of one network".into());
        }
        if shared_width >= width || !(width - shared_width).is_multiple_of(parts) {
            let expected = format!("a width below {width} that leaves a multiple of {parts} units");
            return invalid("shared_width", shared_width.to_string(), expected);
        }
        if self.needs_sample() && !sampled && domains == 0 {
            return invalid("sample", "none".into(), "tokens that a model of one expert saw".into());
        }
        match self.router {
            Some(RouterStart::Random { std }) if !(std.is_finite() && std >= 0.0) => {
                invalid("std", std.to_string(), "a number of at least 0".into())
            }
            Some(RouterStart::Teacher { ridge }) if !(ridge.is_finite() && ridge > 0.0) => {
                invalid("ridge", ridge.to_string(), "a number above 0".into())
            }
            Some(RouterStart::Teacher { .. }) if !cut => {
                invalid("router", "teacher".into(), "another one where experts are not parts of one network".into())
            }
            _ => Ok(()),
        }
    }

    pub(super) fn name(&self) -> &'static str {
        match self.method {
            UpcycleMethod::Copy { .. } => "copy",
            UpcycleMethod::Drop { .. } => "drop",
            UpcycleMethod::Split { .. } => "split",
            UpcycleMethod::Cluster { .. } => "cluster",
            UpcycleMethod::Domains { .. } => "domains",
            UpcycleMethod::Ternary { .. } => "ternary",
            UpcycleMethod::Models { .. } => "models",
        }
    }
}

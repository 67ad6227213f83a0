//! What a mixture of LoRA experts is.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{balance::Balance, gate::Gate};
use crate::{
    Error, Result,
    lora::{LoraConfig, Naming, Patterns, Targets},
};

/// A mixture: low-rank experts beside linear maps, of which a router chooses for every token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MixtureConfig {
    /// Experts at each place.
    pub experts: Experts,
    /// Rank of an expert; of all experts together where every rank is one ([`Gate::is_by_rank`]).
    pub r: usize,
    /// An expert counts `lora_alpha / r`; `lora_alpha / k` with [`Gate::Ranks`].
    pub lora_alpha: f64,
    /// Share of inputs that are dropped in training.
    pub lora_dropout: f64,
    /// Maps with a router of their own, named as in [`LoraConfig::target_modules`].
    pub target_modules: Option<Targets>,
    /// Those that are left out.
    pub exclude_modules: Option<Targets>,
    /// Whose module names.
    pub naming: Naming,
    /// Whether dense blocks and shared experts have a mixture as a whole: one router for gate, up and down.
    pub blocks: bool,
    /// Whether routers have a bias.
    pub router_bias: bool,
    /// Deviation of a new router; uniform in ±1/sqrt(in) if `None`.
    pub router_std: Option<f64>,
    /// Which experts, and how much of each.
    pub gate: Gate,
    /// The same outside of training, if it is another.
    pub inference_gate: Option<Gate>,
    /// What keeps routers from using few experts.
    pub balance: Balance,
    /// Whether experts are trained.
    pub train_experts: bool,
    /// Whether routers are trained.
    pub train_router: bool,
    /// Directory of a saved mixture that this one goes on from: its experts, and its routers where it has some of the
    /// same kind. The second stage of LoRA-Mixer starts from the store of the first. Places, ranks and numbers of
    /// experts have to be the same.
    pub start: Option<PathBuf>,
    /// Factor of `||theta - theta_0||^2`, the squared distance of trained experts from those of `start` (LoRA-Mixer's
    /// preservation of imported experts); 0 or more. It stands beside the mean loss.
    pub preservation: f64,
    /// Where random values begin.
    pub seed: u64,
}

/// How many experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Experts {
    /// The same everywhere.
    Everywhere(usize),
    /// By decoder layer.
    PerLayer(Vec<usize>),
    /// A shape over the depth.
    Shape(Allocation),
}

/// How MoLA spreads experts over the layers (arXiv 2402.08562): numbers for four parts of the depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Allocation {
    /// 2-4-6-8: more in higher layers.
    InvertedTriangle,
    /// 8-6-4-2.
    Triangle,
    /// 8-2-2-8.
    Hourglass,
    /// 5-5-5-5.
    Rectangle,
}

impl Allocation {
    /// Experts of each of `layers`, a quarter of the depth after the other: for 32 layers 160 in all.
    pub fn experts(self, layers: usize) -> Vec<usize> {
        let parts = match self {
            Self::InvertedTriangle => [2, 4, 6, 8],
            Self::Triangle => [8, 6, 4, 2],
            Self::Hourglass => [8, 2, 2, 8],
            Self::Rectangle => [5; 4],
        };
        (0..layers).map(|layer| parts[layer * 4 / layers]).collect()
    }
}

impl Experts {
    /// Those of a decoder layer.
    pub(crate) fn of(&self, layer: usize, layers: usize) -> usize {
        match self {
            Self::Everywhere(n) => *n,
            Self::PerLayer(list) => list.get(layer).copied().unwrap_or(0),
            Self::Shape(shape) => shape.experts(layers)[layer],
        }
    }
}

impl Default for MixtureConfig {
    fn default() -> Self {
        Self {
            experts: Experts::Everywhere(8),
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules: None,
            exclude_modules: None,
            naming: Naming::PerExpert,
            blocks: false,
            router_bias: false,
            router_std: None,
            gate: Gate::TopK { k: 2 },
            inference_gate: None,
            balance: Balance::None {},
            train_experts: true,
            train_router: true,
            start: None,
            preservation: 0.0,
            seed: 0,
        }
    }
}

/// All linear maps but routers.
fn all_linear() -> Option<Targets> {
    Some(Targets::Pattern("all-linear".into()))
}

impl MixtureConfig {
    /// MoLA: every map its own router, top 2 of a number of experts that depends on the layer. Balance loss of 1e-3, as
    /// in the authors' instruction tuning; they leave it out for single tasks. r 8, alpha 16, dropout 0.05.
    pub fn mola(allocation: Allocation) -> Self {
        Self {
            experts: Experts::Shape(allocation),
            lora_dropout: 0.05,
            target_modules: all_linear(),
            balance: Balance::mola(1e-3),
            ..Self::default()
        }
    }

    /// MixLoRA (arXiv 2404.15159): 8 experts beside a dense block, one router, top 2, the auxiliary loss of Mixtral. r
    /// 16, alpha 32. Attention gets a [`LoraConfig`] of its own.
    pub fn mix_lora() -> Self {
        Self {
            r: 16,
            lora_alpha: 32.0,
            lora_dropout: 0.05,
            blocks: true,
            router_std: Some(0.02),
            balance: Balance::mixtral(1e-3),
            ..Self::default()
        }
    }

    /// LLaVA-MoLE (arXiv 2401.16160): the one best of 3 experts beside a dense block, at full weight, so that the
    /// router learns from the balance loss alone. r 32, alpha 16. The loss is the normalized one, `N sum f P`; the
    /// paper's coefficient for its own form is uncertain.
    pub fn llava_mole() -> Self {
        Self {
            experts: Experts::Everywhere(3),
            r: 32,
            lora_alpha: 16.0,
            lora_dropout: 0.05,
            blocks: true,
            router_bias: true,
            gate: Gate::Top1 {},
            balance: Balance::Load { coefficient: 1e-2, scope: super::Scope::Router, per_choice: false },
            ..Self::default()
        }
    }

    /// DynMoLE (arXiv 2504.00661): all of 6 experts where the Tsallis entropy of the router is high, else the top of
    /// its probability. r 24, alpha 48.
    pub fn dyn_mole() -> Self {
        Self {
            experts: Experts::Everywhere(6),
            r: 24,
            lora_alpha: 48.0,
            lora_dropout: 0.05,
            target_modules: all_linear(),
            gate: Gate::Uncertain { q: 1.1, threshold: 0.9, top_p: 0.75, keep_top_k: 2, epsilon: 1e-5 },
            balance: Balance::Entropy { q: 1.1, epsilon: 1e-5, entropy: 1e-2, load: 1e-3 },
            ..Self::default()
        }
    }

    /// LoRAMoE (arXiv 2312.09979): all of 8 experts, the first half for samples of type 1, the second for type 0. r 4,
    /// alpha 32. The paper's `beta` and `delta` of 0.1 are recalled; the released script sets both to 0.
    pub fn lora_moe() -> Self {
        Self {
            r: 4,
            lora_alpha: 32.0,
            lora_dropout: 0.05,
            target_modules: Some(Targets::list(["gate_proj", "up_proj", "down_proj"])),
            gate: Gate::Dense {},
            balance: Balance::Localized { weight: 0.1, delta: 0.1, dispersion: super::Dispersion::CvSquared },
            ..Self::default()
        }
    }

    /// LoRA-Mixer (arXiv 2507.00029), first stage: experts of attention by the label of the task, routers not trained.
    pub fn lora_mixer_experts() -> Self {
        Self {
            target_modules: Some(Targets::list(["q_proj", "k_proj", "v_proj", "o_proj"])),
            gate: Gate::Label {},
            train_router: false,
            ..Self::default()
        }
    }

    /// LoRA-Mixer, second stage: routers over all experts, experts not trained; top 3 outside of training. The
    /// coefficients of the loss are unknown; the entropy counts as written, which spreads the routing.
    pub fn lora_mixer_router() -> Self {
        Self {
            gate: Gate::Dense {},
            inference_gate: Some(Gate::TopK { k: 3 }),
            balance: Balance::Specialization { load: 1e-2, entropy: 1e-3 },
            train_experts: false,
            train_router: true,
            ..Self::lora_mixer_experts()
        }
    }

    /// SMoRA (arXiv 2501.15103): every rank of 64 an expert, 8 of them per token.
    pub fn smora() -> Self {
        Self {
            r: 64,
            lora_alpha: 16.0,
            target_modules: all_linear(),
            gate: Gate::Ranks { k: 8, partition: 1, bias_rate: 1e-5 },
            ..Self::default()
        }
    }

    /// MoRAM (arXiv 2506.21035): every rank activates itself; atoms of earlier tasks stay. r 8, 8 atoms per token.
    pub fn moram() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            target_modules: all_linear(),
            gate: Gate::SelfActivated { k: 8, temperature: 0.03, threshold: 0.2 },
            ..Self::default()
        }
    }

    /// FlyLoRA (arXiv 2510.08396): a frozen sparse `A` chooses 8 of 32 ranks, `B` alone is trained.
    pub fn fly_lora() -> Self {
        Self {
            r: 32,
            lora_alpha: 64.0,
            target_modules: all_linear(),
            gate: Gate::Sparse { k: 8, score: super::Score::Signed, bias_rate: 0.01 },
            ..Self::default()
        }
    }

    /// # Errors
    /// [`Error::Input`] names the field that is out of range or does not go with another.
    pub fn validate(&self, layers: usize) -> Result<()> {
        if self.r == 0 {
            return Err(Error::input("r", 0, "a rank of at least 1"));
        }
        if !(self.lora_alpha > 0.0 && self.lora_alpha.is_finite()) {
            return Err(Error::input("lora_alpha", self.lora_alpha, "a finite number above 0"));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(Error::input("lora_dropout", self.lora_dropout, "a number in [0, 1)"));
        }
        if let Experts::PerLayer(list) = &self.experts
            && list.len() != layers
        {
            return Err(Error::input(
                "experts",
                format!("{} numbers", list.len()),
                format!("one for each of {layers} layers"),
            ));
        }
        if self.target_modules.is_none() && !self.blocks {
            return Err(Error::input("target_modules", "none, and no `blocks`", "where the mixture is"));
        }
        if self.blocks && (self.target_modules.is_some() || self.gate.is_by_rank()) {
            return Err(Error::input("blocks", true, "false with `target_modules` and with gates by rank"));
        }
        if self.blocks && self.lora_dropout > 0.0 && self.gate == (Gate::Label {}) {
            return Err(Error::input("gate", "label", "a router, for blocks"));
        }
        if self.gate.is_by_rank() && self.balance != (Balance::None {}) {
            return Err(Error::input("balance", "a loss", "none: gates by rank have no probabilities"));
        }
        if self.inference_gate.as_ref().is_some_and(|gate| gate.is_by_rank() != self.gate.is_by_rank()) {
            return Err(Error::input("inference_gate", "another kind", "one by rank or one by expert, as `gate`"));
        }
        if !(self.preservation >= 0.0 && self.preservation.is_finite()) {
            return Err(Error::input("preservation", self.preservation, "a finite number of 0 or more"));
        }
        if self.preservation > 0.0 && (self.start.is_none() || !self.train_experts) {
            let expected = "0 without `start` and `train_experts`: nothing moves away from what was imported";
            return Err(Error::input("preservation", self.preservation, expected));
        }
        if !self.train_experts && !self.train_router {
            return Err(Error::input("train_experts and train_router", false, "one of them; nothing would be trained"));
        }
        self.gate.validate(self.r)?;
        self.inference_gate.as_ref().map_or(Ok(()), |gate| gate.validate(self.r))?;
        self.balance.validate()
    }

    /// The maps, by the rules of [`LoraConfig::targets`].
    pub(crate) fn lora(&self) -> LoraConfig {
        LoraConfig {
            r: self.r,
            lora_alpha: self.lora_alpha,
            target_modules: self.target_modules.clone(),
            exclude_modules: self.exclude_modules.clone(),
            naming: self.naming,
            rank_pattern: Patterns::default(),
            seed: self.seed,
            ..LoraConfig::default()
        }
    }

    /// What an expert counts.
    pub fn scale(&self) -> f64 {
        match self.gate {
            Gate::Ranks { k, .. } => self.lora_alpha / k as f64,
            _ => self.lora_alpha / self.r as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocations_have_160_experts_in_32_layers() {
        use Allocation::*;
        for shape in [InvertedTriangle, Triangle, Hourglass, Rectangle] {
            assert_eq!(shape.experts(32).iter().sum::<usize>(), 160);
        }
        assert_eq!(Hourglass.experts(8), [8, 8, 2, 2, 2, 2, 8, 8]);
    }

    #[test]
    fn recipes_are_valid_and_survive_json() {
        for config in [
            MixtureConfig::mola(Allocation::Triangle),
            MixtureConfig::mix_lora(),
            MixtureConfig::llava_mole(),
            MixtureConfig::dyn_mole(),
            MixtureConfig::lora_moe(),
            MixtureConfig::lora_mixer_experts(),
            MixtureConfig::lora_mixer_router(),
            MixtureConfig::smora(),
            MixtureConfig::moram(),
            MixtureConfig::fly_lora(),
        ] {
            config.validate(4).unwrap();
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<MixtureConfig>(&json).unwrap(), config, "{json}");
        }
        let error = |config: MixtureConfig| config.validate(4).unwrap_err().to_string();
        let mola = || MixtureConfig::mola(Allocation::Triangle);
        assert!(error(MixtureConfig { experts: Experts::PerLayer(vec![1]), ..mola() }).starts_with("experts"));
        assert!(error(MixtureConfig { gate: Gate::TopK { k: 0 }, ..mola() }).starts_with("gate.k"));
        assert!(error(MixtureConfig { blocks: true, ..mola() }).starts_with("blocks"));
        assert!(error(MixtureConfig { balance: Balance::mola(-1.0), ..mola() }).starts_with("balance"));
    }
}

//! Methods by name.

use crate::{
    MethodConfig,
    compressed_experts::CompressedExperts,
    condenser::CondenserTuning,
    duo::DuoTuning,
    esft::{Esft, EsftScore},
    final_router::FinalRouterTuning,
    label_experts::LabelExperts,
    layer_sampling::{LayerSampling, LayerTurns},
    lora::{CordaMethod, Init, LoraConfig, Targets},
    loss_free::LossFree,
    method_config::Compressed,
    mixture::{Allocation, MixtureConfig},
    model_weights::OwnWeights,
    mote::Mote,
    null_experts::NullExpertTuning,
    recurrent_router::RecurrentRouterTuning,
    router_loss::RouterTargetTuning,
    smoe_dropout::SmoeDropout,
    smt::{BlockBudget, Smt},
    token_skip::TokenSkipTuning,
};
use moe_core::train::Projection;

/// A method by name, with the options that were published for it.
#[derive(Clone, Copy, Debug)]
pub struct NamedMethod {
    /// Its name.
    pub name: &'static str,
    /// What it trains, in a few words.
    pub words: &'static str,
    /// Where it is from.
    pub source: &'static str,
    /// Its options.
    pub config: fn() -> MethodConfig,
}

const fn named(
    name: &'static str,
    words: &'static str,
    source: &'static str,
    config: fn() -> MethodConfig,
) -> NamedMethod {
    NamedMethod { name, words, source, config }
}

/// The projections of attention, under the names that most families have.
fn attention() -> Option<Targets> {
    Some(Targets::list(["q_proj", "k_proj", "v_proj", "o_proj"]))
}

fn esft(score: EsftScore, threshold: f64) -> MethodConfig {
    MethodConfig::Esft(Esft { score, threshold, ..Esft::default() })
}

fn lora(change: impl FnOnce(&mut LoraConfig)) -> MethodConfig {
    let mut config = LoraConfig { r: 16, lora_alpha: 32.0, target_modules: attention(), ..LoraConfig::default() };
    change(&mut config);
    MethodConfig::Lora(Box::new(config))
}

/// A mixture beside attention. The published ones that are beside all linear maps are of dense models; beside every
/// routed expert they would be larger than the experts.
fn beside_attention(config: MixtureConfig) -> MethodConfig {
    MethodConfig::Mixture(Box::new(MixtureConfig { target_modules: attention(), ..config }))
}

/// All methods that have a name. `Recipe::named` gives one with what it is trained with.
pub const METHODS: &[NamedMethod] = &[
    named("full", "all weights", "", || MethodConfig::Full {}),
    named("esft-token", "the experts most tokens go to", "arXiv 2407.01906", || esft(EsftScore::Token, 0.2)),
    named("esft-gate", "the experts with the largest routing weight", "arXiv 2407.01906", || {
        esft(EsftScore::Gate, 0.1)
    }),
    named("smt", "the blocks with the strongest gradients", "arXiv 2405.15525", || {
        MethodConfig::Smt(Smt { block: 128, feed_forward: Some(BlockBudget::Share(0.0084)), ..Smt::default() })
    }),
    named("lisa", "two layers at a time", "arXiv 2403.17919", || MethodConfig::Layers(LayerTurns::default())),
    named("owlore", "layers by their outliers, low-rank gradients", "arXiv 2405.18380", || {
        MethodConfig::Layers(LayerTurns { sampling: LayerSampling::owlore(), projection: Some(Projection::default()) })
    }),
    named("lora", "rank 16 beside attention", "arXiv 2106.09685", || lora(|_| ())),
    named("lora-experts", "rank 16 beside attention, 2 beside every expert", "arXiv 2106.09685", || {
        lora(|config| {
            config.target_parameters = vec!["mlp.experts.gate_up_proj".into(), "mlp.experts.down_proj".into()];
            for name in ["experts.gate_up_proj", "experts.down_proj"] {
                config.rank_pattern.push(name, 2);
                config.alpha_pattern.push(name, 4.0);
            }
        })
    }),
    named("dora", "the same as lora, with lengths by themselves", "arXiv 2402.09353", || lora(|c| c.use_dora = true)),
    named("corda", "the same as lora, along the covariance of inputs", "arXiv 2406.05223", || {
        lora(|config| config.init_lora_weights = Init::Corda(CordaMethod::Ipm))
    }),
    named(
        "mola",
        "low-rank experts beside attention, more in higher layers, two per token",
        "arXiv 2402.08562",
        || beside_attention(MixtureConfig::mola(Allocation::InvertedTriangle)),
    ),
    named(
        "mixlora",
        "eight low-rank experts beside the shared expert or dense block, two per token",
        "arXiv 2404.15159",
        || MethodConfig::Mixture(Box::new(MixtureConfig::mix_lora())),
    ),
    named("llava-mole", "three of them, the best one per token", "arXiv 2401.16160", || {
        MethodConfig::Mixture(Box::new(MixtureConfig::llava_mole()))
    }),
    named(
        "dynmole",
        "low-rank experts beside attention, as many as the router is uncertain",
        "arXiv 2504.00661",
        || beside_attention(MixtureConfig::dyn_mole()),
    ),
    named("lora-mixer-experts", "one low-rank expert of attention per label: first stage", "arXiv 2507.00029", || {
        MethodConfig::Mixture(Box::new(MixtureConfig::lora_mixer_experts()))
    }),
    named("lora-mixer-router", "the routers over those of `start`: second stage", "arXiv 2507.00029", || {
        MethodConfig::Mixture(Box::new(MixtureConfig::lora_mixer_router()))
    }),
    named("smora", "64 ranks beside attention, 8 per token", "arXiv 2501.15103", || {
        beside_attention(MixtureConfig::smora())
    }),
    named("moram", "ranks that activate themselves", "arXiv 2506.21035", || beside_attention(MixtureConfig::moram())),
    named("flylora", "sparse frozen projections beside attention, 8 of 32 ranks per token", "arXiv 2510.08396", || {
        beside_attention(MixtureConfig::fly_lora())
    }),
    named("null-experts", "routers, and rows of them that stand for nothing", "arXiv 2406.13233", || {
        MethodConfig::NullExperts(NullExpertTuning::default())
    }),
    named("recurrent-router", "a router across layers, beside the model", "arXiv 2408.06793", || {
        MethodConfig::RecurrentRouter(RecurrentRouterTuning::default())
    }),
    named("duo", "a choice of many or few experts for every token, under a budget", "arXiv 2410.10846", || {
        MethodConfig::Duo(DuoTuning::default())
    }),
    named("gamma-mod", "tokens that skip halves of redundant layers, by a trained score", "arXiv 2410.13859", || {
        MethodConfig::TokenSkip(TokenSkipTuning::default())
    }),
    named("final-router", "the last router, by routes that it could have taken", "arXiv 2605.07260", || {
        MethodConfig::FinalRouter(FinalRouterTuning::default())
    }),
    named("router-targets", "a router, by which experts are right for a token", "arXiv 2507.18464", || {
        MethodConfig::RouterTargets(RouterTargetTuning::default())
    }),
    named("label-experts", "experts by the labels of rows, whatever the router says", "Contrastive MoE", || {
        MethodConfig::LabelExperts(LabelExperts::default())
    }),
    named("loss-free", "experts and routers, under a bias that balances the load", "arXiv 2408.15664", || {
        MethodConfig::LossFree(LossFree::default())
    }),
    named("smoe-dropout", "experts, under random routers and ever more per token", "arXiv 2303.01610", || {
        MethodConfig::SmoeDropout(SmoeDropout::default())
    }),
    named("mote", "experts that run as ternary matrices, and routers", "arXiv 2506.14435", || {
        MethodConfig::Mote(Mote::default())
    }),
    named("condensers", "experts and routers, under a bias that makes routing uneven", "arXiv 2604.23036", || {
        MethodConfig::Condensers(CondenserTuning::default())
    }),
    named("compressed-experts", "factors from one expert per token that does not run", "arXiv 2503.00634", || {
        let own = OwnWeights { experts: true, router: true, ..OwnWeights::default() };
        MethodConfig::CompressedExperts(Compressed { experts: CompressedExperts { auxiliary: 1 }, own })
    }),
    named("router", "routers alone", "", || MethodConfig::Own(OwnWeights::router())),
    named("shared", "shared experts and their gates", "", || {
        MethodConfig::Own(OwnWeights { shared: true, shared_gate: true, ..OwnWeights::default() })
    }),
];

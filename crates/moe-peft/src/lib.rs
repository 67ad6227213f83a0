//! Parameter-efficient fine-tuning of Mixture-of-Experts models.
//!
//! What is trained is either a part of the model's own weights or an adapter beside a frozen weight. Both reach every
//! linear map of the model, routed experts included, through [`moe_core::adapters`], and are trained by
//! [`moe_core::train`].
//!
//! 1. A [`Recipe`] says what is trained and how: a [`MethodConfig`], losses on routers, training options. It is one
//!    JSON file.
//! 2. Every method is a [`TuningMethod`]: it checks itself against a model, and puts adapters into an [`AdapterSet`],
//!    whose [`Bank`] has the trained values. A method of one's own is one, too.
//! 3. A [`TrainingRun`] trains a recipe phase by phase, saves states, resumes, and writes metrics. [`FineTune`] is the
//!    task that it runs.
//! 4. [`Trained::save`] writes a checkpoint, an adapter, or both; [`open`](open()) tells what a directory holds and
//!    puts it onto a model again.
//! 5. [`adapter_files`] has the jobs over adapters on disk: merging, combining, converting, looking at them.
//!
//! ```
//! use std::collections::BTreeMap;
//! use moe_core::{Model, data::{Sequence, Wave}};
//! use moe_peft::{Recipe, TrainingRun, fold::FoldPrecision, open};
//! # let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../moe-checkpoint/tests/fixtures/parity/tf5/qwen2_moe");
//!
//! let model = Model::open(fixtures, &moe_core::device::device("default")?, None)?;
//! let waves = [Wave { id: 0, sequences: vec![Sequence::new(vec![5, 36, 67, 1, 32, 63, 94])] }];
//! let recipe: Recipe = serde_json::from_str(
//!     r#"{"method": {"type": "lora", "r": 4, "target_modules": ["q_proj", "experts.1.down_proj"]},
//!         "train": {"max_steps": 3, "epochs": 3, "schedule": {"peak": 0.01}}}"#,
//! )?;
//! let out = tempfile::tempdir()?;
//! let (labels, directory) = (BTreeMap::new(), out.path());
//! let fold = FoldPrecision::Bf16;
//! let run = TrainingRun { model: &model, waves: &waves, labels: &labels, directory, save_every: 50, resume: false, fold };
//! let trained = run.train(&recipe, &mut |_| Ok(()))?;
//! assert_eq!(trained.cost.losses.len(), 3);
//! let saved = trained.save(&model, directory, moe_checkpoint::Existing::Refuse)?;
//! let (tuned, _) = open(saved.adapter.unwrap())?.onto(&model)?;
//! # let _ = tuned;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | method | `type` | options | trains | saved as |
//! |---|---|---|---|---|
//! | full fine-tuning | `full` | | all weights | checkpoint |
//! | any part of the weights | `own` | [`OwnWeights`](model_weights::OwnWeights) | what it names | checkpoint |
//! | ESFT (arXiv 2407.01906) | `esft` | [`Esft`](esft::Esft) | the experts that the rows use | checkpoint |
//! | SMT (arXiv 2405.15525) | `smt` | [`Smt`](smt::Smt) | the blocks with the strongest gradients | checkpoint |
//! | LISA (arXiv 2403.17919), OwLore (2405.18380) | `layers` | [`LayerTurns`](layer_sampling::LayerTurns) | a few layers at a time | checkpoint |
//! | LoRA, rsLoRA, DoRA, PiSSA, OLoRA, CorDA | `lora` | [`LoraConfig`](lora::LoraConfig) | low-rank additions | PEFT adapter and checkpoint |
//! | [mixtures of LoRA experts](mixture) | `mixture` | [`MixtureConfig`](mixture::MixtureConfig) | additions and their routers | mixture |
//! | compressed experts (2503.00634) | `compressed_experts` | [`Compressed`](method_config::Compressed) | factors of experts that do not run | checkpoint and file |
//! | null experts, AdaMoE (2406.13233) | `null_experts` | [`NullExpertTuning`](null_experts::NullExpertTuning) | rows of the router that stand for nothing | checkpoint and file |
//! | recurrent router, RMoE (2408.06793) | `recurrent_router` | [`RecurrentRouterTuning`](recurrent_router::RecurrentRouterTuning) | a router across layers | checkpoint and file |
//! | two sizes per token, Duo-LLM (2410.10846) | `duo` | [`DuoTuning`](duo::DuoTuning) | a choice of many or few experts under a budget | checkpoint and file |
//! | gamma-MoD (2410.13859), MindSkip (2410.13184) | `token_skip` | [`TokenSkipTuning`](token_skip::TokenSkipTuning) | scores by which tokens skip | checkpoint and `run_time.json` |
//! | final-layer router (2605.07260) | `final_router` | [`FinalRouterTuning`](final_router::FinalRouterTuning) | the last router | checkpoint |
//! | right experts, DriftMoE (2507.18464) | `router_targets` | [`RouterTargetTuning`](router_loss::RouterTargetTuning) | a router | checkpoint |
//! | experts by label, Contrastive MoE | `label_experts` | [`LabelExperts`](label_experts::LabelExperts) | experts of a row's label | checkpoint |
//! | loss-free balance (2408.15664) | `loss_free` | [`LossFree`](loss_free::LossFree) | weights, under a bias that follows the load | checkpoint |
//! | SMoE-Dropout (2303.01610) | `smoe_dropout` | [`SmoeDropout`](smoe_dropout::SmoeDropout) | experts, under random routers | checkpoint and `run_time.json` |
//! | MoTE (2506.14435) | `mote` | [`Mote`](mote::Mote) | routed experts as ternary matrices, and routers | checkpoint with experts in two bits |
//! | condenser experts (2604.23036) | `condensers` | [`CondenserTuning`](condenser::CondenserTuning) | weights, under a bias of routing | checkpoint and file |
//! | losses on routers | beside any | [`RouterLosses`](router_loss::RouterLosses) | | |
//! | DenseMixer | beside what trains routers | [`DenseMixer`](dense_mixer::DenseMixer) | | |
//!
//! [`MethodConfig`] has the table of what each is trained with by default, [`METHODS`] those that have a name.
//!
//! # Features
#![doc = document_features::document_features!()]
#![deny(missing_docs)]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod adapter_files;
mod adapter_set;
mod array_file;
pub mod codec;
pub mod compressed_experts;
pub mod condenser;
pub mod dense_mixer;
pub mod duo;
mod error;
pub mod esft;
pub mod final_router;
mod fine_tune;
pub mod fold;
pub mod input_watch;
pub mod label_experts;
pub mod layer_sampling;
pub mod lora;
pub mod loss_free;
pub mod merge;
pub mod method_config;
pub mod mixture;
pub mod model_weights;
pub mod mote;
mod named_methods;
pub mod null_experts;
mod parameter_bank;
mod parked_values;
pub mod peft_files;
mod recipe;
pub mod recurrent_router;
mod rewrite;
pub mod router_loss;
mod saved_tuning;
pub mod smoe_dropout;
pub mod smt;
pub mod token_skip;
pub mod trainable;
pub mod trainable_tensors;
mod training_run;
mod tuning_method;

pub use adapter_set::{AdapterSet, SweepListener};
pub use error::{Error, Result};
pub use fine_tune::{FineTune, Plain, Target, TrainingHooks};
pub use method_config::MethodConfig;
pub use named_methods::{METHODS, NamedMethod};
pub use parameter_bank::{Bank, Live};
pub use recipe::Recipe;
pub use saved_tuning::{SavedKind, SavedTuning, open};
pub use training_run::{LossPoint, OnRunEvent, RunEvent, SavedPaths, Trained, TrainingCost, TrainingRun};
pub use tuning_method::{Artifacts, Installed, Phase, PhaseEnd, Setting, TuningMethod};

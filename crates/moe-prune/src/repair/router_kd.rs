//! Router distillation: the router learns which of the pruned experts to use.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use moe_checkpoint::group::{Alone, Group};
use moe_checkpoint::{LayerRole, Role};
use moe_core::data::Wave;
use moe_core::evaluate::divergence_in_group;
use moe_core::host::{self, HostView};
use moe_core::router::Routed;
use moe_core::trace::{Observer, RouterGradients, Signals};
use moe_core::train::{
    BatchLoss, OnEvent, Parameters, Schedule, TrainEvent, TrainOptions, TrainReport, TrainingTask, train_in_group,
};
use moe_core::{Distillation, Engine, EngineOptions, Model, RoutingOverlay, TeacherLogits};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{OnProgress, Repair, RepairNeeds, RepairRequest, check_shares, edits_by};
use crate::{Edits, Error, Result};

/// Trains the router weights of a changed model, and nothing else, on the divergence of its next-token distribution
/// from the full model's (Router KD, arXiv 2603.02217): after pruning, the experts have changed, and the router does
/// not know.
///
/// The full model's most likely tokens are recorded once ([`TeacherLogits`], which says what memory they take); every
/// step is a forward and a backward sweep of the changed model. Biases of routers stay as they are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterDistillation {
    /// Tokens of the full model kept per position; the others count as one.
    pub top: usize,
    /// How to train.
    pub train: TrainOptions,
}

impl Default for RouterDistillation {
    fn default() -> Self {
        let schedule = Schedule { peak: 1e-3, ..Schedule::default() };
        Self { top: 64, train: TrainOptions { schedule, ..TrainOptions::default() } }
    }
}

/// Result of a [`RouterDistillation`].
#[derive(Clone, Debug, PartialEq)]
pub struct RouterDistilled {
    /// Router weights, in the indices of the changed model's checkpoint.
    pub edits: Edits,
    /// The divergence before and after, in nats per predicted token of the evaluation waves.
    pub report: TrainReport,
}

impl RouterDistillation {
    /// Trains the routers of `student` on `waves` and keeps those with the smallest divergence on `evaluation`; on
    /// `waves` themselves if that is empty. The ids of all waves must differ.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for no tokens to keep; those of [`train`](moe_core::train::train) and of the sweeps.
    pub fn fit(
        &self,
        teacher: &Model,
        student: &Model,
        waves: &[Wave],
        evaluation: &[Wave],
        on_event: OnEvent<'_>,
    ) -> Result<RouterDistilled> {
        self.fit_in(&Alone, teacher, student, waves, evaluation, on_event)
    }

    /// The same with the other ranks of a group, each of which runs other waves: of the full model, of a step, and of
    /// the evaluation.
    fn fit_in(
        &self,
        group: &dyn Group,
        teacher: &Model,
        student: &Model,
        waves: &[Wave],
        evaluation: &[Wave],
        on_event: OnEvent<'_>,
    ) -> Result<RouterDistilled> {
        if self.top == 0 {
            let expected = "at least 1".to_string();
            return Err(Error::InvalidParameter { field: "top", found: "0".into(), expected });
        }
        self.train.validate()?;
        let moe = |layer| student.config().moe(layer);
        if (0..student.config().layers.len()).filter_map(moe).any(|moe| moe.identities > 0) {
            let found = format!("`{}`, whose routers choose identity experts, too", student.config().model_type);
            let expected = "routers of routed experts alone, which edits have rows for".to_string();
            return Err(Error::InvalidParameter { field: "student", found, expected });
        }
        let recorder = Engine::new(teacher, EngineOptions::default());
        let targets = TeacherLogits::record_in_group(group, &recorder, waves.iter().chain(evaluation), self.top)?;

        let config = student.config();
        let layers: Vec<usize> = (0..config.layers.len()).filter(|&layer| config.moe(layer).is_some()).collect();
        let mut parameters = Parameters::new();
        let mut weights = BTreeMap::new();
        for &layer in &layers {
            let own = student.routing_overlay().and_then(|overlay| overlay.router(layer));
            let weight = match own {
                Some(weight) => weight,
                None => student.checkpoint().read_f32(Role::Layer(layer, LayerRole::Router))?,
            };
            parameters.insert(name(layer), weight.clone());
            weights.insert(layer, weight);
        }
        let routers =
            Arc::new(TrainedRouters { base: student.routing_overlay().cloned(), weights: RwLock::new(weights) });
        let model = student.with_overlays(student.expert_overlay().cloned(), Some(routers.clone()))?;
        let evaluation = if evaluation.is_empty() { waves } else { evaluation };
        let mut task = Task { model: &model, routers: &routers, targets: &targets, evaluation };
        let report = train_in_group(group, &mut task, &mut parameters, waves, &self.train, None, on_event)?;

        let recipe = serde_json::json!({ "repair": "router_distillation", "options": self, "report": report });
        let mut edits = edits_by(recipe);
        for layer in layers {
            edits.set_router(layer, parameters.get(&name(layer)).expect("inserted above").values.clone());
        }
        Ok(RouterDistilled { edits, report })
    }
}

impl Repair for RouterDistillation {
    fn recipe(&self) -> Value {
        json!({ "repair": "router_distillation", "options": self })
    }

    fn needs(&self) -> RepairNeeds {
        RepairNeeds { pruned: true, ..RepairNeeds::default() }
    }

    /// Keeps the routers that are best on the waves themselves.
    fn repair(&self, request: &RepairRequest<'_>, on_progress: OnProgress<'_>) -> Result<Edits> {
        check_shares(self.needs(), request)?;
        let mut on_event = |event: &TrainEvent| {
            if let TrainEvent::Step { step, steps, .. } = event {
                on_progress(*step, *steps);
            }
            Ok(())
        };
        let RepairRequest { model, waves, group, .. } = *request;
        let fitted = request.pruned().and_then(|pruned| self.fit_in(group, model, pruned, waves, &[], &mut on_event));
        Ok(group.agree(fitted)?.edits)
    }

    fn check(&self, request: &RepairRequest<'_>) -> Result<()> {
        self.train.validate()?;
        let teacher = Engine::new(request.model, EngineOptions { loss: true, ..EngineOptions::default() });
        let student = request.pruned.map(|student| Engine::new(student, EngineOptions::default()));
        for wave in request.waves {
            teacher.plan(wave.tokens(), Signals::NONE)?;
            if let Some(student) = &student {
                student.plan(wave.tokens(), Signals::ROUTER_GRADIENTS)?;
            }
        }
        Ok(())
    }
}

fn name(layer: usize) -> String {
    format!("layer.{layer}.router")
}

/// Routers that change between sweeps, over whatever else changes the routing.
struct TrainedRouters {
    base: Option<Arc<dyn RoutingOverlay>>,
    weights: RwLock<BTreeMap<usize, Vec<f32>>>,
}

impl RoutingOverlay for TrainedRouters {
    fn removed(&self, layer: usize) -> Option<&[u32]> {
        self.base.as_ref().and_then(|base| base.removed(layer))
    }

    fn gains(&self, layer: usize) -> Option<Vec<f32>> {
        self.base.as_ref().and_then(|base| base.gains(layer))
    }

    fn router(&self, layer: usize) -> Option<Vec<f32>> {
        self.weights.read().unwrap_or_else(PoisonError::into_inner).get(&layer).cloned()
    }

    fn routed(&self, layer: usize, routed: &mut Routed) {
        if let Some(base) = &self.base {
            base.routed(layer, routed);
        }
    }

    fn routed_backward(&self, layer: usize, before: &Routed, after: &Routed, d_weights: &mut [f32]) {
        if let Some(base) = &self.base {
            base.routed_backward(layer, before, after, d_weights);
        }
    }
}

struct Task<'a> {
    model: &'a Model,
    routers: &'a TrainedRouters,
    targets: &'a TeacherLogits,
    evaluation: &'a [Wave],
}

impl TrainingTask for Task<'_> {
    fn accumulate(&mut self, wave: &Wave, parameters: &mut Parameters) -> moe_core::Result<BatchLoss> {
        let engine = Engine::new(self.model, EngineOptions::default());
        let mut observer = WeightGradients { parameters };
        let report = engine.run_with(wave, &mut Distillation::new(self.targets), &mut observer)?;
        Ok(BatchLoss { loss: report.loss.unwrap_or(0.0), tokens: report.loss_tokens })
    }

    fn update(&mut self, parameters: &Parameters) -> moe_core::Result<()> {
        let mut weights = self.routers.weights.write().unwrap_or_else(PoisonError::into_inner);
        for (layer, weight) in weights.iter_mut() {
            weight.clone_from(&parameters.get(&name(*layer)).expect("one of each layer").values);
        }
        Ok(())
    }

    fn evaluate(&mut self, parameters: &mut Parameters) -> moe_core::Result<f64> {
        self.evaluate_in(&Alone, parameters)
    }

    fn evaluate_in(&mut self, group: &dyn Group, _: &mut Parameters) -> moe_core::Result<f64> {
        divergence_in_group(group, self.model, self.targets, self.evaluation)
    }

    fn is_shareable(&self) -> bool {
        true
    }
}

/// Adds `d_logits^T input`, the gradient of each router's weight.
struct WeightGradients<'a> {
    parameters: &'a mut Parameters,
}

impl Observer for WeightGradients<'_> {
    fn needs(&self) -> Signals {
        Signals::ROUTER_GRADIENTS
    }

    fn router(&mut self, gradients: &RouterGradients<'_>) -> moe_core::Result<()> {
        let Some(gradient) = self.parameters.gradient_mut(&name(gradients.layer)) else { return Ok(()) };
        let tokens = gradients.input.dims()[0];
        let d_logits =
            host::from_vec(gradients.d_logits.to_vec(), [tokens, gradients.experts], &gradients.input.device());
        let d_weight = d_logits.transpose().matmul(gradients.input.clone()); // [E, H]
        gradient.iter_mut().zip(HostView::new(&d_weight).as_slice()).for_each(|(sum, d)| *sum += d);
        Ok(())
    }
}

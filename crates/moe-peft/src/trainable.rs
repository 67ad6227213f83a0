//! What exactly will be trained.

use std::fmt;

use moe_checkpoint::Role;
use moe_checkpoint::human::size;
use moe_core::{
    Model,
    adapters::{Adapters, ExpertSite, LayerSite, Site},
};
use serde::{Deserialize, Serialize};

use crate::{AdapterSet, trainable_tensors};

/// A kind of weight of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainablePart {
    /// What it is: `query`, `routed experts gate_up`.
    pub part: String,
    /// Weights of the kind in the model.
    pub weights: usize,
    /// How many of them have an adapter.
    pub adapted: usize,
    /// Values of the kind in the model.
    pub values: u64,
    /// Values that are trained in their place or beside them.
    pub trained: u64,
}

/// What of a model is trained, and what stays as it is. Made before the first step, to be shown.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Trainable {
    /// Every kind of weight that the model has.
    pub parts: Vec<TrainablePart>,
    /// Values that are trained and belong to no weight of the model alone, such as the routers of mixtures.
    pub other: u64,
    /// What somebody might not expect.
    pub warnings: Vec<String>,
}

impl Trainable {
    /// What `set` trains of `model`.
    pub fn of(model: &Model, set: &AdapterSet) -> Self {
        let checkpoint = model.checkpoint();
        let mut parts: Vec<TrainablePart> = Vec::new();
        let mut add = |part: String, values: usize, trained: Option<usize>| {
            let at = parts.iter().position(|known| known.part == part).unwrap_or_else(|| {
                parts.push(TrainablePart { part, weights: 0, adapted: 0, values: 0, trained: 0 });
                parts.len() - 1
            });
            let part = &mut parts[at];
            part.weights += 1;
            part.values += values as u64;
            part.adapted += usize::from(trained.is_some_and(|trained| trained > 0));
            part.trained += trained.unwrap_or(0) as u64;
        };
        for place in trainable_tensors::linear_maps(checkpoint) {
            let trained = set.linear(place.site).map(|adapter| adapter.trained());
            add(part_name(place.site), place.dims[0] * place.dims[1], trained);
        }
        for vector in trainable_tensors::vectors(checkpoint) {
            let trained = set.vector(vector.role).map(|adapter| adapter.trained());
            add(if vector.norm { "norms" } else { "biases" }.into(), vector.len, trained);
        }
        let size = |role: Role| checkpoint.plain_role(role).map_or(0, |info| info.shape.iter().product());
        let rows = |prefix: &str| -> usize {
            let live = set.bank().iter().filter(|live| live.name().starts_with(prefix) && live.is_trained());
            live.map(|live| live.shape().iter().product::<usize>()).sum()
        };
        add("embeddings".into(), size(Role::Embedding), Some(rows("embeddings")));
        if crate::model_weights::tied(checkpoint).is_ok_and(|tied| !tied) {
            add("output head".into(), size(Role::LmHead), Some(rows("head")));
        }
        let known: u64 = parts.iter().map(|part| part.trained).sum();
        let all: usize =
            set.bank().iter().filter(|live| live.is_trained()).map(|live| live.shape().iter().product::<usize>()).sum();
        Self { parts, other: (all as u64).saturating_sub(known), warnings: Vec::new() }
    }

    /// Values that are trained.
    pub fn trained(&self) -> u64 {
        self.parts.iter().map(|part| part.trained).sum::<u64>() + self.other
    }

    /// Values of the model.
    pub fn values(&self) -> u64 {
        self.parts.iter().map(|part| part.values).sum()
    }

    /// Bytes of the trained values with their gradients and the two moments of AdamW, all f32.
    pub fn bytes(&self) -> u64 {
        16 * self.trained()
    }

    /// Warns if the names that were asked for are those of feed-forward maps (`gate_proj`, `gate_up_proj`, `w1`, ..)
    /// and yet no routed expert is trained. That is what becomes of such names in most tools where the experts are one
    /// fused tensor.
    #[must_use]
    pub fn asked_for(mut self, names: &[impl AsRef<str>]) -> Self {
        let feed_forward = |name: &str| {
            let last = name.rsplit('.').next().unwrap_or(name);
            matches!(last, "gate_proj" | "up_proj" | "down_proj" | "gate_up_proj" | "w1" | "w2" | "w3" | "all-linear")
        };
        let asked: Vec<&str> = names.iter().map(AsRef::as_ref).filter(|name| feed_forward(name)).collect();
        let routed = |part: &&TrainablePart| part.part.starts_with("routed experts");
        if !asked.is_empty() && self.parts.iter().filter(routed).all(|part| part.trained == 0) {
            self.warnings.push(format!(
                "the routed experts stay frozen, although {} were asked for: they are one tensor per layer here; name them with \
                 target_parameters",
                asked.join(", ")
            ));
        }
        self
    }
}

fn part_name(site: Site) -> String {
    match site {
        Site::Expert { map: ExpertSite::GateUp, .. } => "routed experts gate_up".into(),
        Site::Expert { map: ExpertSite::Down, .. } => "routed experts down".into(),
        Site::Layer(_, LayerSite::Router) => "routers".into(),
        Site::Layer(_, site) => site.name().replace('_', " ").replace("gate up", "gate_up"),
    }
}

impl fmt::Display for Trainable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<26} {:>9} {:>9} {:>14} {:>12}", "part", "weights", "trained", "values", "trained")?;
        for part in &self.parts {
            let TrainablePart { part, weights, adapted, values, trained } = part;
            writeln!(f, "{part:<26} {weights:>9} {adapted:>9} {values:>14} {trained:>12}")?;
        }
        if self.other > 0 {
            writeln!(f, "{:<26} {:>9} {:>9} {:>14} {:>12}", "beside them", "", "", "", self.other)?;
        }
        let share = 100.0 * self.trained() as f64 / self.values().max(1) as f64;
        writeln!(f, "{:<26} {:>9} {:>9} {:>14} {:>12} ({share:.2}%)", "all", "", "", self.values(), self.trained())?;
        writeln!(f, "trained values, gradients and moments: {}", size(self.bytes()))?;
        self.warnings.iter().try_for_each(|warning| writeln!(f, "warning: {warning}"))
    }
}

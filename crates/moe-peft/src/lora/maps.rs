//! The linear maps of a checkpoint, and what PEFT calls them.

use std::{
    collections::{BTreeSet, HashMap},
    ops::Range,
};

use moe_checkpoint::{
    Checkpoint, ExpertLayout, ExpertMatrix, ExpertSite, ExpertTensor, LayerSite, MatrixId, Role, Site,
};

use super::{modern::modern, targets::ends_with};
use crate::trainable_tensors;

/// Whose module names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Naming {
    /// Every matrix of every expert is a module, as in transformers 4 and in most checkpoints:
    /// `model.layers.0.mlp.experts.3.gate_proj`.
    #[default]
    PerExpert,
    /// All experts of a layer are two parameters of one module, as in transformers 5: `model.layers.0.mlp.experts`,
    /// with `gate_up_proj` and `down_proj`.
    Fused,
}

/// The maps of a checkpoint by place and by name.
#[derive(Debug)]
pub struct Maps<'a> {
    checkpoint: &'a Checkpoint,
    all: Vec<MatrixId>,
    by_path: HashMap<String, MatrixId>,
    /// Layer by the module that holds all its experts, under any of its names.
    experts: HashMap<String, usize>,
    /// Tensors outside of experts by name, under any of their names.
    tensors: HashMap<String, Role>,
}

impl<'a> Maps<'a> {
    /// Those of `checkpoint`.
    pub fn new(checkpoint: &'a Checkpoint) -> Self {
        let mut maps = Self {
            checkpoint,
            all: Vec::new(),
            by_path: HashMap::new(),
            experts: HashMap::new(),
            tensors: HashMap::new(),
        };
        for layer in 0..checkpoint.config().layers.len() {
            for role in LayerSite::ALL.into_iter().flat_map(LayerSite::roles).copied() {
                if maps.shape(Role::Layer(layer, role)).is_none() {
                    continue;
                }
                let map = MatrixId::Layer(layer, role);
                maps.all.push(map);
                for naming in [Naming::PerExpert, Naming::Fused] {
                    maps.by_path.insert(maps.path(map, naming), map);
                }
            }
            for expert in 0..checkpoint.config().moe(layer).map_or(0, |moe| moe.num_experts()) {
                let parts = [ExpertMatrix::Gate, ExpertMatrix::Up, ExpertMatrix::Down];
                let gateless = trainable_tensors::is_gateless(checkpoint, layer);
                for part in parts.into_iter().filter(|part| !gateless || *part != ExpertMatrix::Gate) {
                    let map = MatrixId::Expert { layer, expert, part };
                    maps.all.push(map);
                    let path = maps.path(map, Naming::PerExpert);
                    maps.by_path.insert(modern(&path, checkpoint), map);
                    maps.by_path.insert(path, map);
                }
            }
            if checkpoint.config().moe(layer).is_some() && !maps.expert_matrices_are_modules() {
                for naming in [Naming::PerExpert, Naming::Fused] {
                    maps.experts.insert(maps.experts_path(layer, naming), layer);
                }
            }
        }
        for map in [MatrixId::Embedding, MatrixId::Head] {
            maps.by_path.insert(maps.path(map, Naming::PerExpert), map);
        }
        let matrices = maps.all.iter().filter_map(|map| match map {
            MatrixId::Layer(layer, role) => Some(Role::Layer(*layer, *role)),
            _ => None,
        });
        let vectors = trainable_tensors::vectors(checkpoint).into_iter().map(|vector| vector.role);
        let roles: Vec<Role> = matrices.chain(vectors).chain([Role::Embedding, Role::LmHead]).collect();
        for role in roles {
            let name = checkpoint.family().tensor_name(role);
            maps.tensors.insert(modern(&name, checkpoint), role);
            maps.tensors.insert(name, role);
        }
        maps
    }

    /// The tensor of this name, under any of its names, that is no part of an expert: a matrix of a layer, a vector,
    /// the embeddings, the output head.
    pub fn find_tensor(&self, name: &str) -> Option<Role> {
        self.tensors.get(name).copied()
    }

    /// The name of a tensor outside of experts as its family has it, in transformers 5.
    pub fn tensor_name(&self, role: Role) -> String {
        modern(&self.checkpoint.family().tensor_name(role), self.checkpoint)
    }

    /// The path of the module that has a tensor.
    pub fn module_of(&self, role: Role) -> String {
        let name = self.tensor_name(role);
        name.rsplit_once('.').map_or_else(|| name.clone(), |(path, _)| path.to_string())
    }

    /// The tensors of the modules outside of experts that are called so, by their path or the end of it.
    pub fn of_module(&self, module: &str) -> BTreeSet<Role> {
        let of = |name: &String| name.rsplit_once('.').is_some_and(|(path, _)| ends_with(path, module));
        self.tensors.iter().filter(|(name, _)| of(name)).map(|(_, role)| *role).collect()
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// All maps, layer by layer; of experts gate, up and down.
    pub fn all(&self) -> &[MatrixId] {
        &self.all
    }

    /// Number of routed experts of a layer.
    pub fn experts(&self, layer: usize) -> usize {
        self.checkpoint.config().moe(layer).map_or(0, |moe| moe.num_experts())
    }

    /// Experts that a [fused parameter](Self::fused_parameters) of a layer holds: the routed ones, and where
    /// transformers gives identity experts gate and up projections, which nothing reads, those after them.
    pub fn fused_experts(&self, layer: usize, part: ExpertMatrix) -> usize {
        let moe = self.checkpoint.config().moe(layer);
        match part != ExpertMatrix::Down && self.checkpoint.family().identity_expert_tensors() {
            true => moe.map_or(0, |moe| moe.router_rows()),
            false => self.experts(layer),
        }
    }

    /// `[out, in]`; `None` for a map that the model does not have.
    pub fn dims(&self, map: MatrixId) -> Option<[usize; 2]> {
        match map {
            MatrixId::Layer(layer, role) => {
                LayerSite::of(role)?;
                self.shape(Role::Layer(layer, role))
            }
            MatrixId::Expert { layer, expert, part } => {
                let moe = self.checkpoint.config().moe(layer)?;
                let width = *moe.widths.get(expert)?;
                if moe.gateless && matches!(part, ExpertMatrix::Gate | ExpertMatrix::GateUp) {
                    return None;
                }
                let hidden = self.checkpoint.config().expert_hidden_size();
                Some(match part {
                    ExpertMatrix::Gate | ExpertMatrix::Up => [width, hidden],
                    ExpertMatrix::GateUp => [2 * width, hidden],
                    ExpertMatrix::Down => [hidden, width],
                })
            }
            MatrixId::Embedding => self.shape(Role::Embedding),
            MatrixId::Head => self.shape(Role::LmHead),
        }
    }

    /// Where the engine computes it: the place, which of its rows, and how many it has. `None` for a map that the model
    /// does not have, and for embeddings and output head, which are no maps of a layer.
    pub fn site(&self, map: MatrixId) -> Option<(Site, Range<usize>, usize)> {
        let [out, _] = self.dims(map)?;
        let (site, place) = map.site()?;
        // Without a gate, the map is its up projection alone.
        let (place, of) = if self.is_up_alone(site) { (0, 1) } else { place };
        Some((site, place * out..(place + 1) * out, of * out))
    }

    /// Whether the block that a map of gate and up is of has no gate.
    fn is_up_alone(&self, site: Site) -> bool {
        match site {
            Site::Layer(layer, map) => {
                map.roles().len() == 2 && trainable_tensors::roles(self.checkpoint, layer, map).count() == 1
            }
            Site::Expert { layer, map: ExpertSite::GateUp, .. } => {
                trainable_tensors::is_gateless(self.checkpoint, layer)
            }
            Site::Expert { .. } => false,
        }
    }

    /// The path of its module. A matrix of gate and up together has none of its own: that of the experts, the expert's
    /// number and `gate_up_proj`.
    pub fn path(&self, map: MatrixId, naming: Naming) -> String {
        let family = self.checkpoint.family();
        let name = match map {
            MatrixId::Layer(layer, role) => family.tensor_name(Role::Layer(layer, role)),
            MatrixId::Expert { layer, expert, part } => match part {
                ExpertMatrix::Gate => family.expert_tensor_name(layer, ExpertTensor::Gate(expert)),
                ExpertMatrix::Up => family.expert_tensor_name(layer, ExpertTensor::Up(expert)),
                ExpertMatrix::Down => family.expert_tensor_name(layer, ExpertTensor::Down(expert)),
                ExpertMatrix::GateUp => format!("{}.{expert}.gate_up_proj", self.experts_path(layer, naming)),
            },
            MatrixId::Embedding => family.tensor_name(Role::Embedding),
            MatrixId::Head => family.tensor_name(Role::LmHead),
        };
        let path = name.strip_suffix(".weight").unwrap_or(&name);
        match naming {
            Naming::PerExpert => path.to_string(),
            Naming::Fused => modern(path, self.checkpoint),
        }
    }

    /// The path of the module that holds all routed experts of a layer.
    pub fn experts_path(&self, layer: usize, naming: Naming) -> String {
        let name = self.checkpoint.family().expert_tensor_name(layer, ExpertTensor::RaggedDown);
        let path = name.rsplit_once('.').map_or(name.as_str(), |(path, _)| path);
        match naming {
            Naming::PerExpert => path.to_string(),
            Naming::Fused => modern(path, self.checkpoint),
        }
    }

    /// The two parameters that hold all experts of a layer in transformers 5, and which map of each expert they are.
    pub fn fused_parameters(&self, layer: usize) -> [(ExpertMatrix, &'static str); 2] {
        let first = match trainable_tensors::is_gateless(self.checkpoint, layer) {
            true => (ExpertMatrix::Up, "up_proj"),
            false => (ExpertMatrix::GateUp, "gate_up_proj"),
        };
        [first, (ExpertMatrix::Down, "down_proj")]
    }

    /// Whether either matrix of the experts of a layer is a module of its own in transformers 5.
    pub fn expert_matrices_are_modules(&self) -> bool {
        self.checkpoint.family().expert_matrices_are_modules()
    }

    /// The module that has one of the [parameters](Self::fused_parameters) of a layer in transformers 5, and what the
    /// parameter is called there.
    pub fn fused_parameter(&self, layer: usize, part: ExpertMatrix) -> (String, &'static str) {
        let [first, second] = self.fused_parameters(layer);
        let (down, name) = (part == ExpertMatrix::Down, if part == ExpertMatrix::Down { second.1 } else { first.1 });
        if !self.expert_matrices_are_modules() {
            return (self.experts_path(layer, Naming::Fused), name);
        }
        let tensor = if down { ExpertTensor::FusedDown } else { ExpertTensor::FusedGateUp };
        let path = modern(&self.checkpoint.family().expert_tensor_name(layer, tensor), self.checkpoint);
        (path.strip_suffix(".weight").map_or(path.clone(), str::to_string), "weight")
    }

    /// The matrix of the routed experts of a layer that a module is in transformers 5, where it is one.
    pub fn find_expert_matrix(&self, path: &str) -> Option<(usize, ExpertMatrix)> {
        if !self.expert_matrices_are_modules() {
            return None;
        }
        let layers = self.checkpoint.shape().layers.iter().map(|layer| layer.layer);
        let parts = |layer| self.fused_parameters(layer).map(|(part, _)| (layer, part));
        layers.flat_map(parts).find(|(layer, part)| self.fused_parameter(*layer, *part).0 == path)
    }

    /// The map of a module, by any of its names.
    pub fn find(&self, path: &str) -> Option<MatrixId> {
        self.by_path.get(path).copied()
    }

    /// The layer whose routed experts a module holds, by any of its names.
    pub fn find_experts(&self, path: &str) -> Option<usize> {
        self.experts.get(path).copied()
    }

    /// Whether stock runtimes store the fused experts transposed, `[E, in, out]`, with gate and up columns alternating.
    pub fn is_transposed(&self) -> bool {
        self.checkpoint.family().stock_layout() == ExpertLayout::Interleaved
    }

    fn shape(&self, role: Role) -> Option<[usize; 2]> {
        <[usize; 2]>::try_from(self.checkpoint.plain_role(role).ok()?.shape.as_slice()).ok()
    }
}

//! The linear maps and vectors of a checkpoint that can be trained, and the tensors they are made of.

use moe_checkpoint::{Checkpoint, ExpertPart, ExpertWeights, LayerRole, Role};
use moe_core::adapters::{Depth, ExpertSite, LayerSite, Site};

use crate::Result;

/// A linear map of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which map.
    pub site: Site,
    /// `[out, in]`.
    pub dims: [usize; 2],
}

/// A vector of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VectorPlace {
    /// Which tensor.
    pub role: Role,
    /// Its length.
    pub len: usize,
    /// Where in the model it is.
    pub depth: Depth,
    /// Whether it is the weight or bias of a norm, rather than the bias of a linear map.
    pub norm: bool,
}

/// Vectors of a layer: which, whether of a norm, whether in the attention half.
const VECTORS: [(LayerRole, bool, bool); 21] = [
    (LayerRole::AttentionNorm, true, true),
    (LayerRole::AttentionNormBias, true, true),
    (LayerRole::QueryNorm, true, true),
    (LayerRole::KeyNorm, true, true),
    (LayerRole::LatentQueryNorm, true, true),
    (LayerRole::LatentKvNorm, true, true),
    (LayerRole::QueryBias, false, true),
    (LayerRole::KeyBias, false, true),
    (LayerRole::ValueBias, false, true),
    (LayerRole::OutputBias, false, true),
    (LayerRole::LatentQueryDownBias, false, true),
    (LayerRole::LatentKvDownBias, false, true),
    (LayerRole::FfnNorm, true, false),
    (LayerRole::FfnNormBias, true, false),
    (LayerRole::RouterBias, false, false),
    (LayerRole::AttentionOutputNorm, true, true),
    (LayerRole::FfnOutputNorm, true, false),
    (LayerRole::SharedNorm, true, false),
    (LayerRole::SharedOutputNorm, true, false),
    (LayerRole::ExpertsOutputNorm, true, false),
    (LayerRole::LayerInputOutputNorm, true, false),
];

/// The tensors of a layer's map, in the order of its rows: up alone of a block without a gate.
pub fn roles(checkpoint: &Checkpoint, layer: usize, site: LayerSite) -> impl Iterator<Item = Role> {
    let there = |role: &LayerRole| checkpoint.role(Role::Layer(layer, *role)).is_ok();
    let all = match site.roles() {
        [gate, up] if !there(gate) && there(up) => &site.roles()[1..],
        all => all,
    };
    all.iter().map(move |role| Role::Layer(layer, *role))
}

/// The parts of an expert's map, in the order of its rows: up alone of an expert without a gate.
pub fn expert_parts(checkpoint: &Checkpoint, layer: usize, map: ExpertSite) -> &'static [ExpertPart] {
    match map {
        ExpertSite::GateUp if is_gateless(checkpoint, layer) => &[ExpertPart::Up],
        map => map.parts(),
    }
}

/// Whether the routed experts of a layer have no gate.
pub fn is_gateless(checkpoint: &Checkpoint, layer: usize) -> bool {
    checkpoint.config().moe(layer).is_some_and(|moe| moe.gateless)
}

/// All linear maps of a checkpoint but embeddings and head: layer by layer, those of routed experts last.
pub fn linear_maps(checkpoint: &Checkpoint) -> Vec<Place> {
    let config = checkpoint.config();
    let mut places = Vec::new();
    for layer in 0..config.layers.len() {
        for site in LayerSite::ALL {
            let shape = |role| <[usize; 2]>::try_from(&checkpoint.plain_role(role).ok()?.shape[..]).ok();
            let shapes: Option<Vec<[usize; 2]>> = roles(checkpoint, layer, site).map(shape).collect();
            if let Some(shapes) = shapes {
                let dims = [shapes.iter().map(|shape| shape[0]).sum(), shapes[0][1]];
                places.push(Place { site: Site::Layer(layer, site), dims });
            }
        }
        let Some(moe) = config.moe(layer) else { continue };
        for (expert, &width) in moe.widths.iter().enumerate() {
            let (hidden, parts) = (config.expert_hidden_size(), if moe.gateless { 1 } else { 2 });
            for (map, dims) in [(ExpertSite::GateUp, [parts * width, hidden]), (ExpertSite::Down, [hidden, width])] {
                places.push(Place { site: Site::Expert { layer, expert, map }, dims });
            }
        }
    }
    places
}

/// `[rows, columns]` of the embeddings, and of the output head where it is another tensor.
///
/// # Errors
/// What keeps their shapes from being found.
pub fn vocabulary(checkpoint: &Checkpoint) -> Result<Vec<[usize; 2]>> {
    let (embeddings, head) = (checkpoint.plain_role(Role::Embedding)?, checkpoint.plain_role(Role::LmHead)?);
    let different = (head.name != embeddings.name).then_some(head);
    let shape = |info: &moe_checkpoint::TensorInfo| <[usize; 2]>::try_from(&info.shape[..]).ok();
    Ok(std::iter::once(embeddings).chain(different).filter_map(shape).collect())
}

/// All vectors of a checkpoint that can be trained: weights and biases of norms, biases of linear maps. Not among them
/// are the biases of routed experts, the sinks of attention and what is added to router scores for the selection.
pub fn vectors(checkpoint: &Checkpoint) -> Vec<VectorPlace> {
    let mut vectors = Vec::new();
    let mut add = |role: Role, depth: Depth, norm: bool| {
        if let Ok(info) = checkpoint.plain_role(role) {
            vectors.push(VectorPlace { role, len: info.shape.iter().product(), depth, norm });
        }
    };
    let config = checkpoint.config();
    for layer in 0..config.layers.len() {
        for (role, norm, attention) in VECTORS {
            let depth = if attention { Depth::Attention(layer) } else { Depth::FeedForward(layer) };
            add(Role::Layer(layer, role), depth, norm);
        }
    }
    add(Role::FinalNorm, Depth::Head, true);
    add(Role::FinalNormBias, Depth::Head, true);
    vectors
}

/// The weight of a linear map `[out, in]`, row-major.
///
/// # Errors
/// What keeps it from being read.
pub fn read(checkpoint: &Checkpoint, site: Site) -> Result<Vec<f32>> {
    match site {
        Site::Layer(layer, site) => {
            let mut values = Vec::new();
            for role in roles(checkpoint, layer, site) {
                values.extend(checkpoint.read_f32(role)?);
            }
            Ok(values)
        }
        Site::Expert { layer, expert, map } => {
            let ExpertWeights { mut gate, up, down, .. } = checkpoint.expert(layer, expert)?;
            Ok(match map {
                ExpertSite::GateUp if is_gateless(checkpoint, layer) => up,
                ExpertSite::GateUp => {
                    gate.extend_from_slice(&up);
                    gate
                }
                ExpertSite::Down => down,
            })
        }
    }
}

//! Layers that predict further tokens: kept, dropped or pruned alike, by choice.

use std::collections::BTreeSet;

use moe_checkpoint::{Checkpoint, Dtype, ExpertBiases, ExpertLayout, ExpertPart, Mtp, RawMatrix};

use super::fine_grained::best_blocks;
use super::further::{FurtherLayer, layer_prefix};
use super::target::{Target, TargetLayer, TargetSet};
use super::{PruneForm, PruneOptions};
use crate::plan::LayerKept;
use crate::{PrunePlan, Result};

/// Whether a form gives the config one width and one number of experts.
fn is_structural(form: &PruneForm<'_>) -> bool {
    matches!(form, PruneForm::Uniform | PruneForm::FineGrained(_))
}

/// Refuses a choice for multi-token prediction that a plan which changes anything cannot carry out.
///
/// # Errors
/// [`Error::Export`](crate::Error::Export) for a checkpoint that has such tensors and no choice, or where they cannot
/// stay or be pruned.
pub(super) fn check(from: &Checkpoint, options: &PruneOptions<'_>) -> Result<()> {
    choice(from, options, false).map(drop)
}

/// What is to be done.
enum Choice {
    /// There is nothing to choose.
    None,
    /// These tensors go.
    Drop(Vec<String>),
    /// The experts of these layers are pruned.
    Prune(Vec<FurtherLayer>),
}

/// The choice, if it can be; `unchanged` says whether the plan leaves widths and numbers of experts as they are.
fn choice(from: &Checkpoint, options: &PruneOptions<'_>, unchanged: bool) -> Result<Choice> {
    let names: Vec<&str> = from.mtp_tensors().map(|info| info.name.as_str()).collect();
    let Some(first) = names.first() else { return Ok(Choice::None) };
    let refuse = |reason: String| Err(options.form.refused(reason));
    let what = format!("the checkpoint has {} tensors of multi-token prediction, e.g. `{first}`", names.len());
    match options.mtp {
        None => refuse(format!("{what}; choose whether they are kept, dropped or pruned")),
        Some(Mtp::Drop) => Ok(Choice::Drop(names.into_iter().map(String::from).collect())),
        Some(Mtp::Keep) => {
            let experts = names.iter().any(|name| name.contains(".experts."));
            // Ragged and masked forms leave the width and the number of experts in the config as they were.
            if is_structural(&options.form) && experts && !unchanged {
                return refuse(format!(
                    "{what}; their experts keep their width and number, but the config has one for all experts: \
                     prune or drop them, or export as ragged or masked"
                ));
            }
            Ok(Choice::None)
        }
        Some(Mtp::Prune) => {
            let layers =
                further_layers(from, &names).map_err(|reason| options.form.refused(format!("{what}; {reason}")))?;
            if !layers.is_empty() && !is_structural(&options.form) {
                return refuse(format!(
                    "{what}; this export leaves the width and the number of experts in the config as they were, so that \
                     their experts stay as they are: keep them"
                ));
            }
            Ok(Choice::Prune(layers))
        }
    }
}

/// Carries out the choice for multi-token prediction.
///
/// # Errors
/// Those of [`check`]; weights that cannot be read.
pub(super) fn settle(
    plan: &PrunePlan,
    from: &Checkpoint,
    options: &PruneOptions<'_>,
    target: &mut Target,
) -> Result<()> {
    let unchanged = from.shape().layers.iter().zip(&target.layers).all(|(old, new)| old.widths == new.widths());
    match choice(from, options, unchanged)? {
        Choice::None => {}
        Choice::Drop(names) => {
            target.dropped.extend(names);
            from.drop_mtp_layers(&mut target.config);
        }
        Choice::Prune(layers) => {
            for further in layers {
                let layer = prune(plan, from, options, target, further)?;
                target.layers.push(layer);
            }
        }
    }
    Ok(())
}

/// The layers among tensors of multi-token prediction that have routed experts, or why they cannot be pruned.
fn further_layers(from: &Checkpoint, names: &[&str]) -> Result<Vec<FurtherLayer>, String> {
    let hidden = from.shape().hidden_size;
    let of_experts = |name: &&&str| name.contains(".experts.") && !from.is_scale(name);
    let mut prefixes = BTreeSet::new();
    for name in names.iter().filter(of_experts) {
        let prefix = layer_prefix(name);
        prefixes.insert(prefix.ok_or_else(|| format!("the layer of `{name}` cannot be told by its name"))?);
    }
    if prefixes.is_empty() {
        return Ok(Vec::new());
    }
    let widths = match (from.shape().uniform_width(), from.shape().layers.first()) {
        (Some(_), Some(layer)) if !from.ragged() => layer.widths.clone(),
        _ => return Err("the experts of its decoder do not have one width, with which theirs would compare".into()),
    };
    let mut layers = Vec::with_capacity(prefixes.len());
    for prefix in prefixes {
        let readable = |layout: ExpertLayout| {
            let layer = FurtherLayer { prefix: prefix.to_string(), layout, widths: widths.clone() };
            let tensors = layout.tensors(hidden, &widths, ExpertBiases::None)?;
            let found = tensors.iter().all(|tensor| {
                let info = from.info(&layer.expert_tensor_name(from, tensor.tensor));
                info.is_ok_and(|info| info.shape == tensor.shape)
                    && from
                        .plain_dtype(&layer.expert_tensor_name(from, tensor.tensor))
                        .is_ok_and(|dtype| matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16))
            });
            let count = names.iter().filter(of_experts).filter(|name| name.starts_with(prefix)).count();
            (found && count == tensors.len()).then_some(layer)
        };
        let layer = [ExpertLayout::PerExpert, ExpertLayout::Fused].into_iter().find_map(readable);
        layers.push(layer.ok_or_else(|| {
            format!(
                "the experts of `{}` are not the {} of width {} that the decoder's layers have, one by one or fused",
                prefix.trim_end_matches('.'),
                widths.len(),
                widths[0]
            )
        })?);
    }
    Ok(layers)
}

/// A further layer with as many experts of the same width as the decoder's layers get, by magnitude.
fn prune(
    plan: &PrunePlan,
    from: &Checkpoint,
    options: &PruneOptions<'_>,
    target: &Target,
    further: FurtherLayer,
) -> Result<TargetLayer> {
    let mut scores = Vec::with_capacity(further.widths.len());
    for expert in 0..further.widths.len() {
        let [gate, up, down] = ExpertPart::ALL.map(|part| further.part(from, expert, part));
        scores.push(magnitude(&gate?, &up?, &down?));
        further.release(from, expert);
    }
    // All layers of these forms have the same, and there is an MoE layer.
    let count = target.layers.first().map_or(0, |layer| layer.rows.len());
    let width = target.layers.first().and_then(|layer| layer.sets.first()).map_or(0, |set| set.width);
    let groups = from.config().routing.groups().map_or(1, |groups| groups.count);
    let mut correction_factor = 1.0;
    let (rows, sets) = match &options.form {
        PruneForm::FineGrained(how) => {
            // The ranking and the factors are those of the decoder's layers.
            let how = super::FineGrained { ranking: None, scales: None, ..*how };
            let map = how.map(plan, from)?;
            correction_factor = map.correction_factor;
            let kept = LayerKept {
                layer: from.config().layers.len(),
                experts: best_blocks(&scores, map.width, groups, count / groups),
                removed: Vec::new(),
            };
            let pieces = how.layer(&kept, map.width, &from.config().routing)?;
            how.sets(&kept, &pieces, &map, width, None)
        }
        _ => {
            // Whole experts by their sums, then the best units of each.
            let sums: Vec<Vec<f32>> = scores.iter().map(|units| vec![units.iter().sum()]).collect();
            let whole = best_blocks(&sums, 1, groups, count / groups);
            let rows: Vec<usize> = (0..whole.len()).filter(|expert| !whole[*expert].is_empty()).collect();
            let set = |expert: &usize| {
                TargetSet::of(*expert, best_blocks(&scores[*expert..=*expert], width, 1, 1).swap_remove(0))
            };
            let sets = rows.iter().map(set).collect();
            (rows, sets)
        }
    };
    let layout = further.layout;
    Ok(TargetLayer {
        layer: from.config().layers.len(),
        further: Some(further),
        layout,
        biases: ExpertBiases::None,
        rows,
        sharing: None,
        sets,
        zero: false,
        correction_factor,
    })
}

/// Product of the norms of every unit's gate row, up row and down column: what it gives is proportional to each of
/// them, apart from the bend of the activation.
fn magnitude(gate: &RawMatrix<'_>, up: &RawMatrix<'_>, down: &RawMatrix<'_>) -> Vec<f32> {
    let norm = |values: &mut dyn Iterator<Item = f32>| {
        values.map(|value| f64::from(value) * f64::from(value)).sum::<f64>().sqrt()
    };
    let (hidden, width) = (gate.cols, gate.rows);
    let [gate, up, down] = [gate, up, down].map(|matrix| matrix.to_f32());
    let unit = |unit: usize| {
        let row = unit * hidden..(unit + 1) * hidden;
        let gate = norm(&mut gate[row.clone()].iter().copied());
        let up = norm(&mut up[row].iter().copied());
        let down = norm(&mut down.iter().skip(unit).step_by(width).copied());
        (gate * up * down) as f32
    };
    (0..width).map(unit).collect()
}

//! Steps that the ranks of a group take together.
//!
//! Of the waves of a step each rank runs others. A wave's gradient goes, parameter by parameter, to the rank that owns
//! the parameter, which adds the waves in the order of the batch, takes the step, and sends the values to all. Nothing
//! is added in another order than by one process, so that the values have the same bits for any number of ranks; and
//! each rank keeps the moments of its own parameters alone.

use std::collections::BTreeMap;

use moe_checkpoint::group::{Group, pack, unpack};
use serde::{Deserialize, Serialize};

use super::{BatchLoss, OptimizerState, Parameters, StateArray, TrainingTask};
use crate::data::Wave;
use crate::error::{Error, Result};

/// The owner of each parameter, in the order of their names: the largest first, each to the rank that has least.
fn owners(parameters: &Parameters, ranks: usize) -> Vec<usize> {
    let lens: Vec<usize> = parameters.iter().map(|(_, parameter)| parameter.len()).collect();
    let mut order: Vec<usize> = (0..lens.len()).collect();
    order.sort_by_key(|index| std::cmp::Reverse(lens[*index]));
    let (mut owned, mut owners) = (vec![0; ranks], vec![0; lens.len()]);
    for index in order {
        let least = (0..ranks).min_by_key(|rank| owned[*rank]).unwrap_or(0);
        owned[least] += lens[index];
        owners[index] = least;
    }
    owners
}

/// Values of one parameter in a message: its place in the order of names, then the values.
fn entry(into: &mut Vec<u8>, index: usize, values: &[f32]) {
    let bytes = bytemuck::cast_slice::<f32, u8>(values);
    into.reserve(16 + bytes.len());
    into.extend(((8 + bytes.len()) as u64).to_le_bytes());
    into.extend((index as u64).to_le_bytes());
    into.extend(bytes);
}

/// What [`entry`] wrote.
fn entries(message: &[u8]) -> Result<Vec<(usize, Vec<f32>)>> {
    let entries = unpack(message)?.into_iter().map(|entry| {
        let (index, values) = entry.split_first_chunk::<8>()?;
        Some((u64::from_le_bytes(*index) as usize, bytemuck::pod_collect_to_vec::<u8, f32>(values)))
    });
    entries.collect::<Option<_>>().ok_or_else(|| Error::input("values from another rank", "less", "whole entries"))
}

/// Accumulates the gradients of the waves of a step, each by itself and then in their order, and gives their losses.
/// After a loss that is not finite there are no more. In a group each rank is left with the gradients of its own
/// parameters.
pub(super) fn accumulate(
    group: &dyn Group,
    task: &mut dyn TrainingTask,
    parameters: &mut Parameters,
    batch: &[&Wave],
) -> Result<Vec<BatchLoss>> {
    let mut sums = BTreeMap::new();
    let mut losses: Vec<BatchLoss> = Vec::with_capacity(batch.len());
    let owners = owners(parameters, group.size());
    for round in batch.chunks(group.size()) {
        let own = round.get(group.rank());
        let own = own.map(|wave| task.accumulate(wave, parameters)).transpose()?;
        parameters.check_returned()?;
        if group.size() == 1 {
            parameters.drain_gradients(&mut sums);
            losses.extend(own);
        } else {
            let mut own_gradients = BTreeMap::new();
            parameters.drain_gradients(&mut own_gradients);
            let mut to = vec![Vec::new(); group.size()];
            for (index, gradient) in own_gradients {
                entry(&mut to[owners[index]], index, &gradient);
            }
            for message in group.exchange(to)? {
                for (index, gradient) in entries(&message)? {
                    super::parameters::add_gradient(&mut sums, index, gradient);
                }
            }
            let own =
                own.map(|BatchLoss { loss, tokens }| [loss.to_le_bytes(), (tokens as u64).to_le_bytes()].concat());
            for message in group.share(own.unwrap_or_default())?.iter().take(round.len()) {
                let (loss, tokens) = message.split_at_checked(8).unwrap_or_default();
                let (Ok(loss), Ok(tokens)) = (loss.try_into(), tokens.try_into()) else {
                    return Err(Error::input("loss from another rank", message.len(), "16 bytes"));
                };
                let (loss, tokens) = (f64::from_le_bytes(loss), u64::from_le_bytes(tokens) as usize);
                losses.push(BatchLoss { loss, tokens });
            }
        }
        if losses.iter().any(|loss| !loss.loss.is_finite()) {
            break;
        }
    }
    parameters.set_gradients(sums);
    Ok(losses)
}

/// The norm of the gradients of all ranks together, as [`Parameters::gradient_norm`].
pub(super) fn gradient_norm(group: &dyn Group, parameters: &Parameters) -> Result<f64> {
    let own = parameters.gradient_squares();
    if group.size() == 1 {
        return Ok(own.iter().sum::<f64>().sqrt());
    }
    let owners = owners(parameters, group.size());
    let all = group.share(own.iter().flat_map(|square| square.to_le_bytes()).collect())?;
    let of = |(index, owner): (usize, &usize)| {
        let bytes = all[*owner].get(8 * index..8 * index + 8)?;
        Some(f64::from_le_bytes(bytes.try_into().ok()?))
    };
    let squares: Option<Vec<f64>> = owners.iter().enumerate().map(of).collect();
    let squares =
        squares.ok_or_else(|| Error::input("gradient norms from another rank", "fewer", "one per parameter"))?;
    Ok(squares.iter().sum::<f64>().sqrt())
}

/// The parameters that the next step changes here, by their place.
pub(super) fn about_to_change(group: &dyn Group, parameters: &Parameters) -> Vec<usize> {
    match group.size() {
        1 => Vec::new(),
        _ => parameters.iter().enumerate().filter(|(_, (_, p))| !p.gradient().is_empty()).map(|(i, _)| i).collect(),
    }
}

/// Gives every rank the values that the others have stepped.
pub(super) fn gather_values(group: &dyn Group, parameters: &mut Parameters, changed: &[usize]) -> Result<()> {
    if group.size() == 1 {
        return Ok(());
    }
    let mut message = Vec::new();
    let mut changed = changed.iter().peekable();
    for (index, (_, parameter)) in parameters.iter().enumerate() {
        if changed.next_if(|next| **next == index).is_some() {
            entry(&mut message, index, &parameter.values);
        }
    }
    let mut new = BTreeMap::new();
    for (rank, message) in group.share(message)?.iter().enumerate().filter(|(rank, _)| *rank != group.rank()) {
        for (index, values) in entries(message)? {
            if new.insert(index, values).is_some() {
                return Err(Error::input(format!("values from rank {rank}"), "some twice", "those of its parameters"));
            }
        }
    }
    parameters.set_values(new)
}

/// What of an optimizer's state stands before the values of its arrays.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateMeta {
    steps: u64,
    scalars: BTreeMap<String, u64>,
    arrays: BTreeMap<String, Vec<usize>>,
}

/// Brings what the optimizer remembers of all parameters to rank 0, where a state is saved; until
/// [`keep_own_states`].
pub(super) fn gather_states(group: &dyn Group, parameters: &mut Parameters) -> Result<()> {
    if group.size() == 1 {
        return Ok(());
    }
    let not_json = |error: serde_json::Error| Error::input("optimizer state from another rank", error, "JSON");
    let owners = owners(parameters, group.size());
    let mut parts: Vec<Vec<u8>> = Vec::new();
    let owned = parameters.iter().zip(&owners).filter(|(_, owner)| **owner == group.rank() && group.rank() > 0);
    for ((_, parameter), _) in owned {
        let OptimizerState { steps, arrays, scalars } = parameter.state();
        let shapes = arrays.iter().map(|(name, array)| (name.clone(), array.shape.clone())).collect();
        let meta = StateMeta { steps: *steps, scalars: scalars.clone(), arrays: shapes };
        parts.push(serde_json::to_vec(&meta).map_err(not_json)?);
        parts.push(arrays.values().flat_map(|array| bytemuck::cast_slice::<f32, u8>(&array.values)).copied().collect());
    }
    let all = group.gather(0, pack(parts.iter().map(Vec::as_slice)))?;
    let mut messages = all.iter().map(|message| Ok(unpack(message)?.into_iter())).collect::<Result<Vec<_>>>()?;
    if messages.is_empty() {
        return Ok(());
    }
    for ((_, parameter), owner) in parameters.all_mut().zip(&owners).filter(|(_, owner)| **owner > 0) {
        let (Some(meta), Some(values)) = (messages[*owner].next(), messages[*owner].next()) else {
            return Err(Error::input(format!("optimizer states from rank {owner}"), "too few", "one per parameter"));
        };
        let meta: StateMeta = serde_json::from_slice(meta).map_err(not_json)?;
        let mut values = bytemuck::pod_collect_to_vec::<u8, f32>(values).into_iter();
        let arrays = meta.arrays.into_iter().map(|(name, shape)| {
            let values = values.by_ref().take(shape.iter().product()).collect();
            (name, StateArray { shape, values })
        });
        parameter.state = OptimizerState { steps: meta.steps, arrays: arrays.collect(), scalars: meta.scalars };
    }
    Ok(())
}

/// Forgets what the optimizer remembers of the parameters of other ranks.
pub(super) fn keep_own_states(group: &dyn Group, parameters: &mut Parameters) {
    let owners = owners(parameters, group.size());
    for ((_, parameter), _) in parameters.all_mut().zip(owners).filter(|(_, owner)| *owner != group.rank()) {
        parameter.state = OptimizerState::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_shared_out_by_size() {
        let mut parameters = Parameters::new();
        for (name, len) in [("a", 7), ("b", 1), ("c", 5), ("d", 3), ("e", 0)] {
            parameters.insert(name, vec![0.0; len]);
        }
        assert_eq!(owners(&parameters, 1), [0; 5]);
        assert_eq!(owners(&parameters, 2), [0, 0, 1, 1, 0], "8 and 8 values");
        assert!(owners(&parameters, 9).iter().all(|owner| *owner < 9));
    }

    #[test]
    fn values_in_messages_keep_their_bits() {
        let values = [f32::NAN, -0.0, 1.0e-42, f32::MAX];
        let mut message = Vec::new();
        entry(&mut message, 3, &values);
        entry(&mut message, 5, &[]);
        let read = entries(&message).unwrap();
        assert_eq!((read[0].0, read[1].0, read[1].1.len()), (3, 5, 0));
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&read[0].1), bits(&values));
        assert!(entries(&message[..message.len() - 1]).is_err());
    }
}

//! Edits of experts, as messages between the ranks of a group.

use moe_checkpoint::group::{Group, pack, unpack};

use crate::{Edits, Error, ExpertEdit, Result};

/// The recipe and the edits of experts.
pub(super) fn to_message(edits: &Edits) -> Vec<u8> {
    let mut parts = vec![edits.recipe.to_string().into_bytes()];
    for ((layer, expert), edit) in edits.experts() {
        let place = [layer as u64, expert as u64];
        // What is not there has no values.
        let values = |values: &Option<Vec<f32>>| bytemuck::cast_slice(values.as_deref().unwrap_or_default()).to_vec();
        let parts_of_edit = [bytemuck::cast_slice(&place).to_vec(), values(&edit.down), values(&edit.down_bias)];
        parts.push(pack(parts_of_edit.iter().map(Vec::as_slice)));
    }
    pack(parts.iter().map(Vec::as_slice))
}

/// What [`to_message`] wrote.
pub(super) fn from_message(message: &[u8]) -> Result<Edits> {
    let bad = || Error::invalid_edits(format!("found {} bytes from another rank, expected edits", message.len()));
    let mut edits = Edits::new();
    let parts = unpack(message)?;
    let (recipe, experts) = parts.split_first().ok_or_else(bad)?;
    edits.recipe = serde_json::from_slice(recipe).map_err(|_| bad())?;
    for part in experts {
        let [place, down, bias] = unpack(part)?[..] else { return Err(bad()) };
        let [layer, expert] = bytemuck::pod_collect_to_vec::<u8, u64>(place)[..] else { return Err(bad()) };
        let values = |bytes: &[u8]| (!bytes.is_empty()).then(|| bytemuck::pod_collect_to_vec::<u8, f32>(bytes));
        let edit = ExpertEdit { down: values(down), down_bias: values(bias) };
        edits.set_expert(layer as usize, expert as usize, edit);
    }
    Ok(edits)
}

/// The edits that all ranks have, on every rank.
pub(super) fn shared(group: &dyn Group, own: Edits) -> Result<Edits> {
    if group.size() == 1 {
        return Ok(own);
    }
    let mut all = Edits::new();
    for message in group.share(to_message(&own))? {
        all.extend(from_message(&message)?);
    }
    Ok(all)
}

/// What the first rank has, on every rank.
pub(super) fn of_first(group: &dyn Group, own: Option<Edits>) -> Result<Option<Edits>> {
    if group.size() == 1 {
        return Ok(own);
    }
    let message = group.broadcast(0, own.as_ref().map(to_message).unwrap_or_default())?;
    Ok(if message.is_empty() { None } else { Some(from_message(&message)?) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_come_over_as_they_are() {
        let mut edits = Edits::new();
        edits.recipe = serde_json::json!({ "before": 1.5 });
        edits.set_expert(3, 1, ExpertEdit { down: Some(vec![0.5, -1.0]), down_bias: None });
        edits.set_expert(4, 0, ExpertEdit { down: None, down_bias: Some(vec![2.0]) });
        assert_eq!(from_message(&to_message(&edits)).unwrap(), edits);
        assert!(from_message(&to_message(&edits)[1..]).is_err());
        assert!(from_message(&[]).is_err());
    }
}

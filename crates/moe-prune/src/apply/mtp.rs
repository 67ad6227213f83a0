//! Layers that predict further tokens: kept or dropped, by choice.

use moe_checkpoint::Checkpoint;
use serde_json::{Value, json};

use super::{ApplyOptions, Export, Mtp, Target};
use crate::{Error, Result};

/// Config keys of the number of those layers.
const KEYS: [&str; 3] = ["num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers"];

/// Carries out the choice for multi-token prediction.
///
/// # Errors
/// [`Error::Export`] for a checkpoint that has such tensors and no choice, or where they cannot stay.
pub(crate) fn settle(from: &Checkpoint, options: &ApplyOptions<'_>, target: &mut Target<'_>) -> Result<()> {
    let names: Vec<&str> = from.mtp_tensors().map(|info| info.name.as_str()).collect();
    let Some(first) = names.first() else { return Ok(()) };
    let refuse = |reason: String| Err(Error::Export { mode: options.mode.name(), reason });
    let what = format!("the checkpoint has {} tensors of multi-token prediction, e.g. `{first}`", names.len());
    match options.mtp {
        None => refuse(format!("{what}; choose whether they are kept or dropped")),
        Some(Mtp::Drop) => {
            target.dropped.extend(names.into_iter().map(String::from));
            let text = from.family().text_key().filter(|key| target.config.get(key).is_some());
            let config = match text {
                Some(key) => &mut target.config[key],
                None => &mut target.config,
            };
            if let Value::Object(map) = config {
                for key in KEYS.into_iter().filter(|key| map.contains_key(*key)).collect::<Vec<_>>() {
                    map.insert(key.to_string(), json!(0));
                }
            }
            Ok(())
        }
        Some(Mtp::Keep) => {
            let experts = names.iter().any(|name| name.contains(".experts."));
            // Ragged and masked exports leave the width and the number of experts in the config as they were.
            let unchanged = from.shape().layers.iter().zip(&target.layers).all(|(old, new)| old.widths == new.widths());
            if options.mode == Export::Uniform && experts && !unchanged {
                return refuse(format!(
                    "{what}; their experts keep their width and number, but the config has one for all experts: drop \
                     them, or export as ragged or masked"
                ));
            }
            Ok(())
        }
    }
}

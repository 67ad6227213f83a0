//! Layers that predict further tokens: kept or dropped, by choice.

use std::collections::BTreeSet;

use moe_checkpoint::Checkpoint;
use moe_checkpoint::Mtp;
use serde_json::{Value, json};

use super::target::Target;
use super::{MergeOptions, OutputForm};
use crate::{Error, Result};

/// Config keys of the number of those layers.
const KEYS: [&str; 3] = ["num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers"];

/// Carries out the choice for multi-token prediction: the config, and the tensors that are left out.
///
/// # Errors
/// [`Error::Output`] for a checkpoint that has such tensors and no choice, or where they cannot stay.
pub(crate) fn mtp(from: &Checkpoint, options: &MergeOptions<'_>, target: &Target) -> Result<(Value, BTreeSet<String>)> {
    let mut config = target.config.clone();
    let names: BTreeSet<String> = from.mtp_tensors().map(|info| info.name.clone()).collect();
    let Some(first) = names.first() else { return Ok((config, names)) };
    let refuse = |reason: &str| {
        let what = format!("the checkpoint has {} tensors of multi-token prediction, e.g. `{first}`", names.len());
        Err(Error::Output { form: options.form.name(), reason: format!("{what}; {reason}") })
    };
    match options.mtp {
        Some(Mtp::Drop) => {
            let key = from.family().text_key().filter(|key| config.get(key).is_some());
            let text = match key {
                Some(key) => config.get_mut(key),
                None => Some(&mut config),
            };
            if let Some(Value::Object(map)) = text {
                for key in KEYS.into_iter().filter(|key| map.contains_key(*key)).collect::<Vec<_>>() {
                    map.insert(key.to_string(), json!(0));
                }
            }
            Ok((config, names))
        }
        Some(Mtp::Keep) => {
            let experts = names.iter().any(|name| name.contains(".experts."));
            if options.form == OutputForm::Stock && experts && target.config != *from.raw_config() {
                return refuse("their experts keep their number, but the config has one for all layers: drop them");
            }
            Ok((config, BTreeSet::new()))
        }
        _ => refuse("choose whether they are kept or dropped"),
    }
}

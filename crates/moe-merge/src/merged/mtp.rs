//! Layers that predict further tokens: kept or dropped, by choice.

use std::collections::BTreeSet;

use moe_checkpoint::{Checkpoint, Mtp};

use super::OutputForm;
use crate::{Error, Result};

/// The choice for multi-token prediction, checked: the names of the tensors that are left out. `renumbers` says whether
/// the config will give another number of experts than it does.
///
/// # Errors
/// [`Error::Output`] for a checkpoint that has such tensors and no choice, or where they cannot stay.
pub(super) fn dropped(
    from: &Checkpoint,
    form: OutputForm,
    mtp: Option<Mtp>,
    renumbers: bool,
) -> Result<BTreeSet<String>> {
    let names: BTreeSet<String> = from.mtp_tensors().map(|info| info.name.clone()).collect();
    let Some(first) = names.first() else { return Ok(names) };
    let refuse = |reason: &str| {
        let what = format!("the checkpoint has {} tensors of multi-token prediction, e.g. `{first}`", names.len());
        Err(Error::Output { form: form.name(), reason: format!("{what}; {reason}") })
    };
    match mtp {
        Some(Mtp::Drop) => Ok(names),
        Some(Mtp::Keep) => {
            let experts = names.iter().any(|name| name.contains(".experts."));
            if form == OutputForm::Stock && experts && renumbers {
                return refuse("their experts keep their number, but the config has one for all layers: drop them");
            }
            Ok(BTreeSet::new())
        }
        Some(Mtp::Prune) => refuse("merging has no way to prune them: keep or drop them"),
        None => refuse("choose whether they are kept or dropped"),
    }
}

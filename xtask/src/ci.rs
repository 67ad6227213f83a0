//! The checks of CI.

use std::process::Command;

use crate::{Result, root};

/// Runs `.ci/run`, which holds the steps, so that there is one list of them.
pub fn run(steps: &[String]) -> Result<()> {
    let script = root().join(".ci/run");
    let status = Command::new("bash").arg(&script).args(steps).status().map_err(crate::at(&script))?;
    match status.success() {
        true => Ok(()),
        false => Err("the checks failed".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_step_is_refused() {
        assert!(run(&["deploy".to_owned()]).is_err());
    }
}

//! Checks with tools of their own, which a release has to pass and every change need not: licenses and advisories of
//! dependencies, every feature by itself, spelling, packages, unsafe code under a sanitizer.

use std::process::{Command, Stdio};

use clap::Parser;

use crate::{Result, root};

/// A check, and the tool that does it.
struct Check {
    name: &'static str,
    /// Program and arguments.
    command: &'static [&'static str],
    /// Arguments that show whether the tool is there.
    version: &'static [&'static str],
    /// How to get the tool.
    install: &'static str,
}

const CHECKS: [Check; 5] = [
    Check {
        name: "deny",
        command: &["cargo", "deny", "--workspace", "check"],
        version: &["cargo", "deny", "--version"],
        install: "cargo install cargo-deny",
    },
    Check {
        name: "hack",
        command: &[
            "cargo",
            "hack",
            "check",
            "--workspace",
            "--each-feature",
            "--no-dev-deps",
            "--release",
            "--exclude-features",
            "cuda,mpi,vulkan,wgpu",
        ],
        version: &["cargo", "hack", "--version"],
        install: "cargo install cargo-hack",
    },
    Check {
        name: "typos",
        command: &["typos"],
        version: &["typos", "--version"],
        install: "cargo install typos-cli, or pip install typos",
    },
    Check {
        name: "package",
        command: &["cargo", "xtask", "package", "--allow-dirty"],
        version: &["cargo", "--version"],
        install: "rustup",
    },
    Check {
        name: "sanitize",
        command: &["cargo", "xtask", "sanitize"],
        version: &["cargo", "--version"],
        install: "rustup",
    },
];

/// Which checks are done.
#[derive(Debug, Parser)]
pub struct Options {
    /// Checks to do: deny, hack, typos, package, sanitize [default: all]
    checks: Vec<String>,
}

/// Runs the checks one after the other. A tool that is missing is an error that says how to get it.
pub fn run(options: &Options) -> Result<()> {
    if let Some(unknown) = options.checks.iter().find(|name| CHECKS.iter().all(|check| check.name != **name)) {
        let known: Vec<&str> = CHECKS.iter().map(|check| check.name).collect();
        return Err(format!("unknown check `{unknown}`; the checks are {}", known.join(", ")).into());
    }
    let asked = |check: &&Check| options.checks.is_empty() || options.checks.iter().any(|name| name == check.name);
    let mut failed = Vec::new();
    for check in CHECKS.iter().filter(asked) {
        println!("── {}", check.name);
        if !there(check) {
            failed.push(format!("{}: its tool is missing: {}", check.name, check.install));
            continue;
        }
        let (program, arguments) = (check.command[0], &check.command[1..]);
        if !Command::new(program).args(arguments).current_dir(root()).status()?.success() {
            failed.push(format!("{}: failed", check.name));
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(failed.join("; ").into()) }
}

fn there(check: &Check) -> bool {
    let mut command = Command::new(check.version[0]);
    command.args(&check.version[1..]).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_check_is_refused_with_those_there_are() {
        let error = run(&Options { checks: vec!["semver".into()] }).unwrap_err().to_string();
        assert!(error.contains("semver") && error.contains("deny, hack, typos, package, sanitize"), "{error}");
    }

    #[test]
    fn a_missing_tool_is_told_from_one_that_is_there() {
        assert!(there(&CHECKS[3]));
        let missing = Check { name: "none", command: &["none"], version: &["moe-no-such-tool"], install: "" };
        assert!(!there(&missing));
    }
}

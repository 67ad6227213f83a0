//! The packages as a registry would get them, and how large they are.

use std::fs;
use std::process::{Command, Stdio};

use clap::Parser;
use serde_json::Value;

use crate::{Result, at, root};

/// Bytes of a package that crates.io takes, at most.
const LARGEST: u64 = 10 << 20;
/// How packages are made.
#[derive(Debug, Parser)]
pub struct Options {
    /// Build each of these from its package as well; repeatable. Their dependencies are built anew, Burn too where they
    /// have it
    #[arg(long, value_name = "CRATE")]
    verify: Vec<String>,
    /// Take the tree as it is, changes that are not committed included
    #[arg(long)]
    allow_dirty: bool,
}

/// Packs every crate that is published, and refuses one that is too large.
pub fn run(options: &Options) -> Result<()> {
    let folder = root().join("target/package");
    if folder.exists() {
        for path in packages()? {
            fs::remove_file(&path).map_err(at(&path))?;
        }
    }
    let mut command = Command::new("cargo");
    command.current_dir(root()).args(["package", "--quiet", "--workspace", "--no-verify"]);
    command.args(unpublished()?.iter().flat_map(|name| ["--exclude", name]));
    done(command, options)?;
    let mut too_large = Vec::new();
    for path in packages()? {
        let size = fs::metadata(&path).map_err(at(&path))?.len();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        println!("{name:32} {:>6.2} MiB", size as f64 / (1 << 20) as f64);
        if size > LARGEST {
            too_large.push(name);
        }
    }
    if !too_large.is_empty() {
        return Err(format!("larger than the {} MiB of a registry: {}", LARGEST >> 20, too_large.join(", ")).into());
    }
    if !options.verify.is_empty() {
        let mut command = Command::new("cargo");
        command.current_dir(root()).args(["package", "--quiet"]);
        command.args(options.verify.iter().flat_map(|name| ["--package", name]));
        done(command, options)?;
        println!("built from their packages: {}", options.verify.join(", "));
    }
    Ok(())
}

/// Members of the workspace that say `publish = false`.
fn unpublished() -> Result<Vec<String>> {
    let mut command = Command::new("cargo");
    command.current_dir(root()).args(["metadata", "--no-deps", "--format-version", "1"]);
    let output = command.stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err("cargo metadata failed".into());
    }
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let members = metadata["packages"].as_array().into_iter().flatten();
    let unpublished = members.filter(|member| member["publish"].as_array().is_some_and(Vec::is_empty));
    Ok(unpublished.filter_map(|member| Some(member["name"].as_str()?.to_string())).collect())
}

fn done(mut command: Command, options: &Options) -> Result<()> {
    if options.allow_dirty {
        command.arg("--allow-dirty");
    }
    match command.status()?.success() {
        true => Ok(()),
        false => Err("cargo package failed".into()),
    }
}

/// The packages that were made, by name.
fn packages() -> Result<Vec<std::path::PathBuf>> {
    let folder = root().join("target/package");
    let entries = fs::read_dir(&folder).map_err(at(&folder))?;
    let mut found = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    found.retain(|path| path.extension().is_some_and(|extension| extension == "crate"));
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys of a manifest that a registry shows, or that people need who use the crate.
    const KEYS: [&str; 6] =
        ["description", "documentation", "readme", "keywords", "categories", "package.metadata.docs.rs"];

    #[test]
    fn crates_that_say_so_are_not_packed() {
        let mut names = unpublished().unwrap();
        names.sort();
        assert_eq!(names, ["moe-benches", "moe-examples", "moe-fuzz", "xtask"]);
    }

    #[test]
    fn every_published_crate_has_what_a_registry_shows() {
        let folder = root().join("crates");
        let mut keywords = Vec::new();
        for entry in fs::read_dir(&folder).unwrap() {
            let dir = entry.unwrap().path();
            let manifest = fs::read_to_string(dir.join("Cargo.toml")).unwrap();
            let name = dir.file_name().unwrap().to_str().unwrap().to_string();
            for key in KEYS {
                assert!(manifest.contains(key), "{name}: no {key}");
            }
            for inherited in ["version", "edition", "rust-version", "license", "repository"] {
                assert!(manifest.contains(&format!("{inherited}.workspace = true")), "{name}: {inherited}");
            }
            assert!(manifest.contains(&format!("documentation = \"https://docs.rs/{name}\"")), "{name}: its own pages");
            for file in ["README.md", "LICENSE-MIT", "LICENSE-APACHE"] {
                assert!(dir.join(file).exists(), "{name}: no {file}");
            }
            let own = manifest.lines().find(|line| line.starts_with("keywords")).unwrap().to_string();
            assert!(own.matches('"').count() == 10, "{name}: five keywords, {own}");
            assert!(!keywords.contains(&own), "{name}: keywords of its own, {own}");
            keywords.push(own);
            let categories = manifest.lines().find(|line| line.starts_with("categories")).unwrap();
            assert!(categories.contains('"'), "{name}: {categories}");
        }
        assert_eq!(keywords.len(), 10);
    }
}

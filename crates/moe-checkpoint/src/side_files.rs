//! The files of a model directory other than weights and config: tokenizer, generation config, chat template, licence.

use std::fs::{self, File};
use std::path::Path;

use crate::artefact_file::TEMPORARY_SUFFIX;
use crate::{Error, Result};

/// Extensions of files that are copied.
const EXTENSIONS: [&str; 7] = ["json", "txt", "model", "jinja", "py", "md", "tiktoken"];
/// Starts of the names of files that are copied whatever their extension.
const NAMES: [&str; 3] = ["LICENSE", "README", "NOTICE"];

/// Copies the side files of a model directory: tokenizer, generation config, chat template, code, licence. `config.json`,
/// weights and their indices are left out, as are hidden files and directories. Links are followed.
///
/// Returns the names, sorted.
///
/// # Errors
/// [`Error::Io`] with the file.
pub fn copy_side_files(from: &Path, to: &Path) -> Result<Vec<String>> {
    let list: std::io::Result<Vec<_>> = fs::read_dir(from).and_then(Iterator::collect);
    let mut names = Vec::new();
    for entry in list.map_err(|source| Error::io(from, source))? {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let path = entry.path();
        if is_side_file(&name) && path.is_file() {
            copy(&path, &to.join(&name), &to.join(format!("{name}{TEMPORARY_SUFFIX}")))?;
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn is_side_file(name: &str) -> bool {
    if name.starts_with('.') || name == "config.json" || name.ends_with(".index.json") {
        return false;
    }
    let extension = Path::new(name).extension().and_then(|extension| extension.to_str());
    NAMES.iter().any(|start| name.starts_with(start)) || extension.is_some_and(|e| EXTENSIONS.contains(&e))
}

fn copy(from: &Path, to: &Path, temporary: &Path) -> Result<()> {
    fs::copy(from, temporary).map_err(|source| Error::io(from, source))?;
    let finish = || -> std::io::Result<()> {
        File::open(temporary)?.sync_all()?;
        fs::rename(temporary, to)
    };
    finish().map_err(|source| Error::io(to, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_indices_and_the_config_stay_behind() {
        for name in [
            "tokenizer.json",
            "vocab.txt",
            "spiece.model",
            "chat_template.jinja",
            "modeling_x.py",
            "LICENSE",
            "README.md",
        ] {
            assert!(is_side_file(name), "{name}");
        }
        for name in [
            "config.json",
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            ".moe-resume.json",
        ] {
            assert!(!is_side_file(name), "{name}");
        }
    }
}

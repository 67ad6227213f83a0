//! The files of a model directory other than weights and config: tokenizer, generation config, chat template, license.

use std::fs::{self, File};
use std::path::Path;

use crate::artifact_file::TEMPORARY_SUFFIX;
use crate::{Error, Result};

/// Extensions of files that hold weights or states of training, in whatever format.
const WEIGHTS: [&str; 13] =
    ["safetensors", "bin", "pt", "pth", "ckpt", "gguf", "onnx", "h5", "msgpack", "npz", "npy", "partial", "lock"];
/// Folders within folders that are looked into.
const DEPTH: usize = 4;

/// Copies the side files of a model directory, folders included: tokenizer, generation config, chat templates, code,
/// license. `config.json`, weights and their indices are left out, as are hidden files and folders. Links are followed.
///
/// Returns the paths within the directory, sorted.
///
/// # Errors
/// [`Error::Io`] with the file.
pub fn copy_side_files(from: &Path, to: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    // A model that was never in a directory.
    if from.as_os_str().is_empty() {
        return Ok(names);
    }
    copy_folder(from, to, "", DEPTH, &mut names)?;
    names.sort();
    Ok(names)
}

fn copy_folder(from: &Path, to: &Path, within: &str, depth: usize, names: &mut Vec<String>) -> Result<()> {
    let list: std::io::Result<Vec<_>> = fs::read_dir(from).and_then(Iterator::collect);
    for entry in list.map_err(|source| Error::io(from, source))? {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let path = entry.path();
        if name.starts_with('.') {
            continue;
        }
        if path.is_dir() {
            // Caches and copies of the weights in other formats have no side files of their own to offer.
            if depth > 0 && name != "__pycache__" {
                copy_folder(&path, &to.join(&name), &format!("{within}{name}/"), depth - 1, names)?;
            }
        } else if is_side_file(&name) && !(within.is_empty() && name == "config.json") && path.is_file() {
            fs::create_dir_all(to).map_err(|source| Error::io(to, source))?;
            copy(&path, &to.join(&name), &to.join(format!("{name}{TEMPORARY_SUFFIX}")))?;
            names.push(format!("{within}{name}"));
        }
    }
    Ok(())
}

fn is_side_file(name: &str) -> bool {
    if name.starts_with('.') || name.ends_with(".index.json") || name.ends_with(TEMPORARY_SUFFIX) {
        return false;
    }
    let extension = Path::new(name).extension().and_then(|extension| extension.to_str());
    !extension.is_some_and(|extension| WEIGHTS.contains(&extension))
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
    fn folders_are_copied_and_weights_indices_and_the_config_stay_behind() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let put = |name: &str| {
            let path = from.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, name).unwrap();
        };
        let kept =
            ["additional_chat_templates/tool_use.jinja", "chat_template.jinja", "figures/loss.png", "tokenizer.json"];
        kept.iter().for_each(|name| put(name));
        for name in ["config.json", "model.safetensors", "original/consolidated.00.pth", ".git/HEAD"] {
            put(name);
        }
        assert_eq!(copy_side_files(from.path(), to.path()).unwrap(), kept);
        assert_eq!(fs::read_to_string(to.path().join(kept[0])).unwrap(), kept[0]);
        assert!(!to.path().join("config.json").exists() && !to.path().join("original").exists());
    }

    #[test]
    fn weights_and_indices_are_no_side_files() {
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
        for name in ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", ".moe-resume.json"] {
            assert!(!is_side_file(name), "{name}");
        }
    }
}

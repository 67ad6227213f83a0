//! The card of a model that was changed: what a person reads first.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use crate::artifact_file::write_atomic;
use crate::{Checkpoint, Error, Result};

/// The card.
const CARD: &str = "README.md";
/// What the card of the model that was changed is called beside it.
const BASE_CARD: &str = "README.base.md";

/// Writes the card of a model into its directory, where the card of the base may have been copied to.
pub(crate) fn write(model: &Checkpoint, dir: &Path, measured: &[(String, String)]) -> Result<()> {
    let (card, base_card) = (dir.join(CARD), dir.join(BASE_CARD));
    let before = match fs::read_to_string(&card) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(Error::io(&card, error)),
    };
    // A card of ours stands beside that of the released model already.
    if !before.is_empty() && !base_card.exists() {
        write_atomic(&base_card, before.as_bytes())?;
    }
    write_atomic(&card, text(model, &before, measured).as_bytes())
}

fn text(model: &Checkpoint, before: &str, measured: &[(String, String)]) -> String {
    let root = root(model);
    let name = model.dir().file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut out = String::from("---\n");
    // Writing to a string cannot fail.
    let _ = writeln!(out, "library_name: transformers");
    for line in front_matter(before).filter(|line| line.starts_with("license") || line.starts_with("base_model")) {
        let _ = writeln!(out, "{line}");
    }
    if !front_matter(before).any(|line| line.starts_with("base_model")) && !name.is_empty() {
        let _ = writeln!(out, "base_model: {name}");
    }
    let _ = writeln!(out, "tags:\n- moe\n---\n\n# {name}, changed\n\n## What was done\n");
    for (index, step) in model.steps().iter().enumerate() {
        let _ = writeln!(out, "{}. **{}**: {}", index + 1, step.method, step.summary);
    }
    let _ = writeln!(
        out,
        "\n`{}` holds the whole recipe of every step and the fingerprint of what it was done to.\n\n## Size\n\n\
         | | before | after |\n|---|--:|--:|\n| parameters | {} | {} |\n| bytes of weights | {} | {} |\n\
         | units of routed experts | {} | {} |",
        crate::RECORD_FILE,
        root.parameters(),
        model.parameters(),
        root.bytes_on_disk(),
        model.bytes_on_disk(),
        units(root),
        units(model)
    );
    if !measured.is_empty() {
        let _ = writeln!(out, "\n## Measured\n\n| | |\n|---|--:|");
        for (name, value) in measured {
            let _ = writeln!(out, "| {name} | {value} |");
        }
    }
    if model.ragged() || model.grouped() {
        let what = if model.grouped() { "Experts share sets of weights" } else { "Experts are of different widths" };
        let _ = writeln!(
            out,
            "\n## Loading\n\n{what}, which stock loaders have no place for: this directory opens with the `moe` crates."
        );
    }
    out
}

/// The directory that the model was made from.
fn root(model: &Checkpoint) -> &Checkpoint {
    let mut root = model;
    while let Some(base) = root.base() {
        root = base;
    }
    root
}

fn units(model: &Checkpoint) -> usize {
    let layers = (0..model.config().layers.len()).filter_map(|layer| model.config().moe(layer));
    layers.map(|moe| moe.stored_widths().iter().sum::<usize>()).sum()
}

/// Lines of the YAML block at the start of a card.
fn front_matter(card: &str) -> impl Iterator<Item = &str> {
    let mut lines = card.lines();
    let opens = lines.next() == Some("---");
    lines.take_while(move |line| opens && *line != "---")
}

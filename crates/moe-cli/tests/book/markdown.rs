//! Fenced blocks of pages.

use std::fs;
use std::path::{Path, PathBuf};

/// Blocks of all pages below `folder` and of the README whose language is one of these, page by page.
pub fn blocks(folder: &Path, languages: &[&str]) -> Vec<(String, Vec<String>)> {
    let mut pages = vec![folder.join("../README.md")];
    add_pages(folder, &mut pages);
    let read = |page: PathBuf| {
        let text = fs::read_to_string(&page).unwrap();
        let name = page.strip_prefix(folder).unwrap_or(&page).display().to_string();
        (name, blocks_of(&text, languages))
    };
    pages.into_iter().map(read).collect()
}

fn add_pages(folder: &Path, pages: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            add_pages(&path, pages);
        } else if path.extension().is_some_and(|extension| extension == "md") {
            pages.push(path);
        }
    }
}

fn blocks_of(text: &str, languages: &[&str]) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut block: Option<(bool, String)> = None;
    for line in text.lines() {
        match (&mut block, line.trim_start().strip_prefix("```")) {
            (None, Some(language)) => block = Some((languages.contains(&language.trim()), String::new())),
            (Some((wanted, text)), Some(_)) => {
                if *wanted {
                    blocks.push(std::mem::take(text));
                }
                block = None;
            }
            (Some((_, text)), None) => {
                text.push_str(line);
                text.push('\n');
            }
            (None, None) => {}
        }
    }
    blocks
}

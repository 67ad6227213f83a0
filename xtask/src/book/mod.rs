//! The book: `docs/` as pages, with every link checked.

mod links;

pub use links::files_below;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use mdbook_driver::MDBook;

use crate::{Result, at, root};

/// Where the book's sources are.
const SOURCES: &str = "docs";
/// Pages outside the book whose relative links are checked with it.
const PAGES_OUTSIDE: [&str; 4] = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"];

/// Builds the book into `target/book`, or with `check` into a folder that goes again; fails on a link that leads
/// nowhere and on a page that no chapter names. With `write`, first writes the pages that are generated from the code.
pub fn run(check: bool, write: bool) -> Result<()> {
    if write {
        write_reference()?;
    }
    let root = root();
    let out = root.join("target").join(if check { "book.check" } else { "book" });
    let mut faults = build(&root.join(SOURCES), &out)?;
    for page in PAGES_OUTSIDE.iter().map(|page| root.join(page)).filter(|page| page.exists()) {
        faults.extend(links::of_markdown(&page)?);
    }
    if check {
        fs::remove_dir_all(&out).map_err(at(&out))?;
    }
    match faults.is_empty() {
        true if check => println!("the book builds, and its links lead somewhere"),
        true => println!("the book is in {}", out.join("index.html").display()),
        false => return Err(format!("{} faults in the book:\n  {}", faults.len(), faults.join("\n  ")).into()),
    }
    Ok(())
}

/// Builds the book in `sources` into `out`, and tells what is wrong with it.
fn build(sources: &Path, out: &Path) -> Result<Vec<String>> {
    if out.exists() {
        fs::remove_dir_all(out).map_err(at(out))?;
    }
    let in_book = |error: &dyn std::fmt::Display| format!("{}: {error:#}", sources.display());
    let mut book = MDBook::load(sources).map_err(|error| in_book(&error))?;
    book.config.build.build_dir = out.to_owned();
    book.build().map_err(|error| in_book(&error))?;
    let mut faults = unnamed_pages(&book, sources)?;
    faults.extend(links::of_html(out)?);
    Ok(faults)
}

/// Pages that the summary does not name: nobody would find them.
fn unnamed_pages(book: &MDBook, sources: &Path) -> Result<Vec<String>> {
    let named: Vec<PathBuf> = book
        .iter()
        .filter_map(|item| match item {
            mdbook_driver::book::BookItem::Chapter(chapter) => chapter.source_path.clone(),
            _ => None,
        })
        .collect();
    let mut pages = Vec::new();
    links::files_below(sources, "md", &mut pages)?;
    let relative = pages.iter().filter_map(|page| page.strip_prefix(sources).ok());
    let unnamed = relative.filter(|page| *page != Path::new("SUMMARY.md") && !named.iter().any(|name| name == page));
    Ok(unnamed.map(|page| format!("{}: SUMMARY.md does not name this page", page.display())).collect())
}

/// Lets the tests of the program write the pages that they compare.
fn write_reference() -> Result<()> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["test", "--quiet", "--release", "--package", "moe-cli", "--test", "book"])
        .env("MOE_BOOK", "write")
        .current_dir(root())
        .status()?;
    match status.success() {
        true => Ok(()),
        false => Err("the reference could not be written: cargo test --package moe-cli --test book".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench_report::tests::Scratch;

    #[test]
    fn the_book_of_this_workspace_has_no_fault() {
        run(true, false).unwrap();
    }

    #[test]
    fn a_link_without_an_end_and_a_page_without_a_chapter_are_faults() {
        let scratch = Scratch::new("book");
        scratch.write("docs/book.toml", "[book]\nsrc = \".\"\n");
        scratch.write("docs/SUMMARY.md", "# Summary\n\n- [One](one.md)\n- [Two](two.md)\n");
        scratch.write("docs/one.md", "# One\n\n[a](two.md#second) [b](two.md#third) [c](absent.md) [d](https://a.b)\n");
        scratch.write("docs/two.md", "# Two\n\n## Second\n\n[a](one.md)\n");
        scratch.write("docs/three.md", "# Three\n");
        let faults = build(&scratch.path().join("docs"), &scratch.path().join("out")).unwrap();
        let found = |text: &str| faults.iter().any(|fault| fault.contains(text));
        assert!(found("three.md: SUMMARY.md does not name"), "{faults:#?}");
        assert!(found("two.html#third") && found("absent."), "{faults:#?}");
        assert!(!found("#second") && !found("a.b"), "{faults:#?}");
    }
}

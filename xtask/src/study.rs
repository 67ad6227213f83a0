//! The study of `compare_methods`, and the guide's page of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Result, at, root};

/// The page whose tables are those of the study.
const PAGE: &str = "docs/study.md";
/// And of that of ways to merge.
const MERGING_PAGE: &str = "docs/merging.md";

/// What to run, and what to do with it.
#[derive(clap::Args)]
pub struct Options {
    /// The study of ways to merge
    #[arg(long)]
    merging: bool,
    /// Directory of the study [default: out/study, or out/merging]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with an interrupted study; one that is complete is only read
    #[arg(long)]
    resume: bool,
    /// Replace an earlier study
    #[arg(long, conflicts_with = "resume")]
    force: bool,
    /// A small part of it, in seconds
    #[arg(long)]
    quick: bool,
    /// Draws of the calibration rows, instead of three
    #[arg(long, value_name = "N", conflicts_with = "quick")]
    draws: Option<u32>,
    /// Write its tables into docs/study.md, or docs/merging.md
    #[arg(long, conflicts_with = "quick")]
    write: bool,
}

/// Runs the study, and writes its tables into the page if asked to.
pub fn run(options: &Options) -> Result<()> {
    let (page, out) = match options.merging {
        true => (MERGING_PAGE, "out/merging"),
        false => (PAGE, "out/study"),
    };
    let out = options.out.clone().unwrap_or_else(|| PathBuf::from(out));
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["run", "--release", "--example", "compare_methods", "--", "--out"]).arg(&out);
    let flags = [
        ("--resume", options.resume),
        ("--force", options.force),
        ("--quick", options.quick),
        ("--merging", options.merging),
    ];
    for (flag, given) in flags {
        if given {
            command.arg(flag);
        }
    }
    if let Some(draws) = options.draws {
        command.args(["--draws", &draws.to_string()]);
    }
    if !command.current_dir(root()).status()?.success() {
        return Err("the study failed; --resume goes on with it".into());
    }
    if options.write {
        let (name, page, tables) = (page, root().join(page), root().join(&out).join("tables.md"));
        let read = |path: &PathBuf| fs::read_to_string(path).map_err(at(path));
        let written = splice(&read(&page)?, &read(&tables)?).map_err(at(&page))?;
        fs::write(&page, written).map_err(at(&page))?;
        println!("{name}: written");
    }
    Ok(())
}

/// Runs an example of the benchmarks that leaves tables in `out`, with a number after its flag if one is given, and
/// writes the tables into a page if asked to.
pub fn tables(example: &str, page: &str, out: &Path, flags: &[(&str, Option<String>)], write: bool) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["run", "--release", "--example", example, "--", "--out"]).arg(out);
    for (flag, value) in flags {
        if let Some(value) = value {
            command.args([*flag, value]);
        }
    }
    if !command.current_dir(root()).status()?.success() {
        return Err("the study failed".into());
    }
    if write {
        write_tables(page, &root().join(out))?;
    }
    Ok(())
}

/// Puts the tables of a file into a page, which has a place for each of them.
pub(crate) fn write_tables(page: &str, tables: &Path) -> Result<()> {
    let path = root().join(page);
    let read = |path: &Path| fs::read_to_string(path).map_err(at(path));
    let written = replace(&read(&path)?, &read(tables)?).map_err(at(&path))?;
    fs::write(&path, written).map_err(at(&path))?;
    println!("{page}: written");
    Ok(())
}

/// The blocks of a text between `<!-- study:ID -->` and `<!-- /study:ID -->`, marks included, with their ids.
fn blocks(text: &str) -> std::result::Result<Vec<(&str, &str)>, String> {
    let mut blocks = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find("<!-- study:") {
        let from = &rest[start..];
        let id = from["<!-- study:".len()..].split(" -->").next().unwrap_or_default();
        let end = format!("<!-- /study:{id} -->");
        let Some(length) = from.find(&end).map(|at| at + end.len()) else {
            return Err(format!("`<!-- study:{id} -->` has no `{end}`"));
        };
        blocks.push((id, &from[..length]));
        rest = &from[length..];
    }
    Ok(blocks)
}

/// The page with its tables replaced by those of the same id. Both must have the same ids.
fn splice(page: &str, tables: &str) -> std::result::Result<String, String> {
    let (places, found) = (blocks(page)?, blocks(tables)?);
    let ids = |blocks: &[(&str, &str)]| blocks.iter().map(|(id, _)| (*id).to_owned()).collect::<Vec<_>>();
    if let Some((id, _)) = places.iter().find(|(id, _)| !found.iter().any(|(known, _)| known == id)) {
        return Err(format!("the study has no table `{id}`; it has {}", ids(&found).join(", ")));
    }
    replace(page, tables)
}

/// The page with those of its tables replaced that are among `tables`, all of which must have a place.
pub(crate) fn replace(page: &str, tables: &str) -> std::result::Result<String, String> {
    let (places, tables) = (blocks(page)?, blocks(tables)?);
    if let Some((id, _)) = tables.iter().find(|(id, _)| !places.iter().any(|(known, _)| known == id)) {
        return Err(format!("there is no place for table `{id}`: `<!-- study:{id} -->` and `<!-- /study:{id} -->`"));
    }
    let mut written = page.to_owned();
    for (id, place) in places {
        if let Some((_, table)) = tables.iter().find(|(known, _)| *known == id) {
            written = written.replacen(place, table, 1);
        }
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLES: &str =
        "<!-- study:a -->\n\n| 1 |\n\n<!-- /study:a -->\n\n<!-- study:b-0.5 -->\n\n| 2 |\n\n<!-- /study:b-0.5 -->\n";

    #[test]
    fn tables_go_where_their_marks_are() {
        let page =
            "# Study\n<!-- study:b-0.5 -->\nold\n<!-- /study:b-0.5 -->\nwords\n<!-- study:a --><!-- /study:a -->\n";
        let written = splice(page, TABLES).unwrap();
        assert_eq!(
            written,
            "# Study\n<!-- study:b-0.5 -->\n\n| 2 |\n\n<!-- /study:b-0.5 -->\nwords\n<!-- study:a -->\n\n| 1 |\n\n<!-- /study:a -->\n"
        );
        assert_eq!(splice(&written, TABLES).unwrap(), written);
    }

    #[test]
    fn a_table_without_a_place_or_a_place_without_a_table_is_refused() {
        let only_a = "<!-- study:a -->\n<!-- /study:a -->\n";
        assert!(splice(only_a, TABLES).unwrap_err().contains("no place for table `b-0.5`"));
        assert!(splice(TABLES, only_a).unwrap_err().contains("no table `b-0.5`"));
        assert!(splice("<!-- study:a -->", TABLES).unwrap_err().contains("has no `<!-- /study:a -->`"));
    }

    #[test]
    fn the_page_is_well_formed() {
        for (page, tables) in [(PAGE, 10), (MERGING_PAGE, 8)] {
            let page = fs::read_to_string(root().join(page)).unwrap();
            assert!(blocks(&page).unwrap().len() > tables);
        }
    }
}

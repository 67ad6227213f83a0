//! Integrity of the committed fixtures: parity tests compare against numbers that nobody recomputes, so the files must
//! be the ones that were made.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use crate::{Result, at, root};

/// Folders whose every file is listed.
const FOLDERS: [&str; 3] =
    ["crates/moe-checkpoint/tests/fixtures", "crates/moe-peft/tests/fixtures", "examples/assets"];
/// One line per file as `b3sum` writes them: the sum, two spaces, the path from the root.
const MANIFEST: &str = "xtask/fixtures.b3";

/// blake3 sums in hexadecimal by path from the root, `/` between folders.
type Sums = BTreeMap<String, String>;

/// Checks the fixtures against the manifest, or writes it.
pub fn run(write: bool) -> Result<()> {
    let root = root();
    let found = sums(&root, &FOLDERS)?;
    let manifest = root.join(MANIFEST);
    if write {
        fs::write(&manifest, print(&found)).map_err(at(&manifest))?;
        println!("{MANIFEST}: {} files", found.len());
        return Ok(());
    }
    let expected = parse(&fs::read_to_string(&manifest).map_err(at(&manifest))?).map_err(at(&manifest))?;
    let differences = differences(&expected, &found);
    if !differences.is_empty() {
        let list = differences.join("\n  ");
        let advice = "if the change is meant, run `cargo xtask fixtures --write`";
        return Err(format!("the fixtures are not those of {MANIFEST}; {advice}\n  {list}").into());
    }
    println!("{} fixture files are as committed", found.len());
    Ok(())
}

fn sums(root: &Path, folders: &[&str]) -> Result<Sums> {
    let mut sums = Sums::new();
    for folder in folders {
        add_folder(root, folder, &mut sums)?;
    }
    Ok(sums)
}

fn add_folder(root: &Path, folder: &str, sums: &mut Sums) -> Result<()> {
    let path = root.join(folder);
    for entry in fs::read_dir(&path).map_err(at(&path))? {
        let entry = entry.map_err(at(&path))?;
        let name = entry.file_name();
        let name = name.to_str().ok_or_else(|| format!("{}: the name is not UTF-8", entry.path().display()))?;
        let relative = format!("{folder}/{name}");
        if entry.file_type().map_err(at(&entry.path()))?.is_dir() {
            add_folder(root, &relative, sums)?;
        } else {
            sums.insert(relative, sum(&entry.path())?);
        }
    }
    Ok(())
}

fn sum(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut file = File::open(path).map_err(at(path))?;
    io::copy(&mut file, &mut hasher).map_err(at(path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

fn print(sums: &Sums) -> String {
    sums.iter().map(|(path, sum)| format!("{sum}  {path}\n")).collect()
}

fn parse(manifest: &str) -> std::result::Result<Sums, String> {
    manifest
        .lines()
        .enumerate()
        .map(|(i, line)| {
            let (sum, path) = line
                .split_once("  ")
                .filter(|(sum, path)| sum.len() == 64 && sum.bytes().all(|c| c.is_ascii_hexdigit()) && !path.is_empty())
                .ok_or_else(|| {
                    format!("line {}: found {line:?}, expected a blake3 sum, two spaces and a path", i + 1)
                })?;
            Ok((path.to_owned(), sum.to_owned()))
        })
        .collect()
}

/// One line per file that is missing, changed or not listed.
fn differences(expected: &Sums, found: &Sums) -> Vec<String> {
    let mut lines = Vec::new();
    for (path, sum) in expected {
        match found.get(path) {
            None => lines.push(format!("missing: {path}")),
            Some(other) if other != sum => {
                lines.push(format!("changed: {path} (blake3 {}…, expected {}…)", &other[..12], &sum[..12]));
            }
            Some(_) => {}
        }
    }
    lines.extend(found.keys().filter(|path| !expected.contains_key(*path)).map(|path| format!("not listed: {path}")));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench_report::tests::Scratch;

    #[test]
    fn every_file_is_summed() {
        let scratch = Scratch::new("fixtures");
        scratch.write("a/one.txt", "");
        scratch.write("a/deep/two.bin", "abc");
        scratch.write("b/unlisted.txt", "x");
        let sums = sums(scratch.path(), &["a"]).unwrap();
        // The published sums of no bytes and of "abc".
        assert_eq!(
            print(&sums),
            "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85  a/deep/two.bin\n\
             af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262  a/one.txt\n"
        );
        assert_eq!(parse(&print(&sums)).unwrap(), sums);
        let error = super::sums(scratch.path(), &["absent"]).unwrap_err().to_string();
        assert!(error.contains("absent"), "{error}");
    }

    #[test]
    fn every_difference_is_named() {
        let sums = |list: &[(&str, char)]| -> Sums {
            list.iter().map(|(path, c)| ((*path).to_owned(), String::from_iter([*c; 64]))).collect()
        };
        let expected = sums(&[("same", 'a'), ("other", 'a'), ("gone", 'a')]);
        let found = sums(&[("same", 'a'), ("other", 'b'), ("new", 'a')]);
        assert_eq!(
            differences(&expected, &found),
            ["missing: gone", "changed: other (blake3 bbbbbbbbbbbb…, expected aaaaaaaaaaaa…)", "not listed: new"]
        );
        assert!(differences(&expected, &expected).is_empty());
    }

    #[test]
    fn a_malformed_manifest_is_refused() {
        let sum = "a".repeat(64);
        assert!(parse("").unwrap().is_empty());
        for bad in ["nonsense", &format!("{sum} one-space"), &format!("{sum}  "), &format!("{}  path", &sum[1..])] {
            let error = parse(&format!("{sum}  good\n{bad}\n")).unwrap_err();
            assert!(error.starts_with("line 2: found "), "{error}");
        }
    }

    #[test]
    fn the_committed_fixtures_are_intact() {
        run(false).unwrap();
    }
}

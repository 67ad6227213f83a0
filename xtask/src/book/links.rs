//! Links of pages, and whether they lead somewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::{Result, at};

/// Adds all files below `folder` whose names end in `.extension`, in the order of their names.
pub fn files_below(folder: &Path, extension: &str, files: &mut Vec<PathBuf>) -> Result<()> {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder)
        .map_err(at(folder))?
        .map(|entry| entry.map(|entry| entry.path()).map_err(at(folder)))
        .collect::<std::result::Result<_, String>>()?;
    entries.sort();
    for path in entries {
        if path.is_dir() {
            files_below(&path, extension, files)?;
        } else if path.extension().is_some_and(|found| found == extension) {
            files.push(path);
        }
    }
    Ok(())
}

/// Faults of the rendered pages below `folder`: a file that is not there, an anchor that no element has.
pub fn of_html(folder: &Path) -> Result<Vec<String>> {
    let mut pages = Vec::new();
    files_below(folder, "html", &mut pages)?;
    // The page of errors is served under any address, so its links are relative to the site.
    pages.retain(|page| page.file_name().is_some_and(|name| name != "404.html"));
    let mut texts = BTreeMap::new();
    for page in pages {
        let text = fs::read_to_string(&page).map_err(at(&page))?;
        texts.insert(page, text);
    }
    let anchors: BTreeMap<&PathBuf, BTreeSet<String>> =
        texts.iter().map(|(page, text)| (page, attributes(text, "id").collect())).collect();
    let mut faults = Vec::new();
    for (page, text) in &texts {
        let name = page.strip_prefix(folder).unwrap_or(page).display();
        for link in attributes(text, "href").chain(attributes(text, "src")).filter(|link| is_local(link)) {
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let mut target = match path {
                "" => page.clone(),
                path => lexical(&page.parent().unwrap_or(folder).join(unescaped(path))),
            };
            if target.is_dir() {
                target.push("index.html");
            }
            if !target.exists() {
                faults.push(format!("{name}: {link}: no such file"));
            } else if !anchor.is_empty() && !anchors.get(&target).is_some_and(|ids| ids.contains(&unescaped(anchor))) {
                faults.push(format!("{name}: {link}: no such heading"));
            }
        }
    }
    faults.sort();
    faults.dedup();
    Ok(faults)
}

/// Faults of the relative links of a Markdown page outside the book: files that are not there.
pub fn of_markdown(page: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(page).map_err(at(page))?;
    let folder = page.parent().unwrap_or(Path::new(""));
    let links = text.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(link, _)| link));
    let images = attributes(&text, "src").chain(attributes(&text, "srcset")).collect::<Vec<_>>();
    let links = links.map(str::to_owned).chain(images).filter(|link| is_local(link));
    let faults = links.filter(|link| {
        let path = link.split('#').next().unwrap_or_default();
        !path.is_empty() && !folder.join(path).exists()
    });
    Ok(faults.map(|link| format!("{}: {link}: no such file", page.display())).collect())
}

/// Values of an attribute, wherever it stands in double quotes.
fn attributes<'a>(text: &'a str, name: &str) -> impl Iterator<Item = String> + 'a {
    let start = format!(" {name}=\"");
    let mut rest = text;
    std::iter::from_fn(move || {
        rest = &rest[rest.find(&start)? + start.len()..];
        let (value, after) = rest.split_once('"')?;
        rest = after;
        Some(value.replace("&amp;", "&"))
    })
}

/// Whether a link leads to a file of the book rather than into the world.
fn is_local(link: &str) -> bool {
    let scheme = link.split_once(':').map(|(scheme, _)| scheme);
    !link.is_empty() && !scheme.is_some_and(|scheme| scheme.chars().all(|c| c.is_ascii_alphabetic()))
}

/// A path without `..` and `.`, whether or not it exists.
fn lexical(path: &Path) -> PathBuf {
    let mut found = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                found.pop();
            }
            Component::CurDir => {}
            part => found.push(part),
        }
    }
    found
}

/// Text of a link whose characters may be escaped as `%` and two digits.
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let code = (*first == b'%').then(|| after.get(..2)).flatten();
        let code = code.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench_report::tests::Scratch;

    #[test]
    fn attributes_are_found_wherever_they_stand() {
        let html = "<a class=\"x\" href=\"a.html?b&amp;c\">1</a> <h2 id=\"one\">One</h2><img src=\"i.svg\">";
        assert_eq!(attributes(html, "href").collect::<Vec<_>>(), ["a.html?b&c"]);
        assert_eq!(attributes(html, "id").collect::<Vec<_>>(), ["one"]);
        assert_eq!(attributes(html, "src").collect::<Vec<_>>(), ["i.svg"]);
    }

    #[test]
    fn only_links_without_a_scheme_are_local() {
        assert!(is_local("a.md") && is_local("../b.md#c") && is_local("#c"));
        assert!(!is_local("https://a.b") && !is_local("mailto:a@b.c") && !is_local(""));
        assert_eq!(unescaped("a%20b%zz%e2%86%92"), "a b%zz→");
        assert_eq!(lexical(Path::new("/a/b/../c/./d")), Path::new("/a/c/d"));
    }

    #[test]
    fn links_of_a_page_outside_the_book_are_paths() {
        let scratch = Scratch::new("links");
        scratch.write("there.md", "");
        scratch.write("page.md", "[a](there.md#any) [b](absent.md) <img src=\"gone.svg\"> [c](https://a.b)\n");
        let faults = of_markdown(&scratch.path().join("page.md")).unwrap();
        assert_eq!(faults.len(), 2, "{faults:?}");
        assert!(faults[0].ends_with("absent.md: no such file") && faults[1].ends_with("gone.svg: no such file"));
    }
}

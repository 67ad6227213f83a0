//! Pages of the book that show commands with what they print: run again, and written or compared.

mod page;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::{Result, at, root};
use page::{Page, alike};

/// The pages, in the order in which they are run.
const PAGES: [&str; 2] = ["docs/sessions.md", "docs/jobs/by-one-command.md"];
/// The bundled model and a dense one with random weights, and what the pages call them.
const MODELS: [(&str, &str); 2] =
    [("examples/assets/tiny-moe", "tiny-moe"), ("crates/moe-merge/tests/fixtures/dense/llama", "tiny-llama")];

/// What is run.
#[derive(clap::Args)]
pub struct Options {
    /// Write what the commands print into the pages, instead of comparing it with what they show
    #[arg(long)]
    write: bool,
    /// The program, instead of the one that is built for this
    #[arg(long, value_name = "FILE")]
    moe: Option<PathBuf>,
    /// One page instead of all
    #[arg(long, value_name = "FILE")]
    page: Option<PathBuf>,
}

/// Runs the commands of every page in a new directory of its own, and writes or compares what they print.
pub fn run(options: &Options) -> Result<()> {
    let root = root();
    let program = match &options.moe {
        Some(path) if path.file_name().is_some_and(|name| name == "moe") => fs::canonicalize(path).map_err(at(path))?,
        Some(path) => return Err(format!("{}: expected a program called moe, as the pages do", path.display()).into()),
        None => built(&root)?,
    };
    let pages = match &options.page {
        Some(page) => vec![page.clone()],
        None => PAGES.iter().map(|page| root.join(page)).collect(),
    };
    let mut faults = Vec::new();
    for path in pages {
        let text = fs::read_to_string(&path).map_err(at(&path))?;
        let mut page = Page::read(&text).map_err(at(&path))?;
        let dir = scratch(&root, &path)?;
        let start = Instant::now();
        for session in page.commands_mut() {
            println!("$ {}", session.command);
            let printed = output(&session.command, &dir, &program)?;
            print!("{printed}");
            // What fails as the page shows is a session, too; what fails otherwise is no better for being written down.
            if ending(&session.printed) != ending(&printed) {
                let advice = "a page shows what it ends with as the last line of what the command prints";
                faults.push(format!(
                    "$ {}\n{printed}ends in another way than the page says; {advice}\n",
                    session.command
                ));
            } else if !options.write && !alike(&session.printed, &printed) {
                let (command, shown) = (&session.command, &session.printed);
                faults.push(format!("$ {command}\nthe page shows\n{shown}and the program prints\n{printed}"));
            }
            session.printed = printed;
        }
        println!("{}: {:.0} s", path.display(), start.elapsed().as_secs_f64());
        if options.write && faults.is_empty() {
            fs::write(&path, page.to_string()).map_err(at(&path))?;
        }
    }
    match faults.is_empty() {
        true => Ok(()),
        false => {
            let advice = "`cargo xtask sessions --write` writes what is printed now";
            Err(format!("{} commands do something else; {advice}\n\n{}", faults.len(), faults.join("\n")).into())
        }
    }
}

/// The program, built as people build it.
fn built(root: &Path) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let build = ["build", "--quiet", "--release", "--package", "moe-cli", "--bin", "moe"];
    match Command::new(cargo).args(build).current_dir(root).status()?.success() {
        true => Ok(root.join("target/release/moe")),
        false => Err("the program does not build".into()),
    }
}

/// An empty directory with the models in it.
fn scratch(root: &Path, page: &Path) -> Result<PathBuf> {
    let dir = root.join("target/sessions").join(page.file_stem().unwrap_or_default());
    if dir.exists() {
        fs::remove_dir_all(&dir).map_err(at(&dir))?;
    }
    fs::create_dir_all(&dir).map_err(at(&dir))?;
    for (model, name) in MODELS {
        let copied = Command::new("cp").arg("-r").args([root.join(model), dir.join(name)]).status()?;
        if !copied.success() {
            return Err(format!("{model}: cannot be copied").into());
        }
    }
    Ok(dir)
}

/// What a terminal would show of a command, with its exit status where that is not 0.
fn output(command: &str, dir: &Path, program: &Path) -> Result<String> {
    let folder = program.parent().unwrap_or(Path::new("."));
    let path = std::env::var("PATH").unwrap_or_default();
    let found = Command::new("bash")
        .args(["-c", &format!("set -o pipefail; exec 2>&1\n{command}")])
        .current_dir(dir)
        .env("PATH", format!("{}:{path}", folder.display()))
        .env_remove("MOE_LOG")
        .stdin(Stdio::null())
        .output()?;
    let mut printed = String::from_utf8_lossy(&found.stdout).replace(&format!("{}/", dir.display()), "");
    if !printed.is_empty() && !printed.ends_with('\n') {
        printed.push('\n');
    }
    // A reader that has had enough, as `head`, ends the writer before it.
    match found.status.code() {
        Some(0 | 141) => {}
        Some(code) => printed.push_str(&format!("(exit status {code})\n")),
        None => printed.push_str("(killed)\n"),
    }
    Ok(printed)
}

/// The line that says how a command failed; none if it did not.
fn ending(printed: &str) -> Option<&str> {
    printed.lines().last().filter(|line| line.starts_with("(exit status ") || *line == "(killed)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_has_commands_that_print() {
        for page in PAGES {
            let text = fs::read_to_string(root().join(page)).unwrap();
            let mut read = Page::read(&text).unwrap();
            assert_eq!(read.to_string(), text, "{page}");
            assert!(read.commands_mut().filter(|session| !session.printed.is_empty()).count() > 10, "{page}");
        }
    }

    #[test]
    fn what_a_command_prints_is_what_a_terminal_shows() {
        let dir = root();
        let shown = |command| output(command, &dir, Path::new("/usr/bin/moe")).unwrap();
        assert_eq!(shown("echo out; echo err >&2; pwd | sed s=$=/x="), "out\nerr\nx\n");
        assert_eq!(shown("printf x; exit 2"), "x\n(exit status 2)\n");
        assert_eq!((ending("x\n(exit status 2)\n"), ending("x\n"), ending("")), (Some("(exit status 2)"), None, None));
    }
}

//! The book (`docs/`) says what the program does: its reference is generated from the code, and its commands and
//! recipes are read by the program.

mod commands;
mod markdown;
mod recipes;
mod verbs;

use std::fs;
use std::path::{Path, PathBuf};

/// The folder of the book.
fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs")
}

/// Compares a generated page with the one that is committed, or writes it if `MOE_BOOK` is `write`.
fn page_is(name: &str, generated: &str) {
    let path = docs().join(name);
    if std::env::var_os("MOE_BOOK").is_some_and(|value| value == "write") {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, generated).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    let line = committed.lines().zip(generated.lines()).position(|(was, is)| was != is);
    let line = line.unwrap_or_else(|| committed.lines().count().min(generated.lines().count()));
    assert!(
        committed == generated,
        "docs/{name} is not what the code says, from line {}:\n  committed {:?}\n  generated {:?}\n\
         run `cargo xtask book --write` and commit the page",
        line + 1,
        committed.lines().nth(line).unwrap_or_default(),
        generated.lines().nth(line).unwrap_or_default(),
    );
}

#[test]
fn the_reference_of_verbs_is_what_the_program_says() {
    page_is("reference/verbs.md", &verbs::page());
}

#[test]
fn the_reference_of_recipes_is_their_schema() {
    page_is("reference/recipes.md", &recipes::page());
}

#[test]
fn every_command_of_the_book_is_one_of_the_program() {
    let mut faults = Vec::new();
    let mut read = 0;
    for (page, blocks) in markdown::blocks(&docs(), &["console", "bash", "sh"]) {
        for command in blocks.iter().flat_map(|block| commands::of_block(block)) {
            read += 1;
            if let Err(fault) = commands::check(&command) {
                faults.push(format!("{page}: {}\n    {fault}", command.join(" ")));
            }
        }
    }
    assert!(faults.is_empty(), "commands that the program does not know:\n  {}", faults.join("\n  "));
    assert!(read > 40, "found {read} commands: are the blocks still read?");
}

#[test]
fn every_verb_has_a_session() {
    let page = std::fs::read_to_string(docs().join("sessions.md")).unwrap();
    let program = moe_cli::program::command();
    for verb in program.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help") {
        let name = verb.get_name();
        // Verbs that need a server or are one have tests of their own.
        let call = if ["pull", "push", "serve"].contains(&name) {
            format!("\nmoe {name} ")
        } else {
            format!("\n$ moe {name} ")
        };
        assert!(page.contains(&call), "docs/sessions.md has no session of `moe {name}`");
    }
}

#[test]
fn every_recipe_of_the_book_is_read() {
    let mut read = 0;
    for (page, blocks) in markdown::blocks(&docs(), &["json"]) {
        for block in blocks.iter().filter(|block| block.contains("\"steps\"")) {
            let recipe = serde_json::from_str::<moe::recipe::Recipe>(block);
            assert!(recipe.is_ok(), "{page}: {}\n{block}", recipe.unwrap_err());
            read += 1;
        }
    }
    assert!(read > 2, "found {read} recipes: are the blocks still read?");
}

#[test]
fn an_unknown_verb_or_flag_is_found() {
    let check =
        |text: &str| commands::of_block(text).iter().map(|command| commands::check(command)).collect::<Vec<_>>();
    assert!(matches!(&check("$ moe inspect DIR --json")[..], [Ok(())]));
    assert!(matches!(&check("moe inspect \\\n    DIR\nls\n# moe nothing")[..], [Ok(())]));
    assert!(matches!(&check("cargo run --release --bin moe -- inspect 'a b'")[..], [Ok(())]));
    assert_eq!(check("$ moe inspect DIR\noperations  ls\n    moe no verb\n").len(), 1, "what a command prints is none");
    assert!(check("moe inspect DIR --colour")[0].is_err() && check("moe prunes")[0].is_err());
    assert!(check("moe run no-such-recipe --out OUT")[0].is_err());
    assert!(check("moe inspect DIR | head")[0].is_ok(), "a pipe ends the command");
}

//! Command lines of the program in blocks of a page.

use clap::error::ErrorKind;
use moe::recipe::Recipe;

/// The program when it runs from the workspace.
const FROM_WORKSPACE: &str = "cargo run --release --bin moe -- ";

/// The commands of a block that call the program, each as its words.
pub fn of_block(block: &str) -> Vec<Vec<String>> {
    let joined = block.replace("\\\n", " ");
    // Where commands have prompts, the other lines are what they print.
    let prompts = joined.lines().any(|line| line.starts_with("$ "));
    let lines = joined.lines().filter(|line| !prompts || line.starts_with("$ "));
    let lines = lines.map(|line| line.trim_start().trim_start_matches("$ "));
    let commands = lines.filter_map(|line| match line.strip_prefix(FROM_WORKSPACE) {
        Some(rest) => Some(format!("moe {rest}")),
        None => line.starts_with("moe ").then(|| line.to_owned()),
    });
    commands.map(|line| words(&line)).collect()
}

/// Words as a shell takes them, up to a pipe, a redirection or a comment.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for c in line.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, '|' | '>' | '<' | '#' | ';' | '&') if word.is_none() => return words,
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// Whether the program takes this command line; what `moe run` is given must be a file or a published recipe.
pub fn check(command: &[String]) -> Result<(), String> {
    match moe_cli::program::command().try_get_matches_from(command) {
        Ok(_) => {}
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {}
        Err(error) => return Err(error.to_string().lines().next().unwrap_or_default().to_owned()),
    }
    match command {
        [_, verb, recipe, ..] if verb == "run" && recipe.starts_with('{') => {
            serde_json::from_str::<Recipe>(recipe).map(|_| ()).map_err(|error| error.to_string())
        }
        [_, verb, recipe, ..] if verb == "run" && recipe != "list" && !recipe.starts_with('-') => {
            if recipe.ends_with(".json") {
                Ok(())
            } else {
                Recipe::published(recipe).map(drop).map_err(|e| e.to_string())
            }
        }
        _ => Ok(()),
    }
}

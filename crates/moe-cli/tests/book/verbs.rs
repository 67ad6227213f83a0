//! The reference of verbs, from the command line as clap knows it.

use clap::{Arg, ArgAction, Command};

/// Columns of a line of prose, at most.
const COLUMNS: usize = 120;

/// The page.
pub fn page() -> String {
    let mut program = moe_cli::program::command();
    program.build();
    let mut page = String::from(
        "<!-- Generated from the program's command line: `cargo xtask book --write`. -->\n\n# Verbs of `moe`\n\n",
    );
    page.push_str(&paragraph(&about(&program)));
    if let Some(after) = program.get_after_help() {
        for part in after.to_string().split("\n\n") {
            // Lines of commands stay lines.
            match part.contains("\n  ") {
                true => page.push_str(&format!("```text\n{part}\n```\n\n")),
                false => page.push_str(&paragraph(part)),
            }
        }
    }
    page.push_str("| verb | what it does |\n|---|---|\n");
    for verb in verbs(&program) {
        let (name, about) = (verb.get_name(), verb.get_about().map(ToString::to_string).unwrap_or_default());
        page.push_str(&format!("| [`{name}`](#moe-{name}) | {} |\n", cell(about.lines().next().unwrap_or_default())));
    }
    for verb in verbs(&program) {
        section(verb, &format!("moe {}", verb.get_name()), 2, &mut page);
    }
    page
}

/// Verbs that a person may call, in the order of the program.
fn verbs(program: &Command) -> impl Iterator<Item = &Command> {
    program.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help")
}

fn section(verb: &Command, name: &str, depth: usize, page: &mut String) {
    page.push_str(&format!("\n{} {name}\n\n", "#".repeat(depth)));
    page.push_str(&paragraph(&about(verb)));
    let arguments: Vec<&Arg> =
        verb.get_arguments().filter(|arg| !arg.is_hide_set() && arg.get_id() != "help").collect();
    if !arguments.is_empty() {
        page.push_str("| argument | meaning |\n|---|---|\n");
        for argument in arguments {
            page.push_str(&format!("| {} | {} |\n", spelling(argument), meaning(argument)));
        }
        page.push('\n');
    }
    if let Some(after) = verb.get_after_long_help().or(verb.get_after_help()) {
        page.push_str(&format!("```text\n{}\n```\n", after.to_string().trim_end()));
    }
    for inner in verbs(verb) {
        section(inner, &format!("{name} {}", inner.get_name()), depth + 1, page);
    }
}

/// What a verb does: its long description where it has one.
fn about(verb: &Command) -> String {
    verb.get_long_about().or(verb.get_about()).map(ToString::to_string).unwrap_or_default()
}

fn spelling(argument: &Arg) -> String {
    let takes_value = matches!(argument.get_action(), ArgAction::Set | ArgAction::Append);
    let names = argument.get_value_names().unwrap_or_default();
    let value = names.iter().map(|name| format!("<{name}>")).collect::<Vec<_>>().join(" ");
    let option = argument.get_long().map(|long| format!("--{long}"));
    let short = argument.get_short().map(|short| format!("-{short}"));
    let option = option.or(short);
    let spelled = match (option, takes_value) {
        (Some(option), true) => format!("{option} {value}"),
        (Some(option), false) => option,
        (None, _) => value,
    };
    format!("`{}`", spelled.replace('|', "\\|"))
}

fn meaning(argument: &Arg) -> String {
    let help = argument.get_long_help().or(argument.get_help()).map(ToString::to_string).unwrap_or_default();
    let mut meaning = cell(&help);
    if argument.is_required_set() {
        meaning.push_str(" (required)");
    }
    let flag = matches!(argument.get_action(), ArgAction::SetTrue | ArgAction::SetFalse | ArgAction::Count);
    let defaults: Vec<String> =
        argument.get_default_values().iter().map(|value| value.to_string_lossy().into_owned()).collect();
    if !flag && !defaults.is_empty() {
        meaning.push_str(&format!(" [default: `{}`]", defaults.join(", ").replace('|', "\\|")));
    }
    let possible: Vec<String> =
        argument.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
    if !flag && !possible.is_empty() {
        meaning.push_str(&format!(" [{}]", possible.join(", ")));
    }
    meaning
}

/// Text for a cell of a table.
pub fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|").replace('<', "&lt;")
}

/// Text as paragraphs of lines that are not too long.
pub fn paragraph(text: &str) -> String {
    let mut page = String::new();
    for part in text.split("\n\n").map(str::trim).filter(|part| !part.is_empty()) {
        let mut columns = 0;
        for word in part.split_whitespace() {
            let word = word.replace('<', "&lt;");
            let width = word.chars().count();
            match columns {
                0 => {}
                _ if columns + 1 + width > COLUMNS => {
                    page.push('\n');
                    columns = 0;
                }
                _ => {
                    page.push(' ');
                    columns += 1;
                }
            }
            page.push_str(&word);
            columns += width;
        }
        page.push_str("\n\n");
    }
    page
}

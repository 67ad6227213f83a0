//! The reference of recipes, from their JSON Schema.

use moe::recipe::Recipe;
use moe_importance::ScorerConfig;
use serde_json::{Map, Value};

use super::verbs::{cell, paragraph};

/// Where a schema refers to another.
const DEFINITIONS: &str = "#/$defs/";

/// The page.
pub fn page() -> String {
    let schema = Recipe::schema();
    let mut page = String::from(
        "<!-- Generated from the schema of recipes: `cargo xtask book --write`. -->\n\n# Recipes\n\nA recipe is one JSON file that \
         `moe run` carries out. A key that is not listed here is an error.\n\n",
    );
    section("Recipe", &schema, &mut page);
    let none = Map::new();
    for (name, definition) in schema["$defs"].as_object().unwrap_or(&none) {
        section(name, definition, &mut page);
    }
    page.push_str("\n## Published recipes\n\n`moe run NAME` takes these by their name.\n\n| name | what it is | steps |\n|---|---|---|\n");
    for name in Recipe::names() {
        let recipe = Recipe::published(name).unwrap();
        let steps: Vec<&str> = recipe.steps.iter().map(|step| step.name()).collect();
        page.push_str(&format!("| `{name}` | {} | {} |\n", cell(&recipe.about), steps.join(", ")));
    }
    page.push_str("\n## Scorers\n\n| name | what its scores are |\n|---|---|\n");
    for (name, what) in ScorerConfig::DESCRIPTIONS {
        page.push_str(&format!("| `{name}` | {} |\n", cell(what)));
    }
    page.push_str("\n## Recipes of merging\n\n");
    let names: Vec<String> = moe_merge::Recipe::names().map(|name| format!("`{name}`")).collect();
    page.push_str(&paragraph(&format!("What `recipe` of a merge may name: {}.", names.join(", "))));
    page.push_str("\n## Methods of fine-tuning\n\n| name | what it trains | source |\n|---|---|---|\n");
    for method in moe_peft::METHODS {
        page.push_str(&format!("| `{}` | {} | {} |\n", method.name, cell(method.words), method.source));
    }
    let lines: Vec<String> = page.lines().map(|line| line.trim_end().to_owned()).collect();
    let mut tidy = lines.join("\n");
    while tidy.contains("\n\n\n") {
        tidy = tidy.replace("\n\n\n", "\n\n");
    }
    tidy + "\n"
}

fn section(name: &str, schema: &Value, page: &mut String) {
    page.push_str(&format!("\n## {name}\n\n{}", paragraph(&description(schema))));
    if let Some(properties) = schema["properties"].as_object() {
        fields(properties, &required(schema), page);
    }
    let variants = schema["oneOf"].as_array().or(schema["anyOf"].as_array());
    if let Some(variants) = variants {
        alternatives(variants, page);
    }
}

fn fields(properties: &Map<String, Value>, required: &[&str], page: &mut String) {
    page.push_str("| key | value | meaning |\n|---|---|---|\n");
    for (key, schema) in properties {
        let mut meaning = cell(&description(schema));
        match &schema["default"] {
            Value::Null if required.contains(&key.as_str()) => meaning.push_str(" (required)"),
            Value::Null => {}
            default => meaning.push_str(&format!(" [default: `{}`]", cell(&default.to_string()))),
        }
        page.push_str(&format!("| `{key}` | {} | {meaning} |\n", kind(schema)));
    }
    page.push('\n');
}

fn alternatives(variants: &[Value], page: &mut String) {
    page.push_str("| one of | meaning |\n|---|---|\n");
    for variant in variants {
        let form = match (variant["properties"].as_object(), variant["const"].as_str(), variant["enum"].as_array()) {
            (Some(properties), ..) => object_form(properties),
            (_, Some(text), _) => format!("`\"{text}\"`"),
            (_, _, Some(values)) => values.iter().map(|value| format!("`{value}`")).collect::<Vec<_>>().join(", "),
            _ => kind(variant),
        };
        page.push_str(&format!("| {form} | {} |\n", cell(&description(variant))));
    }
    page.push('\n');
}

/// An object by its keys: `{"score": Score}`, or `{"type": "refit", …}` where a tag tells variants apart.
fn object_form(properties: &Map<String, Value>) -> String {
    match properties.get("type").and_then(|tag| tag["const"].as_str()) {
        Some(tag) => format!("`{{\"type\": \"{tag}\", …}}`"),
        None => {
            let parts = properties.iter().map(|(key, schema)| format!("`\"{key}\"`: {}", kind(schema)));
            format!("{{ {} }}", parts.collect::<Vec<_>>().join(", "))
        }
    }
}

/// What kind of value a schema asks for, with links to what is defined on the page.
fn kind(schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str().and_then(|to| to.strip_prefix(DEFINITIONS)) {
        return format!("[{name}](#{})", name.to_lowercase());
    }
    if let Some(variants) = schema["anyOf"].as_array().or(schema["oneOf"].as_array()) {
        let kinds = variants.iter().filter(|variant| variant["type"] != "null").map(kind);
        return kinds.collect::<Vec<_>>().join(" or ");
    }
    let types: Vec<&str> = match &schema["type"] {
        Value::String(one) => vec![one.as_str()],
        Value::Array(many) => many.iter().filter_map(Value::as_str).filter(|name| *name != "null").collect(),
        _ => return "any".into(),
    };
    match types[..] {
        ["array"] => format!("list of {}", kind(&schema["items"])),
        _ => types.join(" or "),
    }
}

fn description(schema: &Value) -> String {
    // An example in the documentation of the code is one of Rust.
    let text = schema["description"].as_str().unwrap_or_default();
    let text = text.split("```").next().unwrap_or_default().trim();
    text.replace("[`run`](crate::run::run)", "`moe run`").replace("[`Data::samples`]", "`samples` of the data")
}

fn required(schema: &Value) -> Vec<&str> {
    schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

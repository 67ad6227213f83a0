//! What a template may say, against transformers: expressions.json holds what it renders (`make_expressions.py`).

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{ChatTemplate, Conversation};

#[derive(Deserialize)]
struct Goldens {
    messages: Vec<Value>,
    context: Map<String, Value>,
    cases: Vec<Golden>,
}

#[derive(Deserialize)]
struct Golden {
    template: String,
    text: Option<String>,
}

#[test]
fn templates_print_what_python_prints() {
    let goldens: Goldens = serde_json::from_str(include_str!("expressions.json")).unwrap();
    let mut wrong = Vec::new();
    for golden in &goldens.cases {
        let conversation = Conversation { messages: &goldens.messages, tools: None, arguments: None };
        let found = ChatTemplate::new(golden.template.clone(), goldens.context.clone())
            .and_then(|template| template.render(conversation, false));
        match (&golden.text, found) {
            (Some(text), Ok(found)) if *text == found => {}
            (None, Err(_)) => {}
            (text, found) => wrong.push(format!("{}\n    expected {text:?}\n    found    {found:?}", golden.template)),
        }
    }
    assert!(wrong.is_empty(), "{} of {} differ:\n{}", wrong.len(), goldens.cases.len(), wrong.join("\n"));
}

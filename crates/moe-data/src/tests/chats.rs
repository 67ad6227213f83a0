//! Chat templates against transformers: chats.json holds what it renders (`make_chats.py`).

use serde::Deserialize;
use serde_json::{Value, json};

use super::*;
use crate::{ChatTemplate, Conversation, LossOver, Row, RowEncoder};

#[derive(Deserialize)]
struct Goldens {
    cases: Vec<Golden>,
}

#[derive(Deserialize)]
struct Golden {
    template: String,
    messages: Vec<Value>,
    tools: Option<Value>,
    text: String,
    opened: String,
    ids: Vec<u32>,
}

fn goldens() -> Vec<Golden> {
    serde_json::from_str::<Goldens>(include_str!("chats.json")).unwrap().cases
}

fn source(template: &str) -> &'static str {
    match template {
        "qwen_kind" => include_str!("qwen_kind.jinja"),
        _ => include_str!("blocks.jinja"),
    }
}

fn template(source: &str) -> ChatTemplate {
    let special = json!({"eos_token": "<|endoftext|>"});
    ChatTemplate::new(source.to_owned(), special.as_object().unwrap().clone()).unwrap()
}

fn user(content: &str) -> Value {
    json!({"role": "user", "content": content})
}

fn assistant(content: &str) -> Value {
    json!({"role": "assistant", "content": content})
}

/// What the assistant wrote, by the template.
fn turns(source: &str, messages: &[Value]) -> Result<Vec<String>, Error> {
    let (text, spans) = template(source).render_turns(Conversation::new(messages))?;
    Ok(spans.into_iter().map(|(start, end)| text[start..end].to_owned()).collect())
}

#[test]
fn text_and_ids_are_those_of_transformers() {
    for golden in goldens() {
        let tokenizer = tokenizer().with_chat_template(template(source(&golden.template)));
        let conversation = Conversation { messages: &golden.messages, tools: golden.tools.as_ref() };
        assert_eq!(tokenizer.render_chat(conversation, false).unwrap(), golden.text);
        assert_eq!(tokenizer.render_chat(conversation, true).unwrap(), golden.opened);
        let row = Row::Messages { messages: golden.messages.clone(), tools: golden.tools.clone() };
        let sequence = RowEncoder::new(Some(&tokenizer), VOCAB_SIZE, LossOver::All).sequence(&row).unwrap();
        assert_eq!((sequence.ids, sequence.loss), (golden.ids, None));
    }
}

#[test]
fn what_the_assistant_wrote_is_found() {
    let qwen = source("qwen_kind");
    assert_eq!(turns(qwen, &[user("2 + 2?"), assistant("4")]).unwrap(), ["<think>\n\n</think>\n\n4<|im_end|>\n"]);
    // The reasoning of an earlier turn is dropped from the whole, but not where the turn is the last one.
    let reasoned = [user("a"), assistant("<think>\nlong\n</think>\n\nfirst"), user("b"), assistant("second")];
    assert_eq!(turns(qwen, &reasoned).unwrap(), ["first<|im_end|>\n", "<think>\n\n</think>\n\nsecond<|im_end|>\n"]);
    // Equal words of both sides are told apart.
    let same = [user("x"), assistant("x"), user("x"), assistant("x")];
    assert_eq!(turns(qwen, &same).unwrap(), ["x<|im_end|>\n", "<think>\n\n</think>\n\nx<|im_end|>\n"]);
    let called = [
        user("Weather?"),
        json!({"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "get", "arguments": {}}}]}),
        json!({"role": "tool", "content": "sunny"}),
        assistant("Sun."),
    ];
    assert_eq!(
        turns(qwen, &called).unwrap(),
        [
            "\n<tool_call>\n{\"name\": \"get\", \"arguments\": {}}\n</tool_call><|im_end|>\n",
            "<think>\n\n</think>\n\nSun.<|im_end|>\n"
        ]
    );
    // A generation prompt that opens a block of reasoning the whole does not have, and an assistant who speaks first.
    let opening = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}";
    assert_eq!(turns(opening, &[assistant("hi"), user("a"), assistant("b")]).unwrap(), ["hi;", "b;"]);
    assert_eq!(turns(opening, &[user("a")]).unwrap(), [""; 0]);
}

#[test]
fn alternation_is_no_obstacle_where_turns_stay_as_they_are() {
    let strict = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}\
                  [{{ m.role }}]{{ m.content }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    assert_eq!(turns(strict, &[user("a"), assistant("b"), user("b"), assistant("b")]).unwrap(), ["b;", "b;"]);
    let stripping = strict.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[1:] }}");
    assert_eq!(
        turns(&stripping, &[user("a"), assistant("*b"), user("b"), assistant("*b")]).unwrap_err().to_string(),
        "chat template: cannot tell which tokens of \"messages[1]\" the assistant wrote: the messages before it are rendered \
         differently when they stand alone"
    );
}

#[test]
fn a_template_that_hides_who_wrote_what_is_refused() {
    let counted = "{{ messages | length }} messages:{% for m in messages %}{{ m.content }}{% endfor %}";
    assert_eq!(
        turns(counted, &[user("a"), assistant("b")]).unwrap_err().to_string(),
        "chat template: cannot tell which tokens of \"messages[1]\" the assistant wrote: the messages before it are rendered \
         differently when they stand alone"
    );
}

#[test]
fn only_the_assistants_tokens_count_when_asked() {
    let tokenizer = tokenizer().with_chat_template(template(source("qwen_kind")));
    let encoder = RowEncoder::new(Some(&tokenizer), VOCAB_SIZE, LossOver::Completions);
    let messages = vec![user("a b c"), assistant("first thing"), user("d e"), assistant("second thing")];
    let sequence = encoder.sequence(&Row::Messages { messages, tools: None }).unwrap();
    let mask = sequence.loss.unwrap();
    let counted: Vec<u32> = sequence.ids.iter().zip(&mask).filter(|(_, counts)| **counts).map(|(id, _)| *id).collect();
    let expected = "first thing<|im_end|>\n<think>\n\n</think>\n\nsecond thing<|im_end|>\n";
    assert_eq!(tokenizer.decode(&counted).unwrap(), expected);
}

#[test]
fn templates_fail_with_their_reason() {
    let render =
        |source: &str, messages: &[Value]| message(template(source).render(Conversation::new(messages), false));
    assert_eq!(
        render(source("qwen_kind"), &[json!({"role": "oracle"})]),
        "chat template: Unexpected role oracle (line 51 of the template)"
    );
    assert_eq!(
        render("{{ messages[0].role.nothing.more }}", &[user("a")]),
        "chat template: `messages[0].role.nothing` is undefined (line 1 of the template)"
    );
    let error = ChatTemplate::new("{% for %}".into(), Default::default()).map(|_| ());
    assert!(message(error).starts_with("chat template: "));
}

#[test]
fn the_date_can_be_fixed() {
    let source = "{{ strftime_now('%d %b %Y') }}";
    let text = template(source).at_time(1_709_208_000).render(Conversation::new(&[]), false).unwrap();
    assert_eq!(text, "29 Feb 2024");
    assert_eq!(template(source).render(Conversation::new(&[]), false).unwrap().len(), text.len());
}

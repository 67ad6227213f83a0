//! Chat templates against transformers: chats.json holds what it renders (`make_chats.py`).

use serde::Deserialize;
use serde_json::{Value, json};

use super::*;
use crate::{Chat, ChatTemplate, Conversation, LossOver, Row, RowEncoder};

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
        let conversation = Conversation { messages: &golden.messages, tools: golden.tools.as_ref(), arguments: None };
        assert_eq!(tokenizer.render_chat(conversation, false).unwrap(), golden.text);
        assert_eq!(tokenizer.render_chat(conversation, true).unwrap(), golden.opened);
        let row = Row::Messages(Chat { tools: golden.tools.clone(), ..Chat::new(golden.messages.clone()) });
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
    // Where they do not, the words of the turn show where it stands.
    let stripping = strict.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[1:] }}");
    assert_eq!(turns(&stripping, &[user("a"), assistant("*b"), user("b"), assistant("*b")]).unwrap(), ["b;", "*b;"]);
    let counted = "{{ messages | length }} messages:{% for m in messages %}{{ m.content }}{% endfor %}";
    assert_eq!(turns(counted, &[user("a"), assistant("b")]).unwrap(), ["b"]);
}

#[test]
fn turns_are_found_by_their_words_where_renderings_do_not_fit() {
    // Tools stand before the last question, as Mistral has it; the turn before is rendered otherwise when it is the
    // last one.
    let tools = "{% for m in messages %}{% if loop.last or (loop.index0 == messages|length - 2) %}{% if m.role == 'user' and tools %}[TOOLS]{{ tools|tojson }}[/TOOLS]{% endif %}{% endif %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}[CALLS]{{ m.tool_calls|tojson }}</s>{% else %}{{ m.content|trim }}</s>{% endif %}{% endfor %}";
    let call =
        json!({"role": "assistant", "tool_calls": [{"function": {"name": "get", "arguments": "{\"city\": \"x\"}"}}]});
    let messages = [user("a"), assistant(" yes "), user("b"), call, user("c"), assistant("no")];
    let schema = json!([{"name": "get"}]);
    let (text, spans) =
        template(tools).render_turns(Conversation { tools: Some(&schema), ..Conversation::new(&messages) }).unwrap();
    let found: Vec<&str> = spans.iter().map(|(start, end)| &text[*start..*end]).collect();
    assert_eq!(found[0], "yes</s>");
    assert!(found[1].starts_with("get") || found[1].starts_with("[CALLS]"), "{found:?}");
    assert!(found[1].ends_with("\"city\": \"x\"}}}]</s>"), "{found:?}");
    assert_eq!(found[2], "no</s>");

    // A template that says how many messages follow, closes reasoning, and names each turn: the heading is not the
    // assistant's.
    let headed = "{{ messages|length }}{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{{ '<think></think>' if not loop.last else '<think>' + m.reasoning_content|default('') + '</think>' }}{% endif %}{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}";
    let messages = [user("a"), assistant("<think>hm</think>b"), user("assistant"), assistant("d")];
    assert_eq!(turns(headed, &messages).unwrap(), ["</think>b<|end|>", "</think>d<|end|>"]);
    // A turn that is left out has no tokens.
    let forgetful = "{{ messages|length }}{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }};{% endif %}{% endfor %}";
    assert_eq!(turns(forgetful, &[user("a"), assistant("b"), user("c"), assistant("d")]).unwrap(), ["d;"]);
}

#[test]
fn a_template_that_marks_what_the_assistant_writes_is_taken_at_its_word() {
    let marking = "{{ messages|length }}{% for m in messages %}{% if m.role == 'assistant' %}<a>{% generation %}{{ m.content }}!{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}";
    let messages = [user("a"), assistant("b"), user("c"), assistant("é")];
    assert_eq!(turns(marking, &messages).unwrap(), ["b!", "é!"]);
    assert_eq!(template(marking).render(Conversation::new(&messages), false).unwrap(), "4a<a>b!c<a>é!");
}

#[test]
fn a_template_that_hides_who_wrote_what_is_refused() {
    let doubled = "{{ messages | length }} messages:{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}";
    assert_eq!(
        turns(doubled, &[user("a"), assistant("b")]).unwrap_err().to_string(),
        "chat template: cannot tell which tokens of \"messages[1]\" the assistant wrote: the messages before it are rendered \
         differently when they stand alone; a loss over every token (--loss-over-prompts) needs no such marks"
    );
}

#[test]
fn reasoning_and_arguments_are_handed_over_as_templates_read_them() {
    let source = "{{ messages[0].thinking }}|{{ messages[0].reasoning_content }}|{{ messages[0].tool_calls[0].function.arguments|tojson }}|{{ enable_thinking }}";
    let message = json!({"role": "assistant", "reasoning": "r", "content": null, "tool_calls": [{"function": {"arguments": "{\"a\":1.0}"}}]});
    let arguments = json!({"enable_thinking": false});
    let messages = [message];
    let conversation = Conversation { arguments: arguments.as_object(), ..Conversation::new(&messages) };
    assert_eq!(template(source).render(conversation, false).unwrap(), "r|r|{\"a\": 1.0}|False");
}

#[test]
fn only_the_assistants_tokens_count_when_asked() {
    let tokenizer = tokenizer().with_chat_template(template(source("qwen_kind")));
    let encoder = RowEncoder::new(Some(&tokenizer), VOCAB_SIZE, LossOver::Completions);
    let messages = vec![user("a b c"), assistant("first thing"), user("d e"), assistant("second thing")];
    let sequence = encoder.sequence(&Row::Messages(Chat::new(messages))).unwrap();
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

/// Whoever made the model wrote the template: none ends the process, or keeps it.
#[test]
fn templates_that_run_in_circles_or_print_without_end_are_refused() {
    let doubled = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}";
    let nested = "{% set ns = namespace(x=['ab']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
    for source in [
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        doubled,
        &format!("{nested}{{{{ ns.x }}}}"),
        &format!("{nested}{{{{ ns.x | tojson }}}}"),
        "{{ '%99999999999d' | format(1) }}",
        "{{ '%.99999999999f' % 1.5 }}",
        "{{ '{:>99999999999}'.format(1) }}",
        "{{ 'a'.ljust(99999999999) }}",
        "{{ 'a'.center(9223372036854775807, 'four') }}",
        "{{ '-1'.zfill(9223372036854775807) }}",
        "{{ 'a' | center(99999999999) }}",
        "{{ 'a\tb'.expandtabs(99999999999) }}",
        "{{ 'a' | indent(99999999999, true) }}",
        "{{ messages | tojson(indent=99999999999) }}",
        "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
        "{{ ('b' * 99999).join(['a'] * 99999) }}",
        "{{ (['a'] * 99999) | join('b' * 99999) }}",
    ] {
        let result = template(source).render(Conversation::new(&[user("a")]), false);
        let error = result.map(|text| text.len()).unwrap_err().to_string();
        assert!(error.contains("it costs more than 20000000 instructions"), "{source}: {error}");
    }
    let padded = template("{{ '-1'.zfill(-9223372036854775808) }}{{ 'é'.rjust(4, '.') }}");
    assert_eq!(padded.render(Conversation::new(&[]), false).unwrap(), "-1...é");
}

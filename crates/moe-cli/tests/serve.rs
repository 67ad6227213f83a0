//! `moe serve`, as clients meet it: over HTTP, many at a time, some of which hang up.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use moe_cli::TINY_MOE;
use moe_core::data::{Sequence, Tokenizer, Wave};
use moe_core::{Engine, EngineOptions, Model};
use serde_json::{Value, json};

const TEMPLATE: &str =
    "{% for m in messages %}{{ 'Question: ' if m.role == 'user' else 'Answer:' }}{{ m.content }}\n{% endfor %}Answer:";

struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(model: &Path, more: &[&str]) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_moe"))
            .args(["serve", "--model", model.to_str().unwrap(), "--name", "tiny", "--listen", "127.0.0.1:0"])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("tiny at http://").unwrap_or_else(|| panic!("{line}")).to_string();
        Self { process, address }
    }

    fn connect(&self) -> std::io::Result<TcpStream> {
        let stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(Duration::from_secs(300)))?;
        Ok(stream)
    }

    /// Sends a request of HTTP/1.0, whose reply ends with the connection.
    fn send(&self, path: &str, body: Option<&Value>) -> std::io::Result<TcpStream> {
        let mut stream = self.connect()?;
        let (method, body) = body.map_or(("GET", String::new()), |body| ("POST", body.to_string()));
        let length = body.len();
        write!(stream, "{method} {path} HTTP/1.0\r\nHost: here\r\nContent-Length: {length}\r\n\r\n{body}")?;
        Ok(stream)
    }

    fn ask(&self, path: &str, body: Option<&Value>) -> (u16, String) {
        let mut stream = self.send(path, body).unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        let (head, body) = reply.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{reply}"));
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_string())
    }

    fn json(&self, path: &str, body: &Value) -> Value {
        let (status, reply) = self.ask(path, Some(body));
        assert_eq!(status, 200, "{body}: {reply}");
        serde_json::from_str(&reply).unwrap()
    }

    fn refused(&self, path: &str, body: &Value) -> (u16, String) {
        let (status, reply) = self.ask(path, Some(body));
        let reply: Value = serde_json::from_str(&reply).unwrap();
        (status, reply["error"]["message"].as_str().unwrap().to_string())
    }

    fn signal(&self) {
        assert!(Command::new("kill").args(["-TERM", &self.process.id().to_string()]).status().unwrap().success());
    }

    fn ended(&mut self) -> Option<i32> {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(120) {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("the server does not end");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The bundled model with a chat template.
fn chatting(directory: &Path) -> std::path::PathBuf {
    let model = directory.join("tiny-moe");
    std::fs::create_dir(&model).unwrap();
    for entry in std::fs::read_dir(TINY_MOE).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
        std::fs::copy(&entry, model.join(entry.file_name().unwrap())).unwrap();
    }
    std::fs::write(model.join("chat_template.jinja"), TEMPLATE).unwrap();
    model
}

fn question(at: usize) -> String {
    let (first, second, third) = (20 + at % 30, 10 + at % 17, 1 + at % 9);
    format!("Question: Vic finds {first} plums, then {second} more, and loses {third}. How many plums remain?\nAnswer:")
}

/// The parts of a streamed reply, and whether it says that it is complete.
fn parts(body: &str) -> (Vec<Value>, bool) {
    let data: Vec<&str> = body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let done = data.last() == Some(&"[DONE]");
    (data.iter().filter(|line| **line != "[DONE]").map(|line| serde_json::from_str(line).unwrap()).collect(), done)
}

#[test]
fn completions_and_chats_are_those_of_the_model_whole_or_streamed() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(&chatting(directory.path()), &[]);
    let (status, models) = server.ask("/v1/models", None);
    let models: Value = serde_json::from_str(&models).unwrap();
    assert_eq!((status, &models["data"][0]["id"]), (200, &json!("tiny")));
    assert_eq!(server.ask("/v1/models/tiny", None).0, 200);
    assert_eq!(server.ask("/v1/models/large", None).0, 404);
    assert_eq!(server.ask("/v2", None).0, 404);

    let prompt = question(7);
    let generated = Command::new(env!("CARGO_BIN_EXE_moe"))
        .args(["generate", "--model", TINY_MOE, "--prompt", &prompt, "--max-new-tokens", "40", "--json"])
        .output()
        .unwrap();
    let generated: Value = serde_json::from_slice(&generated.stdout).unwrap();
    let whole = json!({"model": "tiny", "prompt": prompt, "max_tokens": 40, "temperature": 0});
    let reply = server.json("/v1/completions", &whole);
    assert_eq!(reply["choices"][0]["text"], generated["completion"]);
    let tokens = Tokenizer::from_dir(TINY_MOE).unwrap().encode(&prompt).unwrap();
    assert_eq!(reply["usage"]["prompt_tokens"], tokens.len());
    assert!(["stop", "length"].contains(&reply["choices"][0]["finish_reason"].as_str().unwrap()));

    let mut streamed = whole.clone();
    (streamed["stream"], streamed["stream_options"]) = (json!(true), json!({"include_usage": true}));
    let (status, body) = server.ask("/v1/completions", Some(&streamed));
    let (sent, done) = parts(&body);
    assert!(status == 200 && done && sent.len() > 3, "{body}");
    let text: String = sent.iter().filter_map(|part| part["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, generated["completion"].as_str().unwrap());
    assert_eq!(sent.last().unwrap()["usage"], reply["usage"]);

    // A stop is not part of the text.
    let answer = generated["completion"].as_str().unwrap();
    let (before, _) = answer.split_once("####").unwrap_or_else(|| panic!("{answer}"));
    let mut stopped = whole.clone();
    stopped["stop"] = json!(["####"]);
    let reply = server.json("/v1/completions", &stopped);
    assert_eq!((&reply["choices"][0]["text"], &reply["choices"][0]["finish_reason"]), (&json!(before), &json!("stop")));

    // The template makes of the chat what was asked above, so that the answer is the same.
    let asked = prompt.strip_prefix("Question: ").unwrap().strip_suffix("\nAnswer:").unwrap();
    let messages = json!([{"role": "user", "content": asked}]);
    let chat = json!({"messages": messages, "max_tokens": 40, "temperature": 0, "logprobs": true, "top_logprobs": 2});
    let reply = server.json("/v1/chat/completions", &chat);
    assert_eq!(reply["choices"][0]["message"]["content"], generated["completion"]);
    let first = &reply["choices"][0]["logprobs"]["content"][0];
    assert_eq!(first["logprob"], first["top_logprobs"][0]["logprob"], "the likeliest token was chosen");
    let mut streamed = chat.clone();
    streamed["stream"] = json!(true);
    let (sent, done) = parts(&server.ask("/v1/chat/completions", Some(&streamed)).1);
    let text: String = sent.iter().filter_map(|part| part["choices"][0]["delta"]["content"].as_str()).collect();
    assert!(done && text == answer && sent[0]["choices"][0]["delta"]["role"] == "assistant", "{sent:?}");

    // The same seed draws the same, two choices draw for themselves.
    let drawn = json!({"prompt": "The ", "max_tokens": 12, "temperature": 1.5, "seed": 5, "n": 2});
    let [one, again] = [(); 2].map(|()| server.json("/v1/completions", &drawn));
    assert_eq!(one["choices"], again["choices"]);
    assert_ne!(one["choices"][0]["text"], one["choices"][1]["text"]);

    for (path, body, status, word) in [
        ("/v1/completions", json!({"prompt": "a", "model": "large"}), 404, "large"),
        ("/v1/completions", json!({"prompt": "a", "frequency_penalty": 1}), 400, "frequency_penalty"),
        ("/v1/completions", json!({"prompt": [999_999]}), 400, "vocabulary"),
        ("/v1/completions", json!({"prompt": "a", "max_tokens": 1_000_000}), 400, "at most"),
        ("/v1/completions", json!({"prompt": []}), 400, "at least one"),
        ("/v1/chat/completions", json!({"prompt": "a"}), 400, "prompt"),
    ] {
        let (found, message) = server.refused(path, &body);
        assert!(found == status && message.contains(word), "{body}: {found} {message}");
    }
}

#[test]
fn prompts_are_scored_as_the_loss_scores_them() {
    let server = Server::start(Path::new(TINY_MOE), &[]);
    let text = format!("{} 3 + 4 = 7. #### 7", question(3));
    let ids = Tokenizer::from_dir(TINY_MOE).unwrap().encode(&text).unwrap();
    let model = Model::open(TINY_MOE, &moe_core::device::device("flex").unwrap(), None).unwrap();
    let wave = Wave { id: 0, sequences: vec![Sequence::new(ids.clone())] };
    let engine = Engine::new(&model, EngineOptions { loss: true, ..EngineOptions::default() });
    let loss = engine.run(&wave, &mut moe_core::trace::Nobody).unwrap().loss.unwrap();
    for prompt in [json!(text), json!(ids), json!([ids])] {
        let body = json!({"prompt": prompt, "echo": true, "logprobs": 1, "max_tokens": 1, "temperature": 0});
        let reply = server.json("/v1/completions", &body);
        let logprobs = &reply["choices"][0]["logprobs"];
        let values = logprobs["token_logprobs"].as_array().unwrap();
        assert_eq!(values.len(), ids.len() + 1, "the prompt and a new token");
        assert!(values[0].is_null(), "nothing goes before the first");
        let sum: f64 = values[1..ids.len()].iter().map(|value| value.as_f64().unwrap()).sum();
        assert!((sum + loss).abs() < 1e-3 * loss, "{sum} {loss}");
        for (value, top) in values.iter().zip(logprobs["top_logprobs"].as_array().unwrap()).skip(1) {
            let best = top.as_object().unwrap().values().map(|value| value.as_f64().unwrap()).fold(f64::MIN, f64::max);
            assert!(value.as_f64().unwrap() <= best);
        }
        assert_eq!(logprobs["tokens"].as_array().unwrap().len(), values.len());
        assert!(reply["choices"][0]["text"].as_str().unwrap().starts_with(&text[..40]), "{reply}");
    }
    let alone = json!({"prompt": ids, "echo": true, "logprobs": 0, "max_tokens": 0});
    let reply = server.json("/v1/completions", &alone);
    assert_eq!(reply["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().len(), ids.len());
}

#[test]
fn sixty_four_clients_are_answered_though_some_hang_up() {
    let server = Server::start(Path::new(TINY_MOE), &["--batch", "24"]);
    let body =
        |at: usize| json!({"prompt": question(at), "max_tokens": 32, "temperature": 0, "stream": at.is_multiple_of(2)});
    let text = |body: &str, at: usize| -> String {
        let parts = if at.is_multiple_of(2) { parts(body).0 } else { vec![serde_json::from_str(body).unwrap()] };
        parts.iter().filter_map(|part| part["choices"][0]["text"].as_str()).collect()
    };
    let alone: Vec<String> = (0..8).map(|at| text(&server.ask("/v1/completions", Some(&body(at))).1, at)).collect();
    std::thread::scope(|scope| {
        for client in 0..64 {
            let (server, alone, at) = (&server, &alone, client % 8);
            scope.spawn(move || {
                let mut stream = server.send("/v1/completions", Some(&body(at))).unwrap();
                if client % 4 == 3 {
                    // Before anything came.
                    return;
                }
                if client % 8 == 2 {
                    // In the middle of a stream.
                    stream.read_exact(&mut [0; 64]).unwrap();
                    return;
                }
                let mut reply = String::new();
                stream.read_to_string(&mut reply).unwrap();
                let (head, body) = reply.split_once("\r\n\r\n").unwrap();
                assert!(head.starts_with("HTTP/1.0 200"), "{head}");
                assert_eq!(text(body, at), alone[at], "client {client}");
            });
        }
    });
    assert_eq!(text(&server.ask("/v1/completions", Some(&body(5))).1, 5), alone[5], "and those after them");
}

#[test]
fn what_the_queue_does_not_hold_is_refused_and_the_rest_is_answered() {
    let server = Server::start(Path::new(TINY_MOE), &["--batch", "1", "--queue", "2"]);
    let long = json!({"prompt": "The ", "max_tokens": 60, "temperature": 1.0, "seed": 1, "n": 16});
    let statuses: Vec<(u16, String)> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..12).map(|_| scope.spawn(|| server.ask("/v1/completions", Some(&long)))).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    let of = |status: u16| statuses.iter().filter(|(found, _)| *found == status).count();
    // Two in the queue, and what the worker has taken out of it before the others came.
    assert!(of(200) >= 2 && of(429) >= 1 && of(200) + of(429) == 12, "{statuses:?}");
    let (_, full) = statuses.iter().find(|(status, _)| *status == 429).unwrap();
    assert!(full.contains("queue"), "{full}");
}

#[test]
fn a_server_that_is_told_to_end_answers_what_is_under_way() {
    let mut server = Server::start(Path::new(TINY_MOE), &[]);
    let long = json!({"prompt": "The ", "max_tokens": 100, "temperature": 1.0, "seed": 1, "n": 8, "stream": true});
    let mut stream = server.send("/v1/completions", Some(&long)).unwrap();
    stream.read_exact(&mut [0; 32]).unwrap();
    server.signal();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.trim_end().ends_with("data: [DONE]"), "…{}", &rest[rest.len().saturating_sub(200)..]);
    assert_eq!(server.ended(), Some(0));
    assert!(server.connect().is_err(), "nobody listens any more");

    // Without time, a reply is cut off and does not say that it is complete.
    let mut server = Server::start(Path::new(TINY_MOE), &["--grace", "0"]);
    let longer = json!({"prompt": "The ", "max_tokens": 200, "temperature": 1.0, "seed": 1, "n": 64, "stream": true});
    let mut stream = server.send("/v1/completions", Some(&longer)).unwrap();
    stream.read_exact(&mut [0; 32]).unwrap();
    server.signal();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert!(!String::from_utf8_lossy(&rest).contains("[DONE]"));
    assert_eq!(server.ended(), Some(0));
}

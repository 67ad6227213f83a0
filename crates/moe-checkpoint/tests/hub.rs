//! Fetching and publishing, against a server on this machine that speaks the Hub's API.
#![cfg(feature = "hub")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use moe_checkpoint::Checkpoint;
use moe_checkpoint::hub::{HubAccess, HubOptions, HubProgress, PushOptions, fetch, push};
use serde_json::{Value, json};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_of_this_test";

/// What the server has and what it was asked.
#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// Files whose connection breaks in the middle.
    breaks: BTreeSet<String>,
    /// Files that are listed and not there.
    missing: BTreeSet<String>,
    /// Contents that were asked for, in order.
    asked: Vec<String>,
    /// Revisions that were asked for.
    revisions: Vec<String>,
    /// Commits: the message, and the names of files.
    commits: Vec<(String, Vec<String>)>,
    private: Option<bool>,
}

/// A Hub with one private repository, `owner/name`.
struct Hub {
    endpoint: String,
    state: Arc<Mutex<State>>,
}

impl Hub {
    fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = shared.clone();
                std::thread::spawn(move || while answer(&stream, &state).is_some() {});
            }
        });
        Self { endpoint, state }
    }

    fn access(&self, cache: &Path) -> HubAccess {
        HubAccess { endpoint: Some(self.endpoint.clone()), token: Some(TOKEN.into()), cache: Some(cache.into()) }
    }
}

/// Answers one request; none when the connection ends.
fn answer(stream: &TcpStream, state: &Mutex<State>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_string(), words.next()?.to_string());
    let (mut length, mut token) = (0, false);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let header = header.trim_end();
        if header.is_empty() {
            break;
        }
        let (name, value) = header.split_once(':')?;
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().ok()?,
            "authorization" => token = value.trim() == format!("Bearer {TOKEN}"),
            "expect" => drop(stream.try_clone().ok()?.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let path = target.split('?').next()?.to_string();
    let reply = if token { respond(&method, &path, &body, &mut state.lock().unwrap()) } else { Reply::status(401) };
    let mut out = stream.try_clone().ok()?;
    let mut head = format!("HTTP/1.1 {} X\r\nContent-Length: {}\r\n", reply.status, reply.body.len());
    reply.headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
    out.write_all(format!("{head}\r\n").as_bytes()).ok()?;
    if method == "HEAD" {
        return Some(());
    }
    if reply.breaks {
        out.write_all(&reply.body[..reply.body.len() / 2]).ok()?;
        let _ = out.shutdown(std::net::Shutdown::Both);
        return None;
    }
    out.write_all(&reply.body).ok()
}

struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    breaks: bool,
}

impl Reply {
    fn status(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: b"{}".to_vec(), breaks: false }
    }

    fn json(value: &Value) -> Self {
        let headers = vec![("Content-Type", "application/json".to_string())];
        Self { headers, body: value.to_string().into_bytes(), ..Self::status(200) }
    }
}

fn respond(method: &str, path: &str, body: &[u8], state: &mut State) -> Reply {
    if let Some(revision) = path.strip_prefix("/api/models/owner/name/revision/") {
        state.revisions.push(revision.to_string());
        return Reply::json(&json!({"id": "owner/name", "sha": COMMIT}));
    }
    if path.starts_with("/api/models/owner/name/tree/") {
        let files = state
            .files
            .iter()
            .map(|(name, bytes)| json!({"type": "file", "oid": etag(bytes), "size": bytes.len(), "path": name}));
        return Reply::json(&files.collect());
    }
    if let Some(name) = path.strip_prefix(&format!("/owner/name/resolve/{COMMIT}/")) {
        let Some(bytes) = state.files.get(name).filter(|_| !state.missing.contains(name)).cloned() else {
            return Reply::status(404);
        };
        if method == "GET" {
            state.asked.push(name.to_string());
        }
        let headers = vec![("ETag", format!("\"{}\"", etag(&bytes))), ("X-Repo-Commit", COMMIT.to_string())];
        let breaks = method == "GET" && state.breaks.remove(name);
        return Reply { headers, body: bytes, breaks, ..Reply::status(200) };
    }
    match (method, path) {
        ("POST", "/api/repos/create") => {
            let request: Value = serde_json::from_slice(body).unwrap();
            assert_eq!((&request["organization"], &request["name"]), (&json!("owner"), &json!("name")));
            if state.private.is_some() {
                return Reply::status(409);
            }
            state.private = request["private"].as_bool();
            Reply::json(&json!({"url": "http://hub/owner/name"}))
        }
        ("POST", "/api/models/owner/name/preupload/main") => {
            let request: Value = serde_json::from_slice(body).unwrap();
            let files = request["files"].as_array().unwrap().iter();
            let files: Vec<Value> = files
                .map(|file| json!({"path": file["path"], "uploadMode": "regular", "shouldIgnore": false}))
                .collect();
            Reply::json(&json!({"files": files}))
        }
        ("POST", "/api/models/owner/name/commit/main") => {
            let lines: Vec<Value> = body
                .split(|byte| *byte == b'\n')
                .filter(|l| !l.is_empty())
                .map(|l| serde_json::from_slice(l).unwrap())
                .collect();
            let message = lines[0]["value"]["summary"].as_str().unwrap().to_string();
            let names = lines[1..].iter().map(|line| {
                assert!(line["key"] == "file" && !line["value"]["content"].as_str().unwrap().is_empty());
                line["value"]["path"].as_str().unwrap().to_string()
            });
            state.commits.push((message, names.collect()));
            Reply::json(&json!({"commitUrl": "http://hub/owner/name/commit/1", "commitOid": COMMIT}))
        }
        _ => Reply::status(404),
    }
}

fn etag(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..40].to_string()
}

/// A small model.
fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/tf5/qwen2_moe")
}

fn files_of(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    entries
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_string(), std::fs::read(path).unwrap()))
        .collect()
}

/// Names of the files that a cache of the Hub has completely.
fn snapshot_files(cache: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut waiting = vec![cache.to_path_buf()];
    while let Some(dir) = waiting.pop() {
        for entry in std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap()) {
            if entry.path().is_dir() {
                waiting.push(entry.path());
            } else if dir.ancestors().any(|dir| dir.ends_with("snapshots")) {
                found.push(entry.file_name().into_string().unwrap());
            }
        }
    }
    found
}

#[test]
fn a_model_is_fetched_and_an_interrupted_fetch_goes_on() {
    let cache = tempfile::tempdir().unwrap();
    let mut files = files_of(&model());
    files.insert("pytorch_model.bin".into(), vec![1; 64]);
    let hub = Hub::start(files);
    hub.state.lock().unwrap().breaks.insert("model.safetensors".into());
    let options = HubOptions { revision: Some("v1".into()), access: hub.access(cache.path()), ..HubOptions::default() };
    let error = fetch("owner/name", &options, |_| {}).unwrap_err().to_string();
    assert!(error.starts_with("model `owner/name`: "), "{error}");
    let before = hub.state.lock().unwrap().asked.len();
    // Files are fetched side by side: those that were under way when one broke off may be incomplete, too.
    let complete = snapshot_files(cache.path());
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = told.clone();
    let directory = fetch("owner/name", &options, move |at| tell.lock().unwrap().push(at)).unwrap();
    assert_eq!(Checkpoint::open(&directory).unwrap().fingerprint(), Checkpoint::open(model()).unwrap().fingerprint());
    {
        let state = hub.state.lock().unwrap();
        let again = &state.asked[before..];
        assert!(again.contains(&"model.safetensors".to_string()), "{again:?}");
        let twice = again.iter().find(|name| complete.contains(*name));
        assert_eq!(twice, None, "what is there is not fetched again: {:?}", state.asked);
        assert!(!state.asked.contains(&"pytorch_model.bin".to_string()), "nobody reads that file");
        assert!(state.revisions.iter().all(|revision| revision == "v1"), "{:?}", state.revisions);
    }
    let all = hub.state.lock().unwrap().asked.len();
    assert_eq!(fetch("owner/name", &options, |_| {}).unwrap(), directory);
    assert_eq!(hub.state.lock().unwrap().asked.len(), all, "a complete model is not fetched again");
    let told = told.lock().unwrap();
    assert!(matches!(told.first(), Some(HubProgress::Started { .. })) && told.last() == Some(&HubProgress::Finished));
    // Now without a network.
    let nowhere = HubAccess { endpoint: Some("http://127.0.0.1:9".into()), ..hub.access(cache.path()) };
    let offline = HubOptions { offline: true, access: nowhere, ..options };
    assert_eq!(fetch("owner/name", &offline, |_| {}).unwrap(), directory);
}

#[test]
fn what_the_hub_refuses_is_said() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::start(files_of(&model()));
    let access = HubAccess { token: Some("hf_of_another".into()), ..hub.access(cache.path()) };
    assert!(!format!("{access:?}").contains("hf_of_another"));
    let options = HubOptions { access, ..HubOptions::default() };
    let error = fetch("owner/name", &options, |_| {}).unwrap_err().to_string();
    assert!(error.contains("owner/name") && !error.contains("hf_of_another"), "{error}");
    // A file that is listed and not there would make a model with a hole.
    hub.state.lock().unwrap().missing.insert("model.safetensors".into());
    let options = HubOptions { access: hub.access(cache.path()), ..HubOptions::default() };
    let error = fetch("owner/name", &options, |_| {}).unwrap_err().to_string();
    assert!(error.contains("model.safetensors: listed"), "{error}");
}

#[test]
fn a_model_is_published_with_its_card() {
    let directory = tempfile::tempdir().unwrap();
    for (name, bytes) in files_of(&model()) {
        std::fs::write(directory.path().join(name), bytes).unwrap();
    }
    std::fs::write(directory.path().join("README.md"), "# A model").unwrap();
    std::fs::write(directory.path().join("model.safetensors.partial"), "half").unwrap();
    let hub = Hub::start(BTreeMap::new());
    let access = hub.access(directory.path());
    let options = PushOptions { private: true, access, ..PushOptions::default() };
    let url = push(directory.path(), "owner/name", &options, |_| {}).unwrap();
    assert_eq!(url, "http://hub/owner/name/commit/1");
    // The second time the repository is there.
    push(directory.path(), "owner/name", &PushOptions { message: Some("Again".into()), ..options.clone() }, |_| {})
        .unwrap();
    let state = hub.state.lock().unwrap();
    assert_eq!(state.private, Some(true));
    let (message, names) = &state.commits[0];
    assert_eq!((message.as_str(), state.commits[1].0.as_str()), ("Upload model", "Again"));
    for name in ["README.md", "config.json", "model.safetensors"] {
        assert!(names.iter().any(|found| found == name), "{name}: {names:?}");
    }
    assert!(!names.iter().any(|name| name.ends_with(".partial")), "{names:?}");
    drop(state);
    // What is no model is not published.
    let empty = tempfile::tempdir().unwrap();
    assert!(push(empty.path(), "owner/name", &options, |_| {}).unwrap_err().to_string().contains("config.json"));
    assert!(push(directory.path(), "name", &options, |_| {}).unwrap_err().to_string().contains("owner/name"));
}

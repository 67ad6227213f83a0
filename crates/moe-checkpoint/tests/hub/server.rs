//! A server that speaks the Hub's API, as far as fetching and publishing models need it.
#![allow(dead_code, reason = "two tests share it, and each uses a part")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

/// The commit that every revision is.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The token that the server wants.
pub const TOKEN: &str = "hf_of_this_test";

/// What the server has and what it was asked.
#[derive(Default)]
pub struct State {
    /// What the repository has, by name.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Files whose connection breaks in the middle.
    pub breaks: BTreeSet<String>,
    /// Files whose connection breaks in the middle of the first piece that begins at this byte or later.
    pub breaks_from: BTreeMap<String, u64>,
    /// Names that the server gives to contents, other than its own.
    pub etags: BTreeMap<String, String>,
    /// Pieces that were asked for: of which file, from which byte.
    pub pieces: Vec<(String, u64)>,
    /// Files that are listed and not there.
    pub missing: BTreeSet<String>,
    /// Contents that were asked for, in order.
    pub asked: Vec<String>,
    /// Revisions that were asked for.
    pub revisions: Vec<String>,
    /// Commits: the message, and the names of files.
    pub commits: Vec<(String, Vec<String>)>,
    /// Whether the repository was made for its owner alone; none before it was made.
    pub private: Option<bool>,
}

/// A Hub with one private repository, `owner/name`.
pub struct Hub {
    /// Its address.
    pub endpoint: String,
    /// What it has and was asked.
    pub state: Arc<Mutex<State>>,
}

impl Hub {
    /// Starts it with these files.
    pub fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
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
}

/// Answers one request; none when the connection ends.
fn answer(stream: &TcpStream, state: &Mutex<State>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_string(), words.next()?.to_string());
    let (mut length, mut token, mut range) = (0, false, None);
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
            "range" => {
                let (start, end) = value.trim().strip_prefix("bytes=")?.split_once('-')?;
                range = Some(start.parse::<u64>().ok()?..end.parse::<u64>().ok()? + 1);
            }
            "authorization" => token = value.trim() == format!("Bearer {TOKEN}"),
            "expect" => drop(stream.try_clone().ok()?.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let path = target.split('?').next()?.to_string();
    let reply =
        if token { respond(&method, &path, &body, range, &mut state.lock().unwrap()) } else { Reply::status(401) };
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

fn respond(method: &str, path: &str, body: &[u8], range: Option<Range<u64>>, state: &mut State) -> Reply {
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
    // By branch, tag or commit, all of which are this one.
    if let Some((_, name)) = path.strip_prefix("/owner/name/resolve/").and_then(|rest| rest.split_once('/')) {
        let Some(bytes) = state.files.get(name).filter(|_| !state.missing.contains(name)).cloned() else {
            return Reply::status(404);
        };
        if method == "GET" && range.is_none() {
            state.asked.push(name.to_string());
        }
        let named = state.etags.get(name).cloned().unwrap_or_else(|| etag(&bytes));
        let mut headers = vec![("ETag", format!("\"{named}\"")), ("X-Repo-Commit", COMMIT.to_string())];
        if let Some(range) = range {
            state.pieces.push((name.to_string(), range.start));
            let breaks = state.breaks_from.get(name).is_some_and(|from| range.start >= *from);
            if breaks {
                state.breaks_from.remove(name);
            }
            headers.push(("Content-Range", format!("bytes {}-{}/{}", range.start, range.end - 1, bytes.len())));
            let body = bytes[range.start as usize..range.end as usize].to_vec();
            return Reply { headers, body, breaks, ..Reply::status(206) };
        }
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
pub fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5/qwen2_moe")
}

/// Contents of the files of a directory, by name.
pub fn files_of(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    entries
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_string(), std::fs::read(path).unwrap()))
        .collect()
}

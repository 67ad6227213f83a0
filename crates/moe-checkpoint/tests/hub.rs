//! Fetching and publishing, against a server on this machine that speaks the Hub's API.
#![cfg(feature = "hub")]

#[path = "hub/server.rs"]
mod server;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use moe_checkpoint::Checkpoint;
use moe_checkpoint::hub::{HubAccess, HubOptions, HubProgress, PushOptions, fetch, push};
use server::{Hub, TOKEN, files_of, model};

impl Hub {
    fn access(&self, cache: &Path) -> HubAccess {
        HubAccess { endpoint: Some(self.endpoint.clone()), token: Some(TOKEN.into()), cache: Some(cache.into()) }
    }
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
fn a_fetch_that_broke_off_goes_on_within_the_file() {
    let cache = tempfile::tempdir().unwrap();
    let mut files = files_of(&model());
    files.remove("expected.safetensors");
    let size = files["model.safetensors"].len() as u64;
    let piece = size / 7;
    let hub = Hub::start(files);
    hub.state.lock().unwrap().breaks_from.insert("model.safetensors".into(), 3 * piece);
    let options = HubOptions {
        access: hub.access(cache.path()),
        piece_bytes: std::num::NonZeroU64::new(piece),
        ..HubOptions::default()
    };
    let from = |asked: usize| -> Vec<u64> {
        hub.state.lock().unwrap().pieces[asked..].iter().map(|(_, start)| *start).collect()
    };
    let error = fetch("owner/name", &options, |_| {}).unwrap_err().to_string();
    assert!(error.contains("model.safetensors"), "{error}");
    assert_eq!(from(0), [0, piece, 2 * piece, 3 * piece]);
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = told.clone();
    let directory = fetch("owner/name", &options, move |at| tell.lock().unwrap().push(at)).unwrap();
    assert_eq!(Checkpoint::open(&directory).unwrap().fingerprint(), Checkpoint::open(model()).unwrap().fingerprint());
    assert_eq!(from(4)[0], 3 * piece, "what was there is not fetched again");
    let first = told.lock().unwrap().iter().find_map(|at| match at {
        HubProgress::File { done, .. } => Some(*done),
        _ => None,
    });
    assert_eq!(first, Some(3 * piece), "and counts as done");
    assert!(!hub.state.lock().unwrap().asked.iter().any(|name| name == "model.safetensors"), "never as a whole");
}

#[test]
fn pieces_of_two_contents_are_never_put_together() {
    let cache = tempfile::tempdir().unwrap();
    let mut files = files_of(&model());
    files.remove("expected.safetensors");
    let content = files["model.safetensors"].clone();
    let piece = content.len() as u64 / 5;
    let hub = Hub::start(files);
    let options = HubOptions {
        access: hub.access(cache.path()),
        piece_bytes: std::num::NonZeroU64::new(piece),
        ..HubOptions::default()
    };
    let broken = |hub: &Hub| {
        hub.state.lock().unwrap().breaks_from.insert("model.safetensors".into(), 2 * piece);
        fetch("owner/name", &options, |_| {}).unwrap_err().to_string()
    };
    broken(&hub);
    // The Hub has another content of that name now: nothing of the first is used.
    let sha256 = |bytes: &[u8]| -> String {
        use sha2::{Digest, Sha256};
        Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
    };
    hub.state.lock().unwrap().etags.insert("model.safetensors".into(), sha256(&content));
    let asked = hub.state.lock().unwrap().pieces.len();
    broken(&hub);
    assert_eq!(hub.state.lock().unwrap().pieces[asked].1, 0);
    // What was there and is wrong is found by its digest, and fetched anew.
    let blobs = cache.path().join("models--owner--name/blobs");
    let incomplete = blobs.join(format!("{}.moe-incomplete", sha256(&content)));
    let mut bytes = std::fs::read(&incomplete).unwrap();
    assert_eq!(bytes.len() as u64, 2 * piece);
    bytes[100] ^= 1;
    std::fs::write(&incomplete, bytes).unwrap();
    let error = fetch("owner/name", &options, |_| {}).unwrap_err().to_string();
    assert!(error.contains("digest") && error.contains("model.safetensors") && !incomplete.exists(), "{error}");
    let directory = fetch("owner/name", &options, |_| {}).unwrap();
    assert_eq!(std::fs::read(directory.join("model.safetensors")).unwrap(), content);
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

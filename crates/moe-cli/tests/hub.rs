//! `moe pull` and `moe push`, against a server on this machine that speaks the Hub's API.

#[path = "../../moe-checkpoint/tests/hub/server.rs"]
mod server;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use moe_checkpoint::Checkpoint;
use server::{Hub, TOKEN, files_of, model};

/// Runs the program as a person who has set the variables of the Hub.
fn moe(hub: &Hub, home: &Path, token: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe"));
    for proxy in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        command.env_remove(proxy);
    }
    command.env("HF_ENDPOINT", &hub.endpoint).env("HF_HOME", home).env("HF_TOKEN", token).env_remove("HF_HUB_CACHE");
    command.args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn ok(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn refused(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_model_is_pulled_by_its_id_and_a_pull_that_broke_off_goes_on() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::start(files_of(&model()));
    hub.state.lock().unwrap().breaks.insert("model.safetensors".into());
    let pull = ["pull", "owner/name", "--revision", "v1"];
    let error = refused(&moe(&hub, home.path(), TOKEN, &pull));
    assert!(error.starts_with("error: model `owner/name`: ") && !error.contains(TOKEN), "{error}");
    let asked = hub.state.lock().unwrap().asked.len();
    let directory = ok(&moe(&hub, home.path(), TOKEN, &pull));
    {
        let state = hub.state.lock().unwrap();
        assert!(state.asked[asked..].contains(&"model.safetensors".to_string()), "{:?}", state.asked);
        assert!(state.revisions.iter().all(|revision| revision == "v1"), "{:?}", state.revisions);
    }
    let pulled = Path::new(directory.trim());
    assert!(pulled.starts_with(home.path()), "the cache is in HF_HOME: {directory}");
    assert_eq!(Checkpoint::open(pulled).unwrap().fingerprint(), Checkpoint::open(model()).unwrap().fingerprint());
    let shown = ok(&moe(&hub, home.path(), TOKEN, &["inspect", directory.trim()]));
    assert!(shown.contains("qwen2_moe"), "{shown}");
    // What is there needs no server.
    let nowhere = Hub { endpoint: "http://127.0.0.1:9".into(), state: hub.state.clone() };
    assert_eq!(ok(&moe(&nowhere, home.path(), TOKEN, &[&pull[..], &["--offline"]].concat())), directory);
    // Another cache, and the token in a file, which goes before the variable.
    let (cache, file) = (home.path().join("elsewhere"), home.path().join("token"));
    std::fs::write(&file, format!("{TOKEN}\n")).unwrap();
    let more = ["--cache", cache.to_str().unwrap(), "--token-file", file.to_str().unwrap()];
    let elsewhere = ok(&moe(&hub, home.path(), "hf_of_another", &[&pull[..], &more].concat()));
    assert!(Path::new(elsewhere.trim()).starts_with(&cache), "{elsewhere}");
}

#[test]
fn a_stranger_is_refused_and_no_token_is_told() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::start(files_of(&model()));
    let error = refused(&moe(&hub, home.path(), "hf_of_another", &["pull", "owner/name"]));
    assert!(error.contains("owner/name") && !error.contains("hf_of_another"), "{error}");
}

#[test]
fn a_model_is_pushed_with_its_card() {
    let home = tempfile::tempdir().unwrap();
    let directory = home.path().join("model");
    std::fs::create_dir(&directory).unwrap();
    for (name, bytes) in files_of(&model()) {
        std::fs::write(directory.join(name), bytes).unwrap();
    }
    std::fs::write(directory.join("README.md"), "# Half of a model").unwrap();
    let hub = Hub::start(BTreeMap::new());
    let push = ["push", directory.to_str().unwrap(), "owner/name", "--private", "--message", "Half"];
    let commit = ok(&moe(&hub, home.path(), TOKEN, &push));
    assert_eq!(commit, "http://hub/owner/name/commit/1\n");
    let state = hub.state.lock().unwrap();
    let (message, names) = &state.commits[0];
    assert_eq!((message.as_str(), state.private), ("Half", Some(true)));
    for name in ["README.md", "config.json", "model.safetensors"] {
        assert!(names.iter().any(|found| found == name), "{name}: {names:?}");
    }
}

//! Disks that are full, files that cannot be read, and other processes: an error that names the file, nothing lost, and
//! a run that goes on from there.

use std::fs::{self, File, FileTimes};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use moe_cli::TINY_MOE;

use crate::support::{contents, moe, ok, refused, rows, text, words};

const SMALL: &str = "--samples 8 --length 48 --wave-tokens 128";

/// The program where no file may grow past so many blocks of 512 or 1024 bytes, as on a disk without room: the write
/// that would comes back short, the next one fails.
#[cfg(unix)]
fn without_room(blocks: u32, arguments: &[&str]) -> Output {
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    let mut command = Command::new("sh");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_moe")]).args(arguments);
    command.stdin(Stdio::null()).output().unwrap()
}

#[cfg(unix)]
#[test]
fn a_disk_without_room_is_an_error_that_names_the_file_and_the_run_goes_on_from_there() {
    let dir = tempfile::tempdir().unwrap();
    let data = rows("arithmetic_calibration");
    for (name, blocks, line) in [
        ("prune", 512, format!("prune --ratio 0.5 --form ragged --repair refit {SMALL}")),
        ("merge", 512, format!("merge --recipe hc-smoe --ratio 0.5 --form grouped {SMALL}")),
        ("score", 16, format!("score --scorer fisher --scorer reap {SMALL}")),
        ("tune", 64, "tune --method lora --steps 2 --samples 8 --length 48 --eval-rows 4".to_string()),
        ("quantize", 512, "quantize --format mxfp4".to_string()),
    ] {
        let [whole, out] = ["whole", "out"].map(|to| dir.path().join(format!("{name}-{to}")));
        let rows: &[&str] = if name == "quantize" { &[] } else { &["--data", &data] };
        let arguments = |to: &'static str, more: &[&'static str]| -> Vec<String> {
            let to = dir.path().join(format!("{name}-{to}"));
            let files = [&["--model", TINY_MOE], rows, &["--out", text(&to)], more].concat();
            words(&line, &files).into_iter().map(String::from).collect()
        };
        let run = |owned: Vec<String>| ok(&owned.iter().map(String::as_str).collect::<Vec<_>>());
        run(arguments("whole", &[]));
        let owned = arguments("out", &[]);
        let failed = without_room(blocks, &owned.iter().map(String::as_str).collect::<Vec<_>>());
        let error = String::from_utf8_lossy(&failed.stderr).into_owned();
        assert_eq!(failed.status.code(), Some(1), "{name}: {error}");
        let last = error.lines().last().unwrap();
        assert!(last.contains("File too large") && last.contains(&format!("{name}-out")), "{name}: {error}");
        let finished = out.join("config.json").exists() || out.join("adapter_config.json").exists();
        assert!(!finished && !error.contains("panicked"), "{name}: {error}");
        run(arguments("out", &["--resume"]));
        let files = |dir: &Path| -> Vec<(String, String)> {
            // But for what tells the time.
            contents(dir)
                .into_iter()
                .filter(|(name, _)| !name.contains("training") && !name.contains("report"))
                .collect()
        };
        // Training leaves an adapter in a folder, and files of how well and how fast beside it.
        let [whole, out] = [whole, out].map(|dir| if name == "tune" { dir.join("lora/model") } else { dir });
        assert!(!files(&out).is_empty());
        assert_eq!(files(&out), files(&whole), "{name}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn what_cannot_be_printed_is_an_error() {
    for arguments in [vec!["inspect", TINY_MOE], vec!["inspect", TINY_MOE, "--json"], vec!["run", "list"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moe"));
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = command.args(&arguments).stdin(Stdio::null()).stdout(full).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(error.contains("stdout: No space left on device"), "{arguments:?}: {error}");
    }
}

/// The memory of a process at its first address is a file that can be opened and not be read: an error of the device.
#[cfg(target_os = "linux")]
#[test]
fn files_that_cannot_be_read_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let prune = |model: &Path, data: &str| -> String {
        let line = format!("prune --ratio 0.5 {SMALL}");
        let (code, error) = refused(&words(&line, &["--model", text(model), "--data", data, "--out", text(&out)]));
        assert!(code == 1 && !out.exists() && !error.contains("panicked"), "{error}");
        error
    };
    let broken = dir.path().join("rows.jsonl");
    std::os::unix::fs::symlink("/proc/self/mem", &broken).unwrap();
    let error = prune(Path::new(TINY_MOE), text(&broken));
    assert!(error.contains("rows.jsonl: Input/output error"), "{error}");
    let data = rows("arithmetic_calibration");
    for name in
        ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"]
    {
        let model = dir.path().join(format!("model-{name}"));
        fs::create_dir(&model).unwrap();
        for entry in fs::read_dir(TINY_MOE).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() && path.file_name().unwrap() != name {
                fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
            }
        }
        fs::create_dir(model.join(name)).unwrap();
        let error = prune(&model, &data);
        assert!(error.contains(&format!("{name}: ")) && error.contains("s a directory"), "{error}");
        fs::remove_dir(model.join(name)).unwrap();
        std::os::unix::fs::symlink("/proc/self/mem", model.join(name)).unwrap();
        let error = prune(&model, &data);
        let expected = if name == "model.safetensors" { "truncated: 0 bytes" } else { "Input/output error" };
        assert!(error.contains(&format!("{name}: {expected}")), "{error}");
        fs::remove_file(model.join(name)).unwrap();
    }
}

#[test]
fn a_second_process_in_a_directory_is_told_so_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let data = rows("arithmetic_calibration");
    let at = |name: &str| dir.path().join(name);
    let recipe = dir.path().join("recipe.json");
    let value = serde_json::json!({
        "model": TINY_MOE, "out": at("run"), "data": {"calibration": [data], "samples": 8, "length": 48},
        "steps": [{"score": {"scorers": ["fisher"]}}, {"prune": {"budget": {"ratio": 0.5}}}, {"write": {}}]
    });
    fs::write(&recipe, value.to_string()).unwrap();
    let model = ["--model", TINY_MOE, "--data", &data];
    let with = |line: &str, out: &str| -> Vec<String> {
        let out = at(out);
        words(line, &[&model[..], &["--out", text(&out), "--resume"]].concat()).into_iter().map(String::from).collect()
    };
    let run = vec!["run".to_string(), text(&recipe).to_string(), "--resume".to_string()];
    let cases = [
        ("run/steps", run),
        ("prune.partial", with(&format!("prune --ratio 0.5 {SMALL}"), "prune")),
        ("score/statistics", with(&format!("score --scorer reap {SMALL}"), "score")),
    ];
    for (folder, arguments) in cases {
        let folder = at(folder);
        fs::create_dir_all(&folder).unwrap();
        // Another process, as far as the lock knows.
        let held = moe_checkpoint::lock_directory(&folder).unwrap();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let (code, error) = refused(&arguments);
        assert!(code == 1 && error.contains("another process"), "{arguments:?}: {error}");
        let left: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, [".moe-lock"], "{arguments:?}");
        drop(held);
        ok(&arguments);
    }
}

#[test]
fn a_training_is_gone_on_with_by_one_process_and_by_its_own_recipe_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (out, data) = (dir.path().join("out"), rows("arithmetic_calibration"));
    let files = ["--model", TINY_MOE, "--data", &data, "--out", text(&out)];
    let line = |steps: usize| format!("tune --method lora --steps {steps} --samples 8 --length 48 --eval-rows 4");
    let resumed = [&files[..], &["--resume"]].concat();
    ok(&words(&line(2), &files));
    let (code, error) = refused(&words(&line(3), &resumed));
    assert!(code == 1 && error.contains("result.json") && error.contains("another recipe"), "{error}");
    // As it stands before the last step of the run is done.
    let method = out.join("lora");
    let model = contents(&method.join("model"));
    fs::remove_file(method.join("result.json")).unwrap();
    fs::remove_dir_all(method.join("model")).unwrap();
    fs::remove_dir_all(method.join("adapter")).unwrap();
    let held = File::options().write(true).open(method.join("training/.lock")).unwrap();
    held.lock().unwrap();
    let (code, error) = refused(&words(&line(2), &resumed));
    assert!(code == 1 && error.contains("training") && error.contains("another process"), "{error}");
    drop(held);
    ok(&words(&line(2), &resumed));
    assert_eq!(contents(&method.join("model")), model);
}

/// A folder of work loses its name before it goes file by file, so that half of one is never gone on from.
#[test]
fn what_is_left_of_a_working_folder_that_was_being_removed_goes() {
    let dir = tempfile::tempdir().unwrap();
    let data = rows("arithmetic_calibration");
    for (name, line) in [
        ("quantize", format!(r#"quantize --format {{"type":"int","bits":4,"group_size":32}} {SMALL}"#)),
        ("merge", format!("merge --recipe hc-smoe --ratio 0.5 --form grouped {SMALL}")),
    ] {
        let out = dir.path().join(name);
        let files = ["--model", TINY_MOE, "--data", &data, "--out", text(&out)];
        ok(&words(&line, &files));
        let (model, half) = (contents(&out), dir.path().join(format!("{name}.work.removed")));
        fs::create_dir(&half).unwrap();
        fs::write(half.join("wave-000000.safetensors"), b"what was there").unwrap();
        let (code, error) = refused(&words(&line, &[&files[..], &["--resume"]].concat()));
        // Done is done.
        assert!(code == 1 && error.contains("exists"), "{name}: {error}");
        assert!(!half.exists() && !dir.path().join(format!("{name}.work")).exists(), "{name}");
        assert_eq!(contents(&out), model, "{name}");
    }
}

/// What a run goes on from is told by digests, not by times: clocks may jump.
#[test]
fn files_from_the_past_and_from_the_future_are_gone_on_from_alike() {
    let dir = tempfile::tempdir().unwrap();
    let (out, recipe) = (dir.path().join("out"), dir.path().join("recipe.json"));
    let value = serde_json::json!({
        "model": TINY_MOE, "out": out,
        "data": {"calibration": [rows("arithmetic_calibration")], "samples": 8, "length": 48},
        "steps": [{"score": {"scorers": ["fisher"]}}, {"prune": {"budget": {"ratio": 0.5}}}, {"write": {}}]
    });
    fs::write(&recipe, value.to_string()).unwrap();
    ok(&["run", text(&recipe)]);
    let model = contents(&out.join("model"));
    let century = Duration::from_secs(100 * 365 * 24 * 3600);
    for time in [SystemTime::UNIX_EPOCH, SystemTime::now() + century] {
        let mut folders = vec![out.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if let Ok(file) = File::options().write(true).open(&path) {
                    file.set_times(FileTimes::new().set_modified(time).set_accessed(time)).unwrap();
                }
            }
        }
        let again: serde_json::Value =
            serde_json::from_str(&ok(&["run", text(&recipe), "--resume", "--json"])).unwrap();
        for step in again["steps"].as_array().unwrap() {
            assert_eq!(step["reused"], serde_json::json!(true), "{step}");
        }
        assert_eq!(contents(&out.join("model")), model);
    }
    assert!(moe(&["run", text(&recipe)]).status.code() == Some(1), "without --resume the directory is in use");
}

//! The fuzzer: gives inputs to the target that `MOE_FUZZ_TARGET` names, after it has written the inputs to begin with
//! into the folder `MOE_FUZZ_CORPUS`, but for those that are longer than `MOE_FUZZ_LONGEST` bytes.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use moe_fuzz::{TARGETS, Target};

static TARGET: LazyLock<&'static Target> = LazyLock::new(|| {
    let name = std::env::var("MOE_FUZZ_TARGET").unwrap_or_default();
    let known: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    let found = TARGETS.iter().find(|target| target.name == name);
    found.unwrap_or_else(|| stop(&format!("MOE_FUZZ_TARGET is `{name}`, expected one of {}", known.join(", "))))
});

fn stop(reason: &str) -> ! {
    eprintln!("{reason}");
    std::process::exit(2)
}

fn begin() {
    let Some(folder) = std::env::var_os("MOE_FUZZ_CORPUS").map(PathBuf::from) else { return };
    let inputs = TARGET.inputs().unwrap_or_else(|error| stop(&error.to_string()));
    let longest = std::env::var("MOE_FUZZ_LONGEST").map_or(Ok(usize::MAX), |longest| longest.parse());
    let longest = longest.unwrap_or_else(|error| stop(&format!("MOE_FUZZ_LONGEST: {error}")));
    for (number, input) in inputs.iter().filter(|input| input.len() <= longest).enumerate() {
        let path = folder.join(format!("seed-{number:04}"));
        std::fs::write(&path, input).unwrap_or_else(|error| stop(&format!("{}: {error}", path.display())));
    }
}

fuzz_target!(init: begin(), |data: &[u8]| (TARGET.run)(data));

//! Crates of this workspace compiled with what their dependencies are compiled without: coverage for the fuzzer, checks
//! of addresses for tests. Cargo calls this program in place of the compiler for them, and for nothing else, so that
//! nothing of Burn is built twice.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::{Result, at};

/// Says which [`Instrument`] this program compiles with, if it stands in for the compiler.
const STANDS_IN: &str = "MOE_INSTRUMENT";

/// A way to compile.
pub struct Instrument {
    name: &'static str,
    flags: &'static [&'static str],
    /// Crates that are compiled as ever.
    plain: &'static [&'static str],
}

/// Coverage for libFuzzer, and checks of arithmetic.
pub const COVERAGE: Instrument = Instrument {
    name: "coverage",
    flags: &[
        "-Cpasses=sancov-module",
        "-Cllvm-args=-sanitizer-coverage-level=4",
        "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
        "-Cllvm-args=-sanitizer-coverage-pc-table",
        "-Cllvm-args=-sanitizer-coverage-trace-compares",
        "-Ccodegen-units=1",
        "-Coverflow-checks=on",
        "-Cdebug-assertions=on",
        "--cfg=fuzzing",
        // The counters of functions that are not linked go with them: the fuzzer looks at all there are after each
        // input.
        "-Clink-arg=-Wl,-z,start-stop-gc",
    ],
    // They compute and run; what of theirs is read as JSON is compiled where it is read.
    plain: &["moe_core", "moe_nn", "moe"],
};

/// AddressSanitizer, whose runtime comes with the toolchain, though the flag is not yet stable.
pub const ADDRESSES: Instrument = Instrument {
    name: "addresses",
    flags: &["-Zsanitizer=address", "-Cunsafe-allow-abi-mismatch=sanitizer", "-Cdebug-assertions=on"],
    plain: &[],
};

/// Stands in for the compiler, if Cargo called this program for that.
pub fn compiler() -> Option<Result<i32>> {
    let name = std::env::var_os(STANDS_IN)?;
    let mut arguments = std::env::args_os().skip(1);
    let compiler = arguments.next()?;
    let Some(instrument) = [&COVERAGE, &ADDRESSES].into_iter().find(|known| name == known.name) else {
        return Some(Err(format!("{STANDS_IN} is `{}`: unknown", name.display()).into()));
    };
    let arguments: Vec<_> = arguments.collect();
    let mut command = Command::new(&compiler);
    command.args(&arguments);
    if instrument.is_for(&arguments) {
        // Only here, since dependencies look at it as well.
        command.args(instrument.flags).env("RUSTC_BOOTSTRAP", "1");
    }
    let status = command.status().map_err(at(Path::new(&compiler)));
    Some(status.map(|status| status.code().unwrap_or(1)).map_err(Into::into))
}

impl Instrument {
    /// Cargo, told to compile the crates of the workspace with this.
    pub fn cargo(&self, root: &Path) -> Result<Command> {
        // Cargo tells builds apart by the path of what stands in for the compiler, and by nothing else of it.
        let program = root.join("target/instrument").join(self.name);
        if let Some(folder) = program.parent() {
            fs::create_dir_all(folder).map_err(at(folder))?;
        }
        let temporary = program.with_extension("new");
        fs::copy(std::env::current_exe()?, &temporary).map_err(at(&temporary))?;
        fs::rename(&temporary, &program).map_err(at(&program))?;
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.env("RUSTC_WORKSPACE_WRAPPER", program).env(STANDS_IN, self.name).current_dir(root);
        Ok(command)
    }

    /// Whether these arguments compile something that counts: scripts and macros run in the compiler, and Cargo also
    /// just asks the compiler what it is.
    fn is_for(&self, arguments: &[OsString]) -> bool {
        let says = |first: &str, second: &str| arguments.windows(2).any(|pair| pair[0] == first && pair[1] == second);
        let is_named = arguments.iter().any(|argument| argument == "--crate-name");
        let plain = ["___", "build_script_build"].iter().chain(self.plain).any(|name| says("--crate-name", name));
        is_named && !plain && !says("--crate-type", "proc-macro")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_programs_are_instrumented_and_what_runs_in_the_compiler_is_not() {
        let is_for = |instrument: &Instrument, words: &str| {
            let arguments: Vec<OsString> = words.split_whitespace().map(OsString::from).collect();
            instrument.is_for(&arguments)
        };
        for instrument in [&COVERAGE, &ADDRESSES] {
            assert!(is_for(instrument, "--crate-name moe_checkpoint --crate-type lib src/lib.rs"));
            assert!(is_for(instrument, "--crate-name moe_fuzz --crate-type bin src/main.rs"));
            for plain in ["-vV", "- --crate-name ___ --print=cfg", "--crate-name build_script_build build.rs"] {
                assert!(!is_for(instrument, plain), "{plain}");
            }
            assert!(!is_for(instrument, "--crate-name derive --crate-type proc-macro src/lib.rs"));
        }
        assert!(!is_for(&COVERAGE, "--crate-name moe_core src/lib.rs"));
        assert!(is_for(&ADDRESSES, "--crate-name moe_core src/lib.rs"));
    }
}

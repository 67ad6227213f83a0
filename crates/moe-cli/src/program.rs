//! The command line of the program `moe`: its verbs, and what each calls.

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use moe::progress::Progress;

use crate::{
    adapt, adapter, apply, cli, compare, convert, delta, eval, finetune, generate, hub, inspect, merge, prune,
    quantize, run, score, serve, trace, upcycle,
};

/// What a person who has a model and some rows would do.
const FIRST_STEPS: &str = "First steps:
  moe inspect DIR                                                        what the model is
  moe prune --model DIR --data rows.jsonl --ratio 0.5 --out OUT --check  what halving its experts would take
  moe prune --model DIR --data rows.jsonl --ratio 0.5 --out OUT          do it
  moe run list                                                           published methods, by name";

/// Makes Mixture-of-Experts language models small and adaptable: importance of experts and units, pruning, merging,
/// fine-tuning
///
/// Every verb reads Hugging Face checkpoints and writes what transformers, vLLM and llama.cpp load, unless a form says
/// otherwise.
#[derive(Parser)]
#[command(name = "moe", version, after_help = format!("{FIRST_STEPS}\n\n{}", cli::EXIT_CODES))]
struct Program {
    /// Log what happens to stderr; twice for more. MOE_LOG chooses finely: MOE_LOG=moe_core=debug
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Inspect(inspect::Arguments),
    Score(score::Arguments),
    Prune(Box<prune::Arguments>),
    Merge(merge::Arguments),
    Upcycle(Box<upcycle::Arguments>),
    Apply(apply::Arguments),
    Quantize(quantize::Arguments),
    Tune(finetune::Arguments),
    Adapt(Box<adapt::Arguments>),
    Eval(eval::Arguments),
    Compare(compare::Arguments),
    Generate(generate::Arguments),
    Serve(serve::Arguments),
    Trace(trace::Arguments),
    Adapter(adapter::Arguments),
    Delta(delta::Arguments),
    Run(run::Arguments),
    Convert(convert::Arguments),
    Pull(hub::PullArguments),
    Push(hub::PushArguments),
    /// Prints a script that completes verbs and options in a shell
    #[command(after_help = "Example: moe completions bash > /etc/bash_completion.d/moe")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Writes a manual page per verb
    #[command(after_help = "Example: moe man --out /usr/local/share/man/man1")]
    Man {
        /// The folder for the pages
        #[arg(long, value_name = "DIR")]
        out: std::path::PathBuf,
    },
}

/// The command line as clap knows it: verbs, options, their values and help.
pub fn command() -> clap::Command {
    Program::command()
}

/// Runs the program on the arguments of the process.
pub fn main() -> ExitCode {
    let verbosity = |program: &Program| program.verbose;
    cli::run_logging(verbosity, |program: Program| match program.verb {
        Verb::Inspect(arguments) => {
            let facts = inspect::run(&arguments)?;
            Ok(if arguments.json { format!("{:#}\n", facts.json()) } else { facts.to_string() })
        }
        Verb::Score(arguments) => {
            cli::allocator(arguments.max_memory);
            let report = score::run(&arguments, Progress::stderr())?;
            cli::shown(&report, arguments.json)
        }
        Verb::Prune(arguments) => prune::run(&arguments, Progress::stderr()),
        Verb::Apply(arguments) => cli::shown(&apply::run(&arguments, Progress::stderr())?, arguments.json),
        Verb::Quantize(arguments) if arguments.frontier => {
            let report = quantize::run_frontier(&arguments, Progress::stderr())?;
            cli::shown(&report, arguments.json)
        }
        Verb::Quantize(arguments) => {
            let report = quantize::run(&arguments, Progress::stderr())?;
            cli::shown(&report, arguments.json)
        }
        Verb::Convert(arguments) => cli::shown(&convert::run(&arguments)?, arguments.json),
        Verb::Pull(arguments) => hub::pull(&arguments, Progress::stderr()),
        Verb::Push(arguments) => hub::push(&arguments, Progress::stderr()),
        Verb::Run(arguments) => run::run(&arguments, Progress::stderr()),
        Verb::Merge(arguments) => {
            cli::allocator(arguments.max_memory);
            match merge::run(&arguments, Progress::stderr())? {
                Some(report) => cli::shown(&report, arguments.json),
                None if arguments.share.shard.is_some() => {
                    let work = arguments.work.as_deref().unwrap_or(&arguments.out);
                    Ok(format!("a share of the evidence: {}\n", work.display()))
                }
                None => Ok("checked: nothing was done\n".into()),
            }
        }
        Verb::Upcycle(arguments) => {
            cli::allocator(arguments.max_memory);
            match upcycle::run(&arguments)? {
                Some(report) => cli::shown(&report, arguments.json),
                None => Ok("checked: nothing was done\n".into()),
            }
        }
        Verb::Tune(arguments) => {
            cli::allocator(arguments.max_memory);
            finetune::print(arguments, Progress::stderr())
        }
        Verb::Adapt(arguments) => adapt::run(&arguments, Progress::stderr()),
        Verb::Eval(arguments) => {
            cli::allocator(arguments.model.max_memory);
            let report = eval::run(&arguments, Progress::stderr())?;
            cli::shown(&report, arguments.json)
        }
        Verb::Compare(arguments) => {
            cli::allocator(arguments.max_memory);
            let report = compare::run(&arguments, Progress::stderr())?;
            cli::shown(&report, arguments.json)
        }
        Verb::Generate(arguments) => {
            cli::allocator(arguments.model.max_memory);
            generate::run(&arguments)
        }
        Verb::Serve(arguments) => {
            cli::allocator(arguments.model.max_memory);
            serve::run(&arguments, Progress::stderr()).map(|()| String::new())
        }
        Verb::Trace(arguments) => {
            cli::allocator(arguments.max_memory);
            cli::shown(&trace::trace(&arguments)?, arguments.json)
        }
        Verb::Adapter(arguments) => adapter::run(arguments),
        Verb::Delta(arguments) => {
            let json = arguments.json;
            cli::shown(&delta::run(arguments)?, json)
        }
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Program::command(), "moe", &mut script);
            Ok(String::from_utf8_lossy(&script).into_owned())
        }
        Verb::Man { out } => {
            std::fs::create_dir_all(&out).map_err(moe::Error::io(&out))?;
            clap_mangen::generate_to(Program::command(), &out).map_err(moe::Error::io(&out))?;
            Ok(format!("manual pages are in {}\n", out.display()))
        }
    })
}

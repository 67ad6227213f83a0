//! The command line of the program `moe`: its verbs, and what each calls.

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use moe::progress::Progress;
use moe_checkpoint::group::{self, Group};

use crate::{
    Error, Result, adapt, adapter, apply, cli, compare, convert, delta, eval, finetune, generate, hub, inspect, merge,
    prune, quantize, run, score, serve, trace, upcycle,
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

/// Runs the program on the arguments of the process, alone or as one of those that a launcher of MPI has started.
pub fn main() -> ExitCode {
    let verbosity = |program: &Program| program.verbose;
    let mut joined = None;
    let code = cli::run_logging(verbosity, |program: Program| {
        let group = joined.insert(group::start()?);
        let (rank, size) = (group.rank(), group.size());
        let result = match size > 1 && !program.verb.is_shared() {
            true => Err(Error::Usage(format!(
                "found {size} processes, expected one: run, prune, score, merge, tune and eval share their work out, this verb does not"
            ))),
            false => program.verb.run(&**group),
        };
        match group.agree(result) {
            Ok(text) => Ok(if rank == 0 { text } else { String::new() }),
            // Whoever failed says why, and so does the first, where people look.
            Err(_) if rank > 0 && group.failed() != Some(rank) => Err(Error::Elsewhere),
            Err(error) => Err(error),
        }
    });
    // Here MPI waits for all: nobody is stopped by the launcher before it has said what it has to say.
    drop(joined);
    code
}

impl Verb {
    /// Whether several processes share the work of this verb.
    fn is_shared(&self) -> bool {
        matches!(self, Self::Run(_) | Self::Prune(_) | Self::Score(_) | Self::Merge(_) | Self::Tune(_) | Self::Eval(_))
    }

    /// What it prints.
    fn run(self, group: &dyn Group) -> Result<String> {
        let progress = if group.rank() == 0 { Progress::stderr() } else { Progress::hidden() };
        match self {
            Self::Inspect(arguments) => {
                let facts = inspect::run(&arguments)?;
                Ok(if arguments.json { format!("{:#}\n", facts.json()) } else { facts.to_string() })
            }
            Self::Score(arguments) => {
                cli::allocator(arguments.max_memory);
                let report = score::run(&arguments, group, progress)?;
                cli::shown(&report, arguments.json)
            }
            Self::Prune(arguments) => prune::run(&arguments, group, progress),
            Self::Apply(arguments) => cli::shown(&apply::run(&arguments, progress)?, arguments.json),
            Self::Quantize(arguments) if arguments.frontier => {
                let report = quantize::run_frontier(&arguments, progress)?;
                cli::shown(&report, arguments.json)
            }
            Self::Quantize(arguments) => {
                let report = quantize::run(&arguments, progress)?;
                cli::shown(&report, arguments.json)
            }
            Self::Convert(arguments) => cli::shown(&convert::run(&arguments)?, arguments.json),
            Self::Pull(arguments) => hub::pull(&arguments, progress),
            Self::Push(arguments) => hub::push(&arguments, progress),
            Self::Run(arguments) => run::run(&arguments, group, progress),
            Self::Merge(arguments) => {
                cli::allocator(arguments.max_memory);
                match merge::run(&arguments, group, progress)? {
                    Some(report) => cli::shown(&report, arguments.json),
                    None if arguments.share.shard.is_some() => {
                        let work = arguments.work.as_deref().unwrap_or(&arguments.out);
                        Ok(format!("a share of the evidence: {}\n", work.display()))
                    }
                    None => Ok("checked: nothing was done\n".into()),
                }
            }
            Self::Upcycle(arguments) => {
                cli::allocator(arguments.max_memory);
                match upcycle::run(&arguments)? {
                    Some(report) => cli::shown(&report, arguments.json),
                    None => Ok("checked: nothing was done\n".into()),
                }
            }
            Self::Tune(arguments) => {
                cli::allocator(arguments.max_memory);
                finetune::print_in_group(arguments, group, progress)
            }
            Self::Adapt(arguments) => adapt::run(&arguments, progress),
            Self::Eval(arguments) => {
                cli::allocator(arguments.model.max_memory);
                let report = eval::run(&arguments, group, progress)?;
                cli::shown(&report, arguments.json)
            }
            Self::Compare(arguments) => {
                cli::allocator(arguments.max_memory);
                let report = compare::run(&arguments, progress)?;
                cli::shown(&report, arguments.json)
            }
            Self::Generate(arguments) => {
                cli::allocator(arguments.model.max_memory);
                generate::run(&arguments)
            }
            Self::Serve(arguments) => {
                cli::allocator(arguments.model.max_memory);
                serve::run(&arguments, progress).map(|()| String::new())
            }
            Self::Trace(arguments) => {
                cli::allocator(arguments.max_memory);
                cli::shown(&trace::trace(&arguments)?, arguments.json)
            }
            Self::Adapter(arguments) => adapter::run(arguments),
            Self::Delta(arguments) => {
                let json = arguments.json;
                cli::shown(&delta::run(arguments)?, json)
            }
            Self::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Program::command(), "moe", &mut script);
                Ok(String::from_utf8_lossy(&script).into_owned())
            }
            Self::Man { out } => {
                std::fs::create_dir_all(&out).map_err(moe::Error::io(&out))?;
                clap_mangen::generate_to(Program::command(), &out).map_err(moe::Error::io(&out))?;
                Ok(format!("manual pages are in {}\n", out.display()))
            }
        }
    }
}

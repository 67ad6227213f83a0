//! Adapters as files: merged into a model, combined, converted, looked at.

use std::path::PathBuf;

use clap::ValueEnum;
use moe_checkpoint::Existing;
use moe_peft::{
    adapter_files::{AdapterInput, AdapterLayout, CombineAdapters, ConvertAdapter, MergeAdapters, inspect},
    lora::Naming,
    merge::Combination,
};

use crate::{Result, cli};

/// Merges, combines, converts and looks at adapters: LoRA as PEFT has it, mixtures, deltas
#[derive(Clone, Debug, clap::Parser)]
#[command(
    name = "adapter",
    after_help = "Example: moe adapter merge --model models/OLMoE --adapter adapters/math --adapter adapters/code=0.5 --out out/OLMoE"
)]
pub struct Arguments {
    /// What to do
    #[command(subcommand)]
    pub verb: Verb,
}

/// What to do.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Verb {
    /// Write a model with adapters in its weights
    #[command(
        after_help = "Example: moe adapter merge --model models/OLMoE --adapter adapters/math --out out/OLMoE-math"
    )]
    Merge {
        /// The model and the adapters
        #[command(flatten)]
        input: Inputs,
        /// Where the result goes
        #[command(flatten)]
        output: Output,
    },
    /// Write one adapter that stands for several
    #[command(
        after_help = "Example: moe adapter combine --model models/OLMoE --adapter a=0.7 --adapter b=0.3 --how svd --rank 16 --out ab"
    )]
    Combine {
        /// The model and the adapters
        #[command(flatten)]
        input: Inputs,
        /// cat: all ranks side by side, exactly the sum; svd: the sum cut to --rank; linear: of one rank, approximately
        #[arg(long, default_value = "cat", requires_if("svd", "rank"))]
        how: How,
        /// Rank of the result of svd
        #[arg(long, value_parser = cli::at_least(1))]
        rank: Option<usize>,
        /// How it is written
        #[command(flatten)]
        layout: Layout,
        /// Where the result goes
        #[command(flatten)]
        output: Output,
    },
    /// Write an adapter in another layout; what began as a part of the weights (PiSSA, OLoRA, CorDA) becomes a plain
    /// LoRA
    #[command(
        after_help = "Example: moe adapter convert --model models/OLMoE --adapter adapters/math --layout per-expert --one-alpha --out out/for-llama.cpp"
    )]
    Convert {
        /// The model and the adapter
        #[command(flatten)]
        input: Inputs,
        /// How it is written
        #[command(flatten)]
        layout: Layout,
        /// Where the result goes
        #[command(flatten)]
        output: Output,
    },
    /// Say what an adapter is, and with --model whether it fits
    #[command(after_help = "Example: moe adapter inspect adapters/math --model models/OLMoE")]
    Inspect {
        /// Directory of the adapter, or the file of a delta
        #[arg(value_name = "DIR")]
        adapter: PathBuf,
        /// Directory of a model that it should fit
        #[arg(long, value_name = "DIR")]
        model: Option<PathBuf>,
        /// One JSON object on stdout
        #[arg(long)]
        json: bool,
    },
}

/// A model and adapters for it.
#[derive(Clone, Debug, clap::Args)]
pub struct Inputs {
    /// Directory of the model
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Directory of an adapter or file of a delta, with a weight if not all of it counts; repeatable
    #[arg(long = "adapter", value_name = "DIR[=WEIGHT]", required = true, value_parser = weighted)]
    pub adapters: Vec<(PathBuf, f64)>,
    /// The adapter as it began, for one that took a part of the weights
    #[arg(long, value_name = "DIR")]
    pub initial: Option<PathBuf>,
    /// For mixtures, the weight of each expert in place of what the router decides: an approximation
    #[arg(long, value_name = "WEIGHT")]
    pub experts_at: Option<f64>,
}

/// Where a result goes.
#[derive(Clone, Debug, clap::Args)]
pub struct Output {
    /// New directory
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Replace what is there
    #[arg(long)]
    pub force: bool,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// How an adapter is written.
#[derive(Clone, Debug, clap::Args)]
pub struct Layout {
    /// Experts fused, as in transformers 5, or one by one [default: fused where PEFT has a fused form]
    #[arg(long)]
    pub layout: Option<Experts>,
    /// One lora_alpha for all, the rest in B: what llama.cpp's converter reads
    #[arg(long)]
    pub one_alpha: bool,
}

/// How experts are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Experts {
    /// All of a layer together.
    Fused,
    /// Each by itself.
    PerExpert,
}

/// How adapters become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum How {
    /// Side by side.
    Cat,
    /// Sums of A and of B.
    Linear,
    /// Cut to the largest singular values.
    Svd,
}

impl Inputs {
    fn adapters(&self) -> Vec<AdapterInput> {
        let input = |(path, weight): &(PathBuf, f64)| AdapterInput {
            weight: *weight,
            initial: self.initial.clone(),
            experts_at: self.experts_at,
            ..AdapterInput::new(path)
        };
        self.adapters.iter().map(input).collect()
    }
}

impl Output {
    fn existing(&self) -> Existing {
        if self.force { Existing::Force } else { Existing::Refuse }
    }
}

impl Layout {
    fn layout(&self) -> AdapterLayout {
        let naming = self.layout.map(|experts| match experts {
            Experts::Fused => Naming::Fused,
            Experts::PerExpert => Naming::PerExpert,
        });
        AdapterLayout { naming, one_alpha: self.one_alpha }
    }
}

/// A path, and a weight after the last `=`.
fn weighted(text: &str) -> std::result::Result<(PathBuf, f64), String> {
    match text.rsplit_once('=') {
        None => Ok((text.into(), 1.0)),
        Some((path, weight)) => match weight.parse::<f64>() {
            Ok(weight) if weight.is_finite() && weight != 0.0 && !path.is_empty() => Ok((path.into(), weight)),
            _ => Err(format!("found `{text}`, expected DIR or DIR=WEIGHT, a finite number other than 0")),
        },
    }
}

/// Does it; what is printed.
///
/// # Errors
/// Arguments that do not go together, and what stops it.
pub fn run(arguments: Arguments) -> Result<String> {
    match arguments.verb {
        Verb::Merge { input, output } => {
            let job = MergeAdapters::new(&input.model, input.adapters(), &output.out);
            cli::shown(&MergeAdapters { existing: output.existing(), ..job }.run()?, output.json)
        }
        Verb::Combine { input, how, rank, layout, output } => {
            let how = match (how, rank) {
                (How::Cat, None) => Combination::Cat,
                (How::Linear, None) => Combination::Linear,
                (How::Svd, Some(rank)) => Combination::Svd { rank },
                _ => return Err(crate::Error::Usage("--rank is for --how svd, which needs it".into())),
            };
            let job = CombineAdapters::new(&input.model, input.adapters(), how, &output.out);
            let job = CombineAdapters { layout: layout.layout(), existing: output.existing(), ..job };
            cli::shown(&job.run()?, output.json)
        }
        Verb::Convert { input, layout, output } => {
            let mut adapters = input.adapters();
            let (Some(adapter), true) = (adapters.pop(), adapters.is_empty()) else {
                return Err(crate::Error::Usage("convert takes one --adapter; combine makes one of several".into()));
            };
            let job = ConvertAdapter::new(&input.model, adapter, &output.out);
            let job = ConvertAdapter { layout: layout.layout(), existing: output.existing(), ..job };
            cli::shown(&job.run()?, output.json)
        }
        Verb::Inspect { adapter, model, json } => cli::shown(&inspect(&adapter, model.as_deref())?, json),
    }
}

//! `volley simulate`: a planned deployment serves a trace in virtual time, before anyone rents it.

mod deployment;
mod flags;
mod play;
mod popularity;

use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;

use clap::{Args, Parser, ValueEnum};
use volley_actors::Scheduler;
use volley_planner::simulate::{Deployed, Situation, Trace};
use volley_planner::{Hardware, Setting};

use self::deployment::resolve;
use self::flags::{GpuFlag, OutageFlag};
use self::popularity::popularity;
use crate::failure::Failure;

/// Prompt tokens of a step on one worker, where nothing says it.
const PREFILL_TOKENS: u32 = 512;

/// Serve a trace on a deployment in virtual time.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct SimulateArgs {
    /// A plan: what `volley plan --json` prints
    #[arg(long, value_name = "FILE", conflicts_with_all = ["config", "attention", "attention_workers", "experts", "expert_workers", "micro_batches", "rows"])]
    plan: Option<PathBuf>,
    /// A configuration (volley.toml): workers, micro-batches, limits and types are its own; the hardware is said by --attention and --experts, or by a profile
    #[arg(long, value_name = "FILE", conflicts_with_all = ["attention_workers", "expert_workers", "micro_batches"])]
    config: Option<PathBuf>,
    /// A directory with a config.json, or a name: mixtral-8x22b, dbrx, scaled-moe, deepseek-v3, ...; with --plan, what the plan must be for
    #[arg(long, value_name = "MODEL", required_unless_present_any = ["plan", "config"])]
    model: Option<String>,
    /// GPUs, prices and what is reached of them (TOML), over the catalogue inside the program; or what `volley profile` wrote
    #[arg(long, value_name = "FILE")]
    hardware: Option<PathBuf>,
    /// Transport between the sides
    #[arg(long, value_name = "NAME")]
    transport: Option<String>,
    /// Type of the weights: f32, bf16, fp8, q8 or q4
    #[arg(long, value_name = "TYPE")]
    dtype: Option<String>,
    /// GPUs of an attention worker
    #[arg(long, value_name = "GPU[:TP]", required_unless_present_any = ["plan", "config"])]
    attention: Option<GpuFlag>,
    /// Attention workers
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    attention_workers: u16,
    /// GPUs of an expert worker
    #[arg(long, value_name = "GPU[:TP]", required_unless_present_any = ["plan", "config"])]
    experts: Option<GpuFlag>,
    /// Expert workers [default: one for each expert]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    expert_workers: Option<u16>,
    /// Micro-batches in flight
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..))]
    micro_batches: u8,
    /// Sequences of an attention worker in one micro-batch [default: 64]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rows: Option<u32>,
    /// Prompt tokens that one step computes at most on one worker [default: 512]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..1_000_000))]
    prefill_tokens: Option<u32>,
    /// Requests: a JSON object a line, with arrival_s, input_tokens and output_tokens (Mooncake's names are read too)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["rate", "duration"])]
    trace: Option<PathBuf>,
    /// Without a trace: requests a second, at random
    #[arg(
        long,
        value_name = "REQUESTS",
        required_unless_present = "trace",
        allow_negative_numbers = true
    )]
    rate: Option<f64>,
    /// Without a trace: for how long requests come, seconds
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 60.0,
        allow_negative_numbers = true
    )]
    duration: f64,
    /// Without a trace: mean tokens of a prompt [the default is the median of the paper's trace]
    #[arg(long, value_name = "TOKENS", default_value_t = 571.0)]
    mean_input: f64,
    /// Without a trace: mean tokens of an answer
    #[arg(long, value_name = "TOKENS", default_value_t = 159.0)]
    mean_output: f64,
    /// Prompts come computed from a prefill cluster, as in the paper: one costs a row, and its KV blocks
    #[arg(long)]
    prefilled: bool,
    /// Skew of the experts by Zipf's law: 0 is even
    #[arg(
        long,
        value_name = "EXPONENT",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    zipf: f64,
    /// Measured popularity: a JSON array of each expert's rows, or what `/admin/experts` answered
    #[arg(long, value_name = "FILE", conflicts_with = "zipf")]
    popularity: Option<PathBuf>,
    /// Each hop takes longer by a share drawn evenly up to this
    #[arg(
        long,
        value_name = "SHARE",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    jitter: f64,
    /// A worker that is gone for a while, as expert-2@10+5: from second 10, for 5 seconds
    #[arg(long, value_name = "WORKER@AT+FOR")]
    fail: Vec<OutageFlag>,
    /// Each expert is on two workers, so that the loss of one stops nothing
    #[arg(long)]
    replicas: bool,
    /// Time until the loss of a worker is noticed, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    notice: f64,
    /// Seed of everything that is drawn
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How the data plane is played
    #[arg(long, value_enum, default_value_t = Detail::Rounds)]
    detail: Detail,
    /// Write what was computed when as a Chrome trace, the last spans of each worker
    #[arg(long, value_name = "FILE")]
    timeline: Option<PathBuf>,
    /// Write a page with plots: throughput over attention workers, over micro-batches, and by price over pairs of GPUs
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  volley simulate --model dbrx --attention A800:8 --attention-workers 4 --experts A800 --rate 20 --duration 300 --zipf 0.8
  volley simulate --model mixtral-8x22b --attention H20 --experts L40S:2 --trace trace.jsonl --report simulated.html
  volley plan --model dbrx --json > plan.json && volley simulate --plan plan.json --rate 50 --fail expert-2@10+5 --replicas --json
  volley profile --out machine.toml && volley simulate --config volley.toml --hardware machine.toml --rate 20
  volley simulate --plan plan.json --rate 2 --duration 5 --detail frames --timeline rally.json

Scheduling is that of `serve`: the same frontend and scheduler plan every step. docs/simulation.md says what is played and what is assumed.
Exit code 1 if the input makes no sense or requests cannot be served; standard error says why.";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Detail {
    /// One event for each layer and micro-batch; for any size
    Rounds,
    /// Every worker's own logic and every frame; for small clusters
    Frames,
}

/// Makes the scheduler that is simulated; again when it dies of a fault.
type MakeScheduler = Rc<dyn Fn() -> Box<dyn Scheduler>>;

/// The command by itself, in a program of a user's own.
#[derive(Debug, Parser)]
#[command(
    about = "Simulate a deployment with a scheduler of one's own",
    max_term_width = 110
)]
struct Alone {
    #[command(flatten)]
    args: SimulateArgs,
}

/// `volley simulate` with a scheduler of one's own, for a program's `main`: the same flags, from the process's arguments.
pub fn simulate_with(make: impl Fn() -> Box<dyn Scheduler> + 'static) -> ExitCode {
    crate::cli::exit(simulate(&Alone::parse().args, Some(Rc::new(make))))
}

/// Runs the command.
///
/// # Errors
/// What was wrong with the input, or why requests cannot be served.
pub(crate) fn run(args: SimulateArgs) -> Result<(), Failure> {
    simulate(&args, None)
}

fn simulate(args: &SimulateArgs, make: Option<MakeScheduler>) -> Result<(), Failure> {
    let hardware = match &args.hardware {
        Some(path) => Hardware::with_file(path)?,
        None => Hardware::embedded(),
    };
    let resolved = resolve(args, &hardware)?;
    let trace = match &args.trace {
        Some(path) => Trace::read(path)?,
        None => {
            let rate = args.rate.unwrap_or_default();
            Trace::draw(
                rate,
                args.duration,
                args.mean_input,
                args.mean_output,
                args.seed,
            )?
        }
    };
    let popularity = popularity(args, &resolved.model)?;
    let workload = trace.workload();
    let situation = Situation {
        setting: Setting {
            hardware: &hardware,
            model: &resolved.model,
            precision: &resolved.precision,
            workload: &workload,
            transport: &resolved.transport,
        },
        popularity: &popularity,
    };
    let prefill = match (args.prefilled, args.prefill_tokens, &resolved.outline) {
        (true, ..) => trace.longest(),
        (false, Some(tokens), _) => tokens,
        (false, None, Some(outline)) => outline.prefill_tokens,
        (false, None, None) => PREFILL_TOKENS,
    };
    let mut deployed = Deployed::new(situation, &resolved.deployment, trace.longest(), prefill)?;
    deployed.shape.replicas = args.replicas;
    resolved.configure(&mut deployed);
    let shipped = deployed.clone();
    let make = make.unwrap_or_else(|| Rc::new(move || shipped.scheduler()));
    for (name, value) in [("--jitter", args.jitter), ("--notice", args.notice)] {
        if !(value.is_finite() && value >= 0.0) {
            return Err(Failure::new(format!(
                "{name} {value}: give a number that is not negative"
            )));
        }
    }
    match args.detail {
        Detail::Rounds => play::rounds(
            args,
            situation,
            &resolved.deployment,
            &deployed,
            &make,
            &trace,
        ),
        Detail::Frames => play::frames(args, &deployed, make, &trace),
    }
}

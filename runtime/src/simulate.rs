//! `volley simulate`: a planned deployment serves a trace in virtual time, before anyone rents it.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::str::FromStr;
use std::time::{Duration, Instant};

use clap::{Args, Parser, ValueEnum};
use serde::Deserialize;
use serde_json::json;
use volley_actors::simulation::{Fault, FaultKind};
use volley_actors::{Scheduler, Timeline};
use volley_planner::simulate::{
    Deployed, GpuSide, Layout, Outage, Report, Routing, Situation, Trace, Variation, frames, page,
};
use volley_planner::{Dtype, Hardware, ModelShape, Precision};
use volley_transports::{Role, WorkerId};

use crate::failure::Failure;

/// Spans kept of each worker for a timeline.
const TIMELINE_SPANS: usize = 4096;

/// Serve a trace on a deployment in virtual time.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct SimulateArgs {
    /// A plan (JSON): model, precision, transport and the deployment, as docs/simulation.md shows
    #[arg(long, value_name = "FILE", conflicts_with_all = ["attention", "attention_workers", "experts", "expert_workers", "micro_batches", "rows"])]
    plan: Option<PathBuf>,
    /// A directory with a config.json, or a name: mixtral-8x22b, dbrx, scaled-moe, deepseek-v3, ...; with --plan, what the plan must be for
    #[arg(long, value_name = "MODEL", required_unless_present = "plan")]
    model: Option<String>,
    /// GPUs, prices and what is reached of them (TOML), over the catalogue inside the program
    #[arg(long, value_name = "FILE")]
    hardware: Option<PathBuf>,
    /// Transport between the sides
    #[arg(long, value_name = "NAME")]
    transport: Option<String>,
    /// Type of the weights: f32, bf16, fp8, q8 or q4
    #[arg(long, value_name = "TYPE")]
    dtype: Option<String>,
    /// GPUs of an attention worker
    #[arg(long, value_name = "GPU[:TP]", required_unless_present = "plan")]
    attention: Option<GpuFlag>,
    /// Attention workers
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    attention_workers: u16,
    /// GPUs of an expert worker
    #[arg(long, value_name = "GPU[:TP]", required_unless_present = "plan")]
    experts: Option<GpuFlag>,
    /// Expert workers [default: one for each expert]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    expert_workers: Option<u16>,
    /// Micro-batches in flight
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..))]
    micro_batches: u8,
    /// Sequences of an attention worker in one micro-batch
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    rows: u32,
    /// Prompt tokens that one step computes at most on one worker
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..1_000_000))]
    prefill_tokens: u32,
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
  volley simulate --plan plan.json --rate 50 --fail expert-2@10+5 --replicas --json
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

/// GPUs of a worker.
#[derive(Debug, Clone, PartialEq)]
struct GpuFlag(GpuSide);

impl FromStr for GpuFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (gpu, tp) = text.split_once(':').unwrap_or((text, "1"));
        let tp = tp.parse().ok().filter(|tp| *tp > 0);
        let tp = tp.ok_or_else(|| {
            format!("write a GPU and how many make a worker, as A800:8, not {text:?}")
        })?;
        Ok(GpuFlag(GpuSide {
            gpu: gpu.to_owned(),
            tp,
        }))
    }
}

/// A worker that is gone for a while.
#[derive(Debug, Clone, Copy, PartialEq)]
struct OutageFlag(Outage);

impl FromStr for OutageFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (worker, times) = text.split_once('@')?;
            let (at, lasts) = times.split_once('+')?;
            let (role, index) = worker.rsplit_once('-')?;
            let role = match role {
                "attention" => Role::Attention,
                "expert" => Role::Expert,
                _ => return None,
            };
            Some(Outage {
                worker: role.worker(index.parse().ok()?),
                at_s: at.parse().ok()?,
                lasts_s: lasts.parse().ok()?,
            })
        };
        parse().map(OutageFlag).ok_or_else(|| {
            format!("write a worker, when it goes and for how long, as expert-2@10+5, not {text:?}")
        })
    }
}

/// The parts of a plan that matter here.
#[derive(Deserialize)]
struct PlanFile {
    model: NamedModel,
    precision: Precision,
    transport: String,
    plan: Best,
}

#[derive(Deserialize)]
struct NamedModel {
    name: String,
}

#[derive(Deserialize)]
struct Best {
    best: Planned,
}

#[derive(Deserialize)]
struct Planned {
    deployment: Layout,
}

/// What is simulated, resolved.
struct Resolved {
    model: ModelShape,
    precision: Precision,
    transport: String,
    layout: Layout,
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
    let Resolved {
        model,
        precision,
        transport,
        layout,
    } = resolve(args)?;
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
    let popularity = popularity(args, &model)?;
    let situation = Situation {
        hardware: &hardware,
        model: &model,
        precision: &precision,
        transport: &transport,
        popularity: &popularity,
        mean_context: trace.mean_context(),
    };
    let prefill = if args.prefilled {
        trace.longest()
    } else {
        args.prefill_tokens
    };
    let mut deployed = Deployed::new(situation, &layout, trace.longest(), prefill)?;
    deployed.shape.replicas = args.replicas;
    let shipped = deployed.clone();
    let make = make.unwrap_or_else(|| Rc::new(move || shipped.scheduler()));
    if !(args.jitter.is_finite()
        && args.jitter >= 0.0
        && args.notice.is_finite()
        && args.notice >= 0.0)
    {
        return Err(Failure::new(
            "--jitter and --notice must be numbers that are not negative",
        ));
    }
    if args.detail == Detail::Frames {
        return play_frames(args, &deployed, make, &trace);
    }
    let variation = Variation {
        jitter: args.jitter,
        draws: true,
        prefilled: args.prefilled,
        outages: args.fail.iter().map(|flag| flag.0).collect(),
        notice_s: args.notice,
        seed: args.seed,
    };
    let workers = workers(&layout);
    let timeline = Timeline::new(
        workers,
        if args.timeline.is_some() {
            TIMELINE_SPANS
        } else {
            0
        },
    );
    let started = Instant::now();
    let report = deployed.serve(make(), &trace, &variation, &timeline)?;
    let took = started.elapsed();
    if let Some(path) = &args.timeline {
        write_timeline(path, &timeline)?;
    }
    if let Some(path) = &args.report {
        let page = page(situation, &layout, &report, args.seed);
        std::fs::write(path, page).map_err(|error| Failure::file(path, &error))?;
    }
    print_report(args, &report, took)
}

fn resolve(args: &SimulateArgs) -> Result<Resolved, Failure> {
    let dtype = args.dtype.as_deref().map(dtype).transpose()?;
    let Some(path) = &args.plan else {
        let (Some(model), Some(attention), Some(experts)) =
            (&args.model, &args.attention, &args.experts)
        else {
            return Err(Failure::new(
                "give --plan, or --model, --attention and --experts",
            ));
        };
        let model = ModelShape::find(model)?;
        let expert_workers = args.expert_workers.map_or(model.experts, usize::from);
        return Ok(Resolved {
            precision: Precision::of_weights(dtype.unwrap_or(Dtype::Bf16)),
            transport: args.transport.clone().unwrap_or_else(|| "m2n".to_owned()),
            layout: Layout {
                attention: attention.0.clone(),
                attention_workers: args.attention_workers.into(),
                experts: experts.0.clone(),
                experts_per_worker: model.experts.div_ceil(expert_workers),
                expert_workers,
                micro_batches: args.micro_batches.into(),
                rows: args.rows as usize,
            },
            model,
        });
    };
    let text = std::fs::read_to_string(path).map_err(|error| Failure::file(path, &error))?;
    let plan: PlanFile = serde_json::from_str(&text).map_err(|error| {
        Failure::new(format!(
            "{}: {error}; it must be a plan: model, precision, transport and plan.best.deployment",
            path.display()
        ))
    })?;
    let name = args.model.as_deref().unwrap_or(&plan.model.name);
    let model = ModelShape::find(name).map_err(|error| {
        Failure::new(format!(
            "{}: the plan is for the model {:?}: {error}; give its directory with --model",
            path.display(),
            plan.model.name
        ))
    })?;
    if !model.name.eq_ignore_ascii_case(&plan.model.name) {
        return Err(Failure::new(format!(
            "{}: the plan is for {}, not for {}; plan again with --model {name}",
            path.display(),
            plan.model.name,
            model.name
        )));
    }
    let layout = plan.plan.best.deployment;
    if layout.expert_workers * layout.experts_per_worker < model.experts {
        return Err(Failure::new(format!(
            "{}: {} expert workers with {} experts each do not hold the {} experts of {}",
            path.display(),
            layout.expert_workers,
            layout.experts_per_worker,
            model.experts,
            model.name
        )));
    }
    Ok(Resolved {
        model,
        precision: dtype.map_or(plan.precision, Precision::of_weights),
        transport: args.transport.clone().unwrap_or(plan.transport),
        layout,
    })
}

fn dtype(name: &str) -> Result<Dtype, Failure> {
    serde_json::from_value(json!(name)).map_err(|_| {
        Failure::new(format!(
            "there is no type {name:?}; known are f32, bf16, fp8, q8 and q4"
        ))
    })
}

fn popularity(args: &SimulateArgs, model: &ModelShape) -> Result<Vec<f64>, Failure> {
    let Some(path) = &args.popularity else {
        if !(args.zipf.is_finite() && args.zipf >= 0.0) {
            return Err(Failure::new("--zipf must be a number that is not negative"));
        }
        return Ok(Routing::zipf(model.experts, args.zipf));
    };
    let text = std::fs::read_to_string(path).map_err(|error| Failure::file(path, &error))?;
    let popularity = read_popularity(&text).ok_or_else(|| {
        Failure::new(format!(
            "{}: this is neither an array with the rows of each expert nor what /admin/experts answers",
            path.display()
        ))
    })?;
    if popularity.len() != model.experts {
        return Err(Failure::new(format!(
            "{}: {} experts, but {} has {}",
            path.display(),
            popularity.len(),
            model.name,
            model.experts
        )));
    }
    Ok(popularity)
}

/// Rows of each expert, layers summed. One that was never met counts as half a row.
fn read_popularity(text: &str) -> Option<Vec<f64>> {
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    let value = value.get("rows").cloned().unwrap_or(value);
    let layers: Vec<Vec<f64>> = serde_json::from_value(value.clone())
        .or_else(|_| serde_json::from_value(value).map(|layer| vec![layer]))
        .ok()?;
    let experts = layers.first()?.len();
    let mut sums = vec![0.0; experts];
    for layer in &layers {
        if layer.len() != experts {
            return None;
        }
        sums.iter_mut()
            .zip(layer)
            .for_each(|(sum, rows)| *sum += rows);
    }
    Some(
        sums.into_iter()
            .map(|sum| if sum == 0.0 { 0.5 } else { sum })
            .collect(),
    )
}

fn workers(layout: &Layout) -> impl Iterator<Item = WorkerId> + use<> {
    let attention = (0..layout.attention_workers).map(|index| Role::Attention.worker(index as u16));
    attention.chain((0..layout.expert_workers).map(|index| Role::Expert.worker(index as u16)))
}

fn play_frames(
    args: &SimulateArgs,
    deployed: &Deployed,
    make: MakeScheduler,
    trace: &Trace,
) -> Result<(), Failure> {
    if args.report.is_some() || args.jitter > 0.0 || args.prefilled {
        return Err(Failure::new(
            "--report, --jitter and --prefilled go with --detail rounds",
        ));
    }
    let spans = if args.timeline.is_some() {
        TIMELINE_SPANS
    } else {
        0
    };
    let faults = args.fail.iter().map(|OutageFlag(outage)| Fault {
        at: Duration::from_secs_f64(outage.at_s.max(0.0)),
        lasts: Duration::from_secs_f64(outage.lasts_s.max(0.0)),
        kind: FaultKind::Kill {
            worker: outage.worker,
            told: false,
        },
    });
    let (found, timeline) = frames(
        &deployed.shape,
        &deployed.routing,
        deployed.times.clone(),
        deployed.wire,
        Box::new(move || make()),
        trace,
        faults.collect(),
        args.seed,
        spans,
    )?;
    if let Some(path) = &args.timeline {
        write_timeline(path, &timeline)?;
    }
    let outcome = &found.outcome;
    let document = json!({
        "completed": outcome.streams.iter().filter(|stream| stream.finished.is_some()).count(),
        "span_s": outcome.ended.as_secs_f64(),
        "output_tokens": outcome.totals.generated_tokens,
        "ttft": found.ttft, "tpot": found.tpot,
        "steps": outcome.steps, "epochs": outcome.epochs, "events": outcome.events,
        "longest_pause_s": outcome.streams.iter().map(|stream| stream.longest_pause.as_secs_f64()).fold(0.0, f64::max),
    });
    if args.json {
        return print(&format!("{document:#}\n"));
    }
    let ms = |seconds: f64| seconds * 1e3;
    print(&format!(
        "requests     {} of {} completed, {} tokens\nTTFT         mean {:.1} ms, P99 {:.1}\nTPOT         mean {:.2} ms, P99 {:.2}\npause        {:.1} ms between two tokens of a stream at most\nsteps        {}; {} events, {} epochs\n",
        document["completed"],
        trace.requests().len(),
        outcome.totals.generated_tokens,
        ms(found.ttft.mean_s),
        ms(found.ttft.p99_s),
        ms(found.tpot.mean_s),
        ms(found.tpot.p99_s),
        document["longest_pause_s"].as_f64().unwrap_or_default() * 1e3,
        outcome.steps,
        outcome.events,
        outcome.epochs
    ))
}

fn write_timeline(path: &Path, timeline: &Timeline) -> Result<(), Failure> {
    let file = File::create(path).map_err(|error| Failure::file(path, &error))?;
    let mut out = BufWriter::new(file);
    let written = timeline
        .write_chrome_trace(&mut out)
        .and_then(|()| out.flush());
    written.map_err(|error| Failure::file(path, &error))
}

fn print_report(args: &SimulateArgs, report: &Report, took: Duration) -> Result<(), Failure> {
    if args.json {
        let mut document =
            serde_json::to_value(report).map_err(|error| Failure::new(error.to_string()))?;
        document["simulated_in_s"] = json!(took.as_secs_f64());
        return print(&format!("{document:#}\n"));
    }
    print(&format!(
        "{report}\nsimulated    in {:.2} s, {:.0} times real time, {:.0} ns an event\n",
        took.as_secs_f64(),
        report.span_s / took.as_secs_f64().max(1e-9),
        took.as_nanos() as f64 / report.events.max(1) as f64
    ))
}

fn print(text: &str) -> Result<(), Failure> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(Failure::output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_and_times_of_failures_are_read() {
        let OutageFlag(outage) = "expert-12@10.5+3".parse().unwrap();
        assert_eq!(
            outage,
            Outage {
                worker: Role::Expert.worker(12),
                at_s: 10.5,
                lasts_s: 3.0
            }
        );
        for wrong in [
            "expert-1",
            "expert@1+1",
            "gpu-1@1+1",
            "attention-1@1",
            "attention-x@1+1",
        ] {
            assert!(wrong.parse::<OutageFlag>().is_err(), "{wrong}");
        }
        assert_eq!("A800:8".parse::<GpuFlag>().unwrap().0.tp, 8);
        assert!("A800:0".parse::<GpuFlag>().is_err());
    }

    #[test]
    fn popularity_is_read_from_an_array_and_from_the_server() {
        assert_eq!(read_popularity("[1, 2, 0]"), Some(vec![1.0, 2.0, 0.5]));
        assert_eq!(
            read_popularity("{\"rows\": [[1, 2], [3, 4]]}"),
            Some(vec![4.0, 6.0])
        );
        for wrong in ["", "{}", "[[1], [1, 2]]", "[]"] {
            assert_eq!(
                read_popularity(wrong).filter(|found| !found.is_empty()),
                None,
                "{wrong}"
            );
        }
    }
}

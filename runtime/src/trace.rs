//! `volley trace`: a short load, its timeline as a file for Perfetto, and what the timeline shows in numbers.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use crate::config::{Demand, TRACE_SPANS_AUTO};
use crate::failure::Failure;
use crate::flags::{ConfigFlags, Offline};
use crate::launch::{Launch, Started};
use crate::load::Load;
use crate::progress::LoadDisplay;
use crate::rally::{self, Rally};
use crate::stats::Summary;
use crate::{logging, serve};

/// Record a timeline of attention and experts at work.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct TraceArgs {
    /// File to write, in Chrome's trace format
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath, default_value = "volley-trace.json")]
    out: PathBuf,
    /// Requests at once
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    batch: u32,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    input_len: u32,
    /// Tokens each request generates
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// Where prompts come from
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    config: ConfigFlags<Offline>,
}

const AFTER_HELP: &str = "\
Examples:
  volley trace --out rally.json
  volley trace --model DIR --expert-workers 2 --micro-batches 3 --batch 64

Open the file in https://ui.perfetto.dev: one row for each worker.

The summary is of the steps that only decode. T_a and T_e are a step's computing on the two sides, T_c the frames' way there and back,
each summed over the layers. With m micro-batches a step can be no shorter than m * max(T_a, T_e), the busier side's work, nor than
T_a + T_e + T_c, the way of one micro-batch. The requests are spread over all m (as with --micro-batch-rows 1), which a server does
only if each gets enough of them. Without the ping-pong, the m micro-batches would take m * (T_a + T_e + T_c).";

/// Records, writes and prints.
///
/// # Errors
/// When the load cannot run or the file cannot be written.
pub fn run(args: TraceArgs) -> Result<(), Failure> {
    let config = args
        .config
        .with_default("limits.max_waiting", args.batch.max(1024))
        // The rally is what is to be seen, also where it does not pay.
        .with_default("cluster.micro_batch_rows", 1);
    let raw = config.load()?;
    logging::start(&raw.log);
    let tokens = args.input_len.saturating_add(args.tokens);
    let mut launch = Launch::prepare(
        &raw,
        Demand::Batch {
            sequences: args.batch,
            tokens,
        },
    )?;
    let cluster = &mut launch.settings.cluster;
    // Three spans a layer and step at most; a load too long for that keeps its end.
    cluster.timeline_spans = cluster.timeline_spans.max(4 * TRACE_SPANS_AUTO);
    let micro_batches = cluster.micro_batches;
    let head = format!(
        "{}: {} attention x {} expert workers, {micro_batches} micro-batches, {}; {} requests of {} + {} tokens",
        launch.settings.model.name,
        cluster.attention_workers,
        cluster.expert_workers,
        cluster.precision(),
        args.batch,
        args.input_len,
        args.tokens
    );
    let Started {
        cluster, children, ..
    } = launch.start_cluster(&Arc::new(LoadDisplay::new()))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("no runtime: {error}")))?;
    let load = Load {
        batch: args.batch,
        input: args.input_len,
        output: args.tokens,
        seed: args.seed,
    };
    let ran = runtime.block_on(load.run(&cluster.client(), launch.model.spec().vocab));
    // Recorders hand their last spans over when their workers end.
    cluster.shutdown(Duration::ZERO);
    crate::children::end_all(&children);
    ran?;
    serve::write_trace(&cluster, &args.out)?;
    let steps = rally::steps(&cluster.timeline().spans());
    // A step of which every sequence decodes has not more rows than there are requests; steps with prompts have more.
    let decode: Vec<_> = steps
        .into_iter()
        .filter(|step| step.rows <= args.batch)
        .collect();
    print(&head, &decode, micro_batches).map_err(Failure::output)?;
    writeln!(io::stdout(), "timeline           {}", args.out.display()).map_err(Failure::output)
}

fn print(head: &str, steps: &[Rally], micro_batches: u8) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{head}")?;
    if steps.is_empty() {
        return writeln!(
            out,
            "no step that only decodes was recorded; ask for more --tokens"
        );
    }
    let summary = |part: fn(&Rally) -> Duration| {
        Summary::of(
            steps
                .iter()
                .map(|step| part(step).as_secs_f64() * 1e3)
                .collect(),
        )
    };
    let (attention, expert, network) = (
        summary(|s| s.attention),
        summary(|s| s.expert),
        summary(|s| s.network),
    );
    let (waiting, step) = (summary(|s| s.waiting), summary(|s| s.total));
    writeln!(
        out,
        "{:<18} {:>10} {:>10}   over {} steps",
        "milliseconds",
        "median",
        "P99",
        steps.len()
    )?;
    let rows = [
        ("T_a attention", attention),
        ("T_e experts", expert),
        ("T_c network", network),
        ("waiting for turn", waiting),
        ("step", step),
    ];
    for (name, s) in rows {
        writeln!(out, "{name:<18} {:>10.3} {:>10.3}", s.median, s.p99)?;
    }
    let mut bounds: BTreeMap<_, usize> = BTreeMap::new();
    for step in steps {
        *bounds.entry(step.bound()).or_default() += 1;
    }
    let bounds = bounds.iter().map(|(bound, count)| {
        let share = 100.0 * *count as f64 / steps.len() as f64;
        format!("{} {share:.0}%", bound.name())
    });
    let bounds: Vec<_> = bounds.collect();
    writeln!(
        out,
        "longest part       {}   of the steps",
        bounds.join(", ")
    )?;
    // Bounds are taken step by step: medians of parts do not add up to the median of the whole.
    let m = u32::from(micro_batches);
    let busier = |s: &Rally| s.attention.max(s.expert) * m;
    let alone = |s: &Rally| s.attention + s.expert + s.network;
    let median =
        |value: &dyn Fn(&Rally) -> f64| Summary::of(steps.iter().map(value).collect()).median;
    let ms = |part: &dyn Fn(&Rally) -> Duration| median(&|s| part(s).as_secs_f64() * 1e3);
    let share = |part: &dyn Fn(&Rally) -> Duration| {
        let sequential = |s: &Rally| (alone(s) * m).as_secs_f64().max(f64::MIN_POSITIVE);
        100.0 * median(&|s| part(s).as_secs_f64() / sequential(s))
    };
    writeln!(
        out,
        "m * max(T_a, T_e)  {:>10.3}   the busier side's work for all {m} micro-batches",
        ms(&busier)
    )?;
    writeln!(
        out,
        "T_a + T_e + T_c    {:>10.3}   the way of one micro-batch alone",
        ms(&alone)
    )?;
    writeln!(
        out,
        "m * the sum        {:>10.3}   what {m} micro-batches would take one after the other",
        ms(&|s| alone(s) * m)
    )?;
    writeln!(
        out,
        "ping-pong          a step takes {:.0}% of the sequential time; the bound is {:.0}%",
        share(&|s| s.total),
        share(&|s| busier(s).max(alone(s)))
    )
}

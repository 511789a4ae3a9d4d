//! Plays a deployment at one of the two levels of detail, and writes what was seen.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use volley_actors::Timeline;
use volley_actors::simulation::{Fault, FaultKind};
use volley_planner::Deployment;
use volley_planner::simulate::{
    Deployed, Report, Situation, Trace, Variation, frames as play, page,
};
use volley_transports::{Role, WorkerId};

use super::flags::OutageFlag;
use super::{MakeScheduler, SimulateArgs};
use crate::failure::Failure;

/// Spans kept of each worker for a timeline.
const TIMELINE_SPANS: usize = 4096;

/// One event for each layer and micro-batch.
pub(super) fn rounds(
    args: &SimulateArgs,
    situation: Situation<'_>,
    deployment: &Deployment,
    deployed: &Deployed,
    make: &MakeScheduler,
    trace: &Trace,
) -> Result<(), Failure> {
    let variation = Variation {
        jitter: args.jitter,
        draws: true,
        prefilled: args.prefilled,
        outages: args.fail.iter().map(|flag| flag.0).collect(),
        notice_s: args.notice,
        seed: args.seed,
    };
    let timeline = Timeline::new(workers(deployment), spans(args));
    let started = Instant::now();
    let report = deployed.serve(make(), trace, &variation, &timeline)?;
    let took = started.elapsed();
    if let Some(path) = &args.timeline {
        write_timeline(path, &timeline)?;
    }
    if let Some(path) = &args.report {
        let page = page(situation, deployment, &report, args.seed);
        std::fs::write(path, page).map_err(|error| Failure::file(path, &error))?;
    }
    print_report(args, &report, took)
}

fn spans(args: &SimulateArgs) -> usize {
    if args.timeline.is_some() {
        TIMELINE_SPANS
    } else {
        0
    }
}

fn workers(deployment: &Deployment) -> impl Iterator<Item = WorkerId> + use<> {
    let attention =
        (0..deployment.attention_workers).map(|index| Role::Attention.worker(index as u16));
    attention.chain((0..deployment.expert_workers).map(|index| Role::Expert.worker(index as u16)))
}

/// Every worker's own logic and every frame.
pub(super) fn frames(
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
    let faults = args.fail.iter().map(|OutageFlag(outage)| Fault {
        at: Duration::from_secs_f64(outage.at_s.max(0.0)),
        lasts: Duration::from_secs_f64(outage.lasts_s.max(0.0)),
        kind: FaultKind::Kill {
            worker: outage.worker,
            told: false,
        },
    });
    let (found, timeline) = play(
        &deployed.shape,
        &deployed.routing,
        deployed.times.clone(),
        deployed.wire,
        Box::new(move || make()),
        trace,
        faults.collect(),
        args.seed,
        spans(args),
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

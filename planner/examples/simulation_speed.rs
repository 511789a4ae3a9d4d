//! How fast clusters of growing size are simulated by rounds: the curve of docs/simulation.md.
//!
//! ```sh
//! cargo run --release -p volley-planner --example simulation_speed             # the curve
//! cargo run --release -p volley-planner --example simulation_speed -- 3600     # with a last row of 1,000 + 1,000 workers over so many seconds
//! ```

use std::time::Instant;

use volley_actors::{FirstCome, PolicyScheduler, Timeline};
use volley_planner::Stages;
use volley_planner::simulate::{ClusterShape, Report, Routing, Trace, Variation, serve};

/// A layer of about 2 ms on either side, and hops of a quarter of that.
const STAGES: Stages = Stages {
    attention_s: 2e-3,
    dispatch_s: 0.5e-3,
    expert_s: 2e-3,
    combine_s: 0.5e-3,
};
const LAYERS: usize = 40;

/// As many attention as expert workers, an expert each, for so many seconds of `per_worker_s` requests a second for each attention worker.
fn play(workers: u16, span_s: f64, per_worker_s: f64) -> Report {
    let shape = ClusterShape {
        attention_workers: workers,
        micro_batches: 3,
        layers: LAYERS,
        kv_blocks: 20_000,
        block_tokens: 16,
        max_rows: 1024,
        context: 4096,
        max_waiting: usize::MAX,
        replicas: false,
    };
    let routing = Routing::new(
        &vec![1.0; workers.into()],
        workers.into(),
        4.min(workers.into()),
    )
    .expect("experts for all");
    let trace =
        Trace::draw(per_worker_s * f64::from(workers), span_s, 571.0, 159.0, 1).expect("a rate");
    let scheduler = Box::new(PolicyScheduler::new(FirstCome::new(512, 1)));
    let timeline = Timeline::new(std::iter::empty(), 0);
    serve(
        &shape,
        routing,
        STAGES,
        scheduler,
        &trace,
        &Variation::default(),
        &timeline,
    )
    .expect("the trace is served")
}

fn row(workers: u16, span_s: f64, per_worker_s: f64) {
    let started = Instant::now();
    let report = play(workers, span_s, per_worker_s);
    let took_s = started.elapsed().as_secs_f64();
    let rounds = report.steps * LAYERS as u64;
    println!(
        "{workers:>6} + {workers:<6} {:>9.0} {:>9} {:>9} {:>8.2} {:>8.1} {:>10.1} {:>10}",
        report.span_s,
        report.requests,
        rounds,
        took_s,
        report.span_s / took_s,
        took_s * 1e9 / (rounds as f64 * 2.0 * f64::from(workers)),
        resident_mib()
    );
}

/// Most memory that this process has had, in MiB, where the system says so.
fn resident_mib() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map_or("-".to_owned(), |kib| (kib / 1024).to_string())
}

fn main() {
    println!(
        "{:^15} {:>9} {:>9} {:>9} {:>8} {:>8} {:>10} {:>10}",
        "workers", "virtual s", "requests", "rounds", "took s", "x real", "ns/worker", "MiB"
    );
    for workers in [10, 30, 100, 300, 1000] {
        row(workers, 20.0, 0.05);
    }
    if let Some(span_s) = std::env::args().nth(1).and_then(|span| span.parse().ok()) {
        row(1000, span_s, 0.02);
    }
}

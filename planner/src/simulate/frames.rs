//! Every worker's own logic and every frame over the simulated fabric: exact, for small clusters and for faults.

use std::time::Duration;

use volley_actors::simulation::{
    Arrival, AttentionLoad, Costs, ExpertRound, Fault, Outcome, Simulation, SimulationConfig,
};
use volley_actors::{Request, RosterShape, Scheduler, Timeline};
use volley_transports::simulated::Conditions;

use super::histogram::Histogram;
use super::report::Quantiles;
use super::{ClusterShape, Routing, StageTimes, Trace};
use crate::PlanError;

/// The line of every worker.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Wire {
    /// Time of a frame without bytes, in seconds.
    pub latency_s: f64,
    /// Bytes per second each way.
    pub bytes_per_s: f64,
    /// Bytes of a row on its way to an expert worker.
    pub dispatch_row_bytes: u64,
    /// Bytes of an output on its way back.
    pub combine_row_bytes: u64,
}

/// What came of it.
#[derive(Debug)]
pub struct FramesOutcome {
    /// Everything, request by request.
    pub outcome: Outcome,
    /// From arrival to first token.
    pub ttft: Quantiles,
    /// Mean time between a request's tokens.
    pub tpot: Quantiles,
}

/// Serves `trace` frame by frame. `make` makes the scheduler, again each time it dies of a fault. The times of sending are those of `wire`, not of `times`.
///
/// # Errors
/// The cluster cannot be, or something happened that must not: see [`Violation`](volley_actors::simulation::Violation).
pub fn frames<T: StageTimes + Send + 'static>(
    shape: &ClusterShape,
    routing: &Routing,
    times: T,
    wire: Wire,
    make: Box<dyn Fn() -> Box<dyn Scheduler>>,
    trace: &Trace,
    faults: Vec<Fault>,
    seed: u64,
    timeline_spans: usize,
) -> Result<(FramesOutcome, Timeline), PlanError> {
    let impossible =
        |problem: String| PlanError::invalid("the cluster", problem, "change its shape");
    let experts = u16::try_from(routing.experts())
        .map_err(|_| impossible(format!("{} experts", routing.experts())))?;
    let config = SimulationConfig {
        roster: RosterShape {
            attention: shape.attention_workers,
            expert_workers: routing.workers() as u16,
            experts,
            replicas: if shape.replicas { 2 } else { 1 },
            spare: 0,
        },
        layers: shape.layers,
        top_k: routing.top_k() as u16,
        vocab: 97,
        popularity: routing.cumulative(),
        micro_batches: shape.micro_batches,
        // The cache is really kept, so no more of it than all requests together can use.
        kv_blocks: shape.kv_blocks.min(trace.blocks(shape.block_tokens)),
        block_tokens: shape.block_tokens,
        max_rows: shape.max_rows,
        context: shape.context,
        max_waiting: shape.max_waiting,
        peer_deadline: Duration::from_secs(30),
        network: Conditions {
            latency: Duration::from_secs_f64(wire.latency_s),
            bytes_per_s: wire.bytes_per_s,
            ..Conditions::default()
        },
        row_bytes: Some((wire.dispatch_row_bytes, wire.combine_row_bytes)),
        load_time: Duration::ZERO,
        adopt_time: Duration::ZERO,
        scheduler_time: Duration::ZERO,
        timeline_spans,
        seed,
    };
    let start_s = 0.1; // Workers have joined by then.
    let arrivals = trace.requests().iter().map(|request| Arrival {
        at: Duration::from_secs_f64(start_s + request.arrival_s),
        request: Request::greedy(
            vec![0; request.input_tokens as usize],
            request.output_tokens,
        ),
        cancelled: None,
    });
    let arrivals: Vec<Arrival> = arrivals.collect();
    let costs = Box::new(FromTimes {
        times,
        rows: Vec::new(),
    });
    let mut simulation = Simulation::new(config, costs, make)
        .map_err(impossible)?
        .unchecked();
    let timeline = simulation.timeline();
    let outcome = simulation
        .run(arrivals, faults)
        .map_err(|violation| PlanError::Infeasible(violation.to_string()))?;
    let (mut ttft, mut tpot) = (Histogram::new(), Histogram::new());
    for stream in &outcome.streams {
        if let (Some(first), Some(latest)) = (stream.first, stream.latest) {
            ttft.add((first - stream.arrived).as_secs_f64());
            if stream.count > 1 {
                tpot.add((latest - first).as_secs_f64() / f64::from(stream.count - 1));
            }
        }
    }
    let outcome = FramesOutcome {
        ttft: ttft.quantiles(),
        tpot: tpot.quantiles(),
        outcome,
    };
    Ok((outcome, timeline))
}

/// The simulation's question answered by the planner's times.
struct FromTimes<T> {
    times: T,
    rows: Vec<f64>,
}

impl<T: StageTimes + Send> Costs for FromTimes<T> {
    fn attention(&mut self, load: &AttentionLoad) -> Duration {
        Duration::from_secs_f64(if load.head {
            self.times.step_s(f64::from(load.rows), load.cached as f64)
        } else {
            self.times
                .attention_s(f64::from(load.rows), load.cached as f64)
        })
    }

    fn experts(&mut self, round: &ExpertRound<'_>) -> Duration {
        self.rows.clear();
        self.rows.extend(
            round
                .offsets
                .windows(2)
                .map(|pair| f64::from(pair[1] - pair[0])),
        );
        Duration::from_secs_f64(self.times.experts_s(&self.rows))
    }
}

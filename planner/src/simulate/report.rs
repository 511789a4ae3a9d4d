//! What a simulated cluster delivered, and where the time went.

use serde::Serialize;

use super::lockstep::{RoundTotals, WorkerTimes};

/// The figures of one simulation. Times are seconds of virtual time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Requests of the trace.
    pub requests: u64,
    /// Those that got all their tokens.
    pub completed: u64,
    /// Those that were refused because too many waited.
    pub refused: u64,
    /// Those that do not fit the context.
    pub impossible: u64,
    /// Sequences taken off a worker to free KV blocks.
    pub preemptions: u64,
    /// Parts of the scheduler's plans that could not be carried out.
    pub plan_refusals: u64,
    /// From the begin of the trace to the last token.
    pub span_s: f64,
    /// Tokens generated.
    pub output_tokens: u64,
    /// The same by second.
    pub output_tokens_per_s: f64,
    /// Tokens of prompts computed.
    pub prompt_tokens: u64,
    /// From a request's arrival to its first token.
    pub ttft: Quantiles,
    /// Mean time between a request's tokens.
    pub tpot: Quantiles,
    /// From a request's arrival to its last token.
    pub latency: Quantiles,
    /// Attention workers.
    pub attention: Side,
    /// Expert workers.
    pub experts: Side,
    /// Where the time of micro-batches went.
    pub bubbles: Bubbles,
    /// Steps that ended.
    pub steps: u64,
    /// Tokens computed in a step, all workers together.
    pub rows_per_step: f64,
    /// Rows of the busiest expert worker by the mean.
    pub expert_imbalance: f64,
    /// Things that happened in the simulation.
    pub events: u64,
    /// Epochs of the cluster.
    pub epochs: u32,
}

/// How a time is spread over requests.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct Quantiles {
    pub mean_s: f64,
    pub p50_s: f64,
    pub p90_s: f64,
    pub p99_s: f64,
}

/// How busy the workers of a side were, as shares of the time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Side {
    /// Workers.
    pub workers: usize,
    /// Mean.
    pub busy: f64,
    /// The busiest.
    pub busiest: f64,
}

impl Side {
    pub(super) fn of(workers: &[WorkerTimes], span_s: f64) -> Self {
        let busy = workers.iter().map(|worker| worker.busy_s / span_s);
        Side {
            workers: workers.len(),
            busy: busy.clone().sum::<f64>() / workers.len().max(1) as f64,
            busiest: busy.fold(0.0, f64::max),
        }
    }
}

/// Where the time of a micro-batch's layer went on the way of its slowest part, as shares of it. Stages of several workers overlap a little, so the
/// shares sum to about 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bubbles {
    /// Mean time of a layer, in seconds.
    pub layer_s: f64,
    /// Attention computed it.
    pub attention: f64,
    /// Experts computed it.
    pub experts: f64,
    /// It was on its way, incast included.
    pub network: f64,
    /// It waited for an attention worker that computed another micro-batch: attention-bound.
    pub attention_queue: f64,
    /// It waited for an expert worker that computed another micro-batch: expert-bound.
    pub expert_queue: f64,
    /// Of attention and experts, what the slowest worker took beyond the mean: stragglers.
    pub stragglers: f64,
}

impl From<RoundTotals> for Bubbles {
    fn from(totals: RoundTotals) -> Self {
        let share = |part: f64| {
            if totals.total_s > 0.0 {
                part / totals.total_s
            } else {
                0.0
            }
        };
        Bubbles {
            layer_s: totals.total_s / totals.rounds.max(1) as f64,
            attention: share(totals.attention_s),
            experts: share(totals.experts_s),
            network: share(totals.network_s),
            attention_queue: share(totals.attention_queue_s),
            expert_queue: share(totals.expert_queue_s),
            stragglers: share(totals.straggler_s),
        }
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |seconds: f64| seconds * 1e3;
        let percent = |share: f64| share * 100.0;
        writeln!(
            f,
            "requests     {} of {} completed in {:.1} s, {} refused, {} too long, {} preemptions",
            self.completed,
            self.requests,
            self.span_s,
            self.refused,
            self.impossible,
            self.preemptions
        )?;
        writeln!(
            f,
            "throughput   {:.1} tokens/s generated",
            self.output_tokens_per_s
        )?;
        for (name, times) in [
            ("TTFT", self.ttft),
            ("TPOT", self.tpot),
            ("latency", self.latency),
        ] {
            writeln!(
                f,
                "{name:<12} mean {:.1} ms, median {:.1}, P90 {:.1}, P99 {:.1}",
                ms(times.mean_s),
                ms(times.p50_s),
                ms(times.p90_s),
                ms(times.p99_s)
            )?;
        }
        for (name, side) in [("attention", self.attention), ("experts", self.experts)] {
            writeln!(
                f,
                "{name:<12} {} workers, busy {:.1} % of the time, the busiest {:.1} %",
                side.workers,
                percent(side.busy),
                percent(side.busiest)
            )?;
        }
        let bubbles = self.bubbles;
        writeln!(
            f,
            "a layer      {:.3} ms of a micro-batch, of which",
            ms(bubbles.layer_s)
        )?;
        for (name, share) in [
            ("attention", bubbles.attention),
            ("experts", bubbles.experts),
            ("network", bubbles.network),
            ("waiting for attention", bubbles.attention_queue),
            ("waiting for experts", bubbles.expert_queue),
            ("stragglers (within the first two)", bubbles.stragglers),
        ] {
            writeln!(f, "             {:>5.1} %  {name}", percent(share))?;
        }
        write!(
            f,
            "steps        {}, {:.1} tokens each; {} events, {} epochs",
            self.steps, self.rows_per_step, self.events, self.epochs
        )
    }
}

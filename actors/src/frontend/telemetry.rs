//! The frontend's metrics: handles looked up once, updated at each event.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram};

use super::ledger::{Ledger, Totals};
use crate::metric_names as names;
use crate::protocol::{Now, StepDone};
use crate::request::{RequestEvent, SubmitError};

/// When what happened to a request.
pub(crate) struct ClientTimes {
    arrived: Now,
    last_token: Option<Now>,
}

impl ClientTimes {
    pub(crate) fn new(arrived: Now) -> Self {
        ClientTimes {
            arrived,
            last_token: None,
        }
    }
}

pub(crate) struct FrontendMetrics {
    finished: [(&'static str, Counter); 4],
    rejected: [(&'static str, Counter); 2],
    prompt_tokens: Counter,
    generation_tokens: Counter,
    preemptions: Counter,
    refusals: Counter,
    steps: Counter,
    pub(crate) scheduler_restarts: Counter,
    running: Gauge,
    waiting: Gauge,
    kv_usage: Gauge,
    epoch: Gauge,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    e2e_latency: Histogram,
    iteration_tokens: Histogram,
    step: Histogram,
    attention: Histogram,
    expert: Histogram,
    expert_queue: Histogram,
    network: Histogram,
    ready: Histogram,
    published: Totals,
}

impl FrontendMetrics {
    pub(crate) fn new() -> Self {
        use metrics::{counter, gauge, histogram};
        let finished = |reason| {
            (
                reason,
                counter!(names::REQUESTS, "finished_reason" => reason),
            )
        };
        let rejected = |reason| (reason, counter!(names::REJECTED, "reason" => reason));
        FrontendMetrics {
            finished: ["stop", "length", "cancelled", "error"].map(finished),
            rejected: ["overload", "invalid"].map(rejected),
            prompt_tokens: counter!(names::PROMPT_TOKENS),
            generation_tokens: counter!(names::GENERATION_TOKENS),
            preemptions: counter!(names::PREEMPTIONS),
            refusals: counter!(names::PLAN_REFUSALS),
            steps: counter!(names::STEPS),
            scheduler_restarts: counter!(names::SCHEDULER_RESTARTS),
            running: gauge!(names::REQUESTS_RUNNING),
            waiting: gauge!(names::REQUESTS_WAITING),
            kv_usage: gauge!(names::KV_USAGE),
            epoch: gauge!(names::EPOCH),
            time_to_first_token: histogram!(names::TIME_TO_FIRST_TOKEN),
            inter_token_latency: histogram!(names::INTER_TOKEN_LATENCY),
            e2e_latency: histogram!(names::E2E_LATENCY),
            iteration_tokens: histogram!(names::ITERATION_TOKENS),
            step: histogram!(names::STEP_TIME),
            attention: histogram!(names::ATTENTION_TIME),
            expert: histogram!(names::EXPERT_TIME),
            expert_queue: histogram!(names::EXPERT_QUEUE_TIME),
            network: histogram!(names::NETWORK_TIME),
            ready: histogram!(names::READY_TIME),
            published: Totals::default(),
        }
    }

    /// An event on its way to a client.
    pub(crate) fn event(&self, times: &mut ClientTimes, event: &RequestEvent, now: Now) {
        match event {
            RequestEvent::Prompt(_) => {}
            RequestEvent::Token { .. } => match times.last_token.replace(now) {
                None => self
                    .time_to_first_token
                    .record((now - times.arrived).as_secs_f64()),
                Some(last) => self.inter_token_latency.record((now - last).as_secs_f64()),
            },
            RequestEvent::Finished(reason) => {
                increment(&self.finished, reason.label());
                self.e2e_latency.record((now - times.arrived).as_secs_f64());
            }
        }
    }

    /// A request that was not taken.
    pub(crate) fn rejected(&self, error: &SubmitError) {
        increment(
            &self.rejected,
            if error.is_overload() {
                "overload"
            } else {
                "invalid"
            },
        );
    }

    /// The end of a step.
    pub(crate) fn step(&self, done: &StepDone, age: Duration) {
        let timing = &done.timing;
        self.step.record(age.as_secs_f64());
        self.iteration_tokens.record(f64::from(timing.rows));
        self.attention.record(timing.attention.as_secs_f64());
        self.expert.record(timing.expert.as_secs_f64());
        self.expert_queue.record(timing.expert_queue.as_secs_f64());
        self.network.record(timing.network.as_secs_f64());
        self.ready.record(timing.ready.as_secs_f64());
    }

    /// Publishes what the ledger holds and has counted since the last call.
    pub(crate) fn state(&mut self, ledger: &Ledger) {
        let view = ledger.view();
        self.waiting.set(ledger.waiting() as f64);
        self.running
            .set((view.sequences().len() - view.waiting().len()) as f64);
        let blocks = |f: fn(&crate::scheduler::WorkerView) -> u32| -> f64 {
            view.workers().iter().map(|w| f64::from(f(w))).sum()
        };
        let (all, free) = (blocks(|w| w.capacity.kv_blocks), blocks(|w| w.free_blocks));
        self.kv_usage
            .set(if all > 0.0 { 1.0 - free / all } else { 0.0 });
        self.epoch.set(f64::from(ledger.epoch().0));
        let (now, before) = (
            ledger.totals,
            std::mem::replace(&mut self.published, ledger.totals),
        );
        self.steps.increment(now.steps - before.steps);
        self.prompt_tokens
            .increment(now.prompt_tokens - before.prompt_tokens);
        self.generation_tokens
            .increment(now.generated_tokens - before.generated_tokens);
        self.preemptions
            .increment(now.preemptions - before.preemptions);
        self.refusals.increment(now.refusals - before.refusals);
    }
}

fn increment(counters: &[(&'static str, Counter)], label: &str) {
    if let Some((_, counter)) = counters.iter().find(|(name, _)| *name == label) {
        counter.increment(1);
    }
}

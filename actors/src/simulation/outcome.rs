//! What came of a simulation.

use std::time::Duration;

use volley_transports::WorkerId;

use super::Simulation;
use crate::frontend::Totals;
use crate::protocol::StepTiming;

/// What came of a simulation in which nothing went wrong.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// By arrival.
    pub streams: Vec<Stream>,
    /// Counts of the frontend.
    pub totals: Totals,
    /// Epochs that were begun.
    pub epochs: u32,
    /// Steps that ended.
    pub steps: u64,
    /// Where their time went, by the slowest worker of each; sums.
    pub timing: StepTiming,
    /// By worker.
    pub utilisation: Vec<Utilisation>,
    /// When the last thing happened.
    pub ended: Duration,
    /// Things that happened.
    pub events: u64,
}

/// How much of a worker and its line was used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Utilisation {
    /// The worker.
    pub worker: WorkerId,
    /// Time spent computing.
    pub busy: Duration,
    /// Bytes that it received.
    pub received_bytes: u64,
    /// Time for which frames to it waited for others.
    pub incast: Duration,
}

/// One request as its client saw it.
#[derive(Debug, Clone, PartialEq)]
pub struct Stream {
    /// When it came.
    pub arrived: Duration,
    /// Tokens of its prompt.
    pub prompt: usize,
    /// When its first token came.
    pub first: Option<Duration>,
    /// When its latest token came.
    pub latest: Option<Duration>,
    /// How many.
    pub count: u32,
    /// The tokens, if they are compared.
    pub tokens: Vec<u32>,
    /// When it ended.
    pub finished: Option<Duration>,
    /// Longest time between two of its tokens.
    pub longest_pause: Duration,
    /// It was refused, because too many waited.
    pub refused: bool,
}

impl Stream {
    pub(super) fn new(arrived: Duration, prompt: usize) -> Self {
        Stream {
            arrived,
            prompt,
            first: None,
            latest: None,
            count: 0,
            tokens: Vec::new(),
            finished: None,
            longest_pause: Duration::ZERO,
            refused: false,
        }
    }

    pub(super) fn token(&mut self, token: u32, now: Duration) {
        if let Some(latest) = self.latest {
            self.longest_pause = self.longest_pause.max(now - latest);
        }
        self.first.get_or_insert(now);
        self.latest = Some(now);
        self.count += 1;
        self.tokens.push(token);
    }
}

/// Something that must not be, and what led to it.
#[derive(Debug, Clone, thiserror::Error)]
#[error("at {at:?}: {what}\n{}", .log.iter().map(|(at, line)| format!("  {:>10.6} s  {line}", at.as_secs_f64())).collect::<Vec<_>>().join("\n"))]
pub struct Violation {
    /// When.
    pub at: Duration,
    /// What.
    pub what: String,
    /// What had happened before.
    pub log: Vec<(Duration, String)>,
}

impl Simulation {
    pub(super) fn violation(&mut self, what: String) -> Box<Violation> {
        Box::new(Violation {
            at: self.now(),
            what,
            log: self.log.drain(..).collect(),
        })
    }

    /// With no request left, nothing may be in the books.
    pub(super) fn books_are_closed(&mut self) -> Result<(), Box<Violation>> {
        let ledger = &self.controller.ledger;
        let view = ledger.view();
        let full = view.workers().iter().all(|worker| {
            let all = if worker.capacity.alive {
                worker.capacity.kv_blocks
            } else {
                0
            };
            worker.free_blocks == all && worker.sequences.is_empty()
        });
        if ledger.live() == 0 && ledger.steps_in_flight() == 0 && view.is_empty() && full {
            return Ok(());
        }
        let state = self.controller.state(self.now());
        Err(self.violation(format!(
            "all streams have ended, but the books are not closed: {state}"
        )))
    }

    pub(super) fn outcome(&mut self) -> Outcome {
        let utilisation = self.hosts.iter().map(|(&worker, host)| {
            let line = self.network.line(worker);
            Utilisation {
                worker,
                busy: host.busy,
                received_bytes: line.bytes,
                incast: line.incast,
            }
        });
        Outcome {
            utilisation: utilisation.collect(),
            streams: std::mem::take(&mut self.streams),
            totals: self.controller.ledger.totals,
            epochs: self.controller.epoch().0,
            steps: self.steps,
            timing: self.timing,
            ended: self.now(),
            events: self.events,
        }
    }
}

pub(super) fn add(sum: &mut StepTiming, step: &StepTiming) {
    sum.total += step.total;
    sum.attention += step.attention;
    sum.expert += step.expert;
    sum.expert_queue += step.expert_queue;
    sum.network += step.network;
    sum.ready += step.ready;
    sum.rows += step.rows;
}

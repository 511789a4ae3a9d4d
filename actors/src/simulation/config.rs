//! What is simulated: a cluster, and what happens to it.

use std::sync::Arc;
use std::time::Duration;

use volley_transports::WorkerId;
use volley_transports::simulated::Conditions;

use crate::request::Request;
use crate::roster::RosterShape;

/// A cluster in virtual time. Names are those of [`ClusterConfig`](crate::ClusterConfig).
#[derive(Debug, Clone)]
pub struct SimulationConfig {
    /// The seats and how experts are spread over them.
    pub roster: RosterShape,
    /// Layers, all with experts.
    pub layers: usize,
    /// Experts each token visits.
    pub top_k: u16,
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Shares of the rows that visit each expert, summed up to 1: `[experts]`. Empty: all alike.
    pub popularity: Arc<[f64]>,
    /// Micro-batches in flight.
    pub micro_batches: u8,
    /// KV blocks of each attention worker.
    pub kv_blocks: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Tokens that one attention worker computes at most in one step.
    pub max_rows: u32,
    /// Longest sequence.
    pub context: u32,
    /// Requests that may wait.
    pub max_waiting: usize,
    /// A peer that keeps a micro-batch waiting for so long is accused.
    pub peer_deadline: Duration,
    /// The network under lanes and control links.
    pub network: Conditions,
    /// Bytes that a row counts for on its way to an expert worker, and an output on its way back; none: those of the frames as they are, whose rows are
    /// short.
    pub row_bytes: Option<(u64, u64)>,
    /// From the start of a worker's process until it has its weights.
    pub load_time: Duration,
    /// Time in which a worker loads experts that it adopts.
    pub adopt_time: Duration,
    /// Time a scheduler takes to answer.
    pub scheduler_time: Duration,
    /// Spans kept of each worker for a timeline.
    pub timeline_spans: usize,
    /// Of everything that is drawn.
    pub seed: u64,
}

/// A request and when it comes.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// When.
    pub at: Duration,
    /// What.
    pub request: Request,
    /// When its client hangs up, if it does.
    pub cancelled: Option<Duration>,
}

/// Something that goes wrong and comes right again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// When.
    pub at: Duration,
    /// For how long.
    pub lasts: Duration,
    /// What.
    pub kind: FaultKind,
}

/// What can go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// A worker's process dies; another one is started when the fault is over.
    Kill {
        /// The worker.
        worker: WorkerId,
        /// The controller is told at once, as it is of its own children; else it has to notice.
        told: bool,
    },
    /// A worker's process is stopped, its network with it (SIGSTOP, a paused machine).
    Stop(WorkerId),
    /// A worker computes for ever, but its host answers.
    Hang(WorkerId),
    /// A worker computes so many times as slowly.
    Slow(WorkerId, u32),
    /// Two workers do not reach each other.
    Cut(WorkerId, WorkerId),
    /// A worker reaches no other worker, but the controller.
    CutOff(WorkerId),
    /// The controller and a worker do not reach each other.
    Unseen(WorkerId),
    /// A worker is told to leave, drains, and comes back when the fault is over.
    Leave(WorkerId),
    /// The scheduler dies and is replaced.
    SchedulerDies,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.kind {
            FaultKind::Kill { worker, told: true } => write!(f, "{worker} is killed")?,
            FaultKind::Kill {
                worker,
                told: false,
            } => write!(f, "{worker} vanishes")?,
            FaultKind::Stop(worker) => write!(f, "{worker} is stopped")?,
            FaultKind::Hang(worker) => write!(f, "{worker} hangs")?,
            FaultKind::Slow(worker, times) => write!(f, "{worker} is {times} times as slow")?,
            FaultKind::Cut(a, b) => write!(f, "{a} and {b} are cut from each other")?,
            FaultKind::CutOff(worker) => write!(f, "{worker} is cut off from all workers")?,
            FaultKind::Unseen(worker) => write!(f, "{worker} is cut from the controller")?,
            FaultKind::Leave(worker) => write!(f, "{worker} is told to leave")?,
            FaultKind::SchedulerDies => return write!(f, "the scheduler dies"),
        }
        write!(f, " for {:?}", self.lasts)
    }
}

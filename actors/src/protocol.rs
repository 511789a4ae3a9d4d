//! The words that schedulers, the frontend and workers exchange.
//!
//! # The scheduler protocol
//! The frontend tells a scheduler what happens ([`SchedulerEvent`]) and the scheduler answers each event with any number of
//! [`StepPlan`]s, including none. Guarantees:
//! * Events arrive in the order in which they happened; the next one is sent when the previous one was answered or its deadline passed.
//! * A plan is a wish. The frontend checks it against its own books ([`crate::View`], which a scheduler may keep for itself too) and carries out what is
//!   possible; what is not is named in a [`SchedulerEvent::Refused`], and nothing else is disturbed by it.
//! * Each accepted plan is one *step* of one micro-batch and ends in exactly one [`StepDone`].
//! * Up to [`PLANS_AHEAD`] plans of a micro-batch may be under way, so that the next step can be planned while the last one runs.
//! * [`SchedulerEvent::MembershipChanged`] concerns only what is on workers that are gone or new ([`AttentionCapacity::since`]): their sequences leave the books, also
//!   from steps under way, and each that is not at its end is submitted again right behind the event. All else goes on. A step whose only sequences left ends as any other.
//! * A scheduler that is started while the cluster runs is first told everything at once: [`SchedulerEvent::Introduced`].
//!
//! A scheduler that panics or is late loses no request: requests live in the frontend.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use volley_transports::{Epoch, MicroBatch, Participants, Step};

use crate::request::{FinishReason, Request, TokenLogprob};

/// Time since the cluster started. Pure logic is given the time; it has no clock.
pub type Now = Duration;

/// Plans of one micro-batch that may be under way at once: the running step and the one planned behind it.
pub const PLANS_AHEAD: u8 = 2;

/// A sequence: one request's tokens, prompt and output. Numbers grow in order of arrival and are never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SequenceId(pub u64);

impl std::fmt::Display for SequenceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sequence {}", self.0)
    }
}

/// What a scheduler is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[non_exhaustive]
pub enum SchedulerEvent {
    /// A sequence wants to run.
    Submit(Submit),
    /// A sequence ended for a reason other than its own step: cancelled, or failed.
    Cancel(SequenceId),
    /// A step came to its end.
    StepDone(StepDone),
    /// The cluster's workers changed, at start and after failures.
    MembershipChanged(Membership),
    /// Takes the place of a scheduler that died: the workers, and every sequence that is not at its end, with what its worker holds of it. No step is under way.
    /// Begin with empty books.
    Introduced(Membership, Vec<Submit>),
    /// Parts of a plan could not be carried out.
    Refused(Vec<Refusal>),
}

/// A sequence, as far as scheduling is concerned.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Submit {
    /// Its name.
    pub sequence: SequenceId,
    /// Tokens known now: the prompt, after a failure also what was generated.
    pub length: u32,
    /// Its length never grows beyond this.
    pub limit: u32,
    /// Who asks.
    pub tenant: Arc<str>,
    /// Larger is more urgent.
    pub priority: i32,
    /// When it arrived.
    pub arrived: Now,
    /// What a worker has computed of it already; none for a sequence that waits for a place.
    pub held: Option<Held>,
}

/// A sequence's place, between steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The attention worker with its KV cache.
    pub worker: u16,
    /// Tokens whose keys and values are in the cache.
    pub computed: u32,
}

/// The workers of the cluster and their limits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Membership {
    /// Version of membership and placement.
    pub epoch: Epoch,
    /// Micro-batches in flight on every worker.
    pub micro_batches: u8,
    /// Every attention worker, in order of its index.
    pub attention: Vec<AttentionCapacity>,
}

/// What one attention worker can hold.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AttentionCapacity {
    /// Whether it can be given work.
    pub alive: bool,
    /// The epoch with which this incarnation of the worker began. Of an earlier one nothing is left.
    pub since: Epoch,
    /// KV cache blocks.
    pub kv_blocks: u32,
    /// Tokens of one block.
    pub block_tokens: u32,
    /// Tokens it computes at most in one step.
    pub max_rows: u32,
}

/// One step of one micro-batch: which sequences compute how many tokens where.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepPlan {
    /// The micro-batch that takes the step.
    pub micro_batch: MicroBatch,
    /// What is computed. Order within an attention worker is the order of rows; it changes no result.
    pub work: Vec<Work>,
    /// Sequences to take off their worker before the step, to free KV blocks. They wait again and lose nothing but time.
    pub preempt: Vec<SequenceId>,
}

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// The sequence.
    pub sequence: SequenceId,
    /// Index of the attention worker. A sequence stays where it first ran until it is preempted.
    pub worker: u16,
    /// How many of its next tokens are computed: a chunk of the prompt, or 1 when decoding.
    pub tokens: u32,
}

/// The end of a step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StepDone {
    /// Which micro-batch.
    pub micro_batch: MicroBatch,
    /// Which step.
    pub step: Step,
    /// How each of the step's sequences fared, in the order of the plan.
    pub outcomes: Vec<Outcome>,
    /// Where the time went, by the slowest worker.
    pub timing: StepTiming,
}

/// How one sequence fared in a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The sequence.
    pub sequence: SequenceId,
    /// Whether a token was generated.
    pub sampled: bool,
    /// Present when the sequence is at its end.
    pub finished: Option<FinishReason>,
}

/// Where a step's time went on one attention worker. Sums over the layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct StepTiming {
    /// From the first layer to the last token.
    pub total: Duration,
    /// Computing on the attention side (T_a summed over the layers).
    pub attention: Duration,
    /// Slowest expert worker's computing, per layer, summed (T_e).
    pub expert: Duration,
    /// Frames waiting at the slowest expert worker before its computation began.
    pub expert_queue: Duration,
    /// Round trips less the above: both hops (2 T_c).
    pub network: Duration,
    /// Combines that lay ready while this worker computed another micro-batch.
    pub ready: Duration,
    /// Tokens computed.
    pub rows: u32,
}

/// A part of a plan that was not carried out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Refusal {
    /// The plan's micro-batch.
    pub micro_batch: MicroBatch,
    /// The sequence, unless the whole plan was refused.
    pub sequence: Option<SequenceId>,
    /// Why.
    pub reason: RefusalReason,
}

/// Why a part of a plan was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum RefusalReason {
    /// There is no such micro-batch.
    #[error("there is no such micro-batch; the cluster has {0}")]
    UnknownMicroBatch(u8),
    /// Enough plans of this micro-batch are under way.
    #[error("{PLANS_AHEAD} plans of this micro-batch are under way already")]
    TooManyPlans,
    /// The sequence is not known, or has ended.
    #[error("this sequence is not known, or has ended")]
    UnknownSequence,
    /// The plan names the sequence twice.
    #[error("the plan names this sequence twice")]
    NamedTwice,
    /// The sequence is in a step of another micro-batch.
    #[error("this sequence is in a step of another micro-batch")]
    Busy,
    /// A sequence with a step under way cannot be preempted.
    #[error("this sequence has a step under way; it can be preempted when that has ended")]
    PreemptBusy,
    /// The sequence does not hold any KV blocks.
    #[error("this sequence is on no worker")]
    NotPlaced,
    /// There is no such worker, or it is not alive.
    #[error("attention-{0} does not exist or is not alive")]
    NoSuchWorker(u16),
    /// The sequence's KV cache is elsewhere.
    #[error("this sequence's KV cache is on attention-{0}")]
    WrongWorker(u16),
    /// More tokens than the sequence has left to compute, or none.
    #[error("{asked} tokens were asked for, but from 1 to {left} can be computed")]
    Tokens {
        /// Tokens in the plan.
        asked: u32,
        /// Tokens there are.
        left: u32,
    },
    /// The step would be larger than the worker's limit.
    #[error("the step would have {rows} tokens on this worker, whose limit is {max_rows}")]
    TooManyRows {
        /// Tokens in the step.
        rows: u32,
        /// The worker's limit.
        max_rows: u32,
    },
    /// There are not enough KV blocks.
    #[error("{needed} more KV blocks are needed, {free} are free")]
    NoBlocks {
        /// Blocks asked for.
        needed: u32,
        /// Blocks there are.
        free: u32,
    },
}

/// What an attention worker is told, in order.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum AttentionCommand {
    /// Make a sequence known; its KV blocks are taken as its steps come.
    Admit {
        /// The sequence.
        sequence: SequenceId,
        /// The request it comes from.
        request: Arc<Request>,
        /// Tokens generated before (after a preemption or a failure).
        generated: Vec<u32>,
        /// The sequence's length never grows beyond this.
        limit: u32,
    },
    /// Forget a sequence and free its blocks.
    Release(SequenceId),
    /// Take a step when the previous one of the micro-batch has ended.
    Step(AttentionStep),
}

impl actix::Message for AttentionCommand {
    type Result = ();
}

/// What an attention worker says to the frontend, in order.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum AttentionWord {
    /// A step came to its end.
    Step(StepReport),
    /// It is in a new epoch. What it had not reported before this is void, and has to be given to it again.
    Moved {
        /// Index of the worker.
        worker: u16,
        /// The new epoch.
        epoch: Epoch,
    },
}

impl AttentionWord {
    /// Index of the worker that says it.
    pub fn worker(&self) -> u16 {
        match self {
            AttentionWord::Step(report) => report.worker,
            AttentionWord::Moved { worker, .. } => *worker,
        }
    }
}

impl actix::Message for AttentionWord {
    type Result = ();
}

/// One attention worker's part of a step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AttentionStep {
    /// Version of membership and placement.
    pub epoch: Epoch,
    /// The micro-batch.
    pub micro_batch: MicroBatch,
    /// The step.
    pub step: Step,
    /// Attention workers that take part.
    pub participants: Arc<Participants>,
    /// What to compute: sequence, position of its first token, number of tokens.
    pub work: Vec<StepWork>,
}

/// One sequence's part of an attention worker's step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepWork {
    /// The sequence.
    pub sequence: SequenceId,
    /// Position of the first token computed.
    pub start: u32,
    /// How many tokens.
    pub tokens: u32,
    /// Whether the step ends with the last known token, so that a next one is sampled.
    pub sample: bool,
}

/// An attention worker's account of a step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StepReport {
    /// Index of the worker.
    pub worker: u16,
    /// Version of membership under which the step ran.
    pub epoch: Epoch,
    /// The micro-batch.
    pub micro_batch: MicroBatch,
    /// The step.
    pub step: Step,
    /// In the order of the work; sequences that had ended before are left out.
    pub results: Vec<SequenceResult>,
    /// Where the time went.
    pub timing: StepTiming,
}

/// What a step did for one sequence.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SequenceResult {
    /// The sequence.
    pub sequence: SequenceId,
    /// The generated token, if the step reached the end of the known ones.
    pub token: Option<u32>,
    /// Its log-probability, if asked for.
    pub logprob: Option<TokenLogprob>,
    /// Log-probabilities of prompt tokens that this step yields, if asked for.
    pub prompt_logprobs: Vec<TokenLogprob>,
    /// How many prompt log-probabilities come before these (the prompt's first token has none).
    pub prompt_start: u32,
    /// Present when the sequence is at its end.
    pub finished: Option<FinishReason>,
}

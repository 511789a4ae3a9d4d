//! Who does what when: attention workers, expert workers, schedulers and the frontend as actors around pure step logic.
//!
//! What decides is plain state machines that take events and the time and return actions ([`Ledger`], [`View`] and the
//! [`Scheduler`]s, [`Rally`]): no clock, no threads, no sockets. What executes is thin: actors for control, one data loop for each worker.
//! [`Cluster::start`] puts them together on one machine; [`Client::submit`] asks it for tokens.
//!
//! To write a scheduler of your own, begin at [`protocol`] and [`Policy`].

mod attention;
pub mod balance;
mod clock;
mod cluster;
mod cluster_config;
mod cluster_error;
mod data_loop;
mod expert;
mod frontend;
mod grouping;
mod metered;
pub mod metric_names;

pub mod protocol;
mod remote;
mod request;
mod roster;
mod scheduler;
pub mod simulation;
mod startup;
mod supervisor;
mod timeline;
mod voice;
mod waits;
mod worker;

pub use attention::{LOGPROBS_MAX, Rally, Sampler, Sequence, SequenceError, Sequences, Task, Wait};
pub use clock::Clock;
pub use cluster::Cluster;
pub use cluster_config::{Bytes, ClusterConfig, MemoryPlan};
pub use cluster_error::ClusterError;
pub use expert::ExpertLoad;
pub use frontend::{
    AttentionStatus, Client, Ledger, Limits, Output, OverdueStep, RequestStream, Status, Totals,
};
pub use remote::{
    Cause, Difference, Edge, Fingerprint, Inspection, Presence, RemoteScheduler,
    RemoteSchedulerError, RemoteWorker, RemoteWorkerError, SchedulingHints, Trouble, Way, inspect,
};
pub use request::{
    FinishReason, Request, RequestEvent, Sampling, SamplingError, SubmitError, TokenLogprob,
};
pub use roster::RosterShape;
pub use scheduler::{
    Accepted, AcceptedWork, Arrival, Batching, Consult, EarliestDeadline, FairShare, FirstCome,
    Order, Pace, Policy, PolicyScheduler, Scheduler, SchedulerActor, SchedulerHandle, SequenceView,
    SloClass, Standing, StartScheduler, TenantWeights, View, WeightError, WorkerView, scheduler,
};
pub use startup::Startup;
pub use supervisor::LoadProgress;
pub use timeline::{Activity, Recorder, Span, Timeline, write_chrome_trace};
pub use waits::{WorkerState, WorkerWait};

/// Messages that an actor's mailbox holds before its senders have to wait.
const MAILBOX_CAPACITY: usize = 4096;

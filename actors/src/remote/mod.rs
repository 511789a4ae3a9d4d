//! Workers in processes of their own, and the controller they join.
//!
//! A worker loads its weights at once, from its own configuration, and meanwhile calls the controller (the process with frontend, scheduler and
//! supervisor). It says who it is and what it computes with ([`Fingerprint`]); the controller gives it its seat or refuses it with the difference. From then on
//! the link carries what mailboxes carry in one process: orders and commands one way, words and reports the other. Rows never take it: for each epoch
//! the worker joins the data fabric, with the addresses that the order names.
//!
//! Schedulers may be processes of their own too ([`RemoteScheduler`]): they call the same controller, with certificates of another role.
//!
//! A link that breaks costs the worker its seat and nothing else: it keeps its weights, calls again, and is used again.

mod fingerprint;
mod gate;
mod inspect;
mod message;
mod planner;
mod probe;
mod redial;
mod scheduler;
mod worker;

pub use fingerprint::{Difference, Fingerprint};
pub(crate) use gate::{Gate, GateError, Joined};
pub use inspect::{Inspection, Presence, inspect};
pub(crate) use planner::Planner;
pub use probe::{Cause, Edge, Trouble, Way};
pub use scheduler::{RemoteScheduler, RemoteSchedulerError, SchedulingHints};
pub use worker::{RemoteWorker, RemoteWorkerError};

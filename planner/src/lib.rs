//! Answers before anyone rents a GPU: which hardware for which side, how many attention workers, which batch,
//! what it will deliver, and what binds.
//!
//! Everything is computed from a model's shape ([`ModelShape`]) and figures of data sheets ([`Hardware`]), after
//! MegaScale-Infer (arXiv 2504.02263), whose equations are cited where they are used. `docs/planner.md` says what is
//! assumed.

pub mod colocated;
pub mod cost;
mod deployment;
mod error;
mod hardware;
mod local;
mod pipeline;
mod plot;
mod precision;
mod profile;
pub mod reproduce;
mod search;
mod shape;
pub mod simulate;
mod workload;

pub use deployment::{Binding, Condition, Deployment, MemoryUse, Outlook, Setting};
pub use error::PlanError;
pub use hardware::{Efficiency, Gpu, Hardware, PriceSource, Transport};
pub use local::Local;
pub use pipeline::{Stages, simulate};
pub use precision::{Dtype, Precision};
pub use profile::{Apart, Fits, Line, Profile};
pub use search::{Candidate, Objective, Plan, Rates, Request, Share, judge, plan};
pub use shape::{AttentionShape, ModelShape};
pub use workload::Workload;

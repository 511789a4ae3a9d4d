//! Answers before anyone rents a GPU: which hardware for which side, how many attention workers, which batch,
//! what it will deliver, and what binds.
//!
//! Everything is computed from a model's shape ([`ModelShape`]) and figures of data sheets ([`Hardware`]), after
//! MegaScale-Infer (arXiv 2504.02263), whose equations are cited where they are used. `docs/planner.md` says what is
//! assumed.

mod error;
mod hardware;
mod pipeline;
mod plot;
mod precision;
mod shape;
pub mod simulate;

pub use error::PlanError;
pub use hardware::{Efficiency, Gpu, Hardware, PriceSource, Transport};
pub use pipeline::{Stages, simulate};
pub use precision::{Dtype, Precision};
pub use shape::{AttentionShape, ModelShape};

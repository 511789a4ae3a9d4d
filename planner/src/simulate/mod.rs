//! A deployment before it is rented: a trace served in virtual time by the scheduling logic of production.
//!
//! Two levels of detail. *Rounds* ([`serve`]) take one event for each layer of each micro-batch, whatever the number of workers; with them a thousand attention
//! and a thousand expert workers are simulated faster than real time on one core. *Frames* ([`frames()`]) play every worker's own logic and every frame over the
//! simulated fabric, for small clusters and for faults; they are what rounds are held against.

mod deployed;
mod frames;
mod histogram;
mod lockstep;
mod report;
mod roofline;
mod routing;
mod serving;
mod times;
mod trace;

pub use deployed::{Deployed, GpuSide, Layout, Situation, page, saturated};
pub use frames::{FramesOutcome, Wire, frames};
pub use report::{Bubbles, Quantiles, Report, Side as SideUse};
pub use roofline::Roofline;
pub use routing::Routing;
pub use serving::{ClusterShape, Outage, Variation, serve};
pub use times::StageTimes;
pub use trace::{Trace, TraceRequest};

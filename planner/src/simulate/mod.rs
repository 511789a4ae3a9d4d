//! A deployment before it is rented: a trace served in virtual time by the scheduling logic of production.
//!
//! Two levels of detail. *Rounds* ([`serve`]) take one event for each layer of each micro-batch, whatever the number of workers; with them a thousand attention
//! and a thousand expert workers are simulated faster than real time on one core. *Frames* ([`frames()`]) play every worker's own logic and every frame over the
//! simulated fabric, for small clusters and for faults; they are what rounds are held against.

mod clients;
mod deployed;
mod frames;
mod histogram;
mod lanes;
mod lockstep;
mod priced;
mod queue;
mod report;
mod routing;
mod serving;
mod shape;
mod sweep;
mod times;
mod trace;

pub use deployed::{Deployed, Situation};
pub use frames::{FramesOutcome, Wire, frames};
pub use priced::Priced;
pub use report::{Bubbles, Quantiles, Report, Side as SideUse};
pub use routing::Routing;
pub use serving::serve;
pub use shape::{ClusterShape, Outage, Variation};
pub use sweep::{page, saturated};
pub use times::StageTimes;
pub use trace::{Trace, TraceRequest};

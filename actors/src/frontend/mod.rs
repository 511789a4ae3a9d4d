//! The frontend: takes requests in, has them scheduled and computed, and streams tokens out.

mod actor;
mod candidates;
mod client;
mod ledger;
mod telemetry;

pub(crate) use actor::{AskStatus, Drain, Frontend, GiveUp, Regrouped, SchedulerNews};
pub use actor::{AttentionStatus, Status};
pub use client::{Client, RequestStream};
pub use ledger::{Ledger, Limits, Output, OverdueStep, Totals};

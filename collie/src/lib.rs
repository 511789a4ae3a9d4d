//! Finds the RDMA workloads that make an adapter misbehave, and the smallest set of settings that each of them needs, after *Collie: Finding
//! Performance Anomalies in RDMA Subsystems* (NSDI 2022).

mod baselines;
mod case;
pub mod engine;
mod evaluate;
mod extract;
mod fit;
pub mod host;
mod ideas;
mod known;
mod mfs;
mod monitor;
mod refine;
mod region;
mod report;
mod reshape;
mod search;
mod session;
mod simulated;
mod space;
mod subsystem;

pub use evaluate::{Evaluation, Strategy, StrategyResult, evaluate};
pub use known::{Difference, KnownAnomalies, KnownError, Met, Reachable};
pub use mfs::{Edge, Factor, Mfs};
pub use monitor::{Monitor, Symptom, Verdict};
pub use region::{Condition, Region};
pub use report::{anomalies_html, anomalies_markdown, evaluation_markdown, evaluation_svg};
pub use reshape::{Change, Refused};
pub use search::{Options, Search, Signals};
pub use session::{JournalError, OutOfTime, Purpose, Record, Session};
pub use simulated::{Effect, Mechanism, Model, Noise, Simulated, UnknownSubsystem};
pub use space::{
    Axis, Category, Choice, Direction, Feature, Memory, Operation, OutsideSpace, Point, Quantity,
    Setting, Space, SpaceError, UnknownName, perftest_command, probe_command,
};
pub use subsystem::{Bound, Measurement, Probe, Sample, SetupFailed, Subsystem};

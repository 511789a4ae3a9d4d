//! Finds the RDMA workloads that make an adapter misbehave, and the smallest set of settings that each of them needs, after *Collie: Finding
//! Performance Anomalies in RDMA Subsystems* (NSDI 2022).

mod monitor;
mod region;
mod simulated;
mod space;
mod subsystem;

pub use monitor::{Monitor, Symptom, Verdict};
pub use region::{Condition, Region};
pub use simulated::{Effect, Mechanism, Model, Noise, Simulated, UnknownSubsystem};
pub use space::{
    Axis, Category, Choice, Direction, Feature, Memory, Operation, OutsideSpace, Point, Quantity,
    Setting, Space, SpaceError, UnknownName, perftest_command, probe_command,
};
pub use subsystem::{Bound, Measurement, Probe, Sample, SetupFailed, Subsystem};

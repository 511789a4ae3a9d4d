//! Real adapters: a verbs traffic generator that runs any workload of the space between two ports, and measures what both ends see.
//!
//! ```text
//!  Adapters (a Subsystem): asks both ends, puts readings together, knows what is owed
//!     |                        |
//!  LocalEnd                 RemoteEnd --- TCP, a management address --- agent --- LocalEnd
//!     |                                                                              |
//!  verbs of this host  <=== the traffic: RC, UC, UD over the adapters' own network ===>
//! ```
//! Both ends may be ports of one host. An end is asked to prepare, connect, run and finish; each has a deadline, and `finish` says whether the device gave everything
//! back. What is pure arithmetic is in `flow`, `samples` and `calibration`; the loops are in `traffic`.
//!
//! Limits: host memory only (no GPU), one port at each end, no congestion control settings. Who reaches an agent's address can make its adapter send: keep it on a
//! network for management, or on `127.0.0.1` behind a tunnel.

mod adapter;
mod agent;
mod calibration;
mod end;
mod flow;
mod message;
mod pair;
mod remote;
mod samples;
mod traffic;

use volley_transports::verbs::VerbsError;

pub use agent::{Agent, AgentOptions};
pub use calibration::{Calibration, Owed};
pub use message::{Facts, Timing};
pub use pair::{Adapters, Place, Progress};

use crate::host::CountersError;
use message::{HalfOffer, Reading, Task};

/// Why an end could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The adapter or the system refused a resource.
    #[error(transparent)]
    Verbs(#[from] VerbsError),
    /// The port has no counters.
    #[error(transparent)]
    Counters(#[from] CountersError),
    /// The port cannot be used.
    #[error("{device} port {port}: {reason}")]
    Device {
        /// The device.
        device: String,
        /// Its port.
        port: u8,
        /// Why not, and what to do.
        reason: String,
    },
    /// This end cannot run such a workload.
    #[error("this end cannot run it: {0}")]
    Unfit(String),
    /// Traffic began and did not go on.
    #[error("traffic broke off: {0}")]
    Broken(String),
    /// The wall-clock limit of a probe.
    #[error("the probe's time is over; give it more (--limit), or fewer queue pairs and regions")]
    OutOfTime,
    /// The coordinator asked for something that cannot come now, or sent what does not fit the workload.
    #[error("asked out of turn: do both hosts run the same version?")]
    OutOfTurn,
    /// The device kept something after the workload.
    #[error("not everything was taken down: {0}")]
    LeftOver(String),
    /// The agent of the other host does not do its part.
    #[error("agent {address}: {what}")]
    Agent {
        /// Where it is.
        address: String,
        /// What happened.
        what: String,
    },
    /// The two ends, or the space that was asked for, have no workload in common.
    #[error("no workload is left: {0}")]
    NothingInCommon(String),
}

/// One host's half of the traffic, here or elsewhere.
trait End: Send {
    /// What it is made of.
    fn facts(&self) -> &Facts;

    /// Makes queue pairs and regions, after whatever was there is taken down.
    fn prepare(&mut self, task: &Task) -> Result<Vec<HalfOffer>, EngineError>;

    /// Connects its halves to these.
    fn connect(&mut self, peers: &[HalfOffer]) -> Result<(), EngineError>;

    /// Lets traffic flow, which it then does until [`End::finish`], and takes readings.
    fn run(&mut self, timing: Timing) -> Result<Vec<Reading>, EngineError>;

    /// Stops and takes everything down. Nothing to do is done.
    fn finish(&mut self) -> Result<(), EngineError>;
}

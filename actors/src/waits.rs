//! Who waits for whom: what every worker is waiting for at this moment.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use volley_transports::{Epoch, Layer, MicroBatch, Step, WorkerId};

use crate::startup::Startup;

/// One micro-batch of a worker that waits for frames of others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerWait {
    /// Whose frames are missing.
    pub peers: Vec<WorkerId>,
    /// The micro-batch.
    pub micro_batch: MicroBatch,
    /// Its step.
    pub step: Step,
    /// The layer.
    pub layer: Layer,
    /// For how long.
    pub age: Duration,
}

/// How a worker's seat stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerState {
    /// The seat.
    pub worker: WorkerId,
    /// Where its process is reached, if it is another one and takes lanes.
    pub address: Option<SocketAddr>,
    /// Whether somebody sits there.
    pub present: bool,
    /// Whether its work goes elsewhere, or has gone: it is drained, or wants to leave.
    pub leaving: bool,
    /// The epoch since which it has taken part; none if it does not.
    pub since: Option<Epoch>,
    /// How its start went.
    pub startup: Startup,
    /// What it waits for; none if it did not answer in time.
    pub waits: Option<Vec<WorkerWait>>,
}

impl std::fmt::Display for WorkerState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: ", self.worker)?;
        match (self.present, self.since) {
            (false, _) => return f.write_str("nobody is there"),
            (true, None) if self.leaving => f.write_str("drained; it may be stopped")?,
            (true, None) => f.write_str("takes no part")?,
            (true, Some(epoch)) if self.leaving => {
                write!(
                    f,
                    "in since {epoch}; to be drained, but the others do not suffice"
                )?;
            }
            (true, Some(epoch)) => write!(f, "in since {epoch}")?,
        }
        match &self.waits {
            None => {
                f.write_str("; it does not say what it waits for: it computes for long, or hangs")
            }
            Some(waits) => waits.iter().try_for_each(|wait| {
                let peers: Vec<String> = wait.peers.iter().map(WorkerId::to_string).collect();
                write!(
                    f,
                    "; waits {:.1?} for {} ({}, {}, {})",
                    wait.age,
                    peers.join(", "),
                    wait.layer,
                    wait.micro_batch,
                    wait.step
                )
            }),
        }
    }
}

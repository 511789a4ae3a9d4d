//! Names of the things that exchange frames: workers, lanes, and the coordinates of one exchange.
//!
//! All are newtypes, so that a layer cannot be passed where a micro-batch is meant, and all print themselves the
//! way log lines and error messages show them.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Which half of a layer a worker computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Role {
    /// Keeps the requests and their KV cache; sends dispatches.
    Attention,
    /// Keeps experts; answers with combines.
    Expert,
}

impl Role {
    /// The role at the other end of every lane.
    pub const fn opposite(self) -> Self {
        match self {
            Self::Attention => Self::Expert,
            Self::Expert => Self::Attention,
        }
    }

    /// The worker number `index` of this role.
    pub const fn worker(self, index: u16) -> WorkerId {
        WorkerId { role: self, index }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Attention => "attention",
            Self::Expert => "expert",
        })
    }
}

/// One worker: its role and its number among the workers of that role, from zero. Prints as `attention-0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct WorkerId {
    /// The half of the layer it computes.
    pub role: Role,
    /// Its number among the workers of its role, from zero.
    pub index: u16,
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.role, self.index)
    }
}

/// A text is no worker's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a worker is named by role and index, as in `attention-0` or `expert-3`")]
pub struct WorkerNameError;

impl std::str::FromStr for WorkerId {
    type Err = WorkerNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (role, index) = text.split_once('-').ok_or(WorkerNameError)?;
        let mut roles = [Role::Attention, Role::Expert].into_iter();
        let role = roles.find(|of| of.to_string() == role);
        // What is read is what is written: no sign, no leading zero.
        let number = index.parse::<u16>().ok().filter(|n| n.to_string() == index);
        Ok(role
            .ok_or(WorkerNameError)?
            .worker(number.ok_or(WorkerNameError)?))
    }
}

/// One of the groups of sequences that take turns between attention and experts (MegaScale-Infer, section 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MicroBatch(pub u8);

impl fmt::Display for MicroBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "micro-batch {}", self.0)
    }
}

/// One pass of a micro-batch through all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Step(pub u64);

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {}", self.0)
    }
}

/// A layer of the model, from zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Layer(pub u16);

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {}", self.0)
    }
}

/// Version of membership and placement. Frames of an older epoch are stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u32);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "epoch {}", self.0)
    }
}

/// The coordinates of one exchange: which step of which micro-batch, at which layer, under which placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StepKey {
    /// Placement under which the rows were routed.
    pub epoch: Epoch,
    /// Step of the micro-batch.
    pub step: Step,
    /// Layer whose experts are asked.
    pub layer: Layer,
    /// The micro-batch.
    pub micro_batch: MicroBatch,
}

impl fmt::Display for StepKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} {} {}",
            self.epoch, self.step, self.layer, self.micro_batch
        )
    }
}

/// One of the lanes of an endpoint: the worker at the other end, and the micro-batch.
///
/// Between one attention worker and one expert worker there is one lane per micro-batch. It is made of two slots,
/// one in each direction, and works like a ball: exactly one side holds it. The holder may read what the other side
/// sent last and write what it will send next; [`post`](crate::Endpoint::post) hands the ball over. At the start the
/// attention side holds every ball. The pattern is strictly call and return, which is why there are no credits: a
/// worker that holds the ball knows that both slots are its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lane {
    /// Index of the worker at the other end, whose role is the opposite of the endpoint's.
    pub peer: u16,
    /// The micro-batch whose frames it carries.
    pub micro_batch: MicroBatch,
}

impl Lane {
    /// The lane to `peer` for `micro_batch`.
    pub const fn new(peer: u16, micro_batch: MicroBatch) -> Self {
        Self { peer, micro_batch }
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lane to peer {} for {}", self.peer, self.micro_batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_as_in_a_log_line() {
        assert_eq!(Role::Attention.worker(0).to_string(), "attention-0");
        assert_eq!(Role::Attention.opposite().worker(2).to_string(), "expert-2");
        let key = StepKey {
            epoch: Epoch(3),
            step: Step(7),
            layer: Layer(2),
            micro_batch: MicroBatch(1),
        };
        assert_eq!(key.to_string(), "epoch 3 step 7 layer 2 micro-batch 1");
        assert_eq!(
            Lane::new(4, MicroBatch(0)).to_string(),
            "lane to peer 4 for micro-batch 0"
        );
    }
}

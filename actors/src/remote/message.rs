//! What travels over a control link, and how: postcard, one message to a frame of the link.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use volley_transports::{Epoch, Participants, Placement, WorkerId};

use super::Fingerprint;
use super::probe::Edge;
use super::scheduler::SchedulingHints;
use crate::grouping::Grouping;
use crate::protocol::{AttentionCommand, AttentionWord, Now, SchedulerEvent, StepPlan};
use crate::supervisor::LoadProgress;
use crate::timeline::Span;
use crate::voice::WorkerWord;

/// What a worker says to the controller.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum FromWorker {
    /// First of all.
    Hello {
        worker: WorkerId,
        fingerprint: Fingerprint,
        /// The experts it holds, if it has loaded already.
        loaded: Option<Vec<u16>>,
    },
    Word(WorkerWord),
    Attention(AttentionWord),
    Progress(LoadProgress),
    /// Rows that its experts computed since this was last said: layer, expert, rows.
    Load(Vec<(u16, u16, u64)>),
    /// The answer to [`ToWorker::Spans`]: its clock, and what it has recorded since it last said so.
    Spans(Now, Vec<Span>),
    /// The answer to [`ToWorker::Time`]: time of day, since the Unix epoch.
    Time(Duration),
    /// The answer to [`ToWorker::Probe`].
    Probed(Vec<Edge>),
    /// It wants to leave; it stays until it is told to stop, so that its work can go elsewhere first.
    Leaving,
}

/// What the controller says to a worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum ToWorker {
    /// The answer to a good [`FromWorker::Hello`].
    Welcome,
    /// The answer to another one.
    Refused {
        reason: String,
        /// Whether it may be otherwise later.
        again: bool,
    },
    Regroup(WireGrouping),
    Command(AttentionCommand),
    Adopt(Vec<u16>),
    Waits,
    /// What it has done of late.
    Spans,
    /// What time it is.
    Time,
    /// Try the way to these workers.
    Probe(Vec<(WorkerId, SocketAddr)>),
    Crash,
    /// The work of a worker that leaves has gone elsewhere.
    Released,
}

/// What a scheduler process says to the controller.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum FromScheduler {
    /// First of all.
    Hello {
        /// Its version: plans and events have no other.
        volley: String,
        name: String,
        term: Option<u64>,
    },
    /// An election chose it, or another instead.
    Elected(Option<u64>),
    /// The answer to a [`ToScheduler::Consult`].
    Plans { number: u64, plans: Vec<StepPlan> },
}

/// What the controller says to a scheduler process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum ToScheduler {
    /// The answer to a good hello.
    Welcome(SchedulingHints),
    /// The answer to another one.
    Refused(String),
    /// See [`Consult`](crate::Consult).
    Consult {
        number: u64,
        event: SchedulerEvent,
        now: Now,
    },
}

/// A [`Grouping`] with the addresses of its expert workers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct WireGrouping {
    epoch: Epoch,
    expert_workers: u16,
    /// Of each expert, the one to send to first.
    owners: Vec<Vec<u16>>,
    attention: Participants,
    fresh: Participants,
    /// By expert worker; none for those that take no part.
    pub(super) addresses: Vec<Option<SocketAddr>>,
}

impl WireGrouping {
    pub(super) fn new(grouping: &Grouping, addresses: Vec<Option<SocketAddr>>) -> Self {
        let placement = &grouping.placement;
        let owners = |expert| {
            let owners = placement.owners(volley_transports::Layer(0), expert).iter();
            owners.map(|owner| owner.worker).collect()
        };
        WireGrouping {
            epoch: grouping.epoch,
            expert_workers: placement.workers(),
            owners: (0..placement.experts()).map(owners).collect(),
            attention: (*grouping.attention).clone(),
            fresh: (*grouping.fresh).clone(),
            addresses,
        }
    }

    /// The grouping, if it makes sense.
    pub(super) fn grouping(&self) -> Result<Grouping, String> {
        if self.addresses.len() != usize::from(self.expert_workers) {
            return Err(format!(
                "{} addresses came for {} expert workers",
                self.addresses.len(),
                self.expert_workers
            ));
        }
        let owners = std::slice::from_ref(&self.owners);
        let placement = Placement::from_owners(self.epoch, self.expert_workers, owners)
            .map_err(|error| error.to_string())?;
        Ok(Grouping {
            epoch: self.epoch,
            placement: Arc::new(placement),
            attention: Arc::new(self.attention.clone()),
            fresh: Arc::new(self.fresh.clone()),
        })
    }
}

pub(super) fn encode(message: &impl Serialize) -> Vec<u8> {
    postcard::to_stdvec(message).expect("our messages have no part that cannot be written")
}

/// Reads a message; what is wrong with it otherwise.
pub(super) fn decode<M: DeserializeOwned>(bytes: &[u8]) -> Result<M, String> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(format!("{} bytes are left behind the message", rest.len())),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::request::Request;

    #[test]
    fn a_grouping_travels() {
        let placement =
            Placement::from_owners(Epoch(7), 3, &[vec![vec![1, 0], vec![2], vec![0], vec![1]]])
                .unwrap();
        let grouping = Grouping {
            epoch: Epoch(7),
            placement: Arc::new(placement),
            attention: Arc::new(Participants::all(2)),
            fresh: Arc::new(Participants::none(2)),
        };
        let address = "10.1.2.3:7".parse().unwrap();
        let wire = WireGrouping::new(&grouping, vec![Some(address), None, None]);
        let back: WireGrouping = decode(&encode(&wire)).unwrap();
        let there = back.grouping().unwrap();
        assert_eq!(there.placement, grouping.placement);
        assert_eq!(
            (there.attention, there.fresh),
            (grouping.attention.clone(), grouping.fresh.clone())
        );
        assert_eq!(back.addresses, [Some(address), None, None]);
        assert!(WireGrouping::new(&grouping, vec![None]).grouping().is_err());
    }

    #[test]
    fn a_command_travels_and_what_is_left_behind_it_is_refused() {
        let admit = ToWorker::Command(AttentionCommand::Admit {
            sequence: crate::protocol::SequenceId(5),
            request: Arc::new(Request::greedy(vec![1, 2, 3], 4)),
            generated: vec![9],
            limit: 7,
        });
        let mut bytes = encode(&admit);
        let back: ToWorker = decode(&bytes).unwrap();
        assert_eq!(format!("{back:?}"), format!("{admit:?}"));
        bytes.push(0);
        assert!(decode::<ToWorker>(&bytes).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<FromWorker>(&bytes);
            let _ = decode::<FromScheduler>(&bytes);
            let _ = decode::<ToScheduler>(&bytes);
            if let Ok(ToWorker::Regroup(grouping)) = decode::<ToWorker>(&bytes) {
                let _ = grouping.grouping();
            }
        }
    }
}

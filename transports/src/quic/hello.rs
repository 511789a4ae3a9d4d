//! What a caller says first: what the connection is for. Fixed little-endian numbers, checked before use; nothing is allocated for it.

use std::fmt::Write as _;

use crate::{Epoch, Topology};

/// Version of the whole protocol, agreed in the TLS handshake.
pub(super) const ALPN: &[u8] = b"volley/1";

const MAGIC: [u8; 4] = *b"VLYQ";
/// Bytes of a hello.
pub(super) const HELLO_BYTES: usize = 44;
/// Longest reason of a refusal, in bytes.
pub(super) const REASON_MAX: usize = 512;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hello {
    /// A [`ControlLink`](super::ControlLink).
    Control,
    /// Lanes between an attention worker, who calls, and an expert worker.
    Data(DataHello),
    /// Nothing: the caller wants to know whether it gets here, and how.
    Probe,
}

/// What the frames of a data connection's lanes travel by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carrier {
    /// Streams of the connection.
    Streams = 2,
    /// Queue pairs, which are agreed on over the connection.
    Verbs = 3,
}

impl std::fmt::Display for Carrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Streams => "QUIC",
            Self::Verbs => "RDMA",
        })
    }
}

/// Which lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DataHello {
    pub(crate) carrier: Carrier,
    pub(crate) epoch: Epoch,
    /// Index of the attention worker.
    pub(crate) attention: u16,
    /// Index of the expert worker.
    pub(crate) expert: u16,
    /// Which of the pair's connections. Micro-batch `b` is on connection `b % connections`.
    pub(crate) connection: u8,
    pub(crate) connections: u8,
    pub(crate) topology: Topology,
}

impl Hello {
    pub(super) fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&MAGIC);
        match self {
            Hello::Control => put(&[1]),
            Hello::Probe => put(&[4]),
            Hello::Data(data) => {
                put(&[
                    data.carrier as u8,
                    data.connection,
                    data.connections,
                    data.topology.micro_batches,
                ]);
                put(&data.epoch.0.to_le_bytes());
                put(&data.attention.to_le_bytes());
                put(&data.expert.to_le_bytes());
                put(&data.topology.attention.to_le_bytes());
                put(&data.topology.experts.to_le_bytes());
                put(&(data.topology.dispatch_bytes as u64).to_le_bytes());
                put(&(data.topology.combine_bytes as u64).to_le_bytes());
            }
        }
        bytes
    }

    /// Reads a hello; what is wrong with it otherwise.
    pub(super) fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, String> {
        let mut at = 0;
        let mut take = |n: usize| {
            at += n;
            &bytes[at - n..at]
        };
        fn number(bytes: &[u8]) -> u64 {
            bytes
                .iter()
                .rev()
                .fold(0, |number, &byte| number << 8 | u64::from(byte))
        }
        if take(4) != MAGIC {
            return Err("it does not speak this protocol".to_owned());
        }
        let kind = number(take(1));
        let hello = match kind {
            1 => Hello::Control,
            4 => Hello::Probe,
            2 | 3 => {
                let (connection, connections) = (number(take(1)) as u8, number(take(1)) as u8);
                let micro_batches = number(take(1)) as u8;
                let epoch = Epoch(number(take(4)) as u32);
                let [attention, expert, m, n] = [(); 4].map(|()| number(take(2)) as u16);
                let [dispatch_bytes, combine_bytes] =
                    [(); 2].map(|()| usize::try_from(number(take(8))));
                let (Ok(dispatch_bytes), Ok(combine_bytes)) = (dispatch_bytes, combine_bytes)
                else {
                    return Err("its slots do not fit this machine".to_owned());
                };
                let topology = Topology {
                    attention: m,
                    experts: n,
                    micro_batches,
                    dispatch_bytes,
                    combine_bytes,
                };
                topology.bytes().map_err(|error| error.to_string())?;
                if attention >= m || expert >= n || connection >= connections {
                    return Err(format!(
                        "it names attention-{attention} of {m}, expert-{expert} of {n}, connection {connection} of {connections}"
                    ));
                }
                Hello::Data(DataHello {
                    carrier: if kind == 2 {
                        Carrier::Streams
                    } else {
                        Carrier::Verbs
                    },
                    epoch,
                    attention,
                    expert,
                    connection,
                    connections,
                    topology,
                })
            }
            other => return Err(format!("it wants something unknown ({other})")),
        };
        if bytes[at..].iter().any(|&byte| byte != 0) {
            return Err("its hello has bytes where there must be none".to_owned());
        }
        Ok(hello)
    }
}

impl DataHello {
    /// Micro-batches whose lanes are on this connection.
    pub(super) fn micro_batches(&self) -> impl Iterator<Item = u8> + use<> {
        (self.connection..self.topology.micro_batches).step_by(usize::from(self.connections.max(1)))
    }

    /// What the two ends disagree about, in words; empty if nothing.
    pub(super) fn disagreement(&self, ours: &Topology) -> String {
        let mut text = String::new();
        let theirs = &self.topology;
        let numbers = [
            (
                "attention workers",
                ours.attention as usize,
                theirs.attention as usize,
            ),
            (
                "expert workers",
                ours.experts as usize,
                theirs.experts as usize,
            ),
            (
                "micro-batches",
                ours.micro_batches as usize,
                theirs.micro_batches as usize,
            ),
            (
                "bytes of a dispatch",
                ours.dispatch_bytes,
                theirs.dispatch_bytes,
            ),
            (
                "bytes of a combine",
                ours.combine_bytes,
                theirs.combine_bytes,
            ),
        ];
        for (what, ours, theirs) in numbers
            .into_iter()
            .filter(|(_, ours, theirs)| ours != theirs)
        {
            let _ = write!(
                text,
                "{}{what}: {ours} there, {theirs} here",
                if text.is_empty() { "" } else { "; " }
            );
        }
        text
    }
}

/// Answer to a hello: taken.
pub(super) const TAKEN: u8 = 0;
/// Answer to a hello: refused; length (u16) and text of the reason follow.
pub(super) const REFUSED: u8 = 1;

/// Answer to a hello: the worker was in that epoch and has left it.
pub(super) const LEFT: u8 = 2;

/// The bytes of a refusal.
pub(super) fn refusal(reason: &str) -> Vec<u8> {
    let mut end = reason.len().min(REASON_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let mut bytes = vec![REFUSED];
    bytes.extend((end as u16).to_le_bytes());
    bytes.extend(&reason.as_bytes()[..end]);
    bytes
}

/// What a hello decodes to, as text: for fuzzing the decoder from outside.
#[doc(hidden)]
pub fn describe_hello(bytes: &[u8]) -> Option<String> {
    let bytes = bytes.get(..HELLO_BYTES)?.try_into().ok()?;
    Some(format!("{:?}", Hello::decode(bytes)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_data() -> impl Strategy<Value = DataHello> {
        let shape = (
            1..500u16,
            1..500u16,
            1..9u8,
            0..1usize << 24,
            0..1usize << 24,
        );
        (shape, any::<u32>(), any::<(u16, u16, u8)>(), 1..9u8).prop_map(
            |(
                (attention, experts, micro_batches, dispatch_bytes, combine_bytes),
                epoch,
                (a, e, c),
                connections,
            )| DataHello {
                carrier: if c % 2 == 0 {
                    Carrier::Streams
                } else {
                    Carrier::Verbs
                },
                epoch: Epoch(epoch),
                attention: a % attention,
                expert: e % experts,
                connection: c % connections,
                connections,
                topology: Topology {
                    attention,
                    experts,
                    micro_batches,
                    dispatch_bytes,
                    combine_bytes,
                },
            },
        )
    }

    proptest! {
        #[test]
        fn a_hello_reads_back_as_written(data in any_data()) {
            for hello in [Hello::Control, Hello::Data(data)] {
                prop_assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
            }
        }

        #[test]
        fn no_bytes_panic(mut bytes in prop::collection::vec(any::<u8>(), HELLO_BYTES), like in any::<bool>()) {
            if like {
                bytes[..5].copy_from_slice(b"VLYQ\x02");
            }
            describe_hello(&bytes);
        }

        #[test]
        fn every_lane_is_on_one_connection(data in any_data()) {
            let mut seen = vec![0; data.topology.micro_batches.into()];
            for connection in 0..data.connections {
                DataHello { connection, ..data }.micro_batches().for_each(|lane| seen[usize::from(lane)] += 1);
            }
            prop_assert!(seen.iter().all(|&times| times == 1));
        }
    }

    #[test]
    fn a_disagreement_names_both_numbers() {
        let topology = Topology {
            attention: 1,
            experts: 2,
            micro_batches: 3,
            dispatch_bytes: 4,
            combine_bytes: 5,
        };
        let data = DataHello {
            carrier: Carrier::Streams,
            epoch: Epoch(1),
            attention: 0,
            expert: 0,
            connection: 0,
            connections: 1,
            topology,
        };
        assert_eq!(data.disagreement(&topology), "");
        let ours = Topology {
            experts: 7,
            combine_bytes: 6,
            ..topology
        };
        assert_eq!(
            data.disagreement(&ours),
            "expert workers: 7 there, 2 here; bytes of a combine: 6 there, 5 here"
        );
    }

    #[test]
    fn a_long_reason_is_cut_at_a_letter() {
        let bytes = refusal(&"é".repeat(400));
        assert_eq!(bytes.len(), 3 + REASON_MAX);
        assert!(std::str::from_utf8(&bytes[3..]).is_ok());
    }
}

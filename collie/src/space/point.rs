//! One workload: every setting of a traffic generator, with nothing left open.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A transport and the verb it carries. Only pairs that the verbs API allows exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// Reliable connection, SEND into posted receives.
    RcSend,
    /// Reliable connection, one-sided WRITE.
    RcWrite,
    /// Reliable connection, WRITE that consumes a receive at the peer.
    RcWriteImm,
    /// Reliable connection, one-sided READ.
    RcRead,
    /// Unreliable connection, SEND.
    UcSend,
    /// Unreliable connection, WRITE.
    UcWrite,
    /// Unreliable connection, WRITE that consumes a receive at the peer.
    UcWriteImm,
    /// Unreliable datagram, SEND: a message fits one packet.
    UdSend,
}

impl Operation {
    /// Every legal pair.
    pub const ALL: [Operation; 8] = [
        Operation::RcSend,
        Operation::RcWrite,
        Operation::RcWriteImm,
        Operation::RcRead,
        Operation::UcSend,
        Operation::UcWrite,
        Operation::UcWriteImm,
        Operation::UdSend,
    ];

    /// The six pairs of the published search space.
    pub const PUBLISHED: [Operation; 6] = [
        Operation::RcSend,
        Operation::RcWrite,
        Operation::RcRead,
        Operation::UcSend,
        Operation::UcWrite,
        Operation::UdSend,
    ];

    /// Whether the peer must have posted a receive for each message.
    pub fn consumes_receives(self) -> bool {
        !matches!(
            self,
            Operation::RcWrite | Operation::RcRead | Operation::UcWrite
        )
    }

    /// Whether a message must fit one packet.
    pub fn is_datagram(self) -> bool {
        self == Operation::UdSend
    }

    fn name(self) -> &'static str {
        match self {
            Operation::RcSend => "rc-send",
            Operation::RcWrite => "rc-write",
            Operation::RcWriteImm => "rc-write-imm",
            Operation::RcRead => "rc-read",
            Operation::UcSend => "uc-send",
            Operation::UcWrite => "uc-write",
            Operation::UcWriteImm => "uc-write-imm",
            Operation::UdSend => "ud-send",
        }
    }
}

/// Which way data flows between hosts A and B.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From B to A.
    Unidirectional,
    /// Both ways at once.
    Bidirectional,
    /// From B to A while A also sends to itself through its NIC.
    Loopback,
}

impl Direction {
    /// All three.
    pub const ALL: [Direction; 3] = [
        Direction::Unidirectional,
        Direction::Bidirectional,
        Direction::Loopback,
    ];

    fn name(self) -> &'static str {
        match self {
            Direction::Unidirectional => "unidirectional",
            Direction::Bidirectional => "bidirectional",
            Direction::Loopback => "loopback",
        }
    }
}

/// Where an end's buffers lie: `dram0` is the memory of NUMA node 0, `gpu1` that of the second GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Memory {
    /// The memory of a NUMA node.
    Dram(u8),
    /// The memory of a GPU.
    Gpu(u8),
}

/// A name that is not a value of its category.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} '{given}' is unknown: {expected}")]
pub struct UnknownName {
    what: &'static str,
    given: String,
    expected: String,
}

fn by_name<T: Copy + fmt::Display>(
    what: &'static str,
    given: &str,
    all: &[T],
) -> Result<T, UnknownName> {
    all.iter()
        .copied()
        .find(|value| value.to_string() == given)
        .ok_or_else(|| UnknownName {
            what,
            given: given.to_owned(),
            expected: format!(
                "give one of {}",
                all.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
            ),
        })
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Operation {
    type Err = UnknownName;
    fn from_str(given: &str) -> Result<Self, UnknownName> {
        by_name("operation", given, &Operation::ALL)
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Direction {
    type Err = UnknownName;
    fn from_str(given: &str) -> Result<Self, UnknownName> {
        by_name("direction", given, &Direction::ALL)
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Memory::Dram(node) => write!(f, "dram{node}"),
            Memory::Gpu(index) => write!(f, "gpu{index}"),
        }
    }
}

impl FromStr for Memory {
    type Err = UnknownName;
    fn from_str(given: &str) -> Result<Self, UnknownName> {
        let parse = |prefix: &str| {
            given
                .strip_prefix(prefix)
                .and_then(|index| index.parse().ok())
        };
        parse("dram")
            .map(Memory::Dram)
            .or_else(|| parse("gpu").map(Memory::Gpu))
            .ok_or_else(|| UnknownName {
                what: "memory",
                given: given.to_owned(),
                expected: "give dramN for NUMA node N or gpuN for GPU N".to_owned(),
            })
    }
}

impl Serialize for Memory {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Memory {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// A workload: a point of the search space.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Point {
    /// Transport and verb.
    pub operation: Operation,
    /// Which way data flows.
    pub direction: Direction,
    /// Path MTU, bytes.
    pub mtu: u32,
    /// Where the buffers of host A lie: the one that receives in unidirectional traffic.
    pub memory_a: Memory,
    /// Where the buffers of host B lie.
    pub memory_b: Memory,
    /// Queue pairs in each direction.
    pub qps: u32,
    /// Memory regions registered for each queue pair.
    pub regions: u32,
    /// Length of a region, bytes.
    pub region_bytes: u32,
    /// Work requests posted with one doorbell.
    pub batch: u32,
    /// Work requests a send queue holds.
    pub send_depth: u32,
    /// Work requests a receive queue holds; without effect where the operation consumes no receives.
    pub receive_depth: u32,
    /// Scatter/gather elements of a work request; a message is split evenly between them.
    pub sges: u32,
    /// Sizes of consecutive messages, bytes, repeated for ever.
    pub messages: Vec<u32>,
}

impl Point {
    /// The smallest message, bytes.
    pub fn smallest(&self) -> u32 {
        self.messages.iter().copied().min().unwrap_or(0)
    }

    /// The largest message, bytes.
    pub fn largest(&self) -> u32 {
        self.messages.iter().copied().max().unwrap_or(0)
    }

    /// The mean message, bytes.
    pub fn mean_bytes(&self) -> f64 {
        self.messages
            .iter()
            .map(|&size| f64::from(size))
            .sum::<f64>()
            / self.messages.len().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back_and_strangers_are_told_what_exists() {
        for operation in Operation::ALL {
            assert_eq!(operation.to_string().parse(), Ok(operation));
        }
        for direction in Direction::ALL {
            assert_eq!(direction.to_string().parse(), Ok(direction));
        }
        assert_eq!("gpu3".parse(), Ok(Memory::Gpu(3)));
        assert_eq!("dram1".parse(), Ok(Memory::Dram(1)));
        let error = "rc-recv".parse::<Operation>().unwrap_err().to_string();
        assert!(
            error.contains("rc-recv") && error.contains("rc-send"),
            "{error}"
        );
        assert!("dram".parse::<Memory>().is_err());
    }
}

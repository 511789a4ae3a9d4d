//! What the coordinator of a search and the agent of the other host say to each other: questions and answers in JSON, each in a frame that begins with its length.
//!
//! ```text
//! | length of the rest, u32 big endian | JSON |
//! ```
//! The first question names the protocol's version; another version is refused with both numbers. Frames are bounded, a frame's memory is taken as its bytes arrive, and
//! what does not parse ends the connection. The socket's owner sets its deadlines.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::flow::{Side, Volume};
use crate::space::Point;

/// Both programs must agree on it.
pub(super) const VERSION: u32 = 1;
/// Keys and addresses of 200,000 regions for each of two flows take some 15 MB.
pub(super) const FRAME_MAX: u32 = 32 << 20;

/// What the coordinator asks of an end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Question {
    /// First: who are you?
    Open {
        version: u32,
        device: String,
        port: u8,
    },
    /// Make queue pairs and regions.
    Prepare(Task),
    /// Connect them to these halves of the flows, in the order of this end's own.
    Connect(Vec<HalfOffer>),
    /// Let traffic flow and take readings. It flows on until [`Question::Finish`].
    Run(Timing),
    /// Stop, and take everything down.
    Finish,
}

/// What an end answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Answer {
    /// To [`Question::Open`].
    Facts(Facts),
    /// To [`Question::Prepare`]: its halves.
    Offers(Vec<HalfOffer>),
    /// To [`Question::Run`].
    Readings(Vec<Reading>),
    /// To the others.
    Done,
    /// It could not be done, and why.
    Refused(String),
}

/// One host's part of a workload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Task {
    pub(super) point: Point,
    pub(super) side: Side,
    /// After so long the end stops by itself.
    pub(super) limit_ms: u64,
}

/// When readings are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// Traffic flows so long before the first reading, milliseconds.
    pub settle_ms: u64,
    /// From one reading to the next, milliseconds.
    pub sample_ms: u64,
    /// Samples: one less than readings.
    pub samples: u32,
}

impl Default for Timing {
    /// Two seconds to settle, then four samples of a second.
    fn default() -> Self {
        Timing {
            settle_ms: 2000,
            sample_ms: 1000,
            samples: 4,
        }
    }
}

impl Timing {
    /// Checks that readings are apart, and not too many.
    ///
    /// # Errors
    /// What is out of range.
    pub fn checked(self) -> Result<Self, &'static str> {
        if self.settle_ms > 600_000 {
            return Err("traffic settles for ten minutes at most");
        }
        if !(50..=60_000).contains(&self.sample_ms) {
            return Err("a sample takes 50 milliseconds to a minute");
        }
        if !(1..=600).contains(&self.samples) {
            return Err("there are 1 to 600 samples");
        }
        Ok(self)
    }

    /// All of it, milliseconds.
    pub(super) fn total_ms(&self) -> u64 {
        self.settle_ms
            .saturating_add(self.sample_ms.saturating_mul(self.samples.into()))
    }
}

/// What an end is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The device's name.
    pub device: String,
    /// Queue pairs at most.
    pub queue_pairs: u32,
    /// Requests in one queue at most.
    pub queue_depth: u32,
    /// Scatter/gather elements of a request at most.
    pub sges: u32,
    /// Regions at most.
    pub regions: u32,
    /// The largest packets that the port sends now, bytes.
    pub mtu: u32,
    /// NUMA nodes of the host.
    pub nodes: Vec<u8>,
    /// Diagnostic counters of port and interface.
    pub counters: Vec<String>,
}

/// One end of a flow, as the other needs it to connect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HalfOffer {
    pub(super) gid: [u8; 16],
    pub(super) lid: u16,
    /// Number of the first packet that this end sends.
    pub(super) psn: u32,
    /// READs under way that this end can ask for and serve.
    pub(super) reads: u8,
    /// Numbers of the queue pairs.
    pub(super) queue_pairs: Vec<u32>,
    /// Address and key of each queue pair's regions, where the other end needs them.
    pub(super) regions: Vec<Vec<(u64, u32)>>,
}

/// The state of an end at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Reading {
    /// By the end's own clock.
    pub(super) at_us: u64,
    /// What each half saw completed since traffic began.
    pub(super) volumes: Vec<Volume>,
    /// The counters of port and interface.
    pub(super) counters: BTreeMap<String, u64>,
}

/// Writes one message.
///
/// # Errors
/// The stream's own; `InvalidInput` for a message that is too long.
pub(super) fn write(stream: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let length = u32::try_from(text.len())
        .ok()
        .filter(|length| *length <= FRAME_MAX);
    let length = length.ok_or_else(|| {
        let what = format!("a message of {} bytes, over {FRAME_MAX}", text.len());
        io::Error::new(io::ErrorKind::InvalidInput, what)
    })?;
    stream.write_all(&length.to_be_bytes())?;
    stream.write_all(&text)?;
    stream.flush()
}

/// Reads one message; none where the stream ended before it began.
///
/// # Errors
/// The stream's own; `InvalidData` for a frame that is too long or is no message.
pub(super) fn read<T: DeserializeOwned>(stream: &mut impl Read) -> io::Result<Option<T>> {
    let mut length = Vec::new();
    stream.take(4).read_to_end(&mut length)?;
    let length = match <[u8; 4]>::try_from(length.as_slice()) {
        Ok(length) => u32::from_be_bytes(length),
        Err(_) if length.is_empty() => return Ok(None),
        Err(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
    };
    let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    if length > FRAME_MAX {
        return Err(wrong(format!(
            "a frame of {length} bytes, over {FRAME_MAX}: is this a vet agent?"
        )));
    }
    let mut text = Vec::new();
    stream.take(length.into()).read_to_end(&mut text)?;
    if text.len() < length as usize {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|error| wrong(format!("a frame that is no message: {error}")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_come_back_and_an_end_between_them_is_no_error() {
        let offer = HalfOffer {
            gid: [7; 16],
            lid: 3,
            psn: 0xff_ffff,
            reads: 16,
            queue_pairs: vec![17, 18],
            regions: vec![vec![(u64::MAX, u32::MAX)], vec![]],
        };
        let questions = [Question::Connect(vec![offer]), Question::Finish];
        let mut bytes = Vec::new();
        for question in &questions {
            write(&mut bytes, question).unwrap();
        }
        let mut stream = bytes.as_slice();
        for question in questions {
            assert_eq!(read::<Question>(&mut stream).unwrap(), Some(question));
        }
        assert_eq!(read::<Question>(&mut stream).unwrap(), None);
        let cut = &bytes[..bytes.len() - 1];
        let mut stream = cut;
        assert!(read::<Question>(&mut stream).unwrap().is_some());
        assert!(read::<Question>(&mut stream).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_an_error_and_never_much_memory(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut stream = bytes.as_slice();
            while let Ok(Some(_)) = read::<Question>(&mut stream) {}
            let mut framed = (bytes.len() as u32).to_be_bytes().to_vec();
            framed.extend(&bytes);
            prop_assert!(read::<Answer>(&mut framed.as_slice()).is_err());
        }

        #[test]
        fn a_length_over_the_limit_is_refused_before_anything_is_read(length in FRAME_MAX + 1..) {
            let bytes = length.to_be_bytes();
            let error = read::<Question>(&mut bytes.as_slice()).unwrap_err();
            prop_assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }
}

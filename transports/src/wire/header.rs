//! The 64 bytes every frame begins with.

use std::time::Duration;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::FrameError;
use crate::{Element, Epoch, Layer, MicroBatch, Step, StepKey};

/// Size of the header in bytes: one cache line.
pub const HEADER_BYTES: usize = 64;

/// The first four bytes of every frame.
pub const MAGIC: [u8; 4] = *b"VLLY";

/// Version of the format. Workers of one deployment run one version.
pub const VERSION: u16 = 1;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// Rows to experts.
    Dispatch = 1,
    /// Experts' outputs back.
    Combine = 2,
}

/// What became of a dispatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// Computed; the outputs are in the frame.
    Ok = 0,
    /// Its epoch was over; nothing was computed. Dispatch again under the new placement.
    Stale = 1,
    /// The frame was malformed or contradicted another participant's; nothing was computed.
    Rejected = 2,
    /// The expert worker could not compute.
    Failed = 3,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Stale => "stale epoch",
            Self::Rejected => "rejected",
            Self::Failed => "failed",
        })
    }
}

/// Times an expert worker spent on one exchange. Zero in a dispatch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// From the first participant's arrival until all had arrived and the experts fired, in nanoseconds.
    pub queued_ns: u64,
    /// Computation, in nanoseconds.
    pub compute_ns: u64,
}

impl Times {
    /// Both together.
    pub const fn total(&self) -> Duration {
        Duration::from_nanos(self.queued_ns.saturating_add(self.compute_ns))
    }
}

/// A header whose fields have meaning; counts are not yet checked against limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Dispatch or combine.
    pub kind: FrameKind,
    /// Element type of the rows.
    pub element: Element,
    /// The exchange this frame belongs to.
    pub key: StepKey,
    /// Index of the sender among the workers of its role.
    pub sender: u16,
    /// Number of words of the participants' bitmap; zero in a combine.
    pub participant_words: u16,
    /// Number of rows of the dispatch; a combine repeats it.
    pub rows: u32,
    /// Length of a row in elements.
    pub hidden: u32,
    /// Number of (row, expert) pairs.
    pub assignments: u32,
    /// What became of the dispatch; `Ok` in a dispatch.
    pub status: Status,
    /// Times at the expert worker; zero in a dispatch.
    pub times: Times,
}

impl Header {
    /// Reads the header at the start of `frame`.
    ///
    /// # Errors
    /// The frame is too short, of another protocol or version, or a field means nothing.
    pub fn parse(frame: &[u8]) -> Result<Self, FrameError> {
        let (raw, _) = Raw::ref_from_prefix(frame).map_err(|_| FrameError::Length {
            have: frame.len(),
            need: HEADER_BYTES,
        })?;
        if raw.magic != MAGIC {
            return Err(FrameError::Magic { found: raw.magic });
        }
        if raw.version.get() != VERSION {
            return Err(FrameError::Version {
                found: raw.version.get(),
            });
        }
        if let Some(at) = raw.reserved.iter().position(|&byte| byte != 0) {
            return Err(FrameError::Padding {
                at: HEADER_BYTES - raw.reserved.len() + at,
            });
        }
        let unknown = |what, found: u8| FrameError::Unknown {
            what,
            found: found.into(),
        };
        Ok(Self {
            kind: match raw.kind {
                1 => FrameKind::Dispatch,
                2 => FrameKind::Combine,
                found => return Err(unknown("the frame's kind", found)),
            },
            element: match raw.element {
                1 => Element::F32,
                2 => Element::Bf16,
                found => return Err(unknown("the element type", found)),
            },
            key: StepKey {
                epoch: Epoch(raw.epoch.get()),
                step: Step(raw.step.get()),
                layer: Layer(raw.layer.get()),
                micro_batch: MicroBatch(raw.micro_batch),
            },
            sender: raw.sender.get(),
            participant_words: raw.participant_words.get(),
            rows: raw.rows.get(),
            hidden: raw.hidden.get(),
            assignments: raw.assignments.get(),
            status: match raw.status {
                0 => Status::Ok,
                1 => Status::Stale,
                2 => Status::Rejected,
                3 => Status::Failed,
                found => return Err(unknown("the status", found)),
            },
            times: Times {
                queued_ns: raw.queued_ns.get(),
                compute_ns: raw.compute_ns.get(),
            },
        })
    }

    /// Writes the header to the start of `slot`.
    ///
    /// # Errors
    /// The slot is shorter than a header.
    pub fn write(&self, slot: &mut [u8]) -> Result<(), FrameError> {
        let raw = Raw {
            magic: MAGIC,
            version: VERSION.into(),
            kind: self.kind as u8,
            element: match self.element {
                Element::F32 => 1,
                Element::Bf16 => 2,
            },
            epoch: self.key.epoch.0.into(),
            layer: self.key.layer.0.into(),
            micro_batch: self.key.micro_batch.0,
            status: self.status as u8,
            step: self.key.step.0.into(),
            sender: self.sender.into(),
            participant_words: self.participant_words.into(),
            rows: self.rows.into(),
            hidden: self.hidden.into(),
            assignments: self.assignments.into(),
            queued_ns: self.times.queued_ns.into(),
            compute_ns: self.times.compute_ns.into(),
            reserved: [0; 8],
        };
        raw.write_to_prefix(slot).map_err(|_| FrameError::Length {
            have: slot.len(),
            need: HEADER_BYTES,
        })
    }
}

/// The header byte for byte. Its fields are unaligned little-endian numbers, so the layout is the same everywhere.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 4],
    version: U16,
    kind: u8,
    element: u8,
    epoch: U32,
    layer: U16,
    micro_batch: u8,
    status: u8,
    step: U64,
    sender: U16,
    participant_words: U16,
    rows: U32,
    hidden: U32,
    assignments: U32,
    queued_ns: U64,
    compute_ns: U64,
    reserved: [u8; 8],
}

const _: () = assert!(size_of::<Raw>() == HEADER_BYTES);

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn any_key() -> impl Strategy<Value = StepKey> {
        (any::<u32>(), any::<u64>(), any::<u16>(), any::<u8>()).prop_map(
            |(epoch, step, layer, micro_batch)| StepKey {
                epoch: Epoch(epoch),
                step: Step(step),
                layer: Layer(layer),
                micro_batch: MicroBatch(micro_batch),
            },
        )
    }

    pub(crate) fn any_element() -> impl Strategy<Value = Element> {
        prop_oneof![Just(Element::F32), Just(Element::Bf16)]
    }

    fn any_header() -> impl Strategy<Value = Header> {
        let kind = prop_oneof![Just(FrameKind::Dispatch), Just(FrameKind::Combine)];
        let status = prop_oneof![
            Just(Status::Ok),
            Just(Status::Stale),
            Just(Status::Rejected),
            Just(Status::Failed)
        ];
        let counts = (
            any::<u16>(),
            any::<u16>(),
            any::<u32>(),
            any::<u32>(),
            any::<u32>(),
        );
        let times = (any::<u64>(), any::<u64>());
        (kind, any_element(), any_key(), counts, status, times).prop_map(
            |(
                kind,
                element,
                key,
                (sender, participant_words, rows, hidden, assignments),
                status,
                times,
            )| Header {
                kind,
                element,
                key,
                sender,
                participant_words,
                rows,
                hidden,
                assignments,
                status,
                times: Times {
                    queued_ns: times.0,
                    compute_ns: times.1,
                },
            },
        )
    }

    proptest! {
        #[test]
        fn a_header_reads_back_as_written(header in any_header()) {
            let mut bytes = [0xff; HEADER_BYTES];
            header.write(&mut bytes).unwrap();
            prop_assert_eq!(Header::parse(&bytes), Ok(header));
        }
    }

    /// The bytes of one header, so that the format cannot change unnoticed.
    #[test]
    fn the_format_is_fixed() {
        let header = Header {
            kind: FrameKind::Combine,
            element: Element::Bf16,
            key: StepKey {
                epoch: Epoch(0x0403_0201),
                step: Step(5),
                layer: Layer(6),
                micro_batch: MicroBatch(7),
            },
            sender: 8,
            participant_words: 9,
            rows: 10,
            hidden: 11,
            assignments: 12,
            status: Status::Failed,
            times: Times {
                queued_ns: 13,
                compute_ns: 14,
            },
        };
        let mut bytes = [0; HEADER_BYTES];
        header.write(&mut bytes).unwrap();
        #[rustfmt::skip]
        let expected = [
            b'V', b'L', b'L', b'Y', 1, 0, 2, 2,  1, 2, 3, 4, 6, 0, 7, 3,
            5, 0, 0, 0, 0, 0, 0, 0,  8, 0, 9, 0, 10, 0, 0, 0,
            11, 0, 0, 0, 12, 0, 0, 0,  13, 0, 0, 0, 0, 0, 0, 0,
            14, 0, 0, 0, 0, 0, 0, 0,  0, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_foreign_or_short_frame_is_named() {
        assert_eq!(
            Header::parse(&[0; 63]),
            Err(FrameError::Length { have: 63, need: 64 })
        );
        assert_eq!(
            Header::parse(
                b"GET / HTTP/1.1\r\nHost: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
            ),
            Err(FrameError::Magic { found: *b"GET " })
        );
    }
}

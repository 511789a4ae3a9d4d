//! Why bytes are not a frame that can be used.

use super::header::{MAGIC, VERSION};

/// What is wrong with a frame: which field, where, and against which limit. The caller adds the peer's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The frame is not as long as its header says, or too short for a header.
    #[error("the frame has {have} bytes where its header needs {need}")]
    Length {
        /// Bytes there are.
        have: usize,
        /// Bytes that the header, or the counts in it, call for.
        need: usize,
    },
    /// The first four bytes are not Volley's.
    #[error(
        "the frame starts with {found:02x?}, not {MAGIC:02x?}: the peer does not speak Volley's data protocol"
    )]
    Magic {
        /// The bytes there are.
        found: [u8; 4],
    },
    /// The peer runs another version of the format.
    #[error(
        "the frame has format version {found}, this program speaks {VERSION}: run one release on all workers"
    )]
    Version {
        /// The peer's version.
        found: u16,
    },
    /// A field has a value that means nothing.
    #[error("{what} is {found}, which means nothing")]
    Unknown {
        /// The field.
        what: &'static str,
        /// Its value.
        found: u64,
    },
    /// A field has another value than the one that must stand there.
    #[error("{what} is {found}, expected {expected}")]
    Mismatch {
        /// The field.
        what: &'static str,
        /// Its value.
        found: u64,
        /// The value that must stand there.
        expected: u64,
    },
    /// A field is over its limit.
    #[error("{what} is {found}, the limit is {limit}")]
    OverLimit {
        /// The field.
        what: &'static str,
        /// Its value.
        found: u64,
        /// The largest allowed value.
        limit: u64,
    },
    /// An entry of the assignment arrays is wrong.
    #[error("assignment {index}: {what} is {found}, the limit is {limit}")]
    Assignment {
        /// Position in the arrays.
        index: u32,
        /// The array.
        what: &'static str,
        /// Its value.
        found: u32,
        /// The largest allowed value there.
        limit: u32,
    },
    /// Rows after this one have no assignment, so they should not have travelled.
    #[error("the assignments end at row {used} of {rows}: every row that travels has at least one")]
    UnusedRows {
        /// Rows with an assignment.
        used: u32,
        /// Rows in the frame.
        rows: u32,
    },
    /// The participants name a worker that does not exist, or leave out the sender.
    #[error("the participants {what}")]
    Participants {
        /// What is wrong with them.
        what: &'static str,
    },
    /// A padding byte is not zero.
    #[error("padding byte {at} is not zero")]
    Padding {
        /// Offset in the frame.
        at: usize,
    },
    /// The buffer does not start on a 64-byte boundary, so rows cannot be used in place.
    #[error("the buffer does not start on a 64-byte boundary: slots must")]
    Misaligned,
}

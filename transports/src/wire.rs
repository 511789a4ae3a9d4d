//! Frames as they travel: a fixed little-endian header, then sections that are used where they lie.
//!
//! Bytes that arrive are not trusted: every length, count, id and padding byte is checked before use, nothing is
//! allocated, and nothing panics. What is checked against what a worker expects (its hidden size, its limits) is
//! named in [`DispatchLimits`] and [`CombineLimits`].
//!
//! A **dispatch** is header, participants (`u64` words), padding to 64 bytes, rows `[rows, hidden]`, padding to 4
//! bytes, then three parallel arrays over its assignments: `row: u32`, `weight: f32`, `expert: u16`. Assignments are
//! sorted by row, within a row by top-k rank, and every row has at least one. A **combine** is header, then
//! `[assignments, hidden]`, in the order of the dispatch's assignments and unsummed.

mod combine;
mod dispatch;
mod error;
mod header;
mod layout;

pub use combine::{CombineFrame, CombineHead, CombineLimits, CombineMut, write_status};
pub use dispatch::{DispatchFrame, DispatchHead, DispatchLimits, DispatchMut};
pub use error::FrameError;
pub use header::{FrameKind, HEADER_BYTES, Header, MAGIC, Status, Times, VERSION};
pub use layout::{CombineLayout, DispatchLayout, LayoutError};

#[cfg(target_endian = "big")]
compile_error!(
    "frames are little-endian and their rows are used in place: big-endian machines are not supported"
);

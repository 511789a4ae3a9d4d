//! The combine frame: experts' outputs on their way back.

use super::dispatch::{at_most, below, expect, length_error, rows, rows_mut};
use super::{CombineLayout, FrameError, FrameKind, Header, Status, Times};
use crate::{Element, Rows, RowsMut, StepKey};

/// What an attention worker accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CombineLimits {
    /// Number of expert workers: senders are below it.
    pub expert_workers: u16,
    /// Most rows in one dispatch.
    pub max_rows: u32,
    /// Length of a row in elements, exactly.
    pub hidden: u32,
    /// Most experts of one row.
    pub top_k: u16,
}

/// A combine that was checked, used where it lies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CombineFrame<'a> {
    /// Its header. With any status but `Ok` there are no outputs.
    pub header: Header,
    /// Outputs, `[assignments, hidden]`, in the order of the dispatch's assignments.
    pub rows: Rows<'a>,
}

impl<'a> CombineFrame<'a> {
    /// Checks `frame`, whatever its bytes.
    ///
    /// # Errors
    /// Names the first thing that is wrong. A frame that passes can be used without any further check.
    pub fn parse(frame: &'a [u8], limits: &CombineLimits) -> Result<Self, FrameError> {
        let header = Header::parse(frame)?;
        check_header(&header, limits)?;
        let layout = CombineLayout::for_counts(header.assignments, header.hidden, header.element)
            .filter(|layout| layout.bytes() == frame.len())
            .ok_or_else(|| length_error(&header, frame.len()))?;
        Ok(Self {
            header,
            rows: rows(&frame[layout.rows()], header.element)?,
        })
    }
}

/// What a combine says about itself before its outputs are filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CombineHead {
    /// The exchange it belongs to.
    pub key: StepKey,
    /// Index of the expert worker that sends.
    pub sender: u16,
    /// Element type of the outputs.
    pub element: Element,
    /// Length of a row in elements.
    pub hidden: u32,
    /// Number of rows of the dispatch.
    pub rows: u32,
    /// Number of assignments of the dispatch.
    pub assignments: u32,
    /// Times at the expert worker.
    pub times: Times,
}

impl CombineHead {
    fn header(self, status: Status) -> Header {
        Header {
            kind: FrameKind::Combine,
            element: self.element,
            key: self.key,
            sender: self.sender,
            participant_words: 0,
            rows: self.rows,
            hidden: self.hidden,
            assignments: self.assignments,
            status,
            times: self.times,
        }
    }
}

/// A combine being built in its slot: the header is written, the outputs are to be filled.
#[derive(Debug)]
pub struct CombineMut<'a> {
    /// Outputs, `[assignments, hidden]`.
    pub rows: RowsMut<'a>,
    /// Length of the frame, to be posted.
    pub len: usize,
}

impl<'a> CombineMut<'a> {
    /// Lays a frame with status `Ok` out in `slot`.
    ///
    /// # Errors
    /// The slot is too small or not aligned.
    pub fn lay_out(slot: &'a mut [u8], head: CombineHead) -> Result<Self, FrameError> {
        let have = slot.len();
        let layout = CombineLayout::for_counts(head.assignments, head.hidden, head.element).ok_or(
            FrameError::Length {
                have,
                need: usize::MAX,
            },
        )?;
        let len = layout.bytes();
        let slot = slot
            .get_mut(..len)
            .ok_or(FrameError::Length { have, need: len })?;
        head.header(Status::Ok).write(slot)?;
        Ok(Self {
            rows: rows_mut(&mut slot[layout.rows()], head.element)?,
            len,
        })
    }
}

/// Writes a combine without outputs that says why there are none; returns its length.
///
/// # Errors
/// The slot is shorter than a header.
pub fn write_status(
    slot: &mut [u8],
    head: CombineHead,
    status: Status,
) -> Result<usize, FrameError> {
    CombineHead {
        rows: 0,
        assignments: 0,
        ..head
    }
    .header(status)
    .write(slot)?;
    Ok(super::HEADER_BYTES)
}

fn check_header(header: &Header, limits: &CombineLimits) -> Result<(), FrameError> {
    expect(
        "the frame's kind (1 dispatch, 2 combine)",
        header.kind as u64,
        FrameKind::Combine as u64,
    )?;
    expect(
        "the number of participant words of a combine",
        header.participant_words.into(),
        0,
    )?;
    expect(
        "the length of a row",
        header.hidden.into(),
        limits.hidden.into(),
    )?;
    below(
        "the sender",
        header.sender.into(),
        limits.expert_workers.into(),
    )?;
    if header.status != Status::Ok {
        expect("the number of rows of a refusal", header.rows.into(), 0)?;
        return expect(
            "the number of assignments of a refusal",
            header.assignments.into(),
            0,
        );
    }
    at_most(
        "the number of rows",
        header.rows.into(),
        limits.max_rows.into(),
    )?;
    let most = u64::from(header.rows) * u64::from(limits.top_k);
    at_most("the number of assignments", header.assignments.into(), most)
}

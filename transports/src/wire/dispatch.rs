//! The dispatch frame: rows on their way to experts.

use zerocopy::{FromBytes, IntoBytes};

use super::{DispatchLayout, FrameError, FrameKind, Header, Status, Times};
use crate::participants::{bit, bits};
use crate::slot::SLOT_ALIGN;
use crate::{Element, Participants, Rows, RowsMut, StepKey};

/// What an expert worker accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DispatchLimits {
    /// Number of attention workers: senders and participants are below it.
    pub attention_workers: u16,
    /// Most rows in one frame.
    pub max_rows: u32,
    /// Length of a row in elements, exactly.
    pub hidden: u32,
    /// Most experts of one row.
    pub top_k: u16,
    /// Number of experts at this worker: local indices are below it.
    pub local_experts: u16,
}

/// A dispatch that was checked, used where it lies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DispatchFrame<'a> {
    /// Its header.
    pub header: Header,
    /// Bitmap of the attention workers that take part; the sender is one of them.
    pub participants: &'a [u64],
    /// Rows, `[rows, hidden]`.
    pub rows: Rows<'a>,
    /// Row of each assignment, `[assignments]`, ascending; every row has at least one.
    pub row: &'a [u32],
    /// Local expert of each assignment, `[assignments]`.
    pub expert: &'a [u16],
    /// Gate's weight of each assignment, `[assignments]`. Any bits: a NaN spoils its own row only.
    pub weight: &'a [f32],
}

impl<'a> DispatchFrame<'a> {
    /// Checks `frame`, whatever its bytes.
    ///
    /// # Errors
    /// Names the first thing that is wrong. A frame that passes can be used without any further check.
    pub fn parse(frame: &'a [u8], limits: &DispatchLimits) -> Result<Self, FrameError> {
        let header = Header::parse(frame)?;
        check_header(&header, limits)?;
        let words = usize::from(header.participant_words);
        let layout = DispatchLayout::for_counts(
            words,
            header.rows,
            header.hidden,
            header.assignments,
            header.element,
        )
        .filter(|layout| layout.bytes() == frame.len());
        let layout = layout.ok_or_else(|| length_error(&header, frame.len()))?;
        zeros(frame, layout.participants().end, layout.rows().start)?;
        zeros(frame, layout.rows().end, layout.row().start)?;
        let parsed = Self {
            header,
            participants: view(&frame[layout.participants()])?,
            rows: rows(&frame[layout.rows()], header.element)?,
            row: view(&frame[layout.row()])?,
            expert: view(&frame[layout.expert()])?,
            weight: view(&frame[layout.weight()])?,
        };
        check_participants(parsed.participants, header.sender, limits.attention_workers)?;
        check_assignments(parsed.row, parsed.expert, header.rows, limits)?;
        Ok(parsed)
    }
}

/// What a dispatch says about itself before its sections are filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DispatchHead {
    /// The exchange it belongs to.
    pub key: StepKey,
    /// Index of the attention worker that sends.
    pub sender: u16,
    /// Element type of the rows.
    pub element: Element,
    /// Length of a row in elements.
    pub hidden: u32,
    /// Number of rows.
    pub rows: u32,
    /// Number of (row, expert) pairs.
    pub assignments: u32,
}

/// A dispatch being built in its slot: header, participants and padding are written, the sections are to be filled
/// as [`DispatchFrame`] describes them.
#[derive(Debug)]
pub struct DispatchMut<'a> {
    /// Rows, `[rows, hidden]`.
    pub rows: RowsMut<'a>,
    /// Row of each assignment.
    pub row: &'a mut [u32],
    /// Local expert of each assignment.
    pub expert: &'a mut [u16],
    /// Weight of each assignment.
    pub weight: &'a mut [f32],
    /// Length of the frame, to be posted.
    pub len: usize,
}

impl<'a> DispatchMut<'a> {
    /// Lays a frame out in `slot`.
    ///
    /// # Errors
    /// The slot is too small or not aligned.
    pub fn lay_out(
        slot: &'a mut [u8],
        head: DispatchHead,
        participants: &Participants,
    ) -> Result<Self, FrameError> {
        let words = participants.words();
        let header = Header {
            kind: FrameKind::Dispatch,
            element: head.element,
            key: head.key,
            sender: head.sender,
            // 65,535 workers take 1,024 words.
            participant_words: words.len() as u16,
            rows: head.rows,
            hidden: head.hidden,
            assignments: head.assignments,
            status: Status::Ok,
            times: Times::default(),
        };
        let have = slot.len();
        let layout = DispatchLayout::for_counts(
            words.len(),
            head.rows,
            head.hidden,
            head.assignments,
            head.element,
        )
        .ok_or(FrameError::Length {
            have,
            need: usize::MAX,
        })?;
        let len = layout.bytes();
        let slot = slot
            .get_mut(..len)
            .ok_or(FrameError::Length { have, need: len })?;
        header.write(slot)?;
        slot[layout.participants()].copy_from_slice(words.as_bytes());
        slot[layout.participants().end..layout.rows().start].fill(0);
        slot[layout.rows().end..layout.row().start].fill(0);

        let (_, rest) = slot.split_at_mut(layout.rows().start);
        let (rows, rest) = rest.split_at_mut(layout.rows().len());
        let (_, rest) = rest.split_at_mut(layout.row().start - layout.rows().end);
        let (row, rest) = rest.split_at_mut(layout.row().len());
        let (weight, expert) = rest.split_at_mut(layout.weight().len());
        Ok(Self {
            rows: rows_mut(rows, head.element)?,
            row: view_mut(row)?,
            expert: view_mut(expert)?,
            weight: view_mut(weight)?,
            len,
        })
    }
}

fn check_header(header: &Header, limits: &DispatchLimits) -> Result<(), FrameError> {
    let words = Participants::words_for(limits.attention_workers) as u64;
    expect(
        "the frame's kind (1 dispatch, 2 combine)",
        header.kind as u64,
        FrameKind::Dispatch as u64,
    )?;
    expect("the status of a dispatch", header.status as u64, 0)?;
    expect("the queued time of a dispatch", header.times.queued_ns, 0)?;
    expect("the compute time of a dispatch", header.times.compute_ns, 0)?;
    expect(
        "the number of participant words",
        header.participant_words.into(),
        words,
    )?;
    expect(
        "the length of a row",
        header.hidden.into(),
        limits.hidden.into(),
    )?;
    below(
        "the sender",
        header.sender.into(),
        limits.attention_workers.into(),
    )?;
    at_most(
        "the number of rows",
        header.rows.into(),
        limits.max_rows.into(),
    )?;
    let most = u64::from(header.rows) * u64::from(limits.top_k);
    at_most("the number of assignments", header.assignments.into(), most)
}

fn check_participants(words: &[u64], sender: u16, workers: u16) -> Result<(), FrameError> {
    if bits(words).any(|worker| worker >= workers) {
        return Err(FrameError::Participants {
            what: "name an attention worker that does not exist",
        });
    }
    if !bit(words, sender) {
        return Err(FrameError::Participants {
            what: "leave out the sender",
        });
    }
    Ok(())
}

/// Rows must come as 0, 0, 1, 2, 2, ..: ascending without a gap, each at most `top_k` times.
fn check_assignments(
    row: &[u32],
    expert: &[u16],
    rows: u32,
    limits: &DispatchLimits,
) -> Result<(), FrameError> {
    let (mut used, mut run) = (0u32, 0u32);
    for (index, (&row, &expert)) in row.iter().zip(expert).enumerate() {
        let index = index as u32; // there are at most u32::MAX assignments
        if row == used && row < rows {
            (used, run) = (used + 1, 1);
        } else if row.checked_add(1) == Some(used) && run < u32::from(limits.top_k) {
            run += 1;
        } else {
            return Err(FrameError::Assignment {
                index,
                what: "the row",
                found: row,
                limit: used.min(rows - 1),
            });
        }
        if expert >= limits.local_experts {
            let limit = u32::from(limits.local_experts).saturating_sub(1);
            return Err(FrameError::Assignment {
                index,
                what: "the local expert",
                found: expert.into(),
                limit,
            });
        }
    }
    if used < rows {
        Err(FrameError::UnusedRows { used, rows })
    } else {
        Ok(())
    }
}

pub(super) fn length_error(header: &Header, have: usize) -> FrameError {
    let layout = match header.kind {
        FrameKind::Dispatch => DispatchLayout::for_counts(
            usize::from(header.participant_words),
            header.rows,
            header.hidden,
            header.assignments,
            header.element,
        )
        .map(|layout| layout.bytes()),
        FrameKind::Combine => {
            super::CombineLayout::for_counts(header.assignments, header.hidden, header.element)
                .map(|l| l.bytes())
        }
    };
    FrameError::Length {
        have,
        need: layout.unwrap_or(usize::MAX),
    }
}

pub(super) fn expect(what: &'static str, found: u64, expected: u64) -> Result<(), FrameError> {
    if found == expected {
        Ok(())
    } else {
        Err(FrameError::Mismatch {
            what,
            found,
            expected,
        })
    }
}

pub(super) fn at_most(what: &'static str, found: u64, limit: u64) -> Result<(), FrameError> {
    if found <= limit {
        Ok(())
    } else {
        Err(FrameError::OverLimit { what, found, limit })
    }
}

pub(super) fn below(what: &'static str, found: u64, end: u64) -> Result<(), FrameError> {
    if found < end {
        Ok(())
    } else {
        Err(FrameError::OverLimit {
            what,
            found,
            limit: end.saturating_sub(1),
        })
    }
}

fn zeros(frame: &[u8], start: usize, end: usize) -> Result<(), FrameError> {
    match frame[start..end].iter().position(|&byte| byte != 0) {
        Some(at) => Err(FrameError::Padding { at: start + at }),
        None => Ok(()),
    }
}

/// Lengths are right by layout, so what can fail is the alignment of the buffer.
fn view<T: FromBytes + zerocopy::Immutable>(bytes: &[u8]) -> Result<&[T], FrameError> {
    <[T]>::ref_from_bytes(bytes).map_err(|_| FrameError::Misaligned)
}

fn view_mut<T: FromBytes + IntoBytes>(bytes: &mut [u8]) -> Result<&mut [T], FrameError> {
    <[T]>::mut_from_bytes(bytes).map_err(|_| FrameError::Misaligned)
}

pub(super) fn rows(bytes: &[u8], element: Element) -> Result<Rows<'_>, FrameError> {
    aligned(bytes)?;
    Ok(match element {
        Element::F32 => Rows::F32(view(bytes)?),
        Element::Bf16 => Rows::Bf16(view(bytes)?),
    })
}

pub(super) fn rows_mut(bytes: &mut [u8], element: Element) -> Result<RowsMut<'_>, FrameError> {
    aligned(bytes)?;
    Ok(match element {
        Element::F32 => RowsMut::F32(view_mut(bytes)?),
        Element::Bf16 => RowsMut::Bf16(view_mut(bytes)?),
    })
}

fn aligned(bytes: &[u8]) -> Result<(), FrameError> {
    if bytes.as_ptr().addr().is_multiple_of(SLOT_ALIGN) {
        Ok(())
    } else {
        Err(FrameError::Misaligned)
    }
}

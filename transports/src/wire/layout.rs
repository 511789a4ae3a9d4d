//! Where the sections of a frame stand, and how large a slot must be: all arithmetic checked.

use std::ops::Range;

use super::HEADER_BYTES;
use crate::slot::SLOT_ALIGN;
use crate::{Element, Participants};

/// Byte offsets of a dispatch's sections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DispatchLayout {
    participants: Range<usize>,
    rows: Range<usize>,
    row: Range<usize>,
    weight: Range<usize>,
    expert: Range<usize>,
}

impl DispatchLayout {
    /// The layout for given maxima, to size slots with: at most `max_rows` rows of `hidden` elements, each with at
    /// most `top_k` experts at one worker, from `attention_workers` workers.
    ///
    /// # Errors
    /// The frame would not fit the address space or its 32-bit counts.
    pub fn for_maxima(
        max_rows: u32,
        hidden: u32,
        top_k: u16,
        element: Element,
        attention_workers: u16,
    ) -> Result<Self, LayoutError> {
        let too_large = LayoutError {
            rows: max_rows,
            hidden,
            top_k,
        };
        let assignments = max_rows.checked_mul(top_k.into()).ok_or(too_large)?;
        let words = Participants::words_for(attention_workers);
        Self::for_counts(words, max_rows, hidden, assignments, element).ok_or(too_large)
    }

    /// The layout of one frame; none if it does not fit the address space.
    pub(crate) fn for_counts(
        words: usize,
        rows: u32,
        hidden: u32,
        assignments: u32,
        element: Element,
    ) -> Option<Self> {
        let assignments = usize::try_from(assignments).ok()?;
        let participants = section(HEADER_BYTES, 8, words.checked_mul(8)?)?;
        let rows = section(participants.end, SLOT_ALIGN, matrix(rows, hidden, element)?)?;
        let row = section(rows.end, 4, assignments.checked_mul(4)?)?;
        let weight = section(row.end, 4, assignments.checked_mul(4)?)?;
        let expert = section(weight.end, 2, assignments.checked_mul(2)?)?;
        isize::try_from(expert.end).ok()?;
        Some(Self {
            participants,
            rows,
            row,
            weight,
            expert,
        })
    }

    /// Length of the frame in bytes; for maxima, the capacity that a slot needs.
    pub const fn bytes(&self) -> usize {
        self.expert.end
    }

    /// Bytes of the participants' bitmap, `u64` words.
    pub fn participants(&self) -> Range<usize> {
        self.participants.clone()
    }

    /// Bytes of the rows, `[rows, hidden]`, on a 64-byte boundary.
    pub fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// Bytes of the assignments' rows, `u32`.
    pub fn row(&self) -> Range<usize> {
        self.row.clone()
    }

    /// Bytes of the assignments' weights, `f32`.
    pub fn weight(&self) -> Range<usize> {
        self.weight.clone()
    }

    /// Bytes of the assignments' local experts, `u16`.
    pub fn expert(&self) -> Range<usize> {
        self.expert.clone()
    }
}

/// Byte offsets of a combine's section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CombineLayout {
    rows: Range<usize>,
}

impl CombineLayout {
    /// The layout for given maxima, to size slots with: outputs of `hidden` elements for at most `max_rows` rows, each
    /// with at most `top_k` experts at one worker.
    ///
    /// # Errors
    /// The frame would not fit the address space or its 32-bit counts.
    pub fn for_maxima(
        max_rows: u32,
        hidden: u32,
        top_k: u16,
        element: Element,
    ) -> Result<Self, LayoutError> {
        let too_large = LayoutError {
            rows: max_rows,
            hidden,
            top_k,
        };
        let assignments = max_rows.checked_mul(top_k.into()).ok_or(too_large)?;
        Self::for_counts(assignments, hidden, element).ok_or(too_large)
    }

    /// The layout of one frame; none if it does not fit the address space.
    pub(crate) fn for_counts(assignments: u32, hidden: u32, element: Element) -> Option<Self> {
        let rows = section(
            HEADER_BYTES,
            SLOT_ALIGN,
            matrix(assignments, hidden, element)?,
        )?;
        isize::try_from(rows.end).ok()?;
        Some(Self { rows })
    }

    /// Length of the frame in bytes; for maxima, the capacity that a slot needs.
    pub const fn bytes(&self) -> usize {
        self.rows.end
    }

    /// Bytes of the outputs, `[assignments, hidden]`, on a 64-byte boundary.
    pub fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }
}

/// A frame for these maxima cannot be addressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a frame for {rows} rows of {hidden} elements with {top_k} experts each cannot be addressed: lower the rows per micro-batch"
)]
pub struct LayoutError {
    /// Most rows.
    pub rows: u32,
    /// Elements of a row.
    pub hidden: u32,
    /// Most experts of a row at one worker.
    pub top_k: u16,
}

fn section(after: usize, align: usize, bytes: usize) -> Option<Range<usize>> {
    let start = after.checked_next_multiple_of(align)?;
    Some(start..start.checked_add(bytes)?)
}

fn matrix(rows: u32, hidden: u32, element: Element) -> Option<usize> {
    let rows = usize::try_from(rows).ok()?;
    rows.checked_mul(usize::try_from(hidden).ok()?)?
        .checked_mul(element.bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_stand_where_the_specification_says() {
        let layout = DispatchLayout::for_maxima(3, 5, 2, Element::Bf16, 65).unwrap();
        assert_eq!(layout.participants(), 64..80);
        assert_eq!(layout.rows(), 128..158);
        assert_eq!(layout.row(), 160..184);
        assert_eq!(layout.weight(), 184..208);
        assert_eq!(layout.expert(), 208..220);
        assert_eq!(layout.bytes(), 220);
        assert_eq!(
            CombineLayout::for_maxima(3, 5, 2, Element::F32)
                .unwrap()
                .bytes(),
            64 + 6 * 5 * 4
        );
    }

    #[test]
    fn what_cannot_be_addressed_is_an_error() {
        assert!(DispatchLayout::for_maxima(u32::MAX, u32::MAX, 1, Element::F32, 1).is_err());
        assert!(DispatchLayout::for_maxima(u32::MAX, 1, 2, Element::F32, 1).is_err());
        assert!(CombineLayout::for_maxima(u32::MAX, u32::MAX, 1, Element::Bf16).is_err());
    }
}

//! Rows of numbers as frames carry them: f32, or bf16 as its bits.
//!
//! bf16 to f32 is exact; f32 to bf16 rounds to nearest, ties to even. Both act on each number alone, so a row's
//! value never depends on the rows around it.

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

/// Element type of the rows of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// IEEE 754 binary32.
    F32,
    /// bfloat16: the upper half of an f32.
    Bf16,
}

impl Element {
    /// Size of one element in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// Rows to read, `[rows, hidden]`, row-major.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rows<'a> {
    /// f32 values.
    F32(&'a [f32]),
    /// Bits of bf16 values.
    Bf16(&'a [u16]),
}

impl<'a> Rows<'a> {
    /// Type of the elements.
    pub const fn element(&self) -> Element {
        match self {
            Self::F32(_) => Element::F32,
            Self::Bf16(_) => Element::Bf16,
        }
    }

    /// Number of elements.
    pub const fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(bits) => bits.len(),
        }
    }

    /// Whether there are no elements.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Row `index` of rows of `hidden` elements.
    ///
    /// # Panics
    /// There is no such row.
    pub fn row(&self, index: usize, hidden: usize) -> Rows<'a> {
        let range = index * hidden..(index + 1) * hidden;
        match self {
            Self::F32(values) => Rows::F32(&values[range]),
            Self::Bf16(bits) => Rows::Bf16(&bits[range]),
        }
    }
}

/// Rows to write, `[rows, hidden]`, row-major.
#[derive(Debug, PartialEq)]
pub enum RowsMut<'a> {
    /// f32 values.
    F32(&'a mut [f32]),
    /// Bits of bf16 values.
    Bf16(&'a mut [u16]),
}

impl RowsMut<'_> {
    /// Number of elements.
    pub const fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(bits) => bits.len(),
        }
    }

    /// Whether there are no elements.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes `row` to row `index`, converting if the element types differ. Rows have `row.len()` elements.
    ///
    /// # Panics
    /// There is no such row.
    pub fn set_row(&mut self, index: usize, row: Rows<'_>) {
        let range = index * row.len()..(index + 1) * row.len();
        match (self, row) {
            (Self::F32(to), Rows::F32(from)) => to[range].copy_from_slice(from),
            (Self::Bf16(to), Rows::Bf16(from)) => to[range].copy_from_slice(from),
            (Self::F32(to), Rows::Bf16(from)) => {
                from.reinterpret_cast::<half::bf16>()
                    .convert_to_f32_slice(&mut to[range]);
            }
            (Self::Bf16(to), Rows::F32(from)) => {
                to[range]
                    .reinterpret_cast_mut::<half::bf16>()
                    .convert_from_f32_slice(from);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_is_exact_and_narrowing_rounds_to_even() {
        let mut bits = [0u16; 4];
        RowsMut::Bf16(&mut bits).set_row(1, Rows::F32(&[1.0, f32::from_bits(0x3f80_8000)]));
        assert_eq!(bits, [0, 0, 0x3f80, 0x3f80]);
        RowsMut::Bf16(&mut bits).set_row(0, Rows::F32(&[f32::from_bits(0x3f81_8000), -2.0]));
        assert_eq!(bits, [0x3f82, 0xc000, 0x3f80, 0x3f80]);
        let mut wide = [0f32; 2];
        RowsMut::F32(&mut wide).set_row(0, Rows::Bf16(&bits).row(0, 2));
        assert_eq!(wide, [f32::from_bits(0x3f82_0000), -2.0]);
    }
}

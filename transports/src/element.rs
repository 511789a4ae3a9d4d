//! Rows of numbers as frames carry them: f32, or bf16 as its bits.
//!
//! bf16 to f32 is exact; f32 to bf16 rounds to nearest, ties to even. Both act on each number alone, so a row's
//! value never depends on the rows around it.

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
                to[range]
                    .iter_mut()
                    .zip(from)
                    .for_each(|(to, &bits)| *to = widen(bits));
            }
            (Self::Bf16(to), Rows::F32(from)) => {
                to[range]
                    .iter_mut()
                    .zip(from)
                    .for_each(|(to, &value)| *to = narrow(value));
            }
        }
    }
}

/// The f32 with these upper bits. Without a branch, so that loops over it are vectorised.
pub(crate) const fn widen(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// The nearest bf16, ties to even; a NaN stays one. Without a branch, so that loops over it are vectorised.
const fn narrow(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    (if value.is_nan() { quiet } else { rounded }) as u16
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

    #[test]
    fn widening_agrees_with_half_for_every_value() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (widen(bits), half::bf16::from_bits(bits).to_f32());
            assert!(
                ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(),
                "{bits:04x}"
            );
        }
    }

    #[test]
    fn narrowing_agrees_with_half_around_every_tie() {
        for upper in 0..=u16::MAX {
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(upper) << 16 | lower);
                assert_eq!(
                    narrow(value),
                    half::bf16::from_f32(value).to_bits(),
                    "{value:e} {upper:04x} {lower:04x}"
                );
            }
        }
    }
}

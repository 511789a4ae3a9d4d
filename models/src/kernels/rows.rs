//! Activations in the layout the products read: tiles of a few rows, interleaved.
//!
//! A tile of `h` rows is stored `[step][h]`, so a product walks it with one pointer, whatever the stride of the
//! rows was. With quantised weights a step is a group: first the scale of each row and what its sum of products starts from, then
//! its codes, four to a unit (`quantize.rs`). How many rows a tile has depends on the instruction set and on `m`; results do not.

use std::ops::Range;

use super::product::{HEAD_WORDS, Product};
use super::quantize::{Q4, Q8, Quantized, quantize_activations};
use super::simd::{Kernel, Simd, bf16_bits, bf16_value};
use super::{Isa, WeightType};

/// Rows of activations `[m, k]`, row-major, without gaps.
#[derive(Debug, Clone, Copy)]
pub enum Rows<'a> {
    /// f32.
    F32(&'a [f32]),
    /// Bits of bf16.
    Bf16(&'a [u16]),
}

impl<'a> Rows<'a> {
    /// The elements, `m * k`.
    pub fn len(&self) -> usize {
        match self {
            Rows::F32(x) => x.len(),
            Rows::Bf16(x) => x.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rows `range` of `k` elements each.
    pub fn slice(&self, range: Range<usize>, k: usize) -> Rows<'a> {
        match self {
            Rows::F32(x) => Rows::F32(&x[range.start * k..range.end * k]),
            Rows::Bf16(x) => Rows::Bf16(&x[range.start * k..range.end * k]),
        }
    }
}

/// Scratch that holds one product's activations, rounded and interleaved.
#[derive(Debug)]
pub struct PackedRows {
    data: Vec<u32>,
    isa: Isa,
    kind: WeightType,
    rows: usize,
    k: usize,
    tall: usize,
    units: usize,
}

impl PackedRows {
    /// Room for `rows` rows of `k`, to be multiplied with weights of any type by `isa`.
    pub fn new(isa: Isa, rows: usize, k: usize) -> Self {
        PackedRows {
            data: vec![0; Self::words(rows, k)],
            isa,
            kind: WeightType::F32,
            rows: 0,
            k: 0,
            tall: 1,
            units: 1,
        }
    }

    /// Bytes of scratch for `rows` rows of `k`; nothing if that overflows.
    pub fn bytes(rows: usize, k: usize) -> Option<usize> {
        rows.checked_mul(k.checked_next_multiple_of(Q8::GROUP)?)?
            .checked_mul(4)
    }

    /// Enough for weights of any type: a group of codes never takes more words than it has elements.
    fn words(rows: usize, k: usize) -> usize {
        rows * k.next_multiple_of(Q8::GROUP)
    }

    /// Takes the `m` rows of `k` elements in `x`, rounding them to bf16 (nearest, ties to even) for weights of that type, and
    /// quantising them to 8 bits for quantised ones.
    ///
    /// # Panics
    /// When `x` is not `m * k` long, or larger than the room.
    pub fn pack(&mut self, kind: WeightType, x: Rows<'_>, m: usize, k: usize) {
        assert_eq!(x.len(), m * k, "activations are [{m}, {k}]");
        assert!(
            Self::words(m, k) <= self.data.len(),
            "scratch of {} words is too small for rows [{m}, {k}]",
            self.data.len(),
        );
        (self.kind, self.rows, self.k) = (kind, m, k);
        self.isa.run(Pack { to: self, x });
    }

    /// Rows packed.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Weights these rows can be multiplied with.
    pub fn kind(&self) -> WeightType {
        self.kind
    }

    pub(crate) fn isa(&self) -> Isa {
        self.isa
    }

    pub(crate) fn tiles(&self) -> usize {
        self.rows.div_ceil(self.tall)
    }

    /// Rows of tile `tile`: as even as can be.
    pub(crate) fn tile_rows(&self, tile: usize) -> Range<usize> {
        let (tiles, rows) = (self.tiles(), self.rows);
        tile * rows / tiles..(tile + 1) * rows / tiles
    }

    /// Words of the tile that begins with row `first`.
    pub(crate) fn tile(&self, rows: &Range<usize>) -> &[u32] {
        let words = self.kind.steps(self.k) * self.units;
        &self.data[rows.start * words..rows.end * words]
    }
}

struct Pack<'a, 'b> {
    to: &'a mut PackedRows,
    x: Rows<'b>,
}

impl Kernel for Pack<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Pack { to, x } = self;
        let k = to.k;
        (to.tall, to.units) = match to.kind {
            WeightType::F32 | WeightType::F16 => (S::TALL, 1),
            WeightType::Bf16 => (S::TALL_PAIR, S::PAIR_UNITS),
            WeightType::Q8 => (S::TALL_QUAD, Q8::units::<S>()),
            WeightType::Q4 => (S::TALL_QUAD, Q4::units::<S>()),
        };
        let words = to.kind.steps(k) * to.units;
        for tile in 0..to.tiles() {
            let rows = to.tile_rows(tile);
            let height = rows.len();
            let place = &mut to.data[rows.start * words..rows.end * words];
            for (place_row, row) in rows.enumerate() {
                let x = x.slice(row..row + 1, k);
                match (to.kind, x) {
                    (WeightType::F32 | WeightType::F16, Rows::F32(x)) => {
                        interleave_f32(place, x, height, place_row);
                    }
                    (WeightType::F32 | WeightType::F16, Rows::Bf16(x)) => {
                        for (step, bits) in x.iter().enumerate() {
                            place[step * height + place_row] = bf16_value(*bits).to_bits();
                        }
                    }
                    (WeightType::Bf16, Rows::F32(x)) => {
                        interleave_rounded(s, place, x, height, place_row, to.units);
                    }
                    (WeightType::Bf16, Rows::Bf16(x)) => {
                        interleave_bits(place, x, height, place_row, to.units);
                    }
                    (WeightType::Q8, x) => {
                        interleave_quantized::<S, Q8>(s, place, x, height, place_row);
                    }
                    (WeightType::Q4, x) => {
                        interleave_quantized::<S, Q4>(s, place, x, height, place_row);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn interleave_f32(place: &mut [u32], x: &[f32], height: usize, row: usize) {
    for (place, value) in place.chunks_exact_mut(height).zip(x) {
        place[row] = value.to_bits();
    }
}

#[inline(always)]
fn interleave_rounded<S: Simd>(
    s: S,
    place: &mut [u32],
    x: &[f32],
    height: usize,
    row: usize,
    units: usize,
) {
    let (whole, rest) = x.as_chunks::<16>();
    let mut bits = [0; 16];
    for (chunk, x) in whole.iter().enumerate() {
        s.store_bf16(s.load(x), &mut bits);
        interleave_bits(
            &mut place[chunk * 8 * height * units..],
            &bits,
            height,
            row,
            units,
        );
    }
    for (bits, x) in bits.iter_mut().zip(rest) {
        *bits = bf16_bits(*x);
    }
    interleave_bits(
        &mut place[whole.len() * 8 * height * units..],
        &bits[..rest.len()],
        height,
        row,
        units,
    );
}

#[inline(always)]
fn interleave_bits(place: &mut [u32], x: &[u16], height: usize, row: usize, units: usize) {
    for (place, pair) in place.chunks_exact_mut(height * units).zip(x.chunks(2)) {
        let (even, odd) = (pair[0], pair.get(1).copied().unwrap_or(0));
        if units == 1 {
            place[row] = u32::from(even) | u32::from(odd) << 16;
        } else {
            place[2 * row] = u32::from(even) << 16;
            place[2 * row + 1] = u32::from(odd) << 16;
        }
    }
}

#[inline(always)]
fn interleave_quantized<S: Simd, Q: Quantized + Product>(
    s: S,
    place: &mut [u32],
    x: Rows<'_>,
    height: usize,
    row: usize,
) {
    for (group, place) in place.chunks_exact_mut(height * Q::units::<S>()).enumerate() {
        let first = group * Q::GROUP;
        let (mut wide, mut codes) = ([0.0; Q8::GROUP], [0; Q8::GROUP]);
        let (wide, codes) = (&mut wide[..Q::GROUP], &mut codes[..Q::GROUP]);
        match x {
            Rows::F32(x) => {
                let x = &x[first..x.len().min(first + Q::GROUP)];
                wide[..x.len()].copy_from_slice(x);
            }
            Rows::Bf16(x) => {
                let x = &x[first..x.len().min(first + Q::GROUP)];
                for (value, bits) in wide.iter_mut().zip(x) {
                    *value = bf16_value(*bits);
                }
            }
        }
        let scale = quantize_activations(s, wide, codes);
        let sum: i32 = codes.iter().map(|code| i32::from(*code as i8)).sum();
        let (heads, quads) = place.split_at_mut(HEAD_WORDS * height);
        heads[HEAD_WORDS * row] = scale.to_bits();
        heads[HEAD_WORDS * row + 1] = (-i32::from(Q::ZERO) * sum) as u32;
        let quads = quads.chunks_exact_mut(height * S::QUAD_UNITS);
        for (place, code) in quads.zip(codes.as_chunks::<4>().0) {
            if S::QUAD_UNITS == 1 {
                place[row] = u32::from_le_bytes(*code);
            } else {
                let code = code.map(|code| u32::from(i16::from(code as i8) as u16));
                place[2 * row] = code[0] | code[2] << 16;
                place[2 * row + 1] = code[1] | code[3] << 16;
            }
        }
    }
}

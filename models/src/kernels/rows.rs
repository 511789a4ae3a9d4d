//! Activations in the layout the products read: tiles of a few rows, interleaved.
//!
//! A tile of `h` rows is stored `[step][h]`, so a product walks it with one pointer, whatever the stride of the
//! rows was. With quantised weights a step is a group: first the scale of each row and what its sum of products starts from, then
//! its codes, four to a unit (`quantize.rs`). How many rows a tile has depends on the instruction set and on `m`; results do not.

use std::marker::PhantomData;
use std::ops::Range;

use crate::crew::{Member, Parts};

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

/// Scratch that holds the activations of products with one shape of weights, rounded and interleaved: rows of one group, or of several, each of which is
/// multiplied with weights of its own.
#[derive(Debug)]
pub struct PackedRows {
    data: Vec<u32>,
    /// Row that each tile begins with; after the last, the end.
    tiles: Vec<usize>,
    /// Tile and row that each group begins with; after the last, the ends.
    groups: Vec<(usize, usize)>,
    layout: Layout,
}

/// How rows are packed.
#[derive(Debug, Clone, Copy)]
struct Layout {
    isa: Isa,
    kind: WeightType,
    k: usize,
    /// Words of a row.
    words: usize,
}

/// Rows that are multiplied with the same weights.
#[derive(Debug, Clone, Copy)]
pub struct PackedGroup<'a> {
    data: &'a [u32],
    tiles: &'a [usize],
    layout: Layout,
}

/// Tiles that are still to be packed, those of one piece.
#[derive(Debug)]
pub(crate) struct TilesMut<'a> {
    data: &'a mut [u32],
    tiles: &'a [usize],
    layout: Layout,
}

impl PackedRows {
    /// Room for `rows` rows of `k`, to be multiplied with weights of any type by `isa`.
    pub fn new(isa: Isa, rows: usize, k: usize) -> Self {
        PackedRows {
            data: vec![0; rows * k.next_multiple_of(Q8::GROUP)],
            tiles: Vec::with_capacity(rows + 1),
            groups: Vec::with_capacity(rows + 1),
            layout: Layout {
                isa,
                kind: WeightType::F32,
                k: 0,
                words: 0,
            },
        }
    }

    /// Bytes of scratch for `rows` rows of `k`; nothing if that overflows.
    pub fn bytes(rows: usize, k: usize) -> Option<usize> {
        // Enough for weights of any type: a group of codes never takes more words than it has elements.
        let places = rows.checked_mul(k.checked_next_multiple_of(Q8::GROUP)?)?;
        let marks = rows.checked_add(1)?.checked_mul(size_of::<[usize; 3]>())?;
        places.checked_mul(4)?.checked_add(marks)
    }

    /// Takes the `m` rows of `k` elements in `x`, rounding them to bf16 (nearest, ties to even) for weights of that type, and
    /// quantising them to 8 bits for quantised ones.
    ///
    /// # Panics
    /// When `x` is not `m * k` long, or larger than the room.
    pub fn pack(&mut self, kind: WeightType, x: Rows<'_>, m: usize, k: usize) {
        self.pack_groups(&mut Member::alone(), kind, x, &[0, m], k);
    }

    /// Takes rows in groups: group `g` is rows `bounds[g]..bounds[g + 1]` of `x`, of `k` elements each. An empty group keeps its number.
    ///
    /// # Panics
    /// When the bounds are not those of `x`, or larger than the room.
    pub fn pack_groups(
        &mut self,
        crew: &mut Member,
        kind: WeightType,
        x: Rows<'_>,
        bounds: &[usize],
        k: usize,
    ) {
        let rows = bounds.last().copied().unwrap_or(0);
        assert_eq!(x.len(), rows * k, "activations are [{rows}, {k}]");
        self.lay_out(kind, bounds, k);
        crew.each(self.parts(), |_, mut tiles, _| {
            let rows = tiles.rows();
            tiles.pack(x.slice(rows, k));
        });
    }

    /// Makes tiles of the groups of rows that will be packed.
    ///
    /// # Panics
    /// When they are larger than the room.
    pub(crate) fn lay_out(&mut self, kind: WeightType, bounds: &[usize], k: usize) {
        let isa = self.layout.isa;
        let rows = bounds.last().copied().unwrap_or(0);
        let (tall, units) = isa.run(TileShape(kind));
        let words = kind.steps(k) * units;
        assert!(
            bounds.is_sorted() && rows * words <= self.data.len(),
            "scratch of {} words is too small for rows [{rows}, {k}]",
            self.data.len(),
        );
        self.layout = Layout {
            isa,
            kind,
            k,
            words,
        };
        self.tiles.clear();
        self.groups.clear();
        for group in bounds.windows(2) {
            self.groups.push((self.tiles.len(), group[0]));
            let rows = group[1] - group[0];
            let count = rows.div_ceil(tall);
            // As even as can be.
            self.tiles
                .extend((0..count).map(|tile| group[0] + tile * rows / count));
        }
        self.groups.push((self.tiles.len(), rows));
        self.tiles.push(rows);
    }

    /// The tiles to be packed, in pieces worth the while.
    pub(crate) fn parts(&mut self) -> TileParts<'_> {
        let tiles = self.tiles.len() - 1;
        let words = self.tiles[tiles] * self.layout.words;
        TileParts {
            first: self.data.as_mut_ptr(),
            tiles: &self.tiles,
            per_piece: (PIECE_WORDS * tiles / words.max(1)).max(1),
            layout: self.layout,
            data: PhantomData,
        }
    }

    /// Rows of group `group`.
    ///
    /// # Panics
    /// When there are not so many.
    pub fn group(&self, group: usize) -> PackedGroup<'_> {
        let ((first, start), (last, end)) = (self.groups[group], self.groups[group + 1]);
        PackedGroup {
            data: &self.data[start * self.layout.words..end * self.layout.words],
            tiles: if start == end {
                &[0]
            } else {
                &self.tiles[first..=last]
            },
            layout: self.layout,
        }
    }
}

#[cfg(test)]
impl PackedRows {
    /// The words that are in use, all groups'.
    pub(super) fn words(&self) -> &[u32] {
        &self.data[..self.tiles.last().copied().unwrap_or(0) * self.layout.words]
    }
}

#[cfg(test)]
impl<'a> PackedGroup<'a> {
    /// The same rows, read from elsewhere.
    pub(super) fn with_words(self, data: &'a [u32]) -> Self {
        assert_eq!(data, self.data);
        PackedGroup { data, ..self }
    }
}

impl<'a> From<&'a PackedRows> for PackedGroup<'a> {
    fn from(rows: &'a PackedRows) -> Self {
        rows.group(0)
    }
}

impl<'a> PackedGroup<'a> {
    /// Rows packed.
    pub fn rows(&self) -> usize {
        self.tiles[self.tiles.len() - 1] - self.tiles[0]
    }

    /// Elements of a row.
    pub fn k(&self) -> usize {
        self.layout.k
    }

    /// Weights these rows can be multiplied with.
    pub fn kind(&self) -> WeightType {
        self.layout.kind
    }

    pub(crate) fn isa(&self) -> Isa {
        self.layout.isa
    }

    pub(crate) fn tiles(&self) -> usize {
        self.tiles.len() - 1
    }

    /// Rows of tile `tile`, counted from the first of the group.
    pub(crate) fn tile_rows(&self, tile: usize) -> Range<usize> {
        let first = self.tiles[0];
        self.tiles[tile] - first..self.tiles[tile + 1] - first
    }

    /// Words of the tile with these rows.
    pub(crate) fn tile(&self, rows: &Range<usize>) -> &'a [u32] {
        let words = self.layout.words;
        &self.data[rows.start * words..rows.end * words]
    }
}

/// Words that a thread packs at a time: some microseconds' worth.
const PIECE_WORDS: usize = 16 << 10;

/// Cuts packed rows into pieces of whole tiles.
pub(crate) struct TileParts<'a> {
    first: *mut u32,
    tiles: &'a [usize],
    per_piece: usize,
    layout: Layout,
    data: PhantomData<&'a mut [u32]>,
}

// SAFETY: threads get disjoint parts of an exclusive borrow.
unsafe impl Sync for TileParts<'_> {}

// SAFETY: tiles rise, so pieces of different tiles are disjoint.
unsafe impl<'a> Parts for TileParts<'a> {
    type Part = TilesMut<'a>;

    fn count(&self) -> usize {
        pieces(self.tiles, self.per_piece)
    }

    unsafe fn part(&self, index: usize) -> TilesMut<'a> {
        let tiles = piece(self.tiles, self.per_piece, index);
        let words = self.layout.words;
        let (start, end) = (tiles[0] * words, tiles[tiles.len() - 1] * words);
        TilesMut {
            // SAFETY: `lay_out` saw to it that the last tile ends within the data; asked for once.
            data: unsafe { std::slice::from_raw_parts_mut(self.first.add(start), end - start) },
            tiles,
            layout: self.layout,
        }
    }
}

fn pieces(tiles: &[usize], per_piece: usize) -> usize {
    (tiles.len() - 1).div_ceil(per_piece)
}

/// Bounds of the tiles of piece `index`.
fn piece(tiles: &[usize], per_piece: usize, index: usize) -> &[usize] {
    let first = index * per_piece;
    &tiles[first..=(tiles.len() - 1).min(first + per_piece)]
}

impl<'a> TileParts<'a> {
    /// Data of `unit` elements a row, cut where these tiles are.
    ///
    /// # Panics
    /// When there are fewer rows.
    pub(crate) fn beside<'d, T>(&self, data: &'d mut [T], unit: usize) -> Beside<'a, 'd, T> {
        let rows = self.tiles[self.tiles.len() - 1];
        assert!(
            rows * unit <= data.len(),
            "{rows} rows of {unit} lie in the data"
        );
        Beside {
            first: data.as_mut_ptr(),
            unit,
            tiles: self.tiles,
            per_piece: self.per_piece,
            data: PhantomData,
        }
    }
}

/// See [`TileParts::beside`].
pub(crate) struct Beside<'a, 'd, T> {
    first: *mut T,
    unit: usize,
    tiles: &'a [usize],
    per_piece: usize,
    data: PhantomData<&'d mut [T]>,
}

// SAFETY: threads get disjoint parts of an exclusive borrow.
unsafe impl<T: Send> Sync for Beside<'_, '_, T> {}

// SAFETY: as for `TileParts`.
unsafe impl<'d, T: Send> Parts for Beside<'_, 'd, T> {
    type Part = &'d mut [T];

    fn count(&self) -> usize {
        pieces(self.tiles, self.per_piece)
    }

    unsafe fn part(&self, index: usize) -> &'d mut [T] {
        let tiles = piece(self.tiles, self.per_piece, index);
        let (start, end) = (tiles[0] * self.unit, tiles[tiles.len() - 1] * self.unit);
        // SAFETY: `beside` saw to it that the rows lie within the data; asked for once.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(start), end - start) }
    }
}

impl TilesMut<'_> {
    /// Rows of these tiles.
    pub(crate) fn rows(&self) -> Range<usize> {
        self.tiles[0]..self.tiles[self.tiles.len() - 1]
    }

    /// Packs `x`, which holds those rows.
    pub(crate) fn pack(&mut self, x: Rows<'_>) {
        assert_eq!(x.len(), self.rows().len() * self.layout.k);
        self.layout.isa.run(Pack { to: self, x });
    }
}

/// Rows of the tallest tile, and words of one row in a step.
struct TileShape(WeightType);

impl Kernel for TileShape {
    type Output = (usize, usize);

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> (usize, usize) {
        match self.0 {
            WeightType::F32 | WeightType::F16 => (S::TALL, 1),
            WeightType::Bf16 => (S::TALL_PAIR, S::PAIR_UNITS),
            WeightType::Q8 => (S::TALL_QUAD, Q8::units::<S>()),
            WeightType::Q4 => (S::TALL_QUAD, Q4::units::<S>()),
        }
    }
}

struct Pack<'a, 'b, 'c> {
    to: &'a mut TilesMut<'b>,
    x: Rows<'c>,
}

impl Kernel for Pack<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Pack { to, x } = self;
        let Layout { kind, k, words, .. } = to.layout;
        let first = to.tiles[0];
        for tile in to.tiles.windows(2) {
            let rows = tile[0] - first..tile[1] - first;
            let height = rows.len();
            let place = &mut to.data[rows.start * words..rows.end * words];
            for (place_row, row) in rows.enumerate() {
                let x = x.slice(row..row + 1, k);
                match (kind, x) {
                    (WeightType::F32 | WeightType::F16, Rows::F32(x)) => {
                        interleave_f32(place, x, height, place_row);
                    }
                    (WeightType::F32 | WeightType::F16, Rows::Bf16(x)) => {
                        for (step, bits) in x.iter().enumerate() {
                            place[step * height + place_row] = bf16_value(*bits).to_bits();
                        }
                    }
                    (WeightType::Bf16, Rows::F32(x)) => {
                        interleave_rounded(s, place, x, height, place_row, S::PAIR_UNITS);
                    }
                    (WeightType::Bf16, Rows::Bf16(x)) => {
                        interleave_bits(place, x, height, place_row, S::PAIR_UNITS);
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

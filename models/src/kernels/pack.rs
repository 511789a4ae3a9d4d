//! Weights in the layout the products read: panels of 32 columns (output features), each a contiguous stream.
//!
//! A panel is a sequence of *steps* of 32 u32 (two cache lines). With f32 weights a step is one `k`, with bf16 two:
//! `[n/32][k][32]` f32, `[n/32][k/2][32][2]` bf16. Columns beyond `n` and a `k` beyond an odd one are zeros.

use crate::weights::{ElementType, MatrixView};

use super::arena::{Arena, ArenaBlock};
use super::simd::bf16_bits;

/// Columns of a panel.
pub const PANEL_COLUMNS: usize = 32;

/// What packed weights are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightType {
    /// f32, one `k` a step.
    F32,
    /// bf16, two `k` a step.
    Bf16,
}

impl WeightType {
    /// Steps of a panel for `k` input features.
    pub fn steps(self, k: usize) -> usize {
        match self {
            WeightType::F32 => k,
            WeightType::Bf16 => k.div_ceil(2),
        }
    }
}

/// The weights `[n, k]` of a linear layer (or of several that share their input, side by side along `n`), packed.
#[derive(Debug)]
pub struct PackedMatrix {
    data: ArenaBlock,
    kind: WeightType,
    n: usize,
    k: usize,
}

impl PackedMatrix {
    /// Bytes that `[n, k]` takes in an arena; nothing if that overflows.
    pub fn bytes(kind: WeightType, n: usize, k: usize) -> Option<usize> {
        let len = n
            .checked_next_multiple_of(PANEL_COLUMNS)?
            .checked_mul(kind.steps(k))?;
        Arena::block_bytes(len)
    }

    /// Packs matrices `[n_i, k]`, one after the other along `n`, into a block of `arena`. Values are rounded to
    /// bf16 where `kind` says so and the view's are wider. A view is read once, in the order of its strides if one of them is 1.
    ///
    /// # Panics
    /// When the views differ in `k`, or the arena is too small.
    pub fn pack(arena: &mut Arena, kind: WeightType, views: &[MatrixView<'_>]) -> Self {
        let k = views.first().map_or(0, |view| view.cols);
        let n: usize = views.iter().map(|view| view.rows).sum();
        assert!(
            views.iter().all(|view| view.cols == k),
            "matrices packed side by side share their input"
        );
        let steps = kind.steps(k);
        let mut data = arena.block(n.next_multiple_of(PANEL_COLUMNS) * steps);
        let mut column = 0;
        for view in views {
            match view.element {
                ElementType::F32 => pack_view::<F32>(&mut data, kind, steps, column, view),
                ElementType::F16 => pack_view::<F16>(&mut data, kind, steps, column, view),
                ElementType::Bf16 => pack_view::<Bf16>(&mut data, kind, steps, column, view),
            }
            column += view.rows;
        }
        PackedMatrix { data, kind, n, k }
    }

    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }

    /// What the weights are made of.
    pub fn kind(&self) -> WeightType {
        self.kind
    }

    /// Panels, the last one perhaps partly filled.
    pub fn panels(&self) -> usize {
        self.n.div_ceil(PANEL_COLUMNS)
    }

    /// Columns of panel `panel`.
    pub fn columns(&self, panel: usize) -> usize {
        PANEL_COLUMNS.min(self.n - panel * PANEL_COLUMNS)
    }

    /// Bytes of each panel.
    pub(crate) fn panel_bytes(&self) -> usize {
        self.steps() * PANEL_COLUMNS * 4
    }

    /// Steps of each panel.
    pub(crate) fn steps(&self) -> usize {
        self.kind.steps(self.k)
    }

    /// The words of one panel.
    pub(crate) fn panel(&self, panel: usize) -> &[u32] {
        let len = self.steps() * PANEL_COLUMNS;
        &self.data[panel * len..][..len]
    }

    /// Copies row `row` of the matrix (one output feature) into `out`, widened: the way an embedding is read that shares its weights
    /// with the head.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane) = (self.panel(row / PANEL_COLUMNS), row % PANEL_COLUMNS);
        match self.kind {
            WeightType::F32 => {
                for (k, value) in out[..self.k].iter_mut().enumerate() {
                    *value = f32::from_bits(panel[k * PANEL_COLUMNS + lane]);
                }
            }
            WeightType::Bf16 => {
                for (k, value) in out[..self.k].iter_mut().enumerate() {
                    let word = panel[k / 2 * PANEL_COLUMNS + lane];
                    let bits = if k % 2 == 0 {
                        word << 16
                    } else {
                        word & 0xffff_0000
                    };
                    *value = f32::from_bits(bits);
                }
            }
        }
    }
}

/// How one stored element becomes an f32 or a bf16.
trait Element {
    const BYTES: usize;
    fn f32(bytes: &[u8]) -> f32;
    #[inline(always)]
    fn bf16(bytes: &[u8]) -> u16 {
        bf16_bits(Self::f32(bytes))
    }
}

struct F32;
impl Element for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    fn f32(bytes: &[u8]) -> f32 {
        f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }
}

struct F16;
impl Element for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn f32(bytes: &[u8]) -> f32 {
        half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    }
}

struct Bf16;
impl Element for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn f32(bytes: &[u8]) -> f32 {
        f32::from_bits(u32::from(Self::bf16(bytes)) << 16)
    }
    #[inline(always)]
    fn bf16(bytes: &[u8]) -> u16 {
        u16::from_le_bytes([bytes[0], bytes[1]])
    }
}

/// Steps that are packed of every column before the next ones: their words (8 KiB) stay in the first-level cache.
const BLOCK_STEPS: usize = 64;

fn pack_view<E: Element>(
    data: &mut [u32],
    kind: WeightType,
    steps: usize,
    first_column: usize,
    view: &MatrixView<'_>,
) {
    for row in (0..view.rows).step_by(PANEL_COLUMNS) {
        let rows = PANEL_COLUMNS.min(view.rows - row);
        for first in (0..steps).step_by(BLOCK_STEPS) {
            let block = first..steps.min(first + BLOCK_STEPS);
            if view.row_stride == 1 && view.col_stride != 1 {
                pack_across::<E>(
                    data,
                    kind,
                    steps,
                    first_column,
                    view,
                    row..row + rows,
                    block,
                );
            } else {
                for r in row..row + rows {
                    pack_along::<E>(data, kind, steps, first_column + r, view, r, block.clone());
                }
            }
        }
    }
}

/// Packs steps of one row, reading along `k`.
fn pack_along<E: Element>(
    data: &mut [u32],
    kind: WeightType,
    steps: usize,
    column: usize,
    view: &MatrixView<'_>,
    row: usize,
    block: std::ops::Range<usize>,
) {
    let lane = column % PANEL_COLUMNS;
    let panel = &mut data[column / PANEL_COLUMNS * steps * PANEL_COLUMNS..];
    let places = panel[block.start * PANEL_COLUMNS..block.end * PANEL_COLUMNS]
        .chunks_exact_mut(PANEL_COLUMNS);
    let stride = view.col_stride * E::BYTES;
    let source = &view.data[row * view.row_stride * E::BYTES..];
    match kind {
        WeightType::F32 => {
            for (k, place) in block.zip(places) {
                place[lane] = E::f32(&source[k * stride..][..E::BYTES]).to_bits();
            }
        }
        WeightType::Bf16 => {
            for (step, place) in block.zip(places) {
                let even = E::bf16(&source[2 * step * stride..][..E::BYTES]);
                let odd = if 2 * step + 1 < view.cols {
                    E::bf16(&source[(2 * step + 1) * stride..][..E::BYTES])
                } else {
                    0
                };
                place[lane] = u32::from(even) | u32::from(odd) << 16;
            }
        }
    }
}

/// Packs steps of up to 32 rows that lie side by side in memory, reading across them.
fn pack_across<E: Element>(
    data: &mut [u32],
    kind: WeightType,
    steps: usize,
    first_column: usize,
    view: &MatrixView<'_>,
    rows: std::ops::Range<usize>,
    block: std::ops::Range<usize>,
) {
    let line = |k: usize| {
        let at = (k * view.col_stride + rows.start) * E::BYTES;
        view.data[at..at + rows.len() * E::BYTES].chunks_exact(E::BYTES)
    };
    for step in block {
        // The rows may straddle two panels, where an earlier matrix ended within one.
        let mut column = first_column + rows.start;
        let mut put = |word: u32| {
            let at =
                (column / PANEL_COLUMNS * steps + step) * PANEL_COLUMNS + column % PANEL_COLUMNS;
            data[at] = word;
            column += 1;
        };
        match kind {
            WeightType::F32 => line(step).for_each(|bytes| put(E::f32(bytes).to_bits())),
            WeightType::Bf16 if 2 * step + 1 < view.cols => {
                for (even, odd) in line(2 * step).zip(line(2 * step + 1)) {
                    put(u32::from(E::bf16(even)) | u32::from(E::bf16(odd)) << 16);
                }
            }
            WeightType::Bf16 => line(2 * step).for_each(|bytes| put(E::bf16(bytes).into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, matrix};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_element_of_every_view_stands_at_its_place(
            sizes in prop::collection::vec(1usize..70, 1..4),
            k in 1usize..150,
            element in prop::sample::select(vec![ElementType::F32, ElementType::F16, ElementType::Bf16]),
            transposed: bool,
            seed: u64,
        ) {
            let mut random = Random::new(seed);
            let views: Vec<_> =
                sizes.iter().map(|n| matrix(&mut random, *n, k, 1.0, element, transposed)).collect();
            for kind in [WeightType::F32, WeightType::Bf16] {
                let n = sizes.iter().sum();
                let bytes = PackedMatrix::bytes(kind, n, k).unwrap();
                let mut arena = Arena::new(bytes);
                let packed = PackedMatrix::pack(&mut arena, kind, &views);
                prop_assert_eq!(arena.used_bytes(), bytes);
                let mut row = vec![0.0; k];
                let mut n = 0;
                for view in &views {
                    for r in 0..view.rows {
                        packed.read_row(n, &mut row);
                        for (c, value) in row.iter().enumerate() {
                            let exact = view.at(r, c);
                            let expected = match kind {
                                WeightType::F32 => exact,
                                WeightType::Bf16 => half::bf16::from_f32(exact).to_f32(),
                            };
                            prop_assert_eq!(*value, expected);
                        }
                        n += 1;
                    }
                }
                let used = packed.panels() * packed.steps() * PANEL_COLUMNS;
                let zeros = packed.data[..used].iter().filter(|word| **word == 0).count();
                prop_assert!(zeros >= (packed.panels() * 32 - n) * packed.steps());
            }
        }
    }
}

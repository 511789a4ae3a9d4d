//! Weights in the layout the products read: panels of 32 columns (output features), each a contiguous stream.
//!
//! A panel is a sequence of *steps*. What a step is depends on the type of the weights:
//!
//! | type | inputs | layout of a step |
//! |---|---|---|
//! | f32, f16 | 1 | `[32]` |
//! | bf16 | 2 | `[32][2]` |
//! | Q8 | 64 | 32 scales in bf16, then `[16][32][4]` codes of 8 bits |
//! | Q4 | 32 | 32 scales in bf16, then `[4][32][8]` codes of 4 bits |
//!
//! Columns beyond `n` and inputs beyond `k` are zeros. `quantize.rs` says what codes and scales are.

use std::ops::Range;

use crate::crew::Chunks;
use crate::weights::{ElementType, MatrixView};

use super::Isa;
use super::arena::{Arena, ArenaBlock};
use super::quantize::{Q4, Q8, Quantized, SCALE_WORDS};
use super::simd::{Kernel, Simd, bf16_value};

/// Columns of a panel.
pub const PANEL_COLUMNS: usize = 32;

/// What packed weights are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightType {
    /// f32.
    F32,
    /// f16, multiplied with activations in f32.
    F16,
    /// bf16, multiplied with activations in bf16.
    Bf16,
    /// 8 bits and a scale for every 64, multiplied with activations of 8 bits.
    Q8,
    /// 4 bits and a scale for every 32, multiplied with activations of 8 bits.
    Q4,
}

impl WeightType {
    /// All of them.
    pub const ALL: [WeightType; 5] = [
        WeightType::F32,
        WeightType::F16,
        WeightType::Bf16,
        WeightType::Q8,
        WeightType::Q4,
    ];

    /// Steps of a panel for `k` input features.
    pub fn steps(self, k: usize) -> usize {
        k.div_ceil(match self {
            WeightType::F32 | WeightType::F16 => 1,
            WeightType::Bf16 => 2,
            WeightType::Q8 => Q8::GROUP,
            WeightType::Q4 => Q4::GROUP,
        })
    }

    /// Words of a step.
    pub(super) const fn step_words(self) -> usize {
        match self {
            WeightType::F32 | WeightType::Bf16 => PANEL_COLUMNS,
            WeightType::F16 => PANEL_COLUMNS / 2,
            WeightType::Q8 => Q8::WORDS,
            WeightType::Q4 => Q4::WORDS,
        }
    }

    /// Words of a panel for `k` input features; nothing if that overflows.
    fn panel_words(self, k: usize) -> Option<usize> {
        self.steps(k).checked_mul(self.step_words())
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
        let words = n
            .div_ceil(PANEL_COLUMNS)
            .checked_mul(kind.panel_words(k)?)?;
        Arena::block_bytes(words)
    }

    /// Packs matrices `[n_i, k]`, one after the other along `n`, into a block of `arena`. Values are rounded or quantised
    /// to `kind` where the view's have more digits. A view is read once, in the order of its strides if one of them is 1.
    ///
    /// # Panics
    /// When the views differ in `k`, or the arena is too small.
    pub fn pack(arena: &mut Arena<'_>, kind: WeightType, views: &[MatrixView<'_>]) -> Self {
        let k = views.first().map_or(0, |view| view.cols);
        let n: usize = views.iter().map(|view| view.rows).sum();
        assert!(
            views.iter().all(|view| view.cols == k),
            "matrices packed side by side share their input"
        );
        let panel_words = kind.steps(k) * kind.step_words();
        let mut data = arena.block(n.div_ceil(PANEL_COLUMNS) * panel_words);
        let isa = Isa::detect();
        let per_piece = (PIECE_WORDS / panel_words.max(1)).max(1);
        let pieces = Chunks::new(&mut data[..], (per_piece * panel_words).max(1));
        arena.crew().each(pieces, |piece, data, _| {
            let columns =
                piece * per_piece * PANEL_COLUMNS..(piece + 1) * per_piece * PANEL_COLUMNS;
            let mut first = 0;
            for view in views {
                let end = first + view.rows;
                let ours = columns.start.max(first)..columns.end.min(end);
                if !ours.is_empty() {
                    isa.run(Pack {
                        data,
                        kind,
                        panel_words,
                        column: ours.start - columns.start,
                        view,
                        rows: ours.start - first..ours.end - first,
                    });
                }
                first = end;
            }
        });
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
        self.steps() * self.kind.step_words() * 4
    }

    /// Steps of each panel.
    pub(crate) fn steps(&self) -> usize {
        self.kind.steps(self.k)
    }

    /// The words of one panel.
    pub(crate) fn panel(&self, panel: usize) -> &[u32] {
        let len = self.steps() * self.kind.step_words();
        &self.data[panel * len..][..len]
    }

    /// Copies row `row` of the matrix (one output feature) into `out`, as f32: the way an embedding is read that shares its weights
    /// with the head.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        let (panel, column) = (self.panel(row / PANEL_COLUMNS), row % PANEL_COLUMNS);
        let halves = bytemuck::cast_slice::<u32, u16>(panel);
        for (k, value) in out[..self.k].iter_mut().enumerate() {
            *value = match self.kind {
                WeightType::F32 => f32::from_bits(panel[k * PANEL_COLUMNS + column]),
                WeightType::F16 => {
                    half::f16::from_bits(halves[k * PANEL_COLUMNS + column]).to_f32()
                }
                WeightType::Bf16 => {
                    bf16_value(halves[(k / 2 * PANEL_COLUMNS + column) * 2 + k % 2])
                }
                WeightType::Q8 => Q8::weight(panel, column, k),
                WeightType::Q4 => Q4::weight(panel, column, k),
            };
        }
    }
}

/// Words that a thread packs at a time: some tens of microseconds' worth.
const PIECE_WORDS: usize = 64 << 10;

/// Inputs that are packed of every column before the next ones: what they become (16 KiB in f32) stays in the first-level
/// cache. A whole number of steps of every type.
const BLOCK_INPUTS: usize = 128;

/// Some inputs of a panel's rows as f32, zeros beyond those that there are.
type Block = [[f32; BLOCK_INPUTS]; PANEL_COLUMNS];

/// Packs rows of a view, the first of which is column `column` of the first panel of `data`.
struct Pack<'a, 'b> {
    data: &'a mut [u32],
    kind: WeightType,
    panel_words: usize,
    column: usize,
    view: &'a MatrixView<'b>,
    rows: Range<usize>,
}

impl Kernel for Pack<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut block: Block = [[0.0; BLOCK_INPUTS]; PANEL_COLUMNS];
        let block_steps = self.kind.steps(BLOCK_INPUTS);
        let mut row = self.rows.start;
        while row < self.rows.end {
            let place = self.column + row - self.rows.start;
            let column = place % PANEL_COLUMNS;
            let rows = row..self.rows.end.min(row + PANEL_COLUMNS - column);
            let panel = place / PANEL_COLUMNS * self.panel_words;
            let panel = &mut self.data[panel..][..self.panel_words];
            let steps = panel.chunks_mut(block_steps * self.kind.step_words());
            for (index, steps) in steps.enumerate() {
                let first = index * BLOCK_INPUTS;
                let inputs = first..self.view.cols.min(first + BLOCK_INPUTS);
                if inputs.len() < BLOCK_INPUTS {
                    block = [[0.0; BLOCK_INPUTS]; PANEL_COLUMNS];
                }
                widen(s, self.view, rows.clone(), inputs, &mut block);
                for (i, values) in block[..rows.len()].iter().enumerate() {
                    write(s, self.kind, values, column + i, steps);
                }
            }
            row = rows.end;
        }
    }
}

/// Reads inputs `inputs` of rows `rows`, along the rows or, where those lie side by side in memory, across them.
#[inline(always)]
fn widen<S: Simd>(
    s: S,
    view: &MatrixView<'_>,
    rows: Range<usize>,
    inputs: Range<usize>,
    block: &mut Block,
) {
    let bytes = view.element.bytes();
    let run = |row: usize, input: usize, len: usize| {
        let first = (row * view.row_stride + input * view.col_stride) * bytes;
        &view.data[first..][..len * bytes]
    };
    if view.col_stride == 1 {
        for (row, out) in rows.zip(block) {
            widen_run(s, view.element, run(row, inputs.start, inputs.len()), out);
        }
    } else if view.row_stride == 1 {
        let mut line = [0.0; PANEL_COLUMNS];
        for (i, input) in inputs.enumerate() {
            widen_run(
                s,
                view.element,
                run(rows.start, input, rows.len()),
                &mut line,
            );
            for (out, value) in block.iter_mut().zip(&line[..rows.len()]) {
                out[i] = *value;
            }
        }
    } else {
        for (row, out) in rows.zip(block) {
            for (input, value) in inputs.clone().zip(out) {
                *value = view.at(row, input);
            }
        }
    }
}

/// Widens elements that follow each other.
#[inline(always)]
fn widen_run<S: Simd>(s: S, element: ElementType, bytes: &[u8], out: &mut [f32]) {
    if element == ElementType::F32 {
        for (bytes, value) in bytes.as_chunks::<4>().0.iter().zip(out) {
            *value = f32::from_le_bytes(*bytes);
        }
        return;
    }
    let elements = bytes.as_chunks::<2>().0;
    for (elements, out) in elements.chunks(16).zip(out.chunks_mut(16)) {
        let mut bits = [0; 16];
        for (bits, element) in bits.iter_mut().zip(elements) {
            *bits = u16::from_le_bytes(*element);
        }
        let wide = if element == ElementType::F16 {
            s.load_f16(&bits)
        } else {
            s.load_bf16(&bits)
        };
        s.store_some(wide, &mut out[..elements.len()]);
    }
}

/// Writes one column's inputs into the steps of a panel that they belong to.
#[inline(always)]
fn write<S: Simd>(
    s: S,
    kind: WeightType,
    values: &[f32; BLOCK_INPUTS],
    column: usize,
    steps: &mut [u32],
) {
    match kind {
        WeightType::F32 => {
            let steps = steps.chunks_exact_mut(PANEL_COLUMNS);
            for (step, value) in steps.zip(values) {
                step[column] = value.to_bits();
            }
        }
        WeightType::F16 => {
            let steps = bytemuck::cast_slice_mut::<u32, u16>(steps);
            let steps = steps.chunks_mut(16 * PANEL_COLUMNS);
            for (steps, values) in steps.zip(values.as_chunks::<16>().0) {
                let mut bits = [0; 16];
                s.store_f16(s.load(values), &mut bits);
                for (step, bits) in steps.chunks_exact_mut(PANEL_COLUMNS).zip(bits) {
                    step[column] = bits;
                }
            }
        }
        WeightType::Bf16 => {
            let steps = steps.chunks_mut(8 * PANEL_COLUMNS);
            for (steps, values) in steps.zip(values.as_chunks::<16>().0) {
                let mut bits = [0; 16];
                s.store_bf16(s.load(values), &mut bits);
                let pairs = bits.as_chunks::<2>().0;
                for (step, [even, odd]) in steps.chunks_exact_mut(PANEL_COLUMNS).zip(pairs) {
                    step[column] = u32::from(*even) | u32::from(*odd) << 16;
                }
            }
        }
        WeightType::Q8 => write_groups::<S, Q8>(s, values, column, steps),
        WeightType::Q4 => write_groups::<S, Q4>(s, values, column, steps),
    }
}

#[inline(always)]
fn write_groups<S: Simd, Q: Quantized>(
    s: S,
    values: &[f32; BLOCK_INPUTS],
    column: usize,
    steps: &mut [u32],
) {
    let steps = steps.chunks_exact_mut(Q::WORDS);
    for (step, values) in steps.zip(values.chunks_exact(Q::GROUP)) {
        let (scales, words) = step.split_at_mut(SCALE_WORDS);
        let mut codes = [0; BLOCK_INPUTS];
        let codes = &mut codes[..Q::GROUP];
        let scale = Q::quantize(s, values, codes);
        bytemuck::cast_slice_mut::<u32, u16>(scales)[column] = scale;
        Q::store(codes, column, words);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crew::Member;
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
            for kind in WeightType::ALL {
                let n = sizes.iter().sum();
                let bytes = PackedMatrix::bytes(kind, n, k).unwrap();
                let mut crew = Member::alone();
                let mut arena = Arena::new(bytes, &mut crew);
                let packed = PackedMatrix::pack(&mut arena, kind, &views);
                prop_assert_eq!(arena.used_bytes(), bytes);
                let mut row = vec![0.0; k];
                let mut n = 0;
                for view in &views {
                    for r in 0..view.rows {
                        packed.read_row(n, &mut row);
                        let exact: Vec<f32> = (0..k).map(|c| view.at(r, c)).collect();
                        match kind {
                            WeightType::F32 => prop_assert_eq!(&row, &exact),
                            WeightType::F16 => {
                                let rounded = |x: &f32| half::f16::from_f32(*x).to_f32();
                                prop_assert!(row.iter().copied().eq(exact.iter().map(rounded)));
                            }
                            WeightType::Bf16 => {
                                let rounded = |x: &f32| half::bf16::from_f32(*x).to_f32();
                                prop_assert!(row.iter().copied().eq(exact.iter().map(rounded)));
                            }
                            // Steps of 2 / 254 and 2 / 15 of the largest; the largest of Q4 may be clipped by a third.
                            WeightType::Q8 => check_groups(&row, &exact, 64, 0.004)?,
                            WeightType::Q4 => check_groups(&row, &exact, 32, 0.34)?,
                        }
                        n += 1;
                    }
                }
                let inputs = |i: &usize| *i >= n;
                for column in (0..packed.panels() * PANEL_COLUMNS).filter(inputs) {
                    packed.read_row(column, &mut row);
                    prop_assert!(row.iter().all(|x| *x == 0.0));
                }
            }
        }
    }

    /// Every weight is off by at most `most` of the largest of its group.
    fn check_groups(
        found: &[f32],
        exact: &[f32],
        group: usize,
        most: f32,
    ) -> Result<(), TestCaseError> {
        for (found, exact) in found.chunks(group).zip(exact.chunks(group)) {
            let largest = exact.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
            for (found, exact) in found.iter().zip(exact) {
                prop_assert!((found - exact).abs() <= most * largest, "{found} {exact}");
            }
        }
        Ok(())
    }
}

//! Products of rows with packed weights: `out = x W^T`, in f32.
//!
//! Each element of the result is one chain of additions in ascending `k`, whatever the tile: a tile holds its partial sums
//! in registers, and where `k` is cut so that weights stay in the second-level cache, partial sums pass through `out` unrounded.

use std::marker::PhantomData;
use std::ops::Range;

use super::pack::{PANEL_COLUMNS, PackedMatrix, WeightType};
use super::product::{Ahead, Half, Paired, Product, Single};
use super::quantize::{Q4, Q8};
use super::rows::PackedGroup;
use super::simd::{Kernel, Simd};
use crate::crew::Member;

/// A rectangle of a row-major f32 matrix, which several threads may share by splitting off columns.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    first: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
    data: PhantomData<&'a mut [f32]>,
}

// SAFETY: it is an exclusive borrow of its elements.
unsafe impl Send for MatrixMut<'_> {}

impl<'a> MatrixMut<'a> {
    /// The first `cols` of every `stride` elements of `data`.
    ///
    /// # Panics
    /// When `data` is too short for `rows` rows.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(
            cols <= stride,
            "rows of {cols} overlap with a stride of {stride}"
        );
        assert!(
            rows == 0 || data.len() >= (rows - 1) * stride + cols,
            "{} elements are too few for [{rows}, {cols}] with a stride of {stride}",
            data.len(),
        );
        MatrixMut {
            first: data.as_mut_ptr(),
            rows,
            cols,
            stride,
            data: PhantomData,
        }
    }

    /// Rows of the rectangle.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the rectangle.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// One row.
    ///
    /// # Panics
    /// When there are not so many.
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows);
        // SAFETY: the row is within the borrow, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(row * self.stride), self.cols) }
    }

    /// The same rectangle, for a while.
    pub fn reborrow(&mut self) -> MatrixMut<'_> {
        MatrixMut { ..*self }
    }

    /// Rows `rows` and columns `cols` of it.
    ///
    /// # Safety
    /// The rectangle lies within this one, and while it lives nothing else touches it.
    pub(crate) unsafe fn part(&self, rows: Range<usize>, cols: Range<usize>) -> MatrixMut<'a> {
        debug_assert!(rows.end <= self.rows && cols.end <= self.cols);
        MatrixMut {
            // Wrapping, for a matrix without rows has no elements to point at.
            first: self
                .first
                .wrapping_add(rows.start * self.stride + cols.start),
            rows: rows.len(),
            cols: cols.len(),
            ..*self
        }
    }

    /// Columns `..at` and columns `at..`.
    ///
    /// # Panics
    /// When there are fewer than `at`.
    pub fn split_columns(self, at: usize) -> (Self, Self) {
        assert!(at <= self.cols);
        let right = MatrixMut {
            // Wrapping, for a matrix without rows has no elements to point at.
            first: self.first.wrapping_add(at),
            cols: self.cols - at,
            ..self
        };
        (MatrixMut { cols: at, ..self }, right)
    }
}

/// What a sum starts from.
#[derive(Debug, Clone, Copy)]
pub enum Start<'a> {
    /// Zero: the result overwrites.
    Zero,
    /// A bias per column of the range, likewise overwriting.
    Bias(&'a [f32]),
    /// What stands there.
    Present,
}

/// Multiplies packed rows with the panels `panels` of `w`; `out` is `[rows, columns of those panels]`.
///
/// A panel's result does not depend on the range it was asked for in.
///
/// # Panics
/// When shapes or weight types disagree.
pub fn gemm<'x>(
    x: impl Into<PackedGroup<'x>>,
    w: &PackedMatrix,
    panels: Range<usize>,
    out: MatrixMut<'_>,
    start: Start<'_>,
) {
    let x = x.into();
    assert_eq!(
        (x.k(), x.kind()),
        (w.k(), w.kind()),
        "rows were packed for other weights"
    );
    assert!(panels.start <= panels.end && panels.end <= w.panels());
    let columns = w.n().min(panels.end * PANEL_COLUMNS) - w.n().min(panels.start * PANEL_COLUMNS);
    assert_eq!(
        (out.rows, out.cols),
        (x.rows(), columns),
        "the result has another shape"
    );
    if let Start::Bias(bias) = start {
        assert_eq!(bias.len(), columns, "a bias has one value a column");
    }
    x.isa().run(Gemm {
        x,
        w,
        panels,
        out,
        start,
    });
}

/// Pieces that each thread should get of an operation, so that none waits long for the last.
const PIECES_PER_THREAD: usize = 16;
/// Weights of a piece, if there are enough: some microseconds' worth.
const PIECE_BYTES: usize = 64 << 10;

/// Columns into which to cut the products of `groups` groups of rows with as many matrices like `w`, where a piece takes the same columns of `matrices` of them.
pub(crate) fn columns_per_piece(
    crew: &Member,
    groups: usize,
    matrices: usize,
    w: &PackedMatrix,
) -> usize {
    if crew.threads() == 1 {
        return w.n();
    }
    let panel_bytes = w.panel_bytes() * matrices;
    let even = (w.panels() * groups).div_ceil(crew.threads() * PIECES_PER_THREAD);
    let panels = even.max(PIECE_BYTES / panel_bytes).clamp(1, w.panels());
    panels * PANEL_COLUMNS
}

/// Words of a panel that all row tiles pass over before the next ones: 128 KiB, which stay in the second-level cache.
const BLOCK_WORDS: usize = 32 << 10;
/// Words ahead of the current ones that are asked for when weights stream from memory.
const PREFETCH_WORDS: usize = 1024;
/// Tallest tile of any instruction set.
const MOST_ROWS: usize = 14;

struct Gemm<'a> {
    x: PackedGroup<'a>,
    w: &'a PackedMatrix,
    panels: Range<usize>,
    out: MatrixMut<'a>,
    start: Start<'a>,
}

impl Kernel for Gemm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.w.kind() {
            WeightType::F32 => self.products::<S, Single>(s),
            WeightType::F16 => self.products::<S, Half>(s),
            WeightType::Bf16 => self.products::<S, Paired>(s),
            WeightType::Q8 => self.products::<S, Q8>(s),
            WeightType::Q4 => self.products::<S, Q4>(s),
        }
    }
}

impl Gemm<'_> {
    #[inline(always)]
    fn products<S: Simd, P: Product>(self, s: S) {
        let Gemm {
            x,
            w,
            panels,
            out,
            start,
        } = self;
        let (steps, tiles) = (w.steps(), x.tiles());
        let step_words = P::KIND.step_words();
        // With one tile nothing is read twice, and a panel is best read through.
        let block = if tiles == 1 {
            steps.max(1)
        } else {
            BLOCK_WORDS / step_words
        };
        let mut edge = [0.0f32; MOST_ROWS * PANEL_COLUMNS];
        for first_step in (0..steps.max(1)).step_by(block) {
            let count = block.min(steps - first_step);
            let mut panel = panels.start;
            while panel < panels.end {
                let columns = w.columns(panel);
                let column = (panel - panels.start) * PANEL_COLUMNS;
                let weights = w.panel(panel)[first_step * step_words..].as_ptr();
                for tile in 0..tiles {
                    let rows = x.tile_rows(tile);
                    let height = rows.len();
                    let values = x.tile(&rows)[first_step * height * P::units::<S>()..].as_ptr();
                    // SAFETY: the shapes asserted in `gemm`: the row and the column lie within `out`.
                    let place = unsafe { out.first.add(rows.start * out.stride + column) };
                    let whole = columns == PANEL_COLUMNS;
                    let (to, stride) = if whole {
                        (place, out.stride)
                    } else {
                        (edge.as_mut_ptr(), PANEL_COLUMNS)
                    };
                    let mut fresh = false;
                    if first_step == 0 {
                        match start {
                            Start::Zero => fresh = true,
                            Start::Present => {}
                            Start::Bias(bias) => {
                                let last = (column + columns).min(bias.len());
                                for row in 0..height {
                                    // SAFETY: as for `place`; the bias is as long as a row of `out`.
                                    unsafe {
                                        bias.as_ptr().add(column).copy_to_nonoverlapping(
                                            place.add(row * out.stride),
                                            last - column,
                                        );
                                    }
                                }
                            }
                        }
                    }
                    if !whole && !fresh {
                        for row in 0..height {
                            // SAFETY: `columns` values of a row of `out` and of `edge`.
                            unsafe {
                                place
                                    .add(row * out.stride)
                                    .copy_to_nonoverlapping(to.add(row * stride), columns);
                            }
                        }
                    }
                    // A lone tile asks for its own stream a little ahead. Of several, each asks for its share of
                    // the next panel, which so is in the second-level cache when its turn comes.
                    let (ahead, ahead_words) = if tiles == 1 {
                        (weights.wrapping_add(PREFETCH_WORDS), step_words)
                    } else {
                        let next = weights.wrapping_add(steps * step_words);
                        (
                            next.wrapping_add(tile * count * step_words / tiles),
                            step_words.div_ceil(tiles),
                        )
                    };
                    s.call(TileCall::<P> {
                        weights,
                        ahead,
                        ahead_words,
                        values,
                        height,
                        steps: count,
                        to,
                        stride,
                        fresh,
                        product: PhantomData,
                    });
                    if !whole {
                        for row in 0..height {
                            // SAFETY: as above.
                            unsafe {
                                to.add(row * stride)
                                    .copy_to_nonoverlapping(place.add(row * out.stride), columns);
                            }
                        }
                    }
                }
                panel += 1;
            }
        }
    }
}

/// One tile: `height` rows by one panel.
///
/// `weights` points at the words of `steps` steps, `values` at `steps * height * P::units()`, `to` at `height`
/// rows of 32 values `stride` apart, which are overwritten if `fresh` and added to otherwise.
struct TileCall<P> {
    weights: *const u32,
    /// What is asked for in the first step, and how many words further in each one after; need not be valid memory.
    ahead: *const u32,
    ahead_words: usize,
    values: *const u32,
    height: usize,
    steps: usize,
    to: *mut f32,
    stride: usize,
    fresh: bool,
    product: PhantomData<P>,
}

impl<P: Product> Kernel for TileCall<P> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: the struct's promises, and the widths below add up to a panel.
        unsafe {
            let w = self.weights;
            match self.height {
                1 => self.tile::<S, 1, 2>(s, w, 0),
                2 => self.tile::<S, 2, 2>(s, w, 0),
                _ if S::NARROW => {
                    for half in [0, 16] {
                        match self.height {
                            3 => self.tile::<S, 3, 1>(s, w, half),
                            4 => self.tile::<S, 4, 1>(s, w, half),
                            5 => self.tile::<S, 5, 1>(s, w, half),
                            _ => self.tile::<S, 6, 1>(s, w, half),
                        }
                    }
                }
                _ => match self.height {
                    3 => self.tile::<S, 3, 2>(s, w, 0),
                    4 => self.tile::<S, 4, 2>(s, w, 0),
                    5 => self.tile::<S, 5, 2>(s, w, 0),
                    6 => self.tile::<S, 6, 2>(s, w, 0),
                    7 => self.tile::<S, 7, 2>(s, w, 0),
                    8 => self.tile::<S, 8, 2>(s, w, 0),
                    9 => self.tile::<S, 9, 2>(s, w, 0),
                    10 => self.tile::<S, 10, 2>(s, w, 0),
                    11 => self.tile::<S, 11, 2>(s, w, 0),
                    12 => self.tile::<S, 12, 2>(s, w, 0),
                    13 => self.tile::<S, 13, 2>(s, w, 0),
                    _ => self.tile::<S, 14, 2>(s, w, 0),
                },
            }
        }
    }
}

impl<P: Product> TileCall<P> {
    /// `M` rows by `C` times sixteen columns of the panel, from `column` on.
    ///
    /// # Safety
    /// The struct's promises, with `M` the height, and the columns within the panel.
    #[inline(always)]
    unsafe fn tile<S: Simd, const M: usize, const C: usize>(
        &self,
        s: S,
        w: *const u32,
        column: usize,
    ) {
        let units = P::units::<S>();
        let step_words = P::KIND.step_words();
        let place = |m: usize, c: usize| {
            self.to
                .wrapping_add(m * self.stride + column + c * 16)
                .cast::<[f32; 16]>()
        };
        let mut sums = [[s.splat(0.0); C]; M];
        if !self.fresh {
            for m in 0..M {
                for c in 0..C {
                    // SAFETY: within `to`.
                    sums[m][c] = unsafe { s.load(&*place(m, c)) };
                }
            }
        }
        for step in 0..self.steps {
            let ahead = Ahead {
                from: self.ahead.wrapping_add(step * self.ahead_words),
                words: self.ahead_words / P::PIECES,
            };
            let w = w.wrapping_add(step * step_words);
            let x = self.values.wrapping_add(step * M * units);
            // SAFETY: within the words of the panel and of `values`.
            unsafe { P::add::<S, M, C>(s, &mut sums, w, column, x, ahead) };
        }
        for m in 0..M {
            for c in 0..C {
                // SAFETY: within `to`.
                unsafe { s.store(sums[m][c], &mut *place(m, c)) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Arena, Isa, PackedRows, Rows};
    use crate::testing::{Random, matrix};
    use crate::weights::ElementType;
    use proptest::prelude::*;

    /// A random matrix of a type, and its weights as they were rounded, `[n, k]`.
    fn packed(kind: WeightType, n: usize, k: usize, seed: u64) -> (PackedMatrix, Vec<f32>) {
        let view = matrix(&mut Random::new(seed), n, k, 1.0, ElementType::F32, false);
        let mut crew = Member::alone();
        let mut arena = Arena::new(PackedMatrix::bytes(kind, n, k).unwrap(), &mut crew);
        let packed = PackedMatrix::pack(&mut arena, kind, std::slice::from_ref(&view));
        let mut dense = vec![0.0; n * k];
        for (row, place) in dense.chunks_exact_mut(k).enumerate() {
            packed.read_row(row, place);
        }
        (packed, dense)
    }

    /// A row of activations as products with weights of a type see it.
    fn rounded(kind: WeightType, x: &[f32]) -> Vec<f64> {
        let group = match kind {
            WeightType::F32 | WeightType::F16 => {
                return x.iter().map(|x| f64::from(*x)).collect();
            }
            WeightType::Bf16 => {
                return x
                    .iter()
                    .map(|x| half::bf16::from_f32(*x).to_f64())
                    .collect();
            }
            WeightType::Q8 => 64,
            WeightType::Q4 => 32,
        };
        let quantized = x.chunks(group).flat_map(|x| {
            let scale = x.iter().fold(0.0, |most: f32, x| most.max(x.abs())) / 127.0;
            x.iter()
                .map(move |x| f64::from((x * (1.0 / scale)).round_ties_even()) * f64::from(scale))
        });
        quantized.collect()
    }

    fn product(isa: Isa, w: &PackedMatrix, x: &[f32], m: usize, start: Start<'_>, out: &mut [f32]) {
        product_of(isa, w, Rows::F32(x), m, start, out);
    }

    fn product_of(
        isa: Isa,
        w: &PackedMatrix,
        x: Rows<'_>,
        m: usize,
        start: Start<'_>,
        out: &mut [f32],
    ) {
        let mut rows = PackedRows::new(isa, m, w.k());
        rows.pack(w.kind(), x, m, w.k());
        gemm(
            &rows,
            w,
            0..w.panels(),
            MatrixMut::new(out, m, w.n(), w.n()),
            start,
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        #[test]
        fn products_are_those_of_f64(
            m in 1usize..45, n in 1usize..150, k in 1usize..300,
            kind in prop::sample::select(WeightType::ALL.to_vec()),
            start in 0usize..3, seed: u64,
        ) {
            let (w, dense) = packed(kind, n, k, seed);
            let mut random = Random::new(seed ^ 1);
            let x = random.values(m * k, 1.0);
            let bias = random.values(n, 1.0);
            let present = random.values(m * n, 1.0);
            let exact: Vec<Vec<f64>> = x.chunks_exact(k).map(|x| rounded(kind, x)).collect();
            for isa in Isa::available() {
                let mut out = present.clone();
                let begin = [Start::Zero, Start::Bias(&bias), Start::Present][start];
                product(isa, &w, &x, m, begin, &mut out);
                for row in 0..m {
                    for column in 0..n {
                        let mut sum = [0.0, f64::from(bias[column]), f64::from(present[row * n + column])][start];
                        let mut size = sum.abs();
                        for i in 0..k {
                            let term = exact[row][i] * f64::from(dense[column * k + i]);
                            sum += term;
                            size += term.abs();
                        }
                        let found = f64::from(out[row * n + column]);
                        prop_assert!((found - sum).abs() <= 2e-6 * size + 1e-30, "{isa:?} {kind:?} {found} {sum}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_every_tile_and_from_bf16_bits() {
        // k crosses a block of steps, so that partial sums pass through memory for some heights and not for others.
        for (kind, k) in [
            (WeightType::F32, 1500),
            (WeightType::F16, 2500),
            (WeightType::Bf16, 2601),
            (WeightType::Q8, 4100),
            (WeightType::Q4, 7400),
        ] {
            assert!(w_words(kind, k) > BLOCK_WORDS);
            let n = 75;
            let (w, _) = packed(kind, n, k, 3);
            let bits: Vec<u16> = Random::new(4)
                .values(40 * k, 1.0)
                .iter()
                .map(|x| half::bf16::from_f32(*x).to_bits())
                .collect();
            let x: Vec<f32> = bits
                .iter()
                .map(|x| half::bf16::from_bits(*x).to_f32())
                .collect();
            for isa in Isa::available() {
                let mut alone = vec![0.0; 40 * n];
                for row in 0..40 {
                    let place = &mut alone[row * n..][..n];
                    product(isa, &w, &x[row * k..][..k], 1, Start::Zero, place);
                }
                for m in 1..=40 {
                    let mut out = vec![0.0; m * n];
                    product(isa, &w, &x[..m * k], m, Start::Zero, &mut out);
                    assert!(out == alone[..m * n], "{isa:?} {kind:?} {m} rows");
                }
                let mut out = vec![0.0; 40 * n];
                product_of(isa, &w, Rows::Bf16(&bits), 40, Start::Zero, &mut out);
                assert!(out == alone, "{isa:?} {kind:?} from bits");
            }
        }
    }

    fn w_words(kind: WeightType, k: usize) -> usize {
        kind.steps(k) * kind.step_words()
    }

    #[test]
    fn panels_computed_apart_give_the_whole() {
        let (n, k) = (175, 96);
        let x = Random::new(6).values(3 * k, 1.0);
        for kind in WeightType::ALL {
            let (w, _) = packed(kind, n, k, 5);
            for isa in Isa::available() {
                for m in [1, 3] {
                    let x = &x[..m * k];
                    let (mut whole, mut parts) = (vec![0.0; m * n], vec![0.0; m * n]);
                    product(isa, &w, x, m, Start::Zero, &mut whole);
                    let mut rows = PackedRows::new(isa, m, k);
                    rows.pack(kind, Rows::F32(x), m, k);
                    let (left, right) = MatrixMut::new(&mut parts, m, n, n).split_columns(96);
                    let (none, right) = right.split_columns(0);
                    gemm(&rows, &w, 3..3, none, Start::Zero);
                    gemm(&rows, &w, 3..6, right, Start::Zero);
                    gemm(&rows, &w, 0..3, left, Start::Zero);
                    assert_eq!(whole, parts, "{isa:?} {kind:?}");
                }
            }
        }
    }

    #[test]
    fn instruction_sets_agree_bit_for_bit() {
        for kind in WeightType::ALL {
            let (w, _) = packed(kind, 40, 333, 7);
            let x = Random::new(8).values(9 * 333, 1.0);
            let results: Vec<Vec<f32>> = Isa::available()
                .filter(|isa| match isa.instruction_set().name() {
                    "portable" => false,
                    "avx512-bf16" | "neon-bf16" => kind != WeightType::Bf16,
                    _ => true,
                })
                .map(|isa| {
                    let mut out = vec![0.0; 9 * 40];
                    product(isa, &w, &x, 9, Start::Zero, &mut out);
                    out
                })
                .collect();
            assert!(
                results.windows(2).all(|pair| pair[0] == pair[1]),
                "{kind:?}"
            );
        }
    }

    #[test]
    fn weights_in_f16_give_the_bits_of_the_same_weights_in_f32() {
        let (n, k, m) = (70, 131, 9);
        let view = matrix(&mut Random::new(1), n, k, 1.0, ElementType::F16, false);
        let x = Random::new(2).values(m * k, 1.0);
        for isa in Isa::available() {
            let results = [WeightType::F16, WeightType::F32].map(|kind| {
                let mut crew = Member::alone();
                let mut arena = Arena::new(PackedMatrix::bytes(kind, n, k).unwrap(), &mut crew);
                let w = PackedMatrix::pack(&mut arena, kind, std::slice::from_ref(&view));
                let mut out = vec![0.0; m * n];
                product(isa, &w, &x, m, Start::Zero, &mut out);
                out
            });
            assert_eq!(results[0], results[1], "{isa:?}");
        }
    }

    #[test]
    fn what_is_no_number_stays_in_its_row_and_column() {
        let (n, k, m) = (40, 100, 5);
        for kind in WeightType::ALL {
            for broken in [f32::NAN, f32::INFINITY] {
                let mut view = matrix(&mut Random::new(1), n, k, 1.0, ElementType::F32, false);
                view.data.to_mut()[(7 * k + 70) * 4..][..4].copy_from_slice(&broken.to_le_bytes());
                let mut crew = Member::alone();
                let mut arena = Arena::new(PackedMatrix::bytes(kind, n, k).unwrap(), &mut crew);
                let w = PackedMatrix::pack(&mut arena, kind, std::slice::from_ref(&view));
                let mut x = Random::new(2).values(m * k, 1.0);
                x[3 * k + 99] = broken;
                for isa in Isa::available() {
                    let mut out = vec![0.0; m * n];
                    product(isa, &w, &x, m, Start::Zero, &mut out);
                    for (i, found) in out.iter().enumerate() {
                        let sound = i / n != 3 && i % n != 7;
                        assert_eq!(found.is_finite(), sound, "{isa:?} {kind:?} {i}");
                    }
                }
            }
        }
    }

    #[test]
    fn no_rows_and_no_inputs_are_no_trouble() {
        for kind in WeightType::ALL {
            let (w, _) = packed(kind, 5, 3, 1);
            product(Isa::detect(), &w, &[], 0, Start::Zero, &mut []);
        }
    }
}

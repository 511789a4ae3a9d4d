//! How one step of a panel is multiplied with the same step of some rows: an implementation for each type of weights.

use super::pack::{PANEL_COLUMNS, WeightType};
use super::quantize::{Q4, Q8, Quantized, SCALE_WORDS};
use super::simd::Simd;

/// Partial sums of `M` rows by `C` times sixteen columns of a panel.
pub(super) type Sums<V, const M: usize, const C: usize> = [[V; C]; M];

/// The line that is asked for with the first words of a step, and how many words further on with each 32 words of weights after
/// those. It need not be valid memory.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    pub(super) from: *const u32,
    pub(super) words: usize,
}

#[inline(always)]
fn ask<S: Simd>(s: S, ahead: Ahead, piece: usize) {
    let from = ahead.from.wrapping_add(piece * ahead.words);
    s.prefetch(from);
    s.prefetch(from.wrapping_add(16));
}

/// An expression's values for columns `16 * c..` of `C` times sixteen. Not a function of a closure: closures
/// are not sure to be compiled with the features of their caller.
macro_rules! tile {
    ($c:ident => $value:expr) => {{
        let first = {
            let $c = 0;
            $value
        };
        let mut all = [first; C];
        for $c in 0..C {
            all[$c] = $value;
        }
        all
    }};
}

/// One type of weights, multiplied.
pub(super) trait Product {
    /// The type.
    const KIND: WeightType;
    /// Times that a step asks for what is ahead.
    const PIECES: usize = 1;

    /// u32 of one row's activations in a step.
    fn units<S: Simd>() -> usize;

    /// Adds a step of the panel `w`, from column `column` on, to `sums`.
    ///
    /// # Safety
    /// `w` points at a step's words of a panel, `column + 16 * C` is at most 32, and `x` points at `M * units` words.
    unsafe fn add<S: Simd, const M: usize, const C: usize>(
        s: S,
        sums: &mut Sums<S::V, M, C>,
        w: *const u32,
        column: usize,
        x: *const u32,
        ahead: Ahead,
    );
}

/// f32.
pub(super) struct Single;

impl Product for Single {
    const KIND: WeightType = WeightType::F32;

    #[inline(always)]
    fn units<S: Simd>() -> usize {
        1
    }

    #[inline(always)]
    unsafe fn add<S: Simd, const M: usize, const C: usize>(
        s: S,
        sums: &mut Sums<S::V, M, C>,
        w: *const u32,
        column: usize,
        x: *const u32,
        ahead: Ahead,
    ) {
        let weights = tile!(c => {
            // SAFETY: the caller's promise; every word is an f32, and f32 and u32 align alike.
            unsafe { s.load(&*w.add(column + c * 16).cast::<[f32; 16]>()) }
        });
        ask(s, ahead, 0);
        // SAFETY: the caller's promise.
        unsafe { add_wide(s, sums, weights, x) };
    }
}

/// f16, widened as it is loaded: the sums are those of the same weights in f32.
pub(super) struct Half;

impl Product for Half {
    const KIND: WeightType = WeightType::F16;

    #[inline(always)]
    fn units<S: Simd>() -> usize {
        1
    }

    #[inline(always)]
    unsafe fn add<S: Simd, const M: usize, const C: usize>(
        s: S,
        sums: &mut Sums<S::V, M, C>,
        w: *const u32,
        column: usize,
        x: *const u32,
        ahead: Ahead,
    ) {
        let weights = tile!(c => {
            // SAFETY: the caller's promise; a word is two f16.
            unsafe { s.load_f16(&*w.cast::<u16>().add(column + c * 16).cast::<[u16; 16]>()) }
        });
        ask(s, ahead, 0);
        // SAFETY: the caller's promise.
        unsafe { add_wide(s, sums, weights, x) };
    }
}

/// bf16, two inputs a step.
pub(super) struct Paired;

impl Product for Paired {
    const KIND: WeightType = WeightType::Bf16;

    #[inline(always)]
    fn units<S: Simd>() -> usize {
        S::PAIR_UNITS
    }

    #[inline(always)]
    unsafe fn add<S: Simd, const M: usize, const C: usize>(
        s: S,
        sums: &mut Sums<S::V, M, C>,
        w: *const u32,
        column: usize,
        x: *const u32,
        ahead: Ahead,
    ) {
        // SAFETY: the caller's promise.
        let weights = tile!(c => unsafe { s.load_pair(w.add(column + c * 16)) });
        ask(s, ahead, 0);
        for m in 0..M {
            let x = x.wrapping_add(m * S::PAIR_UNITS);
            for c in 0..C {
                // SAFETY: the caller's promise.
                sums[m][c] = unsafe { s.dot_pair(sums[m][c], weights[c], x) };
            }
        }
    }
}

impl Product for Q8 {
    const KIND: WeightType = WeightType::Q8;
    const PIECES: usize = Self::GROUP / 4;

    #[inline(always)]
    fn units<S: Simd>() -> usize {
        group_units::<S>(Self::GROUP)
    }

    #[inline(always)]
    unsafe fn add<S: Simd, const M: usize, const C: usize>(
        s: S,
        sums: &mut Sums<S::V, M, C>,
        w: *const u32,
        column: usize,
        x: *const u32,
        ahead: Ahead,
    ) {
        // SAFETY: the caller's promise, here and below.
        let mut integers = unsafe { offsets::<S, M, C>(s, x) };
        for quad in 0..Self::PIECES {
            let at = SCALE_WORDS + quad * PANEL_COLUMNS + column;
            // SAFETY: as above.
            let weights = tile!(c => unsafe { s.load_quad(w.add(at + c * 16)) });
            ask(s, ahead, quad);
            // SAFETY: as above.
            unsafe { add_quads(s, &mut integers, weights, quads::<S, M>(x, quad)) };
        }
        // SAFETY: as above.
        unsafe { add_scaled(s, sums, integers, w, column, x) };
    }
}

impl Product for Q4 {
    const KIND: WeightType = WeightType::Q4;
    const PIECES: usize = Self::GROUP / 8;

    #[inline(always)]
    fn units<S: Simd>() -> usize {
        group_units::<S>(Self::GROUP)
    }

    #[inline(always)]
    unsafe fn add<S: Simd, const M: usize, const C: usize>(
        s: S,
        sums: &mut Sums<S::V, M, C>,
        w: *const u32,
        column: usize,
        x: *const u32,
        ahead: Ahead,
    ) {
        // SAFETY: the caller's promise, here and below.
        let mut integers = unsafe { offsets::<S, M, C>(s, x) };
        for piece in 0..Self::PIECES {
            let at = SCALE_WORDS + piece * PANEL_COLUMNS + column;
            // SAFETY: as above.
            let both = tile!(c => unsafe { s.load_nibbles(w.add(at + c * 16)) });
            ask(s, ahead, piece);
            for half in 0..2 {
                let weights = tile!(c => both[c][half]);
                // SAFETY: as above.
                unsafe {
                    add_quads(
                        s,
                        &mut integers,
                        weights,
                        quads::<S, M>(x, 2 * piece + half),
                    )
                };
            }
        }
        // SAFETY: as above.
        unsafe { add_scaled(s, sums, integers, w, column, x) };
    }
}

/// One input's weights times each row's activation.
///
/// # Safety
/// `x` points at `M` words.
#[inline(always)]
unsafe fn add_wide<S: Simd, const M: usize, const C: usize>(
    s: S,
    sums: &mut Sums<S::V, M, C>,
    weights: [S::V; C],
    x: *const u32,
) {
    for m in 0..M {
        // SAFETY: the caller's promise.
        let x = s.splat(f32::from_bits(unsafe { *x.add(m) }));
        for c in 0..C {
            sums[m][c] = s.fma(weights[c], x, sums[m][c]);
        }
    }
}

/// Words at the head of a row's group of activations: the scale, and what the sum of products starts from.
pub(super) const HEAD_WORDS: usize = 2;

/// u32 of one row's activations in a group.
#[inline(always)]
pub(super) fn group_units<S: Simd>(group: usize) -> usize {
    HEAD_WORDS + group / 4 * S::QUAD_UNITS
}

/// Where the codes of inputs `4 * quad..` of a group's `M` rows begin.
#[inline(always)]
fn quads<S: Simd, const M: usize>(x: *const u32, quad: usize) -> *const u32 {
    x.wrapping_add((HEAD_WORDS + quad * S::QUAD_UNITS) * M)
}

/// What the sums of each row start from.
///
/// # Safety
/// `x` points at a group of `M` rows.
#[inline(always)]
unsafe fn offsets<S: Simd, const M: usize, const C: usize>(
    s: S,
    x: *const u32,
) -> Sums<S::I, M, C> {
    let mut offsets = [[s.splat_i32(0); C]; M];
    for m in 0..M {
        // SAFETY: the caller's promise.
        let offset = unsafe { *x.add(HEAD_WORDS * m + 1) };
        offsets[m] = [s.splat_i32(offset as i32); C];
    }
    offsets
}

/// # Safety
/// `x` points at four codes of each of `M` rows.
#[inline(always)]
unsafe fn add_quads<S: Simd, const M: usize, const C: usize>(
    s: S,
    integers: &mut Sums<S::I, M, C>,
    weights: [S::Quad; C],
    x: *const u32,
) {
    for m in 0..M {
        let x = x.wrapping_add(m * S::QUAD_UNITS);
        for c in 0..C {
            // SAFETY: the caller's promise.
            integers[m][c] = unsafe { s.dot_quad(integers[m][c], weights[c], x) };
        }
    }
}

/// Scales a group's sums and adds them.
///
/// # Safety
/// As for [`Product::add`].
#[inline(always)]
unsafe fn add_scaled<S: Simd, const M: usize, const C: usize>(
    s: S,
    sums: &mut Sums<S::V, M, C>,
    integers: Sums<S::I, M, C>,
    w: *const u32,
    column: usize,
    x: *const u32,
) {
    let scales = tile!(c => {
        // SAFETY: the caller's promise; a group's first words are 32 bf16.
        unsafe { s.load_bf16(&*w.cast::<u16>().add(column + c * 16).cast::<[u16; 16]>()) }
    });
    for m in 0..M {
        // SAFETY: the caller's promise.
        let scale = s.splat(f32::from_bits(unsafe { *x.add(HEAD_WORDS * m) }));
        for c in 0..C {
            let both = s.mul(scales[c], scale);
            sums[m][c] = s.fma(s.to_f32(integers[m][c]), both, sums[m][c]);
        }
    }
}

//! Numbers of 8 and of 4 bits: what weights become when they are quantised, and activations that are multiplied with them.
//!
//! Weights of one output feature are taken in groups along `k`. A group has one scale in bf16 and a code for each weight: the
//! weight is `(code - zero) * scale`. The scale is bf16, not f16 as in most formats, because it has the range of f32 for
//! the same two bytes: no group is too small or too large for it, and widening it is a shift. What it lacks in digits costs
//! nothing, as codes are chosen for the scale as it was rounded.
//!
//! | | group | codes | zero | bits a weight |
//! |---|---|---|---|---|
//! | Q8 | 64 | 1 to 255 | 128 | 8.25 |
//! | Q4 | 32 | 0 to 15 | 8 | 4.5 |
//!
//! Activations get, for each row and group, a scale in f32 and codes of -127 to 127. So a group's part of a product is
//! `(sum of weight code * activation code - zero * sum of activation codes) * scale * scale`, in which both sums are integers. The
//! second one is made when rows are packed, and is what the first one starts from.
//!
//! A weight that is not a number, or infinite, makes its column's results NaN, and such an activation its row's. Everything here is
//! IEEE arithmetic without fused operations, so codes are the same on every instruction set.

use super::pack::PANEL_COLUMNS;
use super::simd::{Simd, bf16_bits, bf16_value};

/// Words that the scales of a panel's columns take at the head of each group.
pub(super) const SCALE_WORDS: usize = PANEL_COLUMNS / 2;

/// A type of quantised weights.
pub(super) trait Quantized {
    /// Weights of one column that share a scale.
    const GROUP: usize;
    /// The code of 0.
    const ZERO: u8;
    /// Words of a panel that a group takes.
    const WORDS: usize;

    /// A scale in bf16 and codes for `GROUP` weights. The slices are that long.
    fn quantize<S: Simd>(s: S, weights: &[f32], codes: &mut [u8]) -> u16;
    /// Writes one column's codes into the panel's words behind the scales.
    fn store(codes: &[u8], column: usize, words: &mut [u32]);
    /// The code of weight `i` of a column.
    fn code(words: &[u32], column: usize, i: usize) -> u8;

    /// Weight `k` of a column, from the words of its panel.
    fn weight(panel: &[u32], column: usize, k: usize) -> f32 {
        let group = &panel[k / Self::GROUP * Self::WORDS..][..Self::WORDS];
        let (i, (scales, words)) = (k % Self::GROUP, group.split_at(SCALE_WORDS));
        let scale = bf16_value(bytemuck::cast_slice::<u32, u16>(scales)[column]);
        f32::from(i16::from(Self::code(words, column, i)) - i16::from(Self::ZERO)) * scale
    }
}

/// 8 bits: four weights a word, in ascending `k`.
pub(super) struct Q8;

impl Quantized for Q8 {
    const GROUP: usize = 64;
    const ZERO: u8 = 128;
    const WORDS: usize = SCALE_WORDS + Self::GROUP / 4 * PANEL_COLUMNS;

    #[inline(always)]
    fn quantize<S: Simd>(s: S, weights: &[f32], codes: &mut [u8]) -> u16 {
        let largest = magnitude(weights);
        if !largest.is_finite() {
            codes.fill(Self::ZERO);
            return NAN_BF16;
        }
        // Rounded up, so that the largest weight's code is not beyond 127.
        let scale = ((u64::from((largest / 127.0).to_bits()) + 0xffff) >> 16) as u16;
        let inverse = inverse(bf16_value(scale));
        round(s, weights, inverse, codes);
        for code in codes {
            *code = code.wrapping_add(Self::ZERO);
        }
        if inverse == 0.0 { 0 } else { scale }
    }

    #[inline(always)]
    fn store(codes: &[u8], column: usize, words: &mut [u32]) {
        let places = words.chunks_exact_mut(PANEL_COLUMNS);
        for (place, four) in places.zip(codes.as_chunks::<4>().0) {
            place[column] = u32::from_le_bytes(*four);
        }
    }

    fn code(words: &[u32], column: usize, i: usize) -> u8 {
        words[i / 4 * PANEL_COLUMNS + column].to_le_bytes()[i % 4]
    }
}

/// 4 bits: eight weights a word, the first four in the low halves of its bytes and the next four in the high ones.
pub(super) struct Q4;

/// Codes that the weight of largest magnitude is tried at, less the zero. The codes are lopsided (-8 to 7), so it is given the
/// negative end; beyond -8 it is clipped, in favour of all the others. More candidates lower the error by less than a hundredth.
const Q4_ENDS: [f32; 4] = [-7.3, -8.0, -8.7, -9.5];

impl Quantized for Q4 {
    const GROUP: usize = 32;
    const ZERO: u8 = 8;
    const WORDS: usize = SCALE_WORDS + Self::GROUP / 8 * PANEL_COLUMNS;

    /// Of the candidates for the scale, takes the one with the least squared error, each at its best: codes `q` of weights `w`
    /// are best scaled by `sum(w q) / sum(q q)`, which takes `sum(w q)^2 / sum(q q)` off the squared error.
    #[inline(always)]
    fn quantize<S: Simd>(s: S, weights: &[f32], codes: &mut [u8]) -> u16 {
        codes.fill(Self::ZERO);
        let largest = magnitude(weights);
        if !largest.is_finite() {
            return NAN_BF16;
        }
        if inverse(largest) == 0.0 {
            return 0;
        }
        let (sixteens, _) = weights.as_chunks::<16>();
        let w = [s.load(&sixteens[0]), s.load(&sixteens[1])];
        let top = s.max(w[0], w[1]);
        let extreme = if s.largest(top) == largest {
            largest
        } else {
            -largest
        };
        // Relative to the extreme, so that squares neither vanish nor overflow.
        let unit = s.splat(1.0 / extreme);
        let relative = [s.mul(w[0], unit), s.mul(w[1], unit)];
        // No division and no branch in the loop: groups are quantised overlapping each other, until a branch is mispredicted.
        let (mut best_wq, mut best_qq) = (0.0, 1.0);
        for end in Q4_ENDS {
            let q = [
                q4_integers(s, relative[0], end),
                q4_integers(s, relative[1], end),
            ];
            let wq = s.sum(s.add(s.mul(relative[0], q[0]), s.mul(relative[1], q[1])));
            let qq = s.sum(s.add(s.mul(q[0], q[0]), s.mul(q[1], q[1])));
            let better = wq * wq * best_qq > best_wq * best_wq * qq;
            best_wq = if better { wq } else { best_wq };
            best_qq = if better { qq } else { best_qq };
        }
        let scale = bf16_bits(best_wq / best_qq * extreme);
        let inverse = inverse(bf16_value(scale));
        if inverse == 0.0 {
            return 0;
        }
        for (w, codes) in w.into_iter().zip(codes.chunks_exact_mut(16)) {
            let mut lanes = [0.0; 16];
            s.store(
                s.add(q4_integers(s, w, inverse), s.splat(MAGIC)),
                &mut lanes,
            );
            for (code, lane) in codes.iter_mut().zip(lanes) {
                *code = (lane.to_bits() as u8).wrapping_add(Self::ZERO);
            }
        }
        scale
    }

    #[inline(always)]
    fn store(codes: &[u8], column: usize, words: &mut [u32]) {
        let places = words.chunks_exact_mut(PANEL_COLUMNS);
        for (place, eight) in places.zip(codes.as_chunks::<8>().0) {
            let eight = u64::from_le_bytes(*eight);
            place[column] = (eight | eight >> 28) as u32;
        }
    }

    fn code(words: &[u32], column: usize, i: usize) -> u8 {
        let byte = words[i / 8 * PANEL_COLUMNS + column].to_le_bytes()[i % 4];
        byte >> (i % 8 / 4 * 4) & 15
    }
}

/// `round(w * inverse)` within the range of 4 bits.
#[inline(always)]
fn q4_integers<S: Simd>(s: S, w: S::V, inverse: f32) -> S::V {
    let magic = s.splat(MAGIC);
    let q = s.sub(s.add(s.mul(w, s.splat(inverse)), magic), magic);
    s.min(s.max(q, s.splat(-8.0)), s.splat(7.0))
}

/// The scale of a group of activations, and their codes as bytes.
#[inline(always)]
pub(super) fn quantize_activations<S: Simd>(s: S, x: &[f32], codes: &mut [u8]) -> f32 {
    let largest = magnitude(x);
    if !largest.is_finite() {
        codes.fill(0);
        return f32::NAN;
    }
    let scale = largest / 127.0;
    round(s, x, inverse(scale), codes);
    scale
}

const NAN_BF16: u16 = 0x7fc0;
/// Added to a small number, it leaves the nearest integer (ties to even) in the low bits of the mantissa.
const MAGIC: f32 = 12_582_912.0;

/// The largest magnitude; not finite if any value is not. Magnitudes order as the bits do, NaN above infinity.
#[inline(always)]
fn magnitude(values: &[f32]) -> f32 {
    let bits = values.iter().map(|value| value.to_bits() & 0x7fff_ffff);
    f32::from_bits(bits.fold(0, u32::max))
}

/// `1 / scale`, or 0 for a scale too small to have one (below 3e-39): such a group is taken for zeros.
#[inline(always)]
fn inverse(scale: f32) -> f32 {
    let inverse = 1.0 / scale;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// Codes `round(value * inverse)`, in two's complement. There are a multiple of sixteen values.
#[inline(always)]
fn round<S: Simd>(s: S, values: &[f32], inverse: f32, codes: &mut [u8]) {
    let (inverse, magic) = (s.splat(inverse), s.splat(MAGIC));
    for (values, codes) in values
        .as_chunks::<16>()
        .0
        .iter()
        .zip(codes.chunks_exact_mut(16))
    {
        let mut lanes = [0.0; 16];
        s.store(s.add(s.mul(s.load(values), inverse), magic), &mut lanes);
        for (code, lane) in codes.iter_mut().zip(lanes) {
            *code = lane.to_bits() as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Isa;
    use crate::kernels::simd::Kernel;
    use crate::testing::Random;
    use proptest::prelude::*;
    use std::marker::PhantomData;

    struct Quantize<'a, Q>(&'a [f32], PhantomData<Q>);
    impl<Q: Quantized> Kernel for Quantize<'_, Q> {
        type Output = (u16, Vec<u8>);
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> (u16, Vec<u8>) {
            let mut codes = vec![0; Q::GROUP];
            let scale = Q::quantize(s, self.0, &mut codes);
            (scale, codes)
        }
    }

    struct Activations<'a>(&'a [f32]);
    impl Kernel for Activations<'_> {
        type Output = (f32, Vec<u8>);
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> (f32, Vec<u8>) {
            let mut codes = vec![0; self.0.len()];
            let scale = quantize_activations(s, self.0, &mut codes);
            (scale, codes)
        }
    }

    /// What weights become, which is the same on every instruction set.
    fn quantized<Q: Quantized>(weights: &[f32]) -> Vec<f32> {
        let results: Vec<_> = Isa::available()
            .map(|isa| isa.run(Quantize::<Q>(weights, PhantomData)))
            .collect();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
        let (scale, codes) = &results[0];
        codes
            .iter()
            .map(|code| (f32::from(*code) - f32::from(Q::ZERO)) * bf16_value(*scale))
            .collect()
    }

    /// Values of a normal distribution, nearly: sums of twelve uniform ones.
    fn normal(random: &mut Random, len: usize) -> Vec<f32> {
        (0..len)
            .map(|_| random.values(12, 0.5).iter().sum())
            .collect()
    }

    /// Root of the mean squared error over that of the values.
    fn error(pairs: impl Iterator<Item = (f32, f32)>) -> f64 {
        let (mut off, mut all) = (0.0, 0.0);
        for (found, exact) in pairs {
            off += f64::from(found - exact).powi(2);
            all += f64::from(exact).powi(2);
        }
        (off / all).sqrt()
    }

    fn error_of<Q: Quantized>() -> f64 {
        let weights = normal(&mut Random::new(5), 100_000 / Q::GROUP * Q::GROUP);
        let found: Vec<f32> = weights.chunks(Q::GROUP).flat_map(quantized::<Q>).collect();
        error(found.into_iter().zip(weights))
    }

    #[test]
    fn the_error_on_normal_weights_is_as_documented() {
        let (q8, q4) = (error_of::<Q8>(), error_of::<Q4>());
        assert!((0.005..0.0063).contains(&q8), "{q8}");
        assert!((0.07..0.084).contains(&q4), "{q4}");
    }

    proptest! {
        #[test]
        fn groups_of_any_size_keep_their_error(power in -126i32..127, seed: u64) {
            let weights: Vec<f32> = normal(&mut Random::new(seed), 64)
                .iter()
                .map(|x| x * 0.1 * 2f32.powi(power))
                .collect();
            let q8 = error(quantized::<Q8>(&weights).into_iter().zip(weights.iter().copied()));
            let q4 = error(quantized::<Q4>(&weights[..32]).into_iter().zip(weights.iter().copied()));
            // Where the scale is no normal number it has fewer digits, and in the end none.
            if power > -110 {
                // Half a step each, and what the scale's own rounding adds to large codes; steps follow from the largest weight.
                let bound = |weights: &[f32], codes: f64| {
                    let largest = weights.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
                    let squares: f64 = weights.iter().map(|x| f64::from(*x).powi(2)).sum();
                    0.8 * f64::from(largest) / codes / (squares / weights.len() as f64).sqrt()
                };
                prop_assert!(q8 <= bound(&weights, 127.0), "{q8}");
                prop_assert!(q4 <= bound(&weights[..32], 7.0), "{q4}");
            } else {
                prop_assert!(q8 <= 1.0 && q4 <= 1.0, "{q8} {q4}");
            }
        }

        #[test]
        fn codes_are_stored_at_their_place(codes: [[u8; 32]; 2], column in 0usize..32) {
            let mut words = vec![0; Q8::WORDS - SCALE_WORDS];
            Q8::store(codes.as_flattened(), column, &mut words);
            for i in 0..64 {
                prop_assert_eq!(Q8::code(&words, column, i), codes.as_flattened()[i]);
            }
            let codes = codes[0].map(|code| code % 16);
            let mut words = vec![0; Q4::WORDS - SCALE_WORDS];
            Q4::store(&codes, column, &mut words);
            for i in 0..32 {
                prop_assert_eq!(Q4::code(&words, column, i), codes[i]);
            }
        }

        #[test]
        fn activations_are_within_half_a_step(x in prop::collection::vec(-1e6f32..1e6, 64)) {
            let results: Vec<_> = Isa::available().map(|isa| isa.run(Activations(&x))).collect();
            prop_assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
            let (scale, codes) = &results[0];
            for (x, code) in x.iter().zip(codes) {
                let found = f32::from(*code as i8) * scale;
                prop_assert!((found - x).abs() <= 0.501 * scale, "{x} {found}");
            }
        }
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_no_number_is_not_hidden() {
        assert_eq!(quantized::<Q8>(&[0.0; 64]), [0.0; 64]);
        assert_eq!(quantized::<Q4>(&[-0.0; 32]), [0.0; 32]);
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut weights = [1.0; 64];
            weights[19] = broken;
            assert!(quantized::<Q8>(&weights).iter().all(|x| x.is_nan()));
            assert!(quantized::<Q4>(&weights[..32]).iter().all(|x| x.is_nan()));
            assert!(Isa::detect().run(Activations(&weights)).0.is_nan());
        }
    }
}

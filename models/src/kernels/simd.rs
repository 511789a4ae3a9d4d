//! Sixteen lanes of f32: the vocabulary kernels are written in.

/// An operation, generic over the lanes it runs on. `run` must be `#[inline(always)]`, and so must all it calls, for
/// lanes to be compiled with the features of their instruction set.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;
    /// Does it.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Sixteen f32 at a time. A value of an implementing type is a proof that the processor has the instructions.
pub(crate) trait Simd: Copy {
    /// Sixteen f32.
    type V: Copy;
    /// Two bf16 of each of sixteen columns, ready to be multiplied.
    type Pair: Copy;
    /// Sixteen i32.
    type I: Copy;
    /// Four u8 of each of sixteen columns, ready to be multiplied.
    type Quad: Copy;

    /// u32 that one row's two bf16 occupy in packed rows: 1 as bits, 2 once widened to f32.
    const PAIR_UNITS: usize;
    /// u32 that one row's four i8 occupy in packed rows: 1 as they are, 2 once widened to i16.
    const QUAD_UNITS: usize;
    /// Most rows of a tile of f32 products.
    const TALL: usize;
    /// Most rows of a tile of bf16 products.
    const TALL_PAIR: usize;
    /// Most rows of a tile of products of bytes.
    const TALL_QUAD: usize;
    /// Whether a tall tile spans half a panel (16 columns) for want of registers.
    const NARROW: bool;
    /// Most queries that attention works on together.
    const QUERIES: usize;

    /// Runs a kernel as a function of its own (not inlined into one huge one).
    fn call<K: Kernel>(self, kernel: K) -> K::Output;

    fn splat(self, x: f32) -> Self::V;
    fn load(self, from: &[f32; 16]) -> Self::V;
    fn store(self, v: Self::V, to: &mut [f32; 16]);
    /// Sixteen bf16, widened.
    fn load_bf16(self, from: &[u16; 16]) -> Self::V;
    /// Rounded to the nearest bf16, ties to even; a NaN stays one.
    fn store_bf16(self, v: Self::V, to: &mut [u16; 16]);
    /// Sixteen f16, widened.
    fn load_f16(self, from: &[u16; 16]) -> Self::V;
    /// Rounded to the nearest f16, ties to even; a NaN stays one.
    fn store_f16(self, v: Self::V, to: &mut [u16; 16]);

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, fused where the instruction set can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger of each; `b` where either is a NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller of each; `b` where either is a NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `p * 2^n`, by adding to the exponent; `n` stands in the low bits of the mantissa of `t`.
    fn scale_by_power(self, p: Self::V, t: Self::V) -> Self::V;
    /// Sum of the lanes: halves added, 8, 4, 2, 1.
    fn sum(self, v: Self::V) -> f32;

    /// # Safety
    /// `from` points at sixteen u32.
    unsafe fn load_pair(self, from: *const u32) -> Self::Pair;
    /// `acc + w.even * x.even + w.odd * x.odd`, x being one row's two values, the same for every column.
    ///
    /// # Safety
    /// `x` points at [`Simd::PAIR_UNITS`] u32.
    unsafe fn dot_pair(self, acc: Self::V, w: Self::Pair, x: *const u32) -> Self::V;

    fn splat_i32(self, x: i32) -> Self::I;
    /// Exact for integers that f32 can hold.
    fn to_f32(self, x: Self::I) -> Self::V;
    /// # Safety
    /// `from` points at sixteen u32.
    unsafe fn load_quad(self, from: *const u32) -> Self::Quad;
    /// Of each u32, the low and then the high halves of its four bytes.
    ///
    /// # Safety
    /// `from` points at sixteen u32.
    unsafe fn load_nibbles(self, from: *const u32) -> [Self::Quad; 2];
    /// `acc` plus the four products of `w` with one row's i8, the same for every column. Nothing saturates.
    ///
    /// # Safety
    /// `x` points at [`Simd::QUAD_UNITS`] u32.
    unsafe fn dot_quad(self, acc: Self::I, w: Self::Quad, x: *const u32) -> Self::I;

    /// Asks for the cache line at `from`, which need not be valid memory.
    fn prefetch(self, from: *const u32);

    /// As many values as `from` has (at most sixteen), zeros after them.
    #[inline(always)]
    fn load_some(self, from: &[f32]) -> Self::V {
        let mut all = [0.0; 16];
        all[..from.len()].copy_from_slice(from);
        self.load(&all)
    }

    /// Stores as many lanes as `to` has places (at most sixteen).
    #[inline(always)]
    fn store_some(self, v: Self::V, to: &mut [f32]) {
        let mut all = [0.0; 16];
        self.store(v, &mut all);
        let len = to.len();
        to.copy_from_slice(&all[..len]);
    }

    /// `v` in lanes `lo..hi`, `other` elsewhere.
    #[inline(always)]
    fn keep(self, v: Self::V, lo: usize, hi: usize, other: f32) -> Self::V {
        let mut all = [0.0; 16];
        self.store(v, &mut all);
        for (lane, value) in all.iter_mut().enumerate() {
            if lane < lo || lane >= hi {
                *value = other;
            }
        }
        self.load(&all)
    }

    /// The largest lane; NaNs are passed over unless the last lane compared is one.
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        let mut all = [0.0; 16];
        self.store(v, &mut all);
        let mut width = 8;
        while width > 0 {
            for lane in 0..width {
                all[lane] = if all[lane] > all[lane + width] {
                    all[lane]
                } else {
                    all[lane + width]
                };
            }
            width /= 2;
        }
        all[0]
    }

    /// `e^x`, to about 1 ulp with a fused multiply-add and 2 without; `x` is first clamped to `[-87.33, 88.37]`.
    /// `e^0` is exactly 1.
    ///
    /// Cody and Waite's reduction to `r` in `[-ln 2 / 2, ln 2 / 2]` with Cephes' polynomial (`expf.c`).
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        // Added, it leaves the nearest integer in the low bits of the mantissa.
        let magic = self.splat(12_582_912.0);
        // A NaN passes: min and max give their second operand.
        let x = self.min(self.splat(88.37), self.max(self.splat(-87.33), x));
        let t = self.fma(x, self.splat(std::f32::consts::LOG2_E), magic);
        let n = self.sub(t, magic);
        let r = self.fma(n, self.splat(-0.693_359_4), x);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_1e-4);
        p = self.fma(p, r, self.splat(1.398_2e-3));
        p = self.fma(p, r, self.splat(8.333_452e-3));
        p = self.fma(p, r, self.splat(4.166_579_6e-2));
        p = self.fma(p, r, self.splat(1.666_666_5e-1));
        p = self.fma(p, r, self.splat(0.5));
        let r2 = self.mul(r, r);
        p = self.fma(p, r2, r);
        p = self.add(p, self.splat(1.0));
        self.scale_by_power(p, t)
    }
}

/// Rounds to the nearest bf16, ties to even; a NaN stays one.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// The f32 that a bf16 stands for.
#[inline(always)]
pub(crate) fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Isa;
    use proptest::prelude::*;

    struct Exp([f32; 16]);
    impl Kernel for Exp {
        type Output = [f32; 16];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [f32; 16] {
            let mut out = [0.0; 16];
            s.store(s.exp(s.load(&self.0)), &mut out);
            out
        }
    }

    /// Widens and rounds back.
    struct Half([u16; 16]);
    impl Kernel for Half {
        type Output = ([f32; 16], [u16; 16]);
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> ([f32; 16], [u16; 16]) {
            let (mut wide, mut bits) = ([0.0; 16], [0; 16]);
            let v = s.load_f16(&self.0);
            s.store(v, &mut wide);
            s.store_f16(v, &mut bits);
            (wide, bits)
        }
    }

    struct RoundHalf([f32; 16]);
    impl Kernel for RoundHalf {
        type Output = [u16; 16];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [u16; 16] {
            let mut out = [0; 16];
            s.store_f16(s.load(&self.0), &mut out);
            out
        }
    }

    /// Sixteen columns of four bytes times one row's four, and of eight nibbles times the same row's four twice.
    struct Dots([u32; 16], [i8; 4]);
    impl Kernel for Dots {
        type Output = [[f32; 16]; 2];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [[f32; 16]; 2] {
            let x = self.1.map(|x| i16::from(x) as u16);
            let x = match S::QUAD_UNITS {
                1 => [u32::from_le_bytes(self.1.map(|x| x as u8)), 0],
                _ => [0, 1].map(|i| u32::from(x[i]) | u32::from(x[i + 2]) << 16),
            };
            let mut out = [[0.0; 16]; 2];
            // SAFETY: sixteen words, and as many of `x` as there are units.
            let (bytes, nibbles) = unsafe {
                let acc = s.splat_i32(-7);
                let [low, high] = s.load_nibbles(self.0.as_ptr());
                let low = s.dot_quad(acc, low, x.as_ptr());
                (
                    s.dot_quad(acc, s.load_quad(self.0.as_ptr()), x.as_ptr()),
                    s.dot_quad(low, high, x.as_ptr()),
                )
            };
            s.store(s.to_f32(bytes), &mut out[0]);
            s.store(s.to_f32(nibbles), &mut out[1]);
            out
        }
    }

    struct Largest([f32; 16]);
    impl Kernel for Largest {
        type Output = f32;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> f32 {
            s.largest(s.load(&self.0))
        }
    }

    struct Round([f32; 16]);
    impl Kernel for Round {
        type Output = [u16; 16];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [u16; 16] {
            let mut out = [0; 16];
            s.store_bf16(s.load(&self.0), &mut out);
            out
        }
    }

    #[test]
    fn exp_is_accurate_to_two_ulps_on_every_isa() {
        for isa in Isa::available() {
            let mut worst = 0.0f64;
            for step in 0..400_000u32 {
                let x = -87.3 + step as f32 * (175.6 / 400_000.0);
                let mut lanes = [0.0; 16];
                lanes[step as usize % 16] = x;
                let out = isa.run(Exp(lanes))[step as usize % 16];
                let exact = f64::from(x).exp();
                let ulp = f64::from(f32::from_bits((exact as f32).to_bits() + 1) - exact as f32);
                worst = worst.max((f64::from(out) - exact).abs() / ulp);
            }
            assert!(worst <= 2.0, "{isa:?}: {worst} ulp");
            assert_eq!(isa.run(Exp([0.0; 16])), [1.0; 16]);
            assert!(isa.run(Exp([f32::NAN; 16]))[3].is_nan());
            assert!(isa.run(Exp([f32::NEG_INFINITY; 16]))[3] < 2e-38);
        }
    }

    #[test]
    fn every_f16_is_widened_exactly_and_comes_back() {
        for first in (0..=u16::MAX).step_by(16) {
            let bits: [u16; 16] = std::array::from_fn(|lane| first + lane as u16);
            for isa in Isa::available() {
                let (wide, back) = isa.run(Half(bits));
                for lane in 0..16 {
                    let expected = half::f16::from_bits(bits[lane]).to_f32();
                    if expected.is_nan() {
                        assert!(wide[lane].is_nan() && half::f16::from_bits(back[lane]).is_nan());
                    } else {
                        assert_eq!(wide[lane].to_bits(), expected.to_bits(), "{isa:?}");
                        assert_eq!(back[lane], bits[lane], "{isa:?}");
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn rounding_to_f16_is_that_of_the_half_crate(bits: [u32; 16], near_one: [u16; 16]) {
            let wide = bits.map(f32::from_bits);
            // Most bit patterns are beyond the range of f16; these are within it.
            let near = near_one.map(|x| 1.0 + f32::from(x) / 1_048_576.0);
            for lanes in [wide, near] {
                for isa in Isa::available() {
                    for (found, x) in isa.run(RoundHalf(lanes)).iter().zip(lanes) {
                        let expected = half::f16::from_f32(x);
                        let found = half::f16::from_bits(*found);
                        prop_assert!(
                            found.to_bits() == expected.to_bits() || found.is_nan() && x.is_nan(),
                            "{isa:?} {x}: {found}"
                        );
                    }
                }
            }
        }

        #[test]
        fn products_of_bytes_are_exact(words: [u32; 16], x: [i8; 4]) {
            let products = |bytes: [u8; 4]| -> i32 {
                bytes.iter().zip(x).map(|(w, x)| i32::from(*w) * i32::from(x)).sum()
            };
            for isa in Isa::available() {
                let [bytes, nibbles] = isa.run(Dots(words, x));
                for lane in 0..16 {
                    let w = words[lane].to_le_bytes();
                    prop_assert_eq!(bytes[lane], (products(w) - 7) as f32);
                    let halves = products(w.map(|w| w & 15)) + products(w.map(|w| w >> 4));
                    prop_assert_eq!(nibbles[lane], (halves - 7) as f32);
                }
            }
        }

        #[test]
        fn rounding_to_bf16_is_that_of_the_half_crate(bits: [u32; 16]) {
            let lanes = bits.map(f32::from_bits);
            let expected = lanes.map(|x| half::bf16::from_f32(x).to_bits());
            for isa in Isa::available() {
                prop_assert_eq!(isa.run(Round(lanes)), expected);
            }
        }

        #[test]
        fn the_largest_lane_is_the_largest(lanes: [i32; 16]) {
            let lanes = lanes.map(|x| x as f32);
            let expected = lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for isa in Isa::available() {
                prop_assert_eq!(isa.run(Largest(lanes)), expected);
            }
        }
    }
}

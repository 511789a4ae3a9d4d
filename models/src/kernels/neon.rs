//! Sixteen lanes as four NEON registers, with or without products of bytes (dot product, i8mm) and of bf16.
//!
//! The instructions beyond ARMv8.0 are written as assembly: their intrinsics are not stable.

use std::arch::aarch64::*;
use std::arch::asm;

use super::simd::{Kernel, Simd};

/// Proof of NEON; of `sdot` if `DOT`; of `usdot` and `bfdot`, too, if `BF16`.
#[derive(Clone, Copy)]
pub(crate) struct Neon<const DOT: bool, const BF16: bool>(());

/// Runs `kernel` with NEON, which every aarch64 processor has that the standard library runs on.
///
/// # Safety
/// The processor has NEON.
#[target_feature(enable = "neon")]
pub(crate) unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Neon::<false, false>(()))
}

/// Runs `kernel` with NEON and products of bytes (ARMv8.2, `dotprod`).
///
/// # Safety
/// The processor has both.
#[target_feature(enable = "neon,dotprod")]
pub(crate) unsafe fn enter_dot<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Neon::<true, false>(()))
}

/// Runs `kernel` with NEON and products of bytes and of bf16 (ARMv8.6, `i8mm` and `bf16`).
///
/// # Safety
/// The processor has all of them.
#[target_feature(enable = "neon,dotprod,i8mm,bf16")]
pub(crate) unsafe fn enter_bf16<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Neon::<true, true>(()))
}

/// `acc` plus the products of four i8 with four i8, in each lane.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction is enabled, and touches registers only.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// `acc` plus the products of four u8 with four i8, in each lane.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn usdot(mut acc: int32x4_t, a: uint8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: as above.
    unsafe {
        asm!("usdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// `acc` plus the products of two bf16 with two bf16, in each lane.
#[inline]
#[target_feature(enable = "neon,bf16")]
fn bfdot(mut acc: float32x4_t, a: uint32x4_t, b: uint32x4_t) -> float32x4_t {
    // SAFETY: as above.
    unsafe {
        asm!("bfdot {0:v}.4s, {1:v}.8h, {2:v}.8h", inout(vreg) acc, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// Four f16, widened.
#[inline]
#[target_feature(enable = "neon")]
fn widen_f16(bits: uint16x4_t) -> float32x4_t {
    let wide: float32x4_t;
    // SAFETY: as above.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) wide, in(vreg) bits,
            options(pure, nomem, nostack, preserves_flags));
    }
    wide
}

/// Rounded to the nearest f16, ties to even.
#[inline]
#[target_feature(enable = "neon")]
fn round_f16(wide: float32x4_t) -> uint16x4_t {
    let bits: uint16x4_t;
    // SAFETY: as above.
    unsafe {
        asm!("fcvtn {0:v}.4h, {1:v}.4s", out(vreg) bits, in(vreg) wide,
            options(pure, nomem, nostack, preserves_flags));
    }
    bits
}

type V = [float32x4_t; 4];

/// Two bf16 of sixteen columns: as bits where the processor multiplies them, else widened.
#[derive(Clone, Copy)]
pub(crate) union Pair {
    bits: [uint32x4_t; 4],
    wide: (V, V),
}

macro_rules! lanewise {
    ($($name:ident = $intrinsic:ident),*) => {$(
        #[inline(always)]
        fn $name(self, a: V, b: V) -> V {
            // SAFETY: `self` is the proof.
            unsafe { std::array::from_fn(|i| $intrinsic(a[i], b[i])) }
        }
    )*};
}

impl<const DOT: bool, const BF16: bool> Simd for Neon<DOT, BF16> {
    type V = V;
    type Pair = Pair;
    type I = [int32x4_t; 4];
    /// The bytes as they are.
    type Quad = [uint8x16_t; 4];

    const PAIR_UNITS: usize = if BF16 { 1 } else { 2 };
    const QUAD_UNITS: usize = 1;
    const TALL: usize = 6;
    const TALL_PAIR: usize = if BF16 { 6 } else { 5 };
    const TALL_QUAD: usize = 4;
    const NARROW: bool = true;
    const QUERIES: usize = 4;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` is the proof.
        unsafe {
            if BF16 {
                enter_bf16(kernel)
            } else if DOT {
                enter_dot(kernel)
            } else {
                enter(kernel)
            }
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        // SAFETY: `self` is the proof.
        unsafe { [vdupq_n_f32(x); 4] }
    }
    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> V {
        // SAFETY: `self` is the proof; `from` has sixteen values.
        unsafe { std::array::from_fn(|i| vld1q_f32(from.as_ptr().add(4 * i))) }
    }
    #[inline(always)]
    fn store(self, v: V, to: &mut [f32; 16]) {
        for i in 0..4 {
            // SAFETY: `self` is the proof; `to` has sixteen places.
            unsafe { vst1q_f32(to.as_mut_ptr().add(4 * i), v[i]) };
        }
    }
    #[inline(always)]
    fn load_bf16(self, from: &[u16; 16]) -> V {
        // SAFETY: `self` is the proof; `from` has sixteen values.
        unsafe {
            std::array::from_fn(|i| {
                let bits = vld1_u16(from.as_ptr().add(4 * i));
                vreinterpretq_f32_u32(vshll_n_u16::<16>(bits))
            })
        }
    }
    #[inline(always)]
    fn store_bf16(self, v: V, to: &mut [u16; 16]) {
        for i in 0..4 {
            // SAFETY: `self` is the proof; `to` has sixteen places.
            unsafe {
                let bits = vreinterpretq_u32_f32(v[i]);
                let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
                let up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
                let number = vceqq_f32(v[i], v[i]);
                let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
                let rounded = vshrn_n_u32::<16>(vbslq_u32(number, up, quiet));
                vst1_u16(to.as_mut_ptr().add(4 * i), rounded);
            }
        }
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; 16]) -> V {
        // SAFETY: `self` is the proof; `from` has sixteen values.
        unsafe { std::array::from_fn(|i| widen_f16(vld1_u16(from.as_ptr().add(4 * i)))) }
    }
    #[inline(always)]
    fn store_f16(self, v: V, to: &mut [u16; 16]) {
        for i in 0..4 {
            // SAFETY: `self` is the proof; `to` has sixteen places.
            unsafe { vst1_u16(to.as_mut_ptr().add(4 * i), round_f16(v[i])) };
        }
    }

    lanewise!(
        add = vaddq_f32,
        sub = vsubq_f32,
        mul = vmulq_f32,
        div = vdivq_f32
    );

    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        // Not fmax, which gives a NaN for either of them.
        // SAFETY: `self` is the proof.
        unsafe { std::array::from_fn(|i| vbslq_f32(vcgtq_f32(a[i], b[i]), a[i], b[i])) }
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        // SAFETY: `self` is the proof.
        unsafe { std::array::from_fn(|i| vbslq_f32(vcltq_f32(a[i], b[i]), a[i], b[i])) }
    }

    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        // SAFETY: `self` is the proof.
        unsafe { std::array::from_fn(|i| vfmaq_f32(c[i], a[i], b[i])) }
    }

    #[inline(always)]
    fn scale_by_power(self, p: V, t: V) -> V {
        // SAFETY: `self` is the proof.
        unsafe {
            std::array::from_fn(|i| {
                let n = vshlq_n_u32::<23>(vreinterpretq_u32_f32(t[i]));
                vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(p[i]), n))
            })
        }
    }

    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        // SAFETY: `self` is the proof.
        unsafe {
            let four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
            let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
        }
    }

    #[inline(always)]
    unsafe fn load_pair(self, from: *const u32) -> Pair {
        // SAFETY: the caller's promise, and `self` is the proof.
        unsafe {
            let bits: [uint32x4_t; 4] = std::array::from_fn(|i| vld1q_u32(from.add(4 * i)));
            if BF16 {
                return Pair { bits };
            }
            let even = bits.map(|bits| vreinterpretq_f32_u32(vshlq_n_u32::<16>(bits)));
            let high = vdupq_n_u32(0xffff_0000);
            let odd = bits.map(|bits| vreinterpretq_f32_u32(vandq_u32(bits, high)));
            Pair { wide: (even, odd) }
        }
    }

    #[inline(always)]
    unsafe fn dot_pair(self, acc: V, w: Pair, x: *const u32) -> V {
        // SAFETY: the caller's promise; `self` is the proof; the union's field is the one `load_pair` wrote.
        unsafe {
            if BF16 {
                let x = vdupq_n_u32(*x);
                return std::array::from_fn(|i| bfdot(acc[i], w.bits[i], x));
            }
            let acc = self.fma(w.wide.0, self.splat(f32::from_bits(*x)), acc);
            self.fma(w.wide.1, self.splat(f32::from_bits(*x.add(1))), acc)
        }
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I {
        // SAFETY: `self` is the proof.
        unsafe { [vdupq_n_s32(x); 4] }
    }
    #[inline(always)]
    fn to_f32(self, x: Self::I) -> V {
        // SAFETY: `self` is the proof.
        unsafe { x.map(|x| vcvtq_f32_s32(x)) }
    }

    #[inline(always)]
    unsafe fn load_quad(self, from: *const u32) -> Self::Quad {
        // SAFETY: the caller's promise, and `self` is the proof.
        unsafe { std::array::from_fn(|i| vld1q_u8(from.add(4 * i).cast())) }
    }

    #[inline(always)]
    unsafe fn load_nibbles(self, from: *const u32) -> [Self::Quad; 2] {
        // SAFETY: the caller's promise, and `self` is the proof.
        unsafe {
            let words = self.load_quad(from);
            [
                words.map(|word| vandq_u8(word, vdupq_n_u8(0xf))),
                words.map(|word| vshrq_n_u8::<4>(word)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn dot_quad(self, acc: Self::I, w: Self::Quad, x: *const u32) -> Self::I {
        // SAFETY: the caller's promise, and `self` is the proof.
        unsafe {
            let x = vreinterpretq_s8_u32(vdupq_n_u32(*x));
            if BF16 {
                return std::array::from_fn(|i| usdot(acc[i], w[i], x));
            }
            if DOT {
                // Weights are made signed by taking 128 from each, and 128 times the activations are added again.
                let sum = vshlq_n_s32::<7>(sdot(vdupq_n_s32(0), x, vdupq_n_s8(1)));
                return std::array::from_fn(|i| {
                    let w = vreinterpretq_s8_u8(veorq_u8(w[i], vdupq_n_u8(0x80)));
                    vaddq_s32(sdot(acc[i], w, x), sum)
                });
            }
            // A product of a u8 and an i8 fits 16 bits.
            let x = vmovl_s8(vget_low_s8(x));
            std::array::from_fn(|i| {
                let product = |w| vpaddlq_s16(vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(w)), x));
                let (low, high) = (product(vget_low_u8(w[i])), product(vget_high_u8(w[i])));
                vaddq_s32(acc[i], vpaddq_s32(low, high))
            })
        }
    }

    #[inline(always)]
    fn prefetch(self, from: *const u32) {
        // SAFETY: a prefetch never faults.
        unsafe {
            asm!("prfm pldl1keep, [{0}]", in(reg) from, options(nostack, preserves_flags, readonly));
        }
    }
}

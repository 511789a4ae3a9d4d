//! Sixteen lanes as one AVX-512 register, with or without products of bytes (VNNI) and of bf16.

use std::arch::x86_64::*;

use super::avx2::sum8;
use super::simd::{Kernel, Simd};

/// Proof of AVX-512 F, BW, DQ and VL, and of VNNI and BF16 too if the parameters say so.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const VNNI: bool, const BF16: bool>(());

/// Runs `kernel` with AVX-512.
///
/// # Safety
/// The processor has F, BW, DQ and VL.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512::<false, false>(()))
}

/// Runs `kernel` with AVX-512 and VNNI.
///
/// # Safety
/// The processor has F, BW, DQ, VL and VNNI.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(crate) unsafe fn enter_vnni<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512::<true, false>(()))
}

/// Runs `kernel` with AVX-512, VNNI and BF16.
///
/// # Safety
/// The processor has F, BW, DQ, VL, VNNI and BF16.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(crate) unsafe fn enter_bf16<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512::<true, true>(()))
}

/// Two bf16 of sixteen columns: as bits where the processor multiplies them, else widened.
#[derive(Clone, Copy)]
pub(crate) union Pair {
    bits: __m512i,
    wide: (__m512, __m512),
}

/// Four u8 of sixteen columns: as bytes where the processor multiplies them, else bytes 0 and 2, and bytes 1 and 3, as i16.
#[derive(Clone, Copy)]
pub(crate) union Quad {
    bytes: __m512i,
    wide: (__m512i, __m512i),
}

macro_rules! lanewise {
    ($($name:ident = $intrinsic:ident),*) => {$(
        #[inline(always)]
        fn $name(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: `self` is the proof.
            unsafe { $intrinsic(a, b) }
        }
    )*};
}

impl<const VNNI: bool, const BF16: bool> Simd for Avx512<VNNI, BF16> {
    type V = __m512;
    type Pair = Pair;
    type I = __m512i;
    type Quad = Quad;

    const PAIR_UNITS: usize = if BF16 { 1 } else { 2 };
    const QUAD_UNITS: usize = if VNNI { 1 } else { 2 };
    const TALL: usize = 14;
    const TALL_PAIR: usize = if BF16 { 14 } else { 12 };
    const TALL_QUAD: usize = if VNNI { 12 } else { 6 };
    const NARROW: bool = false;
    const QUERIES: usize = 8;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` is the proof.
        unsafe {
            if BF16 {
                enter_bf16(kernel)
            } else if VNNI {
                enter_vnni(kernel)
            } else {
                enter(kernel)
            }
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` is the proof.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> __m512 {
        // SAFETY: `self` is the proof; `from` has sixteen values.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, v: __m512, to: &mut [f32; 16]) {
        // SAFETY: `self` is the proof; `to` has sixteen places.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) }
    }
    #[inline(always)]
    fn load_bf16(self, from: &[u16; 16]) -> __m512 {
        // SAFETY: `self` is the proof; `from` has sixteen values.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))
        }
    }
    #[inline(always)]
    fn store_bf16(self, v: __m512, to: &mut [u16; 16]) {
        // Not vcvtneps2bf16, which takes denormals for zero: rounding is the same on every instruction set.
        // SAFETY: `self` is the proof; `to` has sixteen places.
        unsafe {
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
            let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let rounded = _mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16);
            _mm256_storeu_si256(to.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(rounded));
        }
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; 16]) -> __m512 {
        // SAFETY: `self` is the proof; `from` has sixteen values.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store_f16(self, v: __m512, to: &mut [u16; 16]) {
        // SAFETY: `self` is the proof; `to` has sixteen places.
        unsafe {
            let rounded = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
            _mm256_storeu_si256(to.as_mut_ptr().cast(), rounded);
        }
    }

    lanewise!(
        add = _mm512_add_ps,
        sub = _mm512_sub_ps,
        mul = _mm512_mul_ps,
        div = _mm512_div_ps,
        max = _mm512_max_ps,
        min = _mm512_min_ps
    );

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` is the proof.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn scale_by_power(self, p: __m512, t: __m512) -> __m512 {
        // SAFETY: `self` is the proof.
        unsafe {
            let n = _mm512_slli_epi32(_mm512_castps_si512(t), 23);
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), n))
        }
    }

    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        // SAFETY: `self` is the proof.
        unsafe {
            sum8(_mm256_add_ps(
                _mm512_castps512_ps256(v),
                _mm512_extractf32x8_ps(v, 1),
            ))
        }
    }

    #[inline(always)]
    fn largest(self, v: __m512) -> f32 {
        // SAFETY: `self` is the proof.
        unsafe {
            let v = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        }
    }

    #[inline(always)]
    unsafe fn load_pair(self, from: *const u32) -> Pair {
        // SAFETY: the caller's promise, and `self` is the proof.
        unsafe {
            let bits = _mm512_loadu_si512(from.cast());
            if BF16 {
                Pair { bits }
            } else {
                let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                Pair {
                    wide: (
                        _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
                        _mm512_castsi512_ps(_mm512_and_si512(bits, high)),
                    ),
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn dot_pair(self, acc: __m512, w: Pair, x: *const u32) -> __m512 {
        // SAFETY: the caller's promise; `self` is the proof; the union's field is the one `load_pair` wrote.
        unsafe {
            if BF16 {
                let x = _mm512_set1_epi32(*x as i32);
                _mm512_dpbf16_ps(
                    acc,
                    std::mem::transmute::<__m512i, __m512bh>(w.bits),
                    std::mem::transmute::<__m512i, __m512bh>(x),
                )
            } else {
                let (even, odd) = w.wide;
                let acc = _mm512_fmadd_ps(even, _mm512_set1_ps(f32::from_bits(*x)), acc);
                _mm512_fmadd_ps(odd, _mm512_set1_ps(f32::from_bits(*x.add(1))), acc)
            }
        }
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> __m512i {
        // SAFETY: `self` is the proof.
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    fn to_f32(self, x: __m512i) -> __m512 {
        // SAFETY: `self` is the proof.
        unsafe { _mm512_cvtepi32_ps(x) }
    }

    #[inline(always)]
    unsafe fn load_quad(self, from: *const u32) -> Quad {
        // SAFETY: the caller's promise, and `self` is the proof.
        unsafe {
            let bytes = _mm512_loadu_si512(from.cast());
            if VNNI {
                Quad { bytes }
            } else {
                let even = _mm512_and_si512(bytes, _mm512_set1_epi16(0xff));
                let odd = _mm512_srli_epi16(bytes, 8);
                Quad { wide: (even, odd) }
            }
        }
    }

    #[inline(always)]
    unsafe fn load_nibbles(self, from: *const u32) -> [Quad; 2] {
        // SAFETY: the caller's promise, and `self` is the proof.
        unsafe {
            let words = _mm512_loadu_si512(from.cast());
            if VNNI {
                let nibble = _mm512_set1_epi8(0xf);
                let low = _mm512_and_si512(words, nibble);
                let high = _mm512_and_si512(_mm512_srli_epi16(words, 4), nibble);
                [Quad { bytes: low }, Quad { bytes: high }]
            } else {
                let nibble = _mm512_set1_epi16(0xf);
                let low = (
                    _mm512_and_si512(words, nibble),
                    _mm512_and_si512(_mm512_srli_epi16(words, 8), nibble),
                );
                let high = (
                    _mm512_and_si512(_mm512_srli_epi16(words, 4), nibble),
                    _mm512_srli_epi16(words, 12),
                );
                [Quad { wide: low }, Quad { wide: high }]
            }
        }
    }

    #[inline(always)]
    unsafe fn dot_quad(self, acc: __m512i, w: Quad, x: *const u32) -> __m512i {
        // SAFETY: the caller's promise; `self` is the proof; the union's field is the one that was written.
        unsafe {
            if VNNI {
                _mm512_dpbusd_epi32(acc, w.bytes, _mm512_set1_epi32(*x as i32))
            } else {
                let (even, odd) = w.wide;
                let (x_even, x_odd) = (
                    _mm512_set1_epi32(*x as i32),
                    _mm512_set1_epi32(*x.add(1) as i32),
                );
                let acc = _mm512_add_epi32(acc, _mm512_madd_epi16(even, x_even));
                _mm512_add_epi32(acc, _mm512_madd_epi16(odd, x_odd))
            }
        }
    }

    #[inline(always)]
    fn prefetch(self, from: *const u32) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch(from.cast(), _MM_HINT_T0) }
    }
}

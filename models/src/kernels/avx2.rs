//! Sixteen lanes as two AVX2 registers, with fused multiply-add and conversions of f16.

use std::arch::x86_64::*;

use super::simd::{Kernel, Simd};

/// Proof of AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

/// Runs `kernel` with AVX2, FMA and F16C.
///
/// # Safety
/// The processor has them.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

type V = [__m256; 2];
type I = [__m256i; 2];

macro_rules! lanewise {
    ($($name:ident = $intrinsic:ident),*) => {$(
        #[inline(always)]
        fn $name(self, a: V, b: V) -> V {
            // SAFETY: `self` is the proof.
            unsafe { [$intrinsic(a[0], b[0]), $intrinsic(a[1], b[1])] }
        }
    )*};
}

impl Simd for Avx2 {
    type V = V;
    type Pair = (V, V);
    type I = I;
    /// Bytes 0 and 2, and bytes 1 and 3, widened to i16.
    type Quad = (I, I);

    const PAIR_UNITS: usize = 2;
    const QUAD_UNITS: usize = 2;
    const TALL: usize = 6;
    const TALL_PAIR: usize = 4;
    const TALL_QUAD: usize = 4;
    const NARROW: bool = true;
    const QUERIES: usize = 2;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` is the proof.
        unsafe { enter(kernel) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        // SAFETY: `self` is the proof.
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> V {
        let p = from.as_ptr();
        // SAFETY: `self` is the proof; `from` has sixteen values.
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }
    #[inline(always)]
    fn store(self, v: V, to: &mut [f32; 16]) {
        let p = to.as_mut_ptr();
        // SAFETY: `self` is the proof; `to` has sixteen places.
        unsafe {
            _mm256_storeu_ps(p, v[0]);
            _mm256_storeu_ps(p.add(8), v[1]);
        }
    }
    #[inline(always)]
    fn load_bf16(self, from: &[u16; 16]) -> V {
        // SAFETY: `self` is the proof; `from` has sixteen values.
        unsafe {
            let p = from.as_ptr().cast::<__m128i>();
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(1)));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(high, 16)),
            ]
        }
    }
    #[inline(always)]
    fn store_bf16(self, v: V, to: &mut [u16; 16]) {
        // SAFETY: `self` is the proof; `to` has sixteen places.
        unsafe {
            let mut rounded = [_mm256_setzero_si256(); 2];
            for half in 0..2 {
                let bits = _mm256_castps_si256(v[half]);
                let odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
                let up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
                let nan = _mm256_castps_si256(_mm256_cmp_ps(v[half], v[half], _CMP_UNORD_Q));
                let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
                rounded[half] = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
            }
            // packus works within 128-bit lanes; the permutation puts the quarters in order.
            let packed = _mm256_packus_epi32(rounded[0], rounded[1]);
            let ordered = _mm256_permute4x64_epi64(packed, 0b11_01_10_00);
            _mm256_storeu_si256(to.as_mut_ptr().cast(), ordered);
        }
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; 16]) -> V {
        // SAFETY: `self` is the proof; `from` has sixteen values.
        unsafe {
            let p = from.as_ptr().cast::<__m128i>();
            [
                _mm256_cvtph_ps(_mm_loadu_si128(p)),
                _mm256_cvtph_ps(_mm_loadu_si128(p.add(1))),
            ]
        }
    }
    #[inline(always)]
    fn store_f16(self, v: V, to: &mut [u16; 16]) {
        // SAFETY: `self` is the proof; `to` has sixteen places.
        unsafe {
            let p = to.as_mut_ptr().cast::<__m128i>();
            _mm_storeu_si128(p, _mm256_cvtps_ph(v[0], _MM_FROUND_TO_NEAREST_INT));
            _mm_storeu_si128(p.add(1), _mm256_cvtps_ph(v[1], _MM_FROUND_TO_NEAREST_INT));
        }
    }

    lanewise!(
        add = _mm256_add_ps,
        sub = _mm256_sub_ps,
        mul = _mm256_mul_ps,
        div = _mm256_div_ps,
        max = _mm256_max_ps,
        min = _mm256_min_ps
    );

    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        // SAFETY: `self` is the proof.
        unsafe {
            [
                _mm256_fmadd_ps(a[0], b[0], c[0]),
                _mm256_fmadd_ps(a[1], b[1], c[1]),
            ]
        }
    }

    #[inline(always)]
    fn scale_by_power(self, p: V, t: V) -> V {
        // SAFETY: `self` is the proof.
        unsafe {
            let mut out = p;
            for half in 0..2 {
                let n = _mm256_slli_epi32(_mm256_castps_si256(t[half]), 23);
                out[half] = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p[half]), n));
            }
            out
        }
    }

    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        // SAFETY: `self` is the proof.
        unsafe { sum8(_mm256_add_ps(v[0], v[1])) }
    }

    #[inline(always)]
    fn largest(self, v: V) -> f32 {
        // SAFETY: `self` is the proof.
        unsafe {
            let v = _mm256_max_ps(v[0], v[1]);
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        }
    }

    #[inline(always)]
    unsafe fn load_pair(self, from: *const u32) -> Self::Pair {
        // SAFETY: the caller's promise, and `self` is the proof.
        unsafe {
            let bits = [
                _mm256_loadu_si256(from.cast()),
                _mm256_loadu_si256(from.add(8).cast()),
            ];
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let (mut even, mut odd) = ([_mm256_setzero_ps(); 2], [_mm256_setzero_ps(); 2]);
            for half in 0..2 {
                even[half] = _mm256_castsi256_ps(_mm256_slli_epi32(bits[half], 16));
                odd[half] = _mm256_castsi256_ps(_mm256_and_si256(bits[half], high));
            }
            (even, odd)
        }
    }

    #[inline(always)]
    unsafe fn dot_pair(self, acc: V, w: Self::Pair, x: *const u32) -> V {
        // SAFETY: the caller's promise.
        let (even, odd) = unsafe { (f32::from_bits(*x), f32::from_bits(*x.add(1))) };
        let acc = self.fma(w.0, self.splat(even), acc);
        self.fma(w.1, self.splat(odd), acc)
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> I {
        // SAFETY: `self` is the proof.
        unsafe { [_mm256_set1_epi32(x); 2] }
    }
    #[inline(always)]
    fn to_f32(self, x: I) -> V {
        // SAFETY: `self` is the proof.
        unsafe { [_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])] }
    }

    #[inline(always)]
    unsafe fn load_quad(self, from: *const u32) -> Self::Quad {
        // SAFETY: the caller's promise, and `self` is the proof.
        unsafe {
            let bytes = [
                _mm256_loadu_si256(from.cast()),
                _mm256_loadu_si256(from.add(8).cast()),
            ];
            let low = _mm256_set1_epi16(0xff);
            let (mut even, mut odd) = (bytes, bytes);
            for half in 0..2 {
                even[half] = _mm256_and_si256(bytes[half], low);
                odd[half] = _mm256_srli_epi16(bytes[half], 8);
            }
            (even, odd)
        }
    }

    #[inline(always)]
    unsafe fn load_nibbles(self, from: *const u32) -> [Self::Quad; 2] {
        // SAFETY: the caller's promise, and `self` is the proof.
        unsafe {
            let bytes = [
                _mm256_loadu_si256(from.cast()),
                _mm256_loadu_si256(from.add(8).cast()),
            ];
            let nibble = _mm256_set1_epi16(0xf);
            let mut quads = [(bytes, bytes); 2];
            for half in 0..2 {
                let bytes = bytes[half];
                quads[0].0[half] = _mm256_and_si256(bytes, nibble);
                quads[1].0[half] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
                quads[0].1[half] = _mm256_and_si256(_mm256_srli_epi16(bytes, 8), nibble);
                quads[1].1[half] = _mm256_srli_epi16(bytes, 12);
            }
            quads
        }
    }

    #[inline(always)]
    unsafe fn dot_quad(self, mut acc: I, w: Self::Quad, x: *const u32) -> I {
        // Not vpmaddubsw, which is one instruction fewer and saturates.
        // SAFETY: the caller's promise, and `self` is the proof.
        unsafe {
            let even = _mm256_set1_epi32(*x as i32);
            let odd = _mm256_set1_epi32(*x.add(1) as i32);
            for half in 0..2 {
                acc[half] = _mm256_add_epi32(acc[half], _mm256_madd_epi16(w.0[half], even));
                acc[half] = _mm256_add_epi32(acc[half], _mm256_madd_epi16(w.1[half], odd));
            }
        }
        acc
    }

    #[inline(always)]
    fn prefetch(self, from: *const u32) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch(from.cast(), _MM_HINT_T0) }
    }
}

/// Sum of eight lanes, halves added: 4, 2, 1.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
pub(crate) unsafe fn sum8(v: __m256) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
    }
}

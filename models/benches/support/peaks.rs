//! The fastest reads and products of this processor, in loops that do nothing else.

#![allow(unsafe_code, unreachable_pub)]
#![allow(clippy::needless_range_loop)] // an iterator over the chains is compiled to moves between them

use std::hint::black_box;

/// A kind of product, and a function that does [`OPERATIONS`] of it.
pub type Peak = (&'static str, fn() -> f32);

/// Operations (a product and a sum are two) of one call of a peak's function.
pub const OPERATIONS: u64 = 1 << 31;

/// The sum of all words, as fast as they can be read.
#[cfg(target_arch = "x86_64")]
pub fn read(words: &[u32]) -> u32 {
    #[target_feature(enable = "avx512f")]
    fn wide(words: &[u32]) -> u32 {
        narrow(words)
    }
    #[inline(always)]
    fn narrow(words: &[u32]) -> u32 {
        let mut sums = [0u32; 128];
        for chunk in words.as_chunks::<128>().0 {
            for (sum, word) in sums.iter_mut().zip(chunk) {
                *sum = sum.wrapping_add(*word);
            }
        }
        sums.iter().fold(0, |a, b| a.wrapping_add(*b))
    }
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: just detected.
        unsafe { wide(words) }
    } else {
        narrow(words)
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub fn read(words: &[u32]) -> u32 {
    words.iter().fold(0, |a, b| a.wrapping_add(*b))
}

/// The kinds of product that this processor has: multiplications and additions in registers, in as many chains as hide their latency.
#[cfg(target_arch = "x86_64")]
pub fn peaks() -> Vec<Peak> {
    use std::arch::x86_64::*;

    /// Twelve chains hide the latency of any of these instructions, and stay in registers.
    const CHAINS: usize = 12;

    #[target_feature(enable = "avx512f")]
    fn f32_512() -> f32 {
        let (a, b) = (
            _mm512_set1_ps(black_box(0.999)),
            _mm512_set1_ps(black_box(0.5)),
        );
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..OPERATIONS / (CHAINS as u64 * 32) {
            for i in 0..CHAINS {
                sums[i] = _mm512_fmadd_ps(sums[i], a, b);
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn bf16_512() -> f32 {
        // SAFETY: both are 64 bytes of plain data.
        let pair = unsafe {
            std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(black_box(0x3f00_3f00)))
        };
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..OPERATIONS / (CHAINS as u64 * 64) {
            for i in 0..CHAINS {
                sums[i] = _mm512_dpbf16_ps(sums[i], pair, pair);
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn int8_512() -> f32 {
        let quad = _mm512_set1_epi32(black_box(0x0101_0101));
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..OPERATIONS / (CHAINS as u64 * 128) {
            for i in 0..CHAINS {
                sums[i] = _mm512_dpbusd_epi32(sums[i], quad, quad);
            }
        }
        sums.into_iter()
            .map(|sum| _mm512_reduce_add_epi32(sum) as f32)
            .sum()
    }

    #[target_feature(enable = "avx2,fma")]
    fn f32_256() -> f32 {
        let (a, b) = (
            _mm256_set1_ps(black_box(0.999)),
            _mm256_set1_ps(black_box(0.5)),
        );
        let mut sums = [_mm256_setzero_ps(); CHAINS];
        for _ in 0..OPERATIONS / (16 * CHAINS as u64) {
            for i in 0..CHAINS {
                sums[i] = _mm256_fmadd_ps(sums[i], a, b);
            }
        }
        sums.into_iter().map(|sum| _mm256_cvtss_f32(sum)).sum()
    }

    let mut peaks: Vec<Peak> = Vec::new();
    if is_x86_feature_detected!("avx512f") {
        peaks.push(("f32", || {
            // SAFETY: just detected.
            unsafe { f32_512() }
        }));
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        peaks.push(("f32", || {
            // SAFETY: just detected.
            unsafe { f32_256() }
        }));
    }
    if is_x86_feature_detected!("avx512bf16") {
        peaks.push(("bf16", || {
            // SAFETY: just detected.
            unsafe { bf16_512() }
        }));
    }
    if is_x86_feature_detected!("avx512vnni") {
        peaks.push(("int8", || {
            // SAFETY: just detected.
            unsafe { int8_512() }
        }));
    }
    peaks
}

#[cfg(not(target_arch = "x86_64"))]
pub fn peaks() -> Vec<Peak> {
    Vec::new()
}

//! Element by element: rounding to bf16 and back, sums, clamps.

use super::Isa;
use super::simd::{Kernel, Simd, bf16_bits, bf16_value};

/// Rounds each of `x` to the nearest bf16 (ties to even).
///
/// # Panics
/// When the lengths differ (so does every function of this file).
pub fn round_to_bf16(isa: Isa, x: &[f32], out: &mut [u16]) {
    assert_eq!(x.len(), out.len());
    isa.run(Round { x, out });
}

/// Widens each bf16 of `bits`, which is exact.
pub fn widen_bf16(bits: &[u16], out: &mut [f32]) {
    assert_eq!(bits.len(), out.len());
    for (value, bits) in out.iter_mut().zip(bits) {
        *value = bf16_value(*bits);
    }
}

/// `x += y`.
pub fn add_assign(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len());
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// Clamps each of `x` to `[-limit, limit]`; a NaN stays one.
pub fn clamp(x: &mut [f32], limit: f32) {
    for x in x {
        *x = x.clamp(-limit, limit);
    }
}

struct Round<'a> {
    x: &'a [f32],
    out: &'a mut [u16],
}

impl Kernel for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (x, rest) = self.x.as_chunks::<16>();
        let (out, rest_out) = self.out.as_chunks_mut::<16>();
        for (x, out) in x.iter().zip(out) {
            s.store_bf16(s.load(x), out);
        }
        for (x, out) in rest.iter().zip(rest_out) {
            *out = bf16_bits(*x);
        }
    }
}

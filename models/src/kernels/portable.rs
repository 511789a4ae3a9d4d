//! Sixteen lanes in plain Rust, for processors without kernels of their own. No fused multiply-add: without
//! the instruction it would be a call of the C library.

use super::simd::{Kernel, Simd, bf16_bits, bf16_value};

/// Plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

macro_rules! lanewise {
    ($name:ident, $a:ident, $b:ident, $value:expr) => {
        #[inline(always)]
        fn $name(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
            let mut out = [0.0; 16];
            for lane in 0..16 {
                let ($a, $b) = (a[lane], b[lane]);
                out[lane] = $value;
            }
            out
        }
    };
}

impl Simd for Portable {
    type V = [f32; 16];
    type Pair = ([f32; 16], [f32; 16]);
    type I = [i32; 16];
    type Quad = [[u8; 4]; 16];

    const PAIR_UNITS: usize = 2;
    const QUAD_UNITS: usize = 1;
    const TALL: usize = 2;
    const TALL_PAIR: usize = 2;
    const TALL_QUAD: usize = 2;
    const NARROW: bool = true;
    const QUERIES: usize = 2;

    #[inline(never)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 16] {
        [x; 16]
    }
    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> [f32; 16] {
        *from
    }
    #[inline(always)]
    fn store(self, v: [f32; 16], to: &mut [f32; 16]) {
        *to = v;
    }
    #[inline(always)]
    fn load_bf16(self, from: &[u16; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        for lane in 0..16 {
            out[lane] = bf16_value(from[lane]);
        }
        out
    }
    #[inline(always)]
    fn store_bf16(self, v: [f32; 16], to: &mut [u16; 16]) {
        for lane in 0..16 {
            to[lane] = bf16_bits(v[lane]);
        }
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; 16]) -> [f32; 16] {
        from.map(|bits| half::f16::from_bits(bits).to_f32_const())
    }
    #[inline(always)]
    fn store_f16(self, v: [f32; 16], to: &mut [u16; 16]) {
        *to = v.map(|x| half::f16::from_f32_const(x).to_bits());
    }

    lanewise!(add, a, b, a + b);
    lanewise!(sub, a, b, a - b);
    lanewise!(mul, a, b, a * b);
    lanewise!(div, a, b, a / b);
    lanewise!(max, a, b, if a > b { a } else { b });
    lanewise!(min, a, b, if a < b { a } else { b });
    lanewise!(
        scale_by_power,
        p,
        t,
        f32::from_bits(p.to_bits().wrapping_add(t.to_bits() << 23))
    );

    #[inline(always)]
    fn fma(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        self.add(self.mul(a, b), c)
    }

    #[inline(always)]
    fn sum(self, mut v: [f32; 16]) -> f32 {
        let mut width = 8;
        while width > 0 {
            for lane in 0..width {
                v[lane] += v[lane + width];
            }
            width /= 2;
        }
        v[0]
    }

    #[inline(always)]
    unsafe fn load_pair(self, from: *const u32) -> Self::Pair {
        // SAFETY: the caller's promise.
        let bits = unsafe { from.cast::<[u32; 16]>().read() };
        let mut pair = ([0.0; 16], [0.0; 16]);
        for lane in 0..16 {
            pair.0[lane] = f32::from_bits(bits[lane] << 16);
            pair.1[lane] = f32::from_bits(bits[lane] & 0xffff_0000);
        }
        pair
    }

    #[inline(always)]
    unsafe fn dot_pair(self, acc: [f32; 16], w: Self::Pair, x: *const u32) -> [f32; 16] {
        // SAFETY: the caller's promise.
        let (even, odd) = unsafe { (f32::from_bits(*x), f32::from_bits(*x.add(1))) };
        let acc = self.fma(w.0, [even; 16], acc);
        self.fma(w.1, [odd; 16], acc)
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> [i32; 16] {
        [x; 16]
    }
    #[inline(always)]
    fn to_f32(self, x: [i32; 16]) -> [f32; 16] {
        x.map(|x| x as f32)
    }

    #[inline(always)]
    unsafe fn load_quad(self, from: *const u32) -> Self::Quad {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[u32; 16]>().read() }.map(u32::to_le_bytes)
    }

    #[inline(always)]
    unsafe fn load_nibbles(self, from: *const u32) -> [Self::Quad; 2] {
        // SAFETY: the caller's promise.
        let words = unsafe { from.cast::<[u32; 16]>().read() };
        [0, 4].map(|shift| words.map(|word| (word >> shift & 0x0f0f_0f0f).to_le_bytes()))
    }

    #[inline(always)]
    unsafe fn dot_quad(self, mut acc: [i32; 16], w: Self::Quad, x: *const u32) -> [i32; 16] {
        // SAFETY: the caller's promise.
        let x = unsafe { *x }.to_le_bytes().map(|x| i32::from(x as i8));
        for lane in 0..16 {
            for i in 0..4 {
                acc[lane] += i32::from(w[lane][i]) * x[i];
            }
        }
        acc
    }

    #[inline(always)]
    fn prefetch(self, _: *const u32) {}
}

//! The gated activation of an expert.

use super::Isa;
use super::simd::{Kernel, Simd};

/// `out = silu(gate) * up` for each row of `gate_up`, `[rows, 2 * width]` with the gate's half first (SwiGLU, arXiv 2002.05202);
/// `out` is `[rows, width]`.
///
/// # Panics
/// When the lengths are not those.
pub fn gated_silu(isa: Isa, gate_up: &[f32], width: usize, out: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * out.len());
    assert!(out.len().is_multiple_of(width));
    isa.run(GatedSilu {
        gate_up,
        width,
        out,
    });
}

struct GatedSilu<'a> {
    gate_up: &'a [f32],
    width: usize,
    out: &'a mut [f32],
}

impl Kernel for GatedSilu<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (row, out) in self
            .gate_up
            .chunks_exact(2 * self.width)
            .zip(self.out.chunks_exact_mut(self.width))
        {
            let (gate, up) = row.split_at(self.width);
            let (gate, rest_gate) = gate.as_chunks::<16>();
            let (up, rest_up) = up.as_chunks::<16>();
            let (out, rest_out) = out.as_chunks_mut::<16>();
            for i in 0..gate.len() {
                s.store(one(s, s.load(&gate[i]), s.load(&up[i])), &mut out[i]);
            }
            if !rest_gate.is_empty() {
                let rest = one(s, s.load_some(rest_gate), s.load_some(rest_up));
                s.store_some(rest, rest_out);
            }
        }
    }
}

#[inline(always)]
fn one<S: Simd>(s: S, gate: S::V, up: S::V) -> S::V {
    let denominator = s.add(s.splat(1.0), s.exp(s.sub(s.splat(0.0), gate)));
    s.mul(s.div(gate, denominator), up)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn silu_is_that_of_f64_and_the_same_wherever_a_value_stands() {
        for isa in Isa::available() {
            for width in [1, 15, 16, 33, 100] {
                let gate_up = Random::new(9).values(2 * 2 * width, 12.0);
                let mut out = vec![0.0; 2 * width];
                gated_silu(isa, &gate_up, width, &mut out);
                for row in 0..2 {
                    for i in 0..width {
                        let (g, u) = (
                            gate_up[row * 2 * width + i],
                            gate_up[row * 2 * width + width + i],
                        );
                        let exact = f64::from(g) / (1.0 + (-f64::from(g)).exp()) * f64::from(u);
                        let found = out[row * width + i];
                        assert!((f64::from(found) - exact).abs() <= 1e-6 * exact.abs().max(1e-6));
                        let mut alone = [0.0];
                        gated_silu(isa, &[g, u], 1, &mut alone);
                        assert_eq!(alone[0].to_bits(), found.to_bits(), "{isa:?} {width} {i}");
                    }
                }
            }
        }
    }
}

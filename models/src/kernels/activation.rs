//! The gated activation of an expert.

use super::simd::{Kernel, Simd};
use super::{Isa, MatrixMut};

/// `gate = silu(gate) * up` (SwiGLU, arXiv 2002.05202), element by element.
///
/// # Panics
/// When the shapes differ.
pub fn gated_silu(isa: Isa, gate: MatrixMut<'_>, up: MatrixMut<'_>) {
    assert_eq!((gate.rows(), gate.cols()), (up.rows(), up.cols()));
    isa.run(GatedSilu { gate, up });
}

struct GatedSilu<'a> {
    gate: MatrixMut<'a>,
    up: MatrixMut<'a>,
}

impl Kernel for GatedSilu<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for row in 0..self.gate.rows() {
            let (gate, rest_gate) = self.gate.row(row).as_chunks_mut::<16>();
            let (up, rest_up) = self.up.row(row).as_chunks::<16>();
            for (gate, up) in gate.iter_mut().zip(up) {
                s.store(one(s, s.load(gate), s.load(up)), gate);
            }
            if !rest_gate.is_empty() {
                let rest = one(s, s.load_some(rest_gate), s.load_some(rest_up));
                s.store_some(rest, rest_gate);
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
                let (gate, up) = (
                    Random::new(9).values(2 * width, 12.0),
                    Random::new(10).values(2 * width, 12.0),
                );
                let silu = |gate: &[f32], up: &[f32], rows: usize| {
                    let (mut gate, mut up) = (gate.to_vec(), up.to_vec());
                    let width = gate.len() / rows;
                    gated_silu(
                        isa,
                        MatrixMut::new(&mut gate, rows, width, width),
                        MatrixMut::new(&mut up, rows, width, width),
                    );
                    gate
                };
                let out = silu(&gate, &up, 2);
                for i in 0..2 * width {
                    let (g, u, found) = (gate[i], up[i], out[i]);
                    let exact = f64::from(g) / (1.0 + (-f64::from(g)).exp()) * f64::from(u);
                    assert!((f64::from(found) - exact).abs() <= 1e-6 * exact.abs().max(1e-6));
                    let alone = silu(&[g], &[u], 1);
                    assert_eq!(alone[0].to_bits(), found.to_bits(), "{isa:?} {width} {i}");
                }
            }
        }
    }
}

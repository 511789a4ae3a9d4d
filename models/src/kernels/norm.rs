//! Normalisation of rows.

use super::Isa;
use super::simd::{Kernel, Simd};

/// RMS norm of each row of `x` (Zhang and Sennrich, arXiv 1910.07467): `x / sqrt(mean(x^2) + eps) * weight`.
///
/// # Panics
/// When `x` and `out` are not rows as long as `weight` (likewise below).
pub fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    check(x, weight, out);
    isa.run(Normalize {
        x,
        weight,
        eps,
        centred: false,
        out,
    });
}

/// Layer norm without bias of each row of `x` (arXiv 1607.06450): `(x - mean(x)) / sqrt(var(x) + eps) * weight`.
pub fn layer_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    check(x, weight, out);
    isa.run(Normalize {
        x,
        weight,
        eps,
        centred: true,
        out,
    });
}

/// RMS norm of one vector where it stands: a query's or key's head.
#[inline(always)]
pub(crate) fn rms_norm_in_place<S: Simd>(s: S, x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = inverse_root(sum_of_squares(s, x, 0.0), x.len(), eps);
    let factor = s.splat(scale);
    let (whole, rest) = x.as_chunks_mut::<16>();
    let (weights, rest_weights) = weight.as_chunks::<16>();
    for (x, w) in whole.iter_mut().zip(weights) {
        s.store(s.mul(s.mul(s.load(x), factor), s.load(w)), x);
    }
    for (x, w) in rest.iter_mut().zip(rest_weights) {
        *x = *x * scale * w;
    }
}

fn check(x: &[f32], weight: &[f32], out: &[f32]) {
    assert_eq!(x.len(), out.len());
    assert!(
        x.len().is_multiple_of(weight.len()),
        "rows are as long as the weight"
    );
}

struct Normalize<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    centred: bool,
    out: &'a mut [f32],
}

impl Kernel for Normalize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.weight.len();
        let (weights, rest_weights) = self.weight.as_chunks::<16>();
        for (x, out) in self
            .x
            .chunks_exact(width)
            .zip(self.out.chunks_exact_mut(width))
        {
            let mean = if self.centred {
                sum(s, x) / width as f32
            } else {
                0.0
            };
            let scale = inverse_root(sum_of_squares(s, x, mean), width, self.eps);
            let (factor, centre) = (s.splat(scale), s.splat(mean));
            let (x, rest) = x.as_chunks::<16>();
            let (out, rest_out) = out.as_chunks_mut::<16>();
            for i in 0..x.len() {
                let scaled = s.mul(s.sub(s.load(&x[i]), centre), factor);
                s.store(s.mul(scaled, s.load(&weights[i])), &mut out[i]);
            }
            for i in 0..rest.len() {
                rest_out[i] = (rest[i] - mean) * scale * rest_weights[i];
            }
        }
    }
}

#[inline(always)]
fn inverse_root(sum_of_squares: f32, width: usize, eps: f32) -> f32 {
    1.0 / (sum_of_squares / width as f32 + eps).sqrt()
}

#[inline(always)]
fn sum<S: Simd>(s: S, x: &[f32]) -> f32 {
    let (whole, rest) = x.as_chunks::<16>();
    let mut acc = s.splat(0.0);
    for x in whole {
        acc = s.add(acc, s.load(x));
    }
    s.sum(s.add(acc, s.load_some(rest)))
}

/// Sum of `(x - centre)^2`.
#[inline(always)]
fn sum_of_squares<S: Simd>(s: S, x: &[f32], centre: f32) -> f32 {
    let (whole, rest) = x.as_chunks::<16>();
    let mut acc = s.splat(0.0);
    for x in whole {
        let d = s.sub(s.load(x), s.splat(centre));
        acc = s.fma(d, d, acc);
    }
    let d = s.sub(s.load_some(rest), s.splat(centre));
    // Lanes beyond the end hold -centre, not a distance.
    let d = s.keep(d, 0, rest.len(), 0.0);
    s.sum(s.fma(d, d, acc))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn norms_are_those_of_f64_at_every_width() {
        for isa in Isa::available() {
            for width in [1, 5, 16, 17, 64, 100, 1024] {
                let mut random = Random::new(width as u64);
                let (x, weight) = (random.values(3 * width, 2.0), random.values(width, 1.0));
                for centred in [false, true] {
                    let mut out = vec![0.0; 3 * width];
                    let norm = if centred { layer_norm } else { rms_norm };
                    norm(isa, &x, &weight, 1e-5, &mut out);
                    for (row, out) in x.chunks(width).zip(out.chunks(width)) {
                        let row: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
                        let n = width as f64;
                        let mean = if centred {
                            row.iter().sum::<f64>() / n
                        } else {
                            0.0
                        };
                        let var = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
                        for i in 0..width {
                            let expected =
                                (row[i] - mean) / (var + 1e-5).sqrt() * f64::from(weight[i]);
                            let found = f64::from(out[i]);
                            assert!(
                                (found - expected).abs() < 1e-5,
                                "{isa:?} {width} {found} {expected}"
                            );
                        }
                    }
                    if !centred {
                        let mut row = x[..width].to_vec();
                        isa.run(InPlace(&mut row, &weight));
                        assert_eq!(row, out[..width]);
                    }
                }
            }
        }
    }

    struct InPlace<'a>(&'a mut [f32], &'a [f32]);
    impl Kernel for InPlace<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            rms_norm_in_place(s, self.0, self.1, 1e-5);
        }
    }
}

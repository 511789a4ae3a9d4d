//! The gate: softmax over router logits and the choice of experts.

use super::Isa;
use super::simd::{Kernel, Simd};

/// Softmax of each row of `width` values, in place.
///
/// # Panics
/// When `x` is not made of such rows.
pub fn softmax(isa: Isa, x: &mut [f32], width: usize) {
    assert!(x.len().is_multiple_of(width));
    isa.run(Softmax { x, width });
}

/// How experts are chosen from probabilities.
#[derive(Debug, Clone, Copy)]
pub struct TopK {
    /// Experts to choose from.
    pub experts: usize,
    /// Experts to choose.
    pub k: usize,
    /// Whether the weights of the chosen are divided by their sum.
    pub normalize: bool,
}

/// Chooses the `k` most probable experts of each row, in falling order, equals by their index. A NaN is
/// chosen only when nothing else is left, so that ids are distinct whatever the logits were.
///
/// `probabilities` is `[rows, experts]` and is used up; `ids` and `weights` are `[rows, k]`.
///
/// # Panics
/// When the lengths are not those, or `k` exceeds `experts`.
pub fn top_k(choice: TopK, probabilities: &mut [f32], ids: &mut [u16], weights: &mut [f32]) {
    let TopK {
        experts,
        k,
        normalize,
    } = choice;
    assert!(k <= experts && ids.len() == weights.len());
    assert_eq!(probabilities.len() * k, ids.len() * experts);
    for ((row, ids), weights) in probabilities
        .chunks_exact_mut(experts)
        .zip(ids.chunks_exact_mut(k))
        .zip(weights.chunks_exact_mut(k))
    {
        let mut sum = 0.0;
        for (id, weight) in ids.iter_mut().zip(weights.iter_mut()) {
            let best = best_of(row);
            *id = best as u16;
            *weight = row[best];
            sum += row[best];
            row[best] = TAKEN;
        }
        if normalize {
            for weight in weights {
                *weight /= sum;
            }
        }
    }
}

/// Stands where a probability has been taken.
const TAKEN: f32 = -2.0;
/// A NaN counts as less than any probability and more than a taken one.
const NAN: f32 = -1.0;

fn best_of(row: &[f32]) -> usize {
    let rank = |p: f32| if p.is_nan() { NAN } else { p };
    let mut best = 0;
    for (expert, p) in row.iter().enumerate() {
        if rank(*p) > rank(row[best]) {
            best = expert;
        }
    }
    best
}

struct Softmax<'a> {
    x: &'a mut [f32],
    width: usize,
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.x.chunks_exact_mut(self.width) {
            let mut largest = f32::NEG_INFINITY;
            for x in row.iter() {
                largest = if *x > largest { *x } else { largest };
            }
            let shift = s.splat(largest);
            let mut sums = s.splat(0.0);
            for chunk in row.chunks_mut(16) {
                let e = s.exp(s.sub(s.load_some(chunk), shift));
                let e = s.keep(e, 0, chunk.len(), 0.0);
                sums = s.add(sums, e);
                s.store_some(e, chunk);
            }
            let sum = s.sum(sums);
            for x in row {
                *x /= sum;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn softmax_is_that_of_f64(x in prop::collection::vec(-30f32..30.0, 1..200)) {
            let largest = x.iter().copied().fold(f32::MIN, f32::max);
            let sum: f64 = x.iter().map(|x| f64::from(x - largest).exp()).sum();
            for isa in Isa::available() {
                let mut out = x.clone();
                softmax(isa, &mut out, x.len());
                for (x, out) in x.iter().zip(&out) {
                    let exact = f64::from(x - largest).exp() / sum;
                    prop_assert!((f64::from(*out) - exact).abs() <= 1e-6 * exact + 1e-37);
                }
            }
        }

        #[test]
        fn top_k_is_a_stable_sort_cut_short(
            p in prop::collection::vec(prop::sample::select(vec![0.0f32, 0.1, 0.2, 0.3]), 1..40),
            k in 1usize..9,
        ) {
            let k = k.min(p.len());
            let mut order: Vec<usize> = (0..p.len()).collect();
            order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
            let (mut ids, mut weights) = (vec![0; k], vec![0.0; k]);
            let choice = TopK { experts: p.len(), k, normalize: false };
            top_k(choice, &mut p.clone(), &mut ids, &mut weights);
            for i in 0..k {
                prop_assert_eq!(usize::from(ids[i]), order[i]);
                prop_assert_eq!(weights[i], p[order[i]]);
            }
        }
    }

    #[test]
    fn weights_are_normalised_and_nans_chosen_last() {
        let choice = TopK {
            experts: 4,
            k: 3,
            normalize: false,
        };
        let (mut ids, mut weights) = ([0; 3], [0.0; 3]);
        top_k(
            choice,
            &mut [f32::NAN, 0.5, f32::NAN, 0.25],
            &mut ids,
            &mut weights,
        );
        assert_eq!(ids, [1, 3, 0]);
        let choice = TopK {
            experts: 3,
            k: 2,
            normalize: true,
        };
        let (mut ids, mut weights) = ([0; 2], [0.0; 2]);
        top_k(choice, &mut [0.25, 0.0, 0.75], &mut ids, &mut weights);
        assert_eq!((ids, weights), ([2, 0], [0.75, 0.25]));
    }
}

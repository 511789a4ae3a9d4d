//! Rotary position embedding (arXiv 2104.09864), half-split, from tables.
//!
//! Angles are computed as Hugging Face does: frequencies in f32, angle = position * frequency in f32, so that a long context's
//! rounding is the one the checkpoints are used with. Cosine and sine of that angle are exact to f32.

use std::f64::consts::PI;

use crate::spec::{Rope, RopeScaling};

use super::norm::rms_norm_in_place;
use super::simd::{Kernel, Simd};
use super::{Isa, MatrixMut};

/// Cosines and sines of every position and frequency.
#[derive(Debug)]
pub struct RopeTable {
    half: usize,
    /// `[positions][2][half]`: cosines, then sines.
    data: Vec<f32>,
}

impl RopeTable {
    /// Tables for positions `0..positions` and heads of `head_dim`.
    pub fn new(rope: &Rope, head_dim: usize, positions: usize) -> Self {
        let half = head_dim / 2;
        let frequencies = frequencies(rope, head_dim);
        let factor = match rope.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            } => attention_factor,
            _ => 1.0,
        };
        let mut data = Vec::with_capacity(positions * head_dim);
        for position in 0..positions {
            let angle = |f: &f32| f64::from(position as f32 * f);
            data.extend(frequencies.iter().map(|f| (angle(f).cos() * factor) as f32));
            data.extend(frequencies.iter().map(|f| (angle(f).sin() * factor) as f32));
        }
        RopeTable { half, data }
    }

    /// Bytes of a table; nothing if that overflows.
    pub fn bytes(head_dim: usize, positions: usize) -> Option<usize> {
        positions.checked_mul(head_dim)?.checked_mul(4)
    }

    /// Turns the heads of every row of `x` (`[positions.len(), heads * head_dim]`) to the row's position, each first RMS-normalised if a weight
    /// `[head_dim]` and an epsilon are given.
    ///
    /// # Panics
    /// When the columns are not heads, rows and positions differ in number, or a position is not in the table.
    pub fn turn_heads(
        &self,
        isa: Isa,
        x: MatrixMut<'_>,
        positions: &[u32],
        norm: Option<(&[f32], f32)>,
    ) {
        assert_eq!(x.rows(), positions.len());
        assert!(x.cols().is_multiple_of(2 * self.half));
        isa.run(TurnHeads {
            table: self,
            x,
            positions,
            norm,
        });
    }

    /// Turns one head where it stands.
    #[inline(always)]
    fn turn<S: Simd>(&self, s: S, x: &mut [f32], position: usize) {
        let row = &self.data[position * 2 * self.half..][..2 * self.half];
        let (cos, rest_cos) = row[..self.half].as_chunks::<16>();
        let (sin, rest_sin) = row[self.half..].as_chunks::<16>();
        let (low, high) = x.split_at_mut(self.half);
        let (low, rest_low) = low.as_chunks_mut::<16>();
        let (high, rest_high) = high.as_chunks_mut::<16>();
        for i in 0..low.len() {
            let (c, n) = (s.load(&cos[i]), s.load(&sin[i]));
            let (a, b) = (s.load(&low[i]), s.load(&high[i]));
            s.store(s.sub(s.mul(a, c), s.mul(b, n)), &mut low[i]);
            s.store(s.add(s.mul(b, c), s.mul(a, n)), &mut high[i]);
        }
        for i in 0..rest_low.len() {
            let (a, b) = (rest_low[i], rest_high[i]);
            rest_low[i] = a * rest_cos[i] - b * rest_sin[i];
            rest_high[i] = b * rest_cos[i] + a * rest_sin[i];
        }
    }
}

struct TurnHeads<'a> {
    table: &'a RopeTable,
    x: MatrixMut<'a>,
    positions: &'a [u32],
    norm: Option<(&'a [f32], f32)>,
}

impl Kernel for TurnHeads<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for (row, position) in self.positions.iter().enumerate() {
            for head in self.x.row(row).chunks_exact_mut(2 * self.table.half) {
                if let Some((weight, eps)) = self.norm {
                    rms_norm_in_place(s, head, weight, eps);
                }
                self.table.turn(s, head, *position as usize);
            }
        }
    }
}

/// Radians per position of each pair of a head's elements.
fn frequencies(rope: &Rope, head_dim: usize) -> Vec<f32> {
    let plain = |i: usize| 1.0 / rope.theta.powf(2.0 * i as f64 / head_dim as f64);
    (0..head_dim / 2)
        .map(|i| stretched(&rope.scaling, plain(i), i, rope.theta, head_dim) as f32)
        .collect()
}

fn stretched(scaling: &RopeScaling, plain: f64, i: usize, theta: f64, head_dim: usize) -> f64 {
    match *scaling {
        RopeScaling::None => plain,
        RopeScaling::Linear { factor } => plain / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_positions,
        } => {
            let turns = original_positions as f64 * plain / (2.0 * PI);
            let ramp = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
            let kept = ramp.clamp(0.0, 1.0);
            (1.0 - kept) * plain / factor + kept * plain
        }
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            original_positions,
            ..
        } => {
            // The index whose frequency makes `turns` turns in the original context.
            let index = |turns: f64| {
                let wavelengths = original_positions as f64 / (turns * 2.0 * PI);
                head_dim as f64 * wavelengths.ln() / (2.0 * theta.ln())
            };
            let low = index(beta_fast).floor().max(0.0);
            let high = index(beta_slow).ceil().min(head_dim as f64 - 1.0);
            let width = if high == low { 0.001 } else { high - low };
            let divided = ((i as f64 - low) / width).clamp(0.0, 1.0);
            plain / factor * divided + plain * (1.0 - divided)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use crate::testing::Random;
    use candle_core::{Device, Tensor};

    #[test]
    fn heads_are_turned_as_the_reference_turns_them_with_every_scaling() {
        let scalings = [
            RopeScaling::None,
            RopeScaling::Linear { factor: 3.0 },
            RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_positions: 64,
            },
            RopeScaling::Yarn {
                factor: 4.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                attention_factor: 1.25,
                original_positions: 128,
            },
        ];
        let (rows, heads) = (70, 3);
        for scaling in scalings {
            for head_dim in [2, 6, 32, 80, 128] {
                let rope = Rope {
                    theta: 1e4,
                    scaling: scaling.clone(),
                };
                let x = Random::new(5).values(rows * heads * head_dim, 1.0);
                let expected = (|| {
                    let (cos, sin) = reference::rope_tables(&rope, head_dim, rows)?;
                    let x = Tensor::from_slice(&x, (rows, heads, head_dim), &Device::Cpu)?
                        .transpose(0, 1)?;
                    let turned = reference::rotate(&x.contiguous()?, &cos, &sin)?;
                    turned.transpose(0, 1)?.flatten_all()?.to_vec1::<f32>()
                })()
                .unwrap();
                let table = RopeTable::new(&rope, head_dim, rows);
                let positions: Vec<u32> = (0..rows as u32).collect();
                for isa in Isa::available() {
                    let mut out = x.clone();
                    let width = heads * head_dim;
                    let rows = MatrixMut::new(&mut out, positions.len(), width, width);
                    table.turn_heads(isa, rows, &positions, None);
                    for (a, b) in out.iter().zip(&expected) {
                        assert!(
                            (a - b).abs() < 1e-5,
                            "{isa:?} {scaling:?} {head_dim}: {a} {b}"
                        );
                    }
                }
            }
        }
    }
}

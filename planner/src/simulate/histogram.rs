//! Quantiles of many times in little memory.

use super::Quantiles;

/// Counts of times from a microsecond to eleven days, in bins of one percent.
#[derive(Debug, Clone)]
pub(super) struct Histogram {
    bins: Vec<u64>,
    count: u64,
    sum_s: f64,
}

const LEAST_S: f64 = 1e-6;
const STEP: f64 = 1.01;
const BINS: usize = 2800;

impl Histogram {
    pub(super) fn new() -> Self {
        Histogram {
            bins: vec![0; BINS],
            count: 0,
            sum_s: 0.0,
        }
    }

    pub(super) fn add(&mut self, time_s: f64) {
        let bin = (time_s.max(LEAST_S) / LEAST_S).ln() / STEP.ln();
        self.bins[(bin as usize).min(BINS - 1)] += 1;
        self.count += 1;
        self.sum_s += time_s;
    }

    pub(super) fn quantiles(&self) -> Quantiles {
        Quantiles {
            mean_s: self.mean_s(),
            p50_s: self.quantile_s(0.5),
            p90_s: self.quantile_s(0.9),
            p99_s: self.quantile_s(0.99),
        }
    }

    fn mean_s(&self) -> f64 {
        if self.count == 0 {
            0.0
        } else {
            self.sum_s / self.count as f64
        }
    }

    /// The middle of the bin with the quantile; 0 of nothing.
    fn quantile_s(&self, share: f64) -> f64 {
        let wanted = (share * self.count as f64).ceil().max(1.0) as u64;
        let mut sum = 0;
        for (bin, count) in self.bins.iter().enumerate() {
            sum += count;
            if sum >= wanted {
                return LEAST_S * STEP.powf(bin as f64 + 0.5);
            }
        }
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_a_bin() {
        let mut histogram = Histogram::new();
        assert_eq!((histogram.quantile_s(0.5), histogram.mean_s()), (0.0, 0.0));
        for millis in 1..=1000 {
            histogram.add(f64::from(millis) * 1e-3);
        }
        for (share, expected) in [
            (0.5, 0.5),
            (0.9, 0.9),
            (0.99, 0.99),
            (1.0, 1.0),
            (0.0, 0.001),
        ] {
            let found = histogram.quantile_s(share);
            assert!((found / expected - 1.0).abs() < 0.011, "{share}: {found}");
        }
        assert!((histogram.mean_s() - 0.5005).abs() < 1e-9);
        histogram.add(0.0);
        histogram.add(1e9);
    }
}

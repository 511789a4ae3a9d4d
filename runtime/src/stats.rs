//! Summaries of measured times.

use serde::Serialize;

/// What is said of a distribution. In the unit of its values.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Summary {
    /// Values that were measured.
    pub count: usize,
    /// Their mean.
    pub mean: f64,
    /// Half of them are not larger.
    pub median: f64,
    /// Nine tenths of them are not larger.
    pub p90: f64,
    /// All but one in a hundred are not larger.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Summary {
    /// Of `values`, in any order. All zero if there are none.
    pub fn of(mut values: Vec<f64>) -> Summary {
        values.sort_by(f64::total_cmp);
        let Some(&max) = values.last() else {
            return Summary::default();
        };
        Summary {
            count: values.len(),
            mean: values.iter().sum::<f64>() / values.len() as f64,
            median: percentile(&values, 0.5),
            p90: percentile(&values, 0.9),
            p99: percentile(&values, 0.99),
            max,
        }
    }
}

/// By linear interpolation between the closest ranks, as NumPy does. `sorted` is not empty.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let rank = share * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[rank.floor() as usize], sorted[rank.ceil() as usize]);
    low + (high - low) * rank.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_numpy() {
        let summary = Summary::of((1..=10).rev().map(f64::from).collect());
        assert_eq!(
            (summary.median, summary.max, summary.count, summary.mean),
            (5.5, 10.0, 10, 5.5)
        );
        assert!((summary.p90 - 9.1).abs() < 1e-12);
        assert!((summary.p99 - 9.91).abs() < 1e-12);
        assert_eq!(Summary::of(vec![3.0]).p99, 3.0);
        assert_eq!(Summary::of(vec![]), Summary::default());
    }
}

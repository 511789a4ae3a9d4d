//! A measured function of the load: straight lines between measured points.

use serde::{Deserialize, Serialize};

/// Points (x, seconds), x ascending. Between two of them, and beyond the last two, a straight line; below the first, its value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Curve(Vec<(f64, f64)>);

impl Curve {
    /// Through the points, which are sorted first. `None` for no points, the same x twice, or values that are not finite and at least 0.
    pub fn through(mut points: Vec<(f64, f64)>) -> Option<Self> {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let curve = Curve(points);
        curve.is_sound().then_some(curve)
    }

    /// Whether the points make a curve: what is read from a file is asked first.
    pub fn is_sound(&self) -> bool {
        let finite = |&(x, y): &(f64, f64)| x.is_finite() && y.is_finite() && x >= 0.0 && y >= 0.0;
        !self.0.is_empty()
            && self.0.iter().all(finite)
            && self.0.windows(2).all(|pair| pair[0].0 < pair[1].0)
    }

    /// The points.
    pub fn points(&self) -> &[(f64, f64)] {
        &self.0
    }

    /// Its value at `x`, never below 0.
    pub fn at(&self, x: f64) -> f64 {
        let points = &self.0;
        let after = points.partition_point(|point| point.0 < x);
        let (left, right) = match (after, points.len()) {
            (_, 1) | (0, _) => return points[0].1,
            (after, count) if after == count => (points[count - 2], points[count - 1]),
            (after, _) => (points[after - 1], points[after]),
        };
        let slope = (right.1 - left.1) / (right.0 - left.0);
        (right.1 + slope * (x - right.0)).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn between_and_beyond_the_points() {
        let curve = Curve::through(vec![(4.0, 3.0), (1.0, 1.0), (2.0, 1.0)]).unwrap();
        for (x, y) in [(0.5, 1.0), (1.5, 1.0), (3.0, 2.0), (4.0, 3.0), (6.0, 5.0)] {
            assert_eq!(curve.at(x), y, "at {x}");
        }
        assert_eq!(Curve::through(vec![(8.0, 2.0)]).unwrap().at(100.0), 2.0);
        assert_eq!(Curve::through(vec![]), None);
        assert_eq!(Curve::through(vec![(1.0, 1.0), (1.0, 2.0)]), None);
        assert_eq!(Curve::through(vec![(1.0, f64::NAN)]), None);
    }
}

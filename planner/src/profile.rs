//! What was measured on one machine for one model: the file that `volley profile` writes and `volley plan --hardware` reads.
//!
//! The paper's fits (T_a = k1 b + k2, T_e = k3 b + k4) are in it with their residuals. What is computed with is the measured curves themselves, for a CPU's
//! experts are not a line: weights are read at the same cost from one row to about sixteen.

use serde::{Deserialize, Serialize};

use crate::cost::{AttentionCost, Curve, ExpertCost, LinkCost, Stage};
use crate::{ModelShape, PlanError, Transport};

/// Measurements of a machine and a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// The machine's name among the GPUs of the file.
    pub gpu: String,
    /// The model.
    pub model: ModelShape,
    /// What the workers compute in, as `volley serve` names it.
    pub dtype: String,
    /// Threads that computed.
    pub threads: usize,
    /// Bytes of one row on its way, either way.
    pub row_bytes: f64,
    /// Seconds for each token in the cache that a row attends to, in a layer.
    pub per_cached_s: f64,
    /// Shares of a layer's rows that experts get, the busiest first, mean over layers.
    pub popularity: Vec<f64>,
    /// Seconds of a layer's attention by rows, nothing cached, on all threads.
    pub attention: Curve,
    /// Seconds of embedding and head by rows, on all threads.
    pub step: Curve,
    /// Seconds of one expert by its rows, on all threads.
    pub expert: Curve,
    /// The same three where each thread computes its own while all others do so too.
    pub apart: Apart,
    /// Seconds between two steps of a micro-batch in which no worker has work.
    pub turn_s: f64,
    /// Seconds of a hop by bytes where there are more workers than threads, so that some have to be woken.
    pub crowded_link: Line,
    /// The paper's fits.
    pub fits: Fits,
    /// The hop.
    pub link: Transport,
    /// What the hop's line carries, in bytes/s.
    pub link_bytes_per_s: f64,
}

/// Measurements with as many modules at work as there are threads, one on each: what it costs that they share caches and memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Apart {
    /// Seconds of a layer's attention by rows.
    pub attention: Curve,
    /// Seconds of embedding and head by rows.
    pub step: Curve,
    /// Seconds of one expert by its rows.
    pub expert: Curve,
}

/// Lines through the measurements.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fits {
    /// k1, k2: seconds of attention by rows of a worker.
    pub attention: Line,
    /// k3, k4: seconds of an expert by its rows.
    pub expert: Line,
    /// Seconds of a hop by bytes.
    pub link: Line,
}

/// `intercept + slope * x`, and how far it is off.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    /// Seconds for each x.
    pub slope: f64,
    /// Seconds at x = 0.
    pub intercept: f64,
    /// The largest relative difference from a measured point.
    pub residual: f64,
}

impl Line {
    /// The line of least squares of relative errors, so that small loads count as much as large ones. Neither part is below 0.
    pub fn through(points: &[(f64, f64)]) -> Self {
        let weighted = |value: &dyn Fn(f64, f64) -> f64| -> f64 {
            points.iter().map(|&(x, y)| value(x, y) / (y * y)).sum()
        };
        let (w, x, y) = (
            weighted(&|_, _| 1.0),
            weighted(&|x, _| x),
            weighted(&|_, y| y),
        );
        let (xx, xy) = (weighted(&|x, _| x * x), weighted(&|x, y| x * y));
        let determinant = w * xx - x * x;
        let mut slope = if determinant > 0.0 {
            (w * xy - x * y) / determinant
        } else {
            0.0
        };
        let mut intercept = (y - slope * x) / w;
        if slope < 0.0 {
            (slope, intercept) = (0.0, y / w);
        } else if intercept < 0.0 {
            (slope, intercept) = (xy / xx, 0.0);
        }
        let off = points
            .iter()
            .map(|&(x, y)| ((intercept + slope * x) / y - 1.0).abs());
        Self {
            slope,
            intercept,
            residual: off.fold(0.0, f64::max),
        }
    }
}

impl Profile {
    /// Refuses what cannot have been measured.
    ///
    /// # Errors
    /// Names the key.
    pub fn check(&self, place: &str) -> Result<(), PlanError> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let sum: f64 = self.popularity.iter().sum();
        let share = |value: &f64| value.is_finite() && *value >= 0.0;
        for (key, good) in [
            ("attention", self.attention.is_sound()),
            ("step", self.step.is_sound()),
            ("expert", self.expert.is_sound()),
            ("apart.attention", self.apart.attention.is_sound()),
            ("apart.step", self.apart.step.is_sound()),
            ("apart.expert", self.apart.expert.is_sound()),
            ("turn_s", self.turn_s.is_finite() && self.turn_s >= 0.0),
            ("row_bytes", positive(self.row_bytes)),
            ("link_bytes_per_s", positive(self.link_bytes_per_s)),
            (
                "per_cached_s",
                self.per_cached_s.is_finite() && self.per_cached_s >= 0.0,
            ),
            (
                "popularity",
                self.popularity.iter().all(share) && (sum - 1.0).abs() < 1e-3,
            ),
            ("threads", self.threads > 0),
        ] {
            if !good {
                return Err(PlanError::invalid(
                    format!("{place}: profile.{key}"),
                    "these are no measurements",
                    "run `volley profile` again",
                ));
            }
        }
        Ok(())
    }

    /// T_a of a worker on the machine.
    pub fn attention_cost(&self) -> AttentionCost {
        let layer = Stage::Measured {
            rows: self.attention.clone(),
            per_cached_s: self.per_cached_s,
        };
        AttentionCost {
            dense_layer: layer.clone(),
            layer,
            step: Stage::Measured {
                rows: self.step.clone(),
                per_cached_s: 0.0,
            },
        }
    }

    /// T_e of a worker on the machine.
    pub fn expert_cost(&self) -> ExpertCost {
        ExpertCost {
            overhead_s: 0.0,
            expert: Stage::Measured {
                rows: self.expert.clone(),
                per_cached_s: 0.0,
            },
            per_row_s: 0.0,
        }
    }

    /// T_c.
    pub fn link_cost(&self) -> LinkCost {
        LinkCost::of(self.link, self.link_bytes_per_s)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_and_its_residual_told() {
        let points: Vec<(f64, f64)> = [1.0, 2.0, 4.0, 8.0].map(|x| (x, 3.0 + 0.5 * x)).to_vec();
        let line = Line::through(&points);
        assert!((line.slope - 0.5).abs() < 1e-9 && (line.intercept - 3.0).abs() < 1e-9);
        assert!(line.residual < 1e-9);
        let bent = Line::through(&[(1.0, 1.0), (2.0, 1.0), (3.0, 4.0)]);
        assert!(bent.residual > 0.1 && bent.intercept >= 0.0 && bent.slope >= 0.0);
        assert_eq!(Line::through(&[(1.0, 2.0), (4.0, 1.0)]).slope, 0.0);
        assert_eq!(Line::through(&[(1.0, 1.0), (4.0, 9.0)]).intercept, 0.0);
    }

    pub(crate) fn profile() -> Profile {
        let line = Line {
            slope: 0.0,
            intercept: 0.0,
            residual: 0.0,
        };
        Profile {
            gpu: "here".to_owned(),
            model: ModelShape::preset("mixtral-8x7b").unwrap(),
            dtype: "bf16".to_owned(),
            threads: 2,
            row_bytes: 8192.0,
            per_cached_s: 1e-9,
            popularity: vec![0.125; 8],
            attention: Curve::through(vec![(1.0, 1e-3), (16.0, 2e-3)]).unwrap(),
            step: Curve::through(vec![(1.0, 1e-3)]).unwrap(),
            expert: Curve::through(vec![(1.0, 1e-3), (16.0, 1e-3), (32.0, 2e-3)]).unwrap(),
            apart: Apart {
                attention: Curve::through(vec![(1.0, 1.5e-3), (16.0, 3e-3)]).unwrap(),
                step: Curve::through(vec![(1.0, 1.5e-3)]).unwrap(),
                expert: Curve::through(vec![(1.0, 1.8e-3), (16.0, 1.8e-3), (32.0, 3e-3)]).unwrap(),
            },
            turn_s: 1e-4,
            crowded_link: Line {
                intercept: 5e-5,
                ..line
            },
            fits: Fits {
                attention: line,
                expert: line,
                link: line,
            },
            link: Transport {
                overhead_us: 10.0,
                share: 1.0,
                tail: 1.0,
                per_peer_us: 0.0,
            },
            link_bytes_per_s: 1e9,
        }
    }

    #[test]
    fn what_cannot_have_been_measured_is_refused_by_key() {
        profile().check("p").unwrap();
        let broken = Profile {
            popularity: vec![0.5; 8],
            ..profile()
        };
        let said = broken.check("p.toml").unwrap_err().to_string();
        assert!(said.contains("p.toml: profile.popularity"), "{said}");
        let broken = Profile {
            turn_s: f64::NAN,
            ..profile()
        };
        let said = broken.check("p.toml").unwrap_err().to_string();
        assert!(said.contains("p.toml: profile.turn_s"), "{said}");
    }
}

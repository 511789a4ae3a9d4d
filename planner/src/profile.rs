//! What was measured on one machine for one model: the file that `volley profile` writes and `volley plan --hardware` reads.
//!
//! The paper's fits (T_a = k1 b + k2, T_e = k3 b + k4) are in it with their residuals. What is computed with is the measured curves themselves, for a CPU's
//! experts are not a line: weights are read at the same cost from one row to about sixteen.

use serde::{Deserialize, Serialize};

use crate::cost::{AttentionCost, Curve, ExpertCost, LinkCost, Stage, workers_visited};
use crate::{ModelShape, PlanError, Stages, Transport};

/// Measurements of a machine and a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// The machine's name among the GPUs of the file.
    pub gpu: String,
    /// The model's name.
    pub model: String,
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
    /// Seconds of a layer's attention by rows, nothing cached.
    pub attention: Curve,
    /// Seconds of embedding and head by rows.
    pub step: Curve,
    /// Seconds of one expert by its rows.
    pub expert: Curve,
    /// The paper's fits.
    pub fits: Fits,
    /// The hop.
    pub link: Transport,
    /// What the hop's line carries, in bytes/s.
    pub link_bytes_per_s: f64,
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

/// A cluster on the profiled machine, whose workers share its cores.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Local {
    /// Attention workers (M).
    pub attention_workers: usize,
    /// Expert workers (N).
    pub expert_workers: usize,
    /// Micro-batches (m).
    pub micro_batches: usize,
    /// Sequences that decode at once.
    pub batch: usize,
    /// Mean tokens in the cache of each.
    pub context: f64,
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

    /// The time of a decode step of a cluster whose workers share this machine's cores, in seconds.
    ///
    /// Idle workers help busy ones, so the work of all workers is done by all cores, one piece after the other, and a
    /// hop is hidden if another micro-batch has work meanwhile.
    pub fn local_step_s(&self, model: &ModelShape, local: &Local) -> f64 {
        let workers = local.attention_workers.min(local.batch).max(1);
        let m = local.micro_batches.min(local.batch / workers).max(1);
        let rows = local.batch as f64 / (m * workers) as f64;
        let all = local.batch as f64 / m as f64;
        let attention = self.attention_cost();
        let experts = self.expert_cost();
        let visits = self
            .popularity
            .iter()
            .map(|share| share * all * model.top_k as f64);
        // How many rows an expert gets varies; it is visited at all with this chance, if visits are independent.
        let layer_s = visits.map(|rows| {
            let chance = 1.0 - (-rows).exp();
            if chance > 0.0 {
                chance * experts.expert.time_s(rows / chance, 0.0)
            } else {
                0.0
            }
        });
        let link = self.link_cost();
        let held = model.experts.div_ceil(local.expert_workers);
        let bytes = |copies: f64| link.hop_s(rows * copies * self.row_bytes, local.expert_workers);
        let stages = Stages {
            attention_s: workers as f64 * attention.layer_s(rows, rows * local.context),
            dispatch_s: bytes(workers_visited(model.experts, model.top_k, held)),
            expert_s: layer_s.sum(),
            combine_s: bytes(model.top_k as f64),
        };
        stages.shared_total_s(m, model.moe_layers) + (m * workers) as f64 * attention.step_s(rows)
    }
}

#[cfg(test)]
mod tests {
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

    fn profile() -> Profile {
        let line = Line {
            slope: 0.0,
            intercept: 0.0,
            residual: 0.0,
        };
        Profile {
            gpu: "here".to_owned(),
            model: "mixtral-8x7b".to_owned(),
            dtype: "bf16".to_owned(),
            threads: 2,
            row_bytes: 8192.0,
            per_cached_s: 1e-9,
            popularity: vec![0.125; 8],
            attention: Curve::through(vec![(1.0, 1e-3), (16.0, 2e-3)]).unwrap(),
            step: Curve::through(vec![(1.0, 1e-3)]).unwrap(),
            expert: Curve::through(vec![(1.0, 1e-3), (16.0, 1e-3), (32.0, 2e-3)]).unwrap(),
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
    fn workers_that_share_cores_add_their_work() {
        let model = ModelShape::preset("mixtral-8x7b").unwrap();
        let of = |m, workers, batch| {
            let local = Local {
                attention_workers: workers,
                expert_workers: 2,
                micro_batches: m,
                batch,
                context: 0.0,
            };
            profile().local_step_s(&model, &local)
        };
        // Experts read their weights for each micro-batch again, attention for each worker.
        assert!(of(2, 1, 32) > of(1, 1, 32));
        assert!(of(1, 2, 32) > of(1, 1, 32));
        // More micro-batches than sequences are not opened.
        assert_eq!(of(4, 1, 1), of(1, 1, 1));
        profile().check("p").unwrap();
        let broken = Profile {
            popularity: vec![0.5; 8],
            ..profile()
        };
        assert!(
            broken
                .check("p.toml")
                .unwrap_err()
                .to_string()
                .contains("p.toml: profile.popularity")
        );
    }
}

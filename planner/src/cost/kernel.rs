//! The time of one kernel by the roofline, and of several one after the other.

use serde::{Deserialize, Serialize};

use super::Curve;

/// Seconds that grow with the load: `fixed + per_row * rows + per_cached * cached tokens`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Affine {
    /// Whatever the load.
    pub fixed_s: f64,
    /// For each row (token) of the micro-batch.
    pub per_row_s: f64,
    /// For each token in the KV cache that the rows attend to, all rows together.
    pub per_cached_s: f64,
}

impl Affine {
    /// At a load.
    pub fn at(&self, rows: f64, cached: f64) -> f64 {
        self.fixed_s + self.per_row_s * rows + self.per_cached_s * cached
    }
}

/// One kernel: a launch, then arithmetic, memory and links between GPUs side by side.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kernel {
    /// What it computes.
    pub name: &'static str,
    /// Launch, or the latency of a collective.
    pub overhead_s: f64,
    /// Time of its operations at the rate that is reached.
    pub compute: Affine,
    /// Time of its bytes at the bandwidth that is reached.
    pub memory: Affine,
    /// Time of what goes to other GPUs of the worker.
    pub link: Affine,
}

impl Kernel {
    /// At a load.
    pub fn time_s(&self, rows: f64, cached: f64) -> f64 {
        self.overhead_s
            + self
                .compute
                .at(rows, cached)
                .max(self.memory.at(rows, cached))
                .max(self.link.at(rows, cached))
    }
}

/// Kernels one after the other, or what was measured instead.
#[derive(Debug, Clone, PartialEq)]
pub enum Stage {
    /// From first principles.
    Kernels(Vec<Kernel>),
    /// Measured: a curve over rows, and the time of a cached token.
    Measured {
        /// Seconds by rows, nothing cached.
        rows: Curve,
        /// Seconds for each cached token.
        per_cached_s: f64,
    },
}

impl Stage {
    /// Seconds for `rows` that attend to `cached` tokens together. No rows take no time.
    pub fn time_s(&self, rows: f64, cached: f64) -> f64 {
        if rows <= 0.0 {
            return 0.0;
        }
        match self {
            Stage::Kernels(kernels) => kernels.iter().map(|k| k.time_s(rows, cached)).sum(),
            Stage::Measured {
                rows: curve,
                per_cached_s,
            } => curve.at(rows) + per_cached_s * cached,
        }
    }

    /// The part of it that is there with one row: the paper's k2 and k4.
    pub fn intercept_s(&self) -> f64 {
        self.time_s(1.0, 0.0)
    }
}

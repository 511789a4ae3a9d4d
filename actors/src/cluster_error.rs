//! Why a cluster does not start.

use volley_models::ModuleError;
use volley_transports::{PlacementError, ShapeError, TopologyError, WorkerId};

/// Why a cluster did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// A number of the configuration is out of range.
    #[error("{0}")]
    Config(String),
    /// A worker could not load its part of the model.
    #[error("{worker} could not load: {reason}")]
    Load {
        /// The worker.
        worker: WorkerId,
        /// What it says.
        reason: String,
    },
    /// A worker's thread could not be started.
    #[error("the thread of {worker} could not be started: {error}")]
    Thread {
        /// The worker.
        worker: WorkerId,
        /// What the system says.
        error: std::io::Error,
    },
    /// The sizes of a module do not fit.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// Experts cannot be placed.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// The exchange between the sides cannot have this shape.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The fabric cannot have this shape.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// The control thread could not be started.
    #[error("the control thread could not be started: {0}")]
    Control(std::io::Error),
    /// The control thread ended.
    #[error("the cluster's control thread ended before the workers had loaded; the log says why")]
    ControlEnded,
}

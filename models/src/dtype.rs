//! What a module computes in.

use serde::{Deserialize, Serialize};

use crate::kernels::WeightType;
use crate::weights::ElementType;

/// Type of a module's packed weights and of its KV cache. Sums, norms, residuals and the router are f32 with either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeType {
    /// f32 throughout.
    F32,
    /// Weights and cache in bf16; activations are rounded to bf16 before they are multiplied with weights.
    Bf16,
}

impl ComputeType {
    /// The type for weights stored as `stored`: bf16 for bf16, f32 for all else (f16 has more digits than bf16 keeps).
    pub fn for_stored(stored: Option<ElementType>) -> Self {
        match stored {
            Some(ElementType::Bf16) => ComputeType::Bf16,
            _ => ComputeType::F32,
        }
    }

    /// Bytes of one weight or cached element.
    pub fn bytes(self) -> usize {
        match self {
            ComputeType::F32 => 4,
            ComputeType::Bf16 => 2,
        }
    }

    pub(crate) fn weights(self) -> WeightType {
        match self {
            ComputeType::F32 => WeightType::F32,
            ComputeType::Bf16 => WeightType::Bf16,
        }
    }
}

impl std::fmt::Display for ComputeType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ComputeType::F32 => "f32",
            ComputeType::Bf16 => "bf16",
        })
    }
}

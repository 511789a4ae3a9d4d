//! What a module computes in, and what its weights are packed as.

use serde::{Deserialize, Serialize};

use crate::kernels::WeightType;
use crate::spec::ModelSpec;
use crate::weights::ElementType;

/// Type of a module's packed weights, unless they are [quantised](Quantization), and of its KV cache. Sums, norms, residuals and
/// the router are f32 with either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeType {
    /// f32 throughout. Weights that are stored in f16 stay in f16, and are widened as they are multiplied, which changes nothing.
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
}

impl std::fmt::Display for ComputeType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ComputeType::F32 => "f32",
            ComputeType::Bf16 => "bf16",
        })
    }
}

/// Weights of fewer bits than they are stored in. Cache, frames and residuals keep the [`ComputeType`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// 8 bits for all matrices but the router and an embedding of its own.
    Q8,
    /// 4 bits for the experts, 8 for the rest: attention and the head have few of the weights, and every token meets all of them.
    Q4,
}

impl std::fmt::Display for Quantization {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Quantization::Q8 => "q8",
            Quantization::Q4 => "q4",
        })
    }
}

/// What the matrices of a model are packed as. The router is f32 always: it decides which experts a token visits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WeightTypes {
    /// The experts.
    pub(crate) experts: WeightType,
    /// Attention, dense FFNs and the head.
    pub(crate) dense: WeightType,
    /// The embedding, where it is not the head.
    pub(crate) embedding: ElementType,
}

impl WeightTypes {
    pub(crate) fn new(
        spec: &ModelSpec,
        dtype: ComputeType,
        quantize: Option<Quantization>,
    ) -> Self {
        let (plain, embedding) = match (dtype, spec.stored_as) {
            (ComputeType::Bf16, _) => (WeightType::Bf16, ElementType::Bf16),
            (ComputeType::F32, Some(ElementType::F16)) => (WeightType::F16, ElementType::F16),
            (ComputeType::F32, _) => (WeightType::F32, ElementType::F32),
        };
        let (experts, dense) = match quantize {
            None => (plain, plain),
            Some(Quantization::Q8) => (WeightType::Q8, WeightType::Q8),
            Some(Quantization::Q4) => (WeightType::Q4, WeightType::Q8),
        };
        WeightTypes {
            experts,
            dense,
            embedding,
        }
    }
}

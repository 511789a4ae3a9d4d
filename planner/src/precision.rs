//! What numbers are stored, sent and multiplied as.

use serde::{Deserialize, Serialize};

/// Type of stored or sent numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    Bf16,
    /// 1 byte, and multiplied at the FP8 rate where the GPU has one.
    Fp8,
    /// 8 bits and an f16 scale for each 64 of them; multiplied in bf16.
    Q8,
    /// 4 bits and an f16 scale for each 32 of them; multiplied in bf16.
    Q4,
}

impl Dtype {
    /// Bytes of one element, its share of the scale included.
    pub fn bytes(self) -> f64 {
        match self {
            Dtype::F32 => 4.0,
            Dtype::Bf16 => 2.0,
            Dtype::Fp8 => 1.0,
            Dtype::Q8 => 1.0 + 2.0 / 64.0,
            Dtype::Q4 => 0.5 + 2.0 / 32.0,
        }
    }
}

/// The type of everything that is stored or travels. Residuals and sums are bf16 at least and are not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Precision {
    /// Weights of attention, dense FFNs, shared experts, embedding and head.
    pub attention: Dtype,
    /// Weights of routed experts.
    pub experts: Dtype,
    /// KV cache.
    pub kv: Dtype,
    /// Rows on their way to the experts.
    pub dispatch: Dtype,
    /// Outputs on their way back.
    pub combine: Dtype,
}

impl Precision {
    /// Everything in bf16, as the paper's evaluation.
    pub const BF16: Self = Self {
        attention: Dtype::Bf16,
        experts: Dtype::Bf16,
        kv: Dtype::Bf16,
        dispatch: Dtype::Bf16,
        combine: Dtype::Bf16,
    };

    /// Weights in `dtype`; cache in bf16 at most; rows travel in bf16, but to FP8 experts in FP8.
    pub fn of_weights(dtype: Dtype) -> Self {
        Self {
            attention: dtype,
            experts: dtype,
            kv: if dtype == Dtype::F32 {
                Dtype::F32
            } else {
                Dtype::Bf16
            },
            dispatch: match dtype {
                Dtype::F32 | Dtype::Fp8 => dtype,
                Dtype::Bf16 | Dtype::Q8 | Dtype::Q4 => Dtype::Bf16,
            },
            combine: if dtype == Dtype::F32 {
                Dtype::F32
            } else {
                Dtype::Bf16
            },
        }
    }
}

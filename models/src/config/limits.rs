//! The largest model that Volley reads: each size has a bound, so that no product of sizes overflows.
//!
//! The bounds stand far above every published model (the widest residual stream is below 2^15, the largest
//! vocabulary below 2^19) and exist so that a broken or hostile `config.json` is refused with a sentence instead of
//! exhausting memory. With these, one tensor has at most 2^44 elements, and
//! [`MODEL_BYTES_MAX`] bounds the rest.

use crate::{DenseTensor, ExpertTensor, ModelSpec, TensorId};

/// Most layers.
pub const LAYERS_MAX: usize = 1024;
/// Widest residual stream and widest intermediate activation.
pub const WIDTH_MAX: usize = 1 << 20;
/// Most vocabulary entries.
pub const VOCAB_MAX: usize = 1 << 24;
/// Most attention heads.
pub const HEADS_MAX: usize = 1 << 12;
/// Widest attention head.
pub const HEAD_DIM_MAX: usize = 1 << 12;
/// Most experts of a layer.
pub const EXPERTS_MAX: usize = 1 << 12;
/// Longest context, in tokens.
pub const POSITIONS_MAX: usize = 1 << 30;
/// Most weights of a whole model in bytes, widened to f32: keeps every sum of sizes in an `i64`.
pub const MODEL_BYTES_MAX: u64 = 1 << 62;

/// Bytes of all weights as f32, or `None` beyond [`MODEL_BYTES_MAX`].
pub(crate) fn total_bytes(spec: &ModelSpec) -> Option<u64> {
    let elements = |id: TensorId| {
        let (rows, cols) = id.shape(spec)?;
        (rows as u64).checked_mul(cols as u64)
    };
    let mut total: u64 = 0;
    let mut add = |count: u64, each: Option<u64>| -> Option<()> {
        total = total.checked_add(count.checked_mul(each?)?)?;
        Some(())
    };
    add(2, elements(TensorId::Embedding))?;
    for layer in 0..spec.layers.len() {
        for tensor in DenseTensor::ALL {
            let id = TensorId::Dense(layer, tensor);
            if id.shape(spec).is_some() {
                add(1, elements(id))?;
            }
        }
    }
    if let Some(layer) = spec.moe_layers().next() {
        let expert = elements(TensorId::Expert(layer, 0, ExpertTensor::Gate))?;
        let experts = (spec.moe_layers().count() as u64).checked_mul(spec.experts as u64)?;
        add(experts.checked_mul(3)?, Some(expert))?;
    }
    total
        .checked_mul(4)
        .filter(|&bytes| bytes <= MODEL_BYTES_MAX)
}

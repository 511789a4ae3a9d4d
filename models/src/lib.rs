//! What one layer of a Mixture-of-Experts model computes, and from which checkpoint.
//!
//! A Hugging Face directory goes in ([`ModelDir`]); out come a [`ModelSpec`], an
//! [`AttentionModule`] (norms, QKV, rotary embedding, paged KV cache, attention, gate, top-k,
//! embedding and head) and an [`ExpertModule`] (grouped gated FFN of some of the experts). Nothing
//! here knows of threads, networks or requests.
//!
//! The hot operations are kernels of our own, chosen for the processor at run time; `reference` states
//! each of them once more in plain candle, and the tests hold one against the other.

mod attention;
mod dtype;
mod expert;
mod ffn;
pub mod kernels;
mod kv_cache;
mod memory;
pub mod reference;
mod spec;
#[cfg(test)]
mod testing;
mod weights;

pub use attention::{Activations, AttentionModule, AttentionOptions, SequenceSlice};
pub use dtype::ComputeType;
pub use expert::{ExpertModule, ExpertOptions};
pub use kernels::{InstructionSet, Isa, UnsupportedIsa};
pub use memory::{MemoryEstimate, ModuleError, Progress};

pub use spec::{
    Activation, Architecture, FfnKind, LayerSpec, ModelSpec, Norm, Rope, RopeScaling, SpecialTokens,
};
pub use weights::{
    DenseTensor, ElementType, ExpertTensor, MatrixView, TensorId, WeightError, WeightSource,
};

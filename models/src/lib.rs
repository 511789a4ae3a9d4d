//! What one layer of a Mixture-of-Experts model computes, and from which checkpoint.
//!
//! A Hugging Face directory goes in ([`ModelDir`]); out come a [`ModelSpec`], an
//! [`AttentionModule`] (norms, QKV, rotary embedding, paged KV cache, attention, gate, top-k,
//! embedding and head) and an [`ExpertModule`] (grouped gated FFN of some of the experts). Nothing
//! here knows of networks or requests; of threads, only that a [`Crew`] of them computes together.
//!
//! The hot operations are kernels of our own, chosen for the processor at run time; `reference` states
//! each of them once more in plain candle, and the tests hold one against the other.

mod attention;
mod chat;
mod checkpoint;
mod config;
pub mod crew;
mod dtype;
mod dummy;
mod expert;
mod ffn;
#[doc(hidden)]
pub mod fuzz;
pub mod kernels;
mod kv_cache;
mod memory;
mod model_dir;
pub mod reference;
mod spec;
#[cfg(test)]
mod testing;
mod tokenizer;
mod weights;

pub use attention::{Activations, AttentionModule, AttentionOptions, SequenceSlice};
pub use chat::{
    ChatContent, ChatError, ChatMessage, ChatOptions, ChatPart, ChatTemplate, FUEL,
    OUTPUT_BYTES_MAX,
};
pub use checkpoint::{
    Checkpoint, CheckpointError, HEADER_BYTES_MAX, INDEX_BYTES_MAX, SHARDS_MAX, WeightBytes,
};
pub use config::{ConfigError, GenerationDefaults, limits, parse_config};
pub use crew::{Crew, Member, NoSeat};
pub use dtype::{ComputeType, Quantization};
pub use dummy::DummyWeights;
pub use expert::{ExpertModule, ExpertOptions};
pub use kernels::{InstructionSet, Isa, UnsupportedIsa};
pub use memory::{MemoryEstimate, ModuleError, Progress};
pub use model_dir::{
    CONFIG_BYTES_MAX, LoadFormat, ModelDir, ModelError, ModelHash, ModelParts, TOKENIZER_BYTES_MAX,
};
pub use spec::{
    Activation, Architecture, FfnKind, LayerSpec, ModelSpec, Norm, Rope, RopeScaling, SpecialTokens,
};
pub use tokenizer::{Detokenizer, Tokenizer, TokenizerError};
pub use weights::{
    DenseTensor, ElementType, ExpertTensor, MatrixView, TensorId, WeightError, WeightSource,
};

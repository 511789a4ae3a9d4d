//! The header reader against damaged files and against the `safetensors` crate.

//! `generation_config.json`: how the authors of a model want it sampled, and which tokens end a text.

use serde::Serialize;
use serde_json::Value;

use super::{ConfigError, fields::Fields};

const FILE: &str = "generation_config.json";

/// Sampling defaults of a model. What the file does not say is `None`, for the server to decide.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct GenerationDefaults {
    /// Whether to sample at all; `false` is greedy.
    pub do_sample: Option<bool>,
    /// Divisor of the logits; zero or more.
    pub temperature: Option<f32>,
    /// Probability mass of the nucleus, in `(0, 1]`.
    pub top_p: Option<f32>,
    /// Number of candidates; zero means all.
    pub top_k: Option<u32>,
    /// Divisor of the logits of tokens already seen; above zero.
    pub repetition_penalty: Option<f32>,
}

/// Reads `generation_config.json` for its sampling defaults.
pub(super) fn defaults(value: &Value) -> Result<GenerationDefaults, ConfigError> {
    let fields = Fields::root(FILE, value)?;
    let number = |key, expected, accept: fn(f64) -> bool| {
        Ok::<_, ConfigError>(
            fields
                .optional_number(key, expected, accept)?
                .map(|number| number as f32),
        )
    };
    let top_k = match fields.present("top_k") {
        None => None,
        Some(value) => Some(
            value
                .as_u64()
                .and_then(|k| u32::try_from(k).ok())
                .ok_or_else(|| {
                    fields.wrong("top_k", value, "a whole number below 2^32, or null")
                })?,
        ),
    };
    Ok(GenerationDefaults {
        do_sample: fields.optional_flag("do_sample")?,
        temperature: number("temperature", "a number from 0 to 1000", |t| {
            (0.0..=1000.0).contains(&t)
        })?,
        top_p: number("top_p", "a number above 0 and up to 1", |p| {
            p > 0.0 && p <= 1.0
        })?,
        top_k,
        repetition_penalty: number("repetition_penalty", "a number above 0, up to 1000", |p| {
            p > 0.0 && p <= 1000.0
        })?,
    })
}

/// Token ids under `key`: a number, a list of numbers, or `null`. `None` where the key is absent.
pub(super) fn token_ids(fields: &Fields<'_>, key: &str) -> Result<Option<Vec<u32>>, ConfigError> {
    let one = |value: &Value| {
        value
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| fields.wrong(key, value, "a token id, a list of token ids, or null"))
    };
    match fields.raw(key) {
        None => Ok(None),
        Some(Value::Null) => Ok(Some(Vec::new())),
        Some(Value::Array(items)) => items.iter().map(one).collect::<Result<_, _>>().map(Some),
        Some(value) => Ok(Some(vec![one(value)?])),
    }
}

/// The object of `generation_config.json`, for [`token_ids`].
pub(super) fn root(value: &Value) -> Result<Fields<'_>, ConfigError> {
    Fields::root(FILE, value)
}

//! Why a configuration was refused.

/// Why `config.json` or `generation_config.json` was refused. `key` is a path with dots (`attn_config.kv_n_heads`).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file is not JSON.
    #[error("{file} is not valid JSON: {source}")]
    Syntax {
        /// The file.
        file: String,
        /// What the parser says, with line and column.
        source: serde_json::Error,
    },
    /// A key without which the model cannot be known is absent.
    #[error("{file}: `{key}` is missing; {remedy}")]
    Missing {
        /// The file.
        file: String,
        /// The key.
        key: String,
        /// What it should say.
        remedy: String,
    },
    /// A value is of the wrong type or out of range.
    #[error("{file}: `{key}` is {value}, but must be {expected}")]
    Value {
        /// The file.
        file: String,
        /// The key.
        key: String,
        /// Its value as JSON, cut if long.
        value: String,
        /// What it may be.
        expected: String,
    },
    /// A value asks for something that Volley does not do.
    #[error("{file}: `{key}` is {value}, which Volley does not run; it runs {supported}")]
    Unsupported {
        /// The file.
        file: String,
        /// The key.
        key: String,
        /// Its value as JSON, cut if long.
        value: String,
        /// What Volley runs.
        supported: String,
    },
    /// Values that are fine by themselves do not go together.
    #[error("{file} contradicts itself: {what}")]
    Contradiction {
        /// The file.
        file: String,
        /// The keys, their values, and the rule they break.
        what: String,
    },
}

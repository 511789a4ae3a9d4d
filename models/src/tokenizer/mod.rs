//! Text to token ids and back, over the `tokenizers` crate: `tokenizer.json` with `tokenizer_config.json`.
//!
//! Decoding is that of the `tokenizers` crate; transformers' optional clean-up of spaces afterwards
//! (`clean_up_tokenization_spaces`, off in every supported model) is not applied.

mod detokenizer;
mod plan;

use std::{collections::HashMap, sync::Arc};

use serde_json::Value;
use tokenizers::{Model, tokenizer::Tokenizer as HfTokenizer};

pub use detokenizer::Detokenizer;

use self::plan::Plan;

/// Why a tokenizer was refused, or a text could not be coded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The model comes without one.
    #[error(
        "there is no tokenizer.json; send token ids instead of text, or take tokenizer.json from the model's publisher"
    )]
    NoTokenizer,
    /// `tokenizer.json` does not describe a tokenizer.
    #[error("tokenizer.json is not a tokenizer that the `tokenizers` library reads: {detail}")]
    Malformed {
        /// What the library says.
        detail: String,
    },
    /// `tokenizer_config.json` has a key of the wrong type, or is not JSON at all.
    #[error("tokenizer_config.json: {detail}")]
    Config {
        /// What is wrong.
        detail: String,
    },
    /// The library could not encode or decode.
    #[error("the tokenizer failed: {detail}")]
    Failed {
        /// What the library says.
        detail: String,
    },
}

/// A tokenizer. Cheap to clone; clones share the vocabulary.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    hf: HfTokenizer,
    plan: Plan,
    /// What surrounds a text, where `tokenizer_config.json` decides it; else `tokenizer.json`'s post-processor does.
    surround: Option<Surround>,
    /// Characters of the longest token, at least 1.
    longest: usize,
}

/// Ids that `add_bos_token` and `add_eos_token` put around a text.
#[derive(Debug, Clone, Copy)]
struct Surround {
    bos: Option<u32>,
    eos: Option<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and from `tokenizer_config.json` whether texts begin with a BOS token and end with an EOS token.
    ///
    /// Truncation and padding that `tokenizer.json` may ask for are switched off: a server counts tokens itself.
    ///
    /// # Errors
    /// When either file is malformed.
    pub fn from_bytes(
        tokenizer: &[u8],
        config: Option<&[u8]>,
    ) -> Result<Tokenizer, TokenizerError> {
        let malformed = |error: tokenizers::Error| TokenizerError::Malformed {
            detail: error.to_string(),
        };
        let mut hf = HfTokenizer::from_bytes(tokenizer).map_err(malformed)?;
        hf.with_truncation(None).map_err(malformed)?;
        hf.with_padding(None);
        let surround = match config {
            Some(config) => surround(&TokenizerConfig::parse(config)?, &hf)?,
            None => None,
        };
        if plan::strips_ends(&hf) {
            return Err(TokenizerError::Malformed {
                detail: "its decoder strips the ends of tokens (`Strip` with `stop`), which the library does \
                         not do safely"
                    .to_owned(),
            });
        }
        let plan = Plan::of(&hf);
        let longest = hf
            .get_vocab(true)
            .keys()
            .map(|token| token.chars().count())
            .max();
        let longest = longest.unwrap_or(0).max(1);
        if matches!(plan, Plan::AtEnd) {
            tracing::warn!(
                "The decoder of tokenizer.json is of a kind that cannot be run token by token: streamed text will \
                 arrive in one piece, at its end."
            );
        }
        Ok(Tokenizer {
            inner: Arc::new(Inner {
                hf,
                plan,
                surround,
                longest,
            }),
        })
    }

    /// The ids of `text`. Special tokens that are written out in the text count as what they say, as chat templates
    /// need it. `add_special` puts the model's own before and after it.
    ///
    /// # Errors
    /// When the tokenizer has no token for a piece of the text, not even an unknown one.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let surround = self.inner.surround.filter(|_| add_special);
        let by_post_processor = add_special && self.inner.surround.is_none();
        let encoding = self
            .inner
            .hf
            .encode_fast(text, by_post_processor)
            .map_err(failed)?;
        let ids = encoding.get_ids();
        let Some(Surround { bos, eos }) = surround else {
            return Ok(ids.to_vec());
        };
        Ok(bos
            .into_iter()
            .chain(ids.iter().copied())
            .chain(eos)
            .collect())
    }

    /// Tokens that `text` takes if each is the longest of the vocabulary: what a server can refuse a text by before it spends seconds
    /// and gigabytes on splitting it.
    ///
    /// Almost always far below what [`Tokenizer::encode`] gives. It is no bound where the tokenizer makes one token of a run of any length
    /// (unknown characters fused, white space that a normaliser or an added token takes away).
    pub fn least_tokens(&self, text: &str) -> usize {
        text.chars().count().div_ceil(self.inner.longest)
    }

    /// The text of `ids`. Ids that are no token's are passed over; so are special tokens if `skip_special`.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        // The crate's BPEDecoder panics where no token is left.
        if !ids
            .iter()
            .any(|&id| self.rendered(id, skip_special).is_some())
        {
            return Ok(String::new());
        }
        self.inner.hf.decode(ids, skip_special).map_err(failed)
    }

    /// Every token with its id, added tokens included. Makes a new map each time.
    pub fn vocab(&self) -> HashMap<String, u32> {
        self.inner.hf.get_vocab(true)
    }

    /// Number of tokens. Ids need not be dense: it is no bound on them.
    pub fn vocab_size(&self) -> usize {
        self.inner.hf.get_vocab_size(true)
    }

    /// The token as the vocabulary has it (`Ġthe`), or `None` where the id is no token's.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.hf.id_to_token(id)
    }

    /// The id of a token as the vocabulary has it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.hf.token_to_id(token)
    }

    /// Whether `id` is a special token's.
    pub fn is_special(&self, id: u32) -> bool {
        self.token(id).is_some_and(|token| {
            self.inner
                .hf
                .get_added_vocabulary()
                .is_special_token(&token)
        })
    }

    /// The token as the decoder sees it, which for added tokens that the normaliser changed is not the token as written.
    fn decoded_token(&self, id: u32) -> Option<String> {
        let hf = &self.inner.hf;
        hf.get_added_vocabulary()
            .simple_id_to_token(id)
            .or_else(|| hf.get_model().id_to_token(id))
    }

    /// [`Self::decoded_token`], unless it is skipped.
    fn rendered(&self, id: u32, skip_special: bool) -> Option<String> {
        let special = |token: &String| self.inner.hf.get_added_vocabulary().is_special_token(token);
        self.decoded_token(id)
            .filter(|token| !(skip_special && special(token)))
    }

    /// The bytes that a token contributes to a text, wherever in it. A part of a character alone is not valid UTF-8.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.decoded_token(id)?;
        Some(self.inner.plan.bytes(&token).unwrap_or_else(|| {
            self.decode(&[id], false)
                .map_or_else(|_| token.into_bytes(), String::into_bytes)
        }))
    }

    /// [`Tokenizer::token_bytes`] as text, U+FFFD standing for what is not valid UTF-8 alone.
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.token_bytes(id)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A decoder for one stream of ids.
    pub fn detokenizer(&self, skip_special: bool) -> Detokenizer {
        Detokenizer::new(self.clone(), skip_special)
    }
}

/// What Volley reads of `tokenizer_config.json`.
#[derive(Debug, Default)]
pub(crate) struct TokenizerConfig {
    pub(crate) bos_token: Option<String>,
    pub(crate) eos_token: Option<String>,
    /// Every special token by its key (`pad_token`, `unk_token`, ...), for chat templates.
    pub(crate) special: Vec<(String, String)>,
    pub(crate) chat_template: Option<Value>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
}

impl TokenizerConfig {
    pub(crate) fn parse(bytes: &[u8]) -> Result<TokenizerConfig, TokenizerError> {
        let refuse = |detail: String| TokenizerError::Config { detail };
        let config: Value = serde_json::from_slice(bytes)
            .map_err(|error| refuse(format!("it is not valid JSON: {error}")))?;
        let Value::Object(config) = config else {
            return Err(refuse("it is not a JSON object".to_owned()));
        };
        let flag = |key: &str| match config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(refuse(format!("`{key}` is {other}, not true or false"))),
        };
        // A token is a string, or an object that describes one added.
        let text = |value: &Value| match value {
            Value::String(text) => Some(text.clone()),
            Value::Object(token) => token.get("content")?.as_str().map(str::to_owned),
            _ => None,
        };
        let token = |key: &str| match config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => text(value)
                .map(Some)
                .ok_or_else(|| refuse(format!("`{key}` is {value}, not a token"))),
        };
        let special = config
            .iter()
            .filter(|(key, _)| key.ends_with("_token"))
            .filter_map(|(key, value)| Some((key.clone(), text(value)?)))
            .collect();
        Ok(TokenizerConfig {
            bos_token: token("bos_token")?,
            eos_token: token("eos_token")?,
            special,
            chat_template: config
                .get("chat_template")
                .filter(|t| !t.is_null())
                .cloned(),
            add_bos_token: flag("add_bos_token")?,
            add_eos_token: flag("add_eos_token")?,
        })
    }
}

/// As transformers 5 has it (`TokenizersBackend.update_post_processor`): as soon as one of the two keys is there, both decide,
/// in place of the post-processor; a flag without a token is off.
fn surround(
    config: &TokenizerConfig,
    hf: &HfTokenizer,
) -> Result<Option<Surround>, TokenizerError> {
    if config.add_bos_token.is_none() && config.add_eos_token.is_none() {
        return Ok(None);
    }
    let id = |flag: Option<bool>, key: &str, token: &Option<String>| match token {
        Some(token) if flag == Some(true) => match hf.token_to_id(token) {
            Some(id) => Ok(Some(id)),
            None => Err(TokenizerError::Config {
                detail: format!("`{key}` is \"{token}\", which tokenizer.json does not have"),
            }),
        },
        _ => Ok(None),
    };
    Ok(Some(Surround {
        bos: id(config.add_bos_token, "bos_token", &config.bos_token)?,
        eos: id(config.add_eos_token, "eos_token", &config.eos_token)?,
    }))
}

fn failed(error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Failed {
        detail: error.to_string(),
    }
}

#[cfg(test)]
mod tests;

//! What is asked of the cluster, and what comes back: a [`Request`] in, a stream of [`RequestEvent`]s out.
//!
//! Both speak in token ids. Text (templates, tokenising, stop strings) is the business of `text`, which stands between these
//! types and whoever serves people.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// One sequence to be generated.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// The prompt; at least one token.
    pub prompt: Vec<u32>,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Tokens to generate at most; 0 computes the prompt only (for its log-probabilities).
    pub max_tokens: u32,
    /// Any of these tokens ends the sequence; the token itself is reported.
    pub stop_tokens: Vec<u32>,
    /// Report each generated token's log-probability and this many alternatives.
    pub logprobs: Option<u8>,
    /// Report each prompt token's log-probability and this many alternatives.
    pub prompt_logprobs: Option<u8>,
    /// Who asks, for policies that are fair among tenants.
    pub tenant: Arc<str>,
    /// Larger is more urgent, for policies that look at it.
    pub priority: i32,
}

impl Request {
    /// A greedy request for `max_tokens` tokens after `prompt`.
    pub fn greedy(prompt: Vec<u32>, max_tokens: u32) -> Self {
        Request {
            prompt,
            sampling: Sampling::greedy(),
            max_tokens,
            stop_tokens: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
            tenant: "".into(),
            priority: 0,
        }
    }
}

/// How the next token is chosen from the logits. The order of application is the one users know from vLLM: logit bias,
/// penalties, temperature, `min_p`, `top_k`, `top_p`, then one draw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 takes the most probable token; otherwise logits are divided by it.
    pub temperature: f32,
    /// Keep the smallest set of tokens whose probabilities reach this sum.
    pub top_p: f32,
    /// Keep this many of the most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Drop tokens less probable than this share of the most probable one.
    pub min_p: f32,
    /// Divide (positive) or multiply (negative) the logits of tokens seen in prompt or output.
    pub repetition_penalty: f32,
    /// Subtracted once from the logits of tokens in the output.
    pub presence_penalty: f32,
    /// Subtracted from logits for each occurrence in the output.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The draw for output token i depends on this and i alone, so a sequence goes on unchanged after a failure.
    pub seed: u64,
}

impl Sampling {
    /// Always the most probable token.
    pub fn greedy() -> Self {
        Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }

    /// Checks every field against its range.
    ///
    /// # Errors
    /// Names the field, the value and the range.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let check = |field, value: f32, low: f32, high: f32| {
            // Written so that NaN is refused too.
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(SamplingError {
                    field,
                    value,
                    low,
                    high,
                })
            }
        };
        check("temperature", self.temperature, 0.0, 100.0)?;
        check("top_p", self.top_p, f32::MIN_POSITIVE, 1.0)?;
        check("min_p", self.min_p, 0.0, 1.0)?;
        check("repetition_penalty", self.repetition_penalty, 0.01, 100.0)?;
        check("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        for &(_, bias) in &self.logit_bias {
            check("logit_bias", bias, -100.0, 100.0)?;
        }
        Ok(())
    }
}

/// A sampling parameter out of its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field} is {value}; it must be {} to {high}", least(*.low))]
pub struct SamplingError {
    /// The parameter, as the API spells it.
    pub field: &'static str,
    /// What was given.
    pub value: f32,
    /// The least that is allowed.
    pub low: f32,
    /// The most that is allowed.
    pub high: f32,
}

/// The least positive number stands for "above 0", and is no help when written out.
fn least(low: f32) -> String {
    if low == f32::MIN_POSITIVE {
        "above 0, up".to_owned()
    } else {
        format!("from {low}")
    }
}

/// The log-probability of a token in its place, by the model's unmodified distribution.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// Its natural log-probability.
    pub logprob: f32,
    /// The most probable tokens in its place, best first.
    pub top: Vec<(u32, f32)>,
}

/// What a request's stream carries.
#[derive(Debug, Clone, PartialEq)]
pub enum RequestEvent {
    /// Log-probabilities of prompt tokens, in order from the second one on (the first has none). May come in several parts.
    Prompt(Vec<TokenLogprob>),
    /// One generated token.
    Token {
        /// The token.
        token: u32,
        /// Present if the request asked for it.
        logprob: Option<TokenLogprob>,
    },
    /// The end; nothing follows.
    Finished(FinishReason),
}

/// Why a sequence ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// One of its stop tokens was generated.
    Stop,
    /// It reached `max_tokens` or the model's context.
    Length,
    /// Its client went away or cancelled it.
    Cancelled,
    /// It could not go on; the text says why.
    Error(String),
}

impl FinishReason {
    /// A label for metrics: one of four words.
    pub fn label(&self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
            FinishReason::Error(_) => "error",
        }
    }
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// The prompt has no tokens.
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,
    /// The prompt does not fit the context.
    #[error(
        "the prompt has {prompt} tokens and max_tokens is {max_tokens}, but this server's context is {context} tokens; shorten one of them"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for.
        max_tokens: u32,
        /// Longest sequence the cluster takes.
        context: u32,
    },
    /// A prompt token is not in the vocabulary.
    #[error(
        "prompt token {token} at position {position} is not in the vocabulary of {vocab} tokens"
    )]
    UnknownToken {
        /// The token.
        token: u32,
        /// Where in the prompt.
        position: usize,
        /// Entries of the vocabulary.
        vocab: usize,
    },
    /// A sampling parameter is out of range.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// As many requests wait as are allowed to.
    #[error(
        "{waiting} requests are waiting, which is the limit (`limits.max_waiting`); try again later"
    )]
    QueueFull {
        /// Requests waiting.
        waiting: usize,
    },
    /// The cluster is shutting down.
    #[error("the server is draining and takes no new requests; try another one")]
    Draining,
    /// The frontend is gone.
    #[error("the cluster has stopped; its log says why")]
    Stopped,
}

impl SubmitError {
    /// Whether the same request may succeed later or elsewhere (HTTP 503), rather than never (HTTP 400).
    pub fn is_overload(&self) -> bool {
        matches!(
            self,
            SubmitError::QueueFull { .. } | SubmitError::Draining | SubmitError::Stopped
        )
    }
}

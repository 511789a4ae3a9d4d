//! `prompt` in its four forms.

use serde_json::Value;
use volley_models::Tokenizer;

use crate::http::encode::encode;
use crate::http::error::ApiError;
use crate::http::fields::{Fields, token_id, wrong};

/// Prompts of one request.
const PROMPTS_MAX: usize = 1024;
const EXPECTED: &str =
    "a string, a list of strings, a list of token ids or a list of lists of token ids";

/// The prompts as they were given.
#[derive(Debug, PartialEq)]
pub(super) enum Given {
    Texts(Vec<String>),
    Tokens(Vec<Vec<u32>>),
}

/// A prompt in tokens.
#[derive(Debug)]
pub(super) struct Tokenized {
    pub(super) tokens: Vec<u32>,
    /// What `echo` returns; empty without it.
    pub(super) text: String,
    /// Whether `text` is without special tokens, because the tokenizer put them there and not the client.
    pub(super) skip_special: bool,
}

impl Given {
    pub(super) fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let Some(value) = fields.value("prompt") else {
            return Err(ApiError::invalid(
                "prompt",
                format!("`prompt` is missing; it must be {EXPECTED}"),
            ));
        };
        let given = Given::parse(&value).ok_or_else(|| wrong("prompt", &value, EXPECTED))?;
        match given.len() {
            0 => Err(ApiError::invalid(
                "prompt",
                "`prompt` is an empty list; give at least one prompt",
            )),
            1..=PROMPTS_MAX => Ok(given),
            count => Err(ApiError::invalid(
                "prompt",
                format!("`prompt` has {count} prompts; {PROMPTS_MAX} are allowed"),
            )),
        }
    }

    /// Tokens of each prompt. Slow for long texts.
    pub(super) fn tokenize(
        self,
        tokenizer: &Tokenizer,
        context: u32,
        add_special: bool,
        echo: bool,
    ) -> Result<Vec<Tokenized>, ApiError> {
        match self {
            Given::Texts(texts) => texts
                .into_iter()
                .map(|text| {
                    let tokens = encode(tokenizer, &text, add_special, context as usize)
                        .map_err(|error| error.about("prompt"))?;
                    // Special tokens that the client wrote out are part of its text; those in front of it are not.
                    let written_out = tokens.iter().filter(|&&token| tokenizer.is_special(token));
                    let skip_special = written_out
                        .filter_map(|&token| tokenizer.token_text(token))
                        .all(|token| !text.contains(&token));
                    Ok(Tokenized {
                        tokens,
                        text,
                        skip_special,
                    })
                })
                .collect(),
            Given::Tokens(lists) => lists
                .into_iter()
                .map(|tokens| {
                    let text = if echo {
                        tokenizer.decode(&tokens, false)?
                    } else {
                        String::new()
                    };
                    Ok(Tokenized {
                        tokens,
                        text,
                        skip_special: false,
                    })
                })
                .collect(),
        }
    }

    fn len(&self) -> usize {
        match self {
            Given::Texts(texts) => texts.len(),
            Given::Tokens(lists) => lists.len(),
        }
    }

    fn parse(value: &Value) -> Option<Self> {
        let list = match value {
            Value::String(text) => return Some(Given::Texts(vec![text.clone()])),
            Value::Array(list) => list,
            _ => return None,
        };
        match list.first() {
            None => Some(Given::Texts(Vec::new())),
            Some(Value::String(_)) => {
                let texts = list.iter().map(|text| text.as_str().map(str::to_owned));
                Some(Given::Texts(texts.collect::<Option<_>>()?))
            }
            Some(Value::Array(_)) => {
                let lists = list
                    .iter()
                    .map(|tokens| tokens.as_array()?.iter().map(token_id).collect());
                Some(Given::Tokens(lists.collect::<Option<_>>()?))
            }
            Some(_) => Some(Given::Tokens(vec![
                list.iter().map(token_id).collect::<Option<_>>()?,
            ])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(prompt: Value) -> Result<Given, ApiError> {
        let body = serde_json::json!({"prompt": prompt}).to_string();
        Given::take(&mut Fields::parse(body.as_bytes()).unwrap())
    }

    #[test]
    fn all_four_forms() {
        assert_eq!(take("a".into()).unwrap(), Given::Texts(vec!["a".into()]));
        assert_eq!(
            take(serde_json::json!(["a", "b"])).unwrap(),
            Given::Texts(vec!["a".into(), "b".into()])
        );
        assert_eq!(
            take(serde_json::json!([1, 2])).unwrap(),
            Given::Tokens(vec![vec![1, 2]])
        );
        assert_eq!(
            take(serde_json::json!([[1], [2, 3]])).unwrap(),
            Given::Tokens(vec![vec![1], vec![2, 3]])
        );
    }

    #[test]
    fn nothing_else() {
        let wrong = [
            "null",
            "[]",
            "5",
            "{}",
            r#"["a", 1]"#,
            r#"[1, "a"]"#,
            "[[1], 2]",
            "[-1]",
            "[1.5]",
            "[4294967296]",
            "[[1, null]]",
        ];
        for json in wrong {
            let error = take(serde_json::from_str(json).unwrap()).unwrap_err();
            assert_eq!(error.body.param.as_deref(), Some("prompt"), "{json}");
        }
        assert!(take(vec!["a"; PROMPTS_MAX + 1].into()).is_err());
    }
}

//! Log-probabilities in the two forms that OpenAI's API has: chat's list of objects, and the parallel lists of completions.

use std::fmt::Write;

use serde::{Serialize, Serializer};
use volley_actors::TokenLogprob;
use volley_models::{Detokenizer, Tokenizer};

/// JSON has no infinity; clients take this for "impossible", as vLLM sends it.
const LOGPROB_MIN: f32 = -9999.0;

/// Chat's form, for some tokens.
#[derive(Debug, Serialize)]
pub(super) struct ChatLogprobs {
    content: Vec<ChatLogprob>,
}

#[derive(Debug, Serialize)]
struct ChatLogprob {
    #[serde(flatten)]
    token: ChatToken,
    top_logprobs: Vec<ChatToken>,
}

#[derive(Debug, Serialize)]
struct ChatToken {
    token: String,
    logprob: f32,
    /// For those who put characters together that tokens share.
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    pub(super) fn new(tokenizer: &Tokenizer, logprobs: &[TokenLogprob]) -> Self {
        let token = |id: u32, logprob: f32| {
            let bytes = tokenizer.token_bytes(id).unwrap_or_default();
            ChatToken {
                token: String::from_utf8_lossy(&bytes).into_owned(),
                logprob: finite(logprob),
                bytes,
            }
        };
        let content = logprobs.iter().map(|entry| ChatLogprob {
            token: token(entry.token, entry.logprob),
            top_logprobs: entry
                .top
                .iter()
                .map(|&(id, logprob)| token(id, logprob))
                .collect(),
        });
        ChatLogprobs {
            content: content.collect(),
        }
    }
}

/// The form of completions, for some tokens: lists of the same length.
#[derive(Debug, Default, Serialize)]
pub(super) struct CompletionLogprobs {
    /// Where in the text each token begins, in characters.
    text_offset: Vec<usize>,
    /// `null` for the first token of a prompt, which nothing precedes.
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    /// Best first; the token itself is always among them.
    top_logprobs: Vec<Option<Top>>,
}

impl CompletionLogprobs {
    /// Appends the tokens of a prompt; `logprobs` are those from the second on.
    pub(super) fn prompt(
        &mut self,
        writer: &mut LogprobWriter,
        prompt: &[u32],
        logprobs: &[TokenLogprob],
    ) {
        if let Some(&first) = prompt.first() {
            self.text_offset.push(writer.offset(first));
            self.token_logprobs.push(None);
            self.tokens.push(name(&writer.tokenizer, first));
            self.top_logprobs.push(None);
        }
        self.extend(writer, logprobs);
    }

    /// Appends tokens.
    pub(super) fn extend(&mut self, writer: &mut LogprobWriter, logprobs: &[TokenLogprob]) {
        let tokenizer = writer.tokenizer.clone();
        for entry in logprobs {
            self.text_offset.push(writer.offset(entry.token));
            self.token_logprobs.push(Some(finite(entry.logprob)));
            self.tokens.push(name(&tokenizer, entry.token));
            self.top_logprobs.push(Some(Top::new(&tokenizer, entry)));
        }
    }
}

/// Knows where in the text the next token begins.
#[derive(Debug)]
pub(super) struct LogprobWriter {
    tokenizer: Tokenizer,
    detokenizer: Detokenizer,
    chars: usize,
}

impl LogprobWriter {
    /// Begins `chars` characters into the text.
    pub(super) fn new(tokenizer: &Tokenizer, skip_special: bool, chars: usize) -> Self {
        LogprobWriter {
            tokenizer: tokenizer.clone(),
            detokenizer: tokenizer.detokenizer(skip_special),
            chars,
        }
    }

    fn offset(&mut self, token: u32) -> usize {
        let offset = self.chars;
        // A decoder that fails has failed on the text itself already.
        if let Ok(Some(text)) = self.detokenizer.push(token) {
            self.chars += text.chars().count();
        }
        offset
    }
}

/// Names and log-probabilities, written as an object in this order.
#[derive(Debug)]
struct Top(Vec<(String, f32)>);

impl Top {
    fn new(tokenizer: &Tokenizer, entry: &TokenLogprob) -> Self {
        let own = (entry.token, entry.logprob);
        let mut top: Vec<(String, f32)> = Vec::with_capacity(entry.top.len() + 1);
        for &(id, logprob) in entry.top.iter().chain([&own]) {
            let name = name(tokenizer, id);
            // Different tokens may have the same name; the most probable one keeps it.
            if top.iter().all(|(other, _)| *other != name) {
                top.push((name, finite(logprob)));
            }
        }
        Top(top)
    }
}

impl Serialize for Top {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, logprob)| (name, logprob)))
    }
}

/// A token as a name: its text, or its bytes as OpenAI writes them where they are no text alone.
fn name(tokenizer: &Tokenizer, id: u32) -> String {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    String::from_utf8(bytes).unwrap_or_else(|error| {
        error
            .as_bytes()
            .iter()
            .fold("bytes:".to_owned(), |mut name, byte| {
                // Writing to a string does not fail.
                let _ = write!(name, "\\x{byte:02x}");
                name
            })
    })
}

fn finite(logprob: f32) -> f32 {
    logprob.max(LOGPROB_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::testing::byte_tokenizer;

    fn entry(token: u32, logprob: f32, top: &[(u32, f32)]) -> TokenLogprob {
        TokenLogprob {
            token,
            logprob,
            top: top.to_vec(),
        }
    }

    #[test]
    fn chat_gives_text_and_bytes_of_each_token() {
        let logprobs = ChatLogprobs::new(
            &byte_tokenizer(),
            &[entry(97, -0.5, &[(97, -0.5), (0xe4, f32::NEG_INFINITY)])],
        );
        let expected = serde_json::json!({"content": [{
            "token": "a", "logprob": -0.5, "bytes": [97],
            "top_logprobs": [
                {"token": "a", "logprob": -0.5, "bytes": [97]},
                {"token": "\u{fffd}", "logprob": -9999.0, "bytes": [0xe4]},
            ],
        }]});
        assert_eq!(serde_json::to_value(logprobs).unwrap(), expected);
    }

    #[test]
    fn completions_give_parallel_lists_and_nothing_for_the_first_prompt_token() {
        let tokenizer = byte_tokenizer();
        let mut writer = LogprobWriter::new(&tokenizer, false, 0);
        let mut logprobs = CompletionLogprobs::default();
        // "aä", where the second character is two tokens.
        let prompt = [97, 0xc3, 0xa4];
        logprobs.prompt(
            &mut writer,
            &prompt,
            &[entry(0xc3, -1.0, &[]), entry(0xa4, -2.0, &[(98, -0.25)])],
        );
        logprobs.extend(&mut writer, &[entry(99, -3.0, &[(99, -3.0)])]);
        let expected = serde_json::json!({
            "text_offset": [0, 1, 1, 2],
            "token_logprobs": [null, -1.0, -2.0, -3.0],
            "tokens": ["a", "bytes:\\xc3", "bytes:\\xa4", "c"],
            "top_logprobs": [null, {"bytes:\\xc3": -1.0}, {"b": -0.25, "bytes:\\xa4": -2.0}, {"c": -3.0}],
        });
        assert_eq!(serde_json::to_value(logprobs).unwrap(), expected);
    }
}

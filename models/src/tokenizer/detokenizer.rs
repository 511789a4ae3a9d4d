//! Text of a stream of ids, as early as it is certain.

use std::{mem, str};

use super::{
    Tokenizer, TokenizerError,
    plan::{self, Plan},
};

/// Decodes one stream of ids, id by id.
///
/// All texts together, [`finish`](Detokenizer::finish)'s included, are exactly what [`Tokenizer::decode`] gives for all ids at once.
/// Text is held back only while a later id could change it: part of a character; a run of byte tokens (`<0xE4>`), which
/// the `tokenizers` crate renders as one. Every id costs time in its own length, however long the stream.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// Whether a token was rendered before.
    begun: bool,
    /// Bytes held back: an unfinished character, or a run of byte tokens.
    held: Vec<u8>,
    /// Characters that still go from the beginning of the text.
    to_strip: usize,
    /// All ids, where the decoder runs at the end only.
    ids: Vec<u32>,
}

impl Detokenizer {
    pub(super) fn new(tokenizer: Tokenizer, skip_special: bool) -> Detokenizer {
        let to_strip = match tokenizer.inner.plan {
            Plan::Fused {
                strip: Some((_, count)),
                ..
            } => count,
            _ => 0,
        };
        Detokenizer {
            tokenizer,
            skip_special,
            begun: false,
            held: Vec::new(),
            to_strip,
            ids: Vec::new(),
        }
    }

    /// Takes the next id and gives the text that is certain now, if any.
    ///
    /// # Errors
    /// When a pattern of the tokenizer's decoder fails on the token.
    pub fn push(&mut self, id: u32) -> Result<Option<String>, TokenizerError> {
        let inner = self.tokenizer.inner.clone();
        if let Plan::AtEnd = inner.plan {
            self.ids.push(id);
            return Ok(None);
        }
        let Some(token) = self.tokenizer.rendered(id, self.skip_special) else {
            return Ok(None);
        };
        let first = !mem::replace(&mut self.begun, true);
        let text = match &inner.plan {
            Plan::AtEnd => String::new(),
            Plan::Joined if first => token,
            Plan::Joined => format!(" {token}"),
            Plan::ByteLevel => {
                self.held.extend(plan::byte_level(&token));
                take_valid(&mut self.held)
            }
            Plan::Metaspace {
                replacement,
                strip_first,
            } => {
                let space = if first && *strip_first { "" } else { " " };
                token.replace(*replacement, space)
            }
            Plan::Fused {
                replace,
                byte_fallback,
                strip,
            } => {
                // The crate replaces before it looks for bytes.
                let token =
                    plan::replaced(replace, &token).ok_or_else(|| TokenizerError::Failed {
                        detail: format!(
                            "a replacement of the decoder fails on the token `{token}`"
                        ),
                    })?;
                match plan::byte_of(&token) {
                    Some(byte) if *byte_fallback => {
                        self.held.push(byte);
                        return Ok(None);
                    }
                    _ => {
                        let text = take_run(&mut self.held) + &token;
                        strip_beginning(text, *strip, &mut self.to_strip)
                    }
                }
            }
        };
        Ok(Some(text).filter(|text| !text.is_empty()))
    }

    /// The end of the stream: what was held back, with U+FFFD for characters that were never finished.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails, where it runs at the end only.
    pub fn finish(mut self) -> Result<Option<String>, TokenizerError> {
        let text = match &self.tokenizer.inner.plan {
            Plan::AtEnd => self.tokenizer.decode(&self.ids, self.skip_special)?,
            Plan::ByteLevel => String::from_utf8_lossy(&self.held).into_owned(),
            Plan::Fused { strip, .. } => {
                let text = take_run(&mut self.held);
                strip_beginning(text, *strip, &mut self.to_strip)
            }
            Plan::Joined | Plan::Metaspace { .. } => String::new(),
        };
        Ok(Some(text).filter(|text| !text.is_empty()))
    }
}

/// Takes everything from `bytes` but a character that may still be completed. What is invalid becomes U+FFFD, by the same rule
/// as `String::from_utf8_lossy`: the longest valid beginning of a character is one replacement.
fn take_valid(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = bytes.as_slice();
    let unfinished = loop {
        match str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                break 0;
            }
            Err(error) => {
                let (valid, after) = rest.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                match error.error_len() {
                    None => break after.len(),
                    Some(invalid) => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        rest = &after[invalid..];
                    }
                }
            }
        }
    };
    bytes.drain(..bytes.len() - unfinished);
    text
}

/// Takes a whole run of byte tokens, as the crate's `ByteFallback` renders it: one U+FFFD for each byte if any is amiss.
fn take_run(bytes: &mut Vec<u8>) -> String {
    String::from_utf8(mem::take(bytes)).unwrap_or_else(|error| {
        char::REPLACEMENT_CHARACTER
            .to_string()
            .repeat(error.as_bytes().len())
    })
}

/// Takes up to `left` of the stripped character from the front of the next piece of text.
fn strip_beginning(text: String, strip: Option<(char, usize)>, left: &mut usize) -> String {
    let Some((content, _)) = strip else {
        return text;
    };
    let mut rest = text.as_str();
    while *left > 0 && !rest.is_empty() {
        match rest.strip_prefix(content) {
            Some(stripped) => {
                rest = stripped;
                *left -= 1;
            }
            None => *left = 0,
        }
    }
    rest.to_owned()
}

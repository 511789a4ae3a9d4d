//! How a tokenizer's decoder can be run token by token with the text of the whole.
//!
//! The decoders of the `tokenizers` crate are functions of all tokens at once. For the kinds that the supported models have, a
//! token's rendering depends on little else, and the plan says on what; [`super::Detokenizer`] carries the plan out. Any other
//! decoder is run at the end of the stream, which is late but never wrong.

use std::{collections::HashMap, sync::LazyLock};

use tokenizers::{
    Decoder, DecoderWrapper, decoders::strip::Strip, normalizers::replace::Replace,
    pre_tokenizers::metaspace::PrependScheme, tokenizer::Tokenizer as HfTokenizer,
};

/// What to do with each token.
#[derive(Debug, Clone)]
pub(super) enum Plan {
    /// No decoder: tokens with a space between them.
    Joined,
    /// GPT-2's byte alphabet: tokens are bytes, and the text is their lossy UTF-8.
    ByteLevel,
    /// A character that stands for a space.
    Metaspace {
        /// The character.
        replacement: char,
        /// Whether the first token loses it.
        strip_first: bool,
    },
    /// SentencePiece as Llama and Mixtral have it: replacements within tokens, `<0xE4>` for bytes, then the beginning stripped.
    Fused {
        replace: Vec<Replace>,
        byte_fallback: bool,
        /// This many of this character go from the beginning of the text.
        strip: Option<(char, usize)>,
    },
    /// Anything else.
    AtEnd,
}

impl Plan {
    pub(super) fn of(tokenizer: &HfTokenizer) -> Plan {
        match tokenizer.get_decoder() {
            None => Plan::Joined,
            Some(DecoderWrapper::Sequence(sequence)) => match sequence.get_decoders() {
                [single] => Plan::of_single(single),
                several => Plan::of_sequence(several),
            },
            Some(single) => Plan::of_single(single),
        }
    }

    fn of_single(decoder: &DecoderWrapper) -> Plan {
        match decoder {
            DecoderWrapper::ByteLevel(_) => Plan::ByteLevel,
            DecoderWrapper::Metaspace(metaspace) => Plan::Metaspace {
                replacement: metaspace.get_replacement(),
                strip_first: metaspace.get_prepend_scheme() != PrependScheme::Never,
            },
            DecoderWrapper::Replace(_)
            | DecoderWrapper::ByteFallback(_)
            | DecoderWrapper::Fuse(_) => Plan::of_sequence(std::slice::from_ref(decoder)),
            _ => Plan::AtEnd,
        }
    }

    /// Replacements, then perhaps byte fallback, then perhaps fusing, and after that perhaps stripping the beginning.
    fn of_sequence(decoders: &[DecoderWrapper]) -> Plan {
        let mut rest = decoders.iter().peekable();
        let mut replace = Vec::new();
        while let Some(DecoderWrapper::Replace(decoder)) = rest.peek() {
            replace.push(decoder.clone());
            rest.next();
        }
        let byte_fallback = rest
            .next_if(|decoder| matches!(decoder, DecoderWrapper::ByteFallback(_)))
            .is_some();
        let fused = rest
            .next_if(|decoder| matches!(decoder, DecoderWrapper::Fuse(_)))
            .is_some();
        let strip = match rest.peek() {
            Some(DecoderWrapper::Strip(Strip {
                content,
                start,
                stop: 0,
                ..
            })) if fused => {
                rest.next();
                Some((*content, *start))
            }
            _ => None,
        };
        if rest.next().is_some() {
            return Plan::AtEnd;
        }
        Plan::Fused {
            replace,
            byte_fallback,
            strip,
        }
    }

    /// The bytes that a token makes by itself, or `None` where that is not defined.
    pub(super) fn bytes(&self, token: &str) -> Option<Vec<u8>> {
        match self {
            Plan::Joined => Some(token.as_bytes().to_vec()),
            Plan::ByteLevel => Some(byte_level(token)),
            Plan::Metaspace { replacement, .. } => {
                Some(token.replace(*replacement, " ").into_bytes())
            }
            Plan::Fused {
                replace,
                byte_fallback,
                ..
            } => {
                // In the order of the decoders: a replacement may make or break a byte token.
                let token = replaced(replace, token)?;
                match byte_of(&token) {
                    Some(byte) if *byte_fallback => Some(vec![byte]),
                    _ => Some(token.into_bytes()),
                }
            }
            Plan::AtEnd => None,
        }
    }
}

/// Whether the decoder strips the ends of tokens: the crate's arithmetic underflows on a token shorter than that.
pub(super) fn strips_ends(tokenizer: &HfTokenizer) -> bool {
    fn strips(decoder: &DecoderWrapper) -> bool {
        match decoder {
            DecoderWrapper::Strip(strip) => strip.stop > 0,
            DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().any(strips),
            _ => false,
        }
    }
    tokenizer.get_decoder().is_some_and(strips)
}

/// A token's bytes by GPT-2's alphabet; a token with any other character is its own UTF-8 (added tokens are).
pub(super) fn byte_level(token: &str) -> Vec<u8> {
    token
        .chars()
        .map(|c| BYTE_OF_CHAR.get(&c).copied())
        .collect::<Option<Vec<u8>>>()
        .unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The byte that a token such as `<0xE4>` stands for.
pub(super) fn byte_of(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    // The crate parses as Rust does, which takes a sign: `<0x+F>` is a byte to it.
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok())?
}

/// A token after every replacement, or `None` if a pattern fails on it.
pub(super) fn replaced(replace: &[Replace], token: &str) -> Option<String> {
    replace.iter().try_fold(token.to_owned(), |token, decoder| {
        decoder.decode_chain(vec![token]).ok()?.pop()
    })
}

/// GPT-2's `bytes_to_unicode`, inverted: printable Latin-1 stands for itself, the other bytes for 256 and on.
static BYTE_OF_CHAR: LazyLock<HashMap<char, u8>> = LazyLock::new(|| {
    let mut stand_in = 256u32;
    (0..=255u8)
        .filter_map(|byte| {
            let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
            let code = if printable {
                u32::from(byte)
            } else {
                stand_in += 1;
                stand_in - 1
            };
            Some((char::from_u32(code)?, byte))
        })
        .collect()
});

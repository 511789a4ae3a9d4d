//! Text from outside into tokens, with a limit that is looked at before the work.

use volley_models::Tokenizer;

use super::error::ApiError;

/// Tokens of `text`. One that must be longer than `most` tokens is refused before it is split: splitting megabytes takes seconds and
/// gigabytes, which other requests would feel.
pub(super) fn encode(
    tokenizer: &Tokenizer,
    text: &str,
    add_special: bool,
    most: usize,
) -> Result<Vec<u32>, ApiError> {
    let least = tokenizer.least_tokens(text);
    if least > most {
        return Err(ApiError::text_too_long(least, most));
    }
    Ok(tokenizer.encode(text, add_special)?)
}

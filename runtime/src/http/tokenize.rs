//! `POST /tokenize` and `POST /detokenize`, as vLLM has them.

use axum::Json;
use axum::extract::State;
use serde::Serialize;

use super::chat::Conversation;
use super::encode::encode;
use super::error::ApiError;
use super::fields::Fields;
use super::state::App;

/// Tokens that a text may have to be counted, where the context is shorter.
const COUNTED_MAX: usize = 65_536;

pub(super) async fn tokenize(
    State(app): State<App>,
    mut fields: Fields,
) -> Result<Json<Tokens>, ApiError> {
    let add_special = fields.flag("add_special_tokens")?;
    let tokens = match fields.text("prompt")? {
        Some(prompt) => {
            let add_special = add_special.unwrap_or(true);
            app.blocking(move |engine| {
                // Counting is what one does to a text that may be too long, so there is some room above the context.
                let most = (engine.context as usize).max(COUNTED_MAX);
                encode(&engine.tokenizer, &prompt, add_special, most)
                    .map_err(|error| error.about("prompt"))
            })
            .await?
        }
        None => {
            Conversation::take(&mut fields, true)?
                .tokens(&app, add_special.unwrap_or(false))
                .await?
        }
    };
    Ok(Json(Tokens {
        count: tokens.len(),
        max_model_len: app.engine.context,
        tokens,
    }))
}

pub(super) async fn detokenize(
    State(app): State<App>,
    mut fields: Fields,
) -> Result<Json<Text>, ApiError> {
    let tokens = fields.token_ids("tokens")?.ok_or_else(|| {
        ApiError::invalid(
            "tokens",
            "`tokens` is missing; it must be a list of token ids",
        )
    })?;
    let vocab = app.engine.spec.vocab;
    if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
        return Err(ApiError::invalid(
            "tokens",
            format!("`tokens` has {token}, which is not in the vocabulary of {vocab} tokens"),
        ));
    }
    let prompt = app.blocking(move |engine| {
        engine
            .tokenizer
            .decode(&tokens, false)
            .map_err(|error| ApiError::from(error).about("tokens"))
    });
    Ok(Json(Text {
        prompt: prompt.await?,
    }))
}

#[derive(Serialize)]
pub(super) struct Tokens {
    count: usize,
    max_model_len: u32,
    tokens: Vec<u32>,
}

#[derive(Serialize)]
pub(super) struct Text {
    prompt: String,
}

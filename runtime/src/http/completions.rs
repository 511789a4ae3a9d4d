//! `POST /v1/completions`: text or token ids on, with `echo` and the older form of log-probabilities.

mod chunks;
mod prompts;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use volley_actors::TokenLogprob;

use self::chunks::CompletionChunks;
use self::prompts::{Given, Tokenized};
use super::answer::{Head, UsageBody};
use super::choices::{Choice, Choices, Prompt};
use super::error::ApiError;
use super::fields::Fields;
use super::generation::{Generation, alternatives, fit, max_tokens};
use super::logprobs::{CompletionLogprobs, LogprobWriter};
use super::state::App;
use super::stream;

/// Tokens generated if the request does not say; OpenAI's number.
const MAX_TOKENS_DEFAULT: u64 = 16;

pub(super) async fn completions(
    State(app): State<App>,
    mut fields: Fields,
) -> Result<Response, ApiError> {
    let mut generation = Generation::take(&mut fields, &app)?;
    let echo = fields.flag("echo")?.unwrap_or(false);
    generation.max_tokens = max_tokens(&mut fields, "max_tokens", if echo { 0 } else { 1 })?;
    generation.logprobs = alternatives(&mut fields, "logprobs")?;
    generation.prompt_logprobs = generation.logprobs.filter(|_| echo);
    check_best_of(&mut fields, generation.n)?;
    let given = Given::take(&mut fields)?;
    let add_special = fields.flag("add_special_tokens")?.unwrap_or(true);
    fields.ignore_rest();

    let tokenized = app
        .blocking(move |engine| {
            given.tokenize(&engine.tokenizer, engine.context, add_special, echo)
        })
        .await?;
    let context = app.engine.context;
    let prompt = |prompt: &Tokenized| {
        let tokens = prompt.tokens.clone();
        let max_tokens = fit(
            &tokens,
            generation.max_tokens,
            MAX_TOKENS_DEFAULT,
            context,
            "prompt",
        )?;
        Ok(Prompt { tokens, max_tokens })
    };
    let prompts: Vec<Prompt> = tokenized
        .iter()
        .map(prompt)
        .collect::<Result<_, ApiError>>()?;
    let choices = Choices::start(&app, &prompts, &generation).await?;
    let form = Form {
        app,
        prompts: tokenized,
        n: generation.n,
        echo,
        logprobs: generation.logprobs.is_some(),
        token_ids: generation.return_token_ids,
        skip_special: generation.skip_special,
    };
    if generation.stream {
        return Ok(stream::respond(
            choices,
            CompletionChunks::new(form, generation.include_usage),
        ));
    }
    let (choices, usage) = choices.collect().await?;
    Ok(Json(CompletionBody {
        head: form.head(),
        choices: choices
            .into_iter()
            .enumerate()
            .map(|(index, choice)| form.choice(index, choice))
            .collect(),
        usage: Some(usage.into()),
    })
    .into_response())
}

/// Answers are not ranked here, so as many are made as are returned.
fn check_best_of(fields: &mut Fields, n: usize) -> Result<(), ApiError> {
    match fields.integer("best_of", 1..=i128::MAX)? {
        Some(best_of) if best_of != n as i128 => Err(ApiError::unsupported(
            "best_of",
            format!(
                "`best_of` is {best_of} and `n` is {n}; this server supports `best_of` equal to `n` only"
            ),
        )),
        _ => Ok(()),
    }
}

#[derive(Serialize)]
struct CompletionBody {
    #[serde(flatten)]
    head: Head,
    choices: Vec<CompletionChoice>,
    usage: Option<UsageBody>,
}

/// A whole answer, or a part of it in a stream.
#[derive(Debug, Serialize)]
struct CompletionChoice {
    index: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

/// What the client wants to see of the answers. Answer i is to prompt i / n.
struct Form {
    app: App,
    prompts: Vec<Tokenized>,
    n: usize,
    echo: bool,
    logprobs: bool,
    token_ids: bool,
    skip_special: bool,
}

impl Form {
    fn head(&self) -> Head {
        Head::new("cmpl-", "text_completion", &self.app.engine.model)
    }

    fn prompt(&self, index: usize) -> &Tokenized {
        &self.prompts[index / self.n]
    }

    fn prompt_token_ids(&self, index: usize) -> Option<Vec<u32>> {
        self.token_ids.then(|| self.prompt(index).tokens.clone())
    }

    /// What writes the log-probabilities of generated tokens.
    fn writer(&self, index: usize) -> LogprobWriter {
        let begin = if self.echo {
            self.prompt(index).text.chars().count()
        } else {
            0
        };
        LogprobWriter::new(&self.app.engine.tokenizer, self.skip_special, begin)
    }

    /// Log-probabilities of the prompt's tokens; offsets are in the text that is echoed.
    fn prompt_logprobs(&self, index: usize, logprobs: &[TokenLogprob]) -> CompletionLogprobs {
        let prompt = self.prompt(index);
        let mut written = CompletionLogprobs::default();
        let mut writer = LogprobWriter::new(&self.app.engine.tokenizer, prompt.skip_special, 0);
        written.prompt(&mut writer, &prompt.tokens, logprobs);
        written
    }

    fn choice(&self, index: usize, choice: Choice) -> CompletionChoice {
        let Choice {
            prompt_logprobs,
            answer,
            finish_reason,
        } = choice;
        let mut text = String::new();
        let mut logprobs = self.logprobs.then(CompletionLogprobs::default);
        if self.echo {
            text += &self.prompt(index).text;
            logprobs = logprobs.map(|_| self.prompt_logprobs(index, &prompt_logprobs));
        }
        text += &answer.text;
        if let Some(logprobs) = &mut logprobs {
            logprobs.extend(&mut self.writer(index), &answer.logprobs);
        }
        CompletionChoice {
            index,
            text,
            logprobs,
            finish_reason: Some(finish_reason),
            token_ids: self.token_ids.then_some(answer.tokens),
            prompt_token_ids: self.prompt_token_ids(index),
        }
    }
}

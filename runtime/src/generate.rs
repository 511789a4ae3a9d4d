//! `volley generate`: text in the terminal, from a cluster inside this process.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Args;
use serde::Serialize;
use volley_actors::{FinishReason, Request, Sampling};
use volley_models::{ChatMessage, ChatOptions};

use crate::config::Demand;
use crate::engine::Engine;
use crate::failure::Failure;
use crate::flags::{ConfigFlags, Offline};
use crate::launch::Launch;
use crate::logging;
use crate::progress::LoadDisplay;
use crate::text::{self, TextEvent, TextRequest};

/// Generate text in the terminal.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct GenerateArgs {
    /// Text to go on from; repeat it for a batch
    #[arg(
        long,
        short,
        value_name = "TEXT",
        required_unless_present = "prompt_file"
    )]
    prompt: Vec<String>,
    /// File whose whole text is a prompt
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    prompt_file: Option<PathBuf>,
    /// Take each prompt as a user's message, by the model's chat template
    #[arg(long)]
    chat: bool,
    /// Print one JSON object for each prompt
    #[arg(long)]
    json: bool,
    /// Say on standard error how fast it was
    #[arg(long)]
    stats: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    config: ConfigFlags<Offline>,
}

/// How tokens are chosen, and when to stop.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingArgs {
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// 0 always takes the most probable token [default: the model's, else 1]
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Keep the smallest set of tokens of this probability [default: the model's, else 1]
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Keep this many tokens; 0 keeps all [default: the model's, else 0]
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// The same seed makes the same text [default: another one each time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// End before this text; may be repeated
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    /// Go on after the model's end-of-sequence token
    #[arg(long)]
    ignore_eos: bool,
}

const AFTER_HELP: &str = "\
Examples:
  volley generate --prompt 'ROMEO:' --seed 1
  volley generate --prompt 'To be' --prompt 'The king' --max-tokens 40 --temperature 0
  volley generate --model DIR --chat --prompt 'Why is the sky blue?' --stats
  volley generate --prompt-file story.txt --json | jq -r .text";

/// Generates and prints.
///
/// # Errors
/// When the model cannot be launched, or a prompt is refused or fails.
pub fn run(args: GenerateArgs) -> Result<(), Failure> {
    let prompts = args.prompts()?;
    let config = args
        .config
        .clone()
        .with_default("limits.max_waiting", prompts.len().max(1024));
    let raw = config.load()?;
    logging::start(&raw.log);
    let demand = Demand::Batch {
        sequences: prompts.len() as u32,
        tokens: u32::MAX,
    };
    let engine = Arc::new(Launch::prepare(&raw, demand)?.start(&Arc::new(LoadDisplay::new()))?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("no runtime: {error}")))?;
    let result = runtime.block_on(generate(&engine, prompts, &args));
    engine.shutdown(Duration::ZERO);
    result
}

/// One prompt's outcome.
#[derive(Debug, Serialize)]
struct Answer {
    index: usize,
    prompt: String,
    text: String,
    token_ids: Vec<u32>,
    finish_reason: FinishReason,
    timings: Timings,
}

/// Counts and seconds of one prompt.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Timings {
    prompt_tokens: u64,
    completion_tokens: u64,
    first_token_s: f64,
    total_s: f64,
    /// After the first token; absent if there was only one.
    tokens_per_s: Option<f64>,
}

async fn generate(
    engine: &Arc<Engine>,
    prompts: Vec<String>,
    args: &GenerateArgs,
) -> Result<(), Failure> {
    let start = Instant::now();
    let streaming = prompts.len() == 1 && !args.json;
    let count = prompts.len();
    let seed = args.sampling.seed.unwrap_or_else(any_seed);
    let mut tasks = tokio::task::JoinSet::new();
    for (index, prompt) in prompts.into_iter().enumerate() {
        // Equal prompts of a batch shall not have equal answers.
        let request = args.request(engine, &prompt, seed.wrapping_add(index as u64))?;
        if streaming && !args.chat {
            print(&prompt)?;
        }
        let engine = Arc::clone(engine);
        tasks.spawn(async move { answer(&engine, index, prompt, request, streaming).await });
    }
    // In order of the prompts, each as soon as all before it are done.
    let mut answers: Vec<Option<Answer>> = (0..count).map(|_| None).collect();
    let (mut printed, mut tokens) = (0, 0);
    let mut failed = None;
    while let Some(joined) = tasks.join_next().await {
        let answer =
            joined.map_err(|error| Failure::new(format!("a request's task ended: {error}")))??;
        tokens += answer.timings.completion_tokens;
        if let FinishReason::Error(reason) = &answer.finish_reason {
            failed.get_or_insert_with(|| {
                Failure::new(format!("prompt {}: {reason}", answer.index + 1))
            });
        }
        let index = answer.index;
        answers[index] = Some(answer);
        while let Some(Some(answer)) = answers.get(printed) {
            show(answer, args, streaming)?;
            printed += 1;
        }
    }
    if args.stats {
        print_stats(answers.iter().flatten(), tokens, start.elapsed());
    }
    failed.map_or(Ok(()), Err)
}

async fn answer(
    engine: &Engine,
    index: usize,
    prompt: String,
    request: TextRequest,
    streaming: bool,
) -> Result<Answer, Failure> {
    let start = Instant::now();
    let mut stream = text::generate(engine, request).await?;
    let mut first = None;
    let mut answer = Answer {
        index,
        prompt,
        text: String::new(),
        token_ids: Vec::new(),
        finish_reason: FinishReason::Cancelled,
        timings: Timings::default(),
    };
    while let Some(event) = stream.next().await {
        match event {
            TextEvent::Prompt(_) => {}
            TextEvent::Delta(delta) => {
                first.get_or_insert_with(|| start.elapsed());
                if streaming {
                    print(&delta.text)?;
                }
                answer.text.push_str(&delta.text);
                answer.token_ids.extend(delta.tokens);
            }
            TextEvent::Finished { reason, usage } => {
                answer.finish_reason = reason;
                answer.timings = timings(
                    usage.prompt_tokens,
                    usage.completion_tokens,
                    first,
                    start.elapsed(),
                );
            }
        }
    }
    Ok(answer)
}

fn timings(
    prompt_tokens: u64,
    completion_tokens: u64,
    first: Option<Duration>,
    total: Duration,
) -> Timings {
    let first = first.unwrap_or(total);
    let rest = total.saturating_sub(first).as_secs_f64();
    Timings {
        prompt_tokens,
        completion_tokens,
        first_token_s: first.as_secs_f64(),
        total_s: total.as_secs_f64(),
        tokens_per_s: (completion_tokens > 1 && rest > 0.0)
            .then(|| (completion_tokens - 1) as f64 / rest),
    }
}

/// Prints what was not streamed already.
fn show(answer: &Answer, args: &GenerateArgs, streamed: bool) -> Result<(), Failure> {
    if args.json {
        let line =
            serde_json::to_string(answer).map_err(|error| Failure::new(error.to_string()))?;
        print(&format!("{line}\n"))
    } else if streamed {
        print("\n")
    } else {
        let prompt = if args.chat { "" } else { &answer.prompt };
        let blank = if answer.index > 0 { "\n" } else { "" };
        print(&format!(
            "{blank}=== {} ===\n{prompt}{}\n",
            answer.index + 1,
            answer.text
        ))
    }
}

fn print_stats<'a>(answers: impl Iterator<Item = &'a Answer>, tokens: u64, wall: Duration) {
    for answer in answers {
        let t = answer.timings;
        let speed = t
            .tokens_per_s
            .map_or("-".to_owned(), |speed| format!("{speed:.1}"));
        eprintln!(
            "prompt {}: {} + {} tokens, first after {:.3} s, {speed} tokens/s, ended by {}",
            answer.index + 1,
            t.prompt_tokens,
            t.completion_tokens,
            t.first_token_s,
            answer.finish_reason.label()
        );
    }
    eprintln!(
        "in all: {tokens} tokens in {:.3} s, {:.1} tokens/s",
        wall.as_secs_f64(),
        tokens as f64 / wall.as_secs_f64()
    );
}

fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(Failure::output)
}

impl GenerateArgs {
    fn prompts(&self) -> Result<Vec<String>, Failure> {
        let mut prompts = self.prompt.clone();
        if let Some(file) = &self.prompt_file {
            prompts
                .push(std::fs::read_to_string(file).map_err(|error| Failure::file(file, &error))?);
        }
        Ok(prompts)
    }

    /// The request of one prompt.
    fn request(&self, engine: &Engine, prompt: &str, seed: u64) -> Result<TextRequest, Failure> {
        let (text, add_special) = if self.chat {
            let template = engine.chat.as_ref().ok_or_else(|| {
                Failure::new(format!(
                    "the model {} has no chat template; leave --chat out",
                    engine.model
                ))
            })?;
            let options = ChatOptions {
                add_generation_prompt: true,
                ..ChatOptions::default()
            };
            let messages = [ChatMessage::new("user", prompt)];
            // The template writes the special tokens itself.
            (
                template
                    .render(&messages, &options)
                    .map_err(|error| Failure::new(error.to_string()))?,
                false,
            )
        } else {
            (prompt.to_owned(), true)
        };
        let tokens = engine
            .tokenizer
            .encode(&text, add_special)
            .map_err(|error| Failure::new(error.to_string()))?;
        let room = engine
            .context
            .saturating_sub(u32::try_from(tokens.len()).unwrap_or(u32::MAX));
        if room == 0 {
            let message = format!(
                "the prompt has {} tokens, the context {}; shorten it or raise --max-context",
                tokens.len(),
                engine.context
            );
            return Err(Failure::new(message));
        }
        let mut request = Request::greedy(tokens, self.sampling.max_tokens.min(room));
        request.sampling = self.sampling.resolve(engine, seed);
        if !self.sampling.ignore_eos {
            request.stop_tokens = engine.spec.special.eos.clone();
        }
        Ok(TextRequest {
            request,
            stop: self.sampling.stop.clone(),
            skip_special: true,
        })
    }
}

impl SamplingArgs {
    /// What was asked for, over the model's own defaults.
    fn resolve(&self, engine: &Engine, seed: u64) -> Sampling {
        let defaults = &engine.defaults;
        let temperature = if defaults.do_sample == Some(false) {
            Some(0.0)
        } else {
            defaults.temperature
        };
        Sampling {
            temperature: self.temperature.or(temperature).unwrap_or(1.0),
            top_p: self.top_p.or(defaults.top_p).unwrap_or(1.0),
            top_k: self.top_k.or(defaults.top_k).unwrap_or(0),
            repetition_penalty: defaults.repetition_penalty.unwrap_or(1.0),
            seed,
            ..Sampling::greedy()
        }
    }
}

/// Another one each time.
fn any_seed() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speed_is_that_after_the_first_token() {
        let t = timings(5, 11, Some(Duration::from_secs(1)), Duration::from_secs(3));
        assert_eq!(
            (t.first_token_s, t.total_s, t.tokens_per_s),
            (1.0, 3.0, Some(5.0))
        );
        assert_eq!(
            timings(5, 1, None, Duration::from_secs(1)).tokens_per_s,
            None
        );
    }
}

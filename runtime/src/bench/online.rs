//! A load generator against any OpenAI-compatible server: Poisson arrivals, streamed completions, and what clients saw.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use http_body_util::BodyExt;
use hyper::body::Bytes;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::Semaphore;

use super::BenchArgs;
use super::report::{OnlineReport, Seen};
use super::sse::SseParser;
use crate::failure::Failure;
use crate::http_client::{HttpClient, deepest};
use crate::random::Random;

/// Flags of the online benchmark.
#[derive(Debug, Args)]
#[command(next_help_heading = "Online (with --url)")]
pub(super) struct OnlineArgs {
    /// Measure the server at this URL, such as http://127.0.0.1:8000
    #[arg(long, value_name = "URL", value_hint = clap::ValueHint::Url)]
    pub(super) url: Option<String>,
    /// Requests per second, arriving by a Poisson process; inf sends as fast as --concurrency allows
    #[arg(long, value_name = "R", default_value = "inf", requires = "url", value_parser = parse_rate)]
    rate: f64,
    /// Requests in all
    #[arg(long, value_name = "N", default_value_t = 100, requires = "url", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    requests: u32,
    /// Requests under way at once, at most
    #[arg(long, value_name = "C", default_value_t = 64, requires = "url", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    concurrency: u32,
    /// Name of the model in the requests [default: the first of /v1/models]
    #[arg(long, value_name = "NAME", requires = "url")]
    request_model: Option<String>,
    /// Prompts are made of token ids below this; no model's vocabulary is smaller
    #[arg(long, value_name = "N", default_value_t = 1000, requires = "url", value_parser = clap::value_parser!(u32).range(1..))]
    prompt_vocab: u32,
    /// Let the model end its outputs; otherwise `ignore_eos` is sent and every output has its full length
    #[arg(long, requires = "url")]
    respect_eos: bool,
    /// Time to first token that counts as good, in milliseconds
    #[arg(long, value_name = "MS", requires = "url")]
    slo_ttft: Option<f64>,
    /// Time per output token that counts as good, in milliseconds
    #[arg(long, value_name = "MS", requires = "url")]
    slo_tpot: Option<f64>,
    /// Sent as `Authorization: Bearer`
    #[arg(
        long,
        value_name = "KEY",
        env = "OPENAI_API_KEY",
        hide_env_values = true
    )]
    api_key: Option<String>,
}

/// A request that takes longer than this counts as failed.
const REQUEST_DEADLINE: Duration = Duration::from_secs(3600);

fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 => Ok(rate),
        _ => Err("it must be a number above 0, or inf".to_owned()),
    }
}

/// Puts the load on the server and gathers what came back.
pub(super) fn run(url: &str, args: &BenchArgs) -> Result<OnlineReport, Failure> {
    let online = &args.online;
    let client = HttpClient::new(url, online.api_key.as_deref())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("no runtime: {error}")))?;
    let runs = async {
        let model = match &online.request_model {
            Some(model) => model.clone(),
            None => first_model(&client)
                .await
                .map_err(|error| Failure::new(format!("{url}: {error}")))?,
        };
        let start = Instant::now();
        let seen = send_all(&client, &model, args).await;
        let wall = start.elapsed();
        // Without early ends, the server's count of tokens must be ours.
        let output = (!online.respect_eos).then_some(args.output_len);
        let slo = (online.slo_ttft, online.slo_tpot);
        Ok(OnlineReport::new(
            url,
            &model,
            &seen,
            wall,
            (args.input_len, output),
            slo,
        ))
    };
    runtime.block_on(runs)
}

async fn first_model(client: &HttpClient) -> Result<String, String> {
    let list = client.get("/v1/models").await?;
    let id = list["data"][0]["id"].as_str();
    id.map(str::to_owned)
        .ok_or_else(|| "/v1/models lists no model; name one with --request-model".to_owned())
}

async fn send_all(client: &HttpClient, model: &str, args: &BenchArgs) -> Vec<Seen> {
    let online = &args.online;
    let mut random = Random::new(args.seed);
    let places = Arc::new(Semaphore::new(online.concurrency as usize));
    let mut tasks = tokio::task::JoinSet::new();
    let mut due = tokio::time::Instant::now();
    for _ in 0..online.requests {
        let body = json!({
            "model": model,
            "prompt": random.prompt(args.input_len, online.prompt_vocab),
            "max_tokens": args.output_len,
            "temperature": 0.0,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let body = with_ignore_eos(body, !online.respect_eos);
        if online.rate.is_finite() {
            due += Duration::from_secs_f64(random.exponential() / online.rate);
            tokio::time::sleep_until(due).await;
        }
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            break;
        };
        let client = client.clone();
        tasks.spawn(async move {
            let _place = place;
            let one = send(&client, body);
            tokio::time::timeout(REQUEST_DEADLINE, one)
                .await
                .unwrap_or_else(|_| Seen::failed("it took more than an hour"))
        });
    }
    let mut seen = Vec::new();
    while let Some(one) = tasks.join_next().await {
        seen.push(one.unwrap_or_else(|error| Seen::failed(&error.to_string())));
    }
    seen
}

fn with_ignore_eos(mut body: serde_json::Value, ignore: bool) -> Bytes {
    if ignore {
        body["ignore_eos"] = true.into();
    }
    Bytes::from(body.to_string())
}

/// The parts of a chunk of a streamed completion that are looked at.
#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    text: String,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
}

async fn send(client: &HttpClient, body: Bytes) -> Seen {
    let start = Instant::now();
    let mut stream = match client.post("/v1/completions", body).await {
        Ok(stream) => stream,
        Err(error) => return Seen::failed(&error),
    };
    let mut parser = SseParser::default();
    let mut seen = Seen::default();
    let mut done = false;
    while let Some(frame) = stream.frame().await {
        let frame = match frame {
            Ok(frame) => frame,
            Err(error) => return Seen::failed(&deepest(&error)),
        };
        let Some(bytes) = frame.data_ref() else {
            continue;
        };
        let now = start.elapsed();
        let parsed = parser.push(bytes, |data| {
            if data == b"[DONE]" {
                done = true;
                return;
            }
            match serde_json::from_slice::<Chunk>(data) {
                Ok(chunk) => take(chunk, now, &mut seen),
                Err(error) => {
                    seen.error = Some(format!("an event is no completion chunk: {error}"))
                }
            }
        });
        if let Err(error) = parsed {
            return Seen::failed(&error.to_string());
        }
    }
    if seen.error.is_none() && (!done || !seen.finished) {
        seen.error = Some("the stream ended before the completion did".to_owned());
    }
    seen
}

fn take(chunk: Chunk, now: Duration, seen: &mut Seen) {
    if let Some(error) = chunk.error {
        seen.error = Some(error.to_string());
    }
    for choice in chunk.choices {
        // A chunk that only ends the stream, or an empty first one, carries no token.
        if !choice.text.is_empty() {
            seen.chunks.push(now);
        }
        seen.finished |= choice.finish_reason.is_some();
    }
    if let Some(usage) = chunk.usage {
        seen.usage = Some((usage.prompt_tokens, usage.completion_tokens));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_positive_numbers_or_inf() {
        assert_eq!(parse_rate("inf"), Ok(f64::INFINITY));
        assert_eq!(parse_rate("0.5"), Ok(0.5));
        for text in ["0", "-1", "nan", "fast"] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
    }
}

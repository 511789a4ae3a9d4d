//! `volley bench`: how fast the engine is by itself, how a server behaves under load, or how frames move.

mod m2n;
mod offline;
mod online;
mod report;
mod sse;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::failure::Failure;
use crate::flags::{ConfigFlags, Offline};

/// Measure speed: the engine offline, or any OpenAI-compatible server by its URL.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP, args_conflicts_with_subcommands = true)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: Option<What>,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    input_len: u32,
    /// Tokens generated for each prompt
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..))]
    output_len: u32,
    /// Where prompts and arrival times come from
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Also write the results to this file
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    json: Option<PathBuf>,
    #[command(flatten)]
    offline: offline::OfflineArgs,
    #[command(flatten)]
    online: online::OnlineArgs,
    #[command(flatten)]
    config: ConfigFlags<Offline>,
}

#[derive(Debug, Subcommand)]
enum What {
    M2n(m2n::M2nArgs),
}

const AFTER_HELP: &str = "\
Examples:
  volley bench --model DIR --batch 1,8,32 --input-len 256 --output-len 128
  volley bench --model DIR --load-format dummy --attention-workers 1 --expert-workers 2
  volley bench --url http://127.0.0.1:8000 --requests 200 --rate 4 --slo-ttft 500 --slo-tpot 50
  volley bench --url http://127.0.0.1:8000 --requests 200 --rate inf --concurrency 32 --json run.json
  volley bench m2n --transport quic --senders 8 --receivers 8 --bytes 256KiB

Offline, each batch is handed in at once; decode begins when every request has its first token.
Online, TTFT and TPOT are measured from the moment a request is sent.";

/// Measures and prints.
///
/// # Errors
/// When there is nothing to measure: a refused configuration, a server that does not answer.
pub fn run(args: BenchArgs) -> Result<(), Failure> {
    if let Some(What::M2n(args)) = &args.what {
        return m2n::run(args);
    }
    match &args.online.url {
        Some(url) => {
            let report = online::run(url, &args)?;
            report.print().map_err(Failure::output)?;
            write_json(args.json.as_deref(), &report)?;
            report.verdict()
        }
        None => {
            let report = offline::run(args.config.clone(), &args)?;
            write_json(args.json.as_deref(), &report)
        }
    }
}

fn write_json(file: Option<&Path>, report: &impl Serialize) -> Result<(), Failure> {
    let Some(file) = file else { return Ok(()) };
    let mut text =
        serde_json::to_string_pretty(report).map_err(|error| Failure::new(error.to_string()))?;
    text.push('\n');
    std::fs::write(file, text).map_err(|error| Failure::file(file, &error))
}

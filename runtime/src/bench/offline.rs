//! The engine by itself: batches of one shape after another, straight into the scheduler.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::BenchArgs;
use crate::config::Demand;
use crate::failure::Failure;
use crate::flags::{ConfigFlags, Offline};
use crate::launch::{Launch, Started};
use crate::load::{Load, Observed};
use crate::logging;
use crate::progress::LoadDisplay;
use crate::stats::Summary;

/// Flags of the offline benchmark.
#[derive(Debug, Args)]
#[command(next_help_heading = "Offline (without --url)")]
pub(super) struct OfflineArgs {
    /// Requests at once; each size is measured
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,8,32,128", conflicts_with = "url",
          value_parser = clap::value_parser!(u32).range(1..=65_536))]
    batch: Vec<u32>,
    /// Runs of each size before the measured ones
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "url")]
    warmup: u32,
    /// Measured runs of each size; the table shows the one of median decode speed
    #[arg(long, value_name = "N", default_value_t = 3, conflicts_with = "url", value_parser = clap::value_parser!(u32).range(1..=1000))]
    repetitions: u32,
}

/// All results.
#[derive(Debug, Serialize)]
pub(super) struct OfflineReport {
    model: String,
    dtype: String,
    attention_workers: u16,
    expert_workers: u16,
    micro_batches: u8,
    input_tokens: u32,
    output_tokens: u32,
    batches: Vec<BatchResult>,
}

/// Results of one batch size.
#[derive(Debug, Serialize)]
struct BatchResult {
    batch: u32,
    /// The run of median decode speed.
    median: Speed,
    runs: Vec<Speed>,
}

/// One run.
#[derive(Debug, Clone, Copy, Serialize)]
struct Speed {
    /// Prompt tokens per second until every request had its first token.
    prefill_tokens_per_s: f64,
    /// Tokens per second after that, over all requests.
    decode_tokens_per_s: f64,
    /// Milliseconds between two tokens of a request after that: one step.
    step_ms: Summary,
}

/// Measures every batch size and prints a line for each as it is done.
pub(super) fn run(
    config: ConfigFlags<Offline>,
    args: &BenchArgs,
) -> Result<OfflineReport, Failure> {
    let largest = args.offline.batch.iter().copied().max().unwrap_or(1);
    let tokens = args.input_len.saturating_add(args.output_len);
    // Everything is handed in at once, so everything must be allowed to wait.
    let config = config.with_default("limits.max_waiting", largest.max(1024));
    let raw = config.load()?;
    logging::start(&raw.log);
    let launch = Launch::prepare(
        &raw,
        Demand::Batch {
            sequences: largest,
            tokens,
        },
    )?;
    let settings = launch.settings.clone();
    if tokens > settings.cluster.context {
        return Err(Failure::new(format!(
            "--input-len and --output-len make {tokens} tokens, but the context is {}; shorten them or raise --max-context",
            settings.cluster.context
        )));
    }
    let Started {
        cluster, children, ..
    } = launch.start_cluster(&Arc::new(LoadDisplay::new()))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("no runtime: {error}")))?;
    let shape = &settings.cluster;
    let mut report = OfflineReport {
        model: settings.model.name.clone(),
        dtype: shape.precision(),
        attention_workers: shape.attention_workers,
        expert_workers: shape.expert_workers,
        micro_batches: shape.micro_batches,
        input_tokens: args.input_len,
        output_tokens: args.output_len,
        batches: Vec::new(),
    };
    report.print_head().map_err(Failure::output)?;
    for &batch in &args.offline.batch {
        let mut runs = Vec::new();
        for repetition in 0..args.offline.warmup + args.offline.repetitions {
            let seed = args.seed.wrapping_add(u64::from(repetition));
            let load = Load {
                batch,
                input: args.input_len,
                output: args.output_len,
                seed,
            };
            let observed =
                runtime.block_on(load.run(&cluster.client(), launch.model.spec().vocab))?;
            if repetition >= args.offline.warmup {
                runs.push(Speed::of(&load, &observed));
            }
        }
        let result = BatchResult {
            batch,
            median: median(&runs),
            runs,
        };
        result.print().map_err(Failure::output)?;
        report.batches.push(result);
    }
    cluster.shutdown(Duration::ZERO);
    crate::children::end_all(&children);
    Ok(report)
}

impl Speed {
    fn of(load: &Load, observed: &Observed) -> Speed {
        let prompts = u64::from(load.batch) * u64::from(load.input);
        let (tokens, time) = observed.decode();
        let gaps = observed
            .gaps()
            .into_iter()
            .map(|seconds| seconds * 1e3)
            .collect();
        Speed {
            prefill_tokens_per_s: per_second(prompts as f64, observed.prefill()),
            decode_tokens_per_s: per_second(tokens as f64, time),
            step_ms: Summary::of(gaps),
        }
    }
}

fn per_second(count: f64, time: Duration) -> f64 {
    if time.is_zero() {
        0.0
    } else {
        count / time.as_secs_f64()
    }
}

/// The run in the middle by decode speed; the slower one of two.
fn median(runs: &[Speed]) -> Speed {
    let mut sorted = runs.to_vec();
    sorted.sort_by(|a, b| a.decode_tokens_per_s.total_cmp(&b.decode_tokens_per_s));
    // There is at least one repetition.
    sorted[(sorted.len() - 1) / 2]
}

impl OfflineReport {
    fn print_head(&self) -> std::io::Result<()> {
        let mut out = std::io::stdout();
        writeln!(
            out,
            "{}: {} attention x {} expert workers, {} micro-batches, {}; prompts of {} tokens, outputs of {}",
            self.model,
            self.attention_workers,
            self.expert_workers,
            self.micro_batches,
            self.dtype,
            self.input_tokens,
            self.output_tokens
        )?;
        writeln!(
            out,
            "{:>6} {:>16} {:>16} {:>14} {:>12}",
            "batch", "prefill tok/s", "decode tok/s", "step ms (p50)", "step ms (p99)"
        )
    }
}

impl BatchResult {
    fn print(&self) -> std::io::Result<()> {
        let Speed {
            prefill_tokens_per_s,
            decode_tokens_per_s,
            step_ms,
        } = self.median;
        writeln!(
            std::io::stdout(),
            "{:>6} {prefill_tokens_per_s:>16.1} {decode_tokens_per_s:>16.1} {:>14.2} {:>13.2}",
            self.batch,
            step_ms.median,
            step_ms.p99
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_count_prompts_before_and_tokens_after_the_last_first_token() {
        let ms = |list: &[u64]| list.iter().map(|ms| Duration::from_millis(*ms)).collect();
        let observed = Observed {
            tokens: vec![ms(&[100, 200, 300]), ms(&[50, 150, 300])],
        };
        let load = Load {
            batch: 2,
            input: 10,
            output: 3,
            seed: 0,
        };
        let speed = Speed::of(&load, &observed);
        assert!((speed.prefill_tokens_per_s - 200.0).abs() < 1e-9);
        assert!((speed.decode_tokens_per_s - 20.0).abs() < 1e-9);
        assert_eq!(speed.step_ms.count, 3);
    }

    #[test]
    fn the_median_run_is_an_actual_run() {
        let run = |speed| Speed {
            prefill_tokens_per_s: 0.0,
            decode_tokens_per_s: speed,
            step_ms: Summary::default(),
        };
        assert_eq!(
            median(&[run(3.0), run(1.0), run(2.0)]).decode_tokens_per_s,
            2.0
        );
        assert_eq!(median(&[run(3.0), run(1.0)]).decode_tokens_per_s, 1.0);
    }
}

//! What clients saw, in numbers.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Duration;

use serde::Serialize;

use crate::failure::Failure;
use crate::stats::Summary;

/// What one client saw of its request.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    /// When each chunk with text came, since the request was sent.
    pub(super) chunks: Vec<Duration>,
    /// Whether the server said why the completion ended.
    pub(super) finished: bool,
    /// Prompt and completion tokens, as the server counted them.
    pub(super) usage: Option<(u32, u32)>,
    /// What went wrong.
    pub(super) error: Option<String>,
}

impl Seen {
    pub(super) fn failed(error: &str) -> Seen {
        Seen {
            error: Some(error.to_owned()),
            ..Seen::default()
        }
    }
}

/// Kinds of errors that are told apart; the rest are summed up.
const ERRORS_SHOWN: usize = 5;

/// The whole run. Times in milliseconds.
#[derive(Debug, Serialize)]
pub(super) struct OnlineReport {
    url: String,
    model: String,
    requests: usize,
    succeeded: usize,
    wall_s: f64,
    requests_per_s: f64,
    input_tokens: u64,
    output_tokens: u64,
    output_tokens_per_s: f64,
    total_tokens_per_s: f64,
    ttft_ms: Summary,
    tpot_ms: Summary,
    itl_ms: Summary,
    e2e_ms: Summary,
    /// Requests per second that met every objective that was given; absent without objectives.
    goodput_requests_per_s: Option<f64>,
    good_requests: Option<usize>,
    /// Answers whose usage was absent, or not what was asked for.
    token_count_mismatches: usize,
    /// Errors and how often each came.
    errors: BTreeMap<String, usize>,
}

impl OnlineReport {
    /// Of requests of `input` tokens and, if nothing may end them early, `output` tokens.
    pub(super) fn new(
        url: &str,
        model: &str,
        seen: &[Seen],
        wall: Duration,
        (input, output): (u32, Option<u32>),
        (slo_ttft, slo_tpot): (Option<f64>, Option<f64>),
    ) -> Self {
        let mut errors = BTreeMap::new();
        for error in seen.iter().filter_map(|one| one.error.as_ref()) {
            *errors.entry(error.clone()).or_insert(0) += 1;
        }
        let fine: Vec<_> = seen.iter().filter(|one| one.error.is_none()).collect();
        let expected =
            |usage: (u32, u32)| usage.0 == input && output.is_none_or(|output| usage.1 == output);
        let mismatches = fine
            .iter()
            .filter(|one| !one.usage.is_some_and(expected))
            .count();
        let (mut ttft, mut tpot, mut itl, mut e2e) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut input_tokens, mut output_tokens, mut good) = (0, 0, 0);
        for one in &fine {
            let (prompt, completion) = one.usage.unwrap_or((input, one.chunks.len() as u32));
            input_tokens += u64::from(prompt);
            output_tokens += u64::from(completion);
            // A completion of no visible text has no times.
            let (Some(&first), Some(&last)) = (one.chunks.first(), one.chunks.last()) else {
                continue;
            };
            ttft.push(ms(first));
            e2e.push(ms(last));
            itl.extend(one.chunks.windows(2).map(|pair| ms(pair[1] - pair[0])));
            let per_token = (completion > 1).then(|| ms(last - first) / f64::from(completion - 1));
            tpot.extend(per_token);
            let met = |limit: Option<f64>, value: f64| limit.is_none_or(|limit| value <= limit);
            good +=
                usize::from(met(slo_ttft, ms(first)) && met(slo_tpot, per_token.unwrap_or(0.0)));
        }
        let seconds = wall.as_secs_f64().max(1e-9);
        let judged = slo_ttft.is_some() || slo_tpot.is_some();
        OnlineReport {
            url: url.to_owned(),
            model: model.to_owned(),
            requests: seen.len(),
            succeeded: fine.len(),
            wall_s: wall.as_secs_f64(),
            requests_per_s: fine.len() as f64 / seconds,
            input_tokens,
            output_tokens,
            output_tokens_per_s: output_tokens as f64 / seconds,
            total_tokens_per_s: (input_tokens + output_tokens) as f64 / seconds,
            ttft_ms: Summary::of(ttft),
            tpot_ms: Summary::of(tpot),
            itl_ms: Summary::of(itl),
            e2e_ms: Summary::of(e2e),
            goodput_requests_per_s: judged.then(|| good as f64 / seconds),
            good_requests: judged.then_some(good),
            token_count_mismatches: mismatches,
            errors,
        }
    }

    pub(super) fn print(&self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        writeln!(out, "{} at {}", self.model, self.url)?;
        writeln!(
            out,
            "requests           {} sent, {} succeeded, in {:.2} s",
            self.requests, self.succeeded, self.wall_s
        )?;
        writeln!(
            out,
            "throughput         {:.2} requests/s, {:.1} output tokens/s, {:.1} tokens/s with prompts",
            self.requests_per_s, self.output_tokens_per_s, self.total_tokens_per_s
        )?;
        if let (Some(goodput), Some(good)) = (self.goodput_requests_per_s, self.good_requests) {
            writeln!(
                out,
                "goodput            {goodput:.2} requests/s ({good} met the objectives)"
            )?;
        }
        writeln!(
            out,
            "{:<18} {:>10} {:>10} {:>10} {:>10}",
            "milliseconds", "mean", "median", "P90", "P99"
        )?;
        let rows = [
            ("TTFT", self.ttft_ms),
            ("TPOT", self.tpot_ms),
            ("ITL", self.itl_ms),
            ("end to end", self.e2e_ms),
        ];
        for (name, s) in rows {
            writeln!(
                out,
                "{name:<18} {:>10.2} {:>10.2} {:>10.2} {:>10.2}",
                s.mean, s.median, s.p90, s.p99
            )?;
        }
        if self.token_count_mismatches > 0 {
            writeln!(
                out,
                "token counts       {} answers without usage, or with another count than asked for",
                self.token_count_mismatches
            )?;
        }
        for (error, count) in self.errors.iter().take(ERRORS_SHOWN) {
            writeln!(out, "error              {count} x {error}")?;
        }
        if self.errors.len() > ERRORS_SHOWN {
            writeln!(
                out,
                "error              and {} other kinds",
                self.errors.len() - ERRORS_SHOWN
            )?;
        }
        Ok(())
    }

    /// A run of which requests failed is a failure, so that a script notices.
    pub(super) fn verdict(&self) -> Result<(), Failure> {
        match self.requests - self.succeeded {
            0 => Ok(()),
            failed => Err(Failure::new(format!(
                "{failed} of {} requests failed",
                self.requests
            ))),
        }
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(chunks: &[u64], usage: Option<(u32, u32)>) -> Seen {
        let chunks = chunks.iter().map(|ms| Duration::from_millis(*ms)).collect();
        Seen {
            chunks,
            finished: true,
            usage,
            error: None,
        }
    }

    fn report(seen: &[Seen], slo: (Option<f64>, Option<f64>)) -> OnlineReport {
        OnlineReport::new(
            "http://x",
            "m",
            seen,
            Duration::from_secs(2),
            (10, Some(3)),
            slo,
        )
    }

    #[test]
    fn times_are_counted_by_tokens_of_usage_not_by_chunks() {
        // Two tokens came in the last chunk.
        let report = report(&[seen(&[100, 300], Some((10, 3)))], (None, None));
        assert_eq!(
            (
                report.ttft_ms.median,
                report.tpot_ms.median,
                report.itl_ms.median
            ),
            (100.0, 100.0, 200.0)
        );
        assert_eq!((report.output_tokens, report.output_tokens_per_s), (3, 1.5));
        assert_eq!(report.token_count_mismatches, 0);
        assert_eq!(report.goodput_requests_per_s, None);
        assert!(report.verdict().is_ok());
    }

    #[test]
    fn goodput_counts_what_met_every_objective() {
        let all = [
            seen(&[100, 200, 300], Some((10, 3))),
            seen(&[900, 1000, 1100], Some((10, 3))),
            seen(&[100, 900, 1700], Some((10, 3))),
            Seen::failed("refused"),
        ];
        let report = report(&all, (Some(500.0), Some(150.0)));
        assert_eq!(
            (report.good_requests, report.goodput_requests_per_s),
            (Some(1), Some(0.5))
        );
        assert_eq!((report.succeeded, report.errors["refused"]), (3, 1));
        assert!(report.verdict().is_err());
    }

    #[test]
    fn a_server_that_counts_otherwise_is_noticed() {
        let all = [
            seen(&[1], Some((10, 2))),
            seen(&[1], Some((11, 3))),
            seen(&[1], None),
            seen(&[1], Some((10, 3))),
        ];
        assert_eq!(report(&all, (None, None)).token_count_mismatches, 3);
    }
}

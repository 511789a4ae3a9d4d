//! The requests of a simulation: a trace, or arrivals drawn at a rate.

use std::path::Path;

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use serde::Deserialize;

use crate::{PlanError, Workload};

/// One request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TraceRequest {
    /// Seconds since the trace began.
    pub arrival_s: f64,
    /// Tokens of the prompt.
    pub input_tokens: u32,
    /// Tokens of the answer.
    pub output_tokens: u32,
}

/// A line of a trace. `timestamp`, `input_length` and `output_length` are the names of Mooncake's published traces, milliseconds and tokens.
#[derive(Deserialize)]
struct Line {
    arrival_s: Option<f64>,
    timestamp: Option<f64>,
    #[serde(alias = "input_length")]
    input_tokens: f64,
    #[serde(alias = "output_length")]
    output_tokens: f64,
}

/// Requests in order of arrival.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace(Vec<TraceRequest>);

impl Trace {
    /// The requests.
    pub fn requests(&self) -> &[TraceRequest] {
        &self.0
    }

    /// Time of the last arrival.
    pub fn span_s(&self) -> f64 {
        self.0.last().map_or(0.0, |request| request.arrival_s)
    }

    /// So many alike requests at once.
    ///
    /// # Errors
    /// There are none.
    pub fn burst(
        requests: usize,
        input_tokens: u32,
        output_tokens: u32,
    ) -> Result<Self, PlanError> {
        if requests == 0 {
            return Err(PlanError::invalid(
                "the arrivals",
                "there are no requests",
                "give at least one",
            ));
        }
        let request = TraceRequest {
            arrival_s: 0.0,
            input_tokens,
            output_tokens,
        };
        Ok(Trace(vec![request; requests]))
    }

    /// Its means, as a plan would read them: a request counts by how long it decodes.
    pub fn workload(&self) -> Workload {
        let sum = |of: &dyn Fn(f64, f64) -> f64| -> f64 {
            let each = |request: &TraceRequest| {
                of(request.input_tokens.into(), request.output_tokens.into())
            };
            self.0.iter().map(each).sum()
        };
        let tokens = sum(&|_, output| output);
        let context = sum(&|input, output| output * (input + output / 2.0)) / tokens;
        let mean_output = tokens / self.0.len() as f64;
        Workload {
            mean_input: (context - mean_output / 2.0).max(1.0),
            mean_output,
            imbalance: 1.0,
        }
    }

    /// KV blocks that all requests together fill.
    pub(super) fn blocks(&self, block_tokens: u32) -> u32 {
        let blocks = |request: &TraceRequest| {
            u64::from((request.input_tokens + request.output_tokens).div_ceil(block_tokens))
        };
        u32::try_from(self.0.iter().map(blocks).sum::<u64>()).unwrap_or(u32::MAX)
    }

    /// Longest request, prompt and answer together.
    pub fn longest(&self) -> u32 {
        let lengths = self
            .0
            .iter()
            .map(|request| request.input_tokens + request.output_tokens);
        lengths.max().unwrap_or(1)
    }

    /// Reads a file of JSON lines.
    ///
    /// # Errors
    /// The file cannot be read; or names the line that is not a request, goes back in time, or has a number that makes no sense; or there is none.
    pub fn read(path: &Path) -> Result<Self, PlanError> {
        let place = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| PlanError::File {
            path: place.clone(),
            source,
        })?;
        Self::parse(&place, &text)
    }

    /// As [`read`](Self::read), of the text of `place`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(place: &str, text: &str) -> Result<Self, PlanError> {
        let mut requests: Vec<TraceRequest> = Vec::new();
        for (line, number) in text
            .lines()
            .zip(1..)
            .filter(|(line, _)| !line.trim().is_empty())
        {
            let place = format!("{place}, line {number}");
            let line: Line = serde_json::from_str(line).map_err(|error| {
                PlanError::invalid(
                    &place,
                    error.to_string(),
                    "write one object a line, as {\"arrival_s\": 0.5, \"input_tokens\": 571, \"output_tokens\": 159}",
                )
            })?;
            let arrival_s = line
                .arrival_s
                .or(line.timestamp.map(|ms| ms / 1e3))
                .ok_or_else(|| {
                    PlanError::invalid(
                        &place,
                        "the request has no time",
                        "give arrival_s in seconds, or timestamp in milliseconds",
                    )
                })?;
            if !(arrival_s.is_finite() && arrival_s >= 0.0) {
                return Err(PlanError::invalid(
                    &place,
                    format!("the request arrives at {arrival_s} s"),
                    "times count from the begin of the trace and are not negative",
                ));
            }
            if requests
                .last()
                .is_some_and(|last| last.arrival_s > arrival_s)
            {
                return Err(PlanError::invalid(
                    &place,
                    format!("the request arrives at {arrival_s} s, before the one above it"),
                    "sort the trace by time",
                ));
            }
            let tokens = |name, value: f64, least: f64| {
                if value.fract() == 0.0 && (least..=f64::from(u32::MAX / 4)).contains(&value) {
                    Ok(value as u32)
                } else {
                    Err(PlanError::invalid(
                        &place,
                        format!("{name} is {value}"),
                        format!("it must be a whole number of at least {least}"),
                    ))
                }
            };
            requests.push(TraceRequest {
                arrival_s,
                input_tokens: tokens("input_tokens", line.input_tokens, 1.0)?,
                output_tokens: tokens("output_tokens", line.output_tokens, 1.0)?,
            });
        }
        if requests.is_empty() {
            return Err(PlanError::invalid(
                place,
                "there are no requests",
                "write one a line",
            ));
        }
        Ok(Trace(requests))
    }

    /// Arrivals of a Poisson process of `per_s` requests for `span_s` seconds, with lengths drawn evenly between half and one and a half times the means.
    ///
    /// # Errors
    /// A rate, time or length that makes no sense.
    pub fn draw(
        per_s: f64,
        span_s: f64,
        mean_input: f64,
        mean_output: f64,
        seed: u64,
    ) -> Result<Self, PlanError> {
        for (name, value, least) in [
            ("the rate", per_s, f64::MIN_POSITIVE),
            ("the duration", span_s, f64::MIN_POSITIVE),
            ("the mean input", mean_input, 1.0),
            ("the mean output", mean_output, 1.0),
        ] {
            if !(value.is_finite() && value >= least) {
                return Err(PlanError::invalid(
                    "the arrivals",
                    format!("{name} is {value}"),
                    "give a positive number",
                ));
            }
        }
        let random = &mut Pcg64::seed_from_u64(seed);
        let mut requests = Vec::new();
        let mut arrival_s = 0.0;
        loop {
            arrival_s -= (1.0 - random.random::<f64>()).ln() / per_s;
            if arrival_s > span_s && !requests.is_empty() {
                return Ok(Trace(requests));
            }
            let mut length =
                |mean: f64| (mean * (0.5 + random.random::<f64>())).round().max(1.0) as u32;
            requests.push(TraceRequest {
                arrival_s,
                input_tokens: length(mean_input),
                output_tokens: length(mean_output),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_are_read() {
        let text = "{\"arrival_s\": 0.5, \"input_tokens\": 7, \"output_tokens\": 3}\n\n{\"timestamp\": 1500, \"input_length\": 9, \"output_length\": 4, \"hash_ids\": [1]}\n";
        let trace = Trace::parse("t", text).unwrap();
        let expected =
            [(0.5, 7, 3), (1.5, 9, 4)].map(|(arrival_s, input_tokens, output_tokens)| {
                TraceRequest {
                    arrival_s,
                    input_tokens,
                    output_tokens,
                }
            });
        assert_eq!(trace.requests(), expected);
    }

    #[test]
    fn bad_lines_are_named() {
        let good = "{\"arrival_s\": 3, \"input_tokens\": 7, \"output_tokens\": 3}";
        for (text, said) in [
            (
                good.replace("3, \"i", "-1, \"i"),
                "line 1: the request arrives at -1 s",
            ),
            (
                format!("{good}\n{}", good.replace("3, \"i", "2, \"i")),
                "line 2: the request arrives at 2 s, before",
            ),
            (good.replace('7', "0"), "input_tokens is 0"),
            (good.replace('7', "1.5"), "input_tokens is 1.5"),
            (good.replace("\"arrival_s\": 3, ", ""), "no time"),
            ("12".to_owned(), "line 1"),
            ("\n".to_owned(), "t: there are no requests"),
        ] {
            let error = Trace::parse("t", &text).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn drawn_arrivals_have_the_rate_and_a_seed() {
        let draw = |seed| Trace::draw(50.0, 200.0, 100.0, 10.0, seed).unwrap();
        let trace = draw(1);
        assert!((9_500..10_500).contains(&trace.requests().len()));
        assert!(
            trace
                .requests()
                .is_sorted_by(|a, b| a.arrival_s <= b.arrival_s)
        );
        assert_eq!(trace, draw(1));
        assert_ne!(trace, draw(2));
        assert!(Trace::draw(0.0, 1.0, 1.0, 1.0, 0).is_err());
    }
}

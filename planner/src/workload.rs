//! What is to be served: lengths of requests, and how unevenly experts are visited.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::PlanError;

/// A workload, as far as a plan depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// Mean tokens of a prompt.
    pub mean_input: f64,
    /// Mean tokens of an answer.
    pub mean_output: f64,
    /// Rows of the busiest expert worker by the mean: 1 where load is balanced.
    pub imbalance: f64,
}

/// One request of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
struct Line {
    /// Seconds since the trace began; `timestamp` in milliseconds is read too (Mooncake's traces).
    arrival_s: Option<f64>,
    timestamp: Option<f64>,
    #[serde(alias = "input_length")]
    input_tokens: f64,
    #[serde(alias = "output_length")]
    output_tokens: f64,
}

impl Workload {
    /// The medians of the paper's trace.
    pub const PAPER: Self = Self {
        mean_input: 571.0,
        mean_output: 159.0,
        imbalance: 1.0,
    };

    /// Mean tokens in the cache of a request that decodes (s): its prompt, and half of its answer.
    pub fn mean_context(&self) -> f64 {
        self.mean_input + self.mean_output / 2.0
    }

    /// Means of a trace: one JSON object a line, with `arrival_s` (or `timestamp` in milliseconds), `input_tokens` and `output_tokens`
    /// (or `input_length` and `output_length`). A request counts by how long it decodes, for that is how often it is met in a batch.
    ///
    /// # Errors
    /// Names the line that is not such an object, goes back in time, or has a number that makes no sense.
    pub fn from_trace(path: &Path) -> Result<Self, PlanError> {
        let place = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| PlanError::File {
            path: place.clone(),
            source,
        })?;
        Self::from_trace_text(&place, &text)
    }

    fn from_trace_text(place: &str, text: &str) -> Result<Self, PlanError> {
        let (mut tokens, mut context, mut requests) = (0.0, 0.0, 0.0);
        for (number, line) in text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty())
        {
            let place = format!("{place}: line {}", number + 1);
            let request: Line = serde_json::from_str(line).map_err(|error| {
                PlanError::invalid(
                    &place,
                    error.to_string(),
                    "write {\"arrival_s\": 0.5, \"input_tokens\": 571, \"output_tokens\": 159}",
                )
            })?;
            let arrival = request.arrival_s.or(request.timestamp).unwrap_or(0.0);
            for (key, value, least) in [
                ("the arrival", arrival, 0.0),
                ("input_tokens", request.input_tokens, 1.0),
                ("output_tokens", request.output_tokens, 1.0),
            ] {
                if !(value.is_finite() && value >= least) {
                    return Err(PlanError::invalid(
                        &place,
                        format!("{key} is {value}"),
                        format!("it must be at least {least}"),
                    ));
                }
            }
            requests += 1.0;
            tokens += request.output_tokens;
            context += request.output_tokens * (request.input_tokens + request.output_tokens / 2.0);
        }
        if requests == 0.0 {
            return Err(PlanError::invalid(place, "no requests", "write one a line"));
        }
        let mean_output = tokens / requests;
        Ok(Self {
            mean_input: (context / tokens - mean_output / 2.0).max(1.0),
            mean_output,
            imbalance: 1.0,
        })
    }

    /// Refuses numbers that make no sense.
    ///
    /// # Errors
    /// Names the number.
    pub fn check(&self) -> Result<(), PlanError> {
        for (key, value, least) in [
            ("mean input", self.mean_input, 1.0),
            ("mean output", self.mean_output, 1.0),
            ("imbalance", self.imbalance, 1.0),
        ] {
            if !(value.is_finite() && value >= least) {
                return Err(PlanError::invalid(
                    format!("workload: {key}"),
                    format!("{value} is out of range"),
                    format!("it must be at least {least}"),
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_counts_by_the_steps_it_is_in() {
        let text = "{\"arrival_s\": 0, \"input_tokens\": 100, \"output_tokens\": 10}\n\n{\"timestamp\": 1500, \"input_length\": 1000, \"output_length\": 30}\n";
        let workload = Workload::from_trace_text("t", text).unwrap();
        assert_eq!(workload.mean_output, 20.0);
        assert_eq!(
            workload.mean_context(),
            (10.0 * 105.0 + 30.0 * 1015.0) / 40.0
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_line() {
        for (text, says) in [
            ("", "no requests"),
            (
                "{\"arrival_s\": -1, \"input_tokens\": 1, \"output_tokens\": 1}",
                "t: line 1: the arrival is -1",
            ),
            (
                "\n{\"arrival_s\": 0, \"input_tokens\": 0, \"output_tokens\": 1}",
                "line 2: input_tokens is 0",
            ),
            ("{\"input_tokens\": 1}", "output_tokens"),
            ("nonsense", "line 1"),
        ] {
            let said = Workload::from_trace_text("t", text)
                .unwrap_err()
                .to_string();
            assert!(said.contains(says), "{said}");
        }
    }
}

//! A made-up load straight into the engine, without text and HTTP: for `volley bench` and `volley trace`.

use std::time::{Duration, Instant};

use volley_actors::{Client, FinishReason, Request, RequestEvent};

use crate::failure::Failure;
use crate::random::Random;

/// Requests that are all handed in at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// How many.
    pub batch: u32,
    /// Tokens of each prompt.
    pub input: u32,
    /// Tokens each generates; nothing ends one early.
    pub output: u32,
    /// Where prompts come from.
    pub seed: u64,
}

/// When each token of each request came, since all were handed in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// `[request][token]`.
    pub tokens: Vec<Vec<Duration>>,
}

impl Load {
    /// Runs the load to its end. `vocab` is the model's.
    ///
    /// # Errors
    /// When a request is refused or fails.
    pub async fn run(self, client: &Client, vocab: usize) -> Result<Observed, Failure> {
        let mut random = Random::new(self.seed);
        let vocab = u32::try_from(vocab).unwrap_or(u32::MAX);
        let prompts: Vec<_> = (0..self.batch)
            .map(|_| random.prompt(self.input, vocab))
            .collect();
        let start = Instant::now();
        let mut requests = tokio::task::JoinSet::new();
        for prompt in prompts {
            let mut stream = client.submit(Request::greedy(prompt, self.output)).await?;
            requests.spawn(async move {
                let mut times = Vec::new();
                while let Some(event) = stream.next().await {
                    match event {
                        RequestEvent::Token { .. } => times.push(start.elapsed()),
                        RequestEvent::Finished(FinishReason::Error(reason)) => {
                            return Err(Failure::new(reason));
                        }
                        RequestEvent::Prompt(_) | RequestEvent::Finished(_) => {}
                    }
                }
                Ok(times)
            });
        }
        let mut tokens = Vec::new();
        while let Some(joined) = requests.join_next().await {
            tokens.push(
                joined
                    .map_err(|error| Failure::new(format!("a request's task ended: {error}")))??,
            );
        }
        let expected = self.output as usize;
        match tokens.iter().find(|times| times.len() != expected) {
            Some(times) => Err(Failure::new(format!(
                "a request generated {} tokens instead of {expected}; prompt and output must fit the context",
                times.len()
            ))),
            None => Ok(Observed { tokens }),
        }
    }
}

impl Observed {
    /// Until every request had its first token: the time of all prompts.
    pub fn prefill(&self) -> Duration {
        self.tokens
            .iter()
            .filter_map(|times| times.first())
            .max()
            .copied()
            .unwrap_or_default()
    }

    /// Tokens that came after that, and the time they took.
    pub fn decode(&self) -> (usize, Duration) {
        let prefill = self.prefill();
        let end = self
            .tokens
            .iter()
            .filter_map(|times| times.last())
            .max()
            .copied()
            .unwrap_or_default();
        let tokens = self
            .tokens
            .iter()
            .flatten()
            .filter(|time| **time > prefill)
            .count();
        (tokens, end.saturating_sub(prefill))
    }

    /// Seconds between two tokens of a request, all of them, once all prompts were done.
    pub fn gaps(&self) -> Vec<f64> {
        let prefill = self.prefill();
        let pairs = self.tokens.iter().flat_map(|times| times.windows(2));
        pairs
            .filter(|pair| pair[0] >= prefill)
            .map(|pair| (pair[1] - pair[0]).as_secs_f64())
            .collect()
    }
}

impl Observed {
    /// Those of [`gaps`](Self::gaps) that passed before any request had ended: all were decoding.
    pub fn full_gaps(&self) -> Vec<f64> {
        let (prefill, ends) = (
            self.prefill(),
            self.tokens.iter().filter_map(|times| times.last()),
        );
        let end = ends.min().copied().unwrap_or_default();
        let pairs = self.tokens.iter().flat_map(|times| times.windows(2));
        pairs
            .filter(|pair| pair[0] >= prefill && pair[1] <= end)
            .map(|pair| (pair[1] - pair[0]).as_secs_f64())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_begins_when_the_last_prompt_is_done() {
        let ms = |list: &[u64]| list.iter().map(|ms| Duration::from_millis(*ms)).collect();
        let observed = Observed {
            tokens: vec![ms(&[10, 20, 40, 50]), ms(&[30, 40, 50])],
        };
        assert_eq!(observed.prefill(), Duration::from_millis(30));
        assert_eq!(observed.decode(), (4, Duration::from_millis(20)));
        let gaps = observed.gaps();
        assert_eq!(gaps.len(), 3);
        assert!(gaps.iter().all(|gap| (gap - 0.01).abs() < 1e-9), "{gaps:?}");
        assert_eq!(observed.full_gaps().len(), 3);
        let observed = Observed {
            tokens: vec![ms(&[10, 20, 30]), ms(&[30, 40, 50])],
        };
        assert!(observed.full_gaps().is_empty() && observed.gaps().len() == 2);
    }
}

//! From logits to a token, and to log-probabilities.
//!
//! Everything here is a function of the logits, the request and the position of the output token: the draw uses a counter instead of a
//! generator's state, so a sequence that moves to another worker goes on as if nothing had happened.

use std::cmp::Ordering;

use crate::request::{Sampling, TokenLogprob};

/// Most alternatives a request can ask log-probabilities for.
pub const LOGPROBS_MAX: u8 = 20;

/// Scratch memory for sampling, sized to the vocabulary once.
#[derive(Debug)]
pub struct Sampler {
    candidates: Vec<Candidate>,
    counts: Vec<u32>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    /// Probability up to a common factor; the most probable token has 1.
    weight: f64,
}

impl Candidate {
    /// More probable first, then the lower token: a total order, so that ties are decided alike everywhere.
    fn order(a: &Candidate, b: &Candidate) -> Ordering {
        b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token))
    }
}

impl Sampler {
    /// For a vocabulary of `vocab` tokens.
    pub fn new(vocab: usize) -> Self {
        Sampler {
            candidates: Vec::with_capacity(vocab),
            counts: vec![0; vocab],
        }
    }

    /// Chooses output token `generated.len()` of a sequence. `logits` are changed by biases and penalties.
    ///
    /// `None` where the logits have no greatest number: they are NaN or infinite, from damaged weights or an overflow. A token taken from
    /// them would be noise that looks like an answer.
    pub fn sample(
        &mut self,
        logits: &mut [f32],
        sampling: &Sampling,
        prompt: &[u32],
        generated: &[u32],
    ) -> Option<u32> {
        self.penalize(logits, sampling, prompt, generated);
        let best = argmax(logits);
        let max = f64::from(logits[best as usize]);
        if !max.is_finite() {
            return None;
        }
        if sampling.temperature == 0.0 {
            return Some(best);
        }
        let temperature = f64::from(sampling.temperature);
        self.candidates.clear();
        self.candidates
            .extend(logits.iter().zip(0..).map(|(&logit, token)| Candidate {
                token,
                weight: ((f64::from(logit) - max) / temperature).exp(),
            }));
        if sampling.min_p > 0.0 {
            self.candidates
                .retain(|c| c.weight >= f64::from(sampling.min_p));
        }
        let top_k = sampling.top_k as usize;
        if top_k > 0 && top_k < self.candidates.len() {
            self.candidates
                .select_nth_unstable_by(top_k - 1, Candidate::order);
            self.candidates.truncate(top_k);
        }
        if sampling.top_p < 1.0 {
            self.keep_nucleus(f64::from(sampling.top_p));
        }
        let total: f64 = self.candidates.iter().map(|c| c.weight).sum();
        if total.is_nan() {
            return None;
        }
        let mut left = uniform(sampling.seed, generated.len() as u64) * total;
        for candidate in &self.candidates {
            left -= candidate.weight;
            if left < 0.0 {
                return Some(candidate.token);
            }
        }
        // Rounding can leave a remainder behind the last candidate.
        Some(self.candidates.last().map_or(best, |c| c.token))
    }

    /// Biases and penalties, in place.
    fn penalize(
        &mut self,
        logits: &mut [f32],
        sampling: &Sampling,
        prompt: &[u32],
        generated: &[u32],
    ) {
        for &(token, bias) in &sampling.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        let repetition = sampling.repetition_penalty;
        let additive = sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0;
        if repetition == 1.0 && !additive {
            return;
        }
        if repetition != 1.0 {
            for &token in prompt.iter().chain(generated) {
                // `counts` marks what was scaled already: each distinct token once.
                if std::mem::replace(&mut self.counts[token as usize], 1) == 0 {
                    let logit = &mut logits[token as usize];
                    *logit = if *logit > 0.0 {
                        *logit / repetition
                    } else {
                        *logit * repetition
                    };
                }
            }
            for &token in prompt.iter().chain(generated) {
                self.counts[token as usize] = 0;
            }
        }
        if additive {
            for &token in generated {
                self.counts[token as usize] += 1;
            }
            for &token in generated {
                let count = std::mem::take(&mut self.counts[token as usize]);
                if count > 0 {
                    logits[token as usize] -=
                        sampling.presence_penalty + sampling.frequency_penalty * count as f32;
                }
            }
        }
    }

    /// Keeps the smallest set of most probable candidates whose share reaches `top_p`.
    fn keep_nucleus(&mut self, top_p: f64) {
        let goal = top_p * self.candidates.iter().map(|c| c.weight).sum::<f64>();
        // Mostly a few tokens suffice: sort a growing head instead of the whole vocabulary.
        let mut head = 64;
        loop {
            head = head.min(self.candidates.len());
            if head < self.candidates.len() {
                self.candidates
                    .select_nth_unstable_by(head - 1, Candidate::order);
            }
            self.candidates[..head].sort_unstable_by(Candidate::order);
            let mut sum = 0.0;
            for index in 0..head {
                sum += self.candidates[index].weight;
                if sum >= goal {
                    self.candidates.truncate(index + 1);
                    return;
                }
            }
            if head == self.candidates.len() {
                return;
            }
            head *= 8;
        }
    }

    /// The log-probability of `token` under unmodified `logits`, and the `top` most probable ones.
    pub fn logprob(&mut self, logits: &[f32], token: u32, top: u8) -> TokenLogprob {
        let max = f64::from(logits[argmax(logits) as usize]);
        let sum: f64 = logits
            .iter()
            .map(|&logit| (f64::from(logit) - max).exp())
            .sum();
        let normalizer = max + sum.ln();
        let logprob = |token: u32| (f64::from(logits[token as usize]) - normalizer) as f32;
        let top = top.min(LOGPROBS_MAX) as usize;
        let best = |a: &u32, b: &u32| {
            logits[*b as usize]
                .total_cmp(&logits[*a as usize])
                .then(a.cmp(b))
        };
        let mut tokens: Vec<u32> = Vec::new();
        if top > 0 {
            tokens.extend(0..logits.len() as u32);
            if top < tokens.len() {
                tokens.select_nth_unstable_by(top - 1, best);
                tokens.truncate(top);
            }
            tokens.sort_unstable_by(best);
        }
        TokenLogprob {
            token,
            logprob: logprob(token),
            top: tokens
                .into_iter()
                .map(|token| (token, logprob(token)))
                .collect(),
        }
    }
}

/// The index of the greatest value, the lowest one of equals.
fn argmax(values: &[f32]) -> u32 {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = index;
        }
    }
    best as u32
}

/// A uniform number in [0, 1) from a seed and a counter (splitmix64's finaliser, twice).
fn uniform(seed: u64, counter: u64) -> f64 {
    let mix = |mut z: u64| {
        z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    (mix(mix(seed) ^ counter) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f32) -> Sampling {
        Sampling {
            temperature,
            ..Sampling::greedy()
        }
    }

    #[test]
    fn greedy_takes_the_greatest_and_the_lowest_of_equals() {
        let mut sampler = Sampler::new(4);
        let token = sampler.sample(&mut [0.0, 2.0, 2.0, 1.0], &sampling(0.0), &[0], &[]);
        assert_eq!(token, Some(1));
    }

    #[test]
    fn what_is_no_number_is_no_token() {
        let mut sampler = Sampler::new(3);
        let mut choose = |logits: [f32; 3], temperature| {
            sampler.sample(&mut logits.clone(), &sampling(temperature), &[0], &[])
        };
        for temperature in [0.0, 1.0] {
            assert_eq!(choose([f32::NAN; 3], temperature), None);
            assert_eq!(choose([0.0, f32::INFINITY, 0.0], temperature), None);
            assert_eq!(choose([f32::NEG_INFINITY; 3], temperature), None);
            assert_eq!(
                choose([f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY], temperature),
                Some(1)
            );
        }
        assert_eq!(choose([1.0, f32::NAN, 0.0], 1.0), None);
    }

    #[test]
    fn draws_follow_the_distribution_and_depend_on_seed_and_position_only() {
        let mut sampler = Sampler::new(3);
        let logits = [0.0f32, 1.0, 2.0];
        let mut counts = [0u32; 3];
        let generated = vec![0u32; 20_000];
        for position in 0..20_000 {
            let token = sampler.sample(
                &mut logits.clone(),
                &sampling(1.0),
                &[0],
                &generated[..position],
            );
            counts[token.unwrap() as usize] += 1;
        }
        let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        for (count, logit) in counts.iter().zip(logits) {
            let expected = f64::from(logit).exp() / total;
            assert!(
                (f64::from(*count) / 20_000.0 - expected).abs() < 0.01,
                "{counts:?}"
            );
        }
        let draw = |sampler: &mut Sampler| {
            sampler.sample(&mut logits.clone(), &sampling(1.0), &[0], &[1, 2])
        };
        assert_eq!(draw(&mut sampler), draw(&mut Sampler::new(3)));
    }

    #[test]
    fn filters_leave_out_what_they_should() {
        let mut sampler = Sampler::new(5);
        let logits = [0.0f32, 1.0, 2.0, 3.0, 4.0]; // shares 1.2, 3.2, 8.6, 23.4, 63.6 %
        let seen = |sampler: &mut Sampler, sampling: Sampling| {
            let mut seen = [false; 5];
            for seed in 0..2000 {
                let sampling = Sampling {
                    seed,
                    ..sampling.clone()
                };
                let token = sampler.sample(&mut logits.clone(), &sampling, &[0], &[]);
                seen[token.unwrap() as usize] = true;
            }
            seen
        };
        let base = sampling(1.0);
        let all = seen(&mut sampler, base.clone());
        assert_eq!(all, [true; 5]);
        let top_k = seen(
            &mut sampler,
            Sampling {
                top_k: 2,
                ..base.clone()
            },
        );
        assert_eq!(top_k, [false, false, false, true, true]);
        let top_p = seen(
            &mut sampler,
            Sampling {
                top_p: 0.9,
                ..base.clone()
            },
        );
        assert_eq!(top_p, [false, false, true, true, true]);
        let min_p = seen(&mut sampler, Sampling { min_p: 0.3, ..base });
        assert_eq!(min_p, [false, false, false, true, true]);
    }

    #[test]
    fn penalties_and_bias_move_the_choice() {
        let mut sampler = Sampler::new(3);
        let greedy = Sampling::greedy();
        let logits = [1.0f32, 0.9, 0.5];
        let mut choose = |sampling: &Sampling, prompt: &[u32], generated: &[u32]| {
            sampler
                .sample(&mut logits.clone(), sampling, prompt, generated)
                .unwrap()
        };
        assert_eq!(choose(&greedy, &[2], &[0]), 0);
        assert_eq!(
            choose(
                &Sampling {
                    presence_penalty: 0.2,
                    ..greedy.clone()
                },
                &[2],
                &[0]
            ),
            1
        );
        let frequency = Sampling {
            frequency_penalty: 0.06,
            ..greedy.clone()
        };
        assert_eq!(choose(&frequency, &[2], &[0]), 0);
        assert_eq!(choose(&frequency, &[2], &[0, 0]), 1);
        // The prompt counts for the repetition penalty only, and each token once.
        let repetition = Sampling {
            repetition_penalty: 1.5,
            ..greedy.clone()
        };
        assert_eq!(choose(&repetition, &[0, 0], &[]), 1);
        assert_eq!(choose(&repetition, &[0, 1], &[1, 0]), 0);
        assert_eq!(
            choose(
                &Sampling {
                    logit_bias: vec![(2, 1.0)],
                    ..greedy
                },
                &[0],
                &[]
            ),
            2
        );
    }

    #[test]
    fn logprobs_are_normalised_and_sorted() {
        let mut sampler = Sampler::new(3);
        let logprob = sampler.logprob(&[1.0, 3.0, 2.0], 0, 2);
        assert_eq!(
            logprob.top.iter().map(|&(t, _)| t).collect::<Vec<_>>(),
            [1, 2]
        );
        let sum: f32 = [0, 1, 2]
            .map(|t| sampler.logprob(&[1.0, 3.0, 2.0], t, 0).logprob.exp())
            .iter()
            .sum();
        assert!((sum - 1.0).abs() < 1e-6);
    }
}

//! From logits to a token, and to log-probabilities.
//!
//! Everything here is a function of the logits, the request and the position of the output token: the draw uses a counter instead of a
//! generator's state, so a sequence that moves to another worker goes on as if nothing had happened.

use std::cmp::Ordering;

use volley_models::kernels::{Isa, softmax};

use crate::request::{Sampling, TokenLogprob};

/// Most alternatives a request can ask log-probabilities for.
pub const LOGPROBS_MAX: u8 = 20;

/// Probabilities up to this are those of tokens that were ruled out: an exponential is never less than about 1.2e-38.
const RULED_OUT: f32 = 2e-38;

/// Scratch memory for sampling, sized to the vocabulary once.
#[derive(Debug)]
pub struct Sampler {
    isa: Isa,
    candidates: Vec<Candidate>,
    counts: Vec<u32>,
    probabilities: Vec<f32>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    probability: f32,
}

impl Candidate {
    /// More probable first, then the lower token: a total order, so that ties are decided alike everywhere.
    fn order(a: &Candidate, b: &Candidate) -> Ordering {
        b.probability
            .total_cmp(&a.probability)
            .then(a.token.cmp(&b.token))
    }
}

impl Sampler {
    /// For a vocabulary of `vocab` tokens.
    pub fn new(vocab: usize) -> Self {
        Sampler {
            isa: Isa::detect(),
            candidates: Vec::with_capacity(vocab),
            counts: vec![0; vocab],
            probabilities: vec![0.0; vocab],
        }
    }

    /// Chooses output token `generated.len()` of a sequence. `logits` are overwritten.
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
        let max = logits[best as usize];
        if !max.is_finite() {
            return None;
        }
        if sampling.temperature == 0.0 {
            return Some(best);
        }
        for logit in &mut *logits {
            *logit = (*logit - max) / sampling.temperature;
        }
        let width = logits.len();
        softmax(self.isa, logits, width);
        let probabilities = &*logits;
        if probabilities[best as usize].is_nan() {
            return None;
        }
        let draw = uniform(sampling.seed, generated.len() as u64);
        let truncated = sampling.top_k > 0 || sampling.top_p < 1.0 || sampling.min_p > 0.0;
        let token = if truncated {
            self.truncate(probabilities, best, sampling);
            let candidates = self.candidates.iter();
            pick(
                draw * self.mass(),
                candidates.map(|c| (c.token, c.probability)),
            )
        } else {
            pick(draw, (0..).zip(probabilities.iter().copied()))
        };
        Some(token.unwrap_or(best))
    }

    /// Leaves in `candidates` what `min_p`, `top_k` and `top_p`, in this order, leave over: each a prefix of the tokens by falling probability.
    ///
    /// That prefix is mostly short, so what is less than a thousandth as probable as the best is not looked at, then a millionth, and so on until what
    /// was collected must hold it. Filtering costs a comparison a token then, whatever the vocabulary.
    fn truncate(&mut self, probabilities: &[f32], best: u32, sampling: &Sampling) {
        let top_k = match sampling.top_k as usize {
            0 => usize::MAX,
            top_k => top_k,
        };
        let (mut cut, narrowed) = match sampling.min_p {
            0.0 => (1e-3, top_k < probabilities.len()),
            min_p => (min_p, true),
        };
        loop {
            let least = (cut * probabilities[best as usize]).max(RULED_OUT);
            let collected = (0..).zip(probabilities).filter(|&(_, &p)| p >= least);
            self.candidates.clear();
            self.candidates
                .extend(collected.map(|(token, &probability)| Candidate { token, probability }));
            let enough = match narrowed {
                true => sampling.min_p > 0.0 || self.candidates.len() >= top_k,
                false => self.mass() >= f64::from(sampling.top_p),
            };
            if enough || least == RULED_OUT {
                break;
            }
            cut *= 1e-3;
        }
        if top_k < self.candidates.len() {
            self.candidates
                .select_nth_unstable_by(top_k - 1, Candidate::order);
            self.candidates.truncate(top_k);
        }
        if sampling.top_p < 1.0 {
            let whole = if narrowed { self.mass() } else { 1.0 };
            self.keep_nucleus(f64::from(sampling.top_p) * whole);
        }
    }

    /// The candidates' probability together.
    fn mass(&self) -> f64 {
        self.candidates
            .iter()
            .map(|c| f64::from(c.probability))
            .sum()
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

    /// Keeps the smallest set of most probable candidates whose probability together reaches `goal`.
    fn keep_nucleus(&mut self, goal: f64) {
        // Its end lies in `kept..end`; halving that leaves a few to be sorted.
        let (mut kept, mut end) = (0, self.candidates.len());
        let mut sum = 0.0;
        while end - kept > 32 {
            let half = (end - kept) / 2;
            let open = &mut self.candidates[kept..end];
            open.select_nth_unstable_by(half, Candidate::order);
            let mass: f64 = open[..half].iter().map(|c| f64::from(c.probability)).sum();
            if sum + mass >= goal {
                end = kept + half;
            } else {
                sum += mass;
                kept += half;
            }
        }
        self.candidates[kept..end].sort_unstable_by(Candidate::order);
        while kept < end && sum < goal {
            sum += f64::from(self.candidates[kept].probability);
            kept += 1;
        }
        self.candidates.truncate(kept);
    }

    /// The log-probability of `token` under unmodified `logits`, and the `top` most probable ones.
    pub fn logprob(&mut self, logits: &[f32], token: u32, top: u8) -> TokenLogprob {
        let best = argmax(logits) as usize;
        let probabilities = &mut self.probabilities[..logits.len()];
        probabilities.copy_from_slice(logits);
        softmax(self.isa, probabilities, logits.len());
        // The greatest probability is `e^max` of the sum of all.
        let normalizer = f64::from(logits[best]) - f64::from(probabilities[best]).ln();
        let logprob = |token: u32| (f64::from(logits[token as usize]) - normalizer) as f32;
        let top = top.min(LOGPROBS_MAX) as usize;
        let mut most: Vec<(u32, f32)> = Vec::with_capacity(top + 1);
        for (token, &logit) in (0..).zip(logits) {
            if top == 0 || (most.len() == top && logit <= most[top - 1].1) {
                continue;
            }
            // Behind its equals, which are lower tokens.
            let place = most.partition_point(|&(_, other)| other >= logit);
            most.insert(place, (token, logit));
            most.truncate(top);
        }
        TokenLogprob {
            token,
            logprob: logprob(token),
            top: most
                .iter()
                .map(|&(token, _)| (token, logprob(token)))
                .collect(),
        }
    }
}

/// The token at which the running sum of probabilities passes `draw`; `None` where rounding leaves a remainder behind the last.
fn pick(draw: f64, mut candidates: impl Iterator<Item = (u32, f32)>) -> Option<u32> {
    let mut left = draw;
    let passing = candidates.find(|&(_, p)| {
        left -= f64::from(p);
        left < 0.0 && p >= RULED_OUT
    });
    passing.map(|(token, _)| token)
}

/// The index of the greatest value, the lowest one of equals. NaNs do not count; 0 where there is nothing else.
fn argmax(values: &[f32]) -> u32 {
    // In lanes, which is what the compiler needs to see.
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = values.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = greater(*lane, *value);
        }
    }
    let max = lanes
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |max, value| greater(max, *value));
    let first = values.iter().position(|&value| value == max);
    first.unwrap_or(0) as u32
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

    proptest::proptest! {
        /// Whatever was not looked at would not have been kept.
        #[test]
        fn filters_keep_what_sorting_everything_keeps(
            halves in proptest::collection::vec(-60i8..20, 1..400),
            (top_k, top_p, min_p) in (0u32..80, 0.01f32..1.2, -0.2f32..0.5),
        ) {
            // Halves, so that there are ties.
            let logits: Vec<f32> = halves.iter().map(|&half| f32::from(half) / 2.0).collect();
            let sampling = Sampling {
                top_k: top_k.saturating_sub(20),
                top_p: top_p.min(1.0),
                min_p: min_p.max(0.0),
                ..sampling(0.7)
            };
            let mut sampler = Sampler::new(logits.len());
            let mut probabilities = logits.clone();
            let token = sampler.sample(&mut probabilities, &sampling, &[0], &[]).unwrap();

            let mut expected: Vec<Candidate> = (0..).zip(&probabilities).map(|(token, &probability)| Candidate { token, probability }).collect();
            expected.sort_by(Candidate::order);
            let least = sampling.min_p * expected[0].probability;
            expected.retain(|c| c.probability >= least.max(RULED_OUT));
            if sampling.top_k > 0 {
                expected.truncate(sampling.top_k as usize);
            }
            let mass: f64 = expected.iter().map(|c| f64::from(c.probability)).sum();
            let mut sum = 0.0;
            let within = |c: &Candidate| {
                let before = sum;
                sum += f64::from(c.probability);
                sampling.top_p == 1.0 || before / mass < f64::from(sampling.top_p)
            };
            let nucleus = expected.iter().copied().take_while(within).count();
            if sampling.top_k > 0 || sampling.top_p < 1.0 || sampling.min_p > 0.0 {
                // Rounding may decide about one at the end, or about several that hardly count.
                let kept = sampler.candidates.len();
                let between = &expected[kept.min(nucleus)..kept.max(nucleus)];
                let mass: f32 = between.iter().map(|c| c.probability).sum();
                proptest::prop_assert!(between.len() <= 1 || mass < 1e-6, "{kept} for {nucleus}");
                let mut kept: Vec<u32> = sampler.candidates.iter().map(|c| c.token).collect();
                let mut all: Vec<u32> = expected.iter().take(kept.len()).map(|c| c.token).collect();
                proptest::prop_assert!(kept.contains(&token));
                kept.sort_unstable();
                all.sort_unstable();
                proptest::prop_assert_eq!(kept, all);
            }
        }
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

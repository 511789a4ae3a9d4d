//! Which experts rows visit: evenly, by Zipf's law, or as it was measured.

use std::sync::Arc;

use rand::{Rng, RngExt};

use crate::PlanError;

/// Shares of the (row, expert) pairs that go to each expert, and where experts are.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    /// Probability that a row visits each expert, `[experts]`; sums to `top_k`.
    visits: Vec<f64>,
    /// First expert of each expert worker, and behind the last, their number: `[workers + 1]`.
    bounds: Vec<usize>,
    top_k: usize,
}

impl Routing {
    /// Experts spread evenly over `workers` in order, visited in proportion to `popularity` by `top_k` of each row.
    ///
    /// # Errors
    /// There is an expert without popularity or none at all, more workers than experts, or fewer experts than `top_k`.
    pub fn new(popularity: &[f64], workers: usize, top_k: usize) -> Result<Self, PlanError> {
        let experts = popularity.len();
        let wrong = |problem: String, remedy: &str| {
            Err(PlanError::invalid(
                "the routing",
                problem,
                remedy.to_owned(),
            ))
        };
        if workers == 0 || workers > experts {
            return wrong(
                format!("{workers} expert workers for {experts} experts"),
                "there must be from 1 to as many workers as experts",
            );
        }
        if top_k == 0 || top_k > experts {
            return wrong(
                format!("top-{top_k} of {experts} experts"),
                "a row visits from 1 to all experts",
            );
        }
        if let Some(bad) = popularity
            .iter()
            .find(|share| !share.is_finite() || **share <= 0.0)
        {
            return wrong(
                format!("an expert has the popularity {bad}"),
                "popularities are positive counts or shares; give an expert that is never met a small one",
            );
        }
        let (each, more) = (experts / workers, experts % workers);
        let bounds = (0..=workers)
            .map(|worker| worker * each + worker.min(more))
            .collect();
        Ok(Routing {
            visits: capped(popularity, top_k),
            bounds,
            top_k,
        })
    }

    /// Popularity by Zipf's law: the expert of rank r in proportion to `1 / r^exponent`; 0 is even. Ranks are spread over the experts so that neighbours
    /// are not all popular.
    pub fn zipf(experts: usize, exponent: f64) -> Vec<f64> {
        // A stride that meets every expert once: coprime to their number, near the golden section.
        let stride = (0..experts)
            .map(|more| (experts as f64 * 0.618) as usize + more)
            .find(|&stride| gcd(stride, experts) == 1)
            .unwrap_or(1);
        let mut popularity = vec![0.0; experts];
        for rank in 0..experts {
            popularity[rank * stride % experts] = ((rank + 1) as f64).powf(-exponent);
        }
        popularity
    }

    /// The same without some workers: the experts of one that is gone are with the worker behind it.
    pub fn without(&self, gone: &[u16]) -> Self {
        let workers = self.workers();
        let is_gone = |worker: usize| gone.contains(&(worker as u16));
        let mut held = vec![Vec::new(); workers];
        for worker in 0..workers {
            let heir = (0..workers)
                .map(|next| (worker + next) % workers)
                .find(|&heir| !is_gone(heir));
            if let Some(heir) = heir {
                held[heir].extend_from_slice(&self.visits[self.experts_of(worker)]);
            }
        }
        let mut bounds = vec![0];
        let mut visits = Vec::with_capacity(self.visits.len());
        for held in held {
            visits.extend(held);
            bounds.push(visits.len());
        }
        Routing {
            visits,
            bounds,
            top_k: self.top_k,
        }
    }

    /// Expert workers.
    pub fn workers(&self) -> usize {
        self.bounds.len() - 1
    }

    /// Experts of a layer.
    pub fn experts(&self) -> usize {
        self.visits.len()
    }

    /// Shares of the visits, summed up to 1: `[experts]`.
    pub fn cumulative(&self) -> Arc<[f64]> {
        let mut sum = 0.0;
        let shares = self.visits.iter().map(|p| p / self.top_k as f64);
        shares
            .map(|share| {
                sum += share;
                sum
            })
            .collect()
    }

    /// Experts a row visits.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// The experts of a worker, as positions in what [`draw`](Self::draw) fills.
    pub fn experts_of(&self, worker: usize) -> std::ops::Range<usize> {
        self.bounds[worker]..self.bounds[worker + 1]
    }

    /// Expert workers that a row visits on average.
    pub fn workers_visited(&self) -> f64 {
        (0..self.workers()).map(|worker| self.rows_of(worker)).sum()
    }

    /// Share of the rows that visit a worker: by any of its experts.
    pub fn rows_of(&self, worker: usize) -> f64 {
        let missed: f64 = self.visits[self.experts_of(worker)]
            .iter()
            .map(|p| 1.0 - p)
            .product();
        1.0 - missed
    }

    /// Rows of the busiest worker by the mean.
    pub fn imbalance(&self) -> f64 {
        let load = |worker| self.visits[self.experts_of(worker)].iter().sum::<f64>();
        let most = (0..self.workers()).map(load).fold(0.0, f64::max);
        most * self.workers() as f64 / self.top_k as f64
    }

    /// Draws how many of `rows` rows visit each expert in one layer: a binomial, by its limits where it is large, so that the cost is that of the experts and
    /// not of the rows.
    pub fn draw(&self, rows: f64, random: &mut impl Rng, into: &mut Vec<f64>) {
        into.clear();
        into.extend(self.visits.iter().map(|&p| binomial(rows, p, random)));
    }

    /// The means of [`draw`](Self::draw).
    pub fn mean(&self, rows: f64, into: &mut Vec<f64>) {
        into.clear();
        into.extend(self.visits.iter().map(|&p| rows * p));
    }
}

/// Probabilities in proportion to `popularity` that sum to `top_k`, none above 1: a row visits an expert once.
fn capped(popularity: &[f64], top_k: usize) -> Vec<f64> {
    let mut visits = vec![0.0; popularity.len()];
    let mut full = vec![false; popularity.len()];
    loop {
        let open = |i: &usize| !full[*i];
        let sum: f64 = (0..popularity.len())
            .filter(open)
            .map(|i| popularity[i])
            .sum();
        let left = top_k as f64 - full.iter().filter(|full| **full).count() as f64;
        for i in (0..popularity.len()).filter(open) {
            visits[i] = left * popularity[i] / sum;
        }
        let over: Vec<usize> = (0..popularity.len())
            .filter(|&i| !full[i] && visits[i] > 1.0)
            .collect();
        if over.is_empty() {
            return visits;
        }
        for i in over {
            (full[i], visits[i]) = (true, 1.0);
        }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Of `rows` rows, how many do what each does with probability `p`.
fn binomial(rows: f64, p: f64, random: &mut impl Rng) -> f64 {
    if p > 0.5 {
        return rows - binomial(rows, 1.0 - p, random);
    }
    let mean = rows * p;
    if mean > 12.0 {
        let spread = (mean * (1.0 - p)).sqrt();
        (mean + spread * normal(random)).round().clamp(0.0, rows)
    } else if p < 0.1 {
        poisson(mean, random).min(rows)
    } else {
        // At most 120 rows.
        (0..rows as u32)
            .filter(|_| random.random::<f64>() < p)
            .count() as f64
    }
}

/// Twelve uniform draws less six: the normal distribution to well below what a simulation of queues can tell, and a bound of six deviations.
fn normal(random: &mut impl Rng) -> f64 {
    let mut sum = 0.0;
    for _ in 0..3 {
        let bits = random.random::<u64>();
        for part in 0..4 {
            sum += f64::from((bits >> (16 * part)) as u16) / 65536.0;
        }
    }
    sum - 6.0
}

/// Knuth's method; the mean is small.
fn poisson(mean: f64, random: &mut impl Rng) -> f64 {
    let limit = (-mean).exp();
    let (mut product, mut count) = (random.random::<f64>(), 0.0);
    while product > limit {
        product *= random.random::<f64>();
        count += 1.0;
    }
    count
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_pcg::Pcg64;

    use super::*;

    proptest! {
        #[test]
        fn every_row_visits_top_k_experts_and_none_twice(
            popularity in prop::collection::vec(1e-3..1e3, 1..40), share in 0.0..1.0, workers in 1usize..40,
        ) {
            let top_k = 1 + (share * (popularity.len() - 1) as f64) as usize;
            let workers = workers.min(popularity.len());
            let routing = Routing::new(&popularity, workers, top_k).unwrap();
            let sum: f64 = routing.visits.iter().sum();
            prop_assert!((sum - top_k as f64).abs() < 1e-9 * sum);
            prop_assert!(routing.visits.iter().all(|p| (0.0..=1.0 + 1e-12).contains(p)));
            prop_assert!(routing.workers_visited() <= top_k as f64 + 1e-9);
            prop_assert!(routing.imbalance() >= 1.0 - 1e-9);
        }
    }

    #[test]
    fn draws_have_the_mean_and_spread_of_a_binomial() {
        let routing = Routing::new(&Routing::zipf(8, 1.0), 4, 2).unwrap();
        let random = &mut Pcg64::seed_from_u64(1);
        for rows in [4.0, 400.0] {
            let (mut sum, mut squares, mut drawn, mut mean) = (0.0, 0.0, Vec::new(), Vec::new());
            routing.mean(rows, &mut mean);
            for _ in 0..20_000 {
                routing.draw(rows, random, &mut drawn);
                sum += drawn[0];
                squares += (drawn[0] - mean[0]).powi(2);
            }
            assert!((sum / 20_000.0 / mean[0] - 1.0).abs() < 0.03);
            let expected = mean[0] * (1.0 - mean[0] / rows);
            assert!((0.9..1.1).contains(&(squares / 20_000.0 / expected)));
        }
    }

    #[test]
    fn the_worker_behind_takes_over() {
        let routing = Routing::new(&[1.0; 6], 3, 2).unwrap();
        let left = routing.without(&[2, 0]);
        assert_eq!(
            [0, 1, 2].map(|worker| left.experts_of(worker).len()),
            [0, 6, 0]
        );
        let left = routing.without(&[2]);
        assert_eq!(
            [0, 1, 2].map(|worker| left.experts_of(worker).len()),
            [4, 2, 0]
        );
        assert_eq!(routing.without(&[]), routing);
    }

    #[test]
    fn nonsense_is_refused() {
        for (popularity, workers, top_k) in [
            (&[1.0, 0.0][..], 1, 1),
            (&[1.0, f64::NAN], 1, 1),
            (&[1.0], 2, 1),
            (&[1.0], 1, 2),
            (&[], 0, 1),
        ] {
            assert!(Routing::new(popularity, workers, top_k).is_err());
        }
    }

    #[test]
    fn zipf_meets_every_expert() {
        for experts in [1, 2, 7, 8, 128, 1000] {
            let popularity = Routing::zipf(experts, 1.2);
            assert!(popularity.iter().all(|share| *share > 0.0));
        }
    }
}

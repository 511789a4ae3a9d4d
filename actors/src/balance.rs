//! Which of an expert's holders computes it: the paper's greedy min-max balance (MegaScale-Infer, section 6), from measured traffic. Pure.
//!
//! Expert `i` costs `max(rows_i, floor)`: reading the weights of a cold expert takes as long as a few rows. The busiest worker is waited for in every
//! layer, so its cost is what is made small. An expert's rows go to one worker, so that nothing has to be divided on the way; replicas are what gives a choice.

/// Rows that an expert costs at least: below about so many its weights are read for hardly less.
pub const COLD_ROWS: f64 = 1.0;

/// The holder of each expert that computes it, such that the busiest worker has little to do.
///
/// `costs[expert]` is what the expert's rows cost, `holders[expert]` are the workers that have its weights (at least one, below `workers`).
/// Greedy, the costliest first, then moves and swaps of pairs while they even two workers out. With two holders an expert that is 13 % above the optimum on
/// average (a test), for an improvement that takes a chain of moves is not looked for.
pub fn assign(costs: &[f64], holders: &[Vec<u16>], workers: u16) -> Vec<u16> {
    let mut load: Vec<f64> = vec![0.0; usize::from(workers)];
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by(|&a, &b| costs[b].total_cmp(&costs[a]).then(a.cmp(&b)));
    let mut owner = vec![0; costs.len()];
    for &expert in &order {
        let least = holders[expert].iter().copied().min_by(|&a, &b| {
            load[usize::from(a)]
                .total_cmp(&load[usize::from(b)])
                .then(a.cmp(&b))
        });
        owner[expert] = least.unwrap_or(0);
        load[usize::from(owner[expert])] += costs[expert];
    }
    // Each round evens two workers out, or ends; the bound is for costs that differ beyond a float's digits only.
    for _ in 0..8 * costs.len() {
        if !improve(costs, holders, &mut owner, &mut load) {
            break;
        }
    }
    owner
}

/// The move of one expert, or the swap of two, that evens two workers out most: the sum of squared loads falls. Also between workers that are not the
/// busiest, for that makes room for what the busiest can give away next.
fn improve(costs: &[f64], holders: &[Vec<u16>], owner: &mut [u16], load: &mut [f64]) -> bool {
    let mut best: Option<(f64, usize, u16, Option<usize>)> = None;
    for expert in 0..costs.len() {
        let from = owner[expert];
        for &to in holders[expert].iter().filter(|&&to| to != from) {
            let gap = load[usize::from(from)] - load[usize::from(to)];
            let swaps = (0..costs.len())
                .filter(|&back| owner[back] == to && holders[back].contains(&from))
                .map(Some);
            for back in std::iter::once(None).chain(swaps) {
                let moved = costs[expert] - back.map_or(0.0, |back| costs[back]);
                // By how much the sum of squares falls, halved.
                let gain = moved * (gap - moved);
                if gain > 1e-9 * gap.abs() * gap.abs()
                    && best.as_ref().is_none_or(|(most, ..)| gain > *most)
                {
                    best = Some((gain, expert, to, back));
                }
            }
        }
    }
    let Some((_, expert, to, back)) = best else {
        return false;
    };
    let from = owner[expert];
    let moved = costs[expert] - back.map_or(0.0, |back| costs[back]);
    load[usize::from(from)] -= moved;
    load[usize::from(to)] += moved;
    owner[expert] = to;
    if let Some(back) = back {
        owner[back] = from;
    }
    true
}

/// Who should hold each expert, and which share of its rows each holder takes: the paper's greedy with redundancy.
///
/// `slots` are the experts that a worker has room for. The costliest experts are divided first, each worker being filled to the mean, as long as slots
/// are left over for more than one holder. With `workers - 1` slots left over and room everywhere, every worker ends at the mean exactly.
/// `None` if there are fewer slots than experts.
pub fn spread(costs: &[f64], workers: u16, slots: usize) -> Option<Vec<Vec<(u16, f64)>>> {
    let count = usize::from(workers);
    let mut spare = (count * slots).checked_sub(costs.len())?;
    let mean = costs.iter().sum::<f64>() / count.max(1) as f64;
    let (mut load, mut free): (Vec<f64>, _) = (vec![0.0; count], vec![slots; count]);
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by(|&a, &b| costs[b].total_cmp(&costs[a]).then(a.cmp(&b)));
    let mut shares = vec![Vec::new(); costs.len()];
    for expert in order {
        let mut left = costs[expert];
        loop {
            let holders: &Vec<(u16, f64)> = &shares[expert];
            let open = (0..count)
                .filter(|&w| free[w] > 0 && holders.iter().all(|&(h, _)| usize::from(h) != w));
            // Slots of the others are kept by counting `spare`, so there is always one.
            let worker = open.min_by(|&a, &b| load[a].total_cmp(&load[b]))?;
            let others = (0..count).any(|w| {
                w != worker && free[w] > 0 && holders.iter().all(|&(h, _)| usize::from(h) != w)
            });
            let room = mean - load[worker];
            let part = if spare > 0 && others && room > 1e-9 * mean && left > room * (1.0 + 1e-9) {
                spare -= 1;
                room
            } else {
                left
            };
            free[worker] -= 1;
            load[worker] += part;
            left -= part;
            shares[expert].push((
                worker as u16,
                if costs[expert] > 0.0 {
                    part / costs[expert]
                } else {
                    1.0
                },
            ));
            if left <= 0.0 {
                break;
            }
        }
    }
    Some(shares)
}

/// What the busiest worker has to do.
pub fn peak(costs: &[f64], owner: &[u16], workers: u16) -> f64 {
    let mut load = vec![0.0; usize::from(workers)];
    for (cost, &owner) in costs.iter().zip(owner) {
        load[usize::from(owner)] += cost;
    }
    load.into_iter().fold(0.0, f64::max)
}

/// What experts cost by their measured rows: all layers together, for a worker holds the same experts in each.
pub fn costs(rows: &[u64]) -> Vec<f64> {
    let mean = rows.iter().sum::<u64>() as f64 / rows.len().max(1) as f64;
    rows.iter()
        .map(|&rows| (rows as f64).max(COLD_ROWS * mean / 16.0))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The least peak of all assignments, by branch and bound.
    fn optimum(costs: &[f64], holders: &[Vec<u16>], workers: u16) -> f64 {
        fn go(at: usize, costs: &[f64], holders: &[Vec<u16>], load: &mut Vec<f64>, best: &mut f64) {
            let peak = load.iter().copied().fold(0.0, f64::max);
            if peak >= *best {
                return;
            }
            if at == costs.len() {
                *best = peak;
                return;
            }
            for &worker in &holders[at] {
                load[usize::from(worker)] += costs[at];
                go(at + 1, costs, holders, load, best);
                load[usize::from(worker)] -= costs[at];
            }
        }
        let mut best = f64::MAX;
        go(
            0,
            costs,
            holders,
            &mut vec![0.0; usize::from(workers)],
            &mut best,
        );
        best
    }

    /// Experts at home in ranges, and on the `replicas - 1` workers behind.
    fn ring(experts: usize, workers: u16, replicas: u16) -> Vec<Vec<u16>> {
        let home = |expert: usize| (expert * usize::from(workers) / experts) as u16;
        (0..experts)
            .map(|expert| {
                (0..replicas)
                    .map(|next| (home(expert) + next) % workers)
                    .collect()
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn never_twice_the_optimum_and_only_on_holders(
            rows in prop::collection::vec(0u64..1000, 4..10), workers in 2u16..5, replicas in 1u16..4,
        ) {
            let replicas = replicas.min(workers);
            let holders = ring(rows.len(), workers, replicas);
            let costs = costs(&rows);
            let owner = assign(&costs, &holders, workers);
            for (owner, holders) in owner.iter().zip(&holders) {
                prop_assert!(holders.contains(owner));
            }
            let (found, best) = (peak(&costs, &owner, workers), optimum(&costs, &holders, workers));
            // A lower bound of any assignment, also of one that may divide experts.
            let bound = costs.iter().sum::<f64>() / f64::from(workers);
            prop_assert!(best >= bound - 1e-6 && found >= best - 1e-6);
            prop_assert!(found <= 2.0 * best + 1e-6, "{found} {best}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// The bound of the linear program is the mean, for shares may be divided at will.
        #[test]
        fn redundancy_reaches_the_bound_of_the_linear_program(
            rows in prop::collection::vec(1u64..1000, 2..24), workers in 1u16..6, extra in 0usize..8,
        ) {
            let costs = costs(&rows);
            let slots = rows.len().div_ceil(workers.into()) + extra;
            let shares = spread(&costs, workers, slots).unwrap();
            let (mut load, mut held) = (vec![0.0; workers.into()], vec![0; usize::from(workers)]);
            for (cost, shares) in costs.iter().zip(&shares) {
                let sum: f64 = shares.iter().map(|(_, share)| share).sum();
                prop_assert!((sum - 1.0).abs() < 1e-9);
                for &(worker, share) in shares {
                    load[usize::from(worker)] += share * cost;
                    held[usize::from(worker)] += 1;
                }
            }
            prop_assert!(held.iter().all(|held| *held <= slots));
            let bound = costs.iter().sum::<f64>() / f64::from(workers);
            let peak = load.iter().copied().fold(0.0, f64::max);
            prop_assert!(peak >= bound * (1.0 - 1e-9));
            if slots >= rows.len() {
                prop_assert!(peak <= bound * (1.0 + 1e-6), "{peak} {bound}");
            }
        }
    }

    #[test]
    fn on_the_whole_near_the_optimum() {
        let (mut found, mut best) = (0.0, 0.0);
        for seed in 0..200u64 {
            let rows: Vec<u64> = (0..8).map(|e| (seed * 7919 + e * 104_729) % 997).collect();
            let (costs, holders) = (costs(&rows), ring(8, 4, 2));
            found += peak(&costs, &assign(&costs, &holders, 4), 4);
            best += optimum(&costs, &holders, 4);
        }
        assert!(found <= 1.15 * best, "{}", found / best);
    }

    #[test]
    fn a_hot_expert_leaves_its_neighbours_behind() {
        // Experts 0 and 1 at home on worker 0; 0 is as hot as all others together.
        let costs = costs(&[600, 200, 200, 200]);
        let owner = assign(&costs, &ring(4, 2, 2), 2);
        assert_eq!(peak(&costs, &owner, 2), 600.0);
        assert_eq!(owner.iter().filter(|&&o| o == owner[0]).count(), 1);
    }
}

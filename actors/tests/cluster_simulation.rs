//! Thousands of clusters in virtual time, with everything that can go wrong: no stream may be lost, and every token must be that of an undisturbed run.
//!
//! Each seed is a history of its own. One that fails is printed with the command that plays it again:
//!
//! ```sh
//! VOLLEY_SEED=1234 cargo test -p volley-actors --test cluster_simulation
//! ```
//!
//! `VOLLEY_SEEDS=100000..200000` plays others than CI does.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use volley_actors::simulation::{Outcome, scenario};

/// Seeds that CI plays.
const SEEDS: std::ops::Range<u64> = 0..2000;

fn play(seed: u64) -> Result<Outcome, String> {
    let scenario = scenario(seed);
    let mut simulation = scenario.simulation()?;
    let outcome = simulation.run(scenario.arrivals.clone(), scenario.faults.clone());
    outcome.map_err(|violation| violation.to_string())
}

fn seeds() -> std::ops::Range<u64> {
    let number = |text: &str| text.trim().parse::<u64>().expect("a seed is a number");
    if let Ok(seed) = std::env::var("VOLLEY_SEED") {
        return number(&seed)..number(&seed) + 1;
    }
    match std::env::var("VOLLEY_SEEDS") {
        Ok(range) => {
            let (from, to) = range.split_once("..").expect("VOLLEY_SEEDS=FROM..TO");
            number(from)..number(to)
        }
        Err(_) => SEEDS,
    }
}

#[test]
fn no_stream_is_lost_and_every_token_is_right_whatever_fails() {
    let seeds = seeds();
    let next = AtomicU64::new(seeds.start);
    let failed = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let played = std::panic::catch_unwind(|| play(seed));
                    let report = match played {
                        Ok(Ok(_)) => continue,
                        Ok(Err(report)) => report,
                        Err(_) => "it panicked; see above".to_owned(),
                    };
                    failed.lock().unwrap().push((seed, report));
                }
            });
        }
    });
    let mut failed = failed.into_inner().unwrap();
    failed.sort();
    if let Some((seed, report)) = failed.first() {
        let all: Vec<u64> = failed.iter().map(|(seed, _)| *seed).collect();
        panic!(
            "{} of {} seeds failed: {all:?}\n\nseed {seed} {report}\n\nplay it again: VOLLEY_SEED={seed} cargo test -p volley-actors --test cluster_simulation\n",
            all.len(),
            seeds.end - seeds.start
        );
    }
}

#[test]
fn a_seed_is_one_history() {
    for seed in 0..20 {
        let (a, b) = (play(seed).unwrap(), play(seed).unwrap());
        assert_eq!(a.streams, b.streams);
        assert_eq!((a.events, a.ended, a.epochs), (b.events, b.ended, b.epochs));
    }
}

//! Thousands of clusters in virtual time, with everything that can go wrong: no stream may be lost, and every token must be that of an undisturbed run.
//!
//! Each seed is a history of its own. One that fails is printed with the command that plays it again:
//!
//! ```sh
//! VOLLEY_SEED=1234 cargo test -p volley-actors --test cluster_simulation
//! ```
//!
//! `VOLLEY_SEEDS=100000..200000` plays others than CI does. `docs/simulation.md` says what a seed draws and what is checked.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use volley_actors::simulation::{Outcome, scenario};

/// Seeds that CI plays.
const SEEDS: std::ops::Range<u64> = 0..5000;
/// Others that have found something.
const FOUND: [u64; 7] = [8137, 12632, 12815, 14817, 17564, 17768, 18377];

fn play(seed: u64) -> Result<Outcome, String> {
    let scenario = scenario(seed);
    let mut simulation = scenario.simulation()?;
    let outcome = simulation.run(scenario.arrivals.clone(), scenario.faults.clone());
    outcome.map_err(|violation| violation.to_string())
}

fn seeds() -> Vec<u64> {
    let number = |text: &str| text.trim().parse::<u64>().expect("a seed is a number");
    if let Ok(seed) = std::env::var("VOLLEY_SEED") {
        return vec![number(&seed)];
    }
    match std::env::var("VOLLEY_SEEDS") {
        Ok(range) => {
            let (from, to) = range.split_once("..").expect("VOLLEY_SEEDS=FROM..TO");
            (number(from)..number(to)).collect()
        }
        Err(_) => SEEDS.chain(FOUND).collect(),
    }
}

#[test]
fn no_stream_is_lost_and_every_token_is_right_whatever_fails() {
    let seeds = seeds();
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(&seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let report = match std::panic::catch_unwind(|| play(seed)) {
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
            seeds.len()
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

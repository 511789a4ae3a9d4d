//! What the machine can do: the floors that kernels are held against.
//!
//! `cargo bench -p volley-models --bench floor [-- --json]`. Reads a gigabyte in huge pages, and multiplies in registers, with one thread and with one for
//! each core; prints the best of several rounds, for a shared machine is never faster than itself. Volley's own kernels play no part in it.

use std::hint::black_box;
use std::time::{Duration, Instant};

use volley_models::Member;
use volley_models::kernels::Arena;

#[path = "support/peaks.rs"]
mod peaks;

use peaks::{OPERATIONS, peaks, read};

const WORDS: usize = 1 << 28;
const ROUNDS: usize = 12;

fn main() {
    let json = std::env::args().any(|arg| arg == "--json");
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut crew = Member::alone();
    let mut arena = Arena::new(4 * WORDS, &mut crew);
    let mut words = arena.block(WORDS);
    words.iter_mut().zip(0..).for_each(|(word, i)| *word = i);
    if !json {
        println!(" threads    reads GB/s  products and sums, G/s");
    }
    for threads in [1, cores] {
        let chunk = WORDS / threads;
        let time = best(|| {
            on_threads(threads, |thread| {
                let part = &words[thread * chunk..][..chunk];
                black_box(read(part));
            })
        });
        let reads = 4.0 * WORDS as f64 / time.as_secs_f64() / 1e9;
        let rates: Vec<(&str, f64)> = peaks()
            .into_iter()
            .map(|(name, operations)| {
                let time = best(|| on_threads(threads, |_| _ = black_box(operations())));
                let done = (threads as u64 * OPERATIONS) as f64;
                (name, done / time.as_secs_f64() / 1e9)
            })
            .collect();
        if json {
            let rates: Vec<String> = rates
                .iter()
                .map(|(name, rate)| format!("\"{name}\": {rate:.1}"))
                .collect();
            println!(
                "{{\"threads\": {threads}, \"reads_gb_per_s\": {reads:.2}, \"gops_per_s\": {{{}}}}}",
                rates.join(", ")
            );
        } else {
            print!("{threads:>8}  {reads:>12.1}");
            rates
                .iter()
                .for_each(|(name, rate)| print!("  {name} {rate:.0}"));
            println!();
        }
    }
}

fn best(mut run: impl FnMut()) -> Duration {
    let times = (0..ROUNDS).map(|_| {
        let begin = Instant::now();
        run();
        begin.elapsed()
    });
    times.min().unwrap_or_default()
}

fn on_threads(threads: usize, work: impl Fn(usize) + Sync) {
    std::thread::scope(|scope| {
        for thread in 1..threads {
            let work = &work;
            scope.spawn(move || work(thread));
        }
        work(0);
    });
}

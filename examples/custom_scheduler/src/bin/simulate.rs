//! `volley simulate` with [`custom_scheduler::ShortestFirst`] in place of the shipped scheduler: what it would do on hardware that nobody has rented yet.
//!
//! ```sh
//! cargo run --release -p custom_scheduler --bin simulate -- \
//!     --model dbrx --attention A800:8 --attention-workers 4 --experts A800 --rate 20 --duration 60
//! ```

use std::process::ExitCode;

use custom_scheduler::ShortestFirst;

fn main() -> ExitCode {
    volley::simulate_with(|| Box::new(ShortestFirst::default()))
}

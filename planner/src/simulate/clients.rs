//! What clients see: when their tokens come.

use std::collections::HashMap;

use volley_actors::RequestEvent;
use volley_actors::protocol::SequenceId;

use super::histogram::Histogram;

/// Requests that are not answered yet, and the times of those that are.
pub(super) struct Clients {
    live: HashMap<SequenceId, Served>,
    pub(super) ttft: Histogram,
    pub(super) tpot: Histogram,
    pub(super) latency: Histogram,
    pub(super) completed: u64,
}

/// What one client saw.
struct Served {
    arrived_s: f64,
    first_s: Option<f64>,
    latest_s: f64,
    tokens: u32,
}

impl Clients {
    pub(super) fn new() -> Self {
        Clients {
            live: HashMap::new(),
            ttft: Histogram::new(),
            tpot: Histogram::new(),
            latency: Histogram::new(),
            completed: 0,
        }
    }

    /// How many wait for an answer.
    pub(super) fn waiting(&self) -> usize {
        self.live.len()
    }

    pub(super) fn ask(&mut self, sequence: SequenceId, now_s: f64) {
        let served = Served {
            arrived_s: now_s,
            first_s: None,
            latest_s: now_s,
            tokens: 0,
        };
        self.live.insert(sequence, served);
    }

    pub(super) fn hear(&mut self, sequence: SequenceId, event: &RequestEvent, now_s: f64) {
        let Some(served) = self.live.get_mut(&sequence) else {
            return;
        };
        match event {
            RequestEvent::Token { .. } => {
                served.first_s.get_or_insert(now_s);
                served.latest_s = now_s;
                served.tokens += 1;
            }
            RequestEvent::Finished(_) => {
                let first_s = served.first_s.unwrap_or(now_s);
                self.ttft.add(first_s - served.arrived_s);
                self.latency.add(now_s - served.arrived_s);
                if served.tokens > 1 {
                    let each = (served.latest_s - first_s) / f64::from(served.tokens - 1);
                    self.tpot.add(each);
                }
                self.completed += 1;
                self.live.remove(&sequence);
            }
            RequestEvent::Prompt(_) => {}
        }
    }
}

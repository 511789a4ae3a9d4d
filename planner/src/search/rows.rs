//! The largest batch that memory and the step time allow.

use crate::deployment::{Binding, Evaluator, MemoryUse};

/// Most rows of an attention worker in a micro-batch.
const ROWS_MAX: usize = 1 << 14;

/// The largest b_a that memory and the step time allow, what bounds it, and the step time. `None` if one row is too many.
pub(super) fn largest_rows(
    evaluator: &Evaluator<'_>,
    n_a: usize,
    held: usize,
    m: usize,
    slo_s: f64,
) -> Option<(usize, Binding, f64)> {
    let fits = |rows: usize| evaluator.fits(n_a, held, m, rows as f64);
    fits(1).ok()?;
    // Memory is linear in the rows, and the step time does not fall with them.
    let room = |at: &dyn Fn(f64) -> MemoryUse| {
        let (none, one) = (at(0.0), at(1.0));
        ((none.usable - none.total()) / (one.total() - none.total())).floor()
    };
    let attention = room(&|rows| evaluator.attention_memory(held, m, rows));
    let experts = room(&|rows| evaluator.expert_memory(n_a, held, m, rows));
    let within = (attention.min(experts) as usize).clamp(1, ROWS_MAX);
    let step = |rows: usize| {
        let stages = evaluator.stages(n_a, held, rows as f64);
        evaluator.step_s(&stages, m, rows as f64)
    };
    let at_memory = step(within);
    if at_memory <= slo_s {
        let binding = fits(within + 1).err().unwrap_or(Binding::AttentionMemory);
        return Some((within, binding, at_memory));
    }
    let at_one = step(1);
    if at_one > slo_s {
        return None;
    }
    // Nearly a line, so a guess by proportion is close; every third is the middle, should it bend.
    let (mut low, mut high) = ((1, at_one), (within, at_memory));
    for round in 1.. {
        let width = high.0 - low.0;
        if width <= 1 {
            break;
        }
        let share = if round % 3 == 0 {
            0.5
        } else {
            (slo_s - low.1) / (high.1 - low.1)
        };
        let guess = (low.0 + (width as f64 * share) as usize).clamp(low.0 + 1, high.0 - 1);
        let found = (guess, step(guess));
        if found.1 <= slo_s {
            low = found;
            // Most often the next one is too many already.
            let next = (guess + 1, step(guess + 1));
            if next.1 > slo_s {
                break;
            }
            low = next;
        } else {
            high = found;
        }
    }
    Some((low.0, Binding::StepTime, low.1))
}

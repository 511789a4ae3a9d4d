//! How long a decode step takes once the stages of one layer are known: the ping-pong pipeline.
//!
//! m micro-batches go in order through four stages of each layer: attention, dispatch, expert, combine. A stage does
//! one micro-batch at a time, and a micro-batch enters the next layer when its combine has ended.

use serde::Serialize;

/// Time of each stage of one MoE layer for one micro-batch, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Stages {
    /// T_a.
    pub attention_s: f64,
    /// T_c on the way to the experts.
    pub dispatch_s: f64,
    /// T_e.
    pub expert_s: f64,
    /// T_c on the way back.
    pub combine_s: f64,
}

impl Stages {
    /// C: one micro-batch alone through one layer.
    pub fn round_s(&self) -> f64 {
        self.attention_s + self.dispatch_s + self.expert_s + self.combine_s
    }

    /// T_f = max(T_a, T_e).
    pub fn compute_s(&self) -> f64 {
        self.attention_s.max(self.expert_s)
    }

    /// T_c: the slower hop.
    pub fn hop_s(&self) -> f64 {
        self.dispatch_s.max(self.combine_s)
    }

    /// T_x = max(T_a, T_e, T_c): the stage that everything waits for.
    pub fn slowest_s(&self) -> f64 {
        self.compute_s().max(self.hop_s())
    }

    /// T_total, exactly: a layer takes what the slowest stage takes for all micro-batches, or one round, whichever is
    /// longer. The last layer ends one round and m - 1 micro-batches after it began. Holds for any m, L and network.
    pub fn total_s(&self, micro_batches: usize, layers: usize) -> f64 {
        if layers == 0 || micro_batches == 0 {
            return 0.0;
        }
        let (m, round, slowest) = (micro_batches as f64, self.round_s(), self.slowest_s());
        (layers - 1) as f64 * (m * slowest).max(round) + round + (m - 1.0) * slowest
    }

    /// T_total where both sides compute on the same cores: a core that waits for one micro-batch's hop computes another's
    /// attention or experts, so both sides' work adds up.
    pub fn shared_total_s(&self, micro_batches: usize, layers: usize) -> f64 {
        if layers == 0 || micro_batches == 0 {
            return 0.0;
        }
        let (m, round, work) = (
            micro_batches as f64,
            self.round_s(),
            self.attention_s + self.expert_s,
        );
        (layers - 1) as f64 * (m * work).max(round) + round + (m - 1.0) * work
    }

    /// T_total as the paper prints it (MegaScale-Infer, eq. 5). True only where [`overlaps`](Self::overlaps).
    pub fn printed_total_s(&self, micro_batches: usize, layers: usize) -> f64 {
        self.round_s() + self.compute_s() * ((micro_batches * layers) as f64 - 1.0)
    }

    /// Whether eqs. 2 and 3 hold: a hop fits inside a compute step, and there are micro-batches enough to hide it.
    pub fn overlaps(&self, micro_batches: usize) -> bool {
        let compute = self.compute_s();
        self.hop_s() <= compute && micro_batches as f64 * compute >= 2.0 * (compute + self.hop_s())
    }
}

/// T_total by playing every event of the pipeline in virtual time: what [`Stages::total_s`] is held against.
///
/// Events are taken in order of time, whatever they depend on, so nothing of the formula is assumed here but the rules
/// at the top of this file.
pub fn simulate(stages: &Stages, micro_batches: usize, layers: usize) -> f64 {
    let durations = [
        stages.attention_s,
        stages.dispatch_s,
        stages.expert_s,
        stages.combine_s,
    ];
    // Of each micro-batch, the tasks it has ended: task t is stage t % 4 of layer t / 4.
    let mut ended = vec![0; micro_batches];
    let mut ready_s = vec![0.0; micro_batches];
    // Of each stage, the task it does next in its fixed order (layer by layer, micro-batch by micro-batch).
    let mut turn = [0; 4];
    let mut free_s = [0.0; 4];
    let mut now_s: f64 = 0.0;
    loop {
        // The stage that can begin its next task first.
        let first = (0..4)
            .filter(|&stage| turn[stage] < micro_batches * layers)
            .filter_map(|stage| {
                let (layer, micro_batch) =
                    (turn[stage] / micro_batches, turn[stage] % micro_batches);
                let is_next = ended[micro_batch] == 4 * layer + stage;
                is_next.then(|| {
                    (
                        f64::max(free_s[stage], ready_s[micro_batch]),
                        stage,
                        micro_batch,
                    )
                })
            })
            .min_by(|a, b| a.0.total_cmp(&b.0));
        let Some((begin_s, stage, micro_batch)) = first else {
            return now_s;
        };
        let end_s = begin_s + durations[stage];
        free_s[stage] = end_s;
        ready_s[micro_batch] = end_s;
        ended[micro_batch] += 1;
        turn[stage] += 1;
        now_s = now_s.max(end_s);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn relative(a: f64, b: f64) -> f64 {
        (a - b).abs() / a.abs().max(b.abs()).max(f64::MIN_POSITIVE)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Any four stages, also such that break eqs. 1 to 3: hops longer than compute, one side idle, m = 1.
        #[test]
        fn the_exact_formula_is_the_simulation(
            attention_s in 0.0..1.0, expert_s in 0.0..1.0, dispatch_s in 0.0..2.0, combine_s in 0.0..2.0,
            micro_batches in 1usize..9, layers in 1usize..40,
        ) {
            let stages = Stages { attention_s, dispatch_s, expert_s, combine_s };
            let (formula, played) = (stages.total_s(micro_batches, layers), simulate(&stages, micro_batches, layers));
            prop_assert!(relative(formula, played) < 1e-9, "{formula} {played}");
        }

        /// Where its conditions hold the printed formula is the exact one.
        #[test]
        fn the_printed_formula_holds_under_its_conditions(
            attention_s in 0.1..1.0, expert_s in 0.1..1.0, share in 0.0..1.0, extra in 0usize..5, layers in 1usize..40,
        ) {
            let hop = share * f64::max(attention_s, expert_s);
            let stages = Stages { attention_s, dispatch_s: hop, expert_s, combine_s: hop };
            let micro_batches = f64::ceil(2.0 * (1.0 + share)) as usize + extra;
            prop_assume!(stages.overlaps(micro_batches));
            let (exact, printed) = (stages.total_s(micro_batches, layers), stages.printed_total_s(micro_batches, layers));
            prop_assert!(relative(exact, printed) < 1e-9, "{exact} {printed}");
        }
    }

    #[test]
    fn the_printed_formula_is_too_low_where_too_few_micro_batches_fly() {
        let stages = Stages {
            attention_s: 1.0,
            dispatch_s: 0.5,
            expert_s: 1.0,
            combine_s: 0.5,
        };
        assert!(!stages.overlaps(2));
        assert_eq!(stages.printed_total_s(2, 10), 22.0);
        assert_eq!(stages.total_s(2, 10), 31.0);
    }
}

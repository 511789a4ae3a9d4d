//! A timeline read back: for each step of each micro-batch, how long both sides computed, and what the ball waited for.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use volley_actors::{Activity, Span};
use volley_transports::{Layer, Role, WorkerId};

/// One step of one micro-batch. Sums over its layers; of several workers of a side, the slowest in each layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rally {
    /// The step.
    pub step: u64,
    /// The micro-batch.
    pub micro_batch: u8,
    /// Rows of its largest span on the attention side, summed over attention workers.
    pub rows: u32,
    /// Attention side's computing, head and sampling included (T_a).
    pub attention: Duration,
    /// Experts' computing (T_e).
    pub expert: Duration,
    /// Gaps in which the worker that was to go on was idle: frames on their way (T_c, both hops).
    pub network: Duration,
    /// Gaps in which the worker that was to go on computed another micro-batch.
    pub waiting: Duration,
    /// What is left: workers of a side were at the same layer at different times, and the last one counts.
    pub skew: Duration,
    /// How much of `attention` was beyond the mean of the workers of that side, whom the slowest kept waiting.
    pub attention_excess: Duration,
    /// The same of `expert`.
    pub expert_excess: Duration,
    /// The worker with most of that excess.
    pub straggler: Option<WorkerId>,
    /// When its first span started.
    pub start: Duration,
    /// From then to the last span's end.
    pub total: Duration,
}

/// What took the most of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bound {
    /// The attention side, evenly loaded.
    Attention,
    /// The experts, evenly loaded.
    Experts,
    /// Frames on their way.
    Network,
    /// Other micro-batches: the workers were busy.
    Waiting,
    /// Workers of a side that were not in step.
    Skew,
    /// A worker slower than its side's mean.
    Straggler,
}

impl Bound {
    /// In one word.
    pub fn name(self) -> &'static str {
        match self {
            Bound::Attention => "attention",
            Bound::Experts => "experts",
            Bound::Network => "network",
            Bound::Waiting => "waiting",
            Bound::Skew => "skew",
            Bound::Straggler => "straggler",
        }
    }
}

impl Rally {
    /// What the step took the longest with.
    pub fn bound(&self) -> Bound {
        let parts = [
            (
                self.attention.saturating_sub(self.attention_excess),
                Bound::Attention,
            ),
            (
                self.expert.saturating_sub(self.expert_excess),
                Bound::Experts,
            ),
            (self.network, Bound::Network),
            (self.waiting, Bound::Waiting),
            (self.skew, Bound::Skew),
            (self.straggling(), Bound::Straggler),
        ];
        // Of equals the first: computing before what waits for it.
        let longest = parts.into_iter().rev().max_by_key(|(time, _)| *time);
        longest.map_or(Bound::Attention, |(_, bound)| bound)
    }

    /// How long the slowest workers took beyond the mean of their sides.
    pub fn straggling(&self) -> Duration {
        self.attention_excess + self.expert_excess
    }
}

/// Every whole step of a timeline, in order of steps and micro-batches.
///
/// A step that lacks its beginning (rings drop their oldest spans) or the experts of a layer (a worker hands its latest over when it rests) is left out.
pub fn steps(timeline: &[(WorkerId, Vec<Span>)]) -> Vec<Rally> {
    let mut spans: BTreeMap<(u64, u8), Vec<(WorkerId, Span)>> = BTreeMap::new();
    for (worker, list) in timeline {
        for span in list {
            spans
                .entry((span.step.0, span.micro_batch.0))
                .or_default()
                .push((*worker, *span));
        }
    }
    // Dense layers have no span of their own: they belong to the next stage on the attention side.
    let layers = |spans: &[(WorkerId, Span)], activity| -> BTreeSet<Layer> {
        let of = spans.iter().filter(|(_, span)| span.activity == activity);
        of.map(|(_, span)| span.layer).collect()
    };
    let all: Vec<(WorkerId, Span)> = spans.values().flatten().copied().collect();
    let sides = [Activity::Attention, Activity::Experts].map(|side| (side, layers(&all, side)));
    spans
        .into_iter()
        .filter(|(_, spans)| {
            !layers(spans, Activity::Sample).is_empty()
                && sides.iter().all(|(side, all)| layers(spans, *side) == *all)
        })
        .map(|((step, micro_batch), spans)| rally(step, micro_batch, &spans, timeline))
        .collect()
}

fn rally(
    step: u64,
    micro_batch: u8,
    spans: &[(WorkerId, Span)],
    timeline: &[(WorkerId, Vec<Span>)],
) -> Rally {
    // A stage is what one side does between two flights of the ball: ordered by time, workers of a side side by side.
    let mut stages: Vec<Stage> = Vec::new();
    let mut ordered = spans.to_vec();
    ordered.sort_by_key(|(_, span)| (span.layer, side_order(span.activity), span.start));
    for (worker, span) in ordered {
        let key = (span.layer.0, side_order(span.activity));
        match stages.last_mut() {
            Some(stage) if stage.key == key => stage.spans.push((worker, span)),
            _ => stages.push(Stage {
                key,
                spans: vec![(worker, span)],
            }),
        }
    }
    let (mut attention, mut expert) = (Duration::ZERO, Duration::ZERO);
    let (mut network, mut waiting) = (Duration::ZERO, Duration::ZERO);
    let (mut attention_excess, mut expert_excess) = (Duration::ZERO, Duration::ZERO);
    let mut excess_of: BTreeMap<WorkerId, Duration> = BTreeMap::new();
    let mut rows = 0;
    for stage in &stages {
        let times = stage.spans.iter();
        let times = times.map(|(worker, span)| (span.end.saturating_sub(span.start), *worker));
        let sum: Duration = times.clone().map(|(time, _)| time).sum();
        let Some((slowest, worker)) = times.max() else {
            continue;
        };
        let excess = slowest.saturating_sub(sum / stage.spans.len() as u32);
        *excess_of.entry(worker).or_default() += excess;
        match worker.role {
            Role::Attention => (attention += slowest, attention_excess += excess),
            Role::Expert => (expert += slowest, expert_excess += excess),
        };
        if stage.key.1 == side_order(Activity::Attention) {
            rows = rows.max(stage.spans.iter().map(|(_, span)| span.rows).sum());
        }
    }
    for pair in stages.windows(2) {
        // The way of the last ball: from the last end before to the last start after.
        let left = pair[0]
            .spans
            .iter()
            .map(|(_, span)| span.end)
            .max()
            .unwrap_or_default();
        let Some((worker, next)) = pair[1].spans.iter().max_by_key(|(_, span)| span.start) else {
            continue;
        };
        // A span ends when its worker has noted the time, which may be after the ball was caught on the other side (the woken
        // thread may even take the waker's core). What overlaps is on nobody's way and counts once.
        let overlap = left.saturating_sub(next.start);
        match pair[0].spans[0].0.role {
            Role::Attention => attention = attention.saturating_sub(overlap),
            Role::Expert => expert = expert.saturating_sub(overlap),
        }
        let gap = next.start.saturating_sub(left);
        let busy = busy(timeline, *worker, left, next.start);
        waiting += busy;
        network += gap.saturating_sub(busy);
    }
    let start = spans
        .iter()
        .map(|(_, span)| span.start)
        .min()
        .unwrap_or_default();
    let end = spans
        .iter()
        .map(|(_, span)| span.end)
        .max()
        .unwrap_or_default();
    let total = end.saturating_sub(start);
    Rally {
        step,
        micro_batch,
        rows,
        attention,
        expert,
        network,
        waiting,
        skew: total.saturating_sub(attention + expert + network + waiting),
        attention_excess: attention_excess.min(attention),
        expert_excess: expert_excess.min(expert),
        straggler: excess_of
            .into_iter()
            .filter(|(_, excess)| !excess.is_zero())
            .max_by_key(|(_, excess)| *excess)
            .map(|(worker, _)| worker),
        start,
        total,
    }
}

/// What one side does for one layer.
struct Stage {
    key: (u16, u8),
    spans: Vec<(WorkerId, Span)>,
}

/// Within a layer: attention, then experts, then, after the last layer, sampling.
fn side_order(activity: Activity) -> u8 {
    match activity {
        Activity::Attention => 0,
        Activity::Experts => 1,
        Activity::Sample => 2,
    }
}

/// How long `worker` computed anything between two times.
fn busy(
    timeline: &[(WorkerId, Vec<Span>)],
    worker: WorkerId,
    from: Duration,
    until: Duration,
) -> Duration {
    let Some((_, spans)) = timeline.iter().find(|(id, _)| *id == worker) else {
        return Duration::ZERO;
    };
    // Spans of a worker do not overlap and come in order of time.
    let first = spans.partition_point(|span| span.end <= from);
    let within = spans[first..].iter().take_while(|span| span.start < until);
    within
        .map(|span| span.end.min(until).saturating_sub(span.start.max(from)))
        .sum()
}

#[cfg(test)]
mod tests {
    use volley_transports::{MicroBatch, Step};

    use super::*;

    fn span(activity: Activity, micro_batch: u8, layer: u16, start: u64, end: u64) -> Span {
        Span {
            activity,
            micro_batch: MicroBatch(micro_batch),
            step: Step(7),
            layer: Layer(layer),
            rows: 4,
            start: Duration::from_micros(start),
            end: Duration::from_micros(end),
        }
    }

    fn us(n: u64) -> Duration {
        Duration::from_micros(n)
    }

    #[test]
    fn a_rally_of_two_micro_batches_is_taken_apart() {
        use Activity::{Attention, Experts, Sample};
        let attention = vec![
            span(Attention, 0, 0, 0, 10),
            span(Attention, 1, 0, 10, 20),
            span(Sample, 0, 0, 25, 27),
            span(Sample, 1, 0, 40, 42),
        ];
        // Micro-batch 1 leaves at 20 and finds the experts busy until 24.
        let experts = vec![span(Experts, 0, 0, 12, 24), span(Experts, 1, 0, 25, 37)];
        let timeline = [
            (Role::Attention.worker(0), attention),
            (Role::Expert.worker(0), experts),
        ];
        let steps = steps(&timeline);
        assert_eq!(steps.len(), 2);
        let expected = Rally {
            step: 7,
            micro_batch: 0,
            rows: 4,
            attention: us(12),
            expert: us(12),
            network: us(3),
            waiting: us(0),
            skew: us(0),
            attention_excess: us(0),
            expert_excess: us(0),
            straggler: None,
            start: us(0),
            total: us(27),
        };
        assert_eq!(steps[0], expected);
        let second = steps[1];
        assert_eq!((second.waiting, second.network), (us(4), us(1 + 3)));
        // Nothing is lost or counted twice.
        for step in steps {
            assert_eq!(
                step.attention + step.expert + step.network + step.waiting,
                step.total
            );
        }
    }

    #[test]
    fn a_span_that_ends_after_the_ball_was_caught_counts_until_then() {
        use Activity::{Attention, Experts, Sample};
        let attention = vec![span(Attention, 0, 0, 0, 15), span(Sample, 0, 1, 30, 32)];
        let experts = vec![span(Experts, 0, 0, 11, 30)];
        let timeline = [
            (Role::Attention.worker(0), attention),
            (Role::Expert.worker(0), experts),
        ];
        let step = steps(&timeline)[0];
        assert_eq!((step.attention, step.expert), (us(11 + 2), us(19)));
        assert_eq!(step.attention + step.expert, step.total);
    }

    #[test]
    fn of_several_workers_the_slowest_counts_and_rows_add_up() {
        use Activity::{Attention, Experts, Sample};
        let timeline = [
            (
                Role::Attention.worker(0),
                vec![span(Attention, 0, 0, 0, 10), span(Sample, 0, 0, 40, 41)],
            ),
            (
                Role::Attention.worker(1),
                vec![span(Attention, 0, 0, 0, 12), span(Sample, 0, 0, 40, 42)],
            ),
            (Role::Expert.worker(0), vec![span(Experts, 0, 0, 14, 20)]),
            (Role::Expert.worker(1), vec![span(Experts, 0, 0, 14, 30)]),
        ];
        let step = steps(&timeline)[0];
        assert_eq!(
            (step.attention, step.expert, step.rows),
            (us(12 + 2), us(16), 8)
        );
        assert_eq!((step.network, step.total), (us(2 + 10), us(42)));
        // 2 of 12 microseconds of attention (one by each stage), 5 of the experts' 16.
        assert_eq!(step.straggling(), us(1) + Duration::from_nanos(500) + us(5));
        assert_eq!(step.straggler, Some(Role::Expert.worker(1)));
        assert_eq!(step.bound(), Bound::Attention);
    }

    #[test]
    fn a_step_whose_beginning_was_dropped_is_left_out() {
        use Activity::{Attention, Experts, Sample};
        let attention = vec![
            span(Sample, 0, 1, 30, 31),
            span(Attention, 1, 0, 40, 50),
            span(Sample, 1, 1, 70, 71),
        ];
        let experts = vec![span(Experts, 0, 0, 10, 20), span(Experts, 1, 0, 55, 60)];
        let timeline = [
            (Role::Attention.worker(0), attention),
            (Role::Expert.worker(0), experts),
        ];
        let whole: Vec<_> = steps(&timeline)
            .iter()
            .map(|step| step.micro_batch)
            .collect();
        assert_eq!(whole, [1]);
    }
}

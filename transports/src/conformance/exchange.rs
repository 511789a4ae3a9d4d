//! The whole exchange over a fabric, scatter to gather, against a computation without one: equal to the bit.

use std::time::Instant;

use super::{FabricFactory, HANG, arrival, mix, next};
use crate::{
    Arrival, Element, Endpoint, Epoch, Event, ExchangeShape, Gather, Layer, Merge, MicroBatch,
    Participants, Placement, Progress, Role, Rows, RowsMut, Scatter, Step, StepKey, Times,
};

const SHAPE: ExchangeShape = ExchangeShape {
    attention_workers: 1,
    expert_workers: 1,
    max_rows: 5,
    hidden: 24,
    top_k: 2,
    element: Element::F32,
};

/// One attention worker, one expert worker, one micro-batch.
pub fn exchange_equals_a_direct_computation_one_to_one(factory: &dyn FabricFactory) {
    let placement = Placement::even(Epoch(1), 4, 1).expect("a placement");
    Game {
        shape: SHAPE,
        micro_batches: 1,
        layers: 3,
        steps: 6,
        placement,
    }
    .play(factory);
}

/// Numbers that divide nothing: 3 attention workers, 2 expert workers, 7 experts, 3 micro-batches.
pub fn exchange_equals_a_direct_computation_many_to_many(factory: &dyn FabricFactory) {
    let shape = ExchangeShape {
        attention_workers: 3,
        expert_workers: 2,
        hidden: 17,
        top_k: 3,
        ..SHAPE
    };
    let placement = Placement::even(Epoch(2), 7, 2).expect("a placement");
    Game {
        shape,
        micro_batches: 3,
        layers: 4,
        steps: 12,
        placement,
    }
    .play(factory);
}

/// Rows travel as bf16: rounded on the way, the same everywhere.
pub fn exchange_equals_a_direct_computation_bf16(factory: &dyn FabricFactory) {
    let shape = ExchangeShape {
        attention_workers: 2,
        expert_workers: 3,
        hidden: 9,
        element: Element::Bf16,
        ..SHAPE
    };
    let placement = Placement::even(Epoch(3), 8, 3).expect("a placement");
    Game {
        shape,
        micro_batches: 2,
        layers: 3,
        steps: 8,
        placement,
    }
    .play(factory);
}

/// Expert workers without experts get no frames and hold nobody up.
pub fn exchange_with_more_workers_than_experts(factory: &dyn FabricFactory) {
    let shape = ExchangeShape {
        attention_workers: 2,
        expert_workers: 5,
        ..SHAPE
    };
    let placement = Placement::even(Epoch(4), 3, 5).expect("a placement");
    Game {
        shape,
        micro_batches: 2,
        layers: 2,
        steps: 6,
        placement,
    }
    .play(factory);
}

/// Each layer has a map of its own, and some experts stand on two workers.
pub fn exchange_with_replicas_and_a_placement_per_layer(factory: &dyn FabricFactory) {
    let shape = ExchangeShape {
        attention_workers: 2,
        expert_workers: 3,
        ..SHAPE
    };
    let owners = |layer: u64, expert: u64| {
        let first = mix(layer << 8 | expert) % 3;
        let second = (first + 1 + expert % 2) % 3;
        if expert.is_multiple_of(2) {
            vec![first as u16, second as u16]
        } else {
            vec![first as u16]
        }
    };
    let layers = (0..3).map(|layer| (0..6).map(|expert| owners(layer, expert)).collect());
    let placement =
        Placement::from_owners(Epoch(5), 3, &layers.collect::<Vec<_>>()).expect("a placement");
    Game {
        shape,
        micro_batches: 2,
        layers: 3,
        steps: 6,
        placement,
    }
    .play(factory);
}

/// Everything that is played follows from these numbers, so every worker knows it without being told.
struct Game {
    shape: ExchangeShape,
    micro_batches: u8,
    layers: u16,
    steps: u64,
    placement: Placement,
}

impl Game {
    fn play(&self, factory: &dyn FabricFactory) {
        let topology = self.shape.topology(self.micro_batches).expect("a topology");
        std::thread::scope(|scope| {
            for end in factory.build(topology) {
                scope.spawn(move || match end.id().role {
                    Role::Attention => self.attend(end),
                    Role::Expert => self.serve(end),
                });
            }
        });
    }

    fn attend(&self, mut end: Box<dyn Endpoint>) {
        let me = end.id().index;
        let mut scatter = Scatter::new(self.shape).expect("a shape");
        let batches = (0..self.micro_batches).map(MicroBatch);
        let mut rallies = batches
            .map(|batch| Rally::new(self, me, batch))
            .collect::<Vec<_>>();
        for rally in &mut rallies {
            rally.dispatch(self, end.as_mut(), &mut scatter);
        }
        let started = Instant::now();
        while rallies.iter().any(|rally| rally.turn.is_some()) {
            assert!(started.elapsed() < HANG, "attention-{me} is stuck");
            let lane = arrival(&mut end);
            let rally = &mut rallies[usize::from(lane.micro_batch.0)];
            let frame = end.received(lane).expect("a lane that is held");
            if rally.gather.add(lane.peer, frame).expect("a good answer") == Progress::Complete {
                rally.finish(self, end.as_ref());
                rally.dispatch(self, end.as_mut(), &mut scatter);
            }
        }
    }

    fn serve(&self, mut end: Box<dyn Endpoint>) {
        let me = end.id().index;
        let room = self.placement.max_local_experts(me);
        let merge = |batch| Merge::new(self.shape, me, MicroBatch(batch), room).expect("a shape");
        let mut merges = (0..self.micro_batches).map(merge).collect::<Vec<_>>();
        let size = self.shape.max_merged().expect("a shape") as usize * self.shape.hidden as usize;
        let (mut x, mut y) = (vec![0.0; size], vec![0.0; size]);
        let mut peers = end.peers();
        while peers > 0 {
            let Event::Arrived { lane, .. } = next(&mut end) else {
                peers -= 1;
                continue;
            };
            let merge = &mut merges[usize::from(lane.micro_batch.0)];
            let mut ready = match merge
                .arrived(end.as_mut(), &self.placement, lane)
                .expect("a good dispatch")
            {
                Arrival::Ready(key) => Some(key),
                Arrival::Waiting { .. } | Arrival::Early(_) => None,
                Arrival::Stale(key) => panic!("{key} is not stale"),
            };
            while let Some(key) = ready {
                let groups = merge
                    .groups(end.as_ref(), &mut RowsMut::F32(&mut x))
                    .expect("a batch");
                assert_eq!(groups.key, key);
                let held = self.placement.local_experts(key.layer, me);
                assert_eq!(groups.offsets.len(), held.len() + 1);
                let hidden = self.shape.hidden as usize;
                for (bounds, &expert) in groups.offsets.windows(2).zip(held) {
                    for row in bounds[0] as usize..bounds[1] as usize {
                        let range = row * hidden..(row + 1) * hidden;
                        compute(key.layer, expert, &x[range.clone()], &mut y[range]);
                    }
                }
                let times = Times {
                    queued_ns: 1,
                    compute_ns: 2,
                };
                merge
                    .respond(end.as_mut(), Rows::F32(&y), times)
                    .expect("answers");
                ready = merge
                    .revisit(end.as_mut(), &self.placement)
                    .expect("good dispatches");
            }
        }
    }

    fn participants(&self, step: u64, batch: MicroBatch) -> Participants {
        let workers = self.shape.attention_workers;
        let mut set = Participants::none(workers);
        let takes_part = |&worker: &u16| {
            !mix(step << 24 | u64::from(batch.0) << 16 | u64::from(worker)).is_multiple_of(4)
        };
        (0..workers)
            .filter(takes_part)
            .for_each(|worker| set.insert(worker));
        if set.count() == 0 {
            Participants::all(workers)
        } else {
            set
        }
    }

    /// The sum over a row's experts without any exchange.
    fn direct(&self, layer: Layer, x: &[f32], ids: &[u16], weights: &[f32]) -> Vec<f32> {
        let (hidden, top_k) = (self.shape.hidden as usize, usize::from(self.shape.top_k));
        let mut out = vec![0.0; x.len()];
        let mut y = vec![0.0; hidden];
        for (row, (x, out)) in x.chunks(hidden).zip(out.chunks_mut(hidden)).enumerate() {
            for rank in row * top_k..(row + 1) * top_k {
                compute(layer, ids[rank], &self.travel(x), &mut y);
                out.iter_mut()
                    .zip(self.travel(&y))
                    .for_each(|(out, y)| *out += weights[rank] * y);
            }
        }
        out
    }

    /// What the element type of the frames does to a row.
    fn travel(&self, row: &[f32]) -> Vec<f32> {
        match self.shape.element {
            Element::F32 => row.to_vec(),
            Element::Bf16 => row
                .iter()
                .map(|&value| half::bf16::from_f32(value).to_f32())
                .collect(),
        }
    }
}

/// One attention worker's part in one micro-batch: layer after layer, step after step.
struct Rally {
    me: u16,
    batch: MicroBatch,
    gather: Gather,
    /// The next step and layer, or the one under way; none when all is played.
    turn: Option<(u64, u16)>,
    x: Vec<f32>,
    ids: Vec<u16>,
    weights: Vec<f32>,
}

impl Rally {
    fn new(game: &Game, me: u16, batch: MicroBatch) -> Self {
        let gather = Gather::new(game.shape, batch).expect("a shape");
        let mut rally = Self {
            me,
            batch,
            gather,
            turn: None,
            x: Vec::new(),
            ids: Vec::new(),
            weights: Vec::new(),
        };
        rally.begin(game, 0);
        rally
    }

    /// Moves to the first step from `step` on in which this worker takes part, with fresh rows; maybe none.
    fn begin(&mut self, game: &Game, step: u64) {
        self.turn = (step..game.steps)
            .find(|&step| game.participants(step, self.batch).contains(self.me))
            .map(|step| (step, 0));
        if let Some((step, _)) = self.turn {
            let rows = mix(self.seed(step, 0)) % u64::from(game.shape.max_rows + 1);
            let elements = rows as usize * game.shape.hidden as usize;
            self.x = (0..elements)
                .map(|at| value(self.seed(step, 0) ^ (at as u64) << 20))
                .collect();
        }
    }

    fn seed(&self, step: u64, layer: u16) -> u64 {
        step << 48 | u64::from(layer) << 40 | u64::from(self.batch.0) << 16 | u64::from(self.me)
    }

    fn dispatch(&mut self, game: &Game, end: &mut dyn Endpoint, scatter: &mut Scatter) {
        let Some((step, layer)) = self.turn else {
            return;
        };
        let shape = game.shape;
        let rows = self.x.len() / shape.hidden as usize;
        let seed = self.seed(step, layer);
        self.ids.clear();
        for row in 0..rows as u64 {
            let first = mix(seed ^ row << 32);
            let experts = game.placement.experts();
            self.ids.extend(
                (0..shape.top_k).map(|rank| ((first % u64::from(experts)) as u16 + rank) % experts),
            );
        }
        self.weights = (0..self.ids.len())
            .map(|at| value(!seed ^ (at as u64) << 8))
            .collect();
        let key = StepKey {
            epoch: game.placement.epoch(),
            step: Step(step),
            layer: Layer(layer),
            micro_batch: self.batch,
        };
        let participants = game.participants(step, self.batch);
        let (rows, ids, weights) = (Rows::F32(&self.x), &self.ids, &self.weights);
        scatter
            .write(
                end,
                &game.placement,
                key,
                &participants,
                rows,
                ids,
                weights,
                &mut self.gather,
            )
            .expect("a dispatch");
    }

    fn finish(&mut self, game: &Game, end: &dyn Endpoint) {
        let Some((step, layer)) = self.turn else {
            return;
        };
        let mut out = vec![f32::NAN; self.x.len()];
        let first = game.placement.recipients(Layer(layer))[0];
        assert_eq!(
            self.gather.times(first),
            Some(Times {
                queued_ns: 1,
                compute_ns: 2
            })
        );
        self.gather
            .combine(end, &mut out)
            .expect("all outputs are in");
        let direct = game.direct(Layer(layer), &self.x, &self.ids, &self.weights);
        let same = out
            .iter()
            .map(|value| value.to_bits())
            .eq(direct.iter().map(|value| value.to_bits()));
        assert!(
            same,
            "attention-{} {} step {step} layer {layer}: {out:?} is not {direct:?}",
            self.me, self.batch
        );
        if layer + 1 < game.layers {
            self.turn = Some((step, layer + 1));
            // The next layer goes on from this one's result, kept small.
            self.x = out.iter().map(|value| value.clamp(-4.0, 4.0)).collect();
        } else {
            self.begin(game, step + 1);
        }
    }
}

/// What stands for an expert: depends on the layer, the expert and every element's neighbour.
fn compute(layer: Layer, expert: u16, x: &[f32], y: &mut [f32]) {
    let scale = value(u64::from(layer.0) << 16 | u64::from(expert));
    for at in 0..x.len() {
        y[at] = x[at] * scale + 0.37 * x[(at + 1) % x.len()] - 0.01 * f32::from(expert);
    }
}

/// A number in -1..1.
fn value(seed: u64) -> f32 {
    (mix(seed) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

//! What the exchange does when things go wrong: nothing hangs, no lane is lost, and the error names the peer.

use volley_transports::*;

const SHAPE: ExchangeShape = ExchangeShape {
    attention_workers: 2,
    expert_workers: 2,
    max_rows: 4,
    hidden: 2,
    top_k: 2,
    element: Element::F32,
};
const BATCH: MicroBatch = MicroBatch(0);

fn key(epoch: u32, step: u64, layer: u16) -> StepKey {
    StepKey {
        epoch: Epoch(epoch),
        step: Step(step),
        layer: Layer(layer),
        micro_batch: BATCH,
    }
}

fn only(workers: &[u16]) -> Participants {
    let mut set = Participants::none(SHAPE.attention_workers);
    workers.iter().for_each(|&worker| set.insert(worker));
    set
}

/// Two attention workers and two expert workers on one thread, so that every race is written out.
struct Rig {
    attention: Vec<InProcess>,
    experts: Vec<InProcess>,
    scatter: Scatter,
    gathers: Vec<Gather>,
    merges: Vec<Merge>,
    placement: Placement,
}

impl Rig {
    fn new() -> Self {
        let mut attention = InProcessFabric::build(SHAPE.topology(1).unwrap()).unwrap();
        Self {
            experts: attention.split_off(2),
            attention,
            scatter: Scatter::new(SHAPE).unwrap(),
            gathers: (0..2).map(|_| Gather::new(SHAPE, BATCH).unwrap()).collect(),
            merges: (0..2)
                .map(|me| Merge::new(SHAPE, me, BATCH, 4).unwrap())
                .collect(),
            placement: Placement::even(Epoch(1), 4, 2).unwrap(),
        }
    }

    /// One row, `[worker + 1, step]`, to experts 0 and 3 with weights 1 and 0.5, under the epoch of the key.
    fn dispatch(
        &mut self,
        worker: u16,
        key: StepKey,
        participants: &Participants,
    ) -> Result<(), ScatterError> {
        let placement = self.placement.clone().at_epoch(key.epoch);
        let rows = [f32::from(worker) + 1.0, key.step.0 as f32];
        let at = usize::from(worker);
        let (end, gather) = (&mut self.attention[at], &mut self.gathers[at]);
        self.scatter.write(
            end,
            &placement,
            key,
            participants,
            Rows::F32(&rows),
            &[0, 3],
            &[1.0, 0.5],
            gather,
        )
    }

    /// Takes what arrived at an expert worker.
    fn collect(&mut self, expert: usize) -> Vec<Result<Arrival, MergeError>> {
        let mut taken = Vec::new();
        while let Some(event) = self.experts[expert].poll() {
            if let Event::Arrived { lane, .. } = event {
                taken.push(self.merges[expert].arrived(
                    &mut self.experts[expert],
                    &self.placement,
                    lane,
                ));
            }
        }
        taken
    }

    /// Answers the ready round of an expert worker with `y = 10 x`.
    fn fire(&mut self, expert: usize) -> Responded {
        let (merge, end) = (&mut self.merges[expert], &mut self.experts[expert]);
        let mut x = vec![f32::NAN; SHAPE.max_merged().unwrap() as usize * 2];
        merge.groups(end, &mut RowsMut::F32(&mut x)).unwrap();
        x.iter_mut().for_each(|x| *x *= 10.0);
        merge.respond(end, Rows::F32(&x), Times::default()).unwrap()
    }

    /// Takes what arrived at an attention worker.
    fn gather(&mut self, worker: usize) -> Vec<Result<Progress, GatherError>> {
        let mut taken = Vec::new();
        while let Some(event) = self.attention[worker].poll() {
            let gather = &mut self.gathers[worker];
            match event {
                Event::Arrived { lane, .. } => {
                    taken.push(
                        gather.add(lane.peer, self.attention[worker].received(lane).unwrap()),
                    );
                }
                Event::Lost { peer, .. } => taken.push(Ok(gather.lose(peer.index))),
            }
        }
        taken
    }

    fn sum(&mut self, worker: usize) -> [f32; 2] {
        let mut out = [f32::NAN; 2];
        self.gathers[worker]
            .combine(&self.attention[worker], &mut out)
            .unwrap();
        out
    }

    fn serve_all(&mut self) {
        for expert in 0..2 {
            self.collect(expert);
            self.fire(expert);
        }
    }
}

#[test]
fn rows_are_grouped_by_expert_then_sender_then_row() {
    let mut rig = Rig::new();
    let everyone = only(&[0, 1]);
    let key = key(1, 5, 0);
    for worker in [1u16, 0] {
        let rows = [10.0, 11.0, 20.0, 21.0].map(|value| value + 100.0 * f32::from(worker));
        let (end, gather) = (
            &mut rig.attention[usize::from(worker)],
            &mut rig.gathers[usize::from(worker)],
        );
        let ids = [1, 0, 0, 3];
        rig.scatter
            .write(
                end,
                &rig.placement,
                key,
                &everyone,
                Rows::F32(&rows),
                &ids,
                &[0.0; 4],
                gather,
            )
            .unwrap();
    }
    assert_eq!(
        rig.collect(0),
        [Ok(Arrival::Waiting { missing: 1 }), Ok(Arrival::Ready(key))]
    );
    let mut x = [0.0; 32];
    let groups = rig.merges[0]
        .groups(&rig.experts[0], &mut RowsMut::F32(&mut x))
        .unwrap();
    assert_eq!(
        (groups.key, groups.offsets, groups.total()),
        (key, &[0, 4, 6][..], 6)
    );
    assert_eq!(
        x[..12],
        [
            10.0, 11.0, 20.0, 21.0, 110.0, 111.0, 120.0, 121.0, 10.0, 11.0, 110.0, 111.0
        ]
    );
    // A row travels once to a worker, with all its experts there.
    let frame = rig.experts[0].received(Lane::new(0, BATCH)).unwrap();
    let header = Header::parse(frame).unwrap();
    assert_eq!((header.rows, header.assignments), (2, 3));
    let header = Header::parse(
        rig.experts[1]
            .poll()
            .map(|_| rig.experts[1].received(Lane::new(1, BATCH)).unwrap())
            .unwrap(),
    );
    assert_eq!(
        header.map(|header| (header.rows, header.assignments)),
        Ok((1, 1))
    );
}

#[test]
fn sums_run_in_top_k_order_from_zero() {
    let mut rig = Rig::new();
    rig.dispatch(0, key(1, 3, 0), &only(&[0])).unwrap();
    rig.serve_all();
    assert_eq!(
        rig.gather(0),
        [Ok(Progress::Waiting { missing: 1 }), Ok(Progress::Complete)]
    );
    assert_eq!(rig.sum(0), [10.0 + 5.0, 30.0 + 15.0]);
    assert_eq!(rig.gathers[0].progress(), Progress::Idle);
}

#[test]
fn an_old_epoch_is_answered_as_stale_and_the_lane_lives_on() {
    let mut rig = Rig::new();
    rig.placement = rig.placement.clone().at_epoch(Epoch(2));
    rig.dispatch(0, key(1, 3, 0), &only(&[0])).unwrap();
    for expert in 0..2 {
        assert_eq!(rig.collect(expert), [Ok(Arrival::Stale(key(1, 3, 0)))]);
    }
    let worker = Role::Expert.worker(0);
    let broken = Progress::Broken {
        worker,
        cause: Cause::Refused(Status::Stale),
    };
    assert_eq!(
        rig.gather(0),
        [Ok(Progress::Waiting { missing: 1 }), Ok(broken)]
    );
    assert!(matches!(
        rig.gathers[0].combine(&rig.attention[0], &mut [0.0; 2]),
        Err(GatherError::Incomplete { .. })
    ));
    rig.dispatch(0, key(2, 3, 0), &only(&[0])).unwrap();
    rig.serve_all();
    rig.gather(0);
    assert_eq!(rig.sum(0), [15.0, 45.0]);
}

#[test]
fn an_open_round_of_an_old_epoch_is_given_up_when_the_new_one_comes() {
    let mut rig = Rig::new();
    rig.dispatch(0, key(1, 3, 0), &only(&[0, 1])).unwrap();
    assert_eq!(rig.collect(0), [Ok(Arrival::Waiting { missing: 1 })]);
    assert_eq!(
        rig.merges[0].missing().collect::<Vec<_>>(),
        [Role::Attention.worker(1)]
    );
    rig.placement = rig.placement.clone().at_epoch(Epoch(2));
    rig.dispatch(1, key(2, 3, 0), &only(&[1])).unwrap();
    assert_eq!(rig.collect(0), [Ok(Arrival::Ready(key(2, 3, 0)))]);
    assert_eq!(rig.gather(0), [Ok(Progress::Waiting { missing: 1 })]);
    assert_eq!(rig.fire(0), Responded { posted: 1, lost: 0 });
}

#[test]
fn a_dispatch_of_a_coming_epoch_waits_for_the_placement() {
    let mut rig = Rig::new();
    rig.dispatch(0, key(2, 3, 0), &only(&[0])).unwrap();
    assert_eq!(rig.collect(0), [Ok(Arrival::Early(key(2, 3, 0)))]);
    assert_eq!(
        rig.merges[0].revisit(&mut rig.experts[0], &rig.placement),
        Ok(None)
    );
    rig.placement = rig.placement.clone().at_epoch(Epoch(2));
    assert_eq!(
        rig.merges[0].revisit(&mut rig.experts[0], &rig.placement),
        Ok(Some(key(2, 3, 0)))
    );
    assert_eq!(rig.fire(0), Responded { posted: 1, lost: 0 });
}

/// Attention-1 sits step 3 out and begins step 4 while attention-0 is still at step 3.
#[test]
fn the_earliest_step_comes_first() {
    let mut rig = Rig::new();
    rig.dispatch(1, key(1, 4, 0), &only(&[0, 1])).unwrap();
    assert_eq!(rig.collect(0), [Ok(Arrival::Waiting { missing: 1 })]);
    rig.dispatch(0, key(1, 3, 0), &only(&[0])).unwrap();
    assert_eq!(rig.collect(0), [Ok(Arrival::Ready(key(1, 3, 0)))]);
    rig.fire(0);
    assert_eq!(
        rig.merges[0].revisit(&mut rig.experts[0], &rig.placement),
        Ok(None)
    );
    assert_eq!(rig.merges[0].key(), Some(key(1, 4, 0)));
    rig.collect(1);
    rig.fire(1);
    rig.merges[1]
        .revisit(&mut rig.experts[1], &rig.placement)
        .unwrap();
    rig.gather(0);
    assert_eq!(rig.sum(0), [15.0, 45.0]);
    rig.dispatch(0, key(1, 4, 0), &only(&[0, 1])).unwrap();
    rig.serve_all();
    for worker in 0..2 {
        assert_eq!(rig.gather(worker).last(), Some(&Ok(Progress::Complete)));
    }
    assert_eq!((rig.sum(0), rig.sum(1)), ([15.0, 60.0], [30.0, 60.0]));
}

/// A later step that is complete is not disturbed by an earlier one of another worker, nor the reverse.
#[test]
fn a_batch_under_way_is_not_disturbed() {
    let mut rig = Rig::new();
    rig.dispatch(1, key(1, 4, 0), &only(&[1])).unwrap();
    assert_eq!(rig.collect(0), [Ok(Arrival::Ready(key(1, 4, 0)))]);
    rig.dispatch(0, key(1, 3, 0), &only(&[0])).unwrap();
    assert_eq!(rig.collect(0), [Ok(Arrival::Early(key(1, 3, 0)))]);
    rig.fire(0);
    assert_eq!(
        rig.merges[0].revisit(&mut rig.experts[0], &rig.placement),
        Ok(Some(key(1, 3, 0)))
    );
    rig.fire(0);
}

#[test]
fn a_contradiction_is_refused_by_name_and_answered() {
    let mut rig = Rig::new();
    rig.dispatch(0, key(1, 3, 1), &only(&[0, 1])).unwrap();
    rig.collect(0);
    rig.dispatch(1, key(1, 3, 2), &only(&[0, 1])).unwrap();
    let worker = Role::Attention.worker(1);
    let error = MergeError::OtherExchange {
        worker,
        key: key(1, 3, 2),
        round: key(1, 3, 1),
    };
    assert_eq!(rig.collect(0), [Err(error)]);
    assert!(error.to_string().contains("attention-1"));
    assert_eq!(
        rig.gather(1),
        [Ok(Progress::Waiting { missing: 1 })],
        "the lane came back"
    );
    // The first dispatch still stands.
    assert_eq!(rig.merges[0].missing().collect::<Vec<_>>(), [worker]);

    let mut rig = Rig::new();
    rig.dispatch(0, key(1, 3, 1), &only(&[0, 1])).unwrap();
    rig.dispatch(1, key(1, 3, 1), &only(&[1])).unwrap();
    let error = MergeError::OtherParticipants {
        worker,
        key: key(1, 3, 1),
    };
    assert_eq!(
        rig.collect(1),
        [Ok(Arrival::Waiting { missing: 1 }), Err(error)]
    );
}

#[test]
fn a_malformed_dispatch_is_refused_and_answered() {
    let mut rig = Rig::new();
    rig.dispatch(0, key(1, 3, 0), &only(&[0])).unwrap();
    let lane = Lane::new(1, BATCH);
    // Expert-1 gets garbage on its other lane.
    rig.attention[1].slot(Lane::new(1, BATCH)).unwrap().fill(7);
    rig.attention[1].post(Lane::new(1, BATCH), 100).unwrap();
    let error = rig.collect(1).pop().unwrap().unwrap_err();
    assert_eq!(
        error.to_string(),
        "the dispatch of attention-1 for micro-batch 0 is malformed: the frame starts with [07, 07, 07, 07], \
         not [56, 4c, 4c, 59]: the peer does not speak Volley's data protocol"
    );
    assert_eq!(
        rig.attention[1].poll(),
        Some(Event::Arrived {
            lane,
            len: HEADER_BYTES
        })
    );
    let header = Header::parse(rig.attention[1].received(lane).unwrap()).unwrap();
    assert_eq!((header.status, header.sender), (Status::Rejected, 1));
    assert_eq!(
        rig.fire(1),
        Responded { posted: 1, lost: 0 },
        "the good dispatch is served"
    );
}

#[test]
fn the_same_arrival_offered_twice_changes_nothing() {
    let mut rig = Rig::new();
    rig.dispatch(0, key(1, 3, 0), &only(&[0, 1])).unwrap();
    rig.collect(0);
    let lane = Lane::new(0, BATCH);
    let worker = Role::Attention.worker(0);
    let again = rig.merges[0].arrived(&mut rig.experts[0], &rig.placement, lane);
    assert_eq!(
        again,
        Err(MergeError::Duplicate {
            worker,
            micro_batch: BATCH
        })
    );
    assert!(rig.experts[0].holds(lane));
    let foreign = Lane::new(0, MicroBatch(1));
    let other = rig.merges[0].arrived(&mut rig.experts[0], &rig.placement, foreign);
    assert_eq!(
        other,
        Err(MergeError::OtherLane {
            lane: foreign,
            micro_batch: BATCH
        })
    );
}

#[test]
fn a_lost_expert_worker_breaks_the_exchange_and_a_new_placement_routes_around_it() {
    let mut rig = Rig::new();
    rig.dispatch(0, key(1, 3, 0), &only(&[0])).unwrap();
    rig.collect(0);
    rig.fire(0);
    drop(rig.experts.pop());
    let worker = Role::Expert.worker(1);
    let broken = Progress::Broken {
        worker,
        cause: Cause::Lost,
    };
    assert_eq!(
        rig.gather(0),
        [Ok(Progress::Waiting { missing: 1 }), Ok(broken)]
    );
    // Under the old placement it breaks at once, and does not hang.
    rig.dispatch(0, key(1, 3, 0), &only(&[0])).unwrap();
    rig.collect(0);
    rig.fire(0);
    assert_eq!(rig.gather(0), [Ok(broken)]);
    rig.placement = Placement::from_owners(Epoch(2), 2, &[vec![vec![0]; 4]]).unwrap();
    rig.dispatch(0, key(2, 3, 0), &only(&[0])).unwrap();
    assert_eq!(rig.collect(0), [Ok(Arrival::Ready(key(2, 3, 0)))]);
    rig.fire(0);
    assert_eq!(rig.gather(0), [Ok(Progress::Complete)]);
    assert_eq!(
        rig.sum(0),
        [15.0, 45.0],
        "the same answer from another placement"
    );
}

#[test]
fn a_lost_attention_worker_leaves_the_others_an_answer() {
    let mut rig = Rig::new();
    for worker in 0..2 {
        rig.dispatch(worker, key(1, 3, 0), &only(&[0, 1])).unwrap();
    }
    rig.collect(0);
    drop(rig.attention.pop());
    assert_eq!(rig.fire(0), Responded { posted: 1, lost: 1 });
    // One that never sent: the round is given up by its owner.
    rig.collect(1);
    rig.fire(1);
    rig.gather(0);
    rig.dispatch(0, key(1, 4, 0), &only(&[0, 1])).unwrap();
    assert_eq!(
        rig.collect(0).last(),
        Some(&Ok(Arrival::Waiting { missing: 1 }))
    );
    let given_up = rig.merges[0].abandon(&mut rig.experts[0], Status::Failed);
    assert_eq!(given_up, Ok(Responded { posted: 1, lost: 0 }));
    assert_eq!(rig.merges[0].key(), None);
    assert_eq!(rig.gather(0), [Ok(Progress::Waiting { missing: 1 })]);
}

#[test]
fn answers_are_checked_against_what_was_asked() {
    let mut rig = Rig::new();
    let worker = Role::Expert.worker(0);
    assert_eq!(
        rig.gathers[0].add(0, &[]),
        Err(GatherError::NotAwaited {
            worker,
            micro_batch: BATCH
        }),
        "nothing is under way"
    );
    let asked = key(1, 3, 0);
    let answer = |change: fn(&mut CombineHead)| {
        let mut rig = Rig::new();
        rig.dispatch(0, asked, &only(&[0])).unwrap();
        let mut head = CombineHead {
            key: asked,
            sender: 0,
            element: Element::F32,
            hidden: 2,
            rows: 1,
            assignments: 1,
            times: Times::default(),
        };
        change(&mut head);
        rig.experts[0].poll().unwrap();
        let lane = Lane::new(0, BATCH);
        let len = CombineMut::lay_out(rig.experts[0].slot(lane).unwrap(), head)
            .unwrap()
            .len;
        rig.experts[0].post(lane, len).unwrap();
        let result = rig.gather(0).pop().unwrap();
        // Whatever came, it is not awaited any more.
        assert_eq!(
            rig.gathers[0].missing().collect::<Vec<_>>(),
            [Role::Expert.worker(1)]
        );
        result
    };
    assert_eq!(answer(|_| {}), Ok(Progress::Waiting { missing: 1 }));
    let other = answer(|head| head.key.step = Step(9));
    assert_eq!(
        other,
        Err(GatherError::OtherExchange {
            worker,
            key: asked,
            found: key(1, 9, 0)
        })
    );
    let sender = answer(|head| head.sender = 1);
    assert_eq!(
        sender,
        Err(GatherError::Sender {
            worker,
            key: asked,
            sender: 1
        })
    );
    let counts = answer(|head| head.assignments = 2);
    assert_eq!(
        counts,
        Err(GatherError::Counts {
            worker,
            key: asked,
            sent: (1, 1),
            back: (1, 2)
        })
    );
    let hidden = answer(|head| head.hidden = 1);
    assert!(matches!(hidden, Err(GatherError::Frame { .. })));
}

#[test]
fn a_dispatch_that_makes_no_sense_is_refused_before_anything_is_sent() {
    let mut rig = Rig::new();
    let all = only(&[0, 1]);
    let good = key(1, 0, 0);
    let mut write =
        |key, participants: &Participants, rows: &[f32], ids: &[u16], weights: &[f32]| {
            let (end, gather) = (&mut rig.attention[0], &mut rig.gathers[0]);
            let placement = &rig.placement;
            rig.scatter
                .write(
                    end,
                    placement,
                    key,
                    participants,
                    Rows::F32(rows),
                    ids,
                    weights,
                    gather,
                )
                .unwrap_err()
        };
    let (row, ids, weights) = ([0.0; 2], [0, 1], [0.0; 2]);
    assert!(matches!(
        write(good, &all, &row[..1], &ids, &weights),
        ScatterError::Ragged { .. }
    ));
    assert!(matches!(
        write(good, &all, &row, &ids[..1], &weights),
        ScatterError::Ragged { .. }
    ));
    let many = write(good, &all, &[0.0; 10], &[0; 10], &[0.0; 10]);
    assert_eq!(
        many,
        ScatterError::TooManyRows {
            key: good,
            rows: 5,
            limit: 4
        }
    );
    assert!(matches!(
        write(key(2, 0, 0), &all, &row, &ids, &weights),
        ScatterError::Placement { .. }
    ));
    assert!(matches!(
        write(good, &only(&[1]), &row, &ids, &weights),
        ScatterError::NotParticipant { .. }
    ));
    let unknown = write(good, &all, &row, &[0, 4], &weights);
    assert_eq!(
        unknown,
        ScatterError::UnknownExpert {
            row: 0,
            expert: 4,
            experts: 4
        }
    );
    let batch = StepKey {
        micro_batch: MicroBatch(1),
        ..good
    };
    assert_eq!(
        write(batch, &all, &row, &ids, &weights),
        ScatterError::OtherMicroBatch {
            key: batch,
            gather: BATCH
        }
    );

    assert_eq!(rig.experts[0].poll(), None, "nothing was sent");
    rig.dispatch(0, good, &all).unwrap();
    assert_eq!(
        rig.dispatch(0, good, &all),
        Err(ScatterError::Unfinished { key: good })
    );
    rig.gathers[0].abandon();
    assert!(matches!(
        rig.dispatch(0, good, &all),
        Err(ScatterError::Lane(LaneError::NotHeld { .. }))
    ));
}

#[test]
fn batches_are_grouped_before_they_are_answered() {
    let mut rig = Rig::new();
    let mut x = [0.0; 32];
    let not_ready = MergeError::NotReady { micro_batch: BATCH };
    assert_eq!(
        rig.merges[0].groups(&rig.experts[0], &mut RowsMut::F32(&mut x)),
        Err(not_ready)
    );
    rig.dispatch(0, key(1, 0, 0), &only(&[0])).unwrap();
    rig.collect(0);
    let (merge, end) = (&mut rig.merges[0], &mut rig.experts[0]);
    assert_eq!(
        merge.respond(end, Rows::F32(&x), Times::default()),
        Err(not_ready)
    );
    let small = merge.groups(end, &mut RowsMut::F32(&mut x[..1]));
    assert_eq!(
        small,
        Err(MergeError::Size {
            what: "x",
            key: key(1, 0, 0),
            have: 1,
            need: 2
        })
    );
    rig.fire(0);
}

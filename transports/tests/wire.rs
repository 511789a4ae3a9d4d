//! Frames read back as written; any damage is an error or another valid frame, never a panic.

use proptest::prelude::*;
use volley_transports::*;

/// Bytes on a 64-byte boundary, as slots are.
#[derive(Clone, Debug)]
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    fn new(len: usize) -> Self {
        let bytes = vec![0xa5; len + SLOT_ALIGN];
        let start = bytes.as_ptr().align_offset(SLOT_ALIGN);
        Self { bytes, start, len }
    }

    fn of(content: &[u8]) -> Self {
        let mut buffer = Self::new(content.len());
        buffer.get_mut().copy_from_slice(content);
        buffer
    }

    fn get(&self) -> &[u8] {
        &self.bytes[self.start..][..self.len]
    }

    fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.len]
    }
}

#[derive(Clone, Debug)]
struct Dispatch {
    key: StepKey,
    limits: DispatchLimits,
    sender: u16,
    element: Element,
    participants: Participants,
    rows: Vec<u16>,
    row: Vec<u32>,
    expert: Vec<u16>,
    weight: Vec<f32>,
}

impl Dispatch {
    fn head(&self) -> DispatchHead {
        DispatchHead {
            key: self.key,
            sender: self.sender,
            element: self.element,
            hidden: self.limits.hidden,
            rows: self.row.last().map_or(0, |row| row + 1),
            assignments: self.row.len() as u32,
        }
    }

    /// Row elements as the frame's type has them.
    fn values(&self) -> Vec<f32> {
        self.rows
            .iter()
            .map(|&bits| half::bf16::from_bits(bits).to_f32())
            .collect()
    }

    fn build(&self) -> Buffer {
        let DispatchLimits {
            max_rows,
            hidden,
            top_k,
            attention_workers,
            ..
        } = self.limits;
        let layout =
            DispatchLayout::for_maxima(max_rows, hidden, top_k, self.element, attention_workers)
                .unwrap();
        let mut slot = Buffer::new(layout.bytes());
        let mut frame =
            DispatchMut::lay_out(slot.get_mut(), self.head(), &self.participants).unwrap();
        match &mut frame.rows {
            RowsMut::F32(rows) => rows.copy_from_slice(&self.values()[..rows.len()]),
            RowsMut::Bf16(rows) => rows.copy_from_slice(&self.rows[..rows.len()]),
        }
        frame.row.copy_from_slice(&self.row);
        frame.expert.copy_from_slice(&self.expert);
        frame.weight.copy_from_slice(&self.weight);
        let len = frame.len;
        Buffer::of(&slot.get()[..len])
    }
}

fn key() -> impl Strategy<Value = StepKey> {
    (any::<u32>(), any::<u64>(), any::<u16>(), any::<u8>()).prop_map(
        |(epoch, step, layer, batch)| StepKey {
            epoch: Epoch(epoch),
            step: Step(step),
            layer: Layer(layer),
            micro_batch: MicroBatch(batch),
        },
    )
}

fn element() -> impl Strategy<Value = Element> {
    prop_oneof![Just(Element::F32), Just(Element::Bf16)]
}

fn dispatch() -> impl Strategy<Value = Dispatch> {
    let sizes = (1u16..140, 0u32..6, 1u32..20, 1u16..4, 1u16..9);
    (sizes, key(), element(), any::<u64>()).prop_map(
        |((workers, rows, hidden, top_k, experts), key, element, seed)| {
            // A small generator of its own keeps the shrinking on the sizes.
            let mut state = seed | 1;
            let mut random = move |end: u64| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                (state >> 33) % end
            };
            let sender = random(workers.into()) as u16;
            let mut participants = Participants::none(workers);
            participants.insert(sender);
            (0..workers)
                .filter(|_| random(2) == 0)
                .for_each(|worker| participants.insert(worker));
            let row = (0..rows)
                .flat_map(|row| vec![row; 1 + random(top_k.into()) as usize])
                .collect::<Vec<_>>();
            Dispatch {
                key,
                limits: DispatchLimits {
                    attention_workers: workers,
                    max_rows: rows.max(1),
                    hidden,
                    top_k,
                    local_experts: experts,
                },
                sender,
                element,
                participants,
                // No NaN: they are not equal to themselves.
                rows: (0..rows * hidden).map(|_| random(0x7f80) as u16).collect(),
                expert: row.iter().map(|_| random(experts.into()) as u16).collect(),
                weight: row.iter().map(|_| random(1 << 24) as f32).collect(),
                row,
            }
        },
    )
}

/// Touches everything that a parsed frame offers, as a worker would.
fn use_dispatch(frame: &DispatchFrame<'_>, limits: &DispatchLimits) {
    let mut out = vec![0.0; limits.hidden as usize];
    for (&row, &expert) in frame.row.iter().zip(frame.expert) {
        assert!(expert < limits.local_experts);
        RowsMut::F32(&mut out).set_row(0, frame.rows.row(row as usize, limits.hidden as usize));
    }
    assert_eq!(frame.weight.len(), frame.row.len());
    assert!(frame.header.sender < limits.attention_workers && frame.header.rows <= limits.max_rows);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_dispatch_reads_back_as_written(dispatch in dispatch()) {
        let buffer = dispatch.build();
        let frame = DispatchFrame::parse(buffer.get(), &dispatch.limits).unwrap();
        prop_assert_eq!(frame.header.key, dispatch.key);
        prop_assert_eq!(frame.header.sender, dispatch.sender);
        prop_assert_eq!(frame.participants, dispatch.participants.words());
        match frame.rows {
            Rows::F32(rows) => prop_assert_eq!(rows, &dispatch.values()[..]),
            Rows::Bf16(rows) => prop_assert_eq!(rows, &dispatch.rows[..]),
        }
        prop_assert_eq!(frame.row, &dispatch.row[..]);
        prop_assert_eq!(frame.expert, &dispatch.expert[..]);
        prop_assert_eq!(frame.weight, &dispatch.weight[..]);
    }

    #[test]
    fn a_dispatch_with_any_byte_changed_never_panics(dispatch in dispatch(), flip in 1u8..) {
        let mut buffer = dispatch.build();
        for at in 0..buffer.len {
            buffer.get_mut()[at] ^= flip;
            if let Ok(frame) = DispatchFrame::parse(buffer.get(), &dispatch.limits) {
                use_dispatch(&frame, &dispatch.limits);
            }
            buffer.get_mut()[at] ^= flip;
        }
    }

    #[test]
    fn a_dispatch_of_another_length_is_refused(dispatch in dispatch(), longer in 1usize..200) {
        let whole = dispatch.build();
        for len in 0..whole.len {
            prop_assert!(DispatchFrame::parse(&whole.get()[..len], &dispatch.limits).is_err());
        }
        let mut content = whole.get().to_vec();
        content.resize(whole.len + longer, 0);
        let longer = Buffer::of(&content);
        let error = DispatchFrame::parse(longer.get(), &dispatch.limits).unwrap_err();
        prop_assert_eq!(error, FrameError::Length { have: longer.len, need: whole.len });
    }

    #[test]
    fn arbitrary_bytes_after_a_good_start_never_panic(
        dispatch in dispatch(),
        noise in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..20),
    ) {
        let mut buffer = dispatch.build();
        for (at, byte) in noise {
            let at = at.index(buffer.len);
            buffer.get_mut()[at] = byte;
        }
        if let Ok(frame) = DispatchFrame::parse(buffer.get(), &dispatch.limits) {
            use_dispatch(&frame, &dispatch.limits);
        }
    }

    #[test]
    fn a_combine_reads_back_and_survives_damage(
        key in key(),
        element in element(),
        (rows, assignments, hidden) in (1u32..5).prop_flat_map(|rows| (Just(rows), 0..=rows * 3, 1u32..20)),
        times in any::<(u64, u64)>(),
        flip in 1u8..,
    ) {
        let limits = CombineLimits { expert_workers: 9, max_rows: rows, hidden, top_k: 3 };
        let times = Times { queued_ns: times.0, compute_ns: times.1 };
        let head = CombineHead { key, sender: 8, element, hidden, rows, assignments, times };
        let mut slot = Buffer::new(CombineLayout::for_maxima(rows, hidden, 3, element).unwrap().bytes());
        let mut frame = CombineMut::lay_out(slot.get_mut(), head).unwrap();
        let values = (0..hidden).map(|at| at as f32).collect::<Vec<_>>();
        (0..assignments as usize).for_each(|row| frame.rows.set_row(row, Rows::F32(&values)));
        let len = frame.len;
        let mut buffer = Buffer::of(&slot.get()[..len]);

        let parsed = CombineFrame::parse(buffer.get(), &limits).unwrap();
        prop_assert_eq!(parsed.header.times, times);
        prop_assert_eq!(parsed.rows.len(), (assignments * hidden) as usize);
        let mut back = vec![0.0; hidden as usize];
        for row in 0..assignments as usize {
            RowsMut::F32(&mut back).set_row(0, parsed.rows.row(row, hidden as usize));
            prop_assert_eq!(&back, &values);
        }
        for at in 0..len {
            prop_assert!(CombineFrame::parse(&buffer.get()[..at], &limits).is_err());
            buffer.get_mut()[at] ^= flip;
            if let Ok(frame) = CombineFrame::parse(buffer.get(), &limits) {
                prop_assert_eq!(frame.rows.len(), (frame.header.assignments * hidden) as usize);
                prop_assert!(frame.header.sender < 9);
            }
            buffer.get_mut()[at] ^= flip;
        }
    }
}

/// Two rows of two elements: row 0 to experts 1 and 0, row 1 to expert 2; attention-1 of 70 sends.
fn example() -> Dispatch {
    let mut participants = Participants::none(70);
    [1, 69]
        .into_iter()
        .for_each(|worker| participants.insert(worker));
    Dispatch {
        key: StepKey {
            epoch: Epoch(1),
            step: Step(2),
            layer: Layer(3),
            micro_batch: MicroBatch(0),
        },
        limits: DispatchLimits {
            attention_workers: 70,
            max_rows: 2,
            hidden: 2,
            top_k: 2,
            local_experts: 3,
        },
        sender: 1,
        element: Element::F32,
        participants,
        rows: vec![0x3f80; 4],
        row: vec![0, 0, 1],
        expert: vec![1, 0, 2],
        weight: vec![0.5, 0.25, 1.0],
    }
}

fn refusal(change: impl FnOnce(&mut Dispatch), limits: DispatchLimits) -> FrameError {
    let mut dispatch = example();
    change(&mut dispatch);
    DispatchFrame::parse(dispatch.build().get(), &limits).unwrap_err()
}

#[test]
fn what_is_wrong_with_a_dispatch_is_named() {
    let limits = example().limits;
    let same = |_: &mut Dispatch| {};
    let over = |what, found, limit| FrameError::OverLimit { what, found, limit };
    assert_eq!(
        refusal(
            same,
            DispatchLimits {
                max_rows: 1,
                ..limits
            }
        ),
        over("the number of rows", 2, 1)
    );
    assert_eq!(
        refusal(same, DispatchLimits { top_k: 1, ..limits }),
        over("the number of assignments", 3, 2)
    );
    assert_eq!(
        refusal(
            same,
            DispatchLimits {
                hidden: 3,
                ..limits
            }
        ),
        FrameError::Mismatch {
            what: "the length of a row",
            found: 2,
            expected: 3
        }
    );
    assert_eq!(
        refusal(
            same,
            DispatchLimits {
                attention_workers: 64,
                ..limits
            }
        ),
        FrameError::Mismatch {
            what: "the number of participant words",
            found: 2,
            expected: 1
        }
    );
    assert_eq!(
        refusal(
            same,
            DispatchLimits {
                attention_workers: 69,
                ..limits
            }
        )
        .to_string(),
        "the participants name an attention worker that does not exist"
    );
    assert_eq!(
        refusal(|dispatch| dispatch.sender = 2, limits).to_string(),
        "the participants leave out the sender"
    );
    assert_eq!(
        refusal(
            same,
            DispatchLimits {
                local_experts: 2,
                ..limits
            }
        )
        .to_string(),
        "assignment 2: the local expert is 2, the limit is 1"
    );
    let row = |found, index, limit| FrameError::Assignment {
        index,
        what: "the row",
        found,
        limit,
    };
    assert_eq!(
        refusal(|dispatch| dispatch.row = vec![0, 2, 1], limits),
        row(2, 1, 1)
    );
    assert_eq!(
        refusal(|dispatch| dispatch.row = vec![1, 1, 1], limits),
        row(1, 0, 0)
    );
    let unused = |dispatch: &mut Dispatch| {
        dispatch.row = vec![0, 0, 0, 1];
        dispatch.expert = vec![0; 4];
        dispatch.weight = vec![0.0; 4];
    };
    assert_eq!(refusal(unused, limits), row(0, 2, 1));
}

#[test]
fn rows_without_an_assignment_are_refused() {
    let dispatch = example();
    let mut buffer = dispatch.build();
    let layout = DispatchLayout::for_maxima(2, 2, 2, Element::F32, 70).unwrap();
    // The last assignment moves from row 1 to row 0, which top-3 would allow.
    buffer.get_mut()[layout.row().start + 8] = 0;
    let limits = DispatchLimits {
        top_k: 3,
        ..dispatch.limits
    };
    let error = DispatchFrame::parse(buffer.get(), &limits).unwrap_err();
    assert_eq!(error, FrameError::UnusedRows { used: 1, rows: 2 });
}

#[test]
fn padding_and_alignment_are_checked() {
    let dispatch = example();
    let mut buffer = dispatch.build();
    buffer.get_mut()[81] = 1;
    assert_eq!(
        DispatchFrame::parse(buffer.get(), &dispatch.limits),
        Err(FrameError::Padding { at: 81 })
    );
    let whole = dispatch.build();
    let mut shifted = Buffer::new(whole.len + 8);
    shifted.get_mut()[8..].copy_from_slice(whole.get());
    assert_eq!(
        DispatchFrame::parse(&shifted.get()[8..], &dispatch.limits),
        Err(FrameError::Misaligned)
    );
}

#[test]
fn a_slot_too_small_is_an_error() {
    let dispatch = example();
    let mut slot = Buffer::new(150);
    let error =
        DispatchMut::lay_out(slot.get_mut(), dispatch.head(), &dispatch.participants).unwrap_err();
    assert_eq!(
        error,
        FrameError::Length {
            have: 150,
            need: 128 + 16 + 12 + 12 + 6
        }
    );
}

#[test]
fn an_answer_without_outputs_is_only_a_header() {
    let key = example().key;
    let times = Times::default();
    let head = CombineHead {
        key,
        sender: 2,
        element: Element::F32,
        hidden: 2,
        rows: 2,
        assignments: 3,
        times,
    };
    let mut slot = Buffer::new(100);
    let len = write_status(slot.get_mut(), head, Status::Stale).unwrap();
    let limits = CombineLimits {
        expert_workers: 3,
        max_rows: 2,
        hidden: 2,
        top_k: 2,
    };
    let frame = CombineFrame::parse(&slot.get()[..len], &limits).unwrap();
    assert_eq!(
        (
            frame.header.status,
            frame.header.assignments,
            frame.rows.len()
        ),
        (Status::Stale, 0, 0)
    );
}

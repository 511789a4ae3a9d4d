//! Arbitrary bytes to both parsers. The first seven bytes choose the limits, the rest is the frame.

#![no_main]

use libfuzzer_sys::fuzz_target;
use volley_transports::{CombineFrame, CombineLimits, DispatchFrame, DispatchLimits, RowsMut, SLOT_ALIGN};

fuzz_target!(|data: &[u8]| {
    let Some((&[workers, rows, hidden, top_k, experts, ..], frame)) = data.split_first_chunk::<7>() else {
        return;
    };
    let limits = DispatchLimits {
        attention_workers: workers.into(),
        max_rows: rows.into(),
        hidden: hidden.into(),
        top_k: top_k.into(),
        local_experts: experts.into(),
    };
    // Slots are aligned; a frame that is not is refused early, which would hide the rest.
    let mut buffer = vec![0; frame.len() + SLOT_ALIGN];
    let start = buffer.as_ptr().align_offset(SLOT_ALIGN);
    let slot = &mut buffer[start..][..frame.len()];
    slot.copy_from_slice(frame);

    let mut row = vec![0.0; limits.hidden as usize];
    if let Ok(frame) = DispatchFrame::parse(slot, &limits) {
        for (&index, &expert) in frame.row.iter().zip(frame.expert) {
            assert!(expert < limits.local_experts);
            RowsMut::F32(&mut row).set_row(0, frame.rows.row(index as usize, limits.hidden as usize));
        }
    }
    let limits = CombineLimits {
        expert_workers: limits.attention_workers,
        max_rows: limits.max_rows,
        hidden: limits.hidden,
        top_k: limits.top_k,
    };
    if let Ok(frame) = CombineFrame::parse(slot, &limits) {
        for index in 0..frame.header.assignments as usize {
            RowsMut::F32(&mut row).set_row(0, frame.rows.row(index, limits.hidden as usize));
        }
    }
});

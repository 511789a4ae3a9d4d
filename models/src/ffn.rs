//! The gated feed-forward part that experts and dense layers share: `down(silu(gate(x)) * up(x))`.

use crate::kernels::{
    Arena, Isa, MatrixMut, PackedMatrix, PackedRows, Rows, Start, WeightType, gated_silu, gemm,
};
use crate::weights::MatrixView;

/// Packed weights: gate and up side by side, so that one pass over the input yields both.
#[derive(Debug)]
pub(crate) struct GatedFfn {
    gate_up: PackedMatrix,
    down: PackedMatrix,
}

impl GatedFfn {
    /// Bytes in an arena for `hidden` inputs and outputs and `width` between; nothing if that overflows.
    pub(crate) fn bytes(kind: WeightType, hidden: usize, width: usize) -> Option<usize> {
        let gate_up = PackedMatrix::bytes(kind, width.checked_mul(2)?, hidden)?;
        gate_up.checked_add(PackedMatrix::bytes(kind, hidden, width)?)
    }

    pub(crate) fn pack(
        arena: &mut Arena,
        kind: WeightType,
        gate: MatrixView<'_>,
        up: MatrixView<'_>,
        down: MatrixView<'_>,
    ) -> Self {
        GatedFfn {
            gate_up: PackedMatrix::pack(arena, kind, &[gate, up]),
            down: PackedMatrix::pack(arena, kind, &[down]),
        }
    }

    /// `out = ffn(x)` for `[rows, hidden]`, at most as many rows as the scratch was made for.
    pub(crate) fn forward(&self, isa: Isa, scratch: &mut FfnScratch, x: Rows<'_>, out: &mut [f32]) {
        let (hidden, width) = (self.down.n(), self.down.k());
        let rows = out.len() / hidden;
        let kind = self.down.kind();
        scratch.packed.pack(kind, x, rows, hidden);
        let gate_up = &mut scratch.gate_up[..rows * 2 * width];
        let place = MatrixMut::new(gate_up, rows, 2 * width, 2 * width);
        gemm(
            &scratch.packed,
            &self.gate_up,
            0..self.gate_up.panels(),
            place,
            Start::Zero,
        );
        let gated = &mut scratch.gated[..rows * width];
        gated_silu(isa, gate_up, width, gated);
        scratch.packed.pack(kind, Rows::F32(gated), rows, width);
        let place = MatrixMut::new(out, rows, hidden, hidden);
        gemm(
            &scratch.packed,
            &self.down,
            0..self.down.panels(),
            place,
            Start::Zero,
        );
    }
}

/// Room for a gated FFN's intermediate values.
#[derive(Debug)]
pub(crate) struct FfnScratch {
    packed: PackedRows,
    gate_up: Vec<f32>,
    gated: Vec<f32>,
}

impl FfnScratch {
    pub(crate) fn new(isa: Isa, rows: usize, hidden: usize, width: usize) -> Self {
        FfnScratch {
            packed: PackedRows::new(isa, rows, hidden.max(width)),
            gate_up: vec![0.0; rows * 2 * width],
            gated: vec![0.0; rows * width],
        }
    }

    /// Bytes of that room; nothing if that overflows.
    pub(crate) fn bytes(rows: usize, hidden: usize, width: usize) -> Option<usize> {
        PackedRows::bytes(rows, hidden.max(width))?
            .checked_add(rows.checked_mul(width)?.checked_mul(3 * 4)?)
    }
}

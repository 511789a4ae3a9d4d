//! The gated feed-forward part that experts and dense layers share: `down(silu(gate(x)) * up(x))`.
//!
//! Rows come grouped by whose they are. A wave of groups is computed in four operations, each cut into pieces for the crew: rows are packed;
//! columns of gate and up are computed and gated, while they are in the cache; the gated rows are packed; columns of down are computed.

use crate::crew::{Grid, Member};
use crate::kernels::{
    Arena, Isa, MatrixMut, PANEL_COLUMNS, PackedMatrix, PackedRows, Rows, Start, WeightType,
    columns_per_piece, gated_silu, gemm,
};
use crate::weights::MatrixView;

/// Packed weights. Gate and up are apart, so that a piece can take the same columns of both.
#[derive(Debug)]
pub(crate) struct GatedFfn {
    gate: PackedMatrix,
    up: PackedMatrix,
    down: PackedMatrix,
}

impl GatedFfn {
    /// Bytes in an arena for `hidden` inputs and outputs and `width` between; nothing if that overflows.
    pub(crate) fn bytes(kind: WeightType, hidden: usize, width: usize) -> Option<usize> {
        PackedMatrix::bytes(kind, width, hidden)?
            .checked_mul(2)?
            .checked_add(PackedMatrix::bytes(kind, hidden, width)?)
    }

    pub(crate) fn pack(
        arena: &mut Arena<'_>,
        kind: WeightType,
        gate: MatrixView<'_>,
        up: MatrixView<'_>,
        down: MatrixView<'_>,
    ) -> Self {
        let mut pack = |view| PackedMatrix::pack(arena, kind, &[view]);
        GatedFfn {
            gate: pack(gate),
            up: pack(up),
            down: pack(down),
        }
    }
}

/// Room for a wave's intermediate values.
#[derive(Debug)]
pub(crate) struct FfnScratch {
    packed: PackedRows,
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl FfnScratch {
    pub(crate) fn new(isa: Isa, rows: usize, hidden: usize, width: usize) -> Self {
        FfnScratch {
            packed: PackedRows::new(isa, rows, hidden.max(width)),
            gate: vec![0.0; rows * width],
            up: vec![0.0; rows * width],
        }
    }

    /// Bytes of that room; nothing if that overflows.
    pub(crate) fn bytes(rows: usize, hidden: usize, width: usize) -> Option<usize> {
        PackedRows::bytes(rows, hidden.max(width))?
            .checked_add(rows.checked_mul(width)?.checked_mul(2 * 4)?)
    }

    /// `out = ffn(x)` for `[rows, hidden]`: rows `bounds[g]..bounds[g + 1]` by `of(g)`, all of one shape. At most as many rows as the scratch was made for.
    pub(crate) fn forward<'w>(
        &mut self,
        isa: Isa,
        crew: &mut Member,
        of: impl Fn(usize) -> &'w GatedFfn + Sync,
        bounds: &[usize],
        x: Rows<'_>,
        out: &mut [f32],
    ) {
        let FfnScratch { packed, gate, up } = self;
        let groups = bounds.len() - 1;
        let rows = bounds[groups];
        if rows == 0 {
            return;
        }
        let first = of(0);
        let (hidden, width, kind) = (first.down.n(), first.down.k(), first.down.kind());

        packed.pack_groups(crew, kind, x, bounds, hidden);
        let gate = &mut gate[..rows * width];
        let up = &mut up[..rows * width];
        let columns = columns_per_piece(crew, groups, 2, &first.gate);
        let grid = |data| Grid::new(MatrixMut::new(data, rows, width, width), bounds, columns);
        let (gates, ups) = (grid(&mut *gate), grid(up));
        let across = gates.across();
        let ours: &PackedRows = packed;
        crew.each((gates, ups), |index, (mut gate, mut up), _| {
            let (group, ffn) = (index / across, of(index / across));
            let panels = panels(index % across, columns, width);
            let x = ours.group(group);
            gemm(x, &ffn.gate, panels.clone(), gate.reborrow(), Start::Zero);
            gemm(x, &ffn.up, panels, up.reborrow(), Start::Zero);
            gated_silu(isa, gate, up);
        });

        packed.pack_groups(crew, kind, Rows::F32(gate), bounds, width);
        let columns = columns_per_piece(crew, groups, 1, &first.down);
        let outs = Grid::new(MatrixMut::new(out, rows, hidden, hidden), bounds, columns);
        let across = outs.across();
        let ours: &PackedRows = packed;
        crew.each(outs, |index, out, _| {
            let (group, ffn) = (index / across, of(index / across));
            let panels = panels(index % across, columns, hidden);
            gemm(ours.group(group), &ffn.down, panels, out, Start::Zero);
        });
    }
}

/// Panels of piece `piece`, which has `columns` of `n` columns, or what is left of them.
fn panels(piece: usize, columns: usize, n: usize) -> std::ops::Range<usize> {
    let first = piece * columns;
    first / PANEL_COLUMNS..n.min(first + columns).div_ceil(PANEL_COLUMNS)
}

//! T_e: what an expert worker computes in a layer.

use crate::cost::Stage;
use crate::cost::attention::Builder;
use crate::{Efficiency, Gpu, ModelShape, Precision};

/// Time of an expert worker, of all its GPUs together. Its experts are one grouped product after the other.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertCost {
    /// Of each layer, whatever the rows: launches, and the latency of the collective.
    pub overhead_s: f64,
    /// Of one expert by its rows, without overheads: its weights are read once, if it has any row.
    pub expert: Stage,
    /// Of each row, whichever expert it visits: the collective's bytes.
    pub per_row_s: f64,
}

impl ExpertCost {
    /// T_e for the rows of each expert that the worker holds.
    pub fn layer_s(&self, rows: &[f64]) -> f64 {
        let total: f64 = rows.iter().sum();
        if total <= 0.0 {
            return 0.0;
        }
        let each = rows.iter().map(|&rows| self.expert.time_s(rows, 0.0));
        self.overhead_s + each.sum::<f64>() + self.per_row_s * total
    }

    /// T_e for `experts` experts with `rows` rows each on average. Below one row an expert, some have none and their
    /// weights are not read.
    pub fn even_layer_s(&self, experts: usize, rows: f64) -> f64 {
        let visited = experts as f64 * (1.0 - (-rows).exp());
        let total = experts as f64 * rows;
        if total <= 0.0 {
            return 0.0;
        }
        self.overhead_s
            + visited * self.expert.time_s(total / visited, 0.0)
            + self.per_row_s * total
    }

    /// A roofline of both products on `tp` GPUs of one server; every output of a row is reduced over them by itself, for outputs return unsummed.
    pub(crate) fn roofline(
        gpu: &Gpu,
        used: &Efficiency,
        model: &ModelShape,
        precision: &Precision,
        tp: usize,
    ) -> Self {
        Self::reducing(gpu, used, model, precision, tp, 1.0)
    }

    /// The same where experts and attention are together: a row's K outputs are summed first, and reduced once.
    pub(crate) fn colocated(
        gpu: &Gpu,
        used: &Efficiency,
        model: &ModelShape,
        precision: &Precision,
        tp: usize,
    ) -> Self {
        Self::reducing(gpu, used, model, precision, tp, 1.0 / model.top_k as f64)
    }

    /// `reduced` rows go through an all-reduce for each output.
    fn reducing(
        gpu: &Gpu,
        used: &Efficiency,
        model: &ModelShape,
        precision: &Precision,
        tp: usize,
        reduced: f64,
    ) -> Self {
        let build = Builder { gpu, used, tp };
        let third = (model.hidden * model.expert_hidden) as f64;
        let up = build.product("gate and up", 2.0 * third, precision.experts);
        let down = build.product("down", third, precision.experts);
        let mut kernels = vec![up];
        kernels.extend(build.synced(down, reduced * model.hidden as f64 * 2.0));
        // Of a grouped product the launch is one for all experts, and so is an all-reduce that is a kernel of its own.
        let overhead_s = kernels.iter().map(|kernel| kernel.overhead_s).sum();
        let all_reduce = (kernels.len() > 2).then(|| kernels.pop()).flatten();
        for kernel in &mut kernels {
            kernel.overhead_s = 0.0;
        }
        Self {
            overhead_s,
            expert: Stage::Kernels(kernels),
            per_row_s: all_reduce.map_or(0.0, |kernel| kernel.link.per_row_s),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::Curve;

    fn cost() -> ExpertCost {
        ExpertCost {
            overhead_s: 1.0,
            expert: Stage::Measured {
                rows: Curve::through(vec![(1.0, 4.0), (16.0, 4.0), (32.0, 8.0)]).unwrap(),
                per_cached_s: 0.0,
            },
            per_row_s: 0.5,
        }
    }

    #[test]
    fn experts_without_rows_cost_nothing() {
        assert_eq!(cost().layer_s(&[0.0, 8.0, 0.0]), 1.0 + 4.0 + 4.0);
        assert_eq!(cost().layer_s(&[0.0]), 0.0);
        assert_eq!(cost().layer_s(&[]), 0.0);
    }

    #[test]
    fn the_mean_of_many_rows_is_the_sum_of_all() {
        let (even, each) = (cost().even_layer_s(4, 24.0), cost().layer_s(&[24.0; 4]));
        assert!((even / each - 1.0).abs() < 1e-9);
        // Of eight experts that share one row, one is read.
        let even = cost().even_layer_s(8, 0.01);
        assert!(
            (even - (1.0 + 4.0 * 0.0796 + 0.5 * 0.08)).abs() < 0.01,
            "{even}"
        );
    }
}

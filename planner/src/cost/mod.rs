//! What each part of a step costs: T_a, T_e and T_c as functions of the load, in seconds.
//!
//! The same three types stand for figures of data sheets ([`Cost::from_hardware`]: a roofline of every kernel) and for
//! curves measured on a machine (a profile). Plan search, simulator and reproduction ask nothing else. Everything is counted in bytes and
//! operations of the types that are stored, sent and multiplied ([`Precision`]); fixed times (a kernel's launch, a hop
//! without bytes) are kept, which the paper's n_a drops.

mod attention;
mod curve;
mod experts;
mod kernel;
mod link;

pub use attention::AttentionCost;
pub use curve::Curve;
pub use experts::ExpertCost;
pub use kernel::{Affine, Kernel, Stage};
pub use link::{LinkCost, all_reduce_s};

use crate::{Hardware, ModelShape, PlanError, Precision};

/// The GPUs that make one worker of a side.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Side {
    /// Name in the catalogue.
    pub gpu: String,
    /// GPUs of one worker (tp): its weights are divided by so many.
    pub tp: usize,
}

/// The cost of every part of a disaggregated step.
#[derive(Debug, Clone, PartialEq)]
pub struct Cost {
    /// T_a, and what an attention worker does once a step.
    pub attention: AttentionCost,
    /// T_e.
    pub experts: ExpertCost,
    /// T_c as attention workers see it: out of and into their adapters.
    pub attention_link: LinkCost,
    /// T_c as expert workers see it.
    pub expert_link: LinkCost,
    /// Bytes of one row on its way to an expert worker.
    pub dispatch_row_bytes: f64,
    /// Bytes of one output on its way back.
    pub combine_row_bytes: f64,
}

impl Cost {
    /// From figures of data sheets.
    ///
    /// # Errors
    /// A GPU or transport is not in the catalogue.
    pub fn from_hardware(
        hardware: &Hardware,
        model: &ModelShape,
        precision: &Precision,
        attention: &Side,
        experts: &Side,
        transport: &str,
    ) -> Result<Self, PlanError> {
        let (_, attention_gpu) = hardware.gpu(&attention.gpu)?;
        let (_, expert_gpu) = hardware.gpu(&experts.gpu)?;
        let transport = hardware.transport(transport)?;
        let hidden = model.hidden as f64;
        let of = |gpu| hardware.efficiency_of(gpu);
        // What was measured counts for the model and the machine that it was measured on.
        let measured = |side: &Side| {
            let profile = hardware.profile.as_ref()?;
            (profile.model.name == model.name && profile.gpu == side.gpu && side.tp == 1)
                .then_some(profile)
        };
        let mut cost = Self {
            attention: AttentionCost::roofline(
                attention_gpu,
                &of(attention_gpu),
                model,
                precision,
                attention.tp,
            ),
            experts: ExpertCost::roofline(
                expert_gpu,
                &of(expert_gpu),
                model,
                precision,
                experts.tp,
            ),
            attention_link: LinkCost::new(transport, attention_gpu, attention.tp),
            expert_link: LinkCost::new(transport, expert_gpu, experts.tp),
            dispatch_row_bytes: hidden * precision.dispatch.bytes(),
            combine_row_bytes: hidden * precision.combine.bytes(),
        };
        if let Some(profile) = measured(attention) {
            cost.attention = profile.attention_cost();
        }
        if let Some(profile) = measured(experts) {
            cost.experts = profile.expert_cost();
        }
        Ok(cost)
    }

    /// T_c of one way (eq. 6), in seconds: a hop has ended when the slower side has. `attention_bytes` leave (or reach) each
    /// attention worker for (from) `expert_workers`; `expert_bytes` reach (or leave) each expert worker.
    pub fn hop_s(
        &self,
        attention_bytes: f64,
        expert_workers: usize,
        expert_bytes: f64,
        attention_workers: usize,
    ) -> f64 {
        let attention = self.attention_link.hop_s(attention_bytes, expert_workers);
        attention.max(self.expert_link.hop_s(expert_bytes, attention_workers))
    }

    /// P99 of a hop by its median: of the side with the longer tail.
    pub fn hop_tail(&self) -> f64 {
        self.attention_link.tail().max(self.expert_link.tail())
    }
}

/// Expert workers that a row of `top_k` experts visits on average, when each of them holds `held` of `experts`.
///
/// A row travels once to each worker that holds any of its experts. With one expert a worker these are K.
pub fn workers_visited(experts: usize, top_k: usize, held: usize) -> f64 {
    let workers = experts as f64 / held as f64;
    // That none of K different experts is among the `held`: a product over the K draws.
    let missed: f64 = (0..top_k)
        .map(|drawn| (experts - held).saturating_sub(drawn) as f64 / (experts - drawn) as f64)
        .product();
    workers * (1.0 - missed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mixtral_on(attention: (&str, usize), experts: (&str, usize)) -> Cost {
        let side = |(gpu, tp): (&str, usize)| Side {
            gpu: gpu.to_owned(),
            tp,
        };
        Cost::from_hardware(
            &Hardware::embedded(),
            &ModelShape::preset("mixtral-8x22b").unwrap(),
            &Precision::BF16,
            &side(attention),
            &side(experts),
            "m2n",
        )
        .unwrap()
    }

    #[test]
    fn a_row_visits_as_many_workers_as_hold_its_experts() {
        assert_eq!(workers_visited(8, 2, 1), 2.0);
        assert_eq!(workers_visited(8, 2, 8), 1.0);
        // Two of four workers, unless both experts are of the same pair: 1/7.
        assert!((workers_visited(8, 2, 2) - (2.0 - 1.0 / 7.0)).abs() < 1e-12);
    }

    #[test]
    fn an_expert_is_bound_by_reading_its_weights_until_the_batch_is_large() {
        let cost = mixtral_on(("A800", 8), ("A800", 1));
        let few = cost.experts.layer_s(&[1.0]);
        // Three matrices of 6144 x 16384 in bf16 at 80 % of 2039 GB/s, and two kernels of 3 us.
        let read = 3.0 * 6144.0 * 16384.0 * 2.0 / (0.8 * 2039e9) + 6e-6;
        assert!((few / read - 1.0).abs() < 0.01, "{few} {read}");
        assert!(cost.experts.layer_s(&[64.0]) < 1.1 * few);
        let many = cost.experts.layer_s(&[4096.0]);
        let flops = 6.0 * 6144.0 * 16384.0 * 4096.0 / (0.7 * 312e12) + 6e-6;
        assert!((many / flops - 1.0).abs() < 0.01, "{many} {flops}");
    }

    #[test]
    fn attention_reads_every_cached_token_and_its_weights_once() {
        let cost = mixtral_on(("H20", 1), ("L40S", 1));
        let token = 2.0 * 8.0 * 128.0 * 2.0 / (0.8 * 4096e9);
        let (none, some) = (
            cost.attention.layer_s(8.0, 0.0),
            cost.attention.layer_s(8.0, 1e5),
        );
        assert!(((some - none) / (1e5 * token) - 1.0).abs() < 1e-6);
        let weights = 6144.0 * (2 * (48 + 8) * 128) as f64 * 2.0 / (0.8 * 4096e9);
        assert!(none > weights && none < 2.0 * weights, "{none} {weights}");
    }

    #[test]
    fn a_hop_is_as_long_as_its_slower_side() {
        let cost = mixtral_on(("H20", 1), ("L40S", 1));
        let bytes = 100.0 * cost.dispatch_row_bytes;
        // 100 rows of 12 KiB over 100 Gb/s, and 7 us.
        let hop = cost.hop_s(bytes, 8, bytes, 2);
        assert!((hop - (100.0 * 12288.0 / 12.5e9 + 7e-6)).abs() < 1e-9);
    }
}

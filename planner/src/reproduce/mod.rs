//! The paper's evaluation (MegaScale-Infer, sections 7 and 8) from first principles: what it measured, what the performance model says, and the ratio.
//!
//! Every row comes from the same catalogue and the same [`Assumptions`]; none has a constant of its own. Where a row is off by more than a tenth, it
//! names the other reading of what the paper leaves open that brings it nearest, and every row is computed under every reading.

mod ablations;
mod assumptions;
mod baseline;
mod figures;
mod heterogeneous;
mod markdown;
mod svg;
mod testbed;

use serde::Serialize;

use crate::cost::{AttentionCost, ExpertCost};
use crate::search::{Objective, Request};
use crate::{Efficiency, Gpu, ModelShape, PlanError, Precision};

pub use assumptions::{Assumptions, Span};
pub use figures::Figure;

/// The limit of the evaluation: 150 ms between tokens.
const SLO_S: f64 = 0.15;
/// The models of the evaluation.
const MODELS: [&str; 3] = ["mixtral-8x22b", "dbrx", "scaled-moe"];
/// A row is near the paper's within this.
const NEAR: f64 = 0.1;

/// One result of the evaluation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// What the paper says.
    pub paper: f64,
    /// What the model says.
    pub ours: f64,
    /// Ours by the paper's.
    pub ratio: f64,
    /// Where that is off by more than a tenth: the ratio under the reading that brings it nearest.
    pub note: String,
    /// The ratio under each of [`Assumptions::readings`].
    pub readings: Vec<f64>,
}

impl Row {
    /// Whether it is within a tenth of the paper's.
    pub fn is_near(&self) -> bool {
        (self.ratio - 1.0).abs() <= NEAR
    }
}

/// Results as they come.
#[derive(Debug, Default)]
struct Rows(Vec<Row>);

impl Rows {
    fn add(&mut self, name: impl Into<String>, paper: f64, ours: f64) {
        self.0.push(Row {
            name: name.into(),
            paper,
            ours,
            ratio: ours / paper,
            note: String::new(),
            readings: Vec::new(),
        });
    }
}

/// All rows, and the figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Reproduction {
    /// The results.
    pub rows: Vec<Row>,
    /// The curves behind them.
    pub figures: Vec<Figure>,
}

/// Computes everything, under all readings.
///
/// # Errors
/// The embedded catalogue lacks something: a defect.
pub fn reproduce() -> Result<Reproduction, PlanError> {
    let mut all = under(&Assumptions::default())?;
    let readings = Assumptions::readings();
    for (_, reading) in &readings {
        let other = under(reading)?;
        for (row, other) in all.rows.iter_mut().zip(&other.rows) {
            row.readings.push(other.ratio);
        }
    }
    for row in all.rows.iter_mut().filter(|row| !row.is_near()) {
        let nearest = readings.iter().zip(&row.readings);
        let nearest = nearest.min_by(|a, b| a.1.ln().abs().total_cmp(&b.1.ln().abs()));
        if let Some(((reading, _), ratio)) = nearest {
            row.note = format!("{ratio:.2} if {reading}");
        }
    }
    Ok(all)
}

/// Computes everything under one reading of what the paper leaves open.
///
/// # Errors
/// The catalogue lacks something.
pub fn under(assumptions: &Assumptions) -> Result<Reproduction, PlanError> {
    let mut rows = Rows::default();
    testbed::decode(assumptions, &mut rows)?;
    let figures = vec![
        ablations::micro_batches(assumptions, &mut rows)?,
        ablations::attention_replicas(assumptions, &mut rows)?,
        heterogeneous::gains(assumptions, &mut rows)?,
    ];
    testbed::transport(assumptions, &mut rows)?;
    Ok(Reproduction {
        rows: rows.0,
        figures,
    })
}

fn request(attention: &str, experts: &str, objective: Objective) -> Request {
    Request {
        slo_s: SLO_S,
        objective,
        gpus: Some(64),
        attention_gpus: vec![attention.to_owned()],
        expert_gpus: vec![experts.to_owned()],
        attention_workers_max: 64,
    }
}

/// Tokens of prompts that are computed at once.
const PREFILL_TOKENS: f64 = 8192.0;

/// GPU-seconds in which a request's prompt is computed with kernels of efficiency `used`: every product divided over the GPUs of a server. Where one server does
/// not hold the model, layers are divided over several, which costs the same.
fn prefill_gpu_s(
    assumptions: &Assumptions,
    model: &ModelShape,
    gpu: &Gpu,
    used: &Efficiency,
) -> f64 {
    let tp = gpu.node_gpus;
    let attention = AttentionCost::roofline(gpu, used, model, &Precision::BF16, tp);
    let experts = ExpertCost::colocated(gpu, used, model, &Precision::BF16, tp);
    let visits = PREFILL_TOKENS * model.top_k as f64 / model.experts as f64;
    let layer_s =
        attention.layer_s(PREFILL_TOKENS, 0.0) + experts.even_layer_s(model.experts, visits);
    let each_s = layer_s * (model.moe_layers * tp) as f64 / PREFILL_TOKENS;
    each_s * assumptions.prompt_tokens()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_within_a_tenth_or_explained() {
        let all = reproduce().unwrap();
        assert!(all.rows.len() >= 20 && all.figures.len() == 3);
        for row in &all.rows {
            assert!(row.ours.is_finite() && row.ours > 0.0, "{row:?}");
            assert_eq!(row.readings.len(), Assumptions::readings().len());
            let within = |ratio: f64| (ratio - 1.0).abs() <= NEAR;
            assert!(
                row.is_near() || row.readings.iter().any(|&ratio| within(ratio)),
                "no reading explains {row:?}"
            );
            assert_eq!(row.is_near(), row.note.is_empty());
        }
    }

    #[test]
    fn what_the_paper_concludes_holds() {
        let all = under(&Assumptions::default()).unwrap();
        let ours = |part: &str| {
            let found: Vec<f64> = all
                .rows
                .iter()
                .filter(|r| r.name.contains(part))
                .map(|r| r.ours)
                .collect();
            assert!(!found.is_empty(), "{part}");
            found
        };
        // Disaggregation wins per GPU, per cost and per watt; m = 2 pays most, then 3, then little.
        assert!(ours("decode per").iter().all(|gain| *gain > 1.0));
        assert!(
            ours("m = 1 to 2")
                .iter()
                .zip(ours("m = 2 to 3"))
                .all(|(second, third)| *second > third)
        );
        assert!(
            ours("m = 2 to 3")
                .iter()
                .zip(ours("m = 3 to 4"))
                .all(|(third, fourth)| *third > fourth)
        );
        // The more a model sends for what it computes, the more the third micro-batch hides.
        assert!(ours("m = 2 to 3").is_sorted());
        // Beyond the peak, more attention replicas are worth less per GPU, and a step takes longer.
        let replicas = &all.figures[1];
        let at = |curve: usize, count: usize| replicas.series[curve].ours[count - 1].1;
        assert!(at(0, 12) < at(0, 8) && at(0, 16) < at(0, 12));
        assert!(at(1, 12) > at(1, 8));
    }
}

//! How throughput varies around a deployment: over attention workers, over micro-batches, over pairs of GPU types.

use volley_actors::Timeline;

use super::{Deployed, Report, Situation, Trace, Variation};
use crate::cost::Side;
use crate::plot::{Series, bars, escape, lines};
use crate::{Deployment, Hardware, PlanError};

/// Tokens that each request of a saturated run generates.
const SATURATED_OUTPUT: u32 = 24;
/// Points of a sweep over attention workers.
const SWEEP_POINTS: usize = 16;

/// Serves a batch that is full of requests that only decode.
///
/// # Errors
/// As [`Deployed::new`] and [`serve`](super::serve).
pub fn saturated(
    situation: Situation<'_>,
    deployment: &Deployment,
    seed: u64,
) -> Result<Report, PlanError> {
    let input = situation.setting.workload.mean_context().round().max(1.0) as u32;
    // A prompt is there at once and counts one row.
    let deployed = Deployed::new(
        situation,
        deployment,
        input + SATURATED_OUTPUT,
        u32::MAX / 4,
    )?;
    let batch = deployment.rows * deployment.micro_batches * deployment.attention_workers;
    let trace = Trace::burst(batch, input, SATURATED_OUTPUT)?;
    let variation = Variation {
        prefilled: true,
        seed,
        ..Variation::default()
    };
    let timeline = Timeline::new(std::iter::empty(), 0);
    deployed.serve(deployed.scheduler(), &trace, &variation, &timeline)
}

/// How throughput varies around a deployment, as a page of plots.
pub fn page(
    situation: Situation<'_>,
    deployment: &Deployment,
    report: &Report,
    seed: u64,
) -> String {
    let throughput = |deployment: &Deployment| {
        saturated(situation, deployment, seed).map_or(f64::NAN, |report| report.output_tokens_per_s)
    };
    let most = (2 * deployment.attention_workers).max(2);
    let points = (1..=most).step_by(most.div_ceil(SWEEP_POINTS));
    let over_n_a = points.map(|attention_workers| {
        let tokens = throughput(&Deployment {
            attention_workers,
            ..deployment.clone()
        });
        (attention_workers as f64, tokens)
    });
    let over_m = (1..=6).map(|micro_batches| {
        // The same sequences, divided over more micro-batches.
        let rows = (deployment.rows * deployment.micro_batches).div_ceil(micro_batches);
        let tokens = throughput(&Deployment {
            micro_batches,
            rows,
            ..deployment.clone()
        });
        (micro_batches as f64, tokens)
    });
    let (over_n_a, over_m): (Vec<_>, Vec<_>) = (over_n_a.collect(), over_m.collect());
    let per_price = pairs(situation.setting.hardware, deployment, throughput);
    let series = |name: &str, points| {
        [Series {
            name: name.to_owned(),
            points,
        }]
    };
    format!(
        concat!(
            "<!doctype html>\n<meta charset=\"utf-8\"><title>{title}</title>\n",
            "<style>body{{font-family:sans-serif;max-width:60em;margin:2em auto}}pre{{background:#f6f8fa;padding:1em}}</style>\n",
            "<h1>{title}</h1>\n<p>{words}</p>\n<pre>{report}</pre>\n",
            "<p>Below, decode throughput with full batches, each point a simulation of its own.</p>\n{n_a}{m}{pairs}"
        ),
        title = escape(&format!("{}: simulated", situation.setting.model.name)),
        words = escape(&format!(
            "{} attention workers of {} x {}, {} expert workers of {} x {}, {} micro-batches of {} sequences.",
            deployment.attention_workers,
            deployment.attention.tp,
            deployment.attention.gpu,
            deployment.expert_workers,
            deployment.experts.tp,
            deployment.experts.gpu,
            deployment.micro_batches,
            deployment.rows
        )),
        report = escape(&report.to_string()),
        n_a = lines(
            "Throughput over attention workers",
            "attention workers (n_a)",
            "tokens/s",
            &series("decode", over_n_a)
        ),
        m = lines(
            "Throughput over micro-batches, the same sequences",
            "micro-batches (m)",
            "tokens/s",
            &series("decode", over_m)
        ),
        pairs = bars(
            "Throughput per price over pairs of GPUs (attention + experts)",
            "tokens/s per price",
            &per_price
        ),
    )
}

/// Throughput by price of the same shape on every pair of GPU types, best first; those that do not fit are left out.
fn pairs(
    hardware: &Hardware,
    deployment: &Deployment,
    throughput: impl Fn(&Deployment) -> f64,
) -> Vec<(String, f64)> {
    let mut found = Vec::new();
    for (attention, attention_gpu) in &hardware.gpus {
        for (experts, expert_gpu) in &hardware.gpus {
            let side = |gpu: &String, tp| Side {
                gpu: gpu.clone(),
                tp,
            };
            let other = Deployment {
                attention: side(attention, deployment.attention.tp),
                experts: side(experts, deployment.experts.tp),
                ..deployment.clone()
            };
            let price = (deployment.attention_workers * deployment.attention.tp) as f64
                * attention_gpu.price
                + (deployment.expert_workers * deployment.experts.tp) as f64 * expert_gpu.price;
            found.push((
                format!("{attention} + {experts}"),
                throughput(&other) / price,
            ));
        }
    }
    found.retain(|(_, value)| value.is_finite());
    found.sort_by(|a, b| b.1.total_cmp(&a.1));
    found.truncate(24);
    found
}

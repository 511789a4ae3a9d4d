//! A planned deployment as a cluster to simulate, and how its throughput varies around the plan.

use serde::{Deserialize, Serialize};
use volley_actors::{FirstCome, PolicyScheduler, Scheduler, Timeline};

use super::{ClusterShape, Report, Roofline, Routing, Trace, Variation, Wire, serve};
use crate::plot::{Series, bars, escape, lines};
use crate::{Hardware, ModelShape, PlanError, Precision};

/// Tokens of a KV block; that of `serve` by default.
const BLOCK_TOKENS: u32 = 16;
/// Tokens that each request of a saturated run generates.
const SATURATED_OUTPUT: u32 = 24;
/// Points of a sweep over attention workers.
const SWEEP_POINTS: usize = 16;

/// The GPUs of one worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GpuSide {
    /// Name in the catalogue.
    pub gpu: String,
    /// How many make a worker.
    pub tp: usize,
}

/// Workers and GPUs of a deployment, as a plan names them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Layout {
    /// GPUs of an attention worker.
    pub attention: GpuSide,
    /// Attention workers (n_a).
    pub attention_workers: usize,
    /// GPUs of an expert worker.
    pub experts: GpuSide,
    /// Experts of each layer that an expert worker holds.
    pub experts_per_worker: usize,
    /// Expert workers.
    pub expert_workers: usize,
    /// Micro-batches in flight (m).
    pub micro_batches: usize,
    /// Sequences of an attention worker in one micro-batch.
    pub rows: usize,
}

/// What does not change while layouts are compared.
#[derive(Debug, Clone, Copy)]
pub struct Situation<'a> {
    /// The catalogue.
    pub hardware: &'a Hardware,
    /// The model.
    pub model: &'a ModelShape,
    /// Types of everything.
    pub precision: &'a Precision,
    /// The transport between the sides, by name.
    pub transport: &'a str,
    /// How popular each expert is.
    pub popularity: &'a [f64],
    /// Tokens in the cache of a request that decodes, where requests are alike.
    pub mean_context: f64,
}

/// A deployment, ready to be simulated.
#[derive(Debug, Clone)]
pub struct Deployed {
    /// Workers and limits.
    pub shape: ClusterShape,
    /// Who visits which expert, and where experts are.
    pub routing: Routing,
    /// What everything costs.
    pub times: Roofline,
    /// Line of the slower side, for frames.
    pub wire: Wire,
    /// Prompt tokens of a step on one worker.
    pub prefill_tokens: u32,
    /// Rows of a micro-batch before there is another.
    pub micro_batch_rows: u32,
}

impl Deployed {
    /// Of a layout; `context` is the longest sequence that comes.
    ///
    /// # Errors
    /// Something is not in the catalogue, or the memory of a worker does not hold its weights and one sequence.
    pub fn new(
        situation: Situation<'_>,
        layout: &Layout,
        context: u32,
        prefill_tokens: u32,
    ) -> Result<Self, PlanError> {
        let Situation {
            hardware,
            model,
            precision,
            transport,
            popularity,
            ..
        } = situation;
        if layout.attention.tp == 0 || layout.experts.tp == 0 {
            return Err(PlanError::invalid(
                "the deployment",
                "a worker of no GPUs",
                "give tp of at least 1",
            ));
        }
        let times = Roofline::new(hardware, model, precision, transport, layout)?;
        let routing = Routing::new(popularity, layout.expert_workers, model.top_k)?;
        let (need, have) = times.expert_memory(model.experts.div_ceil(layout.expert_workers));
        if need > have {
            return Err(PlanError::invalid(
                "the deployment",
                format!(
                    "an expert worker's weights are {:.1} GB on each GPU, which has {:.1}",
                    need / 1e9,
                    have / 1e9
                ),
                "give it more GPUs, or have more expert workers",
            ));
        }
        let blocks = times.kv_tokens() / f64::from(BLOCK_TOKENS);
        if blocks < f64::from(context.div_ceil(BLOCK_TOKENS)) {
            return Err(PlanError::invalid(
                "the deployment",
                format!(
                    "an attention worker has room for {:.0} tokens of KV cache, and a request has {context}",
                    times.kv_tokens()
                ),
                "give attention workers more GPUs, or cut the requests' lengths",
            ));
        }
        let too_many = |what: &str, count: usize| {
            PlanError::invalid(
                "the deployment",
                format!("{count} {what}"),
                "that is more than a cluster numbers",
            )
        };
        let attention_workers = u16::try_from(layout.attention_workers)
            .map_err(|_| too_many("attention workers", layout.attention_workers))?;
        let micro_batches = u8::try_from(layout.micro_batches)
            .map_err(|_| too_many("micro-batches", layout.micro_batches))?;
        let (dispatch, combine) = times.row_bytes();
        Ok(Deployed {
            shape: ClusterShape {
                attention_workers,
                micro_batches,
                layers: model.moe_layers,
                kv_blocks: blocks.min(f64::from(u32::MAX / BLOCK_TOKENS)) as u32,
                block_tokens: BLOCK_TOKENS,
                max_rows: (layout.rows as u32).saturating_add(prefill_tokens),
                context,
                max_waiting: usize::MAX,
                replicas: false,
            },
            wire: Wire {
                latency_s: times.latency_s(),
                bytes_per_s: times.bytes_per_s(),
                dispatch_row_bytes: dispatch as u64,
                combine_row_bytes: combine as u64,
            },
            times,
            routing,
            prefill_tokens,
            micro_batch_rows: 1,
        })
    }

    /// The scheduler that `serve` has by default.
    pub fn scheduler(&self) -> Box<dyn Scheduler> {
        let policy = FirstCome::new(self.prefill_tokens, self.micro_batch_rows);
        Box::new(PolicyScheduler::new(policy))
    }

    /// Serves a trace.
    ///
    /// # Errors
    /// As [`serve`].
    pub fn serve(
        &self,
        scheduler: Box<dyn Scheduler>,
        trace: &Trace,
        variation: &Variation,
        timeline: &Timeline,
    ) -> Result<Report, PlanError> {
        let (routing, times) = (self.routing.clone(), self.times.clone());
        serve(
            &self.shape,
            routing,
            times,
            scheduler,
            trace,
            variation,
            timeline,
        )
    }
}

/// Serves a batch that is full of requests that only decode.
///
/// # Errors
/// As [`Deployed::new`] and [`serve`].
pub fn saturated(
    situation: Situation<'_>,
    layout: &Layout,
    seed: u64,
) -> Result<Report, PlanError> {
    let input = situation.mean_context.round().max(1.0) as u32;
    // A prompt is there at once and counts one row.
    let deployed = Deployed::new(situation, layout, input + SATURATED_OUTPUT, u32::MAX / 4)?;
    let batch = layout.rows * layout.micro_batches * layout.attention_workers;
    let trace = Trace::burst(batch, input, SATURATED_OUTPUT)?;
    let variation = Variation {
        prefilled: true,
        seed,
        ..Variation::default()
    };
    let timeline = Timeline::new(std::iter::empty(), 0);
    deployed.serve(deployed.scheduler(), &trace, &variation, &timeline)
}

/// How throughput varies around a layout, as a page of plots.
pub fn page(situation: Situation<'_>, layout: &Layout, report: &Report, seed: u64) -> String {
    let throughput = |layout: &Layout| {
        saturated(situation, layout, seed).map_or(f64::NAN, |report| report.output_tokens_per_s)
    };
    let most = (2 * layout.attention_workers).max(2);
    let points = (1..=most).step_by(most.div_ceil(SWEEP_POINTS));
    let over_n_a = points.map(|attention_workers| {
        let tokens = throughput(&Layout {
            attention_workers,
            ..layout.clone()
        });
        (attention_workers as f64, tokens)
    });
    let over_m = (1..=6).map(|micro_batches| {
        // The same sequences, divided over more micro-batches.
        let rows = (layout.rows * layout.micro_batches).div_ceil(micro_batches);
        let tokens = throughput(&Layout {
            micro_batches,
            rows,
            ..layout.clone()
        });
        (micro_batches as f64, tokens)
    });
    let (over_n_a, over_m): (Vec<_>, Vec<_>) = (over_n_a.collect(), over_m.collect());
    let per_price = pairs(situation.hardware, layout, throughput);
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
        title = escape(&format!("{}: simulated", situation.model.name)),
        words = escape(&format!(
            "{} attention workers of {} x {}, {} expert workers of {} x {}, {} micro-batches of {} sequences.",
            layout.attention_workers,
            layout.attention.tp,
            layout.attention.gpu,
            layout.expert_workers,
            layout.experts.tp,
            layout.experts.gpu,
            layout.micro_batches,
            layout.rows
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
    layout: &Layout,
    throughput: impl Fn(&Layout) -> f64,
) -> Vec<(String, f64)> {
    let mut found = Vec::new();
    for (attention, attention_gpu) in &hardware.gpus {
        for (experts, expert_gpu) in &hardware.gpus {
            let side = |gpu: &String, tp| GpuSide {
                gpu: gpu.clone(),
                tp,
            };
            let other = Layout {
                attention: side(attention, layout.attention.tp),
                experts: side(experts, layout.experts.tp),
                ..layout.clone()
            };
            let price = (layout.attention_workers * layout.attention.tp) as f64
                * attention_gpu.price
                + (layout.expert_workers * layout.experts.tp) as f64 * expert_gpu.price;
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

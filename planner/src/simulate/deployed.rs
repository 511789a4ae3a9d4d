//! A planned deployment as a cluster to simulate.

use volley_actors::{FirstCome, PolicyScheduler, Scheduler, Timeline};

use super::{ClusterShape, Priced, Report, Routing, Trace, Variation, Wire, serve};
use crate::deployment::{Evaluator, Setting};
use crate::{Deployment, PlanError};

/// Tokens of a KV block; that of `serve` by default.
const BLOCK_TOKENS: u32 = 16;

/// What does not change while deployments are compared.
#[derive(Debug, Clone, Copy)]
pub struct Situation<'a> {
    /// Catalogue, model, types, requests and transport, as a plan has them.
    pub setting: Setting<'a>,
    /// How popular each expert is.
    pub popularity: &'a [f64],
}

/// A deployment, ready to be simulated.
#[derive(Debug, Clone)]
pub struct Deployed {
    /// Workers and limits.
    pub shape: ClusterShape,
    /// Who visits which expert, and where experts are.
    pub routing: Routing,
    /// What everything costs.
    pub times: Priced,
    /// Line of the slower side, for frames.
    pub wire: Wire,
    /// Prompt tokens of a step on one worker.
    pub prefill_tokens: u32,
    /// Rows of a micro-batch before there is another.
    pub micro_batch_rows: u32,
}

impl Deployed {
    /// Of a deployment; `context` is the longest sequence that comes.
    ///
    /// # Errors
    /// Something is not in the catalogue, or the memory of a worker does not hold its weights and one sequence.
    pub fn new(
        situation: Situation<'_>,
        deployment: &Deployment,
        context: u32,
        prefill_tokens: u32,
    ) -> Result<Self, PlanError> {
        let Setting {
            hardware, model, ..
        } = situation.setting;
        let wrong = |what: String, remedy| PlanError::invalid("the deployment", what, remedy);
        let &Deployment {
            attention_workers,
            expert_workers,
            micro_batches,
            rows,
            ..
        } = deployment;
        if deployment.attention.tp == 0 || deployment.experts.tp == 0 {
            return Err(wrong(
                "a worker of no GPUs".to_owned(),
                "give tp of at least 1",
            ));
        }
        let routing = Routing::new(situation.popularity, expert_workers, model.top_k)?;
        let evaluator = Evaluator::new(
            situation.setting,
            &deployment.attention,
            &deployment.experts,
        )?;
        let held = model.experts.div_ceil(expert_workers);
        let memory = evaluator.expert_memory(attention_workers, held, 1, 0.0);
        if memory.total() > memory.usable {
            return Err(wrong(
                format!(
                    "an expert worker's weights are {:.1} GB on each GPU, which has {:.1}",
                    memory.total() / 1e9,
                    memory.usable / 1e9
                ),
                "give it more GPUs, or have more expert workers",
            ));
        }
        let tokens = evaluator.kv_tokens(held, micro_batches, rows as f64);
        let blocks = (tokens / f64::from(BLOCK_TOKENS)).floor();
        if blocks < f64::from(context.div_ceil(BLOCK_TOKENS)) {
            return Err(wrong(
                format!(
                    "an attention worker has room for {tokens:.0} tokens of KV cache, and a request has {context}"
                ),
                "give attention workers more GPUs, or cut the requests' lengths",
            ));
        }
        let count = |what: &str, count: usize| {
            u16::try_from(count).map_err(|_| {
                wrong(
                    format!("{count} {what}"),
                    "that is more than a cluster numbers",
                )
            })
        };
        let attention_workers = count("attention workers", attention_workers)?;
        let micro_batches = count("micro-batches", micro_batches)?;
        let micro_batches = u8::try_from(micro_batches).unwrap_or(u8::MAX);
        let cost = evaluator.into_cost();
        let transport = hardware.transport(situation.setting.transport)?;
        let line = cost.attention_link.line_bytes_per_s();
        let line = line.min(cost.expert_link.line_bytes_per_s());
        Ok(Deployed {
            shape: ClusterShape {
                attention_workers,
                micro_batches,
                layers: model.moe_layers,
                kv_blocks: blocks.min(f64::from(u32::MAX / BLOCK_TOKENS)) as u32,
                block_tokens: BLOCK_TOKENS,
                max_rows: (rows as u32).saturating_add(prefill_tokens),
                context,
                max_waiting: usize::MAX,
                replicas: false,
            },
            wire: Wire {
                latency_s: transport.overhead_us * 1e-6,
                bytes_per_s: line * transport.share,
                dispatch_row_bytes: cost.dispatch_row_bytes as u64,
                combine_row_bytes: cost.combine_row_bytes as u64,
            },
            times: Priced {
                cost,
                dense_layers: model.dense_layers,
            },
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::Side;
    use crate::simulate::StageTimes;
    use crate::{Hardware, ModelShape, Precision, Workload};

    fn deployment() -> Deployment {
        let side = |tp| Side {
            gpu: "A800".to_owned(),
            tp,
        };
        Deployment {
            attention: side(8),
            attention_workers: 2,
            experts: side(1),
            experts_per_worker: 1,
            expert_workers: 8,
            micro_batches: 3,
            rows: 64,
        }
    }

    fn deploy(deployment: &Deployment, context: u32) -> Result<Deployed, PlanError> {
        let situation = Situation {
            setting: Setting {
                hardware: &Hardware::embedded(),
                model: &ModelShape::preset("mixtral-8x22b").unwrap(),
                precision: &Precision::BF16,
                workload: &Workload::PAPER,
                transport: "m2n",
            },
            popularity: &[1.0; 8],
        };
        Deployed::new(situation, deployment, context, 512)
    }

    /// The simulation asks the very model that the plan was made with.
    #[test]
    fn a_layer_takes_what_the_plan_said() {
        let (deployment, rows) = (deployment(), 64.0);
        let deployed = deploy(&deployment, 1024).unwrap();
        let hardware = Hardware::embedded();
        let setting = Setting {
            hardware: &hardware,
            model: &ModelShape::preset("mixtral-8x22b").unwrap(),
            precision: &Precision::BF16,
            workload: &Workload::PAPER,
            transport: "m2n",
        };
        let planned = deployment.outlook(setting, 0.15).unwrap().stages;
        let cached = rows * Workload::PAPER.mean_context();
        let times = &deployed.times;
        let near = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-9;
        assert!(near(times.attention_s(rows, cached), planned.attention_s));
        // 128 rows, two experts each, over eight experts.
        assert!(near(times.experts_s(&[32.0]), planned.expert_s));
        // Rows go from adapters of eight GPUs into that of one, which takes longer.
        assert!(near(times.expert_receives_s(32.0, 2), planned.dispatch_s));
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_figures() {
        let said =
            |deployment: &Deployment, context| deploy(deployment, context).unwrap_err().to_string();
        let few = Deployment {
            expert_workers: 1,
            experts_per_worker: 8,
            ..deployment()
        };
        assert!(
            said(&few, 1024)
                .contains("an expert worker's weights are 270.6 GB on each GPU, which has 72.0")
        );
        assert!(said(&deployment(), 100_000_000).contains("tokens of KV cache, and a request has"));
        let many = Deployment {
            attention_workers: 100_000,
            ..deployment()
        };
        assert!(said(&many, 1024).contains("100000 attention workers"));
    }
}

//! A plan in words and tables.

use std::fmt::Write as _;
use std::io::Write as _;

use volley_planner::colocated::{Colocated, Division};
use volley_planner::{
    Binding, Candidate, MemoryUse, Objective, Plan, PriceSource, Request, Setting,
};

use crate::failure::Failure;

/// Writes to standard output.
pub(super) fn out(text: &str) -> Result<(), Failure> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(Failure::output)
}

/// All of it.
pub(super) fn plan(setting: Setting<'_>, request: &Request, plan: &Plan) -> String {
    let mut text = String::new();
    let Candidate {
        deployment,
        outlook,
        ..
    } = &plan.best;
    let _ = writeln!(
        text,
        "{}: prompts of {:.0} + {:.0} tokens, {} between the sides, at most {:.1} ms between tokens\n",
        setting.model.name,
        setting.workload.mean_input,
        setting.workload.mean_output,
        setting.transport,
        request.slo_s * 1e3
    );
    let _ = writeln!(
        text,
        "attention        {} workers of {} x {}",
        deployment.attention_workers, deployment.attention.tp, deployment.attention.gpu
    );
    let _ = writeln!(
        text,
        "experts          {} workers of {} x {}, {} of {} experts each",
        deployment.expert_workers,
        deployment.experts.tp,
        deployment.experts.gpu,
        deployment.experts_per_worker,
        setting.model.experts
    );
    let _ = writeln!(
        text,
        "batch            {} sequences: {} micro-batches of {} on each attention worker; {:.0} rows an expert",
        deployment.batch(),
        deployment.micro_batches,
        deployment.rows,
        outlook.rows_per_expert
    );
    let stages = &outlook.stages;
    let _ = writeln!(
        text,
        "a layer          T_a {:.0} us, T_e {:.0} us, T_c {:.0} us there and {:.0} us back",
        stages.attention_s * 1e6,
        stages.expert_s * 1e6,
        stages.dispatch_s * 1e6,
        stages.combine_s * 1e6
    );
    let _ = writeln!(
        text,
        "a step           {:.2} ms; T_total {:.2} ms exactly, {:.2} ms as printed (5)",
        outlook.step_s * 1e3,
        outlook.total_s * 1e3,
        outlook.printed_total_s * 1e3
    );
    let rates = &plan.best.rates;
    let _ = writeln!(
        text,
        "delivers         {:.0} tokens/s on {} GPUs: {}",
        rates.tokens_per_s,
        rates.gpus,
        scores(&plan.best)
    );
    memory(&mut text, "attention GPU", &outlook.attention_memory);
    memory(&mut text, "expert GPU", &outlook.expert_memory);
    let _ = writeln!(
        text,
        "\n{:<34} {:>5} {:>12} {:>12} {:>8}",
        "condition", "eq.", "is", "at most", "slack"
    );
    for condition in &outlook.conditions {
        let _ = writeln!(
            text,
            "{:<34} {:>5} {:>9.2} {:<2} {:>9.2} {:<2} {:>6.0}%{}",
            condition.name,
            condition.equation,
            condition.left,
            condition.unit,
            condition.right,
            condition.unit,
            100.0 * condition.slack(),
            match (condition.holds(), condition.required) {
                (true, _) => "",
                (false, true) => "  broken",
                (false, false) => "  idles",
            }
        );
    }
    let _ = writeln!(
        text,
        "\nbinds            {}",
        match plan.best.binding {
            Binding::StepTime =>
                "the time between tokens: a larger batch would be slower than asked for",
            Binding::AttentionMemory => "memory of attention workers: a larger batch does not fit",
            Binding::ExpertMemory => "memory of expert workers: a larger batch does not fit",
        }
    );
    if !plan.runners_up.is_empty() {
        let _ = writeln!(text, "\nrunners-up");
        for runner in &plan.runners_up {
            let d = &runner.deployment;
            let _ = writeln!(
                text,
                "  {:>5.1}%  {} x {} {} + {} x {} {}, m = {}, B = {}, step {:.1} ms",
                100.0 * runner.rates.score(request.objective) / rates.score(request.objective),
                d.attention_workers,
                d.attention.tp,
                d.attention.gpu,
                d.expert_workers,
                d.experts.tp,
                d.experts.gpu,
                d.micro_batches,
                d.batch(),
                runner.outlook.step_s * 1e3
            );
        }
    }
    match &plan.colocated {
        Some(best) => colocated(&mut text, request.objective, best, plan),
        None => text += "\ncolocated        fits no GPU allowed\n",
    }
    fleet(&mut text, plan);
    let estimated = [&deployment.attention.gpu, &deployment.experts.gpu];
    let estimated: Vec<&str> = estimated
        .into_iter()
        .filter(|name| {
            let gpu = setting.hardware.gpus.get(name.as_str());
            gpu.is_some_and(|gpu| gpu.price_source == PriceSource::Estimate)
        })
        .map(String::as_str)
        .collect();
    if request.objective == Objective::ThroughputPerCost && !estimated.is_empty() {
        let _ = writeln!(
            text,
            "\nThe price of {} is a guess of the catalogue: put your own into --hardware.",
            estimated.join(" and ")
        );
    }
    text
}

fn scores(candidate: &Candidate) -> String {
    let score = |objective| candidate.rates.score(objective);
    format!(
        "{:.0} a GPU, {:.0} by price, {:.2} a watt",
        score(Objective::PerGpu),
        score(Objective::ThroughputPerCost),
        score(Objective::PerWatt)
    )
}

fn memory(text: &mut String, name: &str, used: &MemoryUse) {
    let gb = |bytes: f64| bytes / 1e9;
    let _ = writeln!(
        text,
        "{name:<16} {:.1} of {:.1} GB: weights {:.1}, KV {:.1}, slots {:.2}, scratch {:.2}",
        gb(used.total()),
        gb(used.usable),
        gb(used.weights),
        gb(used.kv),
        gb(used.slots),
        gb(used.scratch)
    );
}

fn colocated(text: &mut String, objective: Objective, best: &Colocated, plan: &Plan) {
    let ratio = plan.best.rates.score(objective) / best.rates.score(objective);
    let division = match best.division {
        Division::Tensors { stages: 1 } => "tensors divided".to_owned(),
        Division::Tensors { stages } => {
            format!("tensors divided, layers in {stages} stages of a pipeline")
        }
        Division::Experts { tp, micro_batches } => {
            format!("experts divided, attention in groups of {tp}, {micro_batches} micro-batches")
        }
    };
    let _ = writeln!(
        text,
        "\ncolocated        {} x {} ({division}), B = {}, step {:.1} ms: {:.0} tokens/s",
        best.gpus,
        best.gpu,
        best.batch,
        best.step_s * 1e3,
        best.rates.tokens_per_s
    );
    let _ = if plan.disaggregate {
        writeln!(
            text,
            "verdict          disaggregate: {ratio:.2} x the best colocated plan"
        )
    } else {
        writeln!(
            text,
            "verdict          do not disaggregate: the best colocated plan makes {:.2} x of this",
            1.0 / ratio
        )
    };
}

fn fleet(text: &mut String, plan: &Plan) {
    if plan.fleet.is_empty() {
        return;
    }
    let _ = writeln!(text, "\nfleet");
    for share in &plan.fleet {
        let d = &share.candidate.deployment;
        let _ = writeln!(
            text,
            "  {:>4} x ({} x {} {} + {} x {} {}): {:.0} tokens/s on {} GPUs",
            share.replicas,
            d.attention_workers,
            d.attention.tp,
            d.attention.gpu,
            d.expert_workers,
            d.experts.tp,
            d.experts.gpu,
            share.replicas as f64 * share.candidate.rates.tokens_per_s,
            share.replicas * share.candidate.rates.gpus
        );
    }
}

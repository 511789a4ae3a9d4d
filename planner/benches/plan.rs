//! How long a plan takes: 10,000 GPUs of 12 types. `cargo bench -p volley-planner`.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use volley_planner::{
    Hardware, ModelShape, Objective, Precision, Request, Setting, Workload, plan,
};

fn plans(criterion: &mut Criterion) {
    let mut hardware = Hardware::embedded();
    // The catalogue has eleven; a twelfth is an H100 with more memory.
    let mut twelfth = hardware.gpus["H100"].clone();
    twelfth.memory_gb = 94.0;
    hardware.gpus.insert("H100-NVL".to_owned(), twelfth);
    let request = Request {
        slo_s: 0.15,
        objective: Objective::ThroughputPerCost,
        gpus: Some(10_000),
        attention_gpus: Vec::new(),
        expert_gpus: Vec::new(),
        attention_workers_max: 1024,
    };
    let mut group = criterion.benchmark_group("10,000 GPUs of 12 types");
    group.sample_size(10);
    for name in [
        "mixtral-8x22b",
        "dbrx",
        "scaled-moe",
        "qwen3-30b-a3b",
        "deepseek-v3",
    ] {
        let model = ModelShape::preset(name).expect("a preset");
        let setting = Setting {
            hardware: &hardware,
            model: &model,
            precision: &Precision::BF16,
            workload: &Workload::PAPER,
            transport: "m2n",
        };
        group.bench_function(name, |bencher| {
            bencher.iter(|| plan(black_box(setting), &request).expect("a plan"));
        });
    }
    group.finish();
}

criterion_group!(benches, plans);
criterion_main!(benches);

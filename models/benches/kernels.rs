//! Speed of the kernels on one core, at the sizes of a middling Mixtral (hidden 1024, 16/4 heads of 64, experts of 1792).
//!
//! `cargo bench -p volley-models --bench kernels -- [FILTER]`. Weights rotate over 256 MiB, so that each product streams
//! them from memory as a model does. Behind each rate stands its share of what one core can do at most, measured when the benches begin: the larger of
//! the two is the kernel's share of its floor.

#![allow(unsafe_code)]

use std::borrow::Cow;
use std::hint::black_box;
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use volley_models::kernels::{
    Arena, AttentionScratch, Isa, KvSlice, MatrixMut, PackedMatrix, PackedRows, PagedAttention,
    Rows, Span, Start, WeightType, gemm,
};
use volley_models::{
    Activation, Architecture, AttentionModule, AttentionOptions, ComputeType, ElementType,
    ExpertModule, ExpertOptions, FfnKind, LayerSpec, MatrixView, Member, ModelSpec, Norm,
    Quantization, Rope, RopeScaling, SequenceSlice, SpecialTokens, TensorId, WeightError,
    WeightSource,
};

#[path = "support/peaks.rs"]
mod peaks;

/// Bytes of weights that products rotate over: well beyond any cache.
const ROTATION_BYTES: usize = 256 << 20;

fn values(len: usize) -> Vec<f32> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..len).map(|_| next() * 0.1).collect()
}

fn view(rows: usize, cols: usize) -> MatrixView<'static> {
    MatrixView {
        data: Cow::Owned(
            values(rows * cols)
                .iter()
                .flat_map(|x| x.to_le_bytes())
                .collect(),
        ),
        element: ElementType::F32,
        rows,
        cols,
        row_stride: cols,
        col_stride: 1,
    }
}

/// What one core can do at most: bytes a nanosecond, and operations a nanosecond of each kind.
struct Floors {
    reads: f64,
    rates: Vec<(&'static str, f64)>,
}

static FLOORS: LazyLock<Floors> = LazyLock::new(|| {
    let best = |work: &dyn Fn()| {
        let times = (0..8).map(|_| {
            let begin = thread_time();
            work();
            thread_time() - begin
        });
        times.min().unwrap_or_default().as_nanos().max(1) as f64
    };
    let mut crew = Member::alone();
    let mut arena = Arena::new(ROTATION_BYTES, &mut crew);
    let mut words = arena.block(ROTATION_BYTES / 4);
    words.iter_mut().zip(0..).for_each(|(word, i)| *word = i);
    let reads = ROTATION_BYTES as f64 / best(&|| _ = black_box(peaks::read(&words)));
    let rate = |work: fn() -> f32| peaks::OPERATIONS as f64 / best(&|| _ = black_box(work()));
    let rates = peaks::peaks().into_iter();
    let floors = Floors {
        reads,
        rates: rates.map(|(name, work)| (name, rate(work))).collect(),
    };
    let Floors { reads, rates } = &floors;
    println!("floors of one core: reads {reads:.1} GB/s, operations {rates:.0?} G/s");
    floors
});

/// The rate that the current group is held against.
static RATE: Mutex<&str> = Mutex::new("f32");

/// Says that the products that follow are of this kind; where the processor has none, they are done in f32.
fn held_against(kind: &'static str) {
    *RATE.lock().expect("no bench panics while it holds it") = kind;
}

/// As criterion's own, with rates of operations and the share of the floor.
struct Shares;

impl ValueFormatter for Shares {
    fn scale_values(&self, typical: f64, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_values(typical, values)
    }
    fn scale_for_machines(&self, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_for_machines(values)
    }
    fn scale_throughputs(
        &self,
        typical: f64,
        throughput: &Throughput,
        values: &mut [f64],
    ) -> &'static str {
        WallTime
            .formatter()
            .scale_throughputs(typical, throughput, values)
    }
    fn format_throughput(&self, throughput: &Throughput, ns: f64) -> String {
        let Floors { reads, rates } = &*FLOORS;
        match *throughput {
            Throughput::Elements(operations) => {
                let kind = *RATE.lock().expect("no bench panics while it holds it");
                let of = |kind| rates.iter().find(|(name, _)| *name == kind);
                let most = of(kind).or(of("f32")).map_or(f64::NAN, |(_, rate)| *rate);
                let rate = operations as f64 / ns;
                format!("{rate:.1} Gop/s, {:.2} of the rate", rate / most)
            }
            Throughput::Bytes(bytes) => {
                let rate = bytes as f64 / ns;
                format!("{rate:.1} GB/s, {:.2} of the reads", rate / reads)
            }
            _ => WallTime.formatter().format_throughput(throughput, ns),
        }
    }
}

/// Time this thread was on a core. The kernels use one thread, and a machine that also builds would be measured otherwise.
struct ThreadTime;

#[cfg(unix)]
fn thread_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the clock exists on every Unix, and `time` is there to be written.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(not(unix))]
fn thread_time() -> Duration {
    static BEGIN: std::sync::LazyLock<std::time::Instant> =
        std::sync::LazyLock::new(std::time::Instant::now);
    BEGIN.elapsed()
}

impl Measurement for ThreadTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        thread_time()
    }
    fn end(&self, begin: Duration) -> Duration {
        thread_time() - begin
    }
    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }
    fn zero(&self) -> Duration {
        Duration::ZERO
    }
    fn to_f64(&self, value: &Duration) -> f64 {
        value.as_nanos() as f64
    }
    fn formatter(&self) -> &dyn ValueFormatter {
        &Shares
    }
}

fn quick<'a>(
    criterion: &'a mut Criterion<ThreadTime>,
    name: &str,
) -> BenchmarkGroup<'a, ThreadTime> {
    let mut group = criterion.benchmark_group(name);
    group
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800));
    group
}

fn products(criterion: &mut Criterion<ThreadTime>) {
    let isa = Isa::detect();
    for kind in WeightType::ALL {
        let name = format!("{kind:?}").to_lowercase();
        held_against(match kind {
            WeightType::Bf16 => "bf16",
            WeightType::Q8 | WeightType::Q4 => "int8",
            _ => "f32",
        });
        let mut group = quick(criterion, &format!("gemm/{name}"));
        for (n, k) in [(1024, 1024), (3584, 1024), (1024, 1792), (8192, 1024)] {
            let one = PackedMatrix::bytes(kind, n, k).expect("small");
            let copies = ROTATION_BYTES / one;
            let mut crew = Member::alone();
            let mut arena = Arena::new(one * copies, &mut crew);
            let view = view(n, k);
            let weights: Vec<_> = (0..copies)
                .map(|_| PackedMatrix::pack(&mut arena, kind, std::slice::from_ref(&view)))
                .collect();
            for m in [1, 8, 32, 128] {
                let x = values(m * k);
                let mut rows = PackedRows::new(isa, m, k);
                let mut out = vec![0.0; m * n];
                let mut turn = 0;
                group.throughput(Throughput::ElementsAndBytes {
                    elements: (2 * m * n * k) as u64,
                    bytes: one as u64,
                });
                group.bench_function(BenchmarkId::new(format!("{n}x{k}"), m), |bencher| {
                    bencher.iter(|| {
                        let w = &weights[turn % copies];
                        turn += 1;
                        rows.pack(kind, Rows::F32(&x), m, k);
                        gemm(
                            &rows,
                            w,
                            0..w.panels(),
                            MatrixMut::new(&mut out, m, n, n),
                            Start::Zero,
                        );
                        black_box(&mut out);
                    });
                });
            }
        }
        group.finish();
    }
}

/// Weights without a checkpoint: one matrix of each shape, for every role.
struct Source(ModelSpec);

impl WeightSource for Source {
    fn spec(&self) -> &ModelSpec {
        &self.0
    }

    fn tensor(&self, id: TensorId) -> Result<MatrixView<'_>, WeightError> {
        use volley_models::{DenseTensor::*, ExpertTensor};
        let spec = &self.0;
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        Ok(match id {
            TensorId::Embedding | TensorId::Head => view(spec.vocab, spec.hidden),
            TensorId::Dense(_, Query) => view(q, spec.hidden),
            TensorId::Dense(_, Key | Value) => view(kv, spec.hidden),
            TensorId::Dense(_, Output) => view(spec.hidden, q),
            TensorId::Dense(_, Router) => view(spec.experts, spec.hidden),
            TensorId::Expert(_, _, ExpertTensor::Down) => view(spec.hidden, spec.expert_hidden),
            TensorId::Expert(..) => view(spec.expert_hidden, spec.hidden),
            TensorId::FinalNorm | TensorId::Dense(..) => view(1, spec.hidden),
        })
    }
}

fn mid_mixtral(layers: usize) -> Source {
    Source(ModelSpec {
        architecture: Architecture::Mixtral,
        hidden: 1024,
        vocab: 8192,
        max_positions: 8192,
        heads: 16,
        kv_heads: 4,
        head_dim: 64,
        experts: 8,
        top_k: 2,
        expert_hidden: 1792,
        normalize_top_k: true,
        layers: vec![
            LayerSpec {
                ffn: FfnKind::Experts
            };
            layers
        ],
        norm: Norm::Rms { eps: 1e-5 },
        rope: Rope {
            theta: 1e6,
            scaling: RopeScaling::None,
        },
        qk_norm: false,
        clip_qkv: None,
        attention_bias: false,
        sliding_window: None,
        activation: Activation::Silu,
        tied_embeddings: false,
        special: SpecialTokens::default(),
        stored_as: None,
    })
}

fn experts(criterion: &mut Criterion<ThreadTime>) {
    let isa = Isa::detect();
    let layers = 3;
    let mut source = mid_mixtral(layers);
    let (hidden, width) = (1024, 1792);
    for (name, dtype, stored_as, quantize) in [
        ("f32", ComputeType::F32, ElementType::F32, None),
        ("f16", ComputeType::F32, ElementType::F16, None),
        ("bf16", ComputeType::Bf16, ElementType::F32, None),
        (
            "q8",
            ComputeType::Bf16,
            ElementType::F32,
            Some(Quantization::Q8),
        ),
        (
            "q4",
            ComputeType::Bf16,
            ElementType::F32,
            Some(Quantization::Q4),
        ),
    ] {
        held_against(match (dtype, quantize) {
            (_, Some(_)) => "int8",
            (ComputeType::Bf16, None) => "bf16",
            (ComputeType::F32, None) => "f32",
        });
        let mut group = quick(criterion, &format!("experts/{name}"));
        source.0.stored_as = Some(stored_as);
        let options = ExpertOptions {
            dtype,
            quantize,
            isa,
            max_rows: 256,
        };
        let memory = ExpertModule::memory(&source.0, 8, options).expect("small");
        let mut module = ExpertModule::load(
            &source,
            &[0, 1, 2, 3, 4, 5, 6, 7],
            options,
            Member::alone(),
            &mut |_| (),
        )
        .expect("the source has all");
        for rows_per_expert in [1, 2, 8, 32] {
            let rows = 8 * rows_per_expert;
            let offsets: Vec<u32> = (0..=8).map(|e| (e * rows_per_expert) as u32).collect();
            let x = values(rows * hidden);
            let mut out = vec![0.0; rows * hidden];
            let mut turn = 0;
            group.throughput(Throughput::ElementsAndBytes {
                elements: (2 * rows * 3 * hidden * width) as u64,
                bytes: (memory.weights / layers) as u64,
            });
            group.bench_function(BenchmarkId::new("8 experts", rows_per_expert), |bencher| {
                bencher.iter(|| {
                    turn += 1;
                    module
                        .forward(
                            turn % layers,
                            &[0, 1, 2, 3, 4, 5, 6, 7],
                            &offsets,
                            Rows::F32(&x),
                            &mut out,
                        )
                        .expect("the groups are those of the rows");
                });
            });
        }
        group.finish();
    }
}

fn paged_attention(criterion: &mut Criterion<ThreadTime>) {
    let isa = Isa::detect();
    let (heads, kv_heads, head_dim, block_tokens) = (16, 4, 64, 16);
    // The cache may be bf16; scores and sums are f32.
    held_against("f32");
    for dtype in [ComputeType::F32, ComputeType::Bf16] {
        let mut group = quick(criterion, &format!("attention/{dtype}"));
        // A decode reads its whole context once; a prefill of 128 rows shares what it reads.
        for (name, rows, context) in [
            ("decode", 1, 512),
            ("decode", 1, 4096),
            ("prefill", 128, 128),
            ("prefill", 128, 4096),
        ] {
            let sequences = if rows == 1 { 32 } else { 1 };
            let blocks = sequences * context / block_tokens;
            let elements = blocks * block_tokens * kv_heads * head_dim;
            let wide = values(elements);
            let bits: Vec<u16> = wide
                .iter()
                .map(|x| half::bf16::from_f32(*x).to_bits())
                .collect();
            // In huge pages, as the module's cache is.
            let mut crew = Member::alone();
            let mut arena = Arena::new(8 * elements, &mut crew);
            let blocks_of_both = [(); 2].map(|()| {
                let mut block = arena.block(elements * dtype.bytes() / 4);
                match dtype {
                    ComputeType::F32 => bytemuck::cast_slice_mut(&mut block).copy_from_slice(&wide),
                    ComputeType::Bf16 => {
                        bytemuck::cast_slice_mut(&mut block).copy_from_slice(&bits)
                    }
                }
                block
            });
            let [keys, cached_values] = blocks_of_both.each_ref().map(|block| match dtype {
                ComputeType::F32 => KvSlice::F32(bytemuck::cast_slice(block)),
                ComputeType::Bf16 => KvSlice::Bf16(bytemuck::cast_slice(block)),
            });
            let queries = values(sequences * rows * heads * head_dim);
            let table: Vec<u32> = (0..blocks as u32).collect();
            let mut scratch = AttentionScratch::new(rows, heads / kv_heads, head_dim);
            let mut out = vec![0.0; rows * heads * head_dim];
            let paged = PagedAttention {
                queries: &queries,
                query_stride: heads * head_dim,
                keys,
                values: cached_values,
                block_tokens,
                heads,
                kv_heads,
                head_dim,
                window: None,
                scale: 0.125,
            };
            let seen: usize = (context - rows + 1..=context).sum();
            group.throughput(Throughput::ElementsAndBytes {
                elements: (sequences * seen * heads * head_dim * 4) as u64,
                bytes: (2 * elements * dtype.bytes()) as u64,
            });
            group.bench_function(BenchmarkId::new(name, context), |bencher| {
                bencher.iter(|| {
                    for sequence in 0..sequences {
                        let span = Span {
                            first_row: sequence * rows,
                            rows,
                            start: context - rows,
                            blocks: &table[sequence * context / block_tokens..],
                        };
                        let width = heads * head_dim;
                        paged.run(
                            isa,
                            span,
                            0..kv_heads,
                            &mut scratch,
                            MatrixMut::new(&mut out, rows, width, width),
                        );
                    }
                });
            });
        }
        group.finish();
    }
}

fn attention_module(criterion: &mut Criterion<ThreadTime>) {
    let isa = Isa::detect();
    let layers = 8;
    let source = mid_mixtral(layers);
    for dtype in [ComputeType::F32, ComputeType::Bf16] {
        held_against(match dtype {
            ComputeType::F32 => "f32",
            ComputeType::Bf16 => "bf16",
        });
        let mut group = quick(criterion, &format!("attention-module/{dtype}"));
        let options = AttentionOptions {
            dtype,
            quantize: None,
            isa,
            kv_blocks: 1024,
            block_tokens: 16,
            max_rows: 128,
            micro_batches: 1,
            seats: 1,
        };
        let mut module = AttentionModule::load(&source, options, Member::alone(), &mut |_| ())
            .expect("the source has all");
        let mut acts = module.activations();
        let tables: Vec<Vec<u32>> = (0..32).map(|s| (s * 16..s * 16 + 16).collect()).collect();
        let tokens = vec![7u32; 128];
        let weights = 1024 * (1024 + 2 * 256 + 1024) + 8 * 1024;
        for (name, sequences, rows, start) in [
            ("decode", 1, 1, 128),
            ("decode", 8, 1, 128),
            ("decode", 32, 1, 128),
            ("prefill", 1, 128, 0),
        ] {
            let batch: Vec<SequenceSlice<'_>> = (0..sequences)
                .map(|s| SequenceSlice {
                    tokens: &tokens[..rows],
                    start,
                    blocks: &tables[s],
                })
                .collect();
            module
                .begin(&mut acts, batch.iter().copied())
                .expect("the batch is within bounds");
            module.embed(&mut acts);
            group.throughput(Throughput::ElementsAndBytes {
                elements: (2 * sequences * rows * weights) as u64,
                bytes: (weights * dtype.bytes()) as u64,
            });
            let mut turn = 0;
            group.bench_function(BenchmarkId::new(name, sequences), |bencher| {
                bencher.iter(|| {
                    turn += 1;
                    module.attention(turn % layers, &mut acts);
                });
            });
        }
        group.finish();
    }
}

/// Reading a stored matrix into each type, as loading a model does. Bytes are those of the stored bf16.
fn packing(criterion: &mut Criterion<ThreadTime>) {
    LazyLock::force(&FLOORS);
    let (n, k) = (3584, 1024);
    let stored = MatrixView {
        data: Cow::Owned(
            values(n * k)
                .iter()
                .flat_map(|x| half::bf16::from_f32(*x).to_le_bytes())
                .collect(),
        ),
        element: ElementType::Bf16,
        ..view(n, k)
    };
    let mut group = quick(criterion, "pack");
    group.throughput(Throughput::Bytes((2 * n * k) as u64));
    for kind in WeightType::ALL {
        let bytes = PackedMatrix::bytes(kind, n, k).expect("small");
        let name = format!("bf16 to {kind:?}").to_lowercase();
        group.bench_function(name, |bencher| {
            let mut crew = Member::alone();
            bencher.iter_custom(|rounds| {
                let mut time = Duration::ZERO;
                for _ in 0..rounds {
                    let mut arena = Arena::new(bytes, &mut crew);
                    let begin = thread_time();
                    PackedMatrix::pack(&mut arena, kind, std::slice::from_ref(&stored));
                    time += thread_time() - begin;
                }
                time
            });
        });
    }
    group.finish();
}

criterion_group!(
    name = benches;
    config = Criterion::default().with_measurement(ThreadTime).without_plots();
    targets = packing, products, experts, paged_attention, attention_module
);
criterion_main!(benches);

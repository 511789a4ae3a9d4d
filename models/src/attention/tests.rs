//! The modules against the reference, and against themselves in other company.

use super::activations::SpanRecord;
use super::*;
use crate::crew::Crew;
use crate::expert::{ExpertModule, ExpertOptions};
use crate::kernels::Isa;
use crate::reference::ReferenceModel;
use crate::testing::{Random, RandomWeights, dbrx, mixtral, qwen3_moe};
use crate::weights::ElementType;

/// Attention, experts on two workers, and a local combine in top-k order.
struct Model {
    attention: AttentionModule,
    workers: [ExpertModule; 2],
}

/// What a model computes in.
#[derive(Debug, Clone, Copy)]
struct Precision(ComputeType, Option<Quantization>);

impl From<ComputeType> for Precision {
    fn from(dtype: ComputeType) -> Self {
        Precision(dtype, None)
    }
}

impl Model {
    fn new(
        source: &RandomWeights,
        isa: Isa,
        precision: impl Into<Precision>,
        block_tokens: usize,
    ) -> Self {
        Self::with(source, isa, precision, block_tokens, &mut Member::alone)
    }

    /// As `new`, with members of a crew.
    fn with(
        source: &RandomWeights,
        isa: Isa,
        precision: impl Into<Precision>,
        block_tokens: usize,
        member: &mut dyn FnMut() -> Member,
    ) -> Self {
        let Precision(dtype, quantize) = precision.into();
        let options = AttentionOptions {
            quantize,
            dtype,
            isa,
            kv_blocks: 256 / block_tokens,
            block_tokens,
            max_rows: 64,
            micro_batches: 2,
            seats: 1,
        };
        let experts = source.spec.experts as u16;
        let mut worker = |parity| {
            let owned: Vec<u16> = (0..experts).filter(|e| e % 2 == parity).collect();
            let options = ExpertOptions {
                quantize,
                dtype,
                isa,
                max_rows: 7,
            };
            ExpertModule::load(source, &owned, options, member(), &mut |_| ()).unwrap()
        };
        let workers = [worker(0), worker(1)];
        Model {
            attention: AttentionModule::load(source, options, member(), &mut |_| ()).unwrap(),
            workers,
        }
    }

    /// One step; logits of every row.
    fn step(&mut self, batch: &[SequenceSlice<'_>]) -> Vec<f32> {
        let spec = self.attention.spec().clone();
        let mut acts = self.attention.activations();
        self.attention
            .begin(&mut acts, batch.iter().copied())
            .unwrap();
        self.attention.embed(&mut acts);
        for layer in 0..spec.layers.len() {
            self.attention.attention(layer, &mut acts);
            if spec.layers[layer].ffn == FfnKind::Experts {
                let out = self.experts(layer, &spec, &acts);
                self.attention.add_ffn(&mut acts, &out);
            }
        }
        let rows: Vec<u32> = (0..acts.rows() as u32).collect();
        let mut logits = vec![0.0; rows.len() * spec.vocab];
        self.attention.logits(&acts, &rows, &mut logits).unwrap();
        logits
    }

    fn experts(&mut self, layer: usize, spec: &ModelSpec, acts: &Activations) -> Vec<f32> {
        let (hidden, k) = (spec.hidden, spec.top_k);
        let mut returned = vec![vec![]; acts.rows() * k];
        for worker in &mut self.workers {
            let (mut offsets, mut visits) = (vec![0], vec![]);
            let experts: Vec<u16> = worker.experts().collect();
            for expert in &experts {
                visits.extend(
                    (0..acts.rows() * k).filter(|visit| acts.expert_ids()[*visit] == *expert),
                );
                offsets.push(visits.len() as u32);
            }
            let mut out = vec![0.0; visits.len() * hidden];
            match acts.ffn_input_bf16() {
                Some(input) => {
                    let x: Vec<u16> = visits
                        .iter()
                        .flat_map(|v| &input[v / k * hidden..][..hidden])
                        .copied()
                        .collect();
                    worker
                        .forward(layer, &experts, &offsets, Rows::Bf16(&x), &mut out)
                        .unwrap();
                }
                None => {
                    let input = acts.ffn_input();
                    let x: Vec<f32> = visits
                        .iter()
                        .flat_map(|v| &input[v / k * hidden..][..hidden])
                        .copied()
                        .collect();
                    worker
                        .forward(layer, &experts, &offsets, Rows::F32(&x), &mut out)
                        .unwrap();
                }
            }
            for (visit, out) in visits.iter().zip(out.chunks(hidden)) {
                returned[*visit] = out.to_vec();
            }
        }
        let mut sums = vec![0.0; acts.rows() * hidden];
        for (visit, out) in returned.iter().enumerate() {
            let weight = acts.expert_weights()[visit];
            for (sum, x) in sums[visit / k * hidden..][..hidden].iter_mut().zip(out) {
                *sum += weight * x;
            }
        }
        sums
    }
}

fn tokens(seed: u64, n: usize) -> Vec<u32> {
    let mut random = Random::new(seed);
    (0..n).map(|_| (random.next() % 97) as u32).collect()
}

fn slice<'a>(tokens: &'a [u32], start: u32, blocks: &'a [u32]) -> SequenceSlice<'a> {
    SequenceSlice {
        tokens,
        start,
        blocks,
    }
}

fn specs() -> [ModelSpec; 4] {
    let odd_head = ModelSpec {
        head_dim: 10,
        sliding_window: Some(1),
        ..mixtral()
    };
    [mixtral(), qwen3_moe(), dbrx(), odd_head]
}

/// Root of the mean square of the difference over that of `b`.
fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (difference / b.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}

#[test]
fn every_model_is_the_reference_in_f32() {
    for spec in specs() {
        let source = RandomWeights {
            spec,
            element: ElementType::F32,
            seed: 11,
        };
        let prompt = tokens(1, 53);
        let expected = ReferenceModel::new(&source).forward(&prompt).unwrap();
        for isa in Isa::available() {
            let mut model = Model::new(&source, isa, ComputeType::F32, 16);
            let logits = model.step(&[slice(&prompt, 0, &[3, 0, 2, 9])]);
            let worst = logits
                .iter()
                .zip(&expected)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            let error = relative_error(&logits, &expected);
            println!(
                "{:?} {isa:?}: worst {worst:.1e}, relative {error:.1e}",
                source.spec.architecture
            );
            assert!(
                worst < 1e-4,
                "{:?} {isa:?}: {worst}",
                source.spec.architecture
            );
        }
    }
}

#[test]
fn every_model_is_near_the_reference_in_bf16() {
    for spec in specs() {
        // Every expert is visited: rounding may tip the choice between two that are nearly as probable, which is not an
        // error of the kernels but would show as one.
        let spec = ModelSpec {
            top_k: spec.experts,
            ..spec
        };
        let source = RandomWeights {
            spec,
            element: ElementType::Bf16,
            seed: 12,
        };
        let prompt = tokens(2, 40);
        let expected = ReferenceModel::new(&source).forward(&prompt).unwrap();
        for isa in Isa::available() {
            let mut model = Model::new(&source, isa, ComputeType::Bf16, 16);
            let logits = model.step(&[slice(&prompt, 0, &[3, 0, 2])]);
            let error = relative_error(&logits, &expected);
            println!(
                "{:?} {isa:?}: relative {error:.1e}",
                source.spec.architecture
            );
            assert!(
                error < 0.04,
                "{:?} {isa:?}: {error}",
                source.spec.architecture
            );
        }
    }
}

/// The spec of a checkpoint that is stored in a type.
fn stored_as(spec: &ModelSpec, element: ElementType) -> ModelSpec {
    ModelSpec {
        stored_as: Some(element),
        ..spec.clone()
    }
}

#[test]
fn every_model_is_near_the_reference_with_quantised_weights() {
    for spec in specs() {
        let spec = ModelSpec {
            top_k: spec.experts, // as above
            ..spec
        };
        let source = RandomWeights {
            spec,
            element: ElementType::F32,
            seed: 12,
        };
        let prompt = tokens(2, 40);
        let expected = ReferenceModel::new(&source).forward(&prompt).unwrap();
        for isa in Isa::available() {
            for (quantization, limit) in [(Quantization::Q8, 0.1), (Quantization::Q4, 0.25)] {
                let precision = Precision(ComputeType::F32, Some(quantization));
                let mut model = Model::new(&source, isa, precision, 16);
                let logits = model.step(&[slice(&prompt, 0, &[3, 0, 2])]);
                let error = relative_error(&logits, &expected);
                println!(
                    "{:?} {isa:?} {quantization}: relative {error:.1e}",
                    source.spec.architecture
                );
                assert!(error < limit, "{isa:?} {quantization}: {error}");
            }
        }
    }
}

#[test]
fn weights_kept_in_f16_give_the_bits_of_f32_from_half_the_memory() {
    for spec in specs() {
        let prompt = tokens(5, 21);
        let of = |stored: ElementType| {
            let source = RandomWeights {
                spec: stored_as(&spec, stored),
                element: ElementType::F16,
                seed: 15,
            };
            let mut model = Model::new(&source, Isa::detect(), ComputeType::F32, 16);
            let bytes = AttentionModule::memory(&source.spec, model.attention.options);
            let logits = model.step(&[slice(&prompt, 0, &[0, 1])]);
            (logits, bytes.unwrap().weights)
        };
        let (half, wide) = (of(ElementType::F16), of(ElementType::F32));
        assert!(half.0 == wide.0);
        assert!(half.1 < wide.1 * 3 / 4, "{} of {}", half.1, wide.1);
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_chunks_blocks_and_company() {
    let others = tokens(8, 30);
    for spec in specs() {
        for (element, dtype) in [
            (ElementType::F32, ComputeType::F32.into()),
            (ElementType::F16, ComputeType::F32.into()),
            (ElementType::Bf16, ComputeType::Bf16.into()),
            (
                ElementType::F32,
                Precision(ComputeType::F32, Some(Quantization::Q8)),
            ),
            (
                ElementType::Bf16,
                Precision(ComputeType::Bf16, Some(Quantization::Q4)),
            ),
        ] {
            let source = RandomWeights {
                spec: stored_as(&spec, element),
                element,
                seed: 13,
            };
            let prompt = tokens(3, 37);
            for isa in Isa::available() {
                let whole =
                    Model::new(&source, isa, dtype, 16).step(&[slice(&prompt, 0, &[0, 1, 2])]);

                let mut model = Model::new(&source, isa, dtype, 16);
                let table = [5, 3, 11];
                let mut logits = model.step(&[slice(&prompt[..16], 0, &table[..1])]);
                logits.extend(model.step(&[slice(&prompt[16..], 16, &table)]));
                assert!(
                    logits == whole,
                    "{:?} {isa:?} {dtype:?}: 16 + 21",
                    spec.architecture
                );

                let mut logits = vec![];
                for (position, token) in prompt.iter().enumerate() {
                    logits.extend(model.step(&[slice(&[*token], position as u32, &[7, 8, 9])]));
                }
                assert!(
                    logits == whole,
                    "{:?} {isa:?} {dtype:?}: one by one",
                    spec.architecture
                );

                // In company: a prompt before, a decode behind, larger blocks, and 5 + 32 tokens.
                let mut model = Model::new(&source, isa, dtype, 32);
                let vocab = spec.vocab;
                let first =
                    model.step(&[slice(&others[..13], 0, &[4]), slice(&prompt[..5], 0, &[1])]);
                let second = model.step(&[
                    slice(&others[13..25], 13, &[4]),
                    slice(&prompt[5..], 5, &[1, 6]),
                    slice(&others[..1], 0, &[2]),
                ]);
                assert!(first[13 * vocab..] == whole[..5 * vocab]);
                assert!(
                    second[12 * vocab..44 * vocab] == whole[5 * vocab..],
                    "{:?} {isa:?} {dtype:?}: in company",
                    spec.architecture
                );
            }
        }
    }
}

#[test]
fn what_stands_in_unseen_places_of_a_block_does_not_matter() {
    // A former owner of the block left infinities: its later positions are beyond what the new one sees.
    let source = RandomWeights {
        spec: mixtral(),
        element: ElementType::F32,
        seed: 14,
    };
    let prompt = tokens(4, 11);
    for isa in Isa::available() {
        let mut model = Model::new(&source, isa, ComputeType::F32, 16);
        let clean = model.step(&[slice(&prompt, 0, &[0])]);
        let poison = vec![f32::INFINITY; source.spec.head_dim];
        for layer in 0..3 {
            let cache = &mut model.attention.cache;
            Member::alone().each(cache.heads(layer), |_, mut head, _| {
                (0..16).for_each(|slot| head.write(0, slot, &poison, &poison));
            });
        }
        assert!(model.step(&[slice(&prompt, 0, &[0])]) == clean, "{isa:?}");
    }
}

#[test]
fn batches_out_of_bounds_are_refused_by_name() {
    let source = RandomWeights {
        spec: mixtral(),
        element: ElementType::F32,
        seed: 1,
    };
    let model = Model::new(&source, Isa::detect(), ComputeType::F32, 16).attention;
    let mut acts = model.activations();
    let long = vec![1; 65];
    let mut begin = |batch: &[SequenceSlice<'_>]| {
        let result = model.begin(&mut acts, batch.iter().copied());
        assert!(result.is_ok() || acts.rows() == 0);
        result
    };
    let one = slice(&[1], 0, &[0]);
    assert!(begin(&[one]).is_ok());
    assert!(matches!(
        begin(&[slice(&long, 0, &[0; 5])]),
        Err(ModuleError::TooManyRows { rows: 65, .. })
    ));
    assert!(matches!(
        begin(&[one, slice(&[], 0, &[0])]),
        Err(ModuleError::EmptySequence { sequence: 1 })
    ));
    assert!(matches!(
        begin(&[slice(&[101], 0, &[0])]),
        Err(ModuleError::Token { token: 101, .. })
    ));
    assert!(matches!(
        begin(&[slice(&[1], 256, &[0; 17])]),
        Err(ModuleError::Position { .. })
    ));
    assert!(matches!(
        begin(&[slice(&[1], u32::MAX, &[0])]),
        Err(ModuleError::Position { .. })
    ));
    assert!(matches!(
        begin(&[slice(&[1, 2], 15, &[0])]),
        Err(ModuleError::BlockTable {
            needed: 2,
            found: 1,
            ..
        })
    ));
    assert!(matches!(
        begin(&[slice(&[1, 2], 15, &[0, 16])]),
        Err(ModuleError::Block { block: 16, .. })
    ));
}

#[test]
fn logits_of_rows_that_do_not_exist_are_refused() {
    let source = RandomWeights {
        spec: mixtral(),
        element: ElementType::F32,
        seed: 1,
    };
    let mut model = Model::new(&source, Isa::detect(), ComputeType::F32, 16).attention;
    let mut acts = model.activations();
    model
        .begin(&mut acts, std::iter::once(slice(&[1, 2], 0, &[0])))
        .unwrap();
    model.embed(&mut acts);
    let mut out = vec![0.0; 2 * 101];
    assert!(model.logits(&acts, &[1, 0], &mut out).is_ok());
    assert!(matches!(
        model.logits(&acts, &[1, 2], &mut out),
        Err(ModuleError::Logits { last: 2, .. })
    ));
    assert!(matches!(
        model.logits(&acts, &[1], &mut out),
        Err(ModuleError::Logits { places: 2, .. })
    ));
    assert!(model.logits(&acts, &[], &mut []).is_ok());
}

#[test]
fn the_estimate_counts_what_is_allocated() {
    for spec in specs() {
        for (element, dtype, quantize) in [
            (ElementType::F32, ComputeType::F32, None),
            (ElementType::F16, ComputeType::F32, None),
            (ElementType::F32, ComputeType::Bf16, None),
            (ElementType::F32, ComputeType::F32, Some(Quantization::Q8)),
            (ElementType::F16, ComputeType::Bf16, Some(Quantization::Q4)),
        ] {
            let spec = stored_as(&spec, element);
            let source = RandomWeights {
                spec: spec.clone(),
                element,
                seed: 1,
            };
            let options = AttentionOptions {
                dtype,
                quantize,
                isa: Isa::detect(),
                kv_blocks: 16,
                block_tokens: 16,
                max_rows: 9,
                micro_batches: 3,
                seats: 1,
            };
            let mut packed = 0;
            let module = AttentionModule::load(&source, options, Member::alone(), &mut |p| {
                packed = p.packed_bytes;
                assert!(p.packed_bytes <= p.total_bytes);
            })
            .unwrap();
            let estimate = AttentionModule::memory(&spec, options).unwrap();
            let (arena, vectors) =
                DenseWeights::bytes(&spec, WeightTypes::new(&spec, dtype, quantize)).unwrap();
            assert_eq!(packed, arena);
            let positions = module.max_positions();
            assert_eq!(
                estimate.weights,
                arena + vectors + 4 * positions * spec.head_dim
            );
            let acts = module.activations();
            let acts_bytes = 4
                * (acts.tokens.capacity() + acts.positions.capacity() + acts.row_blocks.capacity())
                + size_of::<SpanRecord>() * acts.spans.capacity()
                + size_of::<usize>() * (acts.bounds.capacity() - 1)
                + 4 * (acts.tables.capacity()
                    + acts.residual.len()
                    + acts.ffn_input.len()
                    + acts.expert_weights.len())
                + 2 * (acts.ffn_input_bf16.len() + acts.expert_ids.len());
            assert_eq!(acts.limits.bytes(), Some(acts_bytes));
            let s = &module.scratch;
            let rows = s.normed.len()
                + s.qkv.len()
                + s.context.len()
                + s.projected.len()
                + s.probabilities.len();
            let rest = PackedRows::bytes(9, spec.hidden.max(spec.heads * spec.head_dim)).unwrap()
                + AttentionScratch::bytes(SPAN_ROWS, spec.heads_per_kv_head(), spec.head_dim)
                    .unwrap()
                + FfnScratch::bytes(9, spec.hidden, dense_width(&spec)).unwrap();
            assert_eq!(estimate.scratch, 3 * acts_bytes + 4 * rows + rest);
        }
    }
}

#[test]
fn options_the_kernels_do_not_take_are_refused() {
    let options = AttentionOptions {
        quantize: None,
        dtype: ComputeType::F32,
        isa: Isa::detect(),
        kv_blocks: 16,
        block_tokens: 16,
        max_rows: 9,
        micro_batches: 1,
        seats: 1,
    };
    let refuse = |options| {
        AttentionModule::memory(&mixtral(), options)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        refuse(AttentionOptions {
            block_tokens: 8,
            ..options
        }),
        "block_tokens is 8, but must be a multiple of 16, above 0"
    );
    assert!(
        refuse(AttentionOptions {
            max_rows: 0,
            ..options
        })
        .starts_with("max_rows is 0")
    );
    assert!(
        refuse(AttentionOptions {
            kv_blocks: usize::MAX / 16,
            ..options
        })
        .starts_with("the key/value cache would")
    );
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for spec in specs() {
        for dtype in [ComputeType::F32, ComputeType::Bf16] {
            let source = RandomWeights {
                spec: spec.clone(),
                element: ElementType::F32,
                seed: 5,
            };
            let blocks: Vec<u32> = (0..8).collect();
            let (prompt, other) = (tokens(3, 41), tokens(4, 7));
            let logits = |model: &mut Model| {
                let prompts = [
                    slice(&prompt, 0, &blocks[..4]),
                    slice(&other, 0, &blocks[4..]),
                ];
                let mut logits = model.step(&prompts);
                let next = [slice(&[9], 41, &blocks[..4]), slice(&[8], 7, &blocks[4..])];
                logits.extend(model.step(&next));
                logits
            };
            let isa = Isa::detect();
            let expected = logits(&mut Model::new(&source, isa, dtype, 16));
            for threads in [2, 5] {
                let crew = Crew::new(threads, 1).unwrap();
                let mut join = || crew.join().unwrap();
                let found = logits(&mut Model::with(&source, isa, dtype, 16, &mut join));
                assert!(expected == found, "{dtype} {threads}");
            }
        }
    }
}

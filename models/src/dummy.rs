//! Random weights for any model, without a checkpoint: for benchmarks, plans and tests of shapes nobody can download.
//!
//! A value is a function of (seed, tensor, element index) alone, by a counter-based generator: any tensor can be had without the
//! others, workers agree without talking, and a run repeats on every platform (the arithmetic is integer but for one
//! multiplication by a constant, and rounding is IEEE).
//!
//! Scales keep activations of order one through any depth, as `make_models.py` of the fixtures does: linear layers have a variance
//! of 1 / fan-in, the embedding of 1, norms are near 1, biases of 0.1; the router is wide enough that the choice of experts
//! does not hang on rounding, and the head makes logits of deviation 3. Values are uniform, not normal: that costs one
//! multiplication and no logarithm, and dummy text is as meaningless either way.

use std::borrow::Cow;

use half::{bf16, f16};

use crate::{
    DenseTensor, ElementType, ExpertTensor, MatrixView, ModelSpec, TensorId, WeightError,
    WeightSource,
};

/// Seeded random weights of a model.
#[derive(Debug, Clone)]
pub struct DummyWeights {
    spec: ModelSpec,
    seed: u64,
    element: ElementType,
}

impl DummyWeights {
    /// Weights for `spec`, of the type it says its weights are stored as, else bfloat16.
    pub fn new(spec: ModelSpec, seed: u64) -> DummyWeights {
        let element = spec.stored_as.unwrap_or(ElementType::Bf16);
        DummyWeights {
            spec,
            seed,
            element,
        }
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }
}

impl WeightSource for DummyWeights {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn tensor(&self, id: TensorId) -> Result<MatrixView<'_>, WeightError> {
        let (rows, cols) = id.shape(&self.spec).ok_or(WeightError::Absent { id })?;
        // Tied, head and embedding are one tensor.
        let stored = match id {
            TensorId::Head if self.spec.tied_embeddings => TensorId::Embedding,
            other => other,
        };
        let stream = mix(self.seed ^ mix(code(stored)));
        let data = fill(
            stream,
            Distribution::of(stored, cols),
            rows * cols,
            self.element,
        );
        Ok(MatrixView {
            data: Cow::Owned(data),
            element: self.element,
            rows,
            cols,
            row_stride: cols,
            col_stride: 1,
        })
    }
}

/// Uniform values of a mean and a standard deviation.
#[derive(Debug, Clone, Copy)]
struct Distribution {
    mean: f32,
    deviation: f32,
}

impl Distribution {
    fn of(id: TensorId, fan_in: usize) -> Distribution {
        let linear = |gain: f32| Distribution {
            mean: 0.0,
            deviation: gain / (fan_in as f32).sqrt(),
        };
        match id {
            TensorId::Embedding => Distribution {
                mean: 0.0,
                deviation: 1.0,
            },
            TensorId::Head => linear(3.0),
            TensorId::Expert(..) => linear(1.0),
            TensorId::Dense(_, tensor) => match tensor {
                DenseTensor::Router => linear(2.0),
                DenseTensor::QueryBias
                | DenseTensor::KeyBias
                | DenseTensor::ValueBias
                | DenseTensor::OutputBias => Distribution {
                    mean: 0.0,
                    deviation: 0.1,
                },
                _ if id.is_vector() => Distribution::NORM,
                _ => linear(1.0),
            },
            TensorId::FinalNorm => Distribution::NORM,
        }
    }

    const NORM: Distribution = Distribution {
        mean: 1.0,
        deviation: 0.1,
    };
}

/// `elements` values as bytes of `element`. One draw of the generator makes four.
fn fill(stream: u64, distribution: Distribution, elements: usize, element: ElementType) -> Vec<u8> {
    // A uniform variable over [-1, 1) has variance 1/3. Its 2^16 steps stand at odd multiples of 2^-16.
    let scale = distribution.deviation * 3f32.sqrt() / 65536.0;
    let value = |draw: u64, lane: usize| {
        let bits = (draw >> (16 * lane)) as u16;
        distribution.mean + scale * (2 * i32::from(bits) - 65535) as f32
    };
    let draws = (0..).map(|counter: u64| mix(stream.wrapping_add(counter.wrapping_mul(GOLDEN))));
    let mut data = vec![0; elements * element.bytes()];
    for (chunk, draw) in data.chunks_mut(4 * element.bytes()).zip(draws) {
        for (lane, out) in chunk.chunks_exact_mut(element.bytes()).enumerate() {
            let value = value(draw, lane);
            match element {
                ElementType::F32 => out.copy_from_slice(&value.to_le_bytes()),
                ElementType::F16 => out.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
                ElementType::Bf16 => out.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            }
        }
    }
    data
}

/// 2^64 divided by the golden ratio, SplitMix64's increment.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's finaliser (Steele, Lea and Flood 2014, with Stafford's mix 13): a bijection that scatters every bit.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(GOLDEN);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A number of its own for every tensor. Part of what a seed means: never renumber.
fn code(id: TensorId) -> u64 {
    let which = |which: ExpertTensor| match which {
        ExpertTensor::Gate => 0,
        ExpertTensor::Up => 1,
        ExpertTensor::Down => 2,
    };
    let pack = |kind: u64, layer: usize, expert: usize, which: u64| {
        kind << 56 | (layer as u64) << 32 | (expert as u64) << 8 | which
    };
    match id {
        TensorId::Embedding => 1,
        TensorId::FinalNorm => 2,
        TensorId::Head => 3,
        TensorId::Dense(layer, tensor) => {
            let number = match tensor {
                DenseTensor::AttentionNorm => 0,
                DenseTensor::FfnNorm => 1,
                DenseTensor::Query => 2,
                DenseTensor::Key => 3,
                DenseTensor::Value => 4,
                DenseTensor::Output => 5,
                DenseTensor::QueryBias => 6,
                DenseTensor::KeyBias => 7,
                DenseTensor::ValueBias => 8,
                DenseTensor::OutputBias => 9,
                DenseTensor::QueryNorm => 10,
                DenseTensor::KeyNorm => 11,
                DenseTensor::Router => 12,
                DenseTensor::Ffn(part) => 13 + which(part),
            };
            pack(1, layer, 0, number)
        }
        TensorId::Expert(layer, expert, part) => pack(2, layer, expert, which(part)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::parse_config;

    fn spec(config: &str) -> ModelSpec {
        parse_config(config.as_bytes(), None).unwrap().0
    }

    fn small() -> ModelSpec {
        spec(
            r#"{"model_type": "qwen3_moe", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
                "head_dim": 32, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 512,
                "moe_intermediate_size": 32, "intermediate_size": 48, "mlp_only_layers": [1], "attention_bias": true}"#,
        )
    }

    #[test]
    fn every_tensor_has_its_shape_and_its_own_values() {
        let weights = DummyWeights::new(small(), 7);
        let mut codes = HashSet::new();
        let mut starts = HashSet::new();
        for id in TensorId::all(weights.spec()) {
            let view = weights.tensor(id).unwrap();
            assert_eq!(
                Some((view.rows, view.cols)),
                id.shape(weights.spec()),
                "{id:?}"
            );
            assert!(codes.insert(code(id)), "{id:?}");
            assert!(starts.insert(view.data[..16].to_vec()), "{id:?}");
        }
    }

    #[test]
    fn mean_and_deviation_are_what_the_tensor_calls_for() {
        let weights = DummyWeights::new(small(), 1);
        let statistics = |id| {
            let values = weights.tensor(id).unwrap().to_f32();
            let count = values.len() as f64;
            let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
            let variance = values
                .iter()
                .map(|&v| (f64::from(v) - mean).powi(2))
                .sum::<f64>()
                / count;
            (mean, variance.sqrt())
        };
        for (id, mean, deviation) in [
            (TensorId::Embedding, 0.0, 1.0),
            (TensorId::Head, 0.0, 3.0 / 8.0),
            (
                TensorId::Expert(0, 3, ExpertTensor::Down),
                0.0,
                1.0 / 32f64.sqrt(),
            ),
            (TensorId::Dense(0, DenseTensor::Query), 0.0, 1.0 / 8.0),
        ] {
            let (m, d) = statistics(id);
            assert!((m - mean).abs() < 0.1 * deviation, "{id:?}: mean {m}");
            assert!((d / deviation - 1.0).abs() < 0.05, "{id:?}: deviation {d}");
        }
        let (mean, deviation) = statistics(TensorId::FinalNorm);
        assert!((mean - 1.0).abs() < 0.05 && (deviation - 0.1).abs() < 0.03);
    }

    /// Held fixed: a seed in somebody's notes must mean the same weights tomorrow and on another machine.
    #[test]
    fn values_are_pinned() {
        let mut spec = small();
        spec.stored_as = Some(ElementType::F32);
        let weights = DummyWeights::new(spec, 42);
        let bits: Vec<u32> = weights
            .tensor(TensorId::Expert(0, 1, ExpertTensor::Up))
            .unwrap()
            .to_f32()[..6]
            .iter()
            .map(|value| value.to_bits())
            .collect();
        assert_eq!(bits, PINNED);
    }

    const PINNED: [u32; 6] = [
        1046249575, 1040294645, 3177943691, 3185121360, 3175107673, 1031758333,
    ];

    #[test]
    fn rounding_to_a_narrow_type_is_all_that_differs_between_types() {
        let mut wide = small();
        wide.stored_as = Some(ElementType::F32);
        let mut narrow = small();
        narrow.stored_as = Some(ElementType::Bf16);
        let id = TensorId::Dense(0, DenseTensor::Router);
        let wide = DummyWeights::new(wide, 3).tensor(id).unwrap().to_f32();
        let narrow = DummyWeights::new(narrow, 3).tensor(id).unwrap().to_f32();
        for (wide, narrow) in wide.iter().zip(&narrow) {
            assert_eq!(bf16::from_f32(*wide).to_f32(), *narrow);
        }
    }

    #[test]
    fn another_seed_gives_other_values_and_a_tied_head_is_the_embedding() {
        let mut tied = small();
        tied.tied_embeddings = true;
        let one = DummyWeights::new(tied.clone(), 1);
        let other = DummyWeights::new(tied, 2);
        let values = |weights: &DummyWeights, id| weights.tensor(id).unwrap().to_f32();
        assert_ne!(
            values(&one, TensorId::Embedding),
            values(&other, TensorId::Embedding)
        );
        assert_eq!(
            values(&one, TensorId::Embedding),
            values(&one, TensorId::Head)
        );
    }

    #[test]
    fn a_tensor_the_model_lacks_is_refused() {
        let weights = DummyWeights::new(small(), 1);
        for id in [
            TensorId::Expert(1, 0, ExpertTensor::Up),
            TensorId::Expert(0, 4, ExpertTensor::Up),
            TensorId::Dense(0, DenseTensor::Ffn(ExpertTensor::Gate)),
            TensorId::Dense(2, DenseTensor::Query),
        ] {
            assert!(matches!(
                weights.tensor(id),
                Err(WeightError::Absent { .. })
            ));
        }
    }
}

//! The whole model once more, in plain candle: f32, no cache, no kernels of ours.
//!
//! This is what every faster path is held against, in tests and by `volley validate --numerics`. It is written to be read beside a paper or
//! the Hugging Face code, one operation a function, and it shares no arithmetic with the modules. Weights are read from
//! the source layer by layer and dropped after, so that a model too large for memory in f32 can still be checked.

use std::f64::consts::PI;

use candle_core::{D, DType, Device, Result as CandleResult, Tensor};

use crate::ModelSpec;
use crate::spec::{Activation, FfnKind, Norm, Rope, RopeScaling};
use crate::weights::{DenseTensor, ExpertTensor, TensorId, WeightError, WeightSource};

/// Why the reference gave no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// A weight could not be had.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// candle refused an operation.
    #[error("the reference model failed in candle: {0}")]
    Candle(#[from] candle_core::Error),
}

/// A model computed by the book.
pub struct ReferenceModel<'a> {
    source: &'a dyn WeightSource,
}

impl<'a> ReferenceModel<'a> {
    /// The model whose weights `source` has.
    pub fn new(source: &'a dyn WeightSource) -> Self {
        ReferenceModel { source }
    }

    /// Logits `[tokens.len(), vocab]`, row-major, of one sequence that begins at position 0.
    ///
    /// # Errors
    /// When a weight is missing or a token is not in the vocabulary.
    pub fn forward(&self, tokens: &[u32]) -> Result<Vec<f32>, ReferenceError> {
        let spec = self.source.spec();
        let ids = Tensor::new(tokens, &Device::Cpu)?;
        let mut x = self.matrix(TensorId::Embedding)?.index_select(&ids, 0)?;
        for (layer, shape) in spec.layers.iter().enumerate() {
            let normed = norm(
                &x,
                &self.vector(layer, DenseTensor::AttentionNorm)?,
                spec.norm,
            )?;
            x = (x + self.attention(layer, &normed)?)?;
            let normed = norm(&x, &self.vector(layer, DenseTensor::FfnNorm)?, spec.norm)?;
            let ffn = match shape.ffn {
                FfnKind::Experts => self.experts(layer, &normed)?,
                FfnKind::Dense { .. } => {
                    let matrix =
                        |which| self.matrix(TensorId::Dense(layer, DenseTensor::Ffn(which)));
                    gated_ffn(
                        &normed,
                        &matrix(ExpertTensor::Gate)?,
                        &matrix(ExpertTensor::Up)?,
                        &matrix(ExpertTensor::Down)?,
                        spec.activation,
                    )?
                }
            };
            x = (x + ffn)?;
        }
        let x = norm(
            &x,
            &self.matrix(TensorId::FinalNorm)?.flatten_all()?,
            spec.norm,
        )?;
        let logits = linear(&x, &self.matrix(TensorId::Head)?, None)?;
        Ok(logits.flatten_all()?.to_vec1()?)
    }

    /// Attention of a layer over normed rows `[n, hidden]`, with the output projection.
    fn attention(&self, layer: usize, x: &Tensor) -> Result<Tensor, ReferenceError> {
        let spec = self.source.spec();
        let n = x.dim(0)?;
        let project = |x: &Tensor, weight, bias| {
            let bias = if spec.attention_bias {
                Some(self.vector(layer, bias)?)
            } else {
                None
            };
            let weight = self.matrix(TensorId::Dense(layer, weight))?;
            Ok::<_, ReferenceError>(linear(x, &weight, bias.as_ref())?)
        };
        let heads = |x: Tensor, heads| {
            let x = match spec.clip_qkv {
                Some(limit) => x.clamp(-limit, limit)?,
                None => x,
            };
            // [n, heads * head_dim] -> [heads, n, head_dim]
            x.reshape((n, heads, spec.head_dim))?
                .transpose(0, 1)?
                .contiguous()
        };
        let mut q = heads(
            project(x, DenseTensor::Query, DenseTensor::QueryBias)?,
            spec.heads,
        )?;
        let mut k = heads(
            project(x, DenseTensor::Key, DenseTensor::KeyBias)?,
            spec.kv_heads,
        )?;
        let v = heads(
            project(x, DenseTensor::Value, DenseTensor::ValueBias)?,
            spec.kv_heads,
        )?;
        if spec.qk_norm {
            q = norm(&q, &self.vector(layer, DenseTensor::QueryNorm)?, spec.norm)?;
            k = norm(&k, &self.vector(layer, DenseTensor::KeyNorm)?, spec.norm)?;
        }
        let (cos, sin) = rope_tables(&spec.rope, spec.head_dim, n)?;
        let q = rotate(&q, &cos, &sin)?;
        let k = rotate(&k, &cos, &sin)?;
        let context = attend(&q, &k, &v, spec.sliding_window)?;
        let context = context
            .transpose(0, 1)?
            .reshape((n, spec.heads * spec.head_dim))?;
        project(&context, DenseTensor::Output, DenseTensor::OutputBias)
    }

    /// The experts of a layer: each row's weighted sum in the order the gate chose them.
    fn experts(&self, layer: usize, x: &Tensor) -> Result<Tensor, ReferenceError> {
        let spec = self.source.spec();
        let router = self.matrix(TensorId::Dense(layer, DenseTensor::Router))?;
        let chosen = gate(x, &router, spec)?;
        let mut weights = vec![None; spec.experts];
        let mut rows = Vec::with_capacity(chosen.len());
        for (row, choice) in chosen.iter().enumerate() {
            let x = x.narrow(0, row, 1)?;
            let mut sum = x.zeros_like()?;
            for (expert, weight) in choice {
                if weights[*expert].is_none() {
                    let matrix = |which| self.matrix(TensorId::Expert(layer, *expert, which));
                    weights[*expert] = Some((
                        matrix(ExpertTensor::Gate)?,
                        matrix(ExpertTensor::Up)?,
                        matrix(ExpertTensor::Down)?,
                    ));
                }
                if let Some((gate, up, down)) = &weights[*expert] {
                    let out = gated_ffn(&x, gate, up, down, spec.activation)?;
                    sum = (sum + (out * f64::from(*weight))?)?;
                }
            }
            rows.push(sum);
        }
        Ok(Tensor::cat(&rows, 0)?)
    }

    fn matrix(&self, id: TensorId) -> Result<Tensor, ReferenceError> {
        let view = self.source.tensor(id)?;
        let values = view.to_f32();
        Ok(Tensor::from_vec(
            values,
            (view.rows, view.cols),
            &Device::Cpu,
        )?)
    }

    fn vector(&self, layer: usize, which: DenseTensor) -> Result<Tensor, ReferenceError> {
        Ok(self.matrix(TensorId::Dense(layer, which))?.flatten_all()?)
    }
}

/// `x w^T + bias` for `x` `[n, k]`, `w` `[m, k]`, `bias` `[m]`.
pub fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> CandleResult<Tensor> {
    let product = x.matmul(&w.t()?)?;
    match bias {
        Some(bias) => product.broadcast_add(bias),
        None => Ok(product),
    }
}

/// Norm over the last dimension.
pub fn norm(x: &Tensor, weight: &Tensor, norm: Norm) -> CandleResult<Tensor> {
    let (x, eps) = match norm {
        Norm::Rms { eps } => (x.clone(), eps),
        Norm::Layer { eps } => (x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?, eps),
    };
    let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(variance + f64::from(eps))?.sqrt()?)?
        .broadcast_mul(weight)
}

/// Cosines and sines `[n, head_dim / 2]` of positions `0..n`.
pub fn rope_tables(rope: &Rope, head_dim: usize, n: usize) -> CandleResult<(Tensor, Tensor)> {
    let frequencies = inverse_frequencies(rope, head_dim);
    let positions = Tensor::arange(0u32, n as u32, &Device::Cpu)?.to_dtype(DType::F32)?;
    let frequencies = Tensor::from_vec(frequencies, (1, head_dim / 2), &Device::Cpu)?;
    let angles = positions.reshape((n, 1))?.matmul(&frequencies)?;
    let factor = match rope.scaling {
        RopeScaling::Yarn {
            attention_factor, ..
        } => attention_factor,
        _ => 1.0,
    };
    Ok(((angles.cos()? * factor)?, (angles.sin()? * factor)?))
}

/// The frequencies, as `transformers/modeling_rope_utils.py` computes them.
fn inverse_frequencies(rope: &Rope, head_dim: usize) -> Vec<f32> {
    let dims = (0..head_dim).step_by(2);
    let mut frequencies: Vec<f64> = dims
        .map(|dim| 1.0 / rope.theta.powf(dim as f64 / head_dim as f64))
        .collect();
    match rope.scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } => frequencies.iter_mut().for_each(|f| *f /= factor),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_positions,
        } => {
            let context = original_positions as f64;
            for f in &mut frequencies {
                let wavelength = 2.0 * PI / *f;
                if wavelength > context / low_freq_factor {
                    *f /= factor;
                } else if wavelength >= context / high_freq_factor {
                    let smooth = (context / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    *f = (1.0 - smooth) * *f / factor + smooth * *f;
                }
            }
        }
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            original_positions,
            ..
        } => {
            let correction_dim = |rotations: f64| {
                (head_dim as f64 * (original_positions as f64 / (rotations * 2.0 * PI)).ln())
                    / (2.0 * rope.theta.ln())
            };
            let low = correction_dim(beta_fast).floor().max(0.0);
            let mut high = correction_dim(beta_slow).ceil().min(head_dim as f64 - 1.0);
            if low == high {
                high += 0.001;
            }
            for (i, f) in frequencies.iter_mut().enumerate() {
                let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                let extrapolation = 1.0 - ramp;
                *f = *f / factor * (1.0 - extrapolation) + *f * extrapolation;
            }
        }
    }
    frequencies.into_iter().map(|f| f as f32).collect()
}

/// Rotary embedding of `x` `[heads, n, head_dim]`: `x * cos + rotate_half(x) * sin`.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> CandleResult<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (low, high) = (
        x.narrow(D::Minus1, 0, half)?,
        x.narrow(D::Minus1, half, half)?,
    );
    let turned = Tensor::cat(&[high.neg()?, low], D::Minus1)?;
    let (cos, sin) = (Tensor::cat(&[cos, cos], 1)?, Tensor::cat(&[sin, sin], 1)?);
    x.broadcast_mul(&cos)? + turned.broadcast_mul(&sin)?
}

/// Causal attention of `q` `[heads, n, d]` over `k` and `v` `[kv_heads, n, d]`, each query seeing `window` positions, its own included.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, window: Option<usize>) -> CandleResult<Tensor> {
    let (heads, n, dim) = q.dims3()?;
    let group = heads / k.dim(0)?;
    let repeat = |x: &Tensor| {
        let (kv_heads, n, dim) = x.dims3()?;
        x.unsqueeze(1)?
            .expand((kv_heads, group, n, dim))?
            .reshape((heads, n, dim))
    };
    let scores = (q.matmul(&repeat(k)?.transpose(1, 2)?.contiguous()?)? / (dim as f64).sqrt())?;
    let mask: Vec<f32> = (0..n * n)
        .map(|i| (i / n, i % n))
        .map(|(query, key)| key <= query && window.is_none_or(|window| query - key < window))
        .map(|seen| if seen { 0.0 } else { f32::NEG_INFINITY })
        .collect();
    let mask = Tensor::from_vec(mask, (n, n), &Device::Cpu)?;
    softmax(&scores.broadcast_add(&mask)?)?.matmul(&repeat(v)?)
}

/// Softmax over the last dimension.
pub fn softmax(x: &Tensor) -> CandleResult<Tensor> {
    let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}

/// The experts each row of `x` `[n, hidden]` visits and their weights, the most probable first, equals by their index.
pub fn gate(x: &Tensor, router: &Tensor, spec: &ModelSpec) -> CandleResult<Vec<Vec<(usize, f32)>>> {
    let probabilities = softmax(&linear(x, router, None)?)?.to_vec2::<f32>()?;
    let choose = |row: Vec<f32>| {
        let mut chosen: Vec<(usize, f32)> = row.into_iter().enumerate().collect();
        chosen.sort_by(|a, b| b.1.total_cmp(&a.1));
        chosen.truncate(spec.top_k);
        if spec.normalize_top_k {
            let sum: f32 = chosen.iter().map(|(_, weight)| weight).sum();
            chosen.iter_mut().for_each(|(_, weight)| *weight /= sum);
        }
        chosen
    };
    Ok(probabilities.into_iter().map(choose).collect())
}

/// `down(activation(gate(x)) * up(x))`.
pub fn gated_ffn(
    x: &Tensor,
    gate: &Tensor,
    up: &Tensor,
    down: &Tensor,
    activation: Activation,
) -> CandleResult<Tensor> {
    let gate = linear(x, gate, None)?;
    let gate = match activation {
        Activation::Silu => gate.silu()?,
    };
    linear(&(gate * linear(x, up, None)?)?, down, None)
}

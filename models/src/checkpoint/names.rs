//! What the tensors are called in each family's checkpoints, and how several roles share one stored tensor.
//!
//! A role has one or more candidates, tried in order; the first that is present counts. Sources: the modules and
//! `conversion_mapping.py` of transformers 5.23. Its `save_pretrained` writes experts one by one under the old names unless
//! `save_original_format=False`, which writes its own stacked parameters; both are read.

use crate::{Architecture, DenseTensor, ExpertTensor, ModelSpec, TensorId};

/// Where a role's matrix may stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// Name of the stored tensor.
    pub(super) name: String,
    /// Shape the stored tensor must have.
    pub(super) stored_shape: Vec<usize>,
    /// Element of the stored tensor at which the matrix begins.
    pub(super) offset: usize,
    /// Elements from row to row of the matrix.
    pub(super) row_stride: usize,
    /// Elements from column to column.
    pub(super) col_stride: usize,
}

/// The places of a tensor, best first; empty where the model has no such tensor.
pub(super) fn places(spec: &ModelSpec, id: TensorId) -> Vec<Place> {
    let Some((rows, cols)) = id.shape(spec) else {
        return Vec::new();
    };
    match spec.architecture {
        Architecture::Dbrx => vec![dbrx(spec, id)],
        Architecture::Mixtral | Architecture::Qwen3Moe => {
            let whole = |name: String| {
                let shape = if id.is_vector() {
                    vec![cols]
                } else {
                    vec![rows, cols]
                };
                part(name, shape, 0, cols)
            };
            let mut places: Vec<Place> = llama_like(spec, id).into_iter().map(whole).collect();
            places.extend(stacked_expert(spec, id));
            places
        }
    }
}

/// A matrix of rows that lie one after another, `cols` elements each, from `offset` on.
fn part(name: String, stored_shape: Vec<usize>, offset: usize, cols: usize) -> Place {
    Place {
        name,
        stored_shape,
        offset,
        row_stride: cols,
        col_stride: 1,
    }
}

/// Names of the tensors that are stored whole, in Mixtral and Qwen3-MoE.
fn llama_like(spec: &ModelSpec, id: TensorId) -> Vec<String> {
    const EMBEDDING: &str = "model.embed_tokens.weight";
    const HEAD: &str = "lm_head.weight";
    let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    match id {
        // Tied, but both stored: transformers uses both if they differ. Tied, and one stored: that one is both.
        TensorId::Embedding if spec.tied_embeddings => owned(&[EMBEDDING, HEAD]),
        TensorId::Head if spec.tied_embeddings => owned(&[HEAD, EMBEDDING]),
        TensorId::Embedding => owned(&[EMBEDDING]),
        TensorId::Head => owned(&[HEAD]),
        TensorId::FinalNorm => owned(&["model.norm.weight"]),
        TensorId::Dense(layer, tensor) => {
            let in_layer = |name: &str| vec![format!("model.layers.{layer}.{name}")];
            match tensor {
                DenseTensor::AttentionNorm => in_layer("input_layernorm.weight"),
                DenseTensor::FfnNorm => in_layer("post_attention_layernorm.weight"),
                DenseTensor::Query => in_layer("self_attn.q_proj.weight"),
                DenseTensor::Key => in_layer("self_attn.k_proj.weight"),
                DenseTensor::Value => in_layer("self_attn.v_proj.weight"),
                DenseTensor::Output => in_layer("self_attn.o_proj.weight"),
                DenseTensor::QueryBias => in_layer("self_attn.q_proj.bias"),
                DenseTensor::KeyBias => in_layer("self_attn.k_proj.bias"),
                DenseTensor::ValueBias => in_layer("self_attn.v_proj.bias"),
                DenseTensor::OutputBias => in_layer("self_attn.o_proj.bias"),
                DenseTensor::QueryNorm => in_layer("self_attn.q_norm.weight"),
                DenseTensor::KeyNorm => in_layer("self_attn.k_norm.weight"),
                DenseTensor::Router => {
                    let mut names = in_layer("mlp.gate.weight");
                    if spec.architecture == Architecture::Mixtral {
                        names.insert(
                            0,
                            format!("model.layers.{layer}.block_sparse_moe.gate.weight"),
                        );
                    }
                    names
                }
                DenseTensor::Ffn(which) => in_layer(&format!("mlp.{}.weight", projection(which))),
            }
        }
        TensorId::Expert(layer, expert, which) => vec![match spec.architecture {
            Architecture::Mixtral => {
                let name = match which {
                    ExpertTensor::Gate => "w1",
                    ExpertTensor::Up => "w3",
                    ExpertTensor::Down => "w2",
                };
                format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight")
            }
            _ => format!(
                "model.layers.{layer}.mlp.experts.{expert}.{}.weight",
                projection(which)
            ),
        }],
    }
}

fn projection(which: ExpertTensor) -> &'static str {
    match which {
        ExpertTensor::Gate => "gate_proj",
        ExpertTensor::Up => "up_proj",
        ExpertTensor::Down => "down_proj",
    }
}

/// An expert inside transformers v5's stacked parameters: `gate_up_proj` is `[experts, 2 * inner, hidden]` with the gate first,
/// `down_proj` is `[experts, hidden, inner]`.
fn stacked_expert(spec: &ModelSpec, id: TensorId) -> Option<Place> {
    let TensorId::Expert(layer, expert, which) = id else {
        return None;
    };
    let (experts, hidden, inner) = (spec.experts, spec.hidden, spec.expert_hidden);
    let name = |of: &str| format!("model.layers.{layer}.mlp.experts.{of}");
    let matrix = inner * hidden;
    Some(match which {
        ExpertTensor::Gate | ExpertTensor::Up => part(
            name("gate_up_proj"),
            vec![experts, 2 * inner, hidden],
            (2 * expert + usize::from(which == ExpertTensor::Up)) * matrix,
            hidden,
        ),
        ExpertTensor::Down => part(
            name("down_proj"),
            vec![experts, hidden, inner],
            expert * matrix,
            inner,
        ),
    })
}

/// DBRX: queries, keys and values are rows of one matrix; the experts of a layer lie below each other in `w1` (gate), `v1` (up)
/// and `w2`, which is applied as `x @ w2`: down is its transpose.
fn dbrx(spec: &ModelSpec, id: TensorId) -> Place {
    let hidden = spec.hidden;
    match id {
        TensorId::Embedding => part(
            "transformer.wte.weight".to_owned(),
            vec![spec.vocab, hidden],
            0,
            hidden,
        ),
        TensorId::FinalNorm => part(
            "transformer.norm_f.weight".to_owned(),
            vec![hidden],
            0,
            hidden,
        ),
        TensorId::Head => part(
            "lm_head.weight".to_owned(),
            vec![spec.vocab, hidden],
            0,
            hidden,
        ),
        TensorId::Dense(layer, tensor) => {
            let queries = spec.heads * spec.head_dim;
            let keys = spec.kv_heads * spec.head_dim;
            let name = |of: &str| format!("transformer.blocks.{layer}.{of}");
            let fused = |row: usize| {
                part(
                    name("norm_attn_norm.attn.Wqkv.weight"),
                    vec![queries + 2 * keys, hidden],
                    row * hidden,
                    hidden,
                )
            };
            match tensor {
                DenseTensor::AttentionNorm => part(
                    name("norm_attn_norm.norm_1.weight"),
                    vec![hidden],
                    0,
                    hidden,
                ),
                DenseTensor::FfnNorm => part(
                    name("norm_attn_norm.norm_2.weight"),
                    vec![hidden],
                    0,
                    hidden,
                ),
                DenseTensor::Query => fused(0),
                DenseTensor::Key => fused(queries),
                DenseTensor::Value => fused(queries + keys),
                DenseTensor::Output => part(
                    name("norm_attn_norm.attn.out_proj.weight"),
                    vec![hidden, queries],
                    0,
                    queries,
                ),
                DenseTensor::Router => part(
                    name("ffn.router.layer.weight"),
                    vec![spec.experts, hidden],
                    0,
                    hidden,
                ),
                DenseTensor::QueryBias
                | DenseTensor::KeyBias
                | DenseTensor::ValueBias
                | DenseTensor::OutputBias
                | DenseTensor::QueryNorm
                | DenseTensor::KeyNorm
                | DenseTensor::Ffn(_) => {
                    unreachable!("DBRX has no {tensor:?}, so `TensorId::shape` gave none")
                }
            }
        }
        TensorId::Expert(layer, expert, which) => {
            let matrix = match which {
                ExpertTensor::Gate => "w1",
                ExpertTensor::Up => "v1",
                ExpertTensor::Down => "w2",
            };
            let stacked = part(
                format!("transformer.blocks.{layer}.ffn.experts.mlp.{matrix}"),
                vec![spec.experts * spec.expert_hidden, hidden],
                expert * spec.expert_hidden * hidden,
                hidden,
            );
            match which {
                ExpertTensor::Gate | ExpertTensor::Up => stacked,
                ExpertTensor::Down => Place {
                    row_stride: 1,
                    col_stride: hidden,
                    ..stacked
                },
            }
        }
    }
}

/// The layer that a stored tensor belongs to by its name, in any of the families.
pub(super) fn layer(name: &str) -> Option<usize> {
    let rest = name
        .strip_prefix("model.layers.")
        .or_else(|| name.strip_prefix("transformer.blocks."))?;
    rest.split('.').next()?.parse().ok()
}

/// Whether a stored tensor that no role uses is known to be harmless: a buffer that older versions of transformers saved.
pub(super) fn is_harmless(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || name.ends_with(".masked_bias")
}

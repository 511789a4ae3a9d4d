//! What an attention worker computes, as far as its logic is concerned: the real module, or one that costs nothing and can be checked.

use volley_models::{
    Activations, AttentionModule, ComputeType, FfnKind, ModelSpec, ModuleError, SequenceSlice,
};
use volley_transports::Rows;

/// The operations of [`AttentionModule`], under the same names and with the same meaning.
pub(crate) trait AttentionCompute {
    /// One micro-batch between its tokens and its logits.
    type Batch;

    /// Takes the tokens of a step into `batch`, in place of whatever it held.
    fn begin<'s>(
        &mut self,
        batch: &mut Self::Batch,
        sequences: impl Iterator<Item = SequenceSlice<'s>> + Clone,
    ) -> Result<(), ModuleError>;

    /// Looks up the embeddings.
    fn embed(&mut self, batch: &mut Self::Batch);

    /// Computes a layer up to its experts.
    fn attention(&mut self, layer: usize, batch: &mut Self::Batch);

    /// Adds what the layer's experts returned, weighted and summed: `[rows, hidden]`.
    fn add_ffn(&mut self, batch: &mut Self::Batch, ffn_out: &[f32]);

    /// Logits of some rows: `[rows.len(), vocab]`.
    fn logits(
        &mut self,
        batch: &Self::Batch,
        rows: &[u32],
        out: &mut [f32],
    ) -> Result<(), ModuleError>;

    /// What is to be sent to whom after [`attention`](Self::attention).
    fn routed<'a>(&self, batch: &'a Self::Batch, dtype: ComputeType) -> Routed<'a>;
}

/// Rows on their way to experts.
pub(crate) struct Routed<'a> {
    /// `[rows, hidden]`.
    pub(crate) rows: Rows<'a>,
    /// `[rows, top_k]`, best first.
    pub(crate) expert_ids: &'a [u16],
    /// Of the same shape.
    pub(crate) expert_weights: &'a [f32],
}

/// What of a model the loops have to know.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Outline {
    /// Width of a row.
    pub(crate) hidden: usize,
    /// Entries of the vocabulary.
    pub(crate) vocab: usize,
    /// Of each layer, whether it has experts.
    pub(crate) routed: Vec<bool>,
}

impl From<&ModelSpec> for Outline {
    fn from(spec: &ModelSpec) -> Self {
        let layers = spec.layers.iter();
        Outline {
            hidden: spec.hidden,
            vocab: spec.vocab,
            routed: layers.map(|layer| layer.ffn == FfnKind::Experts).collect(),
        }
    }
}

impl AttentionCompute for AttentionModule {
    type Batch = Activations;

    fn begin<'s>(
        &mut self,
        batch: &mut Activations,
        sequences: impl Iterator<Item = SequenceSlice<'s>> + Clone,
    ) -> Result<(), ModuleError> {
        AttentionModule::begin(self, batch, sequences)
    }

    fn embed(&mut self, batch: &mut Activations) {
        AttentionModule::embed(self, batch);
    }

    fn attention(&mut self, layer: usize, batch: &mut Activations) {
        AttentionModule::attention(self, layer, batch);
    }

    fn add_ffn(&mut self, batch: &mut Activations, ffn_out: &[f32]) {
        AttentionModule::add_ffn(self, batch, ffn_out);
    }

    fn logits(
        &mut self,
        batch: &Activations,
        rows: &[u32],
        out: &mut [f32],
    ) -> Result<(), ModuleError> {
        AttentionModule::logits(self, batch, rows, out)
    }

    fn routed<'a>(&self, batch: &'a Activations, dtype: ComputeType) -> Routed<'a> {
        Routed {
            rows: match dtype {
                ComputeType::F32 => Rows::F32(batch.ffn_input()),
                ComputeType::Bf16 => Rows::Bf16(batch.ffn_input_bf16().unwrap_or(&[])),
            },
            expert_ids: batch.expert_ids(),
            expert_weights: batch.expert_weights(),
        }
    }
}

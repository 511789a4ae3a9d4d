//! What an expert worker computes, as far as its logic is concerned: the real module, or one that costs nothing and can be checked.

use std::sync::Arc;

use volley_models::kernels::Rows;
use volley_models::{ExpertModule, ModuleError, WeightSource};

/// The operations of [`ExpertModule`], under the same names and with the same meaning.
pub(crate) trait ExpertCompute {
    /// Computes a layer for rows grouped by expert.
    fn forward(
        &mut self,
        layer: usize,
        experts: &[u16],
        offsets: &[u32],
        x: Rows<'_>,
        out: &mut [f32],
    ) -> Result<(), ModuleError>;

    /// Holds these experts too, beside those it was loaded with, and no others.
    fn adopt(&mut self, experts: &[u16]) -> Result<(), ModuleError>;

    /// The experts it holds.
    fn holds(&self) -> Vec<u16>;
}

/// A module, and where experts that it adopts come from.
pub(crate) struct Loaded {
    pub(crate) module: ExpertModule,
    pub(crate) weights: Arc<dyn WeightSource>,
}

impl ExpertCompute for Loaded {
    fn forward(
        &mut self,
        layer: usize,
        experts: &[u16],
        offsets: &[u32],
        x: Rows<'_>,
        out: &mut [f32],
    ) -> Result<(), ModuleError> {
        self.module.forward(layer, experts, offsets, x, out)
    }

    fn adopt(&mut self, experts: &[u16]) -> Result<(), ModuleError> {
        self.module.adopt(&*self.weights, experts, &mut |_| ())
    }

    fn holds(&self) -> Vec<u16> {
        self.module.experts().collect()
    }
}

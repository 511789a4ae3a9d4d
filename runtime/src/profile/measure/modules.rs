//! One module by itself: passes through all its layers, on all threads together, or on one while as many others compute the same beside it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use volley_models::{
    Activations, AttentionModule, AttentionOptions, ComputeType, Crew, ExpertModule, ExpertOptions,
    Isa, SequenceSlice, kernels::Rows,
};
use volley_planner::ModelShape;

use super::median_s;
use crate::failure::Failure;
use crate::launch::Launch;

/// Tokens of a KV block.
const BLOCK: usize = 16;
/// Rows that an expert's module takes at once, as in service.
const EXPERT_ROWS: usize = 512;

/// Something that computes passes of so many rows.
pub(super) trait Passes {
    /// Of how many rows the next passes are.
    fn prepare(&mut self, rows: usize) -> Result<(), Failure>;

    /// Once through all layers.
    fn pass(&mut self) -> Result<(), Failure>;

    /// What a pass is divided by: layers, or experts.
    fn parts(&self) -> usize;
}

/// Seconds of a part by rows, where `company` others do the same beside it, each on a thread of its own.
pub(super) fn curve_s<P: Passes>(
    make: impl Fn() -> Result<P, Failure> + Sync,
    sweep: &[usize],
    company: usize,
) -> Result<Vec<(f64, f64)>, Failure> {
    let (rows, ready, done) = (
        AtomicUsize::new(sweep.first().copied().unwrap_or(1)),
        AtomicUsize::new(0),
        AtomicBool::new(false),
    );
    let accompany = || -> Result<(), Failure> {
        let mut passes = make()?;
        ready.fetch_add(1, Ordering::Release);
        let mut of = 0;
        while !done.load(Ordering::Acquire) {
            let now = rows.load(Ordering::Acquire);
            if now != of {
                passes.prepare(now)?;
                of = now;
            }
            passes.pass()?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (0..company).map(|_| scope.spawn(accompany)).collect();
        let measure = || -> Result<Vec<(f64, f64)>, Failure> {
            let mut passes = make()?;
            while ready.load(Ordering::Acquire) < company
                && !others.iter().any(|other| other.is_finished())
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            let mut points = Vec::new();
            for &count in sweep {
                rows.store(count, Ordering::Release);
                passes.prepare(count)?;
                let each_s = median_s(|| passes.pass())? / passes.parts() as f64;
                points.push((count as f64, each_s));
            }
            Ok(points)
        };
        let points = measure();
        done.store(true, Ordering::Release);
        for other in others {
            other
                .join()
                .map_err(|_| Failure::new("a measuring thread panicked"))??;
        }
        points
    })
}

fn module<T, E: std::fmt::Display>(result: Result<T, E>) -> Result<T, Failure> {
    result.map_err(|error| Failure::new(error.to_string()))
}

/// What of an attention worker a pass computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// Attention and gate of all layers, as a step goes through them; each row has so many cached tokens.
    Layers {
        /// Cached tokens.
        start: u32,
    },
    /// Embedding and head.
    Head,
}

/// An attention module.
pub(super) struct AttentionPasses {
    part: Part,
    layers: usize,
    rows: usize,
    hidden: usize,
    vocab: usize,
    module: AttentionModule,
    acts: Activations,
    tables: Vec<Vec<u32>>,
    wanted: Vec<u32>,
    outputs: Vec<f32>,
    logits: Vec<f32>,
    /// Its threads end with it.
    _crew: Crew,
}

impl AttentionPasses {
    pub(super) fn new(
        launch: &Launch,
        model: &ModelShape,
        most: usize,
        threads: usize,
        part: Part,
    ) -> Result<Self, Failure> {
        let cluster = &launch.settings.cluster;
        let context = match part {
            Part::Layers { start } => start as usize,
            Part::Head => 0,
        };
        let blocks = (context + 1).div_ceil(BLOCK);
        let crew = module(Crew::new(threads, 1))?;
        let options = AttentionOptions {
            dtype: cluster.dtype,
            quantize: cluster.quantize,
            isa: Isa::detect(),
            kv_blocks: blocks * most,
            block_tokens: BLOCK,
            max_rows: most,
            micro_batches: 1,
            seats: Crew::seats(threads, 1),
        };
        let weights = launch.model.weights();
        let member = module(crew.join())?;
        let loaded = AttentionModule::load(&*weights, options, member, &mut |_| ());
        let attention = module(loaded)?;
        let table = |row: usize| (row * blocks..(row + 1) * blocks).map(|block| block as u32);
        Ok(Self {
            part,
            layers: model.layers(),
            rows: 0,
            hidden: model.hidden,
            vocab: model.vocab,
            acts: attention.activations(),
            module: attention,
            tables: (0..most).map(|row| table(row).collect()).collect(),
            wanted: (0..most as u32).collect(),
            outputs: vec![0.0; most * model.hidden],
            logits: vec![0.0; most * model.vocab],
            _crew: crew,
        })
    }
}

impl Passes for AttentionPasses {
    fn prepare(&mut self, rows: usize) -> Result<(), Failure> {
        self.rows = rows;
        let start = match self.part {
            Part::Layers { start } => start,
            Part::Head => 0,
        };
        let batch = self.tables[..rows].iter().map(|blocks| SequenceSlice {
            tokens: &[1],
            start,
            blocks,
        });
        module(self.module.begin(&mut self.acts, batch))
    }

    fn pass(&mut self) -> Result<(), Failure> {
        match self.part {
            Part::Layers { .. } => {
                let outputs = &self.outputs[..self.rows * self.hidden];
                for layer in 0..self.layers {
                    self.module.attention(layer, &mut self.acts);
                    self.module.add_ffn(&mut self.acts, outputs);
                }
            }
            Part::Head => {
                self.module.embed(&mut self.acts);
                let logits = &mut self.logits[..self.rows * self.vocab];
                // The rows exist: they were just begun.
                let _ = self
                    .module
                    .logits(&self.acts, &self.wanted[..self.rows], logits);
            }
        }
        Ok(())
    }

    fn parts(&self) -> usize {
        match self.part {
            Part::Layers { .. } => self.layers,
            Part::Head => 1,
        }
    }
}

/// An expert module, with as many rows for each expert.
pub(super) struct ExpertPasses {
    moe_layers: Vec<usize>,
    experts: Vec<u16>,
    hidden: usize,
    dtype: ComputeType,
    module: ExpertModule,
    offsets: Vec<u32>,
    x32: Vec<f32>,
    x16: Vec<u16>,
    y: Vec<f32>,
    /// Its threads end with it.
    _crew: Crew,
}

impl ExpertPasses {
    pub(super) fn new(
        launch: &Launch,
        model: &ModelShape,
        most: usize,
        threads: usize,
    ) -> Result<Self, Failure> {
        let cluster = &launch.settings.cluster;
        let crew = module(Crew::new(threads, 1))?;
        let options = ExpertOptions {
            dtype: cluster.dtype,
            quantize: cluster.quantize,
            isa: Isa::detect(),
            max_rows: EXPERT_ROWS,
        };
        let experts: Vec<u16> = (0..model.experts as u16).collect();
        let weights = launch.model.weights();
        let member = module(crew.join())?;
        let loaded = ExpertModule::load(&*weights, &experts, options, member, &mut |_| ());
        let rows = experts.len() * most;
        Ok(Self {
            moe_layers: launch.model.spec().moe_layers().collect(),
            experts,
            hidden: model.hidden,
            dtype: cluster.dtype,
            module: module(loaded)?,
            offsets: Vec::new(),
            x32: vec![0.1; rows * model.hidden],
            // 0.1 in bf16.
            x16: vec![0x3dcc; rows * model.hidden],
            y: vec![0.0; rows * model.hidden],
            _crew: crew,
        })
    }
}

impl Passes for ExpertPasses {
    fn prepare(&mut self, rows: usize) -> Result<(), Failure> {
        let offset = |expert: usize| (expert * rows) as u32;
        self.offsets = (0..=self.experts.len()).map(offset).collect();
        Ok(())
    }

    fn pass(&mut self) -> Result<(), Failure> {
        let count = self.offsets.last().map_or(0, |rows| *rows as usize) * self.hidden;
        for &layer in &self.moe_layers {
            let x = match self.dtype {
                ComputeType::F32 => Rows::F32(&self.x32[..count]),
                ComputeType::Bf16 => Rows::Bf16(&self.x16[..count]),
            };
            let y = &mut self.y[..count];
            module(
                self.module
                    .forward(layer, &self.experts, &self.offsets, x, y),
            )?;
        }
        Ok(())
    }

    fn parts(&self) -> usize {
        self.moe_layers.len() * self.experts.len()
    }
}

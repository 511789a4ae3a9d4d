//! What an expert worker computes: the gated FFN of the experts it owns, for rows that arrive grouped by expert.

use crate::ModelSpec;
use crate::crew::Member;
use crate::dtype::{ComputeType, Quantization, WeightTypes};
use crate::ffn::{FfnScratch, GatedFfn};
use crate::kernels::{Arena, Isa, Rows};
use crate::memory::{MemoryEstimate, ModuleError, Progress};
use crate::weights::{ExpertTensor, TensorId, WeightSource};

/// How an [`ExpertModule`] computes.
#[derive(Debug, Clone, Copy)]
pub struct ExpertOptions {
    /// Type of the weights, unless they are quantised.
    pub dtype: ComputeType,
    /// What they are quantised to, if at all.
    pub quantize: Option<Quantization>,
    /// Instruction set of the kernels.
    pub isa: Isa,
    /// Rows that scratch is sized for. More are worked off in waves of this many.
    pub max_rows: usize,
}

/// The packed weights of some experts, the same ones in every MoE layer.
#[derive(Debug)]
pub struct ExpertModule {
    /// Layers with experts.
    moe_layers: Vec<bool>,
    /// By global id; `None` for those it does not hold.
    experts: Vec<Option<Expert>>,
    /// Experts that were not there at first.
    adopted: Vec<u16>,
    options: ExpertOptions,
    hidden: usize,
    crew: Member,
    scratch: FfnScratch,
    wave: Wave,
}

/// One expert's weights, by layer; `None` where the layer is dense.
#[derive(Debug)]
struct Expert(Vec<Option<GatedFfn>>);

/// Groups of rows that are computed together.
#[derive(Debug)]
struct Wave {
    /// The expert of each group, by its index among those of the call.
    experts: Vec<usize>,
    /// Row that each group begins with, counted from the first of the wave; after the last, the end.
    bounds: Vec<usize>,
}

impl ExpertModule {
    /// Bytes that a module of `experts` experts will take.
    ///
    /// # Errors
    /// When they cannot be counted.
    pub fn memory(
        spec: &ModelSpec,
        experts: usize,
        options: ExpertOptions,
    ) -> Result<MemoryEstimate, ModuleError> {
        let kind = WeightTypes::new(spec, options.dtype, options.quantize).experts;
        let weights = || {
            let one = GatedFfn::bytes(kind, spec.hidden, spec.expert_hidden)?;
            one.checked_mul(experts)?
                .checked_mul(spec.moe_layers().count())
        };
        let scratch = FfnScratch::bytes(options.max_rows, spec.hidden, spec.expert_hidden);
        let scratch = scratch.and_then(|bytes| bytes.checked_add(Wave::bytes(spec.experts)));
        Ok(MemoryEstimate {
            weights: weights().ok_or(ModuleError::TooLarge {
                what: "the experts' weights",
            })?,
            kv: 0,
            scratch: scratch.ok_or(ModuleError::TooLarge {
                what: "the experts' scratch",
            })?,
        })
    }

    /// Packs the experts named by their global ids. The module computes with `crew`.
    ///
    /// # Errors
    /// When an id is not one of the model's or comes twice, when a weight is missing, or when sizes overflow.
    pub fn load(
        source: &dyn WeightSource,
        experts: &[u16],
        options: ExpertOptions,
        mut crew: Member,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, ModuleError> {
        let spec = source.spec();
        if options.max_rows == 0 {
            return Err(ModuleError::Option {
                option: "max_rows",
                found: 0,
                needed: "at least 1",
            });
        }
        let packed = Self::pack(source, experts, options, &mut crew, progress)?;
        let mut this = ExpertModule {
            moe_layers: vec![false; spec.layers.len()],
            experts: (0..spec.experts).map(|_| None).collect(),
            adopted: Vec::new(),
            options,
            hidden: spec.hidden,
            crew,
            wave: Wave::new(spec.experts),
            scratch: FfnScratch::new(
                options.isa,
                options.max_rows,
                spec.hidden,
                spec.expert_hidden,
            ),
        };
        spec.moe_layers()
            .for_each(|layer| this.moe_layers[layer] = true);
        for (&expert, packed) in experts.iter().zip(packed) {
            this.experts[usize::from(expert)] = Some(packed);
        }
        Ok(this)
    }

    /// Holds these experts too, beside those it was loaded with, and no others: what it had adopted before and is not named is dropped.
    ///
    /// # Errors
    /// As [`ExpertModule::load`]; none of the missing ones is held then.
    pub fn adopt(
        &mut self,
        source: &dyn WeightSource,
        experts: &[u16],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), ModuleError> {
        for expert in std::mem::take(&mut self.adopted) {
            if experts.contains(&expert) {
                self.adopted.push(expert);
            } else {
                self.experts[usize::from(expert)] = None;
            }
        }
        let held = |expert: &u16| {
            self.experts
                .get(usize::from(*expert))
                .is_some_and(Option::is_some)
        };
        let missing: Vec<u16> = experts
            .iter()
            .copied()
            .filter(|expert| !held(expert))
            .collect();
        let packed = Self::pack(source, &missing, self.options, &mut self.crew, progress)?;
        for (&expert, packed) in missing.iter().zip(packed) {
            self.experts[usize::from(expert)] = Some(packed);
            self.adopted.push(expert);
        }
        Ok(())
    }

    /// Packs experts into an arena of their own.
    fn pack(
        source: &dyn WeightSource,
        experts: &[u16],
        options: ExpertOptions,
        crew: &mut Member,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Expert>, ModuleError> {
        let spec = source.spec();
        for (i, expert) in experts.iter().enumerate() {
            if usize::from(*expert) >= spec.experts || experts[..i].contains(expert) {
                return Err(ModuleError::Expert {
                    expert: *expert,
                    experts: spec.experts,
                });
            }
        }
        let kind = WeightTypes::new(spec, options.dtype, options.quantize).experts;
        let total_bytes = Self::memory(spec, experts.len(), options)?.weights;
        let mut arena = Arena::new(total_bytes, crew);
        let empty = |_: &u16| Expert(spec.layers.iter().map(|_| None).collect());
        let mut all: Vec<Expert> = experts.iter().map(empty).collect();
        let prefetch = |layer: usize| {
            let tensors = |expert: &u16| {
                ExpertTensor::ALL.map(|which| TensorId::Expert(layer, usize::from(*expert), which))
            };
            experts
                .iter()
                .flat_map(tensors)
                .for_each(|id| source.prefetch(id));
        };
        spec.moe_layers().take(1).for_each(prefetch);
        for (layer, next) in spec
            .moe_layers()
            .zip(spec.moe_layers().skip(1).map(Some).chain([None]))
        {
            // Read while this layer is packed.
            next.into_iter().for_each(prefetch);
            for (expert, packed) in experts.iter().zip(&mut all) {
                let tensor =
                    |which| source.tensor(TensorId::Expert(layer, usize::from(*expert), which));
                packed.0[layer] = Some(GatedFfn::pack(
                    &mut arena,
                    kind,
                    tensor(ExpertTensor::Gate)?,
                    tensor(ExpertTensor::Up)?,
                    tensor(ExpertTensor::Down)?,
                ));
                progress(Progress {
                    packed_bytes: arena.used_bytes(),
                    total_bytes,
                });
            }
        }
        Ok(all)
    }

    /// Global ids of the experts it holds, ascending.
    pub fn experts(&self) -> impl Iterator<Item = u16> + '_ {
        let all = self.experts.iter().zip(0..);
        all.filter_map(|(expert, id)| expert.is_some().then_some(id))
    }

    /// The module's place in its crew.
    pub fn crew(&mut self) -> &mut Member {
        &mut self.crew
    }

    /// Computes layer `layer` for rows grouped by expert: rows `offsets[g]..offsets[g + 1]` of `x` visit the expert with the global id `experts[g]`,
    /// and their results, not yet weighted, go to the same rows of `out`. Groups may be empty.
    ///
    /// `offsets` has one value more than `experts`; `x` and `out` are `[last offset, hidden]`.
    ///
    /// # Errors
    /// When the layer has no experts, when one that has rows is not held, or when offsets and rows contradict each other; nothing is computed then.
    pub fn forward(
        &mut self,
        layer: usize,
        experts: &[u16],
        offsets: &[u32],
        x: Rows<'_>,
        out: &mut [f32],
    ) -> Result<(), ModuleError> {
        let hidden = self.hidden;
        if !self.moe_layers.get(layer).is_some_and(|&moe| moe) {
            return Err(ModuleError::Layer { layer });
        }
        let held = &self.experts;
        let find = |expert: u16| held.get(usize::from(expert))?.as_ref()?.0[layer].as_ref();
        let rows = offsets.last().map_or(0, |rows| *rows as usize);
        let consistent = offsets.len() == experts.len() + 1
            && offsets[0] == 0
            && offsets.is_sorted()
            && rows.checked_mul(hidden) == Some(x.len())
            && x.len() == out.len();
        if !consistent {
            return Err(ModuleError::Groups {
                groups: experts.len() + 1,
                rows: x.len() / hidden,
                hidden,
            });
        }
        // One without rows may have been dropped: replicas that are not sent to are.
        let mut groups = experts.iter().zip(offsets.windows(2));
        if let Some((&expert, _)) =
            groups.find(|&(&expert, rows)| rows[0] < rows[1] && find(expert).is_none())
        {
            return Err(ModuleError::NotHeld { expert });
        }
        let max_rows = self.options.max_rows;
        let mut first = 0;
        while first < rows {
            let last = rows.min(first + max_rows);
            self.wave.take(offsets, first, last);
            let Wave {
                experts: of,
                bounds,
            } = &self.wave;
            let ffn = |group: usize| {
                let expert = find(experts[of[group]]);
                expert.expect("all experts of the call were found above")
            };
            self.scratch.forward(
                self.options.isa,
                &mut self.crew,
                ffn,
                bounds,
                x.slice(first..last, hidden),
                &mut out[first * hidden..last * hidden],
            );
            first = last;
        }
        Ok(())
    }
}

impl Wave {
    fn new(experts: usize) -> Self {
        Wave {
            experts: Vec::with_capacity(experts),
            bounds: Vec::with_capacity(experts + 1),
        }
    }

    fn bytes(experts: usize) -> usize {
        (2 * experts + 1) * size_of::<usize>()
    }

    /// Takes rows `first..last`: the groups of `offsets` that have some of them.
    fn take(&mut self, offsets: &[u32], first: usize, last: usize) {
        self.experts.clear();
        self.bounds.clear();
        self.bounds.push(0);
        for (expert, group) in offsets.windows(2).enumerate() {
            let (start, end) = (first.max(group[0] as usize), last.min(group[1] as usize));
            if start < end {
                self.experts.push(expert);
                self.bounds.push(end - first);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::widen_bf16;
    use crate::testing::{Random, RandomWeights, dbrx, qwen3_moe};
    use crate::weights::ElementType;

    fn options(isa: Isa, dtype: ComputeType, max_rows: usize) -> ExpertOptions {
        ExpertOptions {
            dtype,
            quantize: None,
            isa,
            max_rows,
        }
    }

    /// One expert of one row, in f64.
    fn exact(source: &RandomWeights, layer: usize, expert: usize, x: &[f32]) -> Vec<f64> {
        let product = |which, x: &[f64]| -> Vec<f64> {
            let w = source
                .tensor(TensorId::Expert(layer, expert, which))
                .unwrap();
            (0..w.rows)
                .map(|r| (0..w.cols).map(|c| f64::from(w.at(r, c)) * x[c]).sum())
                .collect()
        };
        let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let (gate, up) = (
            product(ExpertTensor::Gate, &x),
            product(ExpertTensor::Up, &x),
        );
        let inner: Vec<f64> = gate
            .iter()
            .zip(&up)
            .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
            .collect();
        product(ExpertTensor::Down, &inner)
    }

    #[test]
    fn ragged_groups_are_each_rows_own_expert_in_any_pieces() {
        for spec in [qwen3_moe(), dbrx()] {
            for (element, dtype, quantize, tolerance) in [
                (ElementType::F32, ComputeType::F32, None, 1e-5),
                (ElementType::F16, ComputeType::F32, None, 1e-5),
                (ElementType::Bf16, ComputeType::Bf16, None, 2e-2),
                (
                    ElementType::F32,
                    ComputeType::F32,
                    Some(Quantization::Q8),
                    3e-2,
                ),
                (
                    ElementType::Bf16,
                    ComputeType::Bf16,
                    Some(Quantization::Q8),
                    4e-2,
                ),
                (
                    ElementType::Bf16,
                    ComputeType::Bf16,
                    Some(Quantization::Q4),
                    0.25,
                ),
            ] {
                let spec = ModelSpec {
                    stored_as: Some(element),
                    ..spec.clone()
                };
                let source = RandomWeights {
                    spec: spec.clone(),
                    element,
                    seed: 1,
                };
                let owned = [7, 0, 3, 5];
                let offsets = [0u32, 0, 1, 24, 31];
                let hidden = spec.hidden;
                let bits: Vec<u16> = Random::new(2)
                    .values(31 * hidden, 1.0)
                    .iter()
                    .map(|x| half::bf16::from_f32(*x).to_bits())
                    .collect();
                let mut x = vec![0.0; bits.len()];
                widen_bf16(&bits, &mut x);
                for isa in Isa::available() {
                    let mut results = Vec::new();
                    for max_rows in [1, 5, 64] {
                        let options = ExpertOptions {
                            quantize,
                            ..options(isa, dtype, max_rows)
                        };
                        let mut seen = 0;
                        let mut module = ExpertModule::load(
                            &source,
                            &owned,
                            options,
                            Member::alone(),
                            &mut |p| seen = p.packed_bytes,
                        )
                        .unwrap();
                        assert_eq!(
                            seen,
                            ExpertModule::memory(&spec, 4, options).unwrap().weights
                        );
                        let mut out = vec![0.0; x.len()];
                        module
                            .forward(0, &owned, &offsets, Rows::F32(&x), &mut out)
                            .unwrap();
                        results.push(out.clone());
                        if dtype == ComputeType::Bf16 {
                            module
                                .forward(0, &owned, &offsets, Rows::Bf16(&bits), &mut out)
                                .unwrap();
                            results.push(out);
                        }
                    }
                    assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{isa:?}");
                    for (group, expert) in offsets.windows(2).zip(owned) {
                        for row in group[0] as usize..group[1] as usize {
                            let exact =
                                exact(&source, 0, expert.into(), &x[row * hidden..][..hidden]);
                            let size = exact.iter().map(|x| x * x).sum::<f64>().sqrt();
                            let error = exact
                                .iter()
                                .zip(&results[0][row * hidden..])
                                .map(|(a, b)| (a - f64::from(*b)).powi(2))
                                .sum::<f64>()
                                .sqrt();
                            assert!(
                                error <= tolerance * size,
                                "{isa:?} {dtype} {error} of {size}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn contradictions_are_refused() {
        let source = RandomWeights {
            spec: qwen3_moe(),
            element: ElementType::F32,
            seed: 1,
        };
        let options = options(Isa::detect(), ComputeType::F32, 8);
        let load = |experts: &[u16]| {
            ExpertModule::load(&source, experts, options, Member::alone(), &mut |_| ())
        };
        assert!(matches!(
            load(&[3, 3]),
            Err(ModuleError::Expert { expert: 3, .. })
        ));
        assert!(matches!(
            load(&[13]),
            Err(ModuleError::Expert { expert: 13, .. })
        ));
        let mut module = load(&[1, 2]).unwrap();
        let x = vec![0.0; 2 * 52];
        let mut forward = |layer, offsets: &[u32], len: usize| {
            module.forward(
                layer,
                &[1, 2],
                offsets,
                Rows::F32(&x[..len]),
                &mut vec![0.0; len],
            )
        };
        assert!(matches!(
            forward(1, &[0, 1, 2], 104),
            Err(ModuleError::Layer { layer: 1 })
        ));
        assert!(matches!(
            forward(9, &[0, 1, 2], 104),
            Err(ModuleError::Layer { layer: 9 })
        ));
        for offsets in [
            &[0u32, 2][..],
            &[0, 2, 1],
            &[1, 1, 2],
            &[0, 1, 3],
            &[0, 1, u32::MAX],
            &[],
        ] {
            assert!(matches!(
                forward(0, offsets, 104),
                Err(ModuleError::Groups { .. })
            ));
        }
        assert!(forward(0, &[0, 0, 0], 0).is_ok());
        assert!(forward(2, &[0, 2, 2], 104).is_ok());
        let out = &mut [0.0; 104];
        assert!(matches!(
            module.forward(0, &[1, 3], &[0, 1, 2], Rows::F32(&x), out),
            Err(ModuleError::NotHeld { expert: 3 })
        ));
    }

    #[test]
    fn adopted_experts_compute_as_at_home_and_leave_again() {
        let source = RandomWeights {
            spec: qwen3_moe(),
            element: ElementType::F32,
            seed: 1,
        };
        let options = options(Isa::detect(), ComputeType::F32, 8);
        let load = |experts: &[u16]| {
            ExpertModule::load(&source, experts, options, Member::alone(), &mut |_| ())
        };
        let x = Random::new(2).values(3 * 52, 1.0);
        let compute = |module: &mut ExpertModule| {
            let mut out = vec![0.0; x.len()];
            let computed = module.forward(0, &[2, 5], &[0, 1, 3], Rows::F32(&x), &mut out);
            computed.map(|()| out)
        };
        let expected = compute(&mut load(&[2, 5]).unwrap()).unwrap();
        let mut module = load(&[2]).unwrap();
        assert!(compute(&mut module).is_err());
        module.adopt(&source, &[5, 1], &mut |_| ()).unwrap();
        assert_eq!(module.experts().collect::<Vec<_>>(), [1, 2, 5]);
        assert_eq!(compute(&mut module).unwrap(), expected);
        // What is adopted already stays, what is at home is not adopted, and the rest goes.
        module
            .adopt(&source, &[2, 5], &mut |_| panic!("nothing to load"))
            .unwrap();
        assert_eq!(module.experts().collect::<Vec<_>>(), [2, 5]);
        assert_eq!(compute(&mut module).unwrap(), expected);
        assert!(module.adopt(&source, &[99], &mut |_| ()).is_err());
        assert_eq!(module.experts().collect::<Vec<_>>(), [2]);
    }
}

//! A bounded fleet: how many GPUs of each type there are, and how replicas fill them.

use std::collections::BTreeMap;

use super::pairs::best_of_pairs;
use super::{Candidate, Request, Share};
use crate::deployment::Setting;
use crate::{Deployment, Hardware, PlanError};

/// GPUs that are left.
#[derive(Debug, Clone)]
pub(super) struct Stock {
    pub(super) all: usize,
    pub(super) of: BTreeMap<String, usize>,
}

impl Stock {
    pub(super) fn of(hardware: &Hardware, request: &Request) -> Self {
        let available = hardware.gpus.iter();
        Self {
            all: request.gpus.unwrap_or(usize::MAX),
            of: available
                .filter_map(|(name, gpu)| Some((name.clone(), gpu.available?)))
                .collect(),
        }
    }

    fn is_bounded(&self) -> bool {
        self.all != usize::MAX || !self.of.is_empty()
    }

    fn left(&self, gpu: &str) -> usize {
        self.of
            .get(gpu)
            .copied()
            .unwrap_or(usize::MAX)
            .min(self.all)
    }

    /// How often a deployment fits.
    pub(super) fn replicas(&self, deployment: &Deployment) -> usize {
        let (attention, experts) = (&deployment.attention.gpu, &deployment.experts.gpu);
        let all = self.all / deployment.gpus();
        if attention == experts {
            return all.min(self.left(attention) / deployment.gpus());
        }
        all.min(self.left(attention) / deployment.attention_gpus())
            .min(self.left(experts) / deployment.expert_gpus())
    }

    fn take(&mut self, deployment: &Deployment, replicas: usize) {
        if self.all != usize::MAX {
            self.all -= replicas * deployment.gpus();
        }
        for (gpu, count) in [
            (&deployment.attention.gpu, deployment.attention_gpus()),
            (&deployment.experts.gpu, deployment.expert_gpus()),
        ] {
            if let Some(left) = self.of.get_mut(gpu) {
                *left -= replicas * count;
            }
        }
    }
}

/// Fills a bounded fleet with replicas of the best deployment, what is left with the best for what is left, and so on.
pub(super) fn fleet(
    setting: Setting<'_>,
    request: &Request,
    first: &Candidate,
) -> Result<Vec<Share>, PlanError> {
    let mut stock = Stock::of(setting.hardware, request);
    let mut shares = Vec::new();
    if !stock.is_bounded() {
        return Ok(shares);
    }
    let mut next = Some(first.clone());
    while let Some(candidate) = next {
        let replicas = stock.replicas(&candidate.deployment);
        if replicas == 0 || replicas == usize::MAX {
            break;
        }
        stock.take(&candidate.deployment, replicas);
        shares.push(Share {
            replicas,
            candidate,
        });
        next = best_of_pairs(setting, request, &stock)?.into_iter().next();
    }
    Ok(shares)
}

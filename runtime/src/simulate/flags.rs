//! What flags of `volley simulate` say.

use std::str::FromStr;

use volley_planner::cost::Side;
use volley_planner::simulate::Outage;
use volley_transports::Role;

/// GPUs of a worker.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct GpuFlag(pub(super) Side);

impl FromStr for GpuFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (gpu, tp) = text.split_once(':').unwrap_or((text, "1"));
        let tp = tp.parse().ok().filter(|tp| *tp > 0);
        let tp = tp.ok_or_else(|| {
            format!("write a GPU and how many make a worker, as A800:8, not {text:?}")
        })?;
        Ok(GpuFlag(Side {
            gpu: gpu.to_owned(),
            tp,
        }))
    }
}

/// A worker that is gone for a while.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct OutageFlag(pub(super) Outage);

impl FromStr for OutageFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (worker, times) = text.split_once('@')?;
            let (at, lasts) = times.split_once('+')?;
            let (role, index) = worker.rsplit_once('-')?;
            let role = match role {
                "attention" => Role::Attention,
                "expert" => Role::Expert,
                _ => return None,
            };
            Some(Outage {
                worker: role.worker(index.parse().ok()?),
                at_s: at.parse().ok()?,
                lasts_s: lasts.parse().ok()?,
            })
        };
        parse().map(OutageFlag).ok_or_else(|| {
            format!("write a worker, when it goes and for how long, as expert-2@10+5, not {text:?}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_and_times_of_failures_are_read() {
        let OutageFlag(outage) = "expert-12@10.5+3".parse().unwrap();
        assert_eq!(
            outage,
            Outage {
                worker: Role::Expert.worker(12),
                at_s: 10.5,
                lasts_s: 3.0
            }
        );
        for wrong in [
            "expert-1",
            "expert@1+1",
            "gpu-1@1+1",
            "attention-1@1",
            "attention-x@1+1",
        ] {
            assert!(wrong.parse::<OutageFlag>().is_err(), "{wrong}");
        }
        assert_eq!("A800:8".parse::<GpuFlag>().unwrap().0.tp, 8);
        assert!("A800:0".parse::<GpuFlag>().is_err());
    }
}

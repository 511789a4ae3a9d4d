//! The expert worker: holds a share of every layer's experts and no state of any request.

mod actor;
mod compute;
mod load;
mod logic;

pub(crate) use actor::live;
pub(crate) use compute::ExpertCompute;
pub use load::ExpertLoad;
pub(crate) use logic::{Begun, ExpertCommand, ExpertLogic, ExpertParts};

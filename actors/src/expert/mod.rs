//! The expert worker: holds a share of every layer's experts and no state of any request.

mod actor;
mod data_loop;
mod load;

pub(crate) use actor::live;
pub(crate) use data_loop::ExpertCommand;
pub use load::ExpertLoad;

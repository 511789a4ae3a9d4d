//! One configuration: `volley.toml`, environment variables and flags, checked as a whole before anything starts.
//!
//! There are two stages. [`Raw`] is what was typed: flags over environment over file over defaults, every key known and every value
//! in its range. [`Settings`] is what it means for one model on one machine: every `auto` replaced by what it stands for.

pub mod keys;
mod kind;
mod planned;
mod policy;
mod problem;
mod raw;
mod settings;
mod size;
pub(crate) mod suggest;

pub use kind::Kind;
pub use planned::ClusterOutline;
pub use policy::{OrderSettings, SchedulerSettings};
pub use problem::{ConfigError, Place, Problem};
pub use raw::{
    FlagValues, Isolate, LogFormat, LogSettings, MembershipBackend, Raw, Transport, environment,
};
pub use settings::{
    CONTEXT_AUTO_MAX, Demand, KV_CONTEXTS_AUTO, MembershipSettings, ModelSettings, NetworkSettings,
    RdmaSettings, ServerSettings, Settings, TRACE_SPANS_AUTO, TraceSettings,
};
pub use size::{ByteSize, SizeError};

//! The program `volley`: configuration, launch, the HTTP API, and every command.
//!
//! A command reads as: flags -> [`config::Raw`] -> [`config::Settings`] -> [`engine::Engine`] -> what it does. [`cli::main`] is the way in.

pub mod bench;
mod build;
pub mod certificate;
pub mod certs;
pub mod children;
pub mod cli;
pub mod config;
pub mod demo;
pub mod doctor;
pub mod drain;
pub mod engine;
pub mod failure;
pub mod files;
pub mod fingerprint;
pub mod flags;
pub mod generate;
pub mod http;
mod http_client;
mod inspection;
mod known_traffic;
pub mod launch;
pub mod load;
pub mod logging;
mod manual;
pub mod membership;
pub mod memory;
pub mod network;
pub mod numerics;
mod plan;
mod profile;
pub mod progress;
pub mod rally;
pub mod random;
mod rdma_counters;
pub mod recorder;
mod reproduce;
pub mod scheduler;
pub mod serve;
pub mod signals;
mod simulate;
pub mod stats;
pub mod text;
mod top;
pub mod trace;
pub mod validate;
mod vet;
pub mod worker;
pub mod worker_http;

pub use simulate::simulate_with;

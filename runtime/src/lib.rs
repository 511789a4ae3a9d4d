//! The program `volley`: configuration, launch, the HTTP API, and every command.
//!
//! A command reads as: flags -> [`config::Raw`] -> [`config::Settings`] -> [`engine::Engine`] -> what it does. [`cli::main`] is the way in.

pub mod cli;
pub mod config;
pub mod engine;
pub mod failure;
pub mod flags;
pub mod http;
pub mod logging;
pub mod memory;
pub mod recorder;
pub mod text;

//! The HTTP API from outside: a real server, a real model, real sockets.

mod chat;
mod completions;
mod errors;
mod hostile;
mod lifecycle;
mod operations;
mod server;

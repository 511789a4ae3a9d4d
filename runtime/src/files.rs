//! Open files: as many as the system lets this process have, and a word where they do not suffice.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Files beside those of HTTP connections: the model's, sockets, logs.
const OTHERS: usize = 256;

/// Raises this process's own limit of open files as far as the system allows, and warns if `connections` do not fit.
pub fn prepare(connections: usize) {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    // None is no limit.
    let limit = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => maximum,
        Err(_) => current,
    };
    let wanted = (connections + OTHERS) as u64;
    if let Some(limit) = limit.filter(|&limit| limit < wanted) {
        tracing::warn!(
            "server.max_connections is {connections}, but this process may have {limit} files open: raise the limit (ulimit -n, LimitNOFILE= in a systemd unit), or lower server.max_connections"
        );
    }
}

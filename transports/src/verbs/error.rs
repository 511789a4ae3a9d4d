//! Why verbs could not be used.

use std::io;

/// Why a device, a resource or a transition could not be had. Posting has an error of its own: [`PostError`](super::PostError).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerbsError {
    /// libibverbs is not on this machine, or is too old.
    #[error(
        "libibverbs cannot be used: {reason}; install it (Debian: libibverbs1 and ibverbs-providers; RHEL: libibverbs), or choose another transport"
    )]
    Library {
        /// What the dynamic linker says.
        reason: String,
    },
    /// A call was refused.
    #[error("{call} on {on}: {error}{}", remedy(call, error))]
    Call {
        /// The libibverbs call.
        call: &'static str,
        /// The device, and what of it.
        on: String,
        /// What the system says.
        error: io::Error,
    },
    /// There is no such device.
    #[error("there is no RDMA device `{name}` here; there are: {present}")]
    NoDevice {
        /// The name that was asked for.
        name: String,
        /// Those that are there.
        present: String,
    },
    /// The device has no such port.
    #[error("{device} has no port {port}: it has {ports}, numbered from 1")]
    NoPort {
        /// The device.
        device: String,
        /// The port that was asked for.
        port: u8,
        /// How many there are.
        ports: u8,
    },
    /// A part of a region lies outside of it.
    #[error("bytes {start}..{end} are outside of a region of {len} bytes")]
    OutOfRegion {
        /// First byte.
        start: usize,
        /// One past the last byte.
        end: usize,
        /// Length of the region.
        len: usize,
    },
    /// Memory for a region could not be had.
    #[error("{bytes} bytes of memory for RDMA cannot be had: {error}{}", huge(*huge_pages))]
    Memory {
        /// How many.
        bytes: usize,
        /// Whether huge pages were asked for.
        huge_pages: bool,
        /// What the system says.
        error: io::Error,
    },
    /// A setting is outside of what the protocol can express.
    #[error("{what} is {value}, but verbs take at most {max}")]
    Range {
        /// The setting.
        what: &'static str,
        /// What it was.
        value: u64,
        /// Its limit.
        max: u64,
    },
}

impl VerbsError {
    pub(super) fn last(call: &'static str, on: impl Into<String>) -> Self {
        let on = on.into();
        let error = io::Error::last_os_error();
        Self::Call { call, on, error }
    }

    /// Of calls that return the error's number.
    pub(super) fn numbered(call: &'static str, on: impl Into<String>, number: i32) -> Self {
        let on = on.into();
        let error = io::Error::from_raw_os_error(number.abs());
        Self::Call { call, on, error }
    }
}

fn remedy(call: &str, error: &io::Error) -> &'static str {
    match (call, error.raw_os_error()) {
        ("ibv_reg_mr", Some(libc::ENOMEM | libc::EPERM | libc::EAGAIN)) => {
            "; raise the limit on locked memory (ulimit -l unlimited, LimitMEMLOCK=infinity)"
        }
        ("ibv_open_device", Some(libc::EACCES | libc::EPERM | libc::ENOENT)) => {
            "; /dev/infiniband/uverbs* must be there and readable (in a container: pass the device through)"
        }
        ("ibv_create_qp" | "ibv_create_cq", Some(libc::ENOMEM)) => {
            "; the device or the limit on locked memory is exhausted: fewer or shorter queues"
        }
        ("ibv_create_qp", Some(libc::EINVAL)) => {
            "; the device does not offer queues of this length, so many pieces or so much inline"
        }
        ("ibv_modify_qp", Some(libc::ETIMEDOUT)) => {
            "; the peer's address does not resolve: do both GIDs lie in one network?"
        }
        _ => "",
    }
}

fn huge(huge_pages: bool) -> &'static str {
    if huge_pages {
        "; reserve huge pages (sysctl vm.nr_hugepages) or do not ask for them"
    } else {
        ""
    }
}

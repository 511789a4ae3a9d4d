//! What ends a data loop's sleep beside a completion: a waker, or news of a peer.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::Wake;

/// Rung from any thread. A ring is remembered until it is heard.
///
/// The sleeper sets `asleep`, then looks at the flags, then sleeps on the descriptor. A ringer sets its flag, then looks at `asleep`. All are sequentially consistent,
/// so at least one of the two sees the other: either the sleeper sees the flag, or the ringer writes the descriptor.
pub(super) struct Bell {
    woken: AtomicBool,
    news: AtomicBool,
    asleep: AtomicBool,
    fd: OwnedFd,
}

impl Bell {
    pub(super) fn new() -> std::io::Result<Self> {
        // SAFETY: a new descriptor, owned by nobody yet.
        let fd = unsafe {
            let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
            if fd < 0 {
                return Err(std::io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        Ok(Self {
            woken: AtomicBool::new(false),
            news: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            fd,
        })
    }

    /// There is news of a peer.
    pub(super) fn announce(&self) {
        self.news.store(true, Ordering::SeqCst);
        self.ring();
    }

    fn ring(&self) {
        if self.asleep.load(Ordering::SeqCst) {
            let one = 1_u64;
            // SAFETY: eight bytes to a descriptor of ours. A counter that is full is readable already.
            unsafe { libc::write(self.fd.as_raw_fd(), (&raw const one).cast(), 8) };
        }
    }

    /// Whether somebody used the waker since the last call.
    pub(super) fn take_wake(&self) -> bool {
        self.woken.load(Ordering::Relaxed) && self.woken.swap(false, Ordering::SeqCst)
    }

    /// Whether there was news since the last call.
    pub(super) fn take_news(&self) -> bool {
        self.news.load(Ordering::Relaxed) && self.news.swap(false, Ordering::SeqCst)
    }

    /// From now on rings write the descriptor; whoever calls this looks once more before it sleeps.
    pub(super) fn fall_asleep(&self) {
        self.asleep.store(true, Ordering::SeqCst);
    }

    /// Whether something was rung that was not heard.
    pub(super) fn is_rung(&self) -> bool {
        self.woken.load(Ordering::SeqCst) || self.news.load(Ordering::SeqCst)
    }

    pub(super) fn wake_up(&self) {
        self.asleep.store(false, Ordering::SeqCst);
        let mut count = 0_u64;
        // SAFETY: eight bytes from a descriptor of ours, which does not block.
        unsafe { libc::read(self.fd.as_raw_fd(), (&raw mut count).cast(), 8) };
    }
}

impl AsRawFd for Bell {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Wake for Bell {
    fn wake(&self) {
        self.woken.store(true, Ordering::SeqCst);
        self.ring();
    }
}

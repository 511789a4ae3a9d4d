//! Events of a device that belong to no request: ports that go down, queue pairs that break.

use std::ffi::CStr;
use std::fmt;

use super::Context;
use super::ffi;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AsyncEventKind {
    /// A queue pair broke (or, harmlessly, took its first message before it was told that it may).
    QueuePair {
        /// Its number.
        number: u32,
        /// Whether it can still be used.
        fatal: bool,
    },
    /// A port carries traffic again.
    PortUp(u8),
    /// A port carries none any more.
    PortDown(u8),
    /// Addresses of a port changed.
    AddressesChanged(u8),
    /// A completion queue overflowed.
    CompletionQueue,
    /// The device is of no use any more.
    Device,
    /// Anything else.
    Other,
}

/// An event of a device.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct AsyncEvent {
    /// What happened.
    pub kind: AsyncEventKind,
    name: &'static CStr,
}

impl fmt::Display for AsyncEvent {
    /// As libibverbs calls it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name.to_string_lossy())
    }
}

impl fmt::Debug for AsyncEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self} ({:?})", self.kind)
    }
}

/// Takes the next event and acknowledges it at once: destroying a queue pair would wait for that.
pub(super) fn next(context: &Context) -> Option<AsyncEvent> {
    let library = context.library();
    let mut event = ffi::AsyncEvent {
        element: ffi::EventElement { port_num: 0 },
        event_type: 0,
    };
    // SAFETY: the context is open, its descriptor does not block, and `event` has the header's layout.
    if unsafe { (library.get_async_event)(context.raw(), &mut event) } != 0 {
        return None;
    }
    // SAFETY: the element is read as what the header says it is for the type; a queue pair cannot be freed before its event is acknowledged.
    let kind = unsafe {
        let queue_pair = |fatal| AsyncEventKind::QueuePair {
            number: (*event.element.qp).qp_num,
            fatal,
        };
        let port = || u8::try_from(event.element.port_num).unwrap_or(0);
        match event.event_type {
            0 => AsyncEventKind::CompletionQueue,
            // QP_FATAL, QP_REQ_ERR, QP_ACCESS_ERR
            1..=3 => queue_pair(true),
            // COMM_EST, SQ_DRAINED, PATH_MIG, PATH_MIG_ERR, QP_LAST_WQE_REACHED
            4..=7 | 16 => queue_pair(false),
            8 => AsyncEventKind::Device,
            9 => AsyncEventKind::PortUp(port()),
            10 => AsyncEventKind::PortDown(port()),
            // LID_CHANGE, PKEY_CHANGE, SM_CHANGE, CLIENT_REREGISTER, GID_CHANGE
            11..=13 | 17 | 18 => AsyncEventKind::AddressesChanged(port()),
            _ => AsyncEventKind::Other,
        }
    };
    // SAFETY: the event that was just taken; the name is a string of the library, which stays open.
    let name = unsafe {
        (library.ack_async_event)(&mut event);
        CStr::from_ptr((library.event_type_str)(event.event_type))
    };
    Some(AsyncEvent { kind, name })
}

//! The devices of this host.

use std::ffi::CStr;

use super::VerbsError;
use super::context::Context;
use super::ffi;
use super::library::Library;

/// The RDMA devices of this host, as they were when it was made.
pub struct DeviceList {
    library: &'static Library,
    list: *mut *mut ffi::Device,
    len: usize,
}

// SAFETY: the list is not changed after it was made; libibverbs counts references to its devices under a lock.
unsafe impl Send for DeviceList {}
// SAFETY: as above.
unsafe impl Sync for DeviceList {}

/// One device, not opened.
#[derive(Clone, Copy)]
pub struct Device<'list> {
    list: &'list DeviceList,
    device: *mut ffi::Device,
}

impl DeviceList {
    /// Opens libibverbs and asks it.
    ///
    /// # Errors
    /// libibverbs is not here, or the kernel's interface is not.
    pub fn open() -> Result<Self, VerbsError> {
        let library = Library::get()?;
        let mut count = 0;
        // SAFETY: the call writes the count and returns an array of that many entries, or null.
        let list = unsafe { (library.get_device_list)(&mut count) };
        if list.is_null() {
            return Err(VerbsError::last("ibv_get_device_list", "this host"));
        }
        Ok(Self {
            library,
            list,
            len: usize::try_from(count).unwrap_or(0),
        })
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = Device<'_>> {
        (0..self.len).map(|index| Device {
            list: self,
            // SAFETY: `list` has `len` entries.
            device: unsafe { *self.list.add(index) },
        })
    }

    /// Number of devices.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device of this name, opened.
    ///
    /// # Errors
    /// There is none (the message lists those there are), or it cannot be opened.
    pub fn context(&self, name: &str) -> Result<Context, VerbsError> {
        let device = self.iter().find(|device| device.name() == name);
        let device = device.ok_or_else(|| {
            let names: Vec<&str> = self.iter().map(|device| device.name()).collect();
            let present = if names.is_empty() {
                "none".to_owned()
            } else {
                names.join(", ")
            };
            VerbsError::NoDevice {
                name: name.to_owned(),
                present,
            }
        })?;
        device.open()
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        // SAFETY: `list` came from `get_device_list`; opened devices keep references of their own.
        unsafe { (self.library.free_device_list)(self.list) }
    }
}

impl<'list> Device<'list> {
    /// Its name, as in `/sys/class/infiniband`.
    pub fn name(&self) -> &'list str {
        // SAFETY: the library fills `name` with a terminated string, and the list keeps the device alive.
        let name = unsafe { CStr::from_ptr((*self.device).name.as_ptr()) };
        name.to_str().unwrap_or("?")
    }

    /// Opens it.
    ///
    /// # Errors
    /// The system does not let this process.
    pub fn open(&self) -> Result<Context, VerbsError> {
        // SAFETY: the device is one of the list's, which lives.
        let context = unsafe { (self.list.library.open_device)(self.device) };
        if context.is_null() {
            return Err(VerbsError::last("ibv_open_device", self.name()));
        }
        // SAFETY: an open device, which is handed over.
        unsafe { Context::from_raw(self.list.library, context, self.name()) }
    }
}

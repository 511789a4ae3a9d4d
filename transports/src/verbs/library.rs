//! libibverbs, opened at run time, and the calls it exports.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use super::VerbsError;
use super::ffi::{
    Ah, AhAttr, AsyncEvent, CompChannel, Context, Cq, Device, DeviceAttr, GidEntry, Mr, Pd,
    PortAttr, Qp, QpAttr, QpInitAttr,
};

/// The name of the interface's only major version.
const NAME: &str = "libibverbs.so.1";

macro_rules! library {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// The exported calls, resolved once.
        pub(super) struct Library {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            /// Not in every version: memory of other devices.
            pub(super) reg_dmabuf_mr: Option<unsafe extern "C" fn(*mut Pd, u64, usize, u64, c_int, c_int) -> *mut Mr>,
            /// Open as long as its functions can be called.
            _open: libloading::Library,
        }

        impl Library {
            fn open() -> Result<Self, String> {
                // SAFETY: the system's own libibverbs, whose initialisers do nothing but register its providers.
                let library = unsafe { libloading::Library::new(NAME) };
                let library = library.map_err(|error| error.to_string())?;
                Ok(Self {
                    $($field: {
                        // SAFETY: the symbol has this type in every version of the interface; see `ffi`.
                        let symbol = unsafe { library.get($symbol.as_bytes()) };
                        *symbol.map_err(|error| format!("{NAME} is too old: {error}"))?
                    },)*
                    // SAFETY: as above.
                    reg_dmabuf_mr: unsafe { library.get(b"ibv_reg_dmabuf_mr") }.ok().map(|symbol| *symbol),
                    _open: library,
                })
            }
        }
    };
}

library! {
    get_device_list = "ibv_get_device_list": fn(*mut c_int) -> *mut *mut Device;
    free_device_list = "ibv_free_device_list": fn(*mut *mut Device);
    open_device = "ibv_open_device": fn(*mut Device) -> *mut Context;
    close_device = "ibv_close_device": fn(*mut Context) -> c_int;
    query_device = "ibv_query_device": fn(*mut Context, *mut DeviceAttr) -> c_int;
    query_port = "ibv_query_port": fn(*mut Context, u8, *mut PortAttr) -> c_int;
    query_gid_table = "_ibv_query_gid_table": fn(*mut Context, *mut GidEntry, usize, u32, usize) -> isize;
    get_async_event = "ibv_get_async_event": fn(*mut Context, *mut AsyncEvent) -> c_int;
    ack_async_event = "ibv_ack_async_event": fn(*mut AsyncEvent);
    alloc_pd = "ibv_alloc_pd": fn(*mut Context) -> *mut Pd;
    dealloc_pd = "ibv_dealloc_pd": fn(*mut Pd) -> c_int;
    reg_mr = "ibv_reg_mr": fn(*mut Pd, *mut c_void, usize, c_int) -> *mut Mr;
    dereg_mr = "ibv_dereg_mr": fn(*mut Mr) -> c_int;
    create_comp_channel = "ibv_create_comp_channel": fn(*mut Context) -> *mut CompChannel;
    destroy_comp_channel = "ibv_destroy_comp_channel": fn(*mut CompChannel) -> c_int;
    create_cq = "ibv_create_cq": fn(*mut Context, c_int, *mut c_void, *mut CompChannel, c_int) -> *mut Cq;
    destroy_cq = "ibv_destroy_cq": fn(*mut Cq) -> c_int;
    get_cq_event = "ibv_get_cq_event": fn(*mut CompChannel, *mut *mut Cq, *mut *mut c_void) -> c_int;
    ack_cq_events = "ibv_ack_cq_events": fn(*mut Cq, c_uint);
    create_qp = "ibv_create_qp": fn(*mut Pd, *mut QpInitAttr) -> *mut Qp;
    modify_qp = "ibv_modify_qp": fn(*mut Qp, *mut QpAttr, c_int) -> c_int;
    query_qp = "ibv_query_qp": fn(*mut Qp, *mut QpAttr, c_int, *mut QpInitAttr) -> c_int;
    destroy_qp = "ibv_destroy_qp": fn(*mut Qp) -> c_int;
    create_ah = "ibv_create_ah": fn(*mut Pd, *mut AhAttr) -> *mut Ah;
    destroy_ah = "ibv_destroy_ah": fn(*mut Ah) -> c_int;
    event_type_str = "ibv_event_type_str": fn(c_uint) -> *const c_char;
    wc_status_str = "ibv_wc_status_str": fn(c_uint) -> *const c_char;
}

impl Library {
    /// The library; the error is the same each time.
    pub(super) fn get() -> Result<&'static Self, VerbsError> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        let library = LIBRARY.get_or_init(Self::open).as_ref();
        library.map_err(|reason| VerbsError::Library {
            reason: reason.clone(),
        })
    }
}

//! The part of libibverbs' binary interface that this crate uses: structures as the C library lays them out, and nothing else.
//!
//! The interface has been stable since version 1.1 of the library (2008); the test below holds every size, offset and constant against the header where that is
//! installed. Names are the header's without their prefix. Fields that are not read are kept as bytes of the right size, so that what follows stands where it must.

#![allow(missing_docs, unreachable_pub, dead_code)]

use std::ffi::{c_char, c_int, c_uint, c_void};

/// `union ibv_gid`, in network order.
pub type RawGid = [u8; 16];

#[repr(C)]
pub struct Device {
    ops: [*mut c_void; 2],
    pub node_type: c_int,
    pub transport_type: c_int,
    pub name: [c_char; 64],
    pub dev_name: [c_char; 64],
    pub dev_path: [c_char; 256],
    pub ibdev_path: [c_char; 256],
}

/// Transport of a device: an RDMA network interface of iWARP.
pub const TRANSPORT_IWARP: c_int = 1;

pub type PollCq = unsafe extern "C" fn(*mut Cq, c_int, *mut Wc) -> c_int;
pub type ReqNotifyCq = unsafe extern "C" fn(*mut Cq, c_int) -> c_int;
pub type PostSend = unsafe extern "C" fn(*mut Qp, *mut SendWr, *mut *mut SendWr) -> c_int;
pub type PostRecv = unsafe extern "C" fn(*mut Qp, *mut RecvWr, *mut *mut RecvWr) -> c_int;

/// `struct ibv_context_ops`: calls that the header makes through this table, inline.
#[repr(C)]
pub struct ContextOps {
    before_poll: [*mut c_void; 11],
    pub poll_cq: PollCq,
    pub req_notify_cq: ReqNotifyCq,
    before_send: [*mut c_void; 12],
    pub post_send: PostSend,
    pub post_recv: PostRecv,
    rest: [*mut c_void; 5],
}

#[repr(C)]
pub struct Context {
    pub device: *mut Device,
    pub ops: ContextOps,
    pub cmd_fd: c_int,
    pub async_fd: c_int,
    pub num_comp_vectors: c_int,
}

#[repr(C)]
pub struct Pd {
    pub context: *mut Context,
    pub handle: u32,
}

#[repr(C)]
pub struct Mr {
    pub context: *mut Context,
    pub pd: *mut Pd,
    pub addr: *mut c_void,
    pub length: usize,
    pub handle: u32,
    pub lkey: u32,
    pub rkey: u32,
}

#[repr(C)]
pub struct CompChannel {
    pub context: *mut Context,
    pub fd: c_int,
    pub refcnt: c_int,
}

#[repr(C)]
pub struct Cq {
    pub context: *mut Context,
    pub channel: *mut CompChannel,
    pub cq_context: *mut c_void,
    pub handle: u32,
    pub cqe: c_int,
}

#[repr(C)]
pub struct Qp {
    pub context: *mut Context,
    pub qp_context: *mut c_void,
    pub pd: *mut Pd,
    pub send_cq: *mut Cq,
    pub recv_cq: *mut Cq,
    pub srq: *mut c_void,
    pub handle: u32,
    pub qp_num: u32,
    pub state: c_uint,
    pub qp_type: c_uint,
}

#[repr(C)]
pub struct Ah {
    pub context: *mut Context,
    pub pd: *mut Pd,
    pub handle: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct DeviceAttr {
    pub fw_ver: [c_char; 64],
    pub node_guid: u64,
    pub sys_image_guid: u64,
    pub max_mr_size: u64,
    pub page_size_cap: u64,
    pub vendor_id: u32,
    pub vendor_part_id: u32,
    pub hw_ver: u32,
    pub max_qp: c_int,
    pub max_qp_wr: c_int,
    pub device_cap_flags: c_uint,
    pub max_sge: c_int,
    pub max_sge_rd: c_int,
    pub max_cq: c_int,
    pub max_cqe: c_int,
    pub max_mr: c_int,
    pub max_pd: c_int,
    pub max_qp_rd_atom: c_int,
    pub max_ee_rd_atom: c_int,
    pub max_res_rd_atom: c_int,
    pub max_qp_init_rd_atom: c_int,
    rest: [c_int; 16],
    pub max_pkeys: u16,
    pub local_ca_ack_delay: u8,
    pub phys_port_cnt: u8,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct PortAttr {
    pub state: c_uint,
    pub max_mtu: c_uint,
    pub active_mtu: c_uint,
    pub gid_tbl_len: c_int,
    pub port_cap_flags: u32,
    pub max_msg_sz: u32,
    pub bad_pkey_cntr: u32,
    pub qkey_viol_cntr: u32,
    pub pkey_tbl_len: u16,
    pub lid: u16,
    pub sm_lid: u16,
    pub lmc: u8,
    pub max_vl_num: u8,
    pub sm_sl: u8,
    pub subnet_timeout: u8,
    pub init_type_reply: u8,
    pub active_width: u8,
    pub active_speed: u8,
    pub phys_state: u8,
    pub link_layer: u8,
    pub flags: u8,
    pub port_cap_flags2: u16,
    /// Newer headers have a field here; the exported call does not fill it.
    reserve: [u32; 4],
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct GidEntry {
    pub gid: RawGidAligned,
    pub gid_index: u32,
    pub port_num: u32,
    pub gid_type: u32,
    pub ndev_ifindex: u32,
}

/// `union ibv_gid` where its alignment (that of its 64-bit halves) matters.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct RawGidAligned(pub RawGid);

#[derive(Clone, Copy)]
#[repr(C)]
pub struct GlobalRoute {
    pub dgid: RawGidAligned,
    pub flow_label: u32,
    pub sgid_index: u8,
    pub hop_limit: u8,
    pub traffic_class: u8,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct AhAttr {
    pub grh: GlobalRoute,
    pub dlid: u16,
    pub sl: u8,
    pub src_path_bits: u8,
    pub static_rate: u8,
    pub is_global: u8,
    pub port_num: u8,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct QpCap {
    pub max_send_wr: u32,
    pub max_recv_wr: u32,
    pub max_send_sge: u32,
    pub max_recv_sge: u32,
    pub max_inline_data: u32,
}

#[repr(C)]
pub struct QpInitAttr {
    pub qp_context: *mut c_void,
    pub send_cq: *mut Cq,
    pub recv_cq: *mut Cq,
    pub srq: *mut c_void,
    pub cap: QpCap,
    pub qp_type: c_uint,
    pub sq_sig_all: c_int,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct QpAttr {
    pub qp_state: c_uint,
    pub cur_qp_state: c_uint,
    pub path_mtu: c_uint,
    pub path_mig_state: c_uint,
    pub qkey: u32,
    pub rq_psn: u32,
    pub sq_psn: u32,
    pub dest_qp_num: u32,
    pub qp_access_flags: c_uint,
    pub cap: QpCap,
    pub ah_attr: AhAttr,
    pub alt_ah_attr: AhAttr,
    pub pkey_index: u16,
    pub alt_pkey_index: u16,
    pub en_sqd_async_notify: u8,
    pub sq_draining: u8,
    pub max_rd_atomic: u8,
    pub max_dest_rd_atomic: u8,
    pub min_rnr_timer: u8,
    pub port_num: u8,
    pub timeout: u8,
    pub retry_cnt: u8,
    pub rnr_retry: u8,
    pub alt_port_num: u8,
    pub alt_timeout: u8,
    pub rate_limit: u32,
}

/// Bits that say which fields of a [`QpAttr`] count.
pub mod qp_attr {
    use std::ffi::c_int;
    pub const STATE: c_int = 1 << 0;
    pub const ACCESS_FLAGS: c_int = 1 << 3;
    pub const PKEY_INDEX: c_int = 1 << 4;
    pub const PORT: c_int = 1 << 5;
    pub const QKEY: c_int = 1 << 6;
    pub const AV: c_int = 1 << 7;
    pub const PATH_MTU: c_int = 1 << 8;
    pub const TIMEOUT: c_int = 1 << 9;
    pub const RETRY_CNT: c_int = 1 << 10;
    pub const RNR_RETRY: c_int = 1 << 11;
    pub const RQ_PSN: c_int = 1 << 12;
    pub const MAX_QP_RD_ATOMIC: c_int = 1 << 13;
    pub const MIN_RNR_TIMER: c_int = 1 << 15;
    pub const SQ_PSN: c_int = 1 << 16;
    pub const MAX_DEST_RD_ATOMIC: c_int = 1 << 17;
    pub const CAP: c_int = 1 << 19;
    pub const DEST_QPN: c_int = 1 << 20;
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Sge {
    pub addr: u64,
    pub length: u32,
    pub lkey: u32,
}

/// What the union `wr` of a send request holds.
#[derive(Clone, Copy)]
#[repr(C)]
pub union SendTarget {
    pub rdma: RdmaTarget,
    pub ud: UdTarget,
    /// The largest member, for atomic operations.
    size: [u64; 4],
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct RdmaTarget {
    pub remote_addr: u64,
    pub rkey: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct UdTarget {
    pub ah: *mut Ah,
    pub remote_qpn: u32,
    pub remote_qkey: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct SendWr {
    pub wr_id: u64,
    pub next: *mut SendWr,
    pub sg_list: *mut Sge,
    pub num_sge: c_int,
    pub opcode: c_uint,
    pub send_flags: c_uint,
    /// In network order.
    pub imm_data: u32,
    pub wr: SendTarget,
    qp_type: u64,
    bind_mw: [u64; 6],
}

impl SendWr {
    pub const EMPTY: Self = Self {
        wr_id: 0,
        next: std::ptr::null_mut(),
        sg_list: std::ptr::null_mut(),
        num_sge: 0,
        opcode: 0,
        send_flags: 0,
        imm_data: 0,
        wr: SendTarget { size: [0; 4] },
        qp_type: 0,
        bind_mw: [0; 6],
    };
}

pub mod opcode {
    use std::ffi::c_uint;
    pub const RDMA_WRITE: c_uint = 0;
    pub const RDMA_WRITE_WITH_IMM: c_uint = 1;
    pub const SEND: c_uint = 2;
    pub const SEND_WITH_IMM: c_uint = 3;
    pub const RDMA_READ: c_uint = 4;
}

pub mod send_flag {
    use std::ffi::c_uint;
    pub const FENCE: c_uint = 1;
    pub const SIGNALED: c_uint = 2;
    pub const SOLICITED: c_uint = 4;
    pub const INLINE: c_uint = 8;
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct RecvWr {
    pub wr_id: u64,
    pub next: *mut RecvWr,
    pub sg_list: *mut Sge,
    pub num_sge: c_int,
}

/// A work completion.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Wc {
    pub wr_id: u64,
    pub status: c_uint,
    pub opcode: c_uint,
    pub vendor_err: u32,
    pub byte_len: u32,
    /// In network order.
    pub imm_data: u32,
    pub qp_num: u32,
    pub src_qp: u32,
    pub wc_flags: c_uint,
    pub pkey_index: u16,
    pub slid: u16,
    pub sl: u8,
    pub dlid_path_bits: u8,
}

pub const WC_WITH_IMM: c_uint = 1 << 1;

#[repr(C)]
pub union EventElement {
    pub cq: *mut Cq,
    pub qp: *mut Qp,
    pub port_num: c_int,
}

#[repr(C)]
pub struct AsyncEvent {
    pub element: EventElement,
    pub event_type: c_uint,
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};
    use std::process::Command;

    use super::*;

    /// Rows of (what, ours, the header's expression).
    macro_rules! rows {
        ($($ours:ty as $theirs:literal { $($field:ident),* })*) => {
            vec![$(
                $((format!("{}.{}", $theirs, stringify!($field)), offset_of!($ours, $field), format!("offsetof(struct {}, {})", $theirs, stringify!($field))),)*
            )*]
        };
    }

    fn table() -> Vec<(String, usize, String)> {
        let mut rows = rows! {
            Device as "ibv_device" { node_type, transport_type, name, ibdev_path }
            ContextOps as "ibv_context_ops" { poll_cq, req_notify_cq, post_send, post_recv }
            Context as "ibv_context" { device, ops, cmd_fd, async_fd, num_comp_vectors }
            Pd as "ibv_pd" { context, handle }
            Mr as "ibv_mr" { pd, addr, length, handle, lkey, rkey }
            CompChannel as "ibv_comp_channel" { fd, refcnt }
            Cq as "ibv_cq" { context, channel, cq_context, handle, cqe }
            Qp as "ibv_qp" { context, pd, send_cq, recv_cq, handle, qp_num, state, qp_type }
            Ah as "ibv_ah" { pd, handle }
            DeviceAttr as "ibv_device_attr" { fw_ver, node_guid, max_mr_size, max_qp, max_qp_wr, device_cap_flags, max_sge, max_cq, max_cqe, max_mr, max_qp_rd_atom, max_qp_init_rd_atom, max_pkeys, phys_port_cnt }
            PortAttr as "ibv_port_attr" { state, max_mtu, active_mtu, gid_tbl_len, max_msg_sz, lid, lmc, max_vl_num, active_width, active_speed, phys_state, link_layer, flags, port_cap_flags2 }
            GidEntry as "ibv_gid_entry" { gid, gid_index, port_num, gid_type, ndev_ifindex }
            GlobalRoute as "ibv_global_route" { dgid, flow_label, sgid_index, hop_limit, traffic_class }
            AhAttr as "ibv_ah_attr" { grh, dlid, sl, src_path_bits, static_rate, is_global, port_num }
            QpCap as "ibv_qp_cap" { max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data }
            QpInitAttr as "ibv_qp_init_attr" { send_cq, recv_cq, srq, cap, qp_type, sq_sig_all }
            QpAttr as "ibv_qp_attr" { qp_state, path_mtu, qkey, rq_psn, sq_psn, dest_qp_num, qp_access_flags, cap, ah_attr, alt_ah_attr, pkey_index, max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num, timeout, retry_cnt, rnr_retry, rate_limit }
            Sge as "ibv_sge" { addr, length, lkey }
            SendWr as "ibv_send_wr" { wr_id, next, sg_list, num_sge, opcode, send_flags, imm_data, wr }
            RecvWr as "ibv_recv_wr" { wr_id, next, sg_list, num_sge }
            Wc as "ibv_wc" { wr_id, status, opcode, vendor_err, byte_len, imm_data, qp_num, src_qp, wc_flags, slid, sl }
            AsyncEvent as "ibv_async_event" { element, event_type }
        };
        for (theirs, ours) in [
            ("ibv_device", size_of::<Device>()),
            ("ibv_context_ops", size_of::<ContextOps>()),
            ("ibv_device_attr", size_of::<DeviceAttr>()),
            ("ibv_gid_entry", size_of::<GidEntry>()),
            ("ibv_global_route", size_of::<GlobalRoute>()),
            ("ibv_ah_attr", size_of::<AhAttr>()),
            ("ibv_qp_init_attr", size_of::<QpInitAttr>()),
            ("ibv_qp_attr", size_of::<QpAttr>()),
            ("ibv_sge", size_of::<Sge>()),
            ("ibv_send_wr", size_of::<SendWr>()),
            ("ibv_recv_wr", size_of::<RecvWr>()),
            ("ibv_wc", size_of::<Wc>()),
            ("ibv_async_event", size_of::<AsyncEvent>()),
        ] {
            let expression = format!("sizeof(struct {theirs})");
            rows.push((format!("size of {theirs}"), ours, expression));
        }
        for (name, ours) in [
            ("IBV_WR_RDMA_WRITE_WITH_IMM", opcode::RDMA_WRITE_WITH_IMM),
            ("IBV_WR_SEND", opcode::SEND),
            ("IBV_WR_SEND_WITH_IMM", opcode::SEND_WITH_IMM),
            ("IBV_WR_RDMA_READ", opcode::RDMA_READ),
            ("IBV_SEND_FENCE", send_flag::FENCE),
            ("IBV_SEND_SIGNALED", send_flag::SIGNALED),
            ("IBV_SEND_SOLICITED", send_flag::SOLICITED),
            ("IBV_SEND_INLINE", send_flag::INLINE),
            ("IBV_WC_WITH_IMM", WC_WITH_IMM),
            ("IBV_QP_ACCESS_FLAGS", qp_attr::ACCESS_FLAGS as u32),
            ("IBV_QP_AV", qp_attr::AV as u32),
            ("IBV_QP_PATH_MTU", qp_attr::PATH_MTU as u32),
            ("IBV_QP_TIMEOUT", qp_attr::TIMEOUT as u32),
            ("IBV_QP_RNR_RETRY", qp_attr::RNR_RETRY as u32),
            ("IBV_QP_RQ_PSN", qp_attr::RQ_PSN as u32),
            ("IBV_QP_MAX_QP_RD_ATOMIC", qp_attr::MAX_QP_RD_ATOMIC as u32),
            ("IBV_QP_MIN_RNR_TIMER", qp_attr::MIN_RNR_TIMER as u32),
            ("IBV_QP_SQ_PSN", qp_attr::SQ_PSN as u32),
            (
                "IBV_QP_MAX_DEST_RD_ATOMIC",
                qp_attr::MAX_DEST_RD_ATOMIC as u32,
            ),
            ("IBV_QP_DEST_QPN", qp_attr::DEST_QPN as u32),
            ("IBV_TRANSPORT_IWARP", TRANSPORT_IWARP as u32),
        ] {
            rows.push((name.to_owned(), ours as usize, name.to_owned()));
        }
        rows
    }

    /// Every offset, size and constant against the header, through a C program, on machines that have it.
    #[test]
    fn layouts_are_the_headers() {
        if !std::path::Path::new("/usr/include/infiniband/verbs.h").exists() {
            eprintln!("left out: <infiniband/verbs.h> is not installed (libibverbs-dev)");
            return;
        }
        let rows = table();
        let mut program = String::from(
            "#include <infiniband/verbs.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n",
        );
        for (_, _, expression) in &rows {
            program += &format!("printf(\"%zu\\n\", (size_t)({expression}));\n");
        }
        program += "return 0; }\n";
        let folder =
            std::env::temp_dir().join(format!("volley-verbs-layout-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (source, binary) = (folder.join("layout.c"), folder.join("layout"));
        std::fs::write(&source, program).unwrap();
        let built = Command::new("cc")
            .arg("-o")
            .arg(&binary)
            .arg(&source)
            .output()
            .unwrap();
        assert!(
            built.status.success(),
            "{}",
            String::from_utf8_lossy(&built.stderr)
        );
        let output = Command::new(&binary).output().unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        let theirs: Vec<usize> = String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(|line| line.parse().unwrap())
            .collect();
        assert_eq!(theirs.len(), rows.len());
        let wrong: Vec<String> = rows
            .iter()
            .zip(theirs)
            .filter(|((_, ours, _), theirs)| ours != theirs)
            .map(|((what, ours, _), theirs)| format!("{what}: {ours} here, {theirs} there"))
            .collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
}

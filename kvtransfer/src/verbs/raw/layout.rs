//! Proof that the declarations of [`raw`](super) are those of the C header.
//!
//! The numbers are those that `layout.c` printed for rdma-core 44 on a 64-bit system; they are part of a frozen ABI.
//! Where the header and a C compiler are installed, the program is compiled and asked again.
#![cfg(test)]

use std::mem::{offset_of, size_of};
use std::path::Path;
use std::process::Command;

use super::*;

/// What `layout.c` calls it, what it is here, what it was in the header.
fn rows() -> Vec<(&'static str, usize, usize)> {
    #[rustfmt::skip]
    let rows = vec![
        ("ibv_context_ops",                     size_of::<ContextOps>(),                     256),
        ("ibv_context_ops.poll_cq",             offset_of!(ContextOps, poll_cq),             88),
        ("ibv_context_ops.req_notify_cq",       offset_of!(ContextOps, req_notify_cq),       96),
        ("ibv_context_ops.post_send",           offset_of!(ContextOps, post_send),           200),
        ("ibv_context.ops",                     offset_of!(Context, ops),                    8),
        ("ibv_context.cmd_fd",                  offset_of!(Context, cmd_fd),                 264),
        ("ibv_context.async_fd",                offset_of!(Context, async_fd),               268),
        ("ibv_context.num_comp_vectors",        offset_of!(Context, num_comp_vectors),       272),
        ("ibv_pd.context",                      offset_of!(Pd, context),                     0),
        ("ibv_comp_channel.fd",                 offset_of!(CompChannel, fd),                 8),
        ("ibv_cq.context",                      offset_of!(Cq, context),                     0),
        ("ibv_cq.cqe",                          offset_of!(Cq, cqe),                         28),
        ("ibv_mr.addr",                         offset_of!(Mr, addr),                        16),
        ("ibv_mr.length",                       offset_of!(Mr, length),                      24),
        ("ibv_mr.lkey",                         offset_of!(Mr, lkey),                        36),
        ("ibv_mr.rkey",                         offset_of!(Mr, rkey),                        40),
        ("ibv_qp.context",                      offset_of!(Qp, context),                     0),
        ("ibv_qp.qp_num",                       offset_of!(Qp, qp_num),                      52),
        ("ibv_qp.state",                        offset_of!(Qp, state),                       56),
        ("ibv_sge",                             size_of::<Sge>(),                            16),
        ("ibv_sge.length",                      offset_of!(Sge, length),                     8),
        ("ibv_sge.lkey",                        offset_of!(Sge, lkey),                       12),
        ("ibv_send_wr",                         size_of::<SendWr>(),                         128),
        ("ibv_send_wr.next",                    offset_of!(SendWr, next),                    8),
        ("ibv_send_wr.sg_list",                 offset_of!(SendWr, sg_list),                 16),
        ("ibv_send_wr.num_sge",                 offset_of!(SendWr, num_sge),                 24),
        ("ibv_send_wr.opcode",                  offset_of!(SendWr, opcode),                  28),
        ("ibv_send_wr.send_flags",              offset_of!(SendWr, send_flags),              32),
        ("ibv_send_wr.imm_data",                offset_of!(SendWr, imm_data),                36),
        ("ibv_send_wr.wr.rdma.remote_addr",     offset_of!(SendWr, rdma.remote_addr),        40),
        ("ibv_send_wr.wr.rdma.rkey",            offset_of!(SendWr, rdma.rkey),               48),
        ("ibv_send_wr.qp_type.xrc.remote_srqn", offset_of!(SendWr, xrc_remote_srqn),         72),
        ("ibv_send_wr.bind_mw",                 offset_of!(SendWr, bind_mw_or_tso),          80),
        ("ibv_wc",                              size_of::<Wc>(),                             48),
        ("ibv_wc.status",                       offset_of!(Wc, status),                      8),
        ("ibv_wc.opcode",                       offset_of!(Wc, opcode),                      12),
        ("ibv_wc.vendor_err",                   offset_of!(Wc, vendor_err),                  16),
        ("ibv_wc.byte_len",                     offset_of!(Wc, byte_len),                    20),
        ("ibv_wc.qp_num",                       offset_of!(Wc, qp_num),                      28),
        ("ibv_wc.wc_flags",                     offset_of!(Wc, wc_flags),                    36),
    ];
    rows.into_iter().chain(attribute_rows()).collect()
}

/// The same for what is set and asked for.
fn attribute_rows() -> Vec<(&'static str, usize, usize)> {
    #[rustfmt::skip]
    let rows = vec![
        ("ibv_qp_cap",                          size_of::<QpCap>(),                          20),
        ("ibv_qp_cap.max_inline_data",          offset_of!(QpCap, max_inline_data),          16),
        ("ibv_qp_init_attr",                    size_of::<QpInitAttr>(),                     64),
        ("ibv_qp_init_attr.cap",                offset_of!(QpInitAttr, cap),                 32),
        ("ibv_qp_init_attr.qp_type",            offset_of!(QpInitAttr, qp_type),             52),
        ("ibv_qp_init_attr.sq_sig_all",         offset_of!(QpInitAttr, sq_sig_all),          56),
        ("ibv_global_route",                    size_of::<GlobalRoute>(),                    24),
        ("ibv_global_route.sgid_index",         offset_of!(GlobalRoute, sgid_index),         20),
        ("ibv_global_route.hop_limit",          offset_of!(GlobalRoute, hop_limit),          21),
        ("ibv_ah_attr",                         size_of::<AhAttr>(),                         32),
        ("ibv_ah_attr.dlid",                    offset_of!(AhAttr, dlid),                    24),
        ("ibv_ah_attr.is_global",               offset_of!(AhAttr, is_global),               29),
        ("ibv_ah_attr.port_num",                offset_of!(AhAttr, port_num),                30),
        ("ibv_qp_attr",                         size_of::<QpAttr>(),                         144),
        ("ibv_qp_attr.path_mtu",                offset_of!(QpAttr, path_mtu),                8),
        ("ibv_qp_attr.rq_psn",                  offset_of!(QpAttr, rq_psn),                  20),
        ("ibv_qp_attr.qp_access_flags",         offset_of!(QpAttr, qp_access_flags),         32),
        ("ibv_qp_attr.ah_attr",                 offset_of!(QpAttr, ah_attr),                 56),
        ("ibv_qp_attr.pkey_index",              offset_of!(QpAttr, pkey_index),              120),
        ("ibv_qp_attr.max_rd_atomic",           offset_of!(QpAttr, max_rd_atomic),           126),
        ("ibv_qp_attr.timeout",                 offset_of!(QpAttr, timeout),                 130),
        ("ibv_qp_attr.rate_limit",              offset_of!(QpAttr, rate_limit),              136),
        ("ibv_port_attr.state",                 offset_of!(PortAttr, state),                 0),
        ("ibv_port_attr.active_mtu",            offset_of!(PortAttr, active_mtu),            8),
        ("ibv_port_attr.gid_tbl_len",           offset_of!(PortAttr, gid_tbl_len),           12),
        ("ibv_port_attr.max_msg_sz",            offset_of!(PortAttr, max_msg_sz),            20),
        ("ibv_port_attr.lid",                   offset_of!(PortAttr, lid),                   34),
        ("ibv_port_attr.link_layer",            offset_of!(PortAttr, link_layer),            46),
        ("ibv_port_attr.flags",                 offset_of!(PortAttr, flags),                 47),
        ("ibv_async_event",                     size_of::<AsyncEvent>(),                     16),
        ("ibv_async_event.event_type",          offset_of!(AsyncEvent, event_type),          8),
        ("ibv_device_attr.max_mr_size",         offset_of!(DeviceAttr, max_mr_size),         80),
        ("ibv_device_attr.max_qp_wr",           offset_of!(DeviceAttr, max_qp_wr),           112),
        ("ibv_device_attr.max_sge",             offset_of!(DeviceAttr, max_sge),             120),
        ("ibv_device_attr.max_cqe",             offset_of!(DeviceAttr, max_cqe),             132),
        ("ibv_device_attr.max_qp_rd_atom",      offset_of!(DeviceAttr, max_qp_rd_atom),      144),
        ("ibv_device_attr.max_qp_init_rd_atom", offset_of!(DeviceAttr, max_qp_init_rd_atom), 156),
    ];
    rows
}

#[test]
fn declarations_have_the_recorded_layout() {
    for (name, ours, recorded) in rows() {
        assert_eq!(ours, recorded, "{name}");
    }
    // The library writes these whole, and later versions of them are longer.
    assert!(56 <= size_of::<PortAttr>() && 232 <= size_of::<DeviceAttr>());
}

#[test]
fn declarations_agree_with_the_header() {
    if !Path::new("/usr/include/infiniband/verbs.h").exists() {
        return eprintln!(
            "no infiniband/verbs.h here (Debian: libibverbs-dev): only the recorded numbers were compared"
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("layout");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/verbs/raw/layout.c");
    let compiled = Command::new("cc").arg("-o").arg(&program).arg(source).status().expect("a C compiler");
    assert!(compiled.success(), "layout.c compiles");
    let output = Command::new(&program).output().unwrap();
    let header = String::from_utf8(output.stdout).unwrap();
    let ours: String = rows().iter().map(|(name, ours, _)| format!("{name} {ours}\n")).collect();
    assert_eq!(ours, header);
}

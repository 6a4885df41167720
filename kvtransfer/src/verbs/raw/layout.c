/* Prints sizes and offsets of what ../raw.rs declares by hand; compared with it by a test in layout.rs. */
#include <infiniband/verbs.h>
#include <stddef.h>
#include <stdio.h>

#define SIZE(type) printf("%s %zu\n", #type, sizeof(struct type))
#define OFFSET(type, field) printf("%s.%s %zu\n", #type, #field, offsetof(struct type, field))

int main(void) {
    SIZE(ibv_context_ops);
    OFFSET(ibv_context_ops, poll_cq);
    OFFSET(ibv_context_ops, req_notify_cq);
    OFFSET(ibv_context_ops, post_send);
    OFFSET(ibv_context, ops);
    OFFSET(ibv_context, cmd_fd);
    OFFSET(ibv_context, async_fd);
    OFFSET(ibv_context, num_comp_vectors);
    OFFSET(ibv_pd, context);
    OFFSET(ibv_comp_channel, fd);
    OFFSET(ibv_cq, context);
    OFFSET(ibv_cq, cqe);
    OFFSET(ibv_mr, addr);
    OFFSET(ibv_mr, length);
    OFFSET(ibv_mr, lkey);
    OFFSET(ibv_mr, rkey);
    OFFSET(ibv_qp, context);
    OFFSET(ibv_qp, qp_num);
    OFFSET(ibv_qp, state);
    SIZE(ibv_sge);
    OFFSET(ibv_sge, length);
    OFFSET(ibv_sge, lkey);
    SIZE(ibv_send_wr);
    OFFSET(ibv_send_wr, next);
    OFFSET(ibv_send_wr, sg_list);
    OFFSET(ibv_send_wr, num_sge);
    OFFSET(ibv_send_wr, opcode);
    OFFSET(ibv_send_wr, send_flags);
    OFFSET(ibv_send_wr, imm_data);
    OFFSET(ibv_send_wr, wr.rdma.remote_addr);
    OFFSET(ibv_send_wr, wr.rdma.rkey);
    OFFSET(ibv_send_wr, qp_type.xrc.remote_srqn);
    OFFSET(ibv_send_wr, bind_mw);
    SIZE(ibv_wc);
    OFFSET(ibv_wc, status);
    OFFSET(ibv_wc, opcode);
    OFFSET(ibv_wc, vendor_err);
    OFFSET(ibv_wc, byte_len);
    OFFSET(ibv_wc, qp_num);
    OFFSET(ibv_wc, wc_flags);
    SIZE(ibv_qp_cap);
    OFFSET(ibv_qp_cap, max_inline_data);
    SIZE(ibv_qp_init_attr);
    OFFSET(ibv_qp_init_attr, cap);
    OFFSET(ibv_qp_init_attr, qp_type);
    OFFSET(ibv_qp_init_attr, sq_sig_all);
    SIZE(ibv_global_route);
    OFFSET(ibv_global_route, sgid_index);
    OFFSET(ibv_global_route, hop_limit);
    SIZE(ibv_ah_attr);
    OFFSET(ibv_ah_attr, dlid);
    OFFSET(ibv_ah_attr, is_global);
    OFFSET(ibv_ah_attr, port_num);
    SIZE(ibv_qp_attr);
    OFFSET(ibv_qp_attr, path_mtu);
    OFFSET(ibv_qp_attr, rq_psn);
    OFFSET(ibv_qp_attr, qp_access_flags);
    OFFSET(ibv_qp_attr, ah_attr);
    OFFSET(ibv_qp_attr, pkey_index);
    OFFSET(ibv_qp_attr, max_rd_atomic);
    OFFSET(ibv_qp_attr, timeout);
    OFFSET(ibv_qp_attr, rate_limit);
    OFFSET(ibv_port_attr, state);
    OFFSET(ibv_port_attr, active_mtu);
    OFFSET(ibv_port_attr, gid_tbl_len);
    OFFSET(ibv_port_attr, max_msg_sz);
    OFFSET(ibv_port_attr, lid);
    OFFSET(ibv_port_attr, link_layer);
    OFFSET(ibv_port_attr, flags);
    SIZE(ibv_async_event);
    OFFSET(ibv_async_event, event_type);
    OFFSET(ibv_device_attr, max_mr_size);
    OFFSET(ibv_device_attr, max_qp_wr);
    OFFSET(ibv_device_attr, max_sge);
    OFFSET(ibv_device_attr, max_cqe);
    OFFSET(ibv_device_attr, max_qp_rd_atom);
    OFFSET(ibv_device_attr, max_qp_init_rd_atom);
    return 0;
}

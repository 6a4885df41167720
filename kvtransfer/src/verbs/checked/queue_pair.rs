//! Reliable connections: a send queue here, the same at the peer.

use std::ptr::{self, NonNull};
use std::sync::Arc;

use super::{CompletionQueue, Domain, loaded};
use crate::verbs::error::VerbsError;
use crate::verbs::raw;

/// A reliable-connected queue pair. Nothing is ever received by message, so its receive queue has no room.
pub(in crate::verbs) struct QueuePair {
    raw: NonNull<raw::Qp>,
    capacity: Capacity,
    /// Scratch of `post`, kept for its memory.
    chain: Vec<raw::SendWr>,
    /// Kept, as the library demands.
    completions: Arc<CompletionQueue>,
    /// Kept, as the library demands.
    _domain: Arc<Domain>,
}

// SAFETY: the library allows any thread to use a queue pair; the pointers in `chain` are only valid, and only used,
// during `post`.
unsafe impl Send for QueuePair {}

/// What a queue pair has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::verbs) struct Capacity {
    /// Requests under way.
    pub(in crate::verbs) depth: u32,
    /// Pieces of local memory in one request.
    pub(in crate::verbs) gather: u32,
    /// Bytes that a request can carry itself.
    pub(in crate::verbs) inline: u32,
}

/// How a queue pair reaches its other end.
#[derive(Clone, Copy, Debug)]
pub(in crate::verbs) struct Connect {
    /// Port of this side.
    pub(in crate::verbs) port: u8,
    /// Which of the port's addresses packets come from.
    pub(in crate::verbs) gid_index: u8,
    /// Address of the peer's port; `None` between InfiniBand ports of one subnet.
    pub(in crate::verbs) gid: Option<[u8; 16]>,
    /// InfiniBand's local address of the peer's port.
    pub(in crate::verbs) lid: u16,
    /// The peer's queue pair.
    pub(in crate::verbs) queue_pair: u32,
    /// Number of the first packet from the peer.
    pub(in crate::verbs) their_psn: u32,
    /// Number of the first packet of this side.
    pub(in crate::verbs) our_psn: u32,
    /// As `enum ibv_mtu`.
    pub(in crate::verbs) mtu: u32,
    /// A packet without an answer is repeated after 4.096 µs times two to this power.
    pub(in crate::verbs) timeout: u8,
    /// So often, seven times at most.
    pub(in crate::verbs) retries: u8,
    /// Reads under way, in either direction.
    pub(in crate::verbs) reads: u8,
}

/// What a work request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::verbs) enum RequestKind {
    /// Local memory goes to the peer's.
    Write,
    /// Local memory is read when the request is posted, and goes to the peer's.
    WriteInline,
    /// The peer's memory comes to local memory.
    Read,
}

/// One work request.
#[derive(Clone, Copy, Debug)]
pub(in crate::verbs) struct Request {
    /// Comes back in the completion.
    pub(in crate::verbs) id: u64,
    /// What it does.
    pub(in crate::verbs) kind: RequestKind,
    /// How many of the pieces belong to it; those of the request before it come first.
    pub(in crate::verbs) pieces: u32,
    /// First byte of the peer's memory.
    pub(in crate::verbs) remote_address: u64,
    /// The peer's key for it.
    pub(in crate::verbs) remote_key: u32,
    /// Whether its success makes a completion. Failure always does.
    pub(in crate::verbs) is_signalled: bool,
}

/// A piece of local memory.
#[derive(Clone, Copy, Debug)]
pub(in crate::verbs) struct Gather {
    /// Address of the first byte.
    pub(in crate::verbs) address: u64,
    /// Bytes.
    pub(in crate::verbs) len: u32,
    /// Key of the registration that it lies in; any for an inline write.
    pub(in crate::verbs) key: u32,
}

impl QueuePair {
    /// Makes a queue pair for `port`, with at least the capacity asked for. It is not connected.
    pub(in crate::verbs) fn new(
        domain: &Arc<Domain>,
        completions: &Arc<CompletionQueue>,
        port: u8,
        capacity: Capacity,
    ) -> Result<Self, VerbsError> {
        let mut wanted = raw::QpInitAttr {
            qp_context: ptr::null_mut(),
            send_cq: completions.as_ptr(),
            recv_cq: completions.as_ptr(),
            srq: ptr::null_mut(),
            cap: raw::QpCap {
                max_send_wr: capacity.depth,
                max_recv_wr: 1, // Some devices do not know zero.
                max_send_sge: capacity.gather,
                max_recv_sge: 1,
                max_inline_data: capacity.inline,
            },
            qp_type: raw::QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: domain and completion queue are alive and kept by the result; the structure is complete.
        let raw = unsafe { (loaded().ibv_create_qp)(domain.as_ptr(), &raw mut wanted) };
        let raw = NonNull::new(raw).ok_or_else(|| VerbsError::last("make a queue pair"))?;
        let (completions, domain) = (Arc::clone(completions), Arc::clone(domain));
        let mut pair = Self { raw, capacity, chain: Vec::new(), completions, _domain: domain };
        let access = raw::ACCESS_LOCAL_WRITE | raw::ACCESS_REMOTE_WRITE | raw::ACCESS_REMOTE_READ;
        let attributes = raw::QpAttr {
            qp_state: raw::QPS_INIT,
            port_num: port,
            qp_access_flags: access.unsigned_abs(),
            ..raw::QpAttr::default()
        };
        let fields = raw::QP_STATE | raw::QP_PKEY_INDEX | raw::QP_PORT | raw::QP_ACCESS_FLAGS;
        pair.modify("initialise a queue pair", attributes, fields)?;
        Ok(pair)
    }

    /// Its number, by which the peer names it.
    pub(in crate::verbs) fn number(&self) -> u32 {
        // SAFETY: the queue pair lives until `drop`, and its number never changes.
        unsafe { (*self.raw.as_ptr()).qp_num }
    }

    pub(in crate::verbs) fn capacity(&self) -> Capacity {
        self.capacity
    }

    pub(in crate::verbs) fn completions(&self) -> &Arc<CompletionQueue> {
        &self.completions
    }

    /// From now on the peer's requests are taken, and own ones can be posted.
    pub(in crate::verbs) fn connect(&mut self, to: &Connect) -> Result<(), VerbsError> {
        let grh = raw::GlobalRoute {
            dgid: raw::Gid(to.gid.unwrap_or_default()),
            sgid_index: to.gid_index,
            hop_limit: HOP_LIMIT,
            ..raw::GlobalRoute::default()
        };
        let ah_attr = raw::AhAttr {
            grh,
            dlid: to.lid,
            is_global: u8::from(to.gid.is_some()),
            port_num: to.port,
            ..raw::AhAttr::default()
        };
        let ready_to_receive = raw::QpAttr {
            qp_state: raw::QPS_RTR,
            path_mtu: to.mtu,
            dest_qp_num: to.queue_pair,
            rq_psn: to.their_psn,
            max_dest_rd_atomic: to.reads,
            min_rnr_timer: RECEIVER_NOT_READY_TIMER,
            ah_attr,
            ..raw::QpAttr::default()
        };
        let fields = raw::QP_STATE
            | raw::QP_AV
            | raw::QP_PATH_MTU
            | raw::QP_DEST_QPN
            | raw::QP_RQ_PSN
            | raw::QP_MAX_DEST_RD_ATOMIC
            | raw::QP_MIN_RNR_TIMER;
        self.modify("connect a queue pair", ready_to_receive, fields)?;
        let ready_to_send = raw::QpAttr {
            qp_state: raw::QPS_RTS,
            timeout: to.timeout,
            retry_cnt: to.retries,
            rnr_retry: to.retries,
            sq_psn: to.our_psn,
            max_rd_atomic: to.reads,
            ..raw::QpAttr::default()
        };
        let fields = raw::QP_STATE
            | raw::QP_TIMEOUT
            | raw::QP_RETRY_CNT
            | raw::QP_RNR_RETRY
            | raw::QP_SQ_PSN
            | raw::QP_MAX_QP_RD_ATOMIC;
        self.modify("start a queue pair", ready_to_send, fields)
    }

    /// Into the error state: the peer's requests are turned down, own ones complete as flushed.
    pub(in crate::verbs) fn fail(&mut self) -> Result<(), VerbsError> {
        let attributes = raw::QpAttr { qp_state: raw::QPS_ERR, ..raw::QpAttr::default() };
        self.modify("stop a queue pair", attributes, raw::QP_STATE)
    }

    fn modify(
        &mut self,
        operation: &'static str,
        mut attributes: raw::QpAttr,
        fields: i32,
    ) -> Result<(), VerbsError> {
        // SAFETY: the queue pair is alive, and the structure complete as far as `fields` names it.
        let code = unsafe { (loaded().ibv_modify_qp)(self.raw.as_ptr(), &raw mut attributes, fields) };
        VerbsError::code(operation, code)
    }

    /// Posts requests in order, with one call. `Err` names the first that was not posted; those before it were.
    ///
    /// # Safety
    ///
    /// Until a request has completed, or the queue pair is dropped, its pieces are memory that is registered under
    /// their keys, and for a read nobody else uses it. A piece of an inline write need only be readable during the
    /// call.
    pub(in crate::verbs) unsafe fn post(
        &mut self,
        requests: &[Request],
        pieces: &[Gather],
    ) -> Result<(), (usize, VerbsError)> {
        let mut gather: Vec<raw::Sge> = pieces
            .iter()
            .map(|piece| raw::Sge { addr: piece.address, length: piece.len, lkey: piece.key })
            .collect();
        self.chain.clear();
        let mut rest = gather.as_mut_slice();
        for request in requests {
            let (mine, others) = rest.split_at_mut(request.pieces as usize);
            rest = others;
            let (opcode, inline) = match request.kind {
                RequestKind::Write => (raw::WR_RDMA_WRITE, 0),
                RequestKind::WriteInline => (raw::WR_RDMA_WRITE, raw::SEND_INLINE),
                RequestKind::Read => (raw::WR_RDMA_READ, 0),
            };
            let flags = inline | if request.is_signalled { raw::SEND_SIGNALED } else { 0 };
            let target = raw::RdmaTarget::new(request.remote_address, request.remote_key);
            let mut wr = raw::SendWr::new(request.id, opcode, flags, target);
            wr.num_sge = i32::try_from(mine.len()).expect("a queue pair takes few pieces");
            wr.sg_list = mine.as_mut_ptr();
            self.chain.push(wr);
        }
        // From the last to the first, when none of them moves any more.
        let mut next = ptr::null_mut();
        for wr in self.chain.iter_mut().rev() {
            wr.next = next;
            next = ptr::from_mut(wr);
        }
        if next.is_null() {
            return Ok(());
        }
        let mut bad = ptr::null_mut();
        let post = self.ops().post_send.expect("every provider has it");
        // SAFETY: the queue pair is alive; the chain and its lists live through the call, after which the provider
        // has copied them; the caller answers for the memory that they name.
        let code = unsafe { post(self.raw.as_ptr(), next, &raw mut bad) };
        VerbsError::code("post to a queue pair", code).map_err(|error| {
            let first = self.chain.iter().position(|wr| ptr::eq(wr, bad)).unwrap_or(0);
            (first, error)
        })
    }

    fn ops(&self) -> &raw::ContextOps {
        // SAFETY: the queue pair lives until `drop`, and its context, which it points to, at least as long.
        let context = unsafe { (*self.raw.as_ptr()).context };
        // SAFETY: as above; the table never changes once the device is open.
        unsafe { &(*context).ops }
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: made by the library and undone once. When it returns, the device neither reads the memory of
        // requests that had not completed nor takes any of the peer's.
        let code = unsafe { (loaded().ibv_destroy_qp)(self.raw.as_ptr()) };
        // Others rely on it to hand memory back: better no worker than one that may be written to.
        assert_eq!(code, 0, "a queue pair is undone");
    }
}

/// Routers that a packet may pass.
const HOP_LIMIT: u8 = 64;
/// 0.64 ms; nothing that needs a posted receive is ever sent.
const RECEIVER_NOT_READY_TIMER: u8 = 12;

//! What the endpoints go by, and what they say of themselves.

use std::time::Duration;

use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::endpoint_core::EndpointRules;
use tidemill_kvtransfer_proto::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
use tidemill_kvtransfer_proto::message::{Hello, Offer, OnFailure, PROTOCOL};
use tidemill_kvtransfer_proto::units::{BlockLen, HandoffId};

use crate::world::{BLOCK, Config, TOKENS, Wire, content};

pub(crate) fn rules(config: &Config) -> EndpointRules {
    let never = Duration::from_secs(1_000_000);
    EndpointRules {
        layout: layout(),
        blocks: u64::from(config.blocks),
        staging: 0,
        in_place: config.wire == Wire::InPlace,
        coverage: Coverage::Full,
        lease: never,
        heartbeat: never,
        patience: never,
        stall: never,
        offers: never,
        credit: 1 << 20,
        pulls: config.wire == Wire::Read,
    }
}

pub(crate) fn hello(instance: u64, config: &Config) -> Hello {
    // What is read lies at a place of its own for each number.
    let blocks = if config.wire == Wire::Read {
        content(HandoffId(config.handoffs + 1), 0)
    } else {
        config.blocks.into()
    };
    Hello {
        protocol: PROTOCOL,
        instance,
        name: String::new(),
        layout: layout(),
        region_bytes: blocks * BLOCK as u64,
        staging_bytes: 0,
        listen_port: 1,
        host: String::new(),
        memory_socket: String::new(),
        offer: Offer { shared_memory: true, rdma: true, tcp: true, on_failure: OnFailure::FallBack },
        pulls: config.wire == Wire::Read,
        lease: Duration::from_secs(1_000_000),
    }
}

fn layout() -> KvLayout {
    let layout = KvLayout {
        model: String::new(),
        layers: 1,
        kv_heads: 1,
        heads: HeadRange { first: 0, count: 1 },
        head_size: 2,
        dtype: KvDtype::F32,
        block_len: BlockLen::new(TOKENS).expect("a power of two"),
        order: AxisOrder::TokenHead,
    };
    assert_eq!(layout.block_bytes(), BLOCK);
    layout
}

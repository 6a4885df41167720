//! Ledgers, credit and sums between the engine's types and the wire.

use tidemill_engine::handle::{Counters, CreditLoad, Ledger, SpeculationSums};
use tidemill_kvtransfer_proto::units::BlockCount;

use crate::proto;

pub(super) fn ledger_to_wire(ledger: &Ledger) -> proto::Ledger {
    let Ledger { total, free, cached, held, reserved, quarantined } = *ledger;
    let [total, free, cached, held, reserved, quarantined] =
        [total, free, cached, held, reserved, quarantined].map(|BlockCount(count)| count);
    proto::Ledger { total, free, cached, held, reserved, quarantined }
}

pub(super) fn ledger_from_wire(wire: proto::Ledger) -> Ledger {
    let proto::Ledger { total, free, cached, held, reserved, quarantined } = wire;
    let [total, free, cached, held, reserved, quarantined] =
        [total, free, cached, held, reserved, quarantined].map(BlockCount);
    Ledger { total, free, cached, held, reserved, quarantined }
}

pub(super) fn credit_to_wire(credit: &CreditLoad) -> proto::Credit {
    let CreditLoad { granted_bytes, waiting_bytes, waiting_handoffs } = *credit;
    proto::Credit { granted_bytes, waiting_bytes, waiting_handoffs }
}

pub(super) fn credit_from_wire(wire: proto::Credit) -> CreditLoad {
    let proto::Credit { granted_bytes, waiting_bytes, waiting_handoffs } = wire;
    CreditLoad { granted_bytes, waiting_bytes, waiting_handoffs }
}

pub(super) fn counters_to_wire(counters: &Counters) -> proto::Counters {
    proto::Counters {
        steps: counters.steps,
        overlapped_steps: counters.overlapped_steps,
        prompt_tokens: counters.prompt_tokens,
        generation_tokens: counters.generation_tokens,
        prefix_queries: counters.prefix_queries,
        prefix_hits: counters.prefix_hits,
        preemptions: counters.preemptions,
        handoffs: counters.handoffs,
        handoff_bytes: counters.handoff_bytes,
        handoff_writes: counters.handoff_writes,
        handoff_failures: counters.handoff_failures,
        handoff_in_place: counters.handoff_in_place,
        handoff_head_start_seconds: counters.handoff_head_start_seconds,
        handoff_seconds: counters.handoff_seconds,
        handoff_refusals: counters.handoff_refusals,
        speculation: Some(speculation_to_wire(&counters.speculation)),
    }
}

pub(super) fn counters_from_wire(wire: proto::Counters) -> Counters {
    Counters {
        steps: wire.steps,
        overlapped_steps: wire.overlapped_steps,
        prompt_tokens: wire.prompt_tokens,
        generation_tokens: wire.generation_tokens,
        prefix_queries: wire.prefix_queries,
        prefix_hits: wire.prefix_hits,
        preemptions: wire.preemptions,
        handoffs: wire.handoffs,
        handoff_bytes: wire.handoff_bytes,
        handoff_writes: wire.handoff_writes,
        handoff_failures: wire.handoff_failures,
        handoff_in_place: wire.handoff_in_place,
        handoff_refusals: wire.handoff_refusals,
        handoff_head_start_seconds: wire.handoff_head_start_seconds,
        handoff_seconds: wire.handoff_seconds,
        speculation: wire.speculation.map(|it| speculation_from_wire(&it)).unwrap_or_default(),
    }
}

fn speculation_to_wire(sums: &SpeculationSums) -> proto::Speculation {
    let SpeculationSums { drafts, drafted, accepted, accepted_at, held_back } = *sums;
    proto::Speculation { drafts, drafted, accepted, accepted_at: accepted_at.to_vec(), held_back }
}

fn speculation_from_wire(wire: &proto::Speculation) -> SpeculationSums {
    let mut sums = SpeculationSums {
        drafts: wire.drafts,
        drafted: wire.drafted,
        accepted: wire.accepted,
        held_back: wire.held_back,
        ..SpeculationSums::default()
    };
    sums.accepted_at.iter_mut().zip(&wire.accepted_at).for_each(|(sum, it)| *sum = *it);
    sums
}

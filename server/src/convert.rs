//! Between the types of the wire and the types of the engine, both ways, and nowhere else.
//!
//! What comes from another process is checked here: a field that is missing or out of range is an [`Invalid`] that
//! names it, so that the rest of the program deals in types that cannot be wrong.

mod counters;

use std::net::SocketAddr;

use tidemill_engine::handle::{
    Description, DeviceWay, DeviceWays, EngineEvent, EngineStatus, Peer, PeerLink, Recovery, Role,
};
use tidemill_engine_core::request::{
    FinishReason, Logprobs, Part, Request, RequestId, SamplingParams, StopConditions,
};
use tidemill_kvtransfer_proto::layout::{AxisOrder, KvDtype};
use tidemill_kvtransfer_proto::units::{HandoffId, TokenCount};

use crate::proto;
use counters::{
    counters_from_wire, counters_to_wire, credit_from_wire, credit_to_wire, ledger_from_wire, ledger_to_wire,
};

/// Version of the protocol between router and worker. A router refuses a worker with another one.
pub(crate) const PROTOCOL: u32 = 1;

/// A message that no correct peer of this version sends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("field `{field}` is missing or out of range")]
pub(crate) struct Invalid {
    /// The field, as the protocol names it.
    pub(crate) field: &'static str,
}

/// A request together with the peer that its part involves.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Assignment {
    /// What the engine is asked to do.
    pub(crate) request: Request,
    /// The other side of the handoff; `None` exactly when the part is [`Part::Whole`].
    pub(crate) peer: Option<Peer>,
    /// Why a request of a split deployment is not split; empty when it is, or never would be.
    pub(crate) reason: String,
}

/// What a router knows of a worker from its `Describe`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Introduction {
    /// The engine's own description.
    pub(crate) engine: Description,
    /// Name of the model.
    pub(crate) model: String,
    /// Version of the worker's program.
    pub(crate) version: String,
}

/// One message of a worker's `Watch`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct WorkerStatus {
    /// State of the engine.
    pub(crate) engine: EngineStatus,
    /// Whether the prefix cache starts afresh before `added` and `removed` apply.
    pub(crate) cache_reset: bool,
    /// Blocks that can now be found.
    pub(crate) cache_added: Vec<u64>,
    /// Blocks that can no longer be found.
    pub(crate) cache_removed: Vec<u64>,
    /// Connections to peers.
    pub(crate) links: Vec<PeerLink>,
    /// What was measured since the last status.
    pub(crate) samples: Vec<Sample>,
}

/// One measured value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sample {
    /// What was measured, as the protocol names it.
    pub(crate) name: String,
    /// How much it was.
    pub(crate) value: f64,
}

pub(crate) fn assignment_to_wire(assignment: &Assignment) -> proto::GenerateRequest {
    let Request { id, tokens, prompt_len, sampling, stop, part } = &assignment.request;
    let peer = assignment.peer.as_ref().map(peer_to_wire);
    let part = match *part {
        Part::Whole => {
            proto::generate_request::Part::Whole(proto::Whole { reason: assignment.reason.clone() })
        }
        Part::PrefillFor(handoff) => {
            proto::generate_request::Part::PrefillFor(proto::PrefillFor { handoff: handoff.0, decode: peer })
        }
        Part::DecodeFrom(handoff) => {
            proto::generate_request::Part::DecodeFrom(proto::DecodeFrom { handoff: handoff.0, prefill: peer })
        }
    };
    proto::GenerateRequest {
        request: id.0,
        tokens: tokens.clone(),
        prompt_len: prompt_len.0,
        sampling: Some(sampling_to_wire(sampling)),
        stop: Some(stop_to_wire(stop)),
        part: Some(part),
    }
}

pub(crate) fn assignment_from_wire(wire: proto::GenerateRequest) -> Result<Assignment, Invalid> {
    let prompt_len = wire.prompt_len;
    if prompt_len == 0 || wire.tokens.len() < prompt_len as usize {
        return Err(Invalid { field: "prompt_len" });
    }
    let (part, peer, reason) = match wire.part.ok_or(Invalid { field: "part" })? {
        proto::generate_request::Part::Whole(whole) => (Part::Whole, None, whole.reason),
        proto::generate_request::Part::PrefillFor(part) => {
            let peer = peer_from_wire(part.decode.ok_or(Invalid { field: "prefill_for.decode" })?)?;
            (Part::PrefillFor(HandoffId(part.handoff)), Some(peer), String::new())
        }
        proto::generate_request::Part::DecodeFrom(part) => {
            let peer = peer_from_wire(part.prefill.ok_or(Invalid { field: "decode_from.prefill" })?)?;
            (Part::DecodeFrom(HandoffId(part.handoff)), Some(peer), String::new())
        }
    };
    let request = Request {
        id: RequestId(wire.request),
        tokens: wire.tokens,
        prompt_len: TokenCount(prompt_len),
        sampling: sampling_from_wire(wire.sampling.ok_or(Invalid { field: "sampling" })?),
        stop: stop_from_wire(wire.stop.ok_or(Invalid { field: "stop" })?)?,
        part,
    };
    Ok(Assignment { request, peer, reason })
}

fn sampling_to_wire(sampling: &SamplingParams) -> proto::Sampling {
    let logit_bias = sampling.logit_bias.iter();
    proto::Sampling {
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k.unwrap_or(0),
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        logit_bias: logit_bias.map(|&(token, bias)| proto::LogitBias { token, bias }).collect(),
        seed: sampling.seed,
        logprobs: sampling.logprobs,
        prompt_logprobs: sampling.prompt_logprobs,
    }
}

fn sampling_from_wire(wire: proto::Sampling) -> SamplingParams {
    SamplingParams {
        temperature: wire.temperature,
        top_p: wire.top_p,
        top_k: (wire.top_k != 0).then_some(wire.top_k),
        min_p: wire.min_p,
        repetition_penalty: wire.repetition_penalty,
        presence_penalty: wire.presence_penalty,
        frequency_penalty: wire.frequency_penalty,
        logit_bias: wire.logit_bias.into_iter().map(|bias| (bias.token, bias.bias)).collect(),
        seed: wire.seed,
        logprobs: wire.logprobs,
        prompt_logprobs: wire.prompt_logprobs,
    }
}

fn stop_to_wire(stop: &StopConditions) -> proto::Stop {
    proto::Stop {
        max_tokens: stop.max_tokens,
        min_tokens: stop.min_tokens,
        token_ids: stop.stop_token_ids.clone(),
        eos_token_ids: stop.eos_token_ids.clone(),
        ignore_eos: stop.ignore_eos,
    }
}

fn stop_from_wire(wire: proto::Stop) -> Result<StopConditions, Invalid> {
    if wire.max_tokens == 0 {
        return Err(Invalid { field: "stop.max_tokens" });
    }
    Ok(StopConditions {
        max_tokens: wire.max_tokens,
        min_tokens: wire.min_tokens,
        stop_token_ids: wire.token_ids,
        eos_token_ids: wire.eos_token_ids,
        ignore_eos: wire.ignore_eos,
    })
}

pub(crate) fn event_to_wire(event: EngineEvent) -> proto::GenerateEvent {
    use proto::generate_event::Event;
    let event = match event {
        EngineEvent::PromptLogprobs(tokens) => Event::PromptLogprobs(proto::PromptLogprobs {
            tokens: tokens.into_iter().map(logprobs_to_wire).collect(),
        }),
        EngineEvent::Token { id, index, logprobs } => {
            Event::Token(proto::Token { id, index, logprobs: logprobs.map(logprobs_to_wire) })
        }
        EngineEvent::Begun => Event::Begun(proto::Begun {}),
        EngineEvent::HandedOver => Event::HandedOver(proto::HandedOver {}),
        EngineEvent::Finished { reason, cached_tokens } => {
            let (reason, stop_token) = match reason {
                FinishReason::Stop(token) => (proto::Reason::Stop, token),
                FinishReason::Length => (proto::Reason::Length, None),
            };
            Event::Finished(proto::Finished { reason: reason.into(), stop_token, cached_tokens })
        }
        EngineEvent::Failed { recovery, message } => {
            let recovery = match recovery {
                Recovery::GiveUp => proto::Recovery::GiveUp,
                Recovery::Reroute => proto::Recovery::Reroute,
                Recovery::Later => proto::Recovery::Later,
            };
            Event::Failed(proto::Failed { recovery: recovery.into(), message })
        }
    };
    proto::GenerateEvent { event: Some(event) }
}

pub(crate) fn event_from_wire(wire: proto::GenerateEvent) -> Result<EngineEvent, Invalid> {
    use proto::generate_event::Event;
    Ok(match wire.event.ok_or(Invalid { field: "event" })? {
        Event::PromptLogprobs(prompt) => {
            EngineEvent::PromptLogprobs(prompt.tokens.into_iter().map(logprobs_from_wire).collect())
        }
        Event::Token(token) => EngineEvent::Token {
            id: token.id,
            index: token.index,
            logprobs: token.logprobs.map(logprobs_from_wire),
        },
        Event::Begun(_) => EngineEvent::Begun,
        Event::HandedOver(_) => EngineEvent::HandedOver,
        Event::Finished(finished) => {
            let reason = match finished.reason() {
                proto::Reason::Stop => FinishReason::Stop(finished.stop_token),
                proto::Reason::Length => FinishReason::Length,
                proto::Reason::Unspecified => return Err(Invalid { field: "finished.reason" }),
            };
            EngineEvent::Finished { reason, cached_tokens: finished.cached_tokens }
        }
        Event::Failed(failed) => {
            let recovery = match failed.recovery() {
                proto::Recovery::GiveUp => Recovery::GiveUp,
                // An advice of a later version: a replay elsewhere is never wrong.
                proto::Recovery::Reroute | proto::Recovery::Unspecified => Recovery::Reroute,
                proto::Recovery::Later => Recovery::Later,
            };
            EngineEvent::Failed { recovery, message: failed.message }
        }
    })
}

fn logprobs_to_wire(logprobs: Logprobs) -> proto::Logprobs {
    let top = logprobs.top.into_iter();
    proto::Logprobs {
        chosen: logprobs.chosen,
        rank: logprobs.rank,
        top: top.map(|(token, logprob)| proto::Alternative { token, logprob }).collect(),
    }
}

fn logprobs_from_wire(wire: proto::Logprobs) -> Logprobs {
    let top = wire.top.into_iter();
    Logprobs {
        chosen: wire.chosen,
        rank: wire.rank,
        top: top.map(|alternative| (alternative.token, alternative.logprob)).collect(),
    }
}

pub(crate) fn peer_to_wire(peer: &Peer) -> proto::Peer {
    proto::Peer {
        name: peer.name.clone(),
        instance: peer.instance,
        handoff_address: peer.address.to_string(),
    }
}

pub(crate) fn peer_from_wire(wire: proto::Peer) -> Result<Peer, Invalid> {
    Ok(Peer { name: wire.name, instance: wire.instance, address: address(&wire.handoff_address)? })
}

pub(crate) fn link_to_wire(link: &PeerLink) -> proto::PeerLink {
    let (transport, error) = match &link.transport {
        Ok(transport) => (transport.clone(), String::new()),
        Err(error) => (String::new(), error.clone()),
    };
    proto::PeerLink {
        name: link.name.clone(),
        instance: link.instance,
        transport,
        error,
        measured_bytes_per_second: link.bytes_per_second,
        is_fallback: link.is_fallback,
        to_peer_error: link.to_peer.clone().err().unwrap_or_default(),
        from_peer_error: link.from_peer.clone().err().unwrap_or_default(),
        device_to_peer: link.devices.to_peer.name().to_owned(),
        device_from_peer: link.devices.from_peer.name().to_owned(),
    }
}

pub(crate) fn link_from_wire(wire: proto::PeerLink) -> PeerLink {
    let transport = if wire.transport.is_empty() { Err(wire.error) } else { Ok(wire.transport) };
    let direction = |error: String| if error.is_empty() { Ok(()) } else { Err(error) };
    PeerLink {
        name: wire.name,
        instance: wire.instance,
        transport,
        bytes_per_second: wire.measured_bytes_per_second,
        is_fallback: wire.is_fallback,
        to_peer: direction(wire.to_peer_error),
        from_peer: direction(wire.from_peer_error),
        devices: DeviceWays {
            to_peer: DeviceWay::by_name(&wire.device_to_peer),
            from_peer: DeviceWay::by_name(&wire.device_from_peer),
        },
    }
}

pub(crate) fn introduction_to_wire(introduction: &Introduction) -> proto::Description {
    let engine = &introduction.engine;
    let role = match engine.role {
        Role::Prefill => proto::Role::Prefill,
        Role::Decode => proto::Role::Decode,
        Role::Hybrid => proto::Role::Hybrid,
    };
    proto::Description {
        protocol: PROTOCOL,
        version: introduction.version.clone(),
        name: engine.name.clone(),
        role: role.into(),
        instance: engine.instance,
        model: introduction.model.clone(),
        fingerprint: engine.fingerprint.clone(),
        max_model_len: engine.max_model_len,
        block_len: engine.block_len,
        vocab_size: engine.vocab_size,
        handoff_address: engine.handoff_address.to_string(),
        kv_dtype: engine.kv_dtype.name().into(),
        axis_order: engine.axis_order.name().into(),
        device: engine.device.clone(),
        max_num_seqs: engine.max_num_seqs,
        tensor_parallel: engine.tensor_parallel,
    }
}

pub(crate) fn introduction_from_wire(wire: proto::Description) -> Result<Introduction, Invalid> {
    if wire.protocol != PROTOCOL {
        return Err(Invalid { field: "protocol" });
    }
    let role = match wire.role() {
        proto::Role::Prefill => Role::Prefill,
        proto::Role::Decode => Role::Decode,
        proto::Role::Hybrid => Role::Hybrid,
        proto::Role::Unspecified => return Err(Invalid { field: "role" }),
    };
    let engine = Description {
        name: wire.name,
        role,
        instance: wire.instance,
        fingerprint: wire.fingerprint,
        max_model_len: wire.max_model_len,
        block_len: wire.block_len,
        vocab_size: wire.vocab_size,
        handoff_address: address(&wire.handoff_address)?,
        kv_dtype: named(KV_DTYPES, &wire.kv_dtype, KvDtype::name).ok_or(Invalid { field: "kv_dtype" })?,
        axis_order: named(AXIS_ORDERS, &wire.axis_order, AxisOrder::name)
            .ok_or(Invalid { field: "axis_order" })?,
        device: wire.device,
        max_num_seqs: wire.max_num_seqs,
        tensor_parallel: wire.tensor_parallel.max(1),
    };
    Ok(Introduction { engine, model: wire.model, version: wire.version })
}

pub(crate) fn status_to_wire(status: &WorkerStatus) -> proto::Status {
    let EngineStatus { draining, running, waiting, queued_tokens, ledger, counters, credit } = &status.engine;
    proto::Status {
        credit: Some(credit_to_wire(credit)),
        draining: *draining,
        running: *running,
        waiting: *waiting,
        queued_tokens: *queued_tokens,
        ledger: Some(ledger_to_wire(ledger)),
        counters: Some(counters_to_wire(counters)),
        cache_reset: status.cache_reset,
        cache_added: status.cache_added.clone(),
        cache_removed: status.cache_removed.clone(),
        links: status.links.iter().map(link_to_wire).collect(),
        samples: status
            .samples
            .iter()
            .map(|sample| proto::Sample { name: sample.name.clone(), value: sample.value })
            .collect(),
    }
}

pub(crate) fn status_from_wire(wire: proto::Status) -> WorkerStatus {
    WorkerStatus {
        engine: EngineStatus {
            draining: wire.draining,
            running: wire.running,
            waiting: wire.waiting,
            queued_tokens: wire.queued_tokens,
            ledger: ledger_from_wire(wire.ledger.unwrap_or_default()),
            counters: counters_from_wire(wire.counters.unwrap_or_default()),
            credit: credit_from_wire(wire.credit.unwrap_or_default()),
        },
        cache_reset: wire.cache_reset,
        cache_added: wire.cache_added,
        cache_removed: wire.cache_removed,
        links: wire.links.into_iter().map(link_from_wire).collect(),
        samples: wire
            .samples
            .into_iter()
            .map(|sample| Sample { name: sample.name, value: sample.value })
            .collect(),
    }
}

fn address(text: &str) -> Result<SocketAddr, Invalid> {
    text.parse().map_err(|_| Invalid { field: "handoff_address" })
}

fn named<T: Copy>(all: &[T], name: &str, name_of: fn(T) -> &'static str) -> Option<T> {
    all.iter().copied().find(|&it| name_of(it) == name)
}

const KV_DTYPES: &[KvDtype] = &[KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8, KvDtype::Fp8];
const AXIS_ORDERS: &[AxisOrder] = &[AxisOrder::TokenHead, AxisOrder::HeadToken];

#[cfg(test)]
mod tests {
    use tidemill_engine::handle::{Counters, CreditLoad, Ledger, SpeculationSums};
    use tidemill_kvtransfer_proto::units::BlockCount;

    use super::*;

    fn logprobs() -> Logprobs {
        Logprobs { chosen: -0.5, rank: 2, top: vec![(9, -0.25), (7, -0.5)] }
    }

    fn assignment(part: Part) -> Assignment {
        let sampling = SamplingParams {
            temperature: 0.7,
            top_p: 0.9,
            top_k: Some(40),
            min_p: 0.1,
            repetition_penalty: 1.1,
            presence_penalty: 0.2,
            frequency_penalty: 0.3,
            logit_bias: vec![(3, -1.0)],
            seed: u64::MAX,
            logprobs: Some(0),
            prompt_logprobs: None,
        };
        let stop = StopConditions {
            max_tokens: 8,
            min_tokens: 2,
            stop_token_ids: vec![4],
            eos_token_ids: vec![5, 6],
            ignore_eos: false,
        };
        let whole = part == Part::Whole;
        let peer = Peer { name: "decode-0".into(), instance: 8, address: ([127, 0, 0, 1], 9).into() };
        Assignment {
            request: Request {
                id: RequestId(77),
                tokens: vec![1, 2, 3],
                prompt_len: TokenCount(2),
                sampling,
                stop,
                part,
            },
            peer: (!whole).then_some(peer),
            reason: if whole { "short".into() } else { String::new() },
        }
    }

    #[test]
    fn an_assignment_survives_the_wire() {
        for part in [Part::Whole, Part::PrefillFor(HandoffId(5)), Part::DecodeFrom(HandoffId(6))] {
            let sent = assignment(part);
            assert_eq!(assignment_from_wire(assignment_to_wire(&sent)), Ok(sent));
        }
    }

    #[test]
    fn an_event_survives_the_wire() {
        let events = [
            EngineEvent::PromptLogprobs(vec![logprobs(), logprobs()]),
            EngineEvent::Token { id: 3, index: 0, logprobs: None },
            EngineEvent::Token { id: 3, index: 7, logprobs: Some(logprobs()) },
            EngineEvent::Begun,
            EngineEvent::HandedOver,
            EngineEvent::Finished { reason: FinishReason::Stop(None), cached_tokens: 16 },
            EngineEvent::Finished { reason: FinishReason::Stop(Some(0)), cached_tokens: 0 },
            EngineEvent::Finished { reason: FinishReason::Length, cached_tokens: 0 },
            EngineEvent::Failed { recovery: Recovery::GiveUp, message: "no".into() },
            EngineEvent::Failed { recovery: Recovery::Reroute, message: "peer".into() },
            EngineEvent::Failed { recovery: Recovery::Later, message: "full".into() },
        ];
        for event in events {
            assert_eq!(event_from_wire(event_to_wire(event.clone())), Ok(event));
        }
    }

    #[test]
    fn an_introduction_survives_the_wire() {
        let engine = Description {
            name: "prefill-0".into(),
            role: Role::Prefill,
            instance: u64::MAX,
            fingerprint: "f".into(),
            max_model_len: 1,
            block_len: 2,
            vocab_size: 3,
            handoff_address: ([127, 0, 0, 1], 4).into(),
            kv_dtype: KvDtype::Int8,
            axis_order: AxisOrder::HeadToken,
            device: "cpu".into(),
            max_num_seqs: 5,
            tensor_parallel: 2,
        };
        let sent = Introduction { engine, model: "m".into(), version: "1".into() };
        assert_eq!(introduction_from_wire(introduction_to_wire(&sent)), Ok(sent));
    }

    #[test]
    fn a_status_survives_the_wire() {
        let [total, free, cached, held, reserved, quarantined] = [21, 1, 2, 3, 4, 11].map(BlockCount);
        let ledger = Ledger { total, free, cached, held, reserved, quarantined };
        let sent = WorkerStatus {
            engine: EngineStatus {
                draining: true,
                running: 1,
                waiting: 2,
                queued_tokens: 7,
                ledger,
                counters: Counters {
                    steps: 1,
                    handoff_head_start_seconds: 0.25,
                    handoff_seconds: 0.5,
                    handoff_refusals: 3,
                    speculation: SpeculationSums {
                        drafts: 4,
                        drafted: 5,
                        accepted: 6,
                        accepted_at: std::array::from_fn(|place| place as u64),
                        held_back: 7,
                    },
                    ..Counters::default()
                },
                credit: CreditLoad { granted_bytes: 1 << 40, waiting_bytes: 5, waiting_handoffs: 2 },
            },
            cache_reset: true,
            cache_added: vec![u64::MAX],
            cache_removed: vec![1],
            links: vec![
                PeerLink {
                    name: "a".into(),
                    instance: 1,
                    transport: Ok("shm".into()),
                    bytes_per_second: 2.0,
                    is_fallback: true,
                    to_peer: Err("dtype".into()),
                    from_peer: Ok(()),
                    devices: DeviceWays { to_peer: DeviceWay::PeerCopy, from_peer: DeviceWay::Staging },
                },
                PeerLink {
                    name: "b".into(),
                    instance: u64::MAX,
                    transport: Err("refused".into()),
                    bytes_per_second: 0.0,
                    is_fallback: false,
                    to_peer: Ok(()),
                    from_peer: Err("dtype".into()),
                    devices: DeviceWays::default(),
                },
            ],
            samples: vec![Sample { name: "handoff_seconds".into(), value: 0.5 }],
        };
        assert_eq!(status_from_wire(status_to_wire(&sent)), sent);
    }

    #[test]
    fn what_no_correct_peer_sends_is_refused_by_name() {
        let changed = |change: fn(&mut proto::GenerateRequest)| {
            let mut wire = assignment_to_wire(&assignment(Part::PrefillFor(HandoffId(5))));
            change(&mut wire);
            assignment_from_wire(wire).map_err(|invalid| invalid.field)
        };
        #[rustfmt::skip]
        let rows = [
            ("an empty prompt",           changed(|it| it.prompt_len = 0),     "prompt_len"),
            ("a prompt beyond the tokens", changed(|it| it.prompt_len = 4),    "prompt_len"),
            ("no part",                   changed(|it| it.part = None),        "part"),
            ("no sampling",               changed(|it| it.sampling = None),    "sampling"),
            ("no stop",                   changed(|it| it.stop = None),        "stop"),
            ("nothing to generate",       changed(|it| it.stop.as_mut().unwrap().max_tokens = 0), "stop.max_tokens"),
        ];
        for (name, outcome, field) in rows {
            assert_eq!(outcome.map(|_| ()), Err(field), "{name}");
        }
    }
}

//! What can happen next.

use tidemill_kvtransfer_proto::units::HandoffId;

/// One step of one thread, or one fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Move {
    DecodeEngineReserves,
    DecodeEngineCancels(HandoffId),
    DecodeEngineHears,
    DecodeEngineRefuses,
    DecodeEngineFrees(HandoffId),
    DecodeEndpointObeys,
    DecodeEndpointHears(usize),
    DecodeEndpointTakesDigests,
    DecodeEndpointNoticesLoss,
    DecodeEndpointEndsAccess,
    DecodeEndpointSeesTheEnd,
    DecodeEndpointReachesNobody,
    DecodeEndpointFetches,
    DecodeEndpointReads(usize),
    PrefillEndpointObeys,
    PrefillEndpointHears(usize),
    PrefillEndpointPosts,
    PrefillEndpointWrites(usize),
    PrefillEndpointTakesDigests,
    PrefillEndpointNoticesLoss,
    PrefillEndpointEndsAccess,
    PrefillEngineHears,
    PrefillEngineStores(HandoffId),
    PrefillEngineFinishes(HandoffId),
    PrefillEngineGivesUp(HandoffId),
    PrefillEngineStoresTooLate,
    ConnectionBreaks,
    ConnectionIsMade,
    PrefillWorkerDies,
    MessageToPrefillVanishes,
    MessageToDecodeVanishes,
    NetworkDelivers(usize),
}

/// Whom a move changes.
#[derive(Clone, Copy)]
pub(crate) struct Touches {
    pub(crate) decode: bool,
    pub(crate) prefill: bool,
}

impl Move {
    pub(crate) fn touches(self) -> Touches {
        let (decode, prefill) = match self {
            Self::DecodeEngineReserves // The router tells both.
            | Self::ConnectionBreaks
            | Self::ConnectionIsMade
            | Self::PrefillWorkerDies => (true, true),
            Self::MessageToPrefillVanishes | Self::MessageToDecodeVanishes | Self::NetworkDelivers(_) => (false, false),
            Self::DecodeEngineCancels(_)
            | Self::DecodeEngineHears
            | Self::DecodeEngineRefuses
            | Self::DecodeEngineFrees(_)
            | Self::DecodeEndpointObeys
            | Self::DecodeEndpointHears(_)
            | Self::DecodeEndpointTakesDigests
            | Self::DecodeEndpointNoticesLoss
            | Self::DecodeEndpointEndsAccess
            | Self::DecodeEndpointSeesTheEnd
            | Self::DecodeEndpointReachesNobody
            | Self::DecodeEndpointFetches
            | Self::DecodeEndpointReads(_) => (true, false),
            Self::PrefillEndpointObeys
            | Self::PrefillEndpointHears(_)
            | Self::PrefillEndpointPosts
            | Self::PrefillEndpointWrites(_)
            | Self::PrefillEndpointTakesDigests
            | Self::PrefillEndpointNoticesLoss
            | Self::PrefillEndpointEndsAccess
            | Self::PrefillEngineHears
            | Self::PrefillEngineStores(_)
            | Self::PrefillEngineFinishes(_)
            | Self::PrefillEngineGivesUp(_)
            | Self::PrefillEngineStoresTooLate => (false, true),
        };
        Touches { decode, prefill }
    }
}

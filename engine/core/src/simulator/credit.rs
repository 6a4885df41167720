//! The check that receivers are not sent more at a time than they lend credit for.

use std::collections::BTreeSet;

use tidemill_kvtransfer_proto::endpoint_core::WriteSource;
use tidemill_kvtransfer_proto::message::Message;
use tidemill_kvtransfer_proto::reservation::ReservationState;

use super::Mischief;
use super::wire::ConnId;
use super::world::{Event, World};

impl World<'_> {
    /// A planted bug: whoever asks is answered by the wire.
    pub(super) fn grant_to_all(&mut self, id: ConnId, side: usize, at: u64, message: &Message) {
        if let Message::Ask { handoff, ask } = message
            && self.plants(Mischief::GrantToAll)
        {
            let message = Message::Grant { handoff: *handoff, bytes: ask.wanted };
            self.at(at, Event::Control { conn: id, to: side, message });
        }
    }

    /// Bytes on their way to handoffs that are being filled on one side of a connection are as many as that lends at a
    /// time; more only for one that is alone.
    pub(super) fn check_credit(&self, id: ConnId, side: usize) {
        let receiver = self.conns[&id].ends[side].process;
        let Some(life) = self.workers[receiver.place].life.as_ref() else { return };
        let gives_back_early = [Mischief::CommitEarly, Mischief::ReadEarly, Mischief::SkipDigest];
        if life.instance != receiver.instance
            || self.options.mischief.is_some_and(|it| gives_back_early.contains(&it))
        {
            return; // Nobody is there to lend; or what is still used was given back.
        }
        let is_filled = |handoff| life.core.reservation_state(handoff) == Some(ReservationState::Filling);
        let (mut bytes, mut handoffs) = (0, BTreeSet::new());
        for conn in self.conns.values().filter(|it| it.proof.takes_credit()) {
            for side in 0..2 {
                let (to, from) = (&conn.ends[side], &conn.ends[1 - side]);
                if to.process != receiver || !to.is_open {
                    continue;
                }
                for read in to.reads.values().filter(|it| is_filled(it.handoff())) {
                    bytes += read.bytes();
                    handoffs.insert(read.handoff());
                }
                if !from.is_open {
                    continue;
                }
                for flight in from.flights.values().filter(|it| is_filled(it.range.handoff)) {
                    bytes += flight.source.len() as u64;
                    handoffs.insert(flight.range.handoff);
                }
            }
        }
        assert!(
            bytes <= self.credit || handoffs.len() == 1,
            "{bytes} bytes of {} handoffs are on their way to worker {}, which lends credit for {}",
            handoffs.len(),
            receiver.place,
            self.credit
        );
    }
}

//! Prefill side of a handoff: from the first layer that is computed to the peer's word that it took over.
//!
//! ```text
//! Computing ──► Pushing ──► Committing ──► Done
//!     │            │             │
//!     └────────────┴► Stopping ──┴► Abandoned      Stopping: given up, but a write or the engine may still run
//! ```
//!
//! Commit is sent after the engine said `Finish` and every write has completed, never before: writes on
//! different queues have no order among each other, so only completions can tell. `Quiet` is sent when neither a
//! write nor the engine can touch the peer's blocks any more, and not a moment earlier.

use crate::error::TransferError;
use crate::message::Message;
use crate::units::HandoffId;

/// Where the prefill side of a handoff stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SenderState {
    /// The engine computes; no write was asked for (in place there never is one).
    Computing,
    /// Writes are queued or under way.
    Pushing,
    /// Commit was sent, or is being composed.
    Committing,
    /// Given up; waits until the engine has stopped and the writes under way have completed.
    Stopping,
    /// The decode side took over.
    Done,
    /// Given up, and quiet.
    Abandoned,
}

/// What can happen to the prefill side of a handoff.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SenderEvent {
    /// The engine asked for this many writes.
    Pushed {
        /// How many.
        writes: u32,
    },
    /// Writes completed, or were dropped before they were posted.
    Settled {
        /// How many.
        writes: u32,
    },
    /// A write completed badly; it still has to be counted by `Settled`.
    WriteFailed {
        /// In which way.
        reason: String,
    },
    /// The engine is done computing and will not touch the blocks again.
    Finish {
        /// To be sent along with the commit.
        payload: Vec<u8>,
    },
    /// The engine gave up and will not touch the blocks again.
    Abandon {
        /// Its reason.
        reason: String,
    },
    /// The decode side took over.
    Adopted,
    /// The decode side does not accept the commit, or what was named ahead of it.
    Refused {
        /// Its reason.
        reason: String,
    },
    /// The decode side does not want it any more.
    Cancelled,
    /// The connection to the peer is gone.
    PeerLost {
        /// Name of the peer.
        peer: String,
        /// How it showed.
        reason: String,
    },
}

/// What the driver has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SenderAction {
    /// Say this to the peer, if it is still there.
    Send(Message),
    /// Compose the commit with the digests of what was written, and send it.
    Commit {
        /// To be sent along.
        payload: Vec<u8>,
    },
    /// Drop the writes that were not posted yet and count them by `Settled`.
    DropUnposted,
    /// Tell the engine: stop, and answer with `Abandon`.
    TellStop,
    /// Tell the engine: taken over; its blocks are free. The handoff can be forgotten.
    TellDelivered,
    /// Tell the engine: it failed, and nothing reads its blocks any more. The handoff can be forgotten.
    TellFailed(TransferError),
}

/// The prefill side of one handoff.
#[derive(Clone, Debug)]
pub struct Sender {
    handoff: HandoffId,
    state: SenderState,
    /// Writes asked for that are not settled.
    unsettled: u32,
    engine: Engine,
    /// Why it was given up; the first reason counts.
    cause: Option<TransferError>,
}

/// What the engine last said about its own part.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Engine {
    Computing,
    /// Done, with the payload of the commit until that is sent.
    Finished(Option<Vec<u8>>),
    Stopped,
}

use SenderAction as Action;
use SenderEvent as Event;
use SenderState as State;

impl Sender {
    /// The peer's reservation is known; the engine may begin.
    pub fn new(handoff: HandoffId) -> Self {
        Self { handoff, state: State::Computing, unsettled: 0, engine: Engine::Computing, cause: None }
    }

    /// Where it stands.
    pub fn state(&self) -> SenderState {
        self.state
    }

    /// Whether writes may be pushed: neither finished nor given up.
    pub fn accepts_writes(&self) -> bool {
        matches!(self.state, State::Computing | State::Pushing) && self.engine == Engine::Computing
    }

    /// Whether a write or the engine may still touch the peer's blocks.
    pub fn is_busy(&self) -> bool {
        matches!(self.state, State::Computing | State::Pushing | State::Stopping)
    }

    /// The one way in which it changes. Events that come late, twice or out of order change nothing.
    ///
    /// # Panics
    ///
    /// On `Pushed` while [`accepts_writes`](Self::accepts_writes) is false and on more `Settled` than `Pushed`:
    /// bugs in the driver.
    pub fn apply(&mut self, event: Event) -> Vec<Action> {
        match event {
            Event::Pushed { writes } => self.pushed(writes),
            Event::Settled { writes } => self.settled(writes),
            Event::WriteFailed { reason } => self.give_up(TransferError::Refused { reason }),
            Event::Finish { payload } => self.finish(payload),
            Event::Abandon { reason } => self.abandon(reason),
            Event::Adopted => self.adopted(),
            Event::Refused { reason } => self.refused(reason),
            Event::Cancelled => self.give_up(TransferError::Cancelled),
            Event::PeerLost { peer, reason } => self.give_up(TransferError::PeerLost { peer, reason }),
        }
    }

    fn pushed(&mut self, writes: u32) -> Vec<Action> {
        assert!(self.accepts_writes(), "writes are pushed while the handoff accepts them");
        self.state = State::Pushing;
        self.unsettled += writes;
        Vec::new()
    }

    fn settled(&mut self, writes: u32) -> Vec<Action> {
        self.unsettled = self.unsettled.checked_sub(writes).expect("each write settles once");
        match self.state {
            State::Stopping => self.end_if_quiet(),
            _ => self.commit_if_complete(),
        }
    }

    fn finish(&mut self, payload: Vec<u8>) -> Vec<Action> {
        if self.engine != Engine::Computing {
            return Vec::new();
        }
        self.engine = Engine::Finished(Some(payload));
        match self.state {
            State::Computing | State::Pushing => self.commit_if_complete(),
            State::Stopping => self.end_if_quiet(), // It finished before it heard that it should stop.
            State::Committing | State::Done | State::Abandoned => Vec::new(),
        }
    }

    fn abandon(&mut self, reason: String) -> Vec<Action> {
        if self.engine != Engine::Computing {
            return Vec::new(); // After `Finish` the decode side has the say.
        }
        self.engine = Engine::Stopped;
        match self.state {
            State::Computing | State::Pushing => self.give_up(TransferError::Abandoned { reason }),
            State::Stopping => self.end_if_quiet(),
            State::Committing | State::Done | State::Abandoned => Vec::new(),
        }
    }

    fn adopted(&mut self) -> Vec<Action> {
        if self.state != State::Committing {
            return Vec::new();
        }
        self.state = State::Done;
        vec![Action::TellDelivered]
    }

    fn refused(&mut self, reason: String) -> Vec<Action> {
        self.give_up(TransferError::Refused { reason })
    }

    fn give_up(&mut self, cause: TransferError) -> Vec<Action> {
        match self.state {
            State::Computing | State::Pushing => {
                self.state = State::Stopping;
                self.cause = Some(cause);
                let mut actions = Vec::new();
                if self.engine == Engine::Computing {
                    actions.push(Action::TellStop);
                }
                if self.unsettled > 0 {
                    actions.push(Action::DropUnposted);
                }
                actions.extend(self.end_if_quiet());
                actions
            }
            State::Committing => {
                self.cause = Some(cause);
                self.end()
            }
            State::Stopping | State::Done | State::Abandoned => Vec::new(),
        }
    }

    fn commit_if_complete(&mut self) -> Vec<Action> {
        let Engine::Finished(payload) = &mut self.engine else { return Vec::new() };
        if self.unsettled > 0 {
            self.state = State::Pushing;
            return Vec::new();
        }
        self.state = State::Committing;
        let payload = payload.take().expect("commits once: the state was not Committing");
        vec![Action::Commit { payload }]
    }

    fn end_if_quiet(&mut self) -> Vec<Action> {
        if self.engine == Engine::Computing || self.unsettled > 0 { Vec::new() } else { self.end() }
    }

    fn end(&mut self) -> Vec<Action> {
        self.state = State::Abandoned;
        let cause = self.cause.take().expect("given up for a reason");
        let reason = cause.to_string();
        vec![Action::Send(Message::Quiet { handoff: self.handoff, reason }), Action::TellFailed(cause)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str) -> Event {
        let reason = || "r".to_owned();
        match name {
            "push" => Event::Pushed { writes: 1 },
            "settle" => Event::Settled { writes: 1 },
            "write-failed" => Event::WriteFailed { reason: reason() },
            "finish" => Event::Finish { payload: vec![1] },
            "abandon" => Event::Abandon { reason: reason() },
            "adopted" => Event::Adopted,
            "refused" => Event::Refused { reason: reason() },
            "cancelled" => Event::Cancelled,
            "lost" => Event::PeerLost { peer: "p".into(), reason: reason() },
            other => panic!("no event {other}"),
        }
    }

    fn render(state: State, actions: &[Action]) -> String {
        let actions = actions.iter().map(|action| match action {
            Action::Send(Message::Quiet { .. }) => "send-quiet".to_owned(),
            Action::Send(other) => format!("{other:?}"),
            Action::Commit { .. } => "commit".to_owned(),
            Action::DropUnposted => "drop".to_owned(),
            Action::TellStop => "stop!".to_owned(),
            Action::TellDelivered => "delivered!".to_owned(),
            Action::TellFailed(_) => "failed!".to_owned(),
        });
        std::iter::once(format!("{state:?}").to_lowercase()).chain(actions).collect::<Vec<_>>().join(" ")
    }

    /// The first column is the way to a state, the second what happens then; `.` means that nothing changes.
    #[test]
    fn transitions() {
        #[rustfmt::skip]
        let rows = [
            ("",                        "push",         "pushing"),
            ("",                        "write-failed", "stopping stop!"),
            ("",                        "finish",       "committing commit"),
            ("",                        "abandon",      "abandoned send-quiet failed!"),
            ("",                        "adopted",      "."),
            ("",                        "refused",      "stopping stop!"),
            ("",                        "cancelled",    "stopping stop!"),
            ("",                        "lost",         "stopping stop!"),

            ("push",                    "push",         "pushing"),
            ("push",                    "settle",       "pushing"),
            ("push",                    "write-failed", "stopping stop! drop"),
            ("push",                    "finish",       "pushing"),
            ("push",                    "abandon",      "stopping drop"),
            ("push",                    "adopted",      "."),
            ("push",                    "refused",      "stopping stop! drop"),
            ("push",                    "cancelled",    "stopping stop! drop"),
            ("push",                    "lost",         "stopping stop! drop"),
            ("push settle",             "finish",       "committing commit"),
            ("push settle",             "cancelled",    "stopping stop!"),
            ("push push finish",        "settle",       "pushing"),
            ("push push finish settle", "settle",       "committing commit"),
            ("push finish",             "abandon",      "."),
            ("push finish",             "finish",       "."),
            ("push finish",             "cancelled",    "stopping drop"),
            ("push finish",             "write-failed", "stopping drop"),
            ("push finish cancelled",   "settle",       "abandoned send-quiet failed!"),

            ("finish",                  "adopted",      "done delivered!"),
            ("finish",                  "refused",      "abandoned send-quiet failed!"),
            ("finish",                  "cancelled",    "abandoned send-quiet failed!"),
            ("finish",                  "lost",         "abandoned send-quiet failed!"),
            ("finish",                  "abandon",      "."),
            ("finish",                  "finish",       "."),

            ("cancelled",               "cancelled",    "."),
            ("cancelled",               "lost",         "."),
            ("cancelled",               "adopted",      "."),
            ("cancelled",               "refused",      "."),
            ("cancelled",               "write-failed", "."),
            ("cancelled",               "abandon",      "abandoned send-quiet failed!"),
            ("cancelled",               "finish",       "abandoned send-quiet failed!"),
            ("push cancelled",          "abandon",      "."),
            ("push cancelled",          "settle",       "."),
            ("push cancelled abandon",  "settle",       "abandoned send-quiet failed!"),
            ("push cancelled settle",   "abandon",      "abandoned send-quiet failed!"),
            ("push lost abandon",       "settle",       "abandoned send-quiet failed!"),

            ("finish adopted",          "adopted",      "."),
            ("finish adopted",          "refused",      "."),
            ("finish adopted",          "cancelled",    "."),
            ("finish adopted",          "lost",         "."),
            ("abandon",                 "cancelled",    "."),
            ("abandon",                 "adopted",      "."),
            ("abandon",                 "lost",         "."),
            ("abandon",                 "finish",       "."),
        ];
        for (path, name, expected) in rows {
            let mut it = Sender::new(HandoffId(7));
            for step in path.split_whitespace() {
                it.apply(event(step));
            }
            let before = render(it.state(), &[]);
            let actions = it.apply(event(name));
            let expected = if expected == "." { before } else { expected.to_owned() };
            assert_eq!(render(it.state(), &actions), expected, "{name} after \"{path}\"");
        }
    }

    #[test]
    fn writes_are_accepted_only_while_the_engine_computes() {
        for (path, accepts, busy) in [
            ("", true, true),
            ("push", true, true),
            ("push finish", false, true),
            ("finish", false, false),
            ("cancelled", false, true),
            ("cancelled abandon", false, false),
            ("finish adopted", false, false),
        ] {
            let mut it = Sender::new(HandoffId(7));
            for step in path.split_whitespace() {
                it.apply(event(step));
            }
            assert_eq!((it.accepts_writes(), it.is_busy()), (accepts, busy), "after \"{path}\"");
        }
    }
}

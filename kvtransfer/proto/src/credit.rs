//! Credit: how many bytes may be on their way to one receiver, and whose they are.
//!
//! ```text
//! prefill side, CreditLine                          decode side, CreditPool
//!   pushed: asks for whole writes ── Ask ─────────►   waits for its turn, by deadline
//!   posts what was granted        ◄─ Grant ────────   as soon as all of it fits under the limit
//!   writes have ended             ── Ask ─────────►   is room for the next
//! ```
//!
//! Without it many prefill workers that write to one decode worker at once (incast) share its port by chance: queues
//! fill, packets are lost or paused, and all of them are late. With it the one whose deadline comes first has the
//! port, and the others wait without harm.
//!
//! Why nothing waits for ever. Only bytes that can be written at once are asked for, in whole writes, and granted
//! whole or not at all: whoever holds credit can use it up, and gives it back as its writes end, with its commit or
//! with its reservation, which ends with the lease of a peer that died. Nobody overtakes the earliest deadline, not
//! even with a smaller wish; and a deadline that has passed stays the earliest.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::units::{HandoffId, Moment};

/// What a receiver has lent to those who write to it.
#[derive(Clone, Debug)]
pub struct CreditPool {
    /// Bytes that may be lent at a time.
    limit: u64,
    /// Bytes that are.
    lent: u64,
    accounts: BTreeMap<HandoffId, Account>,
    /// Those that want more than they have, in the order in which they get it.
    waiting: BTreeSet<(Moment, HandoffId)>,
    holders: BTreeMap<u64, Holder>,
}

/// One handoff's. All numbers count bytes since it began.
#[derive(Clone, Debug)]
struct Account {
    peer: u64,
    deadline: Moment,
    /// All that it can ever want.
    size: u64,
    wanted: u64,
    granted: u64,
    ended: u64,
    /// Whether it may get more.
    is_open: bool,
}

/// A peer that is to write what it was lent.
#[derive(Clone, Debug, Default)]
struct Holder {
    held: u64,
    /// Since when none of its writes has ended, as far as that was looked at.
    still_since: Option<Moment>,
}

/// Leave to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// To whom.
    pub peer: u64,
    /// For which handoff.
    pub handoff: HandoffId,
    /// How many of its bytes may be written, counted from the first.
    pub bytes: u64,
}

/// What a sender says of its credit. Both numbers count bytes since the handoff began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Bytes whose writes have ended, in whatever way.
    pub ended: u64,
    /// Bytes that it has or would like to have leave for.
    pub wanted: u64,
}

/// How busy a receiver is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CreditLoad {
    /// Bytes that peers may have on their way.
    pub granted_bytes: u64,
    /// Bytes that peers would like to send and may not yet.
    pub waiting_bytes: u64,
    /// Handoffs that these belong to.
    pub waiting_handoffs: u64,
}

/// A peer asks for what cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it asked for credit that it cannot need, or gave back what it never had")]
pub struct CreditFault;

impl CreditPool {
    /// Lends `limit` bytes at a time; more only to one that wants more at once and is alone.
    pub fn new(limit: u64) -> Self {
        Self { limit, lent: 0, accounts: BTreeMap::new(), waiting: BTreeSet::new(), holders: BTreeMap::new() }
    }

    /// A handoff of `size` bytes may ask from now on.
    pub fn open(&mut self, handoff: HandoffId, peer: u64, deadline: Moment, size: u64) {
        let account = Account { peer, deadline, size, wanted: 0, granted: 0, ended: 0, is_open: true };
        let before = self.accounts.insert(handoff, account);
        assert!(before.is_none(), "a handoff is announced once");
    }

    /// What a peer says of its handoff's credit. Of a handoff without an account it is too late, and means nothing.
    ///
    /// # Errors
    ///
    /// No correct peer says it; nothing changes.
    pub fn ask(&mut self, handoff: HandoffId, ask: Ask) -> Result<(), CreditFault> {
        let Some(account) = self.accounts.get_mut(&handoff) else { return Ok(()) };
        let is_sound = account.ended <= ask.ended
            && ask.ended <= account.granted
            && account.wanted <= ask.wanted
            && ask.wanted <= account.size;
        if !is_sound {
            return Err(CreditFault);
        }
        let given_back = ask.ended - account.ended;
        account.ended = ask.ended;
        account.wanted = ask.wanted;
        self.lent -= given_back;
        if account.is_open {
            if account.granted < account.wanted {
                self.waiting.insert((account.deadline, handoff));
            }
            let peer = account.peer;
            if 0 < given_back {
                self.take_back(peer, given_back);
            }
        }
        Ok(())
    }

    /// It gets no more. What it has stays lent until [`close`](Self::close): its bytes may be under way.
    pub fn stop(&mut self, handoff: HandoffId) {
        let Some(account) = self.accounts.get_mut(&handoff).filter(|it| it.is_open) else { return };
        account.is_open = false;
        self.waiting.remove(&(account.deadline, handoff));
        let (peer, held) = (account.peer, account.held());
        if 0 < held {
            self.take_back(peer, held);
        }
    }

    fn take_back(&mut self, peer: u64, bytes: u64) {
        let Some(holder) = self.holders.get_mut(&peer) else { return };
        holder.held -= bytes;
        holder.still_since = None;
        if holder.held == 0 {
            self.holders.remove(&peer);
        }
    }

    /// Nothing of it is under way any more: what it had is free.
    pub fn close(&mut self, handoff: HandoffId) {
        self.stop(handoff);
        if let Some(account) = self.accounts.remove(&handoff) {
            self.lent -= account.held();
        }
    }

    /// The next leave that can be given; to be asked for until there is none.
    pub fn next_grant(&mut self) -> Option<Grant> {
        let &(deadline, handoff) = self.waiting.first()?;
        let account = self.accounts.get_mut(&handoff).expect("who waits has an account");
        let more = account.wanted - account.granted;
        // Whoever is alone gets what it wants: otherwise a write that is longer than the limit would wait for ever.
        if 0 < self.lent && self.limit.saturating_sub(self.lent) < more {
            return None;
        }
        self.waiting.remove(&(deadline, handoff));
        account.granted = account.wanted;
        self.lent += more;
        self.holders.entry(account.peer).or_default().held += more;
        Some(Grant { peer: account.peer, handoff, bytes: account.granted })
    }

    /// Whether a peer has had leave to write for longer than `patience`, and no write of it has ended.
    pub fn is_standing_still(&mut self, peer: u64, patience: Duration, now: Moment) -> bool {
        let Some(holder) = self.holders.get_mut(&peer) else { return false };
        let since = *holder.still_since.get_or_insert(now);
        patience < now.since(since)
    }

    /// How busy it is.
    pub fn load(&self) -> CreditLoad {
        let wishes = self.waiting.iter().map(|(_, handoff)| &self.accounts[handoff]);
        CreditLoad {
            granted_bytes: self.lent,
            waiting_bytes: wishes.map(|it| it.wanted - it.granted).sum(),
            waiting_handoffs: self.waiting.len() as u64,
        }
    }
}

impl Account {
    fn held(&self) -> u64 {
        self.granted - self.ended
    }
}

/// The sender's side of one handoff: asks for what it is about to write, and counts.
#[derive(Clone, Debug, Default)]
pub struct CreditLine {
    /// Ends of runs of writes that were not asked for, short enough to be asked for at once.
    runs: VecDeque<u64>,
    /// Bytes since the handoff began; each is at most the one before it.
    pushed: u64,
    asked: u64,
    granted: u64,
    posted: u64,
    ended: u64,
    /// What the receiver knows of `ended`.
    told: u64,
}

impl CreditLine {
    /// Writes of these lengths are to be posted, in this order, behind those that were pushed before.
    pub fn push(&mut self, lens: impl Iterator<Item = u64>) {
        let mut start = self.pushed;
        for len in lens {
            if start < self.pushed && LONGEST_ASK < self.pushed + len - start {
                self.runs.push_back(self.pushed);
                start = self.pushed;
            }
            self.pushed += len;
        }
        if start < self.pushed {
            self.runs.push_back(self.pushed);
        }
    }

    /// What the receiver should hear now, if anything: a new wish once the last one is fulfilled, and what has ended
    /// when that is much, or all of it.
    pub fn take_ask(&mut self) -> Option<Ask> {
        let before = self.asked;
        if self.asked == self.granted {
            while let Some(&end) = self.runs.front()
                && (self.asked == before || end - before <= LONGEST_ASK)
            {
                self.asked = end;
                self.runs.pop_front();
            }
        }
        let is_much = LONGEST_SILENCE <= self.ended - self.told;
        let is_all = self.told < self.ended && self.ended == self.posted;
        if self.asked == before && !is_much && !is_all {
            return None;
        }
        self.told = self.ended;
        Some(Ask { ended: self.ended, wanted: self.asked })
    }

    /// Leave for that many bytes, counted from the first. False, without effect, when that is not what was asked for.
    pub fn grant(&mut self, bytes: u64) -> bool {
        let is_new = self.granted < bytes && bytes == self.asked;
        if is_new {
            self.granted = bytes;
        }
        is_new
    }

    /// Whether the next write, of this length, may be posted.
    pub fn covers(&self, len: u64) -> bool {
        self.posted + len <= self.granted
    }

    /// It was posted.
    pub fn post(&mut self, len: u64) {
        self.posted += len;
        debug_assert!(self.posted <= self.granted, "nothing is posted without leave");
    }

    /// A posted write has ended.
    pub fn end(&mut self, len: u64) {
        self.ended += len;
    }
}

/// Long enough that a round trip does not show, short enough that an urgent handoff soon has its turn.
const LONGEST_ASK: u64 = 8 << 20;
/// Ended bytes that the receiver need not know of: a message for every write would be many.
const LONGEST_SILENCE: u64 = 1 << 20;

#[cfg(test)]
mod tests;

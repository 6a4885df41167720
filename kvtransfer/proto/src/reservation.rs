//! Decode side of a handoff: blocks that wait to be filled by a peer.
//!
//! ```text
//! Reserved ──► Filling ──► Committed ──► Released
//!     │           │            │            ▲
//!     └───────────┴─► Quarantined ──────────┘   only when it is proven that no write can land any more
//! ```
//!
//! The one rule behind it: a block that was announced to a peer goes back to the pool only by adoption, by the
//! peer's own word that it is quiet, or by the driver's proof of it. Losing the peer is no proof.
//!
//! Where this side reads from the peer instead of being written to, nobody but this side touches the blocks: they are
//! quiet when its own reads have ended, and not before, whatever the peer says.

use std::collections::BTreeMap;

use crate::error::{CommitFault, TransferError};
use crate::message::{Commit, Filled, Message};
use crate::proof::Proof;
use crate::transport::{RemoteRange, WriteFault, stamp};
use crate::units::{BlockId, BlockRef, HandoffId, TokenCount};

/// Where a reservation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReservationState {
    /// Set aside; the peer does not know of it.
    Reserved,
    /// Announced: writes can land at any moment.
    Filling,
    /// A valid commit came and its digests match; the engine has yet to take the blocks over.
    Committed,
    /// Given up, but the peer may still write.
    Quarantined,
    /// Over. The blocks are the engine's, to use or to give out again.
    Released,
}

/// What can happen to a reservation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReservationEvent {
    /// The announcement was handed to the connection; the peer is to write.
    Announced,
    /// The same, and this side is to read from the peer.
    AnnouncedToRead,
    /// This side is going to read so many pieces into the blocks.
    Reading {
        /// How many more.
        pieces: u64,
    },
    /// Nothing of so many pieces can land any more: they were read, or will not be.
    Read {
        /// How many more.
        pieces: u64,
    },
    /// The prefill side will not do it.
    Declined {
        /// Its reason.
        reason: String,
    },
    /// The prefill side says that some blocks are final, ahead of its commit.
    Filled(Filled),
    /// The prefill side says that everything is written.
    Commit(Commit),
    /// The driver compared digests with the memory.
    Verified {
        /// Of so many targets.
        targets: usize,
        /// The first target that differs, if one does.
        outcome: Result<(), CommitFault>,
    },
    /// The engine took the blocks over.
    Adopt,
    /// The engine cannot use the committed blocks.
    Refuse {
        /// Its reason.
        reason: String,
    },
    /// The engine does not want the handoff any more.
    Cancel,
    /// The prefill side says that it will never touch the blocks again.
    Quiet {
        /// Why there is no commit.
        reason: String,
    },
    /// The connection to the peer is gone.
    PeerLost {
        /// Name of the peer.
        peer: String,
        /// How it showed.
        reason: String,
    },
    /// The driver has proof that the peer cannot write any more.
    QuietProven,
}

/// What the driver has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReservationAction {
    /// Say this to the peer, if it is still there.
    Send(Message),
    /// Compare these digests with the memory; answer with `Verified`.
    Verify {
        /// The target that the first of them is for.
        first: usize,
        /// One for each target from there on.
        digests: Vec<u64>,
    },
    /// Tell the engine: filled and verified; the payload is what the peer sent along.
    TellCommitted(Vec<u8>),
    /// Tell the engine: there will be no KV.
    TellFailed(TransferError),
    /// Tell the engine: the blocks may go back to the pool. The reservation can be forgotten.
    TellReleased,
    /// The reservation can be forgotten; the blocks belong to the engine.
    Forget,
}

/// Blocks set aside for one handoff.
#[derive(Clone, Debug)]
pub struct Reservation {
    handoff: HandoffId,
    tokens: TokenCount,
    targets: Vec<BlockRef>,
    positions: BTreeMap<BlockId, u32>,
    state: ReservationState,
    proof: Proof,
    commit: CommitProgress,
    peer_is_quiet: bool,
    /// Pieces that this side reads into the blocks.
    reads: u64,
}

/// How far a commit record got while the state is `Filling`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum CommitProgress {
    Awaited,
    /// It came; digests may still be being compared. No write is admitted any more.
    Verifying {
        payload: Vec<u8>,
    },
}

use ReservationAction as Action;
use ReservationEvent as Event;
use ReservationState as State;

impl Reservation {
    /// Sets `targets` aside to hold the KV of `tokens`.
    ///
    /// # Errors
    ///
    /// A block is named twice, or none is.
    pub fn new(
        handoff: HandoffId,
        tokens: TokenCount,
        targets: Vec<BlockRef>,
    ) -> Result<Self, TransferError> {
        let positions: BTreeMap<_, _> = targets.iter().map(|it| it.block).zip(0..).collect();
        if targets.is_empty() || positions.len() != targets.len() {
            return Err(TransferError::Invalid { what: "targets are not one or more distinct blocks" });
        }
        Ok(Self {
            handoff,
            tokens,
            targets,
            positions,
            state: State::Reserved,
            proof: Proof::new(handoff),
            commit: CommitProgress::Awaited,
            peer_is_quiet: false,
            reads: 0,
        })
    }

    /// Where it stands.
    pub fn state(&self) -> ReservationState {
        self.state
    }

    /// The blocks, in order of the sequence.
    pub fn targets(&self) -> &[BlockRef] {
        &self.targets
    }

    /// Tokens that the blocks, and those cached before them, are to hold.
    pub fn tokens(&self) -> TokenCount {
        self.tokens
    }

    /// Whether the peer has named every block ahead, so that its commit is all that is left to come.
    pub fn awaits_commit_alone(&self) -> bool {
        let is_awaited = self.state == State::Filling && self.commit == CommitProgress::Awaited;
        is_awaited && self.proof.named() == self.targets.len()
    }

    /// Pieces that this side is reading into the blocks.
    pub fn reads(&self) -> u64 {
        self.reads
    }

    /// Whether the receiver may let a write land: it lies within targets of this reservation that the peer has not said to
    /// be final, names their epochs, and the handoff still expects bytes.
    ///
    /// # Errors
    ///
    /// Names the rule that the write breaks. No byte of it may be stored.
    pub fn admit(&self, range: &RemoteRange, block_bytes: usize) -> Result<(), WriteFault> {
        if self.state != State::Filling || self.commit != CommitProgress::Awaited {
            return Err(WriteFault::NotExpected);
        }
        let blocks = range.blocks(block_bytes).ok_or(WriteFault::Outside)?;
        let mut is_final = false;
        let covered = blocks.map(|block| {
            let position = *self.positions.get(&block)? as usize;
            is_final |= position < self.proof.named();
            Some(self.targets[position])
        });
        // One look-up per block and an early end, so that a hostile length costs nothing.
        let covered: Option<Vec<BlockRef>> = covered.collect();
        let covered = covered.ok_or(WriteFault::Outside)?;
        if is_final {
            return Err(WriteFault::NotExpected);
        }
        if stamp(&covered) != range.stamp {
            return Err(WriteFault::Stale);
        }
        Ok(())
    }

    /// The one way in which a reservation changes. Events that come late, twice or out of order change nothing.
    ///
    /// # Panics
    ///
    /// On `Reading` of what [`admit`](Self::admit) turns down, and on more `Read` than `Reading`: bugs in the driver.
    pub fn apply(&mut self, event: Event) -> Vec<Action> {
        match event {
            Event::Announced => self.announced(false),
            Event::AnnouncedToRead => self.announced(true),
            Event::Reading { pieces } => self.reading(pieces),
            Event::Read { pieces } => self.read(pieces),
            Event::Declined { reason } => self.declined(reason),
            Event::Filled(filled) => self.filled(filled),
            Event::Commit(commit) => self.committed(commit),
            Event::Verified { targets, outcome } => self.verified(targets, outcome),
            Event::Adopt => self.adopt(),
            Event::Refuse { reason } => self.refuse(reason),
            Event::Cancel => self.cancel(),
            Event::Quiet { reason } => self.quiet(reason),
            Event::PeerLost { peer, reason } => self.peer_lost(peer, reason),
            Event::QuietProven => self.quiet_proven(),
        }
    }

    fn announced(&mut self, is_to_read: bool) -> Vec<Action> {
        if self.state == State::Reserved {
            self.state = State::Filling;
            // It has no way to write.
            self.peer_is_quiet = is_to_read;
        }
        Vec::new()
    }

    fn reading(&mut self, pieces: u64) -> Vec<Action> {
        let is_filled = self.state == State::Filling && self.commit == CommitProgress::Awaited;
        assert!(is_filled, "only what is admitted is read");
        self.reads += pieces;
        Vec::new()
    }

    fn read(&mut self, pieces: u64) -> Vec<Action> {
        self.reads = self.reads.checked_sub(pieces).expect("each read ends once");
        if self.state == State::Quarantined { self.release_if_quiet() } else { Vec::new() }
    }

    fn declined(&mut self, reason: String) -> Vec<Action> {
        match self.state {
            State::Filling => self.give_back(TransferError::Declined { reason }),
            State::Quarantined => self.quiet_proven(),
            State::Reserved | State::Committed | State::Released => Vec::new(),
        }
    }

    /// What is named here is not in what the commit will say again: it is examined as strictly.
    fn filled(&mut self, filled: Filled) -> Vec<Action> {
        if self.state != State::Filling || self.commit != CommitProgress::Awaited {
            return Vec::new();
        }
        let first = self.proof.named();
        match self.proof.name_ahead(&self.targets, &filled) {
            Ok(true) if !filled.digests.is_empty() => {
                vec![Action::Verify { first, digests: filled.digests }]
            }
            Ok(_) => Vec::new(),
            Err(fault) => self.reject(fault),
        }
    }

    fn committed(&mut self, commit: Commit) -> Vec<Action> {
        if self.state != State::Filling || self.commit != CommitProgress::Awaited {
            return Vec::new();
        }
        let first = self.proof.named();
        if let Err(fault) = self.examine(&commit) {
            return self.reject(fault);
        }
        self.commit = CommitProgress::Verifying { payload: commit.payload };
        if commit.digests.is_empty() {
            return self.commit_if_proven();
        }
        vec![Action::Verify { first, digests: commit.digests }]
    }

    /// Everything about a commit that can be told without looking at the memory.
    fn examine(&mut self, commit: &Commit) -> Result<(), CommitFault> {
        if commit.tokens != self.tokens {
            return Err(CommitFault::Tokens { ours: self.tokens.0, theirs: commit.tokens.0 });
        }
        if 0 < self.reads {
            return Err(CommitFault::Early { reads: self.reads });
        }
        self.proof.name_rest(&self.targets, commit)
    }

    fn verified(&mut self, targets: usize, outcome: Result<(), CommitFault>) -> Vec<Action> {
        if self.state != State::Filling || !self.proof.awaits(targets) {
            return Vec::new(); // Given up meanwhile, or nothing was to be compared.
        }
        match outcome {
            Ok(()) => {
                self.proof.compared(targets);
                self.commit_if_proven()
            }
            Err(fault) => self.reject(fault),
        }
    }

    fn commit_if_proven(&mut self) -> Vec<Action> {
        let CommitProgress::Verifying { payload } = &mut self.commit else { return Vec::new() };
        if !self.proof.is_whole(&self.targets) {
            return Vec::new();
        }
        let payload = std::mem::take(payload);
        self.state = State::Committed;
        vec![Action::TellCommitted(payload)]
    }

    fn reject(&mut self, fault: CommitFault) -> Vec<Action> {
        self.state = State::Quarantined;
        let reason = fault.to_string();
        let mut actions = vec![
            Action::Send(Message::Refused { handoff: self.handoff, reason }),
            Action::TellFailed(fault.into()),
        ];
        actions.extend(self.release_if_quiet());
        actions
    }

    fn adopt(&mut self) -> Vec<Action> {
        if self.state != State::Committed {
            return Vec::new();
        }
        self.state = State::Released;
        vec![Action::Send(Message::Adopted { handoff: self.handoff }), Action::Forget]
    }

    fn refuse(&mut self, reason: String) -> Vec<Action> {
        match self.state {
            State::Committed => {
                self.state = State::Quarantined;
                let mut actions = vec![Action::Send(Message::Refused { handoff: self.handoff, reason })];
                actions.extend(self.release_if_quiet());
                actions
            }
            State::Reserved | State::Filling => self.cancel(),
            State::Quarantined | State::Released => Vec::new(),
        }
    }

    fn cancel(&mut self) -> Vec<Action> {
        match self.state {
            State::Reserved => {
                self.state = State::Released;
                vec![Action::TellReleased]
            }
            State::Filling => {
                self.state = State::Quarantined;
                let mut actions = vec![Action::Send(Message::Cancel { handoff: self.handoff })];
                actions.extend(self.release_if_quiet());
                actions
            }
            State::Committed => self.refuse("cancelled".to_owned()),
            State::Quarantined | State::Released => Vec::new(),
        }
    }

    fn quiet(&mut self, reason: String) -> Vec<Action> {
        match self.state {
            State::Filling => self.give_back(TransferError::Abandoned { reason }),
            State::Committed | State::Quarantined => self.quiet_proven(),
            State::Reserved | State::Released => Vec::new(),
        }
    }

    fn peer_lost(&mut self, peer: String, reason: String) -> Vec<Action> {
        match self.state {
            State::Reserved => {
                self.state = State::Released;
                vec![Action::TellFailed(TransferError::PeerLost { peer, reason }), Action::TellReleased]
            }
            State::Filling => {
                self.state = State::Quarantined;
                let mut actions = vec![Action::TellFailed(TransferError::PeerLost { peer, reason })];
                actions.extend(self.release_if_quiet());
                actions
            }
            // What was committed is complete and verified: the engine may still take it.
            State::Committed | State::Quarantined | State::Released => Vec::new(),
        }
    }

    fn quiet_proven(&mut self) -> Vec<Action> {
        match self.state {
            State::Committed => {
                self.peer_is_quiet = true;
                Vec::new()
            }
            State::Quarantined => {
                self.peer_is_quiet = true;
                self.release_if_quiet()
            }
            State::Reserved | State::Filling | State::Released => Vec::new(),
        }
    }

    /// The peer will not go on, and touches nothing.
    fn give_back(&mut self, error: TransferError) -> Vec<Action> {
        self.state = State::Quarantined;
        self.peer_is_quiet = true;
        let mut actions = vec![Action::TellFailed(error)];
        actions.extend(self.release_if_quiet());
        actions
    }

    fn release_if_quiet(&mut self) -> Vec<Action> {
        if !self.peer_is_quiet || 0 < self.reads {
            return Vec::new();
        }
        self.state = State::Released;
        vec![Action::TellReleased]
    }
}

#[cfg(test)]
mod tests;

//! Links: what keeps them alive, what is heard over them, and what their end means for the handoffs on them.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::prefilling::Outgoing;
use super::writing::WriteSource;
use super::{ByDevice, Directions, EndpointAction, EndpointCore, EndpointEvent, LinkId, LinkUp, QuietProof};
use crate::digest::BlockShape;
use crate::layout::{Bridge, KvLayout, LayoutMismatch};
use crate::message::Message;
use crate::reservation::ReservationEvent;
use crate::sender::SenderEvent;
use crate::units::{HandoffId, Moment};

/// Another worker.
#[derive(Clone, Debug)]
pub(super) struct PeerState {
    pub(super) name: String,
    pub(super) link: Option<LinkState>,
    /// What this side could not promise to leave alone when it last shook hands.
    named_busy: Vec<HandoffId>,
}

/// A connection over which handoffs go.
#[derive(Clone, Debug)]
pub(super) struct LinkState {
    pub(super) id: LinkId,
    pub(super) proof: QuietProof,
    /// Whether the peer reads what this side has for it.
    pub(super) is_read_by_peer: bool,
    pub(super) by_device: ByDevice,
    pub(super) layout: Arc<KvLayout>,
    /// Of the peer's blocks.
    pub(super) shape: BlockShape,
    /// How many of them the peer has.
    pub(super) blocks: u64,
    /// All of the peer's memory, and how much at its end is for what it converts for this side.
    pub(super) region_bytes: u64,
    staging: u64,
    /// From this side's layout to the peer's.
    pub(super) bridge: Result<Bridge, LayoutMismatch>,
    last_heard: Moment,
    next_beat: Moment,
    beat_every: Duration,
    beats: u64,
    /// Posted writes and reads that have not ended.
    pub(super) under_way: u32,
    /// When one of them ended, or the first was posted.
    pub(super) progress: Moment,
    /// Handoffs that have writes to post, oldest first.
    pub(super) posting: VecDeque<HandoffId>,
    /// Handoffs that have reads to post, in the order in which they got leave.
    pub(super) fetching: VecDeque<HandoffId>,
    pub(super) ended: Ended,
}

/// The last handoffs that ended on a link: a message about one of them comes too late, or twice.
#[derive(Clone, Debug, Default)]
pub(super) struct Ended {
    order: VecDeque<HandoffId>,
    set: BTreeSet<HandoffId>,
}

impl<S: WriteSource> EndpointCore<S> {
    /// A peer exists: handoffs with it may be ordered before it is connected.
    pub fn meet(&mut self, peer: u64, name: &str) {
        self.peers.entry(peer).or_insert_with(|| PeerState::new(name.to_owned()));
    }

    /// Forgets a peer with which nothing is going on. False, without effect, when something is.
    pub fn forget(&mut self, peer: u64) -> bool {
        let is_idle = self.link(peer).is_none() && self.is_idle_with(peer);
        if is_idle {
            self.peers.remove(&peer);
        }
        is_idle
    }

    /// Whether no handoff with the peer is under way.
    pub fn is_idle_with(&self, peer: u64) -> bool {
        !self.incoming.values().any(|it| it.peer == peer) && !self.outgoing.values().any(|it| it.peer == peer)
    }

    /// Whether a connection to the peer would help a handoff on.
    pub fn wants_link(&self, peer: u64) -> bool {
        // Blocks in quarantine want it too: only a new handshake can prove a living process quiet.
        self.incoming.values().any(|it| it.peer == peer && it.wants_link())
    }

    /// The last step before this side says `Ready`: ends an older link, and names the handoffs that this side
    /// cannot promise to leave alone. Nothing can be added to them before the new link is up, for nothing is
    /// received of the old one any more.
    pub fn prepare_link(&mut self, peer: u64, now: Moment) -> Vec<HandoffId> {
        self.link_lost(peer, "the peer connected anew", now);
        let busy = self.busy_with(peer);
        if let Some(state) = self.peers.get_mut(&peer) {
            state.named_busy.clone_from(&busy);
        }
        busy
    }

    /// A handshake has come to its end; the driver can send over the link.
    pub fn link_up(&mut self, peer: u64, up: LinkUp, now: Moment) -> LinkId {
        self.link_lost(peer, "the peer connected anew", now);
        let LinkUp { hello, proof, busy, by_device } = up;
        let id = LinkId(self.next_link);
        self.next_link += 1;
        let shape = BlockShape::of(&hello.layout);
        let is_read_by_peer = hello.pulls && proof == QuietProof::AccessEnded;
        let bridge = self.rules.layout.bridge(&hello.layout);
        let link = LinkState {
            id,
            proof,
            is_read_by_peer,
            by_device,
            shape,
            blocks: hello.blocks(),
            region_bytes: hello.region_bytes,
            staging: hello.staging_bytes,
            bridge: if is_read_by_peer {
                bridge.and_then(|bridge| read_over(bridge, self.rules.staging, shape))
            } else {
                bridge
            },
            layout: Arc::new(hello.layout),
            last_heard: now,
            next_beat: now,
            beat_every: self.rules.heartbeat.min(hello.lease / BEATS_PER_LEASE),
            beats: 0,
            under_way: 0,
            progress: now,
            posting: VecDeque::new(),
            fetching: VecDeque::new(),
            ended: Ended::default(),
        };
        let mut state = PeerState::new(hello.name);
        state.link = Some(link);
        let before = self.peers.insert(peer, state);
        self.take_word_of_quiet(peer, &busy);
        self.say_what_is_quiet_since(peer, before.map(|it| it.named_busy).unwrap_or_default());
        self.announce_waiting(peer);
        id
    }

    /// Takes back what was said when hands were shaken, where it is over since: there was no link to say so over.
    fn say_what_is_quiet_since(&mut self, peer: u64, named: Vec<HandoffId>) {
        let busy = self.busy_with(peer);
        for handoff in named.into_iter().filter(|it| !busy.contains(it)) {
            self.say_quiet(peer, handoff, "it has ended meanwhile");
        }
    }

    /// Whether prompts for that peer are computed in its own memory.
    pub fn reaches_in_place(&self, peer: u64) -> bool {
        self.link(peer).is_some_and(|link| {
            self.rules.in_place && link.proof == QuietProof::Process && link.bridge == Ok(Bridge::Identical)
        })
    }

    /// Whether this side can hand over to the peer, and the peer to this side; otherwise the field of the layouts that
    /// nothing bridges.
    pub fn directions(&self, peer: u64) -> Option<Directions> {
        let link = self.link(peer)?;
        let back = link.layout.bridge(&self.rules.layout);
        let is_read_here = self.rules.pulls && link.proof == QuietProof::AccessEnded;
        let back = if is_read_here {
            back.and_then(|bridge| read_over(bridge, link.staging, self.shape))
        } else {
            back
        };
        let field = |bridge: &Result<Bridge, LayoutMismatch>| match bridge {
            Ok(_) => Ok(()),
            Err(mismatch) => Err(mismatch.field),
        };
        Some(Directions { to_peer: field(&link.bridge), from_peer: field(&back) })
    }

    /// Bytes came from the peer: it is alive, whatever they are.
    pub fn heard(&mut self, peer: u64, now: Moment) {
        if let Some(link) = self.link_mut(peer) {
            link.last_heard = now;
        }
    }

    /// This side did not run for that long: it could neither hear nor speak, so no peer was silent meanwhile. On a
    /// machine with too much to do nobody is taken for dead who is only as late as this side is.
    pub fn stood_still(&mut self, lateness: Duration, now: Moment) {
        for link in self.peers.values_mut().filter_map(|it| it.link.as_mut()) {
            link.last_heard = link.last_heard.plus(lateness).min(now);
        }
        if !lateness.is_zero() {
            self.offers_stood_still(lateness, now);
        }
    }

    /// A message came over the peer's link.
    pub fn hear(&mut self, peer: u64, message: Message, now: Moment) {
        if self.link(peer).is_none() {
            return; // Severed by what came before it.
        }
        self.heard(peer, now);
        match message {
            Message::Reserve(reserve) => self.hear_reserve(peer, reserve, now),
            Message::Cancel { handoff } => self.hear_cancel(peer, handoff, now),
            Message::Adopted { handoff } => self.hear_of_sender(peer, handoff, SenderEvent::Adopted, now),
            Message::Refused { handoff, reason } => {
                self.hear_of_sender(peer, handoff, SenderEvent::Refused { reason }, now);
            }
            Message::Decline { handoff, reason } => {
                self.hear_of_reservation(peer, handoff, ReservationEvent::Declined { reason });
            }
            Message::Filled(filled) => self.hear_filled(peer, filled),
            Message::Commit(commit) => {
                self.note_in_place(peer, &commit);
                self.hear_of_reservation(peer, commit.handoff, ReservationEvent::Commit(commit));
            }
            Message::Quiet { handoff, reason } => {
                self.hear_of_reservation(peer, handoff, ReservationEvent::Quiet { reason });
            }
            Message::Ask { handoff, ask } => self.hear_ask(peer, handoff, ask, now),
            Message::Grant { handoff, bytes } => self.hear_grant(peer, handoff, bytes),
            Message::Offer(offered) => self.hear_offer(peer, offered, now),
            Message::Fetched { handoff, pieces } => self.hear_fetched(peer, handoff, pieces, now),
            // Paths are the driver's; that the peer spoke has been noted.
            Message::Heartbeat { .. }
            | Message::PathDown { .. }
            | Message::PathAnew { .. }
            | Message::PathUp { .. } => {}
            Message::Bye { busy } => {
                self.link_lost(peer, "the peer said goodbye", now);
                self.take_word_of_quiet(peer, &busy);
            }
            Message::Hello(_)
            | Message::Welcome(_)
            | Message::Refuse(_)
            | Message::Attach(_)
            | Message::Paths(_)
            | Message::Ready(_) => {
                let reason = "the peer broke the protocol: a message of the handshake after its end";
                self.link_lost(peer, reason, now);
            }
        }
    }

    /// The connection is of no further use. Ends the link, if there is one, and everything that depends on it.
    pub fn link_lost(&mut self, peer: u64, reason: &str, now: Moment) {
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let Some(link) = state.link.take() else { return };
        let (name, reason) = (state.name.clone(), reason.to_owned());
        self.act(EndpointAction::Sever { peer, link: link.id, reason: reason.clone() });
        self.tell(EndpointEvent::PeerDown { name: name.clone(), peer, reason: reason.clone() });
        self.lose_reservations(peer, &name, &reason);
        self.lose_senders(peer, &name, &reason, now);
    }

    /// No connection can be made: what the peer was never told of is over.
    pub fn unreachable(&mut self, peer: u64, reason: &str) {
        let Some(name) = self.peers.get(&peer).map(|it| it.name.clone()) else { return };
        self.lose_unannounced(peer, &name, reason);
    }

    /// The peer's process has ended, and with it its mapping of this side's memory.
    pub fn process_gone(&mut self, peer: u64, now: Moment) {
        self.link_lost(peer, "the peer's process is gone", now);
        self.prove_quiet(peer, |incoming| incoming.proof() != Some(QuietProof::AccessEnded));
    }

    /// No device of the peer can write or read over what was that link any more.
    pub fn access_ended(&mut self, peer: u64, link: LinkId, now: Moment) {
        self.prove_quiet(peer, |incoming| incoming.link() == Some(link));
        self.end_offers(peer, link, now);
    }

    /// Heartbeats, leases and everything else that happens because time passes.
    pub fn tick(&mut self, now: Moment) {
        let peers: Vec<u64> = self.peers.keys().copied().collect();
        for peer in peers {
            let (lease, stall) = (self.rules.lease, self.rules.stall);
            let (is_idle, leaves_offers) = (self.is_hoarding(peer, now), self.leaves_offers(peer, now));
            let Some(link) = self.link_mut(peer) else { continue };
            let silence = now.since(link.last_heard);
            let standstill = now.since(link.progress);
            if lease < silence {
                self.link_lost(peer, &format!("nothing was heard for {silence:?}"), now);
            } else if 0 < link.under_way && stall < standstill {
                self.link_lost(peer, &format!("no transfer has completed for {standstill:?}"), now);
            } else if is_idle {
                self.link_lost(peer, "the peer has leave to write and writes nothing", now);
            } else if leaves_offers {
                self.link_lost(peer, "the peer does not read what it was offered", now);
            } else if link.next_beat <= now {
                link.next_beat = now.plus(link.beat_every);
                self.beat(peer);
            }
        }
        self.end_waiting(now);
    }

    /// Says that this side is there.
    pub(super) fn beat(&mut self, peer: u64) {
        let Some(link) = self.link_mut(peer) else { return };
        link.beats += 1;
        let seq = link.beats;
        self.send(peer, Message::Heartbeat { seq });
    }

    /// When [`tick`](Self::tick) has something to do.
    pub fn next_tick(&self) -> Option<Moment> {
        let links = self.peers.values().filter_map(|it| it.link.as_ref());
        let clocks = links.map(|link| {
            let lease = link.next_beat.min(link.last_heard.plus(self.rules.lease));
            let stall = (0 < link.under_way).then(|| link.progress.plus(self.rules.stall));
            stall.map_or(lease, |stall| stall.min(lease))
        });
        clocks.chain(self.waiting.values().map(super::Waiting::until)).min()
    }

    /// Last words to each peer that is connected.
    pub fn goodbye(&mut self) -> Vec<(u64, Message)> {
        let connected: Vec<u64> =
            self.peers.iter().filter(|(_, it)| it.link.is_some()).map(|(&it, _)| it).collect();
        // Writes end with the driver; only an engine that computes in place goes on without it.
        let is_in_place = |handoff: &HandoffId| self.outgoing[handoff].computes_in_place();
        let words = |peer| self.busy_with(peer).into_iter().filter(is_in_place).collect();
        connected.into_iter().map(|peer| (peer, Message::Bye { busy: words(peer) })).collect()
    }

    /// Says something to a peer. Without a link it is dropped: the end of a link is news enough for the other
    /// side, and the next handshake says what is still of interest.
    pub(super) fn send(&mut self, peer: u64, message: Message) {
        if self.link(peer).is_some() {
            self.act(EndpointAction::Send { peer, message });
        }
    }

    pub(super) fn link(&self, peer: u64) -> Option<&LinkState> {
        self.peers.get(&peer)?.link.as_ref()
    }

    pub(super) fn link_mut(&mut self, peer: u64) -> Option<&mut LinkState> {
        self.peers.get_mut(&peer)?.link.as_mut()
    }

    pub(super) fn knows(&self, peer: u64) -> bool {
        self.peers.contains_key(&peer)
    }

    /// Handoffs to that peer of which this side cannot promise that it no longer touches their blocks.
    fn busy_with(&self, peer: u64) -> Vec<HandoffId> {
        let touches = |it: &Outgoing<S>| it.peer == peer && it.sender.is_busy() && it.offers.is_none();
        let busy = self.outgoing.iter().filter(|(_, it)| touches(it));
        busy.map(|(&handoff, _)| handoff).collect()
    }
}

impl PeerState {
    fn new(name: String) -> Self {
        Self { name, link: None, named_busy: Vec::new() }
    }
}

impl Ended {
    pub(super) fn insert(&mut self, handoff: HandoffId) {
        if !self.set.insert(handoff) {
            return;
        }
        self.order.push_back(handoff);
        if MAX_ENDED < self.order.len()
            && let Some(oldest) = self.order.pop_front()
        {
            self.set.remove(&oldest);
        }
    }

    pub(super) fn contains(&self, handoff: HandoffId) -> bool {
        self.set.contains(&handoff)
    }
}

/// The bridge to a side that reads: what is converted for it is put into `staging` bytes, a layer of a block at a time at
/// least.
fn read_over(bridge: Bridge, staging: u64, reader: BlockShape) -> Result<Bridge, LayoutMismatch> {
    let layer = reader.granule as u64;
    match bridge {
        Bridge::Convert { .. } if staging < layer => Err(LayoutMismatch {
            field: "handoff",
            ours: format!("room to convert {staging} bytes"),
            theirs: format!("reads layers of {layer} bytes"),
        }),
        Bridge::Identical | Bridge::Convert { .. } => Ok(bridge),
    }
}

/// A beat may be late, and the one after it too.
const BEATS_PER_LEASE: u32 = 4;
/// More than can be under way on one link at a time.
const MAX_ENDED: usize = 4096;

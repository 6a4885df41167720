//! The state of both workers and what can happen next.

use std::collections::VecDeque;
use std::fmt::{self, Write};
use std::time::Duration;

use tidemill_kvtransfer_proto::endpoint_core::{ByDevice, LinkId, LinkUp, QuietProof};
use tidemill_kvtransfer_proto::message::Message;
use tidemill_kvtransfer_proto::units::{BlockId, BlockRef, HandoffId, Moment};

use xxhash_rust::xxh3::Xxh3;

use crate::decode::Decode;
use crate::moves::Move;
use crate::prefill::{Flight, Prefill};
use crate::settings::hello;

/// Bytes of a block; what they are is one number per block.
pub(crate) const BLOCK: usize = 64;
/// Tokens of a block.
pub(crate) const TOKENS: u32 = 4;
pub(crate) const PREFILL: u64 = 1;
pub(crate) const DECODE: u64 = 2;
/// Time stands still: clocks are the simulator's business.
pub(crate) const NOW: Moment = Moment(Duration::ZERO);

/// How many of what take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    /// Handoffs, begun in order as blocks are free.
    pub(crate) handoffs: u64,
    /// Blocks of the decode worker.
    pub(crate) blocks: u32,
    /// Blocks that each handoff needs.
    pub(crate) blocks_each: u32,
    pub(crate) wire: Wire,
    pub(crate) faults: Faults,
    /// Whether control messages may overtake one another.
    pub(crate) overtaking: bool,
    pub(crate) planted: Option<Planted>,
}

/// How bytes reach the decode worker's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wire {
    /// The prefill engine stores into them while it computes.
    InPlace,
    /// The prefill endpoint copies into them; nobody looks.
    Copied,
    /// The decode endpoint lets each write land or not, as with TCP.
    Admitted,
    /// A device writes, in any order; what has left arrives, or does not, until the decode endpoint has ended its access.
    Device,
    /// The decode worker's device reads, in any order, until the prefill endpoint has ended its access.
    Read,
}

impl Wire {
    pub(crate) const ALL: [Self; 5] = [Self::InPlace, Self::Copied, Self::Admitted, Self::Device, Self::Read];

    /// Whether devices of both sides reach the other's memory.
    pub(crate) fn has_devices(self) -> bool {
        self.proof() == QuietProof::AccessEnded
    }

    /// Whether the prefill worker has the decode worker's memory mapped, and so cannot die unseen.
    pub(crate) fn is_mapped(self) -> bool {
        self.proof() == QuietProof::Process
    }

    /// Whether writes need leave.
    pub(crate) fn takes_credit(self) -> bool {
        self.proof().takes_credit()
    }

    fn proof(self) -> QuietProof {
        match self {
            Self::InPlace | Self::Copied => QuietProof::Process,
            Self::Admitted => QuietProof::Admission,
            Self::Device | Self::Read => QuietProof::AccessEnded,
        }
    }
}

/// How often what may still go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Faults {
    /// The decode engine cancels a handoff, or refuses a committed one.
    pub(crate) cancels: u8,
    /// The prefill engine gives one up.
    pub(crate) abandons: u8,
    /// The connection breaks, and is made again.
    pub(crate) breaks: u8,
    /// The prefill worker dies.
    pub(crate) kills: u8,
    /// A control message vanishes.
    pub(crate) losses: u8,
}

/// A mistake that the search must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Planted {
    FreeOnCancel,
    FreeOnLoss,
    StoreAfterAbandon,
    SettleWhenPosted,
    AdmitEverything,
    NobodyAsks,
    NobodyIsBusy,
    AccessIsLeft,
    FreeOffered,
    FreeOfferedOnLoss,
    SettleWhenFetched,
}

/// A connection as one side sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    Up,
    /// Broken; this side has not noticed.
    Broken,
    Down,
}

/// Both workers, what lies between them, and what may still go wrong.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) config: Config,
    pub(crate) faults: Faults,
    /// What each block of the decode worker holds.
    pub(crate) memory: Vec<u64>,
    pub(crate) to_prefill: VecDeque<Message>,
    pub(crate) to_decode: VecDeque<Message>,
    /// Writes of a device that have left a sender which knows no more of them.
    pub(crate) in_network: VecDeque<Flight>,
    /// The first link by which a device can still write.
    open_from: LinkId,
    /// The first link by which the decode worker's device can still read.
    pub(crate) readable_from: LinkId,
    pub(crate) decode: Decode,
    /// `None` when it is dead.
    pub(crate) prefill: Option<Prefill>,
    /// Digests of the two sides as text; `None` when one has moved since.
    decode_key: Option<u128>,
    prefill_key: Option<u128>,
}

/// What a rule says is wrong.
pub(crate) type Checked = Result<(), String>;

/// What the block at `position` of a handoff must hold: any number that nothing else makes.
pub(crate) fn content(handoff: HandoffId, position: usize) -> u64 {
    handoff.0 * 100 + position as u64 + 1
}

impl World {
    pub(crate) fn new(config: Config) -> Self {
        let mut world = Self {
            config,
            faults: config.faults,
            memory: vec![0; config.blocks as usize],
            to_prefill: VecDeque::new(),
            to_decode: VecDeque::new(),
            in_network: VecDeque::new(),
            open_from: LinkId(0),
            readable_from: LinkId(0),
            decode: Decode::new(&config),
            prefill: Some(Prefill::new(&config)),
            decode_key: None,
            prefill_key: None,
        };
        world.connect();
        world
    }

    /// Everything that can happen now.
    pub(crate) fn moves(&self) -> Vec<Move> {
        let mut moves = Vec::new();
        self.decode_moves(&mut moves);
        self.prefill_moves(&mut moves);
        moves.extend((0..self.in_network.len()).map(Move::NetworkDelivers));
        let Some(prefill) = &self.prefill else { return moves };
        let is_over = self.decode.is_over();
        if self.decode.link == Link::Up && prefill.link == Link::Up && !is_over {
            if 0 < self.faults.breaks {
                moves.push(Move::ConnectionBreaks);
            }
            if 0 < self.faults.losses && !self.to_prefill.is_empty() {
                moves.push(Move::MessageToPrefillVanishes);
            }
            if 0 < self.faults.losses && !self.to_decode.is_empty() {
                moves.push(Move::MessageToDecodeVanishes);
            }
        }
        if self.decode.link == Link::Down && prefill.link == Link::Down {
            moves.push(Move::ConnectionIsMade);
        }
        if 0 < self.faults.kills && !is_over {
            moves.push(Move::PrefillWorkerDies);
        }
        moves
    }

    /// Does one of the [`moves`](Self::moves).
    pub(crate) fn make(&mut self, step: Move) -> Checked {
        let touches = step.touches();
        self.decode_key = self.decode_key.filter(|_| !touches.decode);
        self.prefill_key = self.prefill_key.filter(|_| !touches.prefill);
        match step {
            Move::ConnectionBreaks => {
                self.faults.breaks -= 1;
                self.cut();
                self.prefill.as_mut().expect("it lives").link = Link::Broken;
            }
            Move::ConnectionIsMade => self.connect(),
            Move::NetworkDelivers(index) => {
                let flight = self.in_network.remove(index).expect("just listed");
                self.land(&flight)?;
            }
            Move::PrefillWorkerDies => {
                self.faults.kills -= 1;
                self.cut();
                let prefill = self.prefill.take().expect("it lives");
                prefill.flights().for_each(|flight| self.leave(flight));
            }
            Move::MessageToPrefillVanishes => {
                self.faults.losses -= 1;
                self.to_prefill.pop_front();
            }
            Move::MessageToDecodeVanishes => {
                self.faults.losses -= 1;
                self.to_decode.pop_front();
            }
            _ if self.decode_moves_by(step)? => {}
            _ => self.prefill_moves_by(step)?,
        }
        Ok(())
    }

    /// The state in 128 bits, by its text, so that two states in a search of millions do not share a key. A side that
    /// has not moved is not described again.
    pub(crate) fn key(&mut self) -> u128 {
        let decode = *self.decode_key.get_or_insert_with(|| digest(&self.decode));
        let prefill = *self.prefill_key.get_or_insert_with(|| digest(&self.prefill));
        let Self { faults, memory, to_prefill, to_decode, in_network, open_from, readable_from, .. } = self;
        let open = (open_from, readable_from);
        digest(&(decode, prefill, faults, memory, to_prefill, to_decode, in_network, open))
    }

    /// What was under way is lost.
    fn cut(&mut self) {
        self.to_prefill.clear();
        self.to_decode.clear();
        if self.decode.link == Link::Up {
            self.decode.link = Link::Broken;
        }
    }

    /// The handshake: each side says what it is still busy with; the decode side announces what waits.
    fn connect(&mut self) {
        let prefill = self.prefill.as_mut().expect("it lives");
        let mut busy = prefill.core.prepare_link(DECODE, NOW);
        match self.config.planted {
            Some(Planted::NobodyIsBusy) => busy.clear(),
            Some(Planted::NobodyAsks) => busy.extend((1..=self.config.handoffs).map(HandoffId)),
            _ => {}
        }
        let decode = &mut self.decode;
        let up = |instance, busy| LinkUp {
            hello: hello(instance, &self.config),
            proof: self.config.wire.proof(),
            busy,
            by_device: ByDevice::default(),
        };
        let decode_is_busy = decode.core.prepare_link(PREFILL, NOW);
        prefill.link_id = prefill.core.link_up(DECODE, up(DECODE, decode_is_busy), NOW);
        prefill.link = Link::Up;
        let link = decode.core.link_up(PREFILL, up(PREFILL, busy), NOW);
        decode.link = Link::Up;
        decode.link_id = link;
        assert_eq!(link, prefill.link_id, "each side counts its connections");
        self.decode_acts();
        self.prefill_acts();
    }

    /// Whether the sender's device still can write by the link of that write.
    pub(crate) fn may_write(&self, flight: &Flight) -> bool {
        self.open_from <= flight.link
    }

    /// From now on nothing lands that was sent by a link up to that one.
    pub(crate) fn end_access(&mut self, link: LinkId) {
        if self.config.planted != Some(Planted::AccessIsLeft) {
            self.open_from = LinkId(link.0 + 1);
            self.in_network.retain(|flight| link < flight.link);
        }
    }

    /// Every store into a block of the decode worker, by whomever.
    pub(crate) fn store(&mut self, handoff: HandoffId, number: u64, block: BlockId) -> Checked {
        let block = block.0 as usize;
        let owner = self.decode.owners[block];
        if owner != Some(handoff) {
            return Err(format!("handoff {handoff} stores into a block that belongs to {owner:?}"));
        }
        if self.decode.is_adopted(handoff) {
            return Err(format!("handoff {handoff} stores into a block that decode reads"));
        }
        self.memory[block] = number;
        Ok(())
    }

    /// Whether blocks hold what their handoff computed.
    pub(crate) fn check_content(&self, handoff: HandoffId, targets: &[BlockRef]) -> Checked {
        for (position, target) in targets.iter().enumerate() {
            let found = self.memory[target.block.0 as usize];
            if found != content(handoff, position) {
                return Err(format!("handoff {handoff} was given foreign bytes: {found} at {position}"));
            }
        }
        Ok(())
    }

    /// How many handoffs were adopted.
    pub(crate) fn adopted(&self) -> u64 {
        self.decode.adopted
    }

    /// Nothing is left to do: then nothing may be held. Where messages vanish a handoff may wait for one.
    pub(crate) fn check_end(&self) -> Checked {
        let is_orderly = !self.config.overtaking || !self.config.wire.takes_credit();
        if self.faults.losses != self.config.faults.losses || !is_orderly {
            return Ok(());
        }
        if !self.decode.is_over() {
            return Err(format!("the decode side is stuck: {:?}", self.decode));
        }
        match &self.prefill {
            Some(prefill) if !prefill.is_over() => Err(format!("the prefill side is stuck: {prefill:?}")),
            _ => Ok(()),
        }
    }
}

/// Of a value, as text.
fn digest(value: &impl fmt::Debug) -> u128 {
    struct Hashing(Xxh3);
    impl Write for Hashing {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            self.0.update(text.as_bytes());
            Ok(())
        }
    }
    let mut hashing = Hashing(Xxh3::new());
    write!(hashing, "{value:?}").expect("a hasher takes everything");
    hashing.0.digest128()
}

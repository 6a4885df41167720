//! The state of both workers and what can happen next.

use std::collections::VecDeque;
use std::fmt;

use tidemill_kvtransfer_proto::message::Message;
use tidemill_kvtransfer_proto::units::{BlockRef, HandoffId};

use crate::decode::Decode;
use crate::prefill::Prefill;

/// Bytes of a block; what they are is one number per block.
pub(crate) const BLOCK: usize = 64;

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
}

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
    DecodeEndpointVerifies,
    DecodeEndpointNoticesLoss,
    PrefillEndpointObeys,
    PrefillEndpointHears(usize),
    PrefillEndpointPosts(HandoffId),
    PrefillEndpointCopies(HandoffId),
    PrefillEndpointTakesDigests,
    PrefillEndpointNoticesLoss,
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
    pub(crate) decode: Decode,
    /// `None` when it is dead.
    pub(crate) prefill: Option<Prefill>,
}

/// What a rule says is wrong.
pub(crate) type Checked = Result<(), String>;

/// What the block at `position` of a handoff must hold: any number that nothing else makes.
pub(crate) fn content(handoff: HandoffId, position: usize) -> u64 {
    handoff.0 * 100 + position as u64 + 1
}

impl World {
    pub(crate) fn new(config: Config) -> Self {
        Self {
            config,
            faults: config.faults,
            memory: vec![0; config.blocks as usize],
            to_prefill: VecDeque::new(),
            to_decode: VecDeque::new(),
            decode: Decode::new(&config),
            prefill: Some(Prefill::default()),
        }
    }

    /// Everything that can happen now.
    pub(crate) fn moves(&self) -> Vec<Move> {
        let mut moves = Vec::new();
        self.decode_moves(&mut moves);
        self.prefill_moves(&mut moves);
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
        match step {
            Move::ConnectionBreaks => {
                self.faults.breaks -= 1;
                self.cut();
                self.prefill.as_mut().expect("it lives").link = Link::Broken;
            }
            Move::ConnectionIsMade => return self.connect(),
            Move::PrefillWorkerDies => {
                self.faults.kills -= 1;
                self.cut();
                self.prefill = None;
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

    /// What was under way is lost.
    fn cut(&mut self) {
        self.to_prefill.clear();
        self.to_decode.clear();
        if self.decode.link == Link::Up {
            self.decode.link = Link::Broken;
        }
    }

    /// The handshake: the prefill side says what it is still busy with, the decode side announces what waits.
    fn connect(&mut self) -> Checked {
        let nobody = self.config.planted == Some(Planted::NobodyIsBusy);
        let prefill = self.prefill.as_mut().expect("it lives");
        prefill.link = Link::Up;
        let busy = if nobody { Vec::new() } else { prefill.busy() };
        self.decode.link = Link::Up;
        self.decode_is_connected(&busy)
    }

    /// Every store into a block of the decode worker, by whomever.
    pub(crate) fn store(&mut self, handoff: HandoffId, position: usize, target: BlockRef) -> Checked {
        let block = target.block.0 as usize;
        let owner = self.decode.owners[block];
        if owner != Some(handoff) {
            return Err(format!("handoff {handoff} stores into a block that belongs to {owner:?}"));
        }
        if self.decode.is_adopted(handoff) {
            return Err(format!("handoff {handoff} stores into a block that decode reads"));
        }
        self.memory[block] = content(handoff, position);
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
        if self.faults.losses != self.config.faults.losses {
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

/// Without the configuration, which is the same for all states of a search.
impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { config: _, faults, memory, to_prefill, to_decode, decode, prefill } = self;
        write!(f, "{faults:?} {memory:?} {to_prefill:?} {to_decode:?} {decode:?} {prefill:?}")
    }
}

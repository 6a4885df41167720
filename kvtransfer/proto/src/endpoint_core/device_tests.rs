//! Handoffs in which a device writes: what of it is named to whom, and what is no way to push.

use std::time::Duration;

use super::tests::{HANDOFF, PEER, hello, rules};
use super::*;
use crate::layout::KvDtype;
use crate::message::{Commit, Reserve};
use crate::transport::{Completion, Post};
use crate::units::{BlockId, Epoch, Moment};

const NOW: Moment = Moment(Duration::from_secs(1));

/// A range of a device's blocks, or of other memory.
#[derive(Clone, Debug)]
struct Source {
    on_device: bool,
    offset: usize,
    len: usize,
}

impl WriteSource for Source {
    fn memory(&self) -> usize {
        usize::from(self.on_device)
    }
    fn offset(&self) -> usize {
        self.offset
    }
    fn len(&self) -> usize {
        self.len
    }
    fn range(&self, offset: usize, len: usize) -> Option<Self> {
        Some(Self { offset, len, ..self.clone() })
    }
    fn in_region(&self) -> Option<u64> {
        None
    }
    fn is_on_device(&self) -> bool {
        self.on_device
    }
    fn read(&self, _: usize, _: &mut [u8]) {
        assert!(!self.on_device, "what is in a device is read by that alone");
    }
}

fn blocks(numbers: [u32; 2]) -> Vec<BlockRef> {
    numbers.map(|block| BlockRef { block: BlockId(block), epoch: Epoch(1) }).to_vec()
}

/// Of two layers, one of which may be pushed before the other.
fn layout() -> KvLayout {
    KvLayout { layers: 2, ..super::tests::layout() }
}

/// A core with a link on which devices write as is said, and a peer of this layout.
fn connected(by_device: ByDevice, theirs: KvLayout) -> EndpointCore<Source> {
    let mut core = EndpointCore::new(EndpointRules { in_place: false, layout: layout(), ..rules() });
    let region_bytes = 8 * theirs.block_bytes() as u64;
    let hello = Hello { layout: theirs, region_bytes, ..hello() };
    core.meet(PEER, "peer");
    core.link_up(PEER, LinkUp { hello, proof: QuietProof::Process, busy: Vec::new(), by_device }, NOW);
    core
}

#[test]
fn what_is_pushed_from_a_device_is_hashed_there_and_committed_then() {
    let (block, layer) = (layout().block_bytes(), layout().strides().layer);
    let there = ByDevice { to_peer: true, from_peer: false };
    let bf16 = || KvLayout { dtype: KvDtype::Bf16, ..layout() };
    let on = |on_device, offset, len| Source { on_device, offset, len };
    #[rustfmt::skip]
    let rows = [
        // what is shown                             the link,            layout,   the pushes: (target, offset in it, source)                             what comes of it
        ("both blocks, from others in the device",   there,               layout(), vec![(0, 0, on(true, 5 * block, block)), (1, 0, on(true, 2 * block, block))], "device hash:5,2 commit:[50, 20]"),
        ("layer by layer",                           there,               layout(), vec![(0, 0, on(true, 5 * block, layer)), (1, 0, on(true, 2 * block, block)),
                                                                                         (0, layer, on(true, 5 * block + layer, block - layer))],                     "device hash:5,2 commit:[50, 20]"),
        ("one target from two blocks",               there,               layout(), vec![(0, 0, on(true, 5 * block, layer)), (0, layer, on(true, 6 * block + layer, block - layer))], "device stop"),
        ("a target from where no block begins",      there,               layout(), vec![(0, 0, on(true, 5 * block + layer, block))],                             "device stop"),
        ("memory of the host",                       there,               layout(), vec![(0, 0, on(false, 5 * block, block))],                                    "device stop"),
        ("one of two blocks",                        there,               layout(), vec![(0, 0, on(true, 5 * block, block))],                                     "device commit:[0, 0]"),
        ("from a device that does not reach it",     ByDevice::default(), layout(), vec![(0, 0, on(true, 5 * block, block))],                                     "written stop"),
        ("blocks that are to be converted",          there,               bf16(),   vec![],                                                                       "written commit:[0, 0]"),
    ];
    for (name, by_device, theirs, pushes, expected) in rows {
        let mut core = connected(by_device, theirs);
        let (tokens, coverage) = (TokenCount(8), Coverage::Full);
        let (cached, targets) = (Vec::new(), blocks([3, 4]));
        core.expect(HANDOFF, PEER, Duration::from_secs(1), NOW);
        let reserve = Reserve { handoff: HANDOFF, tokens, first_block: 0, cached, targets, coverage };
        core.hear(PEER, Message::Reserve(reserve), NOW);
        let mut seen = watch(&mut core);
        for (target_index, offset, source) in pushes {
            let source = Some(source);
            core.push(HANDOFF, vec![TargetWrite { target_index, offset, source }], NOW);
            seen.extend(watch(&mut core));
        }
        let mut posted = Vec::new();
        core.post(
            PEER,
            |id, _, _| {
                posted.push(Completion { id, outcome: Ok(()) });
                Post::Accepted
            },
            NOW,
        );
        core.finish(HANDOFF, Vec::new(), NOW);
        seen.extend(watch(&mut core));
        core.completed(&posted, NOW);
        seen.extend(watch(&mut core));
        assert_eq!(seen.join(" "), expected, "{name}");
    }
}

/// What the core does, in words; it is given ten times the block's number as digest.
fn watch(core: &mut EndpointCore<Source>) -> Vec<String> {
    let mut seen = Vec::new();
    while let Some(action) = core.next_action() {
        match action {
            EndpointAction::Tell(EndpointEvent::Reserved(reserved)) => {
                let by_device = reserved.delivery == Delivery::ByDevice;
                seen.push(if by_device { "device" } else { "written" }.to_owned());
            }
            EndpointAction::TakeDigests(DigestOrder {
                ticket, handoff, owner, on_device, targets, ..
            }) => {
                assert_eq!((owner, on_device), (None, true), "of this side's blocks, by its device");
                let numbers: Vec<u32> = targets.iter().map(|target| target.block.0).collect();
                let shown: Vec<String> = numbers.iter().map(u32::to_string).collect();
                seen.push(format!("hash:{}", shown.join(",")));
                let digests = numbers.into_iter().map(|number| u64::from(number) * 10).collect();
                core.digested(handoff, ticket, digests);
            }
            EndpointAction::Send { message: Message::Commit(commit), .. } => {
                assert_eq!(commit.targets, blocks([3, 4]), "the peer's blocks are named");
                seen.push(format!("commit:{:?}", commit.digests));
            }
            EndpointAction::Tell(EndpointEvent::CancelWanted { .. }) => seen.push("stop".to_owned()),
            _ => {}
        }
    }
    seen
}

#[test]
fn what_a_peers_device_has_written_is_compared_with_what_is_in_this_sides() {
    for from_peer in [true, false] {
        let mut core = connected(ByDevice { to_peer: false, from_peer }, layout());
        let (tokens, cached, targets) = (TokenCount(8), Vec::new(), blocks([3, 4]));
        let within = Duration::from_secs(1);
        let order = ReserveOrder {
            handoff: HANDOFF,
            peer: PEER,
            within,
            tokens,
            first_block: 0,
            cached,
            targets: targets.clone(),
        };
        core.reserve(order, NOW);
        let mut seal = crate::digest::Seal::new(HANDOFF);
        seal.add(&targets, &[7, 8]);
        let (digests, payload) = (vec![7, 8], vec![1]);
        let seal = seal.value();
        let commit =
            Commit { handoff: HANDOFF, tokens, first: 0, targets, digests, seal, payload, in_place: false };
        core.hear(PEER, Message::Commit(commit), NOW);
        let mut committed = None;
        while let Some(action) = core.next_action() {
            match action {
                EndpointAction::TakeDigests(order) => {
                    assert_eq!((order.owner, order.on_device), (None, from_peer));
                    core.digested(HANDOFF, order.ticket, vec![7, 8]);
                }
                EndpointAction::Tell(EndpointEvent::Committed { on_device, .. }) => {
                    committed = Some(on_device)
                }
                _ => {}
            }
        }
        assert_eq!(committed, Some(from_peer));
    }
}

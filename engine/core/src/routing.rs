//! Which workers serve a request.
//!
//! A pure function of what the router knows of the cluster. The order of criteria:
//!
//! - *Prefill* goes where the prompt's first token comes soonest: fewest tokens to compute, counting those that
//!   queue there and leaving out those that the worker's prefix cache has.
//! - *Decode* goes where most of the prompt is cached already, since that is neither computed nor moved, but only
//!   among workers that are about as idle as the idlest: a system prompt that all requests share must not gather
//!   them on one worker.
//! - Only workers that are connected to each other make a pair.
//! - Ties go round, by a counter that the caller passes in and raises.
//!
//! A worker is named by its place in the view and told apart from its earlier lives by its instance number.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tidemill_kvtransfer_proto::units::{BlockCount, BlockLen, TokenCount};

use crate::prefix_tree::chain_hashes;
use crate::request::TokenId;

/// What a worker is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Computes prompts and hands their KV cache over.
    Prefill,
    /// Receives KV caches and continues with the second token.
    Decode,
    /// Takes whole requests.
    Hybrid,
}

/// Whether a worker takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Availability {
    /// It does.
    Serving,
    /// It finishes what it has.
    Draining,
    /// It does not answer.
    Down,
}

/// What the router knows of a worker.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerView {
    /// A number that no other start of any worker has.
    pub instance: u64,
    /// What it is for.
    pub role: Role,
    /// Whether it takes requests.
    pub availability: Availability,
    /// Sequences that compute there.
    pub running: u32,
    /// Requests that wait there.
    pub waiting: u32,
    /// Sequences in one of its steps at most.
    pub max_num_seqs: u32,
    /// Prompt tokens that wait to be computed there.
    pub queued_tokens: u64,
    /// Blocks that can be given out: free ones and unused cached ones.
    pub free: BlockCount,
    /// Blocks of its KV cache.
    pub total: BlockCount,
    /// Tokens per block.
    pub block_len: BlockLen,
    /// Chained hashes that its prefix cache has: many, so that views share them.
    pub cached: Arc<BTreeSet<u64>>,
}

/// All workers, in an order that stays.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClusterView {
    /// The workers; a [`WorkerIndex`] counts here.
    pub workers: Vec<WorkerView>,
    /// Pairs of instances of which the first can hand KV caches over to the second.
    pub links: BTreeSet<(u64, u64)>,
}

/// A worker's place in [`ClusterView::workers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WorkerIndex(pub usize);

/// What an operator can choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoutingPolicy {
    /// A prompt of which the decode worker would compute fewer tokens than this is not split. Zero splits always.
    pub alone_below: TokenCount,
    /// How many more requests than the idlest worker one may have and still be preferred for its prefix cache.
    pub max_imbalance: u32,
}

/// One request to be routed.
#[derive(Clone, Copy, Debug)]
pub struct RouteRequest<'a> {
    /// Prompt, and output so far when it is replayed.
    pub tokens: &'a [TokenId],
    /// Instances that have just failed this request.
    pub excluded: &'a [u64],
    /// Raised by the caller with each request: whose turn it is among equals.
    pub turn: u64,
}

/// Who serves a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// One worker computes the prompt, another continues.
    Split {
        /// Computes the prompt.
        prefill: WorkerIndex,
        /// Continues with the second token.
        decode: WorkerIndex,
    },
    /// One worker does everything.
    Alone {
        /// Which one.
        worker: WorkerIndex,
        /// Why the request is not split.
        reason: AloneReason,
    },
    /// Nobody.
    None(NoRoute),
}

/// Why a request is not split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AloneReason {
    /// The worker takes whole requests.
    Hybrid,
    /// The decode worker has little of the prompt to compute.
    Cheaper,
    /// A fallback: there is a decode worker but no prefill worker.
    PrefillUnavailable,
    /// A fallback: there is a prefill worker but no decode worker.
    DecodeUnavailable,
    /// A fallback: there are both, but none is connected to one of the other kind.
    Unlinked,
}

/// Why nobody serves a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoRoute {
    /// No worker answers: later.
    AllDown,
    /// The workers that answer are draining: later.
    AllDraining,
    /// The workers that serve have just failed this request: later, or give up.
    AllExcluded,
    /// No serving worker has a KV cache for so many tokens: give up.
    NeverFits,
}

impl Role {
    /// As it stands in logs, metrics and names of workers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Hybrid => "hybrid",
        }
    }
}

impl Default for RoutingPolicy {
    fn default() -> Self {
        Self { alone_below: TokenCount(0), max_imbalance: 8 }
    }
}

impl AloneReason {
    /// As it stands in logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Hybrid => "hybrid",
            Self::Cheaper => "cheaper",
            Self::PrefillUnavailable => "prefill-unavailable",
            Self::DecodeUnavailable => "decode-unavailable",
            Self::Unlinked => "unlinked",
        }
    }
}

/// Chooses who serves a request. Changes nothing.
pub fn route(view: &ClusterView, policy: RoutingPolicy, request: RouteRequest<'_>) -> Route {
    let candidates = match candidates(view, request) {
        Ok(candidates) => candidates,
        Err(why) => return Route::None(why),
    };
    let of_role = |role| candidates.iter().filter(move |it| it.worker.role == role);
    let has_decode = |prefill: &&Candidate<'_>| of_role(Role::Decode).any(|it| view.hands_over(prefill, it));
    let prefill = soonest(of_role(Role::Prefill).filter(has_decode), request.turn);
    let is_reached =
        |it: &&Candidate<'_>| prefill.as_ref().is_none_or(|prefill| view.hands_over(prefill, it));
    let decode = nearest(of_role(Role::Decode).filter(is_reached), policy, request.turn);
    let hybrid = soonest(of_role(Role::Hybrid), request.turn);
    if let Some(hybrid) = hybrid {
        let pair_is_sooner =
            decode.is_some() && prefill.is_some_and(|it| it.tokens_ahead() <= hybrid.tokens_ahead());
        if !pair_is_sooner {
            return Route::Alone { worker: hybrid.index, reason: AloneReason::Hybrid };
        }
    }
    match (prefill, decode) {
        (_, Some(decode)) if decode.uncached < u64::from(policy.alone_below.0) => {
            Route::Alone { worker: decode.index, reason: AloneReason::Cheaper }
        }
        (Some(prefill), Some(decode)) => Route::Split { prefill: prefill.index, decode: decode.index },
        (None, Some(decode)) => {
            let is_unlinked = of_role(Role::Prefill).next().is_some();
            let reason = if is_unlinked { AloneReason::Unlinked } else { AloneReason::PrefillUnavailable };
            Route::Alone { worker: decode.index, reason }
        }
        (Some(_), None) => unreachable!("a prefill worker was chosen for its decode worker"),
        (None, None) => {
            let prefill = soonest(of_role(Role::Prefill), request.turn);
            let prefill = prefill.expect("each candidate has a role, and the other two have been served");
            Route::Alone { worker: prefill.index, reason: AloneReason::DecodeUnavailable }
        }
    }
}

impl ClusterView {
    fn hands_over(&self, from: &Candidate<'_>, to: &Candidate<'_>) -> bool {
        self.links.contains(&(from.worker.instance, to.worker.instance))
    }
}

/// A worker that may be chosen.
#[derive(Clone, Copy, Debug)]
struct Candidate<'a> {
    index: WorkerIndex,
    worker: &'a WorkerView,
    /// Tokens of the request that its prefix cache does not have.
    uncached: u64,
}

impl Candidate<'_> {
    /// Tokens it computes until the request's first token.
    fn tokens_ahead(&self) -> u64 {
        self.worker.queued_tokens + self.uncached
    }

    /// Requests it has.
    fn load(&self) -> u32 {
        self.worker.running.saturating_add(self.worker.waiting)
    }
}

/// The workers that may serve the request; never empty.
fn candidates<'a>(view: &'a ClusterView, request: RouteRequest<'_>) -> Result<Vec<Candidate<'a>>, NoRoute> {
    let left: Vec<_> = view.workers.iter().enumerate().collect();
    let left = keep(left, |it| it.availability != Availability::Down, NoRoute::AllDown)?;
    let left = keep(left, |it| it.availability == Availability::Serving, NoRoute::AllDraining)?;
    let left = keep(left, |it| !request.excluded.contains(&it.instance), NoRoute::AllExcluded)?;
    let tokens = TokenCount(u32::try_from(request.tokens.len()).unwrap_or(u32::MAX));
    let left = keep(left, |it| tokens.blocks_to_hold(it.block_len) <= it.total, NoRoute::NeverFits)?;

    let mut hashes: BTreeMap<BlockLen, Vec<u64>> = BTreeMap::new();
    let candidate = |(index, worker): (usize, &'a WorkerView)| {
        let hashes =
            hashes.entry(worker.block_len).or_insert_with_key(|len| chain_hashes(request.tokens, *len));
        let hits = hashes.iter().take_while(|hash| worker.cached.contains(hash)).count() as u64;
        // The last token is always computed.
        let hits =
            hits.min(u64::from(TokenCount(tokens.0.saturating_sub(1)).blocks_filled(worker.block_len).0));
        let uncached = u64::from(tokens.0) - hits * u64::from(worker.block_len.tokens());
        Candidate { index: WorkerIndex(index), worker, uncached }
    };
    Ok(left.into_iter().map(candidate).collect())
}

type Numbered<'a> = Vec<(usize, &'a WorkerView)>;

/// Those that pass, or `why` when none does.
fn keep<'a>(
    workers: Numbered<'a>,
    passes: impl Fn(&WorkerView) -> bool,
    why: NoRoute,
) -> Result<Numbered<'a>, NoRoute> {
    let left: Numbered<'a> = workers.into_iter().filter(|(_, worker)| passes(worker)).collect();
    if left.is_empty() { Err(why) } else { Ok(left) }
}

/// The one that has computed the prompt soonest.
fn soonest<'a, 'b: 'a>(
    candidates: impl Iterator<Item = &'a Candidate<'b>>,
    turn: u64,
) -> Option<Candidate<'b>> {
    let candidates: Vec<_> = candidates.copied().collect();
    best(&candidates, turn, |it| (it.tokens_ahead(), it.load()))
}

/// The one that has most of the prompt, among those that are about as idle as the idlest.
fn nearest<'a, 'b: 'a>(
    candidates: impl Iterator<Item = &'a Candidate<'b>>,
    policy: RoutingPolicy,
    turn: u64,
) -> Option<Candidate<'b>> {
    let candidates: Vec<_> = candidates.copied().collect();
    let has_room = |it: &Candidate<'_>| {
        let needed = it.uncached.div_ceil(u64::from(it.worker.block_len.tokens()));
        it.load() < it.worker.max_num_seqs && needed <= u64::from(it.worker.free.0)
    };
    let idlest = candidates.iter().map(Candidate::load).min()?;
    best(&candidates, turn, |it| {
        let balanced = it.load() <= idlest.saturating_add(policy.max_imbalance);
        (!has_room(it), !balanced, it.uncached, it.load())
    })
}

/// The candidate with the least key; among several of them, the one whose turn it is.
fn best<'a, K: Ord>(
    candidates: &[Candidate<'a>],
    turn: u64,
    key: impl Fn(&Candidate<'_>) -> K,
) -> Option<Candidate<'a>> {
    let least = candidates.iter().map(&key).min()?;
    let equals: Vec<_> = candidates.iter().filter(|it| key(it) == least).collect();
    let chosen = turn % equals.len() as u64;
    Some(*equals[usize::try_from(chosen).expect("less than the number of candidates")])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A worker in a word: `p`, `d` or `h`, then its load after `=`, tokens queued after `q`, leading blocks of the
    /// prompt that it has cached after `c`, free blocks after `f`, all blocks after `t`, `-` draining, `!` down.
    /// Twelve tokens are routed; blocks have four; steps have eight places.
    fn worker(instance: u64, word: &str) -> WorkerView {
        let value = |mark: char| {
            let rest = word.split_once(mark).map(|(_, rest)| rest)?;
            let digits = rest.find(|it: char| !it.is_ascii_digit()).unwrap_or(rest.len());
            rest[..digits].parse::<u32>().ok()
        };
        let total = value('t').unwrap_or(100);
        let cached = chain_hashes(&PROMPT, BlockLen::new(4).unwrap());
        WorkerView {
            instance,
            role: match &word[..1] {
                "p" => Role::Prefill,
                "d" => Role::Decode,
                _ => Role::Hybrid,
            },
            availability: match word.chars().last() {
                Some('-') => Availability::Draining,
                Some('!') => Availability::Down,
                _ => Availability::Serving,
            },
            running: value('=').unwrap_or(0),
            waiting: 0,
            max_num_seqs: 8,
            queued_tokens: value('q').unwrap_or(0).into(),
            free: BlockCount(value('f').unwrap_or(total)),
            total: BlockCount(total),
            block_len: BlockLen::new(4).unwrap(),
            cached: Arc::new(cached.into_iter().take(value('c').unwrap_or(0) as usize).collect()),
        }
    }

    const PROMPT: [TokenId; 12] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];

    /// One row per rule. `x1` excludes the worker at place 1, `@1` is the turn, `<6` sets `alone_below`. All workers are
    /// connected to each other, but for those in `/1`, which have no connection at all.
    #[test]
    fn routes() {
        use AloneReason::{Cheaper, DecodeUnavailable, Hybrid, PrefillUnavailable, Unlinked};
        let split =
            |prefill, decode| Route::Split { prefill: WorkerIndex(prefill), decode: WorkerIndex(decode) };
        let alone = |worker, reason| Route::Alone { worker: WorkerIndex(worker), reason };
        #[rustfmt::skip]
        let rows = [
            ("a pair splits",                                  "p d",          split(0, 1)),
            ("the order in the view does not matter",          "d p",          split(1, 0)),
            ("prefill: the shorter queue",                     "pq9 pq5 d",    split(1, 2)),
            ("prefill: a cached prefix makes up for a queue",  "pq7c2 p d",    split(0, 2)),
            ("prefill: but not for a long one",                "pq9c2 p d",    split(1, 2)),
            ("prefill: fewer requests among equals",           "p=2 p=1 d",    split(1, 2)),
            ("decode: the longer cached prefix",               "p dc1 dc2",    split(0, 2)),
            ("decode: not when it is much busier",             "p d=0 dc2=5",  split(0, 1)),
            ("decode: unless only a little",                   "p d=0 dc2=4",  split(0, 2)),
            ("decode: fewer requests among equals",            "p d=2 d=1",    split(0, 2)),
            ("decode: one with room for the blocks",           "p dc1f1 d=1",  split(0, 2)),
            ("decode: a cached prefix needs no room",          "p dc2f1 d=1",  split(0, 1)),
            ("decode: one with a place",                       "p d=8c2 d=7",  split(0, 2)),
            ("decode: any when all are full",                  "p d=9 d=8",    split(0, 2)),
            ("equals take turns",                              "p p d d @0",   split(0, 2)),
            ("equals take turns: the next",                    "p p d d @1",   split(1, 3)),
            ("equals take turns: round",                       "p p d d @2",   split(0, 2)),
            ("a prompt mostly cached on D stays there",        "p dc2 <6",     alone(1, Cheaper)),
            ("a longer rest is split",                         "p dc2 <4",     split(0, 1)),
            ("the last token is always computed",              "p dc3 <4",     split(0, 1)),
            ("no prefill worker: D alone",                     "d",            alone(0, PrefillUnavailable)),
            ("a prefill worker is down: D alone",              "p! d",         alone(1, PrefillUnavailable)),
            ("a prefill worker drains: D alone",               "p- d",         alone(1, PrefillUnavailable)),
            ("a prefill worker failed: D alone",               "p d x0",       alone(1, PrefillUnavailable)),
            ("a failed one is passed over",                    "p p d x0",     split(1, 2)),
            ("no decode worker: P alone",                      "p d!",         alone(0, DecodeUnavailable)),
            ("no connection to the decode worker: D alone",    "p d /0",       alone(1, Unlinked)),
            ("prefill: one with a connection",                 "pq0 pq9 d /0", split(1, 2)),
            ("decode: one with a connection",                  "p d dc2 /2",   split(0, 1)),
            ("a hybrid takes whole requests",                  "h",            alone(0, Hybrid)),
            ("hybrids: the sooner one",                        "hq9 h",        alone(1, Hybrid)),
            ("a pair comes before a hybrid among equals",      "h p d",        split(1, 2)),
            ("a busier pair does not",                         "h pq1 d",      alone(0, Hybrid)),
            ("half a pair does not",                           "hq9 d",        alone(0, Hybrid)),
            ("too small a worker is passed over",              "p dt2 d=1",    split(0, 2)),
            ("nobody",                                         "",             Route::None(NoRoute::AllDown)),
            ("all down",                                       "p! d!",        Route::None(NoRoute::AllDown)),
            ("the rest drains",                                "p! d-",        Route::None(NoRoute::AllDraining)),
            ("the rest has failed",                            "p! d x1",      Route::None(NoRoute::AllExcluded)),
            ("the rest is too small",                          "p! dt2",       Route::None(NoRoute::NeverFits)),
        ];
        for (name, words, expected) in rows {
            let (settings, workers): (Vec<&str>, Vec<&str>) =
                words.split_whitespace().partition(|word| word.starts_with(['x', '@', '<', '/']));
            let setting =
                |mark| settings.iter().find_map(|word| word.strip_prefix(mark)).map(|it| it.parse::<u32>());
            let number = |mark| setting(mark).map(|it| it.unwrap());
            let cut = number('/').map(|place| 100 + u64::from(place));
            let names = (100..).take(workers.len()).filter(|name| Some(*name) != cut);
            let view = ClusterView {
                workers: workers.iter().zip(100..).map(|(it, name)| worker(name, it)).collect(),
                links: names.clone().flat_map(|one| names.clone().map(move |other| (one, other))).collect(),
            };
            let policy =
                RoutingPolicy { alone_below: TokenCount(number('<').unwrap_or(0)), max_imbalance: 4 };
            let excluded: Vec<u64> = number('x').into_iter().map(|place| 100 + u64::from(place)).collect();
            let turn = number('@').unwrap_or(0).into();
            let request = RouteRequest { tokens: &PROMPT, excluded: &excluded, turn };
            assert_eq!(route(&view, policy, request), expected, "{name}");
        }
    }

    #[test]
    fn each_worker_is_asked_in_its_own_block_length() {
        let mut coarse = worker(1, "d");
        coarse.block_len = BlockLen::new(8).unwrap();
        coarse.cached = Arc::new(chain_hashes(&PROMPT, coarse.block_len).into_iter().collect());
        let links = BTreeSet::from([(0, 2), (0, 1)]);
        let mut view = ClusterView { workers: vec![worker(0, "p"), worker(2, "dc1"), coarse], links };
        let request = RouteRequest { tokens: &PROMPT, excluded: &[], turn: 0 };
        let expected = Route::Split { prefill: WorkerIndex(0), decode: WorkerIndex(2) };
        assert_eq!(
            route(&view, RoutingPolicy::default(), request),
            expected,
            "eight tokens are more than four"
        );
        view.links = BTreeSet::from([(2, 0), (1, 0)]);
        let expected = Route::Alone { worker: WorkerIndex(2), reason: AloneReason::Unlinked };
        assert_eq!(route(&view, RoutingPolicy::default(), request), expected, "only decode could hand over");
    }
}

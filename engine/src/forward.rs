//! One forward pass of the engine thread: the plan's work goes to the device, finished layers to peers, what comes back to
//! the sampler.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use tidemill_engine_core::plan::{StepPlan, Work};
use tidemill_engine_core::request::{Part, RequestId, TokenId};
use tidemill_engine_core::scheduler::Scheduler;
use tidemill_kernels::cuda::{CudaError, DeviceAddress};
use tidemill_kernels::kv::BlockAddress;
use tidemill_kvtransfer::Endpoint;
use tidemill_kvtransfer_proto::units::{BlockRef, HandoffId, TokenCount};

use crate::device::{Descent, Device, Parts};
use crate::driver::{Active, Driver, Inbox};
use crate::fault;
use crate::handle::{Fault, FaultStage};
use crate::memory::{Arena, DevicePool};
use crate::roles::prefill::{Announced, Origin, Outgoings, Piece};
use crate::runner::{Batch, BatchSequence, LogitsWanted, OutcomeRow, RowTask};
use crate::sampler::{Sampler, logprobs_on_device, on_device};
use crate::verification::{Share, StepResult};

/// What is computed, and for whom.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub(crate) plan: &'a StepPlan,
    pub(crate) scheduler: &'a Scheduler,
    pub(crate) requests: &'a BTreeMap<RequestId, Active>,
}

/// Pushes layers to peers while later ones are computed.
struct Pusher<'a> {
    pass: Pass<'a>,
    inbox: &'a mut Inbox,
    outgoing: &'a mut Outgoings,
    origin: Origin<'a>,
    pool: Option<&'a DevicePool>,
    fault: Option<&'a Fault>,
    /// What comes down from the device meanwhile, in order.
    under_way: VecDeque<(HandoffId, Vec<Piece>, Way)>,
    /// Bytes of the landing that it takes.
    landing: usize,
    outcome: Result<(), CudaError>,
}

/// How parts of blocks come down.
enum Way {
    Begun(Descent),
    /// When everything of the step was asked for: there was no room, and ranks of a device are not waited for before.
    Later(Parts),
}

/// The blocks of each work's sequence, by the device's names.
pub(crate) enum Tables {
    Host(Vec<Vec<BlockAddress>>),
    Device(Vec<Vec<DeviceAddress>>),
}

impl Driver {
    /// Runs the plan's work on the device and samples.
    pub(crate) fn compute(&mut self, plan: &StepPlan) -> Result<Vec<StepResult>, CudaError> {
        let Self { scheduler, device, sampler, arena, pool, endpoint, requests, outgoing, .. } = self;
        let pass = Pass { plan, scheduler, requests };
        let tables = pass.tables(outgoing, arena, pool.as_ref());
        let tokens = pass.tokens();
        let mut pusher = Pusher {
            pass,
            inbox: &mut self.inbox,
            outgoing,
            origin: Origin { scheduler, arena, cpu: &self.cpu, endpoint },
            pool: pool.as_ref(),
            fault: self.fault.as_ref(),
            under_way: VecDeque::new(),
            landing: 0,
            outcome: Ok(()),
        };
        let mut results: Vec<StepResult> =
            plan.work.iter().map(|work| StepResult::new(work.request)).collect();
        match (device, &tables) {
            (Device::Cpu(runner), Tables::Host(tables)) => {
                let sequences = pass.sequences(&tokens, tables);
                let all_layers = pusher.origin.arena.shape().layers;
                let logits = runner.step(&Batch { sequences: &sequences }, &mut |layers| {
                    let is_last = layers.end == all_layers;
                    pusher.push(layers);
                    if is_last {
                        // What is left of the last layer, and the head, store nothing that a peer gets: it can look at its blocks
                        // meanwhile, and be awake for the first token.
                        pass.prompts_computed(endpoint, pusher.outgoing);
                    }
                });
                logits.for_each(|row| {
                    if let Some(share) = pass.share(row.sequence) {
                        results[row.sequence].take(&row, share, sampler);
                    }
                });
            }
            (Device::Cuda(runner), Tables::Device(tables)) => {
                let sequences = pass.sequences(&tokens, tables);
                let tasks = |sequence, position| pass.task(sequence, position);
                let batch = Batch { sequences: &sequences };
                let outcome = runner.step(&batch, &tasks, &mut |layers| pusher.push(layers))?;
                pusher.land_all()?;
                pass.prompts_computed(endpoint, pusher.outgoing);
                outcome.for_each(|row| pass.take_row(row, &mut results, sampler))?;
            }
            (Device::Cpu(_), Tables::Device(_)) | (Device::Cuda(_), Tables::Host(_)) => {
                unreachable!("a GPU has a pool, and a CPU has none")
            }
        }
        self.count(plan);
        Ok(results)
    }

    /// Counts a forward pass.
    pub(crate) fn count(&mut self, plan: &StepPlan) {
        let generated = plan.work.iter().filter(|work| work.decodes()).count() as u64;
        let known: u64 = plan.work.iter().map(|work| u64::from(work.count.0)).sum();
        self.counters.steps += 1;
        self.counters.prompt_tokens += known - generated;
    }
}

impl<'a> Pass<'a> {
    pub(crate) fn tables(self, outgoing: &Outgoings, arena: &Arena, pool: Option<&DevicePool>) -> Tables {
        match pool {
            None => Tables::Host(
                self.plan.work.iter().map(|work| self.host_blocks(work, outgoing, arena)).collect(),
            ),
            Some(pool) => {
                let address = |reference: &BlockRef| pool.address(reference.block);
                let table =
                    |work: &Work| self.scheduler.block_table(work.request).iter().map(address).collect();
                Tables::Device(self.plan.work.iter().map(table).collect())
            }
        }
    }

    /// The blocks of a work's sequence in this process: its own, or its peer's.
    fn host_blocks(self, work: &Work, outgoing: &Outgoings, arena: &Arena) -> Vec<BlockAddress> {
        if let Some(Part::PrefillFor(handoff)) = self.part(work)
            && let Some(blocks) = outgoing.blocks_in_place(handoff)
        {
            return blocks.to_vec();
        }
        let table = self.scheduler.block_table(work.request);
        table.iter().map(|reference| arena.address(reference.block)).collect()
    }

    pub(crate) fn tokens(self) -> Vec<Cow<'a, [TokenId]>> {
        self.plan.work.iter().map(|work| self.scheduler.work_tokens(self.plan, work)).collect()
    }

    /// The work as a device takes it.
    pub(crate) fn sequences<'b, A>(
        self,
        tokens: &'b [Cow<'_, [TokenId]>],
        tables: &'b [Vec<A>],
    ) -> Vec<BatchSequence<'b, A>> {
        let parts = self.plan.work.iter().zip(tokens).zip(tables);
        parts
            .map(|((work, tokens), blocks)| BatchSequence {
                tokens,
                first_position: work.first.0,
                blocks,
                logits: self.logits_wanted(work),
            })
            .collect()
    }

    fn logits_wanted(self, work: &Work) -> LogitsWanted {
        let active = self.requests.get(&work.request);
        let prompt = active.filter(|active| active.request.sampling.prompt_logprobs.is_some());
        match prompt {
            Some(active) if (work.first.0 as usize) < active.request.prompt_len => LogitsWanted::All,
            _ if work.samples => LogitsWanted::Tail(1 + work.drafted.0 as usize),
            _ => LogitsWanted::None,
        }
    }

    /// What the device makes of the row at a position; `None` where the host looks at its logits.
    pub(crate) fn task(self, sequence: usize, position: u32) -> Option<RowTask> {
        let work = &self.plan.work[sequence];
        let next = position + 1;
        let known = work.first.0 + work.count.0;
        // Nobody wants to know of a request that is gone.
        let Some(active) = self.requests.get(&work.request) else { return Some(RowTask::default()) };
        let parts = &active.request;
        let prompt_len = u32::try_from(parts.prompt_len).expect("bounded by max_model_len");
        match parts.sampling.prompt_logprobs {
            Some(count) if next < prompt_len => {
                let token = self.scheduler.tokens(work.request)[next as usize];
                let logprobs = logprobs_on_device(token, count)?;
                Some(RowTask { sample: None, logprobs: Some(logprobs) })
            }
            _ if work.samples && known <= next => on_device(&parts.sampling, &parts.stop, next - prompt_len),
            // It is known already.
            _ => Some(RowTask::default()),
        }
    }

    /// Whether a device does everything with a work's rows that is wanted of them.
    pub(crate) fn is_for_device_alone(self, work: &Work) -> bool {
        let Some(Active { request: parts, .. }) = self.requests.get(&work.request) else { return false };
        let (known, prompt_len) = ((work.first.0 + work.count.0) as usize, parts.prompt_len);
        let samples = || {
            let index = u32::try_from(known - prompt_len).expect("bounded by max_model_len");
            on_device(&parts.sampling, &parts.stop, index).is_some()
        };
        parts.sampling.prompt_logprobs.is_none_or(|count| logprobs_on_device(0, count).is_some())
            && (!work.samples || samples())
    }

    /// Takes what a row came to.
    pub(crate) fn take_row(self, row: OutcomeRow<'_>, results: &mut [StepResult], sampler: &mut Sampler) {
        match row {
            OutcomeRow::Logits(row) => {
                if let Some(share) = self.share(row.sequence) {
                    results[row.sequence].take(&row, share, sampler);
                }
            }
            OutcomeRow::Made { sequence, position, token, logprobs } => {
                if let Some(share) = self.share(sequence) {
                    results[sequence].take_made(position, token, logprobs, share);
                }
            }
        }
    }

    /// Tells peers up to where prompts are computed in place, and which are computed whole, before anybody is told of a first token.
    fn prompts_computed(self, endpoint: &Endpoint, outgoing: &Outgoings) {
        for work in &self.plan.work {
            let Some(Part::PrefillFor(handoff)) = self.part(work) else { continue };
            if outgoing.blocks_in_place(handoff).is_some() {
                endpoint.filled(handoff, TokenCount(work.first.0 + work.count.0));
            }
            if work.samples {
                endpoint.computed(handoff);
            }
        }
    }

    fn share(self, sequence: usize) -> Option<Share<'a>> {
        let work = &self.plan.work[sequence];
        // Another request may have the name of one that was cancelled meanwhile.
        let active = self.requests.get(&work.request).filter(|_| self.scheduler.is_computed(work.request))?;
        let (tokens, draft) = (self.scheduler.tokens(work.request), self.plan.draft(work));
        Some(Share { work, tokens, draft, active })
    }

    fn part(self, work: &Work) -> Option<Part> {
        self.requests.get(&work.request).map(|active| active.request.part)
    }
}

impl Pusher<'_> {
    /// Layers are computed, or will be by what a device was asked for so far.
    fn push(&mut self, layers: Range<usize>) {
        let Self { pass, inbox, outgoing, .. } = self;
        let works = &pass.plan.work;
        inbox.meet_reservations(|reserved| {
            // Any other is for after the step: it has been computed, or waits to be computed in place.
            let request = outgoing.request(reserved.handoff);
            let is_computed_now = works.iter().any(|work| Some(work.request) == request);
            is_computed_now && outgoing.announce(reserved, false) == Announced::ComputeAndPush
        });
        for work in works {
            let Some(Part::PrefillFor(handoff)) = self.pass.part(work) else { continue };
            // Layers above this one are as far as the step before took them.
            let computed = TokenCount(work.first.0 + work.count.0);
            match self.outgoing.due(handoff, layers.clone(), computed) {
                Some(pieces) => {
                    let begun = self.begin(handoff, work.request, pieces);
                    self.outcome = std::mem::replace(&mut self.outcome, Ok(())).and(begun);
                }
                None if self.outgoing.blocks_in_place(handoff).is_some() => {
                    fault::meet(self.fault, FaultStage::Pushing);
                }
                None => {}
            }
        }
    }

    /// Pushes pieces at once, or has them come down first.
    fn begin(&mut self, handoff: HandoffId, request: RequestId, pieces: Vec<Piece>) -> Result<(), CudaError> {
        let Some(pool) = self.pool else {
            self.send(handoff, pieces);
            return Ok(());
        };
        if self.outgoing.goes_by_device(handoff) {
            self.outgoing.push_from_device(handoff, pieces, &self.origin, pool)?;
            fault::meet(self.fault, FaultStage::Pushing);
            return Ok(());
        }
        let arena = self.origin.arena;
        let table = self.pass.scheduler.block_table(request);
        let parts = self.outgoing.parts(handoff, &pieces, table, arena.shape().block_len);
        let mut descent = pool.start_down(&parts, arena, &mut self.landing)?;
        if descent.is_none() && !pool.is_shared() {
            self.land()?;
            descent = pool.start_down(&parts, arena, &mut self.landing)?;
        }
        match descent {
            Some(descent) => self.under_way.push_back((handoff, pieces, Way::Begun(descent))),
            None if pool.is_shared() => self.under_way.push_back((handoff, pieces, Way::Later(parts))),
            None => {
                pool.bring_down(&parts, arena)?;
                self.send(handoff, pieces);
            }
        }
        Ok(())
    }

    /// Everything has come down and is pushed.
    fn land_all(&mut self) -> Result<(), CudaError> {
        std::mem::replace(&mut self.outcome, Ok(()))?;
        self.land()
    }

    fn land(&mut self) -> Result<(), CudaError> {
        while let Some((handoff, pieces, way)) = self.under_way.pop_front() {
            let (pool, arena) =
                (self.pool.expect("only from a pool does anything come down"), self.origin.arena);
            match way {
                Way::Begun(descent) => pool.land(descent, arena)?,
                Way::Later(parts) => pool.bring_down(&parts, arena)?,
            }
            self.send(handoff, pieces);
        }
        self.landing = 0;
        Ok(())
    }

    fn send(&mut self, handoff: HandoffId, pieces: Vec<Piece>) {
        self.outgoing.push(handoff, pieces, &self.origin);
        fault::meet(self.fault, FaultStage::Pushing);
    }
}

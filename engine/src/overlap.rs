//! Steps that a GPU computes while the host takes the outcome of the one before.
//!
//! A step is asked for, and while the device computes, the next one is planned as if no sequence ended
//! ([`Scheduler::plan_ahead`](tidemill_engine_core::scheduler::Scheduler::plan_ahead)) and asked for too: it takes the tokens that it goes on with where they
//! were chosen. Only then does the host wait for the first. So the device is never without work, and answers are those that come
//! without: a row that was computed for a sequence which had ended is looked at by nobody.
//!
//! A step goes that way when nothing of it concerns the host or a peer before its end: the device chooses all tokens, nobody
//! guesses, no prompt is for another worker. Any other is waited for before the next is planned.

use std::collections::BTreeMap;

use tidemill_engine_core::plan::StepPlan;
use tidemill_engine_core::request::RequestId;
use tidemill_kernels::cuda::CudaError;

use crate::device::Device;
use crate::driver::Driver;
use crate::forward::{Pass, Tables};
use crate::runner::{Batch, Flight};
use crate::verification::StepResult;

/// A step that was asked for, and whose outcome was not.
#[derive(Debug)]
pub(crate) struct UnderWay {
    plan: StepPlan,
    flight: Flight,
    /// Where each sequence's token will be among those that are chosen.
    places: BTreeMap<RequestId, usize>,
}

impl Driver {
    /// Whether a step can be asked for without waiting for it.
    pub(crate) fn goes_ahead(&self, plan: &StepPlan) -> bool {
        let Self { scheduler, requests, .. } = self;
        self.overlaps
            && self.speculation.is_none()
            && scheduler.may_be_assumed(plan)
            && plan.work.iter().all(|work| Pass { plan, scheduler, requests }.is_for_device_alone(work))
    }

    /// Asks for a step that has begun. `before` is the one that computes, if one does.
    pub(crate) fn start(&mut self, plan: StepPlan, before: Option<&UnderWay>) -> Result<UnderWay, CudaError> {
        self.count(&plan);
        let Self { scheduler, device, arena, pool, requests, outgoing, .. } = self;
        let Device::Cuda(runner) = device else { unreachable!("only a GPU computes by itself") };
        let pass = Pass { plan: &plan, scheduler, requests };
        let Tables::Device(tables) = pass.tables(outgoing, arena, pool.as_ref()) else {
            unreachable!("a GPU has a pool")
        };
        let tokens = pass.tokens();
        let sequences = pass.sequences(&tokens, &tables);
        let carried = |sequence: usize| {
            let work = &plan.work[sequence];
            let place = || before.and_then(|it| it.places.get(&work.request)).copied();
            scheduler.awaits_token(work).then(|| place().expect("the step before chooses the token"))
        };
        let tasks = |sequence, position| pass.task(sequence, position);
        let flight = runner.submit(&Batch { sequences: &sequences }, &tasks, &carried, &mut |_| {})?;
        let place = |(index, request)| Some((request, runner.last_row(&flight, index)?));
        let requests = plan.work.iter().map(|work| work.request);
        let places = requests.enumerate().filter_map(place).collect();
        Ok(UnderWay { plan, flight, places })
    }

    /// Asks for the step behind the one that computes, if it can, and takes the outcome of that.
    pub(crate) fn go_on(&mut self, step: UnderWay) -> Result<(), CudaError> {
        self.scheduler.assume(&step.plan);
        if let Some(next) = self.scheduler.plan_ahead().filter(|next| self.goes_ahead(next)) {
            self.scheduler.begin(&next);
            self.tell_begun(&next);
            self.under_way = Some(self.start(next, Some(&step))?);
            self.counters.overlapped_steps += 1;
        }
        self.repeat_first_tokens();
        let UnderWay { plan, flight, .. } = step;
        let Self { scheduler, device, sampler, requests, .. } = self;
        let Device::Cuda(runner) = device else { unreachable!("only a GPU computes by itself") };
        let pass = Pass { plan: &plan, scheduler, requests };
        let mut results: Vec<StepResult> =
            plan.work.iter().map(|work| StepResult::new(work.request)).collect();
        runner.receive(flight, |row| pass.take_row(row, &mut results, sampler))?;
        self.apply(&plan, results, None);
        Ok(())
    }
}

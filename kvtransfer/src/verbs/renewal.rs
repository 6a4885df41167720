//! Paths that are made anew, after a port or a wire was gone for a while.
//!
//! ```text
//! lower instance number                       higher instance number
//!   has ended the path, and heard that the peer has
//!   makes an end              ── PathAnew ──►   makes one, connects it
//!   connects, reads a little  ◄── PathAnew ──   (or PathDown: it has none)
//!   bytes came: it is up      ── PathUp ────►   it is up
//! ```
//!
//! A port that is up says nothing of the wire behind it, and handoffs that are given to a path which does not work wait for
//! seconds until that is found out. So nothing goes over it before bytes came over it. Whoever gives up at any point
//! says `PathDown`, as of any path. Nothing of the old pair can be taken for something of the new one: that has another
//! number, known to nobody before the old one was gone on both sides and each knew it.

use std::time::Duration;

use tidemill_kvtransfer_proto::path::PathEnd;

use super::error::VerbsError;
use super::setup::End;
use super::transport::RdmaTransport;

/// How far a path is with being made anew, and when that is to be tried again.
#[derive(Debug)]
pub(super) struct Renewal<E = End> {
    stage: Stage<E>,
    /// When to try next, once it has ended, and how long to wait after that.
    due: Duration,
    pause: Duration,
    /// Since when it works, or did.
    up_since: Duration,
}

#[derive(Debug)]
enum Stage<E> {
    /// It works, or has ended.
    Settled,
    /// This side's end is made, the peer's awaited.
    Asked(E),
    /// Connected, and not known to work.
    OnTrial { since: Duration },
    /// Known to work; the peer has to be told.
    Proven,
}

impl<E> Default for Renewal<E> {
    fn default() -> Self {
        Self { stage: Stage::Settled, due: Duration::ZERO, pause: FIRST_PAUSE, up_since: Duration::ZERO }
    }
}

impl<E> Renewal<E> {
    /// Whether it is connected and nothing may go over it yet.
    pub(super) fn is_on_trial(&self) -> bool {
        matches!(self.stage, Stage::OnTrial { .. })
    }

    /// The path, or the attempt to make it anew, has ended. One that did not work for long is tried less often.
    pub(super) fn ended(&mut self, now: Duration) {
        if matches!(self.stage, Stage::Settled | Stage::Proven) && LONGEST_PAUSE < now - self.up_since {
            self.pause = FIRST_PAUSE;
        }
        self.stage = Stage::Settled;
        self.due = now + self.pause;
        self.pause = (2 * self.pause).min(LONGEST_PAUSE);
    }

    /// What was asked for is refused.
    pub(super) fn refused(&mut self, now: Duration) {
        if let Stage::Asked(_) = self.stage {
            self.ended(now);
        }
    }

    /// A read over it has brought bytes.
    pub(super) fn proven(&mut self, now: Duration) {
        if self.is_on_trial() {
            (self.stage, self.up_since) = (Stage::Proven, now);
        }
    }

    fn is_due(&self, now: Duration) -> bool {
        self.due <= now
    }

    fn has_been_on_trial(&self, now: Duration) -> bool {
        matches!(self.stage, Stage::OnTrial { since } if TRIAL < now - since)
    }

    fn asked(&mut self, end: E) {
        self.stage = Stage::Asked(end);
    }

    fn take_asked(&mut self) -> Option<E> {
        match std::mem::replace(&mut self.stage, Stage::Settled) {
            Stage::Asked(end) => Some(end),
            other => {
                self.stage = other;
                None
            }
        }
    }

    fn try_out(&mut self, now: Duration) {
        self.stage = Stage::OnTrial { since: now };
    }

    fn take_proven(&mut self) -> bool {
        let is_proven = matches!(self.stage, Stage::Proven);
        if is_proven {
            self.stage = Stage::Settled;
        }
        is_proven
    }
}

impl RdmaTransport {
    /// Makes ends for the paths that both sides have ended and that are worth a try, to be told to the peer. To be
    /// called on one of the two sides, after the peer was told which paths have ended.
    pub(crate) fn renew(&mut self) -> Vec<(u32, PathEnd)> {
        let now = self.now();
        let mut ends = Vec::new();
        // What was flushed out of an old pair is looked at before there is another one.
        if self.is_dead() || !self.overheard.is_empty() {
            return ends;
        }
        for index in 0..self.paths.len() {
            let path = &self.paths[index];
            if path.renewal.has_been_on_trial(now) {
                self.bury(index, "nothing comes through it");
                continue;
            }
            let is_over = path.is_closed() && path.is_fenced;
            if !is_over || path.nic().is_port_down() || !path.renewal.is_due(now) {
                continue;
            }
            match self.end_anew(index) {
                Ok((end, told)) => {
                    self.paths[index].is_fenced = false;
                    self.paths[index].renewal.asked(end);
                    ends.push((u32::try_from(index).expect("few paths"), told));
                }
                Err(error) => {
                    let device = self.paths[index].nic().name();
                    tracing::debug!(device, error = error.to_line(), "an RDMA path cannot be made anew");
                    self.paths[index].renewal.ended(now);
                }
            }
        }
        ends
    }

    /// The peer has made an end anew. Returns the one to answer with, unless this side spoke first. Where nothing comes of
    /// it that is among the [`news`](Self::take_news).
    ///
    /// # Errors
    ///
    /// There is no such path, or it has not ended.
    pub(crate) fn hear_anew(
        &mut self,
        path: u32,
        their: &PathEnd,
        spoke_first: bool,
    ) -> Result<Option<PathEnd>, NotEnded> {
        let index = path as usize;
        let now = self.now();
        let state = self.paths.get_mut(index).ok_or(NotEnded)?;
        let made = match state.renewal.take_asked() {
            Some(end) => Ok((end, None)),
            None if !spoke_first && state.is_closed() && state.is_fenced => {
                self.end_anew(index).map(|(end, told)| (end, Some(told)))
            }
            None => return Err(NotEnded),
        };
        let state = &mut self.paths[index];
        let connected = made.and_then(|(end, told)| {
            let pair = end.connect(state.nic(), their, &self.terms)?;
            Ok((pair, told))
        });
        match connected {
            Ok((pair, told)) => {
                state.reopen(pair, their);
                state.is_fenced = false;
                state.renewal.try_out(now);
                if told.is_none()
                    && let Err(reason) = state
                        .try_out(TRIAL_BYTES.min(usize::try_from(self.remote_len).unwrap_or(TRIAL_BYTES)))
                {
                    self.bury(index, &reason);
                }
                Ok(told)
            }
            Err(error) => {
                tracing::debug!(
                    device = state.nic().name(),
                    error = error.to_line(),
                    "an RDMA path is refused"
                );
                state.renewal.ended(now);
                self.news.push(path);
                Ok(None)
            }
        }
    }

    /// The peer has seen that a path works. False when there is no such path.
    pub(crate) fn hear_up(&mut self, path: u32) -> bool {
        let now = self.now();
        let Some(path) = self.paths.get_mut(path as usize) else { return false };
        path.renewal.proven(now);
        if path.renewal.take_proven() {
            tracing::info!(device = path.nic().name(), "an RDMA path is up again");
        }
        true
    }

    /// Paths that work again since the last call: to be told to the peer.
    pub(crate) fn take_proven(&mut self) -> Vec<u32> {
        let mut proven = Vec::new();
        for (path, index) in self.paths.iter_mut().zip(0..) {
            if path.renewal.take_proven() {
                tracing::info!(device = path.nic().name(), "an RDMA path is up again");
                proven.push(index);
            }
        }
        proven
    }

    fn end_anew(&self, index: usize) -> Result<(End, PathEnd), VerbsError> {
        let path = &self.paths[index];
        let what = "the peer's rights have been taken away";
        let access = self.access.0.get(path.queue()).ok_or(VerbsError::Peer { what })?;
        let end = End::anew(path.nic(), &self.queues[path.queue()].completions, &self.terms)?;
        let told = end.describe(path.nic(), access);
        Ok((end, told))
    }
}

/// A path that has not ended on both sides is not made anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotEnded;

/// A wire that was pulled for a moment is used again soon.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// An attempt costs a queue pair and two messages: few enough to find out for as long as the connection lasts.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// A read that takes longer is taken for lost, however patient the queue pair is.
const TRIAL: Duration = Duration::from_secs(10);
/// Several packets of any length: one that carries short ones only is of no use.
const TRIAL_BYTES: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    /// What happens to a path, with the second in which it does, and the seconds when it may be tried next.
    #[test]
    fn when_a_path_is_tried_again() {
        #[rustfmt::skip]
        let rows = [
            ("soon after it ended",                   "20 end",                                  21),
            ("and after twice the time, if in vain",  "20 end, 21 ask, 22 refuse",               24),
            ("which doubles",                         "20 end, 21 ask, 22 refuse, 24 ask, 25 refuse", 29),
            ("up to a bound",                         "20 end, 21 ask, 21 refuse, 23 ask, 23 refuse, 27 ask, 27 refuse, 35 ask, 35 refuse, 43 ask, 43 refuse", 51),
            ("a trial that came to nothing is one",   "20 end, 21 ask, 22 try, 24 end",          26),
            ("working for a moment changes nothing",  "20 end, 21 ask, 22 try, 23 work, 24 end", 26),
            ("working for long does",                 "20 end, 21 ask, 22 try, 23 work, 90 end", 91),
            ("a refusal of nothing changes nothing",  "20 end, 20 refuse, 20 refuse",            21),
        ];
        for (name, story, due) in rows {
            let mut renewal = Renewal::default();
            for step in story.split(", ") {
                let (second, what) = step.split_once(' ').unwrap();
                let now = Duration::from_secs(second.parse().unwrap());
                match what {
                    "end" => renewal.ended(now),
                    "ask" => {
                        assert!(renewal.is_due(now), "{name}: {step}");
                        renewal.asked(());
                    }
                    "refuse" => renewal.refused(now),
                    "try" => {
                        assert_eq!(renewal.take_asked(), Some(()), "{name}: {step}");
                        renewal.try_out(now);
                        assert!(renewal.is_on_trial(), "{name}");
                    }
                    "work" => {
                        renewal.proven(now);
                        assert!(!renewal.is_on_trial(), "{name}");
                        assert!(renewal.take_proven() && !renewal.take_proven(), "{name}: said once");
                    }
                    other => panic!("nothing is called {other}"),
                }
            }
            let at = |second| renewal.is_due(Duration::from_secs(second));
            assert!(at(due) && !at(due - 1), "{name}: {renewal:?}");
        }
    }

    #[test]
    fn only_a_path_on_trial_is_proven_and_a_trial_has_an_end() {
        let mut renewal = Renewal::<()>::default();
        renewal.proven(Duration::ZERO);
        assert!(!renewal.take_proven(), "it works as it is");
        renewal.try_out(Duration::from_secs(5));
        assert!(!renewal.has_been_on_trial(Duration::from_secs(5) + TRIAL));
        assert!(renewal.has_been_on_trial(Duration::from_secs(6) + TRIAL));
        renewal.ended(Duration::from_secs(20));
        renewal.proven(Duration::from_secs(21));
        assert!(!renewal.take_proven(), "it has ended before its read came back");
    }
}

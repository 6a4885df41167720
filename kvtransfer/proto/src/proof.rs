//! How far it is proven, on the decode side, that blocks hold what their handoff is about.
//!
//! A commit names each block with its epoch and a digest. Blocks that are final earlier can be named earlier, while others
//! are still being computed, and are compared with the memory at once. Such a commit names the rest, if there is one, and
//! by its seal everything that was named before: what is left to do then does not grow with the prompt.

use crate::digest::Seal;
use crate::error::CommitFault;
use crate::message::{Commit, Filled};
use crate::units::{BlockRef, HandoffId};

/// What was named of a reservation's targets, and what of it was compared.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Proof {
    /// Leading targets that were named.
    named: usize,
    /// How many of them were compared with the memory.
    compared: usize,
    /// Of what was named.
    seal: Seal,
}

impl Proof {
    /// Nothing is.
    pub(crate) const fn new(handoff: HandoffId) -> Self {
        Self { named: 0, compared: 0, seal: Seal::new(handoff) }
    }

    /// Leading targets that were named.
    pub(crate) const fn named(&self) -> usize {
        self.named
    }

    /// Whether so many targets were named and not compared.
    pub(crate) const fn awaits(&self, targets: usize) -> bool {
        self.compared + targets <= self.named
    }

    /// So many of them were compared and are as they should be.
    pub(crate) const fn compared(&mut self, targets: usize) {
        self.compared += targets;
    }

    /// Whether all of `targets` were named and compared.
    pub(crate) const fn is_whole(&self, targets: &[BlockRef]) -> bool {
        self.compared == targets.len()
    }

    /// Takes names and digests of some blocks, ahead of the commit. False when they are not the next ones.
    ///
    /// # Errors
    ///
    /// What is wrong with them.
    pub(crate) fn name_ahead(&mut self, targets: &[BlockRef], filled: &Filled) -> Result<bool, CommitFault> {
        if filled.first as usize != self.named {
            return Ok(false);
        }
        let end = self.named + filled.targets.len();
        self.name(&targets[..end.min(targets.len())], &filled.targets, &filled.digests)?;
        Ok(true)
    }

    /// Takes names and digests of all other blocks from the commit, which has to stand for those that were named before
    /// as well.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub(crate) fn name_rest(&mut self, targets: &[BlockRef], commit: &Commit) -> Result<(), CommitFault> {
        let (first, named) = (commit.first as usize, self.named);
        if first != named {
            return Err(CommitFault::Order { first, named });
        }
        self.name(targets, &commit.targets, &commit.digests)?;
        if commit.seal != self.seal.value() {
            return Err(CommitFault::Seal);
        }
        Ok(())
    }

    /// `theirs` are to be the targets of `ours` that were not named yet.
    fn name(&mut self, ours: &[BlockRef], theirs: &[BlockRef], digests: &[u64]) -> Result<(), CommitFault> {
        let rest = &ours[self.named..];
        if let Some(index) = (0..rest.len().max(theirs.len())).find(|&it| rest.get(it) != theirs.get(it)) {
            let (ours, theirs) = (rest.get(index).copied(), theirs.get(index).copied());
            return Err(CommitFault::Target { index: self.named + index, ours, theirs });
        }
        if digests.len() != theirs.len() {
            return Err(CommitFault::Shape { digests: digests.len(), targets: theirs.len() });
        }
        self.seal.add(theirs, digests);
        self.named = ours.len();
        Ok(())
    }
}

//! Dying on purpose, so that tests meet each stage of a handoff and not just some moment.

use std::fs;

use rustix::process::{Signal, getpid, kill_process};

use crate::handle::{Fault, FaultStage};

/// Kills this process, as SIGKILL from outside would, if a fault at `stage` is armed.
pub(crate) fn meet(fault: Option<&Fault>, stage: FaultStage) {
    // Removing the trigger decides which of several processes dies, and that the one that replaces it does not.
    if let Some(fault) = fault
        && fault.stage == stage
        && fs::remove_file(&fault.trigger).is_ok()
    {
        tracing::warn!(?stage, "fault point reached: this process kills itself");
        let _ = kill_process(getpid(), Signal::KILL);
    }
}

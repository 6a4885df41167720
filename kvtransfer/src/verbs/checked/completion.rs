//! Where the ends of work requests show up.

use std::ffi::CStr;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use super::{Context, loaded};
use crate::verbs::error::VerbsError;
use crate::verbs::raw;

/// A completion queue with a channel of its own, whose descriptor becomes readable when the queue was armed and a
/// completion has come.
pub(in crate::verbs) struct CompletionQueue {
    raw: NonNull<raw::Cq>,
    channel: NonNull<raw::CompChannel>,
    /// Keeps the device.
    _context: Arc<Context>,
}

// SAFETY: the library allows any thread to use a completion queue.
unsafe impl Send for CompletionQueue {}
// SAFETY: the library locks a completion queue while it is polled or armed.
unsafe impl Sync for CompletionQueue {}

/// The end of a work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::verbs) struct WorkCompletion {
    /// The number that the request was given.
    pub(in crate::verbs) id: u64,
    /// The queue pair.
    pub(in crate::verbs) queue_pair: u32,
    /// Zero, or what went wrong, as `enum ibv_wc_status`.
    pub(in crate::verbs) status: u32,
}

impl CompletionQueue {
    /// A queue with room for `len` completions.
    pub(in crate::verbs) fn new(context: &Arc<Context>, len: u32) -> Result<Arc<Self>, VerbsError> {
        let library = loaded();
        // SAFETY: the context is open and kept by the result.
        let channel = unsafe { (library.ibv_create_comp_channel)(context.as_ptr()) };
        let channel = NonNull::new(channel).ok_or_else(|| VerbsError::last("make a completion channel"))?;
        let len = i32::try_from(len).unwrap_or(i32::MAX);
        // SAFETY: context and channel are alive and kept by the result; the cookie is not used; interrupt vector
        // zero always exists.
        let raw =
            unsafe { (library.ibv_create_cq)(context.as_ptr(), len, ptr::null_mut(), channel.as_ptr(), 0) };
        let Some(raw) = NonNull::new(raw) else {
            let error = VerbsError::last("make a completion queue");
            // SAFETY: the channel was just made, and no queue uses it.
            unsafe { (library.ibv_destroy_comp_channel)(channel.as_ptr()) };
            return Err(error);
        };
        let queue = Self { raw, channel, _context: Arc::clone(context) };
        rustix::io::ioctl_fionbio(queue.fd(), true)
            .map_err(|errno| VerbsError::Call { operation: "prepare a channel", source: errno.into() })?;
        Ok(Arc::new(queue))
    }

    pub(super) fn as_ptr(&self) -> *mut raw::Cq {
        self.raw.as_ptr()
    }

    /// What events of the device call it.
    pub(in crate::verbs) fn address(&self) -> usize {
        self.raw.as_ptr().addr()
    }

    /// Readable when a completion has come since [`arm`](Self::arm).
    pub(in crate::verbs) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel lives until `drop`.
        let fd = unsafe { (*self.channel.as_ptr()).fd };
        // SAFETY: the descriptor is the channel's and open until `drop`; the result borrows `self`.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    /// Asks for the descriptor to become readable with the next completion. One that came before is not announced:
    /// poll again after arming.
    pub(in crate::verbs) fn arm(&self) -> Result<(), VerbsError> {
        let arm = self.ops().req_notify_cq.expect("every provider has it");
        // SAFETY: the queue is alive; zero asks for any completion, not only solicited ones.
        let code = unsafe { arm(self.as_ptr(), 0) };
        VerbsError::code("arm a completion queue", code)
    }

    /// Takes the announcements off the descriptor, so that it is readable no more. How many there were.
    pub(in crate::verbs) fn take_events(&self) -> u32 {
        let (mut queue, mut cookie, mut count) = (ptr::null_mut(), ptr::null_mut(), 0);
        // SAFETY: the channel is alive and does not block; the other arguments are valid places for results.
        while unsafe { (loaded().ibv_get_cq_event)(self.channel.as_ptr(), &raw mut queue, &raw mut cookie) }
            == 0
        {
            count += 1;
        }
        if 0 < count {
            // SAFETY: only this queue uses the channel, and that many events were taken.
            unsafe { (loaded().ibv_ack_cq_events)(self.as_ptr(), count) };
        }
        count
    }

    /// Appends completions that are there, at most [`BATCH`] of them; how many.
    pub(in crate::verbs) fn poll(&self, done: &mut Vec<WorkCompletion>) -> Result<usize, VerbsError> {
        let poll = self.ops().poll_cq.expect("every provider has it");
        let mut entries = [raw::Wc::default(); BATCH];
        let room = i32::try_from(BATCH).expect("a small number");
        // SAFETY: the queue is alive, and there is room for that many entries.
        let count = unsafe { poll(self.as_ptr(), room, entries.as_mut_ptr()) };
        let Ok(count) = usize::try_from(count) else {
            return Err(VerbsError::last("poll a completion queue"));
        };
        done.extend(entries[..count].iter().map(|entry| WorkCompletion {
            id: entry.wr_id,
            queue_pair: entry.qp_num,
            status: entry.status,
        }));
        Ok(count)
    }

    fn ops(&self) -> &raw::ContextOps {
        // SAFETY: the queue lives until `drop`, and its context, which it points to, at least as long.
        let context = unsafe { (*self.as_ptr()).context };
        // SAFETY: as above; the table never changes once the device is open.
        unsafe { &(*context).ops }
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: queue pairs hold an `Arc` of their completion queue, so none is left; all events taken were
        // acknowledged.
        let code = unsafe { (loaded().ibv_destroy_cq)(self.as_ptr()) };
        debug_assert_eq!(code, 0, "a completion queue that nothing uses goes");
        // SAFETY: the one queue that used it is gone.
        unsafe { (loaded().ibv_destroy_comp_channel)(self.channel.as_ptr()) };
    }
}

impl WorkCompletion {
    /// What the library calls the status.
    pub(in crate::verbs) fn reason(&self) -> String {
        // SAFETY: any number may be asked for.
        let text = unsafe { (loaded().ibv_wc_status_str)(self.status) };
        if text.is_null() {
            return format!("status {}", self.status);
        }
        // SAFETY: the result is a constant of the library, ended by zero.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    pub(in crate::verbs) fn is_ok(&self) -> bool {
        self.status == raw::WC_SUCCESS
    }
}

/// Completions taken at a time.
const BATCH: usize = 32;

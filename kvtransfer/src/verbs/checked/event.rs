//! What a device says without being asked.

use std::os::fd::BorrowedFd;

use super::{Context, loaded};
use crate::verbs::raw;

/// News of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::verbs) enum DeviceEvent {
    /// Nothing gets through a port any more.
    PortDown(u8),
    /// Something does again.
    PortUp(u8),
    /// A queue pair is of no use any more.
    QueuePairFailed(u32),
    /// A completion queue is of no use any more; its address, to be compared only.
    CompletionQueueFailed(usize),
    /// The device itself is of no use any more.
    DeviceFailed,
    /// Nothing that has to be answered, as `enum ibv_event_type`.
    Other(u32),
}

impl Context {
    /// Readable when there is news.
    pub(in crate::verbs) fn event_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the context is open until `drop`, and this field of it never changes.
        let fd = unsafe { (*self.as_ptr()).async_fd };
        // SAFETY: the descriptor is the context's and open until `drop`; the result borrows `self`.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    /// The next news, if there is some. Does not wait.
    pub(in crate::verbs) fn take_event(&self) -> Option<DeviceEvent> {
        let mut event = raw::AsyncEvent { element: raw::AsyncElement { port_num: 0 }, event_type: 0 };
        // SAFETY: the context is open, its descriptor does not block, and the structure is the library's.
        if unsafe { (loaded().ibv_get_async_event)(self.as_ptr(), &raw mut event) } != 0 {
            return None;
        }
        // SAFETY: the library has just filled it in, and it was not acknowledged.
        let news = unsafe { read(&event) };
        // SAFETY: acknowledged once; nobody who destroys what it is about waits longer than until here.
        unsafe { (loaded().ibv_ack_async_event)(&raw mut event) };
        Some(news)
    }
}

/// What an event says.
///
/// # Safety
///
/// It comes from the library and was not acknowledged: until then what it points to is not destroyed.
unsafe fn read(event: &raw::AsyncEvent) -> DeviceEvent {
    match event.event_type {
        raw::EVENT_PORT_ERR | raw::EVENT_PORT_ACTIVE => {
            // SAFETY: events of these kinds name a port.
            let port = u8::try_from(unsafe { event.element.port_num }).unwrap_or(0);
            if event.event_type == raw::EVENT_PORT_ERR {
                DeviceEvent::PortDown(port)
            } else {
                DeviceEvent::PortUp(port)
            }
        }
        raw::EVENT_QP_FATAL | raw::EVENT_QP_REQ_ERR | raw::EVENT_QP_ACCESS_ERR => {
            // SAFETY: events of these kinds name a queue pair.
            let pair = unsafe { event.element.qp };
            // SAFETY: the caller answers for it; the number of a queue pair never changes.
            DeviceEvent::QueuePairFailed(unsafe { (*pair).qp_num })
        }
        raw::EVENT_CQ_ERR => {
            // SAFETY: events of this kind name a completion queue.
            DeviceEvent::CompletionQueueFailed(unsafe { event.element.cq }.addr())
        }
        raw::EVENT_DEVICE_FATAL => DeviceEvent::DeviceFailed,
        other => DeviceEvent::Other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_events_say() {
        let mut pair = raw::Qp {
            context: std::ptr::null_mut(),
            qp_context: std::ptr::null_mut(),
            pd: std::ptr::null_mut(),
            send_cq: std::ptr::null_mut(),
            recv_cq: std::ptr::null_mut(),
            srq: std::ptr::null_mut(),
            handle: 0,
            qp_num: 17,
            state: 0,
            qp_type: 0,
        };
        let qp = &raw mut pair;
        let cq = std::ptr::without_provenance_mut(0x5000);
        let port = |port_num| raw::AsyncElement { port_num };
        #[rustfmt::skip]
        let rows = [
            // as the header numbers them
            (0,  raw::AsyncElement { cq }, DeviceEvent::CompletionQueueFailed(0x5000)),
            (1,  raw::AsyncElement { qp }, DeviceEvent::QueuePairFailed(17)),
            (2,  raw::AsyncElement { qp }, DeviceEvent::QueuePairFailed(17)),
            (3,  raw::AsyncElement { qp }, DeviceEvent::QueuePairFailed(17)),
            (4,  raw::AsyncElement { qp }, DeviceEvent::Other(4)),
            (8,  port(0),                  DeviceEvent::DeviceFailed),
            (9,  port(2),                  DeviceEvent::PortUp(2)),
            (10, port(1),                  DeviceEvent::PortDown(1)),
            (18, port(1),                  DeviceEvent::Other(18)),
        ];
        for (event_type, element, expected) in rows {
            // SAFETY: each element is of the kind that the event's number says, and lives.
            let news = unsafe { read(&raw::AsyncEvent { element, event_type }) };
            assert_eq!(news, expected);
        }
    }
}

//! What devices said of themselves: a port that is down is known at once, not when the packets that it loses have been
//! repeated for seconds.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use super::checked::DeviceEvent;
use super::device::Nic;

/// How a port and its device are. Written and read by the endpoint's thread alone, so the order of accesses is that of
/// the program; the atomics are only there because others hold the device too.
#[derive(Debug)]
pub(super) struct Health {
    is_port_down: AtomicBool,
    is_broken: AtomicBool,
}

/// Something of a device that is of no use any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    /// The queue pair of that number.
    QueuePair(u32),
    /// The completion queue at that address.
    CompletionQueue(usize),
}

impl Health {
    /// Of a port that is down, or up, as it is opened.
    pub(super) fn of_port(is_down: bool) -> Self {
        Self { is_port_down: AtomicBool::new(is_down), is_broken: AtomicBool::new(false) }
    }
}

impl Nic {
    /// Readable when the device has news.
    pub(crate) fn event_fd(&self) -> BorrowedFd<'_> {
        self.domain.context().event_fd()
    }

    /// Hears the news of the device. What it says of port and device is remembered, and seen to by each transport when
    /// it is polled next; what it says of a single connection is returned.
    pub(crate) fn hear_events(&self) -> Vec<Failed> {
        let news = std::iter::from_fn(|| self.domain.context().take_event());
        news.filter_map(|event| self.hear(event)).collect()
    }

    fn hear(&self, event: DeviceEvent) -> Option<Failed> {
        let device = self.name();
        match event {
            DeviceEvent::PortDown(port) if port == self.port() => {
                tracing::warn!(device, "an RDMA port is down");
                self.health.is_port_down.store(true, Ordering::Relaxed);
            }
            DeviceEvent::PortUp(port) if port == self.port() => {
                tracing::info!(device, "an RDMA port is up");
                self.health.is_port_down.store(false, Ordering::Relaxed);
            }
            DeviceEvent::DeviceFailed => {
                tracing::error!(device, "an RDMA device has failed");
                self.health.is_broken.store(true, Ordering::Relaxed);
            }
            DeviceEvent::QueuePairFailed(number) => return Some(Failed::QueuePair(number)),
            DeviceEvent::CompletionQueueFailed(address) => return Some(Failed::CompletionQueue(address)),
            DeviceEvent::PortDown(_) | DeviceEvent::PortUp(_) | DeviceEvent::Other(_) => {
                tracing::debug!(device, ?event, "an RDMA device has news");
            }
        }
        None
    }

    /// Whether nothing gets through its port at the moment.
    pub(super) fn is_port_down(&self) -> bool {
        self.health.is_port_down.load(Ordering::Relaxed)
    }

    /// Whether the device has failed, which only opening it again would change.
    pub(super) fn is_broken(&self) -> bool {
        self.health.is_broken.load(Ordering::Relaxed)
    }
}

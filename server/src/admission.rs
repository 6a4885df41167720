//! The door: a bounded number of sequences in flight or waiting. What does not fit is refused at once.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Counts the places.
#[derive(Debug)]
pub(crate) struct Admission {
    places: Arc<Semaphore>,
    capacity: u32,
}

/// Places that are taken until it is dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    _places: OwnedSemaphorePermit,
}

/// There is no place now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("The server is busy: all {capacity} places are taken. Try again in {retry_after_s} s.")]
pub(crate) struct Full {
    capacity: u32,
    /// Seconds until it is worth trying again.
    pub(crate) retry_after_s: u32,
}

impl Admission {
    /// A door to `capacity` places; at least one.
    pub(crate) fn new(capacity: usize) -> Self {
        let capacity = u32::try_from(capacity.clamp(1, Semaphore::MAX_PERMITS)).unwrap_or(u32::MAX);
        Self { places: Arc::new(Semaphore::new(capacity as usize)), capacity }
    }

    /// Takes a place for each of `sequences`, or all there are when a single request asks for more than that.
    pub(crate) fn admit(&self, sequences: u32) -> Result<Permit, Full> {
        let wanted = sequences.min(self.capacity);
        match Arc::clone(&self.places).try_acquire_many_owned(wanted) {
            Ok(places) => Ok(Permit { _places: places }),
            Err(_) => Err(Full { capacity: self.capacity, retry_after_s: RETRY_AFTER_S }),
        }
    }
}

/// Answers take seconds, so a place is likely to be free after one.
const RETRY_AFTER_S: u32 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_come_back_when_their_permit_is_dropped() {
        let admission = Admission::new(3);
        let two = admission.admit(2).unwrap();
        let one = admission.admit(1).unwrap();
        assert!(admission.admit(1).is_err());
        drop(two);
        drop(one);
        let all = admission.admit(100).unwrap();
        assert!(admission.admit(1).is_err(), "a large request has the house to itself");
        drop(all);
        assert!(admission.admit(3).is_ok());
    }
}

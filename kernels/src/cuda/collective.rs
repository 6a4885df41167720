//! What several devices do together: the ranks of a model, each a device with its part of the weights, sum up and exchange what they
//! have computed.

use super::DeviceAddress;
use crate::matrix::WeightDtype;

/// What ranks find one another by: made by one of them, for one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupId(pub(super) [u8; Self::BYTES]);

impl GroupId {
    /// As many as `ncclUniqueId` has.
    pub(super) const BYTES: usize = 128;
}

/// A device's place in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Of the device's places.
    pub(super) number: u64,
    /// Which it is, from zero.
    pub rank: u32,
    /// How many there are.
    pub ranks: u32,
}

/// What every rank of a group is asked for, each with places in its own memory. All ranks ask for the same, in the same order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collective {
    /// What each rank has is replaced by the sum of all, the same bits in every rank. How often it is rounded on the way is the
    /// library's choice.
    Sum {
        /// Read and written.
        address: DeviceAddress,
        /// How many numbers.
        elements: usize,
        /// Of which type.
        dtype: WeightDtype,
    },
    /// What all ranks have comes to lie side by side in every rank, in their order.
    Gather {
        /// `ranks` times as many bytes.
        to: DeviceAddress,
        /// Outside of `to`.
        from: DeviceAddress,
        /// Of one rank.
        bytes: usize,
    },
    /// All ranks get what the first one has.
    Spread {
        /// Read in the first rank, written in others.
        address: DeviceAddress,
        /// How many.
        bytes: usize,
    },
}

#[cfg(all(feature = "emulator", not(no_cpp_compiler)))]
impl Collective {
    /// For people.
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Sum { .. } => "sum of ranks",
            Self::Gather { .. } => "gathering of ranks",
            Self::Spread { .. } => "spreading to ranks",
        }
    }

    /// Bytes that each rank brings along.
    pub(super) const fn bytes(&self) -> usize {
        match *self {
            Self::Sum { elements, dtype, .. } => elements * dtype.bytes(),
            Self::Gather { bytes, .. } | Self::Spread { bytes, .. } => bytes,
        }
    }
}

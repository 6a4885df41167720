//! Blocks in memory that this process does not touch by itself, a device's: what their owner does for the endpoint.
//!
//! An engine that computes in a device has its blocks there, by the same numbers as those of its region. Peers on this host whose blocks have
//! the same layout copy from device to device instead of through both regions; how that is done is the owner's, who supplies [`DeviceBlocks`].
//! Here are only places, lengths and descriptors.

use std::fmt::Debug;
use std::os::fd::OwnedFd;

/// What a device that holds this worker's blocks can do with them. Any thread may ask.
///
/// # Contract
///
/// An error means that the device is of no use any more, except where a method says otherwise; whatever was asked for is over then as far as
/// anybody can tell, and the owner ends this worker.
pub trait DeviceBlocks: Debug + Send + Sync {
    /// What a process of this host reaches the blocks by: a descriptor, and what it has to be told with it, of
    /// [`LONGEST_NOTE`] bytes at most. An error, for people, where the device has no such thing.
    ///
    /// # Errors
    ///
    /// What is missing.
    fn export(&self) -> Result<(OwnedFd, Vec<u8>), String>;

    /// Takes hold of what a peer has exported.
    ///
    /// # Errors
    ///
    /// Why this device does not reach it.
    fn import(&self, memory: OwnedFd, note: &[u8]) -> Result<Box<dyn PeerBlocks>, String>;

    /// Begins to take digests: for each part a sum that it is added to, which all begin with zero. One piece of work at a time, of
    /// [`MOST_PARTS`] parts and as many sums at most; parts are of one length, or all are lines. What was begun before and not asked for is
    /// given up.
    ///
    /// # Errors
    ///
    /// See the contract.
    fn begin_digests(&self, parts: &[DigestPart], sums: usize) -> Result<(), String>;

    /// The sums that were begun, once they are there.
    ///
    /// # Errors
    ///
    /// See the contract.
    fn digests(&self) -> Result<Option<Vec<u64>>, String>;
}

/// Blocks of a peer that this side's device copies to. Whoever drops it has waited for all copies.
pub trait PeerBlocks: Debug + Send {
    /// How many bytes of blocks there are.
    fn bytes(&self) -> u64;

    /// Asks for a copy from this side's blocks to the peer's; both ranges are within them. It comes after what this side has computed when the
    /// bytes were pushed.
    ///
    /// # Errors
    ///
    /// The device's.
    fn copy(&mut self, from: usize, to: u64, len: usize) -> Result<(), String>;

    /// How many copies have ended, of all that were ever asked for. Does not wait.
    ///
    /// # Errors
    ///
    /// The device's.
    fn ended(&mut self) -> Result<u64, String>;

    /// Waits until all have ended.
    ///
    /// # Errors
    ///
    /// The device's.
    fn settle(&mut self) -> Result<(), String>;
}

/// A part of a block whose bytes are hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DigestPart {
    /// Which bytes.
    pub bytes: PartBytes,
    /// What the hash begins with.
    pub seed: u64,
    /// Which sum the digest is added to.
    pub sum: u32,
}

/// Bytes of this side's blocks, by their places in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartBytes {
    /// So many from there on.
    All {
        /// The first.
        offset: usize,
        /// How many.
        len: usize,
    },
    /// Four lines of 64 bytes, one behind the other.
    Lines([usize; 4]),
}

/// Parts of one piece of work.
pub const MOST_PARTS: usize = 2048;
/// Bytes of what goes along with a descriptor.
pub const LONGEST_NOTE: usize = 256;

//! The atomics of [`gate`](super::gate), named apart so that its test can put loom's in their place.

pub(crate) use std::sync::atomic::{AtomicU64, Ordering};

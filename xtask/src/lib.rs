//! Chores of the repository that tests call too.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

pub mod measure_start;
pub mod simulate;
pub mod tidy;

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the root").to_path_buf()
}

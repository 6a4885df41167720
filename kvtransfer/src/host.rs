//! What tells hosts apart, and numbers that cannot be guessed.

use std::{fs, io};

use rustix::rand::GetRandomFlags;

/// Equal for two processes of one host and one user, which may share memory. Empty, and equal to nobody's, when
/// the system does not say.
pub(crate) fn identity() -> String {
    let Ok(boot) = fs::read_to_string("/proc/sys/kernel/random/boot_id") else { return String::new() };
    format!("{}/{}", boot.trim(), rustix::process::getuid().as_raw())
}

/// A number that nobody can guess.
pub(crate) fn token() -> io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(bytes))
}

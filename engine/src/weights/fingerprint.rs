//! A short text that is equal for two workers exactly when their K and V for equal tokens are.
//!
//! It covers what the forward pass reads (not the model's name or folder): the shape and constants, and each tensor's
//! name, shape, type and bytes, and how weights are quantised. Above [`WHOLE_UP_TO`] bytes of weights only some stretches of each tensor are read, as a
//! model must not be read from disk twice; a fine-tuned model differs nearly everywhere, so a few stretches tell it apart.

use xxhash_rust::xxh3::Xxh3;

use crate::handle::Quantization;
use crate::models::ModelSpec;

/// A fingerprint in the making.
pub(super) struct Fingerprint {
    hasher: Xxh3,
    whole: bool,
}

impl Fingerprint {
    /// Starts with the configuration; `bytes` is the size of all weights.
    pub(super) fn of(spec: &ModelSpec, quantization: Option<Quantization>, bytes: u64) -> Self {
        let mut hasher = Xxh3::new();
        let ModelSpec { heads, kv_heads, head_size, norm_eps, rope, windows, tied_embeddings, .. } = spec;
        let constants =
            format!("{heads} {kv_heads} {head_size} {norm_eps:?} {rope:?} {windows:?} {tied_embeddings}");
        add_framed(&mut hasher, constants.as_bytes());
        if let Some(quantization) = quantization {
            add_framed(&mut hasher, quantization.to_string().as_bytes());
        }
        Self { hasher, whole: bytes < WHOLE_UP_TO }
    }

    /// Adds one tensor, or a part of one; `kind` tells how its bytes are read.
    pub(super) fn add(&mut self, name: &str, shape: &[usize], kind: &str, bytes: &[u8]) {
        add_framed(&mut self.hasher, name.as_bytes());
        add_framed(&mut self.hasher, format!("{kind} {shape:?}").as_bytes());
        if self.whole || bytes.len() <= STRETCHES * STRETCH {
            self.hasher.update(bytes);
            return;
        }
        let last = bytes.len() - STRETCH;
        for stretch in 0..STRETCHES {
            let first = last / (STRETCHES - 1) * stretch;
            self.hasher.update(&bytes[first..first + STRETCH]);
        }
        self.hasher.update(&bytes[last..]);
    }

    /// The text: 32 hexadecimal digits.
    pub(super) fn text(&self) -> String {
        format!("{:032x}", self.hasher.digest128())
    }
}

/// Adds a text with its length, so that "ab" "c" and "a" "bc" differ.
fn add_framed(hasher: &mut Xxh3, text: &[u8]) {
    hasher.update(&(text.len() as u64).to_le_bytes());
    hasher.update(text);
}

const WHOLE_UP_TO: u64 = 64 << 20;
const STRETCHES: usize = 32;
const STRETCH: usize = 64;

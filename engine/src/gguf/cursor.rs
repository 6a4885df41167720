//! The bytes of a file, one after the other.

use super::error::GgufError;

/// A place in a file.
#[derive(Clone, Debug)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    /// Goes on at `position`, which was a place in the same bytes.
    pub(super) const fn at(bytes: &'a [u8], position: usize) -> Self {
        Self { bytes, position }
    }

    pub(super) const fn position(&self) -> usize {
        self.position
    }

    /// The next `count` bytes, which are `what`.
    pub(super) fn take(&mut self, count: u64, what: &'static str) -> Result<&'a [u8], GgufError> {
        let cut = GgufError::Cut { what, position: self.position, file: self.bytes.len() };
        let end = usize::try_from(count).ok().and_then(|count| self.position.checked_add(count));
        let Some(taken) = end.and_then(|end| self.bytes.get(self.position..end)) else { return Err(cut) };
        self.position += taken.len();
        Ok(taken)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, GgufError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, GgufError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A number of `N` bytes.
    pub(super) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], GgufError> {
        let taken = self.take(N as u64, what)?;
        Ok(*taken.as_array().expect("as many as were asked for"))
    }

    /// A length, and a text of so many bytes.
    pub(super) fn text(&mut self, what: &'static str) -> Result<&'a str, GgufError> {
        let length = self.u64(what)?;
        let position = self.position;
        std::str::from_utf8(self.take(length, what)?).map_err(|_| GgufError::Utf8 { what, position })
    }
}

//! Files in memory without copying them.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;

/// A file, mapped for reading.
#[derive(Debug)]
pub struct MappedFile(Mmap);

impl MappedFile {
    /// Maps a whole file.
    ///
    /// # Errors
    ///
    /// What the system says about opening or mapping it.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: `map` asks that the file does not change while it is mapped. It is a model's weights, mapped only while
        // they are copied into their packed form. Whoever replaces them does so by renaming a new file over the old,
        // as download tools do, which leaves this mapping the old content. Shrinking the file in place would end the
        // process with SIGBUS, which is the price of not holding every weight twice.
        let map = unsafe { Mmap::map(&file) }?;
        Ok(Self(map))
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

//! The files of a model, be they in a folder or compiled into the binary.

use std::ops::Deref;
use std::path::Path;
use std::{fs, io};

use super::error::ModelError;
use crate::handle::{EmbeddedFile, ModelSource};
use crate::memory::MappedFile;

/// Reads a model's files by name.
#[derive(Clone, Copy, Debug)]
pub struct ModelFiles<'a>(Place<'a>);

/// Content of a file.
#[derive(Debug)]
pub enum FileBytes {
    /// Copied.
    Read(Vec<u8>),
    /// Paged in when it is read.
    Mapped(MappedFile),
    /// Part of the binary.
    Embedded(&'static [u8]),
}

#[derive(Clone, Copy, Debug)]
enum Place<'a> {
    Folder(&'a Path),
    Embedded(&'static [EmbeddedFile]),
}

impl<'a> ModelFiles<'a> {
    /// The files of a model; a GGUF file has none beside it.
    pub fn of(source: &'a ModelSource) -> Self {
        Self(match source {
            ModelSource::Folder(folder) => Place::Folder(folder),
            ModelSource::Gguf(_) => Place::Embedded(&[]),
            ModelSource::Embedded(files) => Place::Embedded(files),
        })
    }

    /// What errors and logs call a file.
    pub fn label(&self, name: &str) -> String {
        match self.0 {
            Place::Folder(folder) => folder.join(name).display().to_string(),
            Place::Embedded(_) => format!("embedded {name}"),
        }
    }

    /// A small file.
    ///
    /// # Errors
    ///
    /// [`ModelError::Read`], also when there is no such file.
    pub fn read(&self, name: &str) -> Result<FileBytes, ModelError> {
        self.open(name, |path| fs::read(path).map(FileBytes::Read))
    }

    /// A small file that may be absent.
    ///
    /// # Errors
    ///
    /// [`ModelError::Read`] when it is there and cannot be read.
    pub fn read_if_present(&self, name: &str) -> Result<Option<FileBytes>, ModelError> {
        match self.read(name) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(ModelError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A large file, without reading it yet.
    ///
    /// # Errors
    ///
    /// As for [`read`](Self::read).
    pub fn map(&self, name: &str) -> Result<FileBytes, ModelError> {
        self.open(name, |path| MappedFile::open(path).map(FileBytes::Mapped))
    }

    fn open(
        &self,
        name: &str,
        from_folder: impl FnOnce(&Path) -> io::Result<FileBytes>,
    ) -> Result<FileBytes, ModelError> {
        let opened = match self.0 {
            Place::Folder(folder) => from_folder(&folder.join(name)),
            Place::Embedded(files) => files
                .iter()
                .find(|file| file.name == name)
                .map(|file| FileBytes::Embedded(file.bytes))
                .ok_or_else(|| io::ErrorKind::NotFound.into()),
        };
        opened.map_err(|source| ModelError::Read { file: self.label(name), source })
    }
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Read(bytes) => bytes,
            Self::Mapped(file) => file,
            Self::Embedded(bytes) => bytes,
        }
    }
}

//! GGUF files: a model in one file or several, its metadata as key and value, its tensors in blocks of few bits.
//!
//! A reader of our own (`docs/decisions/0017`), after the specification at
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Counts and lengths in a file are only believed as far as
//! its bytes go: nothing is allocated before what it is for has been seen.

mod cursor;
mod error;
mod parts;
mod tensor_type;
mod value;

use std::collections::BTreeMap;
use std::path::Path;

use crate::memory::MappedFile;
use cursor::Cursor;
use parts::Split;

pub use error::GgufError;
pub use parts::PartName;
pub use tensor_type::TensorType;
pub use value::{GgufArray, GgufValue};

/// What a file says about itself and where its tensors are. Names the bytes that it was read from, and holds none of them.
#[derive(Debug)]
pub struct GgufHeader {
    metadata: BTreeMap<String, GgufValue>,
    tensors: BTreeMap<String, GgufTensor>,
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// Rows first, as elsewhere in this engine; the file has it the other way round.
    pub shape: Vec<usize>,
    /// How its elements are stored.
    pub kind: TensorType,
    /// From the start of its file.
    offset: u64,
    /// In which of a model's files it is, from zero.
    part: usize,
}

/// A mapped file, or all parts of a model, with the header.
#[derive(Debug)]
pub struct GgufFile {
    label: String,
    /// The first has what is said about the model.
    parts: Vec<MappedFile>,
    /// The first part's, with the tensors of all.
    header: GgufHeader,
}

impl GgufFile {
    /// Maps a file and reads its header. Of a model in parts `path` is the first; the others lie beside it.
    ///
    /// # Errors
    ///
    /// [`GgufError`] says what is wrong and where.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let (first, mut header) = map(path)?;
        let mut parts = vec![first];
        if let Some(split) = Split::of(&header)? {
            for path in split.others(path)? {
                let part = parts.len();
                let opened = map(&path).and_then(|(bytes, found)| {
                    split.check_part(part as u64, &found)?;
                    header.join(found, part)?;
                    Ok(bytes)
                });
                let file = || path.display().to_string();
                parts.push(
                    opened.map_err(|source| GgufError::Part { file: file(), source: Box::new(source) })?,
                );
            }
            split.check_whole(header.tensors.len())?;
        }
        Ok(Self { label: path.display().to_string(), parts, header })
    }

    /// What errors call the file.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The header.
    pub const fn header(&self) -> &GgufHeader {
        &self.header
    }

    /// The bytes of a tensor.
    ///
    /// # Errors
    ///
    /// As [`GgufHeader::data_of`].
    pub fn data_of(&self, name: &str) -> Result<&[u8], GgufError> {
        let part = self.header.tensors.get(name).map_or(0, |tensor| tensor.part);
        self.header.data_of(&self.parts[part], name)
    }

    /// The texts of an array.
    ///
    /// # Errors
    ///
    /// When there is none under `key`, or it is of something else.
    pub fn texts(&self, key: &str) -> Result<Vec<&str>, GgufError> {
        self.array(key)?.texts(&self.parts[0]).ok_or_else(|| GgufError::wrong(key, "an array of texts"))
    }

    /// The numbers of an array.
    ///
    /// # Errors
    ///
    /// When there is none under `key`, or it is of something else.
    pub fn numbers(&self, key: &str) -> Result<Vec<f64>, GgufError> {
        self.array(key)?.numbers(&self.parts[0]).ok_or_else(|| GgufError::wrong(key, "an array of numbers"))
    }

    fn array(&self, key: &str) -> Result<&GgufArray, GgufError> {
        match self.header.value(key) {
            None => Err(GgufError::Missing { key: key.into() }),
            Some(GgufValue::Array(array)) => Ok(array),
            Some(_) => Err(GgufError::wrong(key, "an array")),
        }
    }
}

impl GgufHeader {
    /// Reads the header of a file that begins with `bytes`.
    ///
    /// # Errors
    ///
    /// [`GgufError`] says what is wrong and where.
    pub fn parse(bytes: &[u8]) -> Result<Self, GgufError> {
        let mut cursor = Cursor::new(bytes);
        if cursor.take(MAGIC.len() as u64, "the file's first bytes")? != MAGIC {
            return Err(GgufError::Magic);
        }
        let version = cursor.u32("the version")?;
        if !VERSIONS.contains(&version) {
            return Err(GgufError::Version { found: version });
        }
        let tensor_count = cursor.u64("the number of tensors")?;
        let value_count = cursor.u64("the number of values")?;
        let mut metadata = BTreeMap::new();
        for _ in 0..value_count {
            let key = cursor.text("a key")?.to_owned();
            let value = GgufValue::read(&mut cursor, &key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(GgufError::Twice { name: key });
            }
        }
        let alignment = alignment(&metadata)?;
        let mut tensors = BTreeMap::new();
        for _ in 0..tensor_count {
            let name = cursor.text("the name of a tensor")?.to_owned();
            let tensor = GgufTensor::read(&mut cursor, &name, alignment)?;
            if tensors.insert(name.clone(), tensor).is_some() {
                return Err(GgufError::Twice { name });
            }
        }
        let data = cursor.position().next_multiple_of(alignment);
        for tensor in tensors.values_mut() {
            tensor.offset = tensor.offset.saturating_add(data as u64);
        }
        let header = Self { metadata, tensors };
        for name in header.tensors.keys() {
            header.data_of(bytes, name)?;
        }
        Ok(header)
    }

    /// Takes the tensors of another part of the same model.
    fn join(&mut self, other: Self, part: usize) -> Result<(), GgufError> {
        for (name, tensor) in other.tensors {
            if self.tensors.contains_key(&name) {
                return Err(GgufError::Twice { name });
            }
            self.tensors.insert(name, GgufTensor { part, ..tensor });
        }
        Ok(())
    }

    /// The value under `key`.
    pub fn value(&self, key: &str) -> Option<&GgufValue> {
        self.metadata.get(key)
    }

    /// Every key with its value.
    pub const fn metadata(&self) -> &BTreeMap<String, GgufValue> {
        &self.metadata
    }

    /// Every tensor, by name.
    pub const fn tensors(&self) -> &BTreeMap<String, GgufTensor> {
        &self.tensors
    }

    /// The bytes of a tensor, out of those of the file that it is in; of a type without a known size, all that follow its first.
    ///
    /// # Errors
    ///
    /// When there is no such tensor, it does not fit into the file, or its rows are no whole blocks.
    pub fn data_of<'a>(&self, bytes: &'a [u8], name: &str) -> Result<&'a [u8], GgufError> {
        let tensor = self.tensors.get(name).ok_or_else(|| GgufError::NoTensor { name: name.into() })?;
        let beyond = || GgufError::Beyond { name: name.into(), file: bytes.len() };
        let offset = usize::try_from(tensor.offset).ok();
        let rest = offset.and_then(|offset| bytes.get(offset..)).ok_or_else(beyond)?;
        let Some((elements, block)) = tensor.kind.block() else { return Ok(rest) };
        let row = tensor.shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(elements) {
            return Err(GgufError::PartOfBlock { name: name.into(), kind: tensor.kind, row, elements });
        }
        // Cannot overflow: the shape's product was checked, and no type has more than 8 bytes per element.
        let blocks = tensor.shape.iter().product::<usize>() / elements;
        blocks.checked_mul(block).and_then(|length| rest.get(..length)).ok_or_else(beyond)
    }

    /// A whole number under `key`.
    ///
    /// # Errors
    ///
    /// When it is something else.
    pub fn count(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "a whole number", GgufValue::as_count)
    }

    /// A number under `key`.
    ///
    /// # Errors
    ///
    /// When it is something else.
    pub fn number(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.typed(key, "a number", GgufValue::as_number)
    }

    /// A text under `key`.
    ///
    /// # Errors
    ///
    /// When it is something else.
    pub fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "a text", GgufValue::as_text)
    }

    /// True or false under `key`.
    ///
    /// # Errors
    ///
    /// When it is something else.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "true or false", GgufValue::as_flag)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        read: impl Fn(&'a GgufValue) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| GgufError::wrong(key, expected))
    }
}

impl GgufTensor {
    fn read(cursor: &mut Cursor<'_>, name: &str, alignment: usize) -> Result<Self, GgufError> {
        let dimensions = cursor.u32("the number of dimensions")?;
        if MOST_DIMENSIONS < dimensions {
            return Err(GgufError::Dimensions { name: name.into(), found: dimensions });
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let extent = cursor.u64("a dimension")?;
            shape.push(usize::try_from(extent).map_err(|_| GgufError::Size { name: name.into() })?);
        }
        shape.reverse();
        let elements = shape.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent));
        if elements.is_none_or(|elements| MOST_ELEMENTS < elements) {
            return Err(GgufError::Size { name: name.into() });
        }
        let kind = TensorType(cursor.u32("the type of a tensor")?);
        let offset = cursor.u64("the place of a tensor")?;
        if offset % alignment as u64 != 0 {
            return Err(GgufError::Alignment { name: name.into(), offset, alignment });
        }
        Ok(Self { shape, kind, offset, part: 0 })
    }
}

/// Maps a file and reads its header, of one part if it is one.
fn map(path: &Path) -> Result<(MappedFile, GgufHeader), GgufError> {
    let bytes = MappedFile::open(path).map_err(GgufError::Open)?;
    let header = GgufHeader::parse(&bytes)?;
    Ok((bytes, header))
}

fn alignment(metadata: &BTreeMap<String, GgufValue>) -> Result<usize, GgufError> {
    let Some(value) = metadata.get(ALIGNMENT) else { return Ok(DEFAULT_ALIGNMENT) };
    let known = value.as_count().and_then(|number| usize::try_from(number).ok());
    known
        .filter(|number| number.is_power_of_two() && *number <= MOST_ALIGNMENT)
        .ok_or_else(|| GgufError::wrong(ALIGNMENT, "a power of two up to 65536"))
}

const MAGIC: &[u8] = b"GGUF";
/// Version 1 had shorter lengths and was in use for a few weeks.
const VERSIONS: [u32; 2] = [2, 3];
const ALIGNMENT: &str = "general.alignment";
const DEFAULT_ALIGNMENT: usize = 32;
const MOST_ALIGNMENT: usize = 1 << 16;
const MOST_DIMENSIONS: u32 = 4;
/// A thousand times what the largest models have, and far from where sizes in bytes overflow.
const MOST_ELEMENTS: usize = 1 << 48;

#[cfg(test)]
mod tests;

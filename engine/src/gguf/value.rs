//! Values of a file's metadata.

use super::cursor::Cursor;
use super::error::GgufError;

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// A whole number that is not negative, of any width.
    Count(u64),
    /// A negative whole number.
    Negative(i64),
    /// A number of either precision.
    Number(f64),
    /// True or false.
    Flag(bool),
    /// A text.
    Text(String),
    /// Many values of one type.
    Array(GgufArray),
}

/// Where an array lies in the file; a vocabulary is not copied before somebody wants it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufArray {
    /// Number of the elements' type.
    kind: u32,
    count: u64,
    /// Where the first element begins.
    position: usize,
}

impl GgufValue {
    pub(super) fn read(cursor: &mut Cursor<'_>, key: &str) -> Result<Self, GgufError> {
        let kind = cursor.u32("the type of a value")?;
        if kind != ARRAY {
            return Self::scalar(cursor, key, kind);
        }
        let kind = cursor.u32("the type of an array")?;
        let count = cursor.u64("the length of an array")?;
        let array = GgufArray { kind, count, position: cursor.position() };
        match width(kind) {
            Some(width) => {
                // Beyond 2^64 is beyond the file too.
                cursor.take(count.saturating_mul(width), "an array")?;
            }
            None if kind == TEXT => {
                for _ in 0..count {
                    cursor.text("a text of an array")?;
                }
            }
            None if kind == ARRAY => return Err(GgufError::Nested { key: key.into() }),
            None => return Err(GgufError::ValueType { key: key.into(), found: kind }),
        }
        Ok(Self::Array(array))
    }

    fn scalar(cursor: &mut Cursor<'_>, key: &str, kind: u32) -> Result<Self, GgufError> {
        const WHAT: &str = "a value";
        let whole = |number: i64| u64::try_from(number).map_or(Self::Negative(number), Self::Count);
        Ok(match kind {
            0 => Self::Count(u8::from_le_bytes(cursor.array(WHAT)?).into()),
            1 => whole(i8::from_le_bytes(cursor.array(WHAT)?).into()),
            2 => Self::Count(u16::from_le_bytes(cursor.array(WHAT)?).into()),
            3 => whole(i16::from_le_bytes(cursor.array(WHAT)?).into()),
            4 => Self::Count(cursor.u32(WHAT)?.into()),
            5 => whole(i32::from_le_bytes(cursor.array(WHAT)?).into()),
            6 => Self::Number(f32::from_le_bytes(cursor.array(WHAT)?).into()),
            7 => Self::Flag(cursor.array(WHAT)? != [0u8]),
            TEXT => Self::Text(cursor.text(WHAT)?.to_owned()),
            10 => Self::Count(cursor.u64(WHAT)?),
            11 => whole(i64::from_le_bytes(cursor.array(WHAT)?)),
            12 => Self::Number(f64::from_le_bytes(cursor.array(WHAT)?)),
            found => return Err(GgufError::ValueType { key: key.into(), found }),
        })
    }

    pub(super) const fn as_count(&self) -> Option<u64> {
        if let Self::Count(number) = self { Some(*number) } else { None }
    }

    pub(super) const fn as_number(&self) -> Option<f64> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Count(number) => Some(*number as f64),
            Self::Negative(number) => Some(*number as f64),
            _ => None,
        }
    }

    pub(super) fn as_text(&self) -> Option<&str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    pub(super) const fn as_flag(&self) -> Option<bool> {
        if let Self::Flag(flag) = self { Some(*flag) } else { None }
    }
}

impl GgufArray {
    /// The elements, read from the file's `bytes`; `None` when they are no texts.
    pub(super) fn texts<'a>(&self, bytes: &'a [u8]) -> Option<Vec<&'a str>> {
        let mut cursor = Cursor::at(bytes, self.position);
        let mut next = |_| cursor.text("a text of an array").ok();
        if self.kind == TEXT { (0..self.count).map(&mut next).collect() } else { None }
    }

    /// The elements, read from the file's `bytes`; `None` when they are no numbers.
    pub(super) fn numbers(&self, bytes: &[u8]) -> Option<Vec<f64>> {
        let mut cursor = Cursor::at(bytes, self.position);
        width(self.kind)?;
        let mut next = |_| GgufValue::scalar(&mut cursor, "", self.kind).ok()?.as_number();
        (0..self.count).map(&mut next).collect()
    }
}

/// Bytes of a value of a type that has a fixed width.
const fn width(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

const TEXT: u32 = 8;
const ARRAY: u32 = 9;

//! Models in several files, as `llama-gguf-split` makes them: `NAME-00001-of-00003.gguf` has what is said about the model, and every
//! part has some of its tensors.

use std::path::{Path, PathBuf};

use super::{GgufError, GgufHeader};

/// The name of a part, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartName {
    stem: String,
    /// Which it is, from one.
    pub number: u32,
    /// How many there are.
    pub count: u32,
}

/// What a file says of the parts that it is one of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Split {
    /// Which it is, from zero.
    number: u64,
    count: u64,
    /// Of all parts together.
    tensors: Option<u64>,
}

impl PartName {
    /// Takes a file's name, or a path that ends in it, apart; `None` when it is not named as parts are.
    pub fn parse(name: &str) -> Option<Self> {
        let extension = name.len().checked_sub(EXTENSION.len())?;
        let rest = name.get(..extension).filter(|_| name[extension..].eq_ignore_ascii_case(EXTENSION))?;
        let (rest, count) = numbered(rest, "-of-")?;
        let (stem, number) = numbered(rest, "-")?;
        (1..=count).contains(&number).then(|| Self { stem: stem.to_owned(), number, count })
    }

    /// What stands before the numbers.
    pub fn stem(&self) -> &str {
        &self.stem
    }

    /// The names of all parts, in order.
    pub fn all(&self) -> impl Iterator<Item = String> {
        (1..=self.count).map(|number| format!("{}-{number:05}-of-{:05}{EXTENSION}", self.stem, self.count))
    }
}

/// What stands before `mark` and the five digits at the end of `text`, and their number.
fn numbered<'a>(text: &'a str, mark: &str) -> Option<(&'a str, u32)> {
    let (rest, digits) = text.split_at_checked(text.len().checked_sub(DIGITS)?)?;
    let number = digits.bytes().all(|digit| digit.is_ascii_digit()).then(|| digits.parse().ok())??;
    Some((rest.strip_suffix(mark)?, number))
}

impl Split {
    /// What a header says; `None` when it is the whole.
    pub(super) fn of(header: &GgufHeader) -> Result<Option<Self>, GgufError> {
        let Some(count) = header.count(COUNT)?.filter(|count| 1 < *count) else { return Ok(None) };
        let number = header.count(NUMBER)?.ok_or_else(|| GgufError::Missing { key: NUMBER.into() })?;
        Ok(Some(Self { number, count, tensors: header.count(TENSORS)? }))
    }

    /// Where the other parts of the file at `path` are, in order.
    ///
    /// # Errors
    ///
    /// When it is not the first one, or is not named as it is.
    pub(super) fn others(&self, path: &Path) -> Result<Vec<PathBuf>, GgufError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let named = PartName::parse(&name).filter(|named| u64::from(named.count) == self.count);
        let Some(named) = named else { return Err(GgufError::PartName { count: self.count }) };
        if self.number != 0 || named.number != 1 {
            let first = named.all().next().unwrap_or_default();
            return Err(GgufError::NotFirst {
                number: self.number.saturating_add(1),
                count: self.count,
                first,
            });
        }
        Ok(named.all().skip(1).map(|name| path.with_file_name(name)).collect())
    }

    /// Checks that a header is that of part `number`, from zero, of the same model.
    pub(super) fn check_part(&self, number: u64, part: &GgufHeader) -> Result<(), GgufError> {
        if part.count(NUMBER)? != Some(number) {
            return Err(GgufError::wrong(NUMBER, format!("{number}, as the part of this name")));
        }
        if part.count(COUNT)? != Some(self.count) {
            return Err(GgufError::wrong(COUNT, format!("{}, as in the first part", self.count)));
        }
        Ok(())
    }

    /// Checks that all parts together have as many tensors as they say.
    pub(super) fn check_whole(&self, tensors: usize) -> Result<(), GgufError> {
        if self.tensors.is_some_and(|wanted| wanted != tensors as u64) {
            return Err(GgufError::wrong(TENSORS, format!("{tensors}, which its parts have together")));
        }
        Ok(())
    }
}

const EXTENSION: &str = ".gguf";
const DIGITS: usize = 5;
const NUMBER: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts_are_taken_apart() {
        #[rustfmt::skip]
        let rows = [
            ("the first",           "m-Q4_0-00001-of-00003.gguf",   Some(("m-Q4_0", 1, 3))),
            ("in a folder",         "q/m-00002-of-00002.GGUF",      Some(("q/m", 2, 2))),
            ("a whole",             "m-Q4_0.gguf",                  None),
            ("four digits",         "m-0001-of-0003.gguf",          None),
            ("beyond the last",     "m-00004-of-00003.gguf",        None),
            ("none",                "m-00000-of-00003.gguf",        None),
            ("no number",           "m-+0001-of-00003.gguf",        None),
            ("another extension",   "m-00001-of-00003.bin",         None),
            ("of many bytes",       "m-0000é-of-00003.gguf",        None),
            ("only an extension",   ".gguf",                        None),
        ];
        for (row, name, expected) in rows {
            let found = PartName::parse(name);
            let found = found.as_ref().map(|name| (name.stem(), name.number, name.count));
            assert_eq!(found, expected, "{row}");
        }
        let names: Vec<String> = PartName::parse("q/m-00002-of-00002.gguf").expect("a part").all().collect();
        assert_eq!(names, ["q/m-00001-of-00002.gguf", "q/m-00002-of-00002.gguf"]);
    }
}

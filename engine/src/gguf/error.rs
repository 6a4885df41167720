//! Why a GGUF file cannot be read.

use std::io;

use super::tensor_type::TensorType;

/// What is wrong with a GGUF file.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// It cannot be opened.
    #[error("it cannot be opened")]
    Open(#[source] io::Error),
    /// Another part of a model in several files cannot be read.
    #[error("its part {file} cannot be read")]
    Part {
        /// Which.
        file: String,
        /// What is wrong with it.
        source: Box<Self>,
    },
    /// A part by whose name the others cannot be found.
    #[error(
        "it is one of {count} parts, which are found by their names: this one has to end in -00001-of-{count:05}.gguf"
    )]
    PartName {
        /// How many there are.
        count: u64,
    },
    /// Not the part that says what the model is.
    #[error("it is part {number} of {count}; name the first one, {first}")]
    NotFirst {
        /// Which it is, from one.
        number: u64,
        /// How many there are.
        count: u64,
        /// The first one's name.
        first: String,
    },
    /// It is something else.
    #[error("it does not begin with the letters GGUF")]
    Magic,
    /// It is too old, too new, or of a big-endian machine.
    #[error("it is of version {found}; versions 2 and 3 are read, of little-endian numbers")]
    Version {
        /// What it says.
        found: u32,
    },
    /// It ends too early.
    #[error("it has {file} bytes and ends within {what}, which begins at {position}")]
    Cut {
        /// What would have come.
        what: &'static str,
        /// Where that begins.
        position: usize,
        /// Bytes of the file.
        file: usize,
    },
    /// A text is none.
    #[error("{what} at {position} is not UTF-8")]
    Utf8 {
        /// Which text.
        what: &'static str,
        /// Where it begins.
        position: usize,
    },
    /// A value is of a type that does not exist.
    #[error("`{key}` is of type {found}, which does not exist")]
    ValueType {
        /// The value's key.
        key: String,
        /// Number of the type.
        found: u32,
    },
    /// Arrays in arrays.
    #[error("`{key}` is an array of arrays, which no model needs")]
    Nested {
        /// The value's key.
        key: String,
    },
    /// Two of one name.
    #[error("`{name}` is there twice")]
    Twice {
        /// The name.
        name: String,
    },
    /// A tensor of too many dimensions.
    #[error("tensor `{name}` has {found} dimensions; at most 4 are read")]
    Dimensions {
        /// The tensor.
        name: String,
        /// How many.
        found: u32,
    },
    /// A tensor that no memory could hold.
    #[error("tensor `{name}` has more elements than can be")]
    Size {
        /// The tensor.
        name: String,
    },
    /// A tensor's data begins where it must not.
    #[error("tensor `{name}` begins at {offset}, no multiple of {alignment}")]
    Alignment {
        /// The tensor.
        name: String,
        /// Where.
        offset: u64,
        /// What the file's alignment is.
        alignment: usize,
    },
    /// A tensor's data is not all there.
    #[error("tensor `{name}` goes beyond the {file} bytes of the file: is the download complete?")]
    Beyond {
        /// The tensor.
        name: String,
        /// Bytes of the file.
        file: usize,
    },
    /// A tensor's rows do not end where a block ends.
    #[error("tensor `{name}` has rows of {row} elements, no multiple of the {elements} in a block of {kind}")]
    PartOfBlock {
        /// The tensor.
        name: String,
        /// Its type.
        kind: TensorType,
        /// Elements of a row.
        row: usize,
        /// Elements of a block.
        elements: usize,
    },
    /// A tensor that is needed is not there.
    #[error("there is no tensor `{name}`")]
    NoTensor {
        /// The tensor.
        name: String,
    },
    /// A value that is needed is not there.
    #[error("there is no value `{key}`")]
    Missing {
        /// The value's key.
        key: String,
    },
    /// A value is not what it has to be.
    #[error("`{key}` is not {expected}")]
    Wrong {
        /// The value's key.
        key: String,
        /// What would be right.
        expected: String,
    },
    /// A value asks for something that this engine does not have.
    #[error("`{key}` is {found}, which is not supported; supported: {supported}")]
    Unsupported {
        /// The value's key.
        key: String,
        /// What it asks for.
        found: String,
        /// What it could ask for.
        supported: String,
    },
}

impl GgufError {
    /// The error that `key` is not what it has to be.
    pub fn wrong(key: &str, expected: impl Into<String>) -> Self {
        Self::Wrong { key: key.into(), expected: expected.into() }
    }
}

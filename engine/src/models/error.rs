//! Why a model could not be loaded.
//!
//! Nothing here is retried: whoever reads the message has to change a file or a flag, so every variant names the file
//! and the field or tensor in it.

use std::io;

use tidemill_kernels::cuda::CudaError;

use crate::gguf::GgufError;

/// A model that was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The device does not take the weights.
    #[error("the weights cannot be put on the GPU")]
    Device {
        /// What it says.
        #[source]
        source: CudaError,
    },
    /// A file is not there or cannot be read.
    #[error("cannot read {file}")]
    Read {
        /// The file, with its folder where there is one.
        file: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file is not JSON.
    #[error("{file} is not valid JSON")]
    Json {
        /// The file.
        file: String,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A field that has no default is not there.
    #[error("{file}: field `{field}` is missing")]
    MissingField {
        /// The file.
        file: String,
        /// The field, with dots where it is inside another.
        field: String,
    },
    /// A field is there and cannot be what it says.
    #[error("{file}: field `{field}` must be {expected}, found {found}")]
    BadField {
        /// The file.
        file: String,
        /// The field, with dots where it is inside another.
        field: String,
        /// What would be right.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A field asks for something that this engine does not have.
    #[error("{file}: `{field}` is {found}, which is not supported; supported: {supported}")]
    Unsupported {
        /// The file.
        file: String,
        /// The field.
        field: String,
        /// What it asks for.
        found: String,
        /// What it could ask for.
        supported: String,
    },
    /// The model is of a family that this engine does not know.
    #[error("unknown architecture {found}; supported: {supported}")]
    UnknownArchitecture {
        /// What `architectures` says.
        found: String,
        /// All that are known.
        supported: String,
    },
    /// A file of weights cannot be understood, because it is cut short, for instance.
    #[error("{file} is not a valid safetensors file")]
    Weights {
        /// The file.
        file: String,
        /// What is wrong with it.
        #[source]
        source: safetensors::SafeTensorError,
    },
    /// A GGUF file cannot be understood, or asks for what is not supported.
    #[error("{file} cannot be read as GGUF")]
    Gguf {
        /// The file.
        file: String,
        /// What is wrong with it.
        #[source]
        source: GgufError,
    },
    /// A part of a quantised tensor is missing or not what the configuration says.
    #[error("tensor `{tensor}` cannot be unpacked: {reason}")]
    Packed {
        /// The part.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor cannot be cut as ranks would need it.
    #[error("tensor `{tensor}` cannot be cut for --tensor-parallel-size: {reason}")]
    Shared {
        /// The tensor.
        tensor: String,
        /// What stands against it.
        reason: String,
    },
    /// Threads that read the weights cannot be kept to the cores that will compute with them.
    #[error("reading weights on cores {cores:?} failed")]
    Cores {
        /// The cores.
        cores: Vec<usize>,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The configuration asks for tensors that no file holds.
    #[error("{file} lacks {count} tensors that its configuration asks for: {names}")]
    MissingTensors {
        /// The file, or the index of the files.
        file: String,
        /// How many.
        count: usize,
        /// Their names, the first few.
        names: String,
    },
    /// The files hold tensors that the configuration has no place for: the answers would be wrong without them.
    #[error("{file} holds {count} tensors that its configuration has no place for: {names}")]
    UnexpectedTensors {
        /// The file, or the index of the files.
        file: String,
        /// How many.
        count: usize,
        /// Their names, the first few.
        names: String,
    },
    /// A tensor's shape is not what the configuration says.
    #[error("tensor `{tensor}`: the configuration asks for shape {expected:?}, found {found:?}")]
    WrongShape {
        /// The tensor.
        tensor: String,
        /// Shape by the configuration, rows first.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A tensor is stored in a type that this engine does not read.
    #[error("tensor `{tensor}` is stored as {found}; supported: {supported}")]
    WrongDtype {
        /// The tensor.
        tensor: String,
        /// Type in the file.
        found: String,
        /// What would be read.
        supported: String,
    },
    /// The operations refuse the model's shape.
    #[error("this model's shape cannot be computed: {reason}")]
    Shape {
        /// What they refuse.
        reason: String,
    },
}

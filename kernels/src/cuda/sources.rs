//! The kernels as they are written, which the binary carries.

use super::{ComputeCapability, hopper};

/// A file of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Module {
    /// Name of the file without `.cu`: [`Launch::module`](super::Launch::module).
    pub name: &'static str,
    /// What is in it.
    pub source: &'static str,
}

impl Module {
    /// Whether a GPU has the instructions of the file.
    pub fn is_for(&self, capability: ComputeCapability) -> bool {
        capability == hopper::CAPABILITY || !self.name.starts_with("hopper_")
    }
}

macro_rules! modules {
    ($($name:literal),*) => {
        /// All files of kernels.
        pub const MODULES: &[Module] =
            &[$(Module { name: $name, source: include_str!(concat!("../../cu/", $name, ".cu")) }),*];
    };
}

macro_rules! headers {
    ($($name:literal),*) => {
        /// Name and text of what they include.
        pub const HEADERS: &[(&str, &str)] = &[$(($name, include_str!(concat!("../../cu/", $name)))),*];
    };
}

modules!(
    "activation",
    "attention",
    "convert",
    "digest",
    "embedding",
    "hopper_attention",
    "hopper_product",
    "join",
    "matrix_product",
    "normalize",
    "product",
    "prompt_attention",
    "quantized_product",
    "rotary",
    "sampling"
);
headers!(
    "device.cuh",
    "e4m3.cuh",
    "hopper.cuh",
    "instructions.cuh",
    "kv.cuh",
    "matrix_tiles.cuh",
    "product.cuh",
    "prompt_attention.cuh",
    "tensor_core.cuh"
);

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::BTreeSet, fs};

    #[test]
    fn every_file_is_carried() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/cu");
        let names = fs::read_dir(folder)
            .expect("the folder is there")
            .map(|entry| entry.expect("can be read").file_name().into_string().expect("names are text"));
        let there: BTreeSet<String> =
            names.filter(|name| name.ends_with(".cu") || name.ends_with(".cuh")).collect();
        let modules = MODULES.iter().map(|module| format!("{}.cu", module.name));
        let carried: BTreeSet<String> =
            modules.chain(HEADERS.iter().map(|(name, _)| (*name).to_owned())).collect();
        assert_eq!(carried, there);
    }

    #[test]
    fn what_hopper_alone_has_is_for_hopper() {
        let count =
            |major, minor| MODULES.iter().filter(|it| it.is_for(ComputeCapability { major, minor })).count();
        assert_eq!(count(9, 0), MODULES.len());
        for (major, minor) in [(8, 0), (8, 9), (10, 0), (12, 0)] {
            assert_eq!(count(major, minor), MODULES.len() - 2, "{major}.{minor}");
        }
    }
}

//! Where fixtures lie.

use std::path::{Path, PathBuf};

/// The folder of this package.
pub fn tests_folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The folder of the small random model `name`.
pub fn model(name: &str) -> PathBuf {
    tests_folder().join("fixtures/models").join(name)
}

/// The names of all small random models that can be served, in order.
pub fn models() -> Vec<String> {
    let folder = tests_folder().join("fixtures/models");
    let entries = std::fs::read_dir(&folder).expect("the fixtures are part of the repository");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.join("goldens.safetensors").exists())
        .map(|path| path.file_name().expect("a folder has a name").to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert!(!names.is_empty(), "no model in {}", folder.display());
    names
}

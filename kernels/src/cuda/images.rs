//! Kernels as a GPU runs them: compiled once and kept on disk.
//!
//! A file's name has a hash of all that its contents depend on, and a file begins with a hash of what follows, so that whatever was cut
//! off, changed or written by something else is compiled again. Files are written under another name first, because several workers
//! start at the same time.

use super::{
    ComputeCapability, CudaError, CudaVersion, hopper,
    sources::{HEADERS, Module},
};
use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicUsize, Ordering},
};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// What makes images of sources.
pub trait Compiler {
    /// Its own version.
    fn version(&self) -> CudaVersion;

    /// The image of a module.
    ///
    /// # Errors
    ///
    /// [`CudaError::Compile`], and what keeps the compiler from working at all.
    fn compile(&self, module: &Module, options: &[String]) -> Result<Vec<u8>, CudaError>;
}

/// Images for one kind of GPU.
#[derive(Debug)]
pub struct Images {
    folder: Option<PathBuf>,
    capability: ComputeCapability,
    compiled: AtomicUsize,
}

impl Images {
    /// Kept in a folder, which need not be there, or nowhere.
    pub const fn new(folder: Option<PathBuf>, capability: ComputeCapability) -> Self {
        Self { folder, capability, compiled: AtomicUsize::new(0) }
    }

    /// The folder of this user: `tidemill/kernels` in `$XDG_CACHE_HOME`, or in `~/.cache`.
    pub fn usual_folder() -> Option<PathBuf> {
        // The specification says that what is not absolute is to be ignored.
        let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
        Some(cache.join("tidemill/kernels"))
    }

    /// The kind of GPU that they are for.
    pub const fn capability(&self) -> ComputeCapability {
        self.capability
    }

    /// How many were compiled, and not found on disk.
    pub fn compiled(&self) -> usize {
        self.compiled.load(Ordering::Relaxed)
    }

    /// The image of a module. A disk that takes nothing costs time at the next start, and is no error.
    ///
    /// # Errors
    ///
    /// What the compiler says.
    pub fn image(&self, module: &Module, compiler: &dyn Compiler) -> Result<Vec<u8>, CudaError> {
        let ComputeCapability { major, minor } = self.capability;
        // With what only this one has and none after it.
        let alone = if self.capability == hopper::CAPABILITY { "a" } else { "" };
        let architecture = format!("sm_{major}{minor}{alone}");
        let options = vec![
            format!("--gpu-architecture={architecture}"),
            "--std=c++17".to_owned(),
            "--no-source-include".to_owned(),
        ];
        let key = key(module, &options, compiler.version());
        let file =
            self.folder.as_ref().map(|it| it.join(format!("{}-{architecture}-{key:032x}", module.name)));
        if let Some(image) = file.as_deref().and_then(read) {
            return Ok(image);
        }
        let image = compiler.compile(module, &options)?;
        self.compiled.fetch_add(1, Ordering::Relaxed);
        if let Some(file) = file {
            // The next start compiles again.
            drop(write(&file, &image));
        }
        Ok(image)
    }
}

/// A hash of everything that an image depends on.
fn key(module: &Module, options: &[String], version: CudaVersion) -> u128 {
    let mut hash = Xxh3::new();
    let mut part = |text: &str| {
        // With its length, so that no two lists of parts are the same bytes.
        hash.update(&(text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    };
    part(module.source);
    HEADERS.iter().for_each(|(name, text)| [name, text].into_iter().for_each(|it| part(it)));
    options.iter().for_each(|option| part(option));
    part(&version.to_string());
    hash.digest128()
}

/// What is in a file, if it is whole.
fn read(file: &Path) -> Option<Vec<u8>> {
    let bytes = fs::read(file).ok()?;
    let (hash, image) = bytes.split_first_chunk()?;
    (u128::from_le_bytes(*hash) == xxh3_128(image) && !image.is_empty()).then(|| image.to_vec())
}

fn write(file: &Path, image: &[u8]) -> io::Result<()> {
    let folder = file.parent().expect("a file lies in a folder");
    fs::create_dir_all(folder)?;
    let mut bytes = xxh3_128(image).to_le_bytes().to_vec();
    bytes.extend(image);
    // Threads of one process write different files.
    let unfinished = file.with_extension(process::id().to_string());
    let outcome = fs::write(&unfinished, bytes).and_then(|()| fs::rename(&unfinished, file));
    if outcome.is_err() {
        drop(fs::remove_file(&unfinished));
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::sources::MODULES;

    /// An image is what it was made of.
    struct Imitation {
        version: CudaVersion,
        fails: bool,
    }

    impl Compiler for Imitation {
        fn version(&self) -> CudaVersion {
            self.version
        }

        fn compile(&self, module: &Module, options: &[String]) -> Result<Vec<u8>, CudaError> {
            if self.fails {
                return Err(CudaError::Compile { module: module.name.to_owned(), log: "no".to_owned() });
            }
            Ok(format!("{} {} {options:?}", module.name, self.version).into_bytes())
        }
    }

    const VERSION: CudaVersion = CudaVersion { major: 13, minor: 0 };
    const COMPILER: Imitation = Imitation { version: VERSION, fails: false };
    const CAPABILITY: ComputeCapability = ComputeCapability { major: 9, minor: 0 };

    fn images(folder: &Path) -> Images {
        Images::new(Some(folder.join("not there yet")), CAPABILITY)
    }

    fn only_file(images: &Images) -> PathBuf {
        let folder = images.folder.as_ref().expect("kept on disk");
        let files: Vec<PathBuf> =
            fs::read_dir(folder).expect("was made").map(|entry| entry.expect("can be read").path()).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        files[0].clone()
    }

    #[test]
    fn an_image_is_compiled_once() {
        let folder = tempfile::tempdir().expect("there is room");
        let (first, second) = (images(folder.path()), images(folder.path()));
        let image = first.image(&MODULES[0], &COMPILER).expect("compiles");
        let text = String::from_utf8(image.clone()).expect("is text");
        assert_eq!(
            text,
            "activation 13.0 [\"--gpu-architecture=sm_90a\", \"--std=c++17\", \"--no-source-include\"]"
        );
        assert_eq!(second.image(&MODULES[0], &COMPILER), Ok(image));
        assert_eq!((first.compiled(), second.compiled()), (1, 0));
        only_file(&first);
    }

    #[test]
    fn what_is_broken_on_disk_is_compiled_again() {
        type Damage = fn(&[u8]) -> Vec<u8>;
        let rows: [(&str, Damage); 5] = [
            ("nothing", |_| Vec::new()),
            ("cut off in the hash", |bytes| bytes[..7].to_vec()),
            ("cut off", |bytes| bytes[..bytes.len() - 1].to_vec()),
            ("nothing but its hash", |_| xxh3_128(&[]).to_le_bytes().to_vec()),
            ("another byte", |bytes| {
                let mut bytes = bytes.to_vec();
                bytes[20] ^= 1;
                bytes
            }),
        ];
        for (name, damage) in rows {
            let folder = tempfile::tempdir().expect("there is room");
            let images = images(folder.path());
            let image = images.image(&MODULES[0], &COMPILER).expect("compiles");
            let file = only_file(&images);
            let whole = fs::read(&file).expect("was written");
            fs::write(&file, damage(&whole)).expect("there is room");
            assert_eq!(images.image(&MODULES[0], &COMPILER), Ok(image), "{name}");
            assert_eq!(images.compiled(), 2, "{name}");
            assert_eq!(fs::read(only_file(&images)).expect("was written"), whole, "{name}: mended");
        }
    }

    #[test]
    fn whatever_an_image_depends_on_makes_another() {
        let [a, b] = [&MODULES[0], &MODULES[1]];
        let other_source = Module { name: a.name, source: b.source };
        let options = |text: &str| vec![text.to_owned()];
        let keys = [
            key(a, &options("x"), VERSION),
            key(b, &options("x"), VERSION),
            key(&other_source, &options("y"), VERSION),
            key(a, &options("y"), VERSION),
            key(a, &[], VERSION),
            key(a, &["".into(), "x".into()], VERSION),
            key(a, &options("x"), CudaVersion { major: 13, minor: 1 }),
        ];
        for (index, key) in keys.iter().enumerate() {
            assert!(!keys[..index].contains(key), "{index}");
        }
    }

    #[test]
    fn what_does_not_compile_is_not_kept() {
        let folder = tempfile::tempdir().expect("there is room");
        let images = images(folder.path());
        let broken = Imitation { version: VERSION, fails: true };
        let error = images.image(&MODULES[0], &broken).expect_err("does not compile");
        assert_eq!(error.to_string(), "activation.cu does not compile:\nno");
        images.image(&MODULES[0], &COMPILER).expect("compiles");
        assert_eq!(images.compiled(), 1);
    }

    #[test]
    fn a_disk_that_takes_nothing_is_no_error() {
        let file = tempfile::NamedTempFile::new().expect("there is room");
        // A folder cannot be made in a file.
        for folder in [None, Some(file.path().join("kernels"))] {
            let images = Images::new(folder, CAPABILITY);
            for compiled in [1, 2] {
                images.image(&MODULES[0], &COMPILER).expect("compiles");
                assert_eq!(images.compiled(), compiled);
            }
        }
    }
}

//! NVIDIA's compiler as a library (NVRTC), found at run time.

use crate::cuda::{
    CudaError, CudaVersion,
    images::Compiler,
    sources::{HEADERS, Module},
};
use cudarc::nvrtc::sys::{self as nvrtc, nvrtcProgram, nvrtcResult};
use std::{
    ffi::{CStr, CString},
    ptr,
};

/// The library, which is there.
#[derive(Clone, Copy, Debug)]
pub struct Nvrtc {
    version: CudaVersion,
}

impl Nvrtc {
    /// Finds it where the loader finds libraries.
    ///
    /// # Errors
    ///
    /// [`CudaError::NoCompiler`].
    pub fn open() -> Result<Self, CudaError> {
        // SAFETY: loads a library of NVIDIA's by its name, or of whoever has set the loader's path.
        if !unsafe { nvrtc::is_culib_present() } {
            let reason = "libnvrtc.so was not found: install CUDA, or `pip install nvidia-cuda-nvrtc`, and name its folder in \
                          LD_LIBRARY_PATH";
            return Err(CudaError::NoCompiler { reason: reason.to_owned() });
        }
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the library is there; it writes two numbers.
        let result = unsafe { nvrtc::nvrtcVersion(&raw mut major, &raw mut minor) };
        if result != nvrtcResult::NVRTC_SUCCESS {
            return Err(CudaError::NoCompiler { reason: format!("nvrtcVersion: {result:?}") });
        }
        let number = |it: i32| u32::try_from(it).unwrap_or(0);
        Ok(Self { version: CudaVersion { major: number(major), minor: number(minor) } })
    }
}

impl Compiler for Nvrtc {
    fn version(&self) -> CudaVersion {
        self.version
    }

    fn compile(&self, module: &Module, options: &[String]) -> Result<Vec<u8>, CudaError> {
        let failed = |log: String| CudaError::Compile { module: module.name.to_owned(), log };
        let program =
            Program::new(module).map_err(|result| failed(format!("nvrtcCreateProgram: {result:?}")))?;
        let options: Vec<CString> = options.iter().map(|option| c_string(option)).collect();
        let options: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        let count = i32::try_from(options.len()).expect("a few options");
        // SAFETY: the program is there until `drop`; there are so many options, which end with zero and live until the call returns.
        let result = unsafe { nvrtc::nvrtcCompileProgram(program.0, count, options.as_ptr()) };
        if result != nvrtcResult::NVRTC_SUCCESS {
            return Err(failed(program.log().unwrap_or_else(|| format!("nvrtcCompileProgram: {result:?}"))));
        }
        program.image().map_err(|result| failed(format!("nvrtcGetCUBIN: {result:?}")))
    }
}

/// What is compiled.
///
/// # Invariant
///
/// Came from `nvrtcCreateProgram` and is destroyed by `drop` alone.
struct Program(nvrtcProgram);

impl Program {
    fn new(module: &Module) -> Result<Self, nvrtcResult> {
        let (source, name) = (c_string(module.source), c_string(&format!("{}.cu", module.name)));
        let headers: Vec<(CString, CString)> =
            HEADERS.iter().map(|(name, text)| (c_string(name), c_string(text))).collect();
        let names: Vec<_> = headers.iter().map(|(name, _)| name.as_ptr()).collect();
        let texts: Vec<_> = headers.iter().map(|(_, text)| text.as_ptr()).collect();
        let count = i32::try_from(headers.len()).expect("a few headers");
        let mut program = ptr::null_mut();
        // SAFETY: all texts end with zero and live until the call returns, which copies them; there are so many headers.
        let result = unsafe {
            nvrtc::nvrtcCreateProgram(
                &raw mut program,
                source.as_ptr(),
                name.as_ptr(),
                count,
                texts.as_ptr(),
                names.as_ptr(),
            )
        };
        if result == nvrtcResult::NVRTC_SUCCESS { Ok(Self(program)) } else { Err(result) }
    }

    fn log(&self) -> Option<String> {
        let mut bytes = 0;
        // SAFETY: the program is there by the invariant; the callee writes a number.
        let result = unsafe { nvrtc::nvrtcGetProgramLogSize(self.0, &raw mut bytes) };
        let mut log = vec![0u8; bytes];
        if result != nvrtcResult::NVRTC_SUCCESS || bytes == 0 {
            return None;
        }
        // SAFETY: as above; there is as much room as the callee asked for.
        let result = unsafe { nvrtc::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast()) };
        let text = CStr::from_bytes_until_nul(&log).ok()?.to_string_lossy().trim().to_owned();
        (result == nvrtcResult::NVRTC_SUCCESS && !text.is_empty()).then_some(text)
    }

    fn image(&self) -> Result<Vec<u8>, nvrtcResult> {
        let mut bytes = 0;
        // SAFETY: the program is there by the invariant; the callee writes a number.
        let result = unsafe { nvrtc::nvrtcGetCUBINSize(self.0, &raw mut bytes) };
        if result != nvrtcResult::NVRTC_SUCCESS {
            return Err(result);
        }
        let mut image = vec![0u8; bytes];
        // SAFETY: as above; there is as much room as the callee asked for.
        let result = unsafe { nvrtc::nvrtcGetCUBIN(self.0, image.as_mut_ptr().cast()) };
        if result == nvrtcResult::NVRTC_SUCCESS { Ok(image) } else { Err(result) }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: there by the invariant, and used by nobody after this. What it says changes nothing any more.
        unsafe { nvrtc::nvrtcDestroyProgram(&raw mut self.0) };
    }
}

fn c_string(text: &str) -> CString {
    CString::new(text).expect("our sources, names and options have no zero byte")
}

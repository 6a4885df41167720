//! Our kernels on a GPU: compiled, loaded, found by name.

use super::{compiler::Nvrtc, raw::check, tensor_map};
use crate::cuda::{
    CudaError, Launch,
    images::{Compiler, Images},
    sources::MODULES,
};
use cudarc::driver::sys::{
    self, CUfunction, CUfunction_attribute as Attribute, CUgraphExec, CUgraphNode, CUmodule, CUresult,
    CUstream,
};
use std::{
    collections::BTreeMap,
    ffi::{CString, c_void},
    ptr, thread,
};

/// All modules, loaded before anything is captured, which loading might disturb.
#[derive(Debug)]
pub(super) struct Modules {
    loaded: BTreeMap<&'static str, LoadedModule>,
    functions: BTreeMap<&'static str, CUfunction>,
    /// Shared memory that a block can have at most.
    shared_bytes: u32,
}

#[derive(Debug)]
struct LoadedModule(CUmodule);

impl Modules {
    /// In the context that the caller's thread has entered.
    pub(super) fn load(images: &Images, shared_bytes: u32) -> Result<Self, CudaError> {
        let compiler = Nvrtc::open()?;
        let modules: Vec<_> = MODULES.iter().filter(|it| it.is_for(images.capability())).collect();
        let compiled: Vec<_> = thread::scope(|scope| {
            let compile = |module| scope.spawn(move || images.image(module, &compiler as &dyn Compiler));
            let threads: Vec<_> = modules.iter().copied().map(compile).collect();
            threads.into_iter().map(|it| it.join().expect("a compiler returns")).collect()
        });
        let mut loaded = BTreeMap::new();
        for (module, image) in modules.into_iter().zip(compiled) {
            loaded.insert(module.name, LoadedModule::new(&image?)?);
        }
        Ok(Self { loaded, functions: BTreeMap::new(), shared_bytes })
    }

    /// Asks a stream for a launch.
    pub(super) fn launch(&mut self, launch: &Launch, stream: CUstream) -> Result<(), CudaError> {
        let function = self.function(launch)?;
        let ([x, y, z], [threads_x, threads_y, threads_z]) = (launch.grid, launch.block);
        let words = launch.encoded(tensor_map::encode)?;
        let mut parameters = [words.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: the function is of a module that is loaded until `drop`. It takes one structure, which the driver copies from
        // where the only parameter points to, aligned as 64-bit numbers are. What the kernel does with addresses in it concerns
        // the device's memory alone.
        let result = unsafe {
            sys::cuLaunchKernel(
                function,
                x,
                y,
                z,
                threads_x,
                threads_y,
                threads_z,
                launch.shared_bytes,
                stream,
                parameters.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        match result {
            CUresult::CUDA_SUCCESS => Ok(()),
            failed => {
                let name = format!("{failed:?}");
                Err(CudaError::Launch { kernel: launch.kernel, code: failed as i32, name })
            }
        }
    }

    /// Gives a recorded launch another grid and other parameters.
    pub(super) fn update(
        &mut self,
        graph: CUgraphExec,
        node: CUgraphNode,
        launch: &Launch,
    ) -> Result<(), CudaError> {
        let function = self.function(launch)?;
        let ([x, y, z], [threads_x, threads_y, threads_z]) = (launch.grid, launch.block);
        let words = launch.encoded(tensor_map::encode)?;
        let mut parameters = [words.as_ptr().cast_mut().cast::<c_void>()];
        let node_parameters = sys::CUDA_KERNEL_NODE_PARAMS {
            func: function,
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: threads_x,
            blockDimY: threads_y,
            blockDimZ: threads_z,
            sharedMemBytes: launch.shared_bytes,
            kernelParams: parameters.as_mut_ptr(),
            extra: ptr::null_mut(),
            kern: ptr::null_mut(),
            ctx: ptr::null_mut(),
        };
        // SAFETY: the caller has the graph, of which the node is one; the parameters are as in `launch`.
        let result =
            unsafe { sys::cuGraphExecKernelNodeSetParams_v2(graph, node, &raw const node_parameters) };
        check("cuGraphExecKernelNodeSetParams_v2", result)
    }

    fn function(&mut self, launch: &Launch) -> Result<CUfunction, CudaError> {
        if let Some(&function) = self.functions.get(launch.kernel) {
            return Ok(function);
        }
        let module = self.loaded.get(launch.module);
        let module =
            module.unwrap_or_else(|| panic!("{}: there is no module {}", launch.kernel, launch.module));
        let function = module.function(launch.kernel)?;
        allow_all_shared_memory(function, self.shared_bytes)?;
        self.functions.insert(launch.kernel, function);
        Ok(function)
    }
}

impl LoadedModule {
    fn new(image: &[u8]) -> Result<Self, CudaError> {
        let mut module = ptr::null_mut();
        // SAFETY: an image says itself how long it is, and comes whole from the compiler, or from a file that its hash has proven.
        let result = unsafe { sys::cuModuleLoadData(&raw mut module, image.as_ptr().cast()) };
        check("cuModuleLoadData", result).map(|()| Self(module))
    }

    fn function(&self, name: &'static str) -> Result<CUfunction, CudaError> {
        let text = CString::new(name).expect("a kernel's name has no zero byte");
        let mut function = ptr::null_mut();
        // SAFETY: loaded until `drop`; the name ends with zero; writes a handle.
        let result = unsafe { sys::cuModuleGetFunction(&raw mut function, self.0, text.as_ptr()) };
        match result {
            CUresult::CUDA_SUCCESS => Ok(function),
            failed => {
                let error = format!("{failed:?}");
                Err(CudaError::Launch { kernel: name, code: failed as i32, name: error })
            }
        }
    }
}

impl Drop for LoadedModule {
    fn drop(&mut self) {
        // SAFETY: loaded by `new`, used by nobody after this.
        drop(check("cuModuleUnload", unsafe { sys::cuModuleUnload(self.0) }));
    }
}

/// Beyond 48 KiB a kernel gets dynamic shared memory only when that was said before.
fn allow_all_shared_memory(function: CUfunction, shared_bytes: u32) -> Result<(), CudaError> {
    let mut declared = 0;
    // SAFETY: the function's module is loaded; writes a number.
    let result = unsafe {
        sys::cuFuncGetAttribute(&raw mut declared, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
    };
    check("cuFuncGetAttribute", result)?;
    let rest = i32::try_from(shared_bytes).unwrap_or(0) - declared;
    // SAFETY: the function's module is loaded.
    let result = unsafe {
        sys::cuFuncSetAttribute(
            function,
            Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            rest.max(0),
        )
    };
    check("cuFuncSetAttribute", result)
}

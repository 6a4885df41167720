//! cuBLASLt, found at run time: large products of matrices.
//!
//! Its matrices are column by column, so that `x`, `w` and `out` are, as it sees them, transposed: it is asked for `outᵀ = w xᵀ`. Which of
//! its kernels is best for a product is asked once. Only those are taken that sum up in one piece, so that a row is the same whatever the
//! library thinks of the number of rows.

use super::raw::check;
use crate::{
    cuda::{CudaError, DeviceAddress, MatrixProduct, Product},
    matrix::WeightDtype,
};
use cudarc::{
    cublaslt::sys::{
        self, cublasComputeType_t as Compute, cublasLtEpilogue_t as Epilogue, cublasLtHandle_t,
        cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t as Attribute,
        cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreference_t,
        cublasLtMatmulPreferenceAttributes_t as Wish, cublasLtMatrixLayout_t, cublasStatus_t as Status,
        cudaDataType,
    },
    driver::sys::{CUresult, CUstream, cuMemAlloc_v2, cuMemFree_v2},
};
use std::{collections::HashMap, ffi::c_void, mem::MaybeUninit, ptr};

/// The library, with memory for its kernels to work in.
///
/// # Invariant
///
/// `handle` came from `cublasLtCreate` and is destroyed by `drop` alone; `workspace` likewise of `cuMemAlloc_v2`.
#[derive(Debug)]
pub(super) struct Library {
    // Before the handle.
    chosen: HashMap<Shape, Option<Chosen>>,
    handle: cublasLtHandle_t,
    workspace: u64,
    version: usize,
}

/// What the choice of a kernel depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    dtype: WeightDtype,
    to_f32: bool,
    rows: u32,
    inputs: u32,
    outputs: u32,
    has_bias: bool,
}

/// A kernel of the library, and how it is asked.
#[derive(Debug)]
struct Chosen {
    operation: Operation,
    w: Layout,
    x: Layout,
    out: Layout,
    kernel: cublasLtMatmulAlgo_t,
}

/// # Invariant
///
/// Came from `cublasLtMatmulDescCreate` and is destroyed by `drop` alone.
#[derive(Debug)]
struct Operation(cublasLtMatmulDesc_t);

/// # Invariant
///
/// Came from `cublasLtMatrixLayoutCreate` and is destroyed by `drop` alone.
#[derive(Debug)]
struct Layout(cublasLtMatrixLayout_t);

/// # Invariant
///
/// Came from `cublasLtMatmulPreferenceCreate` and is destroyed by `drop` alone.
struct Preference(cublasLtMatmulPreference_t);

impl Library {
    /// Finds it where the loader finds libraries, in the context that the caller's thread has entered. Else says why not.
    pub(super) fn open() -> Result<Self, String> {
        // SAFETY: loads a library of NVIDIA's by its name, or of whoever has set the loader's path.
        if !unsafe { sys::is_culib_present() } {
            return Err("libcublasLt.so was not found".to_owned());
        }
        // SAFETY: the library is there; has no other condition.
        let version = unsafe { sys::cublasLtGetVersion() };
        if version < OLDEST {
            return Err(format!("cuBLASLt {} is too old", version_name(version)));
        }
        let mut handle = ptr::null_mut();
        // SAFETY: writes a handle.
        let created = unsafe { sys::cublasLtCreate(&raw mut handle) };
        if created != Status::CUBLAS_STATUS_SUCCESS {
            return Err(format!("cuBLASLt {}: {created:?}", version_name(version)));
        }
        let mut library = Self { chosen: HashMap::new(), handle, workspace: 0, version };
        // SAFETY: writes an address.
        let taken = unsafe { cuMemAlloc_v2(&raw mut library.workspace, WORKSPACE) };
        match taken {
            CUresult::CUDA_SUCCESS => Ok(library),
            failed => Err(format!("no {WORKSPACE} bytes of the GPU's memory for cuBLASLt: {failed:?}")),
        }
    }

    /// For people.
    pub(super) fn name(&self) -> String {
        format!("cuBLASLt {}", version_name(self.version))
    }

    /// Asks a stream for a product; `false` where the library has no kernel for it.
    pub(super) fn multiply(&mut self, product: &MatrixProduct, stream: CUstream) -> Result<bool, CudaError> {
        let Product { out, x, w, bias, rows, inputs, outputs, adds } = product.product;
        let has_bias = bias != DeviceAddress::NULL;
        let MatrixProduct { dtype, to_f32, .. } = *product;
        let shape = Shape { dtype, to_f32, rows, inputs, outputs, has_bias };
        if MOST_CHOSEN <= self.chosen.len() && !self.chosen.contains_key(&shape) {
            self.chosen.clear();
        }
        if !self.chosen.contains_key(&shape) {
            let chosen = self.choose(shape)?;
            self.chosen.insert(shape, chosen);
        }
        let Some(chosen) = &self.chosen[&shape] else { return Ok(false) };
        if has_bias {
            chosen.operation.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias.0)?;
        }
        let (one, before) = (1.0_f32, if adds == 0 { 0.0_f32 } else { 1.0 });
        // SAFETY: handle, operation and layouts are there until they are dropped, and say sizes of what the addresses point to, which
        // concerns the device's memory alone. Both factors are on the host, as the operation says, and are read before the call returns.
        // The kernel was chosen for these layouts and at most so much memory to work in, which only this stream uses.
        let result = unsafe {
            sys::cublasLtMatmul(
                self.handle,
                chosen.operation.0,
                (&raw const one).cast(),
                device(w),
                chosen.w.0,
                device(x),
                chosen.x.0,
                (&raw const before).cast(),
                device(out),
                chosen.out.0,
                device(out).cast_mut(),
                chosen.out.0,
                &raw const chosen.kernel,
                device(DeviceAddress(self.workspace)).cast_mut(),
                WORKSPACE,
                stream.cast(),
            )
        };
        status("cublasLtMatmul", result).map(|()| true)
    }

    /// The kernel that the library takes for the best, if it has any.
    fn choose(&self, shape: Shape) -> Result<Option<Chosen>, CudaError> {
        let Shape { dtype, to_f32, rows, inputs, outputs, has_bias } = shape;
        let [rows, inputs, outputs] = [rows, inputs, outputs].map(u64::from);
        let operation = Operation::new(has_bias)?;
        let w = Layout::new(kind(dtype), inputs, outputs)?;
        let x = Layout::new(kind(dtype), inputs, rows)?;
        let out = Layout::new(kind(if to_f32 { WeightDtype::F32 } else { dtype }), outputs, rows)?;
        let preference = Preference::new()?;
        preference.set(Wish::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE)?;
        let in_one_piece = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE as u32;
        preference.set(Wish::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &in_one_piece)?;
        let mut found = MaybeUninit::<cublasLtMatmulHeuristicResult_t>::zeroed();
        let mut count = 0;
        // SAFETY: all were made by this library and are there; it writes at most one result, and how many.
        let result = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                operation.0,
                w.0,
                x.0,
                out.0,
                out.0,
                preference.0,
                1,
                found.as_mut_ptr(),
                &raw mut count,
            )
        };
        if result == Status::CUBLAS_STATUS_NOT_SUPPORTED {
            return Ok(None);
        }
        status("cublasLtMatmulAlgoGetHeuristic", result)?;
        if count == 0 {
            return Ok(None);
        }
        // SAFETY: plain numbers, written by the library; where it wrote none of them they are zero, which is one of each.
        let found = unsafe { found.assume_init() };
        Ok(Some(Chosen { operation, w, x, out, kernel: found.algo }))
    }
}

impl Operation {
    /// The first matrix is transposed, the second is as it comes; sums in f32.
    fn new(has_bias: bool) -> Result<Self, CudaError> {
        let mut operation = ptr::null_mut();
        let (compute, scale) = (Compute::CUBLAS_COMPUTE_32F, cudaDataType::CUDA_R_32F);
        // SAFETY: writes a handle.
        let result = unsafe { sys::cublasLtMatmulDescCreate(&raw mut operation, compute, scale) };
        status("cublasLtMatmulDescCreate", result)?;
        let operation = Self(operation);
        operation.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        if has_bias {
            let epilogue = Epilogue::CUBLASLT_EPILOGUE_BIAS as u32;
            operation.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        }
        Ok(operation)
    }

    fn set<T: Copy>(&self, attribute: Attribute, value: &T) -> Result<(), CudaError> {
        let (value, bytes) = (ptr::from_ref(value).cast::<c_void>(), size_of::<T>());
        // SAFETY: there by the invariant; the callee reads so many bytes, and refuses another number than the attribute has.
        let result = unsafe { sys::cublasLtMatmulDescSetAttribute(self.0, attribute, value, bytes) };
        status("cublasLtMatmulDescSetAttribute", result)
    }
}

impl Layout {
    /// Column by column, one behind the other.
    fn new(kind: cudaDataType, rows: u64, columns: u64) -> Result<Self, CudaError> {
        let mut layout = ptr::null_mut();
        let stride = i64::try_from(rows).expect("32 bits");
        // SAFETY: writes a handle.
        let result = unsafe { sys::cublasLtMatrixLayoutCreate(&raw mut layout, kind, rows, columns, stride) };
        status("cublasLtMatrixLayoutCreate", result).map(|()| Self(layout))
    }
}

impl Preference {
    fn new() -> Result<Self, CudaError> {
        let mut preference = ptr::null_mut();
        // SAFETY: writes a handle.
        let result = unsafe { sys::cublasLtMatmulPreferenceCreate(&raw mut preference) };
        status("cublasLtMatmulPreferenceCreate", result).map(|()| Self(preference))
    }

    fn set<T: Copy>(&self, wish: Wish, value: &T) -> Result<(), CudaError> {
        let (value, bytes) = (ptr::from_ref(value).cast::<c_void>(), size_of::<T>());
        // SAFETY: there by the invariant; the callee reads so many bytes, and refuses another number than the wish has.
        let result = unsafe { sys::cublasLtMatmulPreferenceSetAttribute(self.0, wish, value, bytes) };
        status("cublasLtMatmulPreferenceSetAttribute", result)
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        self.chosen.clear();
        if self.workspace != 0 {
            // SAFETY: taken by `open`, used by nobody after this.
            drop(check("cuMemFree_v2", unsafe { cuMemFree_v2(self.workspace) }));
        }
        // SAFETY: made by `open`, used by nobody after this.
        drop(status("cublasLtDestroy", unsafe { sys::cublasLtDestroy(self.handle) }));
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: there by the invariant, used by nobody after this.
        drop(status("cublasLtMatmulDescDestroy", unsafe { sys::cublasLtMatmulDescDestroy(self.0) }));
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: there by the invariant, used by nobody after this.
        drop(status("cublasLtMatrixLayoutDestroy", unsafe { sys::cublasLtMatrixLayoutDestroy(self.0) }));
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: there by the invariant, used by nobody after this.
        let result = unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
        drop(status("cublasLtMatmulPreferenceDestroy", result));
    }
}

/// What a call says.
fn status(call: &'static str, result: Status) -> Result<(), CudaError> {
    match result {
        Status::CUBLAS_STATUS_SUCCESS => Ok(()),
        failed => Err(CudaError::Call { call, code: failed as i32, name: format!("{failed:?}") }),
    }
}

const fn kind(dtype: WeightDtype) -> cudaDataType {
    match dtype {
        WeightDtype::F32 => cudaDataType::CUDA_R_32F,
        WeightDtype::F16 => cudaDataType::CUDA_R_16F,
        WeightDtype::Bf16 => cudaDataType::CUDA_R_16BF,
    }
}

/// A place in the device's memory, which nobody here reads.
fn device(address: DeviceAddress) -> *const c_void {
    ptr::without_provenance(usize::try_from(address.0).expect("an address of this machine"))
}

fn version_name(version: usize) -> String {
    // Of the library 13 on, as of 11 and 12: major * 10000 + minor * 100 + patch.
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// `CUBLAS_OP_T`
const TRANSPOSED: i32 = 1;
/// What NVIDIA advises for Hopper; older GPUs want less.
const WORKSPACE: usize = 32 << 20;
/// The library of CUDA 12.
const OLDEST: usize = 120_000;
/// Shapes whose kernels are kept: prompts end in chunks of any length.
const MOST_CHOSEN: usize = 4096;

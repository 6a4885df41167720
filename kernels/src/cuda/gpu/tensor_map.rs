//! Tensor maps as the driver encodes them for its devices.

use super::raw::check;
use crate::cuda::{CudaError, TensorMap};
use cudarc::driver::sys::{
    self, CUtensorMap, CUtensorMapDataType as DataType, CUtensorMapFloatOOBfill as Fill,
    CUtensorMapInterleave as Interleave, CUtensorMapL2promotion as Promotion, CUtensorMapSwizzle as Swizzle,
};
use std::ptr;

/// What kernels take for a map.
pub(super) fn encode(map: &TensorMap) -> Result<[u64; 16], CudaError> {
    let (sizes, tile, strides) = map.dimensions();
    let sizes: Vec<u64> = sizes.iter().map(|&size| size.into()).collect();
    let every_one = vec![1; tile.len()];
    let swizzle = if map.is_swizzled() {
        Swizzle::CU_TENSOR_MAP_SWIZZLE_128B
    } else {
        Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE
    };
    let first =
        ptr::without_provenance_mut(usize::try_from(map.first().0).expect("an address of this machine"));
    let mut encoded = CUtensorMap { opaque: [0; 16] };
    // SAFETY: the lists are as long as the number of dimensions says, strides by one shorter; the callee writes one map, and
    // keeps the address, of memory that kernels use, without using it.
    let result = unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut encoded,
            // Elements are copied as they are, whatever numbers they mean.
            DataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
            tile.len() as u32,
            first,
            sizes.as_ptr(),
            strides.as_ptr(),
            tile.as_ptr(),
            every_one.as_ptr(),
            Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    check("cuTensorMapEncodeTiled", result).map(|()| encoded.opaque)
}

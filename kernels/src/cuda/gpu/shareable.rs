//! Memory of a GPU that other processes can be given.
//!
//! It is made by CUDA's calls for virtual memory, of which the kernel can make a dma-buf for network devices too. The memory itself lives until
//! the last share of it is given back, so whoever gives back first leaves nobody with memory that is somebody else's.

use super::{
    raw::{Device, check},
    state::State,
};
use crate::cuda::{CudaError, DeviceAddress, DeviceIdentity};
use cudarc::driver::sys::{
    self, CUdevice_attribute as Attribute, CUmemAccess_flags, CUmemAccessDesc,
    CUmemAllocationGranularity_flags, CUmemAllocationHandleType, CUmemAllocationProp, CUmemAllocationType,
    CUmemGenericAllocationHandle, CUmemLocation, CUmemLocationType, CUresult,
};
use std::{
    ffi::c_int,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
};

/// A share of such memory, mapped here.
#[derive(Debug)]
pub(super) struct Shareable {
    // In the order in which they are undone.
    mapping: Mapping,
    handle: Handle,
}

/// Addresses, and what lies at them.
#[derive(Debug)]
struct Mapping {
    address: u64,
    bytes: usize,
    is_mapped: bool,
}

/// A share of memory.
#[derive(Debug)]
struct Handle(CUmemGenericAllocationHandle);

impl Shareable {
    /// Takes memory of a GPU whose context the calling thread has entered.
    pub(super) fn new(device: Device, bytes: usize) -> Result<Self, CudaError> {
        for (attribute, what) in [
            (Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, "virtual memory management"),
            (
                Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
                "descriptors of memory",
            ),
        ] {
            if device.attribute(attribute)? == 0 {
                return Err(CudaError::NotShareable { reason: format!("this GPU has no {what}") });
            }
        }
        let properties = properties(device)?;
        let size = whole_pages(&properties, bytes)?;
        let mut handle = 0;
        // SAFETY: writes a handle, from properties that are all set.
        match unsafe { sys::cuMemCreate(&raw mut handle, size, &raw const properties, 0) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(CudaError::OutOfMemory { bytes }),
            result => {
                check_sharing("cuMemCreate", result).and_then(|()| Self::map(Handle(handle), size, device))
            }
        }
    }

    /// Takes a share of what another process has exported.
    pub(super) fn import(
        device: Device,
        memory: &OwnedFd,
        bytes: usize,
        of: DeviceIdentity,
    ) -> Result<Self, CudaError> {
        let unreachable = |reason: &str| CudaError::Unreachable { reason: reason.to_owned() };
        let owner =
            Device::by_identity(of)?.ok_or_else(|| unreachable("this process does not see that GPU"))?;
        if owner != device && !device.reaches(owner)? {
            return Err(unreachable("no way from one GPU to the other (cuDeviceCanAccessPeer)"));
        }
        let size = whole_pages(&properties(owner)?, bytes)?;
        let descriptor = ptr::without_provenance_mut(memory.as_raw_fd() as usize);
        let mut handle = 0;
        // SAFETY: writes a handle; for this kind of handle the second argument is a descriptor and no address.
        let result = unsafe { sys::cuMemImportFromShareableHandle(&raw mut handle, descriptor, DESCRIPTOR) };
        check("cuMemImportFromShareableHandle", result)?;
        Self::map(Handle(handle), size, device)
    }

    fn map(handle: Handle, bytes: usize, device: Device) -> Result<Self, CudaError> {
        let mut address = 0;
        // SAFETY: writes an address.
        let result = unsafe { sys::cuMemAddressReserve(&raw mut address, bytes, 0, 0, 0) };
        check("cuMemAddressReserve", result)?;
        let mut mapping = Mapping { address, bytes, is_mapped: false };
        // SAFETY: addresses that were just reserved, and memory of that size, which the driver checks.
        check("cuMemMap", unsafe { sys::cuMemMap(address, bytes, 0, handle.0, 0) })?;
        mapping.is_mapped = true;
        let access = CUmemAccessDesc {
            location: location(device),
            flags: CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: what was just mapped; one description.
        check("cuMemSetAccess", unsafe { sys::cuMemSetAccess(address, bytes, &raw const access, 1) })?;
        Ok(Self { mapping, handle })
    }

    pub(super) const fn address(&self) -> DeviceAddress {
        DeviceAddress(self.mapping.address)
    }

    /// To be passed to another process.
    pub(super) fn export(&self) -> Result<OwnedFd, CudaError> {
        let mut descriptor: c_int = -1;
        let room = (&raw mut descriptor).cast();
        // SAFETY: for this kind of handle the room is that of a descriptor.
        let result = unsafe { sys::cuMemExportToShareableHandle(room, self.handle.0, DESCRIPTOR, 0) };
        check_sharing("cuMemExportToShareableHandle", result)?;
        // SAFETY: just opened for us, and for nobody else.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }
}

impl State {
    pub(super) fn allocate_shareable(
        &mut self,
        device: Device,
        bytes: usize,
    ) -> Result<DeviceAddress, CudaError> {
        self.check_not_recording("an allocation");
        assert!(0 < bytes, "an allocation of no bytes");
        Shareable::new(device, bytes).map(|memory| self.keep(memory))
    }

    pub(super) fn import(
        &mut self,
        device: Device,
        memory: &OwnedFd,
        bytes: usize,
        of: DeviceIdentity,
    ) -> Result<DeviceAddress, CudaError> {
        Shareable::import(device, memory, bytes, of).map(|memory| self.keep(memory))
    }

    fn keep(&mut self, memory: Shareable) -> DeviceAddress {
        let address = memory.address();
        self.shareable.insert(address.0, memory);
        address
    }

    pub(super) fn shareable(&self, address: DeviceAddress) -> &Shareable {
        let found = self.shareable.get(&address.0);
        found.unwrap_or_else(|| panic!("export of memory at {address:?} that is not shareable"))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.is_mapped {
            // SAFETY: mapped by `map`, and nothing that was asked for uses it, as the driver's contract says of memory that is given back.
            drop(check("cuMemUnmap", unsafe { sys::cuMemUnmap(self.address, self.bytes) }));
        }
        // SAFETY: reserved by `map`, with nothing mapped there any more.
        drop(check("cuMemAddressFree", unsafe { sys::cuMemAddressFree(self.address, self.bytes) }));
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made or imported, and given back once.
        drop(check("cuMemRelease", unsafe { sys::cuMemRelease(self.0) }));
    }
}

fn properties(device: Device) -> Result<CUmemAllocationProp, CudaError> {
    let mut allocation = sys::CUmemAllocationProp_st__bindgen_ty_1 {
        compressionType: 0,
        gpuDirectRDMACapable: 0,
        usage: 0,
        reserved: [0; 4],
    };
    allocation.gpuDirectRDMACapable = u8::from(device.attribute(RDMA_CAPABLE)? != 0);
    Ok(CUmemAllocationProp {
        type_: CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: DESCRIPTOR,
        location: location(device),
        win32HandleMetaData: ptr::null_mut(),
        allocFlags: allocation,
    })
}

const fn location(device: Device) -> CUmemLocation {
    CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device.0 }
}

/// Both sides come to the same number, from the same bytes.
fn whole_pages(properties: &CUmemAllocationProp, bytes: usize) -> Result<usize, CudaError> {
    let mut page = 0;
    let kind = CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
    // SAFETY: writes a number, from properties that are all set.
    let result = unsafe { sys::cuMemGetAllocationGranularity(&raw mut page, properties, kind) };
    check_sharing("cuMemGetAllocationGranularity", result)?;
    bytes.checked_next_multiple_of(page.max(1)).ok_or(CudaError::OutOfMemory { bytes })
}

/// The driver may have the call, and not do it here.
fn check_sharing(call: &'static str, result: CUresult) -> Result<(), CudaError> {
    check(call, result).map_err(|error| CudaError::NotShareable { reason: error.to_string() })
}

const DESCRIPTOR: CUmemAllocationHandleType =
    CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
const RDMA_CAPABLE: Attribute = Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED;

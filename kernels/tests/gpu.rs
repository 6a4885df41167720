//! What needs no GPU of a GPU's driver: that it is not there is said, and the compiler works where it is.

use std::{env, fs, path::Path, process::Command};
use tidemill_kernels::cuda::{
    ComputeCapability, CudaError, DeviceIdentity, Properties,
    gpu::{Gpu, Nvrtc},
    images::Images,
    sources::{MODULES, Module},
};

#[test]
fn without_a_driver_there_is_an_error_and_no_panic() {
    match Gpu::all() {
        Ok(devices) => {
            let count = u32::try_from(devices.len()).expect("a few");
            assert_eq!(Gpu::open(count, None).unwrap_err(), CudaError::NoDevice { index: count, count });
        }
        Err(error) => {
            assert!(
                matches!(error, CudaError::NoDriver { .. } | CudaError::DriverTooOld { .. }),
                "{error:?}"
            );
            assert_eq!(Gpu::open(0, None).unwrap_err(), error);
        }
    }
}

#[test]
fn gpus_without_our_instructions_are_refused() {
    for ((major, minor), good) in
        [((7, 0), false), ((7, 5), false), ((8, 0), true), ((9, 0), true), ((12, 0), true)]
    {
        let properties = Properties {
            name: "a GPU".to_owned(),
            compute_capability: ComputeCapability { major, minor },
            multiprocessors: 1,
            memory_bandwidth: 0,
            shared_bytes: 0,
            identity: DeviceIdentity::default(),
        };
        let outcome = Gpu::check(&properties).map_err(|error| error.to_string());
        let expected = format!("a GPU has compute capability {major}.{minor}; 8.0 or newer is needed");
        assert_eq!(outcome, if good { Ok(()) } else { Err(expected) });
    }
}

/// Drivers that are not what we need, as small libraries of their own; the library is found once in a process, so each has one.
#[test]
fn drivers_that_are_of_no_use_say_why() {
    const NO_GPU: &str = "int cuInit(unsigned flags) { return 100; }";
    const STUB: &str = "int cuInit(unsigned flags) { return 34; }";
    const OLD: &str = "int cuInit(unsigned flags) { return 0; } int cuDriverGetVersion(int* version) { *version = 12020; return 0; }";
    // Libraries of CUDA's that anybody could load, and none of the compiler.
    const WITHOUT_A_COMPILER: &str = "int cuInit(unsigned flags) { return 0; }
        int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
        int cuDeviceGetCount(int* count) { *count = 1; return 0; }
        int cuDeviceGet(int* device, int index) { *device = index; return 0; }
        int cuDeviceGetName(char* name, int bytes, int device) { name[0] = 'X'; name[1] = 0; return 0; }
        int cuDeviceGetUuid_v2(char* uuid, int device) { for (int i = 0; i < 16; i++) uuid[i] = 0; return 0; }
        int cuDeviceGetAttribute(int* value, int which, int device) { *value = which == 75 ? 9 : 1; return 0; }
        int cuDevicePrimaryCtxRetain(void** context, int device) { *context = &device; return 0; }
        int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
        int cuCtxSetCurrent(void* context) { return 0; }";
    let rows = [
        ("no GPU", NO_GPU, "there is no GPU 0: the driver sees 0"),
        ("a stub", STUB, "no driver for NVIDIA GPUs: cuInit says CUDA_ERROR_STUB_LIBRARY"),
        (
            "an old one",
            OLD,
            "the NVIDIA driver is for CUDA 12.2; CUDA 12.3 or newer is needed: update the driver",
        ),
        (
            "no compiler",
            WITHOUT_A_COMPILER,
            "no compiler for CUDA kernels: libnvrtc.so was not found: install CUDA, or `pip install nvidia-cuda-nvrtc`, and name its \
             folder in LD_LIBRARY_PATH",
        ),
    ];
    // Where the system itself has a compiler, nobody can be without one.
    let has_compiler = Nvrtc::open().is_ok();
    for (name, source, expected) in rows.into_iter().filter(|row| !has_compiler || row.0 != "no compiler") {
        let folder = tempfile::tempdir().expect("there is room");
        let file = folder.path().join("driver.c");
        fs::write(&file, source).expect("there is room");
        let library = folder.path().join("libcuda.so");
        let status = Command::new("cc").args(["-shared", "-o"]).args([&library, &file]).status();
        assert!(status.expect("there is a C compiler").success(), "{name}");
        assert_eq!(opened(folder.path()), expected, "{name}");
    }
}

/// What several GPUs would exchange numbers by, as small libraries of their own.
#[test]
fn a_library_for_several_gpus_is_found_at_run_time() {
    let functions = ["GetErrorString", "GetUniqueId", "CommInitRank", "CommAbort", "CommDestroy"];
    let functions = functions.into_iter().chain(["AllReduce", "AllGather", "Broadcast"]);
    let functions: String = functions.map(|name| format!("void nccl{name}(void) {{}}\n")).collect();
    let version = "int ncclGetVersion(int* version) { *version = 22703; return 0; }\n";
    let missing = "none: several GPUs need NCCL: libnccl.so.2 was not found: `pip install nvidia-nccl-cu13`, and name its folder in \
                   LD_LIBRARY_PATH";
    let rows = [
        ("all it takes", format!("{functions}{version}"), "NCCL 2.27.3"),
        ("another library of that name", version.to_owned(), missing),
    ];
    for (name, source, expected) in rows {
        let folder = tempfile::tempdir().expect("there is room");
        let file = folder.path().join("exchange.c");
        fs::write(&file, source).expect("there is room");
        let library = folder.path().join("libnccl.so.2");
        let status = Command::new("cc").args(["-shared", "-w", "-o"]).args([&library, &file]).status();
        assert!(status.expect("there is a C compiler").success(), "{name}");
        let said = said_by("say_what_several_gpus_exchange_by", folder.path());
        assert_eq!(said, expected, "{name}");
    }
}

#[test]
#[ignore = "needs a library of its own: `a_library_for_several_gpus_is_found_at_run_time` runs it"]
fn say_what_several_gpus_exchange_by() {
    println!("GPU 0: {}", Gpu::exchange_library().unwrap_or_else(|reason| format!("none: {reason}")));
}

/// What another process with these libraries says of GPU 0.
fn opened(libraries: &Path) -> String {
    said_by("say_what_opening_comes_to", libraries)
}

fn said_by(test: &str, libraries: &Path) -> String {
    let this = env::current_exe().expect("this test is a file");
    let output = Command::new(this)
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", libraries)
        .output()
        .expect("it can be run again");
    let text = String::from_utf8(output.stdout).expect("is text");
    let line = text.lines().find_map(|line| line.split_once("GPU 0: "));
    line.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr))).1.to_owned()
}

#[test]
#[ignore = "needs a driver of its own: `drivers_that_are_of_no_use_say_why` runs it"]
fn say_what_opening_comes_to() {
    println!("GPU 0: {}", Gpu::open(0, None).expect_err("the drivers of this test have no GPU"));
}

#[test]
#[ignore = "needs libnvrtc: `kernels/cu/check` has it, and runs this"]
fn the_compiler_compiles_every_kernel_once() {
    let compiler = Nvrtc::open().expect("asked for where it is");
    let folder = tempfile::tempdir().expect("there is room");
    for (major, minor) in [(8, 0), (9, 0)] {
        let capability = ComputeCapability { major, minor };
        let images = || Images::new(Some(folder.path().to_owned()), capability);
        let (first, second) = (images(), images());
        let modules: Vec<&Module> = MODULES.iter().filter(|it| it.is_for(capability)).collect();
        for &module in &modules {
            let image = first.image(module, &compiler).expect("our kernels compile");
            // An image is an ELF file that has its kernels by name.
            assert_eq!(&image[..4], b"\x7fELF", "{}", module.name);
            for kernel in kernels(module) {
                let there = image.windows(kernel.len()).any(|part| part == kernel.as_bytes());
                assert!(there, "{} of {}", kernel, module.name);
            }
            assert_eq!(second.image(module, &compiler), Ok(image));
        }
        assert_eq!((first.compiled(), second.compiled()), (modules.len(), 0));
    }
}

#[test]
#[ignore = "needs libnvrtc: `kernels/cu/check` has it, and runs this"]
fn what_the_compiler_says_is_passed_on() {
    let compiler = Nvrtc::open().expect("asked for where it is");
    let module = Module { name: "wrong", source: "#include \"device.cuh\"\nnothing_of_the_kind x;\n" };
    let images = Images::new(None, ComputeCapability { major: 9, minor: 0 });
    let error = images.image(&module, &compiler).expect_err("is wrong").to_string();
    assert!(error.starts_with("wrong.cu does not compile:\nwrong.cu(2): error: "), "{error}");
    assert!(error.contains("nothing_of_the_kind"), "{error}");
    let images = Images::new(None, ComputeCapability { major: 99, minor: 0 });
    let error = images.image(&MODULES[0], &compiler).expect_err("no such GPU").to_string();
    assert!(error.contains("gpu-architecture"), "{error}");
}

fn kernels(module: &Module) -> Vec<&str> {
    let lines = module.source.lines().filter_map(|line| line.strip_prefix("KERNEL("));
    let names: Vec<&str> = lines.filter_map(|line| line.split(',').next()).collect();
    assert!(!names.is_empty(), "{} has kernels", module.name);
    names
}

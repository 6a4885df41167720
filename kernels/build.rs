//! Compiles the CUDA kernels for the emulator, which tests ask for by the feature `emulator`. Without it nothing is compiled: the product
//! carries the kernels as they are written (`docs/decisions/0014`).

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-check-cfg=cfg(no_cpp_compiler)");
    #[cfg(feature = "emulator")]
    emulator::build();
}

#[cfg(feature = "emulator")]
mod emulator {
    use std::{env, path::Path};

    /// What CI sets, so that a machine without a C++ compiler fails there.
    const REQUIRED: &str = "TIDEMILL_REQUIRE_EMULATOR";

    pub(super) fn build() {
        println!("cargo:rerun-if-changed=cu");
        println!("cargo:rerun-if-env-changed={REQUIRED}");
        let folder = Path::new("cu/emulator");
        if let Err(error) = compiler().file(folder.join("probe.cpp")).try_compile("tidemill_probe") {
            assert!(env::var_os(REQUIRED).is_none(), "the emulator needs a C++ compiler: {error}");
            println!(
                "cargo:warning=no C++ compiler: CUDA kernels are not tested ({REQUIRED} makes it an error)"
            );
            println!("cargo:rustc-cfg=no_cpp_compiler");
            return;
        }
        // Archives are searched in this order: kernels call the emulator.
        for kernels in ["kernels", "planted"] {
            let mut build = compiler();
            build.file(folder.join(kernels).with_extension("cpp")).include("cu").flag("-fsanitize=thread");
            build.compile(&format!("tidemill_emulator_{kernels}"));
        }
        let files = ["emulator.cpp", "hopper.cpp"].map(|name| folder.join(name));
        compiler().opt_level(2).files(files).compile("tidemill_emulator");
    }

    fn compiler() -> cc::Build {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++20").opt_level(1).debug(true).warnings(true).extra_warnings(true);
        // As the reference: each product is rounded before it is added.
        build
            .flag("-ffp-contract=off")
            .flag("-fno-strict-aliasing")
            .flag("-fno-exceptions")
            .flag("-Wno-unused-function");
        build.flag("-Wno-unknown-pragmas").flag("-Werror").cargo_warnings(true);
        build
    }
}

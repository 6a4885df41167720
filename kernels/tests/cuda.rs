//! CUDA kernels agree with `reference`, whatever the order of their threads.

#[cfg(not(no_cpp_compiler))]
#[path = "cuda/agreement.rs"]
mod agreement;
#[cfg(not(no_cpp_compiler))]
mod support;

#[cfg(no_cpp_compiler)]
#[test]
#[ignore = "needs a C++ compiler, to test CUDA kernels"]
fn kernels_agree() {
    panic!("there was no C++ compiler when the tests were built");
}

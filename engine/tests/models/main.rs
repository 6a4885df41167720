//! Tests of everything between a model folder and logits, on the small models of `tests/fixtures/models`.

mod bench;
mod blocks;
tidemill_kernels::where_emulated! {
    mod cuda;
    mod cuda_ranks;
    mod hopper;
    #[path = "../support/test_gpu.rs"]
    mod test_gpu;
}
mod formats;
mod fp8;
mod loading;
mod parity;
mod quantized;
mod ranks;

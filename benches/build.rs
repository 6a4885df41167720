//! The client's side of what routers ask of workers, so that a worker can be asked without a router.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=../server/proto");
    let descriptors = protox::compile(["../server/proto/worker.proto"], ["../server/proto"])?;
    tonic_prost_build::configure().build_server(false).compile_fds(descriptors)?;
    Ok(())
}

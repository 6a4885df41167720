//! Turns `proto/worker.proto` into Rust without `protoc`, and tells the binary which commit it was built from.

use std::path::Path;
use std::process::Command;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(["proto/worker.proto"], ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    println!("cargo::rustc-env=TIDEMILL_BUILD={}", build_name());
    Ok(())
}

/// The commit for a release build, otherwise `debug`: a debug build that followed the commit would be compiled anew
/// after every one of them.
fn build_name() -> String {
    // Cargo tells build scripts about the build through the environment, there is no other way.
    #[expect(clippy::disallowed_methods)]
    let profile = std::env::var("PROFILE").unwrap_or_default();
    if profile != "release" {
        return "debug".into();
    }
    let log = Path::new("../.git/logs/HEAD");
    if log.exists() {
        println!("cargo::rerun-if-changed={}", log.display());
    }
    let git = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output();
    match git {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().into(),
        _ => "release".into(),
    }
}

//! Which crate may depend on which, and what the pure crates may not see at all.

use std::collections::BTreeSet;
use std::path::Path;
use std::process;

use serde_json::Value;

/// Allowed arrows between our packages (normal dependencies). `tests` may use anything; nothing uses `server`.
const ARROWS: [(&str, &[&str]); 10] = [
    ("tidemill-kvtransfer-proto", &[]),
    ("tidemill-kvtransfer", &["tidemill-kvtransfer-proto"]),
    ("tidemill-kernels", &[]),
    ("tidemill-engine-core", &["tidemill-kvtransfer-proto"]),
    (
        "tidemill-engine",
        &["tidemill-engine-core", "tidemill-kernels", "tidemill-kvtransfer", "tidemill-kvtransfer-proto"],
    ),
    (
        "tidemill",
        &[
            "tidemill-engine",
            "tidemill-engine-core",
            "tidemill-kernels",
            "tidemill-kvtransfer",
            "tidemill-kvtransfer-proto",
        ],
    ),
    (
        "tidemill-tests",
        &[
            "tidemill",
            "tidemill-engine",
            "tidemill-engine-core",
            "tidemill-kernels",
            "tidemill-kvtransfer",
            "tidemill-kvtransfer-proto",
        ],
    ),
    (
        "tidemill-bench",
        &[
            "tidemill-engine",
            "tidemill-engine-core",
            "tidemill-kernels",
            "tidemill-kvtransfer",
            "tidemill-kvtransfer-proto",
            "tidemill-tests",
        ],
    ),
    ("xtask", &["tidemill-engine-core"]),
    ("tidemill-fuzz", &["tidemill-kvtransfer-proto"]),
];

/// Packages whose manifest proves that they cannot do I/O: the only outside crates they may name.
const PURE: [(&str, &[&str]); 2] = [
    ("tidemill-kvtransfer-proto", &["prost", "thiserror", "xxhash-rust"]),
    ("tidemill-engine-core", &["thiserror", "xxhash-rust"]),
];

pub(super) fn check(root: &Path) -> Vec<String> {
    let output = process::Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(root)
        .output()
        .expect("cargo describes the workspace");
    let Ok(metadata) = serde_json::from_slice::<Value>(&output.stdout) else {
        return vec![format!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr))];
    };
    findings(&metadata)
}

fn findings(metadata: &Value) -> Vec<String> {
    let packages = metadata["packages"].as_array().expect("metadata lists packages");
    let name = |package: &Value| package["name"].as_str().expect("a package has a name").to_owned();
    let ours: BTreeSet<String> = packages.iter().map(name).collect();
    let mut findings = Vec::new();
    for package in packages {
        let package_name = name(package);
        let Some((_, allowed)) = ARROWS.iter().find(|(from, _)| *from == package_name) else {
            findings.push(format!("{package_name} has no row in the table of arrows"));
            continue;
        };
        let pure = PURE.iter().find(|(pure, _)| *pure == package_name);
        for dependency in package["dependencies"].as_array().expect("a package lists dependencies") {
            let to = name(dependency);
            if !dependency["kind"].is_null() {
                continue; // Tests and build scripts do not ship.
            }
            if ours.contains(&to) && !allowed.contains(&to.as_str()) {
                findings.push(format!("{package_name} may not depend on {to}"));
            }
            if let Some((_, outside)) = pure
                && !ours.contains(&to)
                && !outside.contains(&to.as_str())
            {
                findings.push(format!("{package_name} is pure and may not depend on {to}"));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn arrows_are_checked() {
        let package = |name: &str, dependencies: &[&str]| {
            let dependencies: Vec<Value> =
                dependencies.iter().map(|name| json!({"name": name, "kind": null})).collect();
            json!({"name": name, "dependencies": dependencies})
        };
        #[rustfmt::skip]
        let rows = [
            ("an allowed arrow is fine",   "tidemill-kvtransfer",       "tidemill-kvtransfer-proto", 0),
            ("an upward arrow is found",   "tidemill-kvtransfer-proto", "tidemill-kvtransfer",       1),
            ("a pure crate stays pure",    "tidemill-engine-core",      "tokio",                     1),
            ("outside crates are free",    "tidemill-kvtransfer",       "rustix",                    0),
            ("an unknown package is found", "tidemill-new",             "tidemill",                  1),
        ];
        for (row, from, to, expected) in rows {
            let mut packages = vec![package(from, &[to])];
            if to.starts_with("tidemill") {
                packages.push(package(to, &[]));
            }
            assert_eq!(findings(&json!({"packages": packages})).len(), expected, "{row}");
        }
    }
}

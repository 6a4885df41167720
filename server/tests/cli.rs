//! What the binary says to a person at a terminal, without serving anything.

use std::process::{Command, Output, Stdio};

fn tidemill(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidemill"));
    // Settings of whoever runs the tests are not ours.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TIDEMILL_") {
            command.env_remove(name);
        }
    }
    command.args(arguments).stdin(Stdio::null()).output().expect("the binary starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("the program speaks UTF-8")
}

#[test]
fn the_version_says_how_it_was_built() {
    for arguments in [["--version"].as_slice(), &["serve", "--version"]] {
        let output = tidemill(arguments);
        assert!(output.status.success(), "{arguments:?}");
        let said = text(&output.stdout);
        assert!(said.starts_with("tidemill"), "{said}");
        assert!(said.contains(env!("CARGO_PKG_VERSION")) && said.contains('('), "{said}");
    }
}

#[test]
fn help_teaches() {
    let help = |arguments: &[&str]| text(&tidemill(arguments).stdout);
    let top = help(&["--help"]);
    for command in ["serve", "worker", "route", "chat", "doctor", "completions"] {
        assert!(top.contains(command), "the overview names {command}:\n{top}");
    }
    let serve = help(&["serve", "--help"]);
    for part in
        ["Model:", "Workers:", "Engine:", "HTTP:", "Logs:", "--max-model-len", "TIDEMILL_PORT", "Examples:"]
    {
        assert!(serve.contains(part), "`serve --help` has {part}:\n{serve}");
    }
    for hidden in ["--fault-point", "--supervised"] {
        assert!(
            !serve.contains(hidden) && !help(&["worker", "--help"]).contains(hidden),
            "{hidden} is not for people"
        );
    }
}

#[test]
fn what_cannot_be_meant_is_refused_with_the_reason() {
    #[rustfmt::skip]
    let rows: [(&str, &[&str], &str); 13] = [
        ("an unknown flag",             &["serve", "--max-modle-len", "5"],             "--max-model-len"),
        ("no such command",             &["serf"],                                      "serve"),
        ("no workers at all",           &["serve", "--prefill", "0"],                   "--prefill"),
        ("more workers than sensible",  &["serve", "--decode", "1000"],                 "--decode"),
        ("half a token per block",      &["serve", "--block-size", "12"],               "1, 2, 4"),
        ("memory in parsecs",           &["serve", "--kv-cache-memory", "2parsecs"],    "2GiB"),
        ("a core that is no number",    &["serve", "--cores", "a-b"],                   "core number"),
        ("a core that is not there",    &["serve", "--port", "0", "--cores", "4095"],   "core 4095"),
        ("a missing key file",          &["serve", "--api-key-file", "/nowhere/key"],   "/nowhere/key"),
        ("cores and threads",           &["serve", "--cores", "0", "--threads", "1"],   "cannot be used with"),
        ("a worker without a role",     &["worker"],                                    "--role"),
        ("a router without workers",    &["route"],                                     "--workers"),
        ("a model that is not there",   &["serve", "./no/such/folder"],                 "no/such/folder"),
    ];
    for (name, arguments, expected) in rows {
        let output = tidemill(arguments);
        assert!(!output.status.success(), "{name} is refused");
        let said = text(&output.stderr);
        assert!(said.starts_with("error:"), "{name}: {said}");
        assert!(said.contains(expected), "{name}: `{expected}` is missing in {said}");
    }
}

#[test]
fn a_folder_without_a_model_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().to_str().expect("UTF-8");
    let output = tidemill(&["serve", path]);
    assert!(!output.status.success());
    let said = text(&output.stderr);
    assert!(said.contains(path) && said.contains("config.json"), "{said}");
}

#[test]
fn an_unknown_architecture_is_named_before_anything_starts() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("config.json"), r#"{"architectures": ["FooForCausalLM"]}"#)
        .expect("the folder is ours");
    let output = tidemill(&["serve", "--port", "0", folder.path().to_str().expect("UTF-8")]);
    assert!(!output.status.success());
    let said = text(&output.stderr);
    assert!(said.starts_with("error:"), "{said}");
    assert!(said.contains("FooForCausalLM") && said.contains("Qwen3ForCausalLM"), "{said}");
}

#[test]
fn a_worker_that_cannot_start_says_why_once() {
    let output = tidemill(&["serve", "--port", "0", "--max-model-len", "999999"]);
    assert!(!output.status.success());
    let said = text(&output.stderr);
    let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error:")).collect();
    assert_eq!(errors.len(), 1, "{said}");
    assert!(errors[0].contains("-0 cannot start") && errors[0].contains("999999 tokens"), "{said}");
}

#[test]
fn a_model_that_is_not_cached_is_not_found_offline() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let output = Command::new(env!("CARGO_BIN_EXE_tidemill"))
        .args(["serve", "nobody/nothing", "--offline"])
        .env("HF_HOME", home.path())
        .output()
        .expect("the binary starts");
    assert!(!output.status.success());
    let said = text(&output.stderr);
    assert!(said.contains("nobody/nothing") && said.contains("cache"), "{said}");
}

#[test]
fn completions_complete() {
    for shell in ["bash", "zsh", "fish"] {
        let output = tidemill(&["completions", shell]);
        assert!(output.status.success(), "{shell}");
        assert!(text(&output.stdout).contains("max-model-len"), "{shell} knows the flags");
    }
}

#[test]
fn the_doctor_reports_in_both_forms() {
    let plain = tidemill(&["doctor"]);
    assert!(plain.status.success(), "{}", text(&plain.stderr));
    assert!(!plain.stdout.is_empty());
    let json = tidemill(&["doctor", "--json"]);
    assert!(json.status.success());
    let report: serde_json::Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert!(report["findings"].as_array().is_some_and(|findings| !findings.is_empty()), "{report}");
}

#[test]
fn a_gpu_that_is_not_there_is_refused_with_the_reason() {
    for command in [&["serve"][..], &["worker", "--role", "hybrid"]] {
        let arguments: Vec<&str> = command.iter().copied().chain(["--device", "cuda:1000"]).collect();
        let output = tidemill(&arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let said = text(&output.stderr);
        assert!(said.contains("invalid value 'cuda:1000' for '--device <NAME>': "), "{said}");
        // No machine has so many; most have none.
        let reasons = [
            "no driver for NVIDIA GPUs: libcuda.so.1 was not found",
            "there is no GPU 1000: the driver sees ",
            "the NVIDIA driver is for CUDA ",
        ];
        assert!(reasons.iter().any(|reason| said.contains(reason)), "{said}");
    }
}

/// No library's folder, no home, no path: what is found there is in the binary and in the system's own places.
#[test]
fn an_empty_environment_is_enough() {
    let doctor = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidemill"));
        command.env_clear().arg("doctor").stdin(Stdio::null());
        command.output().expect("the binary starts")
    };
    let output = doctor();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    let gpus = said.lines().find(|line| line.contains(" gpus ")).expect("has a line for GPUs");
    if !std::path::Path::new("/proc/driver/nvidia").exists() {
        assert!(gpus.contains("cpu only: "), "{gpus}");
    }
}

/// A driver that sees no GPU, as a library of its own: `cuda:0` is refused with the reason, `auto` computes on the CPU.
#[test]
fn a_driver_without_a_gpu_is_no_reason_not_to_compute() {
    let folder = tempfile::tempdir().expect("there is room");
    let source = folder.path().join("driver.c");
    std::fs::write(&source, "int cuInit(unsigned flags) { return 100; }").expect("there is room");
    let library = folder.path().join("libcuda.so");
    let built = Command::new("cc").args(["-shared", "-o"]).args([&library, &source]).status();
    assert!(built.expect("there is a C compiler").success());
    let bench = |device: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidemill"));
        command.env_clear().env("LD_LIBRARY_PATH", folder.path()).stdin(Stdio::null());
        command.args([
            "bench",
            "model",
            "--shape",
            "llama-tiny",
            "--prefill-len",
            "1",
            "--decode-batch",
            "1",
        ]);
        command.args(["--runs", "1", "--threads", "1", "--json", "--device", device]);
        command.output().expect("the binary starts")
    };
    let refused = bench("cuda:0");
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused.stdout));
    let said = text(&refused.stderr);
    assert!(said.contains("for '--device <NAME>': there is no GPU 0: the driver sees 0"), "{said}");
    let computed = bench("auto");
    assert!(computed.status.success(), "{}", text(&computed.stderr));
    let report: serde_json::Value = serde_json::from_slice(&computed.stdout).expect("is JSON");
    assert_eq!(report["rows"].as_array().map(Vec::len), Some(2), "{report}");
}

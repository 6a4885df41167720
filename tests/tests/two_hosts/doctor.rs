//! `tidemill doctor` on both hosts: what the way between them is worth.

use serde_json::Value;
use tidemill_tests::two_hosts::{Host, HostProcess, Pair};

use crate::split::{LIMIT, command, start};

#[test]
#[ignore = "needs two hosts with RDMA devices: tests/rdma/run-pair"]
fn doctor_measures_the_way_to_another_host() {
    let _pair = Pair::take();
    #[rustfmt::skip]
    let rows = [
        // there   here    the way that is found, and whether it is the one that was meant
        ("tcp",    "tcp",  "tcp",  "good"),
        ("rdma",   "rdma", "rdma", "good"),
        ("tcp",    "rdma", "tcp",  "limited"),
    ];
    for (there, here, way, verdict) in rows {
        let case = format!("{there} there, {here} here");
        let mut server = serve(there);
        let before = Host::Second.rdma_packets_sent();
        let (status, said) = doctor(&["--json", "--transport", here]);
        assert_eq!(status, Some(0), "{case}: {said}");
        let report: Value =
            serde_json::from_str(&said).unwrap_or_else(|error| panic!("{case}: {error}: {said}"));
        let finding = |subject: &str| {
            let findings = report["findings"].as_array().expect("a list");
            let found = findings.iter().find(|it| it["subject"] == subject);
            found.unwrap_or_else(|| panic!("{case}: no {subject} in {said}"))
        };
        assert_eq!(
            (finding("way")["found"].as_str(), finding("way")["verdict"].as_str()),
            (Some(way), Some(verdict))
        );
        let (alone, beside) = (text(finding("handoffs")), text(finding("interference")));
        for measured in [alone, beside] {
            assert!(0.0 < number_before(measured, " GB/s in handoffs of 16 MiB"), "{case}: {measured}");
            assert!(measured.contains("for one of 16 KiB"), "{case}: {measured}");
        }
        assert!(0.0 < number_before(beside, " small TCP packets per second"), "{case}: {beside}");
        // The kernel's own count: handoffs of 16 MiB do not go unseen.
        let is_rdma = 1000 < Host::Second.rdma_packets_sent() - before;
        assert_eq!(is_rdma, way == "rdma", "{case}: by what the devices have sent");
        server.kill();
    }
}

#[test]
#[ignore = "needs two hosts with RDMA devices: tests/rdma/run-pair"]
fn doctor_prints_for_people_and_says_who_does_not_answer() {
    let _pair = Pair::take();
    let mut server = serve("auto");
    let (status, said) = doctor(&[]);
    assert_eq!(status, Some(0), "{said}");
    for part in ["ok way           rdma", "ok handoffs", "interference", "small TCP packets per second"] {
        assert!(said.contains(part), "`{part}` in {said}");
    }
    server.kill();
    let (status, said) = doctor(&[]);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("does `tidemill doctor --serve` run there?"), "{said}");
}

/// The answering side, on the second host.
fn serve(transport: &str) -> HostProcess {
    let address = format!("{}:{PORT}", Host::Second.address());
    let mut server =
        start(Host::Second, &command(&["doctor", "--serve", &address, "--transport", transport]));
    assert!(server.wait_for("answers measurements at ").starts_with(&address), "{}", server.log());
    server
}

/// The asking side, on the first host: its status, and what it said.
fn doctor(flags: &[&str]) -> (Option<i32>, String) {
    let peer = format!("{}:{PORT}", Host::Second.address());
    let mut process = start(Host::First, &command(&[&["doctor", "--peer", &peer], flags].concat()));
    // Some 400 MB of handoffs, which take their time where the processor is emulated.
    let status = process.wait(4 * LIMIT);
    (status, process.log())
}

fn text(finding: &Value) -> &str {
    finding["found"].as_str().expect("a finding is a text")
}

/// The number that stands before `words`.
fn number_before(text: &str, words: &str) -> f64 {
    let before = text.split(words).next().and_then(|before| before.split_whitespace().last());
    before
        .and_then(|number| number.parse().ok())
        .unwrap_or_else(|| panic!("a number before `{words}` in `{text}`"))
}

const PORT: u16 = 18515;

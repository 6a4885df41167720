//! `tidemill doctor --peer`: what the way to another host is worth, and whether other traffic hurts it.

use std::net::{SocketAddr, ToSocketAddrs};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Context;
use tidemill_engine::network::{self, BLOCK_BYTES, LARGE_BYTES, Measured, PairReport};

use super::Finding;
use crate::flags::{DOCTOR_PORT, TransportName};

/// Answers until the process is interrupted.
#[expect(clippy::print_stdout, reason = "the address is the program's output")]
pub(super) fn answer(address: SocketAddr, transport: TransportName) -> anyhow::Result<ExitCode> {
    let started = |address| println!("answers measurements at {address}: tidemill doctor --peer HOST:PORT");
    network::serve(address, network::choice(transport.choice()), &AtomicBool::new(false), started)?;
    Ok(ExitCode::SUCCESS)
}

/// Measures the way to `peer`.
pub(super) fn findings(peer: &str, transport: TransportName) -> anyhow::Result<Vec<Finding>> {
    let address = resolve(peer)?;
    let report = network::measure(address, network::choice(transport.choice())).with_context(|| {
        format!("the way to {address} was not measured; does `tidemill doctor --serve` run there?")
    })?;
    Ok(judge(&report))
}

fn resolve(peer: &str) -> anyhow::Result<SocketAddr> {
    // More than one colon is an address of IPv6, which has a port only behind its bracket.
    let port = peer.rsplit_once(':').filter(|(host, _)| !host.contains(':') || host.ends_with(']'));
    if let Some((_, port)) = port
        && port.parse::<u16>().is_err()
    {
        anyhow::bail!("`{port}` in `{peer}` is no port, which is a number up to {}", u16::MAX);
    }
    let addresses = peer.to_socket_addrs().or_else(|_| (peer, DOCTOR_PORT).to_socket_addrs());
    let not_found = || format!("`{peer}` is no host that can be found");
    addresses.with_context(not_found)?.next().with_context(not_found)
}

fn judge(report: &PairReport) -> Vec<Finding> {
    let way = report.transport.name();
    let way = match report.is_fallback {
        false => Finding::good("way", way),
        true => Finding::limited(
            "way",
            way,
            "a better one could not be had: `tidemill doctor` on each of the two says what is missing",
        ),
    };
    let PairReport { alone, beside_packets, packets_per_second, .. } = report;
    let beside =
        format!("{}, beside {packets_per_second:.0} small TCP packets per second", describe(beside_packets));
    let is_hurt = beside_packets.bytes_per_second < STILL_GOOD * alone.bytes_per_second
        || alone.latency.mul_f64(SLOWER) + NOISE < beside_packets.latency;
    let interference = match is_hurt {
        false => Finding::good("interference", beside),
        true => Finding::limited("interference", beside, HINT),
    };
    vec![way, Finding::good("handoffs", describe(alone)), interference]
}

fn describe(measured: &Measured) -> String {
    format!(
        "{:.2} GB/s in handoffs of {} MiB; {:?} for one of {} KiB, {:?} at worst",
        measured.bytes_per_second / 1e9,
        LARGE_BYTES >> 20,
        measured.latency,
        BLOCK_BYTES >> 10,
        measured.worst_latency
    )
}

/// Share of the bandwidth below which other traffic counts as harmful.
const STILL_GOOD: f64 = 0.8;
/// How many times slower a small handoff may become, beside what any machine's scheduler adds.
const SLOWER: f64 = 2.0;
const NOISE: Duration = Duration::from_micros(200);
const HINT: &str = "other traffic slows handoffs down: on RoCE, give RDMA a priority (PFC or ECN) of its own and keep TCP off \
                    it; over TCP, the two share the line and the processors";

#[cfg(test)]
mod tests {
    use tidemill_kvtransfer_proto::message::TransportKind;

    use super::*;
    use crate::doctor::Verdict;

    #[test]
    fn verdicts() {
        let measured = |gigabytes: f64, micros| Measured {
            bytes_per_second: gigabytes * 1e9,
            latency: Duration::from_micros(micros),
            worst_latency: Duration::from_micros(10 * micros),
        };
        #[rustfmt::skip]
        let rows = [
            ("undisturbed",                    false, measured(9.5, 60),  [Verdict::Good, Verdict::Good]),
            ("a worse way than intended",      true,  measured(9.5, 60),  [Verdict::Limited, Verdict::Good]),
            ("half the bandwidth is gone",     false, measured(5.0, 60),  [Verdict::Good, Verdict::Limited]),
            ("small handoffs take for ever",   false, measured(9.5, 900), [Verdict::Good, Verdict::Limited]),
            ("a scheduler's noise is no harm", false, measured(9.5, 250), [Verdict::Good, Verdict::Good]),
        ];
        for (name, is_fallback, beside_packets, expected) in rows {
            let alone = measured(10.0, 50);
            let transport = TransportKind::Rdma;
            let findings =
                judge(&PairReport { transport, is_fallback, alone, beside_packets, packets_per_second: 1e5 });
            assert_eq!([findings[0].verdict, findings[2].verdict], expected, "{name}");
        }
    }

    #[test]
    fn a_peer_is_a_host_with_or_without_a_port() {
        assert_eq!(
            resolve("127.0.0.1").expect("an address"),
            SocketAddr::from(([127, 0, 0, 1], DOCTOR_PORT))
        );
        assert_eq!(resolve("127.0.0.1:7").expect("an address"), SocketAddr::from(([127, 0, 0, 1], 7)));
        assert_eq!(resolve("::1").expect("an address").port(), DOCTOR_PORT);
        assert_eq!(resolve("[::1]:7").expect("an address").port(), 7);
        let rows = [
            ("no such host", "is no host that can be found"),
            ("", "is no host that can be found"),
            ("127.0.0.1:99999", "`99999` in `127.0.0.1:99999` is no port"),
            ("127.0.0.1:", "is no port"),
            ("[::1]:x", "`x` in `[::1]:x` is no port"),
        ];
        for (peer, expected) in rows {
            let error = resolve(peer).expect_err(peer).to_string();
            assert!(error.contains(expected), "{peer}: {error}");
        }
    }
}

//! Rows of what `/metrics` must say.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tidemill_kvtransfer_proto::units::BlockCount;

use tidemill_engine::handle::{DeviceWay, DeviceWays, PeerLink};

use super::*;

fn status(instance: u64, bytes: u64) -> WorkerStatusSnapshot<'static> {
    let [total, free, cached, held, reserved, quarantined] = [10, 4, 1, 3, 1, 1].map(BlockCount);
    let ledger = Ledger { total, free, cached, held, reserved, quarantined };
    let counters = Counters { handoff_bytes: bytes, ..Counters::default() };
    WorkerStatusSnapshot {
        worker: "p0",
        role: Role::Prefill,
        instance,
        running: 2,
        waiting: 3,
        ledger,
        counters,
        credit: CreditLoad { granted_bytes: 100, waiting_bytes: 70, waiting_handoffs: 2 },
    }
}

fn value(text: &str, series: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.starts_with(series))?;
    line.rsplit(' ').next()?.parse().ok()
}

#[test]
fn a_restarted_worker_adds_to_what_it_did_before() {
    let metrics = Metrics::new("m");
    metrics.record_worker_status(&status(1, 100));
    metrics.record_worker_status(&status(1, 150));
    metrics.record_worker_status(&status(2, 30));
    let text = metrics.render();
    assert_eq!(value(&text, "tidemill_handoff_bytes_total{"), Some(180.0));
}

#[test]
fn counters_are_there_before_they_count() {
    let metrics = Metrics::new("m");
    metrics.record_worker_status(&status(1, 0));
    let text = metrics.render();
    for series in [
        r#"tidemill_fallbacks_total{reason="prefill-lost"}"#,
        r#"tidemill_fallbacks_total{reason="transport"}"#,
        r#"tidemill_refusals_total{reason="busy"}"#,
        "tidemill_recovery_seconds_count",
        r#"tidemill_worker_restarts_total{worker="p0"}"#,
        r#"tidemill_handoff_duration_seconds_count{model_name="m",engine="p0"}"#,
        r#"vllm:iteration_tokens_total_count{model_name="m",engine="p0"}"#,
    ] {
        assert_eq!(value(&text, series), Some(0.0), "{series} in\n{text}");
    }
}

#[test]
fn guesses_are_counted_as_vllm_counts_them() {
    let metrics = Metrics::new("m");
    let report = |drafts, accepted_at: [u64; 2]| {
        let mut status = status(1, 0);
        let sums = &mut status.counters.speculation;
        (sums.drafts, sums.drafted, sums.held_back) = (drafts, 4 * drafts, drafts + 1);
        sums.accepted = accepted_at.iter().sum();
        sums.accepted_at[..2].copy_from_slice(&accepted_at);
        metrics.record_worker_status(&status);
    };
    report(3, [2, 0]);
    report(5, [4, 1]);
    let text = metrics.render();
    #[rustfmt::skip]
    let rows = [
        (r#"vllm:spec_decode_num_drafts_total{model_name="m",engine="p0"}"#,                                  5.0),
        (r#"vllm:spec_decode_num_draft_tokens_total{model_name="m",engine="p0"}"#,                           20.0),
        (r#"vllm:spec_decode_num_accepted_tokens_total{model_name="m",engine="p0"}"#,                         5.0),
        (r#"vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="m",engine="p0",position="0"}"#,    4.0),
        (r#"vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="m",engine="p0",position="1"}"#,    1.0),
        (r#"tidemill_spec_decode_held_back_total{worker="p0"}"#,                                              6.0),
    ];
    for (series, expected) in rows {
        assert_eq!(value(&text, series), Some(expected), "{series}\n{text}");
    }
}

#[test]
fn a_worker_is_down_until_it_reports_again() {
    let metrics = Metrics::new("m");
    let up = r#"tidemill_worker_up{worker="p0",role="prefill"}"#;
    metrics.record_worker_status(&status(1, 0));
    assert_eq!(value(&metrics.render(), up), Some(1.0));
    metrics.record_worker_down("p0", Role::Prefill);
    assert_eq!(value(&metrics.render(), up), Some(0.0));
    metrics.record_worker_status(&status(2, 0));
    assert_eq!(value(&metrics.render(), up), Some(1.0));
}

#[test]
fn each_pair_has_its_way_and_a_worse_one_is_counted_once() {
    let metrics = Metrics::new("m");
    let link = |transport: &str, bytes_per_second, is_fallback| {
        let transport = Ok(transport.to_owned());
        let (to_peer, from_peer) = (Ok(()), Ok(()));
        vec![PeerLink {
            name: "d0".into(),
            instance: 7,
            transport,
            bytes_per_second,
            is_fallback,
            to_peer,
            from_peer,
            devices: DeviceWays::default(),
        }]
    };
    let gone = vec![PeerLink { transport: Err("refused".into()), ..link("", 0.0, false)[0].clone() }];
    let (rdma, tcp) = (link("rdma", 2e9, false), link("tcp", 1e9, true));
    let speed = |transport: &str| {
        format!(r#"tidemill_link_bytes_per_second{{worker="p0",peer="d0",transport="{transport}"}}"#)
    };
    let fallbacks = r#"tidemill_fallbacks_total{reason="transport"}"#;
    // before, now, speed of RDMA, speed of TCP, fallbacks so far
    let rows = [
        ("connected as intended", &gone, &rdma, Some(2e9), None, 0.0),
        ("lost", &rdma, &gone, Some(0.0), None, 0.0),
        ("connected in a worse way", &gone, &tcp, Some(0.0), Some(1e9), 1.0),
        ("and still so", &tcp, &tcp, Some(0.0), Some(1e9), 1.0),
        ("replaced by the intended one", &tcp, &rdma, Some(2e9), Some(0.0), 1.0),
    ];
    for (name, before, now, by_rdma, by_tcp, counted) in rows {
        metrics.record_links("p0", before, now);
        let text = metrics.render();
        assert_eq!(value(&text, &speed("rdma")), by_rdma, "{name}");
        assert_eq!(value(&text, &speed("tcp")), by_tcp, "{name}");
        assert_eq!(value(&text, fallbacks), Some(counted), "{name}");
    }
}

#[test]
fn how_handoffs_leave_and_reach_a_device_is_told_while_it_is_so() {
    use DeviceWay::{NoDevice, PeerCopy, Staging};
    let metrics = Metrics::new("m");
    let link = |to_peer, from_peer| {
        vec![PeerLink {
            name: "d0".into(),
            instance: 7,
            transport: Ok("shm".into()),
            bytes_per_second: 1.0,
            is_fallback: false,
            to_peer: Ok(()),
            from_peer: Ok(()),
            devices: DeviceWays { to_peer, from_peer },
        }]
    };
    let named = |direction: &str, way: &str| {
        format!(r#"tidemill_link_device_way{{worker="p0",peer="d0",direction="{direction}",way="{way}"}}"#)
    };
    let (none, copies, staged) = (link(NoDevice, NoDevice), link(PeerCopy, Staging), link(Staging, Staging));
    // before, now, to the peer by copy, to it by staging, from it by staging
    let rows = [
        ("memory of the host", &none, &none, None, None, None),
        ("one way by copy", &none, &copies, Some(1.0), None, Some(1.0)),
        ("and still so", &copies, &copies, Some(1.0), None, Some(1.0)),
        ("both through the host", &copies, &staged, Some(0.0), Some(1.0), Some(1.0)),
        ("no link any more", &staged, &none, Some(0.0), Some(0.0), Some(0.0)),
    ];
    for (name, before, now, copied, staged, back) in rows {
        metrics.record_links("p0", before, now);
        let text = metrics.render();
        assert_eq!(value(&text, &named("to_peer", "peer copy")), copied, "{name}");
        assert_eq!(value(&text, &named("to_peer", "staging")), staged, "{name}");
        assert_eq!(value(&text, &named("from_peer", "staging")), back, "{name}");
    }
}

#[test]
fn usage_counts_blocks_that_nobody_else_could_have() {
    let metrics = Metrics::new("m");
    metrics.record_worker_status(&status(1, 0));
    let text = metrics.render();
    assert_eq!(value(&text, r#"vllm:kv_cache_usage_perc{model_name="m",engine="p0"}"#), Some(0.5));
    assert_eq!(value(&text, r#"tidemill_blocks{worker="p0",state="quarantined"}"#), Some(1.0));
}

#[test]
fn what_waits_for_leave_is_told() {
    let metrics = Metrics::new("m");
    metrics.record_worker_status(&status(1, 0));
    let text = metrics.render();
    for (name, expected) in [
        ("tidemill_handoff_granted_bytes", 100.0),
        ("tidemill_handoff_waiting_bytes", 70.0),
        ("tidemill_handoff_waiting", 2.0),
    ] {
        assert_eq!(value(&text, &format!(r#"{name}{{worker="p0"}}"#)), Some(expected), "{name}");
    }
}

#[test]
fn every_distribution_has_buckets() {
    let metrics = Arc::new(Metrics::new("m"));
    let mut record = metrics.follow(Instant::now(), None, 7, 16);
    record.token();
    record.token();
    record.finished(Outcome::Stop);
    metrics.record_recovery(Duration::from_millis(20));
    metrics.record_choices(2);
    for (name, _) in names::SAMPLES {
        metrics.record_sample("p0", name, 1.0);
    }
    let text = metrics.render();
    for (name, _) in names::BUCKETS {
        let bucket = format!("{name}_bucket{{");
        assert!(text.contains(&bucket), "{name} is there, in buckets:\n{text}");
    }
    assert!(!text.contains("quantile="), "a summary cannot be added up over servers");
}

#[test]
fn a_sequence_ends_once_and_by_abort_when_nobody_waits() {
    let metrics = Arc::new(Metrics::new("m"));
    let mut record = metrics.follow(Instant::now(), None, 7, 16);
    record.finished(Outcome::Length);
    record.finished(Outcome::Error);
    drop(record);
    drop(metrics.follow(Instant::now(), None, 7, 16));
    let text = metrics.render();
    let of = |reason: &str| {
        let labels = format!(r#"{{model_name="m",engine="0",finished_reason="{reason}"}}"#);
        value(&text, &format!("vllm:request_success_total{labels}"))
    };
    assert_eq!([of("stop"), of("length"), of("abort"), of("error")], [0.0, 1.0, 1.0, 0.0].map(Some));
}

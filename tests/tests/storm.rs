//! Two hundred clients at once, many of which leave in the middle: no error but 429, no leak, nothing stuck.

use std::time::Duration;

use futures::StreamExt;
use serde_json::json;
use tidemill_tests::client::Client;
use tidemill_tests::deployment::{Deployment, eventually};
use tidemill_tests::fixtures;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_streams_with_cancellations_leave_no_trace() {
    for transport in ["shm", "tcp"] {
        let model = fixtures::model("llama3");
        let deployment = Deployment::start(&[
            model.to_str().expect("UTF-8"),
            "--transport",
            transport,
            "--max-queue",
            "120",
        ]);
        storm(&deployment.client, 0).await; // Fills caches and pools, so that the second one shows only leaks.
        eventually("all blocks are back", LIMIT, || deployment.client.is_idle()).await;
        let before = deployment.resident_bytes();
        let served = storm(&deployment.client, 1).await;
        eventually("all blocks are back", LIMIT, || deployment.client.is_idle()).await;
        assert!(served > 50, "{transport}: only {served} of 200 were served\n{}", deployment.log());
        let after = deployment.resident_bytes();
        let grown = after.saturating_sub(before);
        assert!(
            grown < before / 5 + (8 << 20),
            "{transport}: {grown} bytes more than {before} after a storm"
        );
        assert_eq!(deployment.client.get("/health").await.0, 200, "{transport}");
    }
}

/// Returns how many were served to their end.
async fn storm(client: &Client, round: u64) -> usize {
    let clients = (0..200_u64).map(|number| {
        let client = client.clone();
        tokio::spawn(async move {
            let random = mix(number * 2 + round);
            let length = 5 + random % 150;
            let prompt: Vec<u64> = (0..length).map(|index| 3 + (index * 3 + random) % 200).collect();
            let body = json!({
                "prompt": prompt, "max_tokens": 1 + random % 40, "seed": number, "ignore_eos": true, "stream": true,
            });
            let (status, mut events) = client.stream("/v1/completions", &body).await;
            assert!(status == 200 || status == 429, "client {number}: status {status}");
            if status == 429 {
                return false;
            }
            // A third leaves after some events, some of them before the first.
            let leaves_after = random.is_multiple_of(3).then_some(mix(random) % 12);
            let mut seen = 0;
            while leaves_after != Some(seen) {
                let Some(event) = events.next().await else { break };
                assert!(event.get("error").is_none(), "client {number}: {event}");
                seen += 1;
            }
            leaves_after.is_none()
        })
    });
    let outcomes = futures::future::join_all(clients).await;
    outcomes.into_iter().filter(|outcome| *outcome.as_ref().expect("no client panics")).count()
}

/// SplitMix64 (Steele et al., OOPSLA 2014): spreads small numbers over all bits.
fn mix(number: u64) -> u64 {
    let mut word = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

const LIMIT: Duration = Duration::from_secs(20);

//! Models of few bits, served as they come: a GGUF file has everything that an API needs, and split equals whole.

use serde_json::{Value, json};
use tidemill_tests::client::comparable;
use tidemill_tests::deployment::Deployment;
use tidemill_tests::fixtures::tests_folder;

#[tokio::test]
async fn a_gguf_file_is_served_split_as_whole() {
    let file = tests_folder().join("fixtures/quantized/gguf-q4_0/model.gguf");
    let file = file.to_str().expect("the repository's path is UTF-8");
    let golden = std::fs::read(tests_folder().join("fixtures/quantized/gguf-q4_0/goldens.json"));
    let golden: Value =
        serde_json::from_slice(&golden.expect("goldens are committed")).expect("goldens are JSON");
    let prompt: Vec<u32> = serde_json::from_value(golden["prompt"].clone()).expect("a list of tokens");
    let messages = json!([{"role": "user", "content": "Hello, the thing and another one."}]);
    let mut found = Vec::new();
    for flags in [&["--colocated"][..], &["--transport", "tcp", "--require-transport"]] {
        let deployment = Deployment::start(&[&[file], flags].concat());
        let client = &deployment.client;
        let (status, models) = client.get("/v1/models").await;
        let models: Value = serde_json::from_str(&models).expect("JSON");
        assert_eq!((status, &models["data"][0]["id"]), (200, &json!(file)));
        let reply = client.complete(&prompt, 8, json!({})).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        found.push((comparable(reply), client.chat(&messages).await));
        let log = deployment.log();
        assert!(log.contains("quantised weights are computed with as they come"), "{log}");
        assert!(log.contains("quantised weights are rounded again"), "{log}");
    }
    assert_eq!(found[0], found[1]);
}

//! A draft model changes nothing but speed, whoever it is.
//!
//! Two guess here: the model itself, which is always right if its cache is, and the model without its last layer, which is
//! right now and then. Every guess that can be made is made, whether it pays or not.

use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;
use tempfile::TempDir;
use tidemill_engine::engine::EngineError;
use tidemill_engine::handle::{GuessMethod, Quantization, SpeculationSettings};

use super::speculation::{accepted, agree, renamed, varied};
use super::*;

#[test]
fn every_family_answers_as_without() {
    let models =
        ["llama2", "llama3", "mistral", "qwen2", "qwen2-window", "qwen3", "llama-bias", "llama-yarn"];
    for model in models {
        let plain = start(config(model, Role::Hybrid));
        let shorter = Shorter::of(model);
        let guessing = start(guessed_by(shorter.source(), config(model, Role::Hybrid)));
        agree(model, &plain, &guessing, (0..12).map(varied));
        let sums = guessing.status().counters.speculation;
        assert!(0 < sums.accepted && sums.accepted < sums.drafted, "{model}: some are right: {sums:?}");
        closes(&guessing);
    }
}

#[test]
fn the_model_itself_is_always_right() {
    type Ask = fn(&mut Request);
    #[rustfmt::skip]
    let rows: [(&str, Ask); 6] = [
        ("nothing else",           |_| {}),
        ("random",                 |it| it.sampling.temperature = 1.5),
        ("penalties",              |it| (it.sampling.repetition_penalty, it.sampling.frequency_penalty) = (1.3, 0.3)),
        ("a bias and few tokens",  |it| (it.sampling.logit_bias, it.sampling.top_k) = (vec![(7, 3.0)], Some(5))),
        ("no log-probabilities",   |it| it.sampling.logprobs = None),
        ("those of the prompt",    |it| it.sampling.prompt_logprobs = Some(1)),
    ];
    let plain = start(config("qwen3", Role::Hybrid));
    let guessing = start(guessed_by(ModelSource::Folder(fixture("qwen3")), config("qwen3", Role::Hybrid)));
    for (row, ask) in rows {
        let requests = (0..8).map(|which| {
            let mut request = varied(which);
            ask(&mut request);
            request
        });
        agree(row, &plain, &guessing, requests);
        let sums = guessing.status().counters.speculation;
        assert!(sums.accepted == sums.drafted && 0 < sums.drafted, "{row}: {sums:?}");
    }
    closes(&guessing);
}

#[test]
fn stops_and_ends_within_a_draft_are_met_as_without() {
    type Ask = fn(&mut Request);
    #[rustfmt::skip]
    let rows: [(&str, Ask); 5] = [
        ("one token",              |it| it.stop = StopConditions::after(1)),
        ("two tokens",             |it| it.stop = StopConditions::after(2)),
        ("an end within a draft",  |it| it.stop = StopConditions::after(23)),
        ("stop tokens",            |it| it.stop.stop_token_ids = (0..256).step_by(5).collect()),
        ("no stop before the thirtieth", |it| (it.stop.stop_token_ids, it.stop.min_tokens) = ((0..256).step_by(5).collect(), 30)),
    ];
    let plain = start(config("llama2", Role::Hybrid));
    let shorter = Shorter::of("llama2");
    let guessing = start(guessed_by(shorter.source(), config("llama2", Role::Hybrid)));
    for (row, ask) in rows {
        let requests = (0..8).map(|which| {
            let mut request = varied(which);
            ask(&mut request);
            request
        });
        agree(row, &plain, &guessing, requests);
        closes(&guessing);
    }
}

#[test]
fn neither_batch_nor_chunk_nor_cache_nor_preemption_nor_dtype_matters() {
    #[rustfmt::skip]
    let rows: [(&str, Change); 9] = [
        ("as it is",               |_| {}),
        ("in chunks of 9",         |it| it.max_num_batched_tokens = 9),
        ("one by one",             |it| it.max_num_seqs = 1),
        ("without a prefix cache", |it| it.prefix_cache = false),
        ("in blocks of 1",         |it| it.block_len = 1),
        ("in blocks of 64",        |it| it.block_len = 64),
        ("heads before tokens",    |it| it.axis_order = AxisOrder::HeadToken),
        ("in an int8 cache",       |it| it.kv_cache_dtype = Some(KvDtype::Int8)),
        ("in so little memory that sequences are preempted", |it| it.kv_cache_memory = Some(26 * 16 * 2 * BYTES_PER_TOKEN)),
    ];
    let model = ModelSource::Folder(fixture("llama3"));
    for (row, change) in rows {
        let with_change = || {
            let mut config = config("llama3", Role::Hybrid);
            change(&mut config);
            config
        };
        let plain = start(EngineConfig { kv_cache_memory: Some(4 << 20), ..with_change() });
        let guessing = start(guessed_by(model.clone(), with_change()));
        for round in ["cold", "warm"] {
            agree(&format!("{row}, {round}"), &plain, &guessing, (0..9).map(varied));
        }
        let counters = guessing.status().counters;
        let sums = counters.speculation;
        assert!(0 < sums.drafted && sums.accepted == sums.drafted, "{row}: its cache is right: {sums:?}");
        assert_eq!(0 < counters.preemptions, row.contains("preempted"), "{row}: {counters:?}");
        closes(&guessing);
    }
}

#[test]
fn decode_guesses_behind_every_kind_of_handoff() {
    let plain = start(config("qwen3", Role::Hybrid));
    let (shm, tcp) = (TransportChoice::SharedMemory, TransportChoice::Tcp);
    #[rustfmt::skip]
    let rows: [(&str, TransportChoice, Change); 4] = [
        ("in place",        shm, |_| {}),
        ("copied",          shm, |it| it.in_place = false),
        ("tcp",             tcp, |_| {}),
        ("tcp, in chunks",  tcp, |it| it.max_num_batched_tokens = 20),
    ];
    let model = ModelSource::Folder(fixture("qwen3"));
    for (row, transport, change) in rows {
        let [mut prefill, mut decode] =
            [Role::Prefill, Role::Decode].map(|role| guessed_by(model.clone(), config("qwen3", role)));
        (prefill.transport, decode.transport) = (transport, transport);
        change(&mut prefill);
        change(&mut decode);
        let pair = Pair::start(prefill, decode);
        for round in ["cold", "warm"] {
            let requests: Vec<Request> = (0..9).map(varied).collect();
            let expected: Vec<Output> =
                requests.iter().map(|request| output(submit(&plain, renamed(request), None))).collect();
            let streams: Vec<_> = requests.iter().map(|request| pair.submit_request(request)).collect();
            for (streams, expected) in streams.into_iter().zip(expected) {
                assert_eq!(pair.output(streams), expected, "{row}, {round}");
            }
        }
        let sums = pair.decode.status().counters.speculation;
        assert!(0 < sums.drafted && sums.accepted == sums.drafted, "{row}: its cache is right: {sums:?}");
        assert_eq!(accepted(&pair.prefill), 0, "{row}: prefill has nothing to guess");
        closes(&pair.prefill);
        closes(&pair.decode);
    }
}

#[test]
fn measured_quantised_and_cancelled_it_answers_as_without() {
    let with_weights =
        || EngineConfig { quantization: Some(Quantization::Int8), ..config("llama3", Role::Hybrid) };
    let plain = start(with_weights());
    let mut adaptive = guessed_by(ModelSource::Folder(fixture("llama3")), with_weights());
    adaptive.speculation.as_mut().expect("it guesses").adaptive = true;
    let adaptive = start(adaptive);
    for round in 0..4 {
        let (cancelled, _events) = submit(&adaptive, request(5, Part::Whole), None);
        agree(&format!("round {round}"), &plain, &adaptive, (0..9).map(varied));
        adaptive.cancel(cancelled);
    }
    closes(&adaptive);
}

#[test]
fn its_cache_is_counted() {
    let plain = start(config("llama3", Role::Hybrid)).status().ledger.total.0;
    let itself = guessed_by(ModelSource::Folder(fixture("llama3")), config("llama3", Role::Hybrid));
    let shorter = Shorter::of("llama3");
    let half = guessed_by(shorter.source(), config("llama3", Role::Hybrid));
    assert_eq!(start(itself).status().ledger.total.0, plain / 2, "as many blocks again of the same size");
    assert_eq!(start(half).status().ledger.total.0, plain * 2 / 3, "blocks of one layer beside those of two");
}

#[test]
fn what_cannot_guess_is_refused_with_its_reason() {
    let other = Shorter::change("llama3", |config| config["vocab_size"] = 280.into());
    type Row<'a> = (&'a str, Option<GuessMethod>, Option<ModelSource>, &'a [&'a str]);
    let lookup = GuessMethod::PromptLookup { shortest_match: 2, longest_match: 5 };
    let itself = || Some(ModelSource::Folder(fixture("llama3")));
    let nowhere = Some(ModelSource::Folder("/nowhere".into()));
    #[rustfmt::skip]
    let rows: [Row<'_>; 5] = [
        ("none is named",            Some(GuessMethod::DraftModel), None,                 &["none is named"]),
        ("it is not to guess",       Some(lookup),                  itself(),             &["not to guess"]),
        ("nobody is to guess",       None,                          itself(),             &["not to guess"]),
        ("it is not there",          Some(GuessMethod::DraftModel), nowhere,              &["/nowhere"]),
        ("it has other tokens",      Some(GuessMethod::DraftModel), Some(other.source()), &["280", "288", "vocabulary"]),
    ];
    for (row, method, draft_model, words) in rows {
        let speculation = method.map(|method| SpeculationSettings { method, most: 4, adaptive: true });
        let config = EngineConfig { speculation, draft_model, ..config("llama3", Role::Hybrid) };
        let error = EngineHandle::start(config, &mut |_| {}).expect_err(row);
        assert!(matches!(error, EngineError::Setting(_) | EngineError::Model(_)), "{row}: {error:?}");
        assert!(words.iter().all(|word| error.to_string().contains(word)), "{row}: {error}");
    }
}

/// A fixture with another configuration, in a folder of its own.
struct Shorter(TempDir);

impl Shorter {
    /// Without its last layer.
    fn of(model: &str) -> Self {
        Self::change(model, |config| {
            config["num_hidden_layers"] = 1.into();
            if let Some(types) = config.get_mut("layer_types").and_then(|it| it.as_array_mut()) {
                types.truncate(1);
            }
        })
    }

    fn change(model: &str, change: impl FnOnce(&mut Value)) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let read = |name| fs::read(fixture(model).join(name)).expect("it has one");
        let write = |name, bytes: &[u8]| fs::write(folder.path().join(name), bytes).expect("a new one");
        let mut config = serde_json::from_slice(&read("config.json")).expect("it is JSON");
        change(&mut config);
        let layers = config["num_hidden_layers"].as_u64().expect("a number");
        write("config.json", config.to_string().as_bytes());
        write("model.safetensors", &first_layers(&read("model.safetensors"), layers));
        Self(folder)
    }

    fn source(&self) -> ModelSource {
        ModelSource::Folder(self.0.path().to_owned())
    }
}

/// A file of tensors without those of layers from `layers` on.
fn first_layers(file: &[u8], layers: u64) -> Vec<u8> {
    let (length, rest) = file.split_first_chunk().expect("a length");
    let (header, data) = rest.split_at(usize::try_from(u64::from_le_bytes(*length)).expect("it fits"));
    let header: BTreeMap<String, Value> = serde_json::from_slice(header).expect("it is JSON");
    let layer_of = |name: &str| name.strip_prefix("model.layers.")?.split_once('.')?.0.parse::<u64>().ok();
    let (mut kept, mut bytes) = (BTreeMap::new(), Vec::new());
    for (name, mut tensor) in header {
        if layer_of(&name).is_some_and(|layer| layers <= layer) || name == "__metadata__" {
            continue;
        }
        let [first, end] = [0, 1].map(|at| tensor["data_offsets"][at].as_u64().expect("a place") as usize);
        tensor["data_offsets"] = [bytes.len(), bytes.len() + end - first].into();
        bytes.extend(&data[first..end]);
        kept.insert(name, tensor);
    }
    let header = serde_json::to_string(&kept).expect("it was JSON");
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &bytes].concat()
}

/// Has that model make every guess that can be made.
fn guessed_by(draft_model: ModelSource, mut config: EngineConfig) -> EngineConfig {
    config.speculation =
        Some(SpeculationSettings { method: GuessMethod::DraftModel, most: 5, adaptive: false });
    config.draft_model = Some(draft_model);
    config
}

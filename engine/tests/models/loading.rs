//! Reading a model folder: what is read, and what each kind of broken folder is told.

use std::error::Error;
use std::fs;
use std::path::Path;

use super::bench::{Bench, Storage, fixture, goldens, model, quantized_model};
use serde_json::{Value, json};
use tempfile::TempDir;
use tidemill_engine::handle::{EmbeddedFile, LoadFormat, LoadProgress, ModelSource, Quantization};
use tidemill_engine::models::{Model, ModelError, ModelSpec};

fn load(folder: &Path) -> Result<Model, ModelError> {
    Model::load(&ModelSource::Folder(folder.into()), LoadFormat::Safetensors, &mut |_| {})
}

/// A copy of a fixture model, changed.
fn changed(name: &str, change: impl FnOnce(&Path)) -> TempDir {
    let folder = tempfile::tempdir().expect("a place for temporary files");
    for entry in fs::read_dir(fixture(name)).expect("the fixture is committed") {
        let path = entry.expect("the fixture can be listed").path();
        fs::copy(&path, folder.path().join(path.file_name().expect("it is a file")))
            .expect("it can be copied");
    }
    change(folder.path());
    folder
}

/// Sets a field of a copy's `config.json`; null takes it out.
fn set(folder: &Path, field: &str, value: Value) {
    let path = folder.join("config.json");
    let mut config: Value =
        serde_json::from_slice(&fs::read(&path).expect("it is there")).expect("it is JSON");
    let fields = config.as_object_mut().expect("it is an object");
    if value.is_null() {
        fields.remove(field);
    } else {
        fields.insert(field.into(), value);
    }
    fs::write(&path, config.to_string()).expect("the copy can be written");
}

/// An error and its causes, as the command line shows them.
fn told(error: &ModelError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[test]
fn broken_folders_are_told_what_is_wrong() {
    type Change = fn(&Path);
    #[rustfmt::skip]
    let rows: [(&str, &str, Change, &[&str]); 26] = [
        ("no folder", "llama2", |f| fs::remove_dir_all(f).unwrap(), &["config.json", "No such file"]),
        ("no config", "llama2", |f| fs::remove_file(f.join("config.json")).unwrap(), &["cannot read", "config.json", "No such file"]),
        ("config is no JSON", "llama2", |f| fs::write(f.join("config.json"), "{\"a\": 1,").unwrap(), &["config.json is not valid JSON", "line 1"]),
        ("config is no object", "llama2", |f| fs::write(f.join("config.json"), "[]").unwrap(), &["config.json", "an object", "[]"]),
        ("generation config is no JSON", "llama2", |f| fs::write(f.join("generation_config.json"), "nonsense").unwrap(), &["generation_config.json is not valid JSON"]),
        ("unknown architecture", "llama2", |f| set(f, "architectures", json!(["FooForCausalLM"])), &["unknown architecture FooForCausalLM", "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"]),
        ("no architecture", "llama2", |f| set(f, "architectures", Value::Null), &["field `architectures` is missing"]),
        ("missing field", "llama2", |f| set(f, "num_hidden_layers", Value::Null), &["config.json: field `num_hidden_layers` is missing"]),
        ("wrong type", "llama2", |f| set(f, "hidden_size", json!("64")), &["field `hidden_size` must be a whole number from 1, found \"64\""]),
        ("negative number", "llama2", |f| set(f, "vocab_size", json!(-1)), &["`vocab_size`", "-1"]),
        ("fraction", "llama2", |f| set(f, "num_attention_heads", json!(4.5)), &["`num_attention_heads`", "4.5"]),
        ("heads do not divide", "llama2", |f| set(f, "num_key_value_heads", json!(3)), &["`num_key_value_heads`", "a divisor of num_attention_heads, 4", "found 3"]),
        ("odd head size", "llama2", |f| set(f, "head_dim", json!(15)), &["`head_dim`", "even"]),
        ("unknown activation", "llama2", |f| set(f, "hidden_act", json!("gelu")), &["`hidden_act` is \"gelu\"", "supported: silu"]),
        ("quantised", "llama2", |f| set(f, "quantization_config", json!({"quant_method": "hqq"})), &["`quantization_config.quant_method`", "hqq", "not supported"]),
        ("unknown rope", "llama3", |f| set(f, "rope_scaling", json!({"rope_type": "longrope"})), &["`rope_scaling.rope_type` is \"longrope\"", "default, linear, llama3, yarn"]),
        ("rope without its field", "llama3", |f| set(f, "rope_scaling", json!({"rope_type": "llama3", "factor": 8.0})), &["field `rope_scaling.low_freq_factor` is missing"]),
        ("partial rotation", "llama2", |f| set(f, "partial_rotary_factor", json!(0.5)), &["`partial_rotary_factor` is 0.5"]),
        ("layer types of another depth", "qwen2", |f| set(f, "layer_types", json!(["full_attention"])), &["`layer_types`", "a list of 2"]),
        ("a window that is not in use", "qwen2", |f| set(f, "layer_types", json!(["full_attention", "sliding_attention"])), &["`layer_types`", "no sliding_window"]),
        ("no weights", "llama2", |f| fs::remove_file(f.join("model.safetensors")).unwrap(), &["cannot read", "model.safetensors", "No such file"]),
        ("a file cut short", "llama2", |f| cut(&f.join("model.safetensors")), &["model.safetensors is not a valid safetensors file"]),
        ("a missing shard", "llama-sharded", |f| fs::remove_file(f.join("model-00002-of-00003.safetensors")).unwrap(), &["model-00002-of-00003.safetensors"]),
        ("missing tensors", "llama2", |f| set(f, "num_hidden_layers", json!(3)), &["lacks 9 tensors", "model.layers.2.input_layernorm.weight", "…"]),
        ("tensors without a place", "llama-bias", |f| set(f, "mlp_bias", json!(false)), &["6 tensors that its configuration has no place for", "model.layers.0.mlp.down_proj.bias"]),
        ("another shape", "llama2", |f| set(f, "intermediate_size", json!(128)), &["tensor `model.layers.0.mlp.gate_proj.weight`", "[128, 64]", "[112, 64]"]),
    ];
    for (name, base, change, expected) in rows {
        let folder = changed(base, change);
        let error = load(folder.path()).expect_err(name);
        let text = told(&error);
        for part in expected {
            assert!(text.contains(part), "{name}: {part:?} in {text:?}");
        }
    }
}

fn cut(path: &Path) {
    let bytes = fs::read(path).expect("it is there");
    fs::write(path, &bytes[..bytes.len() - 100]).expect("the copy can be written");
}

#[test]
fn an_index_names_files_of_its_own_folder_only() {
    let folder = changed("llama-sharded", |folder| {
        let path = folder.join("model.safetensors.index.json");
        let index = fs::read_to_string(&path).expect("it is there");
        fs::write(&path, index.replace("model-00003", "../model-00003")).expect("the copy can be written");
    });
    let text = told(&load(folder.path()).expect_err("a path is not a name"));
    assert!(text.contains("the name of a file in the same folder"), "{text}");
}

#[test]
fn the_committed_unknown_architecture_is_named() {
    let text = told(&load(&fixture("unknown-architecture")).expect_err("nobody has it"));
    assert!(text.contains("unknown architecture FooForCausalLM"), "{text}");
}

#[test]
fn absent_fields_have_the_values_that_transformers_assumes() {
    let parse = |config: Value| ModelSpec::parse("config.json", config.to_string().as_bytes());
    let base = |architecture: &str| {
        json!({
            "architectures": [architecture], "hidden_size": 512, "intermediate_size": 64, "vocab_size": 10,
            "num_hidden_layers": 30, "num_attention_heads": 32, "max_position_embeddings": 100,
        })
    };
    let llama = parse(base("LlamaForCausalLM")).expect("every required field is there");
    assert_eq!((llama.kv_heads, llama.head_size, llama.norm_eps), (32, 16, 1e-6));
    assert_eq!((llama.rope.theta, llama.tied_embeddings, llama.eos_token_ids.len()), (10_000.0, false, 0));
    let mistral = parse(base("MistralForCausalLM")).expect("every required field is there");
    assert_eq!((mistral.kv_heads, mistral.windows[0], mistral.qkv_bias), (8, Some(4096), false));
    let qwen2 = parse(base("Qwen2ForCausalLM")).expect("every required field is there");
    assert_eq!(
        (qwen2.kv_heads, qwen2.windows[29], qwen2.qkv_bias, qwen2.output_bias),
        (32, None, true, false)
    );
    let mut with_window = base("Qwen3ForCausalLM");
    with_window["use_sliding_window"] = json!(true);
    let qwen3 = parse(with_window).expect("every required field is there");
    assert_eq!((qwen3.head_size, qwen3.qk_norm), (128, true));
    assert_eq!((qwen3.windows[27], qwen3.windows[28]), (None, Some(4096)));
}

#[test]
fn defaults_of_generation_and_end_tokens_are_read() {
    let llama3 = model("llama3");
    assert_eq!((llama3.generation.temperature, llama3.generation.top_p), (Some(0.6), Some(0.9)));
    assert_eq!((llama3.generation.top_k, llama3.generation.min_p), (None, None));
    assert_eq!(llama3.eos_token_ids(), [1, 3], "a list there, and 3 alone in config.json");
    assert_eq!(model("llama2").eos_token_ids(), [1, 3], "one number there, another in config.json");

    let folder = changed("llama2", |folder| {
        fs::remove_file(folder.join("generation_config.json")).expect("it is there");
    });
    let bare = load(folder.path()).expect("the file is optional");
    assert_eq!((bare.generation.temperature, bare.eos_token_ids()), (None, vec![3]));
}

#[test]
fn fingerprints_tell_models_apart_and_copies_not() {
    let print = |folder: &Path| load(folder).expect("the copy loads").fingerprint;
    let original = print(&fixture("llama2"));
    assert_eq!(original.len(), 32);
    assert_eq!(print(changed("llama2", |_| {}).path()), original, "the folder's name does not matter");
    let reworded = changed("llama2", |folder| set(folder, "eos_token_id", json!(7)));
    assert_eq!(print(reworded.path()), original, "fields that no forward pass reads do not matter");
    let other_base = changed("llama2", |folder| set(folder, "rope_theta", json!(20000.0)));
    assert_ne!(print(other_base.path()), original, "the base of the rotation matters");
    let other_weight = changed("llama2", |folder| {
        let path = folder.join("model.safetensors");
        let mut bytes = fs::read(&path).expect("it is there");
        *bytes.last_mut().expect("it is not empty") ^= 1;
        fs::write(&path, bytes).expect("the copy can be written");
    });
    assert_ne!(print(other_weight.path()), original, "each weight matters");
}

#[test]
fn fingerprints_tell_quantizations_apart() {
    let quantizations = ["int8", "fp8", "int4", "int4-g64", "int4-g128"]
        .map(|name| name.parse::<Quantization>().expect("a name"));
    let mut prints: Vec<String> = quantizations
        .into_iter()
        .map(|quantization| {
            assert_eq!(quantization.to_string().parse(), Ok(quantization));
            quantized_model("llama2", quantization).fingerprint.clone()
        })
        .collect();
    prints.push(model("llama2").fingerprint.clone());
    prints.sort_unstable();
    prints.dedup();
    assert_eq!(prints.len(), 6, "{prints:?}");
    let error = "int3".parse::<Quantization>().expect_err("there is none").to_string();
    assert!(error.contains("`int3` is no quantization; there are int8"), "{error}");
}

#[test]
fn quantized_models_keep_their_embedding() {
    // One with a table of its own, one whose table is also the head.
    for name in ["llama2", "qwen2"] {
        let (plain, quantized) = (model(name), quantized_model(name, Quantization::Int8));
        let width = plain.spec.hidden_size;
        let (mut expected, mut found) = (vec![0.0; width], vec![0.0; width]);
        for token in 0..plain.spec.vocab_size {
            match &plain.weights.embedding {
                Some(table) => table.row(token, &mut expected),
                None => plain.weights.head.row(token, &mut expected),
            }
            quantized.weights.embedding.as_ref().expect("never quantised").row(token, &mut found);
            assert_eq!(found, expected, "{name}: token {token}");
        }
    }
}

#[test]
fn embedded_files_are_as_good_as_a_folder() {
    let leaked = |name: &'static str| {
        let bytes = fs::read(fixture("llama-sharded").join(name)).expect("the fixture is committed");
        EmbeddedFile { name, bytes: Vec::leak(bytes) }
    };
    let files = [
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]
    .map(leaked);
    let source = ModelSource::Embedded(Vec::leak(files.to_vec()));
    let mut reports: Vec<LoadProgress> = Vec::new();
    let embedded = Model::load(&source, LoadFormat::Safetensors, &mut |report| reports.push(report))
        .expect("all is there");
    assert_eq!(embedded.fingerprint, model("llama-sharded").fingerprint);
    assert!(reports.is_sorted_by_key(|report| report.done) && reports[0].done == 0);
    let last = reports.last().expect("there are reports");
    assert_eq!(last.done, last.total);

    let none = Model::load(&ModelSource::Embedded(&[]), LoadFormat::Safetensors, &mut |_| {});
    assert!(told(&none.expect_err("there is no file")).contains("embedded config.json"));
}

#[test]
fn dummy_weights_follow_from_the_seed_and_compute() {
    let folder = tempfile::tempdir().expect("a place for temporary files");
    for name in ["llama-bias", "qwen3-yarn"] {
        fs::copy(fixture(name).join("config.json"), folder.path().join("config.json"))
            .expect("it can be copied");
        let load = |seed| {
            let source = ModelSource::Folder(folder.path().into());
            Model::load(&source, LoadFormat::Dummy { seed }, &mut |_| {}).expect("a config is enough")
        };
        let dummy = load(7);
        assert_eq!(dummy.fingerprint, load(7).fingerprint);
        assert_ne!(dummy.fingerprint, load(8).fingerprint);
        let mut bench = Bench::new(&dummy.into(), Storage::PLAIN);
        let prompt = goldens(name).pop().expect("there are goldens").prompt;
        let mut place = bench.place(prompt.len());
        let logits = bench.extend(&mut place, &prompt);
        let greatest = logits.iter().fold(0.0f32, |greatest, x| greatest.max(x.abs()));
        assert!((0.1..100.0).contains(&greatest), "{name}: logits up to {greatest}");
    }
}

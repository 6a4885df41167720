//! A small shape through all of it.

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Typed {
    #[command(flatten)]
    flags: ModelBenchFlags,
}

#[test]
fn every_pass_is_measured_and_has_its_limit() {
    let typed = "bench --shape llama-tiny --threads 1 --runs 2 --prefill-len 40 --decode-batch 1,3 \
                 --max-num-batched-tokens 16 --decode-context 20";
    let flags = Typed::parse_from(typed.split_whitespace()).flags;
    let bars = MultiProgress::new();
    let (name, source) = source(&flags, &bars).unwrap();
    assert_eq!(name, "llama-tiny");
    let subject = subject(&flags, &source, &bars).unwrap();
    let passes = passes(&flags);
    assert_eq!(passes, [Pass::Prefill(40), Pass::Decode(1), Pass::Decode(3)]);
    let mut yardstick = yardstick(&subject).unwrap();
    let mut bench = Passes::new(subject, &passes, 16, 20).unwrap();
    let rows = measure(&flags, &passes, &mut bench, &mut yardstick).unwrap();
    for (row, pass) in rows.iter().zip(passes.iter().copied()) {
        assert_eq!((row.pass, row.rates.sorted().len()), (pass, 2));
        assert!(0.0 < row.share && row.share.is_finite() && 0.0 < row.limit, "{row:?}");
        assert!(row.line().contains(&pass.name()), "{}", row.line());
    }
    let asked = |lines: &str, bench: &mut Passes, yardstick: &mut Yardstick| {
        in_turns(&rows.iter().map(|row| row.pass).collect::<Vec<_>>(), bench, yardstick, lines.as_bytes())
    };
    assert!(asked("decode 3\nprefill 40\n", &mut bench, &mut yardstick).is_ok());
    let error = asked("decode 4\n", &mut bench, &mut yardstick).expect_err("it was not announced");
    assert!(error.to_string().contains("decode 4") && error.to_string().contains("prefill 40"), "{error}");
    let spec_weights = 9.0 * (2.0 * 256.0 * (256.0 + 128.0) + 3.0 * 256.0 * 1024.0);
    let head = 8192.0 * 256.0;
    let decode = bench.work(Pass::Decode(3));
    let kv_token = 2.0 * 9.0 * 128.0 * 2.0;
    assert_eq!(
        decode.bytes,
        2.0 * (spec_weights + head) + 3.0 * kv_token * 24.5,
        "bf16 weights once, KV thrice"
    );
    let prefill = bench.work(Pass::Prefill(40));
    let pairs = 40.0 * 41.0 / 2.0;
    assert_eq!(prefill.flop, 2.0 * (40.0 * spec_weights + head) + pairs * 4.0 * 9.0 * 256.0);
    assert_eq!(prefill.bytes, 2.0 * (3.0 * spec_weights + head), "three chunks");
}

#[test]
fn the_nearer_limit_counts() {
    let work = Work { tokens: 1.0, bytes: 10.0, flop: 100.0 };
    assert_eq!(work.at_best(Limits { read: 1.0, flop: 100.0 }), (10.0, "bytes"));
    assert_eq!(work.at_best(Limits { read: 100.0, flop: 1.0 }), (100.0, "FLOP"));
}

#[test]
fn what_a_model_is_not_made_for_is_refused() {
    let cpu = Arc::new(Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap());
    let model = Model::load(&Shape::LlamaTiny.source(), LoadFormat::Dummy { seed: 1 }, &mut |_| {}).unwrap();
    let subject = Subject::Cpu(Arc::new(model), cpu);
    let error = Passes::new(subject, &[Pass::Prefill(9000)], 512, 20).unwrap_err();
    assert!(error.to_string().contains("8192 tokens, 9000 are asked for"), "{error}");
}

tidemill_kernels::where_emulated! {
    /// The same passes on a GPU, which the emulator is here: what they must do is the same, and decode steps are graphs if so desired.
    #[test]
    fn a_gpu_is_measured_too() {
        use tidemill_kernels::cuda::Driver;
        use tidemill_kernels::cuda::{emulator::Order, fake::Fake};

        let fake = Arc::new(Fake::new(Order::Forwards).with_capacity(16 << 20).with_library());
        let driver: Arc<dyn Driver> = Arc::clone(&fake) as _;
        let typed = "bench --shape llama-tiny --runs 1 --prefill-len 20 --decode-batch 2";
        let flags = Typed::parse_from(typed.split_whitespace()).flags;
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), SMALL).unwrap();
        let source = ModelSource::Folder(folder.path().to_owned());
        let passes = passes(&flags);
        let options = LoadOptions { threads: 1, format: LoadFormat::Dummy { seed: 1 }, quantization: None };
        let cpu = Arc::new(Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap());
        let on_cpu = Model::load_with(options, &source, &mut |_| {}).unwrap();
        let on_cpu = Passes::new(Subject::Cpu(Arc::new(on_cpu), cpu), &passes, 16, 20).unwrap();
        for graphs in [true, false] {
            let before = fake.calls().replays;
            let model = Arc::new(Model::load_on(&driver, options, &source, &mut |_| {}).unwrap());
            let subject = Subject::Gpu { model, driver: Arc::clone(&driver), graphs };
            let mut yardstick = yardstick(&subject).unwrap();
            let mut bench = Passes::new(subject, &passes, 16, 20).unwrap();
            assert_eq!(bench.arithmetic(), None);
            let rows = measure(&flags, &passes, &mut bench, &mut yardstick).unwrap();
            for row in rows {
                assert_eq!(bench.work(row.pass), on_cpu.work(row.pass), "{row:?}");
                assert!(0.0 < row.share && row.share.is_finite() && row.limit.is_finite(), "{row:?}");
            }
            assert_eq!(before < fake.calls().replays, graphs);
        }
        fake.assert_nothing_left();
    }

    const SMALL: &str = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "dtype": "bfloat16"}"#;
}

//! The forward pass on a GPU that has what Hopper has, which the emulator is here: it takes the kernels that are for it, and
//! they are as right as the others.

use std::sync::Arc;

use super::bench::Storage;
use super::cuda::{Gpu, check_on};
use super::quantized::cosine;
use tidemill_engine::handle::{EmbeddedFile, ModelSource};
use tidemill_engine::runner::LogitsWanted;
use tidemill_kernels::cuda::emulator::Order;
use tidemill_kernels::cuda::fake::Fake;
use tidemill_kernels::cuda::hopper::CAPABILITY;
use tidemill_kvtransfer_proto::layout::KvDtype;

fn hopper(order: Order) -> Arc<Fake> {
    Arc::new(Fake::new(order).with_compute_capability(CAPABILITY))
}

#[test]
fn products_are_within_the_bounds_of_transformers() {
    for name in ["llama-bf16-new-keys", "llama-f16-old-keys"] {
        let fake = hopper(Order::Forwards);
        check_on(Arc::clone(&fake) as _, name);
        let wide = fake.launches().iter().filter(|it| it.kernel.starts_with("multiply_wide_")).count();
        assert!(0 < wide, "{name}");
        fake.assert_nothing_left();
    }
}

/// Chunks in any cut give the bits of the whole, and the numbers of the kernels that every GPU has.
#[test]
fn attention_copies_whole_blocks() {
    let fake = hopper(Order::Random(5));
    let whole = logits(&fake, &[60]);
    let kernels: Vec<&str> = fake.launches().iter().map(|it| it.kernel).collect();
    assert!(kernels.contains(&"attend_prompt_wide_64_bf16"), "{kernels:?}");
    assert!(!kernels.contains(&"attend_prompt_64_bf16"), "{kernels:?}");
    assert!(whole == logits(&fake, &[23, 37]), "in chunks");
    fake.assert_nothing_left();
    let older = Arc::new(Fake::new(Order::Forwards));
    let expected = logits(&older, &[60]);
    let close = cosine(&whole, &expected);
    assert!(0.9995 < close, "{close}");
}

/// Of the last token of a prompt that comes in these chunks.
fn logits(fake: &Arc<Fake>, chunks: &[usize]) -> Vec<f32> {
    let storage = Storage { dtype: KvDtype::Bf16, ..Storage::PLAIN };
    let mut gpu = Gpu::of(Arc::clone(fake) as _, &ModelSource::Embedded(FILES), None, storage, &[]);
    let prompt: Vec<u32> = (0..chunks.iter().sum::<usize>() as u32).map(|it| 3 + it * 7 % 50).collect();
    let mut place = gpu.place(prompt.len());
    let mut last = Vec::new();
    for &rows in chunks {
        let tokens = &prompt[place.len..place.len + rows];
        last = gpu.step(&[(&place, tokens)], LogitsWanted::Last, &|_| None)[0][0].logits().to_vec();
        place.len += rows;
    }
    last
}

const FILES: &[EmbeddedFile] = &[EmbeddedFile { name: "config.json", bytes: CONFIG.as_bytes() }];
const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 64, "head_dim": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "dtype": "bfloat16"}"#;

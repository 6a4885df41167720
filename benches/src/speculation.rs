//! What guessing tokens gains, and that it never costs: the same prompts to two engines that differ in nothing else, in
//! turns.
//!
//! Both must give the same tokens. One thread computes, and its CPU time is taken, short prompts included, so that what else
//! runs on the machine counts little. The demo model copies because it was asked to, or because a text repeats itself.
//! Random weights do not obey, but fall into loops when they are greedy, which is as good for prompt lookup as a copy can
//! be, and write noise when they are not, which is as bad.

mod checkpoints;
pub(crate) mod drafted;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{anyhow, bail};
use tidemill_engine::engine::EngineHandle;
use tidemill_engine::handle::{
    EngineConfig, EngineEvent, GuessMethod, LoadFormat, ModelSource, Role, SpeculationSettings,
};
use tidemill_engine_core::request::{Part, Request, RequestId, SamplingParams, StopConditions, TokenId};
use tidemill_kvtransfer_proto::units::TokenCount;
use tokenizers::Tokenizer;

use crate::report::{Row, Target};
use crate::timing::{in_turns, median, ratio};

/// On the demo model, whose weights fit a cache.
pub(crate) fn measure_demo(rounds: usize) -> anyhow::Result<Vec<Row>> {
    let Asked { copies, repeats, stories } = Asked::of_the_demo_model()?;
    let pair = Pair::start(&demo(), LoadFormat::Safetensors)?;
    let warm = Workload { temperature: 1.0, ..stories.clone() };
    let hot = Workload { temperature: 3.0, stop: StopConditions::after(100), ..stories.clone() };
    let both = [copies.prompts.clone(), stories.prompts.clone()].concat();
    let crowd = Workload { prompts: both, at_once: true, ..copies.clone() };
    #[rustfmt::skip]
    let rows = [
        ("copying: a text that repeats itself goes on, demo model", repeats, 1.0),
        ("copying: names changed in a short text, demo model", copies,  1.0),
        ("new text: stories, demo model",                    stories, 0.97),
        ("new text: stories at temperature 1, demo model",   warm,    0.97),
        ("noise: temperature 3, demo model",                 hot,     0.97),
        ("eight at once, half of them copying, demo model",  crowd,   0.97),
    ];
    rows.iter().map(|(name, workload, at_least)| pair.measure(name, workload, *at_least, rounds)).collect()
}

/// On a model that answers as the demo model does, with weights that come from memory.
pub(crate) fn measure_widened(rounds: usize) -> anyhow::Result<Vec<Row>> {
    let Asked { copies, repeats, stories } = Asked::of_the_demo_model()?;
    let folder = tempfile::tempdir()?;
    checkpoints::widen(&demo(), folder.path(), 4, 24)?;
    let pair = Pair::start(folder.path(), LoadFormat::Safetensors)?;
    {
        let demo = Pair::start(&demo(), LoadFormat::Safetensors)?;
        if copies.run(&demo.plain)?.0 != copies.run(&pair.plain)?.0 {
            bail!("the widened model does not answer as the demo model does");
        }
    }
    let warm = Workload { temperature: 1.0, ..stories.clone() };
    let rounds = rounds.div_ceil(4).max(3);
    #[rustfmt::skip]
    let rows = [
        ("copying: a text that repeats itself goes on, demo model widened to 0.2 G parameters", repeats, 1.8),
        ("copying: names changed in a short text, demo model widened to 0.2 G parameters", copies, 1.8),
        ("new text: stories, demo model widened to 0.2 G parameters", stories, 0.97),
        ("new text: stories at temperature 1, demo model widened to 0.2 G parameters", warm, 0.97),
    ];
    rows.iter().map(|(name, workload, at_least)| pair.measure(name, workload, *at_least, rounds)).collect()
}

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/weights")
}

/// What the demo model was taught.
struct Asked {
    /// Short texts, again with a word changed.
    copies: Workload,
    /// A text that stands there four times, to be gone on with.
    repeats: Workload,
    /// Nothing of it stands in the prompt.
    stories: Workload,
}

impl Asked {
    fn of_the_demo_model() -> anyhow::Result<Self> {
        let tokenizer =
            Tokenizer::from_file(demo().join("tokenizer.json")).map_err(|error| anyhow!(error))?;
        let tokens = |texts: &[String]| -> anyhow::Result<Vec<Vec<TokenId>>> {
            let encode = |text: &String| {
                let encoding = tokenizer.encode(text.as_str(), false).map_err(|error| anyhow!(error))?;
                Ok(encoding.get_ids().to_vec())
            };
            texts.iter().map(encode).collect()
        };
        let asks = |texts: [&str; 4]| {
            tokens(&texts.map(|text| format!("<|bos|><|user|>{text}<|end|><|assistant|>")))
        };
        let repeated = REPEATED.map(|text| format!("<|bos|>{}", [text; 4].join(" ")));
        let stop =
            StopConditions { eos_token_ids: vec![END], ignore_eos: false, ..StopConditions::after(300) };
        let copies = Workload { prompts: asks(COPIES)?, stop, temperature: 0.0, at_once: false };
        let until = StopConditions::after(150);
        let repeats = Workload { prompts: tokens(&repeated)?, stop: until, ..copies.clone() };
        let stories = Workload { prompts: asks(STORIES)?, ..copies.clone() };
        Ok(Self { copies, repeats, stories })
    }
}

/// On random weights of a larger shape.
pub(crate) fn measure_dummy(rounds: usize) -> anyhow::Result<Vec<Row>> {
    let shape = Shape::write()?;
    let pair = Pair::start(shape.0.path(), LoadFormat::Dummy { seed: 1 })?;
    let prompt = |which: u32| (0..64).map(|place| 7 + (place * 31 + which * 997) % 1400).collect();
    let stop = StopConditions::after(128);
    let loops = Workload { prompts: (0..2).map(prompt).collect(), stop, temperature: 0.0, at_once: false };
    let random = Workload { temperature: 1.0, stop: StopConditions::after(64), ..loops.clone() };
    let rounds = rounds.div_ceil(4).max(3);
    #[rustfmt::skip]
    let rows = [
        ("loops: random weights, greedy, 0.4 G parameters",         loops,  1.0),
        ("noise: random weights, temperature 1, 0.4 G parameters",  random, 0.97),
    ];
    rows.iter().map(|(name, workload, at_least)| pair.measure(name, workload, *at_least, rounds)).collect()
}

/// What is asked of both engines.
#[derive(Clone)]
struct Workload {
    prompts: Vec<Vec<TokenId>>,
    stop: StopConditions,
    temperature: f32,
    at_once: bool,
}

/// An engine without guesses and one with them.
struct Pair {
    plain: EngineHandle,
    guessing: EngineHandle,
}

impl Pair {
    fn start(folder: &Path, load_format: LoadFormat) -> anyhow::Result<Self> {
        let start = |speculation| {
            EngineHandle::start(config(folder.to_owned(), load_format, speculation), &mut |_| {})
        };
        let method = GuessMethod::PromptLookup { shortest_match: 2, longest_match: 5 };
        let settings = SpeculationSettings { method, most: 8, adaptive: true };
        Ok(Self { plain: start(None)?, guessing: start(Some(settings))? })
    }

    fn measure(&self, name: &str, workload: &Workload, at_least: f64, rounds: usize) -> anyhow::Result<Row> {
        let before = self.guessing.status().counters.speculation;
        let (mut expected, mut found) = (Vec::new(), Vec::new());
        let answer = |engine: &EngineHandle, answers: &mut Vec<_>| {
            let (tokens, took) = workload.run(engine).expect("the engine serves");
            answers.push(tokens);
            took
        };
        let (guessing, plain) =
            in_turns(rounds, || answer(&self.guessing, &mut found), || answer(&self.plain, &mut expected));
        if expected != found {
            bail!("{name}: the answers differ");
        }
        let tokens: usize = expected[0].iter().map(Vec::len).sum();
        let rate = |times: &[Duration]| tokens as f64 / median(times).as_secs_f64();
        let sums = self.guessing.status().counters.speculation;
        let (drafted, accepted) = (sums.drafted - before.drafted, sums.accepted - before.accepted);
        Ok(Row {
            measure: format!("decode, {name}"),
            value: rate(&guessing),
            unit: "tok/s of CPU",
            limit: Some((rate(&plain), "without guesses")),
            target: Some(Target::Ratio { measured: ratio(&guessing, &plain), at_least }),
            note: format!(
                "{tokens} tokens, {} rounds; {accepted} of {drafted} guesses right, {} drafts held back",
                rounds,
                sums.held_back - before.held_back
            ),
        })
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.plain.clone().shutdown();
        self.guessing.clone().shutdown();
    }
}

impl Workload {
    /// The answers, and how long the process computed for them.
    fn run(&self, engine: &EngineHandle) -> anyhow::Result<(Vec<Vec<TokenId>>, Duration)> {
        let start = process_cpu();
        let submit = |(prompt, seed): (&Vec<TokenId>, u64)| submit(engine, self.request(prompt, seed));
        let prompts = self.prompts.iter().zip(0..);
        let answers: Vec<Vec<TokenId>> = if self.at_once {
            let streams: Vec<_> = prompts.map(submit).collect();
            streams.iter().map(answer).collect::<Result<_, _>>()?
        } else {
            prompts.map(|it| answer(&submit(it))).collect::<Result<_, _>>()?
        };
        Ok((answers, process_cpu().saturating_sub(start)))
    }

    fn request(&self, prompt: &[TokenId], seed: u64) -> Request {
        Request {
            id: RequestId(seed),
            tokens: prompt.to_vec(),
            prompt_len: TokenCount(u32::try_from(prompt.len()).expect("a short prompt")),
            sampling: SamplingParams { temperature: self.temperature, seed, ..SamplingParams::default() },
            stop: self.stop.clone(),
            part: Part::Whole,
        }
    }
}

fn submit(engine: &EngineHandle, request: Request) -> Receiver<EngineEvent> {
    let (events, stream) = channel();
    engine.generate(request, None, Box::new(move |event| drop(events.send(event))));
    stream
}

fn answer(stream: &Receiver<EngineEvent>) -> anyhow::Result<Vec<TokenId>> {
    let mut tokens = Vec::new();
    loop {
        match stream.recv_timeout(Duration::from_secs(120))? {
            EngineEvent::Token { id, .. } => tokens.push(id),
            EngineEvent::Finished { .. } => return Ok(tokens),
            EngineEvent::Failed { message, .. } => bail!(message),
            _ => {}
        }
    }
}

/// CPU time of all threads so far. The engine that has nothing to do takes none.
fn process_cpu() -> Duration {
    Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime)).unwrap_or_default()
}

fn config(
    folder: PathBuf,
    load_format: LoadFormat,
    speculation: Option<SpeculationSettings>,
) -> EngineConfig {
    EngineConfig {
        load_format,
        max_model_len: Some(1024),
        max_num_seqs: 16,
        max_waiting: 64,
        kv_cache_memory: Some(256 << 20),
        threads: Some(1),
        speculation,
        ..EngineConfig::new("measured", Role::Hybrid, ModelSource::Folder(folder))
    }
}

/// A model folder without weights.
struct Shape(tempfile::TempDir);

impl Shape {
    /// That of Qwen2.5 0.5B with a smaller vocabulary.
    fn write() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000,
            "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "hidden_act": "silu",
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        });
        std::fs::write(folder.path().join("config.json"), config.to_string())?;
        Ok(Self(folder))
    }
}

/// The demo model's end of a message.
const END: TokenId = 4;

const COPIES: [&str; 4] = [
    "Rename Tom to Anna: Tom has a red ball. Tom lives in a small house. Mia likes Tom.",
    "Change Ben to Lily: Ben goes to the park. Ben and Max are friends. Ben found a blue box.",
    "Replace Sam with Emma: Sam is happy. Sam went to the lake and met Leo. The book belongs to Sam.",
    "Repeat: Grace has an orange map. Grace found an orange box. Grace and Tom are friends.",
];

const REPEATED: [&str; 2] = [
    "Tom has a red ball. Tom lives in a small house near the lake. Mia likes Tom and gives Tom a cake.",
    "Ben goes to the park. Ben and Max are friends. Ben found a blue box, and the book belongs to Ben.",
];

const STORIES: [&str; 4] = [
    "Tell me a story about a fox named Mia.",
    "Tell me a story about a bear named Tom.",
    "Tell me a story about a cat named Lily.",
    "What is 7 plus 5? And what is 3 times 4?",
];

//! What will be asked, and when: all of it decided before the first request is sent.

use std::fs::File;
use std::io::BufReader;
use std::time::Duration;

use anyhow::Context;

use super::arrivals::{self, arrivals};
use super::draws::Draws;
use super::flags::{DatasetName, LoadFlags, PromptFlags, Rate};
use super::prompts::{Content, Part};
use super::trace::{self, HASH_BLOCK, Trace};

/// A request to come.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Planned {
    /// From the start of the run.
    pub(super) at: Duration,
    pub(super) parts: Vec<Part>,
    pub(super) output_tokens: u32,
}

/// All of them, with words for the report.
#[derive(Clone, Debug)]
pub(super) struct Workload {
    /// In the order of their times.
    pub(super) requests: Vec<Planned>,
    /// What is asked.
    pub(super) prompts: String,
    /// When.
    pub(super) arrivals: String,
    /// What one should know of it.
    pub(super) notes: Vec<String>,
}

impl Planned {
    /// Tokens of the prompt.
    pub(super) fn input_tokens(&self) -> u32 {
        self.parts.iter().map(|part| part.tokens).sum()
    }
}

impl Workload {
    /// Plans it.
    ///
    /// # Errors
    ///
    /// When the trace cannot be read.
    pub(super) fn plan(load: &LoadFlags, prompts: &PromptFlags) -> anyhow::Result<Self> {
        let rate = load.request_rate;
        let mut workload = match prompts.dataset_name {
            DatasetName::Random => random(load, prompts),
            DatasetName::Sonnet => sonnet(load, prompts),
            DatasetName::Trace => from_trace(load, prompts)?,
        };
        if prompts.dataset_name != DatasetName::Trace || rate.is_some() {
            let rate = rate.unwrap_or(Rate(f64::INFINITY));
            let times = arrivals(workload.requests.len(), rate, load.burstiness, load.seed);
            workload.requests.iter_mut().zip(times).for_each(|(request, at)| request.at = at);
            workload.arrivals = arrivals::describe(rate, load.burstiness);
        }
        Ok(workload)
    }
}

fn random(load: &LoadFlags, prompts: &PromptFlags) -> Workload {
    let mut draws = Draws::new(load.seed, LENGTHS);
    let prefix = prompts.random_prefix_len;
    let mut length = |around: u32| {
        let share = 1.0 + prompts.random_range_ratio * (2.0 * draws.unit() - 1.0);
        ((f64::from(around) * share).round() as u32).max(1)
    };
    let requests = (0..u64::from(load.num_prompts)).map(|index| {
        let input = length(prompts.random_input_len);
        let parts = beginning_alike(prefix, Part { content: Content::Own(index), tokens: input });
        Planned { at: Duration::ZERO, parts, output_tokens: length(prompts.random_output_len) }
    });
    let requests = requests.collect();
    let spread = match prompts.random_range_ratio {
        0.0 => String::new(),
        ratio => format!(", each ± {:.0} %", ratio * 100.0),
    };
    let shared = if prefix == 0 { String::new() } else { format!("{prefix} shared + ") };
    let (input, output) = (prompts.random_input_len, prompts.random_output_len);
    let prompts = format!("random, {shared}{input} → {output} tokens{spread}");
    Workload { requests, prompts, arrivals: String::new(), notes: Vec::new() }
}

fn sonnet(load: &LoadFlags, prompts: &PromptFlags) -> Workload {
    let (input, output, prefix) = (
        prompts.sonnet_input_len,
        prompts.sonnet_output_len,
        prompts.sonnet_prefix_len.min(prompts.sonnet_input_len),
    );
    let requests = (0..u64::from(load.num_prompts)).map(|index| {
        let own = Part { content: Content::Own(index), tokens: input - prefix };
        Planned { at: Duration::ZERO, parts: beginning_alike(prefix, own), output_tokens: output }
    });
    let requests = requests.collect();
    let prompts = format!("verses, {input} → {output} tokens, {prefix} shared");
    Workload { requests, prompts, arrivals: String::new(), notes: Vec::new() }
}

fn beginning_alike(prefix: u32, own: Part) -> Vec<Part> {
    let parts = [Part { content: Content::Shared, tokens: prefix }, own];
    parts.into_iter().filter(|part| 0 < part.tokens).collect()
}

fn from_trace(load: &LoadFlags, prompts: &PromptFlags) -> anyhow::Result<Workload> {
    let path = prompts.dataset_path.as_ref().context("--dataset-name trace needs --dataset-path")?;
    let named = || format!("trace {}", path.display());
    let file = File::open(path).with_context(named)?;
    let trace = trace::read(BufReader::new(file), prompts.trace_format, load.num_prompts as usize);
    let trace = trace.with_context(named)?;
    let scale = prompts.trace_length_scale;
    let mut notes = Vec::new();
    if 0 < trace.unanswered {
        notes.push(format!("{} requests of the trace got no answer and are left out", trace.unanswered));
    }
    let file_name =
        path.file_name().map_or_else(|| path.display().to_string(), |name| name.display().to_string());
    let scaled = if scale == 1.0 { String::new() } else { format!(", lengths × {scale}") };
    let arrivals = match prompts.trace_speed {
        1.0 => "as in the trace".to_owned(),
        speed => format!("as in the trace, {speed} times as fast"),
    };
    let prompts_text = format!("trace {file_name}{scaled}");
    let requests = planned(&trace, scale, prompts.trace_speed);
    Ok(Workload { requests, prompts: prompts_text, arrivals, notes })
}

/// The requests of a trace, with lengths times `scale`, `speed` times as fast.
fn planned(trace: &Trace, scale: f64, speed: f64) -> Vec<Planned> {
    let scaled = |tokens: u32| ((f64::from(tokens) * scale).round() as u32).max(1);
    let block = scaled(HASH_BLOCK);
    let requests = (0..).zip(&trace.requests).map(|(index, request)| {
        let input = scaled(request.input_tokens);
        let mut left = input;
        let mut parts = Vec::with_capacity(request.hash_ids.len());
        for &hash in &request.hash_ids {
            let tokens = left.min(block);
            left -= tokens;
            parts.push(Part { content: Content::Hashed(hash), tokens });
        }
        // What rounding left over, or all of it where the trace has no hashes.
        parts.push(Part { content: Content::Own(index), tokens: left });
        parts.retain(|part| 0 < part.tokens);
        Planned { at: request.at.div_f64(speed), parts, output_tokens: scaled(request.output_tokens) }
    });
    requests.collect()
}

/// Keeps lengths apart from other uses of a seed.
const LENGTHS: u64 = 6;

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::bench::serve::flags::ServeBenchFlags;

    #[derive(Parser)]
    struct Typed {
        #[command(flatten)]
        flags: ServeBenchFlags,
    }

    fn plan(arguments: &str) -> anyhow::Result<Workload> {
        let flags = Typed::parse_from(std::iter::once("bench").chain(arguments.split_whitespace())).flags;
        Workload::plan(&flags.load, &flags.prompts)
    }

    fn lengths(workload: &Workload) -> Vec<(u32, u32)> {
        workload.requests.iter().map(|one| (one.input_tokens(), one.output_tokens)).collect()
    }

    #[test]
    fn random_lengths_are_in_their_range() {
        let fixed = plan("--num-prompts 3 --random-input-len 10 --random-output-len 4 --random-prefix-len 5")
            .unwrap();
        assert_eq!(lengths(&fixed), [(15, 4); 3]);
        assert!(fixed.requests.iter().all(|one| one.at == Duration::ZERO));
        let spread =
            plan("--num-prompts 2000 --random-input-len 100 --random-output-len 20 --random-range-ratio 0.5");
        let spread = lengths(&spread.unwrap());
        let inputs = || spread.iter().map(|(input, _)| *input);
        assert_eq!((inputs().min(), inputs().max()), (Some(50), Some(150)));
        assert!(spread.iter().all(|(_, output)| (10..=30).contains(output)));
    }

    #[test]
    fn verses_share_their_prefix() {
        let workload =
            plan("--dataset-name sonnet --num-prompts 2 --sonnet-input-len 30 --sonnet-prefix-len 20");
        let workload = workload.unwrap();
        assert_eq!(lengths(&workload), [(30, 150); 2]);
        assert_eq!(workload.requests[0].parts[0], workload.requests[1].parts[0]);
        assert_ne!(workload.requests[0].parts[1], workload.requests[1].parts[1]);
        let all_shared = plan("--dataset-name sonnet --num-prompts 1 --sonnet-input-len 30").unwrap();
        assert_eq!(lengths(&all_shared), [(30, 150)]);
    }

    #[test]
    fn a_trace_is_replayed_scaled_and_sped_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.jsonl");
        let lines = "{\"timestamp\": 0, \"input_length\": 1000, \"output_length\": 9, \"hash_ids\": [1, 2]}\n\
                     {\"timestamp\": 4000, \"input_length\": 600, \"output_length\": 1, \"hash_ids\": [1, 3]}\n";
        std::fs::write(&path, lines).unwrap();
        let trace = format!("--dataset-name trace --dataset-path {}", path.display());
        let plain = plan(&trace).unwrap();
        assert_eq!(lengths(&plain), [(1000, 9), (600, 1)]);
        assert_eq!(plain.requests[1].at, Duration::from_secs(4));
        assert_eq!(plain.requests[0].parts[0], plain.requests[1].parts[0], "the shared block");
        let small = plan(&format!("{trace} --trace-length-scale 0.25 --trace-speed 8")).unwrap();
        assert_eq!(lengths(&small), [(250, 2), (150, 1)]);
        assert_eq!(small.requests[1].at, Duration::from_millis(500));
        assert_eq!(small.requests[0].parts[0], Part { content: Content::Hashed(1), tokens: 128 });
        let paced = plan(&format!("{trace} --request-rate 2 --burstiness inf")).unwrap();
        assert_eq!(paced.requests[1].at, Duration::from_millis(500));
        let missing = plan("--dataset-name trace --dataset-path /no/such/trace").unwrap_err();
        assert!(format!("{missing:#}").contains("/no/such/trace"), "{missing:#}");
    }
}

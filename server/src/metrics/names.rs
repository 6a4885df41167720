//! Every metric's name, help text and buckets.

use metrics::{describe_counter, describe_gauge, describe_histogram};

macro_rules! metric_names {
    ($($kind:ident $constant:ident = $name:literal, $help:literal;)*) => {
        $(#[doc = $help] pub(super) const $constant: &str = $name;)*

        /// Tells the current recorder what each metric means.
        pub(super) fn describe() {
            $($kind!($name, $help);)*
        }
    };
}

metric_names! {
    describe_gauge RUNNING = "vllm:num_requests_running", "Sequences that compute.";
    describe_gauge WAITING = "vllm:num_requests_waiting", "Requests that wait for a place.";
    describe_gauge CACHE_USAGE = "vllm:kv_cache_usage_perc", "Share of KV blocks in use, 1 for all.";
    describe_gauge CACHE_CONFIG = "vllm:cache_config_info", "How the KV cache is made.";
    describe_counter PREFIX_QUERIES = "vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.";
    describe_counter PREFIX_HITS = "vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.";
    describe_counter PREEMPTIONS = "vllm:num_preemptions_total", "Sequences that lost their blocks and were computed again.";
    describe_counter PROMPT_TOKENS = "vllm:prompt_tokens_total", "Prompt tokens of answered requests.";
    describe_counter GENERATION_TOKENS = "vllm:generation_tokens_total", "Output tokens.";
    describe_counter REQUEST_SUCCESS = "vllm:request_success_total", "Sequences that ended, by reason.";
    describe_histogram REQUEST_PROMPT_TOKENS = "vllm:request_prompt_tokens", "Prompt tokens of a sequence.";
    describe_histogram REQUEST_GENERATION_TOKENS = "vllm:request_generation_tokens", "Output tokens of a sequence.";
    describe_histogram ITERATION_TOKENS = "vllm:iteration_tokens_total", "Tokens of one forward pass.";
    describe_histogram TIME_TO_FIRST_TOKEN = "vllm:time_to_first_token_seconds", "From arrival to the first token.";
    describe_histogram INTER_TOKEN_LATENCY = "vllm:inter_token_latency_seconds", "Between two tokens of a sequence.";
    describe_histogram E2E_LATENCY = "vllm:e2e_request_latency_seconds", "From arrival to the last token.";
    describe_histogram QUEUE_TIME = "vllm:request_queue_time_seconds", "From arrival until a worker began to compute.";
    describe_histogram PREFILL_TIME = "vllm:request_prefill_time_seconds", "From a worker's beginning to the first token.";
    describe_histogram DECODE_TIME = "vllm:request_decode_time_seconds", "From the first to the last token.";
    describe_histogram INFERENCE_TIME = "vllm:request_inference_time_seconds", "From a worker's beginning to the last token.";
    describe_histogram PARAMS_N = "vllm:request_params_n", "Answers asked for in a request.";
    describe_histogram PARAMS_MAX_TOKENS = "vllm:request_params_max_tokens", "Output tokens allowed for a sequence.";

    describe_counter SPECULATION_DRAFTS = "vllm:spec_decode_num_drafts_total", "Drafts of guessed tokens that were verified, one for each sequence and step.";
    describe_counter SPECULATION_DRAFTED = "vllm:spec_decode_num_draft_tokens_total", "Guessed tokens that were verified.";
    describe_counter SPECULATION_ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total", "Guessed tokens that were right: each saved a step.";
    describe_counter SPECULATION_ACCEPTED_AT = "vllm:spec_decode_num_accepted_tokens_per_pos_total", "Guessed tokens that were right, by place in the draft.";
    describe_counter SPECULATION_HELD_BACK = "tidemill_spec_decode_held_back_total", "Drafts that could have been made, but would not have paid.";

    describe_gauge WORKER_UP = "tidemill_worker_up", "1 while the worker answers, 0 while it is gone.";
    describe_gauge WORKER_RANKS = "tidemill_worker_tensor_parallel_size", "Ranks that compute together in a worker.";
    describe_counter WORKER_RESTARTS = "tidemill_worker_restarts_total", "Starts of a worker after its death.";
    describe_gauge BLOCKS = "tidemill_blocks", "KV blocks by state; the sum over states never changes.";
    describe_counter STEPS = "tidemill_steps_total", "Forward passes.";
    describe_counter OVERLAPPED_STEPS = "tidemill_overlapped_steps_total",
        "Forward passes that a GPU was asked for while it computed the one before.";
    describe_counter COMPUTED_PROMPT_TOKENS = "tidemill_computed_prompt_tokens_total", "Prompt tokens computed by a worker.";
    describe_counter HANDOFFS = "tidemill_handoff_total", "Handoffs completed, by sender.";
    describe_counter HANDOFF_BYTES = "tidemill_handoff_bytes_total", "Bytes written to peers.";
    describe_counter HANDOFF_WRITES = "tidemill_handoff_writes_total", "Writes posted to peers.";
    describe_counter HANDOFF_FAILURES = "tidemill_handoff_failures_total", "Handoffs that failed, as sender or receiver.";
    describe_counter HANDOFF_REFUSALS = "tidemill_handoff_refusals_total", "Commits refused because epoch or digest did not match.";
    describe_counter HANDOFF_IN_PLACE = "tidemill_handoff_in_place_total", "Handoffs that moved no byte.";
    describe_gauge GRANTED_BYTES = "tidemill_handoff_granted_bytes", "Bytes that prefill workers may have on their way to a worker over a network.";
    describe_gauge WAITING_BYTES = "tidemill_handoff_waiting_bytes", "Bytes that prefill workers would send to a worker, and that wait for its leave.";
    describe_gauge WAITING_HANDOFFS = "tidemill_handoff_waiting", "Handoffs whose bytes wait for a worker's leave.";
    describe_histogram HEAD_START = "tidemill_handoff_head_start_seconds", "From the end of a prompt until its first token was known: what can be done ahead for a handoff has that long.";
    describe_histogram HANDOFF_DURATION = "tidemill_handoff_duration_seconds", "From the end of prefill to adoption.";
    describe_histogram RECOVERY = "tidemill_recovery_seconds", "From the first sign that a worker or handoff failed until its request was with others.";
    describe_gauge LINK_SPEED = "tidemill_link_bytes_per_second", "Speed of the way for KV cache between two workers, as a probe measured it; zero when there is no such way now.";
    describe_gauge DEVICE_WAY = "tidemill_link_device_way", "How handoffs leave a worker's device for a peer, and reach it from there: one for the way that is taken.";
    describe_counter FALLBACKS = "tidemill_fallbacks_total", "Things done in a worse way than intended, by reason.";
    describe_counter REFUSALS = "tidemill_refusals_total", "Requests refused before they reached a worker, by reason.";
}

/// Names of samples in the worker protocol, and the histograms they go to.
pub(super) const SAMPLES: [(&str, &str); 3] = [
    ("handoff_head_start_seconds", HEAD_START),
    ("handoff_seconds", HANDOFF_DURATION),
    ("iteration_tokens", ITERATION_TOKENS),
];

/// Buckets of each histogram; one that is not listed would become a summary, which cannot be added up.
pub(super) const BUCKETS: &[(&str, &[f64])] = &[
    (REQUEST_PROMPT_TOKENS, TOKENS),
    (REQUEST_GENERATION_TOKENS, TOKENS),
    (PARAMS_MAX_TOKENS, TOKENS),
    (PARAMS_N, &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]),
    (ITERATION_TOKENS, STEP_TOKENS),
    (TIME_TO_FIRST_TOKEN, SHORT_SECONDS),
    (INTER_TOKEN_LATENCY, SHORT_SECONDS),
    (HEAD_START, TINY_SECONDS),
    (HANDOFF_DURATION, SHORT_SECONDS),
    (RECOVERY, SHORT_SECONDS),
    (E2E_LATENCY, LONG_SECONDS),
    (QUEUE_TIME, LONG_SECONDS),
    (PREFILL_TIME, LONG_SECONDS),
    (DECODE_TIME, LONG_SECONDS),
    (INFERENCE_TIME, LONG_SECONDS),
];

const TOKENS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6];
const STEP_TOKENS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const TINY_SECONDS: &[f64] =
    &[2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0];
const SHORT_SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
const LONG_SECONDS: &[f64] = &[
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
];

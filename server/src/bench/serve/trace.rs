//! Traces of real traffic: when requests came, how long they and their answers were, and which began alike.
//!
//! Mooncake (FAST'25): a JSON object a line, `timestamp` in ms, `input_length`, `output_length`, `hash_ids` of blocks
//! of 512 tokens; equal ids are equal blocks. Azure LLM inference 2023 and 2024: CSV with `TIMESTAMP`,
//! `ContextTokens`, `GeneratedTokens`. BurstGPT: CSV with `Timestamp` in s, `Request tokens`, `Response tokens`.

use std::io::BufRead;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use serde::Deserialize;

use super::flags::TraceFormat;

/// A request of a trace.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct TraceRequest {
    /// From the first request of the file on.
    pub(super) at: Duration,
    pub(super) input_tokens: u32,
    pub(super) output_tokens: u32,
    /// One for each block of [`HASH_BLOCK`] input tokens, the last of which may be cut; empty where the trace does not
    /// say.
    pub(super) hash_ids: Vec<u64>,
}

/// What was read.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Trace {
    /// In the order of their times.
    pub(super) requests: Vec<TraceRequest>,
    /// Lines of requests that got no answer, which are left out.
    pub(super) unanswered: usize,
}

/// Tokens that a hash of Mooncake's stands for.
pub(super) const HASH_BLOCK: u32 = 512;

/// Reads at most `limit` requests.
///
/// # Errors
///
/// Name the line that is no request, and what is wrong with it.
pub(super) fn read(input: impl BufRead, format: Option<TraceFormat>, limit: usize) -> anyhow::Result<Trace> {
    let mut lines = (1..).zip(input.lines()).filter_map(|(number, line)| match line {
        Ok(line) if line.trim().is_empty() => None,
        line => Some((number, line)),
    });
    let mut next = || match lines.next() {
        Some((number, line)) => {
            let line = line.with_context(|| format!("line {number} cannot be read"))?;
            // Some tools begin a CSV with a byte order mark.
            Ok::<_, anyhow::Error>(Some((number, line.trim_start_matches('\u{feff}').to_owned())))
        }
        None => Ok(None),
    };
    let first = next()?.context("it is empty")?;
    let mut reader = Reader::new(&first.1, format)?;
    let mut pending = reader.first_line_is_data().then_some(first);
    let mut trace = Trace::default();
    while trace.requests.len() < limit {
        let Some((number, line)) = (match pending.take() {
            Some(first) => Some(first),
            None => next()?,
        }) else {
            break;
        };
        let at_line = || format!("line {number}: `{}`", shortened(&line));
        match reader.request(&line).with_context(at_line)? {
            Some(request) => trace.requests.push(request),
            None => trace.unanswered += 1,
        }
    }
    ensure!(!trace.requests.is_empty(), "it has no request");
    // The sort is stable: requests of one time stay in the order of the file.
    trace.requests.sort_by_key(|request| request.at);
    let first = trace.requests[0].at;
    trace.requests.iter_mut().for_each(|request| request.at -= first);
    Ok(trace)
}

/// Understands the lines of one format.
enum Reader {
    Mooncake,
    Csv {
        columns: Columns,
        /// How a time is written.
        time: fn(&str) -> anyhow::Result<f64>,
        /// The first time, from which the others are counted: dates are far from zero.
        begin: Option<f64>,
    },
}

/// Positions of the columns that matter.
struct Columns {
    time: usize,
    input: usize,
    output: usize,
}

#[derive(Deserialize)]
struct MooncakeLine {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

impl Reader {
    fn new(first: &str, format: Option<TraceFormat>) -> anyhow::Result<Self> {
        let seen = if first.trim_start().starts_with('{') {
            Some(TraceFormat::Mooncake)
        } else if Columns::find(first, AZURE_COLUMNS).is_ok() {
            Some(TraceFormat::Azure)
        } else if Columns::find(first, BURSTGPT_COLUMNS).is_ok() {
            Some(TraceFormat::Burstgpt)
        } else {
            None
        };
        let format = format.or(seen).ok_or_else(|| {
            let line = shortened(first);
            anyhow!("line 1: `{line}` is neither Mooncake's JSON nor a header of Azure's or BurstGPT's CSV")
        })?;
        let csv = |names, time| -> anyhow::Result<Self> {
            let columns = Columns::find(first, names).context("line 1")?;
            Ok(Self::Csv { columns, time, begin: None })
        };
        match format {
            TraceFormat::Mooncake => Ok(Self::Mooncake),
            TraceFormat::Azure => csv(AZURE_COLUMNS, date_seconds),
            TraceFormat::Burstgpt => csv(BURSTGPT_COLUMNS, plain_seconds),
        }
    }

    const fn first_line_is_data(&self) -> bool {
        matches!(self, Self::Mooncake)
    }

    /// `None` for a request that got no answer.
    fn request(&mut self, line: &str) -> anyhow::Result<Option<TraceRequest>> {
        let (seconds, input_tokens, output_tokens, hash_ids) = match self {
            Self::Mooncake => {
                let line: MooncakeLine = serde_json::from_str(line)?;
                let blocks = line.input_length.div_ceil(HASH_BLOCK) as usize;
                ensure!(
                    line.hash_ids.is_empty() || line.hash_ids.len() == blocks,
                    "{} tokens are {blocks} blocks of {HASH_BLOCK}, but it has {} hash_ids",
                    line.input_length,
                    line.hash_ids.len()
                );
                (line.timestamp / 1000.0, line.input_length, line.output_length, line.hash_ids)
            }
            Self::Csv { columns, time, begin } => {
                let fields: Vec<&str> = line.split(',').map(str::trim).collect();
                let field = |at: usize| fields.get(at).copied().context("it has too few fields");
                let tokens = |at: usize| -> anyhow::Result<u32> {
                    let text = field(at)?;
                    text.parse().map_err(|_| anyhow!("`{text}` is no number of tokens"))
                };
                let now = time(field(columns.time)?)?;
                let begin = *begin.get_or_insert(now);
                (now - begin, tokens(columns.input)?, tokens(columns.output)?, Vec::new())
            }
        };
        if input_tokens == 0 || output_tokens == 0 {
            return Ok(None);
        }
        ensure!(seconds.is_finite() && seconds.abs() < LONGEST_S, "its time is out of range");
        // A file that is not in order may have a time before that of its first line: all are moved by as much.
        let at = Duration::from_secs_f64(seconds + LONGEST_S);
        Ok(Some(TraceRequest { at, input_tokens, output_tokens, hash_ids }))
    }
}

impl Columns {
    fn find(header: &str, [time, input, output]: [&str; 3]) -> anyhow::Result<Self> {
        let names: Vec<&str> = header.split(',').map(|name| name.trim().trim_matches('"')).collect();
        let position = |wanted: &str| {
            let found = names.iter().position(|name| name.eq_ignore_ascii_case(wanted));
            found.with_context(|| format!("`{}` has no column `{wanted}`", shortened(header)))
        };
        Ok(Self { time: position(time)?, input: position(input)?, output: position(output)? })
    }
}

fn plain_seconds(text: &str) -> anyhow::Result<f64> {
    text.parse().map_err(|_| anyhow!("`{text}` is no time in seconds"))
}

/// Seconds since 1970 of a date and time, with or without an offset. Without one it is taken as UTC: only differences
/// matter.
fn date_seconds(text: &str) -> anyhow::Result<f64> {
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return Ok(time.as_duration().as_secs_f64());
    }
    let Ok(time) = text.parse::<jiff::civil::DateTime>() else { bail!("`{text}` is no date and time") };
    Ok(time.to_zoned(jiff::tz::TimeZone::UTC)?.timestamp().as_duration().as_secs_f64())
}

/// The beginning of a line, for messages.
fn shortened(line: &str) -> String {
    match line.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}

const AZURE_COLUMNS: [&str; 3] = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"];
const BURSTGPT_COLUMNS: [&str; 3] = ["Timestamp", "Request tokens", "Response tokens"];
/// No trace is longer than some thirty years.
const LONGEST_S: f64 = 1e9;

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> anyhow::Result<Trace> {
        read(text.as_bytes(), None, 100)
    }

    fn request(at_ms: u64, input_tokens: u32, output_tokens: u32, hash_ids: &[u64]) -> TraceRequest {
        TraceRequest {
            at: Duration::from_millis(at_ms),
            input_tokens,
            output_tokens,
            hash_ids: hash_ids.into(),
        }
    }

    /// Times go through floats: a microsecond is kept.
    fn rounded(trace: Trace) -> Vec<TraceRequest> {
        let round = |at: Duration| Duration::from_millis((at.as_secs_f64() * 1000.0).round() as u64);
        trace.requests.into_iter().map(|one| TraceRequest { at: round(one.at), ..one }).collect()
    }

    #[test]
    fn each_format_is_seen_and_read() {
        let mooncake = "\
{\"timestamp\": 1000, \"input_length\": 513, \"output_length\": 5, \"hash_ids\": [0, 7]}

{\"timestamp\": 4000, \"input_length\": 512, \"output_length\": 6, \"hash_ids\": [0]}
{\"timestamp\": 2500, \"input_length\": 3, \"output_length\": 7}
";
        let azure = "\u{feff}TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:15:46.6805900,374,44\r
2023-11-16 18:15:50.9951690,396,109\r
";
        let azure_2024 = "\
TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.250000+00:00,10,4
2024-05-10 00:01:00.500000+00:00,20,5
";
        let burstgpt = "\
Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,1,2,ChatGPT,472,18,490,Conversation log
45.5,1,2,GPT-4,3,0,3,Conversation log
46.5,2,3,GPT-4,7,9,16,API log
";
        #[rustfmt::skip]
        let rows = [
            ("mooncake",   mooncake,   vec![request(0, 513, 5, &[0, 7]), request(1500, 3, 7, &[]), request(3000, 512, 6, &[0])], 0),
            ("azure",      azure,      vec![request(0, 374, 44, &[]), request(4315, 396, 109, &[])],                             0),
            ("azure 2024", azure_2024, vec![request(0, 10, 4, &[]), request(60_250, 20, 5, &[])],                                0),
            ("burstgpt",   burstgpt,   vec![request(0, 472, 18, &[]), request(41_500, 7, 9, &[])],                               1),
        ];
        for (name, text, requests, unanswered) in rows {
            let trace = parsed(text).unwrap_or_else(|error| panic!("{name}: {error:#}"));
            assert_eq!(trace.unanswered, unanswered, "{name}");
            assert_eq!(rounded(trace), requests, "{name}");
        }
    }

    #[test]
    fn no_more_is_read_than_wanted() {
        let text = "{\"timestamp\": 0, \"input_length\": 1, \"output_length\": 1}\n\
                    {\"timestamp\": 1, \"input_length\": 2, \"output_length\": 2}\nnonsense\n";
        let trace = read(text.as_bytes(), None, 2).expect("the third line is not looked at");
        assert_eq!(trace.requests.len(), 2);
    }

    #[test]
    fn a_bad_line_is_named() {
        let mooncake = "{\"timestamp\": 0, \"input_length\": 9, \"output_length\": 1, \"hash_ids\": [1]}\n";
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n";
        let burst = "Timestamp,Model,Request tokens,Response tokens\n1,GPT-4,5,6\n";
        #[rustfmt::skip]
        let rows: [(&str, String, &[&str]); 14] = [
            ("empty",                 String::new(),                                        &["it is empty"]),
            ("another format",        "a,b,c\n".to_owned(),                                 &["line 1", "neither"]),
            ("a header alone",        azure.lines().next().unwrap().to_owned(),             &["no request"]),
            ("cut JSON",              format!("{mooncake}{{\"timestamp\": 1,\n"),           &["line 2", "EOF"]),
            ("a missing field",       format!("{mooncake}{{\"timestamp\": 1}}\n"),          &["line 2", "input_length"]),
            ("a negative length",     format!("{mooncake}\n{}", mooncake.replace(": 9", ": -9")), &["line 3", "-9"]),
            ("a block too many",      mooncake.replace("[1]", "[1, 2]"),                    &["line 1", "1 blocks of 512", "2 hash_ids"]),
            ("a field too few",       format!("{azure}2023-11-16 18:15:46.68,5\n"),         &["line 3", "too few"]),
            ("no date",               format!("{azure}yesterday,5,5\n"),                    &["line 3", "`yesterday`"]),
            ("half a token",          format!("{azure}2023-11-16 18:15:46.68,5.5,5\n"),     &["line 3", "`5.5`"]),
            ("no such day",           format!("{azure}2023-02-30 18:15:46.68,5,5\n"),       &["line 3", "2023-02-30"]),
            ("no time",               format!("{burst}soon,GPT-4,5,5\n"),                   &["line 3", "`soon`"]),
            ("no tokens",             format!("{burst}1,GPT-4,,5\n"),                       &["line 3", "``"]),
            ("a time without bounds", format!("{burst}1e300,GPT-4,5,5\n"),                  &["line 3", "out of range"]),
        ];
        for (name, text, expected) in rows {
            let error = format!("{:#}", parsed(&text).expect_err(name));
            for part in expected {
                assert!(error.contains(part), "{name}: `{part}` is missing in `{error}`");
            }
        }
    }

    #[test]
    fn a_format_that_was_asked_for_must_fit() {
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n";
        let error = read(azure.as_bytes(), Some(TraceFormat::Burstgpt), 9).expect_err("it is Azure's");
        assert!(format!("{error:#}").contains("Request tokens"), "{error:#}");
    }
}

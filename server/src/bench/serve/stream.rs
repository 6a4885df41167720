//! Reads the events of one answer and notes when they came.

use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use super::outcome::{Answer, Failure, FailureKind, Usage};
use crate::event_lines::EventLines;

/// An answer as far as it came.
#[derive(Debug, Default)]
pub(super) struct Listener {
    lines: EventLines,
    first: Option<Duration>,
    last: Duration,
    last_token: Duration,
    gaps: Vec<Duration>,
    usage: Option<Usage>,
    has_ended: bool,
    /// The beginning of what came, for when it is no event stream.
    beginning: Vec<u8>,
}

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<EventUsage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Delta {
    role: Option<String>,
    content: Option<String>,
    #[serde(alias = "reasoning")]
    reasoning_content: Option<String>,
}

#[derive(Deserialize)]
struct EventUsage {
    prompt_tokens: u32,
    #[serde(default)]
    completion_tokens: u32,
}

impl Listener {
    /// Takes bytes that came `now`, counted from when the request was sent.
    pub(super) fn hear(&mut self, bytes: &[u8], now: Duration) -> Result<(), Failure> {
        if self.beginning.len() < BEGINNING {
            self.beginning.extend(bytes.iter().take(BEGINNING - self.beginning.len()));
        }
        for data in self.lines.push(bytes) {
            if data == "[DONE]" {
                self.has_ended = true;
                continue;
            }
            let event: Event = serde_json::from_str(&data)
                .map_err(|error| Failure::new(FailureKind::Malformed, format!("{error} in an event")))?;
            if let Some(error) = event.error.filter(|error| !error.is_null()) {
                return Err(Failure::new(FailureKind::Reported, message(&error)));
            }
            if let Some(EventUsage { prompt_tokens, completion_tokens }) = event.usage {
                self.usage = Some(Usage { prompt_tokens, completion_tokens });
            }
            if let Some(choice) = event.choices.first() {
                self.hear_choice(choice, now);
            }
        }
        Ok(())
    }

    fn hear_choice(&mut self, choice: &Choice, now: Duration) {
        let ends = choice.finish_reason.is_some();
        if choice.has_token() || (ends && self.first.is_none()) {
            match self.first {
                None => self.first = Some(now),
                Some(_) => self.gaps.push(now - self.last_token),
            }
            self.last_token = now;
        }
        self.last = now;
        self.has_ended |= ends;
    }

    /// The whole answer, once the connection says that nothing more comes.
    pub(super) fn finish(self) -> Result<Answer, Failure> {
        match self.first {
            Some(first) if self.has_ended => {
                Ok(Answer { first, gaps: self.gaps, last: self.last, usage: self.usage })
            }
            Some(_) => {
                let message =
                    format!("it ended after {} events without a finish_reason", self.gaps.len() + 1);
                Err(Failure::new(FailureKind::Cut, message))
            }
            None if self.has_ended => Err(Failure::new(FailureKind::Malformed, "an answer without a token")),
            None if self.beginning.is_empty() => {
                Err(Failure::new(FailureKind::Cut, "it ended before any event"))
            }
            None => {
                let beginning = String::from_utf8_lossy(&self.beginning);
                Err(Failure::new(FailureKind::Malformed, format!("no event with a token, but `{beginning}`")))
            }
        }
    }
}

impl Choice {
    /// Whether a token came with it. One that completes no character has an empty text; the message's role, which some
    /// servers send before they compute anything, is none.
    fn has_token(&self) -> bool {
        let is_text = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        let has_text = |delta: &Delta| is_text(&delta.content) || is_text(&delta.reasoning_content);
        let goes_on = self.finish_reason.is_none();
        match (&self.text, &self.delta) {
            (Some(text), _) => !text.is_empty() || goes_on,
            (None, Some(delta)) => {
                has_text(delta) || (goes_on && delta.role.is_none() && delta.content.is_some())
            }
            (None, None) => false,
        }
    }
}

/// What an error object says.
pub(super) fn message(error: &Value) -> String {
    match error["message"].as_str().or_else(|| error.as_str()) {
        Some(message) => message.to_owned(),
        None => error.to_string(),
    }
}

/// Bytes that are kept to be shown.
const BEGINNING: usize = 120;

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets each of `events` come a millisecond after the one before it.
    fn heard(events: &[&str]) -> Result<Answer, Failure> {
        let mut listener = Listener::default();
        for (event, ms) in events.iter().zip(1..) {
            listener.hear(format!("data: {event}\n\n").as_bytes(), Duration::from_millis(ms))?;
        }
        listener.finish()
    }

    fn text(text: &str) -> String {
        format!(r#"{{"choices": [{{"text": "{text}", "finish_reason": null}}]}}"#)
    }

    fn delta(delta: &str) -> String {
        format!(r#"{{"choices": [{{"delta": {delta}, "finish_reason": null}}]}}"#)
    }

    const TEXT_END: &str = r#"{"choices": [{"text": "", "finish_reason": "length"}]}"#;
    const CHAT_END: &str = r#"{"choices": [{"delta": {}, "finish_reason": "stop"}]}"#;
    const USAGE: &str = r#"{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}"#;

    #[test]
    fn times_and_counts_are_those_of_tokens() {
        let (a, b, part) = (text("a"), text("b"), text(""));
        let (role, said, thought) = (
            delta(r#"{"role": "assistant", "content": ""}"#),
            delta(r#"{"content": "a"}"#),
            delta(r#"{"reasoning_content": "hm"}"#),
        );
        let nothing = delta(r#"{"content": ""}"#);
        type Row<'a> = (&'a str, &'a [&'a str], u64, &'a [u64], u64, u32);
        #[rustfmt::skip]
        let rows: [Row<'_>; 9] = [
            // name                                  events                              first  gaps    last  tokens
            ("completions",                          &[&a, &b, TEXT_END, "[DONE]"],          1, &[1],      3, 2),
            ("usage counts where there is one",      &[&a, &b, TEXT_END, USAGE, "[DONE]"],   1, &[1],      3, 5),
            ("a token without a whole character",    &[&part, &b, TEXT_END],                 1, &[1],      3, 2),
            ("the last token comes with the end",    &[&a, r#"{"choices": [{"text": "b", "finish_reason": "stop"}]}"#], 1, &[1], 2, 2),
            ("a role is no token",                   &[&role, &said, &said, CHAT_END],       2, &[1],      4, 2),
            ("thoughts are tokens",                  &[&role, &thought, &said, CHAT_END],    2, &[1],      4, 2),
            ("chat without a whole character",       &[&role, &nothing, &said, CHAT_END],    2, &[1],      4, 2),
            ("an answer that ends at once",          &[&role, CHAT_END],                     2, &[],       2, 1),
            ("no [DONE] is needed after a reason",   &[&a, TEXT_END],                        1, &[],       2, 1),
        ];
        for (name, events, first, gaps, last, tokens) in rows {
            let answer = heard(events).unwrap_or_else(|failure| panic!("{name}: {failure:?}"));
            let ms =
                |times: &[Duration]| times.iter().map(|time| time.as_millis() as u64).collect::<Vec<_>>();
            assert_eq!(ms(&[answer.first, answer.last]), [first, last], "{name}");
            assert_eq!((ms(&answer.gaps).as_slice(), answer.output_tokens()), (gaps, tokens), "{name}");
        }
    }

    #[test]
    fn time_per_token_is_by_tokens_not_by_events() {
        let answer = heard(&[&text("a"), &text("bcd"), TEXT_END, USAGE]).expect("it is whole");
        assert_eq!(
            answer.per_output_token(),
            Some(Duration::from_micros(500)),
            "2 ms for 4 tokens after the first"
        );
        assert_eq!(heard(&[&text("a"), TEXT_END]).expect("it is whole").per_output_token(), None);
    }

    #[test]
    fn what_is_no_whole_answer_is_a_failure_of_its_kind() {
        let a = text("a");
        #[rustfmt::skip]
        let rows: [(&str, &[&str], FailureKind, &str); 6] = [
            ("nothing at all",        &[],                                         FailureKind::Cut,       "before any event"),
            ("no end",                &[&a, &a],                                   FailureKind::Cut,       "after 2 events"),
            ("an error inside",       &[&a, r#"{"error": {"message": "lost"}}"#],  FailureKind::Reported,  "lost"),
            ("an error as text",      &[r#"{"error": "lost"}"#],                   FailureKind::Reported,  "lost"),
            ("no JSON",               &["{oops"],                                  FailureKind::Malformed, "in an event"),
            ("an end without tokens", &["[DONE]"],                                 FailureKind::Malformed, "without a token"),
        ];
        for (name, events, kind, message) in rows {
            let failure = heard(events).expect_err(name);
            assert_eq!(failure.kind, kind, "{name}: {failure:?}");
            assert!(failure.message.contains(message), "{name}: {failure:?}");
        }
        let mut page = Listener::default();
        page.hear(b"<html>Welcome</html>", Duration::ZERO).expect("no event yet");
        let failure = page.finish().expect_err("a web page");
        assert_eq!(failure.kind, FailureKind::Malformed);
        assert!(failure.message.contains("Welcome"), "{failure:?}");
    }
}

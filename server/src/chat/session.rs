//! One conversation: what was said, what the user may type besides questions, and how long answers took.

use std::io::Write;
use std::pin::pin;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::{Either, select};
use serde_json::{Value, json};

use super::ChatFlags;
use super::client::{Client, Said};

/// A conversation.
#[derive(Debug)]
pub(super) struct Session {
    client: Client,
    model: String,
    system: Option<String>,
    max_tokens: Option<u32>,
    temperature: Option<f64>,
    stats: bool,
    /// Questions and answers, oldest first.
    messages: Vec<Value>,
}

/// What a line asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// An answer.
    Ask,
    /// Nothing more.
    Listen,
    /// The end.
    Quit,
}

/// How an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// By itself.
    Complete,
    /// By the user.
    Stopped,
}

/// When an answer's text came, and how much of it.
#[derive(Debug)]
struct Times {
    asked: Instant,
    first: Option<Instant>,
    last: Instant,
    prompt_tokens: u64,
    completion_tokens: u64,
}

impl Session {
    /// A conversation that has not begun.
    pub(super) fn new(client: Client, model: String, flags: &ChatFlags) -> Self {
        Self {
            client,
            model,
            system: flags.system.clone(),
            max_tokens: flags.max_tokens,
            temperature: flags.temperature,
            stats: flags.stats,
            messages: Vec::new(),
        }
    }

    /// The model's name.
    pub(super) fn model(&self) -> &str {
        &self.model
    }

    /// Obeys a line that begins with a slash; any other is a question.
    pub(super) fn next(&mut self, line: &str, notes: &mut impl Write) -> std::io::Result<Next> {
        let line = line.trim();
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match command {
            "/help" => write!(notes, "{HELP}")?,
            "/quit" | "/exit" => return Ok(Next::Quit),
            "/reset" => {
                self.messages.clear();
                writeln!(notes, "forgotten")?;
            }
            "/system" => {
                self.system = Some(rest.trim().to_owned()).filter(|text| !text.is_empty());
                self.messages.clear();
                writeln!(
                    notes,
                    "a new conversation, {}",
                    if self.system.is_some() { "told so" } else { "told nothing" }
                )?;
            }
            "/stats" => {
                self.stats = !self.stats;
                writeln!(notes, "times are {}", if self.stats { "shown" } else { "hidden" })?;
            }
            command if command.starts_with('/') => {
                writeln!(notes, "there is no {command}; /help says what there is")?
            }
            _ => return Ok(Next::Ask),
        }
        Ok(Next::Listen)
    }

    /// Asks, and writes the answer to `out` as it comes, until it ends or `stop` does. What was said until then is
    /// remembered; after an error it is as if the question had not been asked.
    pub(super) async fn ask(
        &mut self,
        question: &str,
        stop: impl Future<Output = ()>,
        out: &mut impl Write,
        notes: &mut impl Write,
    ) -> anyhow::Result<Turn> {
        self.messages.push(json!({"role": "user", "content": question}));
        let mut answer = String::new();
        let outcome = self.stream(&mut answer, stop, out, notes).await;
        match &outcome {
            Ok(_) => self.messages.push(json!({"role": "assistant", "content": answer})),
            Err(_) => drop(self.messages.pop()),
        }
        if !answer.ends_with('\n') && !answer.is_empty() {
            writeln!(out)?;
        }
        let (turn, times) = outcome?;
        if turn == Turn::Stopped {
            writeln!(notes, "[stopped]")?;
        }
        if self.stats {
            writeln!(notes, "{}", times.line())?;
        }
        Ok(turn)
    }

    async fn stream(
        &self,
        answer: &mut String,
        stop: impl Future<Output = ()>,
        out: &mut impl Write,
        notes: &mut impl Write,
    ) -> anyhow::Result<(Turn, Times)> {
        let mut stop = pin!(stop);
        let now = Instant::now();
        let mut times = Times { asked: now, first: None, last: now, prompt_tokens: 0, completion_tokens: 0 };
        let mut said = match select(pin!(self.client.ask(self.body())), stop.as_mut()).await {
            Either::Left((said, _)) => said?,
            Either::Right(_) => return Ok((Turn::Stopped, times)),
        };
        loop {
            let next = match select(said.next(), stop.as_mut()).await {
                Either::Left((next, _)) => next,
                Either::Right(_) => return Ok((Turn::Stopped, times)),
            };
            match next.transpose()? {
                None => return Ok((Turn::Complete, times)),
                Some(Said::Text(text)) => {
                    times.text();
                    out.write_all(text.as_bytes())?;
                    out.flush()?;
                    answer.push_str(&text);
                }
                Some(Said::Ended(reason)) if reason == "length" => {
                    writeln!(notes, " [cut off at its length]")?
                }
                Some(Said::Ended(_)) => {}
                Some(Said::Usage { prompt_tokens, completion_tokens }) => {
                    (times.prompt_tokens, times.completion_tokens) = (prompt_tokens, completion_tokens);
                }
            }
        }
    }

    fn body(&self) -> Value {
        let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
        let messages: Vec<Value> = system.chain(self.messages.iter().cloned()).collect();
        let mut body = json!({"model": self.model, "messages": messages});
        if let Some(max_tokens) = self.max_tokens {
            body["max_tokens"] = json!(max_tokens);
        }
        if let Some(temperature) = self.temperature {
            body["temperature"] = json!(temperature);
        }
        body
    }
}

impl Times {
    fn text(&mut self) {
        self.last = Instant::now();
        self.first.get_or_insert(self.last);
    }

    /// The rate is that of the tokens after the first, whose time is said apart.
    fn line(&self) -> String {
        let Some(first) = self.first else { return "[no text]".to_owned() };
        let (waited, spoken) = (first - self.asked, self.last - first);
        let Self { prompt_tokens, completion_tokens, .. } = self;
        let rate = match completion_tokens.checked_sub(1) {
            Some(after_first) if 0 < after_first && Duration::ZERO < spoken => {
                format!(", then {:.1} tokens/s", after_first as f64 / spoken.as_secs_f64())
            }
            _ => String::new(),
        };
        let waited = waited.as_secs_f64();
        format!("[{prompt_tokens} tokens in, {completion_tokens} out; first after {waited:.3} s{rate}]")
    }
}

/// What [`Session::next`] obeys.
pub(super) const COMMANDS: &[&str] = &["/help", "/reset", "/system", "/stats", "/quit"];

const HELP: &str = "\
/help           this
/reset          forget the conversation
/system [TEXT]  begin another, told TEXT or nothing
/stats          show or hide how long answers take
/quit           leave, as Ctrl-D does
A line that ends in \\ goes on in the next one, and pasted lines stay together.
Tab completes a command, Ctrl-C stops an answer.
";

#[cfg(test)]
mod tests;
